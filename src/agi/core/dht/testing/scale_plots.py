"""Plots of what scale.py found; plots.py has what they are made with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from agi.core.dht.testing.plots import Plot, PlotsUnavailable, check
from agi.core.dht.testing.plots import write as write_plots
from agi.core.dht.testing.scale_members import CURVE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from agi.core.dht.testing.scale import Scale

__all__ = ["PLOTS", "PlotsUnavailable", "check", "write"]

Scales: TypeAlias = "Sequence[Scale]"

DETECTORS = ((True, "Lifeguard"), (False, "plain SWIM"))


def write(scales: Scales, folder: Path) -> list[Path]:
    """Writes one SVG file for each of PLOTS; makes the folder. Raises PlotsUnavailable."""
    return write_plots(PLOTS, scales, folder, salt="scale")


def _sizes(plot: Plot, panel: int, scales: Scales, title: str, y: str) -> Axes:
    """A panel whose x axis has the sizes, logarithmic."""
    axes = plot.axes(panel, title, "members", y)
    members = [scale.members for scale in scales]
    axes.set_xscale("log")
    axes.set_xticks(members, [f"{count:,}" for count in members])
    axes.minorticks_off()
    return axes


def _detection(plot: Plot, scales: Scales) -> None:
    axes = _sizes(plot, 0, scales, "A death is known", "s after the death")
    members = [scale.members for scale in scales]
    for series, label in (("all", "to all, worst"), ("p99", "p99"), ("p50", "p50"), ("first", "to the first")):
        plot.line(axes, series, label, members, [getattr(scale.detection, f"{series}_s") for scale in scales])
    plot.line(
        axes, "expected", "as the settings promise", members, [s.detection.expected_s for s in scales], dashed=True
    )
    axes.set_ylim(bottom=0)
    plot.legend(axes)


def _known(plot: Plot, scales: Scales) -> None:
    axes = plot.axes(0, "Who knows of a death", "s after the death", "% of the members")
    for scale in scales:
        shares = [100 * step / CURVE for step in range(CURVE + 1)]
        plot.line(axes, f"{scale.members}", f"{scale.members:,} members", scale.detection.known_s, shares)
    axes.set_xlim(left=0)
    plot.legend(axes)


def _gossip(plot: Plot, scales: Scales) -> None:
    members = [scale.members for scale in scales]
    axes = _sizes(plot, 0, scales, "News is known", "s after it is told first")
    for series, label in (("news_all", "to all, worst"), ("news_p99", "p99"), ("news_p50", "p50")):
        plot.line(axes, series, label, members, [getattr(scale.detection, f"{series}_s") for scale in scales])
    plot.line(axes, "leave_all", "a leave, to all", members, [scale.detection.leave_all_s for scale in scales])
    axes.set_ylim(bottom=0)
    plot.legend(axes)
    axes = _sizes(plot, 1, scales, "What a member sends", "")
    plot.line(axes, "messages", "messages a second, at peace", members, [s.detection.messages for s in scales])
    plot.line(axes, "bytes", "bytes a second, at peace", members, [s.detection.bytes for s in scales])
    plot.line(axes, "death_messages", "messages for one death", members, [s.detection.death_messages for s in scales])
    plot.line(axes, "death_bytes", "bytes for one death", members, [s.detection.death_bytes for s in scales])
    axes.set_yscale("log")
    plot.legend(axes)


def _stalls(plot: Plot, scales: Scales) -> None:
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
    axes = _sizes(plot, 1, scales, f"Stalls of {least:g} to {most:g} s", "deaths a member and hour")
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


def _ring(plot: Plot, scales: Scales) -> None:
    members = [scale.members for scale in scales]
    axes = _sizes(plot, 0, scales, "Time of a node's processor", "s")
    for series, label in (
        ("adopt", "adopting a join, both rings"),
        ("final", "adopting its end"),
        ("fill", "all replica sets of a ring"),
        ("build", "building a ring"),
    ):
        plot.line(axes, series, label, members, [getattr(scale.ring, f"{series}_s") for scale in scales])
    axes.set_yscale("log")
    plot.legend(axes)
    axes = _sizes(plot, 1, scales, "Size", "bytes")
    for series, label in (
        ("joint", "both rings during a join, in memory"),
        ("filled", "a ring with all replica sets, in memory"),
        ("built", "a ring as built, in memory"),
        ("topology", "the topology, as sent"),
    ):
        plot.line(axes, series, label, members, [getattr(scale.ring, f"{series}_bytes") for scale in scales])
    axes.set_yscale("log")
    plot.legend(axes)


def _balance(plot: Plot, scales: Scales) -> None:
    members = [scale.members for scale in scales]
    axes = _sizes(plot, 0, scales, "Balance", "share of a node / mean")
    for series, label in (
        ("primary_max", "fullest, as first replica"),
        ("held_max", "fullest, all replicas"),
        ("held_min", "emptiest, all replicas"),
        ("primary_min", "emptiest, as first replica"),
    ):
        plot.line(axes, series, label, members, [getattr(scale.ring, series) for scale in scales])
    axes.set_ylim(bottom=0)
    plot.legend(axes)
    axes = _sizes(plot, 1, scales, "Stored data that a join moves", "%")
    plot.line(axes, "moved", "mean of the joins", members, [100 * scale.ring.moved for scale in scales])
    plot.line(axes, "moved_max", "the most", members, [100 * scale.ring.moved_max for scale in scales])
    ideal = [100 * scale.ring.moved_ideal for scale in scales]
    plot.line(axes, "moved_ideal", "ideal, 1 / (n + 1)", members, ideal, dashed=True)
    axes.set_yscale("log")
    plot.legend(axes)


PLOTS: dict[str, tuple[int, Callable[[Plot, Scales], None]]] = {
    "detection": (1, _detection),
    "known": (1, _known),
    "gossip": (2, _gossip),
    "stalls": (2, _stalls),
    "ring": (2, _ring),
    "balance": (2, _balance),
}
"""File name: (panels, what draws them)."""
