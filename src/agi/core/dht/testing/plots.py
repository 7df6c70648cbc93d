"""Plots for documents: SVG files that are the same for the same figures.

matplotlib is needed for nothing else and is imported here only when plots are asked for. Who draws gives a table of
file name -> (panels, function), each of which draws into a `Plot` what it is handed:

    write({"growth": (1, draw)}, figures, folder, salt="growth")
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

T = TypeVar("T")

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Told apart by those who see red and green alike too (Okabe and Ito, "Color Universal Design")."""
MARKERS = ("o", "s", "^", "D", "v", "P")
WIDTH_IN, HEIGHT_IN = 4.6, 4.2
"""Of one panel."""
POINTS_MARKED_MAX = 12
"""A line of more points has no markers."""
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: a tenth of the bytes, and it can be searched
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


class PlotsUnavailable(RuntimeError):
    """There is no matplotlib."""


def check() -> None:
    """Raises PlotsUnavailable where plots cannot be made."""
    if importlib.util.find_spec("matplotlib") is None:
        raise PlotsUnavailable("plots need matplotlib 3.10 or newer: pip install 'matplotlib>=3.10'")


def write(
    plots: Mapping[str, tuple[int, Callable[[Plot, T], None]]], figures: T, folder: Path, *, salt: str
) -> list[Path]:
    """Writes one SVG file for each of the plots; makes the folder. Raises PlotsUnavailable.

    Every series is a group whose id is the plot's name and its own, such as `detection-p99`, for who wants to find it.
    `salt`: ids are derived from it, else they would be drawn anew each time.
    """
    check()
    import matplotlib.style
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (panels, draw) in plots.items():
        path = folder / f"{name}.svg"
        with matplotlib.style.context({"svg.hashsalt": salt, **STYLE}):
            figure = Figure(figsize=(WIDTH_IN * panels, HEIGHT_IN), layout="constrained")
            draw(Plot(name, figure, panels), figures)
            figure.savefig(path, format="svg", metadata=NO_METADATA)
        written.append(path)
    return written


class Plot:
    """One file with its panels."""

    def __init__(self, name: str, figure: Figure, panels: int) -> None:
        self.name = name
        self.panels: list[Axes] = list(figure.subplots(1, panels, squeeze=False)[0])
        self._count = dict.fromkeys(self.panels, 0)

    def axes(self, panel: int, title: str, x: str, y: str) -> Axes:
        axes = self.panels[panel]
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        return axes

    def line(
        self,
        axes: Axes,
        series: str,
        label: str,
        x: Sequence[float],
        y: Sequence[float],
        *,
        dashed: bool = False,
        again: bool = False,
    ) -> None:
        """Adds a series. `dashed`: one to compare with the others. `again`: of the same thing as the series before it,
        and in its colour."""
        self._count[axes] += not again
        number = (self._count[axes] - 1) % len(COLOURS)
        axes.plot(
            x,
            y,
            label=label,
            gid=f"{self.name}-{series}",
            color="#555555" if dashed else COLOURS[number],
            linestyle="--" if dashed else ":" if again else "-",
            linewidth=1.5,
            marker="" if dashed or len(x) > POINTS_MARKED_MAX else MARKERS[number],
            markersize=6,
            markerfacecolor="none",  # so that one does not hide another
            clip_on=False,
        )

    def legend(self, axes: Axes) -> None:
        """Below the panel, where it hides nothing."""
        if axes.lines:
            axes.legend(loc="upper left", bbox_to_anchor=(-0.1, -0.14), ncols=2)
