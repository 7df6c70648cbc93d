"""A node that is told to stop: its clients go elsewhere before it hangs up, and no call of theirs fails."""

from __future__ import annotations

import asyncio

import pytest
from cluster import Cluster, until

from agi.core.dht.errors import DHTError, NotReady
from agi.core.dht.protocol.messages import Get, Goodbye, Hello
from agi.core.dht.transport.handshake import greet
from agi.core.dht.types import PROTOCOL_VERSION, Consistency


@pytest.mark.parametrize("count", [3, 5])
async def test_no_call_fails_while_a_node_drains(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agi.core.dht.node.GOODBYE_S", 30.0)
    async with Cluster(count, loopback=True) as cluster:
        client = await cluster.client(retry_count=0)
        failures: list[DHTError] = []
        stop = False

        async def load(number: int) -> None:
            turn = 0
            while not stop and not failures:
                turn += 1
                try:
                    await client.put(f"k{number}", b"%d" % turn)
                    assert await client.get(f"k{number}") == b"%d" % turn
                    if turn % 10 == 0:
                        await client.put_many({f"k{number}:{i}": b"v" for i in range(20)})
                        assert len(await client.scan(f"k{number}:")) == 20
                except DHTError as error:
                    failures.append(error)

        workers = [asyncio.create_task(load(number)) for number in range(16)]
        await asyncio.sleep(0.2)
        node = cluster.node(0)
        began = asyncio.get_running_loop().time()
        await node.stop(30.0)
        assert asyncio.get_running_loop().time() - began < 15  # it was the clients that hung up, not a timeout
        cluster.nodes[0] = cluster._doors[0].node = None
        assert "n0" not in [remote.node_id for remote in client._live().up]
        await asyncio.sleep(0.2)
        stop = True
        await asyncio.gather(*workers)
        assert failures == []


async def test_what_comes_after_the_goodbye_is_refused_and_a_client_that_stays_is_cut_off() -> None:
    async with Cluster(3) as cluster:
        wire = await cluster.wire(0)
        stopping = asyncio.create_task(cluster.node(0).stop(0.3))
        await until(lambda: any(isinstance(message, Goodbye) for message in wire.heard))
        wire.heard.clear()
        with pytest.raises(NotReady, match="n0 is not ready: stopping"):
            hello = Hello(PROTOCOL_VERSION, "client", "late")
            await greet(cluster._transport("client"), cluster.addresses[0], hello, wire)
        reply = await wire.ask(Get(7, Consistency.ONE, 1000, [b"k"]))
        assert "n0 is not ready: stopping" in reply.error[1]
        await stopping
        assert wire.closed
        cluster.nodes[0] = cluster._doors[0].node = None


async def test_a_node_that_is_back_is_used_again() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        for _ in range(2):
            await cluster.node(0).stop(5.0)
            cluster.network.crash("n0", 0.0)
            cluster.nodes[0] = cluster._doors[0].node = None
            await cluster.up(0)
            await until(lambda: len(client._live().up) == 3)
            assert client._live().nodes["n0"].parting == []
            await client.put("k", b"v", consistency=Consistency.ALL)
