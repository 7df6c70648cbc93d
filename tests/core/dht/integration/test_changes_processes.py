"""Processes that join a running cluster and leave it, under load, by the commands that users have."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from pathlib import Path

from process_harness import ONE_CLOCK, WAIT_S, environment, node, options, until

from agi.core.dht.client import DHTClient
from agi.core.dht.errors import ChangeRefused, DHTError, OutcomeUnknown
from agi.core.dht.local import LocalCluster
from agi.core.dht.types import Consistency

VALUES = {f"k{i}": b"v" * 200 for i in range(1000)}


async def cli(*arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "agi.core.dht.cli",
        *arguments,
        env=environment(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode()


class Load:
    """Callers that put and get until they are told to stop; what failed, and when its calls had begun."""

    def __init__(self, client: DHTClient, callers: int) -> None:
        self.written: dict[str, bytes] = {}
        self.failures: list[tuple[float, DHTError]] = []
        self._client = client
        self._stop = False
        self._tasks = [asyncio.create_task(self._call(number)) for number in range(callers)]

    async def _call(self, number: int) -> None:
        turn = 0
        while not self._stop:
            turn += 1
            key, value = f"w{number}:{turn % 50}", str(turn).encode()
            began = time.monotonic()
            try:
                await self._client.put(key, value)
                self.written[key] = value
                assert await self._client.get(key) == value
            except DHTError as error:
                self.written.pop(key, None)
                self.failures.append((began, error))

    async def end(self) -> None:
        self._stop = True
        await asyncio.gather(*self._tasks)


async def dead(client: DHTClient, name: str) -> None:
    """Returns once it may be replaced."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                await client.plan("replace", name)
            except ChangeRefused:
                await asyncio.sleep(0.05)
            else:
                return


async def test_a_process_joins_under_load_and_leaves_again_and_one_is_replaced(tmp_path: Path) -> None:
    settings = {**ONE_CLOCK, "health.heartbeat_interval_ms": "200", "health.probe_timeout_ms": "100"}
    async with LocalCluster(3, tmp_path, settings=settings) as cluster, DHTClient(timeout=10) as client:
        await client.connect(cluster.addresses)
        await client.put_many(VALUES, consistency=Consistency.ALL)
        load = Load(client, 8)
        connect = ",".join(cluster.addresses)
        arguments = ("--peers", connect, *options(settings))
        async with node(tmp_path, *arguments, "--node-id", "n3", name="n3", storage="rocksdb") as joiner:
            assert await cli("wait-healthy", "--connect", joiner.address, "--wait", "30") == (
                0,
                "replication is whole\n",
            )
            members = {member["node_id"]: member["state"] for member in (await client.topology())["members"]}
            assert members == dict.fromkeys(("n0", "n1", "n2", "n3"), "normal")
            located = await client.locate("k0")
            assert all(held["state"] == "live" for held in located["replicas"].values())
            code, said = await cli("topology", "--connect", joiner.address)
            assert code == 0 and said.splitlines()[-1].split() == ["1", "at", "formation", "formed"], said
            code, said = await cli("leave", "n3", "--connect", connect)
            assert code == 0, said
            assert "done: n3 leaves" in said
            assert await joiner.ended() == 0
        assert load.failures == []
        assert not (tmp_path / "n3").exists()
        assert (tmp_path / "n3.removed-1").is_dir()

        await cluster.kill(2)
        await dead(client, "n2")
        known = time.monotonic()
        code, said = await cli("replace", "n2", "--dry-run", "--connect", connect)
        assert code == 0 and said.startswith("(new node) replaces n2: ") and "agi-dht serve" not in said, said
        async with node(tmp_path, *arguments, "--node-id", "n4", "--replace", "n2", name="n4") as joiner:
            after = await client.wait_replaced("n2", timeout=30)
            assert [member["node_id"] for member in after["members"]] == ["n0", "n1", "n4"]
            await asyncio.sleep(0.3)  # under the new sets
            await load.end()
            assert [error for began, error in load.failures if began > known] == []
            assert {type(error) for _, error in load.failures} <= {OutcomeUnknown}  # under way at the kill
            assert await client.get_many(VALUES, consistency=Consistency.ALL) == VALUES
            assert await client.get_many(load.written, consistency=Consistency.ALL) == load.written
            await client.wait_healthy(30)
            assert await cli("leave", "n1", "--connect", connect) == (
                17,
                "error: without n1 there are 2 nodes for 3 replicas: add one first, or force it\n",
            )


async def member_of(client: DHTClient, name: str) -> set[str]:
    """The members, once this node is one and no change is under way."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(DHTError):  # whoever was asked is no member yet
                topology = await client.topology()
                names = {member["node_id"] for member in topology["members"]}
                if name in names and not topology["in_transition"]:
                    return names
            await asyncio.sleep(0.1)


async def test_a_joiner_whose_change_another_node_spoils_asks_again_and_joins(tmp_path: Path) -> None:
    """Nobody does anything: n3 dies amid the join, is evicted, and the process that joins begins anew."""
    settings = {
        **ONE_CLOCK,
        "health.heartbeat_interval_ms": "200",
        "health.probe_timeout_ms": "100",
        "health.suspicion_mult": "2",
        "health.suspicion_max_mult": "2",
        "migration.join_timeout_ms": "2000",
        "migration.eviction_timeout_ms": "3000",
    }
    async with LocalCluster(5, tmp_path, settings=settings) as cluster, DHTClient(timeout=10) as client:
        await client.connect(cluster.addresses[:3])
        await client.put_many(VALUES, consistency=Consistency.ALL)
        slow = (*options(ONE_CLOCK), "--set", "migration.bytes_per_s=40000", "--set", "observability.log_format=json")
        joining = ("--peers", ",".join(cluster.addresses), "--node-id", "n5", *slow)
        async with node(tmp_path, *joining, name="n5", storage="rocksdb") as joiner:
            await until(lambda: joiner.events("topology_adopted"), "the transition")
            await cluster.kill(3)
            await until(lambda: joiner.events("asks_again"), "a second life")
            assert joiner.events("asks_again")[0]["address"] == joiner.address
            assert (tmp_path / "n5.removed-1").is_dir()
            assert await member_of(client, "n5") == {"n0", "n1", "n2", "n4", "n5"}
            assert await client.get_many(VALUES, consistency=Consistency.ALL) == VALUES
            assert await joiner.end() == 0
