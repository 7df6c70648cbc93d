"""Operations on keys under consensus through the real client, recorded as one history and judged for linearizability.

Workers in this process use registers (compare-and-set, writes bound to a version, plain and linearizable writes and
reads, deletes) and counters; holder processes take locks and write what those guard (holder.py). All record times of
CLOCK_MONOTONIC, before a call and after it, so that the records can be merged: where two times are equal, an invocation
comes before a completion, which can hide a violation, but make none up (docs/histories.md).
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from agi.core.dht.client import DHTClient
from agi.core.dht.testing.chaos.auditor import Auditor, Kind
from agi.core.dht.testing.chaos.holder import guarded
from agi.core.dht.testing.chaos.holders import Holders
from agi.core.dht.testing.chaos.load import HUNG_S, TIMEOUT_S
from agi.core.dht.testing.chaos.report import Journal
from agi.core.dht.testing.conditional import ConditionalWork
from agi.core.dht.testing.history import History, Outcome
from agi.core.dht.testing.linearizability import Result, Verdict, check
from agi.core.dht.types import Consistency

WORKERS, HOLDERS = 4, 3
REGISTERS, COUNTERS = 3, 2
LOCKS = ("lock-0", "lock-1")
PERIOD_S = 8.0
"""Registers and counters are used for so long, then others: each is brought under consensus anew, and no history of a
key is so long, or has so many operations of unknown outcome, that it cannot be decided."""
THINK_S = 0.03
LIMIT = 1_000_000
"""Configurations that the checker may look at for one key."""
FINAL_TIMEOUT_S = 10.0
QUESTIONS_MAX = 16
"""Under way at once."""


class Worker:
    """One call at a time, by any of the clients."""

    def __init__(
        self,
        name: str,
        history: History,
        clients: Sequence[DHTClient],
        auditor: Auditor,
        journal: Journal,
        rng: random.Random,
    ) -> None:
        self._name = name
        self._history = history
        self._clients = clients
        self._auditor = auditor
        self._journal = journal
        self._rng = rng
        self._numbers = itertools.count(1)
        self._period = -1
        self._work: ConditionalWork

    async def run(self, stop: asyncio.Event) -> None:
        """Until told to stop; the call under way is finished."""
        while not stop.is_set():
            period = int(self._journal.now / PERIOD_S)
            if period != self._period:
                self._period, self._work = period, self._work_of(period)
            try:
                async with asyncio.timeout(TIMEOUT_S + HUNG_S):
                    await self._work.perform(self._rng.choice(self._clients), TIMEOUT_S)
            except TimeoutError:
                text = f"a call took {TIMEOUT_S + HUNG_S:g} s, its deadline is {TIMEOUT_S:g} s"
                self._auditor.found(Kind.HUNG, self._name, text, self._journal.now)
            await asyncio.sleep(self._rng.expovariate(1.0 / THINK_S))

    def _work_of(self, period: int) -> ConditionalWork:
        return conditional_work(
            f"{self._name}.{period}",
            self._history,
            [f"register-{number}.{period}" for number in range(REGISTERS)],
            [f"counter-{number}.{period}" for number in range(COUNTERS)],
            self._rng,
            lambda: f"{self._name}:{next(self._numbers)}".encode(),
        )


def conditional_work(
    process: str,
    history: History,
    registers: Sequence[str],
    counters: Sequence[str],
    rng: random.Random,
    value_of: Callable[[], bytes],
) -> ConditionalWork:
    """Of keys that stay the same."""
    return ConditionalWork(process, history, registers, counters, rng, value_of, 0.0, lambda: 0.0)


async def read_all(history: History, client: DHTClient, auditor: Auditor, journal: Journal) -> None:
    """At rest, every key is read once more: what was acknowledged must be there."""
    keys = sorted({operation.key for operation in history.operations})
    keys += [guarded(lock) for lock in LOCKS]
    counters = [key for key in keys if key.startswith("counter")]
    work = conditional_work("final", history, [], counters, random.Random(0), bytes)
    places = asyncio.Semaphore(QUESTIONS_MAX)

    async def read(key: str) -> None:
        async with places:
            if not await work.read(client, key, Consistency.LINEARIZABLE, FINAL_TIMEOUT_S):
                auditor.found(Kind.UNREADABLE, key, "a linearizable read at rest failed", journal.now)

    await asyncio.gather(*map(read, keys))


def merged(histories: Iterable[Iterable[str]]) -> list[str]:
    """The lines of one history of all."""

    def place(line: str) -> tuple[int, bool]:
        event = json.loads(line)
        return event["time"], event["type"] != "invoke"

    return list(heapq.merge(*histories, key=place))


def lines_of(path: Path) -> Iterator[str]:
    """The events in a file of a process that may have been killed in the midst of a line."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield line.removesuffix("\n")


def judge(history: History, holders: Holders, path: Path, auditor: Auditor, journal: Journal) -> Result:
    """Everything as one history, written to the file, and what is not linearizable as violations."""
    recorded = [lines_of(each) for each in holders.histories if each.exists()]
    lines = merged([history.lines(), *recorded])
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    began = journal.now
    operations = History.parse(lines, str(path)).operations
    result = check(operations, limit=LIMIT)
    for violation in result.violations:
        auditor.found(Kind.NOT_LINEARIZABLE, violation.key, violation.describe(), journal.now)
    for name in result.undecided:
        auditor.found(Kind.UNDECIDED, name, f"not decided within {LIMIT} configurations", journal.now)
    for operation in operations:
        refused = operation.outcome is Outcome.OK and operation.result is False
        counts = journal.histories.setdefault(operation.f, Counter())
        counts["refused" if refused else operation.outcome] += 1
    told = "linearizable" if result.verdict is Verdict.LINEARIZABLE else str(result.verdict)
    journal.figures["history"] = f"{told}: {result.operations} operations on {result.objects} objects"
    journal.say(
        f"{result.operations} operations on {result.objects} objects judged in {journal.now - began:.1f} s: {told}"
    )
    return result
