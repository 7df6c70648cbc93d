"""What an operator does with single nodes, as processes: weigh, replace, leave at SIGTERM; and what is refused."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from process_harness import ANY_PORTS, ONE_CLOCK, asking, node, options, refused, until
from test_changes_processes import cli
from test_recovery_processes import QUICK

from agi.core.dht.client import DHTClient
from agi.core.dht.errors import DHTError, FolderMismatch
from agi.core.dht.local import LocalCluster
from agi.core.dht.types import Consistency

KEYS = [f"k{i}" for i in range(300)]
JSON_LOG = ("--set", "observability.log_format=json")


async def topology(connect: str) -> dict[str, Any]:
    code, said = await cli("topology", "--json", "--connect", connect)
    assert code == 0, said
    found: dict[str, Any] = json.loads(said)
    return found


async def test_a_node_is_weighed_and_leaves_when_it_is_told_to_stop(tmp_path: Path) -> None:
    async with LocalCluster(3, tmp_path, settings=ONE_CLOCK) as cluster, DHTClient(timeout=10) as client:
        await client.connect(cluster.addresses)
        await client.put_many({key: key.encode() for key in KEYS}, consistency=Consistency.ALL)
        connect = ",".join(cluster.addresses)
        code, said = await cli("plan", "--connect", connect)
        assert code == 0 and said.startswith("(new node) joins: ") and "75.0%" in said
        failures: list[DHTError] = []
        stop = False

        async def load(number: int) -> None:
            turn = 0
            while not stop and not failures:
                turn += 1
                try:
                    await client.put(f"w{number}", b"%d" % turn)
                    assert await client.get(f"w{number}") == b"%d" % turn
                except DHTError as error:
                    failures.append(error)

        workers = [asyncio.create_task(load(number)) for number in range(4)]
        arguments = ("--peers", connect, "--node-id", "n3", "--leave", *JSON_LOG, *options(ONE_CLOCK))
        async with node(tmp_path, *arguments, name="n3", storage="rocksdb") as joiner:
            assert (await cli("wait-healthy", "--connect", joiner.address))[0] == 0
            code, said = await cli("weight", "n3", "0.5", "--dry-run", "--json", "--connect", connect)
            plan = json.loads(said)
            assert plan["note"] == "n3 gets weight 0.5 instead of 1" and plan["shares"]["n3"]["ideal"] < 0.5
            assert (await topology(connect))["epoch"] == 3
            code, said = await cli("weight", "n3", "0.5", "--connect", connect)
            assert code == 0 and "done: n3 gets weight 0.5 instead of 1" in said, said
            assert (await topology(connect))["epoch"] == 5
            joiner.send(signal.SIGTERM)
            assert await joiner.ended() == 0
            assert [event["epoch"] for event in joiner.events("leaving")] == [6]
        stop = True
        await asyncio.gather(*workers)
        assert failures == []
        assert (tmp_path / "n3.removed-1").is_dir()
        assert [m["node_id"] for m in (await topology(connect))["members"]] == ["n0", "n1", "n2"]
        assert await client.get_many(KEYS, consistency=Consistency.ALL) == {key: key.encode() for key in KEYS}


async def test_a_node_that_cannot_leave_says_so_and_stops(tmp_path: Path) -> None:
    async with node(tmp_path, "--leave", *JSON_LOG, storage="rocksdb") as alone:
        async with asking(alone.data_address) as asker:
            await asker.until_status(lambda status: status["ready"])
        alone.send(signal.SIGTERM)
        assert await alone.ended() == 0
        [said] = alone.events("not_left")
        assert "is the only node" in said["reason"]
    assert (tmp_path / "n").is_dir()  # it comes back as who it was
    async with node(tmp_path, "--leave", "--peers", "127.0.0.1:1", *JSON_LOG, name="m") as waiting:
        waiting.send(signal.SIGTERM)
        assert await waiting.ended() == 0
        assert waiting.events("not_left")[0]["reason"] == "it belongs to no cluster yet"


async def test_a_leave_that_does_not_come_to_its_end_is_bounded(tmp_path: Path) -> None:
    async with LocalCluster(3, tmp_path, settings=ONE_CLOCK) as cluster:
        connect = ",".join(cluster.addresses)
        slow = ("--leave", "--leave-timeout", "1.5", "--set", "migration.bytes_per_s=1024", *options(ONE_CLOCK))
        async with node(tmp_path, "--peers", connect, "--node-id", "n3", *slow, *JSON_LOG, name="n3") as joiner:
            assert (await cli("wait-healthy", "--connect", joiner.address))[0] == 0
            for i in range(2):
                cluster.node(i).process.send_signal(signal.SIGSTOP)  # no majority of the voters answers
            joiner.send(signal.SIGTERM)
            assert await joiner.ended() == 0
            assert "not let go within 1.5 s" in joiner.events("not_left")[0]["reason"]
            for i in range(2):
                cluster.node(i).process.send_signal(signal.SIGCONT)


async def test_a_dead_node_is_replaced_and_then_a_wiped_one_by_itself(tmp_path: Path) -> None:
    async with LocalCluster(3, tmp_path, settings=QUICK) as cluster, DHTClient(timeout=10) as client:
        await client.connect(cluster.addresses[:2])
        await client.put_many({key: key.encode() for key in KEYS}, consistency=Consistency.ALL)
        connect = ",".join(cluster.addresses[:2])
        code, said = await cli("replace", "n2", "--connect", connect)
        assert code == 17 and "n2, which is not held to be dead" in said
        arguments = ["--peers", connect, "--replace", "n2", *JSON_LOG, *options(QUICK)]
        async with node(tmp_path, *arguments, "--node-id", "n3", name="n3", storage="rocksdb") as joiner:
            async with asking(joiner.data_address) as asker:
                await asker.until_status(lambda s: "n3 is to replace n2, which is not held" in s["waiting_for"])
                assert (await topology(connect))["epoch"] == 1
                await cluster.kill(2)
                await asker.until_status(lambda status: status["ready"])
            code, said = await cli("wait-healthy", "--connect", joiner.address)
            assert code == 0, said
            found = await topology(connect)
            assert found["epoch"] == 3 and found["history"][-1]["note"] == "done: n3 replaces n2"
            assert await client.get_many(KEYS, consistency=Consistency.ALL) == {key: key.encode() for key in KEYS}
            await joiner.end(signal.SIGKILL)

        # its disk is replaced, too; first it is started as if nothing had happened
        shutil.rmtree(tmp_path / "n3")
        async with node(tmp_path, "--peers", connect, "--node-id", "n3", name="n3", storage="rocksdb") as wiped:
            async with asking(wiped.data_address) as asker:
                status = await asker.until_status(lambda s: "a disk that the cluster does not know" in s["waiting_for"])
                assert "start it with `--replace n3`" in status["waiting_for"] and status["epoch"] == 0
            assert (await topology(connect))["epoch"] == 3

        async def is_dead() -> bool:
            return (await cli("replace", "n3", "--connect", connect))[0] == 0

        while not await is_dead():  # noqa: ASYNC110  # the nodes are other processes
            await asyncio.sleep(0.1)
        code, said = await cli("replace", "n3", "--json", "--connect", connect)
        plan = json.loads(said)
        assert plan["command"][:6] == ["agi-dht", "serve", "--replace", "n3", "--peers", connect]
        assert plan["moves"]["(new node)"]["share"] == 1.0
        waits = asyncio.create_task(cli("replace", "n3", "--wait", "60", "--connect", connect))
        arguments = ["--peers", connect, "--replace", "n3", "--node-id", "n3", *options(QUICK)]
        async with node(tmp_path, *arguments, name="n3", storage="rocksdb") as anew:
            code, said = await waits
            assert code == 0 and "done: n3 joins in its own place, with a new disk" in said, said
            code, said = await cli("wait-healthy", "--connect", anew.address)
            assert code == 0, said
            assert await client.get_many(KEYS, consistency=Consistency.ALL) == {key: key.encode() for key in KEYS}


def is_waiting(said: str, status: dict[str, Any]) -> bool:
    return said in status["waiting_for"]


async def test_nodes_that_may_not_join_are_told_why_and_change_nothing(tmp_path: Path) -> None:
    async with LocalCluster(3, tmp_path, settings=QUICK) as cluster:
        connect = ",".join(cluster.addresses)
        cases: list[tuple[list[str], str]] = [
            (["--node-id", "other", "--set", "cluster.name=other"], "cluster is 'other' at other and 'dht' at n"),
            (["--node-id", "n1"], "n1 came with a disk that the cluster does not know"),
            (["--node-id", "lost", "--advertise", "127.0.0.1:1"], "cannot connect to 127.0.0.1:1"),
            (["--node-id", "n3", "--replace", "n9"], "n3 is to replace 'n9', which is no member"),
            (["--node-id", "n3", "--replace", "n1"], "n3 is to replace n1, which is not held to be dead"),
            (["--node-id", "n1", "--replace", "n1"], "n1 is to replace n1, which is not held to be dead"),
        ]
        for number, (arguments, said) in enumerate(cases):
            async with (
                node(tmp_path, "--peers", connect, *arguments, name=f"j{number}") as joiner,
                asking(joiner.data_address) as asker,
            ):
                status = await asker.until_status(partial(is_waiting, said))
                assert not status["ready"] and status["epoch"] == 0
        found = await topology(connect)
        assert found["epoch"] == 1 and len(found["members"]) == 3
        async with DHTClient(timeout=10) as client:
            await client.connect(cluster.addresses)
            await client.put("k", b"v", consistency=Consistency.ALL)
            for call in (
                client.leave("n1"),
                client.remove("n1"),
                client.set_weight("n1", -1),
                client.set_weight("n9", 1),
                client.recover(["n1"], confirm="dht"),
                client.plan("replace", "n1"),
            ):
                with pytest.raises(DHTError):
                    await call
        assert (await topology(connect))["epoch"] == 1


async def test_a_folder_that_was_copied(tmp_path: Path) -> None:
    """Under another name it is refused at once; under its own, once the one it was copied from has started again,
    however often the copy is started, and as long as that one runs."""
    async with LocalCluster(3, tmp_path, settings=QUICK) as cluster:
        connect = ",".join(cluster.addresses)
        await cluster.stop_node(2)
        shutil.copytree(tmp_path / "n2", tmp_path / "copy")
        peers = ["--peers", ",".join(cluster.addresses[:2])]
        arguments = ["--port", 0, *ANY_PORTS, "--path", tmp_path / "copy", *peers]
        ended = await refused(tmp_path, *arguments, "--node-id", "n3")
        assert ended.code == FolderMismatch.exit_code
        assert "the data folder belongs to node n2, not n3" in ended.error
        await cluster.start_node(2)
        await cluster.wait_ready()
        await cluster.stop_node(2)
        await cluster.start_node(2)
        await cluster.wait_ready()
        shutil.copytree(tmp_path / "n2", tmp_path / "running")
        for name, why in (
            ("copy", "restored or copied data folder: its boot counter is 2, 3 was seen"),
            ("copy", "restored or copied data folder: its start 3 was another"),
            ("copy", "restored or copied data folder: its start 3 was another"),
            ("running", "or a copy of it, runs yet"),
        ):
            async with node(tmp_path, "--node-id", "n2", *peers, name=name, storage="rocksdb") as clone:
                await until(lambda clone=clone, why=why: why in clone.said(), "")
                async with asking(clone.data_address) as asker:
                    status = await asker.until_status(partial(is_waiting, "ClonedNode: n2 "))
                    assert not status["ready"]
        found = await topology(connect)
        assert found["epoch"] == 1
