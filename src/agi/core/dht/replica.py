"""One node's copy of its keys: merges what coordinators send and answers what it holds.

The laws it keeps: a reply leaves only when what it tells of is durable (PROTOCOLS D1, D2; protocol/commit.py); a record
never replaces a newer one, and the sender hears `superseded` (V2); a version far ahead of every clock here is refused
(V3, fresh writes only).

Every call is a batch and ends in `done`, called exactly once: at once where the store allows it, else after the sync or
the store's answer. A store in another process (Redis) goes through one worker, so that merges of a key cannot race.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from operator import gt
from typing import Any, TypeAlias, cast

import structlog

from agi.core.dht.clock import Clock
from agi.core.dht.committer import Committer, Parked
from agi.core.dht.errors import ClockSkew, DHTError, Overloaded, StorageError, from_wire
from agi.core.dht.observability.logs import Throttle
from agi.core.dht.observability.metrics import Metrics
from agi.core.dht.protocol.consensus import is_register, round_of, unvoted
from agi.core.dht.protocol.floors import Floors
from agi.core.dht.protocol.messages import FRESH, REPAIR, WireError
from agi.core.dht.protocol.record import (
    EXPIRES,
    FLAGS,
    HEADER,
    REGISTERED,
    expires_ms_of,
    height_of,
    hlc_of,
    is_live,
    shrink,
)
from agi.core.dht.protocol.versioning import HLC, physical_ms
from agi.core.dht.sessions import cut
from agi.core.dht.storage.base import Batch, Page, StorageBackend
from agi.core.dht.tasks import end
from agi.core.dht.types import BATCH_BYTES_MAX

_log = structlog.get_logger("agi.core.dht.replica")

REMOTE_QUEUE_MAX = 4096
"""Batches that may wait for a store in another process."""
REMOTE_READS_MAX = 256
"""Read batches under way at a store in another process."""
REMOTE_READ_KEYS = 64
"""Of a batch that are read at first, then four times as many each time: less often than the reply is full."""
STORE_TIMEOUT_S = 10.0
SWEEP, PURGE, FILL, DECIDE = -1, -2, -3, -4
"""Modes of writes beside those of messages: expired records shrink; records of these headers go; what a change of the
members brings here is stored however old it is; what is stored is decided by what is held."""

Superseded: TypeAlias = list[tuple[int, int]] | None
ReadDone: TypeAlias = Callable[[list[bytes | None], WireError | None], None]
WriteDone: TypeAlias = Callable[[Superseded, list[int] | None, WireError | None], None]
ScanDone: TypeAlias = Callable[[Page, WireError | None], None]
HeldDone: TypeAlias = Callable[[list[bytes | None], Collection[bytes], WireError | None], None]
Decide: TypeAlias = Callable[[list[bytes | None]], Batch]
"""Told what a store holds of some keys; returns what to store."""
Changed: TypeAlias = Callable[[list[bytes], Sequence[bytes | None], list[bytes]], None]


class Replica:
    """Drives one store.

    Args:
        hlc: the node's clock; every version that is stored here passes through it.
        max_clock_skew_ms: how far ahead a fresh version may be (V3), and how long after its expiry a record is shrunk
            (V4).
    """

    def __init__(
        self, store: StorageBackend, hlc: HLC, clock: Clock, metrics: Metrics, *, max_clock_skew_ms: int
    ) -> None:
        self.store = store
        self._hlc = hlc
        self._clock = clock
        self._metrics = metrics
        self._skew_ms = max_clock_skew_ms
        # registers are synced whatever `wal_sync` says (I2), so that every store that can sync has groups
        self._commit: Committer | None = None
        if store.local and store.can_sync:
            self._commit = Committer(store, clock, metrics, lambda error: self.on_store_failed(error))
        self._grouped = store.group_sync
        self._refusals = Throttle(1)
        self._queue: deque[tuple[int, list[bytes], list[bytes], bool, WriteDone, HeldDone | Decide | None]] = deque()
        self._queued = asyncio.Event()
        self._tasks: dict[asyncio.Task[None], None] = {}
        self.on_change: Changed | None = None
        """Told of keys whose records are about to change, of the headers that they had, and which had none."""
        self.promises: dict[bytes, bytes] = {}
        """Keys of which this node has promised more than it has accepted (acceptor.py): plain writes stay out (R1)."""
        self._applying: Collection[bytes] = ()
        self.floors = Floors()
        """What fresh writes, hints and repairs of old versions are judged by (G1)."""
        self.token_of: Callable[[bytes], int] = _no_token
        self.on_store_failed: Callable[[DHTError], None] = lambda error: None
        """Told once when the store can no longer be written (a failed sync)."""

    def start(self) -> None:
        if not self.store.local:
            self._spawn(self._remote_writer())

    async def stop(self) -> None:
        await end(self._tasks)

    def now_ms(self) -> int:
        """What fresh versions are judged by: the wall clock, or the newest version seen where that is ahead (V3)."""
        return max(self._clock.wall_ms(), physical_ms(self._hlc.last))

    def limit(self) -> int:
        """The greatest version that is not too far ahead of this node (V3)."""
        return self._hlc.limit(self._clock.wall_ms(), self._skew_ms)

    @property
    def unsynced(self) -> bool:
        return self._commit is not None and not self._commit.idle

    # --- reads

    def read_batch(self, keys: list[bytes], done: ReadDone) -> None:
        """As `read`, and no further than a reply has room for: the first records, at least one. Who asked asks again
        for the rest."""

        def cut_short(records: list[bytes | None], error: WireError | None) -> None:
            done(cut(records), error)

        self.read(keys, done if len(keys) == 1 else cut_short, bytes_max=BATCH_BYTES_MAX)

    def read(self, keys: list[bytes], done: ReadDone, *, mark: bool = True, bytes_max: int | None = None) -> None:
        """The record of each key, expired ones shrunk. `done` comes at once unless a key is unsynced (D2). Registers
        that this node has promised more for are marked, unless they are to be stored elsewhere. `bytes_max`: past so
        many the store need not read on."""
        self._metrics.replica_reads += len(keys)
        store = self.store
        if not store.local:
            self._read_remote(keys, done, mark, bytes_max)
            return
        commit = self._commit
        try:
            if commit is not None and commit.error is not None:
                raise commit.error  # what a failed sync left behind is not shown (D2)
            records = store.read(keys) if bytes_max is None else store.read_within(keys, bytes_max)
        except DHTError as error:
            done([], error.to_wire())
            return
        if len(records) < len(keys):
            keys = keys[: len(records)]
        if commit is None or commit.idle:
            done(self._normal(keys, records, mark), None)
            return
        seen = False
        overlay = commit.overlay
        for index, key in enumerate(keys):
            record = overlay(key)
            if record is not None:
                seen = True
                records[index] = record
        records = self._normal(keys, records, mark)
        if not seen:
            done(records, None)
            return
        try:
            commit.park(lambda error: done(records, None) if error is None else done([], error.to_wire()))
        except DHTError as error:
            done([], error.to_wire())

    def headers(self, keys: list[bytes]) -> list[bytes | None] | None:
        """At least the headers of what a merge would meet; None where the store cannot tell at once."""
        if not self.store.local:
            return None
        headers = self.store.headers(keys)
        commit = self._commit
        if commit is not None and not commit.idle:
            overlay = commit.overlay
            for index, key in enumerate(keys):
                record = overlay(key)
                if record is not None:
                    headers[index] = record
        return headers

    def held(self, keys: list[bytes], done: HeldDone) -> None:
        """At least the headers of what the store itself holds, expired records as they are, and which of the keys are
        about to change: merged, but not in the store yet."""
        if not self.store.local:
            self._enqueue(-1, keys, [], False, lambda *_: None, done)
            return
        try:
            headers = self.store.headers(keys)
        except DHTError as error:
            done([], (), error.to_wire())
            return
        done(headers, self.unsettled(), None)

    @property
    def asked(self) -> int:
        """Keys that were read or written here since the node started, whoever asked."""
        return self._metrics.replica_reads + self._metrics.replica_writes

    async def settle(self) -> None:
        """Returns when every write that was taken before this call is in the store, and synced where groups are. Raises
        StorageError kinds, TimeoutError."""
        settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def done(error: DHTError | None) -> None:
            if not settled.done():
                settled.set_result(None) if error is None else settled.set_exception(error)

        def held(headers: object, unsettled: object, error: WireError | None) -> None:
            done(None if error is None else from_wire(*error))

        commit = self._commit
        if not self.store.local:
            self._enqueue(-1, [b"\0"], [], False, lambda *_: None, held)
        elif commit is None or commit.idle:
            return
        else:
            commit.park(done)
        async with asyncio.timeout(STORE_TIMEOUT_S):
            await settled

    def unsettled(self) -> Collection[bytes]:
        """Keys that are about to change in the store."""
        return self._commit.waiting.keys() if self._commit is not None else self._applying

    async def scan(self, start: bytes, end: bytes, limit: int, bytes_max: int, done: ScanDone) -> None:
        """A page of records in key order, tombstones included."""
        try:
            async with asyncio.timeout(STORE_TIMEOUT_S):
                page = await self.store.scan(start, end or None, limit, bytes_max)
        except DHTError as error:
            done(Page([], False), error.to_wire())
            return
        except TimeoutError:
            done(Page([], False), StorageError("the store did not answer a scan in time").to_wire())
            return
        keys = [key for key, _ in page.items]

        def told(records: list[bytes | None], error: WireError | None) -> None:
            items = [(key, record) for key, record in zip(keys, records, strict=error is None) if record is not None]
            done(Page(items, page.complete and error is None), error)

        self.tell_scanned(keys, [record for _, record in page.items], told, mark=True)

    def tell_scanned(self, keys: list[bytes], records: list[bytes | None], done: ReadDone, *, mark: bool) -> None:
        """What a scan of the store has met, as `read` shows it, once it is synced."""
        records = self._normal(keys, records, mark)
        commit = self._commit
        if commit is None or (commit.error is None and (commit.idle or not any(map(commit.overlay, keys)))):
            done(records, None)
            return
        try:
            commit.park(lambda error: done(records, None) if error is None else done([], error.to_wire()))
        except DHTError as error:
            done([], error.to_wire())

    def _normal(self, keys: list[bytes], records: list[bytes | None], mark: bool) -> list[bytes | None]:
        """Expired records in their shrunk form, as every replica shows them once the skew has passed (V4)."""
        for index, record in enumerate(records):
            if record is not None and record[FLAGS] == EXPIRES:
                records[index] = self._shrunk(keys[index], record)
        if mark and self.promises:
            for index, key in enumerate(keys):
                record = records[index]
                if is_register(record) and round_of(record) < self.promises.get(key, b""):
                    records[index] = unvoted(record)
        return records

    def _shrunk(self, key: bytes, record: bytes) -> bytes:
        if record[FLAGS] == EXPIRES and expires_ms_of(record) + self._skew_ms < self._clock.wall_ms():
            return shrink(key, record)
        return record

    # --- writes

    def write(
        self,
        mode: int,
        keys: list[bytes],
        records: list[bytes],
        want_live: bool,
        done: WriteDone,
        headers: list[bytes | None] | None = None,
    ) -> None:
        """Merges these records. `headers` is what `headers(keys)` said in this same turn, where the caller knows it."""
        self._metrics.replica_writes += len(keys)
        if not self.store.local:
            self._write_remote(mode, keys, records, want_live, done)
            return
        commit = self._commit
        try:
            if commit is not None and commit.error is not None:
                raise commit.error
            if headers is None:
                headers = self.headers(keys)
                assert headers is not None
            merged, inserts, superseded, live = self._merge(mode, keys, records, headers, want_live)
            if merged:
                self._tell_change(keys, headers, merged, inserts)
            if commit is None or not (self._grouped or self._votes(merged, commit)):
                if merged:
                    self.store.write(Batch(merged, inserts))
                done(superseded, live, None)
            elif merged:
                commit.commit(merged, inserts, _written(done, superseded, live))
            elif commit.idle:
                done(superseded, live, None)
            else:  # what superseded it may be unsynced itself
                commit.park(_written(done, superseded, live))
        except DHTError as error:
            self._metrics.replica_errors += 1
            done(None, None, error.to_wire())

    @staticmethod
    def _votes(records: dict[bytes, bytes], commit: Committer) -> bool:
        """Whether these are synced however plain writes are: registers count as votes, and must not come before what
        is about to be stored of their keys."""
        return not commit.waiting.keys().isdisjoint(records) or any(map(is_register, records.values()))

    def _merge(
        self,
        mode: int,
        keys: list[bytes],
        records: list[bytes],
        headers: Sequence[bytes | None],
        want_live: bool,
    ) -> tuple[dict[bytes, bytes], list[bytes], Superseded, list[int] | None]:
        """What to store of a batch: (records, which of them are inserts, superseded, live). Raises ClockSkew."""
        now_ms = self._clock.wall_ms()
        newest = hlc_of(max(records))
        registers = newest >= REGISTERED
        if registers:
            newest = hlc_of(max((r for r in records if not is_register(r)), default=b"\0" * HEADER))
        if mode == FRESH and newest > self._hlc.limit(now_ms, self._skew_ms):
            self._refuse_skew(records, headers, now_ms)
        self._hlc.observe(newest)
        live = [i for i, header in enumerate(headers) if is_live(header, now_ms)] if want_live else None
        superseded: list[tuple[int, int]] = []
        skip: Collection[int] = ()
        if mode >= 0 and (registers or min(records) < self.floors.mark):
            skip = self._below_floors(mode, keys, records, headers, superseded)
        if self.promises and mode != FILL and not self.promises.keys().isdisjoint(keys):
            skip = self._promised(keys, records, superseded) | set(skip)
        merged = dict(zip(keys, records, strict=True))
        if len(merged) == len(keys) and not skip:
            if None not in headers:
                if all(map(gt, records, headers)):  # type: ignore[arg-type]  # no None among them
                    return merged, [], None, live
            elif not any(headers):
                return merged, keys, None, live
        merged = {}
        inserts: list[bytes] = []
        for index, (key, record, header) in enumerate(zip(keys, records, headers, strict=True)):
            if index in skip:
                continue
            known = merged.get(key, header)
            if known is None:
                inserts.append(key)
            elif known[:32] == record[:32]:
                continue  # the same write again
            elif known > record:
                superseded.append((index, hlc_of(known)))
                continue
            merged[key] = record
        self._metrics.replica_superseded += len(superseded)
        return merged, inserts, superseded or None, live

    def _tell_change(
        self, keys: list[bytes], headers: Sequence[bytes | None], merged: dict[bytes, bytes], inserts: list[bytes]
    ) -> None:
        if self.on_change is None:
            return
        if len(merged) < len(keys):  # without those of which nothing was taken: they may have no record at all
            changing = [(key, header) for key, header in zip(keys, headers, strict=True) if key in merged]
            keys, headers = [key for key, _ in changing], [header for _, header in changing]
        self.on_change(keys, headers, inserts)

    def _below_floors(
        self,
        mode: int,
        keys: list[bytes],
        records: list[bytes],
        headers: Sequence[bytes | None],
        superseded: list[tuple[int, int]],
    ) -> set[int]:
        """Which of the records come too late for their arcs' floors (protocol/floors.py)."""
        late = set()
        mark = self.floors.mark
        for index, (key, record, header) in enumerate(zip(keys, records, headers, strict=True)):
            if record >= mark and not is_register(record):
                continue
            height, hlc = self.floors.at(self.token_of(key)), height_of(hlc_of(record))
            if mode == REPAIR:
                # it was reclaimed: all replicas held it, or a newer one, when they closed; a plain record came after
                if hlc <= height.closed and (header is None or (is_register(record) and not is_register(header))):
                    late.add(index)
            elif hlc <= height.sealed:
                if mode == FRESH and (header is None or header[:32] != record[:32]):
                    superseded.append((index, max(height.sealed, 0 if header is None else hlc_of(header))))
                late.add(index)
        self._metrics.replica_below_floor += len(late)
        return late

    def _promised(self, keys: list[bytes], records: list[bytes], superseded: list[tuple[int, int]]) -> set[int]:
        """Which of the records a promise keeps out: plain ones, and what was accepted below it (R1, R2)."""
        out = set()
        for index, (key, record) in enumerate(zip(keys, records, strict=True)):
            promise = self.promises.get(key, b"")
            if promise and not (is_register(record) and round_of(record) >= promise):
                superseded.append((index, hlc_of(promise)))
                out.add(index)
        return out

    def _refuse_skew(self, records: Iterable[bytes], headers: Iterable[bytes | None], now_ms: int) -> None:
        limit = self._hlc.limit(now_ms, self._skew_ms)
        for record, header in zip(records, headers, strict=True):
            hlc = hlc_of(record)
            if hlc > limit and (header is None or hlc > hlc_of(header) + (self._skew_ms << 16)):
                ahead_s = ((hlc >> 16) - now_ms) / 1000
                if self._refusals.pass_(self._clock.monotonic()):
                    _log.error("clock_skew_refused", ahead_s=ahead_s, max_clock_skew_ms=self._skew_ms)
                raise ClockSkew(
                    f"the version is {ahead_s:.1f} s ahead of this replica's clock; "
                    f"at most {self._skew_ms} ms are taken"
                )

    # --- registers (acceptor.py)

    def decide(self, keys: list[bytes], decide: Decide, done: Parked, *, values: bool) -> None:
        """Stores what `decide` makes of what is held of these keys, at least the headers, or with their `values`;
        `done` once that, and all that it was told, is durable. Raises nothing."""
        if not self.store.local:
            self._enqueue(
                DECIDE, keys, [], False, lambda _, __, error: done(None if error is None else from_wire(*error)), decide
            )
            return
        commit = self._commit
        try:
            if commit is not None and commit.error is not None:
                raise commit.error
            records = self.store.read(keys) if values else self.store.headers(keys)
            if commit is not None and not commit.idle:
                for index, key in enumerate(keys):
                    unsynced = commit.overlay(key)
                    if unsynced is not None:
                        records[index] = unsynced
            batch = decide(records)
            changes = bool(batch.records or batch.promises)
            if batch.records:
                self._tell_change(keys, records, batch.records, batch.inserts)
            self._tell_purge(keys, records, batch.purges)
            if commit is None:
                if changes:
                    self.store.write(batch)
                done(None)
            elif changes:
                if batch.purges:  # with what is promised for it, and before that departs, which has it synced
                    self.store.write(Batch(purges=batch.purges, promises=batch.promises))
                commit.commit(batch.records, batch.inserts, done, batch.promises)
            elif commit.idle:
                done(None)
            else:
                commit.park(done)
        except DHTError as error:
            self._metrics.replica_errors += 1
            done(error)

    def _tell_purge(self, keys: list[bytes], records: Sequence[bytes | None], purges: list[bytes]) -> None:
        if purges and self.on_change is not None:
            self.on_change(purges, list(map(dict(zip(keys, records, strict=True)).get, purges)), [])

    # --- expiry (V4, G3)

    async def keep_swept(self, interval_s: float, step: int) -> None:
        """Sweeps at this interval, for ever."""
        while True:
            await asyncio.sleep(interval_s)
            try:
                await self.sweep(step)
            except (DHTError, TimeoutError) as error:
                _log.warning("sweep_failed", error=str(error))

    async def sweep(self, step: int) -> int:
        """Shrinks up to `step` records that have been expired for longer than the clock skew; returns how many."""
        async with asyncio.timeout(STORE_TIMEOUT_S):
            found = await self.store.expired(self._clock.wall_ms() - self._skew_ms, step)
        if not found:
            return 0
        keys = [key for key, _ in found]
        records = [shrink(key, record) for key, record in found]
        swept = asyncio.get_running_loop().create_future()

        def done(superseded: Superseded, live: list[int] | None, error: WireError | None) -> None:
            if not swept.done():
                swept.set_result(error)

        self.write(SWEEP, keys, records, False, done)
        async with asyncio.timeout(STORE_TIMEOUT_S):
            error = await swept
        if error is not None:
            raise StorageError(error[1])
        self._metrics.expired_shrunk += len(keys)
        return len(keys)

    # --- purging (G1)

    async def purge(self, keys: list[bytes], records: list[bytes], allowed: Callable[[], bool] = lambda: True) -> int:
        """Removes these records altogether, but for those that have changed, or whose last write is under way still;
        returns how many. Nothing if it is not `allowed` at that moment. Raises StorageError kinds, TimeoutError."""
        if self.store.local:
            commit = self._commit
            if commit is not None and commit.error is not None:
                raise commit.error
            headers = self.store.headers(keys)
            if commit is not None and not commit.idle:  # the next write of such a key takes it to be there
                headers = [None if commit.overlay(key) is not None else h for key, h in zip(keys, headers, strict=True)]
            purges = _unchanged(keys, records, headers) if allowed() else {}
            if purges:
                if self.on_change is not None:
                    self.on_change(list(purges), list(purges.values()), [])
                self.store.write(Batch(purges=list(purges)))
            return len(purges)
        purged: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def done(count: Superseded, live: list[int] | None, error: WireError | None) -> None:
            if not purged.done():
                purged.set_result(len(live or ())) if error is None else purged.set_exception(from_wire(*error))

        if not allowed():
            return 0
        self._enqueue(PURGE, keys, records, False, done, None)
        async with asyncio.timeout(STORE_TIMEOUT_S):
            return await purged

    # --- a store in another process

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(coroutine)
        self._tasks[task] = None
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.critical("replica_task_failed", error=repr(error))
            self.on_store_failed(StorageError(f"the store's worker ended: {error!r}"))

    def _read_remote(self, keys: list[bytes], done: ReadDone, mark: bool, bytes_max: int | None) -> None:
        if len(self._tasks) > REMOTE_READS_MAX:
            done([], Overloaded(f"{len(self._tasks)} reads wait for the store already").to_wire())
            return
        self._spawn(self._read_remote_task(keys, done, mark, bytes_max))

    async def _read_remote_task(self, keys: list[bytes], done: ReadDone, mark: bool, bytes_max: int | None) -> None:
        step = len(keys) if bytes_max is None else REMOTE_READ_KEYS
        records: list[bytes | None] = []
        try:
            async with asyncio.timeout(STORE_TIMEOUT_S):
                while len(records) < len(keys):
                    records += await self.store.get_many(keys[len(records) : len(records) + step])
                    if bytes_max is not None and sum(map(len, filter(None, records))) > bytes_max:
                        break
                    step *= 4
        except DHTError as error:
            done([], error.to_wire())
        except TimeoutError:
            done([], StorageError("the store did not answer in time").to_wire())
        else:
            done(self._normal(keys, records, mark), None)

    def _write_remote(
        self, mode: int, keys: list[bytes], records: list[bytes], want_live: bool, done: WriteDone
    ) -> None:
        self._enqueue(mode, keys, records, want_live, done, None)

    def _enqueue(
        self,
        mode: int,
        keys: list[bytes],
        records: list[bytes],
        want_live: bool,
        done: WriteDone,
        held: HeldDone | Decide | None,
    ) -> None:
        if len(self._queue) >= REMOTE_QUEUE_MAX:
            full = Overloaded(f"{len(self._queue)} writes wait for the store already").to_wire()
            if held is not None and mode != DECIDE:
                cast(HeldDone, held)([], (), full)
            else:
                done(None, None, full)
            return
        self._queue.append((mode, keys, records, want_live, done, held))
        self._queued.set()

    async def _purge_remote(
        self, keys: list[bytes], records: list[bytes], headers: Sequence[bytes | None]
    ) -> list[int]:
        purges = _unchanged(keys, records, headers)
        if purges:
            if self.on_change is not None:
                self.on_change(list(purges), list(purges.values()), [])
            self._applying = keys
            await self.store.apply(Batch(purges=list(purges)))
        return list(range(len(purges)))

    async def _decide_remote(self, keys: list[bytes], records: list[bytes | None], decide: Decide) -> None:
        batch = decide(records)
        if batch.records:
            self._tell_change(keys, records, batch.records, batch.inserts)
        self._tell_purge(keys, records, batch.purges)
        if batch.records or batch.promises:
            self._applying = keys
            await self.store.apply(batch)

    async def _remote_writer(self) -> None:
        while True:
            await self._queued.wait()
            self._queued.clear()
            while self._queue:
                mode, keys, records, want_live, done, held = self._queue.popleft()
                superseded, live = None, None
                failure: WireError | None = None
                headers: list[bytes | None] = []
                try:
                    async with asyncio.timeout(STORE_TIMEOUT_S):
                        headers = await self.store.get_many(keys)
                        if mode == PURGE:
                            live = await self._purge_remote(keys, records, headers)
                        elif mode == DECIDE:
                            await self._decide_remote(keys, headers, cast(Decide, held))
                        elif held is None:
                            merged, inserts, superseded, live = self._merge(mode, keys, records, headers, want_live)
                            if merged:
                                self._tell_change(keys, headers, merged, inserts)
                                self._applying = keys
                                await self.store.apply(Batch(merged, inserts))
                except DHTError as error:
                    self._metrics.replica_errors += 1
                    failure = error.to_wire()
                except TimeoutError:
                    failure = StorageError("the store did not answer in time").to_wire()
                self._applying = ()
                if held is not None and mode != DECIDE:
                    cast(HeldDone, held)(headers, (), failure)
                elif failure is not None:
                    done(None, None, failure)
                else:
                    done(superseded, live, None)


def _no_token(key: bytes) -> int:
    raise AssertionError("the node has not formed")


def _unchanged(keys: list[bytes], records: list[bytes], headers: Sequence[bytes | None]) -> dict[bytes, bytes]:
    """Those of the keys that still hold these records, with their headers."""
    return {
        key: header
        for key, record, header in zip(keys, records, headers, strict=True)
        if header is not None and header[:HEADER] == record[:HEADER]
    }


def _written(done: WriteDone, superseded: Superseded, live: list[int] | None) -> Parked:
    return lambda error: done(superseded, live, None) if error is None else done(None, None, error.to_wire())
