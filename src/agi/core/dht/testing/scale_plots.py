"""Plots of what scale.py found, as SVG files that are the same for the same figures.

matplotlib is needed for nothing else and is imported here only when plots are asked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from agi.core.dht.testing.scale_members import CURVE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from agi.core.dht.testing.scale import Scale

Scales: TypeAlias = "Sequence[Scale]"

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Told apart by those who see red and green alike too (Okabe and Ito, "Color Universal Design")."""
MARKERS = ("o", "s", "^", "D", "v", "P")
WIDTH_IN, HEIGHT_IN = 4.6, 4.2
"""Of one panel."""
DETECTORS = ((True, "Lifeguard"), (False, "plain SWIM"))
POINTS_MARKED_MAX = 12
"""A line of more points has no markers."""
STYLE: dict[str, Any] = {
    "svg.hashsalt": "scale",  # else ids are drawn anew each time
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


def write(scales: Scales, folder: Path) -> list[Path]:
    """Writes one SVG file for each of PLOTS; makes the folder. Raises PlotsUnavailable.

    Every series is a group whose id is the plot's name and its own, such as `detection-p99`, for who wants to find it.
    """
    check()
    import matplotlib.style
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (panels, draw) in PLOTS.items():
        path = folder / f"{name}.svg"
        with matplotlib.style.context(STYLE):
            figure = Figure(figsize=(WIDTH_IN * panels, HEIGHT_IN), layout="constrained")
            draw(_Plot(name, figure, panels), scales)
            figure.savefig(path, format="svg", metadata=NO_METADATA)
        written.append(path)
    return written


class _Plot:
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

    def sizes(self, panel: int, scales: Scales, title: str, y: str) -> Axes:
        """A panel whose x axis has the sizes, logarithmic."""
        axes = self.axes(panel, title, "members", y)
        members = [scale.members for scale in scales]
        axes.set_xscale("log")
        axes.set_xticks(members, [f"{count:,}" for count in members])
        axes.minorticks_off()
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


def _detection(plot: _Plot, scales: Scales) -> None:
    axes = plot.sizes(0, scales, "A death is known", "s after the death")
    members = [scale.members for scale in scales]
    for series, label in (("all", "to all, worst"), ("p99", "p99"), ("p50", "p50"), ("first", "to the first")):
        plot.line(axes, series, label, members, [getattr(scale.detection, f"{series}_s") for scale in scales])
    plot.line(
        axes, "expected", "as the settings promise", members, [s.detection.expected_s for s in scales], dashed=True
    )
    axes.set_ylim(bottom=0)
    plot.legend(axes)


def _known(plot: _Plot, scales: Scales) -> None:
    axes = plot.axes(0, "Who knows of a death", "s after the death", "% of the members")
    for scale in scales:
        shares = [100 * step / CURVE for step in range(CURVE + 1)]
        plot.line(axes, f"{scale.members}", f"{scale.members:,} members", scale.detection.known_s, shares)
    axes.set_xlim(left=0)
    plot.legend(axes)


def _gossip(plot: _Plot, scales: Scales) -> None:
    members = [scale.members for scale in scales]
    axes = plot.sizes(0, scales, "News is known", "s after it is told first")
    for series, label in (("news_all", "to all, worst"), ("news_p99", "p99"), ("news_p50", "p50")):
        plot.line(axes, series, label, members, [getattr(scale.detection, f"{series}_s") for scale in scales])
    plot.line(axes, "leave_all", "a leave, to all", members, [scale.detection.leave_all_s for scale in scales])
    axes.set_ylim(bottom=0)
    plot.legend(axes)
    axes = plot.sizes(1, scales, "What a member sends", "")
    plot.line(axes, "messages", "messages a second, at peace", members, [s.detection.messages for s in scales])
    plot.line(axes, "bytes", "bytes a second, at peace", members, [s.detection.bytes for s in scales])
    plot.line(axes, "death_messages", "messages for one death", members, [s.detection.death_messages for s in scales])
    plot.line(axes, "death_bytes", "bytes for one death", members, [s.detection.death_bytes for s in scales])
    axes.set_yscale("log")
    plot.legend(axes)


def _stalls(plot: _Plot, scales: Scales) -> None:
    axes = plot.axes(0, "Stalled members declared dead", "longest stall, s", "a stalled member and hour")
    kinds = sorted({each.still_s for scale in scales for each in scale.stalls})
    axes.set_xticks([longest for _, longest in kinds])
    for scale in scales:
        for lifeguard, detector in DETECTORS:
            stalls = [each for each in scale.stalls if each.lifeguard is lifeguard]
            if len(stalls) > 1:  # else only the last kind was tried
                plot.line(
                    axes,
                    f"{scale.members}-{_id(detector)}",
                    f"{scale.members:,} members, {detector}",
                    [each.still_s[1] for each in stalls],
                    [each.rates(scale.members)[1] for each in stalls],
                    again=not lifeguard,
                )
    axes.set_ylim(bottom=0)
    plot.legend(axes)
    least, most = kinds[-1]
    axes = plot.sizes(1, scales, f"Stalls of {least:g} to {most:g} s", "deaths a member and hour")
    for index, whom in enumerate(("sound", "stalled")):
        for lifeguard, detector in DETECTORS:
            stalls = [next(each for each in reversed(s.stalls) if each.lifeguard is lifeguard) for s in scales]
            plot.line(
                axes,
                f"{whom}-{_id(detector)}",
                f"{whom}, {detector}",
                [scale.members for scale in scales],
                [each.rates(scale.members)[index] for each, scale in zip(stalls, scales, strict=True)],
                again=not lifeguard,
            )
    axes.set_ylim(bottom=0)
    plot.legend(axes)


def _id(detector: str) -> str:
    return detector.split()[0].lower()


def _ring(plot: _Plot, scales: Scales) -> None:
    members = [scale.members for scale in scales]
    axes = plot.sizes(0, scales, "Time of a node's processor", "s")
    for series, label in (
        ("adopt", "adopting a join, both rings"),
        ("final", "adopting its end"),
        ("fill", "all replica sets of a ring"),
        ("build", "building a ring"),
    ):
        plot.line(axes, series, label, members, [getattr(scale.ring, f"{series}_s") for scale in scales])
    axes.set_yscale("log")
    plot.legend(axes)
    axes = plot.sizes(1, scales, "Size", "bytes")
    for series, label in (
        ("joint", "both rings during a join, in memory"),
        ("filled", "a ring with all replica sets, in memory"),
        ("built", "a ring as built, in memory"),
        ("topology", "the topology, as sent"),
    ):
        plot.line(axes, series, label, members, [getattr(scale.ring, f"{series}_bytes") for scale in scales])
    axes.set_yscale("log")
    plot.legend(axes)


def _balance(plot: _Plot, scales: Scales) -> None:
    members = [scale.members for scale in scales]
    axes = plot.sizes(0, scales, "Balance", "share of a node / mean")
    for series, label in (
        ("primary_max", "fullest, as first replica"),
        ("held_max", "fullest, all replicas"),
        ("held_min", "emptiest, all replicas"),
        ("primary_min", "emptiest, as first replica"),
    ):
        plot.line(axes, series, label, members, [getattr(scale.ring, series) for scale in scales])
    axes.set_ylim(bottom=0)
    plot.legend(axes)
    axes = plot.sizes(1, scales, "Stored data that a join moves", "%")
    plot.line(axes, "moved", "mean of the joins", members, [100 * scale.ring.moved for scale in scales])
    plot.line(axes, "moved_max", "the most", members, [100 * scale.ring.moved_max for scale in scales])
    ideal = [100 * scale.ring.moved_ideal for scale in scales]
    plot.line(axes, "moved_ideal", "ideal, 1 / (n + 1)", members, ideal, dashed=True)
    axes.set_yscale("log")
    plot.legend(axes)


PLOTS: dict[str, tuple[int, Callable[[_Plot, Scales], None]]] = {
    "detection": (1, _detection),
    "known": (1, _known),
    "gossip": (2, _gossip),
    "stalls": (2, _stalls),
    "ring": (2, _ring),
    "balance": (2, _balance),
}
"""File name: (panels, what draws them)."""
