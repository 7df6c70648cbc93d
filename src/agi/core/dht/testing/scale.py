"""How failure detection and the ring behave at sizes that no test machine runs: 10 to 5000 members in virtual time.

    python -m agi.core.dht.testing.scale                          10, 100, 1000 and 5000 members (`make sim-scale`)
    python -m agi.core.dht.testing.scale --sizes 10,100 --json    others, as JSON

Times are virtual seconds of the shipped state machines (protocol/membership.py) at the settings of a preset, without
links: a broken link, which real nodes notice, makes detection faster. The network delays each message by 0.2 to 2 ms.
What is said of the ring is measured, and depends on the machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from agi.core.dht.config import load_config
from agi.core.dht.config.schema import PRESETS
from agi.core.dht.protocol.membership import Pace, Report
from agi.core.dht.ring import Ring
from agi.core.dht.testing.membership import MemberNet
from agi.core.dht.types import MemberStatus, Node

SIZES = (10, 100, 1000, 5000)
MEMBERS_MAX = 20_000
WARM_S, PEACE_S, DETECT_S_MAX, SPREAD_S_MAX = 5.0, 30.0, 120.0, 60.0
"""Virtual seconds: before anything is measured, of peace, at most for a death and for news."""
STALLED_S, STALLED_MEMBER_S = 60.0, 100_000
"""How long some members stall: so many virtual seconds, but no more than this over all members, to end in time."""
STALLED_SHARE = 0.05
STALL_S, RUN_S = (0.5, 8.0), (0.1, 1.0)
"""How long a stalled member stands still, and then runs."""
DEATHS = 5
"""Members killed, one after the other, of which the times to detection are."""
KEYS = 100_000
LOOKUPS = 200_000
VNODES = 150
FACTOR = 3


@dataclass(slots=True)
class Scale:
    """What was found for one size; times in seconds.

    Attributes:
        detect_first_s, detect_p50_s, detect_p99_s, detect_all_s: from a death until the first, half, 99 % and all of
            the others hold it; medians over several deaths, the last one the worst.
        spread_s: until one member's refutation is known to all.
        messages, bytes: per member and second at peace.
        stalled_s: how long 5 % of the members stalled, again and again.
        false_healthy, false_stalled: members then declared dead though they ran: sound ones, and those that stalled
            themselves, once for each incarnation; `plain_`: without Lifeguard's self-doubt and long suspicions, and
            where nobody notices that it stalled.
        ring_build_s, lookup_us, ring_mb: a ring of these nodes; a lookup of the replicas of a key.
        balance, balance_replicas: the fullest node's share over the mean, as primary and with replicas.
        moved, moved_ideal: share of keys whose primary changes when a node joins.
    """

    members: int
    detect_first_s: float = 0.0
    detect_p50_s: float = 0.0
    detect_p99_s: float = 0.0
    detect_all_s: float = 0.0
    spread_s: float = 0.0
    messages: float = 0.0
    bytes: float = 0.0
    stalled_s: float = 0.0
    false_healthy: int = 0
    false_stalled: int = 0
    plain_false_healthy: int = 0
    plain_false_stalled: int = 0
    ring_build_s: float = 0.0
    lookup_us: float = 0.0
    ring_mb: float = 0.0
    balance: float = 0.0
    balance_replicas: float = 0.0
    moved: float = 0.0
    moved_ideal: float = 0.0
    took_s: float = 0.0


class _Watch:
    """Counts reports; keeping those of thousands of members would take more room than the members."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.member = ""
        self.status = MemberStatus.DEAD
        self.deaths: set[tuple[str, int]] = set()
        self.net: MemberNet | None = None

    def __call__(self, now: float, where: str, what: Report) -> None:
        if what.node == self.member and what.status is self.status:
            self.times.append(now)
        if what.status is MemberStatus.DEAD and self.net is not None:
            self.deaths.add((what.node, self.net.members[where].view.get(what.node).incarnation))


def _net(members: int, pace: Pace, seed: int, *, notice_stalls: bool = True) -> tuple[MemberNet, _Watch]:
    watch = _Watch()
    net = MemberNet(members, seed=seed, pace=pace, watch=watch, notice_stalls=notice_stalls)
    return net, watch


def measure_members(scale: Scale, pace: Pace, seed: int) -> None:
    """Traffic at peace, the spread of news, and deaths."""
    net, watch = _net(scale.members, pace, seed)
    net.run(WARM_S)
    net.messages = net.bytes = 0
    net.run(PEACE_S)
    scale.messages = net.messages / PEACE_S / scale.members
    scale.bytes = net.bytes / PEACE_S / scale.members
    scale.spread_s = _spread(net, watch)
    firsts, halves, most, alls = [], [], [], []
    for victim in net.names[1 : 1 + min(DEATHS, scale.members // 3)]:
        watch.member, watch.status, watch.times = victim, MemberStatus.DEAD, []
        others = len(net.members) - 1
        net.kill(victim)
        began = net.now
        _run_until(net, lambda: len(watch.times) >= others, DETECT_S_MAX)  # noqa: B023  # it is over before they change
        times = [at - began for at in watch.times]
        firsts.append(times[0])
        halves.append(times[(others - 1) // 2])
        most.append(times[min(others - 1, round(0.99 * others))])
        alls.append(times[-1])
    scale.detect_first_s = statistics.median(firsts)
    scale.detect_p50_s = statistics.median(halves)
    scale.detect_p99_s = statistics.median(most)
    scale.detect_all_s = max(alls)


def _spread(net: MemberNet, watch: _Watch) -> float:
    """Lets a member leave: that is news which nobody doubts. It comes back by a restart."""
    teller = net.names[0]
    watch.member, watch.status, watch.times = teller, MemberStatus.LEFT, []
    began, others = net.now, len(net.members) - 1
    net.leave(teller)
    _run_until(net, lambda: len(watch.times) >= others, SPREAD_S_MAX)
    took_s = watch.times[-1] - began
    net.restart(teller)
    watch.status, watch.times = MemberStatus.ALIVE, []
    _run_until(net, lambda: len(watch.times) >= others, SPREAD_S_MAX)
    return took_s


def _run_until(net: MemberNet, condition: Callable[[], bool], within_s: float) -> None:
    net.run_until(condition, within_s=within_s)


def measure_stalls(members: int, pace: Pace, seed: int, *, notice_stalls: bool = True) -> tuple[int, int]:
    """(sound, stalled) members that were declared dead, by incarnation, while some stand still again and again."""
    net, watch = _net(members, pace, seed, notice_stalls=notice_stalls)
    net.run(WARM_S)
    rng = random.Random(f"stalls/{seed}")
    stalled = rng.sample(net.names, max(1, round(STALLED_SHARE * members)))

    def pause(name: str) -> None:
        net.pause(name)
        net.at(rng.uniform(*STALL_S), resume, name)

    def resume(name: str) -> None:
        net.resume(name)
        net.at(rng.uniform(*RUN_S), pause, name)

    for name in stalled:
        net.at(rng.uniform(0, STALL_S[1]), pause, name)
    watch.net = net
    net.run(stalled_s(members))
    own = set(stalled)
    return sum(name not in own for name, _ in watch.deaths), sum(name in own for name, _ in watch.deaths)


def stalled_s(members: int) -> float:
    return min(STALLED_S, STALLED_MEMBER_S / members)


def without_lifeguard(pace: Pace) -> Pace:
    """What SWIM alone has: no doubt in oneself, suspicions of one length, and one failed round is enough for one."""
    return replace(pace, awareness_max=0, suspicion_max_mult=1, failure_threshold=1)


def measure_ring(scale: Scale) -> None:
    """Building and asking a ring of that many nodes, and what a further one moves."""
    nodes = [Node(f"node{i:05d}", f"10.0.{i >> 8}.{i & 255}", 7000, virtual_nodes=VNODES) for i in range(scale.members)]
    gc.collect()
    before = _resident_bytes()
    began = time.perf_counter()
    ring = Ring(nodes, "xxh3", FACTOR)
    scale.ring_build_s = time.perf_counter() - began
    keys = [b"key:%d" % i for i in range(KEYS)]
    owners = [ring.preference(key, 1)[0] for key in keys]
    replicas = ring.replicas
    began = time.perf_counter()
    for i in range(LOOKUPS):
        replicas(keys[i % KEYS])
    scale.lookup_us = (time.perf_counter() - began) / LOOKUPS * 1e6
    scale.ring_mb = max(0, _resident_bytes() - before) / (1 << 20)
    factor = min(FACTOR, scale.members)
    scale.balance = max(ring.ownership(1).values()) * scale.members
    scale.balance_replicas = max(ring.ownership(factor).values()) * scale.members / factor
    joined = Ring([*nodes, Node("joiner", "10.1.0.1", 7000, virtual_nodes=VNODES)], "xxh3", FACTOR)
    moved = sum(joined.preference(key, 1)[0] != owner for key, owner in zip(keys, owners, strict=True))
    scale.moved, scale.moved_ideal = moved / KEYS, 1 / (scale.members + 1)


def _resident_bytes() -> int:
    """0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0


Part = Callable[[Scale, Pace, int], None]


def _stalls(scale: Scale, pace: Pace, seed: int) -> None:
    scale.stalled_s = stalled_s(scale.members)
    scale.false_healthy, scale.false_stalled = measure_stalls(scale.members, pace, seed)


def _plain_stalls(scale: Scale, pace: Pace, seed: int) -> None:
    found = measure_stalls(scale.members, without_lifeguard(pace), seed, notice_stalls=False)
    scale.plain_false_healthy, scale.plain_false_stalled = found


def _ring(scale: Scale, pace: Pace, seed: int) -> None:
    measure_ring(scale)


PARTS: tuple[Part, ...] = (_stalls, _plain_stalls, measure_members, _ring)


def _measure_part(members: int, pace: Pace, seed: int, part: Part) -> Scale:
    gc.disable()  # nothing here is garbage before the end, and looking for it takes as long as the rest
    began = time.process_time()
    scale = Scale(members)
    part(scale, pace, seed)
    scale.took_s = time.process_time() - began
    return scale


def measure(sizes: list[int], pace: Pace, seed: int, jobs: int) -> list[Scale]:
    """Everything, for these sizes, in so many processes at a time."""
    work = [(size, pace, seed, part) for size in sorted(sizes, reverse=True) for part in PARTS]
    if jobs == 1:
        found = [_measure_part(*each) for each in work]
    else:
        with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=1) as pool:
            found = pool.starmap(_measure_part, work, chunksize=1)
    scales = {size: Scale(size) for size in sizes}
    for part in found:
        scale = scales[part.members]
        for name in (each.name for each in fields(Scale)):
            if name != "members":
                setattr(scale, name, getattr(scale, name) + getattr(part, name))
    return list(scales.values())


ROWS: tuple[tuple[str, Callable[[Scale], str]], ...] = (
    ("a death, known to the first, s", lambda s: f"{s.detect_first_s:.2f}"),
    ("  to half, s", lambda s: f"{s.detect_p50_s:.2f}"),
    ("  to 99 %, s", lambda s: f"{s.detect_p99_s:.2f}"),
    ("  to all, worst, s", lambda s: f"{s.detect_all_s:.2f}"),
    ("news, known to all, s", lambda s: f"{s.spread_s:.2f}"),
    ("messages per member and second", lambda s: f"{s.messages:.2f}"),
    ("bytes per member and second", lambda s: f"{s.bytes:.0f}"),
    ("5 % of the members stall for, s", lambda s: f"{s.stalled_s:.0f}"),
    ("  false deaths of sound ones", lambda s: f"{s.false_healthy}"),
    ("  of the stalled themselves", lambda s: f"{s.false_stalled}"),
    ("  without Lifeguard, of sound ones", lambda s: f"{s.plain_false_healthy}"),
    ("  of the stalled themselves", lambda s: f"{s.plain_false_stalled}"),
    ("ring: build, s", lambda s: f"{s.ring_build_s:.3f}"),
    ("  lookup of replicas, us", lambda s: f"{s.lookup_us:.2f}"),
    ("  memory, MiB", lambda s: f"{s.ring_mb:.1f}"),
    ("  fullest / mean, primary", lambda s: f"{s.balance:.2f}"),
    ("  fullest / mean, with replicas", lambda s: f"{s.balance_replicas:.2f}"),
    ("  keys moved by a join, %", lambda s: f"{100 * s.moved:.3f}"),
    ("  1 / (n + 1), %", lambda s: f"{100 * s.moved_ideal:.3f}"),
    ("(processor time, s)", lambda s: f"{s.took_s:.0f}"),
)


def table(scales: list[Scale]) -> str:
    head = ["members", *(str(scale.members) for scale in scales)]
    lines = [head, *([name, *map(show, scales)] for name, show in ROWS)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def _sizes(text: str) -> list[int]:
    sizes = [int(part) for part in text.split(",")]
    if not all(3 <= size <= MEMBERS_MAX for size in sizes):
        raise ValueError(text)
    return sizes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m agi.core.dht.testing.scale", description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=_sizes, default=list(SIZES), help=f"members, each 3 to {MEMBERS_MAX}")
    parser.add_argument("--preset", choices=PRESETS, default="lan", help="settings of the failure detector")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: all processors)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    given = parser.parse_args(argv)
    pace = load_config(None, {}, {"health.preset": given.preset}).pace()
    scales = measure(given.sizes, pace, given.seed, given.jobs)
    if given.json:
        sys.stdout.write(
            json.dumps({"preset": given.preset, "seed": given.seed, "sizes": list(map(asdict, scales))}, indent=2)
        )
        sys.stdout.write("\n")
    else:
        sys.stdout.write(table(scales) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
