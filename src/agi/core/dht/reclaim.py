"""Takes tombstones and expired records away in agreed rounds, and the data of arcs that this node gave up.

What was deleted stays as a tombstone until every replica has it and nothing older can arrive any more; only then may it
go (PROTOCOLS G1; protocol/floors.py says what the heights mean). Of each arc the first replica by name leads: it has
all replicas seal the arc up to a version of a while ago; then each brings itself level with every other by exchanges of
hash trees and closes; then all reclaim. All replicas must be up, in one epoch without a change under way; else the next
round tries again, at a later version. *"Everybody confirmed an exchange" alone: a hint, a repair or a paused
coordinator brings the old value after the tombstone has gone.*

The tombstone of a register goes in two steps more (R8), once nothing at or below the round's version can be accepted
any more and all replicas are level: each of them that has accepted just that one replaces it by a promise
(acceptor.py), and when all have, the promises go too. *In one step: a plain put that two replicas take, which have
nothing left, is hidden by the tombstone at the third.* One that remembers a fence stays, for good.

A node that gains an arc first drops, durably, whatever it has of it (`make_room`, T10): what was deleted meanwhile
would come back with it. What it holds of arcs that are not its own is dropped in the background, at its leisure.
"""

from __future__ import annotations

import asyncio
import random
from bisect import bisect_right
from collections.abc import Awaitable, Callable
from itertools import islice
from typing import TYPE_CHECKING

import structlog

from agi.core.dht.acceptor import is_whole
from agi.core.dht.errors import (
    ClockSkew,
    DHTError,
    InvalidRequest,
    NotReady,
    Overloaded,
    ProtocolMismatch,
    StaleEpoch,
    TransportError,
)
from agi.core.dht.identity import Ledger
from agi.core.dht.joint import JointRing, JointSet
from agi.core.dht.protocol.consensus import BALLOT_BYTES, LOOK, LOOK_NAME, has_expired, is_register, is_retired
from agi.core.dht.protocol.exchange import Span
from agi.core.dht.protocol.floors import NONE, Floors, Height, is_dead
from agi.core.dht.protocol.messages import Op, OpResult, ReclaimReply, ReclaimStep, WireError
from agi.core.dht.protocol.record import FLAGS, TOMBSTONE, height_of, hlc_of
from agi.core.dht.protocol.versioning import physical_ms
from agi.core.dht.ring import TOKENS, Partition, Ring
from agi.core.dht.sessions import Session
from agi.core.dht.tasks import all_of
from agi.core.dht.topology import Topology
from agi.core.dht.transport.base import Link
from agi.core.dht.treekeeper import Own, joined

if TYPE_CHECKING:
    from agi.core.dht.node import Node

_log = structlog.get_logger("agi.core.dht.reclaim")

REQUESTS = (ReclaimStep,)
SEAL, CLOSE, RECLAIM, RETIRE, FREE = 1, 2, 3, 4, 5
STEP_TIMEOUT_S = 15.0
CLOSE_TIMEOUT_S = 600.0
"""Closing may have to bring much; it is asked for again and again."""
CLOSE_POLL_S = 0.5
LEVEL_TRIES = 5
"""Exchanges with one peer until one finds nothing any more."""
RETRY_S = 10.0
"""A round that failed is tried again after about this, if that is less than the interval."""
RETIRE_MAX = 1000
"""Registers that one round takes away."""
EXPIRED_MAX = 200
"""Registers whose expiry one look at the store has decided on."""
STEPS_MAX = 64
"""Steps under way at one node for others."""
CALM_S = 10.0
CALM_LOOKS = 6
"""The first count waits until no request has come for CALM_S, and no longer than so many times that."""
COUNT_S = 600.0
"""Between two counts where no rounds are led that would look through the store."""


class Reclaimer:
    """
    Args:
        own: runs a coroutine as a task that the node owns.
        interval_s: between two rounds; 0 for none.
        lag_s: how far in the past the version lies up to which a round reclaims.

    Attributes:
        rounds, failed: that this node led.
        reclaimed: records that it has taken away.
        dropped: records of arcs that are not its own that it has dropped.
        dead, oldest_dead_ms: tombstones and expired records that its last look at the store found and left, and when
            the oldest of them was written; `dead` is None before the first look.
        retired: registers among what was reclaimed.
    """

    def __init__(
        self,
        node: Node,
        ledger: Ledger,
        rng: random.Random,
        own: Own,
        stale: Callable[[Session, int], WireError | None],
        *,
        interval_s: float,
        lag_s: float,
    ) -> None:
        self.rounds = 0
        self.failed = 0
        self.reclaimed = 0
        self.retired = 0
        self.dropped = 0
        self.dead: int | None = None
        self.oldest_dead_ms = 0
        self._node = node
        self._ledger = ledger
        self._rng = rng
        self._own = own
        self._stale = stale
        self._interval_s = interval_s
        self._lag_ms = int(lag_s * 1000)
        self._raising = asyncio.Lock()
        self._look = asyncio.Event()
        self._closing: set[str] = set()
        self._absent: dict[bytes, bytes] = {}
        self._steps = 0

    async def load(self) -> None:
        """Before the node serves anybody."""
        self._node.replica.floors = await self._ledger.floors()

    def start(self) -> None:
        if self._interval_s:
            self._own(self._lead(), "reclaim")
            self._own(self._clear(), "reclaim store")
        self._own(self._count(), "count tombstones")

    @property
    def floor_age_s(self) -> float | None:
        """How far behind now the version is up to which all of this node's arcs are reclaimed; None where some are not,
        or while members change."""
        if not isinstance(self._node.ring, Ring):
            return None
        reclaimed = self._lowest(self._node.antientropy.keeper.held).reclaimed
        return (self._node.clock.wall_ms() - physical_ms(reclaimed)) / 1000 if reclaimed else None

    @property
    def oldest_dead_s(self) -> float | None:
        """How long ago the oldest tombstone that was left was written; None before the first look."""
        if self.dead is None:
            return None
        return (self._node.clock.wall_ms() - self.oldest_dead_ms) / 1000 if self.dead else 0.0

    def state(self) -> dict[str, object]:
        """For `status`."""
        age_s, oldest_s = self.floor_age_s, self.oldest_dead_s
        return {
            "floor_age_s": None if age_s is None else round(age_s, 1),
            "tombstones": self.dead,
            "oldest_tombstone_s": None if oldest_s is None else round(oldest_s, 1),
            "reclaimed": self.reclaimed,
        }

    # --- leading rounds

    async def _lead(self) -> None:
        pause_s = self._interval_s
        while True:
            await asyncio.sleep(pause_s * (0.75 + 0.5 * self._rng.random()))
            pause_s = self._interval_s
            try:
                await self.round()
            except (DHTError, TimeoutError) as error:
                self.failed += 1
                pause_s = min(self._interval_s, RETRY_S)
                _log.info("round_failed", error=str(error) or "no answer in time")

    async def round(self) -> int:
        """Reclaims what this node leads, as far as its replicas are up; returns up to which version, 0 where there is
        nothing to lead now. Raises DHTError kinds, TimeoutError."""
        node = self._node
        ring, topology = node.ring, node.known_topology
        if not isinstance(ring, Ring):
            return 0
        up = {node.node_id, *node.peers.usable}
        absent = sorted(member.node_id for member in topology.members if member.node_id not in up)
        names = {name for part in ring.partitions() if _led_by(part, node.node_id, absent) for name in part.replicas}
        if not names:
            return 0
        others = sorted(names - {node.node_id})
        version = max(0, node.clock.wall_ms() - self._lag_ms) << 16 | 0xFFFF
        epoch = topology.epoch
        for step, timeout_s in ((SEAL, STEP_TIMEOUT_S), (CLOSE, CLOSE_TIMEOUT_S), (RECLAIM, STEP_TIMEOUT_S)):
            async with asyncio.timeout(timeout_s):
                await self._all(others, ReclaimStep(0, epoch, step, version, absent))
        self.rounds += 1
        try:
            await self._retire(others, epoch, version, absent)
        except (DHTError, TimeoutError) as error:  # the next round tries it again
            _log.info("registers_not_retired", error=str(error) or "no answer in time")
        _log.debug("round_done", version=version, replicas=len(names), absent=absent)
        return version

    async def _retire(self, others: list[str], epoch: int, version: int, absent: list[str]) -> None:
        """Takes registers of absent keys away, of those that this node's last look at the store found."""
        replica, me = self._node.replica, self._node.node_id
        led = Floors([(*span, NONE) for span in self._held(lambda part: _led_by(part, me, absent))])
        found = {key: ballot for key, ballot in self._absent.items() if led.covers(replica.token_of(key))}
        self._absent = {}
        if not found:
            return
        keys, ballots = list(found), list(found.values())
        for step in (RETIRE, FREE):
            async with asyncio.timeout(STEP_TIMEOUT_S):
                kept = await self._all(others, ReclaimStep(0, epoch, step, version, absent, keys, ballots))
            keys = [key for index, key in enumerate(keys) if index not in kept]
            ballots = [found[key] for key in keys]
            if not keys:
                break

    async def _all(self, others: list[str], message: ReclaimStep) -> set[int]:
        """All have taken the step; which of its keys some of them has kept."""
        kept: set[int] = set()

        async def add(step: Awaitable[list[int]]) -> None:
            kept.update(await step)

        mine = self._step(self._node.node_id, message, wait=True)
        await all_of([add(self._order(name, message)) for name in others] + [add(mine)])
        return kept

    async def _order(self, name: str, message: ReclaimStep) -> list[int]:
        """That replica has taken the step; which of its keys it has kept."""
        while True:
            try:
                async with asyncio.timeout(STEP_TIMEOUT_S):
                    reply = await self._node.calls.call(name, message)
                assert isinstance(reply, ReclaimReply)
                return reply.kept
            except NotReady:
                await asyncio.sleep(CLOSE_POLL_S * (0.5 + self._rng.random()))

    # --- steps

    def request(self, session: Session, link: Link, message: ReclaimStep) -> None:
        """Whoever leads asks for a step."""
        error = self._stale(session, message.epoch)
        if session.kind != "node":
            raise ProtocolMismatch("a client reclaims nothing")
        if error is None and self._steps >= STEPS_MAX:
            error = Overloaded(f"{self._steps} steps are being taken already").to_wire()
        if error is not None:
            self._reply(session, link, ReclaimReply(message.id, error))
            return
        self._steps += 1
        self._own(self._answer(session, link, message), "reclaim answer")

    async def _answer(self, session: Session, link: Link, message: ReclaimStep) -> None:
        error: WireError | None = None
        kept: list[int] = []
        try:
            async with asyncio.timeout(STEP_TIMEOUT_S):
                kept = await self._step(session.name, message, wait=False)
        except DHTError as failure:
            error = failure.to_wire()
        except TimeoutError:
            error = NotReady(f"{self._node.node_id} has not taken the step in time").to_wire()
        finally:
            self._steps -= 1
        self._reply(session, link, ReclaimReply(message.id, error, kept))

    def _reply(self, session: Session, link: Link, reply: ReclaimReply) -> None:
        try:
            session.send(link, reply)
        except (TransportError, Overloaded) as error:
            _log.info("reply_undeliverable", peer=session.name, error=str(error))

    async def _step(self, leader: str, message: ReclaimStep, *, wait: bool) -> list[int]:
        """Returns when the step is taken, durably; the places of its keys that this node has kept. Without `wait`,
        NotReady tells that closing goes on."""
        node, version = self._node, message.version
        if version > node.replica.limit():
            raise ClockSkew(f"{leader} would reclaim what is written long after the time of {node.node_id}")
        placement = node.known_topology.placement
        spans = self._held(lambda part: _led_by(part, leader, message.absent))
        if not spans:
            raise InvalidRequest(f"{leader} leads no arc of {node.node_id}")
        if message.step == SEAL:
            await self._raise(placement, spans, Height(version, 0, 0), settle=True)
        elif message.step == CLOSE:
            if self._lowest(spans).closed >= version:
                return []
            if wait:
                await self._close(placement, spans, leader, message)
                return []
            if leader not in self._closing:  # for an earlier round, perhaps: then that ends first
                self._closing.add(leader)
                self._own(self._close_quietly(placement, spans, leader, message), "close arcs")
            raise NotReady(f"{node.node_id} is closing")
        elif message.step == RECLAIM:
            if self._lowest(spans).closed < version:
                raise InvalidRequest(f"{node.node_id} has not closed what {leader} would reclaim")
            await self._raise(placement, spans, Height(version, version, version))
            self._look.set()
        elif message.step in (RETIRE, FREE):
            return await self._take_away(spans, message)
        else:
            raise InvalidRequest(f"unknown step {message.step}")
        return []

    async def _take_away(self, spans: list[Span], message: ReclaimStep) -> list[int]:
        """Takes RETIRE, or FREE."""
        acceptor, replica = self._node.acceptor, self._node.replica
        keys, ballots = message.keys, message.ballots
        if len(keys) > RETIRE_MAX or not is_whole(keys, ballots):
            raise InvalidRequest("RETIRE and FREE name keys, and the ballot of each")
        if self._lowest(spans).reclaimed < message.version:
            raise InvalidRequest(f"{self._node.node_id} has not reclaimed up to {message.version}")
        held = Floors([(*span, NONE) for span in spans])
        places = [index for index, key in enumerate(keys) if held.covers(replica.token_of(key))]
        if not places:
            return []
        keys, ballots = [keys[index] for index in places], [ballots[index] for index in places]
        if message.step == FREE:
            await acceptor.free(keys, message.version)
            return []
        kept = await acceptor.retire(keys, ballots, message.version)
        self.retired += len(keys) - len(kept)
        return [places[index] for index in kept]

    def _held(self, choose: Callable[[Partition], bool]) -> list[Span]:
        """What this node holds of the arcs chosen, in token order. Raises StaleEpoch while members change."""
        ring = self._node.ring
        if not isinstance(ring, Ring):
            raise StaleEpoch("nothing is reclaimed while a change of the members is under way")
        me = self._node.node_id
        return sorted(
            span for part in ring.partitions() if me in part.replicas and choose(part) for span in part.ranges()
        )

    def _lowest(self, spans: list[Span]) -> Height:
        """The lowest heights in these spans."""
        known = self._node.replica.floors.within(spans).spans
        if sum(last - first + 1 for first, last, _ in known) < sum(last - first + 1 for first, last in spans):
            return Height()
        return Height(*(min(each) for each in zip(*(height for _, _, height in known), strict=True)))

    async def _raise(self, placement: str, spans: list[Span], to: Height, *, settle: bool = False) -> None:
        """Puts these heights into force, then stores them."""
        node = self._node
        async with self._raising:
            if node.known_topology.placement != placement:
                raise StaleEpoch("the replica sets have changed")
            node.replica.floors = node.replica.floors.raised(spans, to)
            if settle:
                await node.replica.settle()  # what was taken before is in the store: exchanges tell of it
            await self._ledger.store_floors(node.replica.floors)

    async def _close_quietly(self, placement: str, spans: list[Span], leader: str, message: ReclaimStep) -> None:
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._close(placement, spans, leader, message)
        except (DHTError, TimeoutError) as error:
            _log.info("not_closed", leader=leader, error=str(error) or "no answer in time")
        finally:
            self._closing.discard(leader)

    async def _close(self, placement: str, spans: list[Span], leader: str, message: ReclaimStep) -> None:
        """This node has all that the other replicas held when they had sealed; then it closes."""
        node, version = self._node, message.version
        if self._lowest(spans).sealed < version:
            raise InvalidRequest(f"{node.node_id} has not sealed what it is to close")
        assert isinstance(node.ring, Ring)
        names = {
            name
            for part in node.ring.partitions()
            if node.node_id in part.replicas and _led_by(part, leader, message.absent)
            for name in part.replicas
        }
        for name in sorted(names - {node.node_id}):
            await self._level_with(name, version)
        await self._raise(placement, spans, Height(version, version, 0), settle=True)

    async def _level_with(self, name: str, version: int) -> None:
        """An exchange finds nothing up to that version that this node lacks. What the other one lacks is its own to
        close: it may have reclaimed what this node keeps, where the word to reclaim did not arrive."""
        for _ in range(LEVEL_TRIES):
            report = await self._node.antientropy.exchange(name, young_from=version)
            if report.unknown:
                raise NotReady("hash trees are being built")
            if not report.behind:
                return
        raise NotReady(f"{self._node.node_id} still lacks what {name} has after {LEVEL_TRIES} exchanges")

    # --- the store

    async def _clear(self) -> None:
        """Looks through the store after each round, and now and then without one."""
        while True:
            try:
                async with asyncio.timeout(self._interval_s * (1 + self._rng.random())):
                    await self._look.wait()
            except TimeoutError:
                _log.debug("no_round_of_late")
            self._look.clear()
            try:
                await self.clear()
            except (DHTError, TimeoutError) as error:
                _log.warning("store_not_cleared", error=str(error) or "no answer in time")

    async def _count(self) -> None:
        """Counts what is dead soon after a start, so that it need not be unknown until a round; again and again where
        there are none."""
        while self.dead is None or not self._interval_s:
            await self._calm()
            if self.dead is not None and self._interval_s:
                break  # a round came first
            try:
                await self.count()
            except (DHTError, TimeoutError) as error:
                _log.warning("tombstones_not_counted", error=str(error) or "no answer in time")
            await asyncio.sleep(COUNT_S)

    async def _calm(self) -> None:
        """Returns when the node serves and is at rest, its trees are built, and no change is under way; or does not
        rest for long."""
        node, looks = self._node, 0
        while True:
            before = node.antientropy.keeper.requests
            await asyncio.sleep(CALM_S)
            looks += 1
            busy = node.antientropy.keeper.requests != before and looks < CALM_LOOKS
            if not (busy or node.waiting_for or node.antientropy.keeper.unknown) and isinstance(node.ring, Ring):
                return

    async def count(self) -> None:
        """Looks through the store, and takes nothing away. Raises StorageError kinds, TimeoutError."""
        keeper = self._node.antientropy.keeper
        dead, oldest_ms = 0, self._node.clock.wall_ms()
        for span in joined(keeper.held):
            async for page in keeper.walk(span):
                for found in self._sort(page):
                    dead += len(found)
                    oldest_ms = _oldest(oldest_ms, found)
        self.dead, self.oldest_dead_ms = dead, oldest_ms

    async def clear(self) -> None:
        """Takes away what may go. Raises StorageError kinds, TimeoutError."""
        node = self._node
        if not isinstance(node.ring, Ring):
            return
        held = node.antientropy.keeper.held
        dead, oldest_ms = 0, node.clock.wall_ms()
        absent: dict[bytes, bytes] = {}
        expired: list[bytes] = []
        expiry_ms = node.clock.wall_ms() - self._lag_ms
        for span in joined(held):
            async for page in node.antientropy.keeper.walk(span):
                taken, left = self._sort(page)
                if taken:
                    self.reclaimed += await node.replica.purge([key for key, _ in taken], [item for _, item in taken])
                dead += len(left)
                oldest_ms = _oldest(oldest_ms, left)
                expired += [key for key, item in page if has_expired(item, expiry_ms)][: EXPIRED_MAX - len(expired)]
                if len(absent) < RETIRE_MAX:
                    absent |= await self._registers([key for key, item in left if is_register(item)])
        self.dead, self.oldest_dead_ms = dead, oldest_ms
        self._absent = dict(islice(absent.items(), RETIRE_MAX))
        self._end(expired)
        await self.drop_leftovers()

    async def drop_leftovers(self) -> None:
        """Drops what this node has of arcs that it does not hold. Raises StorageError kinds, TimeoutError."""
        node = self._node
        if not isinstance(node.ring, Ring):
            return
        held, placement = node.antientropy.keeper.held, node.known_topology.placement
        for span in _outside(held):
            self.dropped += await self._drop(span, lambda: node.known_topology.placement == placement)

    def _sort(self, page: list[tuple[bytes, bytes]]) -> tuple[list[tuple[bytes, bytes]], list[tuple[bytes, bytes]]]:
        """Of these records those that may go, and other dead ones."""
        replica = self._node.replica
        now_ms = self._node.clock.wall_ms()
        taken, left = [], []
        for key, record in page:
            if not record[FLAGS]:
                continue
            if is_dead(record, replica.floors.at(replica.token_of(key)).reclaimed):
                taken.append((key, record))
            elif is_dead(record, now_ms << 16) or (is_register(record) and record[FLAGS] & TOMBSTONE):
                left.append((key, record))
        return taken, left

    def _end(self, expired: list[bytes]) -> None:
        """Has the expiry of these keys decided on, where this node leads, so that a later round can take them away."""
        node = self._node
        if node.coordinator is None or not isinstance(node.ring, Ring):
            return
        deadline = node.clock.monotonic() + STEP_TIMEOUT_S
        for key in expired:
            if min(node.ring.replicas(key)) == node.node_id:
                node.coordinator.registers.run(Op(LOOK_NAME, key, LOOK), deadline, _ignore)

    async def _registers(self, keys: list[bytes]) -> dict[bytes, bytes]:
        """Those of these keys whose registers a round may take away, and the ballots under which they were accepted."""
        records = await self._node.antientropy.keeper.read(keys) if keys else []
        height = self._node.clock.wall_ms() << 16
        return {
            key: record[:BALLOT_BYTES]
            for key, record in zip(keys, records, strict=True)
            if record is not None and is_retired(record, height)
        }

    async def _drop(self, span: Span, allowed: Callable[[], bool]) -> int:
        count = 0
        async for page in self._node.antientropy.keeper.walk(span):
            if not allowed():
                break
            count += await self._node.replica.purge([key for key, _ in page], [item for _, item in page], allowed)
        return count

    async def make_room(self, topology: Topology) -> None:
        """Drops all that this node has of the arcs that the topology will give it, hints among it. Raises StorageError
        kinds, TimeoutError: then the topology may not be adopted."""
        node = self._node
        if topology.placement == node.known_topology.placement:
            return
        ring = topology.ring()
        if not isinstance(ring, JointRing):
            return
        gained = sorted(
            span
            for part in ring.partitions()
            if isinstance(part.replicas, JointSet)
            and node.node_id in part.replicas.new
            and node.node_id not in part.replicas.old
            for span in part.ranges()
        )
        if not gained:
            return
        async with self._raising:
            node.replica.floors = node.replica.floors.without(gained)
            await self._ledger.store_floors(node.replica.floors)
        firsts = [first for first, _ in gained]
        token_of = node.replica.token_of

        def is_gained(token: int) -> bool:
            index = bisect_right(firsts, token) - 1
            return index >= 0 and token <= gained[index][1]

        hints = await node.handoff.drop(lambda hint: is_gained(token_of(hint.key)))
        count = 0
        await node.replica.settle()
        if (await node.store.count()).records:
            for span in joined(gained):
                count += await self._drop(span, lambda: True)
        if count or hints:
            _log.info("room_made", epoch=topology.epoch, records=count, hints=hints)
        self.dropped += count

    def foresee(self, floors: Floors) -> None:
        """What a source tells of arcs that this node gains counts at once, though only in memory: what is late there
        is late here."""
        self._node.replica.floors = self._node.replica.floors.over(floors)

    async def take_over(self, floors: Floors) -> None:
        """This node has merged what a source held of these spans, and takes over its heights."""
        async with self._raising:
            self._node.replica.floors = self._node.replica.floors.over(floors)
            await self._ledger.store_floors(self._node.replica.floors)


def _ignore(_result: OpResult) -> None:
    """What has expired is found again if that came to nothing."""


def _oldest(before_ms: int, found: list[tuple[bytes, bytes]]) -> int:
    """When the oldest of these was written, or what was met before them."""
    return min([before_ms, *(physical_ms(height_of(hlc_of(record))) for _, record in found)])


def _led_by(part: Partition, leader: str, absent: list[str]) -> bool:
    return min(part.replicas) == leader and not any(name in absent for name in part.replicas)


def _outside(spans: list[Span]) -> list[Span]:
    """All tokens but these."""
    outside, at = [], 0
    for first, last in joined(spans):
        if first > at:
            outside.append((at, first - 1))
        at = last + 1
    if at < TOKENS:
        outside.append((at, TOKENS - 1))
    return outside
