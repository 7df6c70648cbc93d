"""Pages of scans: any node gives one, and another where that one cannot."""

from __future__ import annotations

import asyncio

from agi.core.dht.client.session import Session
from agi.core.dht.errors import ClientClosed, DHTError, NotReady, Unavailable, from_wire
from agi.core.dht.protocol.messages import Scan, ScanReply


async def scan_page(session: Session, request: Scan, timeout_s: float) -> ScanReply:
    """One page. Tries other nodes on retryable errors until the deadline."""
    deadline = session.clock.monotonic() + timeout_s
    attempts = 0
    error: DHTError = Unavailable("no node is reachable")
    while True:
        if session.closed:
            raise ClientClosed("the client is closed")
        left_s = deadline - session.clock.monotonic()
        start, up = session.coordinators()
        news = False
        if up and left_s > 0:
            remote = up[start]
            request.timeout_ms = max(1, int(left_s * 1000 - min(150, left_s * 250)))
            try:
                reply = await session.call(remote.links[0], remote.node_id, request, left_s)
                assert isinstance(reply, ScanReply)
                if reply.error is None:
                    return reply
                error = from_wire(*reply.error)
            except DHTError as failure:
                error = failure
            news = isinstance(error, NotReady) and session.unready(remote.node_id)
        attempts += 1
        left_s = deadline - session.clock.monotonic()
        tried_enough = attempts > session.retry_count and not isinstance(error, NotReady)
        if not error.retryable or tried_enough or left_s <= 0:
            raise error
        if not news:
            await asyncio.sleep(min(0.5, 0.02 * 2 ** min(attempts, 10), max(0.0, left_s)))
