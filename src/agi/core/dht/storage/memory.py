"""The store that forgets: a dict of key -> record, with indexes for ordered scans, token ranges and expiry.

An overwrite costs one `dict.update` and a look at its expiry field; nothing else. A new key only joins a backlog of
keys that no index holds yet; the first scan that needs an index files the backlog, in slices, yielding to the event
loop between them, so that a store that nobody scans pays nothing for its indexes:

    by key      a sorted list of the same key objects                (8 to 10 bytes a key)
    by token    2^14 unsorted buckets, chosen by the first bits of a key's token (9 to 20 bytes a key)
    by expiry   a heap of (expires_ms, key), only for records with a TTL; an overwritten entry is dropped when met

Measured with 13-byte keys and 100-byte values, CPython 3.11, growth of the resident set, all indexes built, beyond key
and value: 203 bytes a key at 1e5 keys, 181 at 1e6, the record's header of 40 included. A batch that names the same
key objects in `records` and `inserts` keeps one object a key.

Nothing outlives the process, so a node on it takes a new disk id at every start.
"""

from __future__ import annotations

import asyncio
import bisect
import heapq
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NoReturn

from sortedcontainers import SortedList

from agi.core.dht.errors import StorageClosed
from agi.core.dht.protocol.hints import Hint
from agi.core.dht.protocol.record import FLAGS, SHRUNK
from agi.core.dht.storage.base import Batch, Count, HintPage, Page, PromisePage, StorageBackend, StoreStats
from agi.core.dht.storage.promises import check_promises

BUCKET_BITS = 14
SLICE_KEYS_MAX = 512
"""Keys indexed, or items scanned, before the event loop gets its turn (0.8 ms of indexing)."""
STATS_EXACT_RECORDS_MAX = 100_000
"""Up to here `stats` adds up every record; above it estimates the bytes from every n-th."""
HEAP_SLACK = 1024
"""The expiry heap is rebuilt when it holds this many entries more than twice the live ones at its last rebuild."""
_NO_EXPIRY = bytes(8)
_SHIFT = 16 - BUCKET_BITS


def _closed(_key: bytes) -> NoReturn:
    raise StorageClosed("the memory store is not open")


class MemoryStore(StorageBackend):
    """Everything in this process's memory.

    Args:
        token_of: the 8 big-endian bytes of a key's ring token.
    """

    name = "memory"
    local = True
    group_sync = False
    persistent = False
    voting_refusal = ""  # what it forgets, it forgets under a disk id that never comes back

    def __init__(self, token_of: Callable[[bytes], bytes]) -> None:
        self._token_of = token_of
        self._open = False
        self._reset()

    def _reset(self) -> None:
        self._records: dict[bytes, bytes] = {}
        self._get: Callable[[bytes], bytes | None] = _closed
        self._meta: dict[str, bytes] = {}
        self._hints: dict[bytes, Hint] = {}
        self._promises: dict[bytes, bytes] = {}
        self._backlog: list[bytes] = []
        self._stale: set[bytes] = set()  # purged while in the backlog
        self._by_key: Any = SortedList()
        self._by_token: list[list[bytes] | None] = []
        self._heap: list[tuple[int, bytes]] = []
        self._heap_bound = HEAP_SLACK

    async def open(self) -> None:
        if not self._open:
            self._by_token = [None] * (1 << BUCKET_BITS)
            self._get = self._records.get
            self._open = True

    async def close(self) -> None:
        self._open = False
        self._reset()

    def _check_open(self) -> None:
        if not self._open:
            _closed(b"")

    # --- the hot path

    def read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return list(map(self._get, keys))

    headers = read

    def write(self, batch: Batch) -> None:
        if not self._open:
            _closed(b"")
        records = batch.records
        if batch.promises:
            self._promise(batch.promises)
        self._records.update(records)
        if batch.inserts:
            if self._stale:
                self._backlog += [key for key in batch.inserts if key not in self._stale]
                self._stale.difference_update(batch.inserts)
            else:
                self._backlog += batch.inserts
        expiring = [key for key, record in records.items() if record[32:40] != _NO_EXPIRY]
        if expiring:
            self._expect(expiring)
        if batch.purges:
            self._purge(batch.purges)

    def _promise(self, promises: dict[bytes, bytes]) -> None:
        check_promises(promises.values())
        for key, promise in promises.items():
            if promise:
                self._promises[key] = promise
            else:
                self._promises.pop(key, None)

    def _expect(self, keys: list[bytes]) -> None:
        for key in keys:
            record = self._records[key]
            if not record[FLAGS] & SHRUNK:
                heapq.heappush(self._heap, (int.from_bytes(record[32:40], "big"), key))
        if len(self._heap) > self._heap_bound:
            # Entries of overwritten records pile up until their time comes; without them the heap is at most half.
            self._heap = [item for item in set(self._heap) if self._expects(item)]
            heapq.heapify(self._heap)
            self._heap_bound = 2 * len(self._heap) + HEAP_SLACK

    def _expects(self, item: tuple[int, bytes]) -> bool:
        """Whether a heap entry still tells of the record that the store holds."""
        record = self._records.get(item[1])
        return record is not None and not record[FLAGS] & SHRUNK and int.from_bytes(record[32:40], "big") == item[0]

    def _purge(self, keys: list[bytes]) -> None:
        for key in keys:
            if self._records.pop(key, None) is None:
                continue
            if key in self._by_key:
                self._by_key.remove(key)
                bucket = self._by_token[int.from_bytes(self._token_of(key)[:2], "big") >> _SHIFT]
                assert bucket is not None
                bucket.remove(key)
            else:
                self._stale.add(key)

    # --- the rest

    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return self.read(keys)

    async def apply(self, batch: Batch) -> None:
        self.write(batch)

    async def _index(self) -> None:
        """Files the whole backlog, a slice at a time. What is written meanwhile may stay in the new backlog's end."""
        self._check_open()
        buckets, token_of, stale = self._by_token, self._token_of, self._stale
        while self._backlog:
            keys = self._backlog[-SLICE_KEYS_MAX:]
            del self._backlog[-SLICE_KEYS_MAX:]
            if stale:
                purged = stale.intersection(keys)
                stale -= purged
                keys = [key for key in keys if key not in purged]
            keys.sort()
            self._by_key.update(keys)
            for key in keys:
                at = int.from_bytes(token_of(key)[:2], "big") >> _SHIFT
                bucket = buckets[at]
                if bucket is None:
                    buckets[at] = [key]
                else:
                    bucket.append(key)
            await self._pause()

    async def _pause(self) -> None:
        await asyncio.sleep(0)
        self._check_open()

    async def scan(self, start: bytes, end: bytes | None, limit: int, bytes_max: int) -> Page:
        await self._index()
        items: list[tuple[bytes, bytes]] = []
        size = 0
        inclusive = (True, False)
        while True:
            chunk = list(
                islice(self._by_key.irange(start, end, inclusive), min(SLICE_KEYS_MAX, limit - len(items) + 1))
            )
            for key in chunk:
                if len(items) >= limit or size > bytes_max:
                    return Page(items, False)
                record = self._records[key]
                items.append((key, record))
                size += len(key) + len(record)
            if len(chunk) < SLICE_KEYS_MAX and len(items) <= limit:
                return Page(items, True)
            start, inclusive = chunk[-1], (False, False)
            await self._pause()

    async def scan_tokens(self, first: int, last: int, limit: int, after: bytes | None = None) -> Page:
        await self._index()
        token_of = self._token_of
        low = first.to_bytes(8, "big")
        if after is not None:
            low = max(low, token_of(after) + after + b"\0")  # the next possible token || key
        high = (last + 1).to_bytes(9, "big")[1:] if last + 1 < 1 << 64 else None
        items: list[tuple[bytes, bytes]] = []
        worked = 0
        for at in range(int.from_bytes(low[:2], "big") >> _SHIFT, (last >> 64 - BUCKET_BITS) + 1):
            bucket = self._by_token[at]
            worked += 1 + (0 if bucket is None else 16 * len(bucket))
            if worked > 16 * SLICE_KEYS_MAX:
                worked = 0
                await self._pause()
                bucket = self._by_token[at]
            if not bucket:
                continue
            placed = sorted([token_of(key) + key for key in bucket])
            for place in placed[bisect.bisect_left(placed, low) :]:
                if high is not None and place >= high:
                    return Page(items, True)
                if len(items) >= limit:
                    return Page(items, False)
                key = place[8:]
                items.append((key, self._records[key]))
        return Page(items, True)

    async def expired(self, before_ms: int, limit: int) -> list[tuple[bytes, bytes]]:
        self._check_open()
        found: dict[bytes, int] = {}
        heap = self._heap
        steps = limit + SLICE_KEYS_MAX
        while heap and heap[0][0] < before_ms and len(found) < limit and steps:
            steps -= 1
            item = heapq.heappop(heap)
            if self._expects(item):
                found[item[1]] = item[0]
        for key, expires in found.items():  # they stay due until they are shrunk or overwritten
            heapq.heappush(heap, (expires, key))
        return [(key, self._records[key]) for key in found]

    async def count(self) -> Count:
        self._check_open()
        return Count(len(self._records), True)

    async def stats(self) -> StoreStats:
        self._check_open()
        total = len(self._records)
        step = total // STATS_EXACT_RECORDS_MAX + 1
        sizes = [len(key) + len(record) for key, record in islice(self._records.items(), 0, None, step)]
        size = sum(sizes) * total // max(1, len(sizes))
        engine = {"unindexed_keys": len(self._backlog), "expiry_heap_entries": len(self._heap)}
        return StoreStats(total, True, size, engine)

    async def get_meta(self, name: str) -> bytes | None:
        self._check_open()
        return self._meta.get(name)

    async def put_meta(self, name: str, value: bytes) -> None:
        self._check_open()
        self._meta[name] = value

    async def save_hints(self, hints: Sequence[Hint], gone: Sequence[bytes], *, synced: bool = False) -> None:
        self._check_open()
        self._hints.update((hint.name, hint) for hint in hints)
        for name in gone:
            self._hints.pop(name, None)

    async def load_hints(self, start: bytes, limit: int) -> HintPage:
        self._check_open()
        return HintPage(list(self._hints.values()), [], b"")

    async def load_promises(self, start: bytes, limit: int) -> PromisePage:
        self._check_open()
        return PromisePage(list(self._promises.items()), b"")
