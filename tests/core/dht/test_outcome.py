"""What the window of a register's value tells of an operation that two coordinators may have tried."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agi.core.dht.errors import OutcomeUnknown, Unavailable, VersionConflict
from agi.core.dht.protocol.consensus import (
    ADD,
    ANYHOW,
    IF_EQUALS,
    IF_VERSION,
    LOOK,
    NOTHING,
    PUT,
    WINDOW,
    Done,
    State,
    apply,
    ballot,
    is_retired,
    newest_of,
    outcome,
    register_of,
)
from agi.core.dht.protocol.messages import Op, OpResult
from agi.core.dht.protocol.versioning import HLC

OURS = b"ours".ljust(16)


def name(number: int) -> bytes:
    return number.to_bytes(16, "big")


FULL = State(115, b"1", done=tuple(Done(name(number), number, 0) for number in range(100, 100 + WINDOW)))
NEWEST, FORGOTTEN = FULL.done[-1], Done(name(99), 99, 0)
ANEW = NEWEST._replace(version=114)
"""The same operation, done in a state that was never chosen."""


def op(*, since: int = 99, retry: bool = False, version: int = 0, kind: int = ADD) -> Op:
    condition = IF_VERSION if version else ANYHOW
    return Op(OURS, b"k", kind, condition, version=version, delta=1, retry=retry, since=since)


@pytest.mark.parametrize(
    ("operation", "state", "seen", "sent", "floor", "late"),
    [
        (op(retry=True), State(), None, 0, 0, True),
        (op(retry=True), State(), None, 0, 99, True),
        (op(), State(), NOTHING, 0, 200, False),
        (op(retry=True), FULL._replace(done=FULL.done[1:]), FORGOTTEN, 90, 0, True),
        (op(since=100, retry=True), FULL, None, 0, 200, True),
        (op(retry=True, version=115), FULL, None, 0, 0, True),
        (op(retry=True, kind=LOOK), FULL, None, 0, 200, True),
        (op(), FULL, None, 0, 0, False),
        (op(), FULL, FORGOTTEN, 101, 0, False),
        (op(), FULL, NEWEST, 90, 0, True),
        (op(retry=True), FULL, NEWEST, 0, 0, False),
    ],
)
def test_it_is_applied_where_it_cannot_be_hidden(
    operation: Op, state: State, seen: Done | None, sent: int, floor: int, late: bool
) -> None:
    assert outcome(operation, state, state, seen, sent, floor, late=late) is None


@pytest.mark.parametrize(
    ("operation", "seen", "sent", "late", "error"),
    [
        (op(), None, 0, True, Unavailable),
        (op(), FORGOTTEN, 0, True, OutcomeUnknown),
        (op(), FORGOTTEN, 100, False, OutcomeUnknown),
        (op(), NOTHING, 0, True, OutcomeUnknown),
        (op(), ANEW, 0, True, OutcomeUnknown),
        (op(retry=True), None, 0, False, OutcomeUnknown),
        (op(retry=True), FORGOTTEN, 0, False, OutcomeUnknown),
        (op(retry=True, version=114), None, 0, False, OutcomeUnknown),
    ],
)
def test_it_is_refused_where_it_may_be_hidden(
    operation: Op, seen: Done | None, sent: int, late: bool, error: type[Exception]
) -> None:
    result = outcome(operation, FULL, FULL, seen, sent, 0, late=late)
    assert result is not None and result.error is not None and result.error[0] == error.code  # type: ignore[attr-defined]  # of DHTError


@pytest.mark.parametrize(
    ("operation", "seen", "sent", "late"),
    [(op(), None, 0, True), (op(), NOTHING, 0, True), (op(), NOTHING, 100, False), (op(retry=True), None, 0, False)],
)
def test_it_is_refused_where_it_may_have_been_taken_away(
    operation: Op, seen: Done | None, sent: int, late: bool
) -> None:
    assert outcome(operation, State(), State(), seen, sent, 100, late=late) is not None


def test_a_refusal_is_remembered_and_forgotten_like_an_effect() -> None:
    refused = FULL._replace(done=(*FULL.done[1:], Done(OURS, -116, VersionConflict.code)))
    result = outcome(op(), refused, refused, None, 0, 0, late=False)
    assert result is not None and result.error is not None
    assert (result.error[0], result.version) == (VersionConflict.code, 115)
    oldest = FULL._replace(done=(Done(name(100), -100, VersionConflict.code), *FULL.done[1:]))
    assert outcome(op(since=99, retry=True), oldest, oldest, None, 0, 0, late=True) is not None
    assert outcome(op(since=100, retry=True), oldest, oldest, None, 0, 0, late=True) is None
    absent = refused._replace(value=None)
    assert is_retired(register_of(b"k", ballot(0, 1), absent), 116)
    assert not is_retired(register_of(b"k", ballot(0, 1), absent), 115)


def test_what_the_round_does_before_it_hides_nothing() -> None:
    later = tuple(Done(name(number), number, 0) for number in range(200, 200 + WINDOW))
    assert outcome(op(), FULL._replace(done=later), FULL, NEWEST, 0, 0, late=True) is None
    shifted = FULL._replace(done=(Done(OURS, 100, 7), *FULL.done[1:]))
    found = outcome(op(), shifted._replace(done=later), shifted, NEWEST, 0, 0, late=True)
    assert found is not None and found.number == 7


def test_it_is_found_where_it_is_named() -> None:
    state = FULL._replace(done=(*FULL.done[:-1], Done(OURS, 115, 7)))
    for late in (False, True):
        result = outcome(op(retry=True), state, state, None, 0, 0, late=late)
        assert result is not None and (result.version, result.number, result.error) == (115, 7, None)


@dataclass
class Coordinator:
    """One that has the operation. It may judge on any state that was chosen before."""

    operation: Op
    hlc: HLC
    seen: Done | None = None
    sent: int = 0
    judged: int = 0

    def tick(self, above: int) -> int:
        self.hlc.observe(above)
        return self.hlc.tick(0)

    def propose(self, state: State, floor: int, *, late: bool) -> tuple[State, OpResult]:
        """What it would have chosen, and what it says then."""
        result = outcome(self.operation, state, state, self.seen, self.sent, floor, late=late)
        if result is not None:
            return state, result
        self.seen = newest_of(state)
        after, result = apply(self.operation, b"k", state, 0, self.tick)
        if after.version != state.version:
            self.sent = self.sent or after.version
        return after, result


def effect(state: State) -> bool:
    return any(done.name == OURS and done.version > 0 for done in state.done)


steps = st.lists(
    st.tuples(
        st.sampled_from(["others", "first", "second", "taken"]),
        st.sampled_from([1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW]),
        st.sampled_from([False, False, True]),
    ),
    min_size=4,
    max_size=10,
)
TIMES = {"clocks": (200, 0, 0), "ahead": 200, "moves_at": 1, "old": False}


@settings(max_examples=500)
@example(  # sent, with a version far ahead, on a base that was old; then late
    steps=[("first", 1, True), ("second", 1, False), ("others", WINDOW + 1, False), ("first", 1, False)],
    before=1,
    by_value=False,
    **TIMES,
)
@example(  # refused by the second; then the value is again what it was
    steps=[("others", 1, False), ("second", 1, False), ("others", 1, False), ("first", 1, False)],
    before=1,
    by_value=True,
    **TIMES,
)
@example(  # and that was forgotten
    steps=[("others", 1, False), ("second", 1, False), ("others", WINDOW + 1, False), ("first", 1, False)],
    before=1,
    by_value=True,
    **TIMES,
)
@given(
    steps=steps,
    clocks=st.tuples(*[st.sampled_from([0, 10, 40, 200])] * 3),
    before=st.sampled_from([0, 1, WINDOW, WINDOW + 5]),
    ahead=st.sampled_from([1, 200]),
    moves_at=st.integers(0, 4),
    old=st.booleans(),
    by_value=st.booleans(),
)
def test_it_takes_effect_once_however_two_coordinators_and_their_clocks_behave(
    steps: list[tuple[str, int, bool]],
    clocks: tuple[int, int, int],
    before: int,
    ahead: int,
    moves_at: int,
    old: bool,
    by_value: bool,
) -> None:
    first, second, others = (HLC(clock) for clock in clocks)
    number = floor = 0
    chain = [State()]

    def other(count: int) -> None:
        nonlocal number
        for _ in range(count):
            number += 1
            write = Op(name(number), b"k", PUT, value=b"%d" % (number % 2))
            chain.append(apply(write, b"k", chain[-1], 0, lambda above: max(others.tick(0), above + 1))[0])

    other(before)
    since = 0 if old else first.tick(0)
    first.tick(0, ahead)  # what else it did since the client heard of its clock

    def ours(retry: bool) -> Op:
        if by_value:
            return Op(OURS, b"k", PUT, IF_EQUALS, b"x", expected=b"1", retry=retry, since=since)
        return Op(OURS, b"k", PUT, value=b"x", retry=retry, since=since)

    one, two = Coordinator(ours(False), first), Coordinator(ours(True), second)
    refused = False
    for at, (what, count, stale) in enumerate(steps):
        moved = at >= moves_at
        if what == "others":
            other(count)
        elif what == "taken":
            floor = max(floor, chain[-1].version, *(abs(done.version) for done in chain[-1].done), 0) + 1
            for clock in (first, second, others):
                clock.observe(floor)
            chain += [chain[-1]._replace(version=floor, value=None), State()]
        elif what == "first" or moved:
            coordinator = one if what == "first" else two
            coordinator.judged = max(coordinator.judged, len(chain) - 1 - (count if stale else 0))
            after, result = coordinator.propose(chain[coordinator.judged], floor, late=moved)
            if coordinator.judged != len(chain) - 1:
                continue  # acceptors refuse it, as they have promised more since
            if after is not chain[-1]:
                chain.append(after)
            if coordinator is two and result.error is not None and result.error[0] == VersionConflict.code:
                refused = True  # and the caller is told so
    effects = sum(effect(now) and not effect(was) for was, now in itertools.pairwise(chain))
    assert effects <= (0 if refused else 1)
