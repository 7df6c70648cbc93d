"""How a promise lies on a medium that may damage it: xxh3-64 of key and promise, then the promise.

A promise that was lost or altered lets an acceptor accept what it has refused, so nothing here is skipped or mended.
"""

from __future__ import annotations

from collections.abc import Iterable

import xxhash

from agi.core.dht.errors import StorageCorrupt

PROMISE_BYTES = 16
_CHECKSUM_BYTES = 8


def check_promises(promises: Iterable[bytes]) -> None:
    """Raises ValueError for one that is neither a promise nor the removal of one."""
    for promise in promises:
        if promise and len(promise) != PROMISE_BYTES:
            raise ValueError(f"a promise is {PROMISE_BYTES} bytes, not {len(promise)}")


def pack_promise(key: bytes, promise: bytes) -> bytes:
    return xxhash.xxh3_64_digest(key + promise) + promise


def unpack_promise(key: bytes, packed: bytes) -> bytes:
    """Raises StorageCorrupt."""
    promise = bytes(packed[_CHECKSUM_BYTES:])
    if len(promise) != PROMISE_BYTES or xxhash.xxh3_64_digest(key + promise) != packed[:_CHECKSUM_BYTES]:
        raise StorageCorrupt(f"the promise of {key[:64]!r} fails its checksum")
    return promise
