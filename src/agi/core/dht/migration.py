"""Fills this node with what a change of the members gives it (PROTOCOLS T4, T6, T7).

While a change is under way, every node that holds an arc after it, newcomer or not, merges that arc from a majority of
those who held it before (counting itself). Writes of the transition reach quorums of both sets anyhow; so what has to
be brought is what was acknowledged before, and each source tells of it only after it has durably adopted the
transition and settled every write that it took under the old epoch (`Replica.settle`). *Copied from one: v at {A,Y},
the newcomer copied B, and v is lost. Snapshot before the epoch: the source takes another old write after it.*

A source also tells up to which versions it has sealed, closed and reclaimed its arcs (protocol/floors.py). Of an arc
that it gains, this node keeps nothing below what a source has closed that the source does not list: it was reclaimed.

A source lists (token, version, writer) of its records; what the target lacks or has older is fetched. So a second
source costs 24 bytes a record, and a repetition after a crash costs that too: nothing but "all is here" is remembered.
"""

from __future__ import annotations

import asyncio
import random
import struct
from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias

import structlog

from agi.core.dht.calls import Calls
from agi.core.dht.clock import Clock
from agi.core.dht.errors import DHTError, NotReady, Overloaded, ProtocolMismatch, StorageError, TransportError
from agi.core.dht.joint import JointRing, JointSet
from agi.core.dht.peers import Peers
from agi.core.dht.protocol.exchange import SEND_KEYS_MAX, Entry, Span
from agi.core.dht.protocol.floors import Floors, unpack
from agi.core.dht.protocol.messages import (
    ArcList,
    ArcListReply,
    ChangeState,
    ChangeStateReply,
    TreeFetch,
    TreeFetchReply,
    WireError,
)
from agi.core.dht.protocol.record import hlc_of
from agi.core.dht.reclaim import Reclaimer
from agi.core.dht.replica import FILL, Replica
from agi.core.dht.ring import Ring
from agi.core.dht.sessions import Session
from agi.core.dht.topology import Topology
from agi.core.dht.transport.base import Link
from agi.core.dht.treekeeper import Own, Rate, TreeKeeper

_log = structlog.get_logger("agi.core.dht.migration")

REQUESTS = (ArcList, ChangeState)
REPLY_TIMEOUT_S = 5.0
"""For one answer of a source."""
SPANS_MAX = 256
"""Spans that one question names."""
RETRY_FIRST_S, RETRY_MAX_S = 0.1, 2.0
PAUSE_S_MAX = 0.25
"""Between two steps of filling, for the sake of requests."""
IDLE_S = 0.02
"""Nobody asks for anything if there was no request for so long."""
LISTS_MAX = 16
"""Lists that a node makes for others at a time."""
_SPAN = struct.Struct(">QQ")
_ENTRY = struct.Struct(">Q16s")
_ENTRY_BYTES = 24

Work: TypeAlias = dict[JointSet, list[Span]]


class Migration:
    """
    Args:
        stale: why a message of that epoch is refused, None if it is not.
        reclaimer: keeps the floors of this node's arcs.
        own: runs a coroutine as a task that the node owns.
        bytes_per_s: what sources send to this node, keys, records and lists.

    Attributes:
        ready: this node holds all that it is to hold after the change under way; true while there is none.
        arcs, arcs_done: of the change under way, those that this node is to hold.
        keys, bytes: brought to this node since it started.
    """

    def __init__(
        self,
        node_id: str,
        replica: Replica,
        keeper: TreeKeeper,
        peers: Peers,
        calls: Calls,
        reclaimer: Reclaimer,
        clock: Clock,
        rng: random.Random,
        own: Own,
        stale: Callable[[Session, int], WireError | None],
        *,
        bytes_per_s: float,
    ) -> None:
        self.ready = True
        self.arcs = 0
        self.arcs_done = 0
        self.keys = 0
        self.bytes = 0
        self._me = node_id
        self._replica = replica
        self._keeper = keeper
        self._peers = peers
        self._calls = calls
        self._reclaimer = reclaimer
        self._rng = rng
        self._own = own
        self._stale = stale
        self._rate = Rate(bytes_per_s, clock)
        self._clock = clock
        self._filling = 1
        self._requests = 0
        self._resumed = 0.0
        self._epoch = 0
        self._placement = ""
        self._settled = ""
        self._lists = 0

    def adopt(self, topology: Topology, ring: Ring | JointRing) -> None:
        """Another topology counts. Where it begins a change, this node starts to fill itself."""
        self._epoch = topology.epoch
        if topology.placement == self._placement:
            return
        self._placement = topology.placement
        self.arcs = self.arcs_done = 0
        self.ready = not isinstance(ring, JointRing)
        if isinstance(ring, JointRing):
            work: Work = {}
            filling: set[str] = set()
            for part in ring.partitions():
                if isinstance(part.replicas, JointSet):
                    filling.update(part.replicas[len(part.replicas.old) :])
                    if self._me in part.replicas.new:
                        work.setdefault(part.replicas, []).extend(part.ranges())
            self._filling = max(1, len(filling))
            self._resumed = self._clock.monotonic()
            self.arcs = sum(map(len, work.values()))
            self._own(self._fill(topology.placement, work), "migration")

    # --- filling

    async def _fill(self, placement: str, work: Work) -> None:
        await self._settle(placement)
        left = deque(work.items())
        async with asyncio.TaskGroup() as group:
            group.create_task(self._fill_from(placement, left))
            group.create_task(self._fill_idly(placement, left))
        if placement == self._placement:
            self.ready = True
            _log.info("filled", epoch=self._epoch, arcs=self.arcs, keys=self.keys, bytes=self.bytes)

    async def _fill_from(self, placement: str, left: deque[tuple[JointSet, list[Span]]]) -> None:
        while left and placement == self._placement:
            await self._merge(placement, *left.popleft())

    async def _fill_idly(self, placement: str, left: deque[tuple[JointSet, list[Span]]]) -> None:
        """Where nobody asks for anything, others are asked while one answers."""
        while left and placement == self._placement:
            requests = self._keeper.requests
            await asyncio.sleep(IDLE_S)
            if left and requests == self._keeper.requests:
                await self._merge(placement, *left.popleft())

    async def _merge(self, placement: str, replicas: JointSet, spans: list[Span]) -> None:
        """Merges these spans from enough of those who held them before."""
        spans.sort()
        enough = replicas.sources - (self._me in replicas.old)
        merged: set[str] = set()
        delay_s = RETRY_FIRST_S
        while len(merged) < enough:
            sources = [name for name in replicas.old if name != self._me and name not in merged]
            self._rng.shuffle(sources)
            sources.sort(key=lambda name: name not in self._peers.usable or name in self._peers.suspects)
            for name in sources:
                if placement != self._placement:
                    return
                try:
                    await self._merge_from(name, spans, placement, gained=self._me not in replicas.old)
                except (DHTError, TimeoutError) as error:
                    _log.info("arcs_not_merged", source=name, error=str(error) or "no answer in time")
                    continue
                merged.add(name)
                delay_s = RETRY_FIRST_S
                break
            else:
                await asyncio.sleep(delay_s * (0.5 + self._rng.random()))
                delay_s = min(RETRY_MAX_S, delay_s * 2)
        self.arcs_done += len(spans)

    async def _requests_first(self) -> None:
        """While requests come, this node rests as long as it has just been filling itself, and half as long for each
        node that fills itself now: less than one of them is in the way of the requests at a time."""
        await self._keeper.turn()
        now, requests = self._clock.monotonic(), self._keeper.requests
        if requests != self._requests:
            self._requests = requests
            await asyncio.sleep(min(PAUSE_S_MAX, (now - self._resumed) * (1 + self._filling / 2)))
        self._resumed = self._clock.monotonic()

    async def _settle(self, placement: str) -> None:
        """Every write that was taken under the old epoch is in the store: from now on lists tell of it."""
        while True:
            try:
                await self._replica.settle()
                # a promise alone is not listed; a round will end it (Registers.settle_abandoned)
                promises = self._replica.promises
                promised = list(promises)
                while placement == self._placement and (promised := [key for key in promised if key in promises]):  # noqa: ASYNC110  # nobody signals
                    await asyncio.sleep(RETRY_FIRST_S)
            except (DHTError, TimeoutError) as error:
                _log.warning("not_settled", error=str(error) or "no answer in time")
                await asyncio.sleep(RETRY_MAX_S)
            else:
                break
        if placement == self._placement:
            self._settled = placement

    async def _merge_from(self, name: str, spans: list[Span], placement: str, *, gained: bool) -> None:
        """This node holds at least what that source holds in these spans, and of those that it gains nothing that was
        reclaimed there. Raises what prevents it."""
        heights = Floors()
        for at in range(0, len(spans), SPANS_MAX):
            left = spans[at : at + SPANS_MAX]
            while left:
                message = ArcList(0, self._epoch, f"migration:{self._me}", b"".join(_SPAN.pack(*s) for s in left))
                async with asyncio.timeout(REPLY_TIMEOUT_S):
                    reply = await self._calls.call(name, message)
                assert isinstance(reply, ArcListReply)
                if len(reply.entries) % _ENTRY_BYTES or not (reply.entries or reply.complete):
                    raise ProtocolMismatch(f"{name} sent a broken list")
                listed = list(_ENTRY.iter_unpack(reply.entries))
                floors = unpack(reply.floors).within(left)
                heights = heights.over(floors)
                if placement != self._placement:
                    raise NotReady("the change is over")
                if gained:
                    self._reclaimer.foresee(floors)
                await self._rate.spend(len(reply.entries))
                await self._requests_first()
                up_to = None if reply.complete else listed[-1][0]
                mine = await self._mine(left, up_to)
                if wanted := self._lacking(mine, listed):
                    await self._fetch(name, wanted, placement)
                    mine = await self._mine(left, up_to)
                    if self._lacking(mine, listed):  # verified (T7)
                        raise ProtocolMismatch(f"{name} has not sent all that it listed")
                if gained:
                    await self._drop_reclaimed(mine, listed, floors)
                if reply.complete:
                    break
                last = listed[-1][0]
                if listed[0][0] == last and len(listed) > 1:
                    last += 1  # all of one token: no page would come further
                left = [(max(first, last), end) for first, end in left if end >= last]
        if heights.spans:
            await self._reclaimer.take_over(heights)

    async def _mine(self, spans: list[Span], up_to: int | None) -> dict[int, list[Entry]]:
        """What this node holds in these spans, by token."""
        mine: dict[int, list[Entry]] = {}
        left = spans if up_to is None else [(first, min(end, up_to)) for first, end in spans if first <= up_to]
        while left:
            entries, cut = await self._keeper.listing(left)
            for entry in entries:
                mine.setdefault(entry.token, []).append(entry)
            if cut is None:
                break
            left = [(max(first, cut + 1), end) for first, end in left if end > cut]
        return mine

    def _lacking(self, mine: dict[int, list[Entry]], listed: list[tuple[int, bytes]]) -> list[int]:
        """Tokens of what the source has and this node has not, or older."""
        wanted: dict[int, None] = {}
        for token, version in listed:
            held = [entry.header[:16] for entry in mine.get(token, ())]
            if version not in held and not (len(held) == 1 and held[0] > version):
                wanted[token] = None
        return list(wanted)

    async def _drop_reclaimed(
        self, mine: dict[int, list[Entry]], listed: list[tuple[int, bytes]], floors: Floors
    ) -> None:
        """What came here late, below what the source has closed, and what it does not hold, was reclaimed there."""
        tokens = {token for token, _ in listed}
        late = [
            entry
            for token, entries in mine.items()
            if token not in tokens
            for entry in entries
            if hlc_of(entry.header) <= floors.at(token).closed
        ]
        if late:
            await self._replica.purge([entry.key for entry in late], [entry.header for entry in late])

    async def _fetch(self, name: str, tokens: list[int], placement: str) -> None:
        """Brings these records; while some are stored the next ones are on their way."""
        at = 0
        storing: asyncio.Future[None] | None = None
        try:
            while at < len(tokens):
                if placement != self._placement:
                    raise NotReady("the change is over")
                some = tokens[at : at + SEND_KEYS_MAX]
                packed = struct.pack(f"<{len(some)}Q", *some)
                async with asyncio.timeout(REPLY_TIMEOUT_S):
                    reply = await self._calls.call(name, TreeFetch(0, self._epoch, f"migration:{self._me}", packed))
                assert isinstance(reply, TreeFetchReply)
                if reply.taken < 1 or len(reply.keys) != len(reply.records):
                    raise ProtocolMismatch(f"{name} sent no records")
                if storing is not None:
                    await self._keeper.stored(storing)
                    storing = None
                if reply.keys:
                    storing = self._keeper.storing(reply.keys, reply.records, FILL)
                size = sum(map(len, reply.keys)) + sum(map(len, reply.records))
                self.keys += len(reply.keys)
                self.bytes += size
                at += reply.taken
                await self._rate.spend(size)
                await self._requests_first()
        finally:
            if storing is not None:
                await self._keeper.stored(storing)

    # --- answers to others

    def request(self, session: Session, link: Link, message: Any) -> None:
        """A member fills itself, or asks how far this node is."""
        error = self._stale(session, message.epoch)
        if session.kind != "node":
            raise ProtocolMismatch("a client takes no part in a change of the members")
        if isinstance(message, ChangeState):
            reply = ChangeStateReply(
                message.id, error is None and self.ready, self.arcs, self.arcs_done, self.keys, self.bytes, error
            )
            self._reply(session, link, reply)
            return
        if error is None and self._settled != self._placement:
            error = NotReady(f"{self._me} has not settled what it took before the change").to_wire()
        if error is None and self._lists >= LISTS_MAX:
            error = Overloaded(f"{self._lists} lists are being made already").to_wire()
        if error is not None:
            self._reply(session, link, ArcListReply(message.id, error=error))
            return
        self._lists += 1
        self._own(self._list(session, link, message), "migration answer")

    async def _list(self, session: Session, link: Link, message: ArcList) -> None:
        try:
            if not message.spans or len(message.spans) % _SPAN.size or len(message.spans) > SPANS_MAX * _SPAN.size:
                raise ProtocolMismatch("a list is of 1 to 256 spans")
            spans = list(_SPAN.iter_unpack(message.spans))
            floors = self._replica.floors.within(spans)  # before the list is made: later ones are not true of it
            entries, cut = await self._keeper.listing(spans)
            reply = ArcListReply(message.id, b"".join(map(_packed, entries)), cut is None, floors.packed)
        except DHTError as error:
            reply = ArcListReply(message.id, error=error.to_wire())
        except TimeoutError:
            reply = ArcListReply(message.id, error=StorageError("the store did not answer in time").to_wire())
        finally:
            self._lists -= 1
        self._reply(session, link, reply)

    def _reply(self, session: Session, link: Link, reply: ArcListReply | ChangeStateReply) -> None:
        try:
            session.send(link, reply)
        except (TransportError, Overloaded) as error:
            _log.info("reply_undeliverable", peer=session.name, error=str(error))


def _packed(entry: Entry) -> bytes:
    return _ENTRY.pack(entry.token, entry.header[:16])
