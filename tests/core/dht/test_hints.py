"""The queue of hints: order, bounds, replacement, what the store is told, and all of it against a plain model."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from agi.core.dht.errors import StorageCorrupt
from agi.core.dht.protocol.hints import (
    HINT_OVERHEAD_BYTES,
    Hint,
    Hints,
    Pending,
    pack_hint,
    target_tag,
    unpack_hint,
)

MIB = 1 << 20
COST = HINT_OVERHEAD_BYTES + 2
"""Of a hint with a key and a record of one byte."""


def hints(bytes_max: int = MIB, age_max_ms: int = 1000) -> Hints:
    return Hints(bytes_max, age_max_ms)


def add(core: Hints, *pairs: tuple[bytes, bytes], node: str = "n", disk: str = "d", now_ms: int = 0) -> None:
    core.add(node, disk, 1, [key for key, _ in pairs], [record for _, record in pairs], now_ms)


def held(core: Hints, node: str = "n") -> list[tuple[bytes, bytes]]:
    return [(hint.key, hint.record) for hint in core.batch(node, 1 << 40, 1 << 40)]


def dropped(core: Hints) -> dict[str, int]:
    return {why.value: count for why, count in core.dropped.items() if count}


def saved(core: Hints) -> tuple[list[bytes], list[bytes]]:
    """The keys of what is to be stored and to be removed, which the store does."""
    changes = core.take_unsaved(1 << 40, 1 << 40)
    core.saved()
    return sorted(hint.key for hint in changes.hints), sorted(name[16:] for name in changes.gone)


def test_a_hint_has_all_that_its_replay_needs() -> None:
    core = hints()
    core.add("n", "d", 7, [b"k", b"l"], [b"1", b"2"], 50)
    assert core.batch("n", MIB, 10) == [Hint("n", "d", 7, 1, 50, b"k", b"1"), Hint("n", "d", 7, 2, 50, b"l", b"2")]
    assert core.pending() == [Pending("n", "d", 2, 2 * COST, 50)]
    assert core.batch("other", MIB, 10) == [] and len(core) == core.stored == 2


def test_the_newest_record_of_a_key_is_kept_at_the_end_of_the_queue() -> None:
    core = hints()
    add(core, (b"a", b"5"), (b"b", b"1"))
    add(core, (b"a", b"4"), (b"a", b"5"))  # older, and the same again
    assert held(core) == [(b"a", b"5"), (b"b", b"1")] and core.stored == 2
    add(core, (b"a", b"6"), now_ms=9)
    assert held(core) == [(b"b", b"1"), (b"a", b"6")]
    assert core.pending()[0] == Pending("n", "d", 2, 2 * COST, 0)
    assert dropped(core) == {}


def test_targets_are_apart() -> None:
    core = hints(bytes_max=COST)
    add(core, (b"k", b"1"), node="b")
    add(core, (b"k", b"2"), node="a")
    assert held(core, "a") == [(b"k", b"2")] and held(core, "b") == [(b"k", b"1")]
    assert [target.node for target in core.pending()] == ["a", "b"]


def test_past_the_bytes_of_a_target_its_oldest_go() -> None:
    core = hints(bytes_max=2 * COST)
    add(core, (b"a", b"1"), (b"b", b"1"))
    assert dropped(core) == {}
    add(core, (b"c", b"1"))
    assert held(core) == [(b"b", b"1"), (b"c", b"1")] and dropped(core) == {"full": 1}
    add(core, (b"d", b"x" * 2 * COST))  # never fits
    assert held(core) == [] and dropped(core) == {"full": 4} and core.pending() == [] and len(core) == 0


def test_what_is_too_old_goes_at_the_exact_moment() -> None:
    core = hints(age_max_ms=1000)
    add(core, (b"a", b"1"), now_ms=10)
    add(core, (b"b", b"1"), now_ms=11)
    core.expire(1009)
    assert len(core) == 2
    core.expire(1010)
    assert held(core) == [(b"b", b"1")] and dropped(core) == {"old": 1}
    add(core, (b"c", b"1"), now_ms=1011)  # a new one finds the old one out
    assert held(core) == [(b"c", b"1")] and dropped(core) == {"old": 2}


def test_a_batch_is_bounded_and_never_empty() -> None:
    core = hints()
    add(core, *((b"%d" % i, b"x" * 9) for i in range(5)))
    assert [hint.key for hint in core.batch("n", 30, 10)] == [b"0", b"1", b"2"]
    assert [hint.key for hint in core.batch("n", 29, 10)] == [b"0", b"1"]
    assert [hint.key for hint in core.batch("n", 1000, 4)] == [b"0", b"1", b"2", b"3"]
    assert [hint.key for hint in core.batch("n", 1, 10)] == [b"0"]


def test_what_was_delivered_goes_but_not_what_came_meanwhile() -> None:
    core = hints()
    add(core, (b"a", b"1"), (b"b", b"1"))
    batch = core.batch("n", MIB, 10)
    add(core, (b"a", b"2"))
    core.delivered(batch)
    assert held(core) == [(b"a", b"2")] and core.replayed == 1
    core.delivered(batch)
    assert held(core) == [(b"a", b"2")] and core.replayed == 1
    core.delivered(core.batch("n", MIB, 10))
    assert core.pending() == [] and dropped(core) == {}


def test_a_disk_gets_no_hints_of_another() -> None:
    core = hints()
    add(core, (b"a", b"1"), (b"b", b"1"), node="n")
    add(core, (b"a", b"1"), node="m")
    add(core, (b"a", b"1"), node="o")
    core.keep({"n": "d", "m": "new"})
    assert held(core) == [(b"a", b"1"), (b"b", b"1")] and dropped(core) == {"other_disk": 1, "no_member": 1}
    add(core, (b"c", b"1"), disk="new")
    assert held(core) == [(b"c", b"1")] and dropped(core) == {"other_disk": 3, "no_member": 1}


def test_what_meets_a_condition_is_dropped() -> None:
    core = hints()
    add(core, (b"a", b"1"), (b"b", b"1"))
    add(core, (b"a", b"1"), node="m")
    assert core.drop(lambda hint: hint.key == b"a") == 2
    assert held(core) == [(b"b", b"1")] and held(core, "m") == [] and dropped(core) == {"topology": 2}


# --- what the store is told


def test_the_store_is_told_of_changes_only_and_of_removals_only_where_it_has_something() -> None:
    core = hints()
    add(core, (b"a", b"1"), (b"b", b"1"), (b"c", b"1"))
    core.drop(lambda hint: hint.key == b"c")
    assert saved(core) == ([b"a", b"b"], [])
    assert saved(core) == ([], [])
    add(core, (b"a", b"2"))
    core.drop(lambda hint: hint.key in (b"a", b"b"))
    assert saved(core) == ([], [b"a", b"b"])


def test_a_key_that_is_missed_again_before_the_store_has_heard_of_its_removal_is_removed_in_the_end() -> None:
    core = hints()
    add(core, (b"a", b"1"))
    assert saved(core) == ([b"a"], [])
    core.delivered(core.batch("n", MIB, 10))
    add(core, (b"a", b"2"))
    core.delivered(core.batch("n", MIB, 10))
    assert saved(core) == ([], [b"a"])


def test_changes_are_taken_in_parts() -> None:
    core = hints()
    add(core, *((b"%d" % i, b"xxx") for i in range(5)))
    sizes = []
    while changes := core.take_unsaved(3, 8).hints:  # the bytes end a part after the second
        sizes.append(len(changes))
        core.saved()
    assert sizes == [2, 2, 1]
    add(core, *((b"%d" % i, b"yyy") for i in range(5)))
    assert len(core.take_unsaved(3, 1000).hints) == 3


def test_what_the_store_refused_is_told_again_unless_it_has_changed() -> None:
    core = hints()
    add(core, (b"a", b"1"), (b"b", b"1"), (b"c", b"1"))
    core.take_unsaved(100, MIB)
    add(core, (b"b", b"2"))
    core.drop(lambda hint: hint.key == b"c")
    core.not_saved()
    changes = core.take_unsaved(100, MIB)
    assert sorted((hint.key, hint.record) for hint in changes.hints) == [(b"a", b"1"), (b"b", b"2")]
    assert [name[16:] for name in changes.gone] == [b"c"]  # it was on its way


def test_a_store_that_refuses_for_ever_is_not_told_more_and_more() -> None:
    core = hints(bytes_max=10 * COST)
    for i in range(1000):
        add(core, (b"%03d" % i, b""))
        core.take_unsaved(1 << 40, MIB)
        core.not_saved()
    changes = core.take_unsaved(1 << 40, 1 << 40)
    assert len(changes.hints) == len(core) <= 10 and changes.gone == []


def test_hints_come_back_in_order_and_new_ones_follow_them() -> None:
    first = hints()
    add(first, (b"a", b"1"), (b"b", b"1"))
    add(first, (b"a", b"2"))
    kept = [unpack_hint(hint.name, pack_hint(hint)) for hint in first.batch("n", MIB, 10)]
    core = hints()
    core.restore(kept[::-1] + kept[:1])  # in any order, one twice
    assert held(core) == [(b"b", b"1"), (b"a", b"2")] and core.pending()[0].bytes == 2 * COST
    add(core, (b"c", b"1"))
    assert [hint.number for hint in core.batch("n", MIB, 10)] == [2, 3, 4]
    core.delivered(core.batch("n", MIB, 10))
    assert saved(core) == ([], [b"a", b"b"])
    small = hints(bytes_max=COST)
    small.restore(kept)
    assert held(small) == [(b"a", b"2")] and dropped(small) == {"full": 1}


def test_what_a_target_lacks_for_good_is_counted_until_it_knows() -> None:
    core = hints(bytes_max=COST, age_max_ms=1000)
    add(core, (b"a", b"1"), (b"b", b"1"))
    core.lose("n", 3)
    assert core.lost == {"n": 4}
    core.expire(5000)
    assert core.lost == {"n": 5}
    core.told("n", 4)  # another went while it was told
    assert core.lost == {"n": 1}
    core.told("n", 1)
    assert core.lost == {}
    add(core, (b"c", b"1"))
    core.drop(lambda hint: True)  # what the target need not have
    add(core, (b"d", b"1"))
    core.keep({"n": "another disk"})  # which is filled as a whole
    assert core.lost == {} and dropped(core) == {"full": 1, "old": 1, "topology": 1, "other_disk": 1}
    core.lose("n", 1)
    core.keep({"m": "d"})
    assert core.lost == {}


def test_damaged_names_are_removed_and_counted() -> None:
    core = hints()
    core.forget([b"n" * 16 + b"k"])
    assert saved(core) == ([], [b"k"]) and dropped(core) == {"damaged": 1}


def test_a_packed_hint_is_whole_or_refused() -> None:
    hint = Hint("n", "d", 3, 4, 5, b"key", b"\x00record\xff")
    packed = pack_hint(hint)
    assert hint.name == target_tag("n", "d") + b"key" and unpack_hint(hint.name, packed) == hint
    for at in range(len(packed)):
        damaged = packed[:at] + bytes([packed[at] ^ 1]) + packed[at + 1 :]
        with pytest.raises(StorageCorrupt, match="fails its checksum"):
            unpack_hint(hint.name, damaged)
        with pytest.raises(StorageCorrupt):
            unpack_hint(hint.name, packed[:at])
    with pytest.raises(StorageCorrupt, match="is that of"):
        unpack_hint(target_tag("other", "d") + b"key", packed)


# --- beside a model

KEYS = st.sampled_from([b"a", b"b", b"c", b"d"])
NODES = st.sampled_from(["m", "n"])
WRITES = st.lists(st.tuples(KEYS, st.binary(min_size=1, max_size=2)), max_size=6)


class Model(RuleBasedStateMachine):
    """Hints beside lists, with a store that takes changes or refuses them."""

    def __init__(self) -> None:
        super().__init__()
        self.core = Hints(3 * COST, 5)
        self.queues: dict[str, list[tuple[bytes, bytes, int]]] = {"m": [], "n": []}
        self.disks = {"m": "0", "n": "0"}
        self.store: dict[bytes, Hint] = {}
        self.now = 0
        self.out: list[Hint] = []

    @rule(node=NODES, writes=WRITES, later=st.integers(0, 2))
    def add(self, node: str, writes: Sequence[tuple[bytes, bytes]], later: int) -> None:
        self.now += later
        self.core.add(node, self.disks[node], 1, [key for key, _ in writes], [record for _, record in writes], self.now)
        queue = self.queues[node]
        for key, record in writes:
            known = next((entry for entry in queue if entry[0] == key), None)
            if known is None or known[1] < record:
                queue[:] = [entry for entry in queue if entry is not known] + [(key, record, self.now)]
        while sum(HINT_OVERHEAD_BYTES + len(key) + len(record) for key, record, _ in queue) > 3 * COST:
            del queue[0]
        queue[:] = [entry for entry in queue if entry[2] + 5 > self.now]

    @rule(later=st.integers(0, 6))
    def expire(self, later: int) -> None:
        self.now += later
        self.core.expire(self.now)
        for queue in self.queues.values():
            queue[:] = [entry for entry in queue if entry[2] + 5 > self.now]

    @rule(node=NODES, count=st.integers(1, 3))
    def send(self, node: str, count: int) -> None:
        self.out = self.core.batch(node, MIB, count)
        assert [hint.key for hint in self.out] == [key for key, _, _ in self.queues[node]][:count]

    @rule()
    def deliver(self) -> None:
        self.core.delivered(self.out)
        for hint in self.out:
            queue = self.queues[hint.node]
            if hint.disk == self.disks[hint.node]:
                queue[:] = [entry for entry in queue if entry != (hint.key, hint.record, hint.since_ms)]
        self.out = []

    @rule(node=NODES)
    def other_disk(self, node: str) -> None:
        self.disks[node] += "x"
        self.core.keep(self.disks)
        self.queues[node].clear()

    @rule(key=KEYS)
    def drop(self, key: bytes) -> None:
        self.core.drop(lambda hint: hint.key == key)
        for queue in self.queues.values():
            queue[:] = [entry for entry in queue if entry[0] != key]

    @rule(taken=st.booleans(), meanwhile=KEYS, parts=st.integers(1, 9))
    def save(self, taken: bool, meanwhile: bytes, parts: int) -> None:
        changes = self.core.take_unsaved(parts, MIB)
        self.drop(meanwhile)
        if taken:
            self.store.update((hint.name, unpack_hint(hint.name, pack_hint(hint))) for hint in changes.hints)
            for name in changes.gone:
                self.store.pop(name, None)
            self.core.saved()
        else:
            self.core.not_saved()

    @rule()
    def restart(self) -> None:
        while changes := self.core.take_unsaved(100, MIB):
            if not (changes.hints or changes.gone):
                break
            self.store.update((hint.name, hint) for hint in changes.hints)
            for name in changes.gone:
                self.store.pop(name, None)
            self.core.saved()
        before = {node: [hint.key for hint in self.core.batch(node, MIB, 100)] for node in ("m", "n")}
        self.core = Hints(3 * COST, 5)
        self.core.restore(unpack_hint(name, pack_hint(hint)) for name, hint in self.store.items())
        assert {node: [hint.key for hint in self.core.batch(node, MIB, 100)] for node in ("m", "n")} == before
        self.out = []

    @invariant()
    def agrees(self) -> None:
        for node, queue in self.queues.items():
            found = self.core.batch(node, MIB, 100)
            assert [(hint.key, hint.record, hint.since_ms) for hint in found] == queue
            assert all(hint.disk == self.disks[node] for hint in found)
        assert [(target.node, target.hints) for target in self.core.pending()] == [
            (node, len(queue)) for node, queue in sorted(self.queues.items()) if queue
        ]
        for target in self.core.pending():
            assert target.bytes == sum(hint.cost for hint in self.core.batch(target.node, MIB, 100)) <= 3 * COST
            assert target.oldest_ms == self.queues[target.node][0][2]


TestHints = Model.TestCase
TestHints.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
