"""Three of five processes are lost for ever: what an operator sees, orders and gets; who comes back is let go."""

from __future__ import annotations

import json
from pathlib import Path

from process_harness import ONE_CLOCK, node, options, until
from test_changes_processes import cli

from agi.core.dht.client import DHTClient
from agi.core.dht.local import LocalCluster
from agi.core.dht.types import Consistency

KEYS = [f"k{i}" for i in range(300)]
QUICK = {
    **ONE_CLOCK,
    "health.heartbeat_interval_ms": "200",
    "health.probe_timeout_ms": "100",
    "health.suspicion_mult": "2",
    "health.suspicion_max_mult": "2",
    "observability.log_format": "json",
}


async def test_three_of_five_are_lost_for_ever(tmp_path: Path) -> None:
    async with LocalCluster(5, tmp_path, settings=QUICK) as cluster:
        async with DHTClient(timeout=10) as client:
            await client.connect(cluster.addresses)
            await client.put_many({key: key.encode() for key in KEYS}, consistency=Consistency.ALL)
            held = {key: (await client.locate(key))["replicas"].keys() for key in KEYS}
        gone = {key for key in KEYS if held[key] <= {"n2", "n3", "n4"}}
        connect = ",".join(cluster.addresses[:2])

        code, said = await cli("topology", "recover", "--lost", "n2,n3,n4", "--confirm", "dht", "--connect", connect)
        assert code == 17 and "a majority of the voters" in said
        for i in (2, 3, 4):
            await cluster.kill(i)

        async def dead() -> bool:
            _, said = await cli("status", "--json", "--connect", connect)
            nodes = [node for node in json.loads(said)["nodes"] if node["reachable"]]
            return all(node["peers"][name]["status"] == "DEAD" for node in nodes for name in ("n2", "n3", "n4"))

        for _ in range(60):
            if await dead():
                break
        code, said = await cli("remove", "n4", "--connect", connect)
        assert code == 17 and "too few replicas are reachable to move their data" in said
        shown = ("remove", "n4", "--dry-run", "--json", "--connect", connect)
        code, said = await cli(*shown)
        assert code == 17 and "too few replicas are reachable to move their data" in said
        code, said = await cli(*shown, "--lose-data")
        plan = json.loads(said)
        assert code == 0 and plan["note"] == "n4 given up for lost" and plan["moves"], said
        code, said = await cli("topology", "recover", "--lost", "n2,n3", "--connect", connect)
        assert code == 17 and "n4: neither named as lost nor reached from n" in said
        code, said = await cli("topology", "recover", "--lost", "n2,n3,n4", "--connect", connect)
        assert code == 0 and "nothing was changed; to do it: --confirm dht" in said, said
        assert "generation 2, epoch 1001" in said and "lost for ever: n2, n3, n4" in said
        assert "survivors, all of whom have to consent: n0, n1" in said and "no replica left: they are gone" in said
        code, said = await cli("topology", "recover", "--lost", "n2,n3,n4", "--confirm", "yes", "--connect", connect)
        assert code == 10 and "confirmed by the cluster's name" in said
        code, said = await cli("topology", "--json", "--connect", connect)
        assert (json.loads(said)["generation"], json.loads(said)["epoch"]) == (1, 1)

        code, said = await cli("topology", "recover", "--lost", "n2,n3,n4", "--confirm", "dht", "--connect", connect)
        assert code == 0 and "done: recovered without n2, n3, n4" in said, said
        code, said = await cli("topology", "--connect", connect)
        assert code == 0 and "epoch 1002 of generation 2" in said
        code, said = await cli("wait-healthy", "--connect", connect)
        assert code == 0, said
        async with DHTClient(timeout=10) as client:
            await client.connect(cluster.addresses[:2])
            found = await client.get_many(KEYS, consistency=Consistency.ALL)
            assert {key for key, value in found.items() if value is None} == gone
            await client.put_many(dict.fromkeys(KEYS, b"new"))

        # a lost one is started after all: it is let go, whatever a majority of the old voters would be
        back = await cluster.start_node(2)
        assert await back.process.wait() == 0
        assert "recovered without n2, n3, n4" in cluster.log(2).read_text()
        assert (tmp_path / "n2.removed-1").is_dir() and not (tmp_path / "n2").exists()
        # started again it is a new node, and joins
        arguments = ["--peers", connect, "--node-id", "n2", *options(QUICK)]
        async with node(tmp_path, *arguments, name="n2", storage="rocksdb") as joiner:
            code, said = await cli("wait-healthy", "--connect", joiner.address, "--wait", "30")
            assert code == 0, said
            async with DHTClient(timeout=10) as client:
                await client.connect([joiner.address])
                members = {m["node_id"]: m["state"] for m in (await client.topology())["members"]}
                assert members == dict.fromkeys(("n0", "n1", "n2"), "normal")
                assert set((await client.get_many(KEYS, consistency=Consistency.ALL)).values()) == {b"new"}
            await until(lambda: joiner.process.returncode is None, "it runs")
