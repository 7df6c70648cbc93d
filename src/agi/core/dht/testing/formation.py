"""One seed of the bootstrap simulation: nodes that form a cluster while everything fails, disks that are lost included.

Nodes start in a drawn order, some very late; links are cut, processes die, and now and then a node that died comes back
with an empty disk. Whatever happens, two different first topologies are never stored (PROTOCOLS T11). If no disk was
lost, all nodes have formed soon after the healing; with a lost disk they may rightly wait for an operator.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from agi.core.dht.testing.cluster import CONVERGE_S, SimCluster
from agi.core.dht.testing.faults import FaultDriver, FaultKind, FaultMix, FaultPlan
from agi.core.dht.testing.network import LinkFaults
from agi.core.dht.testing.report import Report, count_faults, guarded
from agi.core.dht.testing.scenario import SLOW_DISK, Scenario
from agi.core.dht.testing.simulation import Simulation

LIMIT_S = 200.0
WATCH_S = 10.0
"""How long nodes that may wait for ever are watched after the healing."""
_MIX = FaultMix(
    every_s={FaultKind.PARTITION: 1.0, FaultKind.ONE_WAY: 4.0, FaultKind.CLOG: 3.0, FaultKind.CRASH: 1.0},
    for_s=(0.1, 4.0),
    links=LinkFaults(loss_chance=0.1, duplicate_chance=0.05, reorder_chance=0.2),
    disk=replace(SLOW_DISK, full_chance=0.01, sync_error_chance=0.002),
)


@dataclass(frozen=True, slots=True)
class _Plan:
    scenario: Scenario
    wipe_chance: float
    """Of each boot of a node that ran before."""


def _draw(seed: int) -> _Plan:
    rng = random.Random(f"{seed}/formation")
    base = Scenario.draw(seed)
    nodes = base.nodes
    safety_s = rng.uniform(3.0, 10.0)
    late_s = rng.choice((0.5, safety_s))
    plan = FaultPlan.draw(rng, nodes, safety_s=safety_s, mix=replace(_MIX, down_max=rng.choice((0, 1))))
    scenario = replace(base, start_s={name: rng.uniform(0.0, late_s) for name in nodes}, plan=plan)
    return _Plan(scenario, rng.choice((0.0, 0.5)))


def run_formation(seed: int, *, trace_path: Path | None = None) -> Report:
    """Runs one seed; arguments as `run_seed`'s."""
    plan = _draw(seed)
    title = f"seed {seed}: formation of {len(plan.scenario.nodes)} nodes"
    title += ", disks may be lost" if plan.wipe_chance else ""
    report = Report(seed, title, str(plan.scenario.plan), f"{seed} FORMATION=1")
    return guarded(report, lambda sim: _run(sim, plan, report), LIMIT_S, trace_path)


async def _run(sim: Simulation, plan: _Plan, report: Report) -> None:
    scenario = plan.scenario
    cluster = SimCluster(sim, scenario)
    rng = sim.stream("wipes")

    def boot(name: str) -> None:
        host = sim.hosts[name]
        if not host.alive and host.incarnation and rng.uniform(0.0, 1.0) < plan.wipe_chance:
            cluster.wipe(name)
        cluster.boot(name)

    driver = FaultDriver(sim, cluster.network, cluster.disks, boot, scenario.plan)
    for name, at_s in scenario.start_s.items():
        sim.loop.call_later(at_s, partial(boot, name))
    await driver.run()
    if cluster.wiped:
        await asyncio.sleep(WATCH_S)
    else:
        stuck = await cluster.wait_converged(CONVERGE_S)
        if stuck is not None:
            report.findings.append(stuck)
    report.findings += cluster.check_topologies() + cluster.findings
    count_faults(report, cluster, driver)
    report.counts["formed"] = len(cluster.topologies())
    report.counts["wiped"] = len(cluster.wiped)
