"""The plots of docs/growth.md: one file for each dimension, figures with the theories that they are held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from bench.growth.plan import DIMENSIONS
from bench.growth.report import FIGURES, verdicts
from bench.growth.runner import Results

from agi.core.dht.testing.plots import Plot
from agi.core.dht.testing.plots import write as write_plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CPU = ("CPU of an operation, all processes", "us", ("get CPU", "put CPU"))
TAIL = ("99 of 100 calls take at most", "ms", ("get p99", "put p99"))
STORED = ("Memory and disk", "bytes", ("memory of a node", "disk of all nodes"))
MEMORY = ("Memory", "bytes", ("memory of a node",))
STARTS = ("A node starts", "s", ("start, ready", "start after kill -9, ready", "start, trees built"))
PANELS: dict[str, tuple[tuple[str, str, tuple[str, ...]], ...]] = {
    "keys": (CPU, TAIL, STORED, STARTS),
    "memory": (MEMORY,),
}


def write(results: Results, folder: Path) -> list[Path]:
    """Raises PlotsUnavailable."""
    plots: dict[str, tuple[int, Callable[[Plot, Results], None]]] = {
        name: (len(PANELS.get(name, (CPU, TAIL))), partial(_draw, name)) for name in results.dimensions
    }
    return write_plots(plots, results, folder, salt="growth")


def _draw(dimension: str, plot: Plot, results: Results) -> None:
    points = results.dimensions[dimension]
    judged = {verdict.figure: verdict for verdict in verdicts(results, dimension)}
    for panel, (title, unit, figures) in enumerate(PANELS.get(dimension, (CPU, TAIL))):
        axes = plot.axes(panel, title, DIMENSIONS[dimension], unit)
        _scale(axes, [point.x for point in points])
        for figure in figures:
            there = [point for point in points if FIGURES[figure](point)]
            series = "".join(letter if letter.isalnum() else "-" for letter in figure.lower())
            plot.line(axes, series, figure, [p.x for p in there], [median(FIGURES[figure](p)) for p in there])
            if figure in judged:
                xs = [p.x for p in there if min(FIGURES[figure](p)) > 0]
                plot.line(axes, f"{series}-theory", f"{figure}, theory", xs, judged[figure].fitted, dashed=True)
        plot.legend(axes)


def _scale(axes: Axes, xs: Sequence[int]) -> None:
    """Both axes logarithmic, the points of x named; y keeps its minor ticks, which are named where it is short."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(xs, [_short(x) for x in xs])
    axes.xaxis.minorticks_off()


def _short(x: int) -> str:
    for power, unit in ((20, "Mi"), (10, "Ki")):
        if x >= 1 << power and x % (1 << power) == 0:
            return f"{x >> power}{unit}"
    return f"{x:,}"
