"""A running quantile without stored samples: the estimate steps up by q and down by 1 - q of its own small step.

At rest a share q of the samples lies below the estimate (stochastic approximation, Robbins and Monro, 1951).
"""

from __future__ import annotations

STEP = 0.05
"""Share of the estimate by which one sample can move it: larger follows sooner and trembles more."""


class Quantile:
    __slots__ = ("_down", "_floor", "_up", "value")

    def __init__(self, q: float, start_s: float, floor_s: float) -> None:
        self.value = start_s
        self._up = 1 + STEP * q
        self._down = 1 - STEP * (1 - q)
        self._floor = floor_s

    def add(self, sample_s: float) -> None:
        if sample_s > self.value:
            self.value *= self._up
        elif self.value > self._floor:
            self.value *= self._down
