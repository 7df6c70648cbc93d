"""Ordered reads of a RocksDB store, in chunks between which the event loop gets its turn.

No iterator lives across a turn: an open one would pin files, and keep the folder locked if the store were closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from rocksdict import Rdict

from agi.core.dht.errors import StorageCorrupt
from agi.core.dht.protocol.record import verify
from agi.core.dht.storage.base import Page
from agi.core.dht.storage.rocksdb_engine import MIB, Engine, as_storage_error

CHUNK_ITEMS_MAX = 256
CHUNK_BYTES_MAX = 1 * MIB
"""A scan gives the event loop its turn after so many items or bytes (about 0.5 ms)."""


def walk(family: Rdict, start: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The entries of a family from `start` on. One that ends by itself met no damage: rocksdict's own iterators stop
    in silence at a broken block. Raises StorageCorrupt, StorageError."""
    cursor = family.iter()
    try:
        cursor.seek(start)
        while cursor.valid():
            yield cursor.key(), cursor.value()
            cursor.next()
        cursor.status()
    except Exception as error:
        raise as_storage_error(error, "a scan failed") from error
    finally:
        del cursor


class Scanner:
    """The scans of a store; `engine` gives the open database, or raises."""

    def __init__(self, engine: Callable[[], Engine], token_of: Callable[[bytes], bytes]) -> None:
        self._engine = engine
        self._token_of = token_of

    async def by_key(self, start: bytes, end: bytes | None, limit: int, bytes_max: int) -> Page:
        items: list[tuple[bytes, bytes]] = []
        size = 0
        while True:
            before, chunk_bytes = len(items), 0
            engine = self._engine()
            for key, _ in walk(engine.keys, start):
                if end is not None and key >= end:
                    return Page(items, True)
                if len(items) >= limit or size > bytes_max:
                    return Page(items, False)
                if len(items) - before >= CHUNK_ITEMS_MAX or chunk_bytes >= CHUNK_BYTES_MAX:
                    start = key
                    break
                try:
                    record = engine.db.get(self._token_of(key) + key)
                except Exception as error:
                    raise as_storage_error(error, "a scan failed") from error
                if record is None:
                    raise StorageCorrupt(f"the key index names {key[:64]!r}, which has no record")
                items.append((key, verify(key, record)))
                size += len(key) + len(record)
                chunk_bytes += len(record)
            else:
                return Page(items, True)
            await asyncio.sleep(0)

    async def by_token(self, first: int, last: int, limit: int, after: bytes | None) -> Page:
        start, bound = first.to_bytes(8, "big"), last.to_bytes(8, "big")
        if after is not None:
            start = max(start, self._token_of(after) + after + b"\0")  # the next possible token || key
        items: list[tuple[bytes, bytes]] = []
        while True:
            before, chunk_bytes = len(items), 0
            for place, record in walk(self._engine().db, start):
                if place[:8] > bound:
                    return Page(items, True)
                if len(items) >= limit:
                    return Page(items, False)
                if len(items) - before >= CHUNK_ITEMS_MAX or chunk_bytes >= CHUNK_BYTES_MAX:
                    start = place
                    break
                key = place[8:]
                items.append((key, verify(key, record)))
                chunk_bytes += len(record)
            else:
                return Page(items, True)
            await asyncio.sleep(0)

    def count_chunk(self, position: bytes) -> tuple[int, bytes | None]:
        """How many keys follow `position`, up to a chunk, and the last of them; None in its place at the end."""
        counted = 0
        for key, _ in walk(self._engine().keys, position + b"\0" if position else b""):
            if counted >= CHUNK_ITEMS_MAX:
                return counted, position
            counted, position = counted + 1, key
        return counted, None
