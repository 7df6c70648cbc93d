"""What the project sets out to reach, as ratios of our operations a second to a peer's in the same run.

Each peer is held against the variant of ours that promises about the same (`Facts.against`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from bench.peers.loads import SMALL
from bench.peers.results import Named, Results, values
from bench.peers.stats import ratio

COLUMNS = {
    f"a/{SMALL}/1": "1 caller",
    f"a/{SMALL}/32": "32 callers",
    f"a/{SMALL}/256": "256 callers",
    f"batch_put/{SMALL}/1": "batch put",
    f"batch_get/{SMALL}/1": "batch get",
}
"""Cell -> how the ratio tables head it."""
OTHERS = (1.0, 2.0, 2.0, 2.0, 2.0)
"""Of every other replicated peer."""
TARGETS: dict[str, tuple[float, ...]] = {
    "redis-cluster-everysec": (0.7, 2.0, 4.0, 1.5, 2.5),
    "redis-cluster-wait-everysec": (2.5, 4.0, 6.0),
    "etcd": (1.5, 5.0, 8.0, 8.0, 8.0),
    "etcd-rust": (1.5, 5.0, 8.0, 8.0, 8.0),
    "nats": (2.0, 3.0, 4.0, 3.0, 3.0),
}
"""Peer -> target of each column, as far as it has one."""
PUT_32, CAS_32 = f"put/{SMALL}/32", f"cas/{SMALL}/32"
PUT_1, LOCK_1 = f"put/{SMALL}/1", f"lock/{SMALL}/1"
CAS_OF_PUT_MIN = 0.4
CAS_OF_ETCD_MIN = 2.0
LOCK_OF_PUT_MAX = 5.0
P99_CELL = f"a/{SMALL}/32"
GROUP = "ours-group"


@dataclass(frozen=True, slots=True)
class Ratio:
    """One figure beside its target; None where there is none."""

    value: float | None
    target: float | None

    @property
    def missed(self) -> bool:
        return self.value is not None and self.target is not None and self.value < self.target


@dataclass(frozen=True, slots=True)
class Check:
    """One sentence beside whether it holds; None where it was not measured."""

    claim: str
    measured: str
    holds: bool | None


def target(name: str, peer: Named, column: int) -> float | None:
    """Of one peer in one column. None for a peer without replicas."""
    if not peer.replicated:
        return None
    targets: Sequence[float] = TARGETS.get(name, OTHERS)
    return targets[column] if column < len(targets) else None


def ratios(results: Results, name: str) -> list[Ratio]:
    """Ours over a peer, one for each of COLUMNS."""
    peer = results.peers[name]
    ours = results.peers.get(peer.against)
    found = []
    for column, cell in enumerate(COLUMNS):
        value = None if ours is None else ratio(values(ours, cell, "ops_per_s"), values(peer, cell, "ops_per_s"))
        found.append(Ratio(value, target(name, peer, column)))
    return found


def wins(results: Results, name: str) -> dict[str, float]:
    """Cell -> ratio, where a peer does more operations a second than ours."""
    peer = results.peers[name]
    ours = results.peers.get(peer.against)
    if ours is None or ours is peer:
        return {}
    found = {cell: ratio(values(ours, cell, "ops_per_s"), values(peer, cell, "ops_per_s")) for cell in peer.cells}
    return {cell: value for cell, value in found.items() if value is not None and value < 1}


def checks(results: Results) -> list[Check]:
    """The targets that are no ratio of a column."""
    return [*_latency(results), *_conditional(results)]


def _latency(results: Results) -> list[Check]:
    """Of each of our variants against the replicated peers that promise about the same."""
    found = []
    for name, ours in results.peers.items():
        mine = values(ours, P99_CELL, "p99_ms")
        if name != ours.against or not mine:
            continue
        claim = f"{ours.title}: p99 at 32 callers no worse than the best replicated peer's"
        theirs = [
            (median(each), peer.title)
            for peer in results.peers.values()
            if peer.replicated and peer is not ours and peer.against == name
            if (each := values(peer, P99_CELL, "p99_ms"))
        ]
        if not theirs:
            found.append(Check(claim, "no replicated peer was measured", None))
            continue
        best, title = min(theirs)
        found.append(Check(claim, f"{median(mine):.2f} ms against {best:.2f} ms of {title}", median(mine) <= best))
    return found


def _conditional(results: Results) -> list[Check]:
    ours, etcd = results.peers.get(GROUP), results.peers.get("etcd")
    if ours is None:
        return []
    swaps, puts = values(ours, CAS_32, "ops_per_s"), values(ours, PUT_32, "ops_per_s")
    theirs = values(etcd, CAS_32, "ops_per_s") if etcd is not None else []
    locks, single = values(ours, LOCK_1, "p50_ms"), values(ours, PUT_1, "p50_ms")
    return [
        _at_least("compare-and-set, 32 callers, group: of our plain put", ratio(swaps, puts), CAS_OF_PUT_MIN),
        _at_least("compare-and-set, 32 callers, group: of etcd's transaction", ratio(swaps, theirs), CAS_OF_ETCD_MIN),
        _at_most("lock, acquire and release, group: p50 over a plain put's", ratio(locks, single), LOCK_OF_PUT_MAX),
    ]


def _at_least(claim: str, value: float | None, bound: float) -> Check:
    return Check(f"{claim}, at least {bound:g}", _measured(value), None if value is None else value >= bound)


def _at_most(claim: str, value: float | None, bound: float) -> Check:
    return Check(f"{claim}, at most {bound:g}", _measured(value), None if value is None else value <= bound)


def _measured(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"
