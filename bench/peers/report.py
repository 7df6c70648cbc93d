"""The report on a run: Markdown tables, and the part of a document that they replace.

Every figure is a median over the rounds, in brackets the extremes. What a peer lacks is a dash, and the reasons stand
below the tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.peers import bare, plots
from bench.peers.loads import SHARES, SMALL
from bench.peers.results import Named, Results, values
from bench.peers.stats import number, ratio, spread
from bench.peers.targets import COLUMNS, Ratio, checks, ratios, wins

BEGIN, END = "<!-- peers: begin, written by `make bench-peers DOCS=...` -->", "<!-- peers: end -->"
NONE = "-"
COST_CELL = f"a/{SMALL}/32"
LOAD_PER_CORE_MAX = 0.5
"""Beyond which a report says that it cannot be trusted."""
CELLS_NAMED_MAX = 3
"""Of those that a peer lacks for one reason; more are counted."""
OF_ONE_CALL = {
    "put": "put",
    "cas": "compare-and-set",
    "lock": "lock acquire and release",
    "batch_put": "batch put of 1,000",
    "batch_get": "batch get of 1,000",
    "scan": "prefix scan of 1,000",
}
LOADS = {"a": "Workload a, half reads", "b": "Workload b, 95 % reads", "c": "Workload c, reads alone"}


class NoPlace(ValueError):
    """The document lacks the marks between which a report goes."""


def write(results: Results, document: Path) -> list[Path]:
    """Writes the generated part of a document anew, and its plots beside it. Raises NoPlace, PlotsUnavailable."""
    text_before = document.read_text()
    if BEGIN not in text_before or END not in text_before:
        raise NoPlace(f"{document} lacks the lines {BEGIN!r} and {END!r}")
    folder = document.with_suffix("")
    written = plots.write(results, folder)
    pictures = [f"![{path.stem}]({folder.name}/{path.name})" for path in written]
    head, _, rest = text_before.partition(BEGIN)
    _, _, tail = rest.partition(END)
    document.write_text("".join([head, BEGIN, "\n\n", text(results), "\n", "\n".join(pictures), "\n\n", END, tail]))
    return written


def text(results: Results) -> str:
    """All of it, without plots."""
    parts = [_head(results), _peers(results), *_workloads(results), _others(results), _ratios(results)]
    parts += [_checks(results), _wins(results), _ceiling(results), _bounds(results), _absent(results)]
    return "\n".join(part for part in parts if part)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines) + "\n"


def cell_name(cell: str) -> str:
    """`a/100/32` as a reader says it."""
    load, size, callers = cell.split("/")
    what = OF_ONE_CALL.get(load, f"workload {load}")
    many = f"{callers} callers" if callers != "1" else "1 caller"
    return f"{what}, {many}" if size == str(SMALL) else f"{what}, {_size(size)}, {many}"


def _size(value_bytes: str) -> str:
    count = int(value_bytes)
    return f"{count // 1024} KiB" if count % 1024 == 0 else f"{count} B"


def _head(results: Results) -> str:
    return (
        f"Measured {results.date} by `{results.command}`: up to {results.rounds} rounds, {results.seconds:g} s a cell,"
        f" {results.keys:,} keys of each size (fewer of 64 KiB), {results.took_s / 60:.0f} minutes in all.\n\n"
        + "".join(f"- {line}\n" for line in results.hardware)
        + _warning(results)
    )


def _warning(results: Results) -> str:
    if results.load_per_core <= LOAD_PER_CORE_MAX:
        return ""
    return (
        "\n**Provisional**: other programs had the machine too (load before the run:"
        f" {results.load_per_core:.1f} a core), so most of the differences here are noise.\n"
    )


def _title(peer: Named) -> str:
    return f"{peer.title} (threads)" if peer.threads else peer.title


def _peers(results: Results) -> str:
    rows = [
        [_title(peer), peer.guarantee, peer.durability, ", ".join(peer.versions), peer.note or NONE]
        for peer in results.peers.values()
    ]
    return (
        "### What is compared\n\n" + table(["", "guarantee", "durability", "versions", "to know"], rows) if rows else ""
    )


def _figures(peer: Named, cell: str, field: str) -> str:
    found = spread(values(peer, cell, field))
    return NONE if found is None else str(found)


def _median(peer: Named, cell: str, field: str) -> str:
    found = spread(values(peer, cell, field))
    return NONE if found is None else number(found.median)


def _best(results: Results, cell: str) -> Named | None:
    """Who does the most operations a second."""
    known = [
        (found.median, peer)
        for peer in results.peers.values()
        if (found := spread(values(peer, cell, "ops_per_s"))) is not None
    ]
    return max(known, key=lambda each: each[0])[1] if known else None


def _ops(results: Results, cells: Sequence[str], peer: Named) -> list[str]:
    """The fastest of a column is bold."""
    return [
        f"**{_figures(peer, cell, 'ops_per_s')}**"
        if _best(results, cell) is peer
        else _figures(peer, cell, "ops_per_s")
        for cell in cells
    ]


def _workloads(results: Results) -> list[str]:
    parts = []
    sizes = sorted({cell.split("/")[1] for cell in results.cells}, key=int)
    for load, name in LOADS.items():
        for size in sizes:
            cells = [cell for cell in results.cells if cell.startswith(f"{load}/{size}/")]
            if not cells:
                continue
            head = ["operations a second", *(_callers(cell) for cell in cells)]
            costly = COST_CELL in cells
            if costly:
                head += ["p50 / p99 ms at 32", "CPU us an operation, servers + client", "MiB, servers + client"]
            rows = []
            for peer in results.peers.values():
                if any(peer.cells.get(cell) for cell in cells):
                    row = [_title(peer), *_ops(results, cells, peer)]
                    rows.append([*row, *_cost(peer)] if costly else row)
            if rows:
                parts.append(f"### {name}, {_size(size)}\n\n" + table(head, rows))
    return parts


def _callers(cell: str) -> str:
    callers = cell.rpartition("/")[2]
    return f"{callers} callers" if callers != "1" else "1 caller"


def _cost(peer: Named) -> list[str]:
    def both(first: str, second: str, join: str) -> str:
        return f"{_median(peer, COST_CELL, first)}{join}{_median(peer, COST_CELL, second)}"

    if not peer.cells.get(COST_CELL):
        return [NONE] * 3
    return [
        both("p50_ms", "p99_ms", " / "),
        both("server_cpu_us", "client_cpu_us", " + "),
        both("server_rss_mib", "client_rss_mib", " + "),
    ]


def _others(results: Results) -> str:
    """Everything that is no YCSB workload."""
    cells = [cell for cell in results.cells if cell.split("/")[0] not in LOADS]
    if not cells:
        return ""
    parts = []
    for load, name in OF_ONE_CALL.items():
        own = [cell for cell in cells if cell.startswith(f"{load}/")]
        if not own:
            continue
        what = "operations" if load in SHARES or load in ("cas", "lock") else "keys"
        head = [f"{what} a second", *(_callers(cell) for cell in own), f"p50 / p99 ms, {_callers(own[0])}"]
        rows = [
            [
                _title(peer),
                *_ops(results, own, peer),
                f"{_median(peer, own[0], 'p50_ms')} / {_median(peer, own[0], 'p99_ms')}",
            ]
            for peer in results.peers.values()
            if any(peer.cells.get(cell) for cell in own)
        ]
        if rows:
            parts.append(f"### {name[0].upper()}{name[1:]}, {SMALL} B\n\n" + table(head, rows))
    return "\n".join(parts)


def _ratios(results: Results) -> str:
    rows = []
    for name, peer in results.peers.items():
        if name == peer.against or peer.against not in results.peers:
            continue
        ours = results.peers[peer.against]
        rows.append([f"{ours.title} / {_title(peer)}", *(_ratio(each) for each in ratios(results, name))])
    if not rows:
        return ""
    return (
        "### Ours over each peer\n\nMedians of workload a and of batches. Below 1 the peer is faster; in brackets the"
        " target, bold where it was missed.\n\n" + table(["", *COLUMNS.values()], rows)
    )


def _ratio(each: Ratio) -> str:
    if each.value is None:
        return NONE
    shown = f"{each.value:.2f}" if each.target is None else f"{each.value:.2f} ({each.target:g})"
    return f"**{shown}**" if each.missed else shown


def _checks(results: Results) -> str:
    said = {True: "yes", False: "**no**", None: NONE}
    rows = [[check.claim, check.measured, said[check.holds]] for check in checks(results)]
    return "### Other targets\n\n" + table(["", "measured", "holds"], rows) if rows else ""


def _wins(results: Results) -> str:
    lines = []
    for name, peer in results.peers.items():
        if found := wins(results, name):
            each = "; ".join(f"{cell_name(cell)} ({value:.2f})" for cell, value in found.items())
            lines.append(f"- {_title(peer)} against {results.peers[peer.against].title}: {each}\n")
    if not lines:
        return ""
    return "### Where a peer is faster\n\nIn brackets ours over the peer's.\n\n" + "".join(lines)


def _ceiling(results: Results) -> str:
    """etcd's reads beside the smallest call of the library that its client is made of."""
    bound, peer = results.peers.get("grpc-aio"), results.peers.get("etcd")
    cells = [cell for cell in results.cells if bound is not None and bound.cells.get(cell)]
    if bound is None or not cells:
        return ""
    rows = [[bound.title, *_row(bound, cells)]]
    if peer is not None:
        rows.append([f"{peer.title}, workload c", *_row(peer, cells)])
    return (
        "### The ceiling of grpc.aio\n\nNo client that is made of grpc.aio does more calls a second than this from one"
        " process.\n\n" + table(["calls a second", *(_callers(cell) for cell in cells)], rows)
    )


def _row(peer: Named, cells: Sequence[str]) -> list[str]:
    return [_figures(peer, cell, "ops_per_s") for cell in cells]


def _bounds(results: Results) -> str:
    """Ours over the bare loop."""
    rows = []
    for store, name in bare.STORES.items():
        ours, theirs = results.peers.get(name), results.bare.get(store)
        if ours is None or not theirs:
            continue
        row = [f"{ours.title} / bare loop on {store}"]
        for section, cell in bare.SECTIONS.items():
            value = ratio(values(ours, cell, "ops_per_s"), theirs.get(section, []))
            row.append(NONE if value is None else f"{value:.2f} ({spread(theirs[section])})")
        rows.append(row)
    if not rows:
        return ""
    heads = [COLUMNS[cell] for cell in bare.SECTIONS.values()]
    return "### Ours over the bare loop\n\nIn brackets the bare loop's own figures.\n\n" + table(["", *heads], rows)


def _absent(results: Results) -> str:
    """What has no figure, and why."""
    lines = [f"- {name}: {why}\n" for name, why in results.skipped.items()]
    for name, errors in results.failed.items():
        lines.append(f"- {name}: {'; '.join(dict.fromkeys(errors))}\n")
    for peer in results.peers.values():
        reasons: dict[str, list[str]] = {}
        for cell, why in peer.lacks.items():
            reasons.setdefault(why, []).append(cell_name(cell))
        for why, cells in reasons.items():
            which = f"{len(cells)} cells" if len(cells) > CELLS_NAMED_MAX else "; ".join(cells)
            lines.append(f"- {peer.title}: not {which}: {why}\n")
        wrong: dict[str, int] = {}
        for samples in peer.cells.values():
            for sample in samples:
                for error, count in sample.errors.items():
                    wrong[error] = wrong.get(error, 0) + count
        if wrong:
            lines.append(f"- {peer.title}: calls failed: {', '.join(f'{e} {c:,}' for e, c in wrong.items())}\n")
    return "### What was not measured, or failed\n\n" + "".join(lines) if lines else ""
