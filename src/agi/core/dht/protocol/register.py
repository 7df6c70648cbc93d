"""A register that a set of acceptors agree on, one value after another (PROTOCOLS R, T1).

Paxos for one value (Lamport, "Paxos Made Simple", 2001, sections 2.2 and 2.3), in the form of CASPaxos (Rystsov, 2018):
a proposer that finds an accepted value goes on from it. The topology uses one register for each epoch: there a found
value is proposed as it is, so the epoch has one value for ever.

The law of durability: what an acceptor answers it has stored before (D1). `Acceptor` therefore returns its new state
with the reply; the driver stores the one, durably, and sends the other after it.

A quorum is a majority of **each** of the given sets: one set in a settled epoch, the old and the new one in a
transition (T5); an acceptor that is in both counts in both.

>>> acceptors = {name: Acceptor() for name in "abc"}
>>> proposer = Proposer([frozenset("abc")], Ballot(1, 7), b"mine")
>>> for name in "ab":
...     step = proposer.promised(name, acceptors[name].prepare(proposer.ballot).reply)
>>> step
Accept(ballot=Ballot(counter=1, proposer=7), value=b'mine')
>>> for name in "ab":
...     step = proposer.accepted(name, acceptors[name].accept(step.ballot, step.value).reply) or step
>>> step
Chosen(value=b'mine')
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


class Ballot(NamedTuple):
    """Orders proposals. `proposer` names a process that lives once (node and boot counter), so that none is reused."""

    counter: int
    proposer: int


ZERO = Ballot(0, 0)
"""Below every ballot that is proposed."""


@dataclass(frozen=True, slots=True)
class State:
    """What an acceptor must not forget. `accepted` is ZERO where nothing was accepted."""

    promised: Ballot = ZERO
    accepted: Ballot = ZERO
    value: bytes = b""


@dataclass(frozen=True, slots=True)
class Reply:
    """An acceptor's answer. `granted`: it took part; else `state.promised` is the ballot to get past."""

    granted: bool
    state: State


@dataclass(frozen=True, slots=True)
class Step:
    """Store `state` durably, where there is one, then send `reply`."""

    state: State | None
    reply: Reply


class Acceptor:
    """One vote. The driver finishes a step, the disk included, before it begins the next."""

    __slots__ = ("state",)

    def __init__(self, state: State | None = None) -> None:
        self.state = state or State()

    def prepare(self, ballot: Ballot) -> Step:
        """Promises to take part in nothing below this ballot."""
        if ballot <= self.state.promised:
            # the same ballot again may be a message delivered twice: its promise stands
            return Step(None, Reply(ballot == self.state.promised and self.state.accepted < ballot, self.state))
        self.state = State(ballot, self.state.accepted, self.state.value)
        return Step(self.state, Reply(True, self.state))

    def accept(self, ballot: Ballot, value: bytes) -> Step:
        """Accepts a value, unless it promised more."""
        if ballot < self.state.promised:
            return Step(None, Reply(False, self.state))
        if ballot == self.state.accepted:
            return Step(None, Reply(True, self.state))
        self.state = State(ballot, ballot, value)
        return Step(self.state, Reply(True, self.state))


@dataclass(frozen=True, slots=True)
class Accept:
    """Ask every acceptor to accept this."""

    ballot: Ballot
    value: bytes


@dataclass(frozen=True, slots=True)
class Chosen:
    """A quorum has accepted: the value stands, whatever happens."""

    value: bytes


@dataclass(frozen=True, slots=True)
class Preempted:
    """Somebody promised a higher ballot: try again above it."""

    ballot: Ballot


class Proposer:
    """One attempt under one ballot.

    Args:
        quorums: the sets of acceptors, a majority of each of which is needed.
        value: what to propose where nothing was accepted before.
    """

    __slots__ = ("_accepted", "_found", "_promised", "_proposed", "_quorums", "_value", "ballot", "over")

    def __init__(self, quorums: Iterable[frozenset[str]], ballot: Ballot, value: bytes) -> None:
        self._quorums = tuple(quorums)
        self.ballot = ballot
        self._value = value
        self._found = State()
        self._promised: set[str] = set()
        self._accepted: set[str] = set()
        self._proposed: bytes | None = None
        self.over = False

    @property
    def asked(self) -> bool:
        """Whether an Accept was sent: somebody may hold the value."""
        return self._proposed is not None

    @property
    def answered(self) -> int:
        """How many acceptors took part in the phase that it came to."""
        return len(self._promised if self._proposed is None else self._accepted)

    def promised(self, acceptor: str, reply: Reply) -> Accept | Preempted | None:
        """An answer to Prepare. Late and doubled ones change nothing."""
        if self.over or self._proposed is not None:
            return None
        if not reply.granted:
            return self._preempted(reply)
        self._promised.add(acceptor)
        if reply.state.accepted > self._found.accepted:
            self._found = reply.state
        if not self._quorum(self._promised):
            return None
        self._proposed = self._value if self._found.accepted == ZERO else self._found.value
        return Accept(self.ballot, self._proposed)

    def accepted(self, acceptor: str, reply: Reply) -> Chosen | Preempted | None:
        """An answer to Accept."""
        if self.over or self._proposed is None:
            return None
        if not reply.granted:
            return self._preempted(reply)
        self._accepted.add(acceptor)
        if not self._quorum(self._accepted):
            return None
        self.over = True
        return Chosen(self._proposed)

    def _quorum(self, answered: set[str]) -> bool:
        return all(2 * len(answered & acceptors) > len(acceptors) for acceptors in self._quorums)

    def _preempted(self, reply: Reply) -> Preempted:
        self.over = True
        return Preempted(reply.state.promised)
