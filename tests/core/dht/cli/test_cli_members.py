"""Members: plans, weights, replacements and recoveries that are only shown, or refused; for people and as JSON."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

SLOW = {"migration.bytes_per_s": "1024"}
"""A change that moves the data of `filled` takes a minute."""


def filled(run_cli: Any) -> None:
    lines = b"".join(b'{"key": "m%d", "value": "%s"}\n' % (i, b"v" * 400) for i in range(200))
    assert run_cli("load", "-", stdin=lines).code == 0


def test_what_one_more_node_would_get(dht: Any) -> None:
    told = dht("plan", "--weight", "2", "--rack", "r1", "--json")
    assert told.code == 0 and told.err == ""
    plan = told.json
    assert plan["note"] == "(new node) joins" and plan["moves"].keys() == {"(new node)"} and plan["arcs"] > 100
    share = plan["shares"]["(new node)"]
    assert share["before"] == 0 and share["ideal"] == 1.0 and share["after"] > 0.5
    assert sum(node["after"] for node in plan["shares"].values()) == pytest.approx(3)
    lines = dht("plan").text.splitlines()
    assert lines[0].startswith("(new node) joins: ") and lines[1].startswith("node that gains")
    assert any(line.split()[:1] == ["n0"] and line.endswith("75.0%") for line in lines)
    for weight in ("0", "-1", "nan", "1e9"):
        told = dht("plan", "--weight", weight)
        assert (told.code, told.out) == (10, b"") and "a weight is above 0" in told.err, weight


def test_a_weight(dht: Any) -> None:
    before = dht("topology", "--json").json
    plan = dht("weight", "n1", "2", "--dry-run", "--json").json
    assert plan["note"] == "n1 gets weight 2 instead of 1" and plan["moves"] == {}  # each holds everything
    assert dht("weight", "n1", "2", "--dry-run").text.startswith("n1 gets weight 2 instead of 1: 0 arcs")
    assert dht("topology", "--json").json["epoch"] == before["epoch"]
    for arguments, code, said in (
        (["n9", "2"], 10, "no node 'n9'"),
        (["n1", "0"], 10, "a weight is above 0"),
        (["n1", "much"], 2, "Invalid value for 'WEIGHT'"),
    ):
        told = dht("weight", *arguments)
        assert told.code == code and said in told.err and told.out == b""


def test_what_lives_is_not_replaced(dht: Any) -> None:
    for arguments in ([], ["--dry-run"]):
        told = dht("replace", "n1", *arguments)
        assert told.code == 17 and told.out == b"" and "n1, which is not held to be dead" in told.err
    told = dht("replace", "n9")
    assert told.code == 10 and "'n9', which is no member" in told.err


def test_a_recovery_where_nothing_is_lost(dht: Any) -> None:
    for arguments in (["--lost", "n1,n2"], ["--lost", "n1,n2", "--confirm", "dht"]):
        told = dht("topology", "recover", *arguments)
        assert told.code in (10, 17) and told.out == b""
        assert "reaches a majority of the voters" in told.err or "ask a node that survives" in told.err
    told = dht("topology", "recover", "--lost", " , ")
    assert told.code == 10 and "nobody is named as lost" in told.err
    assert dht("topology", "recover").code == 2
    shown = dht("topology", "--json").json
    assert shown["generation"] == 1 and shown["lost"] == [] and shown["in_transition"] is False
    nodes = dht("status", "--json").json["nodes"]
    assert {node["generation"] for node in nodes} == {1}


def test_a_leave_that_is_cancelled_fails(
    run_cli: Any, helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with helpers.local_cluster(4, tmp_path, per_node=dict.fromkeys(range(4), SLOW)) as started:
        monkeypatch.setenv("AGI_DHT_CONNECT", started.connect)
        filled(run_cli)
        told = run_cli("leave", "n3", "--dry-run", "--json")
        assert told.code == 0 and told.json["note"] == "n3 leaves" and told.json["shares"]["n3"]["after"] == 0
        assert sum(move["keys"] for move in told.json["moves"].values()) == pytest.approx(150, abs=75)
        assert run_cli("leave", "n3", "--dry-run").text.startswith("n3 leaves: ")
        told = run_cli("cancel")
        assert told.code == 0 and told.err == "no change is under way: nothing was undone\n"
        assert told.text.splitlines()[0] == "epoch 1: formed"

        leaving = subprocess.Popen(
            helpers.command("leave", "n3", "--connect", started.connect), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            helpers.until(lambda: run_cli("topology", "--json").json["in_transition"])
            told = run_cli("leave", "n2")
            assert told.code == 17 and told.err == "error: another change is under way: n3 leaves\n"
            told = run_cli("cancel", "--json")
            assert told.code == 0 and told.err == "" and told.json["note"] == "given up by order: n3 leaves"
            out, err = leaving.communicate(timeout=20)
        finally:
            leaving.kill()
        assert (leaving.returncode, out) == (17, b"")
        *progress, error = err.decode().splitlines()
        assert error == "error: n3 is still a member at epoch 3 (given up by order: n3 leaves)"
        assert all(line.startswith("n3 leaves: ") for line in progress)
        assert {member["state"] for member in run_cli("topology", "--json").json["members"]} == {"normal"}


def test_a_node_leaves_by_force_and_status_says_what_is_missing(
    run_cli: Any, helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with helpers.local_cluster(3, tmp_path) as started:
        monkeypatch.setenv("AGI_DHT_CONNECT", ",".join(started.cluster.addresses[:2]))
        told = run_cli("leave", "n2")
        assert told.code == 17 and "2 nodes for 3 replicas: add one first, or force it" in told.err
        told = run_cli("leave", "n2", "--force")
        assert told.code == 0 and told.text.splitlines()[0] == "epoch 3: done: n2 leaves"
        too_few = "2 of 3 replicas exist: 1 more node is needed"
        told = run_cli("wait-healthy", "--wait", "30")
        assert (told.code, told.err) == (0, f"{too_few}\n")
        assert told.text == "each node has all, but there are too few nodes\n"
        assert run_cli("wait-healthy", "--json").json == {"healthy": True, "unchecked": [], "too_few": [too_few]}
        told = run_cli("status")
        assert told.code == 0 and told.text.splitlines()[-2:] == ["replication is not whole:", too_few]
