"""Histories of operations: recorded as they happen, written and read as JSON lines (docs/histories.md).

    history = History(clock)                            clock: a callable that tells monotonic nanoseconds
    handle = history.invoke("c1", Function.INCR, "hits", 2)
    handle.ok(7)                                        or handle.fail(), handle.info(), or nothing at all
    history.write(path)
    linearizability.check(History.read(path).operations)

The order of events is the order in which they are recorded, which is the order of the lines; times are for the reader.
An operation precedes another if its completion is recorded before the other's invocation (Herlihy and Wing,
"Linearizability: a correctness condition for concurrent objects", TOPLAS 12(3), 1990, section 2).
"""

from __future__ import annotations

import enum
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

__all__ = ["Function", "Handle", "History", "MalformedHistory", "Operation", "Outcome", "Value"]

Value: TypeAlias = "bool | int | float | str | list[Value] | dict[str, Value] | None"
"""Anything that JSON can say; None is JSON's null."""
FIELDS = ("process", "type", "f", "key", "value", "time")


class MalformedHistory(ValueError):
    """An event that no history can have, by a call or in a file. Nothing was recorded.

    Attributes:
        file, line: where, the first line being 1; "" and 0 if it came by a call.
    """

    def __init__(self, problem: str, file: str = "", line: int = 0) -> None:
        super().__init__(f"{file}:{line}: {problem}" if line else problem)
        self.problem = problem
        self.file = file
        self.line = line


class Function(enum.StrEnum):
    """What an operation does. Its `value` at the invocation, and at an `ok` completion:

    read          null               the value, null if there is none
    write         the value          null
    delete        null               null
    cas           [old, new]         null: it was old and is new; false: it was not old and is unchanged
    incr          the delta, an int  the sum, an int; what is absent counts as 0
    fenced_write  [token, value]     null: it is written; false: a greater token had written before
    lock          null               the fencing token, an int
    unlock        the token, an int  null

    Where null stands for "done", `true` and a repetition of the invoked value mean the same.
    """

    READ = "read"
    WRITE = "write"
    DELETE = "delete"
    CAS = "cas"
    INCR = "incr"
    FENCED_WRITE = "fenced_write"
    LOCK = "lock"
    UNLOCK = "unlock"


class Outcome(enum.StrEnum):
    """How an operation ended: the `type` of its completion, or PENDING if there is none."""

    OK = "ok"
    FAIL = "fail"
    """It never took effect and never will."""
    INFO = "info"
    """It may take effect at any time after its invocation, or never; so may one that is pending."""
    PENDING = "pending"


@dataclass(slots=True)
class Operation:
    """One operation of a history.

    Attributes:
        number: its place among the invocations, from 0.
        f: a Function, or, for a model of one's own, any other name.
        value: as invoked; result: of an `ok` completion, else None.
        invoked, returned: the places of its two events among all events, from 0; `returned` is None while pending.
        invoked_ns, returned_ns: their times.
    """

    number: int
    process: int | str
    f: str
    key: str
    value: Value
    invoked: int
    invoked_ns: int
    outcome: Outcome = Outcome.PENDING
    result: Value = None
    returned: int | None = None
    returned_ns: int | None = None

    def __str__(self) -> str:
        given = "" if self.value is None else f" {json.dumps(self.value)}"
        silent = self.result is None or self.result is True or self.result == self.value
        done = silent and self.f not in (Function.READ, Function.INCR, Function.LOCK)
        told = f" -> {json.dumps(self.result)}" if self.outcome is Outcome.OK and not done else ""
        until = "" if self.returned_ns is None else f"{self.returned_ns / 1e6:.6f}"
        when = f"[{self.invoked_ns / 1e6:.6f}, {until}] ms"
        return f"#{self.number} process {self.process}: {self.f}{given}{told}, {self.outcome} {when}"


class Handle:
    """An operation under way; it is completed once, or never."""

    __slots__ = ("_history", "operation")

    def __init__(self, history: History, operation: Operation) -> None:
        self._history = history
        self.operation = operation

    def ok(self, value: Value = None) -> None:
        """It took effect, with this result (see Function)."""
        self._history._complete(self.operation, Outcome.OK, value)

    def fail(self) -> None:
        """It never took effect and never will."""
        self._history._complete(self.operation, Outcome.FAIL, None)

    def info(self) -> None:
        """Nobody knows. Its process may go on with another operation."""
        self._history._complete(self.operation, Outcome.INFO, None)


class History:
    """Operations in the order of their invocation, of processes that do one thing at a time.

    Args:
        clock: tells the time of an event, in ns, and never goes back.
    """

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.operations: list[Operation] = []
        self._clock = clock
        self._events = 0
        self._last_ns = 0
        self._open: dict[int | str, Operation] = {}

    def __len__(self) -> int:
        return len(self.operations)

    def invoke(self, process: int | str, f: str, key: str, value: Value = None) -> Handle:
        """Records that `process` begins an operation.

        Raises:
            MalformedHistory: the process is in the midst of another, the value is not one of `f`, there is no such
                `f`, or the clock went back.
        """
        return Handle(self, self._invoke(process, f, key, value, self._clock()))

    def lines(self) -> Iterator[str]:
        """Each event as a line of JSON, without its end of line."""
        events: list[tuple[int, Operation, bool]] = []
        for operation in self.operations:
            events.append((operation.invoked, operation, True))
            if operation.returned is not None:
                events.append((operation.returned, operation, False))
        events.sort(key=lambda event: event[0])
        for _, operation, begins in events:
            told: dict[str, object] = {
                "process": operation.process,
                "type": "invoke" if begins else operation.outcome,
                "f": operation.f,
                "key": operation.key,
                "value": operation.value if begins else operation.result,
                "time": operation.invoked_ns if begins else operation.returned_ns,
            }
            yield json.dumps(told, separators=(",", ":"))

    def write(self, path: Path) -> None:
        """Writes the history to a file; whatever goes wrong, a file that was there is left whole.

        Raises:
            OSError: it cannot be written.
        """
        part = path.with_name(path.name + ".part")
        part.write_text("".join(f"{line}\n" for line in self.lines()), encoding="utf-8")
        part.replace(path)

    @classmethod
    def read(cls, path: Path) -> History:
        """The history of a file.

        Raises:
            MalformedHistory: with the file and the line.
            OSError: the file cannot be read.
        """
        content = path.read_bytes()
        lines = content.split(b"\n")
        if lines[-1] == b"":  # what follows the last end of line is no line
            lines.pop()
        return cls.parse(lines, str(path))

    @classmethod
    def parse(cls, lines: Iterable[str | bytes], file: str = "history") -> History:
        """The history that the lines tell.

        Raises:
            MalformedHistory: with `file` and the line.
        """
        history = cls()
        for number, line in enumerate(lines, 1):
            try:
                history._event(_decoded(line))
            except MalformedHistory as error:
                raise MalformedHistory(error.problem, file, number) from error
        return history

    def _event(self, event: Mapping[str, Any]) -> None:
        missing = [name for name in FIELDS if name not in event]
        if missing:
            raise MalformedHistory(f"without {', '.join(missing)}")
        process, kind, f, key, value, at_ns = (event[name] for name in FIELDS)
        if kind == "invoke":
            self._invoke(process, f, key, value, at_ns)
            return
        if kind not in ("ok", "fail", "info"):
            raise MalformedHistory(f"no type: {_shown(kind)}")
        operation = self._open.get(process) if _is_process(process) else None
        if operation is None:
            raise MalformedHistory(f"process {_shown(process)} has begun nothing that could be {kind}")
        if (operation.f, operation.key) != (f, key):
            told = f"{_shown(f)} of {_shown(key)}"
            raise MalformedHistory(f"process {process} began {operation.f} of {operation.key!r}, and ends {told}")
        outcome = Outcome(kind)
        # the value of what failed or is not known is a reason at most
        self._complete(operation, outcome, value if outcome is Outcome.OK else None, at_ns)

    def _invoke(self, process: int | str, f: str, key: str, value: Value, at_ns: int) -> Operation:
        if not _is_process(process):
            raise MalformedHistory(f"a process is an int or a string, not {_shown(process)}")
        if process in self._open:
            raise MalformedHistory(f"process {process} is in the midst of {self._open[process]}")
        if not isinstance(key, str):
            raise MalformedHistory(f"a key is a string, not {_shown(key)}")
        if not isinstance(f, str) or f not in _INVOKED:
            raise MalformedHistory(f"no f: {_shown(f)}")
        value = _plain(value)
        if not _INVOKED[f](value):
            raise MalformedHistory(f"{f} is not invoked with {_shown(value)}")
        self._pass(at_ns)
        operation = Operation(len(self.operations), process, Function(f), key, value, self._events, at_ns)
        self._events += 1
        self.operations.append(operation)
        self._open[process] = operation
        return operation

    def _complete(self, operation: Operation, outcome: Outcome, result: Value, at_ns: int | None = None) -> None:
        if operation.outcome is not Outcome.PENDING:
            raise MalformedHistory(f"{operation} is completed already")
        if outcome is Outcome.OK:
            result = _plain(result)
            if not _is_result(operation, result):
                raise MalformedHistory(f"{operation.f} {_shown(operation.value)} cannot result in {_shown(result)}")
        at_ns = self._clock() if at_ns is None else at_ns
        self._pass(at_ns)
        operation.outcome, operation.result = outcome, result
        operation.returned, operation.returned_ns = self._events, at_ns
        self._events += 1
        del self._open[operation.process]

    def _pass(self, at_ns: int) -> None:
        if not _is_int(at_ns) or at_ns < 0:
            raise MalformedHistory(f"a time is an int of nanoseconds from 0 on, not {_shown(at_ns)}")
        if at_ns < self._last_ns:
            raise MalformedHistory(f"time went back, from {self._last_ns} to {at_ns} ns")
        self._last_ns = at_ns


def _decoded(line: str | bytes) -> Mapping[str, Any]:
    try:
        text = line.decode("utf-8") if isinstance(line, bytes) else line
        event = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except MalformedHistory:
        raise
    except (ValueError, RecursionError) as error:
        raise MalformedHistory(f"not JSON: {error}") from error
    if not isinstance(event, dict):
        raise MalformedHistory("an event is a JSON object")
    return event


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise MalformedHistory("a name stands twice in one object")
    return found


def _no_number(name: str) -> None:
    raise MalformedHistory(f"{name} is not JSON")


def _plain(value: object) -> Value:
    """The value as JSON would bring it back, not shared with the caller, who may go on to change it."""
    try:
        return _copied(value)
    except RecursionError as error:
        raise MalformedHistory("a value nested too deeply") from error


def _copied(value: object) -> Value:
    match value:
        case None | bool() | int() | str():
            return value
        case float() if math.isfinite(value):
            return value
        case list() | tuple():
            return [_copied(part) for part in value]
        case dict() if all(isinstance(name, str) for name in value):
            return {name: _copied(part) for name, part in value.items()}
    raise MalformedHistory(f"not a value of JSON: {_shown(value)}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_process(value: object) -> bool:
    return _is_int(value) or isinstance(value, str)


def _is_none(value: Value) -> bool:
    return value is None


_INVOKED: Mapping[str, Callable[[Value], bool]] = {
    Function.READ: _is_none,
    Function.WRITE: lambda value: True,
    Function.DELETE: _is_none,
    Function.CAS: lambda value: isinstance(value, list) and len(value) == 2,
    Function.INCR: _is_int,
    Function.FENCED_WRITE: lambda value: isinstance(value, list) and len(value) == 2 and _is_int(value[0]),
    Function.LOCK: _is_none,
    Function.UNLOCK: _is_int,
}
"""Whether an operation can be invoked with a value."""


def _is_result(operation: Operation, result: Value) -> bool:
    match operation.f:
        case Function.READ:
            return True
        case Function.INCR | Function.LOCK:
            return _is_int(result)
        case Function.CAS | Function.FENCED_WRITE if result is False:
            return True
    return result is None or result is True or (result == operation.value and type(result) is type(operation.value))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
