"""lock, lock-status and --fence on three real nodes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agi.core.dht import SyncDHTClient
from agi.core.dht.client.locks import Lock

SHOW = "import os; print(os.environ['AGI_DHT_LOCK_NAME'], os.environ['AGI_DHT_LOCK_TOKEN'])"


def python(program: str) -> list[str]:
    return ["--", sys.executable, "-c", program]


@contextlib.contextmanager
def background(helpers: Any, cluster: Any, *arguments: str) -> Any:
    child = subprocess.Popen(
        helpers.command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "AGI_DHT_CONNECT": cluster.connect},
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def test_a_command_runs_under_a_lock_and_its_exit_code_is_ours(dht: Any, helpers: Any, cluster: Any) -> None:
    ended = helpers.process(cluster.connect, "lock", "c:1", *python(SHOW))
    name, token = ended.text.split()
    assert ended.code == 0 and name == "c:1" and int(token) > 0 and ended.err == ""
    again = helpers.process(cluster.connect, "lock", "c:1", "--json", *python(SHOW + "; raise SystemExit(42)"))
    later = int(again.text.split()[1])
    assert later > int(token)
    assert again.code == 42
    assert msgspec.json.decode(again.err) == {"name": "c:1", "token": later, "exit_code": 42, "lost": False}
    ended = helpers.process(cluster.connect, "lock", "c:1", *python("import os; os.kill(os.getpid(), 9)"))
    assert ended.code == 128 + 9
    assert dht("lock", "c:1", "--", "/no/such/program").code == 127
    assert dht("lock", "c:1", "--", "/").code == 126
    shown = dht("lock-status", "c:1")
    assert shown.code == 0 and shown.text.startswith("free, last token ")


def test_who_holds_a_lock(dht: Any, cluster: Any) -> None:
    missing = dht("lock-status", "c:none")
    assert missing.code == 3 and missing.out == b"" and missing.err == "not found: no lock 'c:none'\n"
    with SyncDHTClient() as client:
        client.connect(cluster.cluster.addresses)
        with client.lock("c:2", ttl=20) as lock:
            status = dht("lock-status", "c:2", "--json").json
            assert status.pop("holder").split(":")[1] == str(os.getpid())
            assert status.pop("version") >= lock.token
            assert status == {"name": "c:2", "held": True, "token": lock.token, "lease_seconds": 20}
            assert f"token {lock.token}, lease 20 s" in dht("lock-status", "c:2").text
            refused = dht("lock", "c:2", "--timeout", "0", "--", "true")
            assert refused.code == 30 and refused.err.startswith("error: the lock 'c:2' was held by another")
        assert not dht("lock-status", "c:2", "--json").json["held"]


def test_a_fence_keeps_an_earlier_holder_out(dht: Any) -> None:
    assert dht("put", "c:k", "new", "--fence", "c:3:9").code == 0
    refused = dht("put", "c:k", "old", "--fence", "c:3:8")
    assert refused.code == 28 and refused.out == b""
    assert dht("delete", "c:k", "--fence", "c:3:8").code == 28
    assert dht("put", "c:k", "old", "--fence", "other:99").code == 10
    assert dht("get", "c:k").out == b"new"
    assert dht("delete", "c:k", "--fence", "c:3:9").code == 0
    assert dht("put", "c:k", "old", "--fence", "c:3:8").code == 28
    for wrong in ("c:3", "c:3:", ":9", "c:3:-1", "c:3:0", "c:3:" + "9" * 30, ""):
        assert dht("put", "c:k", "x", "--fence", wrong).code == 10, wrong
    assert dht("delete", "c:k", "c:l", "--fence", "c:3:9").code == 2


def test_wrong_arguments_run_nothing(dht: Any, tmp_path: Path) -> None:
    made = tmp_path / "made"
    for arguments in (["--ttl", "0"], ["--ttl", "-1"], ["--ttl", "nan"], ["--timeout", "-1"], ["--grace", "nan"]):
        assert dht("lock", "c:4", *arguments, "--", "touch", str(made)).code == 10, arguments
    assert dht("lock", "", "--", "touch", str(made)).code == 10
    assert dht("lock", "c:4").code == 2
    assert not made.exists() and dht("lock-status", "c:4").code == 3


def test_one_command_after_the_other(helpers: Any, cluster: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = f"import time; f = open({str(log)!r}, 'a', 1); f.write('in\\n'); time.sleep(0.1); f.write('out\\n')"
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(background(helpers, cluster, "lock", "c:5", *python(program))) for _ in range(4)
        ]
        assert [child.wait(30) for child in children] == [0] * 4
    assert log.read_text().split() == ["in", "out"] * 4


def test_a_signal_ends_the_command_and_frees_the_lock(dht: Any, helpers: Any, cluster: Any) -> None:
    program = "import time; print('ready', flush=True); time.sleep(60)"
    with background(helpers, cluster, "lock", "c:6", "--ttl", "60", *python(program)) as child:
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == 128 + signal.SIGTERM
    assert dht("lock", "c:6", "--timeout", "0", "--", "true").code == 0


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_lost_lock_ends_the_command(dht: Any, monkeypatch: pytest.MonkeyPatch, stubborn: bool) -> None:
    monkeypatch.setattr(Lock, "held", property(lambda lock: time.monotonic() < began + 1.0))
    ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN);" if stubborn else ""
    program = f"import signal, time; {ignore} time.sleep(60)"
    began = time.monotonic()
    ended = dht("lock", f"c:7{stubborn}", "--grace", "0.5", "--json", *python(program))
    assert ended.code == 29 and "is lost: the command is ended" in ended.err
    took_s = time.monotonic() - began
    assert 1.0 <= took_s < 10.0 and (not stubborn or took_s >= 1.5)
    assert '"exit_code":29,"lost":true' in ended.err
