"""The simulation's own parts: time, ownership, crashes, clocks, disk, trace, network and fault plans."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import secrets
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from agi.core.dht.errors import ConnectFailed, FolderUnusable, StorageClosed, StorageError, StorageFull
from agi.core.dht.protocol.messages import EpochPrepare, Goodbye, Query, QueryReply, ReplicaWrite, TopologyNews
from agi.core.dht.protocol.record import pack, shrink
from agi.core.dht.ring import token_bytes
from agi.core.dht.storage.base import Batch
from agi.core.dht.testing import (
    Deadlock,
    DiskFaults,
    Fault,
    FaultDriver,
    FaultKind,
    FaultMix,
    FaultPlan,
    LimitReached,
    LinkFaults,
    Run,
    SimClock,
    SimDisk,
    SimNetwork,
    SimStore,
    SimTransport,
    Simulation,
    SimulationError,
    Trace,
    run_simulation,
)
from agi.core.dht.topology import Member, Topology

Body = Callable[[Simulation], Coroutine[Any, Any, Any]]


def simulate(body: Body, seed: int = 1, limit_s: float = 1000.0, **limits: Any) -> Run[Any]:
    return run_simulation(body, seed=seed, limit_s=limit_s, **limits)


# --- the loop


def test_time_jumps_and_a_day_costs_nothing() -> None:
    async def body(sim: Simulation) -> list[float]:
        loop = asyncio.get_running_loop()
        seen = [loop.time()]
        await asyncio.sleep(86_400)
        seen.append(loop.time())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await loop.create_future()
        return [*seen, loop.time()]

    began = time.monotonic()
    run = simulate(body, limit_s=1e6)
    assert run.value == [0.0, 86_400.0, 86_405.0]
    assert run.time_s == 86_405.0
    assert time.monotonic() - began < 5


def test_timers_run_in_order_of_time_then_of_creation_and_cancelled_ones_never() -> None:
    async def body(sim: Simulation) -> list[str]:
        loop = asyncio.get_running_loop()
        ran: list[str] = []
        loop.call_later(2, ran.append, "late")
        loop.call_later(1, ran.append, "first")
        loop.call_later(1, ran.append, "second")
        loop.call_later(1.5, ran.append, "never").cancel()
        for _ in range(1000):  # enough to make the loop drop cancelled timers while others are set
            loop.call_later(50, ran.append, "never").cancel()
        loop.call_soon(ran.append, "now")
        await asyncio.sleep(3)
        return ran

    run = simulate(body)
    assert run.value == ["now", "first", "second", "late"]
    assert run.time_s == 3.0


def test_deadlock_is_named_with_the_tasks_that_wait() -> None:
    async def stuck_forever() -> None:
        await asyncio.get_running_loop().create_future()

    async def body(sim: Simulation) -> None:
        host = sim.host("a")
        host.boot(stuck_forever)
        await asyncio.sleep(7)
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Deadlock, match=r"at 7.000000 s") as caught:
        simulate(body)
    assert "a.1 (running)" in str(caught.value)
    assert "stuck_forever" in str(caught.value)
    assert any("seed 1" in note for note in caught.value.__notes__)


def test_virtual_time_limit() -> None:
    async def body(sim: Simulation) -> None:
        while True:
            await asyncio.sleep(10)
            assert sim.now <= 100

    with pytest.raises(LimitReached, match=r"not done after 100 s"):
        simulate(body, limit_s=100)


def test_step_limit_ends_a_loop_that_never_waits() -> None:
    async def body(sim: Simulation) -> None:
        while True:
            await asyncio.sleep(0)
            assert sim.now == 0

    with pytest.raises(LimitReached, match=r"callbacks"):
        simulate(body, steps_max=10_000)


def test_exception_in_a_callback_fails() -> None:
    async def body(sim: Simulation) -> None:
        asyncio.get_running_loop().call_later(1, lambda: 1 // 0)
        await asyncio.sleep(5)

    with pytest.raises(SimulationError, match="ZeroDivisionError") as caught:
        simulate(body)
    assert "at 1.000000 s" in str(caught.value)


async def _fail() -> None:
    raise LookupError("lost")


@pytest.mark.parametrize("held", [True, False])
def test_exception_of_a_task_that_nobody_asks_fails(held: bool) -> None:
    keep: list[asyncio.Task[None]] = []

    async def body(sim: Simulation) -> None:
        task = asyncio.create_task(_fail())
        if held:
            keep.append(task)
        del task
        await asyncio.sleep(5)

    with pytest.raises(SimulationError, match=r"lost|never retrieved"):
        simulate(body)


def test_exception_that_is_retrieved_does_not_fail() -> None:
    async def body(sim: Simulation) -> str:
        task = asyncio.create_task(_fail())
        await asyncio.wait([task])
        return str(task.exception())

    assert simulate(body).value == "lost"


def test_main_exception_comes_through_with_seed_and_hidden_failures() -> None:
    keep: list[asyncio.Task[None]] = []

    async def body(sim: Simulation) -> None:
        keep.append(asyncio.create_task(_fail()))
        await asyncio.sleep(1)
        raise AssertionError("a checker's verdict")

    with pytest.raises(AssertionError, match="a checker's verdict") as caught:
        simulate(body, seed=42)
    notes = "\n".join(caught.value.__notes__)
    assert "seed 42" in notes
    assert "lost" in notes


def test_threads_and_sockets_are_refused() -> None:
    async def body(sim: Simulation) -> None:
        loop = asyncio.get_running_loop()
        errors: list[Exception] = []

        def other_thread() -> None:
            try:
                loop.call_soon_threadsafe(print)
            except SimulationError as error:
                errors.append(error)

        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
        assert len(errors) == 1
        with pytest.raises(SimulationError, match="create_server"):
            await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
        with pytest.raises(SimulationError, match="create_connection"):
            await asyncio.open_connection("127.0.0.1", 1)

    simulate(body)


def test_executor_runs_in_the_loop_and_takes_virtual_time() -> None:
    async def body(sim: Simulation) -> None:
        main = threading.get_ident()
        assert await asyncio.to_thread(threading.get_ident) == main
        assert 0 < sim.now <= 0.001
        with pytest.raises(LookupError):
            await asyncio.to_thread(lambda: {}["x"])

    simulate(body)


# --- hosts


async def _tick(into: list[object], every_s: float = 1.0) -> None:
    while True:
        await asyncio.sleep(every_s)
        into.append(asyncio.get_running_loop().time())


def test_kill_drops_pending_callbacks_timers_and_cleanup() -> None:
    effects: list[str] = []

    async def child() -> None:
        try:
            await asyncio.sleep(3)
            effects.append("slept")
        except BaseException:
            effects.append("caught")
            raise
        finally:
            effects.append("finally")

    async def stubborn() -> None:
        while True:
            try:
                await asyncio.sleep(3)
            except GeneratorExit:
                effects.append("exit")
                await asyncio.sleep(1)
            finally:
                effects.append("more")

    async def body(sim: Simulation) -> tuple[list[str], float]:
        shared: asyncio.Future[None] = sim.loop.create_future()

        async def main() -> None:
            loop = asyncio.get_running_loop()
            loop.call_later(3, effects.append, "timer")
            loop.call_soon(loop.call_later, 2.5, effects.append, "nested timer")
            shared.add_done_callback(lambda _: effects.append("future callback"))
            async with asyncio.TaskGroup() as group:
                group.create_task(child())
                group.create_task(stubborn())

        host = sim.host("a")
        host.boot(main)
        await asyncio.sleep(2)
        host.run(sim.loop.call_soon, effects.append, "ready at the kill")
        host.kill()
        assert not host.alive
        shared.set_result(None)
        await asyncio.sleep(10)
        gc.collect()
        return list(effects), sim.now

    assert simulate(body).value == ([], 12.0)


def test_what_is_buried_after_the_end_makes_no_noise(recwarn: pytest.WarningsRecorder) -> None:
    unraisable: list[object] = []
    before, sys.unraisablehook = sys.unraisablehook, unraisable.append

    async def messy() -> None:
        try:
            await asyncio.sleep(100)
        finally:
            task = asyncio.create_task(_fail())
            await task

    async def never_ends() -> None:
        while True:
            try:
                await asyncio.sleep(1)
            except BaseException:  # noqa: BLE001  # a program that cannot be stopped
                continue

    async def body(sim: Simulation) -> None:
        for name, main in (("a", messy), ("b", never_ends), ("c", messy)):
            sim.host(name).boot(main)
        await asyncio.sleep(0.5)
        sim.hosts["a"].kill()
        await asyncio.sleep(0.1)

    try:
        simulate(body)
        gc.collect()
    finally:
        sys.unraisablehook = before
    assert unraisable == []
    assert [str(warning.message) for warning in recwarn] == []


def test_kill_leaves_no_timer_behind_and_cancels_nothing_that_is_shared() -> None:
    shared: list[asyncio.Future[None]] = []

    async def body(sim: Simulation) -> None:
        shared.append(sim.loop.create_future())
        host = sim.host("a")

        async def main() -> None:
            sim.loop.call_later(100, print)
            await shared[0]

        host.boot(main)
        await asyncio.sleep(2)
        host.kill()
        await asyncio.shield(shared[0])

    with pytest.raises(Deadlock, match=r"at 2.000000 s"):
        simulate(body)
    assert not shared[0].cancelled()


def test_wake_up_by_another_host_belongs_to_the_waiter() -> None:
    """B sets the future that A awaits: what A does then is A's, and dies with A while B lives on."""

    async def body(sim: Simulation) -> tuple[list[object], list[object]]:
        of_a: list[object] = []
        of_b: list[object] = []
        shared: asyncio.Future[None] = sim.loop.create_future()

        async def a() -> None:
            await shared
            await _tick(of_a)

        async def b() -> None:
            await asyncio.sleep(1)
            shared.set_result(None)
            await _tick(of_b)

        sim.host("a").boot(a)
        sim.host("b").boot(b)
        await asyncio.sleep(3.5)
        sim.hosts["a"].kill()
        await asyncio.sleep(2)
        return of_a, of_b

    assert simulate(body).value == ([2.0, 3.0], [2.0, 3.0, 4.0, 5.0])


def test_kill_from_within_takes_effect_when_the_callback_ends() -> None:
    async def body(sim: Simulation) -> list[str]:
        ran: list[str] = []
        host = sim.host("a")

        async def main() -> None:
            loop = asyncio.get_running_loop()
            loop.call_soon(ran.append, "already ready")
            host.kill()
            ran.append("same turn")
            await asyncio.sleep(0)
            ran.append("next turn")

        host.boot(main)
        await host.wait_end()
        await asyncio.sleep(1)
        return ran

    assert simulate(body).value == ["same turn"]


def test_restart_is_a_new_incarnation_and_the_old_one_stays_dead() -> None:
    async def body(sim: Simulation) -> tuple[int, list[object]]:
        ran: list[object] = []
        host = sim.host("a")

        async def main() -> None:
            number = host.incarnation
            while True:
                await asyncio.sleep(1)
                ran.append(number)

        host.boot(main)
        with pytest.raises(SimulationError, match="running already"):
            host.boot(main)
        await asyncio.sleep(2.5)
        host.kill()
        host.boot(main)
        await asyncio.sleep(2.5)
        return host.incarnation, ran

    assert simulate(body).value == (2, [1, 1, 2, 2])


def test_return_of_main_ends_the_process_and_its_tasks() -> None:
    async def body(sim: Simulation) -> tuple[list[object], list[bool]]:
        ran: list[object] = []
        ends: list[bool] = []
        host = sim.host("a")
        host.on_end.append(ends.append)

        keep: list[object] = []

        async def holding() -> None:
            keep.append(asyncio.create_task(_tick(ran)))
            await asyncio.sleep(2.5)

        host.boot(holding)
        await host.wait_end()
        assert sim.now == 2.5
        await asyncio.sleep(5)
        return ran, ends

    assert simulate(body).value == ([1.0, 2.0], [False])


def test_main_that_raises_fails_the_simulation() -> None:
    async def body(sim: Simulation) -> None:
        sim.host("a").boot(_fail)
        await asyncio.sleep(1)

    with pytest.raises(SimulationError, match="main coroutine of a raised LookupError"):
        simulate(body)


def test_pause_delays_everything_until_resume_in_order() -> None:
    async def body(sim: Simulation) -> None:
        ran: list[object] = []
        host = sim.host("a")

        async def main() -> None:
            loop = asyncio.get_running_loop()
            loop.call_later(3, ran.append, "third")
            loop.call_later(2, ran.append, "second")
            loop.call_later(10, ran.append, "after")
            await asyncio.sleep(100)

        host.boot(main)
        await asyncio.sleep(1)
        host.pause()
        assert host.paused
        assert host.alive
        host.run(sim.loop.call_soon, ran.append, "first")
        await asyncio.sleep(7)
        assert ran == []
        host.resume()
        await asyncio.sleep(0.5)
        assert ran == ["first", "second", "third"]
        await asyncio.sleep(2)
        assert ran[3:] == ["after"]

    simulate(body)


def test_kill_of_a_paused_host_drops_what_waited() -> None:
    async def body(sim: Simulation) -> list[object]:
        ran: list[object] = []
        host = sim.host("a")
        host.boot(lambda: _tick(ran))
        await asyncio.sleep(1.5)
        host.pause()
        await asyncio.sleep(3)
        host.kill()
        host.resume()
        await asyncio.sleep(3)
        return ran

    assert simulate(body).value == [1.0]


# --- clocks


def test_clock_skew_jump_and_drift() -> None:
    async def body(sim: Simulation) -> None:
        right = sim.host("right").clock
        host = sim.host("wrong", skew_ms=-2000, rate=1.01, offset_s=500.0)
        clock = host.clock
        seen: list[float] = []

        async def main() -> None:
            loop = asyncio.get_running_loop()
            assert loop.time() == clock.monotonic() == 500.0
            for _ in range(100):
                when = loop.time() + 1.0
                await asyncio.sleep(1.0)
                assert when <= clock.monotonic() < when + 1e-6
            seen.append(sim.now)

        assert clock.wall_ms() - right.wall_ms() == -2000
        host.boot(main)
        await host.wait_end()
        assert seen == [pytest.approx(100 / 1.01, rel=1e-6)]
        monotonic = clock.monotonic()
        assert clock.wall_ms() - right.wall_ms() == pytest.approx(-2000 + 1000 * (100 - 100 / 1.01), abs=2)
        clock.jump(60_000)
        assert clock.wall_ms() - right.wall_ms() == pytest.approx(58_000 + 1000 * (100 - 100 / 1.01), abs=2)
        assert clock.monotonic() == monotonic

    simulate(body)


def test_a_timer_never_fires_early_by_the_clock_of_its_host() -> None:
    rng = random.Random(1)
    trace = Trace()
    for _ in range(5000):
        clock = SimClock(trace, rate=rng.uniform(0.95, 1.05), offset_s=rng.uniform(0, 1e5))
        trace.now = rng.uniform(0, 1e4)
        when = clock.monotonic() + rng.uniform(0, 10)
        trace.now = clock.true_time(when)
        assert when <= clock.monotonic() < when + 1e-8


def test_clock_refuses_an_unbounded_rate() -> None:
    async def body(sim: Simulation) -> None:
        with pytest.raises(ValueError, match="rate"):
            sim.host("a", rate=1.5)

    simulate(body)


# --- the disk


def _record(key: bytes, value: bytes, **fields: int) -> bytes:
    return pack(key, value, hlc=fields.pop("hlc", 1 << 16), writer=1, **fields)


def _batch(*keys: bytes, value: bytes = b"v") -> Batch:
    return Batch({key: _record(key, value) for key in keys}, list(keys))


async def _reopen(disk: SimDisk) -> SimStore:
    store = disk.store()
    await store.open()
    return store


def test_crash_loses_exactly_a_suffix_of_the_unsynced_batches() -> None:
    """Over many crashes every prefix survives once in a while, never a gap, never half a batch, never a synced one."""

    async def body(sim: Simulation) -> None:
        rng = sim.stream("disk")
        survived: set[int] = set()
        for _ in range(100):
            disk = SimDisk("d", rng, sim.trace)
            store = await _reopen(disk)
            await store.apply(_batch(b"s1", b"s2"))
            for number in range(4):
                store.write(_batch(b"a%d" % number, b"b%d" % number))
            keys = [b"%c%d" % (letter, number) for number in range(4) for letter in b"ab"]
            assert None not in store.read(keys)
            lost = disk.crash()
            with pytest.raises(StorageClosed):
                store.read([b"s1"])
            store = await _reopen(disk)
            assert None not in store.read([b"s1", b"s2"])
            there = [record is not None for record in store.read(keys)]
            kept = 4 - lost
            assert there == [True] * 2 * kept + [False] * 2 * lost
            assert disk.crashes_that_lost_data == (lost > 0)
            survived.add(kept)
        assert survived == {0, 1, 2, 3, 4}

    simulate(body)


def test_only_a_power_loss_loses_what_was_written() -> None:
    async def body(sim: Simulation) -> None:
        disk = SimDisk("d", sim.stream("disk"), sim.trace)
        for number in range(20):
            store = await _reopen(disk)
            store.write(_batch(b"k%d" % number))
            assert disk.crash(power_loss=False) == 0
        store = await _reopen(disk)
        assert (await store.count()).records == 20
        assert disk.crashes_that_lost_data == 0

    simulate(body)


def test_a_sync_covers_what_was_written_before_it_and_no_more() -> None:
    async def body(sim: Simulation) -> None:
        disk = SimDisk("d", sim.stream("disk"), sim.trace)
        store = await _reopen(disk)
        done: list[Exception | None] = []
        store.write(_batch(b"before"))
        store.sync(done.append)
        with pytest.raises(StorageError, match="one sync"):
            store.sync(done.append)
        store.write(_batch(b"after"))
        assert done == []
        assert disk.unsynced == 2
        await asyncio.sleep(1)
        assert done == [None]
        assert disk.unsynced == 1
        await store.close()
        assert disk.unsynced == 0

    simulate(body)


def test_metadata_is_synced_in_order_with_the_records() -> None:
    async def body(sim: Simulation) -> None:
        disk = SimDisk("d", sim.stream("disk"), sim.trace)
        store = await _reopen(disk)
        store.write(_batch(b"earlier"))
        await store.put_meta("topology", b"epoch 1")
        disk.crash()
        store = await _reopen(disk)
        assert await store.get_meta("topology") == b"epoch 1"
        assert await store.get_meta("other") is None
        assert store.read([b"earlier"]) != [None]

    simulate(body)


def test_a_killed_host_never_sees_its_sync_end() -> None:
    async def body(sim: Simulation) -> None:
        disk = SimDisk("d", sim.stream("disk"), sim.trace)
        disk.faults = DiskFaults(sync_s=(1.0, 1.0))
        host = sim.host("a")
        host.on_end.append(disk.end_hook)
        done: list[object] = []

        async def main() -> None:
            store = await _reopen(disk)
            store.write(_batch(b"k"))
            store.sync(done.append)
            try:
                await asyncio.sleep(100)
            finally:
                store.write(_batch(b"cleanup"))

        host.boot(main)
        await asyncio.sleep(0.5)
        with pytest.raises(FolderUnusable):
            await disk.store().open()
        writes = disk.writes
        host.kill()
        await asyncio.sleep(5)
        assert done == []
        assert disk.writes == writes
        assert disk.unsynced == 0
        await disk.store().open()

    simulate(body)


@pytest.mark.parametrize("inserts", [[], [b"new", b"old"]])
def test_a_batch_that_misnames_its_new_keys_is_a_bug_of_the_program(inserts: list[bytes]) -> None:
    async def body(sim: Simulation) -> None:
        store = await _reopen(SimDisk("d", sim.stream("disk"), sim.trace))
        store.write(_batch(b"old"))
        with pytest.raises(AssertionError, match="new keys"):
            store.write(Batch({key: _record(key, b"v") for key in (b"new", b"old")}, inserts))

    simulate(body)


def test_disk_faults_full_slow_and_failed_sync() -> None:
    async def body(sim: Simulation) -> None:
        disk = SimDisk("d", sim.stream("disk"), sim.trace)
        store = await _reopen(disk)
        disk.faults = DiskFaults(full_chance=1.0)
        with pytest.raises(StorageFull):
            store.write(_batch(b"k"))
        assert store.read([b"k"]) == [None]
        disk.faults = DiskFaults(slow_sync_chance=1.0, slow_sync_s=(3.0, 3.0))
        began = sim.now
        await store.apply(_batch(b"k"))
        assert sim.now - began == 3.0
        disk.faults = DiskFaults(sync_error_chance=1.0)
        with pytest.raises(StorageError):
            await store.apply(_batch(b"lost"))
        disk.faults = DiskFaults()
        for call in (lambda: store.write(_batch(b"x")), lambda: store.read([b"k"]), lambda: store.sync(print)):
            with pytest.raises(StorageError, match="unusable"):
                call()
        await store.close()
        store = await _reopen(disk)
        assert store.read([b"k"]) != [None]

    simulate(body)


def test_scans_counts_and_expiry_agree_with_a_model() -> None:
    async def body(sim: Simulation) -> None:
        rng = sim.stream("model")
        token = token_bytes("md5")
        disk = SimDisk("d", rng, sim.trace)
        store = await _reopen(disk)
        model: dict[bytes, bytes] = {}
        for number in range(600):
            key = b"key%02d" % rng.randrange(60)
            if rng.random() < 0.2:
                store.write(Batch(purges=[key]))
                model.pop(key, None)
            else:
                expires = rng.choice([0, 0, rng.randrange(1, 1000)])
                record = _record(key, b"v%d" % number, expires_ms=expires)
                if expires and rng.random() < 0.3:
                    record = shrink(key, record)
                store.write(Batch({key: record}, [] if key in model else [key]))
                model[key] = record
            if number % 200 == 100:
                await store.close()
                store = await _reopen(disk)
        ordered = sorted(model.items())
        assert (await store.count()).records == len(model)
        assert (await store.count()).exact
        page = await store.scan(b"key10", b"key30", 1000, 1 << 20)
        assert page.items == [item for item in ordered if b"key10" <= item[0] < b"key30"]
        assert page.complete
        assert (await store.scan(b"", None, 5, 1 << 20)).items == ordered[:5]
        assert not (await store.scan(b"", None, 5, 1 << 20)).complete
        assert (await store.scan(b"", None, 5, 1)).items == ordered[:1]
        by_token = sorted(model.items(), key=lambda item: (token(item[0]), item[0]))
        got: list[tuple[bytes, bytes]] = []
        after = None
        while True:
            part = await store.scan_tokens(0, (1 << 64) - 1, 7, after)
            got += part.items
            if part.complete:
                break
            after = part.items[-1][0]
        assert got == by_token
        low, high = 1 << 62, 3 << 62
        expected = [item for item in by_token if low <= int.from_bytes(token(item[0]), "big") <= high]
        assert (await store.scan_tokens(low, high, 1000)).items == expected
        due = [
            (int.from_bytes(record[32:40], "big"), key, record)
            for key, record in model.items()
            if 0 < int.from_bytes(record[32:40], "big") < 500 and not record[16] & 0x80
        ]
        assert await store.expired(500, 1000) == [(key, record) for _, key, record in sorted(due)]
        assert len(await store.expired(500, 2)) == 2

    simulate(body)


# --- the network


class _Echo:
    """Answers a Query with its body; remembers what arrives and which process's clock saw it."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.times: list[float] = []
        self.closed: list[object] = []

    def message(self, link: Any, message: Any) -> None:
        self.times.append(asyncio.get_running_loop().time())
        if isinstance(message, Query):
            self.bodies.append(message.key)
            link.send(QueryReply(message.id, message.key))
        else:
            self.bodies.append(message.body)

    def link_closed(self, link: Any, error: object) -> None:
        self.closed.append(error)


class _Pair:
    """A server on host b and a client on host a, connected."""

    def __init__(self, sim: Simulation, **clock: float) -> None:
        self.network = SimNetwork(sim.loop, sim.stream("network"))
        self.a, self.b = sim.host("a"), sim.host("b", **clock)  # type: ignore[arg-type]
        self.at_a, self.at_b = _Echo(), _Echo()
        self.link: Any = None
        for host in (self.a, self.b):
            self.network.attach(host)

    async def start(self) -> None:
        self.b.boot(self._serve)
        await asyncio.sleep(0.1)
        self.a.boot(self._connect)
        await asyncio.sleep(0.1)
        assert self.link is not None

    async def _serve(self) -> None:
        await SimTransport(self.network, "b").listen("b:7000", self.at_b)
        await asyncio.sleep(10_000)

    async def _connect(self) -> None:
        self.link = await SimTransport(self.network, "a").connect("b:7000", self.at_a)
        await asyncio.sleep(10_000)

    def ask(self, *bodies: bytes) -> None:
        for number, body in enumerate(bodies):
            self.a.run(self.link.send, Query(number, "status", 1000, body))


def test_handlers_run_as_their_host_and_a_message_survives_its_sender() -> None:
    async def body(sim: Simulation) -> None:
        pair = _Pair(sim, offset_s=300.0)
        await pair.start()
        pair.ask(b"1")
        await asyncio.sleep(1)
        assert pair.at_a.bodies == pair.at_b.bodies == [b"1"]
        assert 300 < pair.at_b.times[0] < 301 and pair.at_a.times[0] < 1  # each by its own clock
        pair.ask(b"2")
        pair.a.kill()
        await asyncio.sleep(1)
        assert pair.at_b.bodies == [b"1", b"2"]  # it was on the wire
        assert pair.at_a.bodies == [b"1"]
        await asyncio.sleep(20)
        assert len(pair.at_b.closed) == 1  # found by silence
        assert pair.at_a.closed == []

    simulate(body)


def test_messages_to_a_paused_host_wait_and_to_a_dead_one_vanish() -> None:
    async def body(sim: Simulation) -> None:
        pair = _Pair(sim)
        await pair.start()
        pair.b.pause()
        pair.ask(b"1", b"2", b"3")
        await asyncio.sleep(2)
        assert pair.at_b.bodies == []
        pair.b.resume()
        await asyncio.sleep(1)
        assert pair.at_b.bodies == [b"1", b"2", b"3"]
        assert pair.at_a.bodies == [b"1", b"2", b"3"]
        pair.ask(b"4")
        pair.b.kill(power_loss=False)
        await asyncio.sleep(1)
        assert pair.at_b.bodies == [b"1", b"2", b"3"]
        assert len(pair.at_a.closed) == 1  # its kernel said so at once

    simulate(body)


def test_peers_of_a_host_that_stays_paused_close_their_links() -> None:
    async def body(sim: Simulation) -> None:
        pair = _Pair(sim)
        await pair.start()
        await asyncio.sleep(30)
        assert pair.at_a.closed == []
        pair.b.pause()
        await asyncio.sleep(30)
        assert len(pair.at_a.closed) == 1
        assert pair.at_b.closed == []

    simulate(body)


def test_an_exception_in_a_handler_fails_the_simulation() -> None:
    async def body(sim: Simulation) -> None:
        pair = _Pair(sim)
        await pair.start()
        pair.at_b.message = lambda link, message: 1 // 0  # type: ignore[method-assign]
        pair.ask(b"1")
        await asyncio.sleep(1)

    with pytest.raises(SimulationError, match="division"):
        simulate(body)


def test_order_loss_duplicates_and_reordering() -> None:
    async def body(sim: Simulation) -> None:
        pair = _Pair(sim)
        await pair.start()
        sent = [b"%03d" % number for number in range(200)]
        network = pair.network

        async def exchange(faults: LinkFaults) -> list[bytes]:
            network.faults = faults
            pair.at_b.bodies.clear()
            pair.ask(*sent)
            await asyncio.sleep(2)
            return list(pair.at_b.bodies)

        assert await exchange(LinkFaults()) == sent
        assert network.lost == network.duplicated == network.reordered == 0
        got = await exchange(LinkFaults(loss_chance=0.3))
        assert got == sorted(got)
        assert 100 < len(got) < 180
        assert network.lost >= 200 - len(got)
        got = await exchange(LinkFaults(duplicate_chance=0.3))
        assert set(got) == set(sent)
        assert 220 < len(got) < 300
        assert network.duplicated >= len(got) - 200
        got = await exchange(LinkFaults(reorder_chance=0.3))
        assert got != sent
        assert sorted(got) == sent
        assert network.reordered > 30

    simulate(body)


def test_partitions_one_way_and_clogging() -> None:
    async def body(sim: Simulation) -> None:
        pair = _Pair(sim)
        await pair.start()
        network = pair.network
        network.block([("b", "a")])
        pair.ask(b"1")
        await asyncio.sleep(1)
        assert (pair.at_b.bodies, pair.at_a.bodies) == ([b"1"], [])
        network.heal()
        network.partition(["a"])
        pair.ask(b"2")
        await asyncio.sleep(1)
        assert pair.at_b.bodies == [b"1"]
        attempt = pair.a.spawn(SimTransport(network, "a").connect("b:7000", _Echo(), 0.5))
        await asyncio.wait([attempt], timeout=5)
        assert isinstance(attempt.exception(), ConnectFailed)
        network.heal()
        assert network.partitions == 2
        assert network.blocked >= 2
        network.clog("a", "b", 3.0)
        pair.ask(b"3", b"4")
        await asyncio.sleep(2.9)
        assert pair.at_b.bodies == [b"1"]
        await asyncio.sleep(1)
        assert pair.at_b.bodies == [b"1", b"3", b"4"]

    simulate(body)


# --- fault plans


def test_a_plan_is_drawn_from_its_seed_and_keeps_its_bounds() -> None:
    hosts = ["n1", "n2", "n3", "n4", "n5"]
    mix = FaultMix(down_max=2)
    plans = [FaultPlan.draw(random.Random(seed), hosts, safety_s=60.0, mix=mix) for seed in range(20)]
    assert plans[3] == FaultPlan.draw(random.Random(3), hosts, safety_s=60.0, mix=mix)
    assert len({str(plan) for plan in plans}) == 20
    assert {fault.kind for plan in plans for fault in plan.faults} == set(mix.every_s)
    for plan in plans:
        assert list(plan.faults) == sorted(plan.faults, key=lambda fault: fault.at_s)
        down: list[tuple[float, int]] = []
        for fault in plan.faults:
            assert 0 <= fault.at_s < fault.at_s + fault.for_s <= 60.0 + 1e-9
            if fault.kind in (FaultKind.CRASH, FaultKind.PAUSE):
                down += [(fault.at_s, 1), (fault.at_s + fault.for_s, -1)]
        depth = most = 0
        for _, change in sorted(down, key=lambda entry: (entry[0], entry[1])):
            depth += change
            most = max(most, depth)
        assert most <= 2


async def _cluster(sim: Simulation) -> tuple[FaultDriver, SimNetwork, dict[str, SimDisk]]:
    """Three hosts that write to their disks and query each other for ever, under a plan of faults."""
    network = SimNetwork(sim.loop, sim.stream("network"))
    names = ["n1", "n2", "n3"]
    disks = {name: SimDisk(name, sim.stream(f"disk/{name}"), sim.trace) for name in names}
    for name in names:
        host = sim.host(name, rate=1.0 + sim.stream(name).uniform(-0.01, 0.01))
        host.on_end.append(disks[name].end_hook)
        network.attach(host)

    def boot(name: str) -> None:
        async def main() -> None:
            transport = SimTransport(network, name)
            store = await _reopen(disks[name])
            await transport.listen(f"{name}:7000", _Echo())
            number = 0
            while True:
                await asyncio.sleep(0.05)
                number += 1
                try:
                    batch = _batch(b"%s-%d" % (name.encode(), number % 50))
                    batch.inserts = [key for key in batch.inserts if store.headers([key]) == [None]]
                    store.write(batch)
                    if number % 3 == 0:
                        await store.apply(Batch())
                except StorageFull:
                    continue
                except StorageError:
                    return
                for other in names:
                    if other != name:
                        try:
                            link = await transport.connect(f"{other}:7000", _Echo(), 0.2)
                            link.send(Query(number, "status", 100, uuid.uuid4().bytes))
                        except ConnectFailed:
                            continue

        sim.hosts[name].boot(main)

    for name in names:
        boot(name)
    plan = FaultPlan.draw(sim.stream("plan"), names, safety_s=30.0)
    driver = FaultDriver(sim, network, disks, boot, plan)
    await driver.run()
    assert all(host.alive and not host.paused for host in sim.hosts.values())
    assert all(host.clock.skew_ms == 0 for host in sim.hosts.values())
    assert network.faults == LinkFaults()
    assert all(disk.faults == DiskFaults() for disk in disks.values())
    delivered = network.delivered
    await asyncio.sleep(10)
    assert network.delivered > delivered + 1000
    return driver, network, disks


def test_the_driver_injects_faults_and_heals_them() -> None:
    counts: dict[str, int] = {}

    async def body(sim: Simulation) -> None:
        driver, network, disks = await _cluster(sim)
        for kind, count in driver.counts.items():
            counts[kind] = counts.get(kind, 0) + count
        for name, value in (
            ("lost", network.lost),
            ("duplicated", network.duplicated),
            ("reordered", network.reordered),
            ("blocked", network.blocked),
            ("lost data", sum(disk.crashes_that_lost_data for disk in disks.values())),
        ):
            counts[name] = counts.get(name, 0) + value

    for seed in range(4):
        simulate(body, seed=seed)
    assert set(counts) >= set(FaultMix().every_s)
    assert all(counts.values()), counts


def test_healing_lifts_what_would_last_longer() -> None:
    async def body(sim: Simulation) -> None:
        network = SimNetwork(sim.loop, sim.stream("network"))
        names = ["n1", "n2", "n3"]
        booted: list[str] = []

        def boot(name: str) -> None:
            booted.append(name)
            sim.hosts[name].boot(lambda: asyncio.sleep(1000))

        for name in names:
            network.attach(sim.host(name, skew_ms=5))
            boot(name)
        faults = (
            Fault(1.0, 9.0, FaultKind.PAUSE, ("n1",)),
            Fault(1.5, 9.0, FaultKind.CRASH, ("n2",), 1),
            Fault(2.0, 9.0, FaultKind.CLOCK_JUMP, ("n3",), 777),
            Fault(2.5, 9.0, FaultKind.PARTITION, ("n3",)),
        )
        driver = FaultDriver(sim, network, {}, boot, FaultPlan(5.0, tuple(names), faults, LinkFaults(loss_chance=0.5)))
        task = asyncio.create_task(driver.run())
        await asyncio.sleep(4.5)
        assert sim.hosts["n1"].paused
        assert not sim.hosts["n2"].alive
        assert sim.hosts["n3"].clock.skew_ms == 782
        assert not network.can_connect("n1", "n3")
        assert network.can_connect("n1", "n2")
        assert network.faults.loss_chance == 0.5
        await task
        assert sim.now == 5.0
        assert all(host.alive and not host.paused and host.clock.skew_ms == 5 for host in sim.hosts.values())
        assert network.can_connect("n1", "n3")
        assert network.faults == LinkFaults()
        assert booted == [*names, "n2"]
        assert driver.counts == {fault.kind: 1 for fault in faults}

    simulate(body)


def test_the_coordinator_of_the_moment_is_isolated() -> None:
    async def body(sim: Simulation) -> None:
        network = SimNetwork(sim.loop, sim.stream("network"))
        for name in ("n1", "n2", "n3", "c1"):
            network.attach(sim.host(name))
        coordinator = ""
        faults = (
            Fault(1.0, 1.0, FaultKind.ISOLATE, ("n1",)),
            Fault(3.0, 1.0, FaultKind.ISOLATE, ("n1",), 1),
            Fault(5.0, 9.0, FaultKind.ISOLATE, ("n1",)),
        )
        plan = FaultPlan(6.0, ("n1", "n2", "n3"), faults)
        driver = FaultDriver(sim, network, {}, lambda name: None, plan, coordinator=lambda: coordinator)
        task = asyncio.create_task(driver.run())

        def reached(name: str) -> list[str]:
            return [other for other in sim.hosts if other != name and network.can_connect(name, other)]

        await asyncio.sleep(1.5)
        assert reached("n1") == ["c1"], "nobody is known to coordinate; clients reach it"
        assert reached("n2") == ["n3", "c1"]
        coordinator = "n2"
        await asyncio.sleep(1.0)
        assert reached("n1") == ["n2", "n3", "c1"]
        await asyncio.sleep(1.0)
        assert reached("n2") == [] and reached("n1") == ["n3", "c1"]
        coordinator = "n3"
        await asyncio.sleep(1.0)
        assert reached("n2") == ["n1", "n3", "c1"], "who was cut off is let back, not who coordinates by then"
        await asyncio.sleep(1.0)
        assert reached("n3") == ["c1"]
        await task
        assert reached("n3") == ["n1", "n2", "c1"]

    simulate(body)


def test_hosts_are_held_up_one_after_the_other_and_go_on_one_by_one() -> None:
    mix = FaultMix(every_s={FaultKind.SWIZZLE: 2.0}, for_s=(1.0, 2.0))
    plan = FaultPlan.draw(random.Random(3), ["n1", "n2", "n3", "n4"], safety_s=20.0, mix=mix)
    assert {len(fault.hosts) for fault in plan.faults} == {1}
    assert [fault.at_s for fault in plan.faults] == sorted(fault.at_s for fault in plan.faults)
    assert len({round(fault.at_s + fault.for_s, 6) for fault in plan.faults}) == len(plan.faults) > 4

    async def body(sim: Simulation) -> None:
        network = SimNetwork(sim.loop, sim.stream("network"))
        for name in ("n1", "n2", "n3"):
            network.attach(sim.host(name))
        plan = FaultPlan(6.0, ("n1", "n2", "n3"), (Fault(1.0, 2.0, FaultKind.SWIZZLE, ("n2",)),))
        task = asyncio.create_task(FaultDriver(sim, network, {}, lambda name: None, plan).run())
        await asyncio.sleep(1.5)
        delays = {(a, b): network.policy(a, b, Goodbye())[0] for a, b in (("n1", "n2"), ("n2", "n3"), ("n1", "n3"))}
        assert delays["n1", "n2"] > 1.4 and delays["n2", "n3"] > 1.4 and delays["n1", "n3"] < 0.2
        await task

    simulate(body)


def test_hosts_of_clients_are_stopped_and_set_too_and_healed() -> None:
    async def body(sim: Simulation) -> None:
        network = SimNetwork(sim.loop, sim.stream("network"))
        for name in ("n1", "n2", "c1"):
            network.attach(sim.host(name))
        sim.hosts["c1"].boot(lambda: asyncio.sleep(1000))
        faults = (Fault(1.0, 9.0, FaultKind.PAUSE, ("c1",)), Fault(1.0, 9.0, FaultKind.CLOCK_JUMP, ("c1",), -500))
        booted: list[str] = []
        driver = FaultDriver(sim, network, {}, booted.append, FaultPlan(5.0, ("n1", "n2"), faults))
        task = asyncio.create_task(driver.run())
        await asyncio.sleep(3)
        assert sim.hosts["c1"].paused and sim.hosts["c1"].clock.skew_ms == -500
        await task
        assert not sim.hosts["c1"].paused and sim.hosts["c1"].clock.skew_ms == 0
        assert set(booted) == {"n1", "n2"}, "clients are started by others"

    simulate(body)


def test_deaf_hosts_miss_records_and_untold_ones_the_next_epoch() -> None:
    first = Topology.first("dht", 3, 8, "xxh3", [Member("a", "d", "a:7000")])
    news = [TopologyNews(first.packed), TopologyNews(first.next(first.members, "second", 0).packed)]
    write = ReplicaWrite(1, 1, "", 0, [b"k"], [pack(b"k", b"v", 7, 1)], False)

    async def body(sim: Simulation) -> None:
        network = SimNetwork(sim.loop, sim.stream("network"))
        for name in "abc":
            network.attach(sim.host(name))
            sim.hosts[name].boot(lambda: asyncio.sleep(1000))
        faults = (
            Fault(1.0, 1.0, FaultKind.DEAF, ("b",), 100),
            Fault(2.5, 1.0, FaultKind.UNTOLD, ("b", "c")),
            Fault(6.0, 0.0, FaultKind.WIPE, ("a",)),
            Fault(7.0, 0.0, FaultKind.WIPE, ("b",)),
        )
        wiped: list[str] = []

        def wipe(name: str) -> bool:
            wiped.append(name)
            return name == "b"

        plan = FaultPlan(8.0, ("a", "b", "c"), faults)
        driver = FaultDriver(sim, network, {}, lambda name: None, plan, wipe)
        task = asyncio.create_task(driver.run())

        def heard(message: object) -> str:
            return "".join(name for name in "abc" if network.policy("a", name, message))  # type: ignore[arg-type]

        assert heard(news[0]) == heard(write) == "abc"
        await asyncio.sleep(1.5)
        assert (heard(write), heard(news[0])) == ("ac", "abc")
        await asyncio.sleep(1.5)
        assert (heard(write), heard(news[0])) == ("abc", "abc")  # the epoch that all know by now
        await asyncio.sleep(2.0)
        assert (heard(news[1]), heard(news[0]), heard(write)) == ("a", "a", "abc")
        assert heard(EpochPrepare(1, 3, (1, 1), news[1].topology)) == "a"
        await asyncio.sleep(1.1)
        assert heard(news[1]) == "abc"
        await task
        assert wiped == ["a", "b"] and driver.counts[FaultKind.WIPE] == 1

    simulate(body)


# --- determinism


def _cluster_hash(seed: int, path: Path | None = None) -> str:
    async def body(sim: Simulation) -> None:
        await _cluster(sim)

    return run_simulation(body, seed=seed, limit_s=1000, trace_path=path).hash


def test_a_seed_replays_in_any_process_and_seeds_differ() -> None:
    here = [_cluster_hash(5), _cluster_hash(5), _cluster_hash(6)]
    assert here[0] == here[1] != here[2]
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('infrastructure', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module._cluster_hash(5))\n"
    )
    for hash_seed in ("1", "77"):
        child = subprocess.run(
            [sys.executable, "-c", code, __file__],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert child.stdout.split() == [here[0]]


def test_entropy_of_the_system_is_seeded_and_given_back() -> None:
    async def body(sim: Simulation) -> tuple[object, ...]:
        return uuid.uuid4(), secrets.token_hex(8), os.urandom(4), random.getrandbits(32)

    assert simulate(body, seed=3).value == simulate(body, seed=3).value != simulate(body, seed=4).value
    assert uuid.uuid4() != uuid.uuid4()
    assert secrets.token_hex(8) != secrets.token_hex(8)


def test_one_stream_does_not_disturb_another() -> None:
    async def body(sim: Simulation) -> None:
        first, second = sim.stream("a"), sim.stream("b")
        first.random()
        assert second.random() == sim.stream("b").random() != sim.stream("a").random()

    simulate(body)


def test_trace_digests_time_kind_and_text(tmp_path: Path) -> None:
    def hash_of(*lines: tuple[float, str, str]) -> str:
        trace = Trace()
        for at, kind, text in lines:
            trace.now = at
            trace.record(kind, text)
        return trace.hash()

    base = hash_of((1.0, "send", "a b"))
    assert base == hash_of((1.0, "send", "a b"))
    assert len({base, hash_of((2.0, "send", "a b")), hash_of((1.0, "drop", "a b")), hash_of((1.0, "send", "a c"))}) == 4
    trace = Trace(tmp_path / "trace.txt")
    trace.advance(1.5, 10)
    trace.record("send", "a")
    trace.record("send", "b")
    before = trace.hash()
    trace.record("drop")
    assert trace.hash() != before
    trace.close()
    assert trace.counts == {"send": 2, "drop": 1}
    assert (tmp_path / "trace.txt").read_text().splitlines()[:2] == ["1.500000000 jump 10", "1.500000000 send a"]
    with pytest.raises(ValueError, match="address"):
        trace.record("send", repr(object()))


def test_the_trace_text_of_two_runs_is_equal(tmp_path: Path) -> None:
    paths = [tmp_path / "one", tmp_path / "two"]
    assert len({_cluster_hash(9, path) for path in paths}) == 1
    assert paths[0].read_text() == paths[1].read_text()
    assert len(paths[0].read_text().splitlines()) > 1000
