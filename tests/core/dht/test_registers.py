"""Keys under consensus: conditional calls, counters, plain calls of the same keys, reads, contention and failures."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
from cluster import LOST, Cluster, Wire, until

from agi.core.dht.acceptor import Acceptor
from agi.core.dht.errors import (
    InvalidConsistency,
    InvalidRequest,
    InvalidTTL,
    InvalidValue,
    NotACounter,
    OutcomeUnknown,
    Unavailable,
    VersionConflict,
    from_wire,
)
from agi.core.dht.observability.metrics import Metrics
from agi.core.dht.protocol.consensus import ADD, IF_ABSENT, PUT, State, ballot, is_register, register_of, state_of
from agi.core.dht.protocol.floors import Floors
from agi.core.dht.protocol.messages import (
    Get,
    Op,
    Put,
    RegisterAccept,
    RegisterAccepted,
    RegisterPrepare,
    RegisterPromises,
    ReplicaRead,
    ReplicaScan,
    Scan,
    Update,
)
from agi.core.dht.protocol.record import FLAGS, HEADER, UNVOTED
from agi.core.dht.protocol.versioning import HLC
from agi.core.dht.registers import Registers
from agi.core.dht.replica import FILL, Replica
from agi.core.dht.testing import SimDisk, Simulation, run_simulation
from agi.core.dht.types import Consistency, Fence


async def test_a_put_may_be_bound_to_a_version_or_to_absence() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        first = await client.put("k", b"1", if_absent=True)
        with pytest.raises(VersionConflict) as exists:
            await client.put("k", b"2", if_absent=True)
        assert exists.value.version == first
        second = await client.put("k", b"2", if_version=first)
        assert second > first
        with pytest.raises(VersionConflict) as moved:
            await client.put("k", b"3", if_version=first)
        assert moved.value.version == second
        entry = await client.get_entry("k")
        assert entry is not None and (entry.value, entry.version) == (b"2", second)
        with pytest.raises(VersionConflict):
            await client.delete("k", if_version=first)
        assert await client.delete("k", if_version=second)
        assert await client.get("k") is None
        with pytest.raises(VersionConflict) as absent:
            await client.put("k", b"4", if_version=second)
        assert absent.value.version == 0
        assert await client.put("k", b"5", if_absent=True) > second


async def test_compare_and_set_looks_at_the_value() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        await client.put("k", b"plain")
        version = await client.compare_and_set("k", b"plain", b"a")
        with pytest.raises(VersionConflict) as conflict:
            await client.compare_and_set("k", b"plain", b"b")
        assert conflict.value.version == version
        assert await client.get("k") == b"a"
        await client.compare_and_set("k", b"a", None)
        assert await client.get("k") is None
        await client.compare_and_set("k", None, b"c")
        assert await client.get("k", consistency=Consistency.LINEARIZABLE) == b"c"


async def test_counters_of_many_callers_lose_nothing() -> None:
    async with Cluster(3) as cluster:
        clients = [await cluster.client(seed) for seed in range(3)]
        seen = await asyncio.gather(*(client.incr("n") for client in clients for _ in range(20)))
        assert sorted(seen) == list(range(1, 61))
        assert await clients[0].incr("n", -70) == -10
        assert await clients[1].get("n") == b"-10"


async def test_update_applies_every_change_once() -> None:
    async with Cluster(3) as cluster:
        clients = [await cluster.client(seed) for seed in range(3)]

        async def add(client: object, item: int) -> None:
            await clients[item % 3].update("set", lambda value: (value or b"") + bytes((item,)))

        await asyncio.gather(*(add(clients[i % 3], i) for i in range(24)))
        found = await clients[0].get("set")
        assert found is not None and sorted(found) == list(range(24))
        assert await clients[0].update("set", lambda value: None) is None
        assert await clients[0].get("set") is None


async def test_an_update_that_is_overtaken_ends_in_its_time_with_the_version_that_was_in_its_way() -> None:
    async with Cluster(3) as cluster:
        client, other = await cluster.client(), await cluster.client(host="other")

        def rule(src: str, dst: str, message: object) -> tuple[float, ...] | None:
            slow = isinstance(message, Update) and src == "client" and message.ops[0].kind == PUT
            return (0.05,) if slow else None

        cluster.rule(rule)
        written: list[int] = []

        async def write() -> None:
            while True:
                written.append(await other.put("k", b"theirs", if_version=written[-1]))
                await asyncio.sleep(0.005)

        written.append(await other.put("k", b"theirs", if_absent=True))
        writer = asyncio.create_task(write())
        seen: list[bytes | None] = []

        def change(value: bytes | None) -> bytes:
            seen.append(value)
            return b"ours"

        began = time.monotonic()
        with pytest.raises(VersionConflict) as caught:
            await client.update("k", change, timeout=0.8)
        assert time.monotonic() - began < 0.8
        assert caught.value.version in written and len(seen) > 2 and set(seen) == {b"theirs"}
        writer.cancel()


async def test_who_is_late_once_it_was_proposed_is_not_told_that_nothing_happened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client(retry_count=0)
        propose = Registers._propose

        def late(self: Registers, *given: Any) -> None:
            propose(self, *given)
            monkeypatch.undo()
            self.advance(self._clock.monotonic() + 60)  # in the same turn of the loop, before the proposal has left

        monkeypatch.setattr(Registers, "_propose", late)
        with pytest.raises(OutcomeUnknown):
            await client.compare_and_set("k", None, b"1")
        assert await client.get("k", consistency=Consistency.LINEARIZABLE) == b"1"


async def test_plain_calls_of_such_a_key_go_through_consensus() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        version = await client.put("k", b"1", if_absent=True)
        after = await client.put("k", b"2")
        assert after > version and await client.get("k") == b"2"
        with pytest.raises(VersionConflict):
            await client.put("k", b"3", if_version=version)
        assert len(await client.put_many({"k": b"4", "other": b"o"})) == 2
        assert await client.get_many(["k", "other"]) == {"k": b"4", "other": b"o"}
        assert await client.delete("k") and not await client.delete("k")
        assert await client.get("k") is None
        assert [key async for key in client.iterate_keys()] == ["other"]
        await client.put("k", b"5")
        assert [(k, v) async for k, v in client.iterate()] == [("k", b"5"), ("other", b"o")]
        assert all(is_register(record) for record in cluster.held("k"))
        assert not any(is_register(record) for record in cluster.held("other"))


async def test_a_plain_put_through_a_clock_far_ahead_does_not_beat_consensus() -> None:
    async with Cluster(3, settings={"dht.versions.max_clock_skew_ms": 600_000}) as cluster:
        ahead, other = await cluster.client(0), await cluster.client(1)
        cluster.clocks[0].ahead_ms = 300_000
        await ahead.put("k", b"far ahead")
        entry = await other.get_entry("k")
        assert entry is not None
        version = await other.put("k", b"mine", if_version=entry.version)
        assert version > entry.version
        assert await ahead.get("k") == b"mine"
        await ahead.put("k", b"plain again")
        with pytest.raises(VersionConflict):
            await other.put("k", b"too late", if_version=version)
        assert await other.get("k") == b"plain again"


async def test_one_round_trip_in_the_steady_state() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        version = await client.put("k", b"0", if_absent=True)
        prepared: list[object] = []
        cluster.rule(lambda src, dst, m: prepared.append(m) if isinstance(m, RegisterPrepare) else None)
        for number in range(20):
            version = await client.put("k", b"%d" % number, if_version=version)
        assert not prepared


async def test_a_condition_that_fails_is_told_only_once_the_value_is_chosen() -> None:
    """One replica has accepted a value that nobody chose: it is chosen before it makes a condition fail."""
    async with Cluster(3) as cluster:
        client = await cluster.client()
        end = cluster.rule(lambda src, dst, m: LOST if isinstance(m, RegisterAccept) else None)
        with pytest.raises(OutcomeUnknown):  # its coordinator alone has it
            await client.put("k", b"half", if_absent=True, timeout=0.5)
        end()
        with pytest.raises(VersionConflict):
            await client.put("k", b"mine", if_absent=True)
        assert sum(is_register(record) for record in cluster.held("k")) >= 2
        assert await client.get("k") == b"half"


async def test_a_reply_that_is_lost_does_not_make_an_operation_conflict_with_itself() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        lost: list[object] = []

        def rule(src: str, dst: str, message: object) -> tuple[float, ...] | None:
            if isinstance(message, RegisterAccepted) and len(lost) < 2:
                lost.append(message)
                return LOST
            return None

        cluster.rule(rule)
        await client.put("k", b"1", if_absent=True)
        assert len(lost) == 2
        assert await client.incr("n") == 1


async def test_the_same_operation_through_two_coordinators_takes_effect_once() -> None:
    async with Cluster(3) as cluster:
        wires = [await cluster.wire(i) for i in range(3)]

        async def add(wire: Wire, name: int, *, retry: bool = False) -> int:
            op = Op(name.to_bytes(16, "big"), b"n", ADD, delta=1, retry=retry)
            reply = await wire.ask(Update(0, 2000, [op]))
            assert reply.error is None and reply.results[0].error is None, reply
            return int(reply.results[0].number)

        assert await add(wires[0], 1) == 1
        assert await add(wires[1], 1, retry=True) == 1
        for name in range(2, 18):
            await add(wires[name % 3], name)
        assert await add(wires[2], 2, retry=True) == 2  # the value remembers 16
        with pytest.raises(AssertionError, match="16 later operations"):
            await add(wires[2], 1, retry=True)
        assert await add(wires[0], 99) == 18


async def test_a_message_that_comes_twice_does_not_make_a_failed_operation_succeed_later() -> None:
    async with Cluster(3) as cluster:
        client, wire = await cluster.client(), await cluster.wire(0)
        await client.put("k", b"1", if_absent=True)
        update = Update(7, 2000, [Op(bytes(16), b"k", PUT, IF_ABSENT, b"2")])
        first = await wire.ask(update)
        assert isinstance(from_wire(*first.results[0].error), VersionConflict)
        await client.delete("k")
        assert await wire.ask(update) == first
        assert await client.get("k") is None


async def test_a_message_that_comes_after_its_own_refused_retry_changes_nothing() -> None:
    async with Cluster(3) as cluster:
        wire = await cluster.wire(0)
        op = Op(bytes(15) + b"1", b"n", ADD, delta=1)
        refused = await wire.ask(Update(7, 2000, [op], retry=True))
        assert isinstance(from_wire(*refused.error), OutcomeUnknown)
        assert await wire.ask(Update(7, 2000, [op])) == refused
        assert cluster.held("n") == [None] * 3


async def test_without_a_quorum_nothing_is_changed_or_the_outcome_is_unknown() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        end = cluster.rule(lambda src, dst, m: LOST if isinstance(m, RegisterPromises) else None)
        reply = await (await cluster.wire(0)).ask(Update(0, 400, [Op(bytes(16), b"k", PUT, IF_ABSENT, b"1")]))
        assert isinstance(from_wire(*reply.results[0].error), Unavailable)
        end()
        assert await client.get("k") is None


async def test_a_ttl_ends_a_value_once_for_all() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        await client.put("k", b"1", if_absent=True, ttl_seconds=100)
        entry = await client.get_entry("k")
        assert entry is not None and entry.expires_at is not None
        for clock in cluster.clocks:
            clock.ahead_ms += 101_000
        assert await client.get("k") is None
        for clock in cluster.clocks:
            clock.ahead_ms -= 101_000
        assert await client.get("k") is None  # it was decided
        await client.put("k", b"2", if_absent=True)


async def test_an_abandoned_round_does_not_keep_plain_writes_out_for_long() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        end = cluster.rule(lambda src, dst, m: LOST if isinstance(m, RegisterPromises) else None)
        reply = await (await cluster.wire(0)).ask(Update(0, 400, [Op(bytes(16), b"k", PUT, IF_ABSENT, b"1")]))
        assert isinstance(from_wire(*reply.results[0].error), Unavailable)
        end()
        await until(lambda: not any(node.acceptor.promises for node in cluster.living()))
        await client.put("k", b"plain")
        assert await client.get("k") == b"plain"


@pytest.mark.parametrize("promised", [[1, 2], [0, 1, 2]])
async def test_a_plain_put_that_consensus_takes_over_is_nowhere_only_if_no_replica_took_it(promised: list[int]) -> None:
    async with Cluster(3) as cluster:
        wire = await cluster.wire(0)
        said: list[object] = []
        for i in promised:
            cluster.node(i).acceptor.prepare([b"k"], [ballot(5, 7)], lambda *answer: said.append(answer))
        await until(lambda: len(said) == len(promised))
        end = cluster.rule(lambda src, dst, m: LOST if isinstance(m, RegisterPromises) else None)
        reply = await wire.ask(Put(0, Consistency.ALL, 400, [b"k"], [b"1"]))
        kind = type(from_wire(*reply.errors[0][1]))
        end()
        shown = (await wire.ask(Get(0, Consistency.QUORUM, 3000, [b"k"]))).records[0]
        if len(promised) == 3:
            assert kind is Unavailable and shown is None
        else:
            assert kind is OutcomeUnknown and shown is not None and shown[HEADER:] == b"1"


@pytest.mark.parametrize("how", ["read", "scan"])
async def test_a_plain_value_that_a_promise_keeps_from_being_repaired_is_decided_before_it_is_shown(how: str) -> None:
    """A read finds v2 at one replica, and another has promised: the round that got the promise may have seen v1 alone,
    so v2 must not be shown as if it stood."""
    async with Cluster(3) as cluster:
        wire = await cluster.wire(0)
        for i in range(3):
            cluster.plant(i, "k", b"v1", at_ms=1000)
        cluster.plant(0, "k", b"v2", at_ms=2000)
        promised: list[object] = []
        for i in (1, 2):
            cluster.node(i).acceptor.prepare([b"k"], [ballot(5, 7)], lambda *said: promised.append(said))
        await until(lambda: len(promised) == 2)
        cluster.rule(lambda src, dst, m: LOST if dst == "n2" and isinstance(m, ReplicaRead | ReplicaScan) else None)
        if how == "read":
            shown = (await wire.ask(Get(0, Consistency.QUORUM, 3000, [b"k"]))).records[0]
        else:
            shown = (await wire.ask(Scan(0, Consistency.QUORUM, 3000, b"", b"", 10))).records[0]
        assert shown[HEADER:] == b"v2"
        assert sum(is_register(record) and state_of(record).value == b"v2" for record in cluster.held("k")) >= 2


@pytest.mark.parametrize("how", ["a coordinator", "the client", "a scan"])
async def test_what_a_migration_brings_below_a_promise_is_no_vote(how: str) -> None:
    """n0 alone has accepted v1; n1 and n2 have promised more, to somebody who found nothing, when a migration brings v1
    to n1. So v1 may still be passed over, though two of three hold it: it is decided before it is shown (R2, R9)."""
    async with Cluster(3) as cluster:
        wire, client = await cluster.wire(0), await cluster.client()
        found: list[list[bytes | None]] = []
        for i in (1, 2):
            cluster.node(i).acceptor.prepare([b"k"], [ballot(5, 7)], lambda held, *_: found.append(held))
        await until(lambda: len(found) == 2)
        assert found == [[None], [None]]
        v1 = register_of(b"k", ballot(4, 7), State(4 << 16, b"v1"))
        stored: list[object] = []
        cluster.node(0).acceptor.accept([b"k"], [v1], lambda *said: stored.append(said))
        cluster.node(1).replica.write(FILL, [b"k"], [v1], False, lambda *said: stored.append(said))
        await until(lambda: len(stored) == 2)
        assert cluster.held("k") == [v1, v1, None]
        shown: list[bytes | None] = []
        for i in (0, 1):
            cluster.node(i).replica.read([b"k"], lambda records, *_: shown.extend(records), mark=True)
        await until(lambda: len(shown) == 2)
        assert [record and record[FLAGS] & UNVOTED for record in shown] == [0, UNVOTED]

        cluster.rule(lambda src, dst, m: LOST if dst == "n2" and isinstance(m, ReplicaRead | ReplicaScan) else None)
        if how == "a coordinator":
            record = (await wire.ask(Get(0, Consistency.LINEARIZABLE, 3000, [b"k"]))).records[0]
            assert record[HEADER:] == b"v1"
        elif how == "a scan":
            record = (await wire.ask(Scan(0, Consistency.LINEARIZABLE, 3000, b"", b"", 10))).records[0]
            assert record[HEADER:] == b"v1"
        else:
            assert await client.get("k", consistency=Consistency.LINEARIZABLE) == b"v1"
        refused: list[object] = []
        other = register_of(b"k", ballot(5, 7), State(5 << 16, b"v2"))  # of whoever found nothing
        for i in (1, 2):
            cluster.node(i).acceptor.accept([b"k"], [other], lambda places, error: refused.append(places))
        await until(lambda: len(refused) == 2)
        assert any(refused), "v1 was shown, and v2 was chosen without it"
        assert await client.get("k", consistency=Consistency.LINEARIZABLE) == b"v1"


async def test_a_promise_of_a_node_that_does_not_hold_the_key_is_forgotten() -> None:
    async with Cluster(4) as cluster:
        stranger = next(iter({0, 1, 2, 3} - set(cluster.holders("k"))))
        acceptor = cluster.node(stranger).acceptor
        promised: list[object] = []
        acceptor.prepare([b"k"], [ballot(5, 7)], lambda *said: promised.append(said))
        await until(lambda: promised)
        assert acceptor.promises == 1
        await until(lambda: not acceptor.promises)
        assert cluster.held("k") == [None] * 4  # and nothing had to be decided for that


def test_a_key_that_is_promised_again_and_again_does_not_hide_others_that_were_abandoned() -> None:
    now = [0.0]

    class Kept:
        promises: dict[bytes, bytes] = {}  # one of them is made
        store = SimpleNamespace(voting_refusal="")
        floors = Floors()

        def decide(self, keys: list[bytes], decide: Any, done: Any, *, values: bool) -> None:
            decide([None] * len(keys))
            done(None)

    acceptor = Acceptor(cast(Any, Kept()), cast(Any, SimpleNamespace(monotonic=lambda: now[0])))
    acceptor.prepare([b"busy"], [ballot(1, 7)], lambda *said: None)
    acceptor.prepare([b"left"], [ballot(1, 7)], lambda *said: None)
    for ms in range(2, 10):
        now[0] += 0.5
        acceptor.prepare([b"busy"], [ballot(ms, 7)], lambda *said: None)
    assert acceptor.abandoned(10) == [b"left"]


def test_a_promise_that_could_not_be_stored_is_not_given_to_the_same_message_once_more() -> None:
    wanted = ballot(1, 7)

    async def main(sim: Simulation) -> None:
        disk = SimDisk("n1", sim.stream("disk"), sim.trace)
        store, clock = disk.store(), sim.host("n1").clock
        await store.open()
        acceptor = Acceptor(Replica(store, HLC(), clock, Metrics(), max_clock_skew_ms=5000), clock)
        told: list[tuple[object, object, bytes]] = []

        def done(records: object, refusals: object, error: object) -> None:
            told.append((refusals, error, disk.durable_promise(b"k")))

        disk.faults.full_chance = 1.0
        acceptor.prepare([b"k"], [wanted], done)
        await asyncio.sleep(1)
        assert len(told) == 1 and told[0][1] is not None
        disk.faults.full_chance = 0.0
        acceptor.prepare([b"k"], [wanted], done)  # the network has brought it twice
        await asyncio.sleep(1)
        assert told[1:] == [(None, None, wanted)]
        acceptor.prepare([b"k"], [ballot(1, 8)], done)
        await asyncio.sleep(1)
        assert told[2:] == [([(0, wanted)], None, wanted)]

    run_simulation(main, seed=1)


async def test_bad_input_changes_nothing() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        await client.put("k", b"word")
        with pytest.raises(NotACounter):
            await client.incr("k")
        await client.put("big", b"%d" % ((1 << 63) - 1))
        with pytest.raises(NotACounter):
            await client.incr("big")
        for version in (0, -1, "1", True, 1.5, 1 << 63):
            with pytest.raises(InvalidRequest):
                await client.put("k", b"x", if_version=version)  # type: ignore[arg-type]  # that is the test
        with pytest.raises(InvalidRequest):
            await client.put("k", b"x", if_version=1, if_absent=True)
        for ttl in (-1, 0, float("nan")):
            with pytest.raises(InvalidTTL):
                await client.put("k", b"x", if_absent=True, ttl_seconds=ttl)
        with pytest.raises(InvalidValue):
            await client.compare_and_set("k", b"word", "text")  # type: ignore[arg-type]  # that is the test
        with pytest.raises(InvalidRequest):
            await client.incr("k", 1 << 63)
        version = await client.put("k", b"word", if_version=await client.put("k", b"word"))
        fence = Fence("l", 7)
        for call in (
            client.put("k", b"x", if_version=version, consistency="BOGUS"),
            client.put("k", b"x", fence=fence, consistency="BOGUS"),
            client.delete("k", if_version=version, consistency="BOGUS"),
            client.get("k", fence=fence, consistency="BOGUS"),
            client.get_entry("k", fence=fence, consistency="BOGUS"),
        ):
            with pytest.raises(InvalidConsistency):
                await call
        for absent in ("no", 1, 0, None):
            with pytest.raises(InvalidRequest, match="if_absent"):
                await client.put("k2", b"x", if_absent=absent)  # type: ignore[arg-type]  # that is the test
        with pytest.raises(InvalidRequest, match="no ttl"):
            await client.compare_and_set("k", b"word", None, ttl_seconds=5)
        with pytest.raises(InvalidRequest, match="function"):
            await client.update("k", None)  # type: ignore[arg-type]  # that is the test
        entry = await client.get_entry("k")
        assert entry is not None and entry.version == version and await client.get("k2") is None
        await client.put("k", b"word", fence=Fence("l", 6))  # no fence was shown
        assert await client.get("k") == b"word"
