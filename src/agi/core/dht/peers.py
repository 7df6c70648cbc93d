"""This node's links to the others: one for small messages and, for bulk, the rest of a small pool.

Each peer has a task that connects, says hello, waits for the link to break and connects again with backoff. A peer is
in `connected` exactly while its links are up, and in `usable` unless it is also held to be dead (gossip.py). Its data
address is learnt from its gRPC address each time, since ports may change with a restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable

import msgspec
import structlog

from agi.core.dht.clock import Clock
from agi.core.dht.errors import DHTError, LinkClosed, NotReady, ProtocolMismatch, named
from agi.core.dht.protocol.latency import Quantile
from agi.core.dht.protocol.messages import Hello
from agi.core.dht.tasks import end
from agi.core.dht.topology import Member
from agi.core.dht.transport.base import Link, Transport
from agi.core.dht.transport.handshake import Nobody, greet
from agi.core.dht.types import BULK_VALUE_BYTES

_log = structlog.get_logger("agi.core.dht.peers")

BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 1.0
HEDGE_FLOOR_S = 0.002
"""A hedge is never sent sooner: below this, scheduling noise is most of a reply's latency."""


class Peer:
    """Another member and the links to it."""

    def __init__(self, member: Member, hedge_percentile: float) -> None:
        self.node_id = member.node_id
        self.member = member
        self.address = member.address
        """Where it is reached: as the topology says, or as it said itself since."""
        self.links: list[Link] = []
        self.hello: Hello | None = None
        self.latency = Quantile(hedge_percentile, start_s=0.02, floor_s=HEDGE_FLOOR_S)
        self.clock_ms = 0.0
        """The peer's clock less this node's monotonic one, as its last answer told: whose wall clock jumps is seen."""
        self.gone = False
        """It is held to be dead or has left: it gets no requests."""
        self.down = asyncio.Event()
        self.wake = asyncio.Event()
        self.woken_by = ""
        self.last_error = "not connected yet"
        self._bulk = 0

    def send(self, frame: bytes) -> None:
        """Queues a frame: large ones on the bulk links. Raises LinkClosed, Overloaded."""
        links = self.links
        if not links:
            raise LinkClosed(f"{self.node_id} is not connected")
        if len(frame) < BULK_VALUE_BYTES or len(links) == 1:
            links[0].send_frame(frame)
            return
        self._bulk += 1
        links[1 + self._bulk % (len(links) - 1)].send_frame(frame)


class Peers:
    """Keeps a link to every other member.

    Args:
        seed: the transport that reaches gRPC addresses; `data` reaches data addresses.
        hello: makes this node's Hello of the moment.
        check: judges a peer's Hello; raises a ClusterError to refuse it.
        on_message: gets each message of a peer after its Hello.
        on_connected: told when a peer has become connected.
        on_failed: told when a task that keeps a link died of a bug.
        on_lost: told when a connected peer's links broke.
    """

    def __init__(
        self,
        seed: Transport,
        data: Transport,
        *,
        hello: Callable[[], Hello],
        check: Callable[[Hello], None],
        on_message: Callable[[Peer, msgspec.Struct], None],
        on_connected: Callable[[Peer], None],
        on_lost: Callable[[str, DHTError], None],
        on_failed: Callable[[DHTError], None],
        clock: Clock,
        rng: random.Random,
        pool_size: int,
        hedge_percentile: float,
    ) -> None:
        self._seed = seed
        self._data = data
        self._hello = hello
        self._check = check
        self._on_message = on_message
        self._on_connected = on_connected
        self._on_lost = on_lost
        self._on_failed = on_failed
        self._clock = clock
        self._rng = rng
        self._pool_size = pool_size
        self._hedge_percentile = hedge_percentile
        self.all: dict[str, Peer] = {}
        self.connected: dict[str, Peer] = {}
        self.usable: dict[str, Peer] = {}
        """Those connected that requests may go to."""
        self.suspects: set[str] = set()
        """Those that are asked last."""
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._stopping = False

    def adopt(self, members: list[Member]) -> None:
        """The other members from now on: links to new ones are made, those to removed ones end. A name with another
        disk is another."""
        disks = {member.node_id: member.disk_id for member in members}
        for name in [name for name, peer in self.all.items() if disks.get(name) != peer.member.disk_id]:
            peer = self.all.pop(name)
            self._tasks.pop(name).cancel()
            for link in list(peer.links):
                link.close(LinkClosed(f"{name} is no member any more"))
        for member in members:
            known = self.all.get(member.node_id)
            if known is None:
                peer = self.all[member.node_id] = Peer(member, self._hedge_percentile)
                task = asyncio.get_running_loop().create_task(self._keep(peer), name=f"peer {member.node_id}")
                self._tasks[member.node_id] = task
                task.add_done_callback(self._ended)
            elif known.member != member:
                known.member = member
                self._moved(known, member.address)

    def _moved(self, peer: Peer, address: str) -> None:
        if peer.address != address:
            peer.address = address
            peer.wake.set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.critical("peer_task_failed", task=task.get_name(), exc_info=error)
            self._on_failed(DHTError(f"{task.get_name()} failed: {error!r}"))

    def heard_of(self, hello: Hello) -> None:
        """A peer has said hello on a link of its own: one that has just started or formed is not left to the backoff.
        Once for each, so that two that refuse each other do not keep each other awake."""
        peer = self.all.get(hello.name)
        if peer is None or peer.member.disk_id != hello.disk_id:
            return
        self._moved(peer, hello.address)
        state = f"{hello.run_id}:{bool(hello.topology)}"
        if peer.woken_by != state:
            peer.woken_by = state
            peer.wake.set()

    def judge(self, node_id: str, *, gone: bool, suspect: bool) -> None:
        """What the failure detector holds of a peer."""
        peer = self.all.get(node_id)
        if peer is None:
            return
        peer.gone = gone
        if suspect:
            self.suspects.add(node_id)
        else:
            self.suspects.discard(node_id)
        if gone:
            self.usable.pop(node_id, None)
        elif node_id in self.connected:
            self.usable[node_id] = peer

    def heard_clock(self, peer: Peer, now_ms: int) -> None:
        """What a peer says its clock is."""
        peer.clock_ms = now_ms - self._clock.monotonic() * 1000

    async def stop(self) -> None:
        self._stopping = True
        await end(self._tasks.values())
        for peer in self.all.values():
            for link in peer.links:
                link.close()
            peer.links = []
        self.connected.clear()
        self.usable.clear()

    async def _keep(self, peer: Peer) -> None:
        backoff_s = BACKOFF_FIRST_S
        while self.all.get(peer.node_id) is peer:  # a cancellation alone can get lost (tasks.py)
            try:
                await self._connect(peer)
            except DHTError as error:
                if peer.last_error != named(error):
                    peer.last_error = named(error)
                    _log.warning("peer_unreachable", peer=peer.node_id, error=str(error))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(backoff_s * (0.5 + self._rng.random())):
                        await peer.wake.wait()
                peer.wake.clear()
                backoff_s = min(BACKOFF_MAX_S, backoff_s * 2)
                continue
            backoff_s = BACKOFF_FIRST_S
            peer.last_error = ""
            _log.info("peer_connected", peer=peer.node_id)
            await peer.down.wait()

    async def _connect(self, peer: Peer) -> None:
        handler = _PeerHandler(self, peer)
        nobody = Nobody()
        link, hello = await greet(self._seed, peer.address, self._hello(), nobody)
        link.close()
        self._identify(peer, hello)
        links: list[Link] = []
        try:
            for _ in range(self._pool_size):
                link, hello = await greet(self._data, hello.data_address, self._hello(), handler)
                links.append(link)
                self._identify(peer, hello)
        except BaseException:
            for link in links:
                link.close()
            raise
        if any(link.closed for link in links):
            for link in links:
                link.close()
            raise LinkClosed(f"{peer.node_id} closed the link again")
        self.heard_clock(peer, hello.now_ms)
        peer.hello = hello
        peer.links = links
        peer.down.clear()
        self.connected[peer.node_id] = peer
        if not peer.gone:
            self.usable[peer.node_id] = peer
        self._on_connected(peer)

    def _identify(self, peer: Peer, hello: Hello) -> None:
        if hello.name != peer.node_id:
            raise ProtocolMismatch(f"{peer.address} answered as {hello.name}, not {peer.node_id}")
        self._check(hello)
        if not hello.topology:
            raise NotReady(f"{peer.node_id} has not formed yet")

    def _link_lost(self, peer: Peer, link: Link, error: DHTError | None) -> None:
        if link not in peer.links:
            return
        links, peer.links = peer.links, []
        if self.connected.get(peer.node_id) is peer:
            del self.connected[peer.node_id]
            self.usable.pop(peer.node_id, None)
        for other in links:
            other.close()
        reason = error or LinkClosed(f"{peer.node_id} closed the link")
        peer.last_error = str(reason)
        if not self._stopping:
            _log.warning("peer_lost", peer=peer.node_id, error=str(reason))
            self._on_lost(peer.node_id, reason)
        peer.down.set()

    def deliver(self, peer: Peer, message: msgspec.Struct) -> None:
        self._on_message(peer, message)


class _PeerHandler:
    __slots__ = ("_peer", "_peers")

    def __init__(self, peers: Peers, peer: Peer) -> None:
        self._peers = peers
        self._peer = peer

    def message(self, link: Link, message: msgspec.Struct) -> None:
        self._peers.deliver(self._peer, message)

    def link_closed(self, link: Link, error: DHTError | None) -> None:
        self._peers._link_lost(self._peer, link, error)
