"""Processes that start, wait, stop and come back, in whatever order: what they say meanwhile and what they do."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from process_harness import WAIT_S, asking, held_ports, node

from agi.core.dht.client import DHTClient
from agi.core.dht.errors import NotReady, Unavailable, from_wire
from agi.core.dht.local import LocalCluster
from agi.core.dht.protocol.messages import Get, Put
from agi.core.dht.types import Consistency


async def whole(client: DHTClient) -> None:
    """Until every node is connected to all others: `ready` means no more than quorums."""

    async def missing() -> list[str]:
        status = await client.status()
        return [
            name
            for name, its in status.items()
            if not its.get("peers") or not all(p["connected"] for p in its["peers"].values())
        ]

    async with asyncio.timeout(WAIT_S):
        while await missing():  # noqa: ASYNC110  # the nodes are other processes
            await asyncio.sleep(0.02)


def is_ready(status: dict[str, Any]) -> bool:
    return bool(status["ready"])


@pytest.mark.parametrize("last", [0, 2])
async def test_nodes_wait_for_the_last_of_their_peers_and_say_so(tmp_path: Path, last: int) -> None:
    with held_ports(3) as ports:
        async with AsyncExitStack() as stack:

            async def up(i: int) -> Any:
                peers = ",".join(f"127.0.0.1:{port}" for port in ports if port != ports[i])
                arguments = ["--port", ports[i], "--peers", peers, "--set", "network.reuse_port=true"]
                arguments += ["--set", "observability.log_format=json"]
                running = await stack.enter_async_context(node(tmp_path, *arguments, name=f"n{i}"))
                return running, await stack.enter_async_context(asking(running.data_address))

            missing = f"127.0.0.1:{ports[last]}"
            early = [await up(i) for i in range(3) if i != last]
            for running, asker in early:
                status = await asker.until_status(lambda status: "waiting for 1 of 2" in status["waiting_for"])
                assert f"({missing}: " in status["waiting_for"] and "cannot connect" in status["waiting_for"]
                assert not status["ready"] and status["epoch"] == 0
                assert running.events("bootstrap_waiting")[-1]["reason"] == status["waiting_for"]
                assert running.events("topology_adopted") == []
                for request in (Put(1, Consistency.ONE, 5000, [b"k"], [b"v"]), Get(2, Consistency.ONE, 5000, [b"k"])):
                    error = from_wire(*(await asker.ask(request)).error)
                    assert isinstance(error, NotReady) and missing in str(error)
            late = await up(last)
            digests = set()
            for running, asker in [*early, late]:
                status = await asker.until_status(is_ready)
                assert status["epoch"] == 1 and status["keys"] == 0
                (adopted,) = running.events("topology_adopted")
                digests.add(adopted["digest"])
                assert len(adopted["members"]) == 3
            assert len(digests) == 1


async def test_a_restarted_node_resumes_its_topology_while_the_others_are_down(tmp_path: Path) -> None:
    async with LocalCluster(3, tmp_path) as cluster:
        async with DHTClient() as client:
            await client.connect(cluster.addresses)
            await whole(client)
            await client.put("k", b"v", consistency="ALL")
        assert [await cluster.stop_node(i) for i in range(3)] == [0, 0, 0]
        alone = await cluster.start_node(0)
        async with asking(alone.announced["data_address"]) as asker:
            status = await asker.query("status")
            assert status["epoch"] == 1 and status["boot"] == 2 and not status["ready"]
            assert status["waiting_for"].startswith("too few peers are connected for quorums: n1, n2 missing (")
            numbers = count(10)  # first it waits a moment for the others
            async with asyncio.timeout(WAIT_S):
                while (read := await asker.ask(Get(next(numbers), Consistency.ONE, 5000, [b"k"]))).error is not None:
                    assert type(from_wire(*read.error)) is NotReady
                    await asyncio.sleep(0.02)
            assert read.records[0].endswith(b"v")
            for request in (
                Put(2, Consistency.QUORUM, 5000, [b"k"], [b"w"]),
                Get(3, Consistency.QUORUM, 5000, [b"k"]),
            ):
                ((_, wire),) = (await asker.ask(request)).errors
                error = from_wire(*wire)
                assert type(error) is Unavailable and (error.needed, error.answered) == (2, 1)
        await cluster.start_node(1)
        await cluster.wait_ready()
        async with DHTClient() as client:  # two of three are a quorum again
            await client.connect(cluster.addresses[:2])
            assert await client.get("k") == b"v"
            await client.put("k", b"w")
            await cluster.start_node(2)
            await whole(client)
            assert await client.get("k", consistency="ALL") == b"w"


async def test_a_stop_and_a_kill_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """SIGTERM and SIGKILL in turn, each node once, under writes that go on."""
    async with LocalCluster(3, tmp_path) as cluster, DHTClient(retry_unknown=True, timeout=20) as client:
        await client.connect(cluster.addresses)
        await whole(client)
        written = 0
        for i, how in enumerate((cluster.stop_node, cluster.kill, cluster.stop_node)):
            await client.put_many({f"k{written + at}": b"v" for at in range(20)})
            await how(i)
            await client.put_many({f"k{written + 20 + at}": b"v" for at in range(20)})
            written += 40
            await cluster.start_node(i)
            await whole(client)
        found = await client.get_many([f"k{at}" for at in range(written)])
        assert set(found.values()) == {b"v"} and len(found) == written


async def test_a_node_that_comes_back_at_another_port_is_found_there(tmp_path: Path) -> None:
    """Its folder is the same, so it is the same node; the others learn its address by a decided epoch."""
    async with LocalCluster(3, tmp_path) as cluster, DHTClient() as client:
        await client.connect(cluster.addresses)
        await client.put("k", b"v", consistency="ALL")
        await cluster.kill(1)
        with held_ports(1) as (port,):
            arguments = ["--node-id", "n1", "--port", port, "--path", tmp_path / "n1"]
            arguments += [
                "--peers",
                f"{cluster.addresses[0]},{cluster.addresses[2]}",
                "--set",
                "network.reuse_port=true",
            ]
            async with node(tmp_path, *arguments, name="moved", storage="rocksdb"), asyncio.timeout(WAIT_S):
                while (topology := await client.topology())["epoch"] < 2:  # noqa: ASYNC110  # nobody tells
                    await asyncio.sleep(0.02)
                [moved] = [member for member in topology["members"] if member["node_id"] == "n1"]
                assert moved["address"] == f"127.0.0.1:{port}"
                await whole(client)
                assert await client.put("k", b"w", consistency="ALL") > 0
                await cluster.kill(0)  # the node that moved is needed now
                assert await client.get("k") == b"w"
                history = await client.history()
                assert [past["epoch"] for past in history] == [1, 2] and "n1 moved" in history[1]["note"]
