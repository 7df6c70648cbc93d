"""The checker: against stories, against every order of small histories, and on recorded histories of known verdict."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agi.core.dht.testing.history import Handle, History, MalformedHistory, Operation, Outcome
from agi.core.dht.testing.linearizability import LIMIT, Result, Step, Verdict, check
from agi.core.dht.testing.linearizability.__main__ import main

REPOSITORY = Path(__file__).parents[3]
RECORDED = Path(os.environ.get("DHT_HISTORIES", REPOSITORY.parent / "shared" / "histories"))


def told(story: str, key: str = "k") -> History:
    """A history from a text: "a write 1; b read; a ok; b ok 1", each event 1 ms after the one before."""
    clock = itertools.count(1_000_000, 1_000_000)
    history = History(lambda: next(clock))
    handles: dict[str, Handle] = {}
    for event in story.split(";"):
        process, what, *rest = event.split(maxsplit=2)
        value = json.loads(rest[0]) if rest else None
        if what == "ok":
            handles[process].ok(value)
        elif what in ("fail", "info"):
            getattr(handles[process], what)()
        else:
            handles[process] = history.invoke(process, what, key, value)
    return history


def verdict(story: str) -> Verdict:
    return check(told(story).operations).verdict


# --- stories

RIGHT = {
    "nothing": "a read; a ok null",
    "a read sees the write before it": "a write 1; a ok; b read; b ok 1",
    "overlapping writes in either order": "a write 1; b write 2; a ok; b ok; c read; c ok 1",
    "a write is seen before it returns": "a write 1; b read; b ok 1; a ok",
    "a read overlaps two writes": "a write 1; a ok; r read; a write 2; a ok; r ok 1",
    "a write of unknown outcome happened": "a write 1; a info; b read; b ok 1",
    "a write of unknown outcome did not": "a write 1; a info; b read; b ok null",
    "it happens late": "a write 1; a info; b write 2; b ok; b read; b ok 2; b read; b ok 1",
    "one that never returned happens late": "a write 1; b write 2; b ok; b read; b ok 2; b read; b ok 1",
    "two of unknown outcome, the later first": "a write 1; a info; b write 2; b info; c read; c ok 2; c read; c ok 1",
    "equal ones can happen twice": "a write 1; a info; b write 1; b info; c write 2; c ok; c read; c ok 1; "
    "c write 3; c ok; c read; c ok 1",
    "equal ones in a row": "a write 1; a info; b write 1; b info; c write 1; c info; d write 2; d ok; "
    "d read; d ok 2; d read; d ok 1; d write 3; d ok; d read; d ok 1; d write 4; d ok; d read; d ok 1",
    "chained: a write, then a cas, both unknown": "a write 1; a info; b cas [1, 2]; b info; c read; c ok 2",
    "a failed write was not": "a write 1; a fail; b read; b ok null",
    "a process goes on after an unknown outcome": "a write 1; a info; a write 2; a ok; a read; a ok 1",
    "cas": "a write 1; a ok; a cas [1, 2]; a ok; b read; b ok 2",
    "cas from nothing": "a cas [null, 2]; a ok; b read; b ok 2",
    "a cas refused": "a write 1; a ok; a cas [2, 3]; a ok false; a read; a ok 1",
    "a cas refused because of one of unknown outcome": "a write 1; a ok; b write 2; b info; a cas [1, 3]; a ok false; "
    "a write 4; a ok",
    "cas of unknown outcome": "a write 1; a ok; b cas [1, 2]; b info; a read; a ok 1; a read; a ok 2",
    "incr": "a incr 2; a ok 2; b incr 3; b ok 5; a read; a ok 5",
    "overlapping incr": "a incr 1; b incr 1; b ok 1; a ok 2",
    "incr of unknown outcome": "a incr 1; a info; b incr 1; b ok 2",
    "incr back to a value": "a write 1; a ok; b incr -1; b info; c incr 1; c info; d read; d ok 0; d read; d ok 1",
    "incr of nothing by zero": "a incr 0; a ok 0; a read; a ok 0",
    "delete": "a write 1; a ok; b delete; b ok; a read; a ok null",
    "values are compared as JSON": 'a write {"x": [1, 2]}; a ok; a cas [{"x": [1, 2]}, true]; a ok; a read; a ok true',
    "tokens": 'a fenced_write [1, "x"]; a ok; b fenced_write [2, "y"]; b ok; b fenced_write [2, "z"]; b ok; '
    'a fenced_write [1, "w"]; a ok false; a read; a ok "z"',
    "a plain write has no token": "a fenced_write [5, 1]; a ok; b write 2; b ok; c fenced_write [4, 3]; c ok false; "
    "c delete; c ok; c fenced_write [5, 4]; c ok",
    "a write of unknown outcome raised the token": "a fenced_write [5, 1]; a info; b write 2; b ok; "
    "c fenced_write [4, 3]; c ok false; c read; c ok 2",
    "locks": "a lock; a ok 1; a unlock 1; a ok; b lock; b ok 2; b unlock 2; b ok",
    "an expired lease": "a lock; a ok 1; b lock; b ok 7; b unlock 7; b ok",
    "a lock of unknown outcome has some token": "a lock; a ok 1; b lock; b info; c lock; c ok 3; c unlock 3; c ok",
    "the token became known": "a lock; a info; b unlock 9; b ok; c lock; c ok 10",
    "overlapping locks": "a lock; b lock; b ok 1; a ok 2",
    "an unlock of unknown outcome": "a lock; a ok 1; a unlock 1; a info; a unlock 1; a ok",
}

WRONG = {
    "out of nowhere": "a read; a ok 1",
    "stale": "a write 1; a ok; a write 2; a ok; b read; b ok 1",
    "lost": "a write 1; a ok; b read; b ok null",
    "a value goes and comes back": "a write 1; a ok; b write 2; c read; c ok 2; c read; c ok 1; b ok",
    "two readers see overlapping writes in two orders": "a write 1; b write 2; a ok; b ok; "
    "c read; d read; c ok 1; d ok 2; c read; c ok 1; d read; d ok 2",
    "seen before it was invoked": "a read; a ok 1; b write 1; b info",
    "a failed write was seen": "a write 1; a fail; b read; b ok 1",
    "a failed cas was seen": "a write 1; a ok; b cas [1, 2]; b fail; a read; a ok 2",
    "one of unknown outcome happens once": "a write 1; a info; b read; b ok 1; b write 2; b ok; b read; b ok 1",
    "two equal ones happen twice, not more": "a write 1; a info; b write 1; b info; c write 2; c ok; c read; c ok 1; "
    "c write 3; c ok; c read; c ok 1; c write 4; c ok; c read; c ok 1",
    "cas on another value": "a write 1; a ok; a cas [2, 3]; a ok",
    "two cas of one value": "a write 1; a ok; b cas [1, 2]; c cas [1, 3]; b ok; c ok",
    "a cas refused for no reason": "a write 1; a ok; a cas [1, 2]; a ok false",
    "a cas refused after one of unknown outcome that came later": "a write 1; a ok; a cas [1, 3]; a ok false; "
    "b write 2; b info",
    "lost update": "a incr 1; b incr 1; a ok 1; b ok 1",
    "an incr twice": "a incr 1; a ok 1; b incr 1; b ok 3",
    "incr of a string": 'a write "x"; a ok; a incr 1; a ok 1',
    "incr of true": "a write true; a ok; a incr 1; a ok 2",
    "true is not 1": "a write 1; a ok; b read; b ok true",
    "1.0 is not 1": "a write 1; a ok; b read; b ok 1.0",
    "the string 1 is not 1": 'a write 1; a ok; b read; b ok "1"',
    "deleted and yet there": "a write 1; a ok; b delete; b ok; a read; a ok 1",
    "an old token writes": "a fenced_write [2, 1]; a ok; b fenced_write [1, 2]; b ok",
    "a token is refused for no reason": "a fenced_write [2, 1]; a ok; b fenced_write [2, 2]; b ok false",
    "a refused token wrote": "a fenced_write [2, 1]; a ok; b fenced_write [1, 2]; b ok false; b read; b ok 2",
    "a token twice": "a lock; a ok 1; b lock; b ok 1",
    "a token goes back": "a lock; a ok 2; b lock; b ok 1",
    "unlocked by who has it no more": "a lock; a ok 1; b lock; b ok 2; a unlock 1; a ok",
    "unlocked twice": "a lock; a ok 1; a unlock 1; a ok; a unlock 1; a ok",
    "unlocked and never locked": "a unlock 1; a ok",
    "no token is left for one of unknown outcome": "a lock; a ok 1; b lock; b info; b unlock 1; b ok; c lock; c ok 1",
    "an unknown lock has its own token": "a lock; a ok 1; a unlock 1; a ok; b lock; b info; c unlock 1; c ok",
    "a token known too early": "a lock; a ok 5; b lock; b info; c unlock 4; c ok",
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_has_an_order(name: str) -> None:
    assert verdict(RIGHT[name]) is Verdict.LINEARIZABLE


@pytest.mark.parametrize("name", WRONG)
def test_what_has_none(name: str) -> None:
    assert verdict(WRONG[name]) is Verdict.VIOLATION


def test_keys_are_apart_and_so_are_a_lock_and_a_register() -> None:
    history = History(itertools.count().__next__)
    history.invoke("a", "write", "x", 1).ok()
    history.invoke("a", "lock", "x").ok(4)
    history.invoke("a", "fenced_write", "x", [4, 2]).ok()
    history.invoke("a", "read", "y").ok(None)
    history.invoke("a", "read", "x").ok(2)
    result = check(history.operations)
    assert (result.verdict, result.objects, result.operations) == (Verdict.LINEARIZABLE, 3, 5)
    history.invoke("a", "read", "y").ok(2)
    history.invoke("a", "lock", "x").ok(4)
    result = check(history.operations)
    assert [(wrong.model, wrong.key) for wrong in result.violations] == [("lock", "x"), ("register", "y")]


def test_no_operation_is_left_out_in_silence() -> None:
    stray = Operation(0, "a", "append", "k", "x", 0, 0, Outcome.OK, None, 1, 1)
    with pytest.raises(MalformedHistory, match="append"):
        check([stray])


# --- what is shown of a violation


def test_a_violation_shows_the_smallest_prefix_and_what_was_possible() -> None:
    history = told(
        "a write 1; a ok; b write 2; c write 3; b ok; c ok; d write 4; d info; "
        "r read; e write 5; r ok 1; e ok; r read; r ok 5; r read; r ok 9"
    )
    (violation,) = check(history.operations).violations
    assert violation.failing.number == 4 and violation.shortest
    assert [op.number for op in violation.prefix] == [0, 1, 2, 3, 4, 5]
    assert violation.prefix[5].outcome is Outcome.PENDING, "as it was then"
    assert set(violation.states) == {"value 2", "value 3"}, "4 and 5 were perhaps there, but nothing tells of them"
    assert violation.window_ns == (9_000_000, 11_000_000)
    shown = violation.describe(2)
    assert "register 'k'" in shown and "window: 9.000000 to 11.000000 ms" in shown
    assert "... 4 before these" in shown and "> #4 process r: read -> 1, ok" in shown
    assert "#3" not in shown and "#5 process e: write 5, pending" in shown


def test_the_window_begins_with_the_earliest_that_overlaps() -> None:
    (violation,) = check(
        told("a write 1; a ok; b write 2; c write 3; r read; c ok; b ok; r ok 4").operations
    ).violations
    assert violation.window_ns == (3_000_000, 8_000_000)


def test_a_long_history_fails_where_it_went_wrong() -> None:
    history = atomic(random.Random(5), count=3000, keys=1, unknown=0.0)
    reads = [op for op in history.operations if op.f == "read" and op.outcome is Outcome.OK]
    lies = [reads[len(reads) // 2], reads[-1]]
    for lie in lies:
        lie.result = "never written"
    (violation,) = check(history.operations).violations
    assert violation.failing.number == lies[0].number and violation.shortest
    assert len(violation.prefix) < lies[1].number
    assert violation.states and violation.window_ns[1] == lies[0].returned_ns


# --- against every order


class Thing:
    """A register and a lock, as a program would have them. `run` tells the possible results and what becomes of it."""

    def __init__(self, value: Any = None, fence: float = float("-inf"), token: int = -9, held: bool = False) -> None:
        self.value, self.fence, self.token, self.held = value, fence, token, held

    @property
    def key(self) -> Hashable:
        return (json.dumps(self.value), self.fence, self.token, self.held)

    def run(self, op: Operation) -> Iterator[tuple[Any, Thing]]:
        value: Any = op.value
        if op.f == "read":
            yield self.value, self
        elif op.f in ("write", "delete"):
            yield None, self.but(value=value)
        elif op.f == "cas":
            same = json.dumps(self.value) == json.dumps(value[0])
            yield (None, self.but(value=value[1])) if same else (False, self)
        elif op.f == "incr" and (self.value is None or type(self.value) is int):
            total = (self.value or 0) + value
            yield total, self.but(value=total)
        elif op.f == "fenced_write":
            late = value[0] < self.fence
            yield (False, self) if late else (None, self.but(fence=value[0], value=value[1]))
        elif op.f == "lock":
            for token in range(self.token + 1, 6):
                yield token, self.but(token=token, held=True)
        elif op.f == "unlock" and self.held and self.token == value:
            yield None, self.but(held=False)

    def but(self, **changed: Any) -> Thing:
        return Thing(**{**self.__dict__, **changed})

    def follows(self, op: Operation) -> Iterator[Thing]:
        for result, thing in self.run(op):
            if op.outcome is not Outcome.OK or json.dumps(result) == json.dumps(op.result):
                yield thing


def in_time(order: Sequence[Operation]) -> bool:
    """Nobody comes after one that was invoked when it had returned."""
    latest = -1
    for op in order:
        if op.outcome is Outcome.OK and op.returned is not None and op.returned < latest:
            return False
        latest = max(latest, op.invoked)
    return True


def can_be(order: Sequence[Operation], thing: Thing) -> bool:
    return not order or any(can_be(order[1:], following) for following in thing.follows(order[0]))


def by_every_order(operations: Sequence[Operation]) -> bool:
    known = [op for op in operations if op.outcome is Outcome.OK]
    unknown = [op for op in operations if op.outcome in (Outcome.INFO, Outcome.PENDING)]
    return any(
        in_time(order) and can_be(order, Thing())
        for count in range(len(unknown) + 1)
        for some in itertools.combinations(unknown, count)
        for order in itertools.permutations([*known, *some])
    )


def cut(operations: Sequence[Operation], end: int) -> list[Operation]:
    """What an observer had seen by the event `end`; but those that were going to fail never took effect."""
    seen = [op for op in operations if op.invoked <= end and op.outcome is not Outcome.FAIL]
    return [
        op
        if op.returned is not None and op.returned <= end
        else replace(op, outcome=Outcome.PENDING, result=None, returned=None, returned_ns=None)
        for op in seen
    ]


VALUES = (None, 1, 2, True)
REGISTER = {
    "read": st.none(),
    "write": st.sampled_from(VALUES),
    "delete": st.none(),
    "cas": st.lists(st.sampled_from(VALUES), min_size=2, max_size=2),
    "incr": st.sampled_from((0, 1)),
    "fenced_write": st.tuples(st.sampled_from((1, 2)), st.sampled_from(VALUES)).map(list),
}
LOCK = {"lock": st.none(), "unlock": st.integers(1, 4)}


@st.composite
def histories(draw: st.DrawFn, invoked: dict[str, st.SearchStrategy[Any]], count_max: int) -> list[Operation]:
    """Up to three processes on one object, most of whose results are those of a thing that does one thing at a time,
    which does each operation at the moment of its invocation, of its completion, or never."""
    history = History(itertools.count().__next__)
    thing = Thing(token=0)
    running: dict[int, tuple[Handle, Any, bool]] = {}

    def done(op: Operation) -> Any:
        nonlocal thing
        ways = list(thing.run(op))
        if not ways:
            return 0 if op.f == "incr" else None
        result, thing = ways[0]
        return result

    for _ in range(draw(st.integers(3, 2 * count_max))):
        process = draw(st.integers(0, 2))
        if process not in running:
            if len(history) == count_max:
                continue
            f = draw(st.sampled_from(sorted(invoked)))
            handle = history.invoke(process, f, "k", draw(invoked[f]))
            now = draw(st.booleans())
            running[process] = handle, done(handle.operation) if now else None, now
            continue
        handle, result, over = running.pop(process)
        end = draw(st.sampled_from(("ok",) * 4 + ("lie",) * 3 + ("fail", "info", "info after all")))
        if not over and end in ("ok", "info after all"):
            result = done(handle.operation)
        if end == "fail":
            handle.fail()
        elif end.startswith("info"):
            handle.info()
        else:
            f = handle.operation.f
            if end == "lie" or (f == "lock" and result is None):
                false: tuple[Any, ...] = {
                    "read": VALUES,
                    "cas": (None, False),
                    "fenced_write": (None, False),
                    "incr": (0, 1, 2),
                    "lock": (1, 2, 3, 4),
                }.get(f, (None,))
                result = draw(st.sampled_from(false))
            handle.ok(result)
    return history.operations


@pytest.mark.parametrize(
    ("invoked", "count_max", "examples"), [(REGISTER, 6, 500), (LOCK, 6, 250)], ids=["register", "lock"]
)
def test_the_verdict_is_that_of_trying_every_order(
    invoked: dict[str, st.SearchStrategy[Any]], count_max: int, examples: int
) -> None:
    verdicts: Counter[bool] = Counter()

    @settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(histories(invoked, count_max))
    def compare(operations: list[Operation]) -> None:
        result = check(operations)
        right = by_every_order(operations)
        verdicts[right] += 1
        assert (result.verdict is Verdict.LINEARIZABLE) == right, "\n".join(map(str, operations))
        if not right:
            (violation,) = result.violations
            ends = sorted(op.returned for op in operations if op.outcome is Outcome.OK and op.returned is not None)
            failing = next(end for end in ends if not by_every_order(cut(operations, end)))
            assert violation.failing.returned == failing
            assert list(violation.prefix) == cut(operations, failing)

    compare()
    assert min(verdicts[True], verdicts[False]) > examples // 20, verdicts


# --- against a plain search, on histories in which much is unknown


def by_plain_search(operations: Sequence[Operation]) -> bool:
    """Every order that time allows, one operation after the other; only what was tried is not tried again."""
    tried: set[tuple[frozenset[int], Hashable]] = set()

    def finds(left: list[Operation], thing: Thing) -> bool:
        due = min((op.returned for op in left if op.outcome is Outcome.OK and op.returned is not None), default=None)
        if due is None:
            return True
        here = (frozenset(op.number for op in left), thing.key)
        if here in tried:
            return False
        tried.add(here)
        return any(
            finds([op for op in left if op is not first], following)
            for first in left
            if first.invoked < due
            for following in thing.follows(first)
        )

    return finds([op for op in operations if op.outcome is not Outcome.FAIL], Thing())


def atomic(
    rng: random.Random,
    *,
    count: int,
    keys: int,
    unknown: float,
    processes: int = 10,
    values: int = 1_000_000,
    fs: Sequence[str] = ("read", "read", "write", "cas", "incr", "delete"),
) -> History:
    """Processes at a store that does one thing at a time, at some moment between invocation and completion; what is
    unknown is done later, or never."""
    now = 0
    history = History(lambda: now)
    store: dict[str, Thing] = {}
    running: dict[int, list[Any]] = {}
    late: list[Operation] = []

    def do(op: Operation) -> Any:
        ways = list(store.setdefault(op.key, Thing()).run(op))
        if not ways:  # an incr of what is no int: it does not happen
            return None
        result, store[op.key] = ways[0]
        return result

    while len(history) < count or running:
        now += rng.randrange(1000)
        if late and rng.random() < 0.05:
            do(late.pop(rng.randrange(len(late))))
        process = rng.randrange(processes)
        if process not in running:
            if len(history) < count:
                f, key = rng.choice(fs), f"k{rng.randrange(keys)}"
                old = store[key].value if key in store and rng.random() < 0.7 else rng.randrange(values)
                value: Any = {"write": rng.randrange(values), "cas": [old, rng.randrange(values)], "incr": 1}.get(f)
                running[process] = [history.invoke(process, f, key, value)]
            continue
        handle, *result = running[process]
        if not result and rng.random() < unknown:
            late.append(handle.operation)
            handle.info()
        elif not result:
            running[process].append(do(handle.operation))
            continue
        else:
            handle.ok(*result)
        del running[process]
    return history


def test_the_verdict_is_that_of_a_plain_search() -> None:
    verdicts: Counter[bool] = Counter()
    for seed in range(400):
        rng = random.Random(seed)
        fs = rng.choice(
            (["read", "write", "cas"], ["read", "write", "incr"], ["read", "write", "cas", "incr", "delete"])
        )
        history = atomic(rng, count=13, keys=1, unknown=0.35, processes=5, values=4, fs=fs)
        reads = [op for op in history.operations if op.f == "read" and op.outcome is Outcome.OK]
        if reads and seed % 4:
            rng.choice(reads).result = rng.choice((None, 0, 1, 2))
        right = by_plain_search(history.operations)
        verdicts[right] += 1
        found = check(history.operations).verdict is Verdict.LINEARIZABLE
        assert found == right, f"seed {seed}\n" + "\n".join(map(str, history.operations))
    assert min(verdicts.values()) > 60, verdicts


# --- size


def timed(operations: Sequence[Operation]) -> tuple[Result, float]:
    """The result, and seconds of processor time."""
    began = time.process_time()
    return check(operations), time.process_time() - began


def test_twenty_thousand_operations_take_seconds() -> None:
    history = atomic(random.Random(1), count=20_000, keys=20, unknown=0.002)
    result, took_s = timed(history.operations)
    assert (result.verdict, result.objects, result.operations) == (Verdict.LINEARIZABLE, 20, 20_000)
    assert took_s < 5
    reads = [op for op in history.operations if op.f == "read" and op.outcome is Outcome.OK]
    reads[-1].result = "never written"
    result, took_s = timed(history.operations)
    assert [wrong.failing for wrong in result.violations] == [reads[-1]]
    assert took_s < 5


def many_unknown(history: History) -> int:
    """Sixty, each of another value: 2 ** 60 sets could have happened."""
    for number in range(30):
        history.invoke("a", "write", "k", number).info()
        history.invoke("b", "cas", "k", [number, number + 100]).info()
    for number in (7, 107, 3, 29, 129):
        history.invoke("c", "read", "k").ok(number)
    return 3


def many_equal(history: History) -> int:
    """Sixteen each of two writes: what counts is how many were used, not which."""
    for number in (1, 2) * 16:
        history.invoke("a", "write", "k", number).info()
    for number in (1, 2) * 16:
        history.invoke("c", "read", "k").ok(number)
    return 1


def many_twice(history: History) -> int:
    """Each value could come twice and is read once, between others that hide what nobody reads."""
    for number in range(12):
        history.invoke("a", "write", "k", number).info()
        history.invoke("a", "write", "k", number).info()
    for number in range(12):
        history.invoke("c", "write", "k", -1).ok()
        history.invoke("c", "read", "k").ok(number)
    return -1


def many_at_once(history: History) -> int:
    """Twelve writes that overlap, and reads that tell their order."""
    handles = [history.invoke(process, "write", "k", process) for process in range(12)]
    for number in range(12):
        history.invoke("r", "read", "k").ok(number)
    for handle in handles:
        handle.ok()
    return 3


@pytest.mark.parametrize("happened", [many_unknown, many_equal, many_twice, many_at_once])
def test_what_cannot_matter_is_not_tried(happened: Callable[[History], int]) -> None:
    history = History(itertools.count().__next__)
    gone = happened(history)
    assert check(history.operations, limit=2000).verdict is Verdict.LINEARIZABLE
    history.invoke("z", "read", "k").ok(gone)
    result = check(history.operations, limit=2000)
    assert result.verdict is Verdict.VIOLATION
    assert result.violations[0].failing.process == "z"


def test_a_slow_operation_among_thousands() -> None:
    history = History(itertools.count().__next__)
    slow = history.invoke("slow", "write", "k", "late")
    for number in range(5000):
        history.invoke("a", "write", "k", number).ok()
        history.invoke("a", "read", "k").ok(number)
    slow.ok()
    history.invoke("a", "read", "k").ok("late")
    result, took_s = timed(history.operations)
    assert result.verdict is Verdict.LINEARIZABLE and took_s < 5


def test_what_is_too_much_is_unknown() -> None:
    history = atomic(random.Random(2), count=300, keys=1, unknown=0.0, processes=30, values=4)
    result = check(history.operations, limit=20)
    assert (result.verdict, result.undecided, result.violations) == (Verdict.UNKNOWN, ("register 'k0'",), ())
    assert result.explored <= 22 < LIMIT
    history.invoke("z", "read", "other").ok(1)
    assert check(history.operations, limit=20).verdict is Verdict.VIOLATION, "of another key, and certain"


# --- recorded histories


class Text:
    """A string that is read, set, and appended to."""

    name = "text"
    initial: Hashable = ""
    initial_value: Hashable = ""

    def steps(self, operations: Sequence[Operation]) -> list[Step | None]:
        return [self._step(op) for op in operations]

    def _step(self, op: Operation) -> Step:
        def get(state: Hashable) -> Hashable:
            return state if state == op.result else None

        def put(state: Hashable) -> Hashable:
            return str(op.value)

        def append(state: Hashable) -> Hashable:
            return f"{state}{op.value}"

        return Step({"get": get, "put": put, "append": append}[op.f], observer=op.f == "get", blind=op.f == "put")

    def show(self, state: Hashable) -> str:
        return repr(state)


REGISTER_EVENT = re.compile(r"(\d+)\s+:(\w+)\s+:(\w+)\s+(\S.*?)\s*$")
TEXT_EVENT = re.compile(r'\{:process (\d+), :type :(\w+), :f :(\w+), :key "(.*)", :value (?:nil|"(.*)")\}$')


def recorded_register(path: Path) -> list[Operation]:
    lines = []
    for time_ns, line in enumerate(path.read_text().splitlines()):
        event = REGISTER_EVENT.search(line)
        assert event, line
        process, kind, f, shown = event.groups()
        numbers = [int(number) for number in re.findall(r"\d+", shown)]
        value: Any = numbers if shown.startswith("[") else numbers[0] if numbers else None
        if (kind, f) == ("fail", "cas"):  # the answer that the value was another
            kind, value = "ok", False
        told = {"process": int(process), "type": kind, "f": f, "key": "register", "value": value, "time": time_ns}
        lines.append(json.dumps(told))
    return History.parse(lines, path.name).operations


def recorded_text(path: Path) -> list[Operation]:
    operations: list[Operation] = []
    running: dict[str, Operation] = {}
    for at, line in enumerate(path.read_text().splitlines()):
        event = TEXT_EVENT.match(line)
        assert event, line
        process, kind, f, key, value = event.groups()
        if kind == "invoke":
            running[process] = Operation(len(operations), process, f, key, value, at, at)
            operations.append(running[process])
        else:
            assert kind == "ok", line
            op = running.pop(process)
            op.outcome, op.result, op.returned, op.returned_ns = Outcome.OK, value, at, at
    return operations


@pytest.mark.skipif(not RECORDED.is_dir(), reason=f"no recorded histories in {RECORDED}; set DHT_HISTORIES")
def test_recorded_histories_get_their_verdicts() -> None:
    verdicts: dict[str, bool] = json.loads((RECORDED / "verdicts.json").read_text())
    assert verdicts
    began = time.perf_counter()
    found = {}
    for name in verdicts:
        path = RECORDED / name
        if path.suffix == ".log":
            result = check(recorded_register(path))
        else:
            result = check(recorded_text(path), model=Text())
        assert result.verdict is not Verdict.UNKNOWN, name
        found[name] = result.verdict is Verdict.LINEARIZABLE
    assert found == verdicts
    assert time.perf_counter() - began < 60


# --- the command


def test_the_command_tells_each_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right, wrong, no_history = tmp_path / "right.jsonl", tmp_path / "wrong.jsonl", tmp_path / "no.jsonl"
    told(RIGHT["cas"]).write(right)
    told(WRONG["stale"], key="cart").write(wrong)
    no_history.write_text('{"process": 1}\n')
    hard = tmp_path / "hard.jsonl"
    atomic(random.Random(2), count=300, keys=1, unknown=0.0, processes=30, values=4).write(hard)

    assert main([str(right)]) == 0
    assert f"{right}: linearizable (1 objects, 3 operations" in capsys.readouterr().out
    assert main([str(right), str(wrong)]) == 1
    out = capsys.readouterr().out
    assert f"{right}: linearizable" in out and f"{wrong}: violation" in out
    assert "register 'cart': nothing explains #2 process b: read -> 1, ok [5.000000, 6.000000] ms" in out
    assert "window: 5.000000 to 6.000000 ms" in out and "possible before it: value 2" in out
    assert "smallest failing prefix: 3 operations" in out and "> #2" in out
    assert main(["--limit", "20", str(right), str(hard)]) == 2
    assert "register 'k0': given up" in capsys.readouterr().out
    assert main([str(right), str(no_history), str(tmp_path / "missing")]) == 2
    caught = capsys.readouterr()
    assert f"{no_history}:1: without type" in caught.err and "missing" in caught.err
    assert f"{right}: linearizable" in caught.out
    assert main([str(no_history), str(wrong)]) == 1, "a violation is certain, whatever else there is"


def test_the_command_runs_as_a_module(tmp_path: Path) -> None:
    path = tmp_path / "wrong.jsonl"
    told(WRONG["lost"]).write(path)
    command = [sys.executable, "-W", "error", "-m", "agi.core.dht.testing.linearizability", str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (1, "")
    assert "violation" in ended.stdout
