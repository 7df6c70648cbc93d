"""Which topology is in force at this node, and how it hears of the next one (PROTOCOLS T2, T3, T12)."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

from agi.core.dht.agreement import Agreement
from agi.core.dht.errors import (
    ClusterError,
    DHTError,
    NotReady,
    Overloaded,
    ProtocolMismatch,
    Removed,
    StorageCorrupt,
    TransportError,
)
from agi.core.dht.identity import Ledger, Past
from agi.core.dht.peers import Peer
from agi.core.dht.protocol.messages import (
    EpochAccept,
    EpochPrepare,
    EpochReply,
    TopologyDigest,
    TopologyNews,
)
from agi.core.dht.protocol.versioning import writer_id
from agi.core.dht.recovery import Recovery
from agi.core.dht.sessions import Session
from agi.core.dht.topology import JOINING, Member, Topology, unpack
from agi.core.dht.transport.base import Link
from agi.core.dht.transport.codec import encode

if TYPE_CHECKING:
    from agi.core.dht.node import Node

_log = structlog.get_logger("agi.core.dht.epochs")

EXCHANGE_S = 2.0
"""How often a node tells one other which topology it has, so that whoever missed a change hears of it."""
RELOCATE_TIMEOUT_S = 10.0
RELOCATE_PAUSE_S = 2.0
VOTES_MAX = 64
"""Votes under way at one node; past it a proposer gets Overloaded."""


class Epochs:
    """One node's epochs. `start` once the node has its first topology.

    Args:
        own: runs a coroutine as a task that the node owns.
    """

    def __init__(
        self, node: Node, ledger: Ledger, rng: random.Random, own: Callable[[Coroutine[Any, Any, None], str], None]
    ) -> None:
        self._node = node
        self._ledger = ledger
        self._rng = rng
        self._own = own
        self._lock = asyncio.Lock()
        self._since = 0
        self._votes = 0
        self.agreement: Agreement | None = None
        self.recovery = Recovery(node, ledger, rng, adopt=self.adopt, announce=self._announce)

    def start(self, topology: Topology) -> None:
        node = self._node
        self._since = topology.epoch
        self.agreement = Agreement(
            node.node_id,
            writer_id(node.node_id, node.identity.boot),
            self._ledger,
            node.calls,
            node.clock,
            self._rng,
            current=lambda: node.known_topology,
            adopt=self.adopt,
            announce=self._announce,
        )
        self._own(self.agreement.finish(), "finish epochs")
        self._own(self._exchange(), "exchange epochs")
        if topology.by_id[node.node_id].address != node.address:
            self._own(self._relocate(), "relocate")

    def _agreed(self) -> Agreement:
        assert self.agreement is not None, "the node has not formed"
        return self.agreement

    def covers(self, epoch: int) -> bool:
        """Whether a message of that epoch means the same replica sets as the epoch in force (T3)."""
        return self._since <= epoch <= self._node.known_topology.epoch

    async def history(self) -> list[Past]:
        """The epochs that this node has adopted, oldest first."""
        return await self._ledger.history()

    # --- hearing of a newer one

    def hear_of(self, topology: Topology, source: str) -> None:
        """Another member has this topology. Raises ClusterError where it cannot be one of this cluster."""
        mine = self._node.known_topology
        if topology.origin != mine.origin:
            raise ClusterError(f"{source} belongs to another cluster than {self._node.node_id}")
        if topology.order == mine.order and topology.digest != mine.digest:
            error = ClusterError(f"{source} has another epoch {mine.epoch} than {self._node.node_id}")
            self._node.fail(error)
            raise error
        if topology.order > mine.order:
            self._own(self._adopt_quietly(topology, source), "adopt an epoch")

    async def _adopt_quietly(self, topology: Topology, source: str) -> None:
        try:
            await self.adopt(topology)
        except DHTError as error:
            _log.error("epoch_not_adopted", epoch=topology.epoch, source=source, error=str(error))

    async def adopt(self, topology: Topology) -> None:
        """Puts a newer topology into force, once it is stored (T2). Older and equal ones change nothing."""
        node = self._node
        async with self._lock:
            mine = node.known_topology
            if topology.order <= mine.order:
                return
            if topology.origin != mine.origin:
                raise ClusterError(f"epoch {topology.epoch} is of another cluster than that of {node.node_id}")
            member = topology.by_id.get(node.node_id)
            if member is None or member.disk_id != node.identity.disk_id:
                error = Removed(f"the cluster has let {node.node_id} go in epoch {topology.epoch}: {topology.note}")
                error.asks_again = mine.by_id[node.node_id].state == JOINING and not topology.cancelled
                node.fail(error)
                raise error
            await node.reclaimer.make_room(topology)
            await self._ledger.store_topology(topology)
            if topology.placement != mine.placement:
                self._since = topology.epoch
            node.put_in_force(topology)
        _log.info("topology_adopted", epoch=topology.epoch, note=topology.note, digest=topology.digest)

    # --- telling and asking

    def _announce(self, topology: Topology) -> None:
        frame = encode(TopologyNews(topology.packed))
        for name in list(self._node.peers.connected):
            self._tell(name, frame)

    async def _exchange(self) -> None:
        while True:
            await asyncio.sleep(EXCHANGE_S * (0.5 + self._rng.random()))
            names = list(self._node.peers.connected)
            if names:
                self._tell(names[self._rng.randrange(len(names))], encode(self._digest()))

    def ask(self, name: str) -> None:
        """That member seems to know a newer topology."""
        self._tell(name, encode(self._digest()))

    def _digest(self) -> TopologyDigest:
        topology = self._node.known_topology
        return TopologyDigest(topology.generation, topology.epoch, topology.digest)

    def _tell(self, name: str, frame: bytes) -> None:
        peer = self._node.peers.connected.get(name)
        if peer is None:
            return
        try:
            peer.send(frame)
        except (TransportError, Overloaded) as error:
            _log.debug("epoch_not_told", peer=name, error=str(error))

    # --- messages of members

    def digest(self, session: Session, link: Link, message: TopologyDigest) -> None:
        """A member says what it has: it gets ours if that is newer, and is asked if its own is."""
        self._check(session)
        if self._node.topology is None:
            return  # forming hears of it by the Hello
        mine = self._node.topology
        theirs = (message.generation, message.epoch)
        if theirs < mine.order or (theirs == mine.order and message.digest != mine.digest):
            try:  # on its own link: this node has none to whom the cluster has let go
                link.send(TopologyNews(mine.packed))
            except (TransportError, Overloaded) as error:
                _log.debug("epoch_not_told", peer=session.name, error=str(error))
        elif theirs > mine.order:
            self.ask(session.name)

    def news(self, session: Session, link: Link, message: TopologyNews) -> None:
        self._check(session)
        if self._node.topology is None:
            return
        try:
            self.hear_of(unpack(message.topology), session.name)
        except (ClusterError, StorageCorrupt) as error:
            _log.error("topology_refused", source=session.name, error=str(error))
            link.close(error)

    def told(self, peer: Peer, message: TopologyNews) -> None:
        """A peer has answered that it knows a newer topology."""
        try:
            self.hear_of(unpack(message.topology), peer.node_id)
        except (ClusterError, StorageCorrupt) as error:
            _log.error("topology_refused", source=peer.node_id, error=str(error))

    def let_go(self, topology: Topology) -> None:
        """Tells those that a newer topology does not name any more, before their links end."""
        frame = encode(TopologyNews(topology.packed))
        for name in self._node.peers.connected.keys() - topology.by_id.keys():
            self._tell(name, frame)

    def _check(self, session: Session) -> None:
        if session.kind != "node":
            raise ProtocolMismatch(f"{session.name} is no node: it has no say in the topology")

    def vote(self, session: Session, link: Link, request: EpochPrepare | EpochAccept) -> None:
        self._check(session)
        if self.agreement is None:
            error: DHTError = NotReady(f"{self._node.node_id} has not formed yet")
            link.send(EpochReply(request.id, error=error.to_wire()))
            return
        if self._votes >= VOTES_MAX:
            error = Overloaded(f"{VOTES_MAX} votes are under way at {self._node.node_id} already")
            link.send(EpochReply(request.id, error=error.to_wire()))
            return
        self._votes += 1
        self._own(self._vote(session, link, request), "vote")

    async def _vote(self, session: Session, link: Link, request: EpochPrepare | EpochAccept) -> None:
        agreement = self._agreed()
        try:
            if request.generation:
                reply = await self.recovery.vote(request)
            elif isinstance(request, EpochPrepare):
                reply = await agreement.prepare(request)
            else:
                reply = await agreement.accept(request)
        except DHTError as error:
            reply = EpochReply(request.id, error=error.to_wire())
        finally:
            self._votes -= 1
        try:
            session.send(link, reply)
        except (TransportError, Overloaded) as error:
            _log.info("reply_undeliverable", peer=session.name, error=str(error))

    # --- a node that has moved

    async def _relocate(self) -> None:
        """Brings this node's new address into the topology."""
        node = self._node
        agreement = self._agreed()

        def moved(base: Topology) -> Topology | None:
            mine = base.by_id[node.node_id]
            if mine.address == node.address:
                return None
            members: list[Member] = [msgspec.structs.replace(mine, address=node.address)]
            members += [member for member in base.members if member.node_id != node.node_id]
            note = f"{node.node_id} moved from {mine.address} to {node.address}"
            return base.next(members, note, node.clock.wall_ms())

        while True:
            try:
                await agreement.propose(moved, RELOCATE_TIMEOUT_S)
            except DHTError as error:
                _log.warning("move_not_agreed", address=node.address, error=str(error))
                await asyncio.sleep(RELOCATE_PAUSE_S * (0.5 + self._rng.random()))
            else:
                return
