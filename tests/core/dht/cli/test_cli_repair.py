"""repair: replicas compared by order of an operator."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest


def test_equal_replicas_are_compared_for_next_to_nothing(dht: Any) -> None:
    for i in range(20):
        dht("put", f"r:{i}", "value", "--consistency", "ALL")
    told = dht("repair", "--json")
    assert told.code == 0 and told.err == ""
    shown = told.json
    assert shown["complete"] is True and shown["seconds"] >= 0 and shown["ranges"] > 3 * 2 * 100
    assert [node["node_id"] for node in shown["nodes"]] == ["n0", "n1", "n2"]
    for node in shown["nodes"]:
        assert node["error"] is None and node["failed"] == {} and node["peers"] == node["done"] == 2
    text = dht("repair", "--node", "n1").text.splitlines()
    assert text[0].split()[:3] == ["node", "peers", "ranges"] and text[1].split()[:2] == ["n1", "2/2"]
    assert "differences found in " in text[-1]
    assert dht("status").text.splitlines()[1].split()[9] != "-"  # it had been compared with all


def test_how_far_a_repair_is_is_told_on_stderr(dht: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agi.core.dht.cli.repair.PROGRESS_S", 0.0)
    told = dht("repair")
    assert told.code == 0
    lines = told.err.splitlines()
    assert lines and all(re.fullmatch(r"n[012]: [012] of 2 peers, \d+ differences so far", line) for line in lines)


def test_a_part_of_the_ring(dht: Any) -> None:
    whole = dht("repair", "--node", "n0", "--json").json
    part = dht("repair", "--node", "n0", "--range", "0x0-0xFFFFFFFFFFFFFFF", "--json").json
    assert 0 < part["ranges"] < whole["ranges"] / 8


@pytest.mark.parametrize("range_", ["5", "5-4", "a-b", "0-0x10000000000000000", "-1-5", "1--5"])
def test_ranges_that_are_none(dht: Any, range_: str) -> None:
    told = dht("repair", f"--range={range_}")
    assert told.code == 10 and told.out == b"" and "--range takes FIRST-LAST" in told.err


def test_a_node_that_is_none(dht: Any) -> None:
    told = dht("repair", "--node", "n9")
    assert told.code == 10 and "no node 'n9'" in told.err


def test_what_could_not_be_repaired_is_told(
    run_cli: Any, helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with helpers.local_cluster(3, tmp_path) as started:
        monkeypatch.setenv("AGI_DHT_CONNECT", started.connect)
        started.run(started.cluster.kill(2))
        told = run_cli("repair", "--json")
        assert told.code == 26 and told.json["complete"] is False
        first, second, dead = told.json["nodes"]
        assert list(first["failed"]) == list(second["failed"]) == ["n2"] and "n2" in first["failed"]["n2"]
        assert first["done"] == 2 and dead["node_id"] == "n2" and dead["error"]
        lines = run_cli("repair").text.splitlines()
        assert any(line.startswith("n0 with n2: ") for line in lines) and any(line.startswith("n2: ") for line in lines)
