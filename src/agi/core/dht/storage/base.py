"""What a node needs from a store of its records, and the law that every backend keeps.

A backend maps key bytes to packed records (protocol/record.py) and never looks at versions: merging is the replica's
work, done before it calls `apply`. A backend may not alter, drop or reorder what it was given.

The law of durability: when `apply` returns, the batch has reached the operating system (RocksDB: its WAL, by write());
it is applied as a whole or not at all. With `wal_sync: group` it also has reached the disk. `write` followed by `sync`
is the same in two steps, so that the replica can put many writers behind one sync (group commit).

Stores in this process set `local = True`: they answer `read`, `headers` and `write` at once, in the caller's thread,
without a coroutine; the node's hot path uses only these and `sync`. Others (Redis) leave `local = False` and are used
through the async methods alone.
"""

from __future__ import annotations

import abc
import asyncio
import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from agi.core.dht.protocol.hints import Hint


class WalSync(enum.StrEnum):
    """When an acknowledged write is on the disk itself. It is always in the WAL, so kill -9 never loses it."""

    GROUP = "group"
    """Before the acknowledgement: one fsync for all writes at hand."""
    INTERVAL = "interval"
    """Within `wal_sync_interval_ms`, in the background: power loss may take that much."""
    NONE = "none"
    """When the operating system sees fit."""


@dataclass(slots=True)
class Batch:
    """Records to store, at most one per key. One batch is one atomic write.

    Attributes:
        records: key -> packed record.
        inserts: those of the keys that the store did not hold before (they enter the key index; the others are there).
        purges: keys to remove altogether, header included. Their promises stay.
        promises: key -> packed promise of PROMISE_BYTES; b"" removes it. They need no record of their key.
    """

    records: dict[bytes, bytes] = field(default_factory=dict)
    inserts: list[bytes] = field(default_factory=list)
    purges: list[bytes] = field(default_factory=list)
    promises: dict[bytes, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Count:
    """How many records (tombstones included) a store holds; `exact` is False for an engine's estimate."""

    records: int
    exact: bool


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Numbers for `/metrics` and `status`. `bytes` is what the records take, on disk or in memory."""

    records: int
    exact: bool
    bytes: int
    engine: dict[str, int]


@dataclass(frozen=True, slots=True)
class Page:
    """Part of a scan, in its order. `complete`: the store holds nothing more in the range."""

    items: list[tuple[bytes, bytes]]
    complete: bool


@dataclass(frozen=True, slots=True)
class HintPage:
    """Some of a store's hints, in any order, one perhaps on two pages.

    Attributes:
        damaged: names under which something lies that fails its checksum.
        next: where the next page begins; empty where nothing is left.
    """

    hints: list[Hint]
    damaged: list[bytes]
    next: bytes


@dataclass(frozen=True, slots=True)
class PromisePage:
    """Some of a store's promises, in any order, one perhaps on two pages; a page may be empty before the last.

    Attributes:
        items: (key, promise).
        next: where the next page begins; empty where nothing is left.
    """

    items: list[tuple[bytes, bytes]]
    next: bytes


SyncDone = Callable[[Exception | None], None]


class StorageBackend(abc.ABC):
    """Async and batch-oriented. Keys are 1 to 1024 bytes; records are packed. All methods raise StorageError kinds."""

    name: str
    local: bool = True
    """Whether `read`, `headers`, `write` and `sync` may be used."""
    group_sync: bool = False
    """Whether a write counts as durable only after `sync` (wal_sync: group)."""
    persistent: bool = True
    """False for a store that forgets at exit: it takes a new disk id at every start."""
    voting_refusal: str = "this kind of store keeps no promises"
    """Why the node may not vote with what this store keeps; empty where it may. Known once the store is open."""

    @property
    def can_sync(self) -> bool:
        """Whether `sync` may be used, though plain writes may not wait for it."""
        return self.group_sync

    @abc.abstractmethod
    async def open(self) -> None:
        """Makes the store usable. Raises FolderUnusable, StorageCorrupt."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Syncs what is unsynced and lets go of the store. Closing twice is harmless."""

    async def get(self, key: bytes) -> bytes | None:
        """The record of one key, its checksum verified where it came from a disk or another process."""
        return (await self.get_many((key,)))[0]

    @abc.abstractmethod
    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The record of each key, in order; None where there is none. Raises StorageCorrupt."""

    @abc.abstractmethod
    async def apply(self, batch: Batch) -> None:
        """Stores a batch as the law above says."""

    @abc.abstractmethod
    async def scan(self, start: bytes, end: bytes | None, limit: int, bytes_max: int) -> Page:
        """Records with start <= key < end in key order, tombstones included: at most `limit` of them, and no more once
        their sizes exceed `bytes_max` (but at least one)."""

    @abc.abstractmethod
    async def scan_tokens(self, first: int, last: int, limit: int, after: bytes | None = None) -> Page:
        """Records whose key's token t has first <= t <= last (no wrapping), ordered by (token, key), at most `limit`;
        `after` is the last key of the page before. Costs O(result), not a scan of the store."""

    @abc.abstractmethod
    async def expired(self, before_ms: int, limit: int) -> list[tuple[bytes, bytes]]:
        """Up to `limit` (key, record) with 0 < expires < before_ms and not yet shrunk, soonest first. O(result)."""

    @abc.abstractmethod
    async def count(self) -> Count: ...

    @abc.abstractmethod
    async def stats(self) -> StoreStats: ...

    @abc.abstractmethod
    async def get_meta(self, name: str) -> bytes | None:
        """A small named value of the node (identity, topology): it lives and dies with the data."""

    @abc.abstractmethod
    async def put_meta(self, name: str, value: bytes) -> None:
        """Stores it, synced to the disk whatever `wal_sync` says."""

    # Hints for other nodes (protocol/hints.py): a space of its own beside the records.

    @abc.abstractmethod
    async def save_hints(self, hints: Sequence[Hint], gone: Sequence[bytes], *, synced: bool = False) -> None:
        """Keeps these hints, in place of others of the same names, and removes the names that are `gone`: all or
        nothing. kill -9 cannot undo it afterwards; power loss can, unless `synced`."""

    @abc.abstractmethod
    async def load_hints(self, start: bytes, limit: int) -> HintPage:
        """About `limit` of the hints; `start` is empty for the first page, then what the page before says. None may be
        saved meanwhile. Raises StorageCorrupt where the space as a whole cannot be read."""

    # Promises: what a key's acceptor may not accept any more. A space of its own beside the records.

    async def load_promises(self, start: bytes, limit: int) -> PromisePage:
        """About `limit` of the promises; `start` is empty for the first page, then what the page before says. None may
        be written meanwhile. Raises StorageCorrupt for any that is damaged: a promise that is forgotten is broken."""
        raise NotImplementedError(f"{self.name} keeps no promises")

    # The hot path of local stores.

    def read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """`get_many`, at once."""
        raise NotImplementedError(f"{self.name} is not a local store")

    def read_within(self, keys: Sequence[bytes], bytes_max: int) -> list[bytes | None]:
        """As `read`, and no further than to that many bytes: the first records, at least one. A store that has all in
        memory may return all."""
        return self.read(keys)

    def headers(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """At least the first HEADER bytes of each record: what a merge needs. Cheaper than `read` where it can be."""
        return self.read(keys)

    def write(self, batch: Batch) -> None:
        """Stores the batch so that kill -9 of this process cannot lose it, without waiting for the disk. After
        StorageFull nothing of it is stored, what was written before is whole and can still be synced, and later writes
        work again once there is space. Any other error but StorageClosed is final."""
        raise NotImplementedError(f"{self.name} is not a local store")

    def pause(self, seconds: float, done: SyncDone) -> None:
        """Calls `done` in the event loop after so long, or, once `sync` was called since, at any time."""
        asyncio.get_running_loop().call_later(seconds, done, None)

    def sync(self, done: SyncDone) -> None:
        """Brings all that was written to the disk, in a thread, whatever `wal_sync` says; calls `done(error)` in the
        event loop afterwards. Several may be under way, the store's own among them: they end in their order. After an
        error the store is unusable (PROTOCOLS D2)."""
        raise NotImplementedError(f"{self.name} is not a local store")
