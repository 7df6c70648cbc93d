"""What a run writes down: counts, the table for people at its end, and lines of JSON as things happen."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from agi.core.dht.errors import DHTError
from agi.core.dht.testing import history
from agi.core.dht.testing.chaos.auditor import Auditor, Kind, Outcome
from agi.core.dht.testing.chaos.plan import MEMBERS, Fault

LINES_MAX = 20
"""Violations that the table shows; the JSON has all."""


class Tally:
    """Counts of calls. A batch counts once for each of its keys."""

    def __init__(self) -> None:
        self.begun_s = 0.0
        self.by_operation: dict[str, Counter[Outcome]] = {}
        self.errors: Counter[str] = Counter()
        self.latencies: dict[str, list[float]] = {}
        self.longest_s = 0.0
        self.gap_s = 0.0
        """Longest time in which nothing was acknowledged, and when it ended."""
        self.gap_ended_s = 0.0
        self._last_s = 0.0

    def begin(self, now: float) -> None:
        self.begun_s = self._last_s = now

    def acknowledged(self, operation: str, now: float, took_s: float) -> None:
        self._count(operation, Outcome.OK, took_s)
        self.latencies.setdefault(operation, []).append(took_s)
        self.end(now)

    def failed(self, operation: str, took_s: float, outcome: Outcome, error: DHTError) -> None:
        self._count(operation, outcome, took_s)
        self.errors[type(error).__name__] += 1

    def end(self, now: float) -> None:
        """Something was acknowledged, or the load is over."""
        if now - self._last_s > self.gap_s:
            self.gap_s, self.gap_ended_s = now - self._last_s, now
        self._last_s = now

    def count(self, outcome: Outcome) -> int:
        return sum(counts[outcome] for counts in self.by_operation.values())

    def _count(self, operation: str, outcome: Outcome, took_s: float) -> None:
        self.by_operation.setdefault(operation, Counter())[outcome] += 1
        self.longest_s = max(self.longest_s, took_s)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that this share of them does not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


class Journal:
    """
    Args:
        clock: seconds since the run began.
        path: where the lines of JSON go; None for nowhere.
        say: shows people a line.
    """

    def __init__(self, clock: Callable[[], float], path: Path | None, say: Callable[[str], None]) -> None:
        self.tally = Tally()
        self.faults: Counter[Fault] = Counter()
        self.skipped: Counter[Fault] = Counter()
        self.members: Counter[str] = Counter()
        """How joins and leaves ended."""
        self.figures: dict[str, object] = {}
        """What else was measured."""
        self.absent: dict[str, str] = {}
        """Faults that this machine does not allow, and why."""
        self.histories: dict[str, Counter[str]] = {}
        """How the operations of the history ended, by what they do."""
        self._clock = clock
        self._file: IO[str] | None = path.open("w", encoding="utf-8") if path is not None else None
        self._say = say

    @property
    def now(self) -> float:
        return self._clock()

    def line(self, what: str, **fields: object) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"line": what, "at_s": round(self.now, 3), **fields}) + "\n")
            self._file.flush()

    def say(self, text: str) -> None:
        self._say(f"{self.now:7.1f} s  {text}")

    def fault(self, kind: Fault, where: str, began_s: float, outcome: str) -> None:
        """One that is over."""
        if outcome.startswith("skipped"):
            self.skipped[kind] += 1
        else:
            self.faults[kind] += 1
            if kind in MEMBERS:
                self.members[f"{kind} {outcome.partition(':')[0]}"] += 1
        lasted_s = self.now - began_s
        self.line(
            "fault", kind=kind, where=where, began_s=round(began_s, 3), lasted_s=round(lasted_s, 3), outcome=outcome
        )
        self.say(f"{kind}{' of ' + where if where else ''}, {lasted_s:.1f} s: {outcome}")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    # --- the end

    def summary(self, auditor: Auditor, seed: int, nodes: int) -> dict[str, object]:
        """Writes the violations and the summary as lines; returns the summary."""
        for violation in auditor.violations:
            self.line(
                "violation",
                kind=violation.kind,
                subject=violation.subject,
                text=violation.text,
                found_s=round(violation.at_s, 3),
            )
        tally = self.tally
        found = auditor.tally()
        fields: dict[str, object] = {
            "seed": seed,
            "nodes": nodes,
            "operations": sum(map(tally.count, Outcome)),
            "acknowledged": tally.count(Outcome.OK),
            "unknown": tally.count(Outcome.UNKNOWN),
            "failed": tally.count(Outcome.FAILED),
            "errors": dict(tally.errors),
            "faults": dict(self.faults),
            "skipped": dict(self.skipped),
            "not_possible": self.absent,
            "history_operations": {name: dict(counts) for name, counts in sorted(self.histories.items())},
            "members": dict(self.members),
            "reads_judged": auditor.reads,
            "keys_checked": auditor.checked,
            "late": auditor.late,
            "violations": {kind.value: found[kind] for kind in Kind},
            "latency_ms": {
                name: {
                    "p50": round(1000 * quantile(values, 0.5), 2),
                    "p99": round(1000 * quantile(values, 0.99), 2),
                }
                for name, values in sorted(tally.latencies.items())
            },
            "longest_call_s": round(tally.longest_s, 3),
            "longest_without_acknowledgement_s": round(tally.gap_s, 3),
            **self.figures,
        }
        self.line("summary", **fields)
        return fields

    def table(self, auditor: Auditor, seed: int, nodes: int) -> str:
        """For people."""
        tally, found = self.tally, auditor.tally()
        rows = [
            f"seed {seed}, {nodes} nodes",
            "",
            f"{'':12}{'calls':>9}{'acknowl.':>10}{'unknown':>9}{'failed':>8}{'p50 ms':>9}{'p99 ms':>9}",
        ]
        for name, counts in sorted(tally.by_operation.items()):
            taken = tally.latencies.get(name, [])
            rows.append(
                f"{name:12}{counts.total():9}{counts[Outcome.OK]:10}{counts[Outcome.UNKNOWN]:9}{counts[Outcome.FAILED]:8}"
                f"{1000 * quantile(taken, 0.5):9.1f}{1000 * quantile(taken, 0.99):9.1f}"
            )
        total = [tally.count(outcome) for outcome in (Outcome.OK, Outcome.UNKNOWN, Outcome.FAILED)]
        taken = [value for values in tally.latencies.values() for value in values]
        rows += [
            f"{'all':12}{sum(total):9}{total[0]:10}{total[1]:9}{total[2]:8}"
            f"{1000 * quantile(taken, 0.5):9.1f}{1000 * quantile(taken, 0.99):9.1f}",
            "",
            *self._history_rows(),
            f"errors       {_counts(tally.errors)}",
            f"faults       {_counts(self.faults)}",
            f"skipped      {_counts(self.skipped)}",
            *(f"not possible here: {faults}: {why}" for faults, why in self.absent.items()),
            f"members      {_counts(self.members)}",
            f"longest      call {tally.longest_s:.2f} s; without an acknowledged call {tally.gap_s:.2f} s, "
            f"until {tally.gap_ended_s:.1f} s",
            *(f"{name:12} {value}" for name, value in self.figures.items()),
            "",
            f"checked      {auditor.checked} keys at the end, {auditor.reads} reads meanwhile",
            f"late         {auditor.late} writes of unknown outcome took effect after later ones",
            *(f"{kind:16} {found[kind]}" for kind in Kind),
            "",
        ]
        rows += [str(violation) for violation in auditor.violations[:LINES_MAX]]
        if len(auditor.violations) > LINES_MAX:
            rows.append(f"... and {len(auditor.violations) - LINES_MAX} more")
        rows.append("VIOLATED" if auditor.violations else "nothing was violated")
        return "\n".join(rows)

    def _history_rows(self) -> list[str]:
        if not self.histories:
            return []
        rows = [f"{'history':12}{'calls':>9}{'ok':>10}{'refused':>9}{'unknown':>9}{'failed':>8}"]
        for name, counts in sorted(self.histories.items()):
            unknown = counts[history.Outcome.INFO] + counts[history.Outcome.PENDING]
            rows.append(
                f"{name:12}{counts.total():9}{counts[history.Outcome.OK]:10}{counts['refused']:9}{unknown:9}"
                f"{counts[history.Outcome.FAIL]:8}"
            )
        return [*rows, ""]


def _counts(counts: Counter[str] | Counter[Fault]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"
