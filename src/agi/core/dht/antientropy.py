"""Keeps this node's replicas equal to the others' although writes, hints and repairs may miss one: anti-entropy.

Every so often the node compares its hash trees with each peer that holds ranges in common with it; where they differ,
both end up with the newer records (protocol/exchange.py has the dialogue, protocol/merkle.py the trees). Equal replicas
cost two small messages and no look at the store. Traffic and scans are held to a rate; nothing of this runs in the
write path but the note of which keys have changed.

The trees are built by a scan in the background after a start, and kept up to date by folding changed keys in: before an
exchange, or when many have changed. A peer's questions are answered from the same trees.

The node also keeps account of with whom it has yet to compare, in full, since something may have been missed
(`not_compared`): since it or that peer came back, since a coordinator said that it gave up hints for this node
(handoff.py), or since one ended that may have had such hints in memory only.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import structlog

from agi.core.dht.calls import Calls, Reply, Request
from agi.core.dht.clock import Clock
from agi.core.dht.errors import DHTError, InvalidRequest, NotReady, Overloaded, StaleEpoch, Unavailable
from agi.core.dht.joint import JointRing
from agi.core.dht.observability.logs import Throttle
from agi.core.dht.peers import Peers
from agi.core.dht.protocol.exchange import Ask, Done, Exchange, List, Report, Send, Span
from agi.core.dht.protocol.messages import (
    REPAIR,
    ReplicaWrite,
    WireError,
)
from agi.core.dht.protocol.record import REGISTERED, height_of
from agi.core.dht.protocol.versioning import physical_ms
from agi.core.dht.replica import Replica
from agi.core.dht.ring import TOKENS, Ring
from agi.core.dht.sessions import Session
from agi.core.dht.topology import Topology
from agi.core.dht.transport.base import Link
from agi.core.dht.transport.codec import encode
from agi.core.dht.tree_answers import REQUESTS, TreeAnswers
from agi.core.dht.treekeeper import Own, Rate, TreeKeeper

__all__ = ["REQUESTS", "AntiEntropy"]

_log = structlog.get_logger("agi.core.dht.antientropy")

SOON_S = 2.0
"""An exchange that could not be had in full, or whose peer has come back, is tried again after about this, if that is
less than the interval."""
PAUSE_LEAST = 0.75
"""Of an interval; on average it is one."""
AT_MOST, AT_MOST_S = 0.25, 5.0
"""Of an interval, or this if it is less: so long between two exchanges with one peer, however often something is
missed."""
ASKING, ASKING_S = 0.05, 1.0
"""Of an interval, or this if it is less: a peer that found differences so recently is in an exchange of its own, beside
which another would send everything twice."""
KNOWN_WAIT_S = 300.0
"""How long an ordered repair waits for trees that are being built."""
KNOWN_POLL_S = 0.25
EVERYTHING: Span = (0, TOKENS - 1)


@dataclass(slots=True)
class Totals:
    """Sums over the exchanges that this node began."""

    exchanges: int = 0
    failed: int = 0
    ranges: int = 0
    differing: int = 0
    differences: int = 0
    keys_sent: int = 0
    keys_received: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0

    def add(self, more: Report | Totals) -> None:
        if isinstance(more, Totals):
            for each in fields(self):
                setattr(self, each.name, getattr(self, each.name) + getattr(more, each.name))
            return
        self.ranges += more.ranges
        self.differing += more.differing
        self.differences += more.differences
        self.keys_sent += more.sent
        self.keys_received += more.received


@dataclass(slots=True)
class Order:
    """A repair that an operator has ordered: how far it is, and what came of it."""

    bounds: Span
    peers: int
    done: int = 0
    running: bool = True
    totals: Totals = field(default_factory=Totals)
    young: int = 0
    failed: dict[str, str] = field(default_factory=dict)


class AntiEntropy:
    """
    Args:
        stale: why a message of that epoch is refused, None if it is not.
        interval_s: between two exchanges with one peer; 0 for none but those that are ordered.
        timeout_s: for each answer of a peer; what was written within it is no difference.
        own: runs a coroutine as a task that the node owns.
    """

    def __init__(
        self,
        node_id: str,
        replica: Replica,
        peers: Peers,
        calls: Calls,
        clock: Clock,
        rng: random.Random,
        own: Own,
        stale: Callable[[Session, int], WireError | None],
        *,
        interval_s: float,
        bytes_per_s: float,
        build_keys_per_s: float,
        timeout_s: float,
        max_clock_skew_ms: int,
    ) -> None:
        self.totals = Totals()
        self.keeper = TreeKeeper(node_id, replica, clock, own, build_keys_per_s)
        self.answers = TreeAnswers(self.keeper, clock, own, stale)
        self._me = node_id
        self._replica = replica
        self._peers = peers
        self._calls = calls
        self._clock = clock
        self._rng = rng
        self._own = own
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._skew_ms = max_clock_skew_ms
        self._settling_s = timeout_s + max_clock_skew_ms / 1000
        """What was written so long ago is not young, by any clock."""
        self._traffic = Rate(bytes_per_s, clock)
        self._epoch = 0
        self._due: dict[str, float] = {}
        self._completed: dict[str, float] = {}
        self._ended: set[str] = set()
        self._begun: dict[str, float] = {}
        self._disks: dict[str, str] = {}
        self._boots: dict[str, int] = {}
        self._missed_at = 0.0
        self._back_at: dict[str, float] = {}
        self._covered: dict[str, float] = {}
        """Peer -> what was written before is equal on both sides."""
        self._one = asyncio.Lock()
        self._soon = asyncio.Event()
        self._number = 0
        self._order: Order | None = None
        self._failures = Throttle(1)

    # --- life

    def start(self, topology: Topology, ring: Ring | JointRing) -> None:
        """The node has its first topology; writes come after this."""
        self.keeper.start(ring)
        self._missed_at = self._clock.monotonic()
        self.adopt(topology, ring)
        if self._interval_s:
            self._own(self._schedule(), "anti-entropy")

    def adopt(self, topology: Topology, ring: Ring | JointRing) -> None:
        """Another topology counts. Ranges that it leaves as they are keep their trees."""
        before, behind, adopted = self.keeper.partners.keys(), bool(self.not_compared), self.keeper.adopted
        self._epoch = topology.epoch
        self.keeper.adopt(ring)
        partners, now, draw = self.keeper.partners, self._clock.monotonic(), self._rng.random
        if before and not behind:  # what a change gives to new replicas it brings them whole
            self._covered |= dict.fromkeys(partners.keys() - before, now)
        if partners.keys() != self._due.keys():
            self._due = {name: self._due.get(name, now + self._interval_s * draw()) for name in partners}
            self._completed = {name: at for name, at in self._completed.items() if name in partners}
            self._soon.set()
        disks, self._disks = self._disks, {member.node_id: member.disk_id for member in topology.members}
        for kept in (self._boots, self._back_at, self._covered, self._begun):
            for name in kept.keys() - self._disks.keys():
                del kept[name]
        gone = any(self._disks.get(name) != disk for name, disk in disks.items())  # with the hints that it had
        if gone or (behind and adopted != self.keeper.adopted):  # who held what this node lacks may be another now
            self.missed()

    def connected(self, name: str, boot: int) -> None:
        """There are links to that peer: what it missed meanwhile is not left to the next turn. Started anew it has
        none of the hints that the last one had not stored yet, which may have been for anything that this node holds.
        """
        now = self._clock.monotonic()
        self._back_at[name] = now
        if name in self._due and self._interval_s:
            self._due[name] = min(self._due[name], now + self._soon_s(name))
            self.answers.begun_by.pop(name, None)
            self._soon.set()
        if self._boots.get(name) != boot:
            self._boots[name] = boot
            self.missed()

    def missed(self) -> None:
        """This node may lack what any of the others hold, and compares with them soon."""
        self._missed_at = now = self._clock.monotonic()
        if self._interval_s:
            for name, due in self._due.items():
                earliest = self._begun.get(name, float("-inf")) + min(AT_MOST * self._interval_s, AT_MOST_S)
                self._due[name] = min(due, max(now + self._soon_s(name), earliest))
            self._soon.set()

    def _soon_s(self, name: str) -> float:
        """The two do not begin at once, so that nothing is sent twice."""
        turn = 1 if self._me < name else 2
        return min(SOON_S, self._interval_s) * (turn - 0.5 * self._rng.random())

    def request(self, session: Session, link: Link, message: Any) -> None:
        """A peer compares with this node."""
        self.answers.request(session, link, message)

    # --- what operators see

    @property
    def round_age_s(self) -> float | None:
        """How long ago every peer with ranges in common had been compared with, in full; None if one never was."""
        theirs = self.answers.completed_by
        done = [max(self._completed.get(name, -1.0), theirs.get(name, -1.0)) for name in self._due]
        return None if -1.0 in done else self._clock.monotonic() - min(done, default=self._clock.monotonic())

    @property
    def checked(self) -> bool:
        """Whether replicas are compared without an order."""
        return self._interval_s > 0

    @property
    def not_compared(self) -> list[str]:
        """Peers with which some range was not compared yet since this node, or they, may have missed something."""
        return [name for name in self.keeper.partners if self._behind(name)]

    def _since(self, name: str) -> float:
        return max(self._missed_at, self._back_at.get(name, self._missed_at))

    def _behind(self, name: str) -> bool:
        return self._covered.get(name, float("-inf")) < self._since(name)

    def state(self) -> dict[str, object]:
        """For `status`."""
        age_s = self.round_age_s
        return {
            "last_round_s": None if age_s is None else round(age_s, 1),
            "unknown_ranges": self.keeper.unknown,
            "pending_keys": self.keeper.pending,
            "checked": self.checked,
            "not_compared": self.not_compared if self.checked else [],
        }

    # --- exchanges

    async def _schedule(self) -> None:
        """One exchange after the other, each peer in its turn, for ever."""
        while True:
            self._soon.clear()
            now = self._clock.monotonic()
            due, name = min(((due, name) for name, due in self._due.items()), default=(now + self._interval_s, ""))
            if due > now:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(due - now):
                        await self._soon.wait()
                continue
            pause_s = self._interval_s * (PAUSE_LEAST + 2 * (1 - PAUSE_LEAST) * self._rng.random())
            soon_s = min(pause_s, SOON_S * (0.5 + self._rng.random()))
            begun = self.answers.begun_by.get(name, -self._interval_s)
            behind = self._behind(name)
            self._due[name] = now + (soon_s if behind else pause_s)
            if name not in self._peers.usable:
                continue
            if behind:
                asking_s = min(ASKING * self._interval_s, ASKING_S)
                if self.answers.settling_by.get(name, float("-inf")) > now - asking_s:
                    continue
            elif begun > now - self._interval_s * PAUSE_LEAST:
                self._due[name] = begun + pause_s  # it has begun one itself, which settles both sides
                continue
            report = await self._try_exchange(name)
            if name not in self._due:
                continue
            if self._behind(name) or (report is not None and report.unknown):
                if report is not None and self._begun[name] < self._since(name):  # missed while they compared
                    soon_s = max(soon_s, min(AT_MOST * self._interval_s, AT_MOST_S))
                due = self._clock.monotonic() + soon_s
                if report is not None and report.young and not report.unknown:  # no earlier one could settle it
                    due = max(due, min(self._since(name) + self._settling_s, now + pause_s))
                self._due[name] = due
            else:
                self._due[name] = now + pause_s

    async def _try_exchange(self, name: str) -> Report | None:
        try:
            return await self.exchange(name)
        except (DHTError, TimeoutError) as error:
            if self._failures.pass_(self._clock.monotonic()):
                held_back, self._failures.suppressed = self._failures.suppressed, 0
                text = str(error) or "no answer in time"
                _log.info("exchange_failed", peer=name, error=text, held_back=held_back)
            return None

    async def exchange(
        self, name: str, bounds: Span = EVERYTHING, totals: Totals | None = None, young_from: int | None = None
    ) -> Report:
        """Compares with one peer, and settles what differs, but for what is young: of an HLC above `young_from`, or
        just written. One at a time. Raises DHTError kinds, TimeoutError."""
        async with self._one:
            self._number += 1
            self._begun[name] = began = self._clock.monotonic()
            mine = Totals(exchanges=1)
            report = Report()
            try:
                await self.keeper.fold()
                core = Exchange(
                    self.keeper.trees,
                    self.keeper.shared(name, bounds),
                    bounds,
                    epoch=self._epoch,
                    trace=f"repair:{self._me}:{self._number}",
                    salt=self._rng.getrandbits(64) | 1,
                    completed=name in self._ended,
                    young=self._young(young_from),
                    level=REGISTERED - 1 if young_from is None else young_from,
                    late=lambda token, hlc: height_of(hlc) <= self._replica.floors.at(token).closed,
                )
                report = core.report
                self._ended.discard(name)
                await self._perform(name, core, mine)
            except BaseException:
                mine.failed = 1
                raise
            finally:
                mine.add(report)
                self.totals.add(mine)
                if totals is not None:
                    totals.add(mine)
        if not report.unknown and bounds == EVERYTHING and name in self.keeper.partners:
            self._completed[name] = self._clock.monotonic()
            self._ended.add(name)
            if report.young:  # left alone, and no older than that, by a clock that may be ahead
                began -= self._settling_s
            if not report.young or young_from is None:
                self._covered[name] = max(began, self._covered.get(name, began))
        if report.differing:
            say = _log.info if report.differences else _log.debug  # under load writes overtake each comparison
            say(
                "replicas_compared",
                peer=name,
                differences=report.differences,
                young=report.young,
                sent=report.sent,
                received=report.received,
                bytes=mine.bytes_sent + mine.bytes_received,
            )
        return report

    async def _perform(self, name: str, core: Exchange, counts: Totals) -> None:
        adopted = self.keeper.adopted
        effect = core.begin()
        while not isinstance(effect, Done):
            if isinstance(effect, Ask):
                reply = await self._ask(name, effect.message, counts)
                self._same(adopted)
                effect = core.replied(reply)
            elif isinstance(effect, List):
                entries, up_to = await self.keeper.listing(effect.spans)
                self._same(adopted)
                effect = core.listed(entries, up_to)
            else:
                if isinstance(effect, Send):
                    await self._send(name, effect.keys, core.trace, counts)
                else:
                    await self.keeper.store(effect.keys, effect.records)
                self._same(adopted)
                effect = core.settled()
        self.keeper.look()

    def _same(self, adopted: int) -> None:
        if adopted != self.keeper.adopted:
            raise StaleEpoch("the ranges have changed during the exchange")

    def _young(self, above: int | None) -> Callable[[int], bool]:
        """Whether a record may still be under way: it is above that version or, without one, was written within the
        deadline of a request. One of the future is not, past a like time for clocks that differ: its writer's was
        wrong, or this one was set back, and may stay so for as long as clocks may differ at all."""
        wall_ms, timeout_ms = self._clock.wall_ms, self._timeout_s * 1000
        ahead_ms = min(self._skew_ms, timeout_ms)

        def young(hlc: int) -> bool:
            if hlc >= REGISTERED:  # a ballot's time only counts, it tells nothing of when the value was accepted
                return False
            age_ms = wall_ms() - physical_ms(hlc)
            return -ahead_ms <= age_ms and (age_ms < timeout_ms if above is None else hlc > above)

        return young

    async def _ask(self, name: str, message: Any, counts: Totals) -> Reply:
        sent = len(encode(message))
        request: Request = message
        async with asyncio.timeout(self._timeout_s):
            reply = await self._calls.call(name, request)
        received = len(encode(reply))
        counts.bytes_sent += sent
        counts.bytes_received += received
        await self._traffic.spend(sent + received)
        return reply

    async def _send(self, name: str, keys: list[bytes], trace: str, counts: Totals) -> None:
        records = await self.keeper.read(keys)
        chosen = [(key, record) for key, record in zip(keys, records, strict=True) if record is not None]
        if chosen:
            message = ReplicaWrite(
                0, self._epoch, trace, REPAIR, [key for key, _ in chosen], [record for _, record in chosen]
            )
            await self._ask(name, message, counts)

    # --- ordered by an operator

    def repair(self, bounds: Span) -> dict[str, object]:
        """Begins an exchange with every peer that shares ranges within these tokens, or joins the one under way; its
        state. Raises InvalidRequest, and Overloaded where other tokens are being repaired."""
        first, last = bounds
        if not 0 <= first <= last < TOKENS:
            raise InvalidRequest(f"a range of tokens goes from a lower to a higher one, below 2^64, not {first}-{last}")
        if not self.keeper.started:
            raise NotReady(f"{self._me} has no topology yet")
        order = self._order
        if order is not None and order.running:
            if order.bounds != bounds:
                raise Overloaded(f"{self._me} is repairing another range already")
        else:
            names = [name for name in self.keeper.partners if self.keeper.shared(name, bounds)]
            self._order = order = Order(bounds, len(names))
            self._own(self._carry_out(order, names), "repair")
        return self.repair_state()

    def repair_state(self) -> dict[str, object]:
        """Of the repair that was last ordered. Raises InvalidRequest if none was."""
        order = self._order
        if order is None:
            raise InvalidRequest("no repair was ordered")
        totals = order.totals
        return {
            "running": order.running,
            "peers": order.peers,
            "done": order.done,
            "ranges": totals.ranges,
            "differing_ranges": totals.differing,
            "differences": totals.differences,
            "young": order.young,
            "keys_sent": totals.keys_sent,
            "keys_received": totals.keys_received,
            "bytes_sent": totals.bytes_sent,
            "bytes_received": totals.bytes_received,
            "failed": dict(order.failed),
        }

    async def _carry_out(self, order: Order, names: list[str]) -> None:
        deadline = self._clock.monotonic() + KNOWN_WAIT_S
        try:
            for name in names:
                try:
                    await self._repair_with(name, order, deadline)
                except (DHTError, TimeoutError) as error:
                    order.failed[name] = str(error) or f"{name} did not answer in time"
                order.done += 1
        finally:
            order.running = False

    async def _repair_with(self, name: str, order: Order, deadline: float) -> None:
        """Until every range has been compared, some of which may not be known yet."""
        while True:
            known = all(self.keeper.trees.trees[at].known for at in self.keeper.shared(name, order.bounds))
            if known:
                report = await self.exchange(name, order.bounds, order.totals)
                order.young += report.young
                if not report.unknown:
                    return
            if self._clock.monotonic() > deadline:
                raise Unavailable(f"the trees of {name if known else self._me} are not built yet")
            await asyncio.sleep(KNOWN_POLL_S)
