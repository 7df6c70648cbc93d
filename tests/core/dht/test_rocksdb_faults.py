"""What the RocksDB store keeps when things break: processes, bits, disks, folders."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from contract.storage_harness import (
    TOKEN_MAX,
    all_by_key,
    all_by_token,
    all_hints,
    all_promises,
    by_token,
    hint,
    inserts,
    many,
    promise,
    rec,
    token_of,
)
from rocksdict import Cache, Rdict

from agi.core.dht.errors import FolderUnusable, Overloaded, StorageClosed, StorageCorrupt, StorageError, StorageFull
from agi.core.dht.storage import rocksdb_engine, sync_thread, wal_files
from agi.core.dht.storage.base import Batch, Count, WalSync
from agi.core.dht.storage.rocksdb import RocksStore

WRITER = """
import asyncio, os, sys, xxhash
from agi.core.dht.protocol.record import pack
from agi.core.dht.storage.base import Batch, WalSync
from agi.core.dht.storage.rocksdb import RocksStore

async def main(path, mode, first):
    store = RocksStore(path, xxhash.xxh3_64_digest, wal_sync=WalSync(mode), wal_sync_interval_ms=5)
    await store.open()
    for number in range(first, 1 << 30):
        keys = [b"%08d-%d" % (number, part) for part in range(5)]
        batch = Batch({key: pack(key, key * 20, hlc=number + 1, writer=1) for key in keys}, keys)
        batch.promises = {b"same": number.to_bytes(16, "big"), b"%08d" % number: bytes(16), b"%08d" % (number - 3): b""}
        await store.apply(batch)
        os.write(1, b"%08d\\n" % number)
        if number % 64 == 0:
            await asyncio.sleep(0)

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""

BLOCK = 32 * 1024
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tmpfs, which needs root")


@asynccontextmanager
async def opened(path: Path, wal_sync: WalSync = WalSync.NONE, **options: int) -> AsyncIterator[RocksStore]:
    store = RocksStore(path, token_of, wal_sync=wal_sync, **options)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


async def until(condition: Callable[[], Any], what: str) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"not within 10 s: {what}")


async def exact_count(store: RocksStore) -> int:
    for _ in range(2000):
        if (count := await store.count()).exact:
            return count.records
        await asyncio.sleep(0.005)
    raise AssertionError("the count stayed an estimate for 10 s")


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=30, check=False)


def writer(*arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", WRITER, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0)


async def crash_image(path: Path, image: Path, batches: int, size: int = 100) -> dict[bytes, bytes]:
    """A folder as kill -9 leaves it: everything in the log. Returns what was acknowledged, a key a batch."""
    content = {key: rec(key, bytes(random.Random(at).randbytes(size))) for at, key in enumerate(many(batches))}
    async with opened(path) as store:
        for key, record in content.items():
            store.write(inserts({key: record}))
        shutil.copytree(path, image)
    return content


def flip(path: Path, at: int, bit: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ bit]))


def log_records(log: Path) -> list[int]:
    """The offset of each physical record of a write-ahead log."""
    data, at, found = log.read_bytes(), 0, []
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        found.append(at)
        at += 7 + struct.unpack_from("<H", data, at + 4)[0]
    return found


# --- kill -9


@pytest.mark.parametrize("mode", list(WalSync))
async def test_kill_9_loses_nothing_acknowledged(tmp_path: Path, mode: WalSync) -> None:
    folder = tmp_path / "store"
    first = 0
    for lines in (1, 300, 2000):
        child = writer(folder, mode, first)
        assert child.stdout is not None
        said = b""
        while said.count(b"\n") < lines:
            chunk = os.read(child.stdout.fileno(), 4096)
            assert chunk, "the writer died by itself"
            said += chunk
        child.send_signal(signal.SIGKILL)
        said += child.stdout.read()
        child.stdout.close()
        assert child.wait(timeout=10) == -signal.SIGKILL
        last = int(said.split(b"\n")[-2])
        async with opened(folder, mode) as store:
            content = dict(await all_by_key(store, 1000))
            for number in range(last + 1):
                for part in range(5):
                    key = b"%08d-%d" % (number, part)
                    assert content[key][40:] == key * 20, f"batch {number}, acknowledged, is not whole"
            numbers = sorted({int(key[:8]) for key in content})
            assert numbers == list(range(len(numbers)))
            assert len(content) == 5 * len(numbers), "a batch is neither whole nor absent"
            assert await exact_count(store) == len(content)
            assert dict(await all_by_token(store, 0, TOKEN_MAX, 1000)) == content
            left = {b"%08d" % number: bytes(16) for number in numbers[-3:]} | {b"same": promise(numbers[-1])}
            assert await all_promises(store, 2) == left, "promises and records are not of one batch"
        first = numbers[-1] + 1


async def test_a_crash_is_recounted_while_writes_go_on(tmp_path: Path) -> None:
    content = await crash_image(tmp_path / "a", tmp_path / "b", 3000)
    async with opened(tmp_path / "b") as store:
        assert not (await store.count()).exact
        early, late = b"a first", b"z last"
        store.write(Batch({early: rec(early), late: rec(late)}, [early, late], [b"key:000000", b"key:002999"]))
        assert await exact_count(store) == len(content)
        store.write(Batch(purges=[early]))
        assert await store.count() == Count(2999, True)
    async with opened(tmp_path / "b") as store:
        assert await store.count() == Count(2999, True)


# --- flipped bits


async def test_a_torn_last_write_is_absent_and_the_rest_is_there(tmp_path: Path) -> None:
    content = await crash_image(tmp_path / "a", tmp_path / "b", 400)
    log = wal_files.wal_files(tmp_path / "b")[-1]
    last = log_records(log)[-1]
    for cut in (log.stat().st_size - 1, last + 30, last + 7, last + 3):
        image = tmp_path / f"cut{cut}"
        shutil.copytree(tmp_path / "b", image)
        os.truncate(image / log.name, cut)
        async with opened(image) as store:
            assert await all_by_key(store, 1000) == sorted(content.items())[:-1]


async def test_a_log_flipped_in_the_middle_is_refused(tmp_path: Path) -> None:
    await crash_image(tmp_path / "a", tmp_path / "b", 500)
    log = wal_files.wal_files(tmp_path / "b")[-1]
    size = log.stat().st_size
    assert size > 2 * BLOCK
    for at in (10, BLOCK - 100, BLOCK + 500, size // 2, size - 400):
        image = tmp_path / f"flip{at}"
        shutil.copytree(tmp_path / "b", image)
        flip(image / log.name, at)
        with pytest.raises(StorageCorrupt):
            await RocksStore(image, token_of).open()


@pytest.mark.parametrize("block", ["first", "last"])
async def test_no_flipped_bit_of_a_record_header_loses_data_or_hangs(tmp_path: Path, block: str) -> None:
    """In the last block a damaged length looks like a torn write to RocksDB, and a recycled type hangs it."""
    await crash_image(tmp_path / "a", tmp_path / "b", 400)
    log = wal_files.wal_files(tmp_path / "b")[-1]
    offsets = log_records(log)
    start = offsets[20] if block == "first" else offsets[-3]
    for at in range(start, start + 7):
        for bit in range(8):
            flip(log, at, 1 << bit)
            with pytest.raises(StorageCorrupt):
                await RocksStore(tmp_path / "b", token_of).open()
            flip(log, at, 1 << bit)


async def test_random_flips_of_the_log_never_lose_in_silence(tmp_path: Path) -> None:
    content = await crash_image(tmp_path / "a", tmp_path / "b", 300)
    log = wal_files.wal_files(tmp_path / "b")[-1]
    rng = random.Random(11)
    refused = 0
    for number in range(25):
        image = tmp_path / f"image{number}"
        shutil.copytree(tmp_path / "b", image)
        flip(image / log.name, rng.randrange(log.stat().st_size), 1 << rng.randrange(8))
        store = RocksStore(image, token_of)
        try:
            await store.open()
        except StorageCorrupt:
            refused += 1
            continue
        assert await all_by_key(store, 1000) == sorted(content.items())
        await store.close()
    assert refused >= 20


async def test_a_damaged_file_gives_an_error_or_the_truth(tmp_path: Path) -> None:
    content = {key: rec(key, random.Random(at).randbytes(60)) for at, key in enumerate(many(3000))}
    async with opened(tmp_path / "a") as store:
        store.write(inserts(content))
    files = sorted((tmp_path / "a").glob("*.sst"))
    assert files
    errors = silent = 0
    rng = random.Random(5)
    for number in range(30):
        image = tmp_path / f"image{number}"
        shutil.copytree(tmp_path / "a", image)
        victim = image / rng.choice(files).name
        for _ in range(1 + number % 3):
            flip(victim, rng.randrange(victim.stat().st_size), 1 << rng.randrange(8))
        store = RocksStore(image, token_of)
        failed = 0
        try:
            await store.open()
        except StorageCorrupt:
            errors += 1
            continue
        for check in (
            lambda store=store: all_by_key(store, 1000),
            lambda store=store: all_by_token(store, 0, TOKEN_MAX, 1000),
        ):
            try:
                assert dict(await check()) == content, "a scan left something out"
            except StorageCorrupt:
                failed = 1
        for key in list(content)[::7]:
            try:
                assert store.read([key]) == [content[key]]
            except StorageCorrupt:
                failed = 1
        errors += failed
        silent += 1 - failed
        await store.close()
        shutil.rmtree(image)
    assert errors > silent


async def test_damaged_files_never_forget_a_promise(tmp_path: Path) -> None:
    kept = {key: random.Random(at).randbytes(16) for at, key in enumerate(many(2000))}
    async with opened(tmp_path / "a") as store:
        store.write(Batch(promises=kept))
    files = sorted((tmp_path / "a").glob("*.sst"), key=lambda path: path.stat().st_size)
    assert files[-1].stat().st_size > 2000 * 16
    refused = 0
    rng = random.Random(5)
    for number in range(20):
        image = tmp_path / f"image{number}"
        shutil.copytree(tmp_path / "a", image)
        victim = image / files[-1].name
        flip(victim, rng.randrange(victim.stat().st_size), 1 << rng.randrange(8))
        try:
            async with opened(image) as store:
                assert await all_promises(store, 500) == kept
        except StorageCorrupt:
            refused += 1
        shutil.rmtree(image)
    assert refused >= 10


async def test_a_missing_file_is_corruption(tmp_path: Path) -> None:
    async with opened(tmp_path / "a") as store:
        store.write(inserts(many(100)))
    for file in (tmp_path / "a").glob("*.sst"):
        file.unlink()
    with pytest.raises(StorageCorrupt):
        async with opened(tmp_path / "a") as store:
            await all_by_key(store, 10)


async def test_a_record_with_a_broken_checksum_is_not_served(tmp_path: Path) -> None:
    content = many(10)
    async with opened(tmp_path / "a") as store:
        store.write(inserts(content))
        bad = bytearray(content[b"key:000004"])
        bad[-1] ^= 1
        assert store._engine is not None
        store._engine.db.put(token_of(b"key:000004") + b"key:000004", bytes(bad))
    async with opened(tmp_path / "a") as store:
        for read in (store.read, store.headers):
            with pytest.raises(StorageCorrupt, match="key:000004"):
                read([b"key:000003", b"key:000004"])
        assert store.read([b"key:000003"]) == [content[b"key:000003"]]
        with pytest.raises(StorageCorrupt, match="key:000004"):
            await store.scan(b"", None, 100, 1 << 20)
        with pytest.raises(StorageCorrupt, match="key:000004"):
            await store.scan_tokens(0, TOKEN_MAX, 100)
        assert len((await store.scan(b"key:000005", None, 100, 1 << 20)).items) == 5


async def test_damaged_metadata_is_not_served(tmp_path: Path) -> None:
    async with opened(tmp_path / "a") as store:
        await store.put_meta("identity", b"disk 1")
        assert store._engine is not None
        stored = store._engine.meta.get(b"named:identity")
        store._engine.meta.put(b"named:identity", stored[:-1] + b"2")
        with pytest.raises(StorageCorrupt, match="identity"):
            await store.get_meta("identity")


# --- syncs


class Broken:
    """A database whose syncs fail from now on."""

    def __init__(self, db: Any) -> None:
        self._db = db

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)

    def flush_wal(self, sync: bool) -> None:
        raise Exception("IO error: While fdatasync: 000004.log: Input/output error")


class Counting(Broken):
    syncs = 0

    def flush_wal(self, sync: bool) -> None:
        assert sync
        self.syncs += 1
        self._db.flush_wal(True)


async def test_sync_reports_in_the_loop_and_covers_what_was_written(tmp_path: Path) -> None:
    async with opened(tmp_path / "a", WalSync.GROUP) as store:
        assert store.group_sync
        store.write(inserts(many(10)))
        reported: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        store.sync(reported.set_result)
        assert not reported.done()
        assert await asyncio.wait_for(reported, 10) is None


async def test_after_a_failed_sync_only_reads_go_on(tmp_path: Path) -> None:
    async with opened(tmp_path / "a", WalSync.GROUP) as store:
        await store.apply(inserts({b"a": rec(b"a")}))
        engine = store._engine
        assert engine is not None
        whole, engine.db = engine.db, Broken(engine.db)
        with pytest.raises(StorageError, match="sync failed"):
            await store.apply(inserts({b"b": rec(b"b")}))
        engine.db = whole  # the disk seems well again, but nobody knows what it kept
        for refused in (store.apply(inserts({b"c": rec(b"c")})), store.put_meta("m", b"")):
            with pytest.raises(StorageError, match="takes no more writes"):
                await refused
        reported: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        store.sync(reported.set_result)
        assert isinstance(await asyncio.wait_for(reported, 10), StorageError)
        assert store.read([b"a"]) == [rec(b"a")]
        assert [key for key, _ in await all_by_key(store, 10)] == [b"a", b"b"]
        assert (await store.stats()).engine["refuses_writes"] == 1
    async with opened(tmp_path / "a") as store:
        assert store.read([b"a", b"c"]) == [rec(b"a"), None]


async def test_an_interval_store_syncs_when_written_and_fails_when_that_fails(tmp_path: Path) -> None:
    async with opened(tmp_path / "a", WalSync.INTERVAL, wal_sync_interval_ms=1) as store:
        assert not store.group_sync
        engine = store._engine
        assert engine is not None
        counting = engine.db = Counting(engine.db)
        await store.apply(inserts({b"a": rec(b"a")}))
        await until(lambda: counting.syncs == 1, "the write was synced")
        turns = store._timer
        await until(lambda: store._timer is not turns, "the timer goes on")
        assert counting.syncs == 1, "an idle store does not sync"
        engine.db = Broken(counting._db)
        await store.apply(inserts({b"b": rec(b"b")}))
        await until(lambda: store._sync_error is not None, "the background sync failed")
        with pytest.raises(StorageError, match="takes no more writes"):
            await store.apply(inserts({b"c": rec(b"c")}))
        engine.db = counting._db


async def test_a_store_without_syncs_never_syncs(tmp_path: Path) -> None:
    async with opened(tmp_path / "a", WalSync.NONE) as store:
        engine = store._engine
        assert engine is not None
        counting = engine.db = Counting(engine.db)
        await store.apply(inserts(many(100)))
        assert counting.syncs == 0
        await store.put_meta("identity", b"is synced all the same")
        assert counting.syncs == 1
        engine.db = counting._db


class Slow(Counting):
    """A database whose syncs wait for `go`."""

    def __init__(self, db: Any) -> None:
        super().__init__(db)
        self.go = threading.Event()
        self.at_once = self.most_at_once = 0

    def flush_wal(self, sync: bool) -> None:
        self.at_once += 1
        self.most_at_once = max(self.at_once, self.most_at_once)
        assert self.go.wait(10)
        super().flush_wal(sync)
        self.at_once -= 1


@pytest.mark.parametrize("mode", [WalSync.INTERVAL, WalSync.NONE])
async def test_a_sync_works_whatever_the_mode(tmp_path: Path, mode: WalSync) -> None:
    async with opened(tmp_path / "a", mode, wal_sync_interval_ms=50) as store:
        assert not store.group_sync
        engine = store._engine
        assert engine is not None
        counting = engine.db = Counting(engine.db)
        store.write(Batch({b"a": rec(b"a")}, [b"a"], promises={b"a": promise(1)}))
        assert counting.syncs == 0
        reported: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        store.sync(reported.set_result)
        assert await asyncio.wait_for(reported, 10) is None
        await asyncio.sleep(0.15)
        assert counting.syncs == 1, "what was synced is not synced again at the next interval"
        engine.db = Broken(counting._db)
        store.write(Batch(promises={b"a": promise(2)}))
        reported = asyncio.get_running_loop().create_future()
        store.sync(reported.set_result)
        assert isinstance(await asyncio.wait_for(reported, 10), StorageError)
        engine.db = counting._db
        with pytest.raises(StorageError, match="takes no more writes"):
            store.write(Batch(promises={b"a": promise(3)}))


async def test_syncs_beside_the_interval_sync_queue_up(tmp_path: Path) -> None:
    async with opened(tmp_path / "a", WalSync.INTERVAL, wal_sync_interval_ms=1) as store:
        engine = store._engine
        assert engine is not None
        slow = engine.db = Slow(engine.db)
        store.write(inserts({b"a": rec(b"a")}))
        await until(lambda: slow.at_once, "the interval sync is under way")
        ended: list[tuple[str, Exception | None, int]] = []
        for name in ("first", "second"):
            store.write(Batch(promises={name.encode(): promise(1)}))
            store.sync(lambda error, name=name: ended.append((name, error, slow.syncs)))
        await asyncio.sleep(0.05)
        assert not ended
        slow.go.set()
        await until(lambda: len(ended) == 2, "both syncs ended")
        assert [(name, error) for name, error, _ in ended] == [("first", None), ("second", None)]
        assert ended[0][2] >= 2, "a sync that began before the write does not cover it"
        assert ended[1][2] >= 3
        assert slow.most_at_once == 1
        store.write(inserts({b"b": rec(b"b")}))
        await until(lambda: slow.syncs >= 4, "the interval goes on")
        engine.db = slow._db


async def test_a_failed_sync_fails_those_queued_behind_it(tmp_path: Path) -> None:
    async with opened(tmp_path / "a", WalSync.NONE) as store:
        engine = store._engine
        assert engine is not None
        whole, engine.db = engine.db, Broken(engine.db)
        ended: list[Exception | None] = []
        for number in range(2):
            store.write(Batch(promises={b"a": promise(number)}))
            store.sync(ended.append)
        await until(lambda: len(ended) == 2, "both syncs ended")
        assert all(isinstance(error, StorageError) for error in ended)
        engine.db = whole


async def test_the_interval_goes_on_after_too_many_syncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync_thread, "QUEUE_ITEMS_MAX", 2)
    async with opened(tmp_path / "a", WalSync.INTERVAL, wal_sync_interval_ms=1) as store:
        engine = store._engine
        assert engine is not None
        slow = engine.db = Slow(engine.db)
        ended: list[Exception | None] = []
        for _ in range(2):
            store.sync(ended.append)
        with pytest.raises(Overloaded):
            store.sync(ended.append)
        store.write(inserts({b"a": rec(b"a")}))
        await asyncio.sleep(0.05)  # some intervals, in which nothing more can be queued
        slow.go.set()
        await until(lambda: slow.syncs == 3, "the write was synced at an interval")
        assert ended == [None, None]
        engine.db = slow._db


# --- hints


async def test_hints_reach_the_log_without_a_sync_of_their_own(tmp_path: Path) -> None:
    async with opened(tmp_path / "a", WalSync.GROUP) as store:
        engine = store._engine
        assert engine is not None
        counting = engine.db = Counting(engine.db)
        await store.save_hints([hint(1), hint(2)], [])
        await store.save_hints([hint(3)], [hint(1).name])
        assert counting.syncs == 0
        shutil.copytree(tmp_path / "a", tmp_path / "killed")  # as kill -9 leaves it
        await store.save_hints([], [hint(2).name, hint(3).name], synced=True)
        assert counting.syncs == 1
        engine.db = counting._db
    async with opened(tmp_path / "killed") as store:
        assert await all_hints(store) == ([hint(2), hint(3)], [])
    async with opened(tmp_path / "a") as store:
        assert await all_hints(store) == ([], [])


async def test_a_store_that_refuses_writes_refuses_hints(tmp_path: Path) -> None:
    async with opened(tmp_path / "a", WalSync.GROUP) as store:
        engine = store._engine
        assert engine is not None
        whole, engine.db = engine.db, Broken(engine.db)
        with pytest.raises(StorageError, match="sync failed"):
            await store.apply(inserts({b"b": rec(b"b")}))
        engine.db = whole
        with pytest.raises(StorageError, match="takes no more writes"):
            await store.save_hints([hint(1)], [])
        assert await all_hints(store) == ([], [])


@pytest.mark.parametrize("more", [(), ("hints",)], ids=["hints", "promises"])
async def test_a_folder_from_before_there_was_a_family_opens(tmp_path: Path, more: tuple[str, ...]) -> None:
    cache = Cache(1 << 20)
    families = {name: rocksdb_engine._family(cache, 1 << 20) for name in ("keys", "expiry", "meta", *more)}
    old = Rdict(str(tmp_path / "a"), rocksdb_engine._options(cache), column_families=families)
    old[token_of(b"k") + b"k"] = rec(b"k")
    keys = old.get_column_family("keys")
    keys[b"k"] = b""
    keys.close()
    old.close()
    async with opened(tmp_path / "a") as store:
        assert await all_by_key(store, 10) == [(b"k", rec(b"k"))]
        assert await all_hints(store) == ([], [])
        assert await all_promises(store) == {}
        await store.save_hints([hint(1)], [])
        store.write(Batch(promises={b"k": promise(1)}))
    async with opened(tmp_path / "a") as store:
        assert (await store.get(b"k"), await all_hints(store)) == (rec(b"k"), ([hint(1)], []))
        assert await all_promises(store) == {b"k": promise(1)}


# --- folders


async def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    async with opened(tmp_path / "a"):
        with pytest.raises(FolderUnusable):
            await RocksStore(tmp_path / "a", token_of).open()
        script = "import asyncio, sys, xxhash; from agi.core.dht.storage.rocksdb import RocksStore as R\n"
        script += "asyncio.run(R(sys.argv[1], xxhash.xxh3_64_digest).open())"
        other = run(sys.executable, "-c", script, tmp_path / "a")
        assert other.returncode != 0
        assert "FolderUnusable" in other.stderr
    async with opened(tmp_path / "a"):
        pass


async def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(FolderUnusable):
            await RocksStore(path, token_of).open()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
async def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(mode=0o500)
    for path in (tmp_path / "a", tmp_path / "a" / "below"):
        with pytest.raises(FolderUnusable):
            await RocksStore(path, token_of).open()


async def test_a_failed_open_leaves_a_store_that_can_be_opened(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    store = RocksStore(tmp_path / "a", token_of)
    with pytest.raises(FolderUnusable):
        await store.open()
    with pytest.raises(StorageClosed):
        store.read([b"a"])
    await store.close()
    (tmp_path / "a").unlink()
    await store.open()
    await store.close()


async def test_a_checkpoint_is_a_store_of_that_moment(tmp_path: Path) -> None:
    content = many(2000)
    async with opened(tmp_path / "a") as store:
        store.write(inserts(content))
        await store.put_meta("identity", b"me")
        store.write(Batch(promises={b"key:000000": promise(1)}))
        await store.checkpoint(tmp_path / "copy")
        store.write(Batch({b"later": rec(b"later")}, [b"later"], promises={b"later": promise(2)}))
        with pytest.raises(StorageError, match="copy"):
            await store.checkpoint(tmp_path / "copy")
        store.write(Batch(purges=[b"later"]))
    async with opened(tmp_path / "copy") as copy:
        assert await all_by_key(copy, 1000) == sorted(content.items())
        assert await all_by_token(copy, 0, TOKEN_MAX, 1000) == by_token(content)
        assert await copy.get_meta("identity") == b"me"
        assert await all_promises(copy) == {b"key:000000": promise(1)}
        assert await exact_count(copy) == 2000


async def test_closing_waits_for_syncs_under_way(tmp_path: Path) -> None:
    store = RocksStore(tmp_path / "a", token_of, wal_sync=WalSync.GROUP)
    await store.open()
    store.write(inserts(many(10)))
    results: list[Exception | None] = []
    for _ in range(3):
        store.sync(results.append)
    await store.close()
    assert results == [None, None, None]
    with pytest.raises(StorageClosed):
        store.sync(results.append)


# --- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = run("mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        run("umount", "-l", disk)


async def fill(store: RocksStore, first: int = 0, *, with_promises: bool = False) -> dict[bytes, bytes]:
    """Writes until the disk is full; returns what was acknowledged."""
    acknowledged: dict[bytes, bytes] = {}
    for number in range(first, first + 100_000):
        key = b"%06d" % number
        record = rec(key, random.Random(number).randbytes(4000))
        batch = inserts({key: record})
        if with_promises:
            batch.promises = {key: promise(number), b"last": promise(number)}
        try:
            if number % 50:
                store.write(batch)
            else:
                await store.apply(batch)
        except StorageFull:
            return acknowledged
        acknowledged[key] = record
    raise AssertionError("the disk did not fill")


@pytest.mark.root
@as_root
async def test_a_full_disk_stops_writes_until_there_is_space(small_disk: Path, tmp_path: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(16 << 20))
    async with opened(small_disk / "a", WalSync.GROUP) as store:
        promised = {b"kept": promise(1), b"000000": promise(2)}
        await store.apply(Batch(promises=promised))
        acknowledged = await fill(store)
        assert len(acknowledged) > 500
        changes = {b"kept": b"", b"000000": promise(3), b"more": promise(4)}
        for refused in (inserts({b"more": rec(b"more")}), Batch(promises=changes)):
            refused.promises = changes
            with pytest.raises(StorageFull):
                await store.apply(refused)
        with pytest.raises(StorageFull):
            await store.put_meta("m", b"x")
        # Reads go on, and what was written before is synced when asked.
        reported: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        store.sync(reported.set_result)
        assert await asyncio.wait_for(reported, 10) is None
        store._cache.clear()
        assert store.read(list(acknowledged)) == list(acknowledged.values())
        assert await all_by_key(store, 1000) == sorted(acknowledged.items())
        assert await all_promises(store) == promised
        # A crash now loses nothing.
        shutil.copytree(small_disk / "a", tmp_path / "image")
        async with opened(tmp_path / "image") as image:
            assert await all_by_key(image, 1000) == sorted(acknowledged.items())
            assert await all_promises(image) == promised
        # With space again, writes work again by themselves.
        ballast.unlink()
        resumed = rec(b"resumed")
        async with asyncio.timeout(20):
            while True:
                try:
                    await store.apply(Batch({b"resumed": resumed}, [b"resumed"], promises=changes))
                    break
                except StorageFull:
                    await asyncio.sleep(0.05)
        acknowledged[b"resumed"] = resumed
        await store.put_meta("m", b"x")
        acknowledged |= await fill(store, 500_000)
        assert await all_by_key(store, 1000) == sorted(acknowledged.items())
        del changes[b"kept"]
        assert await all_promises(store) == changes
    # It was closed while full; with room it opens with all that it acknowledged.
    assert run("mount", "-o", "remount,size=96m", small_disk).returncode == 0
    async with opened(small_disk / "a") as store:
        assert await all_by_key(store, 1000) == sorted(acknowledged.items())
        assert await exact_count(store) == len(acknowledged)
        assert await store.get_meta("m") == b"x"
        assert await all_promises(store) == changes
        store.write(inserts({b"after": rec(b"after")}))


@pytest.mark.root
@as_root
async def test_the_batch_that_fills_the_disk_leaves_nothing(small_disk: Path, tmp_path: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(20 << 20))
    async with opened(small_disk / "a", WalSync.GROUP) as store:
        acknowledged = await fill(store, with_promises=True)
        promised = {key: promise(int(key)) for key in acknowledged}
        promised[b"last"] = promise(int(max(acknowledged)))
        assert await all_promises(store) == promised
        assert await all_by_key(store, 1000) == sorted(acknowledged.items())
        shutil.copytree(small_disk / "a", tmp_path / "image")
    for folder in (tmp_path / "image", small_disk / "a"):
        assert run("mount", "-o", "remount,size=96m", small_disk).returncode == 0
        async with opened(folder) as store:
            assert await all_promises(store) == promised
            assert await all_by_key(store, 1000) == sorted(acknowledged.items())


@pytest.mark.root
@as_root
async def test_a_read_only_disk_is_refused(small_disk: Path) -> None:
    async with opened(small_disk / "a") as store:
        store.write(inserts(many(10)))
    assert run("mount", "-o", "remount,ro", small_disk).returncode == 0
    with pytest.raises(FolderUnusable):
        await RocksStore(small_disk / "a", token_of).open()
    with pytest.raises(FolderUnusable):
        await RocksStore(small_disk / "b", token_of).open()


def test_a_log_that_goes_while_the_logs_are_counted_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "000007.log"
    kept.write_bytes(b"x" * 10)
    monkeypatch.setattr(wal_files, "wal_files", lambda folder: [folder / "000003.log", kept])  # deleted after the look
    assert wal_files.wal_bytes(tmp_path) == 10
    wal_files.fsync_wal(tmp_path)
