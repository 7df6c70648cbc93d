"""How this project opens RocksDB: six column families, memory within a budget, and typed errors.

    default   token (8 bytes) || key   ->  record        sequential by ring position
    keys      key                      ->  empty         written on insert and purge only: ordered scans
    expiry    expires_ms (8) || key    ->  empty         records with a TTL only; stale entries are dropped when met
    meta      name                     ->  xxh3 || value
    hints     target tag || key        ->  packed hint   protocol/hints.py
    promises  key                      ->  xxh3 || 16 B  storage/promises.py; written by consensus only

A folder made before it had one of them gets it.

One write-ahead log covers all of them, so a batch is whole or absent.

Memory is bounded: block cache with index and filter blocks in it, write buffers of all families together, a table cache
of open_files_max() files. Measured with 10^6 records of 100-byte values and `cache_size_mb` 64: loading, a full scan
and 200,000 random reads raised the process by 80 MiB; both caches were full by then.
"""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path

import rocksdict
from rocksdict import BlockBasedOptions, Cache, DBCompressionType, DBRecoveryMode, Options, Rdict

from agi.core.dht.errors import FolderUnusable, StorageClosed, StorageCorrupt, StorageError, StorageFull
from agi.core.dht.storage import wal_files

MIB = 1024 * 1024
WRITE_BUFFERS_BYTES = 24 * MIB
"""Memtables of all families together. More means fewer flushes, and more to replay after a crash."""
DATA_BUFFER_BYTES = 8 * MIB
KEYS_BUFFER_BYTES = 4 * MIB
HINTS_BUFFER_BYTES = 4 * MIB
SMALL_BUFFER_BYTES = 1 * MIB
WAL_BYTES_MAX = 64 * MIB
"""Past this the families that hold the oldest log back are flushed. Bounds the replay, and the space to resume."""
OPEN_FILES_LEAST, OPEN_FILES_MOST = 256, 2048
"""Past them a read may have to open its file anew, which costs three times the read: 2048 hold 64 GB."""
FILE_BYTES = 32 * MIB
BLOOM_BITS_PER_KEY = 10
SLOWDOWN_FILES, STOP_FILES = 32, 48
"""Level 0 files at which RocksDB delays and then blocks writers, and with them the event loop."""

KEYS, EXPIRY, META, HINTS, PROMISES = "keys", "expiry", "meta", "hints", "promises"

_FULL = ("No space left", "Disk quota exceeded", "NoSpace", "SpaceLimit")
_UNUSABLE = ("lock hold", "While lock file", "Permission denied", "Read-only file system", "Not a directory")


def open_files_max() -> int:
    """A quarter of what this process may open, within bounds: links need the rest."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY:
        return OPEN_FILES_MOST
    return min(max(allowed // 4, OPEN_FILES_LEAST), OPEN_FILES_MOST)


def as_storage_error(error: BaseException, doing: str, *, opening: bool = False) -> StorageError:
    """The typed error of what rocksdict or the file system raised. rocksdict tells kinds by text only."""
    if isinstance(error, StorageError):
        return error
    text = str(error)
    message = f"{doing}: {text}"
    if isinstance(error, rocksdict.DbClosedError):
        return StorageClosed(message)
    if any(sign in text for sign in _FULL):
        return StorageFull(message)
    if text.startswith("Corruption") or "orruption:" in text:
        return StorageCorrupt(message)
    if opening:
        if any(sign in text for sign in _UNUSABLE) or isinstance(error, PermissionError | NotADirectoryError):
            return FolderUnusable(message)
        if "No such file" in text or "does not match" in text or text.startswith("Invalid argument"):
            return StorageCorrupt(message)  # the folder was made before: a file of the store is missing
    return StorageError(message)


def _table(cache: Cache, *, bloom: bool) -> BlockBasedOptions:
    table = BlockBasedOptions()
    table.set_block_cache(cache)
    table.set_block_size(8 * 1024)
    table.set_format_version(5)
    # Index and filter blocks count within the cache: memory stays bounded however large the store grows.
    table.set_cache_index_and_filter_blocks(True)
    table.set_pin_l0_filter_and_index_blocks_in_cache(True)
    if bloom:
        table.set_bloom_filter(BLOOM_BITS_PER_KEY, False)
    return table


def _family(cache: Cache, buffer_bytes: int, *, bloom: bool = False) -> Options:
    options = Options(raw_mode=True)
    options.set_block_based_table_factory(_table(cache, bloom=bloom))
    options.set_write_buffer_size(buffer_bytes)
    options.set_max_write_buffer_number(4)
    options.set_level_compaction_dynamic_level_bytes(True)
    options.set_target_file_size_base(FILE_BYTES)
    options.set_max_bytes_for_level_base(64 * MIB)
    options.set_level_zero_slowdown_writes_trigger(SLOWDOWN_FILES)
    options.set_level_zero_stop_writes_trigger(STOP_FILES)
    options.set_compression_type(DBCompressionType.lz4())
    return options


def _options(cache: Cache) -> Options:
    options = _family(cache, DATA_BUFFER_BYTES, bloom=True)
    options.create_if_missing(True)
    options.create_missing_column_families(True)
    options.set_paranoid_checks(True)
    # Anything but a torn last write is an error, not a silent loss (wal_files.py closes its two holes).
    options.set_wal_recovery_mode(DBRecoveryMode.tolerate_corrupted_tail_records())
    options.set_db_write_buffer_size(WRITE_BUFFERS_BYTES)
    options.set_max_total_wal_size(WAL_BYTES_MAX)
    options.set_max_open_files(open_files_max())
    options.set_max_background_jobs(2)
    options.set_bytes_per_sync(MIB)
    options.set_skip_stats_update_on_db_open(True)
    options.set_stats_dump_period_sec(0)
    options.set_stats_persist_period_sec(0)
    options.set_keep_log_file_num(4)
    options.set_max_log_file_size(4 * MIB)
    return options


class Engine:
    """An open database and the handles of its families; they must go before it can be closed."""

    def __init__(self, folder: Path, cache_bytes: int) -> None:
        """Opens it. rocksdict holds the GIL meanwhile: 50 ms, and about 1 s for 100 MB of log after a crash.

        Raises FolderUnusable, StorageCorrupt, StorageFull.
        """
        try:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                what = "it is not a folder" if isinstance(error, FileExistsError) else error.strerror
                raise FolderUnusable(f"cannot make the folder {folder}: {what}") from error
            if not os.access(folder, os.W_OK | os.X_OK):
                raise FolderUnusable(f"{folder} is not writable")
            wal_files.check(folder)
            cache = Cache(cache_bytes)
            families = {
                KEYS: _family(cache, KEYS_BUFFER_BYTES),
                EXPIRY: _family(cache, SMALL_BUFFER_BYTES),
                META: _family(cache, SMALL_BUFFER_BYTES),
                HINTS: _family(cache, HINTS_BUFFER_BYTES),
                PROMISES: _family(cache, SMALL_BUFFER_BYTES),
            }
            self.db = Rdict(str(folder), _options(cache), column_families=families)
            try:
                found = map(self.db.get_column_family, families)
                self.keys, self.expiry, self.meta, self.hints, self.promises = found
                handles = map(self.db.get_column_family_handle, families)
                self.keys_handle, self.expiry_handle, self.meta_handle, self.hints_handle, self.promises_handle = (
                    handles
                )
            except Exception:
                self.db.close()
                raise
        except Exception as error:
            raise as_storage_error(error, f"cannot open {folder}", opening=True) from error
        self.cache = cache
        self._families = (self.keys, self.expiry, self.meta, self.hints, self.promises, self.db)

    def close(self) -> None:
        """Flushes the memtables and lets go of the folder, which is free again even where this raises."""
        del self.keys_handle, self.expiry_handle, self.meta_handle, self.hints_handle, self.promises_handle
        errors: list[Exception] = []
        for family in self._families:
            try:
                family.close()
            except rocksdict.DbClosedError:
                continue
            except Exception as error:  # noqa: BLE001 - one that cannot be flushed must not keep the others open
                errors.append(error)
        if errors:
            raise errors[0]

    def flush(self) -> None:
        """Writes the memtables of all families to files; other threads run meanwhile."""
        for family in self._families:
            family.flush(True)

    def close_failed(self) -> None:
        """`close` after a failed append: it lets go of the folder, but cannot flush. The log has all that it would."""
        with contextlib.suppress(Exception):
            self.close()

    def numbers(self) -> dict[str, int]:
        """RocksDB's own figures, summed over the families."""
        names = {
            "sst_bytes": "rocksdb.total-sst-files-size",
            "memtable_bytes": "rocksdb.cur-size-all-mem-tables",
            "pending_compaction_bytes": "rocksdb.estimate-pending-compaction-bytes",
        }
        found = {
            name: sum(family.property_int_value(key) or 0 for family in self._families) for name, key in names.items()
        }
        found["background_errors"] = self.db.property_int_value("rocksdb.background-errors") or 0
        return found
