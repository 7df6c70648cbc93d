"""Public value types, and the limits that every layer keeps."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field
from typing import Protocol

from agi.core.dht.errors import (
    InvalidAddress,
    InvalidConsistency,
    InvalidKey,
    InvalidRequest,
    InvalidTTL,
    InvalidValue,
)

KEY_BYTES_MAX = 1024
VALUE_BYTES_MAX = 8 * 1024 * 1024
FRAME_BYTES_MAX = 16 * 1024 * 1024
BATCH_BYTES_MAX = 4 * 1024 * 1024
"""Clients split batches so that no frame grows past this, unless one value alone does."""
BULK_VALUE_BYTES = 128 * 1024
"""Values from this size on travel on a connection of their own, so that they do not delay small ones."""
SCAN_LIMIT_MAX = 1000
TTL_MS_MAX = 100 * 366 * 24 * 3600 * 1000
PROTOCOL_VERSION = 1

assert VALUE_BYTES_MAX + KEY_BYTES_MAX + 65536 <= FRAME_BYTES_MAX
assert BATCH_BYTES_MAX <= FRAME_BYTES_MAX // 2


class Consistency(enum.IntEnum):
    """How many of a key's replicas a call waits for. Quorums are of the replication factor, never of what is up."""

    ONE = 1
    QUORUM = 2
    ALL = 3
    LINEARIZABLE = 4
    """As QUORUM; and writes go through consensus, so that they cannot overtake each other."""

    def needed(self, replicas: int) -> int:
        """Replies needed from a replica set of this size."""
        if self is Consistency.ONE:
            return 1
        return replicas if self is Consistency.ALL else replicas // 2 + 1

    @classmethod
    def parse(cls, value: object) -> Consistency:
        """A level from its name (any case) or itself. Raises InvalidConsistency."""
        if isinstance(value, cls):
            return value
        if isinstance(value, str) and value.upper() in cls.__members__:
            return cls[value.upper()]
        raise InvalidConsistency(f"unknown consistency {value!r}: use ONE, QUORUM, ALL or LINEARIZABLE")


class MemberStatus(enum.IntEnum):
    """What the failure detector holds of a member. Of two claims about one incarnation the greater one counts."""

    ALIVE = 0
    SUSPECT = 1
    """It did not answer. Unless it is heard of in time it is declared dead; meanwhile it is used as a last choice."""
    DEAD = 2
    """Nothing is sent to it but an occasional probe, until it answers."""
    LEFT = 3
    """It was stopped in order."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A live record as `get_entry` returns it. Times are milliseconds since the Unix epoch.

    Attributes:
        version: the 64-bit hybrid logical clock of the write (48 bits of milliseconds, 16 of counter).
        expires_at: when the value expires, or None.
        created_at: when the key came into being, as the coordinator of the write knew it.
        updated_at: when this value was written (the version's millisecond part).
    """

    key: str
    value: bytes
    version: int
    expires_at: int | None
    created_at: int
    updated_at: int


@dataclass(frozen=True, slots=True)
class Fence:
    """What a write shows to say under which lock it is done: a write of an earlier holder is refused then. It may
    travel to other processes. Raises InvalidKey, InvalidRequest.

    Attributes:
        lock: the lock's name.
        token: the number that its holder got with it; each later holder's is higher.
    """

    lock: str
    token: int

    def __post_init__(self) -> None:
        lock_key(self.lock)
        if isinstance(self.token, bool) or not isinstance(self.token, int) or not 0 < self.token < 1 << 63:
            raise InvalidRequest(f"a token is a positive number as a lock has it, not {self.token!r}")

    @property
    def fence(self) -> Fence:
        return self


class Fencing(Protocol):
    """A held lock, or a `Fence`."""

    @property
    def fence(self) -> Fence:
        """Raises InvalidRequest where the lock was never held."""


@dataclass(frozen=True, slots=True)
class LockStatus:
    """A lock as `lock_status` found it.

    Attributes:
        holder: host, process and a random part of one acquisition; empty where the lock is free.
        token: of the holder, or of the last one.
        lease_seconds: how long after its last renewal a holder that died keeps it; 0 where it is free.
        version: of the record; each renewal has another.
    """

    name: str
    holder: str
    token: int
    lease_seconds: float
    version: int


@dataclass(frozen=True, slots=True)
class Node:
    """A member of the ring.

    Attributes:
        node_id: unique name; defaults to the advertised address.
        address: host that others reach it by.
        port: its gRPC port.
        weight: share of the ring relative to the others, above 0.
        virtual_nodes: points on the ring per unit of weight.
        metadata: free labels; `rack` and `zone` are failure domains.
    """

    node_id: str
    address: str
    port: int
    weight: float = 1.0
    virtual_nodes: int = 150
    metadata: dict[str, str] = field(default_factory=dict, hash=False)


def encode_key(key: object) -> bytes:
    """The UTF-8 bytes of a key, checked. Raises InvalidKey."""
    if not isinstance(key, str):
        raise InvalidKey(f"a key is a str, not {type(key).__name__}")
    try:
        raw = key.encode()
    except UnicodeEncodeError as error:
        raise InvalidKey(f"a key must be valid Unicode: {error.reason} at index {error.start}") from None
    if not raw:
        raise InvalidKey("a key may not be empty")
    if len(raw) > KEY_BYTES_MAX:
        raise InvalidKey(f"a key has at most {KEY_BYTES_MAX} bytes, this one {len(raw)}")
    return raw


LOCK_PREFIX = b"lock:"


def lock_key(name: object) -> bytes:
    """The key that holds the lock of this name. Raises InvalidKey."""
    if not isinstance(name, str) or not name:
        raise InvalidKey(f"a lock's name is a str that is not empty, not {name!r:.40}")
    return encode_key(f"{LOCK_PREFIX.decode()}{name}")


def check_value(value: object) -> bytes:
    """The value as bytes. Raises InvalidValue."""
    if not isinstance(value, bytes):
        if not isinstance(value, bytearray | memoryview):
            raise InvalidValue(f"a value is bytes, not {type(value).__name__}")
        value = bytes(value)
    if len(value) > VALUE_BYTES_MAX:
        raise InvalidValue(f"a value has at most {VALUE_BYTES_MAX} bytes, this one {len(value)}")
    return value


def ttl_to_ms(ttl_seconds: object) -> int:
    """A time to live in whole milliseconds, 0 for none. Raises InvalidTTL."""
    if ttl_seconds is None:
        return 0
    if isinstance(ttl_seconds, bool) or not isinstance(ttl_seconds, int | float):
        raise InvalidTTL(f"ttl_seconds is a number, not {type(ttl_seconds).__name__}")
    if not 0 < ttl_seconds <= TTL_MS_MAX / 1000:  # also refuses NaN
        raise InvalidTTL(f"ttl_seconds must be above 0 and at most {TTL_MS_MAX // 1000}, not {ttl_seconds!r:.40}")
    return max(1, round(ttl_seconds * 1000))


_ADDRESS = re.compile(r"^(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9._-]+)):(?P<port>[0-9]{1,5})$")


def parse_address(text: str) -> tuple[str, int]:
    """`host:port` or `[ipv6]:port` as (host, port). Raises InvalidAddress."""
    match = _ADDRESS.match(text.strip()) if isinstance(text, str) else None
    if match is None:
        hint = " (write an IPv6 address as [::1]:7000)" if isinstance(text, str) and text.count(":") > 1 else ""
        raise InvalidAddress(f"{text!r} is not host:port{hint}")
    port = int(match["port"])
    if not 0 < port < 65536:
        raise InvalidAddress(f"{text!r}: the port must be 1 to 65535")
    return match["six"] or match["host"], port


def format_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
