"""Quorum cores of one batch whose keys share a replica set. Five verbs each, after riak_kv's get and put cores:
create, add a result, `step` (enough? and the response), and what is left to do afterwards, returned as data.

Keys of a batch are named by their index. Most batches meet no conflict and are judged as a whole: one comparison of two
lists for a read, one count for a write; single keys are looked at only where replicas differ.

While keys change hands they have two replica sets, and the joint cores need a quorum of each (PROTOCOLS T5). What they
add is kept in a slot of their base, so that a driver can derive from both its settled form and a joint core.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from agi.core.dht.errors import ClockSkew, DHTError, OutcomeUnknown, Unavailable
from agi.core.dht.protocol.consensus import is_register


@dataclass(frozen=True, slots=True)
class Written:
    """Every key is decided. `restamp` lists (index, HLC to tick past): a newer version is in their way (V2)."""

    restamp: list[tuple[int, int]]


class WriteQuorum:
    """Counts the acknowledgements of one batch of writes.

    >>> quorum = WriteQuorum(needed=2, replicas=3)
    >>> quorum.add_ack("a", None); quorum.step() is None
    True
    >>> quorum.add_ack("b", None); quorum.step()
    Written(restamp=[])
    """

    __slots__ = ("_behind", "_halves", "_newer", "acks", "failures", "maybe", "needed", "reason", "replicas")

    def __init__(self, needed: int, replicas: int) -> None:
        self.needed = needed
        self.replicas = replicas
        self.acks = 0
        self.failures = 0
        self.maybe = 0
        """Failures after which the replica may hold the write all the same."""
        self.reason: DHTError | None = None
        self._behind: dict[int, int] | None = None
        self._newer: dict[int, int] = {}

    @property
    def complete(self) -> bool:
        """Every replica has answered or failed."""
        return self.acks + self.failures >= self.replicas

    def absent(self, replica: str) -> None:
        """A replica is not even asked."""
        self.failures += 1

    @property
    def hopeless(self) -> bool:
        """Too many replicas have failed."""
        return self.replicas - self.failures < self.needed

    def add_ack(self, replica: str, superseded: list[tuple[int, int]] | None) -> None:
        """A replica stored the batch, except the keys for which it holds something newer."""
        self.acks += 1
        if superseded:
            if self._behind is None:
                self._behind = {}
            for index, hlc in superseded:
                self._behind[index] = self._behind.get(index, 0) + 1
                self._newer[index] = max(hlc, self._newer.get(index, 0))

    def add_failure(self, replica: str, error: DHTError, *, maybe_stored: bool) -> None:
        self.failures += 1
        self.maybe += maybe_stored
        self.reason = error

    def step(self) -> Written | DHTError | None:
        """The response, or None while replies are missing that can still decide it."""
        if self.acks < self.needed:
            if not self.hopeless:
                return None
            if self._may_be_nowhere():
                return None  # so far nothing was stored: the last answers may make that certain (D3)
            return self.shortfall("too few replicas")
        if self._behind is None:
            return Written([])
        again, waiting = self._overtaken()
        return None if waiting else Written([(index, self._newer[index]) for index in again])

    def _may_be_nowhere(self) -> bool:
        """So far nothing was stored, and replicas are left that can still make that certain or not."""
        return not self.acks and not self.maybe and not self.complete

    def maybe_holds(self, index: int) -> bool:
        """Whether some replica stored this key of the batch, or may have."""
        behind = 0 if self._behind is None else self._behind.get(index, 0)
        return bool(self.maybe) or self.replicas - self.failures > behind

    def _overtaken(self) -> tuple[list[int], set[int]]:
        """Of a batch with enough acknowledgements: keys that can no longer reach the quorum, as replicas hold newer
        versions, and keys that hang on replies still to come."""
        pending = self.replicas - self.acks - self.failures
        again: list[int] = []
        waiting: set[int] = set()
        for index, behind in (self._behind or {}).items():
            if self.acks - behind + pending < self.needed:
                again.append(index)
            elif self.acks - behind < self.needed:
                waiting.add(index)
        return again, waiting

    def unreachable(self, reachable: int) -> DHTError:
        """The error of a batch that was not even sent: too few replicas are connected."""
        kind = OutcomeUnknown if self.maybe else Unavailable
        return kind("too few replicas are reachable", needed=self.needed, answered=reachable)

    def shortfall(self, what: str) -> DHTError:
        """The error of a batch that did not reach its quorum (D3): a replica that is silent may have stored it."""
        if self.reason is not None:
            what = f"{what}: {self.reason.message}"
        silent = self.replicas - self.acks - self.failures
        kind: type[DHTError] = OutcomeUnknown
        if not (self.acks or self.maybe or silent):
            kind = ClockSkew if isinstance(self.reason, ClockSkew) else Unavailable
        return kind(what, needed=self.needed, answered=self.acks)


class JointWriteQuorum(WriteQuorum):
    """Counts for keys that change hands: a quorum of the old replicas **and** one of the new.

    As a `WriteQuorum` it counts over both sets, which tells whether anything can be stored anywhere (D3).

    >>> quorum = JointWriteQuorum(("a", "b", "c"), ("b", "c", "d"), 2, 2)
    >>> quorum.add_ack("a", None); quorum.add_ack("b", None); quorum.step() is None
    True
    >>> quorum.add_ack("d", None); quorum.step()
    Written(restamp=[])
    """

    __slots__ = ()

    def __init__(self, old: tuple[str, ...], new: tuple[str, ...], old_needed: int, new_needed: int) -> None:
        WriteQuorum.__init__(self, max(old_needed, new_needed), len({*old, *new}))
        self._share(old, new, old_needed, new_needed)

    def _share(self, old: tuple[str, ...], new: tuple[str, ...], old_needed: int, new_needed: int) -> None:
        self._halves: tuple[tuple[tuple[str, ...], WriteQuorum], ...] = (
            (old, WriteQuorum(old_needed, len(old))),
            (new, WriteQuorum(new_needed, len(new))),
        )

    def absent(self, replica: str) -> None:
        WriteQuorum.absent(self, replica)
        for names, half in self._halves:
            if replica in names:
                half.absent(replica)

    @property
    def hopeless(self) -> bool:
        return any(half.hopeless for _, half in self._halves)

    def add_ack(self, replica: str, superseded: list[tuple[int, int]] | None) -> None:
        WriteQuorum.add_ack(self, replica, superseded)
        for names, half in self._halves:
            if replica in names:
                half.add_ack(replica, superseded)

    def add_failure(self, replica: str, error: DHTError, *, maybe_stored: bool) -> None:
        WriteQuorum.add_failure(self, replica, error, maybe_stored=maybe_stored)
        for names, half in self._halves:
            if replica in names:
                half.add_failure(replica, error, maybe_stored=maybe_stored)

    def step(self) -> Written | DHTError | None:
        halves = [half for _, half in self._halves]
        if self.hopeless:
            return None if self._may_be_nowhere() else self.shortfall("too few replicas")
        if any(half.acks < half.needed for half in halves):
            return None
        again: set[int] = set()
        waiting: set[int] = set()
        for half in halves:
            lost, hanging = half._overtaken()
            again.update(lost)
            waiting |= hanging
        return None if waiting - again else Written([(index, self._newer[index]) for index in sorted(again)])

    def unreachable(self, reachable: int) -> DHTError:
        return self._of_short_half(WriteQuorum.unreachable(self, reachable), reached=False)

    def shortfall(self, what: str) -> DHTError:
        return self._of_short_half(WriteQuorum.shortfall(self, what), reached=True)

    def _of_short_half(self, error: DHTError, *, reached: bool) -> DHTError:
        """The error with the figures of the set that fell short."""
        for _, half in self._halves:
            answered = half.acks if reached else half.replicas - half.failures
            if answered < half.needed:
                error.needed, error.answered = half.needed, answered
                break
        return error


@dataclass(frozen=True, slots=True)
class Agreed:
    """The newest record of each key."""

    records: list[bytes | None]


@dataclass(frozen=True, slots=True)
class Repair:
    """Replicas differ: each (replica, indexes) should take the newest records. `blocking`: too few replicas hold them
    yet, so `records` may be returned only after `add_repaired` says so."""

    records: list[bytes | None]
    stale: list[tuple[str, list[int]]]
    blocking: bool


class ReadQuorum:
    """Collects the replies of one batch of reads and repairs what differs before it answers (MUST 2).

    `repair_to` is how many replicas have to hold the newest record before it is returned: 0 switches blocking repair
    off (consistency ONE).
    """

    __slots__ = (
        "_halves",
        "_holders",
        "_records",
        "_repairing",
        "contested",
        "failures",
        "needed",
        "reason",
        "repair_to",
        "replicas",
        "replies",
    )

    def __init__(self, needed: int, replicas: int, repair_to: int) -> None:
        self.needed = needed
        self.replicas = replicas
        self.repair_to = repair_to
        self.replies: list[tuple[str, list[bytes | None]]] = []
        self.failures = 0
        self.reason: DHTError | None = None
        self.contested: Collection[int] = ()
        """Keys under consensus of which replicas show different ballots: a round has to tell (R9)."""
        self._repairing = False
        self._records: list[bytes | None] = []
        self._holders: dict[int, set[str]] = {}

    def add_reply(self, replica: str, records: list[bytes | None]) -> None:
        self.replies.append((replica, records))

    def add_failure(self, replica: str, error: DHTError) -> None:
        self.failures += 1
        self.reason = error

    def step(self) -> Agreed | Repair | DHTError | None:
        """Called after each reply or failure of a read (not of a repair)."""
        if self._repairing:
            return None
        replies = self.replies
        if len(replies) < self.needed:
            return self.shortfall("too few replicas") if self.replicas - self.failures < self.needed else None
        first = replies[0][1]
        if all(records == first for _, records in replies[1:]):
            return Agreed(first)
        newest = merge([records for _, records in replies])
        if not self.repair_to:
            return Agreed(newest)
        self._records = newest
        stale = []
        contested: set[int] = set()
        for replica, records in replies:
            behind = [i for i, record in enumerate(records) if record != newest[i]]
            if behind and (registers := [i for i in behind if is_register(newest[i])]):
                contested.update(registers)
                behind = [i for i in behind if i not in contested]
            if behind:
                stale.append((replica, behind))
        if contested:
            self.contested = contested
        if not stale:
            return Agreed(newest)
        for index in {i for _, behind in stale for i in behind}:
            holders = {replica for replica, records in replies if records[index] == newest[index]}
            if not self._enough(holders):
                self._holders[index] = holders
        self._repairing = bool(self._holders)
        return Repair(newest, stale, self._repairing)

    def add_repaired(self, replica: str, indexes: list[int]) -> Agreed | None:
        """A replica now holds these newest records (or newer ones)."""
        for index in indexes:
            holders = self._holders.get(index)
            if holders is not None:
                holders.add(replica)
                if self._enough(holders):
                    del self._holders[index]
        return Agreed(self._records) if not self._holders else None

    def _enough(self, holders: set[str]) -> bool:
        return len(holders) >= self.repair_to

    def unrepaired(self) -> tuple[list[int], list[bytes]]:
        """What still has to be stored somewhere: indexes and their newest records."""
        indexes = sorted(self._holders)
        return indexes, [self._records[i] or b"" for i in indexes]

    @property
    def repairing(self) -> bool:
        return self._repairing

    def shortfall(self, what: str) -> Unavailable:
        if self._repairing:
            what = "replicas differ and the newest value could not be stored on a quorum"
        elif self.reason is not None:
            what = f"{what}: {self.reason.message}"
        return Unavailable(what, needed=self.needed, answered=len(self.replies))


@dataclass(slots=True)
class _ReadHalf:
    """One of the two sets of a joint read."""

    names: tuple[str, ...]
    needed: int
    failures: int = 0

    def among(self, replicas: Iterable[str]) -> int:
        return sum(name in self.names for name in replicas)


class JointReadQuorum(ReadQuorum):
    """Reads keys that change hands: a quorum of the old replicas **and** one of the new, and of both when it repairs.
    `new_needed` may be 0: the new replicas need not be filled yet.

    >>> quorum = JointReadQuorum(("a", "b", "c"), ("b", "c", "d"), 2, 2, repair=True)
    >>> quorum.add_reply("a", [b"1"]); quorum.add_reply("b", [b"1"]); quorum.step() is None
    True
    >>> quorum.add_reply("d", [None]); quorum.step()
    Repair(records=[b'1'], stale=[('d', [0])], blocking=True)
    """

    __slots__ = ()

    def __init__(
        self, old: tuple[str, ...], new: tuple[str, ...], old_needed: int, new_needed: int, *, repair: bool
    ) -> None:
        needed = max(old_needed, new_needed)
        ReadQuorum.__init__(self, needed, len({*old, *new}), needed if repair else 0)
        self._share(old, new, old_needed, new_needed)

    def _share(self, old: tuple[str, ...], new: tuple[str, ...], old_needed: int, new_needed: int) -> None:
        self._halves: tuple[_ReadHalf, ...] = (_ReadHalf(old, old_needed), _ReadHalf(new, new_needed))

    def add_failure(self, replica: str, error: DHTError) -> None:
        ReadQuorum.add_failure(self, replica, error)
        for half in self._halves:
            half.failures += replica in half.names

    @property
    def hopeless(self) -> bool:
        """One of the sets can no longer reach its quorum."""
        return any(len(half.names) - half.failures < half.needed for half in self._halves)

    def step(self) -> Agreed | Repair | DHTError | None:
        if not self._repairing:
            if self.hopeless:
                return self.shortfall("too few replicas")
            if not self._enough({replica for replica, _ in self.replies}):
                return None
        return ReadQuorum.step(self)

    def unreachable(self, reachable: Iterable[str]) -> Unavailable:
        """The error of a batch that was not even asked for: too few replicas of one set are connected."""
        return self._short(Unavailable("too few replicas are reachable"), reachable)

    def _enough(self, holders: set[str]) -> bool:
        return all(half.among(holders) >= half.needed for half in self._halves)

    def shortfall(self, what: str) -> Unavailable:
        """With the figures of the set that fell short: in answers, or in replicas that hold the newest records."""
        error = ReadQuorum.shortfall(self, what)
        if self._repairing:
            return self._short(error, next(iter(self._holders.values()), ()))
        return self._short(error, [replica for replica, _ in self.replies])

    def _short(self, error: Unavailable, reached: Iterable[str]) -> Unavailable:
        """The error with the figures of a set that these replicas are too few of."""
        for half in self._halves:
            answered = half.among(reached)
            if answered < half.needed:
                error.needed, error.answered = half.needed, answered
                break
        return error


def merge(replies: list[list[bytes | None]]) -> list[bytes | None]:
    """The newest record of each key: bytes order is version order (record.py); absent is older than anything."""
    return [
        max((record for record in column if record is not None), default=None) for column in zip(*replies, strict=True)
    ]
