"""Keeps every operation of a run and says which of them the cluster has broken its word about. Pure: no I/O, no clock.

Each key has one writer, which waits for the end of one call before it begins the next. So a key's writes are in order,
and what may be read is known:

    put a    acknowledged, version 10
    put b    outcome unknown
    read  -> a at 10, or b above 10; anything else is a violation
    delete   acknowledged
    read  -> nothing; a would be resurrected, but b above 10 may still come

A write of unknown outcome may take effect at any time after it began, also after later ones: a coordinator that was
frozen takes it up when it wakes (docs/consistency.md). Versions tell that apart from a loss: it then is newer than all
that was acknowledged or read before. Such cases are counted as `late`. A write that was reported as not written may
never be seen.
"""

from __future__ import annotations

import enum
import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


class Outcome(enum.StrEnum):
    PENDING = "pending"
    OK = "ok"
    FAILED = "failed"
    """By an error that promises that nothing was written."""
    UNKNOWN = "unknown"


class Kind(enum.StrEnum):
    """How a promise was broken."""

    LOST = "lost"
    """At the end, what was acknowledged (or read) is not there."""
    RESURRECTED = "resurrected"
    """What was deleted is there again."""
    STALE = "stale"
    """During the run, a read returned less than what was acknowledged or read before it."""
    PHANTOM = "phantom"
    """Somebody read what nobody wrote, or what was reported as not written."""
    ORDER = "order"
    """A later write got no greater version, or a write changed its version."""
    UNEQUAL = "unequal"
    """At rest, the replicas of a key do not hold the same."""
    SCAN = "scan"
    """A scan at rest and the reads of its keys differ."""
    UNREADABLE = "unreadable"
    """At rest, a key cannot be read."""
    UNHEALTHY = "unhealthy"
    """The cluster did not become whole again."""
    DIED = "died"
    """A node ended, or did not start, without being told to."""
    HUNG = "hung"
    """A call went on long after its deadline."""
    NOT_LINEARIZABLE = "not linearizable"
    """No order of the recorded operations of a key, or a lock, explains what they returned."""
    UNDECIDED = "undecided"
    """Whether there is one could not be decided within bounds."""
    RAISED = "raised"
    """A callback or a task of the client library ended in an error that no caller saw."""


@dataclass(frozen=True, slots=True)
class Violation:
    """`subject` is a key or a node."""

    kind: Kind
    subject: str
    text: str
    at_s: float

    def __str__(self) -> str:
        return f"{self.at_s:8.2f} s  {self.kind}: {self.subject}: {self.text}"


@dataclass(slots=True)
class Write:
    """One put, or one delete (`digest` is None), of one key."""

    number: int
    key: str
    digest: bytes | None
    begun_s: float
    outcome: Outcome = Outcome.PENDING
    version: int = 0
    ended_s: float = float("inf")

    @property
    def may_come(self) -> bool:
        return self.outcome in (Outcome.UNKNOWN, Outcome.PENDING)

    def __str__(self) -> str:
        what = "delete" if self.digest is None else "put"
        version = f" at {self.version:x}" if self.version else ""
        return f"{what} #{self.number} ({self.outcome}{version}, {self.begun_s:.3f} to {self.ended_s:.3f} s)"


@dataclass(frozen=True, slots=True)
class Held:
    """What one replica holds of a key, as `locate` tells it."""

    state: str
    version: int = 0
    bytes: int = 0

    @classmethod
    def of(cls, located: Mapping[str, object]) -> Held:
        version, size = located.get("version", 0), located.get("bytes", 0)
        assert isinstance(version, int) and isinstance(size, int)
        return cls(str(located["state"]), version, size)


@dataclass(slots=True)
class _History:
    """A key: its writes, and the newest fact about it.

    Attributes:
        anchor: the write that is known to have taken effect last, since it was acknowledged or its result was read.
        floor: the greatest version that was acknowledged or read; an acknowledged delete lies above it.
    """

    writes: list[Write] = field(default_factory=list)
    by_digest: dict[bytes, Write] = field(default_factory=dict)
    anchor: Write | None = None
    floor: int = 0


def same(replicas: Mapping[str, Held]) -> bool:
    """Whether all replicas answered and hold the same."""
    return len(set(replicas.values())) == 1 and all(held.state != "unreachable" for held in replicas.values())


class Auditor:
    def __init__(self) -> None:
        self.violations: list[Violation] = []
        self.late = 0
        self.reads = 0
        self.checked = 0
        self._keys: dict[str, _History] = {}
        self._writes = 0

    # --- what happens

    def begin(self, key: str, value: bytes | None, now: float) -> Write:
        """A put, or with None a delete, is about to be sent. Values are unique."""
        history = self._keys.setdefault(key, _History())
        self._writes += 1
        write = Write(self._writes, key, None if value is None else _digest(value), now)
        if write.digest is not None:
            assert write.digest not in history.by_digest, "values are unique"
            history.by_digest[write.digest] = write
        history.writes.append(write)
        return write

    def settle(self, write: Write, outcome: Outcome, now: float, version: int = 0) -> None:
        """It ended so. `version` is that of an acknowledged put, 0 where it was not told."""
        write.outcome, write.version, write.ended_s = outcome, version, now
        if outcome is not Outcome.OK:
            return
        history = self._keys[write.key]
        if version:
            if version <= history.floor:
                self.found(Kind.ORDER, write.key, f"{write} is not above version {history.floor:x}", now)
            history.floor = max(history.floor, version)
        history.anchor = write

    def read(self, key: str, value: bytes | None, version: int, now: float) -> None:
        """The key's writer, with no call under way, has read this at QUORUM."""
        self.reads += 1
        self._judge(key, value, version, now, Kind.STALE)

    def final(self, key: str, value: bytes | None, version: int, replicas: Mapping[str, Held], now: float) -> None:
        """At rest, this was read at QUORUM, and the replicas held this just before."""
        self.checked += 1
        if not same(replicas):
            told = ", ".join(f"{name} {held.state} {held.version:x}" for name, held in sorted(replicas.items()))
            self.found(Kind.UNEQUAL, key, told or "no replica is known", now)
        history = self._keys[key]
        anchor, floor = history.anchor, history.floor
        self._judge(key, value, version, now, Kind.LOST)
        hidden = value is None and anchor is not None and anchor.digest is not None and history.anchor is not anchor
        if hidden and any(held.state != "absent" and held.version <= floor for held in replicas.values()):
            # A delete of unknown outcome is to have hidden an acknowledged put: then its tombstone is newer, or was
            # reclaimed already.
            self.found(Kind.LOST, key, f"{anchor} is gone, and no delete came after it", now)

    def scanned(self, found: Mapping[str, bytes], read: Mapping[str, bytes | None], now: float) -> None:
        """At rest, a scan found this, and reads of all keys gave that."""
        live = {key: value for key, value in read.items() if value is not None}
        for key in sorted(found.keys() | live.keys()):
            if found.get(key) != live.get(key):
                what = "is missing" if key not in found else "is too much" if key not in live else "has another value"
                self.found(Kind.SCAN, key, f"{what} in a scan at rest", now)

    def found(self, kind: Kind, subject: str, text: str, now: float) -> None:
        """A violation."""
        self.violations.append(Violation(kind, subject, text, now))

    # --- what is known

    @property
    def keys(self) -> list[str]:
        """All that were written to, sorted."""
        return sorted(self._keys)

    def acknowledged(self) -> int:
        return sum(write.outcome is Outcome.OK for history in self._keys.values() for write in history.writes)

    def tally(self) -> Counter[Kind]:
        return Counter(violation.kind for violation in self.violations)

    def story(self, key: str) -> list[str]:
        """A key's writes from the last acknowledged one on, for people."""
        writes = self._keys[key].writes
        last = max((place for place, write in enumerate(writes) if write.outcome is Outcome.OK), default=0)
        return [str(write) for write in writes[max(0, last - 2) :]]

    # --- the judgement

    def _judge(self, key: str, value: bytes | None, version: int, now: float, less: Kind) -> None:
        history = self._keys.setdefault(key, _History())
        if value is None:
            self._judge_nothing(key, history, now, less)
            return
        write = history.by_digest.get(_digest(value))
        if write is None:
            self.found(Kind.PHANTOM, key, f"a value of {len(value)} bytes that nobody wrote", now)
        elif write.outcome is Outcome.FAILED:
            self.found(Kind.PHANTOM, key, f"{write} was reported as not written, and is there", now)
        else:
            self._judge_value(key, history, write, version, now, less)

    def _judge_nothing(self, key: str, history: _History, now: float, less: Kind) -> None:
        anchor = history.anchor
        if anchor is None or anchor.digest is None:
            return
        deletes = [write for write in history.writes if write.digest is None and write.may_come]
        if not deletes:
            self.found(less, key, f"nothing is there, after {anchor}", now)
            return
        self.late += deletes[-1].number < anchor.number
        history.anchor = deletes[-1]

    def _judge_value(self, key: str, history: _History, write: Write, version: int, now: float, less: Kind) -> None:
        anchor, floor = history.anchor, history.floor
        deleted = anchor is not None and anchor.digest is None
        if write is anchor and version == floor:
            return
        if write.may_come and version > floor:
            self.late += anchor is not None and write.number < anchor.number
            history.anchor, history.floor = write, version
            return
        if write is anchor and version > floor:
            if not write.version:  # acknowledged without telling it: in a batch of which another part failed
                write.version = history.floor = version
                return
            self.found(Kind.ORDER, key, f"{write} has become version {version:x}", now)
            return
        after = f"after {anchor}, floor {floor:x}" if anchor is not None else f"floor {floor:x}"
        kind = Kind.RESURRECTED if deleted else less
        self.found(kind, key, f"{write} is there at {version:x} {after}", now)


def _digest(value: bytes) -> bytes:
    return hashlib.blake2b(value, digest_size=16).digest()
