"""A node's suspicion of itself (Dadgar et al. 2017, "Lifeguard", LHA-Probe).

A node that is short of processor time or network sees everybody fail. The score rises with what tells of that (probes
that end without an answer, helpers that are silent too, suspicions that this node had to refute, stalls of its own
process) and falls with every answered probe; timeouts and the pace of probing are scaled by 1 + score.

>>> awareness = Awareness(score_max=8)
>>> awareness.add(2); awareness.scale(0.5)
1.5
"""

from __future__ import annotations


class Awareness:
    __slots__ = ("_score_max", "score")

    def __init__(self, score_max: int) -> None:
        self._score_max = score_max
        self.score = 0
        """0 is healthy."""

    def add(self, change: int) -> None:
        self.score = min(self._score_max, max(0, self.score + change))

    def scale(self, seconds: float) -> float:
        return seconds * (1 + self.score)
