"""Ordered scans over the whole cluster: every arc covered by R replicas, or an error; never silently less.

A page asks just enough nodes that each replica set has R answers, merges what they hold (tombstones included) and cuts
the result where the shortest answer ends: beyond that key some replica has not spoken. Keys on which replicas differ
are repaired before they are shown, as in a read. A failed node is replaced by another replica of its sets.

While keys change hands the sets before the change and those after it are covered. Where the topology changes during a
scan, its page begins again: what was said under another one does not count (PROTOCOLS T3).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import structlog

from agi.core.dht.calls import Calls, Reply
from agi.core.dht.clock import Clock
from agi.core.dht.errors import (
    DHTError,
    InvalidRequest,
    Overloaded,
    StaleEpoch,
    TransportError,
    Unavailable,
    from_wire,
)
from agi.core.dht.joint import JointRing
from agi.core.dht.observability.metrics import Metrics
from agi.core.dht.peers import Peers
from agi.core.dht.protocol.consensus import LOOK, LOOK_NAME, as_plain, is_register, is_settled
from agi.core.dht.protocol.messages import (
    REPAIR,
    Message,
    Op,
    OpResult,
    ReplicaScan,
    ReplicaScanReply,
    ReplicaWrite,
    ReplicaWriteReply,
    Scan,
    ScanReply,
    WireError,
)
from agi.core.dht.protocol.record import REGISTERED, is_live
from agi.core.dht.replica import Replica
from agi.core.dht.requests import Decide, undecided
from agi.core.dht.ring import Ring
from agi.core.dht.storage.base import Page
from agi.core.dht.tasks import end
from agi.core.dht.topology import Topology
from agi.core.dht.types import BATCH_BYTES_MAX, SCAN_LIMIT_MAX, Consistency

_log = structlog.get_logger("agi.core.dht.scan")

PATIENCE_MIN_S = 0.1
SCANS_MAX = 64
"""Scans under way at one coordinator; past it callers get Overloaded."""
STALE_PAUSE_S = 0.05
"""How long a page waits that was refused for its epoch, until it begins again."""


@dataclass(frozen=True, slots=True, eq=False)
class _View:
    """The topology that one try of a page goes by."""

    topology: Topology
    ring: Ring | JointRing
    everyone: tuple[str, ...]
    everywhere: bool
    old: Sequence[tuple[str, ...]]
    new: Sequence[tuple[str, ...]]

    @classmethod
    def of(cls, topology: Topology, ring: Ring | JointRing) -> _View:
        everyone = tuple(member.node_id for member in topology.members)
        if isinstance(ring, JointRing):
            old, new = (sorted({part.replicas for part in half.partitions()}) for half in (ring.before, ring.after))
            return cls(topology, ring, everyone, False, old, new)
        if topology.replica_count == len(everyone):
            return cls(topology, ring, everyone, True, [everyone], ())
        return cls(topology, ring, everyone, False, sorted({part.replicas for part in ring.partitions()}), ())

    def needs(self, level: Consistency) -> dict[tuple[str, ...], int]:
        """How many answers each replica set has to give. New ones need not be filled yet for level ONE."""
        needs = {} if level is Consistency.ONE else {s: level.needed(len(s)) for s in self.new}
        needs.update({s: level.needed(len(s)) for s in self.old})
        return needs

    def replicas(self, key: bytes) -> tuple[str, ...]:
        """Of both sets, where the key changes hands."""
        return self.everyone if self.everywhere else self.ring.replicas(key)


class Scanner:
    """Coordinates the scans of clients at one node. Scans are rare and long: each is a task with a deadline.

    Args:
        on_stale: told of a node that goes by a newer topology.
    """

    def __init__(
        self,
        node_id: str,
        topology: Topology,
        ring: Ring | JointRing,
        replica: Replica,
        peers: Peers,
        calls: Calls,
        clock: Clock,
        metrics: Metrics,
        *,
        on_stale: Callable[[str], None] = lambda node: None,
    ) -> None:
        self._me = node_id
        self._view = _View.of(topology, ring)
        self._on_stale = on_stale
        self._replica = replica
        self._peers = peers
        self._calls = calls
        self._clock = clock
        self._metrics = metrics
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._turn = 0
        self.decide: Decide = undecided
        """As in `Requests`."""

    def adopt(self, topology: Topology, ring: Ring | JointRing) -> None:
        """Scans go by this topology; the pages of those under way begin again."""
        self._view = _View.of(topology, ring)

    def scan(self, request: Scan, reply: Callable[[Message], object], trace: str) -> None:
        """Answers with one ScanReply by the deadline."""
        try:
            level = Consistency(request.consistency)
            if not 1 <= request.limit <= SCAN_LIMIT_MAX:
                raise InvalidRequest(f"a page has 1 to {SCAN_LIMIT_MAX} keys, not {request.limit}")
            if len(self._tasks) >= SCANS_MAX:
                raise Overloaded(f"{SCANS_MAX} scans are under way at {self._me} already")
        except (DHTError, ValueError) as error:
            refused = error if isinstance(error, DHTError) else InvalidRequest(str(error))
            reply(ScanReply(request.id, [], [], b"", refused.to_wire()))
            return
        task = asyncio.get_running_loop().create_task(self._run(request, level, reply, trace))
        self._tasks[task] = None
        task.add_done_callback(self._tasks.pop)

    @property
    def pending(self) -> int:
        """Scans under way."""
        return len(self._tasks)

    async def stop(self) -> None:
        await end(self._tasks)

    async def _run(self, request: Scan, level: Consistency, reply: Callable[[Message], object], trace: str) -> None:
        started = self._clock.monotonic()
        answer: ScanReply
        try:
            async with asyncio.timeout(request.timeout_ms / 1000):
                keys, records, cursor = await self._restarted(request, level, trace)
            answer = ScanReply(request.id, keys, [b""] * len(keys) if request.keys_only else records, cursor)
            self._metrics.scans += 1
        except TimeoutError:
            needed = level.needed(self._view.topology.replica_count)
            late = Unavailable("not every arc was covered by the deadline", needed=needed)
            self._metrics.fail(late, 1)
            answer = ScanReply(request.id, [], [], b"", late.to_wire())
        except DHTError as error:
            self._metrics.fail(error, 1)
            answer = ScanReply(request.id, [], [], b"", error.to_wire())
        self._metrics.scan_latency.observe(self._clock.monotonic() - started)
        try:
            reply(answer)
        except (TransportError, Overloaded) as error:
            _log.info("reply_undeliverable", trace=trace, error=str(error))

    async def _restarted(self, request: Scan, level: Consistency, trace: str) -> tuple[list[bytes], list[bytes], bytes]:
        """A page whose every answer and repair was given under one topology."""
        while True:
            view = self._view
            try:
                page = await self._page(view, request, level, trace)
            except StaleEpoch:
                if view is self._view:
                    await asyncio.sleep(STALE_PAUSE_S)
            except DHTError:
                if view is self._view:
                    raise
            else:
                if view is self._view:
                    return page

    async def _page(
        self, view: _View, request: Scan, level: Consistency, trace: str
    ) -> tuple[list[bytes], list[bytes], bytes]:
        needs = view.needs(level)
        pages = await self._cover(view, needs, request, trace)
        if view is not self._view:
            return [], [], b""  # it begins again
        horizon = min((page.items[-1][0] for page in pages.values() if not page.complete and page.items), default=None)
        held: dict[bytes, dict[str, bytes]] = {}
        for name, page in pages.items():
            for key, record in page.items:
                if horizon is None or key <= horizon:
                    held.setdefault(key, {})[name] = record
        now_ms = self._clock.wall_ms()
        keys: list[bytes] = []
        records: list[bytes] = []
        contested: list[int] = []
        repairs: dict[str, list[tuple[bytes, bytes]]] = {}
        repairing = level is not Consistency.ONE and (max(needs.values()) > 1 or bool(view.new))
        size, cursor = 0, (horizon + b"\0" if horizon is not None else b"")
        for key in sorted(held):
            replicas = view.replicas(key)
            versions = held[key]
            newest = max((record for name, record in versions.items() if name in replicas), default=None)
            if newest is None:
                continue  # left over at a node that does not own it
            shown: bytes | None = newest
            if is_register(newest):
                alike = all(versions.get(name) == newest for name in replicas if name in pages)
                if level is not Consistency.ONE and not (alike and is_settled(newest, now_ms)):
                    contested.append(len(keys))  # a round has to tell (R9)
                else:
                    shown = as_plain(key, newest)
            if (contested and contested[-1] == len(keys)) or is_live(shown, now_ms):
                if len(keys) == request.limit or (keys and size + len(newest) > BATCH_BYTES_MAX):
                    cursor = key
                    break
                keys.append(key)
                records.append(shown or b"")
                size += len(newest) + len(key)
            if repairing and not is_register(newest):
                for name in replicas:
                    if name in pages and versions.get(name) != newest:
                        repairs.setdefault(name, []).append((key, newest))
        if repairs:
            decided = await self._repair(view, repairs, trace)
            contested += [index for index, key in enumerate(keys) if key in decided]
        contested = [index for index in contested if index < len(keys)]
        if contested:
            found = await asyncio.gather(*(self._look(keys[index], request.timeout_ms) for index in contested))
            for index, plain in zip(contested, found, strict=True):
                records[index] = plain or b""
            gone = {index for index in contested if not records[index]}
            keys = [key for index, key in enumerate(keys) if index not in gone]
            records = [record for index, record in enumerate(records) if index not in gone]
        return keys, records, cursor

    async def _look(self, key: bytes, timeout_ms: int) -> bytes | None:
        """What a key under consensus holds, decided. Raises what prevents that."""
        looked: asyncio.Future[OpResult] = asyncio.get_running_loop().create_future()

        def answer(result: OpResult) -> None:
            if not looked.done():
                looked.set_result(result)

        self.decide(Op(LOOK_NAME, key, LOOK), self._clock.monotonic() + timeout_ms / 1000, answer)
        result = await looked
        if result.error is not None:
            raise from_wire(*result.error)
        return result.record

    async def _cover(
        self, view: _View, needs: dict[tuple[str, ...], int], request: Scan, trace: str
    ) -> dict[str, Page]:
        """A page from enough nodes that every replica set has the answers it needs. Raises Unavailable; StaleEpoch
        where a node goes by another topology."""
        self._turn += 1
        turn = self._turn % len(view.everyone)
        others = [name for name in view.everyone[turn:] + view.everyone[:turn] if name != self._me]
        others.sort(key=self._peers.suspects.__contains__)
        candidates = [self._me, *(name for name in others if name in self._peers.usable)]
        pages: dict[str, Page] = {}
        failed: dict[str, DHTError] = {}
        while True:
            able = [name for name in candidates if name not in failed]
            asked = self._choose(able, needs, set(pages))
            if asked is None:
                reason = next(iter(failed.values())).message if failed else "too few replicas are reachable"
                held = [(sum(name in able for name in replicas), needed) for replicas, needed in needs.items()]
                answered, needed = min(pair for pair in held if pair[0] < pair[1])
                raise Unavailable(f"a part of the ring is not covered: {reason}", needed=needed, answered=answered)
            fresh = sorted(asked - pages.keys())
            if not fresh:
                return pages
            patience_s = max(PATIENCE_MIN_S, request.timeout_ms / 1000 / 3)
            results = await asyncio.gather(
                *(self._ask_within(view, name, request, trace, patience_s) for name in fresh), return_exceptions=True
            )
            for name, result in zip(fresh, results, strict=True):
                if isinstance(result, DHTError) and not isinstance(result, StaleEpoch):
                    failed[name] = result
                elif isinstance(result, BaseException):
                    raise result
                else:
                    pages[name] = result

    async def _ask_within(self, view: _View, name: str, request: Scan, trace: str, patience_s: float) -> Page:
        """A silent node may not use up the time in which another could answer."""
        try:
            async with asyncio.timeout(patience_s):
                return await self._ask(view, name, request, trace)
        except TimeoutError:
            raise Unavailable(f"{name} did not answer within {patience_s:g} s") from None

    def _choose(self, candidates: list[str], needs: dict[tuple[str, ...], int], answered: set[str]) -> set[str] | None:
        """Nodes that cover each replica set as often as it needs, those that answered first; None if there are none."""
        chosen = set(answered)
        lacking = {s: needed - sum(name in chosen for name in s) for s, needed in needs.items()}
        for name in candidates:
            if name in chosen or not any(count > 0 and name in s for s, count in lacking.items()):
                continue
            chosen.add(name)
            for replicas in lacking:
                if name in replicas:
                    lacking[replicas] -= 1
        return None if any(count > 0 for count in lacking.values()) else chosen

    async def _ask(self, view: _View, name: str, request: Scan, trace: str) -> Page:
        limit = request.limit + 1  # one more than asked tells whether there is a next page
        if name == self._me:
            found: asyncio.Future[Page] = asyncio.get_running_loop().create_future()
            await self._replica.scan(request.start, request.end, limit, BATCH_BYTES_MAX, partial(_settle, found))
            return await found
        message = ReplicaScan(0, view.topology.epoch, trace, request.start, request.end, limit, BATCH_BYTES_MAX)
        reply = await self._call(name, message)
        assert isinstance(reply, ReplicaScanReply)
        return Page(list(zip(reply.keys, reply.records, strict=True)), reply.complete)

    async def _call(self, name: str, message: ReplicaScan | ReplicaWrite) -> Reply:
        try:
            return await self._calls.call(name, message)
        except StaleEpoch:
            self._on_stale(name)
            raise

    async def _repair(self, view: _View, repairs: dict[str, list[tuple[bytes, bytes]]], trace: str) -> set[bytes]:
        """Brings the newest records to who lacks them; returns keys that have come under consensus meanwhile: of those
        a round has to tell what they hold (R1)."""
        self._metrics.read_repairs += sum(map(len, repairs.values()))

        async def one(name: str, items: list[tuple[bytes, bytes]]) -> list[bytes]:
            keys, records = [key for key, _ in items], [record for _, record in items]
            superseded: list[tuple[int, int]] | None
            if name == self._me:
                done: asyncio.Future[list[tuple[int, int]] | None] = asyncio.get_running_loop().create_future()

                def written(found: list[tuple[int, int]] | None, live: object, error: WireError | None) -> None:
                    if not done.done():
                        done.set_result(found) if error is None else done.set_exception(from_wire(*error))

                self._replica.write(REPAIR, keys, records, False, written)
                superseded = await done
            else:
                reply = await self._call(name, ReplicaWrite(0, view.topology.epoch, trace, REPAIR, keys, records))
                assert isinstance(reply, ReplicaWriteReply)
                superseded = reply.superseded
            return [keys[index] for index, hlc in superseded or () if hlc >= REGISTERED]

        found = await asyncio.gather(*(one(name, items) for name, items in repairs.items()))
        return {key for keys in found for key in keys}


def _settle(future: asyncio.Future[Page], page: Page, error: WireError | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(page)
    else:
        future.set_exception(from_wire(*error))
