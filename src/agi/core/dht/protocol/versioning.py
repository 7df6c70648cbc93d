"""Hybrid logical clock (Kulkarni et al., "Logical Physical Clocks", 2014): 48 bits of milliseconds, 16 of counter.

A coordinator stamps every write with `tick`; every version that a node sees goes through `observe`, so that a write
begun after another was acknowledged has the greater version. The clock never goes back, whatever the wall clock does.

>>> clock = HLC()
>>> a = clock.tick(now_ms=1000); b = clock.tick(now_ms=999)
>>> a < b, physical_ms(b)
(True, 1000)
"""

from __future__ import annotations

import xxhash

COUNTER_BITS = 16
HLC_MAX = (1 << 64) - 1


def physical_ms(hlc: int) -> int:
    return hlc >> COUNTER_BITS


def from_ms(ms: int) -> int:
    return ms << COUNTER_BITS


def node_hash(node_id: str) -> int:
    """The 32-bit hash that names a node in versions; two nodes of a cluster may not share it (checked at bootstrap)."""
    return int(xxhash.xxh32_intdigest(node_id.encode()))


def writer_id(node_id: str, boot: int) -> int:
    """The tie-break of equal HLCs. The boot counter keeps a crash with the clock set back from reusing a version."""
    return node_hash(node_id) << 32 | boot & 0xFFFFFFFF


class HLC:
    """One node's clock. `last` is the greatest version that it gave or saw."""

    __slots__ = ("last",)

    def __init__(self, last: int = 0) -> None:
        self.last = last

    def tick(self, now_ms: int, count: int = 1) -> int:
        """Reserves `count` consecutive versions above everything seen; returns the first of them."""
        first = max(now_ms << COUNTER_BITS, self.last + 1)
        self.last = first + count - 1
        return first

    def observe(self, hlc: int) -> None:
        if hlc > self.last:
            self.last = hlc

    def limit(self, now_ms: int, skew_ms: int) -> int:
        """The greatest fresh version that is not far ahead of the wall clock or of what this node has already seen."""
        return max(now_ms << COUNTER_BITS, self.last) + (skew_ms << COUNTER_BITS)
