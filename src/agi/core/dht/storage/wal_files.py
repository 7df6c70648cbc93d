"""RocksDB's write-ahead log files, looked at before RocksDB opens them.

The recovery mode that tolerates a torn last write has two holes, both shown by flipping bits of a log (RocksDB 9.8):

- a record type that belongs to recycled logs makes the recovery loop for ever; this store never recycles a log;
- a length that points past the end of the file looks like a torn write, and what follows it is dropped silently.

A torn write is a prefix of a record; a damaged length has the whole record behind it. So `check` walks the record
headers (about 0.3 us each, no checksums: RocksDB verifies those) and, where the last record is cut off, tries whether
the stored CRC holds for some shorter length. Log format: blocks of 32 KiB; `crc32c u32 | length u16 | type u8 | data`.
"""

from __future__ import annotations

import contextlib
import os
import struct
from pathlib import Path

from agi.core.dht.errors import StorageCorrupt

BLOCK_BYTES = 32 * 1024
_HEADER = struct.Struct("<IHB")
_LAST_PLAIN_TYPE = 4
_RECYCLED_TYPES = frozenset((5, 6, 7, 8, 11))


def _table() -> list[int]:
    entries = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        entries.append(value)
    return entries


_CRC32C = _table()


def _holds_for_a_prefix(masked: int, data: bytes) -> bool:
    """Whether some prefix of data (a record's type byte, then its payload) has this masked CRC-32C."""
    rotated = (masked - 0xA282EAD8) & 0xFFFFFFFF
    wanted = (rotated >> 17 | rotated << 15) & 0xFFFFFFFF ^ 0xFFFFFFFF
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC32C[(crc ^ byte) & 0xFF] ^ crc >> 8
        if crc == wanted:
            return True
    return False


def wal_files(folder: Path) -> list[Path]:
    """The write-ahead logs of a store, oldest first."""
    return sorted(path for path in folder.glob("*.log") if path.stem.isdigit())


def wal_bytes(folder: Path) -> int:
    total = 0
    for path in wal_files(folder):
        with contextlib.suppress(FileNotFoundError):  # RocksDB deletes what it has flushed whenever it likes
            total += path.stat().st_size
    return total


def fsync_wal(folder: Path) -> None:
    """Brings every log to the disk without RocksDB, which refuses to once an append has failed. Raises OSError."""
    for path in [*wal_files(folder), folder]:
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # as above: what was in it is in tables that are on the disk
            continue
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check(folder: Path) -> None:
    """Raises StorageCorrupt for damage that RocksDB's recovery would hang on or drop silently. Raises OSError."""
    for path in wal_files(folder):
        with path.open("rb") as log:
            number = 0
            while block := log.read(BLOCK_BYTES):
                _check_block(path, number, block)
                number += 1


def _check_block(path: Path, number: int, block: bytes) -> None:
    at, size = 0, len(block)
    while at + _HEADER.size <= size:
        crc, length, kind = _HEADER.unpack_from(block, at)
        where = f"{path.name}, offset {number * BLOCK_BYTES + at}"
        if kind in _RECYCLED_TYPES:
            raise StorageCorrupt(f"the write-ahead log is damaged: record type {kind} ({where})")
        if kind == 0 and length == 0:
            return  # preallocated, never written
        end = at + _HEADER.size + length
        if end > size:
            # In a full block RocksDB reports it. In the last one it takes it for a torn write: is it?
            if size == BLOCK_BYTES or _holds_for_a_prefix(crc, block[at + 6 :]):
                raise StorageCorrupt(f"the write-ahead log is damaged: length {length} ({where})")
            return
        if kind > _LAST_PLAIN_TYPE:
            return  # of a newer format: RocksDB's to judge
        at = end
