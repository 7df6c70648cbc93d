"""Up to which version a node's arcs are sealed, closed and reclaimed (PROTOCOLS G1).

A round of reclaiming brings an arc at each of its replicas through three heights, all of them versions (HLC):

    sealed     a put at or below it is answered `superseded`, a hint is dropped, a ballot at or below it is refused as
               if more had been promised: nothing old begins any more
    closed     this replica holds all that any replica held up to here when the last of them had sealed; what is
               repaired at or below it and is not held was reclaimed, so it is dropped
    reclaimed  all replicas have closed: tombstones, and records that expired by then, are gone up to here

A register stands where the milliseconds of its ballot do.

A height never falls while the node holds the arc, and reclaimed <= closed <= sealed.

>>> floors = Floors().raised([(0, 99)], Height(30, 20, 10)).raised([(50, 149)], Height(40, 5, 0))
>>> [(first, last, *height) for first, last, height in floors.spans]
[(0, 49, 30, 20, 10), (50, 99, 40, 20, 10), (100, 149, 40, 5, 0)]
>>> floors.at(75).sealed, floors.at(500).sealed
(40, 0)
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeAlias

from agi.core.dht.errors import StorageCorrupt
from agi.core.dht.protocol.record import EXPIRES, FLAGS, LATER, REGISTERED, TOMBSTONE, expires_ms_of
from agi.core.dht.protocol.versioning import physical_ms

Span: TypeAlias = tuple[int, int]

_ROW = struct.Struct(">QQQQQ")
_NOBODY = b"\xff" * 8


class Height(NamedTuple):
    sealed: int = 0
    closed: int = 0
    reclaimed: int = 0

    def over(self, other: Height) -> Height:
        return Height(*map(max, self, other))


NONE = Height()


def promise_of(sealed: int) -> bytes:
    """What a seal up to this version has promised: no ballot of these milliseconds, or before them."""
    return (REGISTERED | sealed & ~LATER).to_bytes(8, "big") + _NOBODY


class Floors:
    """The heights of spans of tokens, first to last, apart and in order. Immutable.

    Attributes:
        mark: compares above every record at or below the highest seal, and below all others: one comparison tells of a
            whole batch of fresh records that nothing is in its way.
        promise: the highest that any seal stands for; ballots of later milliseconds are above all.
    """

    __slots__ = ("_lasts", "mark", "promise", "spans")

    def __init__(self, spans: Sequence[tuple[int, int, Height]] = ()) -> None:
        self.spans = tuple(spans)
        self._lasts = [last for _, last, _ in self.spans]
        highest = max((height.sealed for _, _, height in self.spans), default=-1)
        self.mark = (highest + 1).to_bytes(9, "big")[1:]
        self.promise = promise_of(max(highest, 0))

    def at(self, token: int) -> Height:
        index = bisect_left(self._lasts, token)
        if index < len(self.spans) and self.spans[index][0] <= token:
            return self.spans[index][2]
        return NONE

    def covers(self, token: int) -> bool:
        """Whether it lies in one of the spans."""
        index = bisect_left(self._lasts, token)
        return index < len(self.spans) and self.spans[index][0] <= token

    def within(self, spans: Iterable[Span]) -> Floors:
        """What is known of these spans alone; they are apart and in order."""
        found = []
        for first, last in spans:
            index = bisect_left(self._lasts, first)
            while index < len(self.spans) and self.spans[index][0] <= last:
                low, high, height = self.spans[index]
                found.append((max(low, first), min(high, last), height))
                index += 1
        return Floors(found)

    def raised(self, spans: Iterable[Span], to: Height) -> Floors:
        """With at least these heights in these spans."""
        return self._merged([(first, last, to) for first, last in spans])

    def over(self, other: Floors) -> Floors:
        """With at least the heights of both."""
        return self._merged(other.spans)

    def without(self, spans: Iterable[Span]) -> Floors:
        """Nothing is known of these spans any more."""
        return self._merged([(first, last, None) for first, last in spans])

    def _merged(self, changes: Iterable[tuple[int, int, Height | None]]) -> Floors:
        changes = sorted(changes, key=lambda change: change[:2])
        cuts = sorted(
            {first for first, _, _ in (*self.spans, *changes)} | {last + 1 for _, last, _ in (*self.spans, *changes)}
        )
        merged: list[tuple[int, int, Height]] = []
        at = 0
        for first, end in pairwise(cuts):
            height = self.at(first)
            while at < len(changes) and changes[at][1] < first:
                at += 1
            if at < len(changes) and changes[at][0] <= first:
                change = changes[at][2]
                height = NONE if change is None else height.over(change)
            if height == NONE:
                continue
            if merged and merged[-1][1] == first - 1 and merged[-1][2] == height:
                merged[-1] = (merged[-1][0], end - 1, height)
            else:
                merged.append((first, end - 1, height))
        return Floors(merged)

    @property
    def packed(self) -> bytes:
        return b"".join(_ROW.pack(first, last, *height) for first, last, height in self.spans)


def unpack(data: bytes) -> Floors:
    """What `packed` gave. Raises StorageCorrupt."""
    if len(data) % _ROW.size:
        raise StorageCorrupt("heights of a wrong length")
    spans = [(first, last, Height(*heights)) for first, last, *heights in _ROW.iter_unpack(data)]
    before = -1
    for first, last, height in spans:
        if not before < first <= last or not height.reclaimed <= height.closed <= height.sealed:
            raise StorageCorrupt("heights out of order")
        before = last
    return Floors(spans)


def is_dead(record: bytes, height: int) -> bool:
    """Whether a round that reclaims up to this version takes the record: one judgement at every replica, whatever its
    clock says."""
    if record[:8] > height.to_bytes(8, "big"):
        return False
    flags = record[FLAGS]
    return bool(flags & TOMBSTONE or (flags & EXPIRES and expires_ms_of(record) <= physical_ms(height)))
