"""Members: plans, weights, replacements and recoveries that are only shown, or refused; for people and as JSON."""

from __future__ import annotations

from typing import Any

import pytest


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
        assert (told.code, told.out) == ((10, b"") if weight != "0" else (0, told.out)), weight


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
    told = dht("replace", "n1")
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
