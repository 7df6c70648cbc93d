"""The trees against a naive model: any interleaving of writes, folding, building and losing them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from agi.core.dht.protocol import merkle
from agi.core.dht.protocol.merkle import MASK, HashTrees, contribution
from agi.core.dht.protocol.record import TOMBSTONE, pack, shrink

TOKENS = 1 << 64
RANGES = [(0, 99), (100, TOKENS // 4), (TOKENS // 4 + 1, TOKENS // 2), (TOKENS // 2 + 1000, TOKENS - 1)]
"""The second touches its neighbours, a gap of another node's tokens is before the last."""


def token_of(key: bytes) -> bytes:
    return bytes(xxhash.xxh3_64_digest(key))


def token(key: bytes) -> int:
    return int.from_bytes(token_of(key), "big")


def key_of(number: int) -> bytes:
    return b"key:%d" % number


def record(key: bytes, hlc: int, *, value: bytes = b"v", expires_ms: int = 0, flags: int = 0) -> bytes:
    return pack(key, value, hlc << 16, 7, 5, expires_ms, flags)


class Store:
    """Trees, and the store that they tell of, driven as a replica drives them."""

    def __init__(self, ranges: list[tuple[int, int]] = RANGES) -> None:
        self.trees = HashTrees(token_of)
        self.trees.adopt(ranges)
        self.records: dict[bytes, bytes] = {}
        self.open: dict[bytes, bytes] = {}
        """Merged, but not in the store yet."""

    def write(self, key: bytes, new: bytes, *, now: bool = True) -> None:
        held = self.open.get(key) or self.records.get(key)
        self.trees.changed([key], [held], [] if held else [key])
        (self.records if now and key not in self.open else self.open)[key] = new

    def land(self) -> None:
        self.records |= self.open
        self.open = {}

    def fold(self, count: int | None = None) -> None:
        keys = list(self.trees.pending)[:count]
        self.trees.fold(keys, [self.records.get(key) for key in keys], self.open.keys())

    def scanned(self, positions: list[int]) -> list[tuple[bytes, bytes]]:
        first, last = self.trees.trees[positions[0]].first, self.trees.trees[positions[-1]].last
        return sorted(
            ((key, held) for key, held in self.records.items() if first <= token(key) <= last),
            key=lambda item: token_of(item[0]),
        )

    def build(self, positions: list[int] | None = None) -> None:
        positions = positions if positions is not None else list(range(len(self.trees.trees)))
        self.trees.begin(positions, len(self.records) / TOKENS, self.open)
        self.trees.page(self.scanned(positions))
        self.trees.finish(positions)

    def settle(self) -> None:
        """Everything is in the store, built and folded."""
        self.land()
        self.fold()
        while positions := self.trees.to_build(TOKENS // 2):
            self.build(positions)
        self.fold()

    def check(self) -> None:
        """Every known tree counts what its keys count for: what is stored, or for a pending key what is pending."""
        for tree in self.trees.trees:
            if not tree.known:
                continue
            leaves = [0] * len(tree.sums.leaves)
            count = 0
            for key in self.records.keys() | self.trees.pending.keys():
                if tree.first <= token(key) <= tree.last:
                    counts = self.trees.pending.get(key)
                    if counts is None:
                        counts = contribution(key, self.records[key])
                    elif tree.building is not None:
                        break  # what a pending key counts for is of the tree that is being built
                    at = (token(key) - tree.first) >> tree.sums.shift
                    leaves[at] = (leaves[at] + counts) & MASK
                    count += counts != 0
            else:
                assert tree.sums.leaves.tolist() == leaves
                assert (tree.sums.total, tree.sums.count) == (sum(leaves) & MASK, count)


# --- what a record counts for


def test_equal_writes_count_alike_and_different_ones_do_not() -> None:
    key = b"k"
    first = record(key, 1)
    others = [
        record(key, 2),
        record(key, 1, value=b"w"),
        record(key, 1, value=b"", flags=TOMBSTONE),
        record(key, 1, expires_ms=9),
        pack(key, b"v", 1 << 16, 8, 5),
    ]
    assert contribution(key, first) == contribution(key, record(key, 1)) == contribution(key, first[:40])
    counted = {contribution(key, each) for each in [first, *others]} | {contribution(b"l", record(b"l", 1))}
    assert len(counted) == 7


def test_a_shrunk_record_counts_as_the_record_that_it_was() -> None:
    key = b"k"
    expired = record(key, 1, expires_ms=9)
    assert contribution(key, shrink(key, expired)) == contribution(key, expired)
    assert contribution(key, expired) != contribution(key, record(key, 1, expires_ms=10))


# --- trees


def test_ranges_are_found_by_token_and_gaps_are_nobodys() -> None:
    trees = Store().trees
    assert [trees.at(t) for t in (0, 99, 100, TOKENS // 4, TOKENS // 4 + 1, TOKENS // 2, TOKENS - 1)] == [
        0, 0, 1, 1, 2, 2, 3,
    ]  # fmt: skip
    assert trees.at(TOKENS // 2 + 1) == trees.at(TOKENS // 2 + 999) == -1
    assert trees.at(TOKENS // 2 + 1000) == 3


@pytest.mark.parametrize(("first", "last"), [(0, 0), (5, 20), (0, TOKENS - 1), (7, TOKENS // 3), (0, 15), (0, 16)])
def test_nodes_of_every_level_add_up_to_the_one_above(first: int, last: int) -> None:
    trees = HashTrees(token_of)
    trees.adopt([(first, last)])
    (tree,) = trees.trees
    trees.begin([0], 5000 / TOKENS, ())
    trees.page([(key_of(i), record(key_of(i), 1)) for i in range(5000)])
    trees.finish([0])
    assert tree.span(tree.bits, 0) == (first, last)
    for shift in range(tree.sums.shift, tree.bits):
        above, below = shift + 1, shift
        sums = []
        for index in range(tree.width_in_nodes(above)):
            start, children = tree.children(above, index, below)
            assert start == 2 * index and 1 <= len(children) <= 2
            assert tree.span(above, index)[0] == tree.span(below, start)[0]
            assert tree.span(above, index)[1] == tree.span(below, start + len(children) - 1)[1]
            sums.append(sum(children) & MASK)
        if above < tree.bits:
            assert sums == tree.children(tree.bits, 0, above)[1]
    assert sum(tree.children(tree.bits, 0, tree.sums.shift)[1]) & MASK == tree.sums.total or tree.bits == 0
    assert tree.children(tree.sums.shift, 0, 0) == (0, [])


def test_the_leaves_follow_the_number_of_keys() -> None:
    store = Store([(0, TOKENS - 1)])
    store.settle()
    (tree,) = store.trees.trees
    assert len(tree.sums.leaves) == merkle.LEAVES_MIN
    for count in (100, 1000, 5000):
        for i in range(count):
            store.write(key_of(i), record(key_of(i), 1))
        store.settle()
        assert tree.sums.count == count and not tree.outgrown
        assert count / len(tree.sums.leaves) <= merkle.LEAF_KEYS_MAX
    assert len(tree.sums.leaves) >= 256
    store.check()


def test_a_range_that_outgrows_its_leaves_answers_from_the_old_ones_until_the_new_are_there() -> None:
    store = Store([(0, TOKENS - 1)])
    store.settle()
    for i in range(1000):
        store.write(key_of(i), record(key_of(i), 1))
    store.fold()
    (tree,) = store.trees.trees
    total, shift = tree.sums.total, tree.sums.shift
    assert tree.outgrown and store.trees.to_build(TOKENS) == [0]
    store.trees.begin([0], 0.0, ())
    items = store.scanned([0])
    store.trees.page(items[:500])
    for key, _ in (items[3], items[900]):  # behind the scan and before it
        store.write(key, record(key, 2))
    new = b"new"
    store.write(new, record(new, 1))
    store.fold()
    assert tree.known and tree.sums.total == total and len(store.trees.pending) == 3
    store.trees.page([(key, store.records[key]) for key, _ in items[500:]])
    store.trees.finish([0])
    assert tree.sums.shift < shift
    store.check()
    store.fold()
    store.check()
    assert not store.trees.pending and tree.sums.count == 1001


def test_equal_contents_have_equal_roots_whatever_happened_before() -> None:
    rng = random.Random(1)
    keys = [key_of(i) for i in range(300)]
    one, two = Store(), Store()
    for key in keys:
        one.write(key, record(key, 9))
    one.settle()
    two.settle()
    for round_ in range(1, 10):
        for key in rng.sample(keys, 200):
            two.write(key, record(key, round_))
        two.fold(rng.randrange(200))
    for key in keys:
        two.write(key, record(key, 9))
    two.settle()
    everything = range(len(RANGES))
    assert one.trees.total(everything) == two.trees.total(everything)
    held = sum(one.trees.at(token(key)) >= 0 for key in keys)
    assert one.trees.total(everything)[1] == held
    two.write(keys[0], record(keys[0], 10))
    two.fold()
    assert one.trees.total(everything)[0] != two.trees.total(everything)[0]


def test_a_write_that_is_not_in_the_store_yet_stays_pending() -> None:
    store = Store()
    store.settle()
    store.write(b"a", record(b"a", 1), now=False)
    store.fold()
    assert list(store.trees.pending) == [b"a"]
    store.open.clear()  # its group failed
    store.fold()
    assert not store.trees.pending
    store.check()
    store.write(b"a", record(b"a", 2), now=False)
    store.build()
    store.fold()
    store.land()
    store.fold()
    store.check()
    assert store.trees.total(range(len(RANGES)))[1] == 1


def test_a_key_is_noted_after_each_fold_whatever_its_version() -> None:
    """The shortcut by version: what was counted is noted when it changes, be it the newest of all or an old one."""
    store = Store()
    store.write(b"a", record(b"a", 5))
    store.write(b"b", record(b"b", 9))
    store.settle()
    for hlc in (10, 11, 12):
        for key in (b"a", b"b"):
            store.write(key, record(key, hlc))
        assert sorted(store.trees.pending) == [b"a", b"b"]
        store.fold()
        store.check()
        assert not store.trees.pending
    for hlc in range(13, 20):  # never both of them
        store.write(b"ab"[hlc % 2 :][:1], record(b"a", hlc))
        store.write(b"b", record(b"b", hlc))
        store.fold(1)
        store.check()


def test_what_was_noted_and_given_up_is_noted_again() -> None:
    store = Store()
    store.settle()
    store.write(b"a", record(b"a", 14))
    store.trees.lose()
    _overtake_a_scan(store)


def test_the_shortcut_is_not_taken_before_every_record_was_met() -> None:
    store = Store()
    store.records[b"a"] = record(b"a", 14)  # of an earlier start
    store.fold()
    _overtake_a_scan(store)


def test_what_only_a_scan_has_met_is_noted_when_it_changes() -> None:
    store = Store()
    store.records[b"a"] = record(b"a", 14)
    store.settle()
    store.write(b"a", record(b"a", 15))
    assert list(store.trees.pending) == [b"a"]
    store.fold()
    store.check()


def test_the_shortcut_is_not_taken_for_ranges_that_are_new_here() -> None:
    at = token(b"a")
    store = Store([(at + 1, TOKENS - 1)])
    store.records[b"a"] = record(b"a", 14)
    store.settle()
    store.trees.adopt([(0, at), (at + 1, TOKENS - 1)])
    store.trees.begin([0], 0.0, store.open)
    store.write(b"a", record(b"a", 15), now=False)
    store.trees.page(store.scanned([0]))
    store.trees.finish([0])
    store.land()
    store.fold()
    store.check()


def _overtake_a_scan(store: Store) -> None:
    """While the range of `a` is built, a newer record of it is merged, but comes into the store only afterwards."""
    others = [position for position in range(4) if position != store.trees.at(token(b"a"))]
    store.build(others[:1])
    positions = [store.trees.at(token(b"a"))]
    store.trees.begin(positions, 0.0, store.open)
    store.write(b"a", record(b"a", 15), now=False)
    store.trees.page(store.scanned(positions))
    store.trees.finish(positions)
    store.land()
    store.fold()
    store.check()


def test_overwrites_of_a_pending_key_cost_no_more_than_one() -> None:
    store = Store()
    store.settle()
    for hlc in range(1, 50):
        store.write(b"a", record(b"a", hlc))
    assert store.trees.pending == {b"a": 0}
    store.fold()
    store.check()


def test_too_many_changes_cost_the_trees_not_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merkle, "FOLD_AT", 10)
    monkeypatch.setattr(merkle, "PENDING_MAX", 20)
    store = Store()
    store.settle()
    woken: list[int] = []
    store.trees.wake = lambda: woken.append(len(store.trees.pending))
    for i in range(20):
        store.write(key_of(i), record(key_of(i), 1), now=i != 5)
    assert woken and store.trees.lost == 0 and store.trees.unknown == 0
    store.write(b"one more", record(b"one more", 1))
    assert store.trees.lost == 1 and store.trees.unknown == len(RANGES)
    assert len(store.trees.pending) <= 1
    positions = store.trees.to_build(TOKENS)
    while positions:
        store.build(positions)  # while key 5 is still not in the store
        positions = store.trees.to_build(TOKENS)
    store.land()
    store.fold()
    store.check()
    assert store.trees.total(range(len(RANGES)))[1] == sum(store.trees.at(token(k)) >= 0 for k in store.records)


def test_ranges_that_stay_keep_their_trees_and_others_are_unknown() -> None:
    store = Store()
    for i in range(100):
        store.write(key_of(i), record(key_of(i), 1))
    store.settle()
    kept, split = store.trees.trees[2], store.trees.trees[3]
    middle = TOKENS - TOKENS // 4
    store.write(key_of(3), record(key_of(3), 2))
    store.trees.adopt([*RANGES[:3], (RANGES[3][0], middle), (middle + 1, TOKENS - 1)])
    assert store.trees.trees[2] is kept and split not in store.trees.trees
    assert [tree.known for tree in store.trees.trees] == [True, True, True, False, False]
    assert store.trees.to_build(TOKENS) == [3, 4] and store.trees.to_build(1000) == [3]
    store.check()
    store.settle()
    store.check()
    assert store.trees.unknown == 0


def test_a_scan_that_failed_leaves_the_range_unknown() -> None:
    store = Store()
    for i in range(100):
        store.write(key_of(i), record(key_of(i), 1))
    store.settle()
    store.trees.begin([1, 2], 0.0, ())
    store.trees.page(store.scanned([1]))
    store.trees.abort([1, 2])
    assert [tree.known for tree in store.trees.trees] == [True, False, False, True]
    store.settle()
    store.check()


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 40), st.integers(1, 30), st.booleans()),
        st.tuples(st.just("fold"), st.integers(0, 60)),
        st.tuples(st.just("fold"), st.just(1000)),
        st.tuples(st.just("settle")),
        st.tuples(st.just("land")),
        st.tuples(st.just("fail")),
        st.tuples(st.just("begin"), st.integers(0, 3)),
        st.tuples(st.just("page"), st.integers(1, 20)),
        st.tuples(st.just("abort")),
        st.tuples(st.just("lose")),
        st.tuples(st.just("split"), st.booleans()),
    ),
    max_size=80,
)


@settings(max_examples=300, deadline=None)
@given(actions=ACTIONS)
def test_any_interleaving_ends_in_the_sums_of_what_is_stored(actions: list[tuple[Any, ...]]) -> None:
    store = Store()
    store.settle()
    trees = store.trees
    building: list[int] = []
    left: list[bytes] = []

    def page(count: int) -> None:
        nonlocal building, left
        trees.page([(key, store.records[key]) for key in left[:count]])
        left = left[count:]
        if building and not left:
            trees.finish(building)
            building = []

    for action in actions:
        match action:
            case "write", number, hlc, now:
                store.write(key_of(number), record(key_of(number), hlc), now=now)
            case "fold", count:
                store.fold(count)
            case ("settle",):
                trees.abort(building)
                building, left = [], []
                store.settle()
            case ("land",):
                store.land()
            case ("fail",):
                store.open = {}
            case "begin", at if not building and at < len(trees.trees):
                building = [at]
                trees.begin(building, 1e-18, store.open)
                left = [key for key, _ in store.scanned(building)]
                page(0)
            case "page", count if building:
                seen = set(left)
                # a real scan meets what was inserted before its position came there
                place = token_of(left[0]) if left else b""
                fresh = [key for key, _ in store.scanned(building) if key in seen or token_of(key) > place]
                left = [key for key in fresh if key in seen or (left and token_of(key) >= place)]
                page(count)
            case ("abort",):
                trees.abort(building)
                building, left = [], []
            case ("lose",):
                trees.lose()
                building, left = [], []
            case "split", halved:
                middle = TOKENS // 8
                trees.adopt([RANGES[0], (100, middle), (middle + 1, TOKENS // 4), *RANGES[2:]] if halved else RANGES)
                building, left = [], []
        store.check()
    page(1 << 30)
    store.settle()
    assert not trees.pending and trees.unknown == 0
    store.check()
    built = Store([(tree.first, tree.last) for tree in trees.trees])
    built.records = store.records
    built.build()
    everything = range(len(trees.trees))
    assert trees.total(everything) == built.trees.total(everything)


def test_a_key_that_is_on_its_way_when_all_is_lost_and_written_again_counts_once() -> None:
    store = Store()
    store.settle()
    key = key_of(34)
    store.write(key, record(key, 1), now=False)
    store.trees.lose()
    store.write(key, record(key, 1), now=False)
    positions = list(range(len(RANGES)))
    store.build(positions)  # which meets nothing of it
    store.check()
    store.settle()
    store.check()
    assert store.trees.total(positions) == (contribution(key, store.records[key]), 1)


def test_a_key_that_is_written_all_the_time_counts_what_the_store_holds_of_it() -> None:
    store = Store()
    store.build()
    key = key_of(1)
    store.write(key, record(key, 1))
    store.fold()
    store.write(key, record(key, 2))
    store.write(key, record(key, 3), now=False)
    store.fold()
    assert key in store.trees.pending
    assert store.trees.total(range(len(RANGES))) == (contribution(key, store.records[key]), 1)
    store.land()
    store.fold()
    assert not store.trees.pending
    assert store.trees.total(range(len(RANGES))) == (contribution(key, record(key, 3)), 1)


def test_ranges_that_lie_apart_are_built_together_up_to_a_bound() -> None:
    """Each go looks at every pending key: a go for each of many ranges would look at them all many times."""
    store = Store([(i * 100, i * 100 + 49) for i in range(64)])
    store.trees.empty(())
    assert store.trees.to_build(TOKENS) == []
    for position in range(0, 64, 2):
        store.trees.forget(position)
    assert store.trees.to_build(TOKENS) == list(range(0, 64, 2))
    assert store.trees.to_build(200) == [0, 2, 4, 6]
    assert store.trees.to_build(1) == [0]
