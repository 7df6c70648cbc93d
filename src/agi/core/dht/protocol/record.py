"""A record as packed bytes: encoded and hashed once by its coordinator, unchanged from then on.

Layout (big-endian, 40 bytes of header, then the value):

    0   8  hlc        48 bits of milliseconds, 16 of counter
    8   8  writer     32-bit hash of the node id, 32-bit boot counter
    16  1  flags      0x80 shrunk (an expired record without its value), 0x02 expires, 0x01 tombstone; 0: live for ever;
                      0x04 register (protocol/consensus.py), 0x40 on the wire only: not voted for by who shows it
    17  7  created    milliseconds since 1970 when the key came into being
    24  8  checksum   xxh3-64 of the rest, seeded with the hash of (header so far, key)
    32  8  expires    milliseconds since 1970, 0 for never

The fields are ordered so that comparing two records of a key as bytes is the version order of PROTOCOLS V1 (HLC, then
writer with its boot counter, then content): merging is `max()`, commutative, associative and idempotent. A record
that expired compares below its own shrunk form, so shrinking is a merge too.

A key under consensus has a register record: the first 16 bytes are its ballot, whose highest bit is set. So it compares
above every plain record, and registers compare by ballot (R2), in merges and hash trees as well.

>>> a, b = pack(b"k", b"old", hlc=1 << 16, writer=7), pack(b"k", b"new", hlc=2 << 16, writer=3)
>>> max(a, b)[HEADER:]
b'new'
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import xxhash

from agi.core.dht.errors import StorageCorrupt

HEADER = 40
FLAGS = 16
TOMBSTONE = 0x01
EXPIRES = 0x02
SHRUNK = 0x80
REGISTER = 0x04
UNVOTED = 0x40
REGISTERED = 1 << 63
"""What `hlc_of` a register record has at least: no version."""

LATER = (1 << 16) - 1
"""What tells versions, and ballots, of one millisecond apart."""

_HEAD = struct.Struct(">QQQ")
_HLC = struct.Struct(">Q")
_hash_int: Callable[..., int] = xxhash.xxh3_64_intdigest
_hash: Callable[..., bytes] = xxhash.xxh3_64_digest
_NO_EXPIRY = bytes(8)


def pack(
    key: bytes, value: bytes, hlc: int, writer: int, created_ms: int = 0, expires_ms: int = 0, flags: int = 0
) -> bytes:
    """One record. `flags` holds TOMBSTONE for a delete (its value is empty); EXPIRES follows from `expires_ms`."""
    if expires_ms:
        flags |= EXPIRES
    head = _HEAD.pack(hlc, writer, flags << 56 | created_ms)
    tail = (expires_ms.to_bytes(8, "big") if expires_ms else _NO_EXPIRY) + value
    return head + _hash(tail, _hash_int(head + key)) + tail


def pack_batch(
    keys: Sequence[bytes],
    values: Sequence[bytes],
    first_hlc: int,
    writer: int,
    created_ms: int,
    expires_ms: int,
    flags: int,
) -> list[bytes]:
    """`pack` of each key with consecutive versions; the hot path of new keys and of batches."""
    expires = expires_ms.to_bytes(8, "big")
    stamp = (flags | EXPIRES if expires_ms else flags) << 56 | created_ms
    pack_head, hash_int, hash_ = _HEAD.pack, _hash_int, _hash
    records = []
    for hlc, (key, value) in enumerate(zip(keys, values, strict=True), first_hlc):
        head = pack_head(hlc, writer, stamp)
        tail = expires + value
        records.append(head + hash_(tail, hash_int(head + key)) + tail)
    return records


def verify(key: bytes, record: bytes) -> bytes:
    """The record itself, if its checksum holds. Raises StorageCorrupt."""
    if len(record) < HEADER or _hash(record[32:], _hash_int(record[:24] + key)) != record[24:32]:
        raise StorageCorrupt(f"the record of key {key[:64]!r} fails its checksum")
    return record


def height_of(hlc: int) -> int:
    """Where a record stands among versions (protocol/floors.py): its version, or what the milliseconds of its ballot
    are as one."""
    return hlc if hlc < REGISTERED else (hlc ^ REGISTERED) & ~LATER


def hlc_of(record: bytes) -> int:
    """The version of a plain record; of a register record the ballot's half, above REGISTERED."""
    return int.from_bytes(record[:8], "big")


def created_ms_of(record: bytes) -> int:
    return int.from_bytes(record[17:24], "big")


def expires_ms_of(record: bytes) -> int:
    """When the record expires, 0 for never."""
    return int.from_bytes(record[32:40], "big")


def is_live(record: bytes | None, now_ms: int) -> bool:
    """Whether a reader sees a value at this time."""
    if record is None:
        return False
    flags = record[FLAGS]
    return not flags or (flags == EXPIRES and int.from_bytes(record[32:40], "big") > now_ms)


def shrink(key: bytes, record: bytes) -> bytes:
    """The expired record without its value: same version and writer, so it is the same write, seen as a tombstone."""
    hlc, writer, rest = _HEAD.unpack_from(record)
    return pack(
        key,
        b"",
        hlc=hlc,
        writer=writer,
        created_ms=rest & (1 << 56) - 1,
        expires_ms=expires_ms_of(record),
        flags=record[FLAGS] | SHRUNK,
    )
