"""`make run` and `make bench` as a stranger runs them: what they print, how they end, what they leave behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from agi.core.dht.cli import demo as demo_module
from agi.core.dht.cli import main
from agi.core.dht.client import DHTClient
from agi.core.dht.errors import ConfigError

WAIT_S = 60.0
ROOT = Path(__file__).parents[4]


async def _start(folder: Path, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, *arguments, cwd=folder, env={**os.environ, "TMPDIR": str(folder)},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip


def _processes(folder: Path) -> list[str]:
    """Command lines that name a folder, of processes that run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has just ended
            continue
        if str(folder) in command and path.parent.name != str(os.getpid()):
            found.append(command)
    return found


async def _all_gone(folder: Path) -> None:
    async with asyncio.timeout(WAIT_S):
        while _processes(folder):  # noqa: ASYNC110  # nobody tells of the end of another's children
            await asyncio.sleep(0.02)


async def test_the_demo_stores_the_library_and_leaves_nothing(tmp_path: Path) -> None:
    process = await _start(tmp_path, "-m", "agi.core.dht.cli", "demo", "--json")
    out, err = await asyncio.wait_for(process.communicate(), WAIT_S)
    assert process.returncode == 0, err.decode()
    report = json.loads(out)
    assert report["files"] >= 600 and report["matched"] == report["files"]
    assert "got SIGKILL" in err.decode() and "byte for byte" in err.decode()
    assert _processes(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_a_demo_that_is_ended_takes_its_nodes_along(tmp_path: Path, how: signal.Signals) -> None:
    process = await _start(tmp_path, "-m", "agi.core.dht.cli", "demo")
    assert process.stderr is not None
    async with asyncio.timeout(WAIT_S):
        while b"three nodes on" not in await process.stderr.readline():
            assert process.returncode is None
    assert len(_processes(tmp_path)) >= 3
    process.send_signal(how)
    await asyncio.wait_for(process.communicate(), WAIT_S)
    assert process.returncode == (1 if how is signal.SIGTERM else -how)
    await _all_gone(tmp_path)
    if how is signal.SIGTERM:
        assert list(tmp_path.iterdir()) == []


def test_a_demo_that_reads_another_byte_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    get = DHTClient.get

    async def wrong_once(client: DHTClient, key: str, **options: Any) -> bytes | None:
        value = await get(client, key, **options)
        return b"x" if key == "file:abc.py" else value

    monkeypatch.setattr(DHTClient, "get", wrong_once)
    monkeypatch.setattr(demo_module, "_library", _some)
    assert main(["demo"]) == 1
    assert "1 files came back wrong, such as file:abc.py" in capsys.readouterr().err


def _some() -> list[tuple[str, Path]]:
    return [(f"file:{path.name}", path) for path in sorted(Path(os.__file__).parent.glob("*.py"))[:40]]


def test_the_bench_command_emits_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--storage",
        "memory",
        "--seconds",
        "0.1",
        "--callers",
        "1,2",
        "--workload",
        "b,batch",
        "--keys",
        "1000",
    ]
    assert main(["bench", *arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["workload"], row["callers"]) for row in rows] == [
        ("b", 1),
        ("b", 2),
        ("batch_put", 1),
        ("batch_get", 1),
    ]
    assert all(row["operations"] > 0 and row["ops_per_s"] > 0 and len(row["nodes"]) == 3 for row in rows)


@pytest.mark.parametrize(
    "wrong",
    [
        ["--workload", "z"], ["--callers", "0"], ["--callers", "x"], ["--rounds", "0"], ["--keys", "0"],
        ["--batch", "100000"], ["--seconds", "-1"], ["--nodes", "0"], ["--set", "x"], ["--set", "network.nothing=1"],
    ],
)  # fmt: skip
def test_a_wrong_bench_is_one_line(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--storage", "memory", "--seconds", "0.1", *wrong]) == ConfigError.exit_code
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("error: ") and captured.out == ""


async def test_the_comparison_with_a_reference_program(tmp_path: Path) -> None:
    reference = tmp_path / "reference.py"
    sections = {name: {"ops_per_s": 1000} for name in ("1", "32", "256", "batch_put", "batch_get")}
    reference.write_text(f"print({json.dumps(json.dumps(sections))})")
    script = str(ROOT / "bench" / "limit.py")
    arguments = ["--rounds", "1", "--seconds", "0.2", "--storage", "memory", "--json", str(tmp_path / "out.json")]
    process = await _start(tmp_path, script, *arguments, "--bare", str(reference))
    out, err = await asyncio.wait_for(process.communicate(), WAIT_S)
    assert process.returncode == 0, err.decode()
    result = json.loads((tmp_path / "out.json").read_text())
    ours = result["memory"]["cluster"]["ops_per_s"]["32"][0]
    assert f"{ours / 1000:.2f}" in out.decode()
    process = await _start(tmp_path, script, *arguments)
    out, _ = await asyncio.wait_for(process.communicate(), WAIT_S)
    assert process.returncode == 0 and out.decode().count("not measured") == 5
