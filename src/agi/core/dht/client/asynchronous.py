"""The asyncio client."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, Self

from agi.core.dht.client.batches import BATCH_KEYS_MAX, Batch, Gathered, Kind, OpenBatch, spans
from agi.core.dht.client.changes import MembershipCalls
from agi.core.dht.client.conditional import check_level, checked_version
from agi.core.dht.client.locks import LockCalls
from agi.core.dht.client.members import MemberStates, StatusCallback
from agi.core.dht.client.repairs import order_repairs
from agi.core.dht.client.scanning import scan_page
from agi.core.dht.client.session import Session
from agi.core.dht.clock import Clock, SystemClock
from agi.core.dht.errors import BatchError, ClientClosed, DHTError, InvalidRequest, Overloaded
from agi.core.dht.protocol.admission import Admission
from agi.core.dht.protocol.consensus import IF_VERSION, LOOK
from agi.core.dht.protocol.messages import Op, OpResult, Scan
from agi.core.dht.protocol.record import HEADER, created_ms_of, expires_ms_of, hlc_of
from agi.core.dht.protocol.versioning import physical_ms
from agi.core.dht.transport.base import Transport
from agi.core.dht.transport.grpc import GrpcTransport
from agi.core.dht.transport.native import NativeTransport
from agi.core.dht.types import (
    BATCH_BYTES_MAX,
    BULK_VALUE_BYTES,
    SCAN_LIMIT_MAX,
    Consistency,
    Entry,
    Fencing,
    check_value,
    encode_key,
    format_address,
    parse_address,
    ttl_to_ms,
)

TIMEOUT_S_MAX = 600.0
CALLS_LEAST = 4096
"""Calls, or keys of batches, that may be under way however slow the cluster is."""
HOLD_KEYS = 32
"""A batch of fewer calls waits while another of its kind is under way."""
HOLD_S = 0.001
"""But never longer, nor longer than half the time that small writes take: beside a disk a fuller frame is worth the
wait, beside memory it is not."""


class DHTClient(MembershipCalls, LockCalls):
    """A client of one cluster, for one event loop.

    Calls made in the same turn of the loop travel together, so `asyncio.gather` over many calls is nearly as fast as
    `get_many`. Every call ends by its timeout in a result or a typed error (errors.py).

    Args:
        cluster: refuse a cluster of another name; None takes the one found.
        timeout: seconds for a call that states none; None takes the cluster's `network.timeout_ms`.
        read_consistency, write_consistency: levels for calls that state none; None takes the cluster's.
        retry_count: tries beyond the first, for retryable errors within the timeout; None takes the cluster's
            `network.retry_count`.
        retry_unknown: repeat plain writes whose outcome is unknown. They may then take effect twice: safe for writes
            that are the same each time.
        connection_pool_size: links to each node; the last carries values from 128 KiB on.
        unix: use a node's Unix socket where it runs on this machine.
        queue_s: how long calls may wait for each other. Where more are made than the cluster answers, so that this
            grows on and on, new ones fail with Overloaded at once until what waits is answered within it again. A
            burst is no such case, nor are 4,096 calls under way.

    >>> async def example() -> None:
    ...     async with DHTClient() as client:
    ...         await client.connect(["localhost:7000"])
    ...         await client.put("greeting", b"hello", ttl_seconds=60)
    ...         assert await client.get("greeting") == b"hello"
    """

    def __init__(
        self,
        *,
        cluster: str | None = None,
        timeout: float | None = None,
        read_consistency: Consistency | str | None = None,
        write_consistency: Consistency | str | None = None,
        retry_count: int | None = None,
        retry_unknown: bool = False,
        connection_pool_size: int = 2,
        unix: bool = True,
        queue_s: float = 0.5,
        seed_transport: Transport | None = None,
        data_transport: Transport | None = None,
        clock: Clock | None = None,
        rng: random.Random | None = None,
    ) -> None:
        super().__init__()
        self._timeout = None if timeout is None else _check_timeout(timeout)
        self._read = None if read_consistency is None else Consistency.parse(read_consistency)
        self._write = None if write_consistency is None else Consistency.parse(write_consistency)
        if (retry_count is not None and retry_count < 0) or connection_pool_size < 1:
            raise InvalidRequest("retry_count is at least 0 and connection_pool_size at least 1")
        self._cluster = cluster or ""
        self._retry_count = retry_count
        self._retry_unknown = retry_unknown
        self._pool_size = connection_pool_size
        self._unix = unix
        self._admission = Admission(_check_timeout(queue_s), CALLS_LEAST)
        self._seed = seed_transport
        self._data = data_transport
        self._clock = clock or SystemClock()
        self._rng = rng or random.Random(secrets.randbits(64))
        self._session: Session | None = None
        self._members = MemberStates()
        self._gets: OpenBatch | None = None
        self._puts: OpenBatch | None = None
        self._others: dict[tuple[Kind, Consistency, int, float, bool], OpenBatch] = {}
        self._flushing = False
        self._held: asyncio.TimerHandle | None = None

    # --- life

    async def connect(self, addresses: Sequence[str], *, timeout: float = 10.0) -> None:
        """Finds the cluster: one live address is enough. Raises InvalidAddress, ConnectFailed, NotReady,
        HelloRefused."""
        if self._session is not None:
            raise InvalidRequest("the client is connected already")
        if isinstance(addresses, str) or not addresses:
            raise InvalidRequest("addresses is a list of host:port")
        known = [format_address(*parse_address(address)) for address in addresses]
        session = Session(
            self._seed or GrpcTransport(),
            self._data or NativeTransport(),
            self._clock,
            self._rng,
            cluster=self._cluster,
            pool_size=self._pool_size,
            retry_count=self._retry_count,
            retry_unknown=self._retry_unknown,
            unix=self._unix,
            on_settled=self._settled,
            on_members=self._members.learn,
        )
        self._loop = asyncio.get_running_loop()
        try:
            await session.open(known, self._clock.monotonic() + timeout)
        except BaseException:
            await session.close()
            raise
        self._session = session
        self._timeout_s = self._timeout if self._timeout is not None else session.topology["timeout_ms"] / 1000

    async def close(self) -> None:
        """Ends the connection; calls under way fail with ClientClosed. Closing twice is harmless."""
        if self._session is not None:
            self._flush(release=True)
            if self._held is not None:
                self._held.cancel()
            await self._end_locks()
            await self._session.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # --- single keys

    async def get(
        self,
        key: str,
        *,
        consistency: Consistency | str | None = None,
        timeout: float | None = None,
        fence: Fencing | None = None,
    ) -> bytes | None:
        """The value, or None where the key is absent, deleted or expired. With `fence` it is a step of its own among
        the key's writes: those of earlier holders of the lock are refused from then on.

        Raises InvalidKey, Unavailable; with a fence also WrongFence, FenceRejected, OutcomeUnknown.
        """
        if fence is not None:
            check_level(consistency)
            found = await self._look(key, timeout, fence)
            return None if found is None else found[HEADER:]
        raw = encode_key(key)
        if consistency is None and timeout is None:
            batch = self._gets
            if batch is None:
                batch = self._gets = self._open(Kind.GET, self._read or self._live().read_consistency, 0, None)
        else:
            batch = self._batch(Kind.GET, consistency, 0, timeout)
        batch.keys.append(raw)
        future = self._loop.create_future()
        batch.futures.append(future)
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)
        if len(batch.keys) >= BATCH_KEYS_MAX:
            self._flush()
        record: bytes | None = await future
        return None if record is None else record[HEADER:]

    async def get_entry(
        self,
        key: str,
        *,
        consistency: Consistency | str | None = None,
        timeout: float | None = None,
        fence: Fencing | None = None,
    ) -> Entry | None:
        """The value with its version and times, or None. `fence` as in `get`."""
        if fence is not None:
            check_level(consistency)
            record = await self._look(key, timeout, fence)
        else:
            record = await self._one(Kind.GET, key, consistency, timeout)
        return None if record is None else _entry(key, record)

    async def exists(
        self, key: str, *, consistency: Consistency | str | None = None, timeout: float | None = None
    ) -> bool:
        """Whether the key holds a value."""
        return await self._one(Kind.GET, key, consistency, timeout) is not None

    async def put(
        self,
        key: str,
        value: bytes,
        *,
        ttl_seconds: float | None = None,
        consistency: Consistency | str | None = None,
        timeout: float | None = None,
        if_version: int | None = None,
        if_absent: bool = False,
        fence: Fencing | None = None,
    ) -> int:
        """Stores a value, last writer wins; returns its version. With `ttl_seconds` it expires.

        With `if_version` only over that version, with `if_absent` only if there is no value, with `fence` (a lock, or
        its Fence) only if no later holder of the lock has been at the key: such a write goes through consensus
        (conditional.py), and so do all later ones of its key.

        Raises InvalidKey, InvalidValue, InvalidTTL; VersionConflict, WrongFence, FenceRejected; Unavailable (nothing
        written); OutcomeUnknown; ClockSkew.
        """
        if if_absent is not False or if_version is not None or fence is not None:
            check_level(consistency)
            if not isinstance(if_absent, bool):
                raise InvalidRequest(f"if_absent is True or False, not {if_absent!r:.40}")
            if if_absent and if_version is not None:
                raise InvalidRequest("a key is absent, or at a version: not both")
            at = 0 if if_absent else None if if_version is None else checked_version(if_version)
            return (await self._write_over(key, value, ttl_seconds, at, timeout, fence)).version
        raw, value = encode_key(key), check_value(value)
        if ttl_seconds is None and consistency is None and timeout is None and len(value) < BULK_VALUE_BYTES:
            batch = self._puts
            if batch is None:
                batch = self._puts = self._open(Kind.PUT, self._write or self._live().write_consistency, 0, None)
        elif len(value) < BULK_VALUE_BYTES:
            batch = self._batch(Kind.PUT, consistency, ttl_to_ms(ttl_seconds), timeout)
        else:  # a large value is a batch of its own, so that it can take the bulk link
            batch = self._open(Kind.PUT, self._level(Kind.PUT, consistency), ttl_to_ms(ttl_seconds), timeout)
            batch.keys.append(raw)
            batch.values.append(value)
            batch.futures.append(future := self._loop.create_future())
            self._submit(batch)
            return int(await future)
        batch.keys.append(raw)
        batch.values.append(value)
        future = self._loop.create_future()
        batch.futures.append(future)
        batch.bytes += len(raw) + len(value)
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)
        if batch.bytes > BATCH_BYTES_MAX or len(batch.keys) >= BATCH_KEYS_MAX:
            self._flush()
        version: int = await future
        return version

    async def delete(
        self,
        key: str,
        *,
        consistency: Consistency | str | None = None,
        timeout: float | None = None,
        if_version: int | None = None,
        fence: Fencing | None = None,
    ) -> bool:
        """Deletes a key. True if one of the replicas that answered held a live value. `if_version` and `fence` as in
        `put`."""
        if if_version is not None or fence is not None:
            check_level(consistency)
            at = None if if_version is None else checked_version(if_version)
            return bool((await self._write_over(key, None, None, at, timeout, fence)).number)
        return bool(await self._one(Kind.DELETE, key, consistency, timeout))

    # --- many keys

    async def get_many(
        self, keys: Iterable[str], *, consistency: Consistency | str | None = None, timeout: float | None = None
    ) -> dict[str, bytes | None]:
        """The value of each key (None where there is none). Raises BatchError if some could not be read."""
        names = list(keys)
        records = await self._many(Kind.GET, names, None, 0, consistency, timeout)
        return {name: None if record is None else record[HEADER:] for name, record in zip(names, records, strict=True)}

    async def put_many(
        self,
        items: Mapping[str, bytes],
        *,
        ttl_seconds: float | None = None,
        consistency: Consistency | str | None = None,
        timeout: float | None = None,
    ) -> dict[str, int]:
        """Stores many values; returns their versions. Not atomic: raises BatchError with those that failed."""
        names = list(items)
        versions = await self._many(Kind.PUT, names, list(items.values()), ttl_to_ms(ttl_seconds), consistency, timeout)
        return dict(zip(names, versions, strict=True))

    async def delete_many(
        self, keys: Iterable[str], *, consistency: Consistency | str | None = None, timeout: float | None = None
    ) -> dict[str, bool]:
        """Deletes many keys; tells which of them held a value. Not atomic: raises BatchError with those that failed."""
        names = list(keys)
        existed = await self._many(Kind.DELETE, names, None, 0, consistency, timeout)
        return dict(zip(names, existed, strict=True))

    # --- scans

    async def scan(
        self,
        prefix: str = "",
        limit: int = SCAN_LIMIT_MAX,
        *,
        start: str | None = None,
        end: str | None = None,
        consistency: Consistency | str | None = None,
        timeout: float | None = None,
    ) -> list[tuple[str, bytes]]:
        """The first `limit` pairs in key order (UTF-8 bytes) under a prefix, or with start <= key < end.

        Complete or an error: Unavailable where a part of the ring is not covered. `timeout` holds for all of it.
        """
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise InvalidRequest(f"limit is a whole number above 0, not {limit!r}")
        low, high, level, timeout_s = self._range(prefix, SCAN_LIMIT_MAX, start, end, consistency, timeout)
        deadline = self._clock.monotonic() + timeout_s
        found: list[tuple[str, bytes]] = []
        while True:
            size = min(limit - len(found), SCAN_LIMIT_MAX)
            pairs, low = await self._page(low, high, size, level, deadline - self._clock.monotonic())
            found += pairs
            if not low or len(found) >= limit:
                return found

    async def iterate(
        self,
        prefix: str = "",
        *,
        page_size: int = SCAN_LIMIT_MAX,
        start: str | None = None,
        end: str | None = None,
        consistency: Consistency | str | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[tuple[str, bytes]]:
        """Pairs in key order, fetched a page at a time; `timeout` holds for each page.

        A key that exists throughout is returned exactly once; one that comes or goes meanwhile may be or not be.
        """
        low, high, level, timeout_s = self._range(prefix, page_size, start, end, consistency, timeout)
        while True:
            pairs, low = await self._page(low, high, page_size, level, timeout_s)
            for pair in pairs:
                yield pair
            if not low:
                return

    async def iterate_entries(
        self,
        prefix: str = "",
        *,
        page_size: int = SCAN_LIMIT_MAX,
        start: str | None = None,
        end: str | None = None,
        consistency: Consistency | str | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[Entry]:
        """`iterate` with versions and times."""
        low, high, level, timeout_s = self._range(prefix, page_size, start, end, consistency, timeout)
        while True:
            entries, low = await self._entries(low, high, page_size, level, timeout_s)
            for entry in entries:
                yield entry
            if not low:
                return

    async def iterate_keys(
        self,
        prefix: str = "",
        *,
        page_size: int = SCAN_LIMIT_MAX,
        start: str | None = None,
        end: str | None = None,
        consistency: Consistency | str | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[str]:
        """`iterate` of the keys alone: no value travels to this client."""
        low, high, level, timeout_s = self._range(prefix, page_size, start, end, consistency, timeout)
        while True:
            pairs, low = await self._page(low, high, page_size, level, timeout_s, keys_only=True)
            for key, _ in pairs:
                yield key
            if not low:
                return

    def _range(
        self,
        prefix: str,
        page_size: int,
        start: str | None,
        end: str | None,
        consistency: Consistency | str | None,
        timeout: float | None,
    ) -> tuple[bytes, bytes, Consistency, float]:
        """What a scan asks for, checked: first key, end (empty for none), level and seconds for each page."""
        if isinstance(page_size, bool) or not isinstance(page_size, int) or not 1 <= page_size <= SCAN_LIMIT_MAX:
            raise InvalidRequest(f"page_size is 1 to {SCAN_LIMIT_MAX}, not {page_size!r}")
        low = encode_key(prefix) if prefix else b""
        high = prefix_end(low) if prefix else b""
        if start is not None:
            low = max(low, encode_key(start))
        if end is not None:
            high = min(high, encode_key(end)) if high else encode_key(end)
        level = self._level(Kind.GET, consistency)
        return low, high, level, self._timeout_s if timeout is None else _check_timeout(timeout)

    async def _page(
        self, low: bytes, high: bytes, size: int, level: Consistency, timeout_s: float, *, keys_only: bool = False
    ) -> tuple[list[tuple[str, bytes]], bytes]:
        """One page of a scan and where the next begins (empty: nowhere)."""
        page = await scan_page(self._live(), Scan(0, level, 0, low, high, size, keys_only), timeout_s)
        return [(k.decode(), r[HEADER:]) for k, r in zip(page.keys, page.records, strict=True)], page.next

    async def _entries(
        self, low: bytes, high: bytes, size: int, level: Consistency, timeout_s: float
    ) -> tuple[list[Entry], bytes]:
        """`_page` with versions and times."""
        page = await scan_page(self._live(), Scan(0, level, 0, low, high, size), timeout_s)
        return [_entry(k.decode(), r) for k, r in zip(page.keys, page.records, strict=True)], page.next

    # --- the cluster

    async def stats(self) -> dict[str, dict[str, Any]]:
        """Counters of every node by node id; `{"error": ...}` for one that does not answer."""
        session = self._live()
        names = sorted(session.nodes)
        answers = await asyncio.gather(*(session.query(name, "stats") for name in names), return_exceptions=True)
        return {name: _or_error(answer) for name, answer in zip(names, answers, strict=True)}

    async def status(self) -> dict[str, dict[str, Any]]:
        """State of every node by node id (queries.py); `{"error": ...}` for one that does not answer."""
        session = self._live()
        names = sorted(session.nodes)
        answers = await asyncio.gather(*(session.query(name, "status") for name in names), return_exceptions=True)
        return {name: _or_error(answer) for name, answer in zip(names, answers, strict=True)}

    async def topology(self) -> dict[str, Any]:
        """Epoch, settings and members of the cluster, asked anew."""
        session = self._live()
        topology: dict[str, Any] = await session.query(self._any(), "topology")
        return topology

    def on_member_status(self, callback: StatusCallback) -> None:
        """Calls it in the event loop with (node id, MemberStatus) when a member's state has changed as one node, asked
        every 2 s or so, holds it; at the first answer for those that are not alive. What comes and goes in between, as
        a short suspicion does, is not told. Register it before `connect` to miss nothing; it may not block."""
        self._members.on_status(callback)

    async def history(self) -> list[dict[str, Any]]:
        """The epochs of the topology that one node remembers, oldest first: generation, epoch, digest, note,
        decided_ms, voters."""
        past: list[dict[str, Any]] = await self._live().query(self._any(), "history")
        return past

    async def locate(self, key: str) -> dict[str, Any]:
        """Token and replicas of a key, and what each replica holds."""
        located: dict[str, Any] = await self._live().query(self._any(), "locate", encode_key(key))
        return located

    async def repair(
        self,
        node_id: str | None = None,
        tokens: tuple[int, int] | None = None,
        on_progress: Callable[[str, dict[str, Any]], object] | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Lets every node, or one, compare its replicas with the others' and settle what differs, now. Returns when all
        is done: by node id, what was compared, sent and received (repairs.py); `{"error": ...}` for one that does not
        answer. A range that could not be repaired is in `failed`, by peer.

        Args:
            tokens: first and last token of the part of the ring that is meant; None for all of it.
            on_progress: called with (node id, state so far) every now and then.
        """
        names = sorted(self._live().nodes) if node_id is None else [node_id]
        return await order_repairs(self._live(), names, tokens, on_progress)

    # --- inside

    def _live(self) -> Session:
        session = self._session
        if session is None:
            raise ClientClosed("the client is not connected: call connect() first")
        if session.closed:
            raise ClientClosed("the client is closed")
        return session

    def _any(self) -> str:
        up = self._live().up
        return up[self._rng.randrange(len(up))].node_id if up else ""

    def _level(self, kind: Kind, consistency: Consistency | str | None) -> Consistency:
        if consistency is not None:
            return Consistency.parse(consistency)
        session = self._live()
        if kind is Kind.GET:
            return self._read or session.read_consistency
        return self._write or session.write_consistency

    def _open(
        self, kind: Kind, level: Consistency, ttl_ms: int, timeout: float | None, urgent: bool = False
    ) -> OpenBatch:
        if not urgent:
            self._admit()
        return OpenBatch(kind, level, self._until(timeout), ttl_ms, self._ended)

    def _admit(self) -> None:
        """Raises Overloaded where a call may not begin."""
        if not self._admission.admits(self._clock.monotonic()):
            raise Overloaded(f"{self._admission.pending} calls wait for the cluster already")

    def _until(self, timeout: float | None) -> float:
        self._live()
        return self._clock.monotonic() + (self._timeout_s if timeout is None else _check_timeout(timeout))

    def _submit(self, batch: Batch) -> None:
        assert self._session is not None
        self._admission.enter(len(batch.keys))
        self._session.submit(batch)

    def _ended(self, count: int, carried_out: bool) -> None:
        self._admission.leave(count, self._clock.monotonic(), done=carried_out)

    def _batch(
        self,
        kind: Kind,
        consistency: Consistency | str | None,
        ttl_ms: int,
        timeout: float | None,
        urgent: bool = False,
    ) -> OpenBatch:
        """The open batch of this turn for calls of one kind, level, TTL and timeout."""
        level = self._level(kind, consistency)
        name = (kind, level, ttl_ms, -1.0 if timeout is None else timeout, urgent)
        batch = self._others.get(name)
        if batch is None:
            batch = self._others[name] = self._open(kind, level, ttl_ms, timeout, urgent)
        return batch

    async def _operate(self, op: Op, timeout: float | None, urgent: bool = False) -> OpResult:
        kind = Kind.BOUND if op.kind == LOOK or op.condition == IF_VERSION else Kind.UPDATE
        batch = self._batch(kind, Consistency.LINEARIZABLE, 0, timeout, urgent)
        batch.keys.append(op.key)
        batch.ops.append(op)
        batch.bytes += len(op.key) + len(op.value)
        result: OpResult = await self._collected(batch)
        return result

    async def _one(self, kind: Kind, key: str, consistency: Consistency | str | None, timeout: float | None) -> Any:
        raw = encode_key(key)
        batch = self._batch(kind, consistency, 0, timeout)
        batch.keys.append(raw)
        return await self._collected(batch)

    async def _collected(self, batch: OpenBatch) -> Any:
        """The result of what was added to the batch last, which goes out at the end of this turn."""
        future = self._loop.create_future()
        batch.futures.append(future)
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)
        if batch.bytes > BATCH_BYTES_MAX or len(batch.keys) >= BATCH_KEYS_MAX:
            self._flush()
        return await future

    def _flush(self, release: bool = False) -> None:
        """Sends what was collected. A small batch waits for one under way, so that few callers share frames as many
        do, but for HOLD_S at most; operations under consensus go to a node for each key, and do not."""
        self._flushing = False
        session = self._session
        assert session is not None
        gets, puts, others = self._gets, self._puts, self._others
        if gets is not None:
            if session.direct.pending and len(gets.keys) < HOLD_KEYS and not release:
                self._hold()
            else:
                self._gets = None
                self._submit(gets)
        if puts is not None:
            if session.writing and len(puts.keys) < HOLD_KEYS and not release:
                self._hold()
            else:
                self._puts = None
                self._submit(puts)
        if others:
            self._others = {}
            for batch in others.values():
                if batch.keys:
                    self._submit(batch)

    def _hold(self) -> None:
        if self._held is None:
            assert self._session is not None
            self._held = self._loop.call_later(min(HOLD_S, self._session.write_s.value / 2), self._release)

    def _release(self) -> None:
        self._held = None
        if self._gets is not None or self._puts is not None:
            self._flush(release=True)

    def _settled(self) -> None:
        """A batch has ended: what waited for it may go, with what its callers ask next."""
        if (self._gets is not None or self._puts is not None) and not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    async def _many(
        self,
        kind: Kind,
        names: list[str],
        values: list[bytes] | None,
        ttl_ms: int,
        consistency: Consistency | str | None,
        timeout: float | None,
    ) -> list[Any]:
        self._live()
        self._admit()
        keys = [encode_key(name) for name in names]
        if values is not None:
            values = [check_value(value) for value in values]
        level = self._level(kind, consistency)
        if not keys:
            return []
        sink = Gathered(len(keys), self._ended)
        deadline = self._until(timeout)
        for first, last in spans(keys, values):
            batch = Batch(kind, level, deadline, ttl_ms, sink)
            batch.keys = keys[first:last]
            batch.values = values[first:last] if values is not None else []
            if last - first < len(keys):
                batch.places = list(range(first, last))
            self._submit(batch)
        await sink.done
        if sink.errors:
            raise BatchError({names[place]: error for place, error in sorted(sink.errors.items())})
        return sink.results


def prefix_end(prefix: bytes) -> bytes:
    """The least key above every key with this prefix; empty where there is none."""
    cut = prefix.rstrip(b"\xff")
    return cut[:-1] + bytes([cut[-1] + 1]) if cut else b""


def _entry(key: str, record: bytes) -> Entry:
    hlc = hlc_of(record)
    return Entry(key, record[HEADER:], hlc, expires_ms_of(record) or None, created_ms_of(record), physical_ms(hlc))


def _check_timeout(timeout: float) -> float:
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout <= TIMEOUT_S_MAX:
        raise InvalidRequest(f"a timeout is above 0 and at most {TIMEOUT_S_MAX:g} seconds, not {timeout!r}")
    return float(timeout)


def _or_error(answer: Any) -> dict[str, Any]:
    if isinstance(answer, DHTError):
        return {"error": str(answer)}
    if isinstance(answer, BaseException):
        raise answer
    return dict(answer)
