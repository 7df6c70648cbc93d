"""What the Redis store adds to the contract: shared servers, connections, a server that fails, fills or restarts."""

from __future__ import annotations

import asyncio
import builtins
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from contract.storage_harness import (
    TOKEN_MAX,
    RedisServer,
    all_by_key,
    all_by_token,
    all_promises,
    inserts,
    many,
    promise,
    rec,
    redis_server,
    token_of,
)
from redis.asyncio import Redis

from agi.core.dht.errors import ConfigError, StorageClosed, StorageCorrupt, StorageError, StorageFull
from agi.core.dht.storage.base import Batch, Count
from agi.core.dht.storage.redis import RedisStore


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as server:
        yield server


@asynccontextmanager
async def opened(url: str, prefix: str = "node", **options: Any) -> AsyncIterator[RedisStore]:
    store = RedisStore(url, prefix, token_of, **options)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def raw(url: str) -> AsyncIterator[Redis]:
    client = Redis.from_url(url)
    try:
        yield client
    finally:
        await client.aclose()


async def test_two_nodes_on_one_server_do_not_see_each_other(server: RedisServer) -> None:
    async with opened(server.url, "a") as a, opened(server.url, "b") as b:
        await a.apply(inserts({b"key": rec(b"key", b"of a", expires_ms=5), b"only a": rec(b"only a")}))
        await b.apply(inserts({b"key": rec(b"key", b"of b")}))
        await a.put_meta("identity", b"a")
        await a.apply(Batch(promises={b"key": promise(1)}))
        assert await b.get(b"key") == rec(b"key", b"of b")
        assert await all_by_key(b, 10) == [(b"key", rec(b"key", b"of b"))]
        assert len(await all_by_token(b, 0, TOKEN_MAX, 10)) == 1
        assert await b.expired(10, 10) == []
        assert await b.get_meta("identity") is None
        assert await all_promises(b) == {}
        assert await b.count() == Count(1, True)
        await b.apply(Batch(purges=[b"key", b"only a"], promises={b"key": b""}))
        assert len(await all_by_key(a, 10)) == 2
        assert await all_promises(a) == {b"key": promise(1)}


async def test_all_of_a_node_is_under_its_prefix(server: RedisServer) -> None:
    async with opened(server.url, "cluster:node 1") as store:
        await store.apply(inserts({b"key": rec(b"key", expires_ms=5)}))
        await store.put_meta("identity", b"x")
        await store.apply(Batch(promises={b"key": promise(1)}))
    async with raw(server.url) as client:
        names = sorted([name async for name in client.scan_iter()])
    parts = (b"expiry", b"keys", b"meta", b"promises", b"records", b"tokens")
    assert names == [b"cluster:node 1:" + part for part in parts]


async def test_a_batch_is_one_transaction(server: RedisServer) -> None:
    async with opened(server.url) as store, raw(server.url) as client, client.monitor() as monitor:
        records = {b"a": rec(b"a", expires_ms=9), b"b": rec(b"b")}
        await store.apply(Batch(records, [b"a", b"b"], [b"c"], {b"a": promise(1), b"b": b""}))
        said = []
        async with asyncio.timeout(10):
            async for command in monitor.listen():
                said.append(command["command"].split()[0])
                if said[-1] == "EXEC":
                    break
    assert said == ["MULTI", "HSET", "ZADD", "ZADD", "ZADD", "HDEL", "ZREM", "ZREM", "HSET", "HDEL", "EXEC"]


async def test_more_callers_than_connections_wait_their_turn(server: RedisServer) -> None:
    async with opened(server.url, connections_max=2) as store:
        content = many(100)
        await store.apply(inserts(content))
        found = await asyncio.gather(*(store.get(key) for key in content))
        assert found == list(content.values())
        async with raw(server.url) as client:
            assert len(await client.client_list()) <= 3


async def test_a_full_server_refuses_writes_and_serves_reads(server: RedisServer) -> None:
    async with opened(server.url) as store, raw(server.url) as client:
        await store.apply(inserts({b"a": rec(b"a")}))
        used = (await client.info("memory"))["used_memory"]
        await client.config_set("maxmemory", used + 200_000)
        with pytest.raises(StorageFull):
            for at in range(64):  # new keys each time: what the server frees meanwhile cannot make room for 64 MiB
                key = b"big%d" % at
                await store.apply(inserts({key: rec(key, bytes(1 << 20))}))
        await client.config_set("maxmemory", 1)  # what counted against the limit was the large command itself, too
        with pytest.raises(StorageFull):
            await store.put_meta("m", b"x")
        assert await store.get(b"a") == rec(b"a")
        await client.config_set("maxmemory", 0)
        await store.apply(Batch({b"a": rec(b"a", hlc=2)}))
        assert await store.get(b"a") == rec(b"a", hlc=2)


async def test_a_refused_batch_leaves_nothing(server: RedisServer) -> None:
    async with opened(server.url) as store, raw(server.url) as client:
        await store.apply(Batch(promises={b"a": promise(1), b"b": promise(2)}))
        await client.config_set("maxmemory", 1)
        for batch in (Batch({b"a": rec(b"a", expires_ms=5)}, [b"a"]), Batch()):
            batch.promises = {b"a": promise(3), b"b": b"", b"c": promise(4)}
            with pytest.raises(StorageFull):
                await store.apply(batch)
        await client.config_set("maxmemory", 0)
        assert await all_promises(store) == {b"a": promise(1), b"b": promise(2)}
        assert await store.count() == Count(0, True)
        assert await all_by_key(store, 10) == []
        assert await store.expired(100, 10) == []


async def test_nobody_there_is_a_storage_error() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        store = RedisStore(f"redis://127.0.0.1:{unused.getsockname()[1]}", "node", token_of, timeout_s=1)
        with pytest.raises(StorageError, match="cannot open the Redis store"):
            await store.open()
        with pytest.raises(StorageClosed):
            await store.get(b"a")


async def test_a_silent_server_costs_one_timeout() -> None:
    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    listener = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    try:
        async with asyncio.timeout(10):
            with pytest.raises(StorageError):
                await RedisStore(f"redis://127.0.0.1:{port}", "node", token_of, timeout_s=0.2).open()
    finally:
        listener.close()


async def test_a_lost_server_fails_calls_with_a_type(server: RedisServer) -> None:
    async with opened(server.url, timeout_s=1) as store:
        await store.apply(inserts({b"a": rec(b"a")}))
        server.kill()
        for call in (store.get(b"a"), store.apply(inserts({b"b": rec(b"b")})), store.count(), store.put_meta("m", b"")):
            with pytest.raises(StorageError) as caught:
                await call
            assert type(caught.value) is StorageError


async def test_a_restart_that_lost_writes_is_noticed(server: RedisServer) -> None:
    async with opened(server.url) as store:
        await store.apply(inserts({b"a": rec(b"a")}))
        server.restart()
        for _ in range(2):
            with pytest.raises(StorageError):
                await store.get(b"a")
        with pytest.raises(StorageError, match="appendfsync always"):
            await store.apply(inserts({b"b": rec(b"b")}))
    async with opened(server.url) as store:  # it came back empty: identity and all
        assert await store.count() == Count(0, True)


async def test_a_restart_from_an_old_snapshot_is_refused_until_cleared(tmp_path: Path) -> None:
    with redis_server(tmp_path, "--appendonly", "no", "--dbfilename", "dump.rdb") as server:
        async with opened(server.url) as store:
            await store.apply(inserts({b"a": rec(b"a")}))
            async with raw(server.url) as client:
                await client.save()
            await store.apply(inserts({b"lost": rec(b"lost")}))
        server.restart()
        with pytest.raises(StorageError, match="may have lost acknowledged writes"):
            async with opened(server.url):
                pass
        async with raw(server.url) as client:
            await client.delete(*[name async for name in client.scan_iter("node:*")])
        async with opened(server.url) as store:
            assert await store.count() == Count(0, True)


async def test_a_server_that_syncs_always_may_restart(tmp_path: Path) -> None:
    with redis_server(tmp_path, "--appendonly", "yes", "--appendfsync", "always") as server:
        async with opened(server.url) as store:
            assert store.voting_refusal == ""
            content = many(50)
            promised = {key: promise(at) for at, key in enumerate(content)}
            await store.apply(Batch(dict(content), list(content), promises=promised))
            await store.apply(Batch(promises={b"key:000000": b"", b"key:000001": promise(99)}))
            del promised[b"key:000000"]
            promised[b"key:000001"] = promise(99)
            server.restart()
            with pytest.raises(StorageError):  # the connection that it had
                await store.get(b"key:000000")
            assert await all_by_key(store, 20) == sorted(content.items())
            assert await all_promises(store, 20) == promised
        async with opened(server.url) as store:
            assert await all_by_key(store, 20) == sorted(content.items())
            assert await all_promises(store, 20) == promised


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--appendonly yes --appendfsync always", ""),
        ("--appendonly yes --appendfsync always --maxmemory-policy volatile-lru", ""),
        ("--appendonly no --appendfsync always", "`appendonly no`, not `appendonly yes`"),
        ("--appendonly yes --appendfsync everysec", "`appendfsync everysec`, not `appendfsync always`"),
        ("--appendonly yes --appendfsync no", "`appendfsync no`, not `appendfsync always`"),
        (
            "--appendonly yes --appendfsync always --no-appendfsync-on-rewrite yes",
            "`no-appendfsync-on-rewrite yes`: it does not sync",
        ),
        (
            "--appendonly yes --appendfsync always --maxmemory-policy allkeys-lru",
            "`maxmemory-policy allkeys-lru`: it may throw promises away",
        ),
    ],
)
async def test_only_a_server_that_forgets_nothing_may_keep_promises(tmp_path: Path, options: str, reason: str) -> None:
    with redis_server(tmp_path, *options.split()) as server:
        store = RedisStore(server.url, "node", token_of)
        assert "not known yet" in store.voting_refusal
        await store.open()
        assert reason in store.voting_refusal
        assert bool(reason) == bool(store.voting_refusal)
        await store.close()


async def test_a_server_that_hides_its_settings_may_not_keep_promises(tmp_path: Path) -> None:
    with redis_server(tmp_path, "--appendonly", "yes", "--appendfsync", "always") as server:
        async with raw(server.url) as client:
            await client.acl_setuser("guest", enabled=True, nopass=True, keys=["*"], commands=["+@all", "-config"])
        async with opened(server.url.replace("//", "//guest:any@")) as store:
            assert store.voting_refusal.startswith("the Redis server does not tell how it stores")
            assert "no permissions" in store.voting_refusal
            await store.apply(inserts({b"a": rec(b"a")}))


async def test_a_broken_record_is_not_served(server: RedisServer) -> None:
    async with opened(server.url) as store, raw(server.url) as client:
        await store.apply(inserts({b"a": rec(b"a"), b"b": rec(b"b")}))
        await client.hset("node:records", b"a", rec(b"a")[:-1] + b"!")  # type: ignore[misc]
        for call in (store.get(b"a"), store.scan(b"", None, 9, 999), store.scan_tokens(0, TOKEN_MAX, 9)):
            with pytest.raises(StorageCorrupt, match="b'a'"):
                await call
        assert await store.get(b"b") == rec(b"b")


async def test_stats_tell_of_the_server(server: RedisServer) -> None:
    async with opened(server.url) as store:
        await store.apply(inserts(many(1000)))
        stats = await store.stats()
        assert (stats.records, stats.exact) == (1000, True)
        assert 50_000 < stats.bytes < stats.engine["server_bytes"]


def test_a_bad_url_is_a_configuration_error() -> None:
    async def attempt(url: str) -> None:
        await RedisStore(url, "node", token_of).open()

    for url in ("localhost:6379", "http://localhost", "redis://localhost:port"):
        with pytest.raises(ConfigError, match="URL"):
            asyncio.run(attempt(url))


def test_without_the_client_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == "redis":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"pip install 'agi-hpc\[redis\]'"):
        RedisStore("redis://localhost", "node", token_of)
