"""Locks: exclusion, tokens, leases by each party's own clock, the line of those who wait, and what is lost how."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import time
from collections.abc import Iterator
from typing import Any

import pytest
from cluster import LOST, Cluster, HostClock, ThreadedCluster, until

from agi.core.dht import (
    DHTClient,
    Fence,
    FenceRejected,
    InvalidKey,
    InvalidRequest,
    InvalidTTL,
    Lock,
    LockHeld,
    LockLost,
    OutcomeUnknown,
    Unavailable,
)
from agi.core.dht.client import locks
from agi.core.dht.clock import SystemClock
from agi.core.dht.errors import from_wire
from agi.core.dht.protocol.locks import LockRecord, holder_s, pack_lock, unpack_lock
from agi.core.dht.protocol.messages import Update, UpdateReply, Watch, WatchReply
from agi.core.dht.watches import WATCHES_MAX, _Place


class Clock(SystemClock):
    """A client's clock: its wall is off, and its boot time jumps when the test lets it."""

    def __init__(self, wall_ahead_ms: int = 0) -> None:
        self.wall_ahead_ms = wall_ahead_ms
        self.slept_s = 0.0

    def wall_ms(self) -> int:
        return super().wall_ms() + self.wall_ahead_ms

    def boottime(self) -> float:
        return super().boottime() + self.slept_s


class NodeClock(HostClock):
    """A node's clock, whose boot time jumps when the test lets it."""

    slept_s = 0.0

    def boottime(self) -> float:
        return super().boottime() + self.slept_s


def aging(count: int = 3) -> Cluster:
    """A cluster whose nodes have such clocks."""
    cluster = Cluster(count)
    cluster.clocks[:] = [NodeClock() for _ in range(count)]
    return cluster


def age(cluster: Cluster, seconds: float) -> None:
    for clock in cluster.clocks:
        assert isinstance(clock, NodeClock)
        clock.slept_s += seconds


def decides(cluster: Cluster) -> int:
    """The node that decides on the lock "l"."""
    (node,) = [n for n in cluster.living() if n.coordinator and b"lock:l" in n.coordinator.registers._chosen]
    return cluster.names.index(node.node_id)


def die(lock: Lock) -> None:
    """The holder does nothing more."""
    assert lock._renewals is not None
    lock._renewals.cancel()


async def record(client: DHTClient, name: str) -> LockRecord:
    value = await client.get(f"lock:{name}")
    assert value is not None
    return unpack_lock(value)


# --- exclusion and order


async def test_one_at_a_time_each_token_above_the_last_and_nobody_starves() -> None:
    contenders, rounds = 16, 6
    async with Cluster(3) as cluster:
        clients = [await cluster.client() for _ in range(4)]
        order: list[int] = []
        tokens: list[int] = []
        inside = 0

        async def contend(me: int) -> None:
            nonlocal inside
            for _ in range(rounds):
                async with clients[me % 4].lock("l", ttl=30) as lock:
                    inside += 1
                    assert inside == 1
                    order.append(me)
                    tokens.append(lock.token)
                    await asyncio.sleep(0.001)
                    assert inside == 1 and lock.held
                    inside -= 1

        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for me in range(contenders):
                group.create_task(contend(me))
        assert tokens == sorted(set(tokens)) and len(tokens) == contenders * rounds
        # how often others came in between two turns of one: the line lets nobody wait much longer than one round of all
        turns = [[i for i, who in enumerate(order) if who == me] for me in range(contenders)]
        waits = [b - a for places in turns for a, b in itertools.pairwise(places)]
        assert max(waits) <= 2 * contenders, waits
        counts = collections.Counter(order[: contenders * rounds // 2])
        assert set(counts) == set(range(contenders)) and max(counts.values()) - min(counts.values()) <= 2, counts


async def test_waiting_costs_no_polling() -> None:
    async with Cluster(3) as cluster:
        client, other = await cluster.client(), await cluster.client()
        asked: list[object] = []
        async with client.lock("l", ttl=30):
            waiting = asyncio.create_task(other.try_lock("other"))
            await waiting
            cluster.rule(lambda src, dst, m: asked.append(m) if src == "client" else None)
            waiter = other.lock("l", ttl=30)
            task = asyncio.create_task(waiter.__aenter__())
            await asyncio.sleep(0.5)
            assert [m.timeout_ms > 0 for m in asked if isinstance(m, Watch)] == [False, True]  # how old, then the line
            assert not any(isinstance(m, Update) for m in asked)
            released = time.monotonic()
        await task
        assert time.monotonic() - released < 2.0 and waiter.held
        await waiter.release()


async def test_try_lock_never_waits() -> None:
    async with Cluster(3) as cluster:
        client, other = await cluster.client(), await cluster.client()
        lock = await client.try_lock("l", ttl=10)
        assert lock is not None and lock.held
        assert await other.try_lock("l") is None and await client.try_lock("l") is None
        async with lock:
            assert await other.try_lock("l") is None
        assert not lock.held
        again = await other.try_lock("l")
        assert again is not None and again.token > lock.token
        assert await client.lock_status("other") is None
        status = await client.lock_status("l")
        assert status is not None and status.holder == again._holder and status.token == again.token
        assert status.lease_seconds == 10
        await again.release()
        status = await client.lock_status("l")
        assert status is not None and status.holder == "" and status.token == again.token


async def test_a_timeout_ends_the_wait_with_nothing_changed() -> None:
    async with Cluster(3) as cluster:
        client, other = await cluster.client(), await cluster.client()
        async with client.lock("l", ttl=30) as lock:
            before = await client.get_entry("lock:l")
            for timeout in (0, 0.3):
                started = time.monotonic()
                with pytest.raises(LockHeld):
                    async with other.lock("l", timeout=timeout):
                        raise AssertionError("it is held")
                assert timeout <= time.monotonic() - started < timeout + 2.0
            assert await client.get_entry("lock:l") == before and lock.held


# --- leases


async def test_renewals_keep_the_token_and_the_lock_beyond_its_lease() -> None:
    async with Cluster(3) as cluster:
        client, other = await cluster.client(), await cluster.client()
        async with client.lock("l", ttl=1.5) as lock:
            token, version = lock.token, lock._version
            assert token == version and (await record(client, "l")).token == 0
            ended = time.monotonic() + 2.5
            while time.monotonic() < ended:
                assert await other.try_lock("l", ttl=1) is None
                lock.check()
                await asyncio.sleep(0.1)
            assert lock.token == token and lock._version > version
            assert (await record(client, "l")).token == token
            status = await other.lock_status("l")
            assert status is not None and status.token == token


@pytest.mark.parametrize("cut", ["replies", "link"])
async def test_a_holder_that_cannot_renew_knows_before_anybody_else_can_have_it(cut: str) -> None:
    async with Cluster(3) as cluster:
        holder, waiter = await cluster.client(host="holder"), await cluster.client()
        events: list[str] = []

        async def hold() -> None:
            with contextlib.suppress(LockLost):
                async with holder.lock("l", ttl=1.0) as lock:
                    events.append("held")
                    try:
                        await asyncio.sleep(60)
                    finally:
                        events.append("lost")
                        assert not lock.held
            events.append("knows")

        task = asyncio.create_task(hold())
        await until(lambda: events)
        lost = (UpdateReply,) if cut == "replies" else (object,)
        cluster.rule(lambda src, dst, m: LOST if "holder" in (src, dst) and isinstance(m, lost) else None)
        async with waiter.lock("l", ttl=5) as lock:
            events.append("taken")
            lock.check()
        await task
        assert events == ["held", "lost", "knows", "taken"]


async def test_lock_lost_takes_the_place_of_its_own_cancellation_alone() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        current = asyncio.current_task()
        assert current is not None
        with pytest.raises(LockLost):
            async with client.lock("l", ttl=10) as lock:
                asyncio.get_running_loop().call_soon(lock._lose, "for the test")
                await asyncio.sleep(10)
        assert current.cancelling() == 0
        await asyncio.sleep(0)  # nothing of it is left
        with pytest.raises(LockLost):  # a block that swallows it
            async with client.lock("m", ttl=10) as lock:
                asyncio.get_running_loop().call_soon(lock._lose, "for the test")
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(10)
        assert current.cancelling() == 0
        with pytest.raises(ValueError, match="mine"):
            async with client.lock("n", ttl=10) as lock:
                asyncio.get_running_loop().call_soon(lock._lose, "for the test")
                try:
                    await asyncio.sleep(10)
                except asyncio.CancelledError:
                    raise ValueError("mine") from None
        assert current.cancelling() == 0

        async def both() -> None:
            async with client.lock("o", ttl=10) as lock:
                entered.append(lock)
                try:
                    await asyncio.sleep(10)
                finally:
                    ends.append(lock.held)

        entered: list[Lock] = []
        ends: list[bool] = []
        for lose in (False, True):
            task = asyncio.create_task(both())
            await until(lambda: len(entered) == 1)
            lock = entered.pop()
            if lose:
                lock._lose("for the test")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert task.cancelled()
            free = await client.try_lock("o", ttl=10)
            assert (free is None) == lose  # who was cancelled gives back what he holds
            if free is not None:
                await free.release()
        assert ends == [True, False]


@pytest.mark.parametrize("hours", [-1, 1])
async def test_a_dead_holder_is_followed_a_lease_after_one_has_seen_it_whatever_the_wall_shows(hours: int) -> None:
    async with Cluster(3, settings={"dht.versions.max_clock_skew_ms": 3_600_000}) as cluster:
        clock, later = Clock(hours * 3_600_000), Clock(-hours * 3_600_000)
        holder = await cluster.client()
        waiter, third = await cluster.client(clock=clock), await cluster.client(clock=later)
        dead = await holder.try_lock("l", ttl=60)
        assert dead is not None
        die(dead)
        cluster.clocks[0].ahead_ms, cluster.clocks[1].ahead_ms = hours * 3_500_000, -hours * 3_500_000
        clock.slept_s = 1000.0  # what was before one has seen it does not count
        assert await waiter.try_lock("l") is None
        clock.slept_s += 59.0
        assert await waiter.try_lock("l") is None
        assert await third.try_lock("l") is None
        clock.slept_s += 1.5
        lock = await waiter.try_lock("l")
        assert lock is not None and lock.token > dead.token
        later.slept_s += 61.0
        assert await third.try_lock("l") is None  # it was another that he saw
        with pytest.raises(LockLost):
            await dead.release()
        assert lock.held and (await record(waiter, "l")).holder == lock._holder


async def test_clients_that_look_but_once_follow_a_dead_holder() -> None:
    async with aging() as cluster:
        dead = await (await cluster.client()).try_lock("l", ttl=600)
        assert dead is not None
        die(dead)
        assert await (await cluster.client()).try_lock("l") is None
        age(cluster, 580.0)
        assert await (await cluster.client()).try_lock("l") is None
        with pytest.raises(LockHeld):
            await (await cluster.client()).lock("l", timeout=0).__aenter__()
        age(cluster, 21.0)
        lock = await (await cluster.client()).try_lock("l", ttl=600)
        assert lock is not None and lock.token > dead.token
        die(lock)
        age(cluster, 601.0)
        async with (await cluster.client()).lock("l", timeout=0) as third:
            assert third.token > lock.token


async def test_who_comes_late_to_a_dead_holder_waits_for_what_is_left_of_its_lease() -> None:
    async with aging() as cluster:
        dead = await (await cluster.client()).try_lock("l", ttl=60)
        assert dead is not None
        die(dead)
        age(cluster, 59.0)
        async with (await cluster.client()).lock("l", timeout=10) as lock:
            assert lock.token > dead.token


async def test_a_node_that_comes_to_decide_on_a_lock_knows_it_since_somebody_asked() -> None:
    async with aging() as cluster:
        dead = await (await cluster.client()).try_lock("l", ttl=600)
        assert dead is not None
        die(dead)
        at = decides(cluster)
        await cluster.down(at)
        age(cluster, 601.0)
        assert await (await cluster.client((at + 1) % 3)).try_lock("l") is None  # nobody who is left had seen it
        age(cluster, 580.0)
        assert await (await cluster.client((at + 1) % 3)).try_lock("l") is None
        age(cluster, 21.0)
        assert await (await cluster.client((at + 1) % 3)).try_lock("l") is not None


async def test_a_renewal_is_another_version_whose_age_begins_anew() -> None:
    async with aging() as cluster:
        lock = await (await cluster.client()).try_lock("l", ttl=1.5)
        assert lock is not None
        age(cluster, 60.0)
        seen = lock._version
        await until(lambda: lock._version > seen)
        assert await (await cluster.client()).try_lock("l") is None
        lock.check()
        await lock.release()


@pytest.mark.parametrize("answer", ["none", "an error"])
async def test_a_lock_is_to_be_had_though_nobody_says_how_old_its_record_is(answer: str) -> None:
    async with Cluster(3) as cluster:

        def rule(src: str, dst: str, message: object) -> tuple[float, ...] | None:
            if not isinstance(message, WatchReply):
                return None
            message.error = (32, "too much", 0, 0)
            return LOST if answer == "none" else None

        cluster.rule(rule)
        client, other = await cluster.client(), await cluster.client()
        dead = await client.try_lock("l", ttl=1.0)
        assert dead is not None
        die(dead)
        assert await other.try_lock("l") is None
        async with other.lock("l", timeout=10) as lock:
            assert lock.token > dead.token


async def test_a_renewal_starts_the_count_of_those_who_wait_anew() -> None:
    async with Cluster(3) as cluster:
        clock = Clock()
        holder, waiter = await cluster.client(), await cluster.client(clock=clock)
        lock = await holder.try_lock("l", ttl=1.5)
        assert lock is not None and await waiter.try_lock("l") is None
        seen = lock._version
        await until(lambda: lock._version > seen)
        clock.slept_s += 60.0
        assert await waiter.try_lock("l") is None
        lock.check()
        await lock.release()


async def test_a_holder_that_slept_knows_it_at_once() -> None:
    async with Cluster(3) as cluster:
        clock = Clock()
        client = await cluster.client(clock=clock)
        lock = await client.try_lock("l", ttl=60)
        assert lock is not None
        clock.slept_s += 53.0
        assert not lock.held  # 60 less the margin
        with pytest.raises(LockLost):
            lock.check()
        with pytest.raises(LockLost):
            await lock.release()
        other = await cluster.client()
        assert await other.try_lock("l") is None


async def test_the_holders_count_begins_before_its_request_is_sent() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        sent: list[float] = []

        def slow(src: str, dst: str, message: object) -> Any:
            if isinstance(message, Update):
                sent.append(SystemClock().boottime())
            return (0.2,) if isinstance(message, UpdateReply) else None

        cluster.rule(slow)
        lock = await client.try_lock("l", ttl=2.4)
        assert lock is not None and len(sent) == 1
        for renewals in (1, 2):
            assert sent[-1] - 0.1 < lock._deadline - holder_s(2400) <= sent[-1]
            before = lock._deadline
            await until(lambda before=before: lock._deadline != before)
            assert len(sent) == 1 + renewals
        await lock.release()


# --- what goes wrong


@pytest.mark.parametrize("late", [False, True])
async def test_the_outcome_of_an_attempt_is_found_out(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "STEP_S_MAX", 0.4)
    async with Cluster(3) as cluster:
        clock = Clock()
        client = await cluster.client(host="holder", retry_count=0, timeout=1.0, clock=clock)
        asked: list[object] = []
        lost: list[object] = []

        def rule(src: str, dst: str, message: object) -> Any:
            if isinstance(message, Update):
                asked.append(message)
            if dst == "holder" and isinstance(message, UpdateReply) and not lost:
                lost.append(message)
                clock.slept_s += 19.0 if late else 0.0
                return LOST
            return None

        cluster.rule(rule)
        lock = await client.try_lock("l", ttl=20)
        assert lost and lock is not None and lock.held
        assert len(asked) == (2 if late else 1)  # what came too late is taken once more, from itself
        entry = await client.get_entry("lock:l")
        assert entry is not None and entry.version == lock.token
        await lock.release()


async def test_who_gives_up_while_the_outcome_is_not_known_leaves_no_lock_behind() -> None:
    async with Cluster(3) as cluster:
        client, other = await cluster.client(host="holder"), await cluster.client()
        end = cluster.rule(lambda src, dst, m: LOST if dst == "holder" and isinstance(m, UpdateReply) else None)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3), client.lock("l", ttl=20):
                raise AssertionError("nobody said so")
        end()
        async with asyncio.timeout(10), other.lock("l", ttl=10) as lock:
            lock.check()


async def test_a_release_whose_outcome_is_unknown_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "STEP_S_MAX", 0.4)
    async with Cluster(3) as cluster:
        client, other = await cluster.client(host="holder", retry_count=0, timeout=1.0), await cluster.client()
        lock = await client.try_lock("l", ttl=30)
        assert lock is not None
        lost: list[object] = []

        def rule(src: str, dst: str, message: object) -> Any:
            if dst == "holder" and isinstance(message, UpdateReply) and not lost:
                lost.append(message)
                return LOST
            return None

        cluster.rule(rule)
        await lock.release()
        assert lost and (await record(other, "l")).holder == ""


async def test_without_a_quorum_there_is_no_lock_and_a_held_one_is_lost() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client(timeout=0.5)
        with pytest.raises(LockLost):
            async with client.lock("l", ttl=1.0):
                await cluster.down(1)
                await cluster.down(2)
                await asyncio.sleep(30)
        with pytest.raises((Unavailable, OutcomeUnknown)):
            await client.try_lock("m")
        with pytest.raises((Unavailable, OutcomeUnknown)):
            async with client.lock("m", timeout=0.5):
                raise AssertionError("there is no quorum")


async def test_a_lock_outlives_the_node_that_decides_on_it() -> None:
    async with Cluster(3) as cluster:
        client, other = await cluster.client(), await cluster.client()
        async with client.lock("l", ttl=6) as lock:
            waiter = asyncio.create_task(other.lock("l", ttl=6).__aenter__())
            for i in range(3):
                await asyncio.sleep(0.1)
                await cluster.down(i)
                lock.check()
                await asyncio.sleep(0.1)
                await cluster.up(i)
            lock.check()
            assert not waiter.done()
        async with asyncio.timeout(10):
            taken = await waiter
        assert taken.token > lock.token
        await taken.release()


async def test_release_is_for_the_holder_and_once() -> None:
    async with Cluster(3) as cluster:
        client, other = await cluster.client(), await cluster.client()
        lock = await client.try_lock("l")
        assert lock is not None
        never = other.lock("l")
        before = await client.get_entry("lock:l")
        with pytest.raises(InvalidRequest):
            await never.release()
        with pytest.raises(InvalidRequest):
            assert never.token
        with pytest.raises(LockLost):
            never.check()
        with pytest.raises(InvalidRequest):
            await other.put("k", b"x", fence=never)
        assert await client.get_entry("lock:l") == before
        await lock.release()
        before = await client.get_entry("lock:l")
        with pytest.raises(InvalidRequest):
            await lock.release()
        with pytest.raises(LockLost):
            lock.check()
        assert await client.get_entry("lock:l") == before
        with pytest.raises(LockLost):
            async with lock:
                raise AssertionError("it was released")
        async with client.lock("l") as lock:
            await lock.release()  # within its block
        with pytest.raises(InvalidRequest):
            await lock._acquire(wait=False)


async def test_one_lock_object_lets_one_block_in() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        inside: list[int] = []
        peak = 0

        async def work(lock: Lock, number: int) -> None:
            nonlocal peak
            async with lock:
                inside.append(number)
                peak = max(peak, len(inside))
                await asyncio.sleep(0.1)
                inside.remove(number)

        held = await client.try_lock("tried")
        assert held is not None
        for lock in (client.lock("l"), held):
            ended = await asyncio.gather(*(work(lock, n) for n in range(3)), return_exceptions=True)
            assert sorted(type(end).__name__ for end in ended) == ["InvalidRequest", "InvalidRequest", "NoneType"]
            assert peak == 1 and not lock.held
            with pytest.raises(InvalidRequest, match="entered before"):
                await work(lock, 9)
        async with client.lock("nested") as lock:
            with pytest.raises(InvalidRequest, match="entered before"):
                async with lock:
                    raise AssertionError
            lock.check()  # whose block goes on


async def test_who_lost_a_lock_cannot_show_it_though_nobody_has_followed() -> None:
    async with Cluster(3) as cluster:
        clock = Clock()
        client = await cluster.client(clock=clock)
        lock = await client.try_lock("l", ttl=10)
        assert lock is not None
        await client.put("k", b"1", fence=lock)
        fence = lock.fence
        clock.slept_s += 11.0
        with pytest.raises(LockLost):
            await client.put("k", b"2", fence=lock)
        with pytest.raises(LockLost):
            assert lock.fence
        assert await client.get("k") == b"1"
        await client.put("k", b"3", fence=fence)  # which tells only of what followed


async def test_a_holder_whose_record_was_taken_does_not_release_the_next_ones() -> None:
    async with Cluster(3) as cluster:
        clock = Clock()
        holder, waiter = await cluster.client(), await cluster.client(clock=clock)
        lock = await holder.try_lock("l", ttl=60)
        assert lock is not None and await waiter.try_lock("l") is None
        clock.slept_s += 61.0  # of the waiter alone: its clock is broken beyond what leases bear
        taken = await waiter.try_lock("l", ttl=60)
        assert taken is not None
        before = await waiter.get_entry("lock:l")
        with pytest.raises(LockLost):
            await lock.release()
        assert await waiter.get_entry("lock:l") == before
        # yet what was written under the later one is safe
        await waiter.put("k", b"new", fence=taken)
        with pytest.raises(LockLost):
            await holder.put("k", b"old", fence=lock)
        with pytest.raises(FenceRejected):
            await holder.put("k", b"old", fence=Fence("l", lock.token))
        assert await waiter.delete("k", fence=taken)
        with pytest.raises(FenceRejected):
            await holder.put("k", b"old", fence=Fence("l", lock.token))
        assert await holder.get("k") is None


async def test_bad_input_changes_nothing() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        for ttl in (-1, 0, 0.01, float("nan"), float("inf"), 1e9, "10", None, True):
            with pytest.raises(InvalidTTL):
                client.lock("l", ttl=ttl)  # type: ignore[arg-type]  # that is the test
            with pytest.raises(InvalidTTL):
                await client.try_lock("l", ttl=ttl)  # type: ignore[arg-type]  # that is the test
        for timeout in (-1, float("nan"), float("inf"), "1", True):
            with pytest.raises(InvalidRequest):
                client.lock("l", timeout=timeout)  # type: ignore[arg-type]  # that is the test
        for name in ("", "x" * 1020, 7, "\ud800"):
            with pytest.raises(InvalidKey):
                client.lock(name)  # type: ignore[arg-type]  # that is the test
        assert cluster.held("lock:l") == [None] * 3
        for value in (b"", b"text", pack_lock(LockRecord("x", -1))):
            await client.put("lock:l", value)
            with pytest.raises(InvalidRequest):
                await client.try_lock("l")
            assert await client.get("lock:l") == value
        await client.delete("lock:l")
        lock = await client.try_lock("l")
        assert lock is not None
        await lock.release()


async def test_a_client_that_closes_gives_its_locks_up() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        with pytest.raises(LockLost, match="its client was closed"):
            async with client.lock("l") as lock:
                await client.close()
                assert not lock.held
        other = await cluster.client()
        assert await other.try_lock("l") is None


# --- the line at the node


async def test_watches_are_answered_in_order_one_for_each_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agi.core.dht.watches.PLACE_S", 1.0)
    async with Cluster(3) as cluster:
        client = await cluster.client()
        lock = await client.try_lock("l", ttl=30)
        assert lock is not None
        (node,) = [n for n in cluster.living() if b"lock:l" in n.coordinator.registers._chosen]  # type: ignore[union-attr]  # they run
        wire = await cluster.wire(cluster.names.index(node.node_id))
        assert node.coordinator is not None
        line = node.coordinator.registers.watches
        for number in range(1, 4):
            wire.link.send(Watch(number, 20_000, b"lock:l", lock.token, f"w{number}"))
        await until(lambda: line.places == 3)
        old = await wire.ask(Watch(9, 20_000, b"lock:l", lock.token - 1, "w9"))
        assert (old.version, old.free, old.error) == (lock.token, False, None)  # it had seen less
        short = await wire.ask(Watch(8, 50, b"lock:l", lock.token, "w8"))
        assert (short.version, short.free) == (0, False)
        wire.heard.clear()
        await lock.release()
        await until(lambda: wire.heard)
        assert [(reply.id, reply.free) for reply in wire.heard] == [(1, True)]
        lock = await client.try_lock("l", ttl=30)
        assert lock is not None
        await asyncio.sleep(0.8)
        assert len(wire.heard) == 1  # taken: the next one waits for the next release
        await lock.release()
        await until(lambda: len(wire.heard) == 2)
        assert wire.heard[1].id == 2
        await until(lambda: len(wire.heard) == 3)  # who was woken did nothing
        assert wire.heard[2].id == 3
        for bad in (Watch(20, 1, b"", 1, "w"), Watch(21, 1, b"k", 1, ""), Watch(22, 1, b"k", 1, "w" * 300)):
            assert isinstance(from_wire(*(await wire.ask(bad)).error), InvalidRequest)
        line._places += WATCHES_MAX
        assert (await wire.ask(Watch(30, 1, b"k", 1, "w"))).error[0] == 32
        line._places -= WATCHES_MAX
        await until(lambda: line.places == 0)
        assert not line._lines and _Place().reply is None


async def test_who_was_overtaken_keeps_his_place() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        lock = await client.try_lock("l", ttl=30)
        assert lock is not None
        wires = [await cluster.wire(i) for i in range(3)]
        (at,) = [i for i, n in enumerate(cluster.living()) if b"lock:l" in n.coordinator.registers._chosen]  # type: ignore[union-attr]  # they run
        wire = wires[at]
        for number in (1, 2):
            wire.link.send(Watch(number, 20_000, b"lock:l", lock.token, f"w{number}"))
        await asyncio.sleep(0.05)
        await lock.release()
        await until(lambda: [reply.id for reply in wire.heard] == [1])
        barger = await client.try_lock("l", ttl=30)
        assert barger is not None
        wire.link.send(Watch(3, 20_000, b"lock:l", barger.token, "w1"))
        await asyncio.sleep(0.05)
        await barger.release()
        await until(lambda: len(wire.heard) == 2)
        assert wire.heard[1].id == 3
        coordinator = cluster.node(at).coordinator
        assert coordinator is not None
        wire.link.send(Watch(4, 20_000, b"lock:m", 0, "w"))
        await until(lambda: coordinator.registers.watches.places == 3)
        coordinator.registers.adopt()  # another epoch: another node may decide from now on
        await until(lambda: {reply.id for reply in wire.heard} >= {2, 4})
        assert not any(reply.free for reply in wire.heard if reply.id in (2, 4))
        assert coordinator.registers.watches.places == 0


async def test_a_node_that_stops_sends_who_waits_elsewhere() -> None:
    async with Cluster(3) as cluster:
        client, other = await cluster.client(), await cluster.client()
        lock = await client.try_lock("l", ttl=30)
        assert lock is not None
        waiter = asyncio.create_task(other.lock("l", ttl=30).__aenter__())

        def waited_for() -> list[int]:
            return [
                i for i, n in enumerate(cluster.nodes) if n and n.coordinator and n.coordinator.registers.watches.places
            ]

        await until(waited_for)
        (at,) = waited_for()
        node, started = cluster.node(at), time.monotonic()
        cluster.nodes[at] = None
        await node.stop(5.0)
        cluster._doors[at].node = None
        assert time.monotonic() - started < 1.5  # nobody's answer was owed
        await until(waited_for)
        await lock.release()
        async with asyncio.timeout(3):
            taken = await waiter
        await taken.release()


# --- the client for threads


@pytest.fixture(scope="module")
def nodes() -> Iterator[ThreadedCluster]:
    cluster = ThreadedCluster()
    yield cluster
    cluster.stop()


def test_a_lock_for_threads(nodes: ThreadedCluster) -> None:
    with nodes.client() as client, nodes.client() as other:
        with client.lock("s", ttl=10) as lock:
            assert lock.held and lock.fence == Fence("s", lock.token)
            lock.check()
            client.put("k", b"1", fence=lock)
            assert other.try_lock("s") is None
            with pytest.raises(LockHeld), other.lock("s", timeout=0.2):
                raise AssertionError("it is held")
            status = other.lock_status("s")
            assert status is not None and status.token == lock.token
        second = other.try_lock("s")
        assert second is not None and second.token > lock.token
        other.put("k", b"2", fence=second)
        with pytest.raises(FenceRejected):
            client.put("k", b"late", fence=lock)
        with second:
            second.check()
            with pytest.raises(InvalidRequest, match="entered before"), second:
                raise AssertionError
            second.check()
        with pytest.raises(InvalidRequest):
            second.release()
        with pytest.raises(InvalidTTL):
            client.lock("s", ttl=0)


def test_a_thread_hears_that_its_lock_is_lost_at_the_next_look(nodes: ThreadedCluster) -> None:
    clock = Clock()
    with nodes.client(clock=clock) as client:
        with pytest.raises(LockLost), client.lock("t", ttl=30) as lock:
            clock.slept_s += 30
            assert not lock.held
        with pytest.raises(LockLost), client.lock("u", ttl=30) as lock:
            clock.slept_s += 30
            with pytest.raises(LockLost):
                lock.check()
        with pytest.raises(ValueError, match="mine"), client.lock("v", ttl=30):
            clock.slept_s += 30
            raise ValueError("mine")
        with pytest.raises(LockLost), client.lock("w", ttl=30):
            client.close()
