"""Keeps the hash trees of a node true to its store: builds them by scans in the background, folds changed keys in, and
reads what a comparison asks for (protocol/merkle.py has the trees and their law).

The write path only notes which keys change. Scans are bounded steps held to a rate, folding gives the event loop its
turn every few keys, and pages shrink where records are large.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator, Sequence
from functools import partial
from itertools import pairwise
from operator import lt
from typing import Any, TypeAlias, TypeVar

import structlog

from agi.core.dht.clock import Clock
from agi.core.dht.errors import DHTError, from_wire
from agi.core.dht.joint import JointRing, JointSet
from agi.core.dht.protocol.exchange import RECORDS_MAX, SEND_BYTES, Entry, Span, entry_of
from agi.core.dht.protocol.merkle import FOLD_AT, HashTrees
from agi.core.dht.protocol.messages import REPAIR, WireError
from agi.core.dht.replica import STORE_TIMEOUT_S, Replica
from agi.core.dht.ring import Partition, Ring, token_bytes
from agi.core.dht.storage.base import Page

_log = structlog.get_logger("agi.core.dht.antientropy")

CUT_TOKENS = 1 << 57
"""Ranges are cut at multiples of this, so that none is more than 1/128 of the ring, however few virtual nodes there
are: while a range is built its changes wait."""
BUILD_KEYS = 16_384
"""Keys that are built into trees in one go, unless one range alone has more. Each go looks at all pending keys, and
those of the ranges that it builds wait for its end."""
FOLD_STEP = 256
"""Keys folded between two turns of the event loop (0.4 ms); more if many wait."""
PAGE_KEYS_MAX = 256
PAGE_BYTES = 1 << 20
"""A scan reads so many records at a time, fewer once it has met large ones."""
RECORDS_A_TURN = 256
"""A listing, or a scan, gives the event loop its turn after so many records (1.5 ms)."""
SPAN_RECORDS = 8
"""What another span costs, in records."""
BUSY_S, BREATH_S_MAX = 0.001, 0.02
SPARSE = 4
"""Records are read page by page while one in so many is wanted, else one by one."""
RETRY_S = 1.0
BURST_S = 0.25
"""How far what is held to a rate may run ahead of it."""

_T = TypeVar("_T")
Own: TypeAlias = Callable[[Coroutine[Any, Any, None], str], None]


class Rate:
    """Holds what costs to so much a second."""

    def __init__(self, per_s: float, clock: Clock) -> None:
        self._per_s = per_s
        self._clock = clock
        self._free_at = 0.0

    async def spend(self, amount: int) -> None:
        now = self._clock.monotonic()
        self._free_at = max(now, self._free_at) + amount / self._per_s
        ahead_s = self._free_at - now - BURST_S
        await asyncio.sleep(max(0.0, ahead_s))


class TreeKeeper:
    """
    Args:
        own: runs a coroutine as a task that the node owns.
        keys_per_s: how many keys a scan may read.

    Attributes:
        held: what this node holds, in token order; what it is to hold, too, while a change is under way.
        moved: keys that were read or stored here for the background's sake.
        partners: other node -> positions of the ranges that it holds too and that are not changing hands, in token
            order.
        adopted: raised whenever positions change their meaning.
        built: ranges whose tree was built, or built anew.
    """

    def __init__(self, node_id: str, replica: Replica, clock: Clock, own: Own, keys_per_s: float) -> None:
        self.held: list[Span] = []
        self.moved = 0
        self.partners: dict[str, list[int]] = {}
        self.adopted = 0
        self.built = 0
        self._me = node_id
        self._replica = replica
        self._own = own
        self._clock = clock
        self._scans = Rate(keys_per_s, clock)
        self._trees: HashTrees | None = None
        self._token_of: Callable[[bytes], bytes] = bytes
        self._folding = asyncio.Lock()
        self._background = asyncio.Lock()
        self._before = 0
        self._work = asyncio.Event()
        self._page_keys = PAGE_KEYS_MAX

    def start(self, ring: Ring | JointRing) -> None:
        """The node has its first topology; writes come after this."""
        self._token_of = token_bytes(ring.hash_algorithm)
        self._trees = HashTrees(self._token_of)
        self._trees.wake = self._work.set
        self._replica.on_change = self._trees.changed
        self._replica.token_of = lambda key: int.from_bytes(self._token_of(key), "big")
        self.adopt(ring)
        self._own(self._keep(), "hash trees")

    def adopt(self, ring: Ring | JointRing) -> None:
        """Another ring counts. Ranges that it leaves as they are keep their trees. What is changing hands has none: the
        change itself fills all of its new replicas, and repair would send everything once more."""
        trees, partners = self.trees, dict[str, list[int]]()
        mine = sorted(
            (bounds, part.replicas) for part in ring.partitions() if self._me in part.replicas for bounds in _cut(part)
        )
        self.held = [bounds for bounds, _ in mine]
        settled = [(bounds, replicas) for bounds, replicas in mine if not isinstance(replicas, JointSet)]
        if [(tree.first, tree.last) for tree in trees.trees] != [bounds for bounds, _ in settled]:
            trees.adopt(bounds for bounds, _ in settled)
            self.adopted += 1
            self._work.set()
        for position, (_, replicas) in enumerate(settled):
            for name in replicas:
                if name != self._me:
                    partners.setdefault(name, []).append(position)
        if partners != self.partners:
            self.adopted += 1
            self.partners = dict(sorted(partners.items()))

    @property
    def started(self) -> bool:
        return self._trees is not None

    @property
    def trees(self) -> HashTrees:
        assert self._trees is not None, "the node has not formed"
        return self._trees

    @property
    def pending(self) -> int:
        """Changed keys that are not in the trees yet."""
        return len(self._trees.pending) if self._trees is not None else 0

    @property
    def unknown(self) -> int:
        """Ranges whose trees are not built yet."""
        return self._trees.unknown if self._trees is not None else 0

    def forget(self) -> None:
        """The store was changed behind the node's back: all trees are built anew."""
        self.trees.lose()
        self._work.set()

    def shared(self, name: str, bounds: Span) -> list[int]:
        """Positions of the ranges that this node holds too and that these tokens touch."""
        first, last = bounds
        trees = self.trees.trees
        return [at for at in self.partners.get(name, ()) if trees[at].last >= first and trees[at].first <= last]

    # --- upkeep

    def look(self) -> None:
        """Trees may have to be built."""
        if self.trees.to_build(1):
            self._work.set()

    async def _keep(self) -> None:
        """Builds what is not known, and folds what is much, for ever."""
        while True:
            self._work.clear()
            try:
                await self._build_all()
                if self.pending >= FOLD_AT:
                    await self.fold()
            except (DHTError, TimeoutError) as error:
                _log.warning("hash_tree_not_built", error=str(error) or type(error).__name__)
                await asyncio.sleep(RETRY_S)
            else:
                await self._work.wait()

    async def _build_all(self) -> None:
        trees = self.trees
        if not trees.to_build(1):
            return
        unsettled = list(self._replica.unsettled())
        count = await self._replica.store.count()
        if count.exact and not count.records and trees.unknown == len(trees.trees):
            trees.empty([*unsettled, *self._replica.unsettled()])
            return
        density = max(1, count.records) / max(1, sum(tree.width for tree in trees.trees))
        while positions := trees.to_build(int(BUILD_KEYS / density)):
            await self._build(positions, density)

    async def _build(self, positions: list[int], density: float) -> None:
        trees, adopted = self.trees, self.adopted
        trees.begin(positions, density, self._replica.unsettled())
        spans = [(trees.trees[position].first, trees.trees[position].last) for position in positions]
        since = 0
        try:
            for span in joined(spans):
                page, after = Page([], False), None
                while not page.complete and adopted == self.adopted:
                    if since >= RECORDS_A_TURN:
                        since = 0
                        await self.turn()
                        continue  # it may be another ring's by now
                    page = await self._page(span, after)
                    since += len(page.items) + SPAN_RECORDS
                    if page.items and adopted == self.adopted:
                        trees.page(page.items)
                        after = page.items[-1][0]
                        await self._scans.spend(len(page.items))
        except BaseException:
            if adopted == self.adopted:
                trees.abort(positions)
            raise
        if adopted == self.adopted:
            trees.finish(positions)
            self.built += len(positions)

    async def walk(self, span: Span) -> AsyncIterator[list[tuple[bytes, bytes]]]:
        """The records of a span in token order, a page at a time, no faster than trees are built."""
        page, after = Page([], False), None
        while not page.complete:
            page = await self._page(span, after)
            if page.items:
                after = page.items[-1][0]
                yield page.items
                await self._scans.spend(len(page.items))

    async def _page(self, span: Span, after: bytes | None) -> Page:
        """Records of a span in token order, behind this key."""
        async with asyncio.timeout(STORE_TIMEOUT_S):
            page = await self._replica.store.scan_tokens(*span, self._page_keys, after)
        if page.items:
            size = max(1, sum(len(record) for _, record in page.items) // len(page.items))
            self._page_keys = max(1, min(PAGE_KEYS_MAX, PAGE_BYTES // size))
        return page

    async def fold(self) -> None:
        """Brings every key that is pending now into the trees."""
        async with self._folding:
            trees = self.trees
            keys = list(trees.pending)
            step = FOLD_STEP + len(keys) // 64
            for at in range(0, len(keys), step):
                if at:
                    await asyncio.sleep(0)
                await self._fold_some(keys[at : at + step])
            self.look()

    async def _fold_some(self, keys: list[bytes]) -> None:
        folded: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def held(headers: list[bytes | None], unsettled: Collection[bytes], error: WireError | None) -> None:
            if error is None:
                self.trees.fold(keys, headers, unsettled)
            if not folded.done():
                folded.set_result(None) if error is None else folded.set_exception(from_wire(*error))

        self._replica.held(keys, held)
        async with asyncio.timeout(STORE_TIMEOUT_S):
            await folded

    # --- reading and storing

    async def listing(self, spans: Sequence[Span]) -> tuple[list[Entry], int | None]:
        """What lies in these spans, at most RECORDS_MAX records; and the last token looked at if that is not all."""
        token_of = self._token_of
        found: list[Entry] = []
        since = 0
        for span in joined(spans):
            page, after = Page([], False), None
            while not page.complete:
                if since >= RECORDS_A_TURN:
                    since = 0
                    await self.turn()
                page = await self._page(span, after)
                since += len(page.items) + SPAN_RECORDS
                found += [entry_of(int.from_bytes(token_of(key), "big"), key, record) for key, record in page.items]
                if len(found) >= RECORDS_MAX:
                    return found, found[-1].token
                after = page.items[-1][0] if page.items else None
        return found, None

    async def records_at(self, tokens: Sequence[int]) -> tuple[list[bytes], list[bytes], int]:
        """The keys with these tokens and their records, up to SEND_BYTES of them; and how many of the tokens were
        looked at."""
        found: list[tuple[bytes, bytes]] = []
        size = taken = since = 0
        together = all(map(lt, tokens, tokens[1:]))
        while taken < len(tokens) and size <= SEND_BYTES:
            settled = 0
            if together:
                items, settled, together = await self._side_by_side(tokens[taken:])
            if not settled:
                items, settled = (await self._page((tokens[taken], tokens[taken]), None)).items, 1
            found += items
            size += sum(len(record) for _, record in items)
            taken += settled
            since += settled + SPAN_RECORDS
            if since >= RECORDS_A_TURN:
                since = 0
                await self.turn()
        told: asyncio.Future[list[bytes | None]] = asyncio.get_running_loop().create_future()
        keys = [key for key, _ in found]
        self._replica.tell_scanned(keys, [record for _, record in found], partial(_tell, told), mark=False)
        records = await self._in_time(told)
        return keys, [record for record in records if record is not None], taken

    async def turn(self) -> None:
        """Lets the event loop do what else there is, and leaves it as long again where that was much and requests come:
        they are not to wait for what runs in the background, neither in this process nor, for a processor, in others.
        """
        async with self._background:  # one after the other
            began = self._clock.monotonic()
            await asyncio.sleep(0)
            busy_s = self._clock.monotonic() - began
            before, self._before = self._before, self.requests
            if busy_s > BUSY_S and before != self._before:
                await asyncio.sleep(min(BREATH_S_MAX, busy_s))

    @property
    def requests(self) -> int:
        """Keys that were read or written here by requests."""
        return self._replica.asked - self.moved

    async def _side_by_side(self, tokens: Sequence[int]) -> tuple[list[tuple[bytes, bytes]], int, bool]:
        """One page of the store, from the first of these ascending tokens on: what of it they name, how many of them
        that settles, and whether another page is worth it: a newcomer wants nearly all that lies there."""
        page = await self._page((tokens[0], tokens[-1]), None)
        token_of = self._token_of
        placed = [int.from_bytes(token_of(key), "big") for key, _ in page.items]
        # of the last token of a page there may be more
        settled = len(tokens) if page.complete else bisect_left(tokens, placed[-1])
        wanted = set(tokens[:settled])
        found = [item for token, item in zip(placed, page.items, strict=True) if token in wanted]
        return found, settled, len(found) * SPARSE >= len(placed)

    async def read(self, keys: list[bytes]) -> list[bytes | None]:
        """As coordinators read: what is not synced yet is not told."""
        found: asyncio.Future[list[bytes | None]] = asyncio.get_running_loop().create_future()
        self.moved += len(keys)
        self._replica.read(keys, partial(_tell, found), mark=False)
        return await self._in_time(found)

    async def store(self, keys: list[bytes], records: list[bytes], mode: int = REPAIR) -> None:
        """Merges what a peer had."""
        await self.stored(self.storing(keys, records, mode))

    def storing(self, keys: list[bytes], records: list[bytes], mode: int) -> asyncio.Future[None]:
        """Begins to merge what a peer had; `stored` waits for it."""
        stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def written(superseded: object, live: object, error: WireError | None) -> None:
            if not stored.done():
                stored.set_result(None) if error is None else stored.set_exception(from_wire(*error))

        self.moved += len(keys)
        self._replica.write(mode, keys, records, False, written)
        return stored

    async def stored(self, storing: asyncio.Future[None]) -> None:
        await self._in_time(storing)

    async def _in_time(self, answer: asyncio.Future[_T]) -> _T:
        async with asyncio.timeout(STORE_TIMEOUT_S):
            return await answer


def _tell(waiting: asyncio.Future[_T], value: _T, error: WireError | None) -> None:
    if not waiting.done():
        waiting.set_result(value) if error is None else waiting.set_exception(from_wire(*error))


def _cut(part: Partition) -> Iterator[Span]:
    """An arc as spans that neither wrap nor pass a multiple of CUT_TOKENS."""
    for first, last in part.ranges():
        while first <= last:
            end = min(last, first | CUT_TOKENS - 1)
            yield first, end
            first = end + 1


def joined(spans: Sequence[Span]) -> Iterator[Span]:
    """The same tokens in fewer spans."""
    if not spans:
        return
    start, end = spans[0]
    for (_, before), (first, last) in pairwise(spans):
        if first != before + 1:
            yield start, end
            start = first
        end = last
    yield start, end
