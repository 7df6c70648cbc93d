"""Whether to begin more work, so that what has begun ends in time.

By Little's law what waits is the throughput times the delay: who knows at what rate work ends, and keeps less under way
than that rate times the longest delay wanted, keeps the delay. Only a queue that stands is refused, not a burst that
drains (after CoDel: Nichols and Jacobson, "Controlling Queue Delay", 2012): past the limit everything is taken until
there has been too much for as long as the delay, up to BURST_MAX. From then on nothing is past it, until for as long as
the delay no more was under way than half of it: were the next burst taken as soon as this one has drained, a load that
is too much all the time would come as bursts, one after the other.

>>> admission = Admission(delay_s=0.5, least=100)
>>> admission.enter(150)
>>> [admission.admits(now) for now in (0.0, 0.4, 0.6)]
[True, True, False]
>>> admission.leave(60, 0.7)
>>> admission.pending, admission.admits(0.7)
(90, True)
>>> admission.enter(60)
>>> admission.admits(0.8), admission.leave(150, 0.9), admission.admits(1.5), admission.enter(150), admission.admits(1.5)
(False, None, True, None, True)
"""

from __future__ import annotations

BURST_MAX = 65_536
"""No burst is larger than this."""
WINDOW_S = 0.1
"""The rate is taken anew after this, or later."""
SHARE = 0.5
"""Of a new rate in the one that counts."""


class Admission:
    """
    Args:
        delay_s: how long work may wait where there is more than can be done.
        least: so much may be under way in any case, however slow it goes.

    Attributes:
        pending: what is under way.
    """

    __slots__ = (
        "_calm_since",
        "_delay_s",
        "_done",
        "_least",
        "_limit",
        "_rate",
        "_since",
        "_standing",
        "_strict",
        "pending",
    )

    def __init__(self, delay_s: float, least: int) -> None:
        self.pending = 0
        self._delay_s = delay_s
        self._least = least
        self._limit = float(least)
        self._rate = 0.0
        self._done = 0
        self._since = 0.0
        self._standing: float | None = None
        self._strict = False
        self._calm_since = 0.0
        """When what is under way last came down to half of the limit."""

    def admits(self, now: float) -> bool:
        """Whether more may begin at this monotonic time."""
        if self.pending <= self._limit:
            if self._strict and self.pending <= self._limit / 2 and now - self._calm_since >= self._delay_s:
                self._strict = False
            self._standing = None
            return True
        if not self._strict:
            if self._standing is None:
                self._standing = now
            if now - self._standing < self._delay_s and self.pending < BURST_MAX:
                return True
            self._strict = True
        return False

    def enter(self, count: int) -> None:
        """So much has begun."""
        self.pending += count

    def leave(self, count: int, now: float, *, done: bool = True) -> None:
        """So much has ended. `done`: by being carried out, whatever came of it. What was refused, or given up at its
        deadline, says nothing of the rate at which work can be done."""
        before, self.pending = self.pending, self.pending - count
        if before > self._limit / 2 >= self.pending:
            self._calm_since = now
        self._done += count if done else 0
        elapsed = now - self._since
        if elapsed >= WINDOW_S:
            self._rate += SHARE * (self._done / elapsed - self._rate)
            self._limit = max(self._least, self._rate * self._delay_s)
            self._done = 0
            self._since = now
