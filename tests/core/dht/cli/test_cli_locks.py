"""lock, lock status and --fence on three real nodes."""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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
        with contextlib.suppress(subprocess.TimeoutExpired):  # somebody is left who holds its pipes
            child.communicate(timeout=5)


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
    shown = dht("lock", "status", "c:1")
    assert shown.code == 0 and shown.text.startswith("free, last token ")


def test_who_holds_a_lock(dht: Any, cluster: Any) -> None:
    missing = dht("lock", "status", "c:none")
    assert missing.code == 3 and missing.out == b"" and missing.err == "not found: no lock 'c:none'\n"
    with SyncDHTClient() as client:
        client.connect(cluster.cluster.addresses)
        with client.lock("c:2", ttl=20) as lock:
            status = dht("lock", "status", "c:2", "--json").json
            assert status.pop("holder").split(":")[1] == str(os.getpid())
            assert status.pop("version") >= lock.token
            assert status == {"name": "c:2", "held": True, "token": lock.token, "lease_seconds": 20}
            assert f"token {lock.token}, lease 20 s" in dht("lock", "status", "c:2").text
            refused = dht("lock", "c:2", "--timeout", "0", "--", "true")
            assert refused.code == 30 and refused.err.startswith("error: the lock 'c:2' was held by another")
            told = dht("lock", "c:2", "--timeout", "0", "--json", "--", "true")
            shown, error = told.err.splitlines()
            assert msgspec.json.decode(shown) == {"name": "c:2", "token": None, "exit_code": 30, "lost": False}
            assert told.code == 30 and told.out == b"" and error.startswith("error: the lock 'c:2'")
        assert not dht("lock", "status", "c:2", "--json").json["held"]


def test_a_fence_keeps_an_earlier_holder_out(dht: Any) -> None:
    assert dht("put", "c:k", "new", "--fence", "c:3:9").code == 0
    refused = dht("put", "c:k", "old", "--fence", "c:3:8")
    assert refused.code == 28 and refused.out == b""
    assert dht("delete", "c:k", "--fence", "c:3:8").code == 28
    assert dht("put", "c:k", "old", "--fence", "other:99").code == 10
    assert dht("get", "c:k").out == b"new"
    assert dht("get", "c:k", "--fence", "c:3:8").code == 28
    assert dht("get", "c:k", "--fence", "c:3:x").code == 10
    version = dht("get", "c:k", "--json").json["version"]
    read = dht("get", "c:k", "--fence", "c:3:10", "--json").json
    assert (read["value"], read["version"]) == ("new", version)
    assert dht("put", "c:k", "late", "--fence", "c:3:9").code == 28
    assert dht("put", "c:k", "next", "--fence", "c:3:10", "--if-version", str(version)).code == 0
    assert dht("delete", "c:k", "--fence", "c:3:10").code == 0
    assert dht("get", "c:k", "--fence", "c:3:10").code == 3
    assert dht("put", "c:k", "old", "--fence", "c:3:8").code == 28
    for wrong in ("c:3", "c:3:", ":9", "c:3:-1", "c:3:0", "c:3:" + "9" * 30, ""):
        assert dht("put", "c:k", "x", "--fence", wrong).code == 10, wrong
    assert dht("delete", "c:k", "c:l", "--fence", "c:3:9").code == 2


def test_wrong_arguments_run_nothing(dht: Any, tmp_path: Path) -> None:
    made = tmp_path / "made"
    for arguments in (["--ttl", "0"], ["--ttl", "-1"], ["--ttl", "nan"], ["--timeout", "-1"], ["--grace", "nan"]):
        assert dht("lock", "c:4", *arguments, "--", "touch", str(made)).code == 10, arguments
    assert dht("lock", "", "--", "touch", str(made)).code == 10
    assert dht("lock", "c:4").code == dht("lock", "c:4", "--").code == 2
    assert not made.exists() and dht("lock", "status", "c:4").code == 3


def test_status_is_a_lock_only_where_a_command_follows(dht: Any) -> None:
    missing = dht("lock", "status", "c:nobody")
    assert missing.code == 3 and missing.err == "not found: no lock 'c:nobody'\n"
    assert dht("lock", "status", "status").code == 3
    assert dht("lock", "status", "--", "false").code == 1
    assert dht("lock", "status", "status").text.startswith("free, last token ")
    assert dht("lock", "status").code == 2


@pytest.mark.parametrize(
    "arguments",
    [["NAME", "touch", "MADE"], ["NAME", "touch", "--", "MADE"], ["NAME", "--ttl", "5", "touch", "MADE"],
     ["--", "NAME", "touch", "MADE"], ["--ttl", "5", "status", "touch", "MADE"],
     ["status", "touch", "--", "MADE"]],
)  # fmt: skip
def test_a_command_is_run_only_behind_the_dashes(dht: Any, tmp_path: Path, arguments: list[str]) -> None:
    made = tmp_path / "made"
    stands_for = {"NAME": "c:dashes", "MADE": str(made)}
    refused = dht("lock", *(stands_for.get(argument, argument) for argument in arguments))
    assert refused.code == 2 and "agi-dht lock NAME -- COMMAND" in refused.err and refused.out == b""
    assert not made.exists() and dht("lock", "status", "c:dashes").code == 3


def test_all_behind_the_dashes_is_the_command(dht: Any) -> None:
    assert dht("lock", "c:8", "--", "sh", "-c", 'test "$*" = "-- --ttl x"', "sh", "--", "--ttl", "x").code == 0


def test_one_command_after_the_other(helpers: Any, cluster: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = f"import time; f = open({str(log)!r}, 'a', 1); f.write('in\\n'); time.sleep(0.1); f.write('out\\n')"
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(background(helpers, cluster, "lock", "c:5", *python(program))) for _ in range(4)
        ]
        assert [child.wait(30) for child in children] == [0] * 4
    assert log.read_text().split() == ["in", "out"] * 4


def test_a_command_whose_holder_was_killed_is_followed_by_one_that_looks_once(
    dht: Any, helpers: Any, cluster: Any
) -> None:
    run = python("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    with background(helpers, cluster, "lock", "c:cron", "--ttl", "2", *run) as child:
        orphan = int(child.stdout.readline())
        child.kill()
        child.wait(10)
        os.kill(orphan, signal.SIGKILL)
    codes = [dht("lock", "c:cron", "--ttl", "2", "--timeout", "0", "--", "true").code]
    until = time.monotonic() + 20
    while codes[-1] and time.monotonic() < until:
        codes.append(dht("lock", "c:cron", "--ttl", "2", "--timeout", "0", "--", "true").code)
    assert codes[-1] == 0 and set(codes[:-1]) <= {30}, codes


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


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_lost_lock_ends_all_that_the_command_started(helpers: Any, tmp_path: Path, stubborn: bool) -> None:
    """All nodes freeze. A script runs a program, which writes on unless it is ended, and holds our stdout open."""
    ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN);" if stubborn else ""
    log, script = tmp_path / "log", tmp_path / "work.sh"
    program = f"""import os, signal, sys, time; {ignore}
print(os.getpid(), flush=True)
while True: open({str(log)!r}, "a").write("x"); time.sleep(0.01)"""
    script.write_text(f"#!/bin/bash\n{shlex.quote(sys.executable)} -c {shlex.quote(program)}\necho on\n")
    script.chmod(0o755)
    with helpers.local_cluster(3, tmp_path) as started:
        nodes = [node.process.pid for node in started.cluster.nodes]
        options = ["--ttl", "2", "--grace", "0.3"]
        with background(helpers, started, "lock", "c:lost", *options, "--", str(script)) as child:
            pid = int(child.stdout.readline())
            try:
                for node in nodes:
                    os.kill(node, signal.SIGSTOP)
                out, err = child.communicate(timeout=30)  # until nobody is left who could write there
                assert child.returncode == 29 and b"is lost: the command is ended" in err and out == b""
                assert state(pid) in "Z" and log.stat().st_size
            finally:
                for node in nodes:
                    os.kill(node, signal.SIGCONT)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_reaches_all_that_the_command_started(helpers: Any, cluster: Any, number: int) -> None:
    """Sent to us alone, while a script waits for what it runs in the foreground."""
    program = "import time; print('ready', flush=True); time.sleep(15)"
    script = f"{shlex.quote(sys.executable)} -c {shlex.quote(program)}; exit 3"
    with background(helpers, cluster, "lock", "c:9", "--", "sh", "-c", script) as child:
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(number)
        assert child.communicate(timeout=10)[0] == b"" and child.returncode == 128 + number


def test_what_is_ignored_here_is_not_passed_on(helpers: Any, cluster: Any) -> None:
    """nohup."""
    program = "import sys; print('ready', flush=True); sys.stdin.readline(); print('done', flush=True)"
    told = subprocess.Popen(
        ["/bin/sh", "-c", 'trap "" HUP; exec "$@"', "sh", *helpers.command("lock", "c:10", *python(program))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "AGI_DHT_CONNECT": cluster.connect},
    )
    with told as child:
        assert child.stdin is not None and child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(signal.SIGHUP)
        assert child.communicate(b"\n", timeout=30)[0] == b"done\n" and child.returncode == 0


# --- at a terminal

SHELL = """
import os, signal, subprocess, sys
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
def foreground(group): os.tcsetpgrp(0, group)
job = subprocess.Popen(sys.argv[1:], process_group=0, preexec_fn=lambda: signal.signal(signal.SIGTTOU, signal.SIG_DFL))
foreground(job.pid)
while True:
    _, status = os.waitpid(job.pid, os.WUNTRACED)
    taken = os.tcgetpgrp(0) == job.pid
    foreground(os.getpgrp())
    if not os.WIFSTOPPED(status):
        break
    print("stopped, and has the terminal:", taken, flush=True)
    sys.stdin.readline()
    foreground(job.pid)
    os.killpg(job.pid, signal.SIGCONT)
print("ended with", os.waitstatus_to_exitcode(status), flush=True)
"""
"""Runs a job in the foreground, as a shell does; where it stops a line from the terminal lets it go on."""
SESSION = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"


class Terminal:
    """What is typed and shown at a terminal where such a shell runs a command of ours."""

    def __init__(self, connect: str, command: list[str]) -> None:
        self._typed, there = os.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", SESSION, sys.executable, "-c", SHELL, *command],
            stdin=there,
            stdout=there,
            stderr=there,
            start_new_session=True,
            env={**os.environ, "AGI_DHT_CONNECT": connect},
        )
        os.close(there)
        self._shown = b""

    def type(self, what: bytes) -> None:
        os.write(self._typed, what)

    def shows(self, what: bytes) -> bytes:
        """Waits for it; returns what came on its line after it."""
        while b"\n" not in self._shown.partition(what)[2]:
            ready, _, _ = select.select([self._typed], [], [], 30)
            assert ready, self._shown
            try:
                self._shown += os.read(self._typed, 4096)
            except OSError:  # nobody has it open any more
                raise AssertionError(self._shown) from None
        rest, _, self._shown = self._shown.partition(what)[2].partition(b"\n")
        return rest.strip()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._typed)  # hangs up whoever is left


@pytest.fixture
def terminal(cluster: Any) -> Iterator[Callable[[list[str]], Terminal]]:
    with contextlib.ExitStack() as stack:
        yield lambda command: stack.enter_context(contextlib.closing(Terminal(cluster.connect, command)))


def test_a_command_that_reads_from_the_terminal_gets_it_and_gives_it_back(terminal: Any, helpers: Any) -> None:
    ours = shlex.join(helpers.command("lock", "c:11", "--", "sh", "-c", "read line; echo command: $line"))
    shown = terminal(["sh", "-c", f"{ours}; read line; echo script: $line"])
    shown.type(b"one\n")
    assert shown.shows(b"command: ") == b"one"
    shown.type(b"two\n")
    assert shown.shows(b"script: ") == b"two"
    assert shown.shows(b"ended with ") == b"0"


CTRL_C, CTRL_Z = b"\x03", b"\x1a"
READ = {"it never reads": "", "it has read": "sys.stdin.readline();"}
"""Whether the command has the terminal."""
SLEEP = "[time.sleep(0.05) for _ in range(1200)]"
"""Python looks for signals before and after it sleeps, but one that comes just as it begins does not wake it."""


@pytest.mark.parametrize("read", READ.values(), ids=READ.keys())
def test_ctrl_c_ends_the_command(terminal: Any, helpers: Any, read: str) -> None:
    program = f"import os, sys, time; {read} print('ready', os.getpid(), flush=True); {SLEEP}"
    shown = terminal(helpers.command("lock", "c:12", *python(program)))
    shown.type(b"\n")
    pid = int(shown.shows(b"ready "))
    shown.type(CTRL_C)
    assert shown.shows(b"ended with ") == b"%d" % (128 + signal.SIGINT)
    assert state(pid) in "Z"


@pytest.mark.parametrize("read", READ.values(), ids=READ.keys())
def test_ctrl_z_stops_the_command_and_us_until_the_shell_goes_on(terminal: Any, helpers: Any, read: str) -> None:
    program = f"""import os, sys, time; {read}
print("ready", os.getpid(), flush=True)
time.sleep(1e-3 if {bool(read)} else 60)
print("read", sys.stdin.readline(), flush=True); {SLEEP}"""
    shown = terminal(helpers.command("lock", "c:13", "--ttl", "60", *python(program)))
    shown.type(b"\n")
    pid = int(shown.shows(b"ready "))
    shown.type(CTRL_Z)
    assert shown.shows(b"has the terminal: ") == b"True"
    assert state(pid) == "T"
    shown.type(b"\n")
    helpers.until(lambda: state(pid) == "S")
    if read:
        shown.type(b"more\n")
        assert shown.shows(b"read ") == b"more"
    shown.type(CTRL_C)
    assert shown.shows(b"ended with ") == b"%d" % (128 + signal.SIGINT)


def test_a_command_that_slept_through_its_lock_does_not_wake(
    terminal: Any, helpers: Any, dht: Any, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    program = f"""import os, time; print("ready", os.getpid(), flush=True)
while True: open({str(log)!r}, "a").write("x"); time.sleep(0.01)"""
    shown = terminal(helpers.command("lock", "c:14", "--ttl", "1", *python(program)))
    pid = int(shown.shows(b"ready "))
    helpers.until(log.exists)
    shown.type(CTRL_Z)
    shown.shows(b"has the terminal: ")
    written = log.stat().st_size
    assert dht("lock", "c:14", "--", "true").code == 0
    shown.type(b"\n")
    shown.shows(b"is lost: the command is ended")
    assert shown.shows(b"ended with ") == b"29"
    assert state(pid) in "Z" and log.stat().st_size == written


def state(pid: int) -> str:
    """The kernel's letter for it: T is stopped, S asleep, Z ended; nothing where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""
