"""Decides whether a history of operations (history.py) is linearizable, and shows where it is not.

A history is linearizable if its operations can be put in one order in which each of them, done alone, gives the result
that was recorded, and no operation comes before one that had returned before it was invoked (Herlihy and Wing,
"Linearizability: a correctness condition for concurrent objects", TOPLAS 12(3), 1990). Those that failed are in no such
order; those whose outcome is unknown are in it anywhere after their invocation, or not at all.

The search is that of Wing and Gong ("Testing and verifying concurrent objects", Journal of Parallel and Distributed
Computing 17, 1993) with the memory of Lowe ("Testing for linearizability", Concurrency and Computation 29(4), 2017:
Wing & Gong graph search): a depth-first walk over configurations, each the set of operations that are linearized and
the state that they leave, none of which is entered twice. Objects are checked each for itself, since a history is
linearizable if and only if it is so for each object (Herlihy and Wing, theorem 1; Horn and Kroening, "Faster
linearizability checking via P-compositionality", FORTE 2015).

Five rules leave out what cannot matter. Each keeps a linearization of what is left, if there is one, with no more
operations of unknown outcome:

1. Observers (reads, refusals), which never change the state, are linearized as soon as they are minimal and right: in
   any linearization they can be moved forward to there.
2. An operation of unknown outcome has to be needed: it changes the state, and what follows is not one that does the
   same whatever the state was (`Step.blind`). If not, it can be left out.
3. Of equal operations of unknown outcome the earliest invoked is taken first: it can stand wherever a later one can.
4. A configuration is not entered if another with the same state and the same operations of known outcome was, that had
   used up no other operations of unknown outcome: it could go on in all the same ways. (Equal ones are Lowe's case.)
5. A value is not replaced while others need it (reads, compare-and-set from it) and nothing is left to give it again.

Together they keep one too. Of all entered configurations that can be completed take the one with the fewest operations
of known outcome left, then the fewest of unknown outcome yet needed, then the fewest of them used up: where a rule
refuses a next step of its shortest completion, the rule names an entered configuration that is less.

Besides, a model drops those of unknown outcome that nothing in the history could tell. All the same the problem is
NP-complete; a bound on the configurations makes the verdict `unknown`, never wrong.
"""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

from agi.core.dht.testing.history import Function, Operation, Outcome
from agi.core.dht.testing.linearizability.models import UNTOLD, LockModel, Model, RegisterModel, State, Step

__all__ = ["LIMIT", "SHOWN", "Result", "Verdict", "Violation", "check"]

LIMIT: Final = 1_000_000
"""Configurations that are explored for an object before it is given up: up to 300 MB, and some 10 s."""
SHOWN: Final = 20
"""Operations of a failing prefix that are printed."""
STATES_SHOWN: Final = 8
SUMS_MAX: Final = 1_000_000
"""Values that are reckoned with because of additions of unknown outcome."""


class Verdict(enum.StrEnum):
    LINEARIZABLE = "linearizable"
    VIOLATION = "violation"
    UNKNOWN = "unknown"
    """The search was given up at its limit."""


@dataclass(frozen=True, slots=True)
class Violation:
    """An object whose operations have no order.

    Attributes:
        model, key: the object.
        prefix: its operations in the shortest prefix of the history that is not linearizable, in the order of their
            invocation. The prefix ends with the completion of `failing`; what was not completed by then is pending.
            Failed operations are not among them.
        failing: the operation whose completion nothing explains.
        states: some that were possible before it, by the model's `show`; those left out that only an operation of
            unknown outcome would explain which nothing else tells of. Empty if the search for them was given up.
        window_ns: from the earliest invocation among the operations with a result that overlap `failing`, itself among
            them, to its completion.
        shortest: false if the search for the shortest prefix was given up at the limit; it may then be shorter.
    """

    model: str
    key: str
    prefix: tuple[Operation, ...]
    failing: Operation
    states: tuple[str, ...]
    window_ns: tuple[int, int]
    shortest: bool = True

    def describe(self, shown: int = SHOWN) -> str:
        """For a reader: what fails, and the last `shown` operations of the prefix."""
        begin_ns, end_ns = self.window_ns
        states = "; ".join(self.states) or "not known"
        shortest = "smallest failing prefix" if self.shortest else "a failing prefix"
        lines = [
            f"{self.model} {self.key!r}: nothing explains {self.failing}",
            f"  window: {begin_ns / 1e6:.6f} to {end_ns / 1e6:.6f} ms",
            f"  possible before it: {states}",
            f"  {shortest}: {len(self.prefix)} operations, up to the completion of #{self.failing.number}",
        ]
        left_out = max(0, len(self.prefix) - max(0, shown))
        if left_out:
            lines.append(f"    ... {left_out} before these")
        for op in self.prefix[left_out:]:
            lines.append(f"  {'>' if op.number == self.failing.number else ' '} {op}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Result:
    """What a check found.

    Attributes:
        verdict: VIOLATION if any object violates its model, else UNKNOWN if any was given up.
        objects, operations: how many there were; explored: configurations, the searches for prefixes left out.
        violations: at most one per object; undecided: the objects that were given up, each as "model 'key'".
    """

    verdict: Verdict
    objects: int
    operations: int
    explored: int
    violations: tuple[Violation, ...] = ()
    undecided: tuple[str, ...] = ()

    def describe(self, shown: int = SHOWN) -> str:
        """For a reader: the verdict in a line, and below it all that is not linearizable or not decided."""
        lines = [f"{self.verdict} ({self.objects} objects, {self.operations} operations, {self.explored} states)"]
        lines += [violation.describe(shown) for violation in self.violations]
        lines += [f"{name}: given up" for name in self.undecided]
        return "\n".join(lines)


_LOCKS = frozenset({Function.LOCK, Function.UNLOCK})


def check(operations: Iterable[Operation], *, limit: int = LIMIT, model: Model | None = None) -> Result:
    """Whether the operations of a history, in any order, are linearizable.

    Args:
        limit: on the configurations that are explored for each object, and once more for its smallest failing prefix.
        model: of all objects, each of them a key. Without one, lock and unlock are of a LockModel and all else is of a
            RegisterModel; a lock and a register of one key are two objects.

    Raises:
        MalformedHistory: an operation that the model does not know.
    """
    objects: dict[tuple[str, str], list[Operation]] = defaultdict(list)
    models: dict[str, Model] = {}
    count = 0
    for op in sorted(operations, key=lambda op: op.invoked):
        count += 1
        own = model or (_LOCK if op.f in _LOCKS else _REGISTER)
        models[own.name] = own
        kept = objects[own.name, op.key]
        if op.outcome is not Outcome.FAIL:
            kept.append(op)
    explored = 0
    violations: list[Violation] = []
    undecided: list[str] = []
    for (name, key), own_operations in objects.items():
        search = _Search(models[name], own_operations, limit)
        verdict = search.run()
        explored += search.explored
        if verdict is Verdict.VIOLATION:
            violations.append(_violation(models[name], key, own_operations, limit))
        elif verdict is Verdict.UNKNOWN:
            undecided.append(f"{name} {key!r}")
    verdict = Verdict.VIOLATION if violations else Verdict.UNKNOWN if undecided else Verdict.LINEARIZABLE
    return Result(verdict, len(objects), count, explored, tuple(violations), tuple(undecided))


_LOCK, _REGISTER = LockModel(), RegisterModel()
_FORCED, _KNOWN, _UNKNOWN = range(3)
_Mark: TypeAlias = tuple[int, int, int, list[int], int, State, int, int, int, int, bool]
"""A choice: its kind, what was chosen, and the configuration in which it was made."""


@dataclass(slots=True)
class _Search:
    """The search of one object.

    Operations with a result are numbered in the order of their invocation. Their events are nodes of a doubly linked
    list in the order of time, calls and returns, from which an operation is lifted when it is linearized; those that
    may come next are the calls before the first return. The linearized ones are a bitset, kept short: all before `base`
    are, and bit i of `ahead` tells of base + i. `used` is the bitset of those of unknown outcome.
    """

    model: Model
    operations: Sequence[Operation]
    limit: int
    foresight: bool = True
    """Whether rule 5 is used. Without it the search gets as far as it can."""
    explored: int = 0
    deepest: int = -1
    """The place of the latest return before which all could be linearized."""
    states: list[State] = field(default_factory=list)
    """Some that were possible then."""

    def run(self) -> Verdict:
        steps: list[Step] = []
        events: list[tuple[int, int, bool]] = []
        unknown: list[tuple[int, Step]] = []
        for op, step in zip(self.operations, self.model.steps(self.operations), strict=True):
            if op.outcome is not Outcome.OK:
                if step is not None:
                    unknown.append((op.invoked, step))
                continue
            assert step is not None and op.returned is not None
            events += [(op.invoked, len(steps), True), (op.returned, len(steps), False)]
            steps.append(step)
        events.sort()
        supply = _Supply(self.model, steps, [step for _, step in unknown], self.foresight)
        if supply.short():
            return Verdict.VIOLATION
        return self._walk(steps, events, unknown, supply)

    def _walk(
        self,
        steps: list[Step],
        events: list[tuple[int, int, bool]],
        unknown: list[tuple[int, Step]],
        supply: _Supply,
    ) -> Verdict:
        size, known = len(events), len(steps)
        owner = [owner for _, owner, _ in events]
        is_call = [begins for _, _, begins in events]
        place = [at for at, _, _ in events]
        call_of, return_of = [0] * known, [0] * known
        for node in range(size):
            (call_of if is_call[node] else return_of)[owner[node]] = node
        after = [*range(1, size + 1), 0]  # node `size` is both ends
        before = [size, *range(size)]
        twins = _twins(step for _, step in unknown)
        entered: dict[tuple[int, int, State], list[int]] = {}
        trail: list[_Mark] = []
        state, held, base, ahead, used = self.model.initial, supply.initial, 0, 0, 0
        idle = False
        """The last choice was one of unknown outcome, and nothing has needed it yet."""
        while True:
            # a new configuration: linearize the observers that are right in it, then see whether it is new indeed
            choices = []
            node = after[size]
            while node != size and is_call[node]:
                op = owner[node]
                if not steps[op].observer:
                    choices.append(return_of[op])
                elif steps[op].apply(state) is not None:
                    trail.append((_FORCED, op, 0, choices, 0, state, held, base, ahead, used, idle))
                    _lift(after, before, node, return_of[op])
                    supply.take(op)
                    base, ahead = _with(base, ahead, op)
                    idle = False
                    node = before[node]  # what followed may have been its return
                node = after[node]
            if node == size:
                return Verdict.LINEARIZABLE
            first_return = place[node]
            self._reached(first_return, state)
            chosen, options = 0, known + len(unknown)
            if self._enters(entered, (base, ahead, state), used):
                choices.sort()  # what returned first probably took effect first
            else:
                chosen = options  # so that it is left at once
            if self.explored > self.limit:
                return Verdict.UNKNOWN
            while True:
                # the next choice in this configuration: of those that may come next, then of the unknown
                following: State | None = None
                while chosen < len(choices):
                    op = owner[choices[chosen]]
                    chosen += 1
                    step = steps[op]
                    if not (idle and step.blind) and not supply.loses(op, held):
                        following = step.apply(state)
                        if following is not None:
                            break
                if following is not None:
                    trail.append((_KNOWN, op, chosen, choices, first_return, state, held, base, ahead, used, idle))
                    _lift(after, before, call_of[op], return_of[op])
                    base, ahead = _with(base, ahead, op)
                    idle = False
                    state, held = following, supply.take(op)
                    break
                chosen = max(chosen, known)
                while chosen < options:
                    op = chosen - known
                    invoked, step = unknown[op]
                    if invoked > first_return:
                        chosen = options
                        break
                    chosen += 1
                    if used >> op & 1 or (twins[op] >= 0 and not used >> twins[op] & 1) or (idle and step.blind):
                        continue
                    if not supply.loses(known + op, held):
                        following = step.apply(state)
                        if following is not None and following != state:
                            break
                        following = None
                if following is not None:
                    trail.append((_UNKNOWN, op, chosen, choices, first_return, state, held, base, ahead, used, idle))
                    used |= 1 << op
                    idle = True
                    state, held = following, supply.take(known + op)
                    break
                # none is left: back to the last choice that was one, and on from there
                kind = _FORCED
                while kind == _FORCED:
                    if not trail:
                        return Verdict.VIOLATION
                    kind, op, chosen, choices, first_return, state, held, base, ahead, used, idle = trail.pop()
                    if kind == _UNKNOWN:
                        supply.put_back(known + op)
                    else:
                        supply.put_back(op)
                        _unlift(after, before, call_of[op], return_of[op])

    def _reached(self, at: int, state: State) -> None:
        if at > self.deepest:
            self.deepest, self.states = at, []
        if at == self.deepest and len(self.states) < STATES_SHOWN and state not in self.states:
            self.states.append(state)

    def _enters(
        self, entered: dict[tuple[int, int, State], list[int]], known: tuple[int, int, State], used: int
    ) -> bool:
        """Whether no configuration was entered that could do all that this one can."""
        sets = entered.get(known)
        if sets is None:
            entered[known] = [used]
            self.explored += 1
            return True
        # long lists cost time, which is bounded too
        self.explored += 1 + len(sets) // 64
        if any(fewer & used == fewer for fewer in sets):
            return False
        sets.append(used)
        return True


class _Supply:
    """How often values are needed and given by what is not linearized yet: rule 5.

    Steps are numbered: those with a result, then those of unknown outcome. Values are too; -1 stands for none.
    """

    def __init__(self, model: Model, known: Sequence[Step], unknown: Sequence[Step], wanted: bool) -> None:
        steps = [*known, *unknown]
        sums = _sums(steps)
        self._on = wanted and sums is not None and all(_is_foreseen(step) for step in steps)
        numbers: dict[Hashable, int] = {UNTOLD: -1}
        self.initial = numbers.setdefault(model.initial_value, 0)
        self._needs = [numbers.setdefault(step.needs, len(numbers)) for step in known] + [-1] * len(unknown)
        self._gives = [numbers.setdefault(step.gives, len(numbers)) for step in steps]
        self._needed, self._given = [0] * (len(numbers) + 1), [0] * (len(numbers) + 1)  # the last is that of -1
        for step in range(len(steps)):
            self.put_back(step)
        for value in sums or ():  # once more than can be taken
            if value in numbers:
                self._given[numbers[value]] += 1

    def short(self) -> bool:
        """Whether something is needed that nothing gives."""
        return self._on and any(
            needed and not given and value != self.initial
            for value, (needed, given) in enumerate(zip(self._needed[:-1], self._given[:-1], strict=True))
        )

    def loses(self, step: int, held: int) -> bool:
        """Whether the step would replace the value that is held, which others need and nothing gives again."""
        if not self._on or held < 0 or self._given[held] or self._gives[step] in (held, -1):
            return False
        return self._needed[held] > (self._needs[step] == held)

    def take(self, step: int) -> int:
        """The step is linearized. Returns the value that it leaves, or -1."""
        self._needed[self._needs[step]] -= 1
        self._given[self._gives[step]] -= 1
        return self._gives[step]

    def put_back(self, step: int) -> None:
        self._needed[self._needs[step]] += 1
        self._given[self._gives[step]] += 1


def _is_foreseen(step: Step) -> bool:
    return step.observer or step.gives != UNTOLD or step.adds is not None


def _sums(steps: Iterable[Step]) -> set[int] | None:
    """The ints that steps which add could make of those that others give; None if there are too many."""
    starts, added = {0}, set[int]()
    for step in steps:
        if step.adds is not None:
            added |= {step.adds} | {total + step.adds for total in added}
        elif isinstance(step.gives, int):
            starts.add(step.gives)
        if len(added) * len(starts) > SUMS_MAX:
            return None
    return {start + total for start in starts for total in added}


def _twins(steps: Iterable[Step]) -> list[int]:
    """For each the place of the last before it that does the same, or -1."""
    last: dict[Hashable, int] = {}
    twins = []
    for place, step in enumerate(steps):
        twins.append(-1 if step.same is None else last.get(step.same, -1))
        last[step.same] = place
    return twins


def _lift(after: list[int], before: list[int], call: int, end: int) -> None:
    for node in (call, end):
        after[before[node]], before[after[node]] = after[node], before[node]


def _unlift(after: list[int], before: list[int], call: int, end: int) -> None:
    for node in (end, call):
        after[before[node]] = before[after[node]] = node


def _with(base: int, ahead: int, place: int) -> tuple[int, int]:
    """The bitset with one more."""
    ahead |= 1 << (place - base)
    if ahead & 1:
        ones = (~ahead & (ahead + 1)).bit_length() - 1
        return base + ones, ahead >> ones
    return base, ahead


def _violation(model: Model, key: str, operations: Sequence[Operation], limit: int) -> Violation:
    """Finds the shortest prefix that fails. One that fails makes all longer ones fail, so halving finds it."""
    ends = sorted(op.returned for op in operations if op.outcome is Outcome.OK and op.returned is not None)
    low, high = 0, len(ends) - 1
    shortest, left = True, limit

    def search(end: int, foresight: bool) -> tuple[Verdict, _Search]:
        nonlocal left
        # a part of what is left, so that there is something for all that follow
        made = _Search(model, _cut(operations, ends[end]), left // 4, foresight)
        verdict = made.run()
        left = max(0, left - made.explored)
        return verdict, made

    probe = ends.index(search(high, foresight=False)[1].deepest)  # the one that is looked for, or little less
    while low < high:
        probe = min(max(probe, low), high - 1)
        verdict, _ = search(probe, foresight=True)
        if verdict is Verdict.VIOLATION:
            high, probe = probe, probe - 1
        else:
            shortest = shortest and verdict is not Verdict.UNKNOWN
            low = probe + 1
            probe = (low + high) // 2
    _, farthest = search(high, foresight=False)
    prefix = farthest.operations
    failing = next(op for op in prefix if op.returned == ends[high])
    assert failing.returned is not None and failing.returned_ns is not None
    # those with a result return before `failing` does, so that they overlap it unless they did before its invocation
    overlapping = [
        op.invoked_ns
        for op in prefix
        if op.outcome is Outcome.OK and op.returned is not None and op.returned > failing.invoked
    ]
    window_ns = min(overlapping), failing.returned_ns
    states = tuple(model.show(state) for state in farthest.states) if farthest.deepest == ends[high] else ()
    return Violation(model.name, key, tuple(prefix), failing, states, window_ns, shortest)


def _cut(operations: Iterable[Operation], end: int) -> list[Operation]:
    """The operations as they stood after the event `end`."""
    kept = []
    for op in operations:
        if op.invoked > end:
            continue
        if op.returned is not None and op.returned > end:
            op = replace(op, outcome=Outcome.PENDING, result=None, returned=None, returned_ns=None)
        kept.append(op)
    return kept
