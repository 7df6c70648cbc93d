"""The store on RocksDB: the default of a node.

`write` puts a batch into the write-ahead log by write(), so kill -9 cannot lose it, and returns without waiting for the
disk. `sync` is one `flush_wal(sync)` in the store's own thread, which runs without the GIL: the node puts many writes
behind one of them (group commit). After a failed sync nobody knows what the disk holds: the store then refuses writes
and syncs for good, and only reads go on (PROTOCOLS D2).

A full disk is another matter: the append failed, what was written before it is whole. Writes raise StorageFull, reads
go on, and a sync fsyncs the log files themselves, since RocksDB refuses to. RocksDB's log writer never recovers from a
failed append, so the store reopens the database, at most once a RESUME_INTERVAL_S and only with room for what a replay
writes; from then on writes work again. A torn append at the log's end is dropped then: it was never acknowledged.

Every record's checksum is verified when it comes from RocksDB. `headers` and `read` look into a cache of records first
(a quarter of `cache_size_mb`; the rest is RocksDB's block cache). Point reads are used for any number of keys: for 1,
10 and 1000 keys they measured 1.04, 0.82 and 0.99 us a key, RocksDB's multi-get 1.26, 0.81 and 1.29.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import xxhash
from rocksdict import Checkpoint, WriteBatch

from agi.core.dht.errors import Overloaded, StorageClosed, StorageCorrupt, StorageError, StorageFull
from agi.core.dht.protocol.hints import Hint, pack_hint, unpack_hint
from agi.core.dht.protocol.record import FLAGS, SHRUNK, verify
from agi.core.dht.storage import wal_files
from agi.core.dht.storage.base import (
    Batch,
    Count,
    HintPage,
    Page,
    PromisePage,
    StorageBackend,
    StoreStats,
    SyncDone,
    WalSync,
)
from agi.core.dht.storage.promises import check_promises, pack_promise, unpack_promise
from agi.core.dht.storage.record_cache import RecordCache
from agi.core.dht.storage.rocksdb_engine import MIB, Engine, as_storage_error
from agi.core.dht.storage.rocksdb_scan import CHUNK_ITEMS_MAX, Scanner, walk
from agi.core.dht.storage.sync_thread import SyncThread

EXPIRY_STALE_MAX = 1024
"""Stale expiry entries that one `expired` call looks at and drops, beyond its limit."""
SYNC_TIMEOUT_S = 30.0
CHECKPOINT_TIMEOUT_S = 300.0
CLOSE_TIMEOUT_S = 60.0
RESUME_INTERVAL_S = 1.0
RESUME_SPARE_BYTES = 2 * MIB
"""Free space needed to reopen after a full disk, beyond the size of the logs that are replayed."""
_COUNT = b"count"
_NAMED = b"named:"
_NO_EXPIRY = bytes(8)


class RocksStore(StorageBackend):
    """Records in a folder of their own.

    Args:
        path: the folder; made if missing.
        token_of: the 8 big-endian bytes of a key's ring token. One folder always needs the same function.
        wal_sync: when a write is on the disk itself.
        wal_sync_interval_ms: for `WalSync.INTERVAL`: power loss may take this much. Lower costs an fsync each time.
        cache_size_mb: memory for cached records and blocks, in MiB. RocksDB's write buffers add up to 24 MiB to it.
    """

    name = "rocksdb"
    local = True
    persistent = True
    voting_refusal = ""  # `sync` brings promises to the disk, whatever wal_sync says

    def __init__(
        self,
        path: str | os.PathLike[str],
        token_of: Callable[[bytes], bytes],
        *,
        wal_sync: WalSync = WalSync.GROUP,
        wal_sync_interval_ms: int = 100,
        cache_size_mb: int = 64,
    ) -> None:
        self._folder = Path(path)
        self._token_of = token_of
        self._wal_sync = wal_sync
        self._interval_s = wal_sync_interval_ms / 1000
        self._block_cache_bytes = cache_size_mb * MIB * 3 // 4
        self._cache = RecordCache(cache_size_mb * MIB // 4)
        self.group_sync = wal_sync is WalSync.GROUP
        self._engine: Engine | None = None
        self._thread: SyncThread | None = None
        self._refusal: StorageError | None = StorageClosed("the store is not open")
        self._sync_error: StorageError | None = None
        self._scanner = Scanner(self._open_engine, token_of)
        self._reset()

    def _reset(self) -> None:
        self._cache.clear()
        self._resume_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._dirty = False
        self._records = 0
        self._recount: asyncio.Task[None] | None = None
        self._recounted: bytes | None = None  # how far the recount got; None when the count is exact
        self._recount_failed = False
        self._expiry_floor = b""  # no expiry entry lies below
        self._checkpoint_lock = asyncio.Lock()

    @property
    def can_sync(self) -> bool:
        return True

    # --- opening and closing

    async def open(self) -> None:
        if self._thread is not None:
            return
        engine = Engine(self._folder, self._block_cache_bytes)
        self._reset()
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._thread = SyncThread(f"sync {self._folder.name}")
        self._refusal = self._sync_error = None
        stored = engine.meta.get(_COUNT)
        if stored is not None:
            # Its absence marks a crash. If power loss undoes this delete, it undoes all later writes with it.
            engine.meta.delete(_COUNT)
            self._records = int.from_bytes(stored, "big")
        else:
            self._recounted = b""
            if self._count_chunk():
                self._recount = self._loop.create_task(self._count_keys(), name=f"recount {self._folder.name}")
        if self._wal_sync is WalSync.INTERVAL:
            self._timer = self._loop.call_later(self._interval_s, self._interval_sync)

    async def close(self) -> None:
        thread, self._thread = self._thread, None
        if thread is None:
            return
        if self._timer is not None:
            self._timer.cancel()
        if self._recount is not None:
            self._recount.cancel()
        try:
            async with asyncio.timeout(CHECKPOINT_TIMEOUT_S), self._checkpoint_lock:
                refusal, self._refusal = self._refusal, StorageClosed("the store is closed")
                engine, self._engine = self._engine, None
                if engine is not None:
                    exact = self._recounted is None and refusal is None
                    work = partial(self._shut, engine, self._records if exact else None)
                    await thread.run(work, CLOSE_TIMEOUT_S, "closing the store")
        except TimeoutError:
            raise StorageError(f"a copy of the store still runs after {CHECKPOINT_TIMEOUT_S:g} s") from None
        finally:
            thread.stop()
            self._cache.clear()

    def _shut(self, engine: Engine, count: int | None) -> None:
        failed = self._sync_error is not None
        try:
            if count is not None:
                engine.meta.put(_COUNT, count.to_bytes(8, "big"))
            if not failed:
                self._flush_wal(engine)
        except Exception as error:
            raise as_storage_error(error, "cannot close the store") from error
        finally:
            try:
                engine.close()
            except Exception as error:
                # One that refused writes cannot flush its memtables; all that it acknowledged is in its log.
                if count is not None:
                    raise as_storage_error(error, "cannot close the store") from error

    def _open_engine(self) -> Engine:
        engine = self._engine
        if engine is None:
            raise self._again(self._refusal or StorageClosed("the store is not open"))
        return engine

    @staticmethod
    def _again(refusal: StorageError) -> StorageError:
        """A fresh copy: one exception object raised many times would gather their tracebacks."""
        return type(refusal)(refusal.message)

    # --- the hot path

    def read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        found: list[bytes | None] = list(map(self._cache.young.get, keys))
        if all(found) and self._engine is not None:
            return found
        return self._read_cold(keys, found)

    headers = read

    def read_within(self, keys: Sequence[bytes], bytes_max: int) -> list[bytes | None]:
        found: list[bytes | None] = list(map(self._cache.young.get, keys))
        if all(found) and self._engine is not None:
            return found
        return self._read_cold(keys, found, bytes_max)

    def _read_cold(
        self, keys: Sequence[bytes], found: list[bytes | None], bytes_max: int | None = None
    ) -> list[bytes | None]:
        size = 0
        get, token_of, old = self._open_engine().db.get, self._token_of, self._cache.old
        warmed: dict[bytes, bytes] = {}
        try:
            for at, record in enumerate(found):
                if record is None:
                    key = keys[at]
                    record = old(key)
                    if record is None:
                        record = get(token_of(key) + key)
                        if record is None:
                            continue
                        verify(key, record)
                    warmed[key] = found[at] = record
                    size += len(record)
                    if bytes_max is not None and size > bytes_max:  # what is cached already costs no reading
                        del found[at + 1 :]
                        break
        except Exception as error:
            raise as_storage_error(error, "a read failed") from error
        self._cache.put(warmed)
        return found

    def write(self, batch: Batch) -> None:
        if self._refusal is not None:
            self._resume()
        engine = self._open_engine()
        token_of, records = self._token_of, batch.records
        writes = WriteBatch(raw_mode=True)
        put = writes.put
        for key, record in records.items():
            put(token_of(key) + key, record)
            if record[32:40] != _NO_EXPIRY and not record[FLAGS] & SHRUNK:
                entry = record[32:40] + key
                put(entry, b"", engine.expiry_handle)
                if entry < self._expiry_floor:
                    self._expiry_floor = entry
        for key in batch.inserts:
            put(key, b"", engine.keys_handle)
        purged = self._purge(engine, writes, batch.purges) if batch.purges else ()
        if batch.promises:
            self._promise(engine, writes, batch.promises)
        try:
            engine.db.write(writes)
        except Exception as error:
            raise self._write_failed(error) from error
        self._dirty = True
        recounted = self._recounted
        if recounted is None:
            self._records += len(batch.inserts) - len(purged)
        else:  # what lies beyond the recount's position it will meet itself
            self._records += sum(key <= recounted for key in batch.inserts)
            self._records -= sum(key <= recounted for key in purged)
        self._cache.put(records)
        self._cache.drop(purged)

    def _purge(self, engine: Engine, writes: WriteBatch, keys: Sequence[bytes]) -> list[bytes]:
        """Adds the removal of those keys that are there. Their expiry entries are stale now, and dropped when met."""
        try:
            there = [key for key in dict.fromkeys(keys) if engine.keys.get(key) is not None]
        except Exception as error:
            raise as_storage_error(error, "a purge failed") from error
        for key in there:
            writes.delete(self._token_of(key) + key)
            writes.delete(key, engine.keys_handle)
        return there

    @staticmethod
    def _promise(engine: Engine, writes: WriteBatch, promises: dict[bytes, bytes]) -> None:
        check_promises(promises.values())
        for key, promise in promises.items():
            if promise:
                writes.put(key, pack_promise(key, promise), engine.promises_handle)
            else:
                writes.delete(key, engine.promises_handle)

    def _write_failed(self, error: BaseException) -> StorageError:
        failure = as_storage_error(error, "a write failed")
        if isinstance(failure, StorageFull):
            self._resume_at = self._loop.time() + RESUME_INTERVAL_S
        self._refusal = failure
        return self._again(failure)

    def _resume(self) -> None:
        """Reopens the database after a full disk, if there is room now. Raises what writes are refused with."""
        refusal = self._refusal
        assert refusal is not None
        now = self._loop.time() if self._thread is not None else 0.0
        if (
            self._thread is None
            or not isinstance(refusal, StorageFull)
            or now < self._resume_at
            or self._thread.pending
            or self._checkpoint_lock.locked()
        ):
            raise self._again(refusal)
        self._resume_at = now + RESUME_INTERVAL_S
        try:
            space = os.statvfs(self._folder)
            if space.f_bavail * space.f_frsize < wal_files.wal_bytes(self._folder) + RESUME_SPARE_BYTES:
                raise self._again(refusal)
            engine, self._engine = self._engine, None
            if engine is not None:
                engine.close_failed()
            self._engine = Engine(self._folder, self._block_cache_bytes)
        except Exception as error:
            self._refusal = as_storage_error(error, "cannot resume after a full disk")
            raise self._again(self._refusal) from error
        self._refusal = None

    # --- durability

    def pause(self, seconds: float, done: SyncDone) -> None:
        if self._thread is None:
            raise StorageClosed("the store is not open")
        self._thread.pause(seconds, done)

    def sync(self, done: SyncDone) -> None:
        self._submit_sync(done)

    def _submit_sync(self, done: SyncDone) -> None:
        if self._thread is None:
            raise StorageClosed("the store is not open")
        self._thread.submit(partial(self._flush_wal, self._open_engine()), done)
        self._dirty = False  # the thread works in order: whatever waits in it, this covers all that is written now

    def _flush_wal(self, engine: Engine) -> None:
        """In the sync thread. A failure is final: what was written before it may or may not be on the disk."""
        if self._sync_error is not None:
            raise self._again(self._sync_error)
        try:
            try:
                engine.db.flush_wal(True)
            except Exception as error:
                if "previous error" not in str(error):
                    raise
                # An append failed (a full disk), after which RocksDB syncs no more; what came before it is whole.
                wal_files.fsync_wal(self._folder)
        except Exception as error:
            failure = StorageError(f"a sync failed, the store takes no more writes: {error}")
            self._sync_error = self._refusal = failure
            raise self._again(failure) from error

    async def _synced(self) -> None:
        if self._thread is None:
            raise StorageClosed("the store is not open")
        await self._thread.run(partial(self._flush_wal, self._open_engine()), SYNC_TIMEOUT_S, "a sync")

    def _interval_sync(self) -> None:
        if self._thread is None or self._engine is None or not self._dirty:
            self._interval_synced(None)
            return
        try:
            self._submit_sync(self._interval_synced)
        except Overloaded:
            self._interval_synced(None)  # too many wait: again at the next turn

    def _interval_synced(self, error: Exception | None) -> None:
        # After an error `_flush_wal` has made every later write fail; there is nothing left to sync.
        if error is None and self._thread is not None:
            self._timer = self._loop.call_later(self._interval_s, self._interval_sync)

    # --- the rest

    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return self.read(keys)

    async def apply(self, batch: Batch) -> None:
        self.write(batch)
        if self.group_sync:
            await self._synced()

    async def scan(self, start: bytes, end: bytes | None, limit: int, bytes_max: int) -> Page:
        return await self._scanner.by_key(start, end, limit, bytes_max)

    async def scan_tokens(self, first: int, last: int, limit: int, after: bytes | None = None) -> Page:
        return await self._scanner.by_token(first, last, limit, after)

    async def expired(self, before_ms: int, limit: int) -> list[tuple[bytes, bytes]]:
        found: list[tuple[bytes, bytes]] = []
        bound = before_ms.to_bytes(8, "big")
        start = self._expiry_floor
        for _ in range(1 + (limit + EXPIRY_STALE_MAX) // CHUNK_ITEMS_MAX):
            stale: list[bytes] = []
            after = None
            for met, (entry, _value) in enumerate(walk(self._open_engine().expiry, start)):
                if met >= CHUNK_ITEMS_MAX or entry[:8] >= bound or len(found) >= limit:
                    after = entry
                    break
                key = entry[8:]
                record = self.read((key,))[0]
                if record is not None and record[32:40] == entry[:8] and not record[FLAGS] & SHRUNK:
                    found.append((key, record))
                else:
                    stale.append(entry)
            if not found and stale and self._expiry_floor == start:
                # The next call need not step over what is deleted here.
                self._expiry_floor = stale[-1] + b"\0" if after is None else after
            self._drop_expiry(stale)
            if after is None or after[:8] >= bound or len(found) >= limit:
                break
            start = after
            await asyncio.sleep(0)
        return found

    def _drop_expiry(self, entries: list[bytes]) -> None:
        """Removes stale entries; a store that takes no writes keeps them."""
        if not entries or self._refusal is not None:
            return
        engine = self._open_engine()
        writes = WriteBatch(raw_mode=True)
        for entry in entries:
            writes.delete(entry, engine.expiry_handle)
        try:
            engine.db.write(writes)
        except Exception as error:
            raise self._write_failed(error) from error

    async def _count_keys(self) -> None:
        while self._count_chunk():  # noqa: ASYNC110 - it works, and yields between the steps
            await asyncio.sleep(0)

    def _count_chunk(self) -> bool:
        """Counts on after a crash; whether there is more. Where it meets damage, which scans raise, `count` stays an
        estimate."""
        assert self._recounted is not None
        try:
            counted, self._recounted = self._scanner.count_chunk(self._recounted)
        except StorageError:
            self._recount_failed = True
            return False
        self._records += counted
        return self._recounted is not None

    def _count_now(self, engine: Engine) -> Count:
        if self._recounted is None:
            return Count(self._records, True)
        return Count(engine.keys.property_int_value("rocksdb.estimate-num-keys") or 0, False)

    async def count(self) -> Count:
        return self._count_now(self._open_engine())

    async def stats(self) -> StoreStats:
        engine = self._open_engine()
        count = self._count_now(engine)
        logs = wal_files.wal_bytes(self._folder)
        numbers = {
            "wal_bytes": logs,
            "block_cache_bytes": engine.cache.get_usage(),
            "cached_records": len(self._cache),
            "recount_failed": int(self._recount_failed),
            "refuses_writes": int(self._refusal is not None),
        } | engine.numbers()
        return StoreStats(count.records, count.exact, numbers["sst_bytes"] + logs, numbers)

    async def get_meta(self, name: str) -> bytes | None:
        engine = self._open_engine()
        try:
            stored = engine.meta.get(_NAMED + name.encode())
        except Exception as error:
            raise as_storage_error(error, "a read failed") from error
        if stored is None:
            return None
        value = bytes(stored[8:])
        if xxhash.xxh3_64_digest(value) != stored[:8]:
            raise StorageCorrupt(f"the node's value {name!r} fails its checksum")
        return value

    async def put_meta(self, name: str, value: bytes) -> None:
        if self._refusal is not None:
            self._resume()
        try:
            self._open_engine().meta.put(_NAMED + name.encode(), xxhash.xxh3_64_digest(value) + value)
        except Exception as error:
            raise self._write_failed(error) from error
        await self._synced()

    async def save_hints(self, hints: Sequence[Hint], gone: Sequence[bytes], *, synced: bool = False) -> None:
        if self._refusal is not None:
            self._resume()
        engine = self._open_engine()
        writes = WriteBatch(raw_mode=True)
        for hint in hints:
            writes.put(hint.name, pack_hint(hint), engine.hints_handle)
        for name in gone:
            writes.delete(name, engine.hints_handle)
        try:
            engine.db.write(writes)
        except Exception as error:
            raise self._write_failed(error) from error
        self._dirty = True
        if synced:
            await self._synced()

    async def load_hints(self, start: bytes, limit: int) -> HintPage:
        hints: list[Hint] = []
        damaged: list[bytes] = []
        for name, packed in walk(self._open_engine().hints, start):
            if len(hints) + len(damaged) >= limit:
                return HintPage(hints, damaged, name)
            try:
                hints.append(unpack_hint(name, packed))
            except StorageCorrupt:
                damaged.append(name)
        return HintPage(hints, damaged, b"")

    async def load_promises(self, start: bytes, limit: int) -> PromisePage:
        items: list[tuple[bytes, bytes]] = []
        for key, packed in walk(self._open_engine().promises, start):
            if len(items) >= limit:
                return PromisePage(items, key)
            items.append((key, unpack_promise(key, packed)))
        return PromisePage(items, b"")

    async def checkpoint(self, path: str | os.PathLike[str]) -> None:
        """A consistent copy of the open store in a new folder, its files hard links where that can be.

        The event loop goes on while memtables are flushed; rocksdict then holds the GIL for some milliseconds while it
        links the files. Raises StorageError kinds; the folder must not exist.
        """
        try:
            async with asyncio.timeout(CHECKPOINT_TIMEOUT_S), self._checkpoint_lock:
                await asyncio.to_thread(_checkpoint, self._open_engine(), os.fspath(path))
        except Exception as error:
            raise as_storage_error(error, f"cannot copy the store to {path}") from error


def _checkpoint(engine: Engine, path: str) -> None:
    engine.flush()
    Checkpoint(engine.db).create_checkpoint(path)
