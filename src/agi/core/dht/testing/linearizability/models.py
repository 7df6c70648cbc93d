"""What the objects of a history do when operations come one at a time, as checker.py needs to know it.

A model turns the operations of one object into steps, functions from a state to the next. A state is any hashable value
but None.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

from agi.core.dht.testing.history import Function, MalformedHistory, Operation, Outcome, Value

__all__ = ["UNTOLD", "LockModel", "Model", "RegisterModel", "State", "Step"]

State: TypeAlias = Hashable
"""Of an object in a model; None is not one."""
UNTOLD: Final = ("untold",)
"""Instead of a value that a step needs or gives, for one that is not known beforehand."""


@dataclass(frozen=True, slots=True)
class Step:
    """What an operation does to the state of its object.

    Attributes:
        apply: from a state to the next, or to None where it could not have had its result, or no effect.
        observer: it never changes the state.
        blind: it can be done in every state and leaves the same; or if not quite, then what it leaves is never worse
            for having left out an operation of unknown outcome right before it.
        same: equal for operations that do the same.
        needs: the value that the object must hold before it, UNTOLD if that is not one alone.
        gives: the value that the object holds after it. UNTOLD is right for observers, which change none, and always
            allowed; of any other step without `adds` it makes the search of the object one without foresight.
        adds: to whatever int the object holds, with None as 0.
    """

    apply: Callable[[State], State | None]
    observer: bool = False
    blind: bool = False
    same: Hashable = None
    needs: Hashable = UNTOLD
    gives: Hashable = UNTOLD
    adds: int | None = None


class Model(Protocol):
    """What an object does if operations come one at a time."""

    name: str
    initial: State
    initial_value: Hashable
    """As in `Step.gives`."""

    def steps(self, operations: Sequence[Operation]) -> list[Step | None]:
        """The steps of the operations of one object, which are in the order of their invocation and `ok` or of unknown
        outcome; None for one of unknown outcome that may be dropped."""

    def show(self, state: State) -> str:
        """A state, for a reader."""


def _frozen(value: Value) -> Hashable:
    """Equal for equal JSON only, whereas in Python 1 == True == 1.0."""
    if value is None or type(value) is int or type(value) is str:
        return value
    return (json.dumps(value, sort_keys=True),)


def _thawed(value: Hashable) -> str:
    return str(value[0]) if isinstance(value, tuple) else json.dumps(value)


_Register: TypeAlias = tuple[Hashable, int | None]


class RegisterModel:
    """A key of a map: a value, null while there is none, and the greatest token that has written.

    read          results in the value
    write         sets it; delete sets it to null
    cas           [old, new]: done, it was old and is new; refused (false), it was another and stays
    incr          adds to an int, or to null as if that were 0, and results in the sum; impossible on anything else
    fenced_write  [token, value]: done, no greater token had written, and the value is set; refused, one had. The other
                  operations neither look at the token nor change it.

    A cas or fenced_write of unknown outcome that would be refused is one that had no effect.
    """

    name = "register"
    initial: State = (None, None)
    initial_value: Hashable = None

    def steps(self, operations: Sequence[Operation]) -> list[Step | None]:
        refused = {op.f for op in operations if _refused(op)}
        # a refused write by an old token tells of a greater one, even if its value is overwritten at once
        tokens_tell = Function.FENCED_WRITE in refused
        unseen = _unseen(operations, told=bool(refused))
        return [None if op.number in unseen else _register_step(op, tokens_tell) for op in operations]

    def show(self, state: State) -> str:
        assert isinstance(state, tuple)
        value, token = state
        return f"value {_thawed(value)}" + ("" if token is None else f", written by token {token}")


def _refused(operation: Operation) -> bool:
    conditional = operation.f in (Function.CAS, Function.FENCED_WRITE)
    return conditional and operation.outcome is Outcome.OK and operation.result is False


def _unseen(operations: Sequence[Operation], told: bool) -> set[int]:
    """Numbers of operations of unknown outcome that nobody could tell from none: reads, and those that leave a value
    which no read returned and no cas expects. What follows such a value is a blind write, or nothing.

    `told`: something was refused. Then only reads are dropped: a refusal tells of any value but the one it expected.
    """
    unknown = {op.number: op for op in operations if op.outcome is not Outcome.OK}
    dropped = {number for number, op in unknown.items() if op.f == Function.READ}
    # sums can be any int, so that who adds may have seen any, and absence too
    if told or any(op.f == Function.INCR for op in operations):
        return dropped
    while True:
        seen: set[Hashable] = set()
        for op in operations:
            if op.f == Function.READ and op.outcome is Outcome.OK:
                seen.add(_frozen(op.result))
            elif op.f == Function.CAS and op.number not in dropped:
                seen.add(_frozen(_pair(op)[0]))
        found = {number for number, op in unknown.items() if number not in dropped and _left(op) not in seen}
        if not found:
            return dropped
        dropped |= found


def _pair(operation: Operation) -> tuple[Value, Value]:
    assert isinstance(operation.value, list)
    first, second = operation.value
    return first, second


def _left(operation: Operation) -> Hashable:
    """The value that a write of any kind leaves."""
    match operation.f:
        case Function.CAS | Function.FENCED_WRITE:
            return _frozen(_pair(operation)[1])
    return _frozen(operation.value)  # null for a delete


def _register_step(operation: Operation, tokens_tell: bool) -> Step:
    known, refused = operation.outcome is Outcome.OK, _refused(operation)
    match operation.f:
        case Function.READ:
            return _reading(_frozen(operation.result))
        case Function.WRITE | Function.DELETE:
            return _writing(_frozen(operation.value), blind=not tokens_tell)
        case Function.CAS:
            old, new = _pair(operation)
            return _comparing(_frozen(old), _frozen(new), refused)
        case Function.INCR:
            assert isinstance(operation.value, int)
            total = operation.result if known else None
            assert total is None or isinstance(total, int)
            return _adding(operation.value, total)
        case Function.FENCED_WRITE:
            token, value = _pair(operation)
            assert isinstance(token, int)
            return _fencing(token, _frozen(value), refused)
    raise MalformedHistory(f"no operation of a {RegisterModel.name}: {operation}")


def _reading(value: Hashable) -> Step:
    return Step(lambda state: state if _register(state)[0] == value else None, observer=True, needs=value)


def _writing(value: Hashable, blind: bool) -> Step:
    return Step(lambda state: (value, _register(state)[1]), blind=blind, same=("write", value), gives=value)


def _comparing(old: Hashable, new: Hashable, refused: bool) -> Step:
    if refused:
        return Step(lambda state: state if _register(state)[0] != old else None, observer=True)

    def apply(state: State) -> State | None:
        value, token = _register(state)
        return (new, token) if value == old else None

    gives = UNTOLD if old == new else new
    return Step(apply, observer=old == new, same=("cas", old, new), needs=old, gives=gives)


def _adding(delta: int, total: int | None) -> Step:
    """`total` is None if it is not known."""

    def apply(state: State) -> State | None:
        value, token = _register(state)
        if value is not None and not isinstance(value, int):
            return None
        found = (value or 0) + delta
        return (found, token) if total is None or total == found else None

    if total is None:
        return Step(apply, same=("incr", delta), adds=delta)
    # before a sum that is the delta there was 0, or nothing
    return Step(apply, observer=delta == 0 != total, needs=UNTOLD if total == delta else total - delta, gives=total)


def _fencing(token: int, value: Hashable, refused: bool) -> Step:
    if refused:

        def observe(state: State) -> State | None:
            greatest = _register(state)[1]
            return state if greatest is not None and greatest > token else None

        return Step(observe, observer=True)

    def apply(state: State) -> State | None:
        greatest = _register(state)[1]
        return (value, token) if greatest is None or greatest <= token else None

    # an operation before it can only have raised the token, and so forbidden it
    return Step(apply, blind=True, same=("fenced_write", token, value), gives=value)


def _register(state: State) -> _Register:
    return state  # type: ignore[return-value]  # the search hands a model its own states only


class LockModel:
    """A lock whose holders get fencing tokens and lose it silently when their lease expires.

    lock    results in a token greater than all before it. It need not be free: the last lease may have expired, which
            is not recorded.
    unlock  [the token]: the last token that was given, and not unlocked since

    So what holds is that tokens grow in every order that real time allows, and that nobody unlocks what is another's or
    is free. That no two hold the lock at a time is for leases to see to, and for fenced writes (RegisterModel) where
    that fails. One that was refused is recorded as failed.

    A lock of unknown outcome, if it was given, has a token that nobody was told: any greater one. The state so is
    (lower bound of the last token, whether it is that token itself, whether it is held).
    """

    name = "lock"
    initial: State = (None, True, False)
    initial_value: Hashable = UNTOLD

    def steps(self, operations: Sequence[Operation]) -> list[Step | None]:
        return [_lock_step(op) for op in operations]

    def show(self, state: State) -> str:
        low, exact, held = _lock(state)
        token = (
            ("no token" if exact else "some token") if low is None else f"token {low}{'' if exact else ' or greater'}"
        )
        return f"{token}, {'held' if held else 'free'}"


def _lock(state: State) -> tuple[int | None, bool, bool]:
    return state  # type: ignore[return-value]  # the search hands a model its own states only


def _lock_step(operation: Operation) -> Step | None:
    known = operation.outcome is Outcome.OK
    match operation.f:
        case Function.LOCK if known:
            assert isinstance(operation.result, int)
            return _locking(operation.result)
        case Function.LOCK:
            return _LOCKING_UNKNOWN
        case Function.UNLOCK if known:
            assert isinstance(operation.value, int)
            return _unlocking(operation.value)
        case Function.UNLOCK:
            return None  # nothing needs a lock to be free
    raise MalformedHistory(f"no operation of a {LockModel.name}: {operation}")


def _locking(token: int) -> Step:
    def apply(state: State) -> State | None:
        low = _lock(state)[0]
        return (token, True, True) if low is None or token > low else None

    # what came before it can only have raised the bound
    return Step(apply, blind=True)


def _lock_somehow(state: State) -> State:
    low = _lock(state)[0]
    return (None if low is None else low + 1, False, True)


_LOCKING_UNKNOWN = Step(_lock_somehow, blind=True, same="lock")


def _unlocking(token: int) -> Step:
    def apply(state: State) -> State | None:
        low, exact, held = _lock(state)
        fits = token == low if exact else low is None or token >= low
        return (token, True, False) if held and fits else None

    return Step(apply)
