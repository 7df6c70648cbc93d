"""A node that falls silent while its links stay up: who waits for it, and who does not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest
from cluster import LOST, Cluster, until

from agi.core.dht.client import DHTClient
from agi.core.dht.client.links import Remote
from agi.core.dht.client.routing import by_key
from agi.core.dht.client.silence import SILENT_S
from agi.core.dht.errors import OutcomeUnknown, Unavailable, VersionConflict, from_wire
from agi.core.dht.protocol.consensus import LOOK, MOVE_AFTER_S, WINDOW, state_of
from agi.core.dht.protocol.messages import Op, Put, RegisterPrepare, RegisterPromises, Update, UpdateReply
from agi.core.dht.types import Consistency

TIMEOUT_S = 8.0
SOON_S = 3.0
"""Far below the deadline, far above what it takes: machines that run tests may be slow."""


def key_of(i: int, cluster: Cluster) -> str:
    """A key whose operations under consensus clients send to that node."""
    return next(
        key for key in map("k{}".format, range(1000)) if by_key([key.encode()], cluster.names, None) == {f"n{i}": [0]}
    )


def silence(cluster: Cluster, i: int) -> Callable[[], None]:
    """Nothing comes from that node or reaches it any more, and no link breaks."""
    return cluster.rule(lambda src, dst, message: LOST if f"n{i}" in (src, dst) else None)


async def connected(cluster: Cluster) -> DHTClient:
    return await cluster.client(timeout=TIMEOUT_S)


async def test_a_bound_write_a_look_and_a_read_go_to_another_node() -> None:
    async with Cluster(3) as cluster:
        client = await connected(cluster)
        key = key_of(1, cluster)
        version = await client.put(key, b"1", if_absent=True)
        heard = silence(cluster, 1)
        began = time.monotonic()
        version = await client.put(key, b"2", if_version=version)
        assert await client.get(key, consistency=Consistency.LINEARIZABLE) == b"2"
        await asyncio.gather(*(client.get_many([f"x{n}" for n in range(50)]) for _ in range(6)))
        assert time.monotonic() - began < SOON_S
        heard()
        assert await client.put(key, b"3", if_version=version) > version
        assert await client.get(key) == b"3"


async def test_other_operations_go_to_another_node_a_little_later() -> None:
    async with Cluster(3) as cluster:
        client = await connected(cluster)
        key = key_of(2, cluster)
        assert await client.incr(key) == 1
        heard = silence(cluster, 2)
        began = time.monotonic()
        first = asyncio.ensure_future(client.incr(key))
        await asyncio.sleep(2 * SILENT_S)
        assert await client.incr(key, 10) == 11
        await asyncio.gather(*(client.put(f"p{n}", b"v") for n in range(9)))
        assert await first == 12
        assert await client.compare_and_set(key, b"12", b"12.") > 0
        assert time.monotonic() - began < SOON_S
        heard()
        assert await client.get(key, consistency=Consistency.LINEARIZABLE) == b"12."


@pytest.mark.parametrize("late", ["the message", "its first round"])
async def test_a_node_that_wakes_late_does_not_do_once_more_what_another_did(late: str) -> None:
    async with Cluster(3) as cluster:
        client, other = await connected(cluster), await cluster.client(host="other")
        key = key_of(0, cluster)
        assert await client.incr(key) == 1
        stopped, done = [late == "its first round"], asyncio.Event()
        cluster.node(0).coordinator.registers._forget(key.encode())  # type: ignore[union-attr]  # so that it prepares

        def rule(src: str, dst: str, message: object) -> tuple[float, ...] | None:
            if isinstance(message, UpdateReply) and src == "n0":
                done.set()
            if isinstance(message, Update) and src == "client" and dst == "n0" and not stopped[0]:
                return (2 * MOVE_AFTER_S,)
            if isinstance(message, RegisterPrepare | RegisterPromises) and "n0" in (src, dst) and stopped[0]:
                return LOST
            return LOST if src == "n0" and dst == "client" else None

        heard = cluster.rule(rule)
        assert await client.incr(key) == 2
        for _ in range(WINDOW + 1):  # so that its value has forgotten it
            await other.incr(key)
        stopped[0] = False
        async with asyncio.timeout(TIMEOUT_S):
            await done.wait()
        heard()
        assert await other.get(key, consistency=Consistency.LINEARIZABLE) == b"%d" % (WINDOW + 3)


async def test_a_node_that_wakes_late_does_not_do_what_another_refused() -> None:
    async with Cluster(3) as cluster:
        client, other = await connected(cluster), await cluster.client(host="other")
        key = key_of(0, cluster)
        await client.put(key, b"a", if_absent=True)
        done = asyncio.Event()

        def rule(src: str, dst: str, message: object) -> tuple[float, ...] | None:
            if isinstance(message, UpdateReply) and src == "n0":
                done.set()
            if isinstance(message, Update) and src == "client" and dst == "n0":
                return (2 * MOVE_AFTER_S,)
            return LOST if src == "n0" and dst == "client" else None

        heard = cluster.rule(rule)
        with pytest.raises(VersionConflict):
            await client.compare_and_set(key, b"b", b"c")
        await other.put(key, b"b")  # it would do now
        await until(done.is_set)
        heard()
        assert await other.get(key, consistency=Consistency.LINEARIZABLE) == b"b"


async def test_what_a_dead_node_had_is_found_out_from_another() -> None:
    async with Cluster(3) as cluster:
        client = await connected(cluster)
        key = key_of(1, cluster)
        assert await client.incr(key) == 1
        taken = asyncio.Event()

        def rule(src: str, dst: str, message: object) -> tuple[float, ...] | None:
            if isinstance(message, Update) and dst == "n1":
                taken.set()
                return LOST
            return None

        cluster.rule(rule)
        waiting = asyncio.ensure_future(client.incr(key))
        await taken.wait()
        await cluster.down(1, noticed=False)
        assert await waiting == 2


async def test_a_write_that_was_done_although_nobody_said_so_is_found_by_the_second_try() -> None:
    async with Cluster(3) as cluster:
        client = await connected(cluster)
        key = key_of(0, cluster)
        version = await client.put(key, b"1", if_absent=True)
        tries: list[str] = []

        def rule(src: str, dst: str, message: object) -> tuple[float, ...] | None:
            if isinstance(message, Update):
                tries.append(dst)
            return LOST if src == "n0" and dst == "client" else None

        heard = cluster.rule(rule)
        second = await client.put(key, b"2", if_version=version)
        assert len(tries) == 2 and tries[0] == "n0" != tries[1]
        entry = await client.get_entry(key)
        assert entry is not None and (entry.value, entry.version) == (b"2", second)
        with pytest.raises(VersionConflict):
            await client.put(key, b"3", if_version=version)
        heard()


async def test_a_second_try_that_cannot_know_says_so() -> None:
    async with Cluster(3) as cluster:
        client, other = await connected(cluster), await cluster.client(host="other")
        key = key_of(0, cluster)
        version = await client.put(key, b"1", if_absent=True)

        def rule(src: str, dst: str, message: object) -> tuple[float, ...] | None:
            if isinstance(message, Update) and src == "client" and dst != "n0":
                return (1.5,)  # after all that others do
            return LOST if src == "n0" and dst == "client" else None

        heard = cluster.rule(rule)
        waiting = asyncio.ensure_future(client.put(key, b"2", if_version=version))
        await until(lambda: any(record is not None and state_of(record).value == b"2" for record in cluster.held(key)))
        for _ in range(WINDOW):
            await other.update(key, lambda value: b"other")
        with pytest.raises(OutcomeUnknown, match="16 later operations"):
            await waiting
        heard()


@pytest.mark.parametrize("way", ["fenced get", "update"])
async def test_a_look_has_no_outcome_that_later_operations_could_hide(way: str) -> None:
    async with Cluster(3) as cluster:
        client = await connected(cluster)
        key = key_of(1, cluster)
        lock = await client.try_lock("l", ttl=60)
        assert lock is not None
        for _ in range(WINDOW + 1):
            await client.incr(key)
        silence(cluster, 1)
        if way == "update":
            assert await client.update(key, lambda value: (value or b"") + b"!") == b"%d!" % (WINDOW + 1)
        else:
            assert await client.get(key, fence=lock) == b"%d" % (WINDOW + 1)


@pytest.mark.parametrize("how", ["update", "get", "exists", "scan"])
@pytest.mark.parametrize("gone", ["silent", "dead"])
async def test_a_look_that_nobody_answers_has_written_nothing_and_says_so(how: str, gone: str) -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client(timeout=1.5)
        key = key_of(1, cluster)
        await client.put(key, b"1", if_absent=True)
        for i in (1, 2):
            if gone == "silent":
                silence(cluster, i)
            else:
                await cluster.down(i)
        with pytest.raises(Unavailable) as caught:
            if how == "update":
                await client.update(key, lambda value: b"2")
            elif how == "get":
                await client.get(key, consistency=Consistency.LINEARIZABLE)
            elif how == "exists":
                await client.exists(key, consistency=Consistency.LINEARIZABLE)
            else:
                await client.scan("k", consistency=Consistency.LINEARIZABLE)
        assert "may" not in caught.value.message, caught.value.message


@pytest.mark.parametrize("fence", [None, (b"lock:l", 7)])
async def test_a_second_try_of_a_look_writes_nothing_either_but_for_a_fence(fence: tuple[bytes, int] | None) -> None:
    async with Cluster(3) as cluster:
        cluster.rule(lambda src, dst, message: LOST if isinstance(message, RegisterPromises) else None)
        op = Op(bytes(16), b"k", LOOK, fence=fence, retry=True)
        reply = await (await cluster.wire(0)).ask(Update(0, 300, [op]))
        assert type(from_wire(*reply.results[0].error)) is (Unavailable if fence is None else OutcomeUnknown)


async def test_an_unknown_outcome_is_found_out_elsewhere() -> None:
    async with Cluster(3) as cluster:
        client = await connected(cluster)
        key = key_of(0, cluster)
        version = await client.put(key, b"1", if_absent=True)
        unknown = OutcomeUnknown("some replica may have accepted it").to_wire()

        def rule(src: str, dst: str, message: object) -> tuple[float, ...] | None:
            if isinstance(message, UpdateReply) and src == "n0":
                for result in message.results:
                    result.error = unknown
            return None

        stop = cluster.rule(rule)
        assert await client.put(key, b"2", if_version=version) > version
        assert await client.compare_and_set(key, b"2", b"3") > version
        assert await client.incr(key, 4) == 7
        stop()
        assert await client.get(key) == b"7"


async def test_a_client_that_did_not_run_itself_takes_nobody_for_silent() -> None:
    async with Cluster(3) as cluster:
        client = await connected(cluster)
        key = key_of(1, cluster)
        version = await client.put(key, b"1", if_absent=True)
        tries: list[str] = []

        def rule(src: str, dst: str, message: object) -> tuple[float, ...] | None:
            if isinstance(message, Update | Put):
                tries.append(dst)
            return None

        stop = cluster.rule(rule)
        for number in range(3):
            call = asyncio.ensure_future(client.put(key, b"%d" % number, if_version=version))
            await asyncio.sleep(0.001)
            time.sleep(2 * SILENT_S)  # noqa: ASYNC251, TID251  # this is what it is about
            version = await call
        stop()
        assert tries == ["n1"] * 3


def test_the_clock_of_a_process_that_is_gone_does_not_count() -> None:
    remote = Remote("n0", "h:7000")
    remote.tell(1_000_000, 5, 10.0)
    assert 1_000_000 < remote.boottime_us(11.0) < 2_000_000 and remote.hlc == 5
    remote.tell(0, 0, 12.0)  # another process answers there, on another machine perhaps, and is not ready yet
    assert remote.boottime_us(13.0) == remote.hlc == 0
