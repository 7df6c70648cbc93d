"""One node: wires store, replica, coordinator, peers and bootstrap together and serves the links of others.

What differs between a process and a simulated host is passed in: the store, the transports, the clock and the source of
randomness. Everything that runs in the background is owned here: a task that ends by an error stops the node, loudly.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeAlias

import msgspec
import structlog

from agi.core.dht.bootstrap import Bootstrapper
from agi.core.dht.calls import ID_BASE, Calls
from agi.core.dht.clock import Clock
from agi.core.dht.config import Config
from agi.core.dht.coordinator import Coordinator
from agi.core.dht.errors import (
    DHTError,
    FrameTooLarge,
    HelloRefused,
    NotReady,
    Overloaded,
    ProtocolMismatch,
    StaleEpoch,
    TransportError,
    UnknownDisk,
    from_wire,
)
from agi.core.dht.hello import KnownBoots, check_hello, own_hello
from agi.core.dht.identity import Identity, Ledger
from agi.core.dht.observability.logs import Throttle
from agi.core.dht.observability.metrics import Metrics
from agi.core.dht.peers import Peer, Peers
from agi.core.dht.protocol.bootstrap import Bootstrap
from agi.core.dht.protocol.messages import (
    Delete,
    DeleteReply,
    Get,
    GetReply,
    Hello,
    KeyError_,
    Message,
    Put,
    PutReply,
    Query,
    QueryReply,
    Refused,
    ReplicaRead,
    ReplicaReadReply,
    ReplicaScan,
    ReplicaScanReply,
    ReplicaWrite,
    ReplicaWriteReply,
    Scan,
    ScanReply,
    WireError,
)
from agi.core.dht.protocol.timers import TICK_S
from agi.core.dht.protocol.versioning import HLC, writer_id
from agi.core.dht.queries import Queries
from agi.core.dht.reads import TRUNCATED
from agi.core.dht.replica import Replica
from agi.core.dht.requests import TIMEOUT_MS_MAX
from agi.core.dht.ring import Ring
from agi.core.dht.scan import Scanner
from agi.core.dht.storage.base import Page, StorageBackend
from agi.core.dht.topology import Member, Topology
from agi.core.dht.transport.base import Link, Listener, Traffic, Transport
from agi.core.dht.transport.codec import encode
from agi.core.dht.types import (
    BATCH_BYTES_MAX,
    BULK_VALUE_BYTES,
    PROTOCOL_VERSION,
    SCAN_LIMIT_MAX,
    format_address,
    parse_address,
)

_log = structlog.get_logger("agi.core.dht.node")

LINKS_MAX = 4096
"""Accepted links at one node; past it the longest waiting stranger is refused."""
REPLICA_SCANS_MAX = 256
QUERIES_MAX = 256
"""Questions under way at one node; past it callers get Overloaded."""


class Session:
    """The other side of an accepted link, after its Hello. Links of one peer share it: replies too large for the link
    of the request leave on another."""

    __slots__ = ("kind", "links", "member", "name")

    def __init__(self, kind: str, name: str, member: bool) -> None:
        self.kind = kind
        self.name = name
        self.member = member
        self.links: list[Link] = []

    def send(self, link: Link, message: Message) -> None:
        """Answers on the link of the request, or for large frames on another of the pool. Raises TransportError."""
        frame = encode(message)
        if len(frame) >= BULK_VALUE_BYTES and len(self.links) > 1:
            link = self.links[-1] if link is self.links[0] else link
        link.send_frame(frame)


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
        self.ring: Ring | None = None
        self.formed = asyncio.Event()
        self.data_address = ""
        self.unix_path = ""
        self.coordinator: Coordinator | None = None
        self.fatal: DHTError | None = None
        self.stopping = False
        self._seed = seed
        self._data = data
        self._data_listen = data_listen
        self._rng = rng
        self._on_fatal = on_fatal
        self._ledger = Ledger(store)
        self._hlc = HLC()
        self._identity: Identity | None = None
        self._bootstrap: Bootstrapper | None = None
        self._boots = KnownBoots(self._ledger)
        self._sessions: dict[tuple[str, str], Session] = {}
        self._links = 0
        self._listeners: list[Listener] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._scans = 0
        self._queries = 0
        self._debug = config.observability.log_level == "debug"
        """Then every request and replica message is logged with its correlation id."""
        self._failures = Throttle()
        self.replica = Replica(
            store, self._hlc, clock, self.metrics, max_clock_skew_ms=config.versions.max_clock_skew_ms
        )
        self.replica.on_store_failed = self._fatal
        self.scanner: Scanner | None = None
        self.peers = Peers(
            seed,
            data,
            hello=self.hello,
            check=self.check_hello,
            on_message=self._peer_message,
            on_lost=self._peer_lost,
            on_failed=self._fatal,
            clock=clock,
            rng=rng,
            pool_size=config.network.connection_pool_size,
            hedge_percentile=config.requests.hedge_percentile,
        )
        self.calls = Calls(self.peers)
        self.queries = Queries(self)
        self._dispatch: dict[type, Handler] = {
            Get: self._get,
            Put: self._put,
            Delete: self._delete,
            Scan: self._scan,
            Query: self._query,
            ReplicaRead: self._replica_read,
            ReplicaWrite: self._replica_write,
            ReplicaScan: self._replica_scan,
        }

    # --- life

    async def start(self) -> None:
        """Opens the store, raises the boot counter, listens, and begins to form or resume. Raises StorageError kinds,
        ConnectFailed where an address cannot be bound."""
        await self.store.open()
        try:
            self._identity = await self._ledger.open(self.node_id, self.config, self._rng)
            await self._boots.load()
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
        self._own(self._sweep(), "sweep")
        self._own(self._boots.keep(), "boots")

    def _check_own(self, topology: Topology) -> None:
        assert self._identity is not None
        mine = topology.by_id.get(self.node_id)
        if mine is None or mine.disk_id != self._identity.disk_id:
            raise UnknownDisk(f"the stored topology does not name {self.node_id} with this disk")

    async def stop(self, drain_s: float = 0.0) -> None:
        """Refuses new requests, lets those under way finish for up to `drain_s`, then closes everything."""
        self.stopping = True
        for listener in self._listeners:
            await listener.close()
        deadline = self.clock.monotonic() + drain_s
        while self._busy() and self.clock.monotonic() < deadline:  # noqa: ASYNC110  # the hot path signals nobody
            await asyncio.sleep(0.01)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.scanner is not None:
            await self.scanner.stop()
        await self.peers.stop()
        for session in list(self._sessions.values()):
            for link in list(session.links):
                link.close()
        await self.replica.stop()
        await self.store.close()

    def _busy(self) -> bool:
        return (self.coordinator is not None and self.coordinator.pending > 0) or self.replica.unsynced

    def _own(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.critical("background_task_failed", task=task.get_name(), error=repr(error), exc_info=error)
            self._fatal(error if isinstance(error, DHTError) else DHTError(f"{task.get_name()} failed: {error!r}"))

    def _fatal(self, error: DHTError) -> None:
        if self.fatal is None:
            self.fatal = error
            self._on_fatal(error)

    # --- forming

    @property
    def started(self) -> bool:
        """Whether the store is open and the node knows who it is."""
        return self._identity is not None

    @property
    def epoch(self) -> int:
        """0 before there is a topology."""
        return self.topology.epoch if self.topology is not None else 0

    @property
    def links(self) -> int:
        """Accepted links."""
        return self._links

    @property
    def traffic(self) -> Traffic | None:
        """What the data wire has carried."""
        return self._data.traffic

    @property
    def identity(self) -> Identity:
        assert self._identity is not None, "the node has not started"
        return self._identity

    @property
    def waiting_for(self) -> str:
        """Why the node is not ready; empty once it is."""
        if self.fatal is not None:
            return str(self.fatal)
        if self.stopping:
            return "stopping"
        if self.topology is None:
            return self._bootstrap.reason if self._bootstrap is not None else "starting"
        if self.config.replication.factor > 1:
            reachable = 1 + len(self.peers.connected)
            missing = sorted(set(self.peers.all) - set(self.peers.connected))
            if reachable <= len(self.topology.members) - self.topology.replica_count // 2 - 1 and missing:
                return f"too few peers are connected for quorums: {', '.join(missing)} missing"
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
        )
        if config.cluster.force_start_without:
            _log.critical("forced_start", without=config.cluster.force_start_without)
        self._bootstrap = Bootstrapper(core, self._ledger, self._seed, self.hello, self.check_hello, self._rng)
        self._form(await self._bootstrap.run())

    def _form(self, topology: Topology) -> None:
        config = self.config
        self.topology = topology
        self.ring = topology.ring()
        self.scanner = Scanner(
            self.node_id, topology, self.ring, self.replica, self.peers, self.calls, self.clock, self.metrics
        )
        self.coordinator = Coordinator(
            self.node_id,
            writer_id(self.node_id, self.identity.boot),
            topology,
            self.ring,
            self.replica,
            self.peers,
            self._hlc,
            self.clock,
            self.metrics,
            hedge_budget=config.requests.hedge_budget,
            dedup_entries=config.requests.dedup_entries,
            max_clock_skew_ms=config.versions.max_clock_skew_ms,
            pending_bytes_max=config.requests.pending_bytes_max_mb << 20,
            slow_request_ms=config.observability.slow_request_ms,
        )
        self.peers.start([member for member in topology.members if member.node_id != self.node_id])
        self.formed.set()
        _log.info(
            "topology_adopted",
            cluster=topology.cluster,
            epoch=topology.epoch,
            digest=topology.digest,
            members=[member.node_id for member in topology.members],
        )

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
            if not session.links:
                self._sessions.pop((session.kind, session.name), None)

    def _greeted(self, link: Link, message: msgspec.Struct) -> None:
        if not isinstance(message, Hello):
            raise ProtocolMismatch("the first message of a link is a Hello")
        try:
            if message.protocol != PROTOCOL_VERSION:
                raise ProtocolMismatch(
                    f"{message.name} speaks protocol {message.protocol}, {self.node_id} speaks {PROTOCOL_VERSION}"
                )
            if self._links >= LINKS_MAX:
                raise Overloaded(f"{self.node_id} has {LINKS_MAX} links already")
            if message.kind == "node":
                self.check_hello(message)
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
        if session is None:
            member = message.kind == "node" and self.topology is not None and message.name in self.topology.by_id
            session = self._sessions[key] = Session(message.kind, message.name, member)
        session.links.append(link)
        self._links += 1
        link.context = session
        link.send(self.hello())

    # --- requests of clients

    def _ready(self) -> WireError | None:
        if self.coordinator is None or self.stopping:
            return NotReady(f"{self.node_id} is not ready: {self.waiting_for}").to_wire()
        return None

    def _get(self, session: Session, link: Link, request: Get) -> None:
        if self.coordinator is None or self.stopping:
            link.send(GetReply(request.id, [], None, self._ready()))
            return
        if self._debug:
            _log.debug("get", trace=f"{session.name}:{request.id}", keys=len(request.keys))
        self.coordinator.get(request, partial(self._answer_get, session, link), f"{session.name}:{request.id}")

    def _answer_get(self, session: Session, link: Link, reply: Message) -> None:
        """Sends the reply, cut to what one frame may hold: the client asks again for the rest."""
        try:
            session.send(link, reply)
        except FrameTooLarge:
            assert isinstance(reply, GetReply)
            kept = cut(reply.records)
            rest: list[KeyError_] = [(i, TRUNCATED.to_wire()) for i in range(len(kept), len(reply.records))]
            kept += [None] * len(rest)
            session.send(link, GetReply(reply.id, kept, (reply.errors or []) + rest, reply.error))

    def _put(self, session: Session, link: Link, request: Put) -> None:
        if self.coordinator is None or self.stopping:
            link.send(PutReply(request.id, [], None, self._ready()))
            return
        if self._debug:
            _log.debug("put", trace=f"{session.name}:{request.id}", keys=len(request.keys), retry=request.retry)
        self.coordinator.put(request, link.send, session.name)

    def _delete(self, session: Session, link: Link, request: Delete) -> None:
        if self.coordinator is None or self.stopping:
            link.send(DeleteReply(request.id, [], None, self._ready()))
            return
        if self._debug:
            _log.debug("delete", trace=f"{session.name}:{request.id}", keys=len(request.keys), retry=request.retry)
        self.coordinator.delete(request, link.send, session.name)

    def _scan(self, session: Session, link: Link, request: Scan) -> None:
        if self.scanner is None or self.stopping:
            link.send(ScanReply(request.id, [], [], b"", self._ready()))
            return
        if self._debug:
            _log.debug("scan", trace=f"{session.name}:{request.id}", limit=request.limit)
        self.scanner.scan(request, partial(session.send, link), f"{session.name}:{request.id}")

    def _query(self, session: Session, link: Link, request: Query) -> None:
        if self._queries >= QUERIES_MAX:
            error = Overloaded(f"{self._queries} questions are under way at {self.node_id} already")
            link.send(QueryReply(request.id, b"", error.to_wire()))
            return
        self._queries += 1
        self._own(self._answer_query(session, link, request), "query")

    async def _answer_query(self, session: Session, link: Link, request: Query) -> None:
        try:
            reply = QueryReply(request.id, *await self._answer(request))
        finally:
            self._queries -= 1
        try:
            session.send(link, reply)
        except (TransportError, Overloaded) as error:
            _log.info("reply_undeliverable", peer=session.name, error=str(error))

    async def _answer(self, request: Query) -> tuple[bytes, WireError | None]:
        try:
            async with asyncio.timeout(min(max(1, request.timeout_ms), TIMEOUT_MS_MAX) / 1000):
                return await self.queries.answer(request.what, request.key), None
        except DHTError as error:
            return b"", error.to_wire()
        except TimeoutError:
            return b"", NotReady("no answer by the deadline").to_wire()

    # --- requests of coordinators

    def _stale(self, session: Session, epoch: int) -> WireError | None:
        """Why a replica request is refused. Clients may read replicas directly; only members may write to them."""
        if self.topology is None:
            return NotReady(f"{self.node_id} is not ready: {self.waiting_for}").to_wire()
        if not session.member and session.kind != "client":
            session.member = session.kind == "node" and session.name in self.topology.by_id
            if not session.member:
                return HelloRefused(f"{session.name} is not a member of this cluster").to_wire()
        if epoch != self.topology.epoch:
            return StaleEpoch(f"{self.node_id} is at epoch {self.topology.epoch}, the message at {epoch}").to_wire()
        return None

    def _replica_read(self, session: Session, link: Link, request: ReplicaRead) -> None:
        if self._debug:
            _log.debug("replica_read", trace=request.trace, peer=session.name, keys=len(request.keys))
        stale = self._stale(session, request.epoch)
        if stale is not None:
            link.send(ReplicaReadReply(request.id, [], stale))
        else:
            self.replica.read(request.keys, partial(self._answer_read, session, link, request))

    def _answer_read(
        self, session: Session, link: Link, request: ReplicaRead, records: list[bytes | None], error: WireError | None
    ) -> None:
        if error is not None:
            self._replica_failed(request, error)
        try:
            session.send(link, ReplicaReadReply(request.id, records, error))
        except FrameTooLarge:
            session.send(link, ReplicaReadReply(request.id, cut(records), error))
        except (TransportError, Overloaded) as failure:
            _log.info("reply_undeliverable", peer=session.name, error=str(failure))

    def _replica_write(self, session: Session, link: Link, request: ReplicaWrite) -> None:
        if self._debug:
            _log.debug("replica_write", trace=request.trace, peer=session.name, keys=len(request.keys))
        stale = self._stale(session, request.epoch)
        if session.kind == "client":
            raise ProtocolMismatch("a client does not write to replicas")
        if stale is None and (not request.keys or len(request.keys) != len(request.records)):
            raise ProtocolMismatch("a replica write has as many records as keys, and at least one")
        if stale is not None:
            link.send(ReplicaWriteReply(request.id, None, None, stale))
        else:
            done = partial(self._answer_write, session, link, request)
            self.replica.write(request.mode, request.keys, request.records, request.want_live, done)

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
            self._replica_failed(request, error)
        try:
            link.send(ReplicaWriteReply(request.id, superseded, live, error, self.replica.now_ms()))
        except (TransportError, Overloaded) as failure:
            _log.info("reply_undeliverable", peer=session.name, error=str(failure))

    def _replica_scan(self, session: Session, link: Link, request: ReplicaScan) -> None:
        if self._debug:
            _log.debug("replica_scan", trace=request.trace, peer=session.name, limit=request.limit)
        error = self._stale(session, request.epoch)
        if error is None and self._scans >= REPLICA_SCANS_MAX:
            error = Overloaded(f"{self._scans} scans are under way at {self.node_id} already").to_wire()
        if error is not None:
            link.send(ReplicaScanReply(request.id, [], [], False, error))
            return
        self._scans += 1
        limit = max(1, min(request.limit, SCAN_LIMIT_MAX + 1))
        bytes_max = max(1, min(request.bytes_max, BATCH_BYTES_MAX))
        done = partial(self._answer_scan, session, link, request)
        self._own(self.replica.scan(request.start, request.end, limit, bytes_max, done), "replica scan")

    def _answer_scan(
        self, session: Session, link: Link, request: ReplicaScan, page: Page, error: WireError | None
    ) -> None:
        self._scans -= 1
        if error is not None:
            self._replica_failed(request, error)
        keys, records = [key for key, _ in page.items], [record for _, record in page.items]
        try:
            session.send(link, ReplicaScanReply(request.id, keys, records, page.complete, error))
        except (TransportError, Overloaded) as failure:
            _log.info("reply_undeliverable", peer=session.name, error=str(failure))

    def _replica_failed(self, request: ReplicaRead | ReplicaWrite | ReplicaScan, error: WireError) -> None:
        if self._failures.pass_(self.clock.monotonic()):
            held_back, self._failures.suppressed = self._failures.suppressed, 0
            _log.warning(
                "replica_request_failed",
                kind=type(request).__name__,
                trace=request.trace,
                error=str(from_wire(*error)),
                held_back=held_back,
            )

    # --- replies of peers

    def _peer_message(self, peer: Peer, message: msgspec.Struct) -> None:
        self.metrics.frames_received += 1
        coordinator = self.coordinator
        assert coordinator is not None
        if not isinstance(message, ReplicaReadReply | ReplicaWriteReply | ReplicaScanReply):
            raise ProtocolMismatch(f"{type(message).__name__} is no reply")
        if message.id >= ID_BASE:
            self.calls.reply(peer, message)
        elif isinstance(message, ReplicaReadReply):
            coordinator.replica_read_reply(peer, message)
        elif isinstance(message, ReplicaWriteReply):
            coordinator.replica_write_reply(peer, message)

    def _peer_lost(self, node_id: str, error: DHTError) -> None:
        self.calls.peer_lost(node_id, error)
        if self.coordinator is not None:
            self.coordinator.peer_lost(node_id, error)

    # --- background

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            if self.coordinator is not None:
                self.coordinator.advance(self.clock.monotonic())

    async def _sweep(self) -> None:
        interval_s, step = self.config.expiry.sweep_interval_ms / 1000, self.config.expiry.sweep_step
        while True:
            await asyncio.sleep(interval_s)
            try:
                await self.replica.sweep(step)
            except (DHTError, TimeoutError) as error:
                _log.warning("sweep_failed", error=str(error))


def cut(records: list[bytes | None]) -> list[bytes | None]:
    """The first records that fit a frame, at least one: who asked asks again for the rest."""
    size = 0
    for index, record in enumerate(records):
        size += len(record) + 8 if record is not None else 1
        if size > BATCH_BYTES_MAX and index:
            return records[:index]
    return records
