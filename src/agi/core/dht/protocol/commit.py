"""Group commit: all writes at hand go to the disk behind one sync, and nobody hears of them before it.

The law (PROTOCOLS D1, D2): a reply that tells of a write leaves after the sync that made the write durable; that holds
for acknowledgements and for reads that saw the write. After a failed sync nothing is ever acknowledged again.

Two groups exist at any time: `flying`, whose sync is under way, and `open`, which collects the next. A write joins the
open group. If nothing flies, the driver is told to have the group `depart` at the end of the turn, with all that has
come together by then. It performs the effects in the order given and reports the end of each sync with `synced` or
`failed`, and the turn after it with `depart` again.

    submit(w1) -> True            nothing flies
    submit(w2) -> False           somebody was told already
    depart()   -> Commit(g1)      g1 flies with w1 and w2
    submit(w3) -> False           w3 waits in the open group
    synced()   -> Release(replies to w1 and w2)
    depart()   -> Commit(g2)

Where syncs are slow, those who have heard of one are likely to write again just after the next has begun, and would
wait for two: so a group that is smaller than the last ones waits a moment for as many as they had (`Pause`;
PostgreSQL's commit_delay and commit_siblings serve the same end).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from agi.core.dht.errors import DHTError, Overloaded
from agi.core.dht.protocol.record import HEADER

T = TypeVar("T")

GROUP_BYTES_MAX = 64 * 1024 * 1024
"""Past this the open group takes no more: callers get Overloaded until the disk has caught up."""


@dataclass(frozen=True, slots=True)
class Commit:
    """Write these records and promises as one batch, then sync; report with `synced` or `failed`."""

    records: dict[bytes, bytes]
    inserts: list[bytes]
    promises: dict[bytes, bytes] = field(default_factory=dict)
    """To be read only: groups without promises share one empty dict."""


@dataclass(frozen=True, slots=True)
class Release(Generic[T]):
    """These replies may leave: what they tell of is durable."""

    replies: list[T]


@dataclass(frozen=True, slots=True)
class Fail(Generic[T]):
    """These replies may never leave: answer with the error instead."""

    replies: list[T]
    error: DHTError


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait a moment for more, then `depart` with this number."""

    group: int


_NO_PROMISES: dict[bytes, bytes] = {}
"""What every group begins with: writes without promises, which are nearly all, pay for no dict."""

Effect = Commit | Release[T] | Fail[T] | Pause


class _Group(Generic[T]):
    __slots__ = ("bytes", "inserts", "promises", "records", "replies")

    def __init__(self) -> None:
        self.records: dict[bytes, bytes] = {}
        self.inserts: list[bytes] = []
        self.promises = _NO_PROMISES
        self.replies: list[T] = []
        self.bytes = 0


class GroupCommit(Generic[T]):
    """The state machine. `T` is whatever the driver needs to send a reply later."""

    __slots__ = ("_expected", "_flying", "_last", "_open", "_pausing", "error", "groups", "writes")

    def __init__(self) -> None:
        self._open: _Group[T] = _Group()
        self._flying: _Group[T] | None = None
        self.error: DHTError | None = None
        self.groups = 0
        self.writes = 0
        self._last = self._expected = 0
        self._pausing = -1

    @property
    def idle(self) -> bool:
        """Nothing is unsynced: every record that a reader can see, and every promise, is durable."""
        return self._flying is None and not self._open.replies and not self._open.records and not self._open.promises

    def overlay(self, key: bytes) -> bytes | None:
        """The unsynced record of a key, if there is one. Whoever shows it must `park` the reply."""
        found = self._open.records.get(key)
        if found is None and self._flying is not None:
            found = self._flying.records.get(key)
        return found

    @property
    def waiting(self) -> Mapping[bytes, bytes]:
        """Records of the open group: the store does not have them yet."""
        return self._open.records

    def submit(
        self,
        records: dict[bytes, bytes],
        inserts: Sequence[bytes],
        reply: T,
        promises: dict[bytes, bytes] | None = None,
    ) -> bool:
        """Takes merged records (each newer than what was seen), and promises (b"" removes one), of which the last of a
        key counts; `reply` leaves after their sync. True if the group has to `depart`. Raises Overloaded or the
        store's error, with nothing taken."""
        if self.error is not None:
            raise self.error
        group = self._open
        size = sum(map(len, records.values())) + HEADER * len(records)
        if promises:
            size += sum(len(key) + len(promise) for key, promise in promises.items()) + HEADER * len(promises)
        if group.bytes and group.bytes + size > GROUP_BYTES_MAX:
            raise Overloaded(f"{group.bytes} bytes wait for the disk already")
        if group.records:
            group.records.update(records)
        else:
            group.records = records
        group.inserts += inserts
        if promises:
            if group.promises:
                group.promises.update(promises)
            else:
                group.promises = dict(promises)
        group.bytes += size
        group.replies.append(reply)
        self.writes += len(records)
        return self._flying is None and len(group.replies) in (1, self._expected)

    def depart(self, paused: int | None = None) -> Commit | Pause | None:
        """The turn is over, or a pause for that group: what is open takes off, or waits for more."""
        if self._flying is not None or not self._open.replies or paused not in (None, self.groups):
            return None
        if paused is not None or len(self._open.replies) >= self._expected:
            return self._take_off()
        if self._pausing == self.groups:
            return None
        self._pausing = self.groups
        return Pause(self.groups)

    def park(self, reply: T) -> None:
        """Holds a reply that tells of unsynced records or promises until all that are unsynced now are synced."""
        if self.error is not None:
            raise self.error
        if self._flying is not None and not self._open.records and not self._open.promises:
            self._flying.replies.append(reply)
        else:
            self._open.replies.append(reply)

    def synced(self, *, patient: bool = False) -> Release[T]:
        """The flying group is durable. `patient`: syncs take so long that the next group may wait for its like."""
        landed, self._flying = self._flying, None
        assert landed is not None
        count = len(landed.replies)
        self._expected = max(count, self._last) if patient else 0
        self._last = count
        return Release(landed.replies)

    def failed(self, error: DHTError, *, fatal: bool) -> Fail[T]:
        """The flying group was not stored. All parked replies fail: the open group was merged against the flying one.
        A failed sync is fatal: what the disk holds is unknown, so the store is never written again. A write that the
        store refused before storing anything (no space) is not: later ones may succeed."""
        if fatal:
            self.error = error
        replies = (self._flying.replies if self._flying is not None else []) + self._open.replies
        self._flying, self._open = None, _Group()
        return Fail(replies, error)

    def _take_off(self) -> Commit:
        self._flying, self._open = self._open, _Group()
        self.groups += 1
        return Commit(self._flying.records, self._flying.inserts, self._flying.promises)
