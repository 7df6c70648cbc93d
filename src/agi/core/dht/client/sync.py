"""The client for threads: the asyncio client on an event loop of its own, in one daemon thread.

Every method has the name, arguments and errors of `DHTClient`'s. Calls of many threads that are under way at once share
frames as concurrent calls of one event loop do, so a thread pool is no slower than `asyncio.gather`.

Threads: every method may be called from any thread at any time; `close` too. KeyboardInterrupt (or any exception that
a signal handler raises) ends the wait of the main thread alone: the call is cancelled, a write may happen all the
same, and the client stays usable.

Callbacks (the function of `update`, `on_progress`, `on_member_status`) run in the loop's thread: they must not block,
and a call of the same client from there raises InvalidRequest.

Fork: the loop's thread does not exist in a forked child, so there every call raises ClientClosed. Make the client
after the fork (in a `multiprocessing` initializer, say). The parent's client is not disturbed by its children.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import random
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Self, TypeVar, overload

import uvloop

from agi.core.dht.client.asynchronous import DHTClient
from agi.core.dht.client.changes import Progress
from agi.core.dht.client.conditional import Change
from agi.core.dht.client.mapping import RAW, Codec, MappingView
from agi.core.dht.client.members import StatusCallback
from agi.core.dht.client.sync_locks import SyncLock
from agi.core.dht.clock import Clock
from agi.core.dht.errors import ClientClosed, DHTError, InvalidRequest
from agi.core.dht.transport.base import Transport
from agi.core.dht.types import SCAN_LIMIT_MAX, Consistency, Entry, Fencing, LockStatus

T = TypeVar("T")
V = TypeVar("V")

CLOSE_TIMEOUT_S = 5.0
"""How long `close` waits for the loop's thread."""
CLOSED = "the client is closed"
FORKED = "the client belongs to the process that was forked: make one in this process"


class _Call:
    """A call under way: its coroutine, and the task once the loop has begun it."""

    __slots__ = ("coroutine", "result", "task")

    def __init__(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self.coroutine = coroutine
        self.result: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self.task: asyncio.Task[Any] | None = None

    def fail(self, error: DHTError) -> None:
        if not self.result.done():
            self.result.set_exception(error)


class _Loop:
    """An event loop in a daemon thread. It knows nothing of its client, so that a forgotten client can be collected."""

    def __init__(self, client: DHTClient) -> None:
        self._client = client
        self._pid = os.getpid()
        self._loop = uvloop.new_event_loop()
        self._calls: dict[_Call, None] = {}
        self._closed = False
        self._last: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="dht-client", daemon=True)
        self._thread.start()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs it in the loop and waits for its result. Raises ClientClosed where the loop has ended; InvalidRequest in
        a callback, as the loop cannot go on while it waits."""
        if self._closed or self._pid != os.getpid():
            coroutine.close()
            raise ClientClosed(CLOSED if self._pid == os.getpid() else FORKED)
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise InvalidRequest("a callback runs in the client's own thread, and may not call the client")
        call = _Call(coroutine)
        self._calls[call] = None  # before the loop hears of it: whatever is in here when it ends, fails
        try:
            self._loop.call_soon_threadsafe(self._begin, call)
        except RuntimeError:  # the loop was closed at this moment
            self._calls.pop(call, None)
            coroutine.close()
            raise ClientClosed(CLOSED) from None
        try:
            result: T = call.result.result()
        except BaseException:
            if not call.result.done():  # the wait was interrupted, not the call
                with contextlib.suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(self._give_up, call)
            raise
        return result

    def stop(self) -> None:
        """Closes the client and ends the loop; calls under way fail with ClientClosed. Any thread, any number of
        times."""
        if self._pid != os.getpid():
            return
        self._closed = True
        with contextlib.suppress(RuntimeError):  # it has ended already
            self._loop.call_soon_threadsafe(self._finish)
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_TIMEOUT_S)

    # --- in the loop's thread

    def _run(self) -> None:
        loop = self._loop
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
        finally:
            self._closed = True
            tasks = asyncio.all_tasks(loop)
            for task in tasks:
                task.cancel()
            if tasks:
                loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            loop.close()
            for call in list(self._calls):
                if call.task is None:
                    call.coroutine.close()
                call.fail(ClientClosed(CLOSED))

    def _finish(self) -> None:
        if self._last is None:
            self._last = self._loop.create_task(self._client.close())
            self._last.add_done_callback(lambda _: self._loop.stop())

    def _begin(self, call: _Call) -> None:
        if self._closed:
            return  # `_run` fails it
        call.task = self._loop.create_task(call.coroutine)
        call.task.add_done_callback(partial(self._done, call))

    def _done(self, call: _Call, task: asyncio.Task[Any]) -> None:
        self._calls.pop(call, None)
        if task.cancelled():
            call.fail(ClientClosed(CLOSED))
        elif (error := task.exception()) is not None:
            call.result.set_exception(error)
        else:
            call.result.set_result(task.result())

    def _give_up(self, call: _Call) -> None:
        if call.task is not None:
            call.task.cancel()


class SyncDHTClient:
    """A client of one cluster, for threads.

    Args, methods, results and errors are those of `DHTClient`, without the `await`; `iterate` is a plain iterator, and
    `map` is here alone. Its thread starts with `connect` and ends with `close`.

    >>> def example() -> None:
    ...     with SyncDHTClient() as client:
    ...         client.connect(["localhost:7000"])
    ...         client.put("greeting", b"hello", ttl_seconds=60)
    ...         assert client.get("greeting") == b"hello"
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
        self._client = DHTClient(
            cluster=cluster,
            timeout=timeout,
            read_consistency=read_consistency,
            write_consistency=write_consistency,
            retry_count=retry_count,
            retry_unknown=retry_unknown,
            connection_pool_size=connection_pool_size,
            unix=unix,
            queue_s=queue_s,
            seed_transport=seed_transport,
            data_transport=data_transport,
            clock=clock,
            rng=rng,
        )
        self._loop: _Loop | None = None
        self._closed = False
        self._lock = threading.Lock()

    # --- life

    def connect(self, addresses: Sequence[str], *, timeout: float = 10.0) -> None:
        """Finds the cluster: one live address is enough. Raises InvalidAddress, ConnectFailed, NotReady,
        HelloRefused."""
        with self._lock:
            if self._loop is None and not self._closed:
                self._loop = _Loop(self._client)
                weakref.finalize(self, self._loop.stop)
        self._call(self._client.connect(addresses, timeout=timeout))

    def close(self) -> None:
        """Ends the connection and the thread; calls under way fail with ClientClosed. Closing twice is harmless."""
        with self._lock:
            self._closed = True
            loop = self._loop
        if loop is not None:
            loop.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- single keys

    def get(
        self,
        key: str,
        *,
        consistency: Consistency | str | None = None,
        timeout: float | None = None,
        fence: Fencing | None = None,
    ) -> bytes | None:
        """The value, or None where the key is absent, deleted or expired. `fence` as in `DHTClient.get`. Raises
        InvalidKey, Unavailable."""
        return self._call(self._client.get(key, consistency=consistency, timeout=timeout, fence=fence))

    def get_entry(
        self,
        key: str,
        *,
        consistency: Consistency | str | None = None,
        timeout: float | None = None,
        fence: Fencing | None = None,
    ) -> Entry | None:
        """The value with its version and times, or None. `fence` as in `DHTClient.get`."""
        return self._call(self._client.get_entry(key, consistency=consistency, timeout=timeout, fence=fence))

    def exists(self, key: str, *, consistency: Consistency | str | None = None, timeout: float | None = None) -> bool:
        """Whether the key holds a value."""
        return self._call(self._client.exists(key, consistency=consistency, timeout=timeout))

    def put(
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

        `if_version`, `if_absent` and `fence` bind it to what is there, as in `DHTClient.put`.

        Raises InvalidKey, InvalidValue, InvalidTTL; VersionConflict, WrongFence, FenceRejected; Unavailable (nothing
        written); OutcomeUnknown; ClockSkew.
        """
        return self._call(
            self._client.put(
                key,
                value,
                ttl_seconds=ttl_seconds,
                consistency=consistency,
                timeout=timeout,
                if_version=if_version,
                if_absent=if_absent,
                fence=fence,
            )
        )

    def delete(
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
        return self._call(
            self._client.delete(key, consistency=consistency, timeout=timeout, if_version=if_version, fence=fence)
        )

    # --- under consensus (conditional.py)

    def compare_and_set(
        self,
        key: str,
        expected: bytes | None,
        value: bytes | None,
        *,
        ttl_seconds: float | None = None,
        timeout: float | None = None,
    ) -> int:
        """Stores `value` if the key holds `expected` (None: absent); returns the new version. Raises VersionConflict;
        else as `DHTClient.compare_and_set`."""
        return self._call(self._client.compare_and_set(key, expected, value, ttl_seconds=ttl_seconds, timeout=timeout))

    def incr(self, key: str, delta: int = 1, *, ttl_seconds: float | None = None, timeout: float | None = None) -> int:
        """Adds to a counter; returns what it is then. Raises NotACounter; else as `DHTClient.incr`."""
        return self._call(self._client.incr(key, delta, ttl_seconds=ttl_seconds, timeout=timeout))

    def update(
        self, key: str, change: Change, *, ttl_seconds: float | None = None, timeout: float | None = None
    ) -> bytes | None:
        """Stores what `change` makes of the value, once nothing has come between, and returns it. `change` runs in the
        client's own thread, so it may neither block nor call the client. As `DHTClient.update`."""
        return self._call(self._client.update(key, change, ttl_seconds=ttl_seconds, timeout=timeout))

    # --- locks (locks.py)

    def lock(self, name: str, *, ttl: float = 10.0, timeout: float | None = None) -> SyncLock:
        """A lock to be held by `with`; as `DHTClient.lock`, but a thread cannot be cancelled: LockLost comes at the
        next `check()`, or at the end of the block."""
        return SyncLock(self._client.lock(name, ttl=ttl, timeout=timeout), self._call)

    def try_lock(self, name: str, *, ttl: float = 10.0) -> SyncLock | None:
        """The lock, held, or None where another has it; never waits. As `DHTClient.try_lock`."""
        lock = SyncLock(self._client.lock(name, ttl=ttl), self._call)
        return lock if lock.acquire(wait=False) else None

    def lock_status(self, name: str, *, timeout: float | None = None) -> LockStatus | None:
        """Who holds the lock; None where nobody ever has. As `DHTClient.lock_status`."""
        return self._call(self._client.lock_status(name, timeout=timeout))

    # --- many keys

    def get_many(
        self, keys: Iterable[str], *, consistency: Consistency | str | None = None, timeout: float | None = None
    ) -> dict[str, bytes | None]:
        """The value of each key (None where there is none). Raises BatchError if some could not be read."""
        return self._call(self._client.get_many(list(keys), consistency=consistency, timeout=timeout))

    def put_many(
        self,
        items: Mapping[str, bytes],
        *,
        ttl_seconds: float | None = None,
        consistency: Consistency | str | None = None,
        timeout: float | None = None,
    ) -> dict[str, int]:
        """Stores many values; returns their versions. Not atomic: raises BatchError with those that failed."""
        items = dict(items)  # the caller's may belong to his thread
        return self._call(
            self._client.put_many(items, ttl_seconds=ttl_seconds, consistency=consistency, timeout=timeout)
        )

    def delete_many(
        self, keys: Iterable[str], *, consistency: Consistency | str | None = None, timeout: float | None = None
    ) -> dict[str, bool]:
        """Deletes many keys; tells which of them held a value. Not atomic: raises BatchError with those that failed."""
        return self._call(self._client.delete_many(list(keys), consistency=consistency, timeout=timeout))

    # --- scans

    def scan(
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
        return self._call(
            self._client.scan(prefix, limit, start=start, end=end, consistency=consistency, timeout=timeout)
        )

    def iterate(
        self,
        prefix: str = "",
        *,
        page_size: int = SCAN_LIMIT_MAX,
        start: str | None = None,
        end: str | None = None,
        consistency: Consistency | str | None = None,
        timeout: float | None = None,
    ) -> Iterator[tuple[str, bytes]]:
        """Pairs in key order, fetched a page at a time as they are asked for; `timeout` holds for each page.

        A key that exists throughout is returned exactly once; one that comes or goes meanwhile may be or not be.
        """
        client = self._client
        low, high, level, timeout_s = client._range(prefix, page_size, start, end, consistency, timeout)
        while True:
            pairs, low = self._call(client._page(low, high, page_size, level, timeout_s))
            yield from pairs
            if not low:
                return

    def iterate_entries(
        self,
        prefix: str = "",
        *,
        page_size: int = SCAN_LIMIT_MAX,
        start: str | None = None,
        end: str | None = None,
        consistency: Consistency | str | None = None,
        timeout: float | None = None,
    ) -> Iterator[Entry]:
        """`iterate` with versions and times."""
        client = self._client
        low, high, level, timeout_s = client._range(prefix, page_size, start, end, consistency, timeout)
        while True:
            entries, low = self._call(client._entries(low, high, page_size, level, timeout_s))
            yield from entries
            if not low:
                return

    def iterate_keys(
        self,
        prefix: str = "",
        *,
        page_size: int = SCAN_LIMIT_MAX,
        start: str | None = None,
        end: str | None = None,
        consistency: Consistency | str | None = None,
        timeout: float | None = None,
    ) -> Iterator[str]:
        """`iterate` of the keys alone: no value travels to this client."""
        client = self._client
        low, high, level, timeout_s = client._range(prefix, page_size, start, end, consistency, timeout)
        while True:
            pairs, low = self._call(client._page(low, high, page_size, level, timeout_s, keys_only=True))
            for key, _ in pairs:
                yield key
            if not low:
                return

    @overload
    def map(self, prefix: str = "") -> MappingView[bytes]: ...
    @overload
    def map(self, prefix: str = "", *, codec: Codec[V]) -> MappingView[V]: ...
    def map(self, prefix: str = "", *, codec: Codec[Any] = RAW) -> MappingView[Any]:
        """The keys under a prefix as a dict-like view (mapping.py), named without it. `codec` translates values: RAW
        (bytes, the default), TEXT, Json(), MessagePack(), or one of your own."""
        return MappingView(self, prefix, codec)

    # --- the cluster

    def stats(self) -> dict[str, dict[str, Any]]:
        """Counters of every node by node id; `{"error": ...}` for one that does not answer."""
        return self._call(self._client.stats())

    def status(self) -> dict[str, dict[str, Any]]:
        """State of every node by node id (queries.py); `{"error": ...}` for one that does not answer."""
        return self._call(self._client.status())

    def topology(self) -> dict[str, Any]:
        """Epoch, settings and members of the cluster, asked anew."""
        return self._call(self._client.topology())

    def on_member_status(self, callback: StatusCallback) -> None:
        """As `DHTClient.on_member_status`; called in the client's own thread, where it may not call the client."""
        self._client.on_member_status(callback)

    def history(self) -> list[dict[str, Any]]:
        """The epochs of the topology that one node remembers, oldest first: generation, epoch, digest, note,
        decided_ms, voters."""
        return self._call(self._client.history())

    def locate(self, key: str) -> dict[str, Any]:
        """Token and replicas of a key, and what each replica holds."""
        return self._call(self._client.locate(key))

    def repair(
        self,
        node_id: str | None = None,
        tokens: tuple[int, int] | None = None,
        on_progress: Callable[[str, dict[str, Any]], object] | None = None,
    ) -> dict[str, dict[str, Any]]:
        """As `DHTClient.repair`; `on_progress` is called in the client's own thread."""
        return self._call(self._client.repair(node_id, tokens, on_progress))

    def leave(
        self, node_id: str, *, force: bool = False, timeout: float = 600.0, on_progress: Progress | None = None
    ) -> dict[str, Any]:
        """As `DHTClient.leave`; `on_progress` is called in the client's own thread, here and below."""
        return self._call(self._client.leave(node_id, force=force, timeout=timeout, on_progress=on_progress))

    def remove(
        self,
        node_id: str,
        *,
        force: bool = False,
        lose_data: bool = False,
        timeout: float = 600.0,
        on_progress: Progress | None = None,
    ) -> dict[str, Any]:
        """As `DHTClient.remove`."""
        return self._call(
            self._client.remove(node_id, force=force, lose_data=lose_data, timeout=timeout, on_progress=on_progress)
        )

    def set_weight(
        self, node_id: str, weight: float, *, timeout: float = 600.0, on_progress: Progress | None = None
    ) -> dict[str, Any]:
        """As `DHTClient.set_weight`."""
        return self._call(self._client.set_weight(node_id, weight, timeout=timeout, on_progress=on_progress))

    def recover(
        self, lost: Sequence[str], *, confirm: str, timeout: float = 600.0, on_progress: Progress | None = None
    ) -> dict[str, Any]:
        """As `DHTClient.recover`."""
        return self._call(self._client.recover(lost, confirm=confirm, timeout=timeout, on_progress=on_progress))

    def plan(
        self,
        what: str,
        node_id: str = "",
        *,
        force: bool = False,
        lose_data: bool = False,
        weight: float = 0.0,
        rack: str = "",
        zone: str = "",
        lost: Sequence[str] = (),
    ) -> dict[str, Any]:
        """As `DHTClient.plan`."""
        supposed = self._client.plan(
            what, node_id, force=force, lose_data=lose_data, weight=weight, rack=rack, zone=zone, lost=lost
        )
        return self._call(supposed)

    def wait_replaced(
        self, node_id: str, *, timeout: float = 600.0, on_progress: Progress | None = None
    ) -> dict[str, Any]:
        """As `DHTClient.wait_replaced`."""
        return self._call(self._client.wait_replaced(node_id, timeout=timeout, on_progress=on_progress))

    def cancel_change(self, *, timeout: float = 60.0) -> dict[str, Any]:
        """As `DHTClient.cancel_change`."""
        return self._call(self._client.cancel_change(timeout=timeout))

    def wait_healthy(self, timeout: float = 60.0) -> list[str]:
        """As `DHTClient.wait_healthy`."""
        return self._call(self._client.wait_healthy(timeout))

    # --- inside

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        loop = self._loop
        if loop is None:
            coroutine.close()
            raise ClientClosed(CLOSED if self._closed else "the client is not connected: call connect() first")
        return loop.call(coroutine)
