"""What the storage tests share: records to store, and a fresh store of each kind, over a real Redis server."""

from __future__ import annotations

import itertools
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import xxhash

from agi.core.dht.protocol import record as records
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
