"""What clients ask of this node, before a coordinator takes it (coordinator.py, scan.py)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import structlog

from agi.core.dht.errors import FrameTooLarge, NotReady
from agi.core.dht.protocol.messages import (
    Delete,
    DeleteReply,
    Get,
    GetReply,
    KeyError_,
    Message,
    Put,
    PutReply,
    Scan,
    ScanReply,
    Update,
    UpdateReply,
    Watch,
    WatchReply,
    WireError,
)
from agi.core.dht.reads import TRUNCATED
from agi.core.dht.sessions import Session, cut
from agi.core.dht.transport.base import Link
from agi.core.dht.types import FRAME_BYTES_MAX

if TYPE_CHECKING:
    from agi.core.dht.node import Node

_log = structlog.get_logger("agi.core.dht.node")

REPLY_BYTES_MAX = FRAME_BYTES_MAX * 3 // 4
"""Of the records in an answer: with what else is in it they fit a frame."""


class ClientRequests:
    """Answers NotReady while the node is not ready; a write that was refused so stays refused (sessions.py)."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._debug = node.config.observability.log_level == "debug"

    def _ready(self) -> WireError | None:
        return None if self._node.serving else self._not_ready()

    def get(self, session: Session, link: Link, request: Get) -> None:
        if self._node.coordinator is None or not self._node.serving:
            link.send(GetReply(request.id, [], None, self._ready()))
            return
        if self._debug:
            _log.debug("get", trace=f"{session.name}:{request.id}", keys=len(request.keys))
        self._node.coordinator.get(request, partial(self._answer_get, session, link), f"{session.name}:{request.id}")

    def _answer_get(self, session: Session, link: Link, reply: Message) -> None:
        """Sends the reply, cut to what one frame may hold: the client asks again for the rest."""
        try:
            session.send(link, reply)
        except FrameTooLarge:
            assert isinstance(reply, GetReply)
            kept = cut(reply.records, REPLY_BYTES_MAX)
            rest: list[KeyError_] = [(i, TRUNCATED.to_wire()) for i in range(len(kept), len(reply.records))]
            kept += [None] * len(rest)
            session.send(link, GetReply(reply.id, kept, (reply.errors or []) + rest, reply.error))

    def _not_ready(self) -> WireError:
        return NotReady(f"{self._node.node_id} is not ready: {self._node.waiting_for}").to_wire()

    def put(self, session: Session, link: Link, request: Put) -> None:
        if session.turns_away(request.id, self._node.serving) or self._node.coordinator is None:
            link.send(PutReply(request.id, [], None, self._not_ready()))
            return
        if self._debug:
            _log.debug("put", trace=f"{session.name}:{request.id}", keys=len(request.keys), retry=request.retry)
        self._node.coordinator.put(request, link.send, session.name)

    def delete(self, session: Session, link: Link, request: Delete) -> None:
        if session.turns_away(request.id, self._node.serving) or self._node.coordinator is None:
            link.send(DeleteReply(request.id, [], None, self._not_ready()))
            return
        if self._debug:
            _log.debug("delete", trace=f"{session.name}:{request.id}", keys=len(request.keys), retry=request.retry)
        self._node.coordinator.delete(request, link.send, session.name)

    def update(self, session: Session, link: Link, request: Update) -> None:
        if session.turns_away(request.id, self._node.serving) or self._node.coordinator is None:
            link.send(UpdateReply(request.id, [], self._not_ready()))
            return
        if self._debug:
            _log.debug("update", trace=f"{session.name}:{request.id}", ops=len(request.ops))
        self._node.coordinator.update(request, link.send, session.name)

    def watch(self, session: Session, link: Link, request: Watch) -> None:
        if self._node.coordinator is None or not self._node.serving:
            link.send(WatchReply(request.id, error=self._ready()))
            return
        self._node.coordinator.registers.watches.start(request, link.send)

    def scan(self, session: Session, link: Link, request: Scan) -> None:
        if self._node.scanner is None or not self._node.serving:
            link.send(ScanReply(request.id, [], [], b"", self._ready()))
            return
        if self._debug:
            _log.debug("scan", trace=f"{session.name}:{request.id}", limit=request.limit)
        self._node.scanner.scan(request, partial(session.send, link), f"{session.name}:{request.id}")
