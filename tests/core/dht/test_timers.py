"""The timer wheel: never early, at most a tick late, nothing lost."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from agi.core.dht.protocol.timers import TimerWheel

TICK_S = 0.05
STEPS = st.lists(
    st.tuples(st.floats(0, 0.3), st.lists(st.floats(-0.2, 3.0), max_size=5)), min_size=1, max_size=30
)  # fmt: skip


@given(start=st.floats(0, 1e6), steps=STEPS)
@example(start=0.0, steps=[(0.0, [0.0, 0.05, 0.1]), (0.05, []), (0.05, [])])
def test_never_early_and_at_most_a_tick_late(start: float, steps: list[tuple[float, list[float]]]) -> None:
    wheel: TimerWheel[int] = TimerWheel(start, TICK_S)
    now = start
    due: dict[int, float] = {}
    for forward_s, timeouts in steps:
        now += forward_s
        for number in wheel.advance(now):
            assert due.pop(number) <= now + 1e-6
        assert all(at > now - TICK_S - 1e-6 for at in due.values()), "later than a tick"
        for timeout_s in timeouts:
            number = len(due) + 1000 * int((now - start) * 1e6)
            while number in due:
                number += 1
            due[number] = now + max(0.0, timeout_s)  # what is late already is due at once
            wheel.add(now + timeout_s, number)
        assert len(wheel) == len(due)
    now += 10.0
    assert sorted(wheel.advance(now)) == sorted(due) and len(wheel) == 0


def test_a_long_pause_does_not_walk_the_empty_slots() -> None:
    wheel: TimerWheel[str] = TimerWheel(0.0, TICK_S)
    wheel.add(1.0, "soon")
    wheel.add(1e9, "in thirty years")
    assert wheel.advance(1e9 - 1) == ["soon"]
    assert wheel.advance(1e9 + 2 * TICK_S) == ["in thirty years"]


def test_time_that_goes_back_returns_nothing_twice() -> None:
    wheel: TimerWheel[str] = TimerWheel(100.0, TICK_S)
    wheel.add(100.2, "a")
    assert wheel.advance(101.0) == ["a"]
    assert wheel.advance(100.0) == []
    wheel.add(100.5, "b")
    assert wheel.advance(101.1) == ["b"]
