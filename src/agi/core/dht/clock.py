"""The time that a node sees. Injected everywhere, so that a simulation can bend it."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def wall_ms(self) -> int:
        """Milliseconds since the Unix epoch; may jump or run off."""

    def monotonic(self) -> float:
        """Seconds that only go forward; for deadlines and latencies."""

    def boottime(self) -> float:
        """As `monotonic`, but it also counts while the machine sleeps; for leases, which others go on counting."""


class SystemClock:
    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        return time.monotonic()

    def boottime(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)
