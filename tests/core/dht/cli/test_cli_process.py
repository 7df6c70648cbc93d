"""The command line as processes: what the shell sees, what is imported, what arguments are made of."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from agi.core.dht import SyncDHTClient
from agi.core.dht.cli.app import COMMANDS

WAIT_S = 30.0
OURS = [name for name in COMMANDS if name not in ("serve", "demo", "bench", "config")]


def test_the_list_of_commands_tells_what_their_own_help_tells(run_cli: Any) -> None:
    shown = run_cli("--help")
    assert shown.code == 0 and shown.err == ""
    for name, lazy in COMMANDS.items():
        found = getattr(importlib.import_module(lazy.module), lazy.attribute)
        if isinstance(found, typer.Typer):
            found = (found.registered_callback or found.registered_commands[0]).callback
        assert (found.__doc__ or "").splitlines()[0] == lazy.help, name
        assert f"{name} {lazy.help}" in " ".join(shown.text.split()), name


@pytest.mark.parametrize("name", [*OURS, "topology recover", "config check", "config show"])
def test_every_command_has_json_and_examples(run_cli: Any, name: str) -> None:
    shown = run_cli(*name.split(), "-h")
    assert shown.code == 0 and "--json" in shown.text and "Example" in shown.text
    assert f"agi-dht {name}" in shown.text.split("Example")[1]


def test_no_command_imports_what_it_does_not_need(cluster: Any) -> None:
    heavy = ("rocksdict", "redis", "rich", "yaml", "cryptography", "prometheus_client", "agi.core.dht.node")
    look = f"import sys; print('imported', [name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    for arguments in (["--help"], ["--version"], ["get", "p:1"], ["put", "p:1", "v"], ["scan", "p:"], ["dump", "p:"]):
        program = f"from agi.core.dht.cli import main\nmain({[*arguments]!r})\n{look}"
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            timeout=WAIT_S,
            env={**os.environ, "AGI_DHT_CONNECT": cluster.connect},
        )
        assert done.stderr.decode().splitlines()[-1] == "imported []", arguments


def test_arguments_that_are_not_text(helpers: Any, cluster: Any) -> None:
    for arguments in (
        [b"get", b"\xff"],
        [b"delete", b"\xed\xa0\x80"],
        [b"scan", b"--end", b"\xfe"],
        [b"locate", b"\xff"],
    ):
        ended = helpers.process(cluster.connect, *arguments)
        assert ended.code == 10 and ended.out == b"" and ended.err.count("\n") == 1, ended
        assert ended.err.startswith("error: a key must be valid Unicode")
    for arguments in ([b"\xff"], [b"get", b"k", b"--\xff"], [b"put", b"k", b"--ttl", b"\xff"]):
        ended = helpers.process(cluster.connect, *arguments)
        assert ended.code == 2 and "Traceback" not in ended.err
    ended = helpers.process(cluster.connect, b"get", b"k", b"--connect", b"\xff:1")
    assert ended.code == 10 and ended.err.startswith("error: ")
    ended = helpers.process(cluster.connect, b"put", b"k", b"--file", b"/\xff")
    assert ended.code == 10 and ended.err == "error: /\\xff: No such file or directory\n"
    assert helpers.process(cluster.connect, b"put", b"p:raw", b"\xff\xfe").code == 0
    assert helpers.process(cluster.connect, "get", "p:raw").out == b"\xff\xfe"


def test_stdin_stdout_and_exit_codes(helpers: Any, cluster: Any) -> None:
    raw = bytes(range(256)) * 100
    assert helpers.process(cluster.connect, "put", "p:pipe", stdin=raw).code == 0
    assert helpers.process(cluster.connect, "get", "p:pipe") == (0, raw, "")
    assert helpers.process(cluster.connect, "get", "p:none").code == 3
    assert helpers.process("127.0.0.1:1", "get", "p", "--timeout", "0.3").code == 23
    version = helpers.process("", "--version")
    assert version.code == 0 and version.text.startswith("agi-dht ")
    assert helpers.process("", "config", "check", "--config", "/nowhere").code == 11


def test_a_reader_that_leaves_ends_a_scan_quietly(helpers: Any, cluster: Any) -> None:
    with SyncDHTClient() as client:
        client.connect(cluster.cluster.addresses)
        client.put_many({f"p:head/{i:05}": b"v" * 100 for i in range(3000)})
    for arguments in (["scan", "p:head/", "--values"], ["dump", "p:head/"], ["scan", "p:head/00000"]):
        scan = subprocess.Popen(
            helpers.command(*arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "AGI_DHT_CONNECT": cluster.connect},
        )
        assert scan.stdout is not None and scan.stderr is not None
        if "p:head/" in arguments:
            assert scan.stdout.readline()
        scan.stdout.close()
        err = scan.stderr.read()
        scan.stderr.close()
        assert scan.wait(WAIT_S) == 141 and err == b"", arguments


def test_a_disk_that_is_full_is_one_line(helpers: Any, cluster: Any) -> None:
    for arguments in (["put", "p:full", "v"], ["status"], ["--version"]):
        with Path("/dev/full").open("wb") as full:
            done = subprocess.run(
                helpers.command(*arguments),
                stdout=full,
                stderr=subprocess.PIPE,
                timeout=WAIT_S,
                env={**os.environ, "AGI_DHT_CONNECT": cluster.connect},
            )
        assert done.returncode == 1 and done.stderr == b"error: stdout: No space left on device\n", arguments


def test_an_interrupt_ends_a_command_with_130(helpers: Any, cluster: Any) -> None:
    load = subprocess.Popen(
        helpers.command("load", "-"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "AGI_DHT_CONNECT": cluster.connect},
    )
    assert load.stdin is not None
    load.stdin.write(b"".join(b'{"key": "p:int/%d", "value": "v"}\n' % i for i in range(1500)))
    load.stdin.flush()
    with SyncDHTClient() as client:
        client.connect(cluster.cluster.addresses)
        helpers.until(lambda: client.exists("p:int/0"))  # now it reads on and waits for more
    load.send_signal(signal.SIGINT)
    out, err = load.communicate(timeout=WAIT_S)
    assert load.returncode == 130 and out == b"" and b"Traceback" not in err


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["agi-dht", "lo"], {"load", "locate", "lock"}),
        (["agi-dht", "lock", "st"], {"status"}),
        (["agi-dht", "lock", "status", "--ti"], {"--timeout"}),
        (["agi-dht", "config", ""], {"check", "show"}),
        (["agi-dht", "get", "k", "--cons"], {"--consistency"}),
        (["agi-dht", "get", "k", "--consistency", ""], {"ONE", "QUORUM", "ALL", "LINEARIZABLE"}),
    ],
)
def test_the_tab_key(typed: list[str], offered: set[str]) -> None:
    environment = {
        **os.environ,
        "_AGI_DHT_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(typed),
        "COMP_CWORD": str(len(typed) - 1),
    }
    program = "import sys; from agi.core.dht.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=WAIT_S, env=environment)
    assert set(done.stdout.decode().split()) == offered, done.stderr


def test_serve_is_a_node(helpers: Any, tmp_path: Path) -> None:
    arguments = ["serve", "--port", "0", "--node-id", "alone", "--storage", "memory", "--set", "network.unix_socket="]
    node = subprocess.Popen(
        helpers.command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if not name.startswith("DHT_")},
    )
    try:
        assert node.stdout is not None
        announced = json.loads(node.stdout.readline())
        connect = f"127.0.0.1:{announced['port']}"
        assert helpers.process(connect, "put", "k", "v").code == 0
        assert helpers.process(connect, "get", "k").out == b"v"
    finally:
        node.terminate()
        code = node.wait(WAIT_S)
        assert node.stdout is not None
        node.stdout.close()
    assert code == 0
