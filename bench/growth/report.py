"""What was found, as Markdown: a table for each dimension, and each figure held against its theory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import TypeAlias

from bench.growth.plan import DIMENSIONS, Base
from bench.growth.runner import Point, Results
from bench.growth.theory import RULES, SENTENCES, Verdict, interpolate, judge
from bench.peers.stats import number

BEGIN, END = "<!-- figures -->", "<!-- /figures -->"
FIGURES: dict[str, Callable[[Point], list[float]]] = {
    "get CPU": lambda point: [sample.cpu_us for sample in point.get],
    "put CPU": lambda point: [sample.cpu_us for sample in point.put],
    "get p99": lambda point: [sample.p99_ms for sample in point.get],
    "put p99": lambda point: [sample.p99_ms for sample in point.put],
    "memory of a node": lambda point: [float(rss) for rss in point.rss_bytes],
    "disk of all nodes": lambda point: [float(disk) for disk in point.disk_bytes],
    "start, ready": lambda point: [start.ready_s for start in point.starts],
    "start after kill -9, ready": lambda point: [start.ready_s for start in point.killed],
    "start, trees built": lambda point: [start.trees_s for start in point.starts if start.trees_s is not None],
}
"""What theories are about: one figure for each round."""
Row: TypeAlias = tuple[str, Callable[[Point], str]]


def _middle(of: Callable[[Point], Sequence[float]]) -> Callable[[Point], str]:
    def cell(point: Point) -> str:
        figures = of(point)
        return number(median(figures)) if figures else ""

    return cell


def _per_key(of: Callable[[Point], Sequence[float]], copies: Callable[[Point], int]) -> Callable[[Point], str]:
    def cell(point: Point) -> str:
        figures = of(point)
        return number(median(figures) / (point.keys_held * copies(point))) if figures else ""

    return cell


def _memory(point: Point) -> list[float]:
    """Of a node, beyond what it took empty."""
    empty = median(filled.empty_rss_bytes for filled in point.filled) if point.filled else 0
    return [max(0.0, rss - empty) for rss in point.rss_bytes]


def _refused(point: Point) -> str:
    found: Counter[str] = Counter()
    for sample in [*point.get, *point.put]:
        found.update(sample.refused)
    return ", ".join(f"{count:,} {error}" for error, count in sorted(found.items())) or "0"


CALLS: tuple[Row, ...] = (
    ("get, operations a second", _middle(lambda point: [sample.ops_per_s for sample in point.get])),
    ("get, p50, ms", _middle(lambda point: [sample.p50_ms for sample in point.get])),
    ("get, p99, ms", _middle(lambda point: [sample.p99_ms for sample in point.get])),
    ("get, CPU of the nodes, us", _middle(lambda point: [sample.node_cpu_us for sample in point.get])),
    ("get, CPU of the client, us", _middle(lambda point: [sample.client_cpu_us for sample in point.get])),
    ("put, operations a second", _middle(lambda point: [sample.ops_per_s for sample in point.put])),
    ("put, p50, ms", _middle(lambda point: [sample.p50_ms for sample in point.put])),
    ("put, p99, ms", _middle(lambda point: [sample.p99_ms for sample in point.put])),
    ("put, CPU of the nodes, us", _middle(lambda point: [sample.node_cpu_us for sample in point.put])),
    ("put, CPU of the client, us", _middle(lambda point: [sample.client_cpu_us for sample in point.put])),
    ("refused, all rounds", _refused),
)
STORED: tuple[Row, ...] = (
    ("largest node, MiB", _middle(lambda point: [rss / (1 << 20) for rss in point.rss_bytes])),
    ("its memory a key, beyond an empty node's, bytes", _per_key(_memory, lambda point: 1)),
)
KEPT: tuple[Row, ...] = (
    ("disk a key and replica, bytes", _per_key(FIGURES["disk of all nodes"], lambda point: point.factor)),
    ("start: listens, s", _middle(lambda point: [start.listens_s for start in point.starts])),
    ("start: ready, s", _middle(FIGURES["start, ready"])),
    ("start: hash trees built, s", _middle(FIGURES["start, trees built"])),
    ("start after kill -9: ready, s", _middle(FIGURES["start after kill -9, ready"])),
    ("keys stored a second, to fill", _middle(lambda point: [each.keys / each.seconds for each in point.filled])),
)
ROWS: dict[str, tuple[Row, ...]] = {
    "keys": CALLS + STORED + KEPT,
    "memory": STORED,
    "values": (*CALLS, ("keys", lambda point: f"{point.keys:,}")),
}


def base_of(results: Results) -> Base:
    return Base(results.nodes, results.factor, results.value_bytes, results.callers, results.keys)


def thinning(results: Results, figure: str) -> Callable[[int], float] | None:
    """What dealing the callers out to so many nodes adds to the cost of a call, as the dimension of callers tells:
    each of n nodes then works for as many as each of the base's would for base / n of them. None where that was not
    measured."""
    of = FIGURES[figure.replace("p99", "CPU")]
    points = [(float(point.x), median(of(point))) for point in results.dimensions.get("callers", []) if of(point)]
    if len(points) < 2:
        return None
    base = base_of(results)
    at_base = interpolate(base.callers, points)
    return lambda nodes: max(1.0, interpolate(base.callers * base.nodes / nodes, points) / at_base)


def verdicts(results: Results, dimension: str) -> list[Verdict]:
    """Each figure of a dimension that could be judged."""
    found = []
    for rule in RULES[dimension]:
        rounds = [(point.x, FIGURES[rule.figure](point)) for point in results.dimensions[dimension]]
        verdict = judge(rule, base_of(results), rounds, thinning(results, rule.figure) if rule.thinned else None)
        if verdict is not None:
            found.append(verdict)
    return found


def faster(results: Results) -> list[str]:
    """What grows faster than its theory."""
    return [
        f"{dimension}: {each.figure} from {each.where[0]:,} to {each.where[1]:,}, {each.strain:.2f} times the theory"
        for dimension in results.dimensions
        for each in verdicts(results, dimension)
        if each.faster
    ]


def text(results: Results) -> str:
    """The generated part of the document."""
    base = base_of(results)
    lines = [
        f"{results.hardware[0]}, {', '.join(results.hardware[1:])}; {results.date}, load {results.load} at the start.",
        f"Medians of {results.rounds} round{'s' if results.rounds != 1 else ''} of {results.seconds:g} s a figure"
        f"{', a quick run' if results.quick else ''}; the whole took {results.took_s / 60:.0f} minutes. Base point: "
        f"{base.nodes} nodes, {base.factor} replicas, {base.value_bytes} B values, {base.callers} callers, "
        f"{base.keys:,} keys, RocksDB, `wal_sync: group`, QUORUM.",
        "",
    ]
    found = faster(results)
    if found:
        lines += ["**Faster than the theory:**", "", *(f"- {each}" for each in found), ""]
    else:
        lines += ["No figure grows faster than its theory.", ""]
    for dimension, points in results.dimensions.items():
        head = [DIMENSIONS[dimension], *(f"{point.x:,}" for point in points)]
        rows = [[label, *(cell(point) for point in points)] for label, cell in ROWS.get(dimension, CALLS)]
        lines += [f"### {_title(dimension)}", "", SENTENCES[dimension], ""]
        lines += [*_table(head, rows), ""]
        judged = verdicts(results, dimension)
        if judged:
            head = ["last point / first", "measured", "theory", "slope", "theory's", "strain", "verdict"]
            lines += [*_table(head, [_verdict(each) for each in judged]), ""]
        lines += [f"![{_title(dimension)}](growth/{dimension}.svg)", ""]
    return "\n".join(lines).rstrip()


def _title(dimension: str) -> str:
    name = DIMENSIONS[dimension]
    return {"nodes-scaled": "Nodes, callers in proportion"}.get(dimension, name[0].upper() + name[1:])


def _verdict(each: Verdict) -> list[str]:
    judgement = "as the theory says"
    if each.faster:
        judgement = f"**faster**, {each.where[0]:,} to {each.where[1]:,}"
    return [
        each.figure,
        number(each.factor),
        number(each.theory),
        f"{each.slope:.2f}",
        f"{each.theory_slope:.2f}",
        f"{each.strain:.2f}",
        judgement,
    ]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(cells: list[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        return f"| {' | '.join(padded)} |"

    return [line(head), line(rule), *(line(row) for row in rows)]


def write(results: Results, document: Path) -> None:
    """Puts the figures between the document's marks. Raises ValueError where it has none."""
    known = document.read_text()
    before, begin, rest = known.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{document} has no lines {BEGIN} and {END}")
    document.write_text(f"{before}{BEGIN}\n{text(results)}\n{END}{after}")
