"""status, ring, locate: whole clusters, clusters with dead nodes, and clusters that have not formed."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pytest

from agi.core.dht.cli import asking
from agi.core.dht.errors import Unavailable

PLACES = {
    0: {"node.rack": "r1", "node.zone": "z1"},
    1: {"node.rack": "r2", "node.zone": "z1", "node.weight": "2"},
    2: {"node.zone": "z2"},
    3: {"node.zone": "z2"},
}


def test_the_state_of_every_node(dht: Any, cluster: Any) -> None:
    told = dht("status", "--json")
    assert told.code == 0 and told.err == ""
    shown = told.json
    assert shown["ready"] is True and shown["cluster"] == "dht" and shown["epoch"] == 1
    assert [node["node_id"] for node in shown["nodes"]] == ["n0", "n1", "n2"]
    for node, address in zip(shown["nodes"], cluster.cluster.addresses, strict=True):
        assert node["address"] == address and node["reachable"] and node["error"] is None
        assert node["ready"] and node["waiting_for"] == "" and node["storage"] == "memory" and node["epoch"] == 1
        assert node["keys_exact"] is True and node["keys"] >= 0 and node["bytes"] >= 0 and node["boot"] >= 1
        assert all(peer == {"connected": True, "status": "ALIVE", "error": ""} for peer in node["peers"].values())
        assert len(node["peers"]) == 2
    assert (shown["failures_tolerated"], shown["unchecked"]) == (1, [])
    assert dht("wait-healthy", "--json").json == {"healthy": True, "unchecked": [], "too_few": []}
    assert dht("status", "--json").json["missing"] == []
    lines = dht("status").text.splitlines()
    columns = [
        "node",
        "address",
        "state",
        "storage",
        "keys",
        "bytes",
        "epoch",
        "boot",
        "hints",
        "repaired",
        "tombstones",
        "peers",
    ]
    assert lines[0].split() == columns
    assert all("ready" in line and line.endswith("2/2") for line in lines[1:4])
    assert lines[4:] == ["failures tolerated now: 1 (quorums are 2 of 3 replicas)", "replication is whole"]
    one = dht("status", "--connect", f"127.0.0.1:1,{cluster.cluster.addresses[2]}")
    assert one.code == 0 and one.text.splitlines()[1].startswith("n0")
    assert one.err.startswith("nobody answers at 127.0.0.1:1: ") and one.err.count("\n") == 1


def test_where_a_key_lies(dht: Any) -> None:
    dht("put", "c:1", "value", "--ttl", "1000")
    version = dht("get", "c:1", "--json").json["version"]
    dht("put", "c:2", "value")
    dht("delete", "c:2")
    shown = dht("locate", "c:1", "--json").json
    assert shown["key"] == "c:1" and 0 <= shown["token"] < 1 << 64
    assert sorted(replica["node_id"] for replica in shown["replicas"]) == ["n0", "n1", "n2"]
    held = [replica for replica in shown["replicas"] if replica["state"] == "live"]
    assert len(held) >= 2 and all(r["version"] == version and r["bytes"] == 45 and r["expires_at"] for r in held)
    text = dht("locate", "c:1").text
    assert text.startswith(f"token {shown['token']}\n") and str(version) in text and " UTC" in text
    states = [replica["state"] for replica in dht("locate", "c:2", "--json").json["replicas"]]
    assert states.count("tombstone") >= 2
    assert {r["state"] for r in dht("locate", "c:none", "--json").json["replicas"]} == {"absent"}


def test_the_shares_of_a_ring(run_cli: Any, helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with helpers.local_cluster(4, tmp_path, per_node=PLACES) as started:
        monkeypatch.setenv("AGI_DHT_CONNECT", started.connect)
        shown = run_cli("ring", "--json").json
        assert (shown["cluster"], shown["epoch"], shown["factor"], shown["replicas"]) == ("dht", 1, 3, 3)
        nodes = {node["node_id"]: node for node in shown["nodes"]}
        assert sum(node["primary_share"] for node in nodes.values()) == pytest.approx(1)
        assert sum(node["replica_share"] for node in nodes.values()) == pytest.approx(3)
        assert nodes["n1"]["virtual_nodes"] == 300 and nodes["n1"]["weight"] == 2
        assert nodes["n1"]["primary_share"] == pytest.approx(0.4, abs=0.08)
        assert (nodes["n0"]["rack"], nodes["n0"]["zone"], nodes["n2"]["rack"]) == ("r1", "z1", "")
        assert all(node["reachable"] and node["state"] == "normal" for node in nodes.values())
        lines = run_cli("ring").text.splitlines()
        assert lines[0].split()[:3] == ["node", "address", "state"] and len(lines) == 5
        assert lines[2].split()[-4:] == ["300", "2", "r2", "z1"]
        assert f"{nodes['n1']['primary_share']:.1%}" in lines[2] and f"{nodes['n1']['replica_share']:.1%}" in lines[2]
        told = run_cli("topology", "--json").json
        assert (told["generation"], told["epoch"], len(told["voters"])) == (1, 1, 3)
        assert {m["node_id"] for m in told["members"] if m["voter"]} == set(told["voters"])
        assert {m["status"] for m in told["members"]} == {"ALIVE"}
        assert [(past["epoch"], past["note"]) for past in told["history"]] == [(1, "formed")]
        text = run_cli("topology").text
        assert "epoch 1 of generation 1, 3 replicas" in text
        assert text.splitlines()[-1].split() == ["1", "at", "formation", "formed"]
        later = [{**told["history"][0], "epoch": 7, "decided_ms": 1, "note": "done: n3 leaves"}]
        with monkeypatch.context() as forgetful:
            forgetful.setattr("agi.core.dht.cli.asking.histories", lambda *_: later)
            lines = run_cli("topology").text.splitlines()
        assert lines[-2].split() == ["7", "1970-01-01", "00:00:00", "UTC", "done:", "n3", "leaves"]
        assert lines[-1] == "nobody who was reached remembers what was before epoch 7"
        # the shares are those of real keys: `locate` names three replicas, primary first
        first = [run_cli("locate", f"r:{i}", "--json").json["replicas"] for i in range(3)]
        assert all(len({replica["node_id"] for replica in replicas}) == 3 for replicas in first)


def test_the_history_is_what_all_nodes_remember_together(monkeypatch: pytest.MonkeyPatch) -> None:
    def past(epoch: int, generation: int = 1) -> dict[str, Any]:
        return {"generation": generation, "epoch": epoch, "digest": f"d{epoch}"}

    told: dict[str, Any] = {
        "old": [past(1), past(2), past(4)],
        "newcomer": [past(4), past(1005, 2)],
        "dead": Unavailable("it does not answer"),
        "away for a while": [past(2), past(3)],
    }

    async def ask(address: str, what: str, timeout_s: float) -> Any:
        assert (what, timeout_s) == ("history", 3.0)
        return told[address]

    monkeypatch.setattr(asking, "_ask", ask)
    assert [each["epoch"] for each in asking.histories(list(told), 3.0)] == [1, 2, 3, 4, 1005]
    assert asking.histories(["dead"], 3.0) == []


def test_commands_while_nodes_die(run_cli: Any, helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with helpers.local_cluster(3, tmp_path) as started:
        monkeypatch.setenv("AGI_DHT_CONNECT", started.connect)
        assert run_cli("put", "k", "value").code == 0
        started.run(started.cluster.kill(0))
        seconds = []
        for _ in range(3):
            began = time.monotonic()
            assert run_cli("get", "k") == (0, b"value", "")  # nothing of the client's troubles shows
            seconds.append(time.monotonic() - began)
        assert min(seconds) < 0.9  # who refuses is not waited for as who is silent is, which takes 1 s

        def n0_is_missed() -> Any:
            told = run_cli("status", "--json")
            return (
                told
                if not any(node.get("peers", {}).get("n0", {}).get("connected") for node in told.json["nodes"])
                else None
            )

        told = helpers.until(n0_is_missed)
        assert told.code == 13 and told.json["ready"] is False and told.json["epoch"] == 1 and told.err == ""
        dead, *alive = told.json["nodes"]
        assert dead["node_id"] == "n0" and not dead["reachable"] and "cannot connect" in dead["error"]
        assert dead["address"] == started.cluster.addresses[0]
        assert all(node["ready"] for node in alive)
        assert all(node["peers"]["n0"]["connected"] is False and node["peers"]["n0"]["error"] for node in alive)
        lines = run_cli("status").text.splitlines()
        assert lines[1].split() == ["n0", started.cluster.addresses[0], "unreachable"]
        assert lines[2].endswith("1/2") and any(line.startswith("n1 to n0: ") for line in lines[4:])
        assert lines[4] == "failures tolerated now: 0 (quorums are 2 of 3 replicas)"
        assert lines[5] == "replication is not whole:" and lines[6].startswith("n0 does not answer: ")

        def everybody_says_the_same() -> bool:
            """In the end: what a node holds of the dead one changes meanwhile."""
            here = run_cli("status", "--connect", started.cluster.addresses[2], "--json").json["nodes"]
            return bool(here == run_cli("status", "--json").json["nodes"])

        assert helpers.until(everybody_says_the_same)
        assert "normal, unreachable" in run_cli("ring").text.splitlines()[1]
        held = {r["node_id"]: r for r in run_cli("locate", "k", "--json").json["replicas"]}
        assert held["n0"]["state"] == "unreachable" and held["n1"]["state"] == "live"
        assert "unreachable: " in run_cli("locate", "k").text
        nobody = run_cli("status", "--connect", started.cluster.addresses[0])
        assert nobody.code == 23 and nobody.out == b"" and nobody.err.startswith("error: ")

        started.run(started.cluster.kill(1))
        for arguments in (["get", "k"], ["put", "k", "v"], ["delete", "k"], ["scan"], ["dump"]):
            failed = run_cli(*arguments, "--timeout", "1", stdin=b"")
            assert failed.code in (12, 13, 26) and failed.out == b"" and failed.err.startswith("error: ")
            assert "(needed 2 replicas, " in failed.err, arguments
        lines_in = b"".join(b'{"key": "l%d", "value": "v"}\n' % i for i in range(1500))
        failed = run_cli("load", "-", "--json", "--timeout", "1", stdin=lines_in)
        assert failed.code == 26 and failed.json["loaded"] == 0 and failed.json["stopped"]
        assert [each["source"] for each in failed.json["failed"]] == [f"-:{i + 1} (l{i})" for i in range(1000)]
        told = run_cli("status")
        assert told.code == 13 and "waiting" in told.text.splitlines()[3] and "n2 is not ready: " in told.text


def test_a_cluster_that_has_not_formed(
    run_cli: Any, helpers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with helpers.local_cluster(2, tmp_path, start=1) as started:
        monkeypatch.setenv("AGI_DHT_CONNECT", started.connect)
        told = run_cli("status", "--json")
        assert told.code == 13 and told.json["cluster"] is None and told.json["epoch"] == 0
        assert told.json["failures_tolerated"] is None and told.json["missing"] == []
        waiting, missing = told.json["nodes"]
        assert waiting["node_id"] == "n0" and waiting["reachable"] and not waiting["ready"] and waiting["waiting_for"]
        assert missing["node_id"] == "" and missing["address"] == started.cluster.addresses[1]
        assert "n0 waits: " in run_cli("status").text
        failed = run_cli("get", "k", "--timeout", "0.5")
        assert failed.code in (13, 23) and failed.out == b"" and failed.err.startswith("error: ")


def test_an_address_where_nothing_is_said_is_waited_for_no_longer_than_asked(dht: Any, cluster: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        alone = dht("status", "--connect", address, "--timeout", "0.3")
        assert alone.code in (12, 23) and alone.out == b"" and address in alone.err
        beside = dht("status", "--connect", f"{address},{cluster.cluster.addresses[0]}", "--timeout", "1")
        assert beside.code == 0 and beside.err.startswith(f"nobody answers at {address}: ")
