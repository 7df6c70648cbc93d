"""Changes of the members that a program orders, and waiting until the cluster is whole again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec

from agi.core.dht.client.session import Session
from agi.core.dht.errors import DHTError, InvalidRequest, Unavailable

POLL_S = 0.25


async def order_change(
    session: Session, names: list[str], what: str, node_id: str, *, force: bool = False, dry_run: bool = False
) -> dict[str, Any]:
    """Asks one node after the other, since one may not be reachable. Raises the error with which the order was refused,
    Unavailable where nobody took it."""
    packed = msgspec.msgpack.encode({"what": what, "node": node_id, "force": force, "dry_run": dry_run})
    last: DHTError = Unavailable("no node is reachable")
    for name in names:
        try:
            answer: dict[str, Any] = await session.query(name, "change", packed)
        except Unavailable as error:
            last = error
        else:
            return answer
    raise last


async def wait_change(topology_of: Callable[[], Any], epoch: int, timeout: float) -> dict[str, Any]:
    """The topology once the change that this epoch began is over, done or undone. Raises Unavailable."""
    try:
        async with asyncio.timeout(timeout):
            while True:
                try:
                    topology: dict[str, Any] = await topology_of()
                except DHTError:
                    await asyncio.sleep(POLL_S)
                    continue
                under_way = any(member["state"] != "normal" for member in topology["members"])
                if topology["epoch"] > epoch and not under_way:
                    return topology
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise Unavailable(f"the change that epoch {epoch} began is not over after {timeout:g} s: it goes on") from None


def missing(topology: dict[str, Any], states: dict[str, dict[str, Any]]) -> list[str]:
    """What keeps the cluster from full replication, as lines for people; empty if nothing does."""
    lines = [
        f"{member['node_id']} is {member['state']}" for member in topology["members"] if member["state"] != "normal"
    ]
    for name, state in sorted(states.items()):
        if "error" in state:
            lines.append(f"{name} does not answer: {state['error']}")
            continue
        if not state["ready"]:
            lines.append(f"{name} is not ready: {state['waiting_for']}")
        if state["epoch"] != topology["epoch"]:
            lines.append(f"{name} is at epoch {state['epoch']}, not {topology['epoch']}")
        lines += [f"{name} keeps {count} hints for {target}" for target, count in state["hints"].items() if count]
    return lines


async def wait_healthy(topology_of: Callable[[], Any], status_of: Callable[[], Any], timeout: float) -> None:
    """Returns when every member answers and is ready, no change is under way and no hint waits. Raises Unavailable with
    what is missing."""
    if timeout <= 0:
        raise InvalidRequest(f"a timeout is above 0, not {timeout}")
    lines = ["nothing was asked yet"]
    try:
        async with asyncio.timeout(timeout):
            while True:
                try:
                    lines = missing(await topology_of(), await status_of())
                except DHTError as error:
                    lines = [str(error)]
                if not lines:
                    return
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise Unavailable(f"not healthy after {timeout:g} s: {'; '.join(lines)}") from None
