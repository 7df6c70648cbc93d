"""Two replicas without a network: whatever they hold, afterwards both hold the newer of each, and what that costs."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from agi.core.dht.errors import InvalidRequest, ProtocolMismatch, StaleEpoch
from agi.core.dht.protocol import exchange as exchanges
from agi.core.dht.protocol.exchange import (
    Ask,
    Done,
    Entry,
    Exchange,
    List,
    Report,
    Send,
    Span,
    answer_nodes,
    answer_records,
    answer_root,
    entry_of,
    spans_of,
    tokens_of,
)
from agi.core.dht.protocol.merkle import HashTrees
from agi.core.dht.protocol.messages import (
    REPAIR,
    Message,
    ReplicaWrite,
    ReplicaWriteReply,
    TreeFetch,
    TreeFetchReply,
    TreeNodes,
    TreeNodesReply,
    TreeRecords,
    TreeRecordsReply,
    TreeRoot,
    TreeRootReply,
)
from agi.core.dht.protocol.record import REGISTERED, TOMBSTONE, hlc_of, pack, shrink
from agi.core.dht.transport.codec import encode

TOKENS = 1 << 64
WHOLE: Span = (0, TOKENS - 1)
RANGES = [(n * (TOKENS // 16), (n + 1) * (TOKENS // 16) - 1) for n in range(16)]


def token(key: bytes) -> int:
    return int(xxhash.xxh3_64_intdigest(key))


def record(key: bytes, hlc: int, value: bytes = b"v" * 100, **more: int) -> bytes:
    return pack(key, value, hlc << 16, 7, 5, **more)


class Replica:
    """Records, and trees that are up to date but for what `stale` names."""

    def __init__(self, records: dict[bytes, bytes], ranges: list[Span] = RANGES) -> None:
        self.records = dict(records)
        self.trees = HashTrees(xxhash.xxh3_64_digest)
        self.trees.adopt(ranges)
        self.lists = 0
        self.build()

    def build(self) -> None:
        everything = range(len(self.trees.trees))
        self.trees.begin(everything, len(self.records) / TOKENS, ())
        self.trees.page(self.records.items())
        self.trees.finish(everything)

    @property
    def positions(self) -> list[int]:
        return list(range(len(self.trees.trees)))

    def list(self, spans: list[Span]) -> tuple[list[Entry], int | None]:
        self.lists += 1
        held = sorted((token(key), key) for key in self.records)
        found: list[Entry] = []
        for first, last in spans:
            for place, key in held:
                if first <= place <= last:
                    found.append(entry_of(place, key, self.records[key]))
                    if len(found) >= exchanges.RECORDS_MAX:
                        return found, place
        return found, None

    def merge(self, keys: list[bytes], records: list[bytes]) -> None:
        for key, each in zip(keys, records, strict=True):
            held = self.records.get(key)
            self.trees.changed([key], [held], [] if held else [key])
            if held is None or each > held:
                self.records[key] = each
        pending = list(self.trees.pending)
        self.trees.fold(pending, [self.records.get(key) for key in pending], ())


@dataclass
class Link:
    """Answers for one replica, and counts what passes."""

    other: Replica
    messages: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    largest: int = 0
    spoil: Callable[[Any], Any] = lambda reply: reply

    def ask(self, message: Message) -> Message:
        other = self.other
        reply: Message
        if isinstance(message, TreeRoot):
            reply = answer_root(other.trees, other.positions, message)
        elif isinstance(message, TreeNodes):
            reply = answer_nodes(other.trees, other.positions, message)
        elif isinstance(message, TreeRecords):
            spans = spans_of(other.trees, other.positions, message)
            reply = answer_records(spans, *other.list(spans), message)
        elif isinstance(message, TreeFetch):
            tokens = tokens_of(message)[:100]  # a peer may answer for a part
            keys = [key for key in other.records if token(key) in set(tokens)]
            reply = TreeFetchReply(0, keys, [other.records[key] for key in keys], len(tokens))
        else:
            assert isinstance(message, ReplicaWrite) and message.mode == REPAIR
            other.merge(message.keys, message.records)
            reply = ReplicaWriteReply(0)
        for each in (message, reply):
            size = len(encode(each))
            self.messages[type(each).__name__] += 1
            self.bytes += size
            self.largest = max(self.largest, size)
        return self.spoil(reply)  # type: ignore[no-any-return]


def converse(
    mine: Replica,
    link: Link,
    *,
    bounds: Span = WHOLE,
    salt: int = 12345,
    young: Callable[[int], bool] | None = None,
    late: Callable[[int, int], bool] | None = None,
    level: int = REGISTERED - 1,
) -> Report:
    core = Exchange(
        mine.trees,
        mine.positions,
        bounds,
        epoch=1,
        trace="t",
        salt=salt,
        completed=False,
        young=young or (lambda hlc: False),
        late=late or (lambda token, hlc: False),
        level=level,
    )
    effect = core.begin()
    while not isinstance(effect, Done):
        if isinstance(effect, Ask):
            effect = core.replied(link.ask(effect.message))
        elif isinstance(effect, List):
            effect = core.listed(*mine.list(effect.spans))
        elif isinstance(effect, Send):
            link.ask(ReplicaWrite(0, 1, "t", REPAIR, effect.keys, [mine.records[key] for key in effect.keys]))
            effect = core.settled()
        else:
            mine.merge(effect.keys, effect.records)
            effect = core.settled()
    return core.report


def merged(one: dict[bytes, bytes], two: dict[bytes, bytes]) -> dict[bytes, bytes]:
    return {key: max(each for each in (one.get(key), two.get(key)) if each) for key in one.keys() | two.keys()}


def weight(one: dict[bytes, bytes], two: dict[bytes, bytes]) -> int:
    """Bytes of the records that one side has to get: the difference."""
    both = merged(one, two)
    return sum(len(key) + len(both[key]) for key in both if one.get(key) != two.get(key))


CONTENT = st.dictionaries(
    st.integers(0, 60).map(lambda n: b"k%d" % n), st.tuples(st.integers(1, 5), st.sampled_from((0, 1, 2))), max_size=60
)


def content(drawn: dict[bytes, tuple[int, int]]) -> dict[bytes, bytes]:
    made = {}
    for key, (hlc, kind) in drawn.items():
        if kind == 1:
            made[key] = record(key, hlc, b"", flags=TOMBSTONE)
        else:
            made[key] = record(key, hlc, expires_ms=1000 * hlc if kind == 2 else 0)
    return made


@settings(max_examples=200, deadline=None)
@given(one=CONTENT, two=CONTENT, records_max=st.integers(1, 8), leaves_max=st.integers(1, 5), salt=st.integers(0))
def test_both_end_with_the_newer_of_each(
    one: dict[bytes, tuple[int, int]], two: dict[bytes, tuple[int, int]], records_max: int, leaves_max: int, salt: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchanges, "RECORDS_MAX", records_max)
        patch.setattr(exchanges, "LEAVES_MAX", leaves_max)
        patch.setattr(exchanges, "NODES_MAX", 20)
        patch.setattr(exchanges, "SEND_KEYS_MAX", 3)
        patch.setattr(exchanges, "SEND_BYTES", 300)
        mine, other = Replica(content(one)), Replica(content(two))
        wanted = merged(mine.records, other.records)
        link = Link(other)
        report = converse(mine, link, salt=salt % TOKENS | 1)
        assert mine.records == other.records == wanted
        assert report.differences == sum(content(one).get(key) != content(two).get(key) for key in wanted)
        assert report.differences <= report.sent + report.received <= 2 * report.differences
        again = converse(mine, Link(other))
        assert again.differing == again.differences == 0


def test_equal_replicas_cost_two_small_messages_and_no_look_at_the_records() -> None:
    records = {key: record(key, 1) for key in (b"key:%d" % n for n in range(20_000))}
    mine, other = Replica(records), Replica(records)
    link = Link(other)
    report = converse(mine, link)
    assert report == Report(ranges=16)
    assert link.messages == {"TreeRoot": 1, "TreeRootReply": 1}
    assert link.bytes < 200
    assert mine.lists == other.lists == 0


@pytest.mark.parametrize("kind", ["stale here", "stale there", "stale anywhere", "missing"])
def test_one_percent_at_random_costs_at_most_twice_the_difference(kind: str) -> None:
    rng = random.Random(1)
    keys = [b"bench:%08d" % n for n in range(20_000)]
    records = {key: record(key, 1) for key in keys}
    one, two = dict(records), dict(records)
    for key in rng.sample(keys, 200):
        behind = {"stale here": one, "stale there": two}.get(kind) or rng.choice((one, two))
        ahead = two if behind is one else one
        if kind == "missing":
            del behind[key]
        else:
            ahead[key] = record(key, 2)
    difference = weight(one, two)
    mine, other = Replica(one), Replica(two)
    link = Link(other)
    report = converse(mine, link)
    assert mine.records == other.records and report.differences == 200
    assert report.sent + report.received == 200  # of a key that both have only the newer travels
    assert link.bytes <= 2 * difference
    assert link.largest < 300_000


def test_one_difference_among_many_keys_is_found_for_a_few_hundred_bytes() -> None:
    records = {key: record(key, 1) for key in (b"key:%d" % n for n in range(50_000))}
    stale = {**records, b"key:7": record(b"key:7", 0)}
    link = Link(Replica(stale))
    report = converse(Replica(records), link)
    assert report.differences == report.sent == report.leaves == 1 and report.differing == 1
    assert link.bytes < 3000


def test_a_large_tree_is_descended_level_by_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchanges, "FANOUT_BITS", 2)
    records = {key: record(key, 1) for key in (b"key:%d" % n for n in range(20_000))}
    link = Link(Replica({**records, b"key:7": record(b"key:7", 2)}, [WHOLE]))
    mine = Replica(records, [WHOLE])
    report = converse(mine, link)
    assert report.differences == report.received == 1
    leaves = len(mine.trees.trees[0].sums.leaves)
    assert link.messages["TreeNodes"] == -(-(leaves.bit_length() - 1) // 2)
    assert link.bytes < 1500


def test_replicas_with_leaves_of_different_sizes_understand_each_other() -> None:
    many = {key: record(key, 1) for key in (b"key:%d" % n for n in range(5000))}
    few = {key: many[key] for key in list(many)[:50]}
    for one, two in ((many, few), (few, many)):
        mine, other = Replica(one), Replica(two)
        assert mine.trees.trees[0].sums.shift != other.trees.trees[0].sums.shift
        link = Link(other)
        report = converse(mine, link)
        assert mine.records == other.records == many
        assert report.sent + report.received == 4950
        assert link.bytes < 1.6 * weight(one, two)  # of which the fetches repeat what was not answered


def test_what_was_written_a_moment_ago_is_left_alone() -> None:
    keys = [b"k%d" % n for n in range(30)]
    base = {key: record(key, 10) for key in keys}
    one = {**base, keys[0]: record(keys[0], 100), b"new": record(b"new", 101)}
    two = {**base, keys[1]: record(keys[1], 102), b"other": record(b"other", 103), keys[2]: record(keys[2], 11)}
    mine, other = Replica(one), Replica(two)
    report = converse(mine, Link(other), young=lambda hlc: hlc >= 100 << 16)
    assert (report.young, report.differences) == (4, 1)
    assert mine.records == {**one, keys[2]: two[keys[2]]} and other.records == two
    report = converse(mine, Link(other))
    assert report.differences == 4 and mine.records == other.records == merged(one, two)


def test_what_was_reclaimed_here_is_not_fetched_from_who_keeps_it() -> None:
    base = {key: record(key, 50) for key in (b"k%d" % n for n in range(30))}
    two = {**base, b"kept": record(b"kept", 10), b"new": record(b"new", 60)}
    mine, other = Replica(base), Replica(two)
    report = converse(mine, Link(other), late=lambda at, hlc: hlc <= 20 << 16)
    assert (report.differences, report.behind, report.received) == (1, 1, 1)
    assert mine.records == {**base, b"new": two[b"new"]} and mine.trees.unknown == 0
    report = converse(other, Link(mine), late=lambda at, hlc: False)  # which cannot know
    assert (report.differences, report.behind, report.sent) == (1, 0, 1)


def test_a_key_under_consensus_is_settled_and_stands_where_the_time_of_its_ballot_does() -> None:
    register = REGISTERED >> 16
    one = {b"a": record(b"a", 5), b"b": record(b"b", register + 1), b"c": record(b"c", 7)}
    two = {b"a": record(b"a", register + 9), b"b": record(b"b", register + 2), b"d": record(b"d", register + 3)}
    mine, other = Replica(one), Replica(two)
    report = converse(mine, Link(other))
    assert (report.differences, report.behind, report.received, report.sent) == (4, 3, 3, 1)
    assert mine.records == other.records == merged(one, two)
    assert converse(Replica(one), Link(Replica(two)), level=2 << 16).behind == 1


def test_a_record_that_one_side_has_shrunk_is_no_difference() -> None:
    expired = {key: record(key, 1, expires_ms=9) for key in (b"k%d" % n for n in range(100))}
    one, two = dict(expired), {key: shrink(key, each) for key, each in expired.items()}
    link = Link(Replica(two))
    assert converse(Replica(one), link) == Report(ranges=16) and link.messages["TreeRoot"] == 1
    one[b"k5"] = record(b"k5", 2)  # in a leaf that differs, they do not count either
    report = converse(Replica(one), Link(Replica(two)))
    assert report.differences == 1 and report.sent == 1 and report.received == 0


def test_ranges_that_are_not_known_yet_are_left_out() -> None:
    keys = [b"k%d" % n for n in range(400)]
    one = {key: record(key, 1) for key in keys}
    for who in range(2):
        mine, other = Replica(one), Replica({})
        unknown = (mine, other)[who]
        for position in range(8):
            unknown.trees.forget(position)
        report = converse(mine, Link(other))
        assert (report.ranges, report.unknown) == (8, 8)
        assert other.records == {key: each for key, each in one.items() if token(key) >= TOKENS // 2}
    mine, other = Replica(one), Replica(one)
    mine.trees.forget(3)
    link = Link(other)
    assert converse(mine, link).unknown == 1 and link.messages == {"TreeRoot": 1, "TreeRootReply": 1}


def test_only_the_ranges_asked_about_are_compared() -> None:
    keys = [b"k%d" % n for n in range(400)]
    one = {key: record(key, 1) for key in keys}
    mine, other = Replica(one), Replica({})
    mine_positions, other_positions = mine.positions[4:6], other.positions[4:6]
    core = Exchange(
        mine.trees,
        mine_positions,
        (RANGES[4][0], RANGES[5][1]),
        epoch=1,
        trace="",
        salt=1,
        completed=False,
        young=lambda hlc: False,
        late=lambda token, hlc: False,
    )
    effect = core.begin()
    assert isinstance(effect, Ask) and isinstance(effect.message, TreeRoot)
    assert (effect.message.first, effect.message.last, effect.message.ranges) == (RANGES[4][0], RANGES[5][1], 2)
    reply = answer_root(other.trees, other_positions, effect.message)
    assert len(reply.totals) == 16
    with pytest.raises(StaleEpoch, match="16 ranges are shared, not 2"):
        answer_root(other.trees, other.positions, effect.message)


def test_a_tree_that_differs_for_no_reason_again_and_again_is_built_anew() -> None:
    records = {key: record(key, 1) for key in (b"k%d" % n for n in range(500))}
    mine, other = Replica(records), Replica(records)
    wrong = mine.trees.trees[mine.trees.at(token(b"k1"))]
    for trees in (mine.trees,):
        trees.changed([b"k1"], [record(b"k1", 0)], [])  # never was
        trees.fold([b"k1"], [records[b"k1"]], ())
    for strike in range(1, exchanges.STRIKES_MAX + 1):
        report = converse(mine, Link(other))
        assert (report.differing, report.differences) == (1, 0)
        assert wrong.known == (strike < exchanges.STRIKES_MAX)
    mine.build()
    assert converse(mine, Link(other)) == Report(ranges=16) and wrong.strikes == 0


def test_what_was_written_meanwhile_is_no_sign_of_a_wrong_tree() -> None:
    records = {key: record(key, 1) for key in (b"k%d" % n for n in range(50))}
    mine, other = Replica(records), Replica(records)
    for replica in (mine, other):
        replica.trees.changed([b"k1"], [records[b"k1"]], [])
        replica.records[b"k1"] = record(b"k1", 99)
    other.trees.fold([b"k1"], [other.records[b"k1"]], ())  # mine comes later
    for _ in range(5):
        report = converse(mine, Link(other), young=lambda hlc: hlc == 99 << 16)
        assert report.differing == 1 and report.differences == report.young == 0
    assert mine.trees.unknown == 0


def test_two_records_of_one_version_are_settled_by_their_bytes() -> None:
    one, two = {b"k": record(b"k", 1, b"a")}, {b"k": record(b"k", 1, b"b")}
    mine, other = Replica(one), Replica(two)
    report = converse(mine, Link(other))
    assert mine.records == other.records == merged(one, two)
    assert (report.sent, report.received) == (1, 1)


# --- what a peer may get wrong


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        (TreeRootReply, lambda r: TreeRootReply(0, r.totals[:-1])),
        (TreeRootReply, lambda r: TreeFetchReply(0, [], [], 1)),
        (TreeNodesReply, lambda r: TreeNodesReply(0, r.shifts[:-1], r.sums)),
        (TreeNodesReply, lambda r: TreeNodesReply(0, r.shifts, r.sums[:-4])),
        (TreeNodesReply, lambda r: TreeNodesReply(0, [0] * len(r.shifts), r.sums)),
        (TreeRecordsReply, lambda r: TreeRecordsReply(0, [10_000], b"", r.nodes, r.up_to)),
        (TreeRecordsReply, lambda r: TreeRecordsReply(0, r.missing, b"x", r.nodes, r.up_to)),
        (TreeRecordsReply, lambda r: TreeRecordsReply(0, r.missing, r.extra, 0, r.up_to)),
        (TreeRecordsReply, lambda r: TreeRecordsReply(0, r.missing, r.extra, 999_999, r.up_to)),
        (TreeFetchReply, lambda r: TreeFetchReply(0, r.keys, r.records, 0)),
        (TreeFetchReply, lambda r: TreeFetchReply(0, r.keys, [], r.taken)),
        (TreeFetchReply, lambda r: ReplicaWriteReply(0)),
    ],
)
def test_an_answer_of_the_wrong_shape_ends_the_exchange(kind: type, spoil: Callable[[Any], Any]) -> None:
    one = {key: record(key, 1) for key in (b"k%d" % n for n in range(200))}
    link = Link(Replica(one), spoil=lambda reply: spoil(reply) if isinstance(reply, kind) else reply)
    with pytest.raises(ProtocolMismatch):
        converse(Replica({}), link)


def _nodes(**changes: Any) -> TreeNodes:
    fields: dict[str, Any] = {"ranges": [0], "shifts": [60], "indexes": [0], "below": [58], **changes}
    return TreeNodes(1, 1, "", *WHOLE, 1, **fields)


def _records(**changes: Any) -> TreeRecords:
    fields: dict[str, Any] = {
        "ranges": [0], "shifts": [60], "indexes": [0], "counts": [0], "digests": b"", "start": 0, "end": 1, **changes,
    }  # fmt: skip
    return TreeRecords(1, 1, "", *WHOLE, 1, **fields)


@pytest.mark.parametrize(
    "message",
    [
        _nodes(ranges=[16]),
        _nodes(ranges=[-1]),
        _nodes(shifts=[65]),
        _nodes(indexes=[1]),
        _nodes(indexes=[-1]),
        _nodes(shifts=[60, 60]),
        _nodes(ranges=[0] * 5000, shifts=[60] * 5000, indexes=[0] * 5000, below=[0] * 5000),
        _nodes(ranges=[0] * 4096, shifts=[60] * 4096, indexes=[0] * 4096, below=[0] * 4096),
        _nodes(below=[]),
        _records(ranges=[], shifts=[], indexes=[], counts=[]),
        _records(counts=[1]),
        _records(counts=[]),
        _records(start=5, end=4),
        _records(indexes=[1 << 70]),
        TreeFetch(1, 1, "", b""),
        TreeFetch(1, 1, "", b"1234567"),
        TreeFetch(1, 1, "", bytes(8 * 1001)),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(message: Any) -> None:
    replica = Replica({})
    with pytest.raises(InvalidRequest):
        Link(replica).ask(message)
    assert replica.lists == 0


def test_hlcs_of_the_records_are_what_is_told() -> None:
    one = {b"k": record(b"k", 3)}
    replica = Replica(one)
    spans = [replica.trees.trees[replica.trees.at(token(b"k"))].span(60, 0)]
    reply = answer_records(spans, *replica.list(spans), _records(end=TOKENS - 1))
    assert reply.extra == token(b"k").to_bytes(8, "little") + hlc_of(one[b"k"]).to_bytes(8, "little")
