"""The clocks of a simulated host: a wall clock that may be wrong and jump, a monotonic one that may drift."""

from __future__ import annotations

from agi.core.dht.testing.trace import Trace

EPOCH_MS = 1_700_000_000_000
"""What a right wall clock shows at virtual time 0, in milliseconds since 1970."""
DRIFT_MAX = 0.05
"""Rates lie within 1 +- this; crystals do better than 1e-4, so tests of leases may exaggerate."""


class SimClock:
    """A host's clock (clock.Clock). Both readings are functions of virtual time, so reading it costs nothing.

    Args:
        trace: whose `now` is the true time.
        skew_ms: how far the wall clock is ahead of the true time (negative: behind).
        rate: seconds this host counts per true second. Timers of the host run by it too, as on a real machine, where
            `loop.time()` and `monotonic()` are one clock; hence it is fixed for the host's life.
        offset_s: what `monotonic()` shows at virtual time 0.

    Raises ValueError for a rate off by more than DRIFT_MAX, or a negative offset.
    """

    __slots__ = ("_trace", "offset_s", "rate", "skew_ms")

    def __init__(self, trace: Trace, *, skew_ms: int = 0, rate: float = 1.0, offset_s: float = 0.0) -> None:
        if not abs(rate - 1.0) <= DRIFT_MAX or offset_s < 0:
            raise ValueError(f"a rate within 1 +- {DRIFT_MAX} and an offset of at least 0, not {rate} and {offset_s}")
        self._trace = trace
        self.skew_ms = skew_ms
        self.rate = rate
        self.offset_s = offset_s

    def wall_ms(self) -> int:
        return EPOCH_MS + int(self._trace.now * self.rate * 1000) + self.skew_ms

    def monotonic(self) -> float:
        return self.offset_s + self._trace.now * self.rate

    def boottime(self) -> float:
        return self.monotonic()  # no simulated host sleeps

    def jump(self, by_ms: int) -> None:
        """The wall clock is set forward or back; `monotonic` does not notice."""
        self.skew_ms += by_ms

    def true_time(self, when: float) -> float:
        """The virtual time at which `monotonic()` first shows `when` or more."""
        at = (when - self.offset_s) / self.rate
        if self.offset_s + at * self.rate < when:  # rounding: a timer that fires early is armed again for ever
            at += 1e-9
        return at
