"""Answers the questions of peers that compare their hash trees with this node's (protocol/exchange.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import structlog

from agi.core.dht.clock import Clock
from agi.core.dht.errors import DHTError, Overloaded, ProtocolMismatch, StorageError, TransportError
from agi.core.dht.protocol.exchange import answer_nodes, answer_records, answer_root, spans_of, tokens_of
from agi.core.dht.protocol.messages import (
    Message,
    TreeFetch,
    TreeFetchReply,
    TreeNodes,
    TreeNodesReply,
    TreeRecords,
    TreeRecordsReply,
    TreeRoot,
    TreeRootReply,
    WireError,
)
from agi.core.dht.sessions import Session
from agi.core.dht.transport.base import Link
from agi.core.dht.treekeeper import Own, TreeKeeper

_log = structlog.get_logger("agi.core.dht.antientropy")

SERVING_MAX = 32
"""Questions of peers that are being answered; past it a peer gets Overloaded."""

_REPLIES: dict[type, Callable[[int, WireError], Message]] = {
    TreeRoot: lambda number, error: TreeRootReply(number, error=error),
    TreeNodes: lambda number, error: TreeNodesReply(number, [], error=error),
    TreeRecords: lambda number, error: TreeRecordsReply(number, error=error),
    TreeFetch: lambda number, error: TreeFetchReply(number, [], [], error=error),
}
REQUESTS = tuple(_REPLIES)


class TreeAnswers:
    """
    Args:
        stale: why a message of that epoch is refused, None if it is not.

    Attributes:
        served: comparisons that peers began.
        begun_by: when each peer last began one.
        settling_by: when each peer last asked about ranges that differ.
        completed_by: when each peer began the last one of which it has said that it came to its end.
    """

    def __init__(
        self, keeper: TreeKeeper, clock: Clock, own: Own, stale: Callable[[Session, int], WireError | None]
    ) -> None:
        self.served = 0
        self.begun_by: dict[str, float] = {}
        self.completed_by: dict[str, float] = {}
        self.settling_by: dict[str, float] = {}
        self._keeper = keeper
        self._clock = clock
        self._own = own
        self._stale = stale
        self._serving = 0

    def request(self, session: Session, link: Link, message: Any) -> None:
        """A peer compares with this node."""
        error = self._stale(session, message.epoch)
        if session.kind != "node":
            raise ProtocolMismatch("a client compares no hash trees")
        if error is None and self._serving >= SERVING_MAX:
            error = Overloaded(f"{self._serving} questions about hash trees are being answered already").to_wire()
        if error is not None:
            self._reply(session, link, _REPLIES[type(message)](message.id, error))
            return
        self._serving += 1
        if not isinstance(message, TreeRoot):
            self.settling_by[session.name] = self._clock.monotonic()
        self._own(self._serve(session, link, message), "anti-entropy answer")

    async def _serve(self, session: Session, link: Link, message: Any) -> None:
        try:
            reply = await self._answer(session.name, message)
        except DHTError as error:
            reply = _REPLIES[type(message)](message.id, error.to_wire())
        except TimeoutError:
            late = StorageError("the store did not answer in time")
            reply = _REPLIES[type(message)](message.id, late.to_wire())
        finally:
            self._serving -= 1
        self._reply(session, link, reply)

    async def _answer(self, name: str, message: Any) -> Message:
        keeper = self._keeper
        if isinstance(message, TreeRoot):
            await keeper.fold()
            self._begun(name, message)
            return answer_root(keeper.trees, keeper.shared(name, (message.first, message.last)), message)
        if isinstance(message, TreeFetch):
            keys, records, taken = await keeper.records_at(tokens_of(message))
            return TreeFetchReply(message.id, keys, records, taken)
        shared = keeper.shared(name, (message.first, message.last))
        if isinstance(message, TreeNodes):
            return answer_nodes(keeper.trees, shared, message)
        assert isinstance(message, TreeRecords)
        spans = spans_of(keeper.trees, shared, message)
        return answer_records(spans, *await keeper.listing(spans), message)

    def _begun(self, name: str, message: TreeRoot) -> None:
        self.served += 1
        if message.completed and name in self.begun_by:
            self.completed_by[name] = self.begun_by[name]
        if message.ranges == len(self._keeper.partners.get(name, ())):  # not a part of them
            self.begun_by[name] = self._clock.monotonic()

    def _reply(self, session: Session, link: Link, reply: Message) -> None:
        try:
            session.send(link, reply)
        except (TransportError, Overloaded) as error:
            _log.info("reply_undeliverable", peer=session.name, error=str(error))
