"""The pages of a node: `/metrics`, `/healthz`, `/readyz`."""

from __future__ import annotations

import asyncio

import msgspec
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from agi.core.dht.admin.http import Answer, HttpServer, Route
from agi.core.dht.admin.replication import not_whole
from agi.core.dht.admin.samples import NodeSamples
from agi.core.dht.errors import DHTError
from agi.core.dht.node import Node
from agi.core.dht.storage.base import StoreStats

STORE_TIMEOUT_S = 2.0


def admin_server(node: Node) -> HttpServer:
    """The node's HTTP server, not yet listening."""
    return HttpServer(_routes(node))


def _routes(node: Node) -> dict[str, Route]:
    async def healthz() -> Answer:
        """Whether the process is in order; a supervisor restarts it where it is not."""
        if node.fatal is None:
            return _json({"status": "ok"}, 200)
        return _json({"status": "failed", "reason": str(node.fatal)}, 503)

    async def readyz() -> Answer:
        """Whether the node serves requests, else why not; a load balancer sends none to it then. And why replication
        is not whole, as far as this node knows: that alone keeps no request away."""
        reason = node.waiting_for
        body = {"ready": not reason, "reason": reason, "node_id": node.node_id, "replication": not_whole(node)}
        return _json(body, 503 if reason else 200)

    async def metrics() -> Answer:
        store: StoreStats | None = None
        if node.started:
            try:
                async with asyncio.timeout(STORE_TIMEOUT_S):
                    store = await node.store.stats()
            except (DHTError, TimeoutError):
                store = None  # `dht_store_up` says so
        return Answer(generate_latest(NodeSamples(node, store)), CONTENT_TYPE_PLAIN_0_0_4)

    return {"/healthz": healthz, "/readyz": readyz, "/metrics": metrics}


def _json(body: object, status: int) -> Answer:
    return Answer(msgspec.json.encode(body) + b"\n", status=status)
