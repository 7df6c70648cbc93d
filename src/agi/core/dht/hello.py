"""Who a node is to others, and whom it lets in: the judgement of the first message on each link (PROTOCOLS I1, I3)."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from agi.core.dht.calls import Calls
from agi.core.dht.errors import (
    ClonedNode,
    DHTError,
    HelloRefused,
    LinkClosed,
    NotReady,
    Overloaded,
    TransportError,
    Unavailable,
    UnknownDisk,
)
from agi.core.dht.identity import Ledger
from agi.core.dht.peers import Peers
from agi.core.dht.protocol.bootstrap import Bootstrap
from agi.core.dht.protocol.messages import ChangeState, Hello
from agi.core.dht.topology import unpack
from agi.core.dht.treekeeper import Own
from agi.core.dht.types import PROTOCOL_VERSION

if TYPE_CHECKING:
    from agi.core.dht.node import Node

_log = structlog.get_logger("agi.core.dht.node")

STORE_INTERVAL_S = 1.0
ANSWER_S = 1.0
"""An earlier process that is there answers within so long."""


def own_hello(node: Node, forming: Bootstrap | None) -> Hello:
    """What a node says of itself at this moment. `forming` is its part in an agreement that is not over."""
    config, identity = node.config, node.identity
    boottime_us, hlc = node.coordinator.registers.now() if node.coordinator is not None else (0, 0)
    return Hello(
        PROTOCOL_VERSION,
        "node",
        node.node_id,
        cluster=config.cluster.name,
        disk_id=identity.disk_id,
        boot=identity.boot,
        run_id=identity.run_id,
        runs=list(identity.runs),
        address=node.address,
        data_address=node.data_address,
        http_address=node.http_address,
        unix_path=node.unix_path,
        weight=config.node.weight,
        rack=config.node.rack,
        zone=config.node.zone,
        factor=config.replication.factor,
        virtual_nodes=config.ring.virtual_nodes,
        hash_algorithm=config.ring.hash_algorithm,
        peers=list(config.cluster.bootstrap_nodes),
        topology=node.topology.packed if node.topology is not None else b"",
        vote=forming.vote.packed if forming is not None and forming.vote is not None else b"",
        members_seen=forming.members_seen if forming is not None else [],
        settled=forming is not None and forming.settled,
        join=forming is not None and forming.joining,
        replaces=config.cluster.replaces,
        now_ms=node.replica.now_ms(),
        boottime_us=boottime_us,
        hlc=hlc,
    )


def check_hello(node: Node, boots: KnownBoots, theirs: Hello) -> None:
    """Judges another node. Raises a ClusterError that names the difference."""
    ours = node.config.shared_settings()
    differences = [
        f"{name} is {getattr(theirs, name)!r} at {theirs.name} and {value!r} at {node.node_id}"
        for name, value in ours.items()
        if getattr(theirs, name) != value
    ]
    if differences:
        raise HelloRefused(f"{theirs.name} and {node.node_id} do not fit: {'; '.join(differences)}")
    if theirs.name == node.node_id:
        if theirs.run_id != node.identity.run_id:
            raise ClonedNode(f"another process runs as {node.node_id}")
        return
    boots.check(theirs)
    topology = node.topology
    if topology is None:
        return
    if theirs.topology:  # before the disk is judged: it may be a newer epoch that names it
        node.epochs.hear_of(unpack(theirs.topology), theirs.name)
    member = topology.by_id.get(theirs.name)
    asks_for_its_place = theirs.replaces == theirs.name and not theirs.topology
    if member is not None and member.disk_id != theirs.disk_id and not asks_for_its_place:
        raise UnknownDisk(
            f"{theirs.name} came with a disk that the cluster does not know: this folder does not hold what the old "
            f"one acknowledged. If that is gone for good, start it with `--replace {theirs.name}`, or let "
            f"`agi-dht remove {theirs.name}` take it out first"
        )


class KnownBoots:
    """The last start seen of each disk. A folder that was restored or copied has started less often, or was started by
    other processes than were seen here, or by one while an earlier one runs (I3). What nobody can tell is a copy that
    is made, and started, after its original has ended for good: it goes on from there."""

    def __init__(self, ledger: Ledger, peers: Peers, calls: Calls, own: Own) -> None:
        self._ledger = ledger
        self._peers = peers
        self._calls = calls
        self._own = own
        self._known: dict[str, tuple[int, str]] = {}
        self._stored: dict[str, tuple[int, str]] = {}
        self._asked: set[str] = set()

    async def load(self) -> None:
        self._known = await self._ledger.boots()
        self._stored = dict(self._known)

    def check(self, theirs: Hello) -> None:
        """Raises ClonedNode; else remembers what the node said."""
        disk = f"{theirs.name}/{theirs.disk_id}"
        boot, run = self._known.get(disk, (0, ""))
        if theirs.boot < boot:
            raise ClonedNode(
                f"{theirs.name} starts from a restored or copied data folder: its boot counter is {theirs.boot}, "
                f"{boot} was seen before"
            )
        since = [theirs.run_id, *theirs.runs]  # by how much older they are
        if boot and theirs.boot - boot < len(since) and since[theirs.boot - boot] != run:
            raise ClonedNode(
                f"{theirs.name} starts from a restored or copied data folder: its start {boot} was another than the "
                "one that was seen"
            )
        self._check_alone(theirs)
        self._known[disk] = theirs.boot, theirs.run_id

    def _check_alone(self, theirs: Hello) -> None:
        """A machine that lost its power leaves links that nobody has ended, so an earlier process is asked first."""
        peer = self._peers.connected.get(theirs.name)
        hello = None if peer is None else peer.hello
        if hello is None or hello.disk_id != theirs.disk_id or hello.run_id == theirs.run_id:
            return
        if theirs.name not in self._asked:
            self._asked.add(theirs.name)
            self._own(self._ask(theirs.name, hello.run_id), "earlier process")
        raise ClonedNode(
            f"{theirs.name} is connected already: an earlier process from this data folder, or a copy of it, runs yet, "
            "or was lost a moment ago"
        )

    async def _ask(self, name: str, run_id: str) -> None:
        """Ends the links to a process that does not answer any more."""
        try:
            async with asyncio.timeout(ANSWER_S):
                await self._calls.call(name, ChangeState(0, 0))
        except (NotReady, Overloaded):
            return  # an answer too
        except (TimeoutError, TransportError, Unavailable):
            peer = self._peers.connected.get(name)
            if peer is not None and peer.hello is not None and peer.hello.run_id == run_id:
                for link in peer.links.copy():
                    link.close(LinkClosed(f"{name} does not answer, and has started anew"))
        except DHTError:
            return
        finally:
            self._asked.discard(name)

    async def keep(self) -> None:
        """Stores what was learnt, for ever."""
        while True:
            await asyncio.sleep(STORE_INTERVAL_S)
            if self._known != self._stored:
                known = dict(self._known)
                try:
                    await self._ledger.store_boots(known)
                except DHTError as error:
                    _log.warning("boots_not_stored", error=str(error))
                else:
                    self._stored = known
