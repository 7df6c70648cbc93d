"""What a seed does to a cluster, and when. Pure: a plan is drawn before the run and does not depend on it.

Lanes run beside each other: troubles one after another, a second and slower lane of them, so that some overlap, wrong
clocks, changes of the members, and what befalls holders of locks. Each lane deals its kinds in shuffled rounds, so that
a run of two minutes or so meets all of them. A fault says whom it hits by `picks`, numbers that are taken modulo the
candidates of its moment.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

LEASE_S = 1.0
"""Of the locks of a run. A freeze, of a holder or of a node, is longer."""


class Fault(enum.StrEnum):
    KILL = "kill"
    """SIGKILL of one node; it is started again at the end of the fault."""
    KILL_ALL = "kill-all"
    """SIGKILL of every node at once."""
    FREEZE = "freeze"
    """SIGSTOP, then SIGCONT."""
    PARTITION = "partition"
    """One or two nodes are cut off from the others, in both directions, and at times from the clients."""
    DEAF = "deaf"
    """One node receives nothing from some of the others, who receive what it sends."""
    MUTE = "mute"
    """What one node sends does not reach some of the others, whom it hears."""
    FULL_DISK = "full-disk"
    """The small disk of one node is filled, then freed."""
    POWER_LOSS = "power-loss"
    """A node ends, and its file system forgets what was not synced."""
    POWER_LOSS_ALL = "power-loss-all"
    """The same of every node at once."""
    SKEW = "skew"
    """A node's wall clock is wrong: it jumps in the midst, or the node is started again with it."""
    JOIN = "join"
    LEAVE = "leave"
    HOLDER_FREEZE = "holder-freeze"
    """SIGSTOP of a client process that holds a lock, until long after its lease is over; then SIGCONT."""
    HOLDER_KILL = "holder-kill"
    """SIGKILL of such a process."""


POWER = frozenset({Fault.POWER_LOSS, Fault.POWER_LOSS_ALL})
NETWORK = frozenset({Fault.PARTITION, Fault.DEAF, Fault.MUTE})
NAMESPACES = NETWORK | POWER | {Fault.FULL_DISK, Fault.SKEW}
"""What needs namespaces of its own."""
MEMBERS = frozenset({Fault.JOIN, Fault.LEAVE})


@dataclass(frozen=True, slots=True)
class Step:
    """
    Attributes:
        at_s: when it begins, from the start of the plan.
        lasts_s: until it is undone; 0 for a change of the members, which takes as long as it takes.
        picks: whom it hits.
    """

    at_s: float
    fault: Fault
    lasts_s: float
    picks: tuple[int, ...]

    def __str__(self) -> str:
        lasts = f" for {self.lasts_s:.1f} s" if self.lasts_s else ""
        return f"{self.at_s:6.1f} s  {self.fault}{lasts}"


@dataclass(frozen=True, slots=True)
class Lane:
    """
    Attributes:
        deck: what is dealt, in shuffled rounds or as it stands.
        first_s: when the first step begins, at the latest.
        pause_s: between the end of one step and the begin of the next: least and most.
        lasts_s: of one step: least and most.
    """

    name: str
    deck: tuple[Fault, ...]
    shuffled: bool
    first_s: float
    pause_s: tuple[float, float]
    lasts_s: tuple[float, float]


LANES = (
    Lane(
        "troubles",
        (
            Fault.KILL,
            Fault.FREEZE,
            Fault.PARTITION,
            Fault.DEAF,
            Fault.MUTE,
            Fault.FULL_DISK,
            Fault.KILL_ALL,
            Fault.POWER_LOSS,
            Fault.POWER_LOSS_ALL,
        ),
        shuffled=True,
        first_s=2.0,
        pause_s=(1.0, 3.0),
        lasts_s=(1.5, 7.0),
    ),
    Lane(
        "more",
        (Fault.KILL, Fault.FREEZE, Fault.PARTITION, Fault.MUTE, Fault.DEAF),
        shuffled=True,
        first_s=12.0,
        pause_s=(6.0, 14.0),
        lasts_s=(1.2 * LEASE_S, 5.0),
    ),
    Lane(
        "clocks",
        (Fault.SKEW,),
        shuffled=False,
        first_s=5.0,
        pause_s=(3.0, 8.0),
        lasts_s=(4.0, 12.0),
    ),
    Lane(
        "members",
        (Fault.JOIN, Fault.LEAVE),
        shuffled=False,
        first_s=5.0,
        pause_s=(9.0, 18.0),
        lasts_s=(0.0, 0.0),
    ),
    Lane(
        "holders",
        (Fault.HOLDER_FREEZE, Fault.HOLDER_FREEZE, Fault.HOLDER_KILL),
        shuffled=True,
        first_s=2.0,
        pause_s=(1.0, 4.0),
        lasts_s=(1.5 * LEASE_S, 4.0 * LEASE_S),
    ),
)
PICKS = 8
PICK_MAX = 1 << 16


EACH_LASTS_S, EACH_PAUSE_S = 1.5, 0.7
"""Of each fault, where every one happens once: longer than a lease."""
EACH = (
    (Fault.HOLDER_KILL, Fault.SKEW, Fault.HOLDER_FREEZE),
    (
        # members first, as they wait for every node; then what leaves all running; all nodes at once last
        *(Fault.JOIN, Fault.LEAVE),
        *(Fault.FULL_DISK, Fault.FREEZE, Fault.DEAF, Fault.MUTE, Fault.PARTITION),
        *(Fault.KILL, Fault.POWER_LOSS, Fault.KILL_ALL, Fault.POWER_LOSS_ALL),
    ),
)
EACH_PICKS = (3, 1, 1, 1, 1, 1, 1, 1)
"""A node that has joined three others leaves again, a clock jumps in the midst, a disk fails before its node ends."""


def each(*, without: Collection[Fault] = ()) -> dict[str, list[Step]]:
    """Every fault once, in a fixed order; a step that is late begins when the one before it is over."""
    plan = {}
    for number, faults in enumerate(EACH):
        at_s, steps = EACH_PAUSE_S, []
        for fault in faults:
            if fault in without:
                continue
            lasts_s = 0.0 if fault in MEMBERS else EACH_LASTS_S
            steps.append(Step(at_s, fault, lasts_s, EACH_PICKS))
            at_s += lasts_s + EACH_PAUSE_S
        plan[f"each {number}"] = steps
    return plan


def draw(
    seed: int, seconds: float, *, without: Collection[Fault] = (), lanes: Sequence[Lane] = LANES
) -> dict[str, list[Step]]:
    """The steps of each lane; every fault is undone before `seconds`. `without`: what cannot be done here."""
    plan = {}
    for lane in lanes:
        rng = random.Random(f"{seed}:{lane.name}")
        deck = [fault for fault in lane.deck if fault not in without]
        steps: list[Step] = []
        if not deck:
            continue
        hand: list[Fault] = []
        at_s = rng.uniform(0.3, 1.0) * lane.first_s
        while True:
            if not hand:
                hand = rng.sample(deck, len(deck)) if lane.shuffled else list(deck)
            fault = hand.pop(0)
            lasts_s = rng.uniform(*lane.lasts_s)
            if at_s + lasts_s >= seconds:
                break
            steps.append(Step(at_s, fault, lasts_s, tuple(rng.randrange(PICK_MAX) for _ in range(PICKS))))
            at_s += lasts_s + rng.uniform(*lane.pause_s)
        plan[lane.name] = steps
    return plan
