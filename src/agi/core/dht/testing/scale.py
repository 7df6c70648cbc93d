"""How failure detection, the topology and the ring behave at sizes that no test machine runs: 10 to 5000 members.

    python -m agi.core.dht.testing.scale                                  10, 100, 1000, 5000 (`make sim-scale`)
    python -m agi.core.dht.testing.scale --sizes 10,100 --result r.json   others, and the figures as JSON
    python -m agi.core.dht.testing.scale --read r.json --plots folder     table and plots of figures measured before

scale_members.py measures deaths, news, traffic and stalls in virtual time, the same for a seed on every machine.
scale_ring.py measures the ring and the topology; its times depend on the machine. docs/scale.md has the figures.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TypeAlias

import msgspec

from agi.core.dht.config import load_config
from agi.core.dht.config.schema import PRESETS
from agi.core.dht.protocol.membership import Pace
from agi.core.dht.testing import scale_plots
from agi.core.dht.testing.scale_members import STALLS_S, Detection, Stalls, measure_detection, measure_stalls, stalls_of
from agi.core.dht.testing.scale_ring import RingFigures, Shape, measure_ring

SIZES = (10, 100, 1000, 5000)
MEMBERS_MIN, MEMBERS_MAX = 3, 20_000


@dataclass(slots=True)
class Scale:
    """What was found for one size.

    Attributes:
        stalls: of each kind that is tried at this size, with Lifeguard and then without.
        took_s: processor time of it all.
    """

    members: int
    detection: Detection
    stalls: list[Stalls]
    ring: RingFigures
    took_s: float

    def stalled(self, still_s: tuple[float, float], lifeguard: bool) -> Stalls | None:
        """What came of that kind of stall, if it was tried."""
        return next((each for each in self.stalls if (each.still_s, each.lifeguard) == (still_s, lifeguard)), None)


@dataclass(slots=True)
class Result:
    """One run: its settings, and what was found for each size, ascending."""

    preset: str
    seed: int
    python: str
    pace: Pace
    shape: Shape
    sizes: list[Scale]


@dataclass(frozen=True, slots=True)
class _Work:
    """A part of a run that is measured in one process. `still_s` and `lifeguard` are of stalls."""

    members: int
    what: str
    pace: Pace
    shape: Shape
    seed: int
    still_s: tuple[float, float] = (0.0, 0.0)
    lifeguard: bool = True

    def __str__(self) -> str:
        kind = f" of {span(self.still_s)}, {guard(self.lifeguard)}" if self.what == "stalls" else ""
        return f"{self.members} members, {self.what}{kind}"


_Part: TypeAlias = Detection | Stalls | RingFigures


def span(still_s: tuple[float, float]) -> str:
    """How long a stall takes, for people."""
    return f"{still_s[0]:g} to {still_s[1]:g} s"


def guard(lifeguard: bool) -> str:
    """Which failure detector, for people."""
    return "Lifeguard" if lifeguard else "plain SWIM"


def _works(members: int, pace: Pace, shape: Shape, seed: int) -> list[_Work]:
    """What takes longest comes first."""
    stalls = [
        _Work(members, "stalls", pace, shape, seed, still_s, lifeguard)
        for still_s, lifeguard in product(stalls_of(members), (True, False))
    ]
    return [*stalls, *(_Work(members, what, pace, shape, seed) for what in ("detection", "ring"))]


def _do(work: _Work) -> tuple[_Work, _Part, float]:
    """Measures a part. Returns it with the processor seconds that it took."""
    began = time.process_time()
    enabled = gc.isenabled()
    gc.disable()  # nothing here is garbage before the end, and looking for it takes as long as the rest
    try:
        part: _Part
        if work.what == "detection":
            part = measure_detection(work.members, work.pace, work.seed)
        elif work.what == "stalls":
            part = measure_stalls(work.members, work.pace, work.seed, work.still_s, lifeguard=work.lifeguard)
        else:
            part = measure_ring(work.members, work.shape)
    finally:
        if enabled:
            gc.enable()
    return work, part, time.process_time() - began


def measure(sizes: Iterable[int], pace: Pace, shape: Shape, seed: int, jobs: int) -> list[Scale]:
    """Everything, for these sizes, in so many processes at a time; 0 stands for this process. A line about each part
    that is done goes to stderr."""
    ordered = sorted(set(sizes))
    works = [work for size in reversed(ordered) for work in _works(size, pace, shape, seed)]
    if jobs == 0:
        found = [_told(each) for each in map(_do, works)]
    else:  # a process for each part: what the one before left in memory would slow the next
        with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=1) as pool:
            found = [_told(each) for each in pool.imap_unordered(_do, works)]
    return [_gathered(size, [each for each in found if each[0].members == size]) for size in ordered]


def _told(done: tuple[_Work, _Part, float]) -> tuple[_Work, _Part, float]:
    work, _, took_s = done
    sys.stderr.write(f"{work}: {took_s:.1f} s\n")
    return done


def _gathered(members: int, found: Sequence[tuple[_Work, _Part, float]]) -> Scale:
    parts = [part for _, part, _ in found]
    return Scale(
        members=members,
        detection=next(part for part in parts if isinstance(part, Detection)),
        stalls=sorted(
            (part for part in parts if isinstance(part, Stalls)),
            key=lambda stalls: (stalls.still_s, not stalls.lifeguard),
        ),
        ring=next(part for part in parts if isinstance(part, RingFigures)),
        took_s=sum(took_s for _, _, took_s in found),
    )


# --- the table

Row: TypeAlias = tuple[str, Callable[[Scale], str]]


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}"


MEMBER_ROWS: tuple[Row, ...] = (
    ("death known to the first, s", lambda s: f"{s.detection.first_s:.2f}"),
    ("death known to a member, p50, s", lambda s: f"{s.detection.p50_s:.2f}"),
    ("death known to a member, p99, s", lambda s: f"{s.detection.p99_s:.2f}"),
    ("worst death known to all, s", lambda s: f"{s.detection.all_s:.2f}"),
    ("death, as the settings promise, s", lambda s: f"{s.detection.expected_s:.2f}"),
    ("deaths tried", lambda s: f"{s.detection.deaths}"),
    ("news known to a member, p50, s", lambda s: f"{s.detection.news_p50_s:.2f}"),
    ("news known to a member, p99, s", lambda s: f"{s.detection.news_p99_s:.2f}"),
    ("worst news known to all, s", lambda s: f"{s.detection.news_all_s:.2f}"),
    ("leave known to all, s", lambda s: f"{s.detection.leave_all_s:.2f}"),
    ("messages a member a second, at peace", lambda s: f"{s.detection.messages:.2f}"),
    ("bytes a member a second, at peace", lambda s: f"{s.detection.bytes:.0f}"),
    ("messages a member that one death adds", lambda s: f"{s.detection.death_messages:.1f}"),
    ("bytes a member that one death adds", lambda s: f"{s.detection.death_bytes:.0f}"),
    ("largest message, bytes", lambda s: f"{s.detection.largest_bytes}"),
)

RING_ROWS: tuple[Row, ...] = (
    ("ring: points", lambda s: f"{s.ring.points}"),
    ("ring: build, s", lambda s: f"{s.ring.build_s:.3f}"),
    ("ring: all replica sets, s", lambda s: f"{s.ring.fill_s:.3f}"),
    ("ring: lookup of the replicas of a key, us", lambda s: f"{s.ring.lookup_us:.2f}"),
    ("ring: memory as built, MiB", lambda s: _mib(s.ring.built_bytes)),
    ("ring: memory with all replica sets, MiB", lambda s: _mib(s.ring.filled_bytes)),
    ("fullest node / mean, as first replica", lambda s: f"{s.ring.primary_max:.2f}"),
    ("emptiest / mean, as first replica", lambda s: f"{s.ring.primary_min:.2f}"),
    ("fullest / mean, all replicas", lambda s: f"{s.ring.held_max:.2f}"),
    ("emptiest / mean, all replicas", lambda s: f"{s.ring.held_min:.2f}"),
    ("joins tried", lambda s: f"{s.ring.joins}"),
    ("join: stored data that moves, mean, %", lambda s: _percent(s.ring.moved)),
    ("join: stored data that moves, most, %", lambda s: _percent(s.ring.moved_max)),
    ("join: ideal, 1 / (n + 1), %", lambda s: _percent(s.ring.moved_ideal)),
    ("join: moves to others than the newcomer, %", lambda s: _percent(s.ring.moved_else)),
    ("join: keys with another first replica, %", lambda s: _percent(s.ring.primary_moved)),
    ("topology, encoded, KiB", lambda s: f"{s.ring.topology_bytes / 1024:.1f}"),
    ("join: adopting it, both rings, s", lambda s: f"{s.ring.adopt_s:.3f}"),
    ("join: adopting its end, s", lambda s: f"{s.ring.final_s:.3f}"),
    ("join: memory of both rings, MiB", lambda s: _mib(s.ring.joint_bytes)),
)


def _false_deaths(still_s: tuple[float, float], lifeguard: bool, kind: int, scale: Scale) -> str:
    stalls = scale.stalled(still_s, lifeguard)
    if stalls is None:
        return ""
    return f"{(stalls.false_sound, stalls.false_stalled)[kind]} ({stalls.rates(scale.members)[kind]:.3g})"


def _stall_bytes(still_s: tuple[float, float], lifeguard: bool, scale: Scale) -> str:
    stalls = scale.stalled(still_s, lifeguard)
    return "" if stalls is None else f"{stalls.bytes:.0f}"


def stall_rows() -> list[Row]:
    """False deaths, in all and (for each member of that kind and hour), for each kind of stall and of detector."""
    rows: list[Row] = [
        ("members that stall", lambda s: f"{s.stalls[0].stalled}"),
        ("for, virtual s", lambda s: f"{s.stalls[0].seconds:.0f}"),
    ]
    for still_s, lifeguard in product(STALLS_S, (True, False)):
        name = f"{span(still_s)}, {guard(lifeguard)}"
        rows += [
            (f"{name}: sound members declared dead", partial(_false_deaths, still_s, lifeguard, 0)),
            (f"{name}: stalled members declared dead", partial(_false_deaths, still_s, lifeguard, 1)),
            (f"{name}: bytes a member a second", partial(_stall_bytes, still_s, lifeguard)),
        ]
    return rows


def table(scales: Sequence[Scale]) -> str:
    """Markdown, one column for each size."""
    sections = (
        ("failure detection; members", MEMBER_ROWS),
        ("5 % stall; members", stall_rows()),
        ("ring; members", RING_ROWS),
    )
    return "\n\n".join(_section(title, rows, scales) for title, rows in sections)


def _section(title: str, rows: Sequence[Row], scales: Sequence[Scale]) -> str:
    lines = [[title, *(f"{scale.members}" for scale in scales)], *([name, *map(show, scales)] for name, show in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    shown = [
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    ]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (shown[0], rule, *shown[1:]))


# --- the command


def _sizes(text: str) -> list[int]:
    sizes = [int(part) for part in text.split(",")]
    if not all(MEMBERS_MIN <= size <= MEMBERS_MAX for size in sizes):
        raise ValueError(text)
    return sizes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m agi.core.dht.testing.scale", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--sizes", type=_sizes, default=list(SIZES), help=f"members, each {MEMBERS_MIN} to {MEMBERS_MAX}"
    )
    parser.add_argument("--preset", choices=PRESETS, default="lan", help="settings of the failure detector")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time (default: all processors); 0: none"
    )
    parser.add_argument("--result", type=Path, help="file that gets the figures as JSON")
    parser.add_argument("--plots", type=Path, help="folder that gets the plots as SVG; needs matplotlib")
    parser.add_argument("--read", type=Path, help="figures of an earlier run: nothing is measured")
    given = parser.parse_args(argv)
    if given.plots is not None:
        try:
            scale_plots.check()  # before it takes a quarter of an hour
        except scale_plots.PlotsUnavailable as error:
            parser.error(str(error))
    if given.read is not None:
        result = msgspec.json.decode(given.read.read_bytes(), type=Result)
    else:
        config = load_config(None, {}, {"health.preset": given.preset})
        shape = Shape(config.replication.factor, config.ring.virtual_nodes, config.ring.hash_algorithm)
        scales = measure(given.sizes, config.pace(), shape, given.seed, given.jobs)
        result = Result(given.preset, given.seed, platform.python_version(), config.pace(), shape, scales)
    sys.stdout.write(table(result.sizes) + "\n")
    if given.result is not None:
        given.result.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    if given.plots is not None:
        scale_plots.write(result.sizes, given.plots)
    return 0


if __name__ == "__main__":
    sys.exit(main())
