"""What a lock's key holds, and how leases are counted (PROTOCOLS L1, L2).

The record never says when the lease ends: clocks differ. Its holder counts the lease from before it sent the renewal,
less a margin; who waits counts the whole of it from when he saw the record, or a node did that tells him, and takes it
over only at that version. So the holder's count ends first as long as clocks run at rates that differ by less than the
margin; what they show does not matter.
"""

from __future__ import annotations

import msgspec

from agi.core.dht.errors import InvalidRequest, InvalidTTL

LEASE_MS_MIN = 100
LEASE_MS_MAX = 24 * 3600 * 1000
MARGIN = 1 / 8
"""Of the lease, by which its holder gives up early: for two clocks that are each off by 5 %."""
RENEW_AFTER = 1 / 3
"""Of the lease; two renewals may fail then."""
HOLDER_BYTES_MAX = 256


class LockRecord(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """`holder`: of one acquisition, empty where the lock is free. `token`: 0 where it is the record's own version, as
    when the lock was taken; a free lock has its last holder's."""

    holder: str
    lease_ms: int
    token: int = 0


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(LockRecord).decode


def pack_lock(record: LockRecord) -> bytes:
    return _encode(record)


def unpack_lock(value: bytes) -> LockRecord:
    """Raises InvalidRequest for what no lock has stored."""
    try:
        record = _decode(value)
    except msgspec.MsgspecError:
        raise InvalidRequest("the key of the lock holds something else") from None
    if not 0 <= record.lease_ms <= LEASE_MS_MAX or not 0 <= record.token < 1 << 63:
        raise InvalidRequest("the key of the lock holds something else")
    return record


def lease_ms_of(ttl: object) -> int:
    """A lease in whole milliseconds. Raises InvalidTTL."""
    if isinstance(ttl, bool) or not isinstance(ttl, int | float):
        raise InvalidTTL(f"a lock's ttl is a number of seconds, not {type(ttl).__name__}")
    if not LEASE_MS_MIN / 1000 <= ttl <= LEASE_MS_MAX / 1000:  # also refuses NaN
        raise InvalidTTL(f"a lock's ttl is {LEASE_MS_MIN / 1000:g} to {LEASE_MS_MAX // 1000} seconds, not {ttl!r:.40}")
    return round(ttl * 1000)


def holder_s(lease_ms: int) -> float:
    """How long after it was sent a renewal holds the lock."""
    return lease_ms / 1000 * (1 - MARGIN)
