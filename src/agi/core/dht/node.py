"""One node: wires store, replica, coordinator, peers and bootstrap together and serves the links of others.

What differs between a process and a simulated host is passed in: the store, the transports, the clock and the source of
randomness. Everything that runs in the background is owned here: a task that ends by an error stops the node, loudly.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

import msgspec
import structlog

from agi.core.dht.acceptor import Acceptor
from agi.core.dht.antientropy import REQUESTS as TREE_REQUESTS
from agi.core.dht.antientropy import AntiEntropy
from agi.core.dht.bootstrap import Bootstrapper
from agi.core.dht.calls import ID_BASE, Calls, Reply
from agi.core.dht.changes import Changes
from agi.core.dht.client_requests import ClientRequests
from agi.core.dht.clock import Clock
from agi.core.dht.config import Config
from agi.core.dht.coordinator import Coordinator
from agi.core.dht.epochs import Epochs
from agi.core.dht.errors import (
    DHTError,
    FrameTooLarge,
    HelloRefused,
    LinkClosed,
    NotReady,
    Overloaded,
    ProtocolMismatch,
    UnknownDisk,
)
from agi.core.dht.gossip import MESSAGES, FailureDetector, StatusCallback
from agi.core.dht.handoff import Handoff
from agi.core.dht.hello import KnownBoots, check_hello, own_hello
from agi.core.dht.identity import Identity, Ledger
from agi.core.dht.joint import JointRing
from agi.core.dht.migration import REQUESTS as MIGRATION_REQUESTS
from agi.core.dht.migration import Migration
from agi.core.dht.observability.logs import Throttle
from agi.core.dht.observability.metrics import Metrics
from agi.core.dht.peers import Peer, Peers
from agi.core.dht.protocol.bootstrap import Bootstrap
from agi.core.dht.protocol.messages import (
    Delete,
    EpochAccept,
    EpochPrepare,
    Get,
    Hello,
    Put,
    Query,
    Refused,
    RegisterAccept,
    RegisterAccepted,
    RegisterPrepare,
    RegisterPromises,
    ReplicaRead,
    ReplicaReadReply,
    ReplicaScan,
    ReplicaWrite,
    ReplicaWriteReply,
    Scan,
    TopologyDigest,
    TopologyNews,
    Update,
    Watch,
)
from agi.core.dht.protocol.timers import TICK_S
from agi.core.dht.protocol.versioning import HLC, writer_id
from agi.core.dht.queries import Queries
from agi.core.dht.reclaim import REQUESTS as RECLAIM_REQUESTS
from agi.core.dht.reclaim import Reclaimer
from agi.core.dht.replica import Replica
from agi.core.dht.replica_requests import ReplicaRequests
from agi.core.dht.ring import Ring
from agi.core.dht.scan import Scanner
from agi.core.dht.sessions import Session, say_goodbye
from agi.core.dht.storage.base import StorageBackend
from agi.core.dht.tasks import end
from agi.core.dht.topology import JOINING, LEAVING, Member, Topology
from agi.core.dht.transport.base import Link, Listener, Traffic, Transport
from agi.core.dht.types import (
    PROTOCOL_VERSION,
    format_address,
    parse_address,
)

_log = structlog.get_logger("agi.core.dht.node")

LINKS_MAX = 4096
"""Accepted links at one node; past it the longest waiting stranger is refused."""
SETTLE_S = 1.0
GOODBYE_S = 2.0
"""A node that drains waits so long, but no longer than it drains, until its clients have closed their links."""


Handler: TypeAlias = Callable[["Session", Link, Any], None]


class Node:
    """One member of a cluster.

    Args:
        node_id, address: its name and the gRPC address that others reach it by.
        store: not yet open; the node opens and closes it.
        seed: the transport that reaches gRPC addresses; the caller lets its links arrive at this node as handler.
        data: the transport of the data wire, on which the node listens itself.
        data_listen: addresses to listen on with `data`; the first is the one announced.
        on_fatal: told when the node cannot go on (the store failed, a background task died).

    `start` returns when the node listens; `formed` is set once it has a topology.
    """

    def __init__(
        self,
        config: Config,
        *,
        node_id: str,
        address: str,
        store: StorageBackend,
        seed: Transport,
        data: Transport,
        data_listen: list[str],
        clock: Clock,
        rng: random.Random,
        on_fatal: Callable[[DHTError], None],
    ) -> None:
        self.config = config
        self.node_id = node_id
        self.address = address
        self.http_address = ""
        """Announced to the others; whoever serves it sets it before `start`."""
        self.store = store
        self.clock = clock
        self.metrics = Metrics()
        self.topology: Topology | None = None
        self.ring: Ring | JointRing | None = None
        self.formed = asyncio.Event()
        self.data_address = ""
        self.unix_path = ""
        self.coordinator: Coordinator | None = None
        self.fatal: DHTError | None = None
        self.stopping = False
        self._settled = self._leaving = False
        self.seed = seed
        self._data = data
        self._data_listen = data_listen
        self._rng = rng
        self._on_fatal = on_fatal
        self._ledger = Ledger(store)
        self._ledger.on_failed = self.fail
        self._hlc = HLC()
        self._identity: Identity | None = None
        self._bootstrap: Bootstrapper | None = None
        self._sessions: dict[tuple[str, str], Session] = {}
        self._links = 0
        self._listeners: list[Listener] = []
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._debug = config.observability.log_level == "debug"
        """Then every request and replica message is logged with its correlation id."""
        self._failures = Throttle()
        self.replica = Replica(
            store, self._hlc, clock, self.metrics, max_clock_skew_ms=config.versions.max_clock_skew_ms
        )
        self.replica.on_store_failed = self.fail
        self.acceptor = Acceptor(self.replica, clock)
        self.scanner: Scanner | None = None
        self.peers = Peers(
            seed,
            data,
            hello=self.hello,
            check=self.check_hello,
            on_message=self._peer_message,
            on_connected=self._peer_connected,
            on_lost=self._peer_lost,
            on_failed=self.fail,
            clock=clock,
            rng=rng,
            pool_size=config.network.connection_pool_size,
            hedge_percentile=config.requests.hedge_percentile,
        )
        self.detector = FailureDetector(node_id, self.peers, config.pace(), clock, rng, self._peer_gone)
        self.calls = Calls(self.peers)
        self._boots = KnownBoots(self._ledger, self.peers, self.calls, self._own)
        self.handoff = Handoff(
            node_id,
            store,
            self.replica,
            self.peers,
            self.calls,
            clock,
            bytes_max=config.hints.bytes_max_mb << 20,
            age_max_s=config.hints.age_max_s,
            bytes_per_s=config.hints.replay_bytes_per_s,
            on_own_loss=lambda: self.antientropy.missed(),
        )
        self.detector.on_status(lambda member, status: self.handoff.wake())
        self.queries = Queries(self, self._own)
        self._replica_requests = ReplicaRequests(self, self._own)
        self.antientropy = AntiEntropy(
            node_id,
            self.replica,
            self.peers,
            self.calls,
            clock,
            rng,
            self._own,
            self._replica_requests.stale,
            interval_s=config.repair.interval_ms / 1000,
            bytes_per_s=config.repair.bytes_per_s,
            build_keys_per_s=config.repair.build_keys_per_s,
            timeout_s=config.network.timeout_ms / 1000,
            max_clock_skew_ms=config.versions.max_clock_skew_ms,
        )
        self.reclaimer = Reclaimer(
            self,
            self._ledger,
            rng,
            self._own,
            self._replica_requests.stale,
            interval_s=config.reclaim.interval_ms / 1000,
            lag_s=config.reclaim.lag_ms / 1000,
        )
        self.migration = Migration(
            node_id,
            self.replica,
            self.antientropy.keeper,
            self.peers,
            self.calls,
            self.reclaimer,
            clock,
            rng,
            self._own,
            self._replica_requests.stale,
            bytes_per_s=config.migration.bytes_per_s,
        )
        self.epochs = Epochs(self, self._ledger, rng, self._own)
        self.changes = Changes(
            self,
            rng,
            self._own,
            join_timeout_s=config.migration.join_timeout_ms / 1000,
            eviction_timeout_s=config.migration.eviction_timeout_ms / 1000,
        )
        self._client_requests = ClientRequests(self)
        self._dispatch: dict[type, Handler] = {
            Get: self._client_requests.get,
            Put: self._client_requests.put,
            Delete: self._client_requests.delete,
            Scan: self._client_requests.scan,
            Query: self.queries.request,
            EpochPrepare: self.epochs.vote,
            EpochAccept: self.epochs.vote,
            TopologyDigest: self.epochs.digest,
            TopologyNews: self.epochs.news,
            ReplicaRead: self._replica_requests.read,
            ReplicaWrite: self._replica_requests.write,
            RegisterPrepare: self._replica_requests.prepare,
            RegisterAccept: self._replica_requests.accept,
            Update: self._client_requests.update,
            Watch: self._client_requests.watch,
            ReplicaScan: self._replica_requests.scan,
            **dict.fromkeys(TREE_REQUESTS, self.antientropy.request),
            **dict.fromkeys(MIGRATION_REQUESTS, self.migration.request),
            **dict.fromkeys(RECLAIM_REQUESTS, self.reclaimer.request),
            **dict.fromkeys(MESSAGES, self.detector.request),
        }

    # --- life

    async def start(self) -> None:
        """Opens the store, raises the boot counter, listens, and begins to form or resume. Raises StorageError kinds,
        ConnectFailed where an address cannot be bound."""
        await self.store.open()
        try:
            self._identity = await self._ledger.open(self.node_id, self.config, self._rng, self.address)
            await self._boots.load()
            await self.handoff.load()
            await self.reclaimer.load()
            await self.acceptor.load()
            topology = await self._ledger.topology()
            vote = await self._ledger.vote()
            if topology is not None:
                self._check_own(topology)
            for address in self._data_listen:
                listener = await self._data.listen(address, self)
                self._listeners.append(listener)
                if address.startswith("unix:"):
                    self.unix_path = address[5:]
                elif not self.data_address:
                    # under the host that others reach: the bound one may be a wildcard
                    host, _ = parse_address(self.address)
                    self.data_address = format_address(host, parse_address(listener.address)[1])
        except BaseException:
            for listener in self._listeners:
                await listener.close()
            await self.store.close()
            raise
        self.replica.start()
        if topology is not None:
            self._form(topology)
        else:
            self._own(self._bootstrap_task(vote), "bootstrap")
        self._own(self._tick(), "tick")
        expiry = self.config.expiry
        self._own(self.replica.keep_swept(expiry.sweep_interval_ms / 1000, expiry.sweep_step), "sweep")
        self._own(self._boots.keep(), "boots")
        self._own(self.handoff.save(), "hints")
        self._own(self.handoff.replay(), "handoff")
        self._own(self.handoff.tell(), "lost hints")

    def _check_own(self, topology: Topology) -> None:
        assert self._identity is not None
        mine = topology.by_id.get(self.node_id)
        if mine is None or mine.disk_id != self._identity.disk_id:
            raise UnknownDisk(f"the stored topology does not name {self.node_id} with this disk")

    async def stop(self, drain_s: float = 0.0) -> None:
        """Refuses new requests, lets those under way finish for up to `drain_s`, then closes everything."""
        self.stopping = self.handoff.stopping = True
        self.detector.leave()
        for listener in self._listeners:
            await listener.close()
        say_goodbye(self._sessions.values())
        if self.coordinator is not None:
            self.coordinator.registers.watches.end()
        now = self.clock.monotonic
        deadline, parted = now() + drain_s, now() + min(drain_s, GOODBYE_S)
        while (self._busy() and now() < deadline) or (self._clients() and now() < parted):  # noqa: ASYNC110  # nobody signals
            await asyncio.sleep(0.01)
        await end(self._tasks)
        if self.scanner is not None:
            await self.scanner.stop()
        self.detector.stop()
        await self.peers.stop()
        for session in list(self._sessions.values()):
            for link in list(session.links):
                link.close()
        await self.replica.stop()
        await self.handoff.stop()
        await self.store.close()

    def _clients(self) -> bool:
        return any(kind == "client" for kind, _ in self._sessions)

    def _busy(self) -> bool:
        requests = self.coordinator is not None and self.coordinator.pending > 0
        scans = self._replica_requests.scans > 0 or (self.scanner is not None and self.scanner.pending > 0)
        return requests or scans or self.queries.under_way > 0 or self.replica.unsynced or self.handoff.busy

    def _own(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks[task] = None
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.critical("background_task_failed", task=task.get_name(), error=repr(error), exc_info=error)
            self.fail(error if isinstance(error, DHTError) else DHTError(f"{task.get_name()} failed: {error!r}"))

    def fail(self, error: DHTError) -> None:
        """The node cannot go on; whoever runs it is told."""
        if self.fatal is None:
            self.fatal = error
            self._on_fatal(error)

    # --- forming

    @property
    def started(self) -> bool:
        """Whether the store is open and the node knows who it is."""
        return self._identity is not None

    @property
    def serving(self) -> bool:
        """Whether requests are taken: from the first moment at which quorums are connected, or SETTLE_S after forming,
        when what needs no quorum works and the rest fails by itself, until the node stops or leaves: then clients go
        elsewhere, and what is under way ends before the others close their links."""
        return self._settled and not self.stopping and not self._leaving

    @property
    def epoch(self) -> int:
        """0 before there is a topology."""
        return self.topology.epoch if self.topology is not None else 0

    @property
    def known_topology(self) -> Topology:
        assert self.topology is not None, "the node has not formed"
        return self.topology

    @property
    def links(self) -> int:
        """Accepted links."""
        return self._links

    @property
    def traffic(self) -> Traffic | None:
        """What the data wire has carried."""
        return self._data.traffic

    def on_member_status(self, callback: StatusCallback) -> None:
        """Calls it with (node id, MemberStatus) whenever this node learns that another's state has changed."""
        self.detector.on_status(callback)

    @property
    def identity(self) -> Identity:
        assert self._identity is not None, "the node has not started"
        return self._identity

    @property
    def waiting_for(self) -> str:
        """Why the node is not ready; empty once it is."""
        if self.fatal is not None:
            return str(self.fatal)
        if self.stopping or self._leaving:
            return "stopping" if self.stopping else "leaving the cluster"
        if self.topology is None:
            return self._bootstrap.reason if self._bootstrap is not None else "starting"
        if self.config.replication.factor > 1:
            reachable = 1 + len(self.peers.usable)
            missing = sorted(set(self.peers.all) - set(self.peers.usable))
            if reachable <= len(self.topology.members) - self.topology.replica_count // 2 - 1 and missing:
                why = self.peers.all[missing[0]].last_error
                return f"too few peers are connected for quorums: {', '.join(missing)} missing{why and f' ({why})'}"
        me = self.topology.by_id.get(self.node_id)
        if me is not None and me.state == JOINING:
            return f"joining: {self.migration.arcs_done} of {self.migration.arcs} arcs are filled"
        return ""

    async def _bootstrap_task(self, vote: Topology | None) -> None:
        config, identity = self.config, self.identity
        me = Member(
            self.node_id, identity.disk_id, self.address, config.node.weight, config.node.rack, config.node.zone
        )
        core = Bootstrap(
            me,
            [address for address in config.cluster.bootstrap_nodes if address != self.address],
            config.cluster.force_start_without,
            lambda members: Topology.first(
                config.cluster.name,
                config.replication.factor,
                config.ring.virtual_nodes,
                config.ring.hash_algorithm,
                members,
            ),
            vote,
            config.cluster.replaces,
        )
        if config.cluster.force_start_without:
            _log.critical("forced_start", without=config.cluster.force_start_without)
        self._bootstrap = Bootstrapper(core, self._ledger, self.seed, self.hello, self.check_hello, self._rng)
        self._form(await self._bootstrap.run())

    def _form(self, topology: Topology) -> None:
        config = self.config
        self.topology = topology
        self.ring = topology.ring()
        self.scanner = Scanner(
            self.node_id,
            topology,
            self.ring,
            self.replica,
            self.peers,
            self.calls,
            self.clock,
            self.metrics,
            on_stale=self.epochs.ask,
        )
        self.coordinator = Coordinator(
            self.node_id,
            writer_id(self.node_id, self.identity.boot),
            topology,
            self.ring,
            self.replica,
            self.peers,
            self.acceptor,
            self._hlc,
            self.clock,
            self._rng,
            self.metrics,
            hint=self.handoff.missed,
            hedge_budget=config.requests.hedge_budget,
            dedup_entries=config.requests.dedup_entries,
            max_clock_skew_ms=config.versions.max_clock_skew_ms,
            pending_bytes_max=config.requests.pending_bytes_max_mb << 20,
            queue_s=config.requests.queue_ms / 1000,
            slow_request_ms=config.observability.slow_request_ms,
            on_stale=self.epochs.ask,
        )
        self.scanner.decide = self.coordinator.registers.run
        self.handoff.adopt(topology)
        self.antientropy.start(topology, self.ring)
        self.migration.adopt(topology, self.ring)
        self.detector.start(topology, self.identity.boot)
        self.epochs.start(topology)
        self.changes.start()
        self.reclaimer.start()
        self._leaving = topology.by_id[self.node_id].state == LEAVING
        self._link_to_members(topology)
        self.formed.set()
        self._look_for_quorums()
        asyncio.get_running_loop().call_later(SETTLE_S, self._settle)
        _log.info(
            "topology_adopted",
            cluster=topology.cluster,
            epoch=topology.epoch,
            digest=topology.digest,
            members=[member.node_id for member in topology.members],
        )

    def _link_to_members(self, topology: Topology) -> None:
        self.peers.adopt([member for member in topology.members if member.node_id != self.node_id])

    def put_in_force(self, topology: Topology) -> None:
        """A newer topology, already stored, is what this node goes by from now on."""
        assert self.coordinator is not None and self.scanner is not None and self.ring is not None
        if topology.placement != self.known_topology.placement:
            self.ring = topology.ring()
        self.topology = topology
        self.coordinator.adopt(topology, self.ring)
        self.scanner.adopt(topology, self.ring)
        self.handoff.adopt(topology)
        self.antientropy.adopt(topology, self.ring)
        self.migration.adopt(topology, self.ring)
        self.detector.set_members(topology)
        self.epochs.let_go(topology)
        self._link_to_members(topology)
        self._leaving = topology.by_id[self.node_id].state == LEAVING
        self._replica_requests.resume()

    def _look_for_quorums(self) -> None:
        if not self._settled and not self.waiting_for:
            self._settle()

    def _settle(self) -> None:
        self._settled = True

    # --- who may talk to this node

    def hello(self) -> Hello:
        """What this node says of itself at this moment."""
        core = self._bootstrap.core if self._bootstrap is not None and self.topology is None else None
        return own_hello(self, core)

    def check_hello(self, theirs: Hello) -> None:
        """Judges another node. Raises a ClusterError that names the difference."""
        check_hello(self, self._boots, theirs)

    # --- links of others

    def message(self, link: Link, message: msgspec.Struct) -> None:
        """LinkHandler: a message on an accepted link."""
        self.metrics.frames_received += 1
        session = link.context
        if session is None:
            self._greeted(link, message)
            return
        handler = self._dispatch.get(message.__class__)
        if handler is None:
            raise ProtocolMismatch(f"a {type(message).__name__} is no request")
        handler(session, link, message)  # type: ignore[arg-type]  # contexts are Sessions here

    def link_closed(self, link: Link, error: DHTError | None) -> None:
        """LinkHandler: an accepted link ended."""
        if isinstance(error, ProtocolMismatch | FrameTooLarge) and self._failures.pass_(self.clock.monotonic()):
            _log.warning("link_refused", peer=link.peer, error=str(error))
        session = link.context
        if isinstance(session, Session):
            self._links -= 1
            session.links.remove(link)
            if not session.links and self._sessions.get((session.kind, session.name)) is session:
                del self._sessions[session.kind, session.name]

    def _greeted(self, link: Link, message: msgspec.Struct) -> None:
        if not isinstance(message, Hello):
            raise ProtocolMismatch("the first message of a link is a Hello")
        try:
            if message.protocol != PROTOCOL_VERSION:
                raise ProtocolMismatch(
                    f"{message.name} speaks protocol {message.protocol}, {self.node_id} speaks {PROTOCOL_VERSION}"
                )
            if self.stopping and message.kind == "client":  # it has just been sent away
                raise NotReady(f"{self.node_id} is not ready: stopping")
            if self._links >= LINKS_MAX:
                raise Overloaded(f"{self.node_id} has {LINKS_MAX} links already")
            if message.kind == "node":
                self.check_hello(message)
                if message.join:
                    self.changes.asked_to_join(message)
            elif message.kind != "client":
                raise ProtocolMismatch(f"a Hello comes from a node or a client, not {message.kind!r}")
            elif message.cluster and message.cluster != self.config.cluster.name:
                raise HelloRefused(f"this is cluster {self.config.cluster.name!r}, not {message.cluster!r}")
        except DHTError as error:
            _log.warning("hello_refused", peer=link.peer, name=message.name, error=str(error))
            link.send(Refused(error.to_wire()))
            link.close()
            return
        key = (message.kind, message.name)
        session = self._sessions.get(key)
        if session is not None and session.run_id != message.run_id:
            for earlier in session.links.copy():  # of a process that this one follows
                earlier.close(LinkClosed(f"another process of {message.name} has started"))
            session = None
        if session is None:
            known = self.topology.by_id.get(message.name) if self.topology is not None else None
            member = message.kind == "node" and known is not None and known.disk_id == message.disk_id
            session = self._sessions[key] = Session(message.kind, message.name, message.run_id, member)
        session.links.append(link)
        self._links += 1
        link.context = session
        link.send(self.hello())
        if message.kind == "node":
            self.peers.heard_of(message)

    # --- replies of peers

    def _peer_message(self, peer: Peer, message: msgspec.Struct) -> None:
        self.metrics.frames_received += 1
        coordinator = self.coordinator
        assert coordinator is not None
        if isinstance(message, ReplicaReadReply) and message.id < ID_BASE:  # what comes most, first
            coordinator.replica_read_reply(peer, message)
        elif isinstance(message, ReplicaWriteReply) and message.id < ID_BASE:
            coordinator.replica_write_reply(peer, message)
        elif isinstance(message, RegisterPromises | RegisterAccepted):
            coordinator.registers.reply(peer, message)
        elif isinstance(message, Reply):
            self.calls.reply(peer, message)
        elif isinstance(message, TopologyNews):
            self.epochs.told(peer, message)
        else:
            self.detector.reply(peer, message)

    def _peer_connected(self, peer: Peer) -> None:
        self.detector.connected(peer)
        self.handoff.connected(peer)
        self.antientropy.connected(peer.node_id, peer.hello.boot if peer.hello is not None else 0)
        self._look_for_quorums()

    def _peer_lost(self, node_id: str, error: DHTError) -> None:
        self.detector.lost(node_id)
        self._peer_gone(node_id, error)

    def _peer_gone(self, node_id: str, error: DHTError) -> None:
        """Nothing waits for it any more."""
        self.calls.peer_lost(node_id, error)
        if self.coordinator is not None:
            self.coordinator.peer_lost(node_id, error)

    # --- background

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            if self.coordinator is not None:
                self.coordinator.advance(self.clock.monotonic())
                self.coordinator.registers.settle_abandoned()
