"""Plots of a run, as SVG files that are the same for the same figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.peers.loads import SMALL
from bench.peers.results import Named, Results, values
from bench.peers.stats import spread
from bench.peers.targets import COLUMNS, ratios

from agi.core.dht.testing.plots import COLOURS, HEIGHT_IN, MARKERS, Plot
from agi.core.dht.testing.plots import write as write_plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CLASSES = {
    "ours-memory": "in memory",
    "ours-interval": "on disk, synced later",
    "ours-group": "synced before the answer",
}
"""What is fair to compare stands in one panel."""
CALLERS = (1, 32, 256)
BARS_WIDTH_IN, RATIOS_WIDTH_IN = 15.0, 9.0
ROW_IN = 0.24
"""Of a bar, or of a line of the ratios."""
ONE_CALL = {
    "batch_put": "Batch put",
    "batch_get": "Batch get",
    "cas": "Compare-and-set",
    "lock": "Lock",
    "scan": "Scan",
}


def write(results: Results, folder: Path) -> list[Path]:
    """One file for each of PLOTS; makes the folder. Raises PlotsUnavailable."""
    return write_plots(PLOTS, results, folder, salt="peers")


def _callers(plot: Plot, results: Results) -> None:
    """Workload a by callers, one panel for each class."""
    for panel, (ours, title) in enumerate(CLASSES.items()):
        axes = plot.axes(panel, f"Workload a, {SMALL} B: {title}", "callers", "" if panel else "operations a second")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(CALLERS, [str(callers) for callers in CALLERS])
        for number, (name, peer) in enumerate(_of_class(results, ours)):
            _line(plot, axes, number, name, peer)
        if axes.containers:
            axes.legend(loc="upper left", bbox_to_anchor=(-0.1, -0.14), ncols=2)


def _of_class(results: Results, ours: str) -> list[tuple[str, Named]]:
    """Ours first, whatever the order of the run."""
    found = [(name, peer) for name, peer in results.peers.items() if peer.against == ours]
    return sorted(found, key=lambda each: each[0] != ours)


def _line(plot: Plot, axes: Axes, number: int, name: str, peer: Named) -> None:
    points = []
    for callers in CALLERS:
        found = spread(values(peer, f"a/{SMALL}/{callers}", "ops_per_s"))
        if found is not None:
            points.append((callers, found))
    if not points:
        return
    middle = [found.median for _, found in points]
    axes.errorbar(
        [callers for callers, _ in points],
        middle,
        yerr=[[found.median - found.low for _, found in points], [found.high - found.median for _, found in points]],
        label=peer.title,
        gid=f"{plot.name}-{name}",
        color=COLOURS[number % len(COLOURS)],
        linestyle="-" if number < len(COLOURS) else "--",
        marker=MARKERS[number % len(MARKERS)],
        markerfacecolor="none",
        linewidth=2.2 if name in CLASSES else 1.3,
        capsize=2,
    )


def _one_call(plot: Plot, results: Results) -> None:
    """Batches, conditional writes, locks and scans, as bars; ours stand out."""
    cells = {load: _most_callers(results, load) for load in ONE_CALL}
    measured = [name for name, peer in results.peers.items() if any(peer.cells.get(cell) for cell in cells.values())]
    names = measured[::-1]  # the first on top
    titles = [results.peers[name].title for name in names]
    _resize(plot, BARS_WIDTH_IN, len(names) * ROW_IN)
    for panel, (load, title) in enumerate(ONE_CALL.items()):
        cell = cells[load]
        callers = cell.rpartition("/")[2]
        unit = "operations a second" if load in ("cas", "lock") else "keys a second"
        axes = plot.axes(panel, f"{title}, callers: {callers}", unit, "")
        figures = [spread(values(results.peers[name], cell, "ops_per_s")) for name in names]
        known = [found.median for found in figures if found is not None]
        if known:
            axes.set_xscale("log")
            axes.set_xlim(10 ** math.floor(math.log10(min(known)) - 0.3), 2 * max(known))
            axes.minorticks_off()
        axes.barh(
            range(len(names)),
            [found.median if found is not None else 0 for found in figures],
            color=[COLOURS[0] if name in CLASSES else "#999999" for name in names],
        )
        axes.set_yticks(range(len(names)), titles if not panel else [""] * len(names))


def _resize(plot: Plot, width_in: float, rows_in: float) -> None:
    figure = plot.panels[0].get_figure(root=True)
    assert figure is not None  # panels are made by one
    figure.set_size_inches(width_in, max(HEIGHT_IN, 1.6 + rows_in))


def _most_callers(results: Results, load: str) -> str:
    """The cell of a workload with 32 callers, or the one it has."""
    cells = [cell for cell in results.cells if cell.startswith(f"{load}/")]
    return next((cell for cell in cells if cell.endswith("/32")), cells[0] if cells else "")


def _ratios(plot: Plot, results: Results) -> None:
    """Ours over each peer, with a line at 1."""
    names = [
        name for name, peer in reversed(results.peers.items()) if name not in CLASSES and peer.against in results.peers
    ]
    _resize(plot, RATIOS_WIDTH_IN, 2 * ROW_IN * len(names))
    axes = plot.axes(0, "Ours over each peer", "operations a second, ours / peer: right of 1 ours is faster", "")
    axes.axvline(1.0, color="#555555", linewidth=1)
    axes.set_yticks(range(len(names)), [results.peers[name].title for name in names])
    found = [ratios(results, name) for name in names]
    for column, title in enumerate(COLUMNS.values()):
        points: Sequence[tuple[float, int]] = [
            (value, row) for row, each in enumerate(found) if (value := each[column].value) is not None
        ]
        axes.plot(
            [value for value, _ in points],
            [row for _, row in points],
            linestyle="",
            marker=MARKERS[column],
            color=COLOURS[column],
            markerfacecolor="none",
            label=title,
            gid=f"{plot.name}-{title.replace(' ', '-')}",
        )
    if names:
        axes.set_xscale("log")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


PLOTS: dict[str, tuple[int, Callable[[Plot, Results], None]]] = {
    "callers": (len(CLASSES), _callers),
    "one-call": (len(ONE_CALL), _one_call),
    "ratios": (1, _ratios),
}
"""File name: (panels, what draws them)."""
