"""The suspicion timeout, and a node's doubt in itself: pure functions and tables of their cases."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agi.core.dht.protocol import awareness, broadcast, suspicion
from agi.core.dht.protocol.awareness import Awareness
from agi.core.dht.protocol.suspicion import Suspicion, bounds, timeout

BOUNDS = [
    # members, interval, mult, max_mult -> least, longest
    (0, 1.0, 4, 6, 4.0, 24.0),
    (1, 1.0, 4, 6, 4.0, 24.0),
    (10, 1.0, 4, 6, 4.0, 24.0),
    (100, 1.0, 4, 6, 8.0, 48.0),
    (1000, 0.5, 4, 6, 6.0, 36.0),
    (1000, 0.5, 4, 1, 6.0, 6.0),
]

# memberlist's own table: least 2 s, longest 30 s, 3 confirmations expected
TIMEOUTS = [
    # confirmations, expected, least, longest -> timeout
    (0, 3, 2.0, 30.0, 30.0),
    (1, 3, 2.0, 30.0, 16.0),
    (2, 3, 2.0, 30.0, 7.810),
    (3, 3, 2.0, 30.0, 2.0),
    (4, 3, 2.0, 30.0, 2.0),
    (0, 0, 2.0, 30.0, 2.0),
    (0, 1, 4.0, 24.0, 24.0),
    (1, 1, 4.0, 24.0, 4.0),
    (0, 2, 5.0, 5.0, 5.0),
]


@pytest.mark.parametrize(("members", "interval", "mult", "max_mult", "least", "longest"), BOUNDS)
def test_bounds(members: int, interval: float, mult: int, max_mult: int, least: float, longest: float) -> None:
    assert bounds(members, interval, mult, max_mult) == pytest.approx((least, longest))


@pytest.mark.parametrize(("confirmations", "expected", "least", "longest", "result"), TIMEOUTS)
def test_timeout(confirmations: int, expected: int, least: float, longest: float, result: float) -> None:
    assert timeout(confirmations, expected, least, longest) == pytest.approx(result, abs=0.001)


@given(
    confirmations=st.integers(0, 20),
    expected=st.integers(0, 20),
    least=st.floats(0.01, 100),
    factor=st.floats(1, 100),
)
def test_a_timeout_is_within_its_bounds_and_only_shrinks(
    confirmations: int, expected: int, least: float, factor: float
) -> None:
    longest = least * factor
    first, later = (timeout(n, expected, least, longest) for n in (confirmations, confirmations + 1))
    assert least <= later <= first <= longest * (1 + 1e-9)


def test_a_suspicion_is_confirmed_once_by_each_accuser_and_not_by_more_than_it_needs() -> None:
    suspected = Suspicion("a", 100.0, 2, 2.0, 30.0)
    assert suspected.deadline == 130.0
    assert not suspected.confirm("a")
    assert suspected.confirm("b") and not suspected.confirm("b")
    between = suspected.deadline
    assert 102.0 < between < 130.0
    assert suspected.confirm("c")
    assert suspected.deadline == 102.0
    assert not suspected.confirm("d"), "nobody needs to hear of more"


def test_a_suspicion_that_nobody_can_confirm_has_the_least_timeout() -> None:
    suspected = Suspicion("a", 0.0, 0, 2.0, 30.0)
    assert suspected.deadline == 2.0 and not suspected.confirm("b")


def test_awareness_stays_in_its_range_and_scales() -> None:
    aware = Awareness(3)
    aware.add(-1)
    assert aware.score == 0 and aware.scale(0.5) == 0.5
    for score in (2, 3, 3):
        aware.add(score - aware.score + (score == 3))
        assert aware.score == score
    assert aware.scale(0.5) == 2.0
    aware.add(-2)
    assert aware.score == 1
    off = Awareness(0)
    off.add(5)
    assert off.score == 0


@pytest.mark.parametrize("module", [suspicion, awareness, broadcast])
def test_doctest(module: object) -> None:
    result = doctest.testmod(module)  # type: ignore[arg-type]
    assert result.attempted and not result.failed
