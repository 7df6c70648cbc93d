"""Keys under consensus in the simulation: what is recorded of sets and locks, and who may believe to hold one."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agi.core.dht.client.locks import Lock
from agi.core.dht.errors import DHTError, OutcomeUnknown, Unavailable, VersionConflict
from agi.core.dht.testing import Profile, Scenario, SimCluster, Simulation, quiet_logs, run_seed, run_simulation
from agi.core.dht.testing.conditional import MEMBERS_MAX, ConditionalWork
from agi.core.dht.testing.history import Function, History, Outcome
from agi.core.dht.testing.locking import Exclusion
from agi.core.dht.testing.workload import fresh_values
from agi.core.dht.types import Consistency


class _Held:
    """What `Exclusion` looks at of a lock."""

    def __init__(self, name: str, token: int) -> None:
        self.name, self.token, self.held = name, token, True


def test_two_that_believe_to_hold_a_lock_at_one_moment_are_found() -> None:
    found: list[str] = []
    exclusion = Exclusion(found.append)
    first, other, second = _Held("a", 1), _Held("b", 2), _Held("a", 3)
    exclusion.enter(cast(Lock, first))
    exclusion.enter(cast(Lock, other))
    first.held = False
    exclusion.enter(cast(Lock, second))
    assert found == [] and exclusion.entered == 3
    first.held = True  # its lease was over, and is not to begin again
    exclusion.look("b")
    assert found == []
    exclusion.look("a")
    assert found == ["a is held at one time by holders of 1, 3"]


class _Sets:
    """A client whose `update` is overtaken as often as is wanted, and ends in an error then."""

    def __init__(self, values: list[bytes | None], error: DHTError | None) -> None:
        self.values, self.error = values, error

    async def update(self, key: str, change: Callable[[bytes | None], bytes | None], timeout: float) -> bytes | None:
        after = None
        for value in self.values:
            after = change(value)
        if self.error is not None:
            raise self.error
        return after


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, Outcome.OK),
        (Unavailable("x"), Outcome.FAIL),
        (OutcomeUnknown("x"), Outcome.INFO),
        (VersionConflict("x"), Outcome.FAIL),
    ],
)
def test_each_try_of_an_update_is_a_read_and_a_compare_and_set(error: DHTError | None, outcome: Outcome) -> None:
    ticks = iter(range(1000))
    history = History(lambda: next(ticks))
    work = ConditionalWork("c", history, [], [], random.Random(1), fresh_values(), 0.0, lambda: 0.0, ["s"])
    client = cast(Any, _Sets([None, b"x,y"], error))
    asyncio.run(work._update(client, "s", 1.0))
    reads = [op for op in history.operations if op.f == Function.READ]
    swaps = [op for op in history.operations if op.f == Function.CAS]
    assert [(op.outcome, op.result) for op in reads[:2]] == [(Outcome.OK, None), (Outcome.OK, "x,y")]
    assert [op.outcome for op in reads[2:]] == [Outcome.FAIL], "there was no third try"
    assert [op.outcome for op in swaps] == [Outcome.FAIL, outcome]
    assert swaps[0].value == [None, "v1"] and isinstance(swaps[1].value, list) and swaps[1].value[0] == "x,y"


@pytest.mark.parametrize(("level", "outcome"), [("QUORUM", Outcome.FAIL), ("LINEARIZABLE", Outcome.OK)])
def test_a_version_that_is_gone_tells_of_another_value_unless_that_was_written_twice(
    level: str, outcome: Outcome
) -> None:
    class Client:
        """One whose every key is always at another version than it says."""

        value = b""

        async def put(self, key: str, value: bytes, if_version: int = 0, **_: object) -> int:
            if if_version:
                raise VersionConflict("x")
            self.value = value
            return 1

        async def get_entry(self, key: str, timeout: float) -> SimpleNamespace:
            return SimpleNamespace(value=self.value, version=1)

    ticks = iter(range(1000))
    history = History(lambda: next(ticks))
    work = ConditionalWork("c", history, ["r"], [], random.Random(1), fresh_values(), 0.0, lambda: 0.0)
    client = cast(Any, Client())
    asyncio.run(work._write(client, "r", Consistency[level], 1.0))
    asyncio.run(work._versioned(client, "r", 1.0))
    writes = [op.outcome for op in history.operations if op.f == Function.WRITE]
    assert writes == ([Outcome.OK, Outcome.INFO] if level == "QUORUM" else [Outcome.OK])
    swap = history.operations[-1]
    assert (swap.f, swap.outcome) == (Function.CAS, outcome) and swap.result in (None, False)


def test_a_set_changes_by_one_member_and_stays_small() -> None:
    work = ConditionalWork("c", History(lambda: 0), [], [], random.Random(1), fresh_values(), 0.0, lambda: 0.0, ["s"])
    value: bytes | None = None
    sizes: Counter[int] = Counter()
    for _ in range(300):
        before = set() if value is None else set(value.split(b","))
        value = work._other(value)
        after = set() if value is None else set(value.split(b","))
        assert len(before ^ after) == 1 and (value is None or value == b",".join(sorted(after)))
        sizes[len(after)] += 1
    assert set(sizes) == set(range(MEMBERS_MAX + 1))


def test_seeds_of_consensus_have_sets_and_locks_and_holders_that_are_stopped() -> None:
    drawn = [Scenario.draw(seed, Profile.CONSENSUS) for seed in range(1, 41)]
    assert {scenario.workload.sets for scenario in drawn} == {0, 1}
    with_locks = [scenario for scenario in drawn if scenario.workload.locking is not None]
    assert 10 < len(with_locks) < 30
    for scenario in with_locks:
        assert scenario.workload.locking is not None
        hosts = set(scenario.workload.locking.hosts)
        assert hosts & {name for fault in scenario.plan.faults for name in fault.hosts}
        assert not hosts & set(scenario.plan.hosts)


def test_locks_are_taken_lost_and_had_again_in_the_end() -> None:
    counts: Counter[str] = Counter()
    seeds = [seed for seed in range(1, 30) if Scenario.draw(seed, Profile.CONSENSUS).workload.locking][:5]
    for seed in seeds:
        report = run_seed(seed, profile=Profile.CONSENSUS)
        assert not report.findings, f"{report}\n{report.plan}"
        counts.update(report.counts)
    assert counts["locks taken"] > 20 and counts["locks lost"] and counts["late fenced writes"] > 5, counts


def test_a_lock_that_nobody_gives_back_can_be_had_a_lease_later_but_not_without_a_cluster() -> None:
    async def body(sim: Simulation) -> None:
        scenario = next(
            each
            for each in (Scenario.draw(seed, Profile.CONSENSUS) for seed in range(1, 99))
            if each.workload.locking is not None and not each.joiners
        )
        cluster = SimCluster(sim, scenario)
        assert await cluster.wait_converged() is None
        host, found = cluster.client_host("app"), list[str]()

        async def app() -> None:
            async with cluster.client(host, sim.stream("app")) as client:
                await client.connect([f"{name}:7000" for name in scenario.nodes])
                exclusion = Exclusion(found.append)
                lock = await client.try_lock("a", ttl=0.5)
                assert lock is not None and await client.try_lock("a", ttl=0.5) is None
                exclusion.enter(lock)
                assert lock._renewals is not None
                lock._renewals.cancel()  # it is not renewed any more, as if its holder had been stopped
                async with client.lock("a", ttl=0.5, timeout=5.0) as next_lock:
                    exclusion.enter(next_lock)
                    assert next_lock.token > lock.token

        host.boot(app)
        await host.wait_end()
        assert found == []

    with quiet_logs():
        run_simulation(body, seed=1)
