"""A short chaos run (docs/chaos.md): real processes under faults, what was acknowledged is checked, nothing is left."""

from __future__ import annotations

import asyncio
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

from agi.core.dht.testing.chaos import network
from agi.core.dht.testing.chaos.auditor import Kind
from agi.core.dht.testing.chaos.run import main

SECONDS = 10
SEED = 5
"""Its plan has a full disk, a node that is not heard, a kill of all and a join in so short a time."""
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
    """Files of a run, and processes that name its folder."""
    found = [str(path) for path in folder.glob("dht-chaos-*")]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue  # it has ended meanwhile
        if int(path.parent.name) != os.getpid() and os.fsencode(folder / "dht-chaos-") in words:
            found.append(words.replace(b"\0", b" ").decode())
    return found


async def test_nothing_is_lost_under_faults(tmp_path: Path, form: list[str]) -> None:
    report = tmp_path / "report.jsonl"
    async with running(tmp_path, "--seconds", SECONDS, "--seed", SEED, "--report", report, *form) as process:
        async with asyncio.timeout(RUN_TIMEOUT_S):
            said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()
    assert "nothing was violated" in said.decode()
    lines: list[dict[str, Any]] = [json.loads(line) for line in report.read_text().splitlines()]
    summary = lines[-1]
    assert summary["line"] == "summary"
    assert summary["violations"] == {kind.value: 0 for kind in Kind}
    assert summary["acknowledged"] > 100 and summary["keys_checked"] > 50 and summary["reads_judged"] > 20
    assert len(summary["faults"]) >= 2
    assert sum(line["line"] == "fault" for line in lines) >= sum(summary["faults"].values())
    assert left(tmp_path) == []


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
    assert main(["--seconds", "1"]) == 2
    said = capsys.readouterr().out
    assert "no-such-tool not found (apt-get install no-such-package)" in said and "--no-network" in said


def test_the_machines_own_network_is_not_touched() -> None:
    with pytest.raises(Exception, match="not a namespace of the run's own"):
        network.Network(network.namespace())
