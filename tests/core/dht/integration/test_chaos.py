"""A short chaos run (docs/chaos.md): real processes under faults, what was acknowledged is checked, nothing is left."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from process_harness import environment

from agi.core.dht.testing.chaos import network, run
from agi.core.dht.testing.chaos.auditor import Kind
from agi.core.dht.testing.chaos.plan import EACH, MEMBERS, NAMESPACES, Fault, each
from agi.core.dht.testing.history import Function, History
from agi.core.dht.testing.linearizability import Verdict, check

SECONDS = 8
SEED = 14193
"""In so short a time its plan has cut links, a holder of a lock that is frozen, a clock an hour off, and in the end a
power loss of all nodes; on the loopback a kill, a freeze, and a frozen holder."""
HAD = {Fault.PARTITION, Fault.POWER_LOSS_ALL, Fault.SKEW, Fault.HOLDER_FREEZE}
"""What that plan has; the run of each fault leaves it out."""
RUN_TIMEOUT_S = 110.0


@pytest.fixture(scope="module")
def form() -> list[str]:
    """With namespaces where they can be made."""
    return ["--no-network"] if network.obstacle() else []


@asynccontextmanager
async def running(folder: Path, *arguments: object) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "agi.core.dht.testing.chaos"),
        *map(str, arguments),
        env=environment(TMPDIR=str(folder)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def left(folder: Path) -> list[str]:
    """Files of a run, and processes and loop devices that name its folder."""
    found = [str(path) for path in folder.glob("dht-chaos-*")]
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # it is let go of right now
            if str(folder) in (image := path.read_text()):
                found.append(f"{path}: {image}")
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue  # it has ended meanwhile
        if int(path.parent.name) != os.getpid() and os.fsencode(folder / "dht-chaos-") in words:
            found.append(words.replace(b"\0", b" ").decode())
    return found


async def test_nothing_is_lost_under_faults(tmp_path: Path, form: list[str]) -> None:
    reports = tmp_path / "reports"
    words = ["--nodes", 5, "--seconds", SECONDS, "--seed", SEED, "--report", reports, "--without", ",".join(MEMBERS)]
    async with running(tmp_path, *words, *form) as process:
        async with asyncio.timeout(RUN_TIMEOUT_S):
            said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()
    assert "nothing was violated" in said.decode()
    assert (reports / "5-nodes.txt").read_text().strip() in said.decode()
    lines: list[dict[str, Any]] = [json.loads(line) for line in (reports / "5-nodes.jsonl").read_text().splitlines()]
    summary = lines[-1]
    assert summary["line"] == "summary"
    assert summary["violations"] == {kind.value: 0 for kind in Kind}
    assert summary["acknowledged"] > 100 and summary["keys_checked"] > 50 and summary["reads_judged"] > 20
    assert len(summary["faults"]) >= 2
    assert sum(line["line"] == "fault" for line in lines) >= sum(summary["faults"].values())
    lacking = {fault for names in summary["not_possible"] for fault in names.split(", ")}
    assert lacking <= NAMESPACES
    if not lacking:
        assert HAD - {Fault.HOLDER_FREEZE} <= set(summary["faults"])

    history = History.read(reports / "5-nodes.history.jsonl")
    assert check(history.operations).verdict is Verdict.LINEARIZABLE
    done = {str(operation.f): 0 for operation in history.operations}
    for operation in history.operations:
        done[operation.f] += operation.outcome == "ok"
    wanted = {Function.READ, Function.WRITE, Function.CAS, Function.INCR, Function.LOCK, Function.FENCED_WRITE}
    assert all(done.get(function, 0) > 0 for function in wanted), done
    assert left(tmp_path) == []


@pytest.mark.timeout(2 * RUN_TIMEOUT_S)
async def test_each_fault_happens_and_is_survived(tmp_path: Path, form: list[str]) -> None:
    reports = tmp_path / "reports"
    words = ["--nodes", 3, "--each", "--seconds", 1, "--seed", SEED, "--report", reports, "--without", ",".join(HAD)]
    async with running(tmp_path, *words, *form) as process:
        async with asyncio.timeout(2 * RUN_TIMEOUT_S):
            said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()
    lines: list[dict[str, Any]] = [json.loads(line) for line in (reports / "3-nodes.jsonl").read_text().splitlines()]
    assert lines[-1]["violations"] == {kind.value: 0 for kind in Kind}
    lacking = {fault for names in lines[-1]["not_possible"] for fault in names.split(", ")}
    assert lacking <= NAMESPACES
    ends = {line["kind"]: line["outcome"] for line in lines if line["line"] == "fault"}
    wanted = dict.fromkeys((fault.value for fault in set(Fault) - HAD - lacking), "undone")
    assert ends == wanted | {Fault.JOIN: "joined", Fault.LEAVE: "left"}, said.decode()
    assert left(tmp_path) == []


def test_each_fault_is_in_the_plan_once() -> None:
    assert sorted(fault for lane in EACH for fault in lane) == sorted(Fault)
    steps = [step for lane in each(without=MEMBERS).values() for step in lane]
    assert {step.fault for step in steps} == set(Fault) - MEMBERS and len(steps) == len(Fault) - len(MEMBERS)
    assert all(step.lasts_s for step in steps)


@pytest.mark.parametrize(
    ("codes", "worst"), [([0, 0], 0), ([1, 0], 1), ([0, 2], 2), ([run.STOPPED], run.STOPPED)], ids=str
)
def test_sizes_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch, codes: list[int], worst: int) -> None:
    asked: list[int] = []

    def one(given: argparse.Namespace, size: int) -> int:
        asked.append(size)
        return codes[len(asked) - 1]

    monkeypatch.setattr(run, "_one", one)
    assert run.main(["--no-network", "--seed", "1"]) == worst
    assert asked == [3, 5][: len(codes)]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
async def test_a_run_that_is_stopped_leaves_nothing(tmp_path: Path, form: list[str], how: signal.Signals) -> None:
    async with running(tmp_path, "--seconds", 60, "--nodes", 4, *form) as process:
        assert process.stdout is not None
        async with asyncio.timeout(RUN_TIMEOUT_S):
            while b"writers begin" not in (line := await process.stdout.readline()):
                assert line, "it ended before"
            process.send_signal(how)
            await process.communicate()
        assert process.returncode == (-how if how is signal.SIGKILL else 130)
    files = how is not signal.SIGKILL  # then nobody is left to remove them
    async with asyncio.timeout(20):
        while [each for each in left(tmp_path) if files or " " in each]:  # noqa: ASYNC110  # the kernel tells nobody
            await asyncio.sleep(0.05)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(network, "TOOLS", {"no-such-tool": "no-such-package"})
    assert run.main(["--seconds", "1"]) == 2
    said = capsys.readouterr().out
    assert "no-such-tool not found (apt-get install no-such-package)" in said and "--no-network" in said


@pytest.mark.parametrize("words", [["--nodes", "2"], ["--nodes", "3,"], ["--seconds", "0"], ["--without", "rain"]])
def test_what_cannot_be_asked_for_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(words)
    assert "error:" in capsys.readouterr().err


def test_the_machines_own_network_is_not_touched() -> None:
    with pytest.raises(Exception, match="not a namespace of the run's own"):
        network.Network(network.namespace())
