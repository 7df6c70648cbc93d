"""The store on a Redis server, for sites that run one already. Needs `pip install 'agi-hpc[redis]'`.

All of a node's data is under its prefix, so that nodes can share a server:

    {prefix}:records   hash         key -> record
    {prefix}:keys      sorted set   key                       ordered scans
    {prefix}:tokens    sorted set   token (8 bytes) || key    scans by ring position
    {prefix}:expiry    sorted set   expires_ms (8) || key     records with a TTL; stale entries are dropped when met
    {prefix}:hints     hash         target tag || key -> packed hint
    {prefix}:promises  hash         key -> xxh3 || promise    storage/promises.py; written by consensus only
    {prefix}:meta      hash         name -> value             and the run id of the server that the data was written on

The sets have one score, so Redis orders them by their bytes. A batch is one MULTI/EXEC.

What an acknowledged write survives is the server's configuration. With `appendonly yes` and `appendfsync always` a
restarted server has all of it. With anything else a restart may have lost acknowledged writes, and a replica that
forgot some must not count as one that knows (PROTOCOLS I1). So the store remembers the server's run id: every new
connection compares it, and after a restart that may have lost writes all calls fail, and `open` too, until the prefix
is cleared and the node joins anew. Where the server came back empty, opening the store again is enough: the node's
identity went with its data.

A promise may not be forgotten at all, not even by a machine without power, so a node votes only where the server syncs
every write before it answers and throws nothing away by itself; `voting_refusal` says what is amiss.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

from agi.core.dht.errors import ConfigError, StorageClosed, StorageCorrupt, StorageError, StorageFull
from agi.core.dht.protocol.hints import Hint, pack_hint, unpack_hint
from agi.core.dht.protocol.record import FLAGS, SHRUNK, verify
from agi.core.dht.storage.base import Batch, Count, HintPage, Page, PromisePage, StorageBackend, StoreStats
from agi.core.dht.storage.promises import check_promises, pack_promise, unpack_promise

if TYPE_CHECKING:
    from redis.asyncio import Redis
    from redis.asyncio.client import Pipeline

CHUNK_KEYS_FIRST, CHUNK_KEYS_MAX = 16, 512
CHUNK_BYTES = 1024 * 1024
"""A scan asks for so many records at once: few until their size is known, then about so many bytes."""
EXPIRY_STALE_MAX = 1024
"""Stale expiry entries that one `expired` call looks at and drops, beyond its limit."""
CONNECT_TIMEOUT_S = 3.0
_NO_EXPIRY = bytes(8)
_RUN_ID = "run_id"
_NAMED = "named:"
_UNKNOWN = "the settings of the Redis server are not known yet"


def _voting_refusal(settings: dict[str, str]) -> str:
    """What in the server's settings lets it lose a promise that it has acknowledged; empty where nothing does."""
    for name, value in (("appendonly", "yes"), ("appendfsync", "always")):
        if settings.get(name) != value:
            return f"the Redis server runs with `{name} {settings.get(name)}`, not `{name} {value}`"
    if settings.get("no-appendfsync-on-rewrite") == "yes":
        return "the Redis server runs with `no-appendfsync-on-rewrite yes`: it does not sync while it rewrites its log"
    policy = settings.get("maxmemory-policy", "")
    if policy.startswith("allkeys-"):
        return f"the Redis server runs with `maxmemory-policy {policy}`: it may throw promises away"
    return ""


def _storage_error(error: BaseException, doing: str) -> StorageError:
    if isinstance(error, StorageError):
        return error
    text = f"{doing}: {error or type(error).__name__}"
    if "OOM" in str(error) or "No space left" in str(error) or type(error).__name__ == "OutOfMemoryError":
        return StorageFull(text)
    return StorageError(text)


class RedisStore(StorageBackend):
    """Records on a Redis server.

    Args:
        url: `redis://[[user]:password@]host:port[/db]`, `rediss://` for TLS, `unix://path`.
        prefix: names this node's data on the server; no two nodes may share one.
        token_of: the 8 big-endian bytes of a key's ring token. One prefix always needs the same function.
        connections_max: connections of this node; a call waits for a free one within its timeout.
        timeout_s: for one command, and for a whole call as often as it sends commands. Default 5 seconds.
    """

    name = "redis"
    local = False
    group_sync = False
    persistent = True

    def __init__(
        self,
        url: str,
        prefix: str,
        token_of: Callable[[bytes], bytes],
        *,
        connections_max: int = 16,
        timeout_s: float = 5.0,
    ) -> None:
        try:
            import redis.asyncio  # noqa: F401 - optional: only who uses this store needs it
        except ImportError:
            raise ConfigError("the Redis store needs its client: pip install 'agi-hpc[redis]'") from None
        self._url = url
        self._token_of = token_of
        self._connections_max = connections_max
        self._timeout_s = timeout_s
        self._records, self._keys, self._tokens, self._expiry, self._meta, self._hints, self._promises = (
            f"{prefix}:{part}" for part in ("records", "keys", "tokens", "expiry", "meta", "hints", "promises")
        )
        self.voting_refusal = _UNKNOWN
        self._client: Redis | None = None
        self._lost = False
        self._run_id: bytes | None = None
        """What the server's run id must be; None where its restarts lose nothing."""

    async def open(self) -> None:
        """Raises StorageError where the server cannot be reached or may have lost writes, ConfigError for a bad URL."""
        if self._client is not None:
            return
        from redis.asyncio import BlockingConnectionPool, Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        try:
            pool = BlockingConnectionPool.from_url(
                self._url,
                max_connections=self._connections_max,
                timeout=self._timeout_s,
                socket_timeout=self._timeout_s,
                socket_connect_timeout=min(CONNECT_TIMEOUT_S, self._timeout_s),
                # A batch that was sent twice could land on a newer one: who failed decides what to do.
                retry=Retry(NoBackoff(), 0),
                redis_connect_func=self._connected,
            )
        except ValueError as error:
            raise ConfigError(f"not the URL of a Redis server: {error}") from None  # the URL may hold a password
        self._run_id, self._lost, self.voting_refusal = None, False, _UNKNOWN
        self._client = client = Redis.from_pool(pool)
        try:
            async with self._call("cannot open the Redis store"):
                run_id = (await client.info("server"))["run_id"].encode()
                stored = await client.hget(self._meta, _RUN_ID)
                if not await self._learn_settings(client):
                    if stored not in (None, run_id):
                        raise self._restarted()
                    self._run_id = run_id
                await client.hset(self._meta, _RUN_ID, run_id)
        except BaseException:
            await self.close()
            raise

    async def _learn_settings(self, client: Redis) -> bool:
        """Whether the server's restarts lose nothing; what keeps it from voting is in `voting_refusal` then."""
        from redis.exceptions import ResponseError

        settings: dict[str, str] = {}
        try:
            for pattern in ("*append*", "maxmemory-policy"):  # one at a time: before Redis 7 there was no more
                found = await client.config_get(pattern)
                settings |= {_text(name): _text(value) for name, value in found.items()}
        except ResponseError as error:  # a managed server
            self.voting_refusal = f"the Redis server does not tell how it stores what it acknowledges: {error}"
            return False
        self.voting_refusal = _voting_refusal(settings)
        return settings.get("appendonly") == "yes" and settings.get("appendfsync") == "always"

    def _restarted(self) -> StorageError:
        return StorageError(
            "the Redis server was restarted without `appendfsync always`: it may have lost acknowledged writes. "
            f"Delete the keys {self._meta.removesuffix(':meta')}:* and let the node join anew"
        )

    async def _connected(self, connection: Any) -> None:
        """Sets a new connection up, and makes sure that it leads to the server that has the data."""
        try:
            await connection.on_connect()
            if self._run_id is not None:
                await connection.send_command("INFO", "server")
                if b"run_id:" + self._run_id not in await connection.read_response(disable_decoding=True):
                    self._lost = True
                    raise self._restarted()
        except BaseException:
            await connection.disconnect()  # else the pool would hand it out unchecked
            raise

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            try:
                async with asyncio.timeout(self._timeout_s):
                    await client.aclose()
                    await client.connection_pool.disconnect()
            except Exception as error:
                raise _storage_error(error, "cannot close the connections") from error

    def _open_client(self) -> Redis:
        if self._client is None:
            raise StorageClosed("the Redis store is not open")
        if self._lost:
            raise self._restarted()
        return self._client

    @asynccontextmanager
    async def _call(self, doing: str) -> AsyncIterator[Redis]:
        """One command with its deadline; errors become typed."""
        client = self._open_client()
        try:
            async with asyncio.timeout(self._timeout_s):
                yield client
        except StorageError:
            raise
        except Exception as error:
            raise _storage_error(error, doing) from error

    # --- records

    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        self._open_client()
        if not keys:
            return []
        async with self._call("a read failed") as client:
            found = cast(list[bytes | None], await client.hmget(self._records, list(keys)))
        for key, record in zip(keys, found, strict=True):
            if record is not None:
                verify(key, record)
        return found

    async def apply(self, batch: Batch) -> None:
        token_of = self._token_of
        check_promises(batch.promises.values())
        async with self._call("a write failed") as client, client.pipeline(transaction=True) as writes:
            if batch.records:
                writes.hset(self._records, items=[part for item in batch.records.items() for part in item])
            if batch.inserts:
                writes.zadd(self._keys, dict.fromkeys(batch.inserts, 0))
                writes.zadd(self._tokens, {token_of(key) + key: 0 for key in batch.inserts})
            expiring = {
                record[32:40] + key: 0
                for key, record in batch.records.items()
                if record[32:40] != _NO_EXPIRY and not record[FLAGS] & SHRUNK
            }
            if expiring:
                writes.zadd(self._expiry, expiring)
            if batch.purges:
                writes.hdel(self._records, *batch.purges)
                writes.zrem(self._keys, *batch.purges)
                writes.zrem(self._tokens, *(token_of(key) + key for key in batch.purges))
            if batch.promises:
                self._promise(writes, batch.promises)
            if len(writes):
                await writes.execute()

    def _promise(self, writes: Pipeline, promises: dict[bytes, bytes]) -> None:
        kept = [part for key, promise in promises.items() if promise for part in (key, pack_promise(key, promise))]
        gone = [key for key, promise in promises.items() if not promise]
        if kept:
            writes.hset(self._promises, items=kept)
        if gone:
            writes.hdel(self._promises, *gone)

    async def _members(self, index: str, low: bytes, high: bytes, count: int) -> list[bytes]:
        async with self._call("a scan failed") as client:
            return cast(list[bytes], await client.zrangebylex(index, low, high, start=0, num=count))

    async def _page(self, index: str, low: bytes, high: bytes, skip: int, limit: int, bytes_max: int | None) -> Page:
        """Records in the order of an index, whose members are keys behind `skip` bytes."""
        items: list[tuple[bytes, bytes]] = []
        size, chunk = 0, CHUNK_KEYS_FIRST
        while True:
            members = await self._members(index, low, high, min(chunk, limit - len(items)) + 1)
            more = len(members) > min(chunk, limit - len(items))
            if more:
                members.pop()
            keys = [member[skip:] for member in members]
            for at, (key, record) in enumerate(zip(keys, await self.get_many(keys), strict=True)):
                if record is None:
                    continue  # purged since its index entry was read
                items.append((key, record))
                size += len(key) + len(record)
                if bytes_max is not None and size > bytes_max:
                    return Page(items, not more and at + 1 == len(keys))
            if not more or len(items) >= limit:
                return Page(items, not more)
            low = b"(" + members[-1]
            chunk = max(1, min(CHUNK_KEYS_MAX, CHUNK_BYTES * len(items) // size)) if size else chunk

    async def scan(self, start: bytes, end: bytes | None, limit: int, bytes_max: int) -> Page:
        high = b"+" if end is None else b"(" + end
        return await self._page(self._keys, b"[" + start, high, 0, limit, bytes_max)

    async def scan_tokens(self, first: int, last: int, limit: int, after: bytes | None = None) -> Page:
        low = b"[" + first.to_bytes(8, "big")
        if after is not None:
            low = max(low, b"[" + self._token_of(after) + after + b"\0")  # the next possible token || key
        high = b"(" + (last + 1).to_bytes(8, "big") if last + 1 < 1 << 64 else b"+"
        return await self._page(self._tokens, low, high, 8, limit, None)

    async def expired(self, before_ms: int, limit: int) -> list[tuple[bytes, bytes]]:
        self._open_client()
        found: list[tuple[bytes, bytes]] = []
        low, high = b"-", b"(" + before_ms.to_bytes(8, "big")
        for _ in range(1 + (limit + EXPIRY_STALE_MAX) // CHUNK_KEYS_MAX):
            entries = await self._members(self._expiry, low, high, CHUNK_KEYS_MAX)
            stale = []
            records = await self.get_many([entry[8:] for entry in entries])
            for entry, record in zip(entries, records, strict=True):
                if record is None or record[32:40] != entry[:8] or record[FLAGS] & SHRUNK:
                    stale.append(entry)
                elif len(found) < limit:
                    found.append((entry[8:], record))
            if stale:
                await self._drop_stale(stale)
            if len(entries) < CHUNK_KEYS_MAX or len(found) >= limit:
                break
            low = b"(" + entries[-1]
        return found

    async def _drop_stale(self, entries: list[bytes]) -> None:
        async with self._call("dropping stale expiry entries failed") as client:
            await client.zrem(self._expiry, *entries)

    # --- figures and metadata

    async def count(self) -> Count:
        async with self._call("a count failed") as client:
            return Count(await client.hlen(self._records), True)

    async def stats(self) -> StoreStats:
        """`bytes` is Redis's estimate of what this node's keys take in the server's memory."""
        async with self._call("stats failed") as client:
            records: int = await client.hlen(self._records)
            parts = (
                self._records,
                self._keys,
                self._tokens,
                self._expiry,
                self._meta,
                self._hints,
                self._promises,
            )
            size = sum([await client.memory_usage(part) or 0 for part in parts])
            memory = await client.info("memory")
        engine = {"server_bytes": int(memory["used_memory"]), "server_bytes_max": int(memory.get("maxmemory", 0))}
        return StoreStats(records, True, size, engine)

    async def get_meta(self, name: str) -> bytes | None:
        async with self._call("a read failed") as client:
            return cast(bytes | None, await client.hget(self._meta, _NAMED + name))

    async def put_meta(self, name: str, value: bytes) -> None:
        async with self._call("a write failed") as client:
            await client.hset(self._meta, _NAMED + name, value)

    async def save_hints(self, hints: Sequence[Hint], gone: Sequence[bytes], *, synced: bool = False) -> None:
        async with self._call("a write of hints failed") as client, client.pipeline(transaction=True) as writes:
            if hints:
                writes.hset(self._hints, items=[part for hint in hints for part in (hint.name, pack_hint(hint))])
            if gone:
                writes.hdel(self._hints, *gone)
            if len(writes):
                await writes.execute()

    async def load_hints(self, start: bytes, limit: int) -> HintPage:
        async with self._call("a read of hints failed") as client:
            answer = await client.hscan(self._hints, int(start or b"0"), count=limit)
        cursor, found = cast(tuple[int, dict[bytes, bytes]], answer)
        hints: list[Hint] = []
        damaged: list[bytes] = []
        for name, packed in found.items():
            try:
                hints.append(unpack_hint(name, packed))
            except StorageCorrupt:
                damaged.append(name)
        return HintPage(hints, damaged, b"%d" % cursor if cursor else b"")

    async def load_promises(self, start: bytes, limit: int) -> PromisePage:
        async with self._call("a read of promises failed") as client:
            answer = await client.hscan(self._promises, int(start or b"0"), count=limit)
        cursor, found = cast(tuple[int, dict[bytes, bytes]], answer)
        items = [(key, unpack_promise(key, packed)) for key, packed in found.items()]
        return PromisePage(items, b"%d" % cursor if cursor else b"")


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
