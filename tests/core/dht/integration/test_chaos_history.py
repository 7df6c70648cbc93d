"""Histories of chaos runs: how they are recorded and merged, and that a planted bug in node processes is found by them.

The story: a holder process is frozen for longer than its lease; another takes the lock and writes; the first wakes, and
writes with its old token. Where nodes ignore fences that write takes effect, and no order explains the history.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from agi.core.dht.client import DHTClient
from agi.core.dht.errors import OutcomeUnknown, Unavailable
from agi.core.dht.testing.chaos import holders as holder_processes
from agi.core.dht.testing.chaos import nodes as node_processes
from agi.core.dht.testing.chaos import skew
from agi.core.dht.testing.chaos.auditor import Auditor, Kind
from agi.core.dht.testing.chaos.histories import judge, lines_of, merged
from agi.core.dht.testing.chaos.holder import Recorder, guarded
from agi.core.dht.testing.chaos.holders import Holders
from agi.core.dht.testing.chaos.nodes import Nodes
from agi.core.dht.testing.chaos.plan import LEASE_S
from agi.core.dht.testing.chaos.report import Journal
from agi.core.dht.testing.history import Function, History, Outcome
from agi.core.dht.testing.linearizability import Verdict, check

LOCK = "lock-0"
STORY_TIMEOUT_S = 60.0
FORM_TIMEOUT_S = 40.0
WAIT_S = 15.0
WITHOUT_FENCES = """
import sys
import time
from unittest import mock
from agi.core.dht import server
from agi.core.dht.protocol import consensus

with mock.patch.object(consensus, "_fence", lambda op, state: op.fence or state.fence):
    sys.exit(server.main())
"""
ALWAYS_LATE = """
import sys
import time
from agi.core.dht.testing.chaos import holder

holder.LATE_SHARE, holder.LATE_S_MAX = 1.0, 0.1
sys.exit(holder.main())
"""


def unexpected(subject: str, what: str) -> None:
    raise AssertionError(f"{subject} {what}")


def unheeded(subject: str, what: str) -> None:
    """Ends that are as they should be."""


@asynccontextmanager
async def cluster(folder: Path) -> AsyncIterator[list[str]]:
    """Three nodes on the loopback; their addresses."""
    nodes = Nodes(folder, None, unexpected, unheeded)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(nodes.kill_all)
        for number in range(3):
            await nodes.add(f"n{number}")
        nodes.first = [node.address for node in nodes.all.values()]
        for node in nodes.all.values():
            node.wanted = True
        async with asyncio.TaskGroup() as group:
            supervisor = group.create_task(nodes.supervise())
            async with DHTClient(unix=False) as client:
                await client.connect(nodes.first, timeout=FORM_TIMEOUT_S)
                await client.wait_healthy(FORM_TIMEOUT_S)
            yield nodes.first
            supervisor.cancel()


async def late_holder(folder: Path) -> tuple[Auditor, Journal]:
    """The story, judged."""
    auditor, journal = Auditor(), Journal(lambda: 0.0, None, lambda line: None)
    async with asyncio.timeout(STORY_TIMEOUT_S), cluster(folder) as addresses, AsyncExitStack() as stack:
        holders = Holders(folder, lambda: addresses, [LOCK], 1, unexpected)
        stack.push_async_callback(holders.kill_all)
        for _ in range(2):
            await holders.add()
        first, *_ = await holders.holding(WAIT_S, LOCK)
        holders.freeze(first)
        frozen_ns = time.monotonic_ns()
        await asyncio.sleep(LEASE_S)
        (second,) = await holders.holding(WAIT_S, LOCK)
        assert second is not first
        async with asyncio.timeout(WAIT_S):
            while not written_since(folder / f"{second.name}.jsonl", frozen_ns):  # noqa: ASYNC110  # another process's file
                await asyncio.sleep(0.05)
        holders.thaw(first)
        await holders.stop()
        judge(History(), holders, folder / "history.jsonl", auditor, journal)
    return auditor, journal


def written_since(path: Path, then_ns: int) -> bool:
    """Whether by that history a lock was taken after that time, and a write with its token has succeeded."""
    operations = [each for each in History.parse(lines_of(path)).operations if (each.returned_ns or 0) > then_ns]
    done = [each for each in operations if each.outcome is Outcome.OK and each.result is not False]
    tokens = [each.result for each in done if each.f == Function.LOCK]
    values = [each.value for each in done if each.f == Function.FENCED_WRITE]
    return any(isinstance(value, list) and value[0] in tokens for value in values)


async def test_who_was_frozen_for_longer_than_his_lease_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "late.py").write_text(ALWAYS_LATE)
    monkeypatch.setattr(holder_processes, "PROGRAM", (str(tmp_path / "late.py"),))
    auditor, journal = await late_holder(tmp_path)
    assert auditor.violations == []
    assert journal.histories[Function.FENCED_WRITE]["refused"] > 0
    assert journal.histories[Function.LOCK]["ok"] > 1


async def test_nodes_that_ignore_fences_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "late.py").write_text(ALWAYS_LATE)
    (tmp_path / "fenceless.py").write_text(WITHOUT_FENCES)
    monkeypatch.setattr(holder_processes, "PROGRAM", (str(tmp_path / "late.py"),))
    monkeypatch.setattr(node_processes, "SERVER", (str(tmp_path / "fenceless.py"),))
    auditor, _ = await late_holder(tmp_path)
    assert [(each.kind, each.subject) for each in auditor.violations] == [(Kind.NOT_LINEARIZABLE, guarded(LOCK))]
    assert Function.FENCED_WRITE in auditor.violations[0].text


# --- records


def test_a_record_tells_outcomes_and_survives_its_process(tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    recorder = Recorder(path, "h")
    recorder.invoke(Function.FENCED_WRITE, "k", [1, "a"]).ok()
    recorder.invoke(Function.FENCED_WRITE, "k", [1, "b"]).failed(Unavailable("too few"))
    recorder.invoke(Function.FENCED_WRITE, "k", [1, "c"]).failed(OutcomeUnknown("who knows"))
    recorder.invoke(Function.READ, "k")
    read = History.parse(lines_of(path))  # not closed: it may be killed at any time
    assert [operation.outcome for operation in read.operations] == ["ok", "fail", "info", "pending"]
    recorder.close()
    path.write_text(path.read_text()[:-5])
    assert [operation.outcome for operation in History.parse(lines_of(path)).operations] == ["ok", "fail", "info"]


def test_records_are_merged_by_time_and_invocations_come_first() -> None:
    def event(process: str, kind: str, f: str, value: object, time: int) -> str:
        return json.dumps({"process": process, "type": kind, "f": f, "key": "k", "value": value, "time": time})

    writer = [event("w", "invoke", "write", "x", 1), event("w", "ok", "write", None, 5)]
    reader = [event("r", "invoke", "read", None, 5), event("r", "ok", "read", None, 6)]
    lines = merged([writer, reader])
    assert lines == [writer[0], reader[0], writer[1], reader[1]]
    assert check(History.parse(lines).operations).verdict is Verdict.LINEARIZABLE
    late = [event("r", "invoke", "read", None, 6), event("r", "ok", "read", None, 6)]
    assert check(History.parse(merged([writer, late])).operations).verdict is Verdict.VIOLATION


# --- clocks


def test_a_clock_is_shifted_alone_and_in_the_midst(tmp_path: Path) -> None:
    if why := skew.obstacle(tmp_path):
        pytest.skip(why)
    clock = skew.Clock(tmp_path / "clock")
    clock.shift(-600.0)
    told = "import sys, time\nfor _ in sys.stdin: print(time.time(), time.monotonic(), flush=True)"
    with subprocess.Popen(
        [*clock.before(), sys.executable, "-c", told],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"FAKETIME": "+5d"},
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None

        def ahead() -> tuple[float, float]:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            wall_s, monotonic_s = map(float, process.stdout.readline().split())
            return round(wall_s - time.time(), 0), round(monotonic_s - time.monotonic(), 0)

        assert ahead() == (-600, 0)
        clock.shift(3600.0)
        until = time.monotonic() + WAIT_S
        while ahead() != (3600, 0):
            assert time.monotonic() < until
            threading.Event().wait(0.1)
        process.stdin.close()
        process.wait(WAIT_S)
