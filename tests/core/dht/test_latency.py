"""The running quantile: finds the share it was asked for, follows changes, keeps its floor."""

from __future__ import annotations

import random

import pytest

from agi.core.dht.protocol.latency import Quantile


@pytest.mark.parametrize("q", [0.5, 0.9, 0.95, 0.99])
def test_it_settles_where_that_share_of_samples_lies_below(q: float) -> None:
    rng = random.Random(1)
    quantile = Quantile(q, start_s=1.0, floor_s=1e-6)
    for _ in range(20_000):
        quantile.add(rng.lognormvariate(-6, 1))
    samples = [rng.lognormvariate(-6, 1) for _ in range(20_000)]
    values = []
    for sample in samples:
        quantile.add(sample)
        values.append(quantile.value)
    below = sum(sample <= value for sample, value in zip(samples[1:], values, strict=False)) / len(samples)
    assert abs(below - q) < 0.15 * (1 - q) + 0.01


def test_it_follows_a_replica_that_becomes_slow_and_fast_again() -> None:
    quantile = Quantile(0.95, start_s=0.001, floor_s=0.0001)
    for _ in range(200):
        quantile.add(0.1)
    assert quantile.value > 0.1
    for _ in range(3000):
        quantile.add(0.001)
    assert 0.0009 < quantile.value < 0.0015


def test_it_never_falls_below_its_floor() -> None:
    quantile = Quantile(0.95, start_s=0.01, floor_s=0.002)
    for _ in range(10_000):
        quantile.add(0.0)
    assert 0.0019 < quantile.value <= 0.002
