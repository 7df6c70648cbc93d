"""The present, the timers and the effects of one state machine: what its parts share.

Every verb of the machine begins with `begin(now)`, which returns the list that collects its effects. Timers are entries
of a heap and cannot be taken back: what is due looks whether it still matters. Time in which the process did not run is
taken out (`stalled`), so that no deadline passes because of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, TypeAlias

import msgspec

from agi.core.dht.protocol.messages import Message
from agi.core.dht.types import MemberStatus

ROUNDING_S = 1e-6
"""Times of the caller and of the machine differ by a sum, which is rounded."""


class Send(msgspec.Struct, frozen=True):
    """Send this; where there is a `via`, on that link: it is the one that the request came on. It may get lost."""

    to: str
    message: Message
    via: object = None


class Report(msgspec.Struct, frozen=True):
    """A member's state has changed here."""

    node: str
    status: MemberStatus
    was: MemberStatus


Effect: TypeAlias = Send | Report


class Agenda:
    """`now` is the machine's own time: the caller's less what it was stalled."""

    __slots__ = ("_count", "_out", "_stalled_s", "_timers", "now")

    def __init__(self, now: float) -> None:
        self.now = now
        self._stalled_s = 0.0
        self._out: list[Effect] = []
        self._timers: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._count = 0

    def begin(self, now: float) -> list[Effect]:
        """A verb begins. Returns where its effects go."""
        self.now = now - self._stalled_s
        self._out = []
        return self._out

    def stalled(self, seconds: float) -> None:
        """The process did not run for so long."""
        self._stalled_s += seconds

    @property
    def due(self) -> float:
        """When the first timer is due, by the caller's clock."""
        return self._timers[0][0] + self._stalled_s if self._timers else math.inf

    def after(self, delay_s: float, action: Callable[[Any], None], subject: object = None) -> None:
        self.at(self.now + delay_s, action, subject)

    def at(self, when: float, action: Callable[[Any], None], subject: object = None) -> None:
        """`action(subject)` at this time of the machine."""
        self._count += 1
        heappush(self._timers, (when, self._count, action, subject))

    def run(self) -> None:
        """Does what is due."""
        timers = self._timers
        while timers and self.is_due(timers[0][0]):
            _, _, action, subject = heappop(timers)
            action(subject)

    def is_due(self, when: float) -> bool:
        return when <= self.now + ROUNDING_S

    def send(self, to: str, message: Message, via: object = None) -> None:
        self._out.append(Send(to, message, via))

    def report(self, node: str, status: MemberStatus, was: MemberStatus) -> None:
        self._out.append(Report(node, status, was))
