"""Judges a history of client calls: what the guarantees allow, decided without looking into the system.

A history holds one `Call` per key and call, with the true times of its invocation and return. Time orders two calls
only if one returned before the other was invoked; calls that overlap may be ordered either way. A write that was not
acknowledged may take effect at any time after its invocation, or never. Every check returns violations as text; none
means that the guarantee held (DESIGN section 2).

    put a ------|          acknowledged
                   put b ------|      acknowledged, begun after a's return
                                  get -> a        violates `order`: b was there before the read began
"""

from __future__ import annotations

import enum
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from agi.core.dht.types import Consistency

NEVER = float("inf")
_Known: TypeAlias = tuple[float, float | int, "Call"]
"""(when a call had taken effect, its invocation or version, the call)"""


class Action(enum.StrEnum):
    PUT = "put"
    DELETE = "delete"
    READ = "read"


class Outcome(enum.StrEnum):
    PENDING = "pending"
    OK = "ok"
    FAILED = "failed"
    """By an error that promises that nothing was written; for a read, any error."""
    UNKNOWN = "unknown"


@dataclass(slots=True)
class Call:
    """What happened to one key in one call of a client.

    Attributes:
        value: what was written (unique in the history) or read; None for a delete, and for a key without a value.
        invoked, returned: true virtual seconds; `returned` is NEVER for a call that is not over.
        version: of the value written or read, 0 where the call does not tell.
        limit_s: how long the call may take.
    """

    number: int
    client: str
    action: Action
    key: str
    value: bytes | None
    level: Consistency
    invoked: float
    limit_s: float
    returned: float = NEVER
    outcome: Outcome = Outcome.PENDING
    version: int = 0

    def __str__(self) -> str:
        shown = "" if self.value is None and self.action is Action.DELETE else f" {_shown(self.value)}"
        version = f" version {self.version:x}" if self.version else ""
        when = f"[{self.invoked:.6f}, {self.returned:.6f}]"
        return f"#{self.number} {self.client} {self.action} {self.key}{shown} {self.outcome}{version} {when}"


@dataclass(slots=True)
class History:
    """Calls in the order of their invocation."""

    calls: list[Call] = field(default_factory=list)

    def acknowledged(self) -> int:
        """Writes at QUORUM or stronger that were acknowledged."""
        return sum(_counts(call) and call.action is not Action.READ for call in self.calls)


@dataclass(frozen=True, slots=True)
class Finding:
    """A guarantee that did not hold: the name of its check, and the calls or replicas that show it."""

    check: str
    text: str

    def __str__(self) -> str:
        return f"{self.check}: {self.text}"


def check_history(history: History) -> list[Finding]:
    """All checks of a history that is over: `deadline`, and per key `origin`, `order` and `version`."""
    findings = list(check_deadlines(history.calls))
    by_key: dict[str, list[Call]] = defaultdict(list)
    for call in history.calls:
        by_key[call.key].append(call)
    for calls in by_key.values():
        findings += check_origin(calls)
        findings += check_order(calls)
        findings += check_versions(calls)
    return findings


def check_deadlines(calls: Iterable[Call]) -> Iterable[Finding]:
    """Every call ends by its deadline, in a result or in an error (guarantee 5)."""
    for call in calls:
        if call.returned - call.invoked > call.limit_s + 1e-6:
            yield Finding("deadline", f"{call} took longer than {call.limit_s:.3f} s")


def check_origin(calls: Iterable[Call]) -> Iterable[Finding]:
    """Nothing is read that nobody wrote, that is written only later, or whose writer was told that it is not stored."""
    writes = {call.value: call for call in calls if call.action is Action.PUT}
    for read in calls:
        if read.action is not Action.READ or read.outcome is not Outcome.OK or read.value is None:
            continue
        write = writes.get(read.value)
        if write is None:
            yield Finding("origin", f"{read} returned what nobody wrote")
        elif write.invoked >= read.returned:
            yield Finding("origin", f"{read} returned what only {write} wrote")
        elif write.outcome is Outcome.FAILED:
            yield Finding("origin", f"{read} returned {write}, which was reported as not stored")


def check_order(calls: Sequence[Call]) -> Iterable[Finding]:
    """A read never returns less than a write that was acknowledged, or read, before it began (guarantee 2).

    A write is outdated at a time if some other, which had taken effect by then, was invoked after its own
    acknowledgement. To find nothing is a value too: that of any delete, and of the time before the first write.

    A put that meets a newer record is stamped anew and so takes effect twice (PROTOCOLS V2), before that record and
    after it. So a read tells only that what was acknowledged before the read began is outdated, unless it shows the
    very version that was acknowledged.
    """
    writes = {call.value: call for call in calls if call.action is Action.PUT}
    known: list[_Known] = []
    for call in calls:
        if not _counts(call):
            continue
        if call.action is not Action.READ:
            known.append((call.returned, call.invoked, call))
        elif call.value is not None and (seen := writes.get(call.value)) is not None:
            final = call.version and call.version == seen.version
            known.append((call.returned, seen.invoked if final else min(seen.invoked, call.invoked), seen))
    times, measures, newest = _newest(known)
    deletes = [call for call in calls if call.action is Action.DELETE and call.outcome is not Outcome.FAILED]
    for read in calls:
        if read.action is not Action.READ or not _counts(read):
            continue
        at = bisect_left(times, read.invoked) - 1  # events of one moment are not ordered
        if at < 0:
            continue
        later, outdated = newest[at], measures[at]
        if read.value is not None:
            write = writes.get(read.value)
            if write is not None and _acknowledged_at(write) < outdated:
                yield Finding("order", f"{read} returned {write}, although {later} had taken effect")
        elif later.action is Action.PUT and not any(
            _acknowledged_at(delete) >= outdated and delete.invoked < read.returned for delete in deletes
        ):
            yield Finding("order", f"{read} found nothing, although {later} had taken effect")


def check_versions(calls: Iterable[Call]) -> Iterable[Finding]:
    """Versions of a key never go back: not from read to read, nor from a write to what is read or written after it."""
    known: list[_Known] = [(call.returned, call.version, call) for call in calls if _counts(call) and call.version]
    times, _, newest = _newest(known)
    for call in calls:
        if _counts(call) and call.version:
            at = bisect_left(times, call.invoked) - 1
            if at >= 0 and newest[at].version > call.version:
                yield Finding("version", f"{call} came after {newest[at]}")


def check_scan(found: Sequence[tuple[str, bytes]], live: Mapping[str, bytes]) -> list[Finding]:
    """A scan at rest returns exactly the live set, in key order."""
    findings = []
    keys = [key for key, _ in found]
    if keys != sorted(set(keys), key=str.encode):
        findings.append(Finding("scan", f"not in key order, or not once each: {keys}"))
    if dict(found) != live:
        wrong = sorted(key for key in {*keys, *live} if dict(found).get(key) != live.get(key))
        shown = ", ".join(f"{key} {_shown(dict(found).get(key))} for {_shown(live.get(key))}" for key in wrong)
        findings.append(Finding("scan", f"differs from the live set: {shown}"))
    return findings


def _newest(known: list[_Known]) -> tuple[list[float], list[float | int], list[Call]]:
    """For times in ascending order: the greatest second part up to then, and its call."""
    known.sort(key=lambda entry: (entry[0], entry[1], entry[2].number))
    times: list[float] = []
    measures: list[float | int] = []
    newest: list[Call] = []
    greatest: float | int = -1
    for at, measure, call in known:
        if measure > greatest:
            greatest = measure
            times.append(at)
            measures.append(measure)
            newest.append(call)
    return times, measures, newest


def _counts(call: Call) -> bool:
    return call.outcome is Outcome.OK and call.level is not Consistency.ONE


def _acknowledged_at(write: Call) -> float:
    return write.returned if write.outcome is Outcome.OK else NEVER


def _shown(value: bytes | None) -> str:
    return "nothing" if value is None else value.decode(errors="replace")
