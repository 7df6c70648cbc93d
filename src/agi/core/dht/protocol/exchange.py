"""The dialogue in which two replicas find what differs between them, and settle it.

Afterwards both hold the newer record of every key in which one of them was behind. One side asks (`Exchange`), the
other answers from its trees and records (the functions at the end); each question stands for itself, so that whoever
answers remembers nothing. After Dynamo, section 4.7; that a range of any size is compared by one number, and that a
fault costs only what differs, is the Merkle tree's (protocol/merkle.py).

    asks                                     answers
    TreeRoot     root of all shared ranges   equal: nothing, and that was all. Else one sum for each range
    TreeNodes    what is under these nodes?  the sums of their children, down to the leaves
    TreeRecords  a digest of each record     which of them it does not hold; token and HLC of what it holds besides
                 in the leaves that differ
    ReplicaWrite the records that are newer here
    TreeFetch    what is newer there         the records

So of a key that both hold only the newer record travels. Records that were written a moment ago are no difference:
they may be under way (`young`). Every question is bounded, and so is every answer: who holds more in a leaf than fits
says how far it came. What is found is settled before more is looked for, so that memory does not grow with it.

A leaf that differs although none of its records does was overtaken by a write; or its tree is wrong. A range in which
that happens STRIKES_MAX times in a row is built anew.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, TypeAlias

from agi.core.dht.errors import InvalidRequest, ProtocolMismatch, StaleEpoch
from agi.core.dht.protocol.merkle import HashTrees, contribution
from agi.core.dht.protocol.messages import (
    Message,
    TreeFetch,
    TreeFetchReply,
    TreeNodes,
    TreeNodesReply,
    TreeRecords,
    TreeRecordsReply,
    TreeRoot,
    TreeRootReply,
)
from agi.core.dht.protocol.record import HEADER, REGISTERED, height_of, hlc_of

NODES_MAX = 4096
"""Sums in one answer (16 KiB)."""
FANOUT_BITS = 8
"""A node is cut into at most 2^8 at a time: one difference among 10^8 keys costs a few KiB."""
LEAVES_MAX = 1024
"""Leaves of one TreeRecords."""
RECORDS_MAX = 2048
"""Records that one side compares at a time: about 1 ms."""
SEND_BYTES = 256 * 1024
"""Records of one message, and those of one page of the store beyond."""
SEND_KEYS_MAX = 1000
STRIKES_MAX = 3

Node: TypeAlias = tuple[int, int, int]
"""(position among the shared ranges, shift, index)"""
Span: TypeAlias = tuple[int, int]


class Entry(NamedTuple):
    """A record as the listing of a leaf met it, without its value."""

    token: int
    key: bytes
    header: bytes
    size: int


def entry_of(token: int, key: bytes, record: bytes) -> Entry:
    return Entry(token, key, record[:HEADER], len(key) + len(record))


# --- effects


@dataclass(frozen=True, slots=True)
class Ask:
    """Send this to the peer; then `replied`."""

    message: Message


@dataclass(frozen=True, slots=True)
class List:
    """Read the records with tokens in these spans, in order, at most RECORDS_MAX; then `listed`."""

    spans: list[Span]


@dataclass(frozen=True, slots=True)
class Send:
    """Write this node's records of these keys to the peer; then `settled`."""

    keys: list[bytes]


@dataclass(frozen=True, slots=True)
class Store:
    """Merge these records into this node's replica; then `settled`."""

    keys: list[bytes]
    records: list[bytes]


@dataclass(frozen=True, slots=True)
class Done:
    """Everything was compared and settled."""


Effect: TypeAlias = Ask | List | Send | Store | Done


@dataclass(slots=True)
class Report:
    """What an exchange came to.

    Attributes:
        ranges: compared; `unknown` others were not, because one side's trees are not built yet.
        differing: of these ranges.
        leaves: whose records were compared.
        differences: keys of which one side was behind.
        behind: keys of which this side was in what it had to be level up to.
        young: keys that differ, but were written a moment ago.
        sent, received: records.
    """

    ranges: int = 0
    unknown: int = 0
    differing: int = 0
    leaves: int = 0
    differences: int = 0
    behind: int = 0
    young: int = 0
    sent: int = 0
    received: int = 0


class Exchange:
    """The asking side. `begin`, then perform each effect and report its end, until `Done`.

    Args:
        positions: of the ranges in `trees` that both sides hold and that `bounds` touches, in token order.
        bounds: first and last token that are asked about.
        trace: the correlation id of its messages.
        salt: odd, random; a new one for each exchange.
        completed: whether the last exchange with this peer came to its end.
        young: whether a record of this HLC may still be under way.
        late: whether a record at this token and of this HLC, of which this node holds nothing, was reclaimed here: a
            peer that was not told to reclaim keeps it until the next round, and it is no difference until then.
        level: up to this version `Report.behind` counts.
    """

    def __init__(
        self,
        trees: HashTrees,
        positions: Sequence[int],
        bounds: Span,
        *,
        epoch: int,
        trace: str,
        salt: int,
        completed: bool,
        young: Callable[[int], bool],
        late: Callable[[int, int], bool],
        level: int = REGISTERED - 1,
    ) -> None:
        self.report = Report()
        self._completed = completed
        self._trees = trees
        self._positions = positions
        self._bounds = bounds
        self._epoch = epoch
        self.trace = trace
        self._salt = salt
        self._young = young
        self._late = late
        self._level = level
        self._expand: list[Node] = []
        self._asked: list[tuple[Node, int]] = []
        self._leaves: deque[Node] = deque()
        self._rests: list[tuple[Node, int]] = []  # leaves that were listed in part, and the token to go on at
        self._listing: list[Node] = []
        self._entries: list[Entry] = []
        self._spans: list[Span] = []
        self._send: deque[tuple[bytes, int]] = deque()
        self._fetch: deque[int] = deque()
        self._seen: dict[int, bool] = {}  # range -> whether a record of it differed, or may have

    # --- events

    def begin(self) -> Effect:
        trees = self._trees
        known = [position for position in self._positions if trees.trees[position].known]
        root, records = trees.total(known)
        return Ask(
            TreeRoot(
                0, self._epoch, self.trace, *self._bounds, len(self._positions), root, records,
                _unknown(trees, self._positions),
                self._completed,
            )
        )  # fmt: skip

    def replied(self, reply: Message) -> Effect:
        """The peer has answered. Raises ProtocolMismatch where that is no answer."""
        try:
            if isinstance(reply, TreeRootReply):
                return self._on_root(reply)
            if isinstance(reply, TreeNodesReply):
                return self._on_nodes(reply)
            if isinstance(reply, TreeRecordsReply):
                return self._on_records(reply)
            if isinstance(reply, TreeFetchReply):
                return self._on_fetched(reply)
        except (struct.error, IndexError, ValueError) as error:
            raise ProtocolMismatch(f"a {type(reply).__name__} of the wrong shape: {error}") from None
        raise ProtocolMismatch(f"a {type(reply).__name__} was not asked for")

    def listed(self, entries: list[Entry], up_to: int | None) -> Effect:
        """The records asked for; `up_to`: the last token that was looked at, None if all were."""
        nodes, spans = self._listing, self._spans
        if up_to is not None:
            at = _containing(spans, up_to)
            self._leaves.extendleft(reversed(nodes[at + 1 :]))
            del nodes[at + 1 :], spans[at + 1 :]
            spans[at] = (spans[at][0], up_to)
        self._entries = entries
        salt = self._salt
        digests = [contribution(entry.key, entry.header) * salt >> 32 & 0xFFFFFFFF for entry in entries]
        return Ask(
            TreeRecords(
                0, self._epoch, self.trace, *self._bounds, salt,
                [node[0] for node in nodes], [node[1] for node in nodes], [node[2] for node in nodes],
                _counts(spans, entries), struct.pack(f"<{len(digests)}I", *digests), spans[0][0], spans[-1][1],
            )
        )  # fmt: skip

    def settled(self) -> Effect:
        """What was to be sent or stored is."""
        return self._next()

    # --- from the root down

    def _on_root(self, reply: TreeRootReply) -> Effect:
        trees, positions, report = self._trees.trees, self._positions, self.report
        theirs = _bits(reply.unknown, len(positions))
        both = [i for i, position in enumerate(positions) if trees[position].known and not theirs[i]]
        report.ranges, report.unknown = len(both), len(positions) - len(both)
        differing: list[int] = []
        if reply.totals:
            totals = struct.unpack(f"<{len(positions)}Q", reply.totals)
            differing = [i for i in both if trees[positions[i]].sums.total != totals[i]]
        report.differing = len(differing)
        for i in set(both).difference(differing):
            trees[positions[i]].strikes = 0
        self._expand = [(i, trees[positions[i]].bits, 0) for i in reversed(differing)]
        return self._next()

    def _ask_nodes(self) -> Effect | None:
        """Asks for children, of as many nodes as fit an answer; None where all of them are leaves here."""
        asked = self._asked = []
        room = NODES_MAX
        while self._expand and room > 0:
            node = i, shift, _ = self._expand.pop()
            tree = self._trees.trees[self._positions[i]]
            below = max(tree.sums.shift, shift - FANOUT_BITS)
            if below >= shift:
                self._leaves.append(node)
            else:
                room -= 1 << shift - below
                asked.append((node, below))
        if not asked:
            return None
        nodes = [node for node, _ in asked]
        return Ask(
            TreeNodes(
                0, self._epoch, self.trace, *self._bounds, self._salt,
                [node[0] for node in nodes], [node[1] for node in nodes], [node[2] for node in nodes],
                [below for _, below in asked],
            )
        )  # fmt: skip

    def _on_nodes(self, reply: TreeNodesReply) -> Effect:
        asked, salt = self._asked, self._salt
        sums = memoryview(reply.sums)
        at = 0
        for (node, below), used in zip(asked, reply.shifts, strict=True):
            i, shift, index = node
            tree = self._trees.trees[self._positions[i]]
            if used >= shift:
                self._leaves.append(node)
                continue
            if used < below:
                raise ValueError(f"nodes of shift {used} were sent, {below} asked for")
            if not tree.known:
                continue  # it was given up meanwhile: the next exchange will see
            first, ours = tree.children(shift, index, used)
            count = min((index + 1) << shift - used, tree.width_in_nodes(used)) - (index << shift - used)
            theirs = struct.unpack_from(f"<{count}I", sums, at)
            at += 4 * count
            if tree.sums.shift > used:
                self._expand.append(node)  # built anew meanwhile, with larger leaves
                continue
            leaf = used == tree.sums.shift or used > below
            found = self._leaves if leaf else self._expand
            for child, (mine, other) in enumerate(zip(ours, theirs, strict=True), first):
                if mine * salt >> 32 & 0xFFFFFFFF != other:
                    found.append((i, used, child))
        return self._next()

    def _next(self) -> Effect:
        """Settles what was found, then lists what differs, then looks for more."""
        effect = self._settle()
        while effect is None:
            if self._rests or (self._leaves and (not self._expand or len(self._leaves) >= LEAVES_MAX)):
                effect = self._list()
            elif self._expand:
                effect = self._ask_nodes()
            else:
                self._judge()
                effect = Done()
        return effect

    # --- records

    def _list(self) -> Effect:
        if self._rests:
            node, start = self._rests.pop()
            self._listing, self._spans = [node], [(start, self._span(node)[1])]
        else:
            nodes = [self._leaves.popleft() for _ in range(min(LEAVES_MAX, len(self._leaves)))]
            self._listing = sorted(nodes, key=self._span)
            self._spans = [self._span(node) for node in self._listing]
        return List(list(self._spans))

    def _span(self, node: Node) -> Span:
        i, shift, index = node
        return self._trees.trees[self._positions[i]].span(shift, index)

    def _on_records(self, reply: TreeRecordsReply) -> Effect:
        nodes, spans, young, report = self._listing, self._spans, self._young, self.report
        if not 1 <= reply.nodes <= len(nodes):
            raise ValueError(f"{reply.nodes} of {len(nodes)} nodes were compared")
        last = nodes[reply.nodes - 1]
        up_to = min(reply.up_to, spans[reply.nodes - 1][1])
        self._leaves.extendleft(reversed(nodes[reply.nodes :]))
        if up_to < self._span(last)[1]:
            self._rests.append((last, up_to + 1))
        report.leaves += reply.nodes
        for node in nodes[: reply.nodes]:
            self._seen.setdefault(node[0], False)
        extra: dict[int, int] = dict(struct.iter_unpack("<QQ", reply.extra))
        for token in extra:
            self._saw(token)
        for position in reply.missing:
            entry = self._entries[position]
            if entry.token > up_to:
                continue  # it is listed again
            self._saw(entry.token)
            ours, theirs = hlc_of(entry.header), extra.pop(entry.token, 0)
            if young(max(ours, theirs)):
                report.young += 1
                continue
            if ours < REGISTERED <= theirs and self._late(entry.token, theirs):
                continue  # it was taken away here before ours came, and will be there
            report.differences += 1
            if ours >= theirs:
                self._send.append((entry.key, entry.size))
            if theirs >= ours:
                report.behind += height_of(theirs) <= self._level
                self._fetch.append(entry.token)
        for token, hlc in extra.items():
            if young(hlc):
                report.young += 1
            elif not self._late(token, hlc):
                report.differences += 1
                report.behind += height_of(hlc) <= self._level
                self._fetch.append(token)
        for entry in self._entries:  # what was written meanwhile explains why the sums differed
            if young(hlc_of(entry.header)):
                self._saw(entry.token)
        return self._next()

    def _saw(self, token: int) -> None:
        """There is, or may be, a difference at this token."""
        self._seen[self._listing[_containing(self._spans, token)][0]] = True

    def _settle(self) -> Effect | None:
        if self._send:
            keys: list[bytes] = []
            size = 0
            while self._send and len(keys) < SEND_KEYS_MAX and (not keys or size + self._send[0][1] <= SEND_BYTES):
                key, cost = self._send.popleft()
                keys.append(key)
                size += cost
            self.report.sent += len(keys)
            return Send(keys)
        if self._fetch:
            tokens = list(islice(self._fetch, SEND_KEYS_MAX))
            return Ask(TreeFetch(0, self._epoch, self.trace, struct.pack(f"<{len(tokens)}Q", *tokens)))
        return None

    def _on_fetched(self, reply: TreeFetchReply) -> Effect:
        if not 1 <= reply.taken <= len(self._fetch) or len(reply.keys) != len(reply.records):
            raise ValueError(f"{reply.taken} of {len(self._fetch)} tokens were looked at")
        for _ in range(reply.taken):
            self._fetch.popleft()
        self.report.received += len(reply.keys)
        return Store(reply.keys, reply.records) if reply.keys else self._next()

    def _judge(self) -> None:
        """Trees that differ for no reason are not to be trusted."""
        for i, differed in self._seen.items():
            tree = self._trees.trees[self._positions[i]]
            tree.strikes = 0 if differed else tree.strikes + 1
            if tree.strikes >= STRIKES_MAX:
                self._trees.forget(self._positions[i])


# --- the answering side


def answer_root(trees: HashTrees, positions: Sequence[int], request: TreeRoot) -> TreeRootReply:
    """Raises StaleEpoch where the two do not mean the same ranges."""
    if request.ranges != len(positions):
        raise StaleEpoch(f"{len(positions)} ranges are shared, not {request.ranges}")
    theirs = _bits(request.unknown, len(positions))
    theirs_known = [position for i, position in enumerate(positions) if not theirs[i]]
    mine = _unknown(trees, positions)
    if all(trees.trees[position].known for position in theirs_known) and trees.total(theirs_known) == (
        request.root,
        request.records,
    ):
        return TreeRootReply(request.id, b"", mine)
    totals = [trees.trees[position].sums.total for position in positions]
    return TreeRootReply(request.id, struct.pack(f"<{len(totals)}Q", *totals), mine)


def answer_nodes(trees: HashTrees, positions: Sequence[int], request: TreeNodes) -> TreeNodesReply:
    """Raises InvalidRequest."""
    shifts: list[int] = []
    sums: list[int] = []
    if len(request.below) != len(request.ranges):
        raise InvalidRequest("each node has the shift of its children")
    for node, below in zip(_nodes(trees, positions, request), request.below, strict=True):
        i, shift, index = node
        tree = trees.trees[positions[i]]
        used = max(below, tree.sums.shift)
        shifts.append(used)
        sums += tree.children(shift, index, used)[1]
        if len(sums) > 2 * NODES_MAX:
            raise InvalidRequest(f"more than {NODES_MAX} sums were asked for")
    salt = request.salt
    packed = struct.pack(f"<{len(sums)}I", *[each * salt >> 32 & 0xFFFFFFFF for each in sums])
    return TreeNodesReply(request.id, shifts, packed)


def spans_of(trees: HashTrees, positions: Sequence[int], request: TreeRecords) -> list[Span]:
    """What to list for an answer: records with tokens in these spans, at most RECORDS_MAX. Raises InvalidRequest."""
    nodes = list(_nodes(trees, positions, request))
    if not nodes or len(nodes) != len(request.counts) or 4 * sum(request.counts) != len(request.digests):
        raise InvalidRequest("as many digests as the counts say belong to at least one node")
    spans = [trees.trees[positions[i]].span(shift, index) for i, shift, index in nodes]
    spans[0] = (max(spans[0][0], request.start), spans[0][1])
    spans[-1] = (spans[-1][0], min(spans[-1][1], request.end))
    if any(first > last for first, last in spans):
        raise InvalidRequest("start and end lie in the first and the last node")
    return spans


def answer_records(
    spans: list[Span], entries: list[Entry], up_to: int | None, request: TreeRecords
) -> TreeRecordsReply:
    """The answer, of what was listed; `up_to` as in `Exchange.listed`."""
    nodes = len(spans)
    if up_to is None:
        up_to = spans[-1][1]
    else:
        nodes = _containing(spans, up_to) + 1
    salt = request.salt
    digests = struct.unpack(f"<{len(request.digests) // 4}I", request.digests)
    missing: list[int] = []
    extra: list[int] = []
    at = place = 0
    for (_, last), count in zip(spans[:nodes], request.counts, strict=False):
        theirs = {digests[position]: position for position in range(at, at + count)}
        while place < len(entries) and entries[place].token <= last:
            entry = entries[place]
            place += 1
            if theirs.pop(contribution(entry.key, entry.header) * salt >> 32 & 0xFFFFFFFF, None) is None:
                extra += (entry.token, hlc_of(entry.header))
        missing += theirs.values()
        at += count
    return TreeRecordsReply(request.id, missing, struct.pack(f"<{len(extra)}Q", *extra), nodes, up_to)


def tokens_of(request: TreeFetch) -> list[int]:
    """Raises InvalidRequest."""
    if len(request.tokens) % 8 or not 1 <= len(request.tokens) // 8 <= SEND_KEYS_MAX:
        raise InvalidRequest(f"1 to {SEND_KEYS_MAX} tokens are fetched at a time")
    return [token for (token,) in struct.iter_unpack("<Q", request.tokens)]


# --- shared


def _nodes(trees: HashTrees, positions: Sequence[int], request: TreeNodes | TreeRecords) -> Iterator[Node]:
    if not len(request.ranges) == len(request.shifts) == len(request.indexes) <= max(NODES_MAX, LEAVES_MAX):
        raise InvalidRequest("nodes have a range, a shift and an index each")
    for i, shift, index in zip(request.ranges, request.shifts, request.indexes, strict=True):
        if not 0 <= i < len(positions) or not 0 <= shift <= 64 or index < 0:
            raise InvalidRequest(f"there is no node {(i, shift, index)}")
        if index >= trees.trees[positions[i]].width_in_nodes(shift):
            raise InvalidRequest(f"there is no node {(i, shift, index)}")
        yield i, shift, index


def _unknown(trees: HashTrees, positions: Sequence[int]) -> bytes:
    """A bitmap; empty if all are known."""
    bits = 0
    for i, position in enumerate(positions):
        if not trees.trees[position].known:
            bits |= 1 << i
    return bits.to_bytes(-(-len(positions) // 8), "little") if bits else b""


def _bits(packed: bytes, count: int) -> list[bool]:
    bits = int.from_bytes(packed, "little")
    return [bool(bits >> i & 1) for i in range(count)] if bits else [False] * count


def _containing(spans: Sequence[Span], token: int) -> int:
    """The position of the span that holds the token. Raises ValueError."""
    at = bisect_left(spans, token, key=lambda span: span[1])
    if at == len(spans) or spans[at][0] > token:
        raise ValueError(f"token {token} was not asked about")
    return at


def _counts(spans: Sequence[Span], entries: Sequence[Entry]) -> list[int]:
    counts = []
    place = 0
    for _, last in spans:
        before = place
        while place < len(entries) and entries[place].token <= last:
            place += 1
        counts.append(place - before)
    return counts
