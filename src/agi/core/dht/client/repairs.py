"""Repairs that a program orders: each node in its turn compares itself with its peers, and is asked how far it is.

A node's state is what antientropy.py says: {"running", "peers": to compare with, "done": of these, "ranges",
"differing_ranges", "differences": keys of which one side was behind, "young": keys left alone as they were just being
written, "keys_sent", "keys_received", "bytes_sent", "bytes_received", "failed": {peer: why}}.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from agi.core.dht.client.session import Session
from agi.core.dht.errors import DHTError, InvalidRequest, Overloaded

POLL_S = 0.1
POLL_FAILURES_MAX = 20
"""A node that fails to say how far it is so often in a row counts as gone."""
TOKENS = 1 << 64


async def order_repairs(
    session: Session,
    names: Sequence[str],
    tokens: tuple[int, int] | None,
    on_progress: Callable[[str, dict[str, Any]], object] | None,
) -> dict[str, dict[str, Any]]:
    """One node after the other. Raises InvalidRequest."""
    key = b""
    if tokens is not None:
        first, last = tokens
        if not 0 <= first <= last < TOKENS:
            raise InvalidRequest(f"a range of tokens goes from a lower to a higher one, below 2^64, not {first}-{last}")
        key = first.to_bytes(8, "big") + last.to_bytes(8, "big")
    unknown = sorted(set(names) - session.nodes.keys())
    if unknown:
        raise InvalidRequest(f"there is no node {unknown[0]!r} in the cluster")
    states: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            states[name] = await _repair(session, name, key, on_progress)
        except DHTError as error:
            states[name] = {"error": str(error)}
    return states


async def _repair(
    session: Session, name: str, key: bytes, on_progress: Callable[[str, dict[str, Any]], object] | None
) -> dict[str, Any]:
    state: dict[str, Any] = await session.query(name, "repair", key)
    failures = 0
    while state["running"]:
        if on_progress is not None:
            on_progress(name, state)
        await asyncio.sleep(POLL_S)
        try:
            state = await session.query(name, "repair_state")
        except Overloaded:
            continue
        except DHTError:
            failures += 1
            if failures >= POLL_FAILURES_MAX:
                raise
        else:
            failures = 0
    if on_progress is not None:
        on_progress(name, state)
    return state
