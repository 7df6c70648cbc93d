"""Medians, spreads, quantiles and ratios, and how they are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with the extremes it lies between."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:
            return number(self.median)
        return f"{number(self.median)} ({number(self.low)} to {number(self.high)})"


def spread(values: Sequence[float]) -> Spread | None:
    """None where nothing was measured."""
    return Spread(median(values), min(values), max(values)) if values else None


def quantile(ordered: Sequence[float], q: float) -> float:
    """Of sorted values, 0 where there are none: the smallest that is not exceeded by a share of q."""
    if not 0 <= q <= 1:
        raise ValueError(f"a quantile is between 0 and 1, not {q}")
    return ordered[min(len(ordered) - 1, int(len(ordered) * q))] if ordered else 0.0


def ratio(mine: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Of the medians. None where one of them was not measured, or is zero."""
    if not mine or not theirs or not median(theirs):
        return None
    return median(mine) / median(theirs)


def number(value: float) -> str:
    """Three digits that count, with commas: 12,345 or 123 or 1.23."""
    if value >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
