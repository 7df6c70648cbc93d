"""The records last read or written, so that a merge or a read of a warm key does not go to RocksDB.

Two generations of plain dicts: what is touched is in the young one; when that has taken its half of the budget it
becomes the old one, and what was old and not touched since is forgotten. That is a second chance for every entry, at
the price of a `dict.update` for a batch, without a list of uses to maintain.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

RECORD_BYTES_MAX = 1024
"""Larger records are not kept: their reads cost more anyway, and a few would displace many."""
ENTRY_OVERHEAD_BYTES = 210
"""Beyond the record: two object headers, a dict slot at its emptiest, an average key."""


class RecordCache:
    """At most `bytes_max` bytes of records. `young` is public for the hot path: `list(map(cache.young.get, keys))`."""

    __slots__ = ("_half", "_old", "_room", "young")

    def __init__(self, bytes_max: int) -> None:
        self._half = bytes_max // 2
        self.clear()

    def clear(self) -> None:
        self._room = self._half
        self.young: dict[bytes, bytes] = {}
        self._old: dict[bytes, bytes] = {}

    def __len__(self) -> int:
        return len(self.young.keys() | self._old.keys())

    def old(self, key: bytes) -> bytes | None:
        """What the young generation does not have; the caller adds it again if it uses it."""
        return self._old.get(key)

    def put(self, records: Mapping[bytes, bytes]) -> None:
        """Keeps the small ones of these records in place of what was there."""
        if not records:
            return
        lengths = list(map(len, records.values()))
        if max(lengths) > RECORD_BYTES_MAX:
            self.drop(key for key, record in records.items() if len(record) > RECORD_BYTES_MAX)
            records = {key: record for key, record in records.items() if len(record) <= RECORD_BYTES_MAX}
            lengths = list(map(len, records.values()))
        size = sum(lengths) + ENTRY_OVERHEAD_BYTES * len(lengths)
        if size > self._room:
            if size > self._half:
                self.drop(records)
                return
            self._old, self.young, self._room = self.young, {}, self._half
        self.young.update(records)
        self._room -= size

    def drop(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            self.young.pop(key, None)
            self._old.pop(key, None)
