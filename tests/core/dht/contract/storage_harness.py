"""What the storage tests share: records to store, and a fresh store of each kind, over a real Redis server."""

from __future__ import annotations

import itertools
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import xxhash

from agi.core.dht.protocol import record as records
from agi.core.dht.protocol.hints import Hint
from agi.core.dht.storage.base import Batch, StorageBackend, WalSync
from agi.core.dht.storage.memory import MemoryStore
from agi.core.dht.storage.redis import RedisStore
from agi.core.dht.storage.rocksdb import RocksStore

KINDS = ("memory", "rocksdb", "redis")
TOKEN_MAX = (1 << 64) - 1
token_of = xxhash.xxh3_64_digest
_numbers = itertools.count()


def token(key: bytes) -> int:
    return int.from_bytes(token_of(key), "big")


def rec(key: bytes, value: bytes = b"v", *, hlc: int = 1, expires_ms: int = 0, flags: int = 0) -> bytes:
    return records.pack(key, value, hlc=hlc, writer=7, created_ms=5, expires_ms=expires_ms, flags=flags)


def inserts(content: Mapping[bytes, bytes]) -> Batch:
    """A batch of keys that the store does not hold."""
    return Batch(dict(content), list(content))


def many(count: int, prefix: bytes = b"key:") -> dict[bytes, bytes]:
    return {key: rec(key, b"value of " + key, hlc=at + 1) for at in range(count) for key in [b"%b%06d" % (prefix, at)]}


def hint(number: int, node: str = "n1", value: bytes = b"v") -> Hint:
    key = b"k%06d" % number
    return Hint(node, "disk", 3, number, 1000 + number, key, rec(key, value, hlc=number, expires_ms=7))


async def all_hints(store: StorageBackend, limit: int = 100) -> tuple[list[Hint], list[bytes]]:
    """The hints of a store in their order, and the names of what is damaged, page by page."""
    hints: dict[bytes, Hint] = {}
    damaged: list[bytes] = []
    start = b""
    while True:
        page = await store.load_hints(start, limit)
        hints |= {found.name: found for found in page.hints}
        damaged += page.damaged
        start = page.next
        if not start:
            return sorted(hints.values(), key=lambda found: found.number), damaged


def promise(number: int) -> bytes:
    return number.to_bytes(16, "big")


async def all_promises(store: StorageBackend, limit: int = 100) -> dict[bytes, bytes]:
    """The promises of a store, page by page."""
    found: dict[bytes, bytes] = {}
    start = b""
    while True:
        page = await store.load_promises(start, limit)
        found |= page.items
        start = page.next
        if not start:
            return found


class RedisServer:
    """A real server with a folder of its own. `restart` is a crash: what the server did not store is gone."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._folder = folder
        self._options = options
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder)]
        command += ["--save", "", *(self._options or ("--appendonly", "no"))]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self._process.stdout is not None
        said = []
        for line in self._process.stdout:
            said.append(line)
            if "eady to accept connections" in line:
                return
        raise AssertionError("redis-server did not start: " + "".join(said))

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=10)
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None

    def restart(self) -> None:
        self.kill()
        self.start()


@contextmanager
def redis_server(folder: Path, *options: str) -> Iterator[RedisServer]:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed (scripts/system_packages installs it)")
    server = RedisServer(folder, *options)
    server.start()
    try:
        yield server
    finally:
        server.kill()


class Site:
    """A place for one store: `make` gives a store object on it, again and again on the same data."""

    def __init__(self, kind: str, folder: Path, redis_url: str) -> None:
        self.kind = kind
        self.keeps = kind != "memory"
        self._folder = folder / f"store{next(_numbers)}"
        self.redis_url = redis_url
        self._prefix = f"node{next(_numbers)}"

    async def damage_hint(self, store: StorageBackend, name: bytes) -> None:
        """Flips a bit of a stored hint behind the store's back; the memory store has no such place."""
        if isinstance(store, RocksStore):
            family = store._open_engine().hints
            packed = family[name]
            family[name] = packed[:-1] + bytes([packed[-1] ^ 1])
        elif isinstance(store, RedisStore):
            client = store._open_client()
            packed = await client.hget(store._hints, name)  # type: ignore[misc]  # redis-py's types know no awaiting
            await client.hset(store._hints, name, packed[:-1] + bytes([packed[-1] ^ 1]))  # type: ignore[misc]

    async def damage_promise(self, store: StorageBackend, key: bytes, damage: Callable[[bytes], bytes]) -> None:
        """Alters what is stored of a promise behind the store's back."""
        if isinstance(store, RocksStore):
            family = store._open_engine().promises
            family[key] = damage(family[key])
        elif isinstance(store, RedisStore):
            client = store._open_client()
            packed = await client.hget(store._promises, key)  # type: ignore[misc]  # redis-py's types know no awaiting
            await client.hset(store._promises, key, damage(packed))  # type: ignore[misc]

    def make(self) -> StorageBackend:
        if self.kind == "memory":
            return MemoryStore(token_of)
        if self.kind == "rocksdb":
            return RocksStore(self._folder, token_of, wal_sync=WalSync.NONE)
        return RedisStore(self.redis_url, self._prefix, token_of)


async def all_by_key(store: StorageBackend, limit: int) -> list[tuple[bytes, bytes]]:
    """The whole store, page by page."""
    found: list[tuple[bytes, bytes]] = []
    start = b""
    while True:
        page = await store.scan(start, None, limit, 1 << 30)
        assert len(page.items) == limit or page.complete
        found += page.items
        if page.complete:
            return found
        start = page.items[-1][0] + b"\0"


async def all_by_token(store: StorageBackend, first: int, last: int, limit: int) -> list[tuple[bytes, bytes]]:
    found: list[tuple[bytes, bytes]] = []
    after = None
    while True:
        page = await store.scan_tokens(first, last, limit, after)
        assert len(page.items) == limit or page.complete
        found += page.items
        if page.complete:
            return found
        after = page.items[-1][0]


def by_token(content: Mapping[bytes, bytes], keys: Sequence[bytes] | None = None) -> list[tuple[bytes, bytes]]:
    return sorted(((key, content[key]) for key in keys or content), key=lambda item: token_of(item[0]) + item[0])
