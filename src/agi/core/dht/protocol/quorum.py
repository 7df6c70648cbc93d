"""Quorum cores of one batch whose keys share a replica set. Five verbs each, after riak_kv's get and put cores:
create, add a result, `step` (enough? and the response), and what is left to do afterwards, returned as data.

Keys of a batch are named by their index. Most batches meet no conflict and are judged as a whole: one comparison of two
lists for a read, one count for a write; single keys are looked at only where replicas differ.
"""

from __future__ import annotations

from dataclasses import dataclass

from agi.core.dht.errors import ClockSkew, DHTError, OutcomeUnknown, Unavailable


@dataclass(frozen=True, slots=True)
class Written:
    """Every key is decided. `restamp` lists (index, HLC to tick past): a newer version is in their way (V2)."""

    restamp: list[tuple[int, int]]


class WriteQuorum:
    """Counts the acknowledgements of one batch of writes.

    >>> quorum = WriteQuorum(needed=2, replicas=3)
    >>> quorum.add_ack(None); quorum.step() is None
    True
    >>> quorum.add_ack(None); quorum.step()
    Written(restamp=[])
    """

    __slots__ = ("_behind", "_newer", "acks", "failures", "maybe", "needed", "reason", "replicas")

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

    def add_ack(self, superseded: list[tuple[int, int]] | None) -> None:
        """A replica stored the batch, except the keys for which it holds something newer."""
        self.acks += 1
        if superseded:
            if self._behind is None:
                self._behind = {}
            for index, hlc in superseded:
                self._behind[index] = self._behind.get(index, 0) + 1
                self._newer[index] = max(hlc, self._newer.get(index, 0))

    def add_failure(self, error: DHTError, *, maybe_stored: bool) -> None:
        self.failures += 1
        self.maybe += maybe_stored
        self.reason = error

    def step(self) -> Written | DHTError | None:
        """The response, or None while replies are missing that can still decide it."""
        needed, acks = self.needed, self.acks
        if acks < needed:
            if self.replicas - self.failures >= needed:
                return None
            if not acks and not self.maybe and not self.complete:
                return None  # so far nothing was stored: the last answers may make that certain (D3)
            return self.shortfall("too few replicas")
        if self._behind is None:
            return Written([])
        pending = self.replicas - acks - self.failures
        restamp = []
        for index, behind in self._behind.items():
            if acks - behind >= needed:
                continue
            if acks - behind + pending >= needed:
                return None
            restamp.append((index, self._newer[index]))
        return Written(restamp)

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
        "_holders",
        "_records",
        "_repairing",
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
        self._repairing = False
        self._records: list[bytes | None] = []
        self._holders: dict[int, set[str]] = {}

    def add_reply(self, replica: str, records: list[bytes | None]) -> None:
        self.replies.append((replica, records))

    def add_failure(self, error: DHTError) -> None:
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
        for replica, records in replies:
            behind = [i for i, record in enumerate(records) if record != newest[i]]
            if behind:
                stale.append((replica, behind))
        for index in {i for _, behind in stale for i in behind}:
            holders = {replica for replica, records in replies if records[index] == newest[index]}
            if len(holders) < self.repair_to:
                self._holders[index] = holders
        self._repairing = bool(self._holders)
        return Repair(newest, stale, self._repairing)

    def add_repaired(self, replica: str, indexes: list[int]) -> Agreed | None:
        """A replica now holds these newest records (or newer ones)."""
        for index in indexes:
            holders = self._holders.get(index)
            if holders is not None:
                holders.add(replica)
                if len(holders) >= self.repair_to:
                    del self._holders[index]
        return Agreed(self._records) if not self._holders else None

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


def merge(replies: list[list[bytes | None]]) -> list[bytes | None]:
    """The newest record of each key: bytes order is version order (record.py); absent is older than anything."""
    return [
        max((record for record in column if record is not None), default=None) for column in zip(*replies, strict=True)
    ]
