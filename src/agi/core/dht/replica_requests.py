"""Answers the messages of coordinators (and the direct reads of clients) from this node's replica."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

from agi.core.dht.acceptor import is_whole
from agi.core.dht.errors import (
    HelloRefused,
    NotReady,
    Overloaded,
    ProtocolMismatch,
    StaleEpoch,
    TransportError,
    from_wire,
)
from agi.core.dht.observability.logs import Throttle
from agi.core.dht.protocol.messages import (
    FRESH,
    HINT,
    REPAIR,
    RegisterAccept,
    RegisterAccepted,
    RegisterPrepare,
    RegisterPromises,
    ReplicaRead,
    ReplicaReadReply,
    ReplicaScan,
    ReplicaScanReply,
    ReplicaWrite,
    ReplicaWriteReply,
    WireError,
)
from agi.core.dht.sessions import Session
from agi.core.dht.storage.base import Page
from agi.core.dht.transport.base import Link
from agi.core.dht.types import BATCH_BYTES_MAX, SCAN_LIMIT_MAX

if TYPE_CHECKING:
    from agi.core.dht.node import Node

_log = structlog.get_logger("agi.core.dht.node")

REPLICA_SCANS_MAX = 256
"""Scans under way at one replica; past it coordinators get Overloaded."""
PARKED_MAX = 4096
"""Requests that wait for a newer topology that their coordinator knows already; past it they are refused as stale."""
PARKED_S_MAX = 30.0
ASK_AGAIN_S = 0.5
"""While requests wait, their coordinators are asked again for the topology that they know."""


class ReplicaRequests:
    """
    Args:
        own: runs a coroutine as a task that the node owns.
    """

    def __init__(self, node: Node, own: Callable[[Coroutine[Any, Any, None], str], None]) -> None:
        self._node = node
        self._replica = node.replica
        self._own = own
        self.scans = 0
        """Scans under way."""
        self._parked: deque[tuple[float, Callable[[Session, Link, Any], None], Session, Link, Any]] = deque()
        self._asked = 0.0
        self._throttle = Throttle()
        self._debug = node.config.observability.log_level == "debug"

    def stale(self, session: Session, epoch: int) -> WireError | None:
        """Why a replica request is refused. Clients may read replicas directly; only members may write to them."""
        topology = self._node.topology
        if topology is None:
            return NotReady(f"{self._node.node_id} is not ready: {self._node.waiting_for}").to_wire()
        if not session.member and session.kind != "client":
            session.member = session.kind == "node" and session.name in topology.by_id
            if not session.member:
                return HelloRefused(f"{session.name} is not a member of this cluster").to_wire()
        if not self._node.epochs.covers(epoch):
            if epoch > topology.epoch and session.member:
                self._node.epochs.ask(session.name)
            return StaleEpoch(f"{self._node.node_id} is at epoch {topology.epoch}, the message at {epoch}").to_wire()
        return None

    def _ahead(self, answer: Callable[[Session, Link, Any], None], session: Session, link: Link, request: Any) -> bool:
        """Whether the request is of an epoch that this node has still to hear of: it is answered then (T2)."""
        topology = self._node.topology
        if topology is None or request.epoch <= topology.epoch or len(self._parked) >= PARKED_MAX:
            return False
        if not session.member:
            return False
        now = self._node.clock.monotonic()
        while self._parked and self._parked[0][0] < now - PARKED_S_MAX:
            self._parked.popleft()  # its coordinator has given up long ago
        if not self._parked or now > self._asked + ASK_AGAIN_S:
            self._asked = now
            self._node.epochs.ask(session.name)
        self._parked.append((now, answer, session, link, request))
        return True

    def resume(self) -> None:
        """A newer topology is in force: what waited for it is looked at again."""
        parked, self._parked = self._parked, deque()
        for _, answer, session, link, request in parked:
            if not link.closed:
                answer(session, link, request)

    def read(self, session: Session, link: Link, request: ReplicaRead) -> None:
        if self._debug:
            _log.debug("replica_read", trace=request.trace, peer=session.name, keys=len(request.keys))
        stale = self.stale(session, request.epoch)
        if stale is not None and self._ahead(self.read, session, link, request):
            return
        if stale is not None:
            link.send(ReplicaReadReply(request.id, [], stale))
        else:
            self._replica.read_batch(request.keys, partial(self._answer_read, session, link, request))

    def _answer_read(
        self, session: Session, link: Link, request: ReplicaRead, records: list[bytes | None], error: WireError | None
    ) -> None:
        if error is not None:
            self._failed(request, error)
        try:
            session.send(link, ReplicaReadReply(request.id, records, error))
        except (TransportError, Overloaded) as failure:
            _log.info("reply_undeliverable", peer=session.name, error=str(failure))

    def write(self, session: Session, link: Link, request: ReplicaWrite) -> None:
        if self._debug:
            _log.debug("replica_write", trace=request.trace, peer=session.name, keys=len(request.keys))
        stale = self.stale(session, request.epoch)
        if session.kind == "client":
            raise ProtocolMismatch("a client does not write to replicas")
        if stale is None and (not request.keys or len(request.keys) != len(request.records)):
            raise ProtocolMismatch("a replica write has as many records as keys, and at least one")
        if request.mode not in (FRESH, REPAIR, HINT):
            raise ProtocolMismatch(f"a replica write of mode {request.mode}")
        if stale is not None and self._ahead(self.write, session, link, request):
            return
        if stale is not None:
            link.send(ReplicaWriteReply(request.id, None, None, stale))
        else:
            done = partial(self._answer_write, session, link, request)
            self._replica.write(request.mode, request.keys, request.records, request.want_live, done)

    def _answer_write(
        self,
        session: Session,
        link: Link,
        request: ReplicaWrite,
        superseded: list[tuple[int, int]] | None,
        live: list[int] | None,
        error: WireError | None,
    ) -> None:
        if error is not None:
            self._failed(request, error)
        try:
            link.send(ReplicaWriteReply(request.id, superseded, live, error, self._replica.now_ms()))
        except (TransportError, Overloaded) as failure:
            _log.info("reply_undeliverable", peer=session.name, error=str(failure))

    def prepare(self, session: Session, link: Link, request: RegisterPrepare) -> None:
        """A coordinator wants this node's promises."""
        stale = self._judge(session, request, request.ballots)
        if stale is not None and self._ahead(self.prepare, session, link, request):
            return
        if stale is not None:
            link.send(RegisterPromises(request.id, [], None, stale))
            return

        def answer(
            records: list[bytes | None], refusals: list[tuple[int, bytes]] | None, error: WireError | None
        ) -> None:
            self._answer_vote(session, link, request, RegisterPromises(request.id, records, refusals, error))

        self._node.acceptor.prepare(request.keys, request.ballots, answer)

    def accept(self, session: Session, link: Link, request: RegisterAccept) -> None:
        """A coordinator wants this node's votes."""
        stale = self._judge(session, request, request.records)
        if stale is not None and self._ahead(self.accept, session, link, request):
            return
        if stale is not None:
            link.send(RegisterAccepted(request.id, None, stale))
            return

        def answer(refusals: list[tuple[int, bytes]] | None, error: WireError | None) -> None:
            self._answer_vote(session, link, request, RegisterAccepted(request.id, refusals, error))

        self._node.acceptor.accept(request.keys, request.records, answer)

    def _judge(
        self, session: Session, request: RegisterPrepare | RegisterAccept, ballots: list[bytes]
    ) -> WireError | None:
        if self._debug:
            _log.debug(type(request).__name__, trace=request.trace, peer=session.name, keys=len(request.keys))
        if session.kind == "client":
            raise ProtocolMismatch("a client does not write to replicas")
        if not is_whole(request.keys, ballots):
            raise ProtocolMismatch("a round of consensus names each key once, with its ballot or record")
        return self.stale(session, request.epoch)

    def _answer_vote(
        self,
        session: Session,
        link: Link,
        request: RegisterPrepare | RegisterAccept,
        reply: RegisterPromises | RegisterAccepted,
    ) -> None:
        if reply.error is not None:
            self._failed(request, reply.error)
        try:
            session.send(link, reply)
        except (TransportError, Overloaded) as failure:
            _log.info("reply_undeliverable", peer=session.name, error=str(failure))

    def scan(self, session: Session, link: Link, request: ReplicaScan) -> None:
        if self._debug:
            _log.debug("replica_scan", trace=request.trace, peer=session.name, limit=request.limit)
        error = self.stale(session, request.epoch)
        if error is not None and self._ahead(self.scan, session, link, request):
            return
        if error is None and self.scans >= REPLICA_SCANS_MAX:
            error = Overloaded(f"{self.scans} scans are under way at {self._node.node_id} already").to_wire()
        if error is not None:
            link.send(ReplicaScanReply(request.id, [], [], False, error))
            return
        self.scans += 1
        limit = max(1, min(request.limit, SCAN_LIMIT_MAX + 1))
        bytes_max = max(1, min(request.bytes_max, BATCH_BYTES_MAX))
        done = partial(self._answer_scan, session, link, request)
        self._own(self._replica.scan(request.start, request.end, limit, bytes_max, done), "replica scan")

    def _answer_scan(
        self, session: Session, link: Link, request: ReplicaScan, page: Page, error: WireError | None
    ) -> None:
        self.scans -= 1
        if error is not None:
            self._failed(request, error)
        keys, records = [key for key, _ in page.items], [record for _, record in page.items]
        try:
            session.send(link, ReplicaScanReply(request.id, keys, records, page.complete, error))
        except (TransportError, Overloaded) as failure:
            _log.info("reply_undeliverable", peer=session.name, error=str(failure))

    def _failed(
        self, request: ReplicaRead | ReplicaWrite | ReplicaScan | RegisterPrepare | RegisterAccept, error: WireError
    ) -> None:
        if self._throttle.pass_(self._node.clock.monotonic()):
            held_back, self._throttle.suppressed = self._throttle.suppressed, 0
            _log.warning(
                "replica_request_failed",
                kind=type(request).__name__,
                trace=request.trace,
                error=str(from_wire(*error)),
                held_back=held_back,
            )
