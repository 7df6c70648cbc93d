"""Failure detectors alone, many of them, on a queue of events in virtual time: no loop, no links, no nodes.

For what the cluster simulation cannot reach: thousands of members, hours, and single messages under a test's thumb.

    net = MemberNet(5, seed=1)
    net.run(2.0)
    net.kill("m0003")
    net.run_until(lambda: net.all_hold("m0003", MemberStatus.DEAD), within_s=30)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import partial
from heapq import heappop, heappush

from agi.core.dht.protocol.membership import Effect, Membership, Pace, Report, Roster, Send
from agi.core.dht.protocol.messages import Message
from agi.core.dht.transport.codec import encode
from agi.core.dht.types import MemberStatus

STALL_S = 0.1
"""A process notices that it did not run for at least so long (gossip.py has the real one)."""

Watch = Callable[[float, str, Report], None]


class MemberNet:
    """Members m0000, m0001, ... and what is between them.

    Args:
        count: how many.
        boot: their boot counter; 0 stands for a cluster in which everybody has heard of everybody long ago.
        links: whether a broken link is told, as real links do; else messages just get lost.
        loss, delay_s: of each message; the delay is drawn evenly.
        notice_stalls: whether a member that was paused knows of it afterwards.

    Attributes:
        now: virtual seconds.
        members: the failure detector of each member that runs, or is paused.
        reports: (time, where, what) of every change of a state, unless `watch` takes them.
        messages, bytes, largest: sent so far.
    """

    def __init__(
        self,
        count: int,
        *,
        seed: int,
        pace: Pace | None = None,
        boot: int = 0,
        links: bool = False,
        loss: float = 0.0,
        delay_s: tuple[float, float] = (0.0002, 0.002),
        notice_stalls: bool = True,
        watch: Watch | None = None,
    ) -> None:
        self.now = 0.0
        self.pace = pace or Pace()
        self.loss = loss
        self.delay_s = delay_s
        self.names = [f"m{number:04d}" for number in range(count)]
        self.roster = Roster((name, f"disk of {name}") for name in self.names)
        self.members: dict[str, Membership] = {}
        self.reports: list[tuple[float, str, Report]] = []
        self.messages = self.bytes = self.largest = 0
        self.dropped: Callable[[str, str, Message], bool] = lambda src, dst, message: False
        """A test's own rule of what gets lost."""
        self._rng = random.Random(f"net/{seed}")
        self._seed = seed
        self._links = links
        self._notice_stalls = notice_stalls
        self._watch = watch or (lambda now, where, what: self.reports.append((now, where, what)))
        self._boots = dict.fromkeys(self.names, boot)
        self._queue: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._count = 0
        self._changed = False
        self._wakes: dict[str, float] = {}
        self._paused: dict[str, float] = {}
        self._inbox: dict[str, list[Callable[[], None]]] = {}
        self._group: dict[str, int] = {}
        for name in self.names:
            self._start(name)

    # --- time

    def run(self, for_s: float) -> None:
        """Lets so much time pass."""
        self._run(self.now + for_s, None)

    def run_until(self, condition: Callable[[], bool], *, within_s: float) -> float:
        """Lets time pass until it is so, looked at whenever a state has changed; returns how long it took. Raises
        TimeoutError."""
        started = self.now
        if not self._run(started + within_s, condition):
            raise TimeoutError(f"not within {within_s:g} s")
        return self.now - started

    def _run(self, until: float, condition: Callable[[], bool] | None) -> bool:
        queue = self._queue
        if condition is not None and condition():
            return True
        while queue and queue[0][0] <= until:
            self.now, _, action, arguments = heappop(queue)
            self._changed = False
            action(*arguments)
            if self._changed and condition is not None and condition():
                return True
        self.now = until
        return False

    def at(self, delay_s: float, action: Callable[..., None], *arguments: object) -> None:
        """Calls it after that time."""
        self._count += 1
        heappush(self._queue, (self.now + delay_s, self._count, action, arguments))

    # --- what happens to members

    def kill(self, name: str) -> None:
        """Without a word."""
        del self.members[name]
        self._paused.pop(name, None)
        if self._links:
            for other in list(self.members):
                self.at(self._delay(), self._link_down, other, name)

    def restart(self, name: str) -> None:
        """A member that is down starts anew."""
        self._boots[name] += 1
        self._start(name)
        if self._links:
            for other in self.members:
                if other != name and not self._cut(name, other):
                    self.at(self._delay(), self._link_up, other, name)
                    self.at(self._delay(), self._link_up, name, other)

    def leave(self, name: str) -> None:
        """It stops in order."""
        self._perform(name, self.members[name].leave(self.now))
        self.kill(name)

    def pause(self, name: str) -> None:
        """Its process stops; what is sent to it waits."""
        self._paused.setdefault(name, self.now)

    def resume(self, name: str) -> None:
        """It goes on: first with the timers that are overdue, as event loops do, then with what came meanwhile."""
        began = self._paused.pop(name, None)
        if began is None or name not in self.members:
            return
        if self._notice_stalls and self.now - began >= STALL_S:
            self.members[name].stalled(self.now - began)
        self._perform(name, self.members[name].advance(self.now))
        for waiting in self._inbox.pop(name, ()):
            waiting()

    def partition(self, group: Iterable[str]) -> None:
        """Nothing passes between these and the others."""
        self._group = dict.fromkeys(group, 1)
        self._tell_links(self._link_down)

    def heal(self) -> None:
        cut, self._group = self._group, {}
        if cut:
            self._group = cut
            self._tell_links(self._link_up)
            self._group = {}

    def _tell_links(self, tell: Callable[[str, str], None]) -> None:
        if self._links:
            for one in self.members:
                for other in self.members:
                    if self._cut(one, other):
                        self.at(self._delay(), tell, one, other)

    # --- what they hold

    def all_hold(self, name: str, status: MemberStatus) -> bool:
        """Whether every other member that runs holds that one to be so."""
        return all(
            member.status(name) is status
            for other, member in self.members.items()
            if other != name and other not in self._paused
        )

    @property
    def at_peace(self) -> bool:
        """Whether everybody who runs holds everybody who runs to be alive."""
        return all(self.all_hold(name, MemberStatus.ALIVE) for name in self.members)

    def held_dead(self) -> list[tuple[str, str]]:
        """(where, who) for all members that were ever declared dead."""
        return [(where, what.node) for _, where, what in self.reports if what.status is MemberStatus.DEAD]

    # --- within

    def _start(self, name: str) -> None:
        rng = random.Random(f"{self._seed}/{name}/{self._boots[name]}")
        self.members[name] = Membership(name, self._boots[name], self.roster, self.pace, rng, self.now)
        self._wakes[name] = float("inf")
        self._schedule(name)

    def _schedule(self, name: str) -> None:
        due = self.members[name].due
        if due < self._wakes[name]:
            self._wakes[name] = due
            self.at(max(0.0, due - self.now), self._wake, name, due)

    def _wake(self, name: str, due: float) -> None:
        member = self.members.get(name)
        if member is None or name in self._paused or self._wakes[name] != due:
            return
        self._wakes[name] = float("inf")
        self._perform(name, member.advance(max(self.now, due)))

    def _perform(self, name: str, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self._send(name, effect.to, effect.message)
            else:
                self._changed = True
                self._watch(self.now, name, effect)
        self._schedule(name)

    def _send(self, src: str, dst: str, message: Message) -> None:
        size = len(encode(message))
        self.messages += 1
        self.bytes += size
        self.largest = max(self.largest, size)
        if self._cut(src, dst) or self.dropped(src, dst, message) or dst not in self.members:
            return
        if self.loss and self._rng.random() < self.loss:
            return
        self.at(self._delay(), self._arrive, src, dst, message)

    def _arrive(self, src: str, dst: str, message: Message) -> None:
        member = self.members.get(dst)
        if member is None or self._cut(src, dst):
            return
        if not self._waits(dst, partial(self._arrive, src, dst, message)):
            self._perform(dst, member.receive(src, message, self.now))

    def _waits(self, name: str, action: Callable[[], None]) -> bool:
        """Whether that member is paused; then this is done at its resume."""
        if name in self._paused:
            self._inbox.setdefault(name, []).append(action)
        return name in self._paused

    def _link_down(self, where: str, other: str) -> None:
        if self._waits(where, partial(self._link_down, where, other)):
            return
        if where in self.members and (other not in self.members or self._cut(where, other)):
            self._perform(where, self.members[where].link_down(other, self.now))

    def _link_up(self, where: str, other: str) -> None:
        if self._waits(where, partial(self._link_up, where, other)):
            return
        if where in self.members and other in self.members and not self._cut(where, other):
            self._perform(where, self.members[where].link_up(other, self._boots[other], self.now))

    def _cut(self, one: str, other: str) -> bool:
        return bool(self._group) and self._group.get(one) != self._group.get(other)

    def _delay(self) -> float:
        least, most = self.delay_s
        return least + self._rng.random() * (most - least)
