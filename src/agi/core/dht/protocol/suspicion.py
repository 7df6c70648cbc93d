"""How long a member is suspected before it is declared dead (Dadgar et al. 2017, "Lifeguard", LHA-Suspicion).

A suspicion starts with a long timeout, since the accuser may itself be the one that is slow. Each further member that
suspects the same on its own shortens it, logarithmically, down to the least:

    least    = suspicion_mult x max(1, log10(members)) x heartbeat interval
    longest  = suspicion_max_mult x least
    timeout  = max(least, longest - (longest - least) x log(confirmations + 1) / log(expected + 1))

>>> least, longest = bounds(members=100, interval_s=0.5, mult=4, max_mult=6)
>>> [round(timeout(confirmed, 2, least, longest), 1) for confirmed in (0, 1, 2)]
[24.0, 11.4, 4.0]
"""

from __future__ import annotations

import math


def bounds(members: int, interval_s: float, mult: float, max_mult: float) -> tuple[float, float]:
    """The least and the longest timeout in a cluster of that size."""
    least_s = mult * max(1.0, math.log10(max(1, members))) * interval_s
    return least_s, max_mult * least_s


def timeout(confirmations: int, expected: int, least_s: float, longest_s: float) -> float:
    """Seconds from the suspicion's beginning. Where nobody could confirm it (`expected` 0) that is the least."""
    if expected < 1:
        return least_s
    share = math.log(confirmations + 1) / math.log(expected + 1)
    return max(least_s, longest_s - (longest_s - least_s) * share)


class Suspicion:
    """One suspicion of one incarnation of a member.

    Args:
        by: who suspects it first.
        expected: confirmations that shorten it to the least.
    """

    __slots__ = ("_accusers", "_expected", "_least_s", "_longest_s", "_started")

    def __init__(self, by: str, started: float, expected: int, least_s: float, longest_s: float) -> None:
        self._accusers = {by}
        self._started = started
        self._expected = expected
        self._least_s = least_s
        self._longest_s = longest_s

    @property
    def deadline(self) -> float:
        """When the member is to be declared dead."""
        return self._started + timeout(len(self._accusers) - 1, self._expected, self._least_s, self._longest_s)

    def confirm(self, by: str) -> bool:
        """Whether this accuser is a new one, and one that counts: then others should hear of it too."""
        if by in self._accusers or len(self._accusers) > self._expected:
            return False
        self._accusers.add(by)
        return True
