"""One seed of the cluster simulation, from the first boot to the verdict.

1. The nodes boot in a drawn order; clients work; faults happen, from the start or once the cluster has formed.
2. Everything is healed. Clients finish. All nodes must be connected again within a bounded time.
3. At rest, all replicas of every key must become equal without being read; every key is read at QUORUM and all are
   scanned; then the history and the disks are judged (checks.py). In half of the seeds the reads come first. What was
   deleted must be reclaimed, and is looked for once more. Where nothing heals replicas by itself, which is so in churn,
   the nodes are told to repair and to reclaim.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

from agi.core.dht.client import DHTClient
from agi.core.dht.protocol.record import EXPIRES, FLAGS, HEADER, TOMBSTONE
from agi.core.dht.testing import conditional
from agi.core.dht.testing.checks import Call, Finding, History, Outcome, check_history, check_scan
from agi.core.dht.testing.cluster import CONVERGE_S, SimCluster
from agi.core.dht.testing.faults import FaultDriver
from agi.core.dht.testing.history import History as Decisions
from agi.core.dht.testing.history import Outcome as Decided
from agi.core.dht.testing.locking import DRIFT, END_S, SKEW_MS_MAX, Contender, Exclusion
from agi.core.dht.testing.report import Report, count_faults, guarded
from agi.core.dht.testing.scenario import Profile, Scenario, Turn, address_of, churns, decides
from agi.core.dht.testing.simulation import Simulation
from agi.core.dht.testing.workload import CONNECT_TIMEOUT_S, Client, Locking, Recorder, fresh_values, unfinished
from agi.core.dht.types import Consistency, lock_key

LIMIT_S = 300.0
FORM_S = 20.0
READ_TIMEOUT_S = 2.0
READ_ATTEMPTS_MAX = 3


def run_seed(
    seed: int, *, profile: Profile | None = None, turn: Turn | None = None, trace_path: Path | None = None
) -> Report:
    """Runs one seed. An error in the program under test becomes a finding too.

    Args:
        profile, turn: instead of those that the seed draws.
        trace_path: write the whole trace as text to this file.
    """
    if profile is None and churns(seed):
        profile = Profile.CHURN
    elif profile is None and decides(seed):
        profile = Profile.CONSENSUS
    scenario = Scenario.draw(seed, profile, turn)
    report = Report(seed, str(scenario), str(scenario.plan), str(seed))
    return guarded(report, lambda sim: _Trial(sim, scenario, report).run(), LIMIT_S, trace_path)


class _Trial:
    def __init__(self, sim: Simulation, scenario: Scenario, report: Report) -> None:
        self.sim = sim
        self.scenario = scenario
        self.report = report
        self.history = History()
        self.recorder = Recorder(sim, self.history)
        self.values = fresh_values()
        self.decisions = Decisions(lambda: round(sim.now * 1e9))
        self.cluster = SimCluster(sim, scenario)
        self.driver = FaultDriver(
            sim,
            self.cluster.network,
            self.cluster.disks,
            self.cluster.boot,
            scenario.plan,
            self.cluster.lose,
            lambda: self.cluster.votes.coordinator,
        )
        self.clients = [self._client(f"c{number}") for number in range(1, scenario.workload.clients + 1)]
        self.judge = self._client("judge")
        self.exclusion = Exclusion(lambda text: report.findings.append(Finding("exclusion", text)))
        locking = scenario.workload.locking
        self.contenders = [] if locking is None else [self._contender(name, locking) for name in locking.hosts]
        self.locksmith = None if locking is None else self._contender("locksmith", locking)

    def _client(self, name: str) -> Client:
        host = self.cluster.client_host(name)
        rng = self.sim.stream(f"client/{name}")
        return Client(
            host,
            lambda: self.cluster.client(host, rng),
            self._addresses,
            self.scenario.workload,
            self.recorder,
            self.sim.stream(f"workload/{name}"),
            self.values,
            self.decisions,
            self.sim.stream(f"decisions/{name}"),
        )

    def _contender(self, name: str, locking: Locking) -> Contender:
        drawn = self.sim.stream(f"clock/{name}")
        skew_ms, rate = drawn.randint(-SKEW_MS_MAX, SKEW_MS_MAX), 1.0 + drawn.uniform(-DRIFT, DRIFT)
        host = self.cluster.client_host(name, skew_ms=skew_ms, rate=rate)
        rng = self.sim.stream(f"client/{name}")
        return Contender(
            host,
            lambda: self.cluster.client(host, rng),
            self._addresses,
            locking,
            self.decisions,
            self.sim.stream(f"locks/{name}"),
            self.values,
            self.exclusion,
        )

    @property
    def _working(self) -> list[Client | Contender]:
        return [*self.clients, *self.contenders]

    @property
    def _addresses(self) -> list[str]:
        return [address_of(node) for node in self.scenario.nodes if node not in self.scenario.joiners]

    async def run(self) -> None:
        findings = self.report.findings
        await self._faulty()
        stuck = await self.cluster.wait_converged(CONVERGE_S) or await self.cluster.wait_all_alive()
        if stuck is not None:
            findings.append(stuck)
        else:
            await self._rest()
        findings += check_history(self.history)
        findings += conditional.judge(self.decisions)
        findings += [Finding("deadline", f"{call} never returned") for call in unfinished(self.history.calls)]
        findings += self.cluster.check_topologies()
        findings += self.cluster.findings
        self._count()

    async def _faulty(self) -> None:
        """The first phase, until all is healed and the clients have gone."""
        scenario, cluster = self.scenario, self.cluster
        loop = self.sim.loop
        for name, at_s in scenario.start_s.items():
            loop.call_later(at_s, partial(cluster.boot, name))
        for client in self._working:
            client.host.boot(client.main)
        if not scenario.faults_from_start:
            await asyncio.sleep(max(scenario.start_s.values()))
            stuck = await cluster.wait_converged(FORM_S)
            if stuck is not None:
                self.report.findings.append(stuck)
        late = self.sim.stream("joiners")
        for name in scenario.joiners:
            last_s = scenario.plan.safety_s if scenario.churn is None else scenario.churn.away_s[1]
            loop.call_later(late.uniform(0.0, last_s), partial(cluster.come_back, name))
        await self.driver.run()
        cluster.settling = True
        for name in sorted(cluster.absent):
            cluster.come_back(name)
        for client in self._working:
            client.stop = True
        workload = scenario.workload
        patience_s = CONNECT_TIMEOUT_S + workload.timeout_s * (2 + workload.keys) + 1.0
        patience_s += 0.0 if workload.locking is None else END_S
        try:
            async with asyncio.timeout(patience_s):
                for client in self._working:
                    await client.host.wait_end()
        except TimeoutError:
            self.report.findings.append(Finding("deadline", f"clients still ran {patience_s:.1f} s after the healing"))

    # --- at rest

    async def _rest(self) -> None:
        """Whatever was left undone comes to its end, and the judge reads."""
        scenario, findings = self.scenario, self.report.findings
        await asyncio.sleep(scenario.workload.timeout_s + 1.0)  # what coordinators still had in hand
        if scenario.churn is not None:
            await self._judged(self._look)
            self.cluster.operators.keep_up()
            await self._equal()
            await self._reclaimed()
        elif scenario.read_last:
            await self._equal()
        await self._judged(self._judge)
        if self.locksmith is not None:
            self.locksmith.host.boot(partial(self._take_locks, self.locksmith))
            await self.locksmith.host.wait_end()
        left = await self.cluster.wait_handed_off()
        if left is not None:
            findings.append(left)
        if not scenario.read_last:
            await self._equal()
        if "reclaim.interval_ms" in scenario.settings:
            await self._reclaimed()
            await self._judged(self._look)

    async def _judged(self, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self.judge.host.boot(main)
        await self.judge.host.wait_end()

    async def _reclaimed(self) -> None:
        """All that was deleted goes, and replicas are equal then too."""
        kept = await self.cluster.wait_reclaimed(self.scenario.workload.names)
        if kept is not None:
            self.report.findings.append(kept)
        await self._equal()

    async def _look(self) -> None:
        """Reads at QUORUM show what was kept: before repair hides it, or once what was deleted has been reclaimed. Half
        of the keys may be left, for repair to find them as they are."""
        client = await self.judge.connected()
        assert client is not None  # nobody tells the judge to stop
        leaves = self.scenario.churn is not None and self.scenario.read_last
        for key in self.scenario.workload.names[:: 2 if leaves else 1]:
            await self._read(client, key, Consistency.QUORUM)
        await client.close()

    async def _equal(self) -> None:
        """All replicas of every key become the same by themselves, and nothing is lost on the way."""
        names = [*self.scenario.workload.names, *self._decided_keys()]
        if self.scenario.settings["repair.interval_ms"] or self.cluster.operators.keeping_up:
            different = await self.cluster.wait_equal(names)
            if different is not None:
                self.report.findings.append(different)
        self.report.findings += self.cluster.check_ttl(names)

    async def _judge(self) -> None:
        """Reads at QUORUM show what was kept. Then reads at ALL, after which no replica has anything left to reveal: a
        write of unknown outcome may have waited at a single one until now."""
        client = await self.judge.connected()
        assert client is not None  # nobody tells the judge to stop
        for key in self.scenario.workload.names:
            call = await self._read(client, key, Consistency.QUORUM)
            if call is not None:
                self._agreed(call)
        last = [await self._read(client, key, Consistency.ALL) for key in self.scenario.workload.names]
        found = await self.judge.scan(client, Consistency.QUORUM, READ_TIMEOUT_S)
        if found is None:
            self.report.findings.append(Finding("healed", "a scan failed"))
        else:
            live = {call.key: call.value for call in last if call is not None and call.value is not None}
            self.report.findings += check_scan(found, live)
        locks = {lock_key(name).decode() for name in self._lock_names}
        for key in self._decided_keys():
            if key in locks:
                continue
            for _ in range(READ_ATTEMPTS_MAX):
                if await self.judge.decisions.read(client, key, Consistency.LINEARIZABLE, READ_TIMEOUT_S):
                    break
            else:
                self.report.findings.append(Finding("healed", f"{key} cannot be read"))
        await client.close()

    async def _take_locks(self, locksmith: Contender) -> None:
        """Each lock can be had, whatever became of its holders."""
        left = await locksmith.locks_left()
        if left:
            self.report.findings.append(Finding("healed", f"nobody can have {', '.join(left)}"))

    @property
    def _lock_names(self) -> list[str]:
        locking = self.scenario.workload.locking
        return [] if locking is None else locking.names

    def _decided_keys(self) -> list[str]:
        return list(dict.fromkeys(operation.key for operation in self.decisions.operations))

    async def _read(self, client: DHTClient, key: str, level: Consistency) -> Call | None:
        for _ in range(READ_ATTEMPTS_MAX):
            call = await self.judge.get_entry(client, key, level, READ_TIMEOUT_S)
            if call.outcome is Outcome.OK:
                return call
        self.report.findings.append(Finding("healed", f"{key} cannot be read at {level.name}"))
        return None

    def _agreed(self, call: Call) -> None:
        """After a quorum read at rest a quorum of the key's replicas durably holds what it returned."""
        node = next(node for node in self.cluster.running.values() if node.node_id in node.known_topology.by_id)
        assert node.topology is not None and node.ring is not None
        key = call.key.encode()
        replicas = node.ring.replicas(key)
        held = [self.cluster.disks[name].durable(key) for name in replicas]
        agreeing = Counter(record for record in held if _shows(record, call))
        needed = Consistency.QUORUM.needed(node.topology.replica_count)
        if max(agreeing.values(), default=0) < needed:
            shown = ", ".join(
                f"{name} {'nothing' if record is None else record[:HEADER].hex()}"
                for name, record in zip(replicas, held, strict=True)
            )
            self.report.findings.append(Finding("agreement", f"{call} is not held by {needed} replicas: {shown}"))

    def _count(self) -> None:
        report, metrics = self.report, self.cluster.metrics
        calls = Counter(call.outcome for call in self.history.calls)
        report.counts["acknowledged"] = self.history.acknowledged()
        report.counts["calls"] = len(self.history.calls)
        decided = Counter(operation.outcome for operation in self.decisions.operations)
        report.counts["decisions"] = len(self.decisions.operations)
        report.counts["of these decided"] = decided[Decided.OK]
        report.counts["rounds of consensus"] = sum(each.rounds for each in metrics)
        report.counts["preempted"] = sum(each.rounds_preempted for each in metrics)
        report.counts["votes watched"] = self.cluster.votes.checked
        report.counts["locks taken"] = self.exclusion.entered
        report.counts["locks lost"] = self.exclusion.lost
        report.counts["late fenced writes"] = self.exclusion.late
        report.counts["wide batches"] = self.recorder.wide
        report.counts["unknown"] = calls[Outcome.UNKNOWN]
        report.counts["failed"] = calls[Outcome.FAILED]
        count_faults(report, self.cluster, self.driver)
        report.counts["read repairs"] = sum(each.read_repairs for each in metrics)
        report.counts["restamps"] = sum(each.restamps for each in metrics)
        report.counts["hints"] = sum(each.stored for each in self.cluster.hints)
        report.counts["hints replayed"] = sum(each.replayed for each in self.cluster.hints)
        report.counts["exchanges"] = sum(each.exchanges for each in self.cluster.repairs)
        report.counts["differences repaired"] = sum(each.differences for each in self.cluster.repairs)
        report.counts["rounds"] = sum(each.rounds for each in self.cluster.reclaimers)
        report.counts["reclaimed"] = sum(each.reclaimed for each in self.cluster.reclaimers)
        report.counts["retired"] = sum(each.retired for each in self.cluster.reclaimers)
        report.counts["below floors"] = sum(each.replica_below_floor for each in metrics)
        operators = self.cluster.operators
        report.counts["epochs proposed"] = operators.proposed
        report.counts["epochs agreed"] = operators.agreed
        report.counts["changes ordered"] = operators.ordered
        report.counts["changes begun"] = operators.begun
        report.counts.update(operators.changes)
        report.counts["let go"] = self.cluster.left
        report.counts["disks lost"] = self.cluster.disks_lost
        report.counts["declared dead"] = self.cluster.declared_dead
        report.counts["of these refuted"] = self.cluster.false_deaths
        report.counts["hedges"] = sum(each.hedges for each in metrics)


def _shows(record: bytes | None, call: Call) -> bool:
    if call.value is None:
        return record is None or bool(record[FLAGS] & TOMBSTONE)
    return record is not None and not record[FLAGS] & ~EXPIRES and record[HEADER:] == call.value
