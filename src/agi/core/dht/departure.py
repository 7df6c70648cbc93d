"""How a process takes its node out of the cluster before it ends: `agi-dht serve --leave`."""

from __future__ import annotations

import asyncio

import structlog

from agi.core.dht.changes import Order
from agi.core.dht.errors import ChangeRefused, DHTError
from agi.core.dht.node import Node
from agi.core.dht.topology import LEAVING

_log = structlog.get_logger("agi.core.dht.departure")

POLL_S = 0.2
RETRY_S = 2.0
"""Another change may be under way, or the voters away for a moment."""


async def leave_when_told(node: Node, told: asyncio.Event, stop: asyncio.Event, timeout_s: float) -> None:
    """Once it is told to, has the node leave the cluster. Sets `stop` where that cannot be, or not in time; a node that
    is let go fails with Removed, which stops it anyhow."""
    await told.wait()
    why = f"it was not let go within {timeout_s:g} s"
    try:
        async with asyncio.timeout(timeout_s):
            why = await _refusal(node)
    except TimeoutError:
        if node.topology is not None and node.topology.in_transition:
            why += ": the change goes on without it"
    finally:
        if node.fatal is None and not stop.is_set():
            _log.error("not_left", reason=why, node_id=node.node_id)
        stop.set()


async def _refusal(node: Node) -> str:
    """Why the node cannot leave; does not return while it is leaving, and returns when it is let go."""
    while True:
        if node.topology is None:
            return "it belongs to no cluster yet"
        try:
            begun = await node.changes.order(Order("leave", node.node_id))
        except ChangeRefused as error:
            if not node.topology.in_transition:
                return str(error)
            _log.info("leave_waits", reason=str(error))
        except DHTError as error:
            _log.warning("leave_waits", reason=str(error))
        else:
            _log.info("leaving", epoch=begun["epoch"])
            while node.fatal is None and node.topology.by_id[node.node_id].state == LEAVING:  # noqa: ASYNC110  # as below
                await asyncio.sleep(POLL_S)  # a node signals neither its end nor its epochs
            return "its leave was undone"
        await asyncio.sleep(RETRY_S)
