"""A client's view of the cluster: links to every node, kept up, and batches on their way.

The session finds the cluster from one live address, connects to every member, refreshes the member list, and moves a
batch to another node when its node fails. A write whose fate is unknown is repeated only where that is safe: at the
same process of the same node, under the same id (protocol/dedup.py); elsewhere only if the caller opted in (R10).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Collection, Coroutine
from pathlib import Path
from typing import Any

import msgspec

from agi.core.dht.client.batches import Batch, Kind
from agi.core.dht.client.direct import DIRECT_KEYS_MAX, DirectReads
from agi.core.dht.client.links import Asking, Farewells, NodeHandler, Remote
from agi.core.dht.client.pacing import Pacing
from agi.core.dht.client.routing import by_key, ring_of, spread
from agi.core.dht.client.silence import Silence
from agi.core.dht.clock import Clock
from agi.core.dht.errors import (
    ClientClosed,
    ConnectFailed,
    DHTError,
    LinkClosed,
    NotReady,
    OutcomeUnknown,
    Overloaded,
    ProtocolMismatch,
    TransportError,
    Truncated,
    Unavailable,
    from_wire,
)
from agi.core.dht.protocol.consensus import MOVE_AFTER_S
from agi.core.dht.protocol.latency import Quantile
from agi.core.dht.protocol.messages import (
    DeleteReply,
    GetReply,
    Goodbye,
    Hello,
    Message,
    PutReply,
    Query,
    QueryReply,
    ReplicaReadReply,
    Scan,
    ScanReply,
    UpdateReply,
    Watch,
    WatchReply,
    WireError,
)
from agi.core.dht.protocol.timers import TICK_S, TimerWheel
from agi.core.dht.ring import Ring
from agi.core.dht.tasks import end
from agi.core.dht.transport.base import Link, LinkHandler, Transport
from agi.core.dht.transport.codec import encode
from agi.core.dht.transport.handshake import greet
from agi.core.dht.types import PROTOCOL_VERSION, Consistency

_log = logging.getLogger("agi.core.dht.client")

BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 1.0
REFRESH_S, REFRESH_MIN_S = 2.0, 0.1
QUERY_TIMEOUT_S = 2.0
CLOSE_TIMEOUT_S = 2.0
"""How long `close` waits for the other ends of its links; they cut themselves off before that."""
MAYBE = "the write may or may not have happened"


class Session:
    """Links and batches of one client. All methods belong to one event loop.

    Args:
        unix: use a node's Unix socket where it is on this machine.
        retry_count: tries beyond the first, for retryable errors; None takes what the cluster says.
        on_settled: told when a batch has been answered.
        on_members: told what each topology answer says of the members.
        retry_unknown: repeat plain writes whose outcome is unknown at other nodes too.

    Attributes:
        write_s: what half of the small writes take at most, of late.
        outdated: set once a node tells of another topology than the one known here.
    """

    def __init__(
        self,
        seed: Transport,
        data: Transport,
        clock: Clock,
        rng: random.Random,
        *,
        cluster: str,
        pool_size: int,
        retry_count: int | None,
        retry_unknown: bool,
        unix: bool,
        on_settled: Callable[[], None],
        on_members: Callable[[list[dict[str, Any]]], None],
    ) -> None:
        self._seed = seed
        self._data = data
        self.clock = clock
        self._rng = rng
        self._cluster = cluster
        self._pool_size = pool_size
        self._retries_asked = retry_count
        self.retry_count = retry_count or 0
        self._retry_unknown = retry_unknown
        self._unix = unix
        self.settled = on_settled
        self.write_s = Quantile(0.5, start_s=0.002, floor_s=1e-5)
        self._on_members = on_members
        self._loop = asyncio.get_running_loop()
        self._ids = 0
        self._turn = 0
        self._batches: dict[int, Batch] = {}
        self._queries: dict[int, tuple[str, asyncio.Future[Any]]] = {}
        self._lost: dict[str, list[Batch]] = {}
        self._delayed: dict[Batch, asyncio.TimerHandle] = {}
        self._links: dict[Link, None] = {}
        self._no_links = asyncio.Event()
        self._wheel: TimerWheel[int] = TimerWheel(clock.monotonic())
        self._timer: asyncio.TimerHandle | None = None
        self._refresher: asyncio.Task[None] | None = None
        self.name = f"c{rng.getrandbits(48):012x}"
        self.addresses: list[str] = []
        self.nodes: dict[str, Remote] = {}
        self.up: list[Remote] = []
        """Connected nodes, sorted by name."""
        self.pacing = Pacing(self.submit)
        self.direct = DirectReads(self)
        self._farewells = Farewells(self)
        self.silence = Silence(self)
        self.epoch = 0
        self.replica_count = 0
        self.direct_reads = True  # not while members change: coordinators know both replica sets
        self.outdated = asyncio.Event()
        self._unready: set[str] = set()
        self.ring: Ring | None = None
        """None while every node holds every key."""
        self.topology: dict[str, Any] = {}
        self.read_consistency = Consistency.QUORUM
        self.write_consistency = Consistency.QUORUM
        self.closed = False

    # --- finding the cluster

    async def open(self, addresses: list[str], deadline: float) -> None:
        """Learns the members from the first address that answers and connects to them. Raises ConnectFailed or what
        the nodes answered."""
        self.addresses = addresses
        error: DHTError = ConnectFailed("no address was given")
        said: dict[str, DHTError] = {}
        while True:
            for address in addresses:
                remaining = deadline - self.clock.monotonic()
                if remaining <= 0:
                    raise error
                try:
                    async with asyncio.timeout(remaining):
                        await self._learn(address)
                except TimeoutError:
                    # the last try is cut short: what an earlier one met says more
                    error = said.get(address) or ConnectFailed(f"{address} did not answer in time")
                except DHTError as failure:
                    if not failure.retryable:
                        raise
                    said[address] = error = failure
                else:
                    if await self._connected(deadline):
                        self._timer = self._loop.call_later(TICK_S, self._tick)
                        self._refresher = self._own(self._refresh(), "refresh")
                        return
                    error = ConnectFailed(f"the members that {address} named could not be reached")
            await asyncio.sleep(min(0.1, max(0.0, deadline - self.clock.monotonic())))

    async def _connected(self, deadline: float) -> bool:
        """Waits for the links of all members, but not for those that fail, and not long for those that are silent."""
        patience = min(deadline, self.clock.monotonic() + 1.0)
        while self.clock.monotonic() < deadline:
            tried = all(remote.links or remote.failed for remote in self.nodes.values())
            if self.up and (tried or self.clock.monotonic() > patience):
                return True
            await asyncio.sleep(0.005)
        return bool(self.up)

    def hello(self) -> Hello:
        return Hello(PROTOCOL_VERSION, "client", self.name, self._cluster)

    async def _learn(self, address: str) -> None:
        """Asks one node for the topology over its gRPC port."""
        link, _ = await self._greet(self._seed, address, Asking(self))
        try:
            self.adopt(await self._query(link, "", Query(0, "topology", int(QUERY_TIMEOUT_S * 1000))))
        finally:
            link.close()

    def adopt(self, topology: dict[str, Any]) -> None:
        """Takes a member list; connects to who is new and lets go of who is gone."""
        self.topology = topology
        self._on_members(topology["members"])
        self._cluster = self._cluster or topology["cluster"]
        if self._retries_asked is None:
            self.retry_count = topology["retry_count"]
        self.read_consistency = Consistency.parse(topology["read_consistency"])
        self.write_consistency = Consistency.parse(topology["write_consistency"])
        members = {member["node_id"]: member for member in topology["members"]}
        self.epoch, states = topology["epoch"], [member["state"] for member in members.values()]
        self.replica_count = min(topology["factor"], len(states) - states.count("joining"))
        self.direct_reads = not topology["in_transition"]
        self._unready = {name for name, member in members.items() if member["state"] == "leaving"}
        for name in [name for name in self.nodes if name not in members]:
            self._drop(self.nodes.pop(name))
        for name, member in members.items():
            if name not in self.nodes:
                remote = self.nodes[name] = Remote(name, member["address"])
                remote.task = self._own(self._keep(remote), f"keep {name}")
            elif self.nodes[name].address != member["address"]:  # it has moved
                self.nodes[name].address = member["address"]
                self.nodes[name].wake.set()
        if len(members) <= topology["factor"]:
            self.ring = None
        elif self.ring is None or {(node.node_id, node.weight) for node in self.ring.nodes} != {
            (name, member["weight"]) for name, member in members.items()
        }:
            self.ring = ring_of(topology)

    def unready(self, node_id: str) -> bool:
        """That node says that it does not serve: it leaves, or is not there yet. Others are asked from now on, and the
        topology anew. False where that is no news."""
        self.outdated.set()
        news = node_id not in self._unready
        self._unready.add(node_id)
        return news

    async def _refresh(self) -> None:
        """Keeps up with the cluster: asks a connected node, or any address ever known."""
        while True:
            await asyncio.sleep(REFRESH_MIN_S * (0.5 + self._rng.random()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REFRESH_S * (0.75 + self._rng.random() / 2)):
                    await self.outdated.wait()
            self.outdated.clear()
            try:
                if self.up:
                    start, up = self.coordinators()
                    self.adopt(await self.query(up[start].node_id, "topology"))
                else:
                    known = [*self.addresses, *(remote.address for remote in self.nodes.values())]
                    async with asyncio.timeout(QUERY_TIMEOUT_S):
                        await self._learn(known[self._rng.randrange(len(known))])
            except (DHTError, TimeoutError) as error:
                _log.debug("the topology could not be refreshed: %s", error)

    def _own(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = self._loop.create_task(coroutine, name=name)
        task.add_done_callback(_ended)
        return task

    def _drop(self, remote: Remote) -> None:
        self.up = [other for other in self.up if other is not remote]  # before its links have ended
        if remote.task is not None:
            remote.task.cancel()
        for link in remote.links:
            link.close()

    # --- links

    async def _keep(self, remote: Remote) -> None:
        backoff_s = BACKOFF_FIRST_S
        while True:
            try:
                await self._connect(remote)
            except DHTError as error:
                _log.debug("%s is unreachable: %s", remote.node_id, error)
                remote.failed = True
                self._give_up(remote)
                try:
                    async with asyncio.timeout(backoff_s * (0.5 + self._rng.random())):
                        await remote.wake.wait()
                except TimeoutError:
                    backoff_s = min(BACKOFF_MAX_S, backoff_s * 2)
                remote.wake.clear()
                continue
            backoff_s = BACKOFF_FIRST_S
            self._resend(remote)
            await remote.down.wait()

    async def _connect(self, remote: Remote) -> None:
        handler = NodeHandler(self, remote)
        seed, hello = await self._greet(self._seed, remote.address, handler)
        if hello.name != remote.node_id:
            seed.close()
            raise ProtocolMismatch(f"{remote.address} answered as {hello.name}, not {remote.node_id}")
        links: list[Link] = []
        told = self.clock.monotonic()
        try:
            for _ in range(self._pool_size):
                links.append(await self._connect_data(hello, handler))
        except DHTError as error:
            for link in links:
                link.close()
            if not isinstance(error, ConnectFailed):
                seed.close()
                raise
            _log.info("%s is reached by gRPC alone, the native port is not: %s", remote.node_id, error)
            links = [seed]  # only the gRPC port can be reached: its tunnel carries the same frames
        else:
            seed.close()
        if any(link.closed for link in links):
            raise LinkClosed(f"{remote.node_id} closed the link again")
        remote.run_id = hello.run_id
        remote.tell(hello.boottime_us, hello.hlc, told)
        remote.links = links
        remote.heard = self.silence.now
        remote.down.clear()
        self.up = sorted([*self.up, remote], key=lambda known: known.node_id)

    async def _connect_data(self, hello: Hello, handler: NodeHandler) -> Link:
        address = hello.data_address
        if self._unix and hello.unix_path and Path(hello.unix_path).is_socket():  # noqa: ASYNC240  # once a link
            with contextlib.suppress(ConnectFailed):  # another machine's path may exist here too
                link, theirs = await self._greet(self._data, f"unix:{hello.unix_path}", handler)
                if theirs.run_id == hello.run_id:
                    return link
                link.close()
        link, _ = await self._greet(self._data, address, handler)
        return link

    async def _greet(self, transport: Transport, address: str, handler: LinkHandler) -> tuple[Link, Hello]:
        link, hello = await greet(transport, address, self.hello(), handler)
        if not link.closed:
            self._links[link] = None
        return link, hello

    def link_ended(self, link: Link) -> None:
        """Nothing of that link is left."""
        self._links.pop(link, None)
        if not self._links:
            self._no_links.set()

    def link_lost(self, remote: Remote, link: Link, error: DHTError | None) -> None:
        if link not in remote.links and link not in remote.parting:
            return
        links, remote.links, remote.parting = remote.links + remote.parting, [], []
        self.up = [other for other in self.up if other is not remote]
        self.silence.forget(remote)
        for other in links:
            other.close()
        lost = [batch for batch in self._batches.values() if batch.node == remote.node_id]
        reason = error or LinkClosed(f"{remote.node_id} closed the link")
        for name, future in list(self._queries.values()):
            if name == remote.node_id and not future.done():
                future.set_exception(Unavailable(reason.message))
        remote.wake.set()
        remote.down.set()
        self.direct.lost(remote)
        for batch in lost:
            del self._batches[batch.id]
            if batch.kind is Kind.GET:
                self._again(batch, reason)
            elif batch.kind is Kind.BOUND:
                self._unknown(batch, reason)
            else:  # the same process may still answer for it
                self._lost.setdefault(remote.node_id, []).append(batch)

    def _resend(self, remote: Remote) -> None:
        """The node is connected again: the writes that it had are asked for under their old ids."""
        for batch in self._lost.pop(remote.node_id, []):
            if batch.run_id == remote.run_id:
                self._send(batch, remote, retry=True)
            else:
                self._unknown(batch, OutcomeUnknown(f"{remote.node_id} restarted"))

    def _give_up(self, remote: Remote) -> None:
        for batch in self._lost.pop(remote.node_id, []):
            self._unknown(batch, LinkClosed(f"{remote.node_id} was lost"))

    # --- batches

    def awaits(self, remote: Remote) -> bool:
        """Whether that node owes this client an answer."""
        name = remote.node_id
        return any(b.node == name for b in self._batches.values()) or any(n == name for n, _ in self._queries.values())

    @property
    def writing(self) -> bool:
        return bool(self._batches)

    def submit(self, batch: Batch) -> None:
        """Sends a batch to a node that holds its keys; the result goes to its sink by its deadline."""
        if batch.kind is not Kind.GET or self.closed or not self.pacing.takes(batch):
            self._route(batch, set())

    def _route(self, batch: Batch, avoid: set[str]) -> None:
        if self.closed:
            batch.fail(ClientClosed("the client is closed"))
            return
        if batch.kind is Kind.GET and not batch.attempts and self.direct.start(batch):
            return
        self._coordinate(batch, avoid)

    def number(self) -> int:
        """A new id for a message."""
        self._ids += 1
        return self._ids

    def coordinate(self, batch: Batch) -> None:
        """Sends a batch to a coordinator after all."""
        self._coordinate(batch, set())

    def coordinators(self, avoid: Collection[str] = ()) -> tuple[int, list[Remote]]:
        """Connected nodes that are expected to answer, but for those to avoid, if there are others; and at which of
        them to begin in this turn."""
        self._turn += 1
        if self._unready or self.silence.nodes:
            avoid = {*avoid, *self._unready, *(remote.node_id for remote in self.silence.nodes)}
        up = [remote for remote in self.up if remote.node_id not in avoid] if avoid else self.up
        up = up or self.up
        return self._turn % len(up) if up else 0, up

    def _coordinate(self, batch: Batch, avoid: set[str]) -> None:
        start, up = self.coordinators(avoid)
        if not up:
            self._later(batch, Unavailable("no node is reachable"))
            return
        names = [remote.node_id for remote in up]
        if batch.kind >= Kind.UPDATE:
            by_node = by_key(batch.keys, names, self.ring)
        elif self.ring is None:
            self._send(batch, up[start], retry=False)
            return
        else:
            by_node = spread(batch.keys, names[start:] + names[:start], self.ring)
        for name, indexes in by_node.items():
            part = batch if len(by_node) == 1 else batch.part(indexes)
            self._send(part, self.nodes[name], retry=False)

    def _send(self, batch: Batch, remote: Remote, *, retry: bool) -> None:
        if not retry:
            self._ids += 1
            batch.id = self._ids
        batch.node, batch.run_id = remote.node_id, remote.run_id
        batch.sent = self.clock.monotonic()
        left_ms = (batch.deadline - batch.sent) * 1000
        if left_ms <= 0:
            self._expire(batch)
            return
        if batch.kind >= Kind.UPDATE and not retry:
            batch.for_node(remote.hlc, remote.boottime_us(batch.sent), remote.blurred(batch.sent))
        # the node answers first, so that its error arrives before this side gives up
        message = batch.message(max(1, int(left_ms - min(150, left_ms / 4))), retry)
        try:
            remote.send(encode(message))
        except (TransportError, Overloaded) as error:
            self._again(batch, error)
            return
        self._batches[batch.id] = batch
        self._wheel.add(batch.deadline, batch.id)

    def _again(self, batch: Batch, error: DHTError) -> None:
        """Nothing was written: try another node while that is worth it."""
        batch.attempts += 1
        # a node that is not ready yet is waited for, however often
        tried_enough = batch.attempts > self.retry_count and not isinstance(error, NotReady)
        now = self.clock.monotonic()
        left_s = batch.deadline - now
        if 0 < batch.sent < now - left_s and not isinstance(error, TransportError):
            tried_enough = True  # it took longer than is left: its outcome is known, another's would not be
        if tried_enough or left_s <= 0:
            batch.fail(error if not isinstance(error, TransportError) else Unavailable(str(error)))
        elif batch.blurred and batch.node in self.nodes and isinstance(error, Unavailable):
            self._send(batch, self.nodes[batch.node], retry=False)  # which has just told its clocks
        elif isinstance(error, TransportError) and any(r.node_id != batch.node for r in self.up):
            self._route(batch, {batch.node})
        else:
            self._later(batch, error)

    def _later(self, batch: Batch, error: DHTError) -> None:
        delay_s = min(0.5, 0.02 * 2 ** min(batch.attempts, 10)) * (0.5 + self._rng.random())
        if self.clock.monotonic() + delay_s >= batch.deadline:
            batch.fail(error)
            return
        self._delayed[batch] = self._loop.call_later(delay_s, self._retry, batch)

    def _retry(self, batch: Batch) -> None:
        del self._delayed[batch]
        self._route(batch, {batch.node})

    def _unknown(self, batch: Batch, error: DHTError) -> None:
        """A write that may or may not have happened."""
        now = self.clock.monotonic()
        wait = isinstance(error, LinkClosed) and batch.kind is Kind.UPDATE  # the node may begin with it still
        at = max(now, batch.sent + MOVE_AFTER_S) if wait else now
        again = batch.movable if wait else self._retry_unknown or batch.kind >= Kind.UPDATE
        for op in batch.ops:
            op.retry = True
        if again and at < batch.deadline and batch.attempts < self.retry_count:
            batch.attempts += 1
            if at > now:
                self._delayed[batch] = self._loop.call_later(at - now, self._retry, batch)
            else:
                self._route(batch, {batch.node})
        else:
            batch.fail(OutcomeUnknown(f"{MAYBE}: {error.message}"))

    def move(self, batch: Batch) -> None:
        """Another node tries it; what the first one may still say of it does not count."""
        del self._batches[batch.id]
        batch.moved = True
        for op in batch.ops:
            op.retry = True
        self._coordinate(batch, {batch.node})

    def receive(self, remote: Remote | None, message: msgspec.Struct) -> None:
        """A reply of a node; None stands for an address that was asked before its node is known."""
        if remote is not None:
            self.silence.heard(remote)
        if isinstance(message, ReplicaReadReply):
            assert remote is not None
            self.direct.reply(remote, message)
        elif isinstance(message, GetReply):
            self.pacing.sizes.learn(message.records)
            self._settle(message.id, message.records, message.errors, message.error)
        elif isinstance(message, PutReply):
            self._settle(message.id, message.versions, message.errors, message.error)
        elif isinstance(message, DeleteReply):
            self._settle(message.id, message.existed, message.errors, message.error)
        elif isinstance(message, UpdateReply):
            if remote is not None and message.boottime_us:
                remote.tell(message.boottime_us, message.hlc, self.clock.monotonic())
            errors = [(i, r.error) for i, r in enumerate(message.results) if r.error and _worth(r.error)]
            self._settle(message.id, message.results, errors or None, message.error)
        elif isinstance(message, ScanReply | QueryReply | WatchReply):
            _, future = self._queries.get(message.id, ("", None))
            if future is not None and not future.done():
                future.set_result(message)
        elif isinstance(message, Goodbye):
            self._farewells.begin(remote)
        else:
            raise ProtocolMismatch(f"{type(message).__name__} is no reply")

    def _settle(
        self, number: int, results: list[Any], errors: list[tuple[int, WireError]] | None, error: WireError | None
    ) -> None:
        batch = self._batches.pop(number, None)
        if batch is None:
            return
        self.settled()
        if batch.kind is not Kind.GET and len(batch.keys) <= DIRECT_KEYS_MAX:
            self.write_s.add(self.clock.monotonic() - batch.sent)
        if error is not None:
            self._failed(batch, from_wire(*error))
        elif errors is None:
            if len(results) == len(batch.keys):
                batch.ok(results)
            else:
                batch.fail(ProtocolMismatch(f"{batch.node} answered another batch"))
        else:
            self._settle_partly(batch, results, errors)

    def _settle_partly(self, batch: Batch, results: list[Any], errors: list[tuple[int, WireError]]) -> None:
        failed: dict[WireError, list[int]] = {}
        for index, wire in errors:
            failed.setdefault(wire, []).append(index)
        bad = {index for index, _ in errors}
        good = [index for index in range(len(batch.keys)) if index not in bad]
        if good:
            batch.part(good).ok([results[index] for index in good])
        for wire, indexes in failed.items():
            part = batch.part(indexes)
            self._failed(part, from_wire(*wire), progress=bool(good))

    def _failed(self, batch: Batch, error: DHTError, progress: bool = False) -> None:
        if isinstance(error, OutcomeUnknown) and batch.kind is not Kind.GET:
            self._unknown(batch, error)
        elif not error.retryable:
            batch.fail(error)
        elif progress and isinstance(error, Truncated):
            self.submit(batch)  # the rest of a reply that was cut
        elif isinstance(error, NotReady):
            batch.attempts += 1
            if self.unready(batch.node):
                self._route(batch, {batch.node})
            else:
                self._later(batch, error)  # a cluster that forms or resumes: worth the whole timeout
        else:
            self._again(batch, error)

    def _tick(self) -> None:
        now = self.clock.monotonic()
        self.direct.look(now)
        self.silence.look(now, self._batches)
        self._farewells.look()
        for batch in self.pacing.expired(now):
            self._expire(batch)
        for number in self._wheel.advance(now):
            late = self._batches.pop(number, None)
            if late is not None:
                self._expire(late)
        for name, lost in self._lost.items():
            self._lost[name] = [batch for batch in lost if batch.deadline > now]
            for batch in lost:
                if batch.deadline <= now:
                    self._expire(batch)
        self._timer = self._loop.call_later(TICK_S, self._tick)

    def _expire(self, batch: Batch) -> None:
        if batch.kind is Kind.GET:
            batch.fail(Unavailable("no answer by the deadline"))
        else:
            batch.fail(OutcomeUnknown(f"no answer by the deadline: {MAYBE}"))

    # --- rare requests

    async def query(self, node_id: str, what: str, key: bytes = b"", timeout_s: float = QUERY_TIMEOUT_S) -> Any:
        """A node's answer to a question (queries.py). Raises Unavailable, or what the node answered."""
        remote = self.nodes.get(node_id)
        if remote is None or not remote.links:
            raise Unavailable(f"{node_id} is not connected")
        return await self._query(remote.links[0], node_id, Query(0, what, int(timeout_s * 1000), key), timeout_s)

    async def _query(self, link: Link, name: str, query: Query, timeout_s: float = QUERY_TIMEOUT_S) -> Any:
        reply = await self.call(link, name, query, timeout_s)
        assert isinstance(reply, QueryReply)
        if reply.error is not None:
            raise from_wire(*reply.error)
        return msgspec.msgpack.decode(reply.body)

    async def call(self, link: Link, name: str, message: Query | Scan | Watch, timeout_s: float) -> Message:
        self._ids += 1
        message.id = number = self._ids
        future: asyncio.Future[Message] = self._loop.create_future()
        self._queries[number] = (name, future)
        try:
            link.send(message)
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            raise Unavailable(f"{name or link.peer} did not answer within {timeout_s:g} s") from None
        finally:
            del self._queries[number]

    async def close(self) -> None:
        """Ends everything; calls under way fail with ClientClosed."""
        self.closed = True
        error = ClientClosed("the client was closed")
        tasks = [task for task in (self._refresher, *(r.task for r in self.nodes.values())) if task is not None]
        await end(tasks)
        if self._timer is not None:
            self._timer.cancel()
        lost = [batch for batches in self._lost.values() for batch in batches]
        for handle in self._delayed.values():
            handle.cancel()
        for batch in [*self.pacing.end(), *self._batches.values(), *self.direct.end(), *lost, *self._delayed]:
            batch.fail(error)
        self._batches.clear()
        self._lost.clear()
        self._delayed.clear()
        for _, future in self._queries.values():
            if not future.done():
                future.set_exception(error)
        for remote in self.nodes.values():
            links, remote.links = remote.links, []
            for link in links:
                link.close()
        self.up = []
        for link in list(self._links):
            link.close()
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                while self._links:
                    self._no_links.clear()
                    await self._no_links.wait()
        except TimeoutError:
            _log.warning("%d links did not end in time", len(self._links))


def _worth(wire: WireError) -> bool:
    """Whether an operation under consensus that ended so may be tried once more, elsewhere: it is known by its name."""
    return wire[0] == OutcomeUnknown.code or from_wire(*wire).retryable


def _ended(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.critical("the task %s failed", task.get_name(), exc_info=error)
