"""Hints: what a replica missed of acknowledged writes, kept by their coordinator until that replica is back.

A hint is one packed record for one target, which is a node on one disk (PROTOCOLS D4): whoever comes back under the
name with another disk gets none of it. Each target has a queue in the order of the writes; of a key only the newest
record is kept, at the end of the queue. A queue is bounded by bytes and by age, and gives up its oldest hints first:
reads and anti-entropy repair what hints do not.

A hint is a repair: the target merges it, so that an old one does no harm, and one delivered twice neither. Hence the
store may lag behind: `take_unsaved` tells what to store and what to remove, `saved` or `not_saved` what became of it.
What is asked of the store is bounded by what is held and what was stored, however long it refuses.

>>> hints = Hints(bytes_max=1 << 20, age_max_ms=1000)
>>> hints.add("n2", "disk", 1, [b"k"], [b"1"], now_ms=5); hints.add("n2", "disk", 1, [b"k"], [b"2"], now_ms=6)
>>> [hint.record for hint in hints.batch("n2", 1 << 20, 10)]
[b'2']
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import msgspec
import xxhash

from agi.core.dht.errors import StorageCorrupt

HINT_OVERHEAD_BYTES = 400
"""What a hint takes beyond its key and record: objects, a place in the queue, for a while one among the unsaved."""
_CHECKSUM_BYTES = 8
_UNKNOWN = object()
_Row: TypeAlias = tuple[str, str, int, int, int, bytes, bytes]


class Dropped(enum.StrEnum):
    """Why a hint was given up."""

    FULL = "full"
    """The target's queue had no room for it."""
    OLD = "old"
    OTHER_DISK = "other_disk"
    """The node is back with a disk that never had what it missed; it is filled as a whole."""
    NO_MEMBER = "no_member"
    DAMAGED = "damaged"
    """What the store returned fails its checksum."""
    TOPOLOGY = "topology"
    """The target no longer holds those keys."""


class Hint(msgspec.Struct):
    """`number` orders the hints of one holder, through restarts; `epoch` is the topology's at the time of the write."""

    node: str
    disk: str
    epoch: int
    number: int
    since_ms: int
    key: bytes
    record: bytes
    saved: bool = False
    """The store has it, or an older one of its key and target."""

    @property
    def name(self) -> bytes:
        """Under which a store keeps it: one of a key and target."""
        return target_tag(self.node, self.disk) + self.key

    @property
    def cost(self) -> int:
        return HINT_OVERHEAD_BYTES + len(self.key) + len(self.record)


def target_tag(node: str, disk: str) -> bytes:
    """The 16 bytes with which the names of a target's hints begin."""
    return xxhash.xxh3_128_digest(msgspec.msgpack.encode((node, disk)))


def pack_hint(hint: Hint) -> bytes:
    """As a store keeps it: a checksum, then everything."""
    row: _Row = (hint.node, hint.disk, hint.epoch, hint.number, hint.since_ms, hint.key, hint.record)
    body = msgspec.msgpack.encode(row)
    return xxhash.xxh3_64_digest(body) + body


def unpack_hint(name: bytes, packed: bytes) -> Hint:
    """The hint that `pack_hint` packed. Raises StorageCorrupt, also where it is another's."""
    body = packed[_CHECKSUM_BYTES:]
    if xxhash.xxh3_64_digest(body) != packed[:_CHECKSUM_BYTES]:
        raise StorageCorrupt(f"the hint of key {name[16:80]!r} fails its checksum")
    node, disk, epoch, number, since_ms, key, record = msgspec.msgpack.decode(body, type=_Row)
    hint = Hint(node, disk, epoch, number, since_ms, key, record)
    if hint.name != name:
        raise StorageCorrupt(f"the hint of key {name[16:80]!r} is that of {hint.key[:64]!r} for {hint.node}")
    return hint


@dataclass(frozen=True, slots=True)
class Pending:
    """What waits for one target."""

    node: str
    disk: str
    hints: int
    bytes: int
    oldest_ms: int
    """When the first of them was made."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What a store should do: keep these hints, in place of older ones of their names, and remove those names."""

    hints: list[Hint]
    gone: list[bytes]


class _Queue:
    __slots__ = ("bytes", "disk", "hints", "node", "tag")

    def __init__(self, node: str, disk: str) -> None:
        self.node = node
        self.disk = disk
        self.tag = target_tag(node, disk)
        self.hints: OrderedDict[bytes, Hint] = OrderedDict()
        self.bytes = 0


class Hints:
    """All hints of one holder.

    Args:
        bytes_max: of one target's queue, HINT_OVERHEAD_BYTES a hint included.
        age_max_ms: how long a hint is kept.

    Attributes:
        stored, replayed: how many hints were taken, and how many their targets confirmed.
        dropped: how many were given up, by reason.
        lost: target -> how many were given up that it still lacks, since it was last told so.
    """

    def __init__(self, bytes_max: int, age_max_ms: int) -> None:
        self.stored = 0
        self.replayed = 0
        self.dropped: dict[Dropped, int] = dict.fromkeys(Dropped, 0)
        self.lost: dict[str, int] = {}
        self._bytes_max = bytes_max
        self._age_max_ms = age_max_ms
        self._number = 0
        self._queues: dict[str, _Queue] = {}
        self._unsaved: dict[bytes, Hint | None] = {}
        self._taken: dict[bytes, Hint | None] = {}

    # --- what happens

    def add(
        self, node: str, disk: str, epoch: int, keys: Iterable[bytes], records: Iterable[bytes], now_ms: int
    ) -> None:
        """That node missed these records."""
        queue = self._queue_of(node, disk)
        held, unsaved, tag, number = queue.hints, self._unsaved, queue.tag, self._number
        for key, record in zip(keys, records, strict=True):
            before = held.get(key)
            if before is not None:
                if before.record >= record:
                    continue
                del held[key]
            number += 1
            name = tag + key
            # a removal that the store has not heard of means that it still has an older one
            saved = before.saved if before is not None else unsaved.get(name, _UNKNOWN) is None
            hint = held[key] = Hint(node, disk, epoch, number, now_ms, key, record, saved)
            unsaved[name] = hint
            queue.bytes += hint.cost - (before.cost if before is not None else 0)
        self.stored += number - self._number
        self._number = number
        self._trim(queue, now_ms)

    def restore(self, hints: Iterable[Hint]) -> None:
        """What the store has kept over a restart. Before anything else is added."""
        for hint in sorted(hints, key=lambda hint: hint.number):
            hint.saved = True
            queue = self._queue_of(hint.node, hint.disk)
            before = queue.hints.pop(hint.key, None)
            queue.hints[hint.key] = hint
            queue.bytes += hint.cost - (before.cost if before is not None else 0)
            self._number = hint.number
        for queue in list(self._queues.values()):
            self._trim(queue, 0)

    def delivered(self, hints: Iterable[Hint]) -> None:
        """The target has these, or newer ones. One that was replaced meanwhile stays."""
        for hint in hints:
            queue = self._queues.get(hint.node)
            if queue is not None and queue.hints.get(hint.key) is hint:
                self._remove(queue, hint)
                self.replayed += 1

    def expire(self, now_ms: int) -> None:
        """Gives up what is too old."""
        for queue in list(self._queues.values()):
            self._trim(queue, now_ms)

    def keep(self, disks: Mapping[str, str]) -> None:
        """Gives up what is for others than these nodes on these disks."""
        for queue in list(self._queues.values()):
            disk = disks.get(queue.node)
            if disk != queue.disk:
                why = Dropped.NO_MEMBER if disk is None else Dropped.OTHER_DISK
                self._give_up(queue, list(queue.hints.values()), why)
        self.lost = {node: count for node, count in self.lost.items() if node in disks}

    def lose(self, node: str, count: int) -> None:
        """That node missed so many records of which no hint is kept."""
        self.lost[node] = self.lost.get(node, 0) + count

    def told(self, node: str, count: int) -> None:
        """The target knows of so many lost ones, and looks for what they held elsewhere."""
        if self.lost.get(node, 0) <= count:
            self.lost.pop(node, None)
        else:
            self.lost[node] -= count

    def drop(self, condition: Callable[[Hint], bool]) -> int:
        """Gives up what meets the condition; returns how many."""
        count = 0
        for queue in list(self._queues.values()):
            met = [hint for hint in queue.hints.values() if condition(hint)]
            count += len(met)
            self._give_up(queue, met, Dropped.TOPOLOGY)
        return count

    # --- what there is

    def batch(self, node: str, bytes_max: int, hints_max: int) -> list[Hint]:
        """The oldest hints of a target, up to these bounds, but at least one; none where there are none."""
        found: list[Hint] = []
        size = 0
        queue = self._queues.get(node)
        if queue is not None:
            for hint in queue.hints.values():
                size += len(hint.key) + len(hint.record)
                if found and (size > bytes_max or len(found) >= hints_max):
                    break
                found.append(hint)
        return found

    def pending(self) -> list[Pending]:
        """By target, in the order of their names."""
        return [
            Pending(queue.node, queue.disk, len(queue.hints), queue.bytes, next(iter(queue.hints.values())).since_ms)
            for _, queue in sorted(self._queues.items())
        ]

    def __len__(self) -> int:
        return sum(len(queue.hints) for queue in self._queues.values())

    # --- what the store should have

    def take_unsaved(self, changes_max: int, bytes_max: int) -> Changes:
        """Some of what the store does not know yet. One at a time: `saved` or `not_saved` ends it."""
        hints: list[Hint] = []
        gone: list[bytes] = []
        size = 0
        while self._unsaved and len(self._taken) < changes_max and size < bytes_max:
            name, hint = self._unsaved.popitem()
            self._taken[name] = hint
            if hint is None:
                gone.append(name)
                size += len(name)
            else:
                hints.append(hint)
                size += len(hint.key) + len(hint.record)
        return Changes(hints, gone)

    def saved(self) -> None:
        """The store has taken what was taken last."""
        for hint in self._taken.values():
            if hint is not None:
                hint.saved = True
        self._taken = {}

    def not_saved(self) -> None:
        """The store has not; what has changed since counts."""
        for name, hint in self._taken.items():
            self._unsaved.setdefault(name, hint)
        self._taken = {}

    def forget(self, names: Iterable[bytes]) -> None:
        """The store has something under these names that cannot be read."""
        for name in names:
            self._unsaved.setdefault(name, None)
            self.dropped[Dropped.DAMAGED] += 1

    # --- parts

    def _queue_of(self, node: str, disk: str) -> _Queue:
        queue = self._queues.get(node)
        if queue is not None and queue.disk != disk:
            self._give_up(queue, list(queue.hints.values()), Dropped.OTHER_DISK)
            queue = None
        if queue is None:
            queue = self._queues[node] = _Queue(node, disk)
        return queue

    def _trim(self, queue: _Queue, now_ms: int) -> None:
        full: list[Hint] = []
        old: list[Hint] = []
        size = queue.bytes
        for hint in queue.hints.values():
            if size > self._bytes_max:
                full.append(hint)
            elif hint.since_ms + self._age_max_ms <= now_ms:
                old.append(hint)
            else:
                break
            size -= hint.cost
        self._give_up(queue, full, Dropped.FULL)
        self._give_up(queue, old, Dropped.OLD)
        if full or old:
            self.lose(queue.node, len(full) + len(old))
        if not queue.hints:
            self._queues.pop(queue.node, None)

    def _give_up(self, queue: _Queue, hints: Iterable[Hint], why: Dropped) -> None:
        for hint in hints:
            self._remove(queue, hint)
            self.dropped[why] += 1

    def _remove(self, queue: _Queue, hint: Hint) -> None:
        del queue.hints[hint.key]
        queue.bytes -= hint.cost
        name = queue.tag + hint.key
        if hint.saved or name in self._taken:
            self._unsaved[name] = None
        else:
            self._unsaved.pop(name, None)
        if not queue.hints:
            self._queues.pop(queue.node, None)
