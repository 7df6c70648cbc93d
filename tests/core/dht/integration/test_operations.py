"""Three node processes as an operator sees them: pages, logs with correlation ids, the announcement, SIGTERM."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from agi.core.dht.client import DHTClient
from agi.core.dht.local import LocalCluster

WAIT_S = 20.0


def _get(address: str, page: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{address}{page}", timeout=WAIT_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


async def _page(cluster: LocalCluster, i: int, page: str) -> tuple[int, str]:
    return await asyncio.to_thread(_get, cluster.node(i).announced["http_address"], page)


def _lines(cluster: LocalCluster, i: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in cluster.log(i).read_text().splitlines() if line.startswith("{")]


async def test_pages_tell_of_health_and_readiness_and_what_was_done(tmp_path: Path) -> None:
    async with LocalCluster(3, tmp_path, storage="memory") as cluster:
        async with DHTClient() as client:
            await client.connect(cluster.addresses)
            for i in range(20):
                await client.put(f"k{i}", b"v")
        pages = [await _page(cluster, i, "/metrics") for i in range(3)]
        counted = [
            float(line.split()[1]) for _, text in pages for line in text.splitlines()
            if line.startswith('dht_operations_total{operation="put"}')
        ]  # fmt: skip
        assert sum(counted) == 20
        async with asyncio.timeout(WAIT_S):
            while json.loads((await _page(cluster, 0, "/readyz"))[1])["replication"]:  # noqa: ASYNC110  # nobody signals it
                await asyncio.sleep(0.02)
        page = await _page(cluster, 0, "/readyz")
        assert page == (200, '{"ready":true,"reason":"","node_id":"n0","replication":[]}\n')
        await cluster.kill(1)
        async with asyncio.timeout(WAIT_S):
            while not (told := json.loads((await _page(cluster, 0, "/readyz"))[1]))["replication"]:  # noqa: ASYNC110  # as above
                await asyncio.sleep(0.02)
        assert told["ready"] and told["replication"][0].startswith(("n1 is not connected: ", "n1 is DEAD"))
        await cluster.kill(2)
        async with asyncio.timeout(WAIT_S):
            while (page := await _page(cluster, 0, "/readyz"))[0] == 200:  # noqa: ASYNC110  # as above
                await asyncio.sleep(0.02)
        assert page[0] == 503 and "n1, n2 missing" in page[1]
        assert await _page(cluster, 0, "/healthz") == (200, '{"status":"ok"}\n')


async def test_a_correlation_id_goes_from_the_client_to_the_replicas(tmp_path: Path) -> None:
    settings = {"observability.log_level": "debug", "observability.log_format": "json"}
    async with LocalCluster(3, tmp_path, storage="memory", settings=settings) as cluster:
        async with DHTClient() as client:
            await client.connect(cluster.addresses)
            await client.put("k", b"v", consistency="ALL")
        lines = [line for i in range(3) for line in _lines(cluster, i)]
    [put] = [line for line in lines if line["event"] == "put"]
    replicas = [line for line in lines if line["event"] == "replica_write"]
    assert [line["trace"] for line in replicas] == [put["trace"]] * 2  # the coordinator is the third replica


async def test_a_node_that_stops_ends_with_zero_and_a_launcher_that_dies_takes_its_nodes_along(tmp_path: Path) -> None:
    async with LocalCluster(2, tmp_path, storage="memory", settings={"replication.factor": "1"}) as cluster:
        assert await cluster.stop_node(0) == 0
        node = cluster.node(1).process
        assert node.stdin is not None
        node.stdin.close()  # what the death of this process would do
        assert await asyncio.wait_for(node.wait(), WAIT_S) == 0
