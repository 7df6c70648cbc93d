"""How each figure may grow, and whether it does.

A theory is a measure of work for each point: copies of a write, bytes of a value, or 1 where nothing is to grow. A
figure may be `fixed + share x work`, with whatever fixed part and share fit best, neither below nothing. What is judged
is what that cannot explain: each point's figure over the fitted one is its strain, and a figure grows faster than its
theory if the strain rises, from any point to any later one, by more than a tolerance and by more than the rounds
scatter.

    work      1    2    3    5             figures  12   22   32   52:  2 + 10 x work, no strain: as the theory says
    work      1    2    3    5             figures  12   24   48  130:  strain rises by 1.9: faster
    work      1    1    1                  figures  50   51   80:       strain rises by 1.6: faster
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import TypeAlias

from bench.growth.plan import KEY_BYTES, RECORD_HEADER_BYTES, Base

Work: TypeAlias = Callable[[int, Base], float]
TOLERANCE, TAIL_TOLERANCE = 1.3, 2.0
"""By what the strain may rise: of costs, and of p99s and starts, which scatter more."""

BOUNDED_BYTES = (64 + 24) << 20
"""Caches and write buffers of RocksDB as they are shipped (docs/limits.md)."""
ENTRY_BYTES, TREE_BYTES = 210, 2
"""What a cached record takes beyond its bytes, and a key in the hash trees."""


def constant(x: int, base: Base) -> float:
    return 1.0


def itself(x: int, base: Base) -> float:
    return float(x)


def quorum(copies: int) -> int:
    return copies // 2 + 1


def kept_in_memory(x: int, base: Base) -> float:
    """Bytes that a node with RocksDB may hold of so many keys: records, until they fill what is bounded, and trees."""
    records = x * (base.value_bytes + KEY_BYTES + RECORD_HEADER_BYTES + ENTRY_BYTES)
    return min(records, BOUNDED_BYTES) + TREE_BYTES * x


def copies_of_nodes(x: int, base: Base) -> float:
    return float(min(x, base.factor))


def quorum_of_nodes(x: int, base: Base) -> float:
    return float(quorum(min(x, base.factor)))


def quorum_of_copies(x: int, base: Base) -> float:
    return float(quorum(x))


@dataclass(frozen=True, slots=True)
class Rule:
    """How one figure of a dimension may grow. `thinned`: more than that by what frames cost that hold fewer keys, as
    the same callers are dealt out to more nodes; the dimension of callers tells how much."""

    figure: str
    work: Work
    tolerance: float = TOLERANCE
    thinned: bool = False


def _both(
    get: Work, put: Work, *, get_tail: Work | None = None, put_tail: Work | None = None, thinned: bool = False
) -> tuple[Rule, ...]:
    return (
        Rule("get CPU", get, thinned=thinned),
        Rule("put CPU", put, thinned=thinned),
        Rule("get p99", get_tail or get, TAIL_TOLERANCE, thinned),
        Rule("put p99", put_tail or put, TAIL_TOLERANCE, thinned),
    )


SENTENCES = {
    "nodes": "An operation costs its copies, at most 3, wherever they are: from 3 nodes on it costs the same, but for "
    "frames that hold fewer keys as the same callers are dealt out to more nodes.",
    "nodes-scaled": "With callers in proportion to the nodes, frames stay as full, and from 3 nodes on an operation "
    "costs the same.",
    "replicas": "A put costs a fixed part and one store's write for each replica; a get costs a fixed part and one "
    "store's read for each replica of a quorum, 1, 2, 2, 3, 3.",
    "keys": "An operation costs the same among more keys; disk a key is constant; memory is a fixed part, caches and "
    "buffers until they are full, and 2 bytes a key; a start does not depend on the keys, but the hash trees are built "
    "behind it, at so many keys a second.",
    "memory": "The memory store takes the same memory for each key.",
    "values": "An operation costs a fixed part and so much for each byte of its value.",
    "callers": "An operation costs no more with more callers, rather less since they share frames and syncs; p99 is a "
    "fixed part and so much for each caller, since all share one machine.",
}
RULES: dict[str, tuple[Rule, ...]] = {
    "nodes": _both(quorum_of_nodes, copies_of_nodes, thinned=True),
    "nodes-scaled": _both(quorum_of_nodes, copies_of_nodes, get_tail=itself, put_tail=itself),
    "replicas": _both(quorum_of_copies, itself),
    "keys": (
        *_both(constant, constant),
        Rule("memory of a node", kept_in_memory),
        Rule("disk of all nodes", itself),
        Rule("start, ready", constant, TAIL_TOLERANCE),
        Rule("start after kill -9, ready", constant, TAIL_TOLERANCE),
        Rule("start, trees built", itself, TAIL_TOLERANCE),
    ),
    "memory": (Rule("memory of a node", itself),),
    "values": _both(itself, itself),
    "callers": _both(constant, constant, get_tail=itself, put_tail=itself),
}


@dataclass(frozen=True, slots=True)
class Fit:
    """`fixed + share x work`."""

    fixed: float
    share: float

    def at(self, work: float) -> float:
        return self.fixed + self.share * work


def fit(works: Sequence[float], figures: Sequence[float]) -> Fit:
    """The least squares of relative errors, with neither part below nothing. Figures are above nothing."""
    if len(works) != len(figures) or not works or min(figures) <= 0:
        raise ValueError("a fit needs as many works as figures, all of these above nothing")
    # minimise sum((fixed * u + share * v - 1)^2) with u = 1 / figure, v = work / figure
    u = [1 / figure for figure in figures]
    v = [work / figure for work, figure in zip(works, figures, strict=True)]
    uu, vv, uv = (sum(a * b for a, b in zip(p, q, strict=True)) for p, q in ((u, u), (v, v), (u, v)))
    su, sv = sum(u), sum(v)
    determinant = uu * vv - uv * uv
    if determinant > 1e-12 * uu * vv:
        both = Fit((su * vv - sv * uv) / determinant, (sv * uu - su * uv) / determinant)
        if both.fixed >= 0 and both.share >= 0:
            return both
    alone = [Fit(su / uu, 0.0), *([Fit(0.0, sv / vv)] if vv else [])]
    return min(alone, key=lambda each: sum((each.at(w) / f - 1) ** 2 for w, f in zip(works, figures, strict=True)))


def slope(xs: Sequence[float], figures: Sequence[float]) -> float:
    """Of the straight line through the logarithms of both: 0 is constant, 1 is in proportion, 2 is the square."""
    logs = [math.log(x) for x in xs]
    values = [math.log(figure) for figure in figures]
    middle, level = fmean(logs), fmean(values)
    width = sum((x - middle) ** 2 for x in logs)
    if not width:
        raise ValueError("a slope needs two different points")
    return sum((x - middle) * (y - level) for x, y in zip(logs, values, strict=True)) / width


def interpolate(x: float, points: Sequence[tuple[float, float]]) -> float:
    """Between ascending points, straight in the logarithms of both; at and past the ends, theirs."""
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x <= x1:
            part = math.log(x / x0) / math.log(x1 / x0)
            return y0 * math.exp(part * math.log(y1 / y0))
    return points[-1][1]


@dataclass(frozen=True, slots=True)
class Verdict:
    """One figure held against its theory. `strain`: how much it rises at most beyond what fits, `where` from which
    point to which; `factor` and `theory` are last point over first, as measured and as fitted."""

    figure: str
    factor: float
    theory: float
    slope: float
    theory_slope: float
    strain: float
    where: tuple[int, int]
    faster: bool
    fitted: tuple[float, ...]


def judge(
    rule: Rule, base: Base, rounds: Sequence[tuple[int, Sequence[float]]], thinning: Callable[[int], float] | None
) -> Verdict | None:
    """`rounds`: ascending points, with a figure for each round. None where there is too little to compare: fewer than
    two points, or a figure that is nothing."""
    usable = [(x, figures) for x, figures in rounds if figures and min(figures) > 0]
    if len(usable) < 2 or (rule.thinned and thinning is None):
        return None
    xs = [x for x, _ in usable]
    extra = [thinning(x) if rule.thinned and thinning is not None else 1.0 for x in xs]
    middles = [median(figures) for _, figures in usable]
    found = fit([rule.work(x, base) for x in xs], [y / more for y, more in zip(middles, extra, strict=True)])
    fitted = [found.at(rule.work(x, base)) * more for x, more in zip(xs, extra, strict=True)]
    worst, where, faster = 1.0, (xs[0], xs[0]), False
    for later in range(1, len(xs)):
        for sooner in range(later):
            expected = fitted[later] / fitted[sooner]
            strain = middles[later] / middles[sooner] / expected
            least = min(usable[later][1]) / max(usable[sooner][1]) / expected
            faster |= strain > rule.tolerance and least > 1
            if strain > worst:
                worst, where = strain, (xs[sooner], xs[later])
    return Verdict(
        rule.figure,
        middles[-1] / middles[0],
        fitted[-1] / fitted[0],
        slope(xs, middles),
        slope(xs, fitted),
        worst,
        where,
        faster,
        tuple(fitted),
    )
