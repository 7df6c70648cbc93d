"""What a simulated seed ended with, and the frame in which every seed runs."""

from __future__ import annotations

import logging
import traceback
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from agi.core.dht.testing.checks import Finding
from agi.core.dht.testing.cluster import SimCluster
from agi.core.dht.testing.faults import FaultDriver, FaultKind
from agi.core.dht.testing.loop import SimulationError
from agi.core.dht.testing.simulation import Simulation, run_simulation

STEPS_MAX = 2_000_000
"""Callbacks of a seed: some fifty times as many as the busiest takes, so that one that spins is found soon."""
MUST_HAPPEN = (
    "acknowledged",
    "crashes that lost data",
    "drops",
    "partitions",
    "duplicates",
    "joins",
    "leaves",
    "reclaimed",
)
"""What a run of some seeds must have seen at least once, or it has tested nothing."""
RARE = ("removals", "evictions", "replacements", "new disks", "disks lost", "weights", "wide batches", "retired")
"""The same of a run of at least MANY_SEEDS seeds."""
MANY_SEEDS = 200


@dataclass(slots=True)
class Report:
    """How a seed went. It is good if there are no findings.

    Attributes:
        title, plan: what was drawn.
        replay: the arguments of `make sim` that run it again.
        counts: what happened, by name; MUST_HAPPEN are among them.
        hash: of the trace; empty if the simulation broke off.
    """

    seed: int
    title: str
    plan: str
    replay: str
    findings: list[Finding] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    hash: str = ""
    time_s: float = 0.0
    steps: int = 0

    @property
    def line(self) -> str:
        """The seed in a line: what it is about and what MUST_HAPPEN."""
        shown = ", ".join(f"{self.counts[name]} {name}" for name in MUST_HAPPEN if name in self.counts)
        verdict = "FAILED" if self.findings else "ok"
        return f"{self.title}: {shown}; {verdict} {self.hash[:8]}"

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        lines = [f"{self.title}\n  {counts}\n  {self.time_s:.1f} virtual s, {self.steps} steps, trace {self.hash}"]
        return "\n  ".join(lines + [f"FAILED {finding}" for finding in self.findings])


def guarded(
    report: Report,
    main: Callable[[Simulation], Coroutine[Any, Any, None]],
    limit_s: float,
    trace_path: Path | None,
) -> Report:
    """Runs `main`, which writes into the report. An error in the program under test becomes a finding too."""
    with quiet_logs():
        try:
            run = run_simulation(main, seed=report.seed, limit_s=limit_s, steps_max=STEPS_MAX, trace_path=trace_path)
        except SimulationError as error:
            report.findings.append(Finding("program", "".join(traceback.format_exception(error))))
        else:
            report.hash, report.time_s, report.steps = run.hash, run.time_s, run.steps
    return report


def count_faults(report: Report, cluster: SimCluster, driver: FaultDriver) -> None:
    """Adds what went wrong in a simulation to its report."""
    network, trace = cluster.network, cluster.sim.trace
    disks = [*cluster.disks.values(), *cluster.wiped]
    report.counts.update(
        {
            "crashes": trace.counts["kill"],
            "crashes that lost data": sum(disk.crashes_that_lost_data for disk in disks),
            "exits": cluster.exits + cluster.starts_failed,
            "drops": network.lost + network.blocked,
            "partitions": network.partitions,
            "duplicates": network.duplicated,
            "reordered": network.reordered,
            "pauses": trace.counts["pause"],
            "clock jumps": driver.counts[FaultKind.CLOCK_JUMP],
        }
    )


def _drop(logger: object, name: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    raise structlog.DropEvent


@contextmanager
def quiet_logs() -> Iterator[None]:
    """No logs of the nodes: thousands of them die here."""
    before = structlog.get_config()
    structlog.configure(
        processors=[_drop],  # the default ones would lay out the traceback of each death, a seventh of a run's time
        wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL),
        logger_factory=structlog.ReturnLoggerFactory(),
    )
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
        structlog.configure(**before)
