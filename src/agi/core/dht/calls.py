"""Awaited requests to single peers, for rare work (scans, repair of what they find, `locate`).

The hot path (coordinator.py) has no future per request; this has. Ids lie in a range of their own, so that a reply
tells by its id whose it is. Callers bound the wait.
"""

from __future__ import annotations

import asyncio

from agi.core.dht.errors import DHTError, Unavailable, from_wire
from agi.core.dht.peers import Peer, Peers
from agi.core.dht.protocol.messages import (
    ArcList,
    ArcListReply,
    ChangeState,
    ChangeStateReply,
    EpochAccept,
    EpochPrepare,
    EpochReply,
    Query,
    QueryReply,
    ReclaimReply,
    ReclaimStep,
    ReplicaRead,
    ReplicaReadReply,
    ReplicaScan,
    ReplicaScanReply,
    ReplicaWrite,
    ReplicaWriteReply,
    TreeFetch,
    TreeFetchReply,
    TreeNodes,
    TreeNodesReply,
    TreeRecords,
    TreeRecordsReply,
    TreeRoot,
    TreeRootReply,
)
from agi.core.dht.transport.codec import encode

ID_BASE = 1 << 62

TreeRequest = TreeRoot | TreeNodes | TreeRecords | TreeFetch
ChangeRequest = ArcList | ChangeState
ChangeReply = ArcListReply | ChangeStateReply
TreeReply = TreeRootReply | TreeNodesReply | TreeRecordsReply | TreeFetchReply
Request = (
    ReplicaRead
    | ReplicaWrite
    | ReplicaScan
    | EpochPrepare
    | EpochAccept
    | TreeRequest
    | ChangeRequest
    | ReclaimStep
    | Query
)
Reply = (
    ReplicaReadReply
    | ReplicaWriteReply
    | ReplicaScanReply
    | EpochReply
    | TreeReply
    | ChangeReply
    | ReclaimReply
    | QueryReply
)


class Calls:
    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._waiting: dict[int, tuple[str, asyncio.Future[Reply]]] = {}
        self._ids = ID_BASE

    async def call(self, name: str, request: Request) -> Reply:
        """The peer's reply; `request.id` is set here. Raises Unavailable where the peer is not connected or lost, or
        the error that it answered."""
        peer = self._peers.usable.get(name)
        if peer is None:
            raise Unavailable(f"{name} is not connected")
        self._ids += 1
        request.id = number = self._ids
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[number] = (name, future)
        try:
            peer.send(encode(request))
            reply = await future
        finally:
            del self._waiting[number]
        if reply.error is not None:
            raise from_wire(*reply.error)
        return reply

    def reply(self, peer: Peer, message: Reply) -> None:
        name, future = self._waiting.get(message.id, ("", None))
        if future is not None and name == peer.node_id and not future.done():
            future.set_result(message)

    def peer_lost(self, node_id: str, error: DHTError) -> None:
        for name, future in list(self._waiting.values()):
            if name == node_id and not future.done():
                future.set_exception(Unavailable(f"{node_id} was lost: {error.message}"))
