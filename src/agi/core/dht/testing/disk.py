"""A simulated disk: what was written and what was synced are two things, and a power cut tells them apart.

A `SimDisk` is the device; it outlives every process. A `SimStore` is one process's store on it (storage/base.py), with
group sync like the RocksDB one: a log of atomic batches, and metadata as entries of the same log. `sync` makes durable
what had been written when it was called. When power is lost, a random prefix of the unsynced log survives, whole
batches only: that is what a write-ahead log recovers to. When only the process dies, the page cache keeps everything,
unless a sync had failed: then the kernel may have thrown pages away ("fsyncgate"), and a random prefix survives too.
"""

from __future__ import annotations

import asyncio
import random
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass

from agi.core.dht.errors import FolderUnusable, StorageClosed, StorageError, StorageFull
from agi.core.dht.protocol.hints import Hint
from agi.core.dht.protocol.record import FLAGS, SHRUNK, expires_ms_of, verify
from agi.core.dht.ring import token_bytes
from agi.core.dht.storage.base import Batch, Count, HintPage, Page, PromisePage, StorageBackend, StoreStats, SyncDone
from agi.core.dht.testing.trace import Trace

_TOKEN_MAX = (1 << 64) - 1


@dataclass(slots=True)
class DiskFaults:
    """How the disk behaves; chances are per operation, times in seconds, drawn uniformly. May be changed at any time.

    Attributes:
        sync_s: least and most time of an ordinary sync.
        slow_sync_chance, slow_sync_s: how often a sync takes long, and how long.
        full_chance: how often a write finds no space (StorageFull; nothing of the batch is stored).
        sync_error_chance: how often a sync fails; the store is unusable from then on, the disk is not.
    """

    sync_s: tuple[float, float] = (0.0002, 0.002)
    slow_sync_chance: float = 0.0
    slow_sync_s: tuple[float, float] = (0.05, 0.5)
    full_chance: float = 0.0
    sync_error_chance: float = 0.0


@dataclass(frozen=True, slots=True)
class _Meta:
    name: str
    value: bytes


@dataclass(frozen=True, slots=True)
class _Hints:
    hints: tuple[Hint, ...]
    gone: tuple[bytes, ...]


_Entry = Batch | _Meta | _Hints


class _Image:
    """Records with the orders that scans need, hints, and metadata."""

    __slots__ = ("_token", "expiry", "hints", "keys", "meta", "promises", "records", "tokens")

    def __init__(self, token: Callable[[bytes], bytes]) -> None:
        self._token = token
        self.records: dict[bytes, bytes] = {}
        self.meta: dict[str, bytes] = {}
        self.hints: dict[bytes, Hint] = {}
        self.promises: dict[bytes, bytes] = {}
        self.keys: list[bytes] = []
        self.tokens: list[tuple[bytes, bytes]] = []
        """Sorted (token, key)."""
        self.expiry: list[tuple[int, bytes]] = []
        """Sorted (expires, key) of what has yet to be shrunk."""

    def apply(self, entry: _Entry) -> None:
        if isinstance(entry, _Meta):
            self.meta[entry.name] = entry.value
            return
        if isinstance(entry, _Hints):
            self.hints.update((hint.name, hint) for hint in entry.hints)
            for name in entry.gone:
                self.hints.pop(name, None)
            return
        for key, record in entry.records.items():
            before = self.records.get(key)
            if before is None:
                insort(self.keys, key)
                insort(self.tokens, (self._token(key), key))
            else:
                self._forget_expiry(key, before)
            self.records[key] = record
            if _expires(record):
                insort(self.expiry, (expires_ms_of(record), key))
        for key, promise in entry.promises.items():
            if promise:
                self.promises[key] = promise
            else:
                self.promises.pop(key, None)
        for key in entry.purges:
            before = self.records.pop(key, None)
            if before is not None:
                del self.keys[bisect_left(self.keys, key)]
                del self.tokens[bisect_left(self.tokens, (self._token(key), key))]
                self._forget_expiry(key, before)

    def _forget_expiry(self, key: bytes, record: bytes) -> None:
        if _expires(record):
            del self.expiry[bisect_left(self.expiry, (expires_ms_of(record), key))]


def _size(entry: _Entry) -> int:
    if isinstance(entry, _Meta):
        return len(entry.value)
    if isinstance(entry, _Hints):
        return sum(len(hint.record) for hint in entry.hints)
    return sum(map(len, entry.records.values())) + sum(map(len, entry.promises.values()))


def _expires(record: bytes) -> bool:
    return not record[FLAGS] & SHRUNK and expires_ms_of(record) > 0


class SimDisk:
    """The device of one data folder. Put `end_hook` into its host's `on_end`.

    Args:
        name: for the trace.
        rng: draws delays, faults and what a power cut leaves.
        trace: gets a line per write, sync and crash.
        hash_algorithm: of the ring, for scans by token.

    Attributes:
        faults: see DiskFaults.
        writes, syncs: how many were done.
        crashes_that_lost_data: crashes after which at least one written entry was gone.
        on_meta: called with (name, value) of a named value of the node that has become durable.
        on_purge: called with (key, record) of a record that is about to be removed altogether.
    """

    def __init__(self, name: str, rng: random.Random, trace: Trace, hash_algorithm: str = "md5") -> None:
        self.name = name
        self.faults = DiskFaults()
        self.writes = 0
        self.syncs = 0
        self.crashes_that_lost_data = 0
        self.on_meta: Callable[[str, bytes], None] | None = None
        self.on_purge: Callable[[bytes, bytes], None] | None = None
        self._rng = rng
        self._trace = trace
        self._token = token_bytes(hash_algorithm)
        self._synced = _Image(self._token)
        self._tail: list[_Entry] = []
        self._synced_count = 0
        self._sync_failed = False
        self._holder: SimStore | None = None

    def store(self) -> SimStore:
        """A store object for a new process; `open` it."""
        return SimStore(self)

    def crash(self, *, power_loss: bool = True) -> int:
        """The process that holds the disk is gone, with `power_loss` the whole machine. Returns how many entries
        (batches and metadata) were lost."""
        if self._holder is not None:
            self._holder._abandon()
            self._holder = None
        lost = self._lose() if power_loss or self._sync_failed else 0
        self._trace.record("disk-crash", f"{self.name} lost={lost}")
        return lost

    def end_hook(self, power_loss: bool) -> None:
        self.crash(power_loss=power_loss)

    @property
    def unsynced(self) -> int:
        """Entries that were written and are not synced."""
        return len(self._tail)

    def durable(self, key: bytes) -> bytes | None:
        """The record that would be there after a power cut at this moment, at least."""
        return self._synced.records.get(key)

    def durable_meta(self, name: str) -> bytes | None:
        """`durable` of a named value of the node."""
        return self._synced.meta.get(name)

    def durable_promise(self, key: bytes) -> bytes:
        """`durable` of a promise; empty for none."""
        return self._synced.promises.get(key, b"")

    # --- for its store

    def open(self, holder: SimStore) -> _Image:
        if self._holder is not None:
            raise FolderUnusable(f"the disk {self.name} is locked by another process")
        self._holder = holder
        if self._sync_failed:
            self._lose()
        image = _Image(self._token)
        image.apply(Batch(records=dict(self._synced.records), promises=dict(self._synced.promises)))
        image.meta.update(self._synced.meta)
        image.hints.update(self._synced.hints)
        for entry in self._tail:
            image.apply(entry)
        return image

    def release(self) -> None:
        self._holder = None

    def append(self, entry: _Entry) -> None:
        if self.faults.full_chance and self._rng.random() < self.faults.full_chance:
            self._trace.record("disk-full", self.name)
            raise StorageFull(f"the disk {self.name} has no space left")
        self._tail.append(entry)
        self.writes += 1
        self._trace.record("disk-write", f"{self.name} {self.end} {_size(entry)}")

    @property
    def end(self) -> int:
        """The log position after the last entry written."""
        return self._synced_count + len(self._tail)

    def sync_delay_s(self) -> float:
        faults = self.faults
        slow = faults.slow_sync_chance and self._rng.random() < faults.slow_sync_chance
        return self._rng.uniform(*(faults.slow_sync_s if slow else faults.sync_s))

    def synced_to(self, position: int) -> StorageError | None:
        """A sync of the log up to there ends: in success, or in the error that it returns."""
        if self.faults.sync_error_chance and self._rng.random() < self.faults.sync_error_chance:
            self._sync_failed = True
            self._trace.record("disk-sync-error", self.name)
            return StorageError(f"a sync of the disk {self.name} failed")
        self.syncs += 1
        self._persist(position - self._synced_count)
        self._trace.record("disk-sync", f"{self.name} {position}")
        return None

    def _lose(self) -> int:
        self._persist(self._rng.randint(0, len(self._tail)))
        lost = len(self._tail)
        self._tail.clear()
        self._sync_failed = False
        self.crashes_that_lost_data += lost > 0
        return lost

    def _persist(self, count: int) -> None:
        if count > 0:  # another sync may have been there first
            for entry in self._tail[:count]:
                self._synced.apply(entry)
                if isinstance(entry, _Meta) and self.on_meta is not None:
                    self.on_meta(entry.name, entry.value)
            del self._tail[:count]
            self._synced_count += count


class SimStore(StorageBackend):
    """A process's store on a SimDisk. After its process has died every call raises StorageClosed."""

    name = "simulated"
    voting_refusal = ""
    local = True
    group_sync = True
    persistent = True

    def __init__(self, disk: SimDisk) -> None:
        self._disk = disk
        self._open: _Image | None = None
        self._failed: StorageError | None = None
        self._syncing = False

    async def open(self) -> None:
        if self._open is None:
            self._open = self._disk.open(self)

    async def close(self) -> None:
        if self._open is None:
            return
        try:
            if self._failed is None and self._disk.unsynced:
                await self._synced()
        finally:
            if self._open is not None:  # else the process was killed meanwhile
                self._open = None
                self._disk.release()

    def _abandon(self) -> None:
        self._open = None

    def _image(self) -> _Image:
        if self._open is None:
            raise StorageClosed(f"the store on {self._disk.name} is not open")
        if self._failed is not None:
            raise StorageError(f"the store on {self._disk.name} is unusable: {self._failed}")
        return self._open

    # --- the local methods

    def read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        get = self._image().records.get
        return [None if (record := get(key)) is None else verify(key, record) for key in keys]

    def headers(self, keys: Sequence[bytes]) -> list[bytes | None]:
        get = self._image().records.get
        return [get(key) for key in keys]

    def write(self, batch: Batch) -> None:
        """As StorageBackend.write. Raises AssertionError where `inserts` is not exactly the new keys: an engine that
        trusts it would lose them from its scans, or return them twice."""
        image = self._image()
        new = [key for key in batch.records if key not in image.records]
        if sorted(new) != sorted(batch.inserts):
            raise AssertionError(f"a batch names {batch.inserts} as new keys; new are {new}")
        if self._disk.on_purge is not None:
            for key in batch.purges:
                if key in image.records:
                    self._disk.on_purge(key, image.records[key])
        copy = Batch(dict(batch.records), list(batch.inserts), list(batch.purges), dict(batch.promises))
        self._disk.append(copy)
        image.apply(copy)

    def sync(self, done: SyncDone) -> None:
        """As StorageBackend.sync. Raises StorageError for a second one at a time."""
        self._image()
        if self._syncing:
            raise StorageError("one sync at a time")
        self._syncing = True

        def end(error: Exception | None) -> None:
            self._syncing = False
            done(error)

        self._start_sync(end)

    def _start_sync(self, done: SyncDone) -> None:
        position = self._disk.end

        def end() -> None:
            if self._open is None:
                done(StorageClosed(f"the store on {self._disk.name} was closed during a sync"))
                return
            if self._failed is None:
                self._failed = self._disk.synced_to(position)
            done(self._failed)

        asyncio.get_running_loop().call_later(self._disk.sync_delay_s(), end)

    async def _synced(self) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def end(error: Exception | None) -> None:
            if not future.done():
                if error is None:
                    future.set_result(None)
                else:
                    future.set_exception(error)

        self._start_sync(end)
        await future

    # --- the async methods

    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return self.read(keys)

    async def apply(self, batch: Batch) -> None:
        self.write(batch)
        await self._synced()

    async def scan(self, start: bytes, end: bytes | None, limit: int, bytes_max: int) -> Page:
        image = self._image()
        first = bisect_left(image.keys, start)
        last = len(image.keys) if end is None else max(first, bisect_left(image.keys, end))
        items: list[tuple[bytes, bytes]] = []
        size = 0
        for key in image.keys[first : min(last, first + limit)]:
            if size > bytes_max:
                break
            record = image.records[key]
            size += len(key) + len(record)
            items.append((key, record))
        return Page(items, first + len(items) == last)

    async def scan_tokens(self, first: int, last: int, limit: int, after: bytes | None = None) -> Page:
        image = self._image()
        start = bisect_left(image.tokens, (first.to_bytes(8, "big"),))
        if after is not None:
            start = max(start, bisect_right(image.tokens, (self._disk._token(after), after)))
        if last >= _TOKEN_MAX:
            end = len(image.tokens)
        else:
            end = max(start, bisect_left(image.tokens, ((last + 1).to_bytes(8, "big"),)))
        keys = image.tokens[start : min(end, start + limit)]
        return Page([(key, image.records[key]) for _, key in keys], start + len(keys) == end)

    async def expired(self, before_ms: int, limit: int) -> list[tuple[bytes, bytes]]:
        image = self._image()
        end = bisect_left(image.expiry, (before_ms,))
        return [(key, image.records[key]) for _, key in image.expiry[: min(end, limit)]]

    async def count(self) -> Count:
        return Count(len(self._image().records), True)

    async def stats(self) -> StoreStats:
        records = self._image().records
        size = sum(len(key) + len(record) for key, record in records.items())
        engine = {"unsynced": self._disk.unsynced, "syncs": self._disk.syncs, "writes": self._disk.writes}
        return StoreStats(len(records), True, size, engine)

    async def load_promises(self, start: bytes, limit: int) -> PromisePage:
        return PromisePage(list(self._image().promises.items()), b"")

    async def get_meta(self, name: str) -> bytes | None:
        return self._image().meta.get(name)

    async def put_meta(self, name: str, value: bytes) -> None:
        entry = _Meta(name, value)
        image = self._image()
        self._disk.append(entry)
        image.apply(entry)
        await self._synced()

    async def save_hints(self, hints: Sequence[Hint], gone: Sequence[bytes], *, synced: bool = False) -> None:
        image = self._image()
        # copies: what the process changes in its own afterwards is not on the disk
        entry = _Hints(tuple(map(copy, hints)), tuple(gone))
        self._disk.append(entry)
        image.apply(entry)
        if synced:
            await self._synced()

    async def load_hints(self, start: bytes, limit: int) -> HintPage:
        return HintPage(list(map(copy, self._image().hints.values())), [], b"")
