"""Group commit under every interleaving that Hypothesis finds: nothing is told before it is durable (D1, D2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agi.core.dht.errors import DHTError, Overloaded, StorageError, StorageFull
from agi.core.dht.protocol import commit as core
from agi.core.dht.protocol.commit import Commit, Effect, Fail, GroupCommit, Pause, Release

KEYS = st.sampled_from([b"a", b"b", b"c"])


@dataclass(eq=False)
class Told:
    """A parked reply: what it tells of, and what became of it."""

    number: int
    records: dict[bytes, bytes]
    write: bool
    promises: dict[bytes, bytes] = field(default_factory=dict)
    outcome: str = "waiting"
    seen_durable: dict[bytes, bytes] = field(default_factory=dict)


class GroupCommitMachine(RuleBasedStateMachine):
    """The driver, the disk and its cache; records and promises are growing numbers, so newer is greater."""

    @initialize()
    def begin(self) -> None:
        self.commit: GroupCommit[Told] = GroupCommit()
        self.cache: dict[bytes, bytes] = {}
        self.disk: dict[bytes, bytes] = {}
        self.promised_cache: dict[bytes, bytes] = {}
        self.promised_disk: dict[bytes, bytes] = {}
        self.promised: dict[bytes, bytes] = {}  # as the node holds them in memory
        self.syncing: tuple[dict[bytes, bytes], dict[bytes, bytes]] | None = None
        self.told: list[Told] = []
        self.departing = False
        self.pauses: list[int] = []
        self.released: list[int] = []
        self.dead = False
        self.version = 0
        self.inserted: list[bytes] = []

    def perform(self, effects: Sequence[Effect[Told] | None]) -> None:
        for effect in effects:
            if effect is None:
                continue
            if isinstance(effect, Pause):
                self.pauses.append(effect.group)
            elif isinstance(effect, Commit):
                assert self.syncing is None, "two syncs at once"
                assert not self.dead, "written after a failed sync"
                assert effect.records or effect.promises, "a sync for nothing"
                self.cache.update(effect.records)
                self.inserted += effect.inserts
                self.promised_cache.update(effect.promises)
                self.syncing = dict(self.cache), dict(self.promised_cache)
            elif isinstance(effect, Release):
                for reply in effect.replies:
                    assert reply.outcome == "waiting"
                    reply.outcome = "released"
                    self.released.append(reply.number)
                    for key, record in reply.records.items():
                        assert self.disk.get(key, b"") >= record, "told of what is not on the disk"
                    for key, promise in reply.promises.items():
                        assert self.promised_disk.get(key, b"") >= promise, "told of a promise that is not on the disk"
            else:
                assert isinstance(effect, Fail)
                for reply in effect.replies:
                    assert reply.outcome == "waiting"
                    reply.outcome = "failed"

    def visible(self, key: bytes) -> bytes | None:
        return self.commit.overlay(key) or self.cache.get(key)

    def tell(self, records: dict[bytes, bytes], write: bool, promises: dict[bytes, bytes] | None = None) -> Told:
        reply = Told(len(self.told), records, write, promises or {})
        self.told.append(reply)
        return reply

    @rule(keys=st.lists(KEYS, min_size=1, max_size=3, unique=True))
    def submit(self, keys: list[bytes]) -> None:
        self.submit_both(keys, None)

    @rule(keys=st.lists(KEYS, max_size=2, unique=True), promised=st.lists(KEYS, min_size=1, max_size=2, unique=True))
    def promise(self, keys: list[bytes], promised: list[bytes]) -> None:
        """Records and promises, or promises alone."""
        self.submit_both(keys, promised)

    def submit_both(self, keys: list[bytes], promised: list[bytes] | None) -> None:
        self.version += 1
        records = dict.fromkeys(keys, b"%08d" % self.version)
        promises = None if promised is None else dict.fromkeys(promised, b"%016d" % self.version)
        inserts = [key for key in keys if self.visible(key) is None]
        reply = self.tell(records, True, promises)
        try:
            departs = self.commit.submit(dict(records), inserts, reply, promises)
        except DHTError:
            assert self.dead
            reply.outcome = "failed"
            return
        assert not self.dead
        self.promised.update(promises or {})
        self.departing |= departs

    @precondition(lambda self: self.departing)
    @rule()
    def the_turn_ends(self) -> None:
        self.departing = False
        self.perform([self.commit.depart()])

    @precondition(lambda self: self.pauses)
    @rule()
    def a_pause_ends(self) -> None:
        self.perform([self.commit.depart(self.pauses.pop(0))])

    @rule(key=KEYS)
    def read(self, key: bytes) -> None:
        """As the replica does: what is unsynced is told later, the rest at once."""
        unsynced = self.commit.overlay(key)
        if unsynced is None:
            if not self.dead and (record := self.cache.get(key)) is not None:
                assert self.disk.get(key) == record, "shown before it is durable"
            return
        self.commit.park(self.tell({key: unsynced}, False))

    @rule(key=KEYS)
    def tell_of_a_promise(self, key: bytes) -> None:
        """What the node holds in memory is told at once where nothing is unsynced, else later."""
        promise = self.promised.get(key)
        if promise is None or self.dead:
            return
        if self.commit.idle:
            assert self.promised_disk.get(key) == promise, "shown before it is durable"
            return
        self.commit.park(self.tell({}, False, {key: promise}))

    @precondition(lambda self: self.syncing is not None)
    @rule(patient=st.booleans())
    def sync_ends(self, patient: bool = False) -> None:
        assert self.syncing is not None
        (self.disk, self.promised_disk), self.syncing = self.syncing, None
        self.perform([self.commit.synced(patient=patient)])
        self.departing = True

    @precondition(lambda self: self.syncing is not None)
    @rule()
    def sync_fails(self) -> None:
        self.syncing = None
        self.dead = True
        self.perform([self.commit.failed(StorageError("gone"), fatal=True)])

    @precondition(lambda self: self.syncing is not None)
    @rule()
    def disk_is_full(self) -> None:
        """The write was refused before anything of it was stored."""
        self.syncing = None
        self.cache = dict(self.disk)
        self.promised_cache = dict(self.promised_disk)
        self.promised = dict(self.promised_disk)
        self.perform([self.commit.failed(StorageFull("full"), fatal=False)])

    @invariant()
    def nobody_is_forgotten(self) -> None:
        waiting = [reply for reply in self.told if reply.outcome == "waiting"]
        assert not waiting or self.syncing is not None or self.departing or self.pauses, (
            "waits for a sync that nobody starts"
        )
        assert self.commit.idle or self.syncing is not None or self.departing or self.pauses

    @invariant()
    def writes_are_answered_in_their_order(self) -> None:
        writes = [number for number in self.released if self.told[number].write]
        assert writes == sorted(writes)

    def teardown(self) -> None:
        if not hasattr(self, "commit"):
            return
        while self.syncing is not None or self.departing or self.pauses:
            if self.syncing is not None:
                self.sync_ends()
            elif self.departing:
                self.the_turn_ends()
            else:
                self.a_pause_ends()
        assert all(reply.outcome != "waiting" for reply in self.told)
        if not self.dead and not any(reply.outcome == "failed" for reply in self.told):
            assert self.disk == self.cache and sorted(self.inserted) == sorted(self.disk)
            assert self.promised_disk == self.promised
        assert core._NO_PROMISES == {}, "all groups without promises would have these"


TestGroupCommit = GroupCommitMachine.TestCase
TestGroupCommit.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_the_worked_example() -> None:
    commit: GroupCommit[str] = GroupCommit()
    assert commit.submit({b"a": b"1"}, [b"a"], "w1")
    assert not commit.submit({b"b": b"1"}, [b"b"], "w2")
    assert commit.depart() == Commit({b"a": b"1", b"b": b"1"}, [b"a", b"b"])
    assert not commit.submit({b"a": b"2"}, [], "w3") and commit.depart() is None
    assert commit.synced() == Release(["w1", "w2"])
    assert commit.depart() == Commit({b"a": b"2"}, [])
    assert commit.synced() == Release(["w3"])
    assert commit.idle and commit.depart() is None and (commit.groups, commit.writes) == (2, 3)


def test_promises_join_the_group_and_the_last_of_a_key_counts() -> None:
    commit: GroupCommit[str] = GroupCommit()
    one, two = bytes(16), bytes(15) + b"1"
    commit.submit({}, [], "p1", {b"a": one})
    assert commit.depart() == Commit({}, [], {b"a": one})
    assert not commit.idle
    commit.submit({b"a": b"1"}, [b"a"], "w2")
    given = {b"a": two, b"b": one}
    commit.submit({}, [], "p3", given)
    commit.submit({b"b": b"1"}, [b"b"], "w4", {b"b": b"", b"c": one})
    assert given == {b"a": two, b"b": one}, "the caller's promises were altered"
    assert commit.synced() == Release(["p1"])
    promises = {b"a": two, b"b": b"", b"c": one}
    assert commit.depart() == Commit({b"a": b"1", b"b": b"1"}, [b"a", b"b"], promises)
    assert commit.synced() == Release(["w2", "p3", "w4"])
    assert commit.idle and (commit.groups, commit.writes) == (2, 2)
    commit.submit({b"a": b"2"}, [], "w5")
    assert commit.depart() == Commit({b"a": b"2"}, [], {})


def test_a_group_of_promises_alone_takes_off_after_the_other_and_replies_park_in_it() -> None:
    commit: GroupCommit[str] = GroupCommit()
    commit.submit({b"a": b"1"}, [b"a"], "w1")
    commit.depart()
    commit.park("r1")
    commit.submit({}, [], "p2", {b"a": bytes(16)})
    commit.park("r2")
    assert commit.synced() == Release(["w1", "r1"])
    assert commit.depart() == Commit({}, [], {b"a": bytes(16)})
    assert not commit.idle
    assert commit.synced() == Release(["p2", "r2"])
    assert commit.idle


def test_a_reply_parks_with_what_has_not_departed_yet() -> None:
    commit: GroupCommit[str] = GroupCommit()
    commit.submit({b"a": b"1"}, [b"a"], "w1")
    assert not commit.idle and commit.overlay(b"a") == b"1"
    commit.park("r1")
    commit.depart()
    assert commit.synced() == Release(["w1", "r1"])


def test_a_failed_group_takes_its_promises_with_it() -> None:
    commit: GroupCommit[str] = GroupCommit()
    commit.submit({}, [], "p1", {b"a": bytes(16)})
    commit.depart()
    commit.submit({}, [], "p2", {b"b": bytes(16)})
    full = StorageFull("full")
    assert commit.failed(full, fatal=False) == Fail(["p1", "p2"], full)
    assert commit.idle and commit.depart() is None
    assert commit.submit({b"a": b"1"}, [b"a"], "w3")
    assert commit.depart() == Commit({b"a": b"1"}, [b"a"], {})


def test_whoever_submits_nothing_is_answered_all_the_same() -> None:
    commit: GroupCommit[str] = GroupCommit()
    commit.submit({b"a": b"1"}, [b"a"], "w1")
    commit.depart()
    commit.submit({}, [], "nothing", {})
    assert commit.synced() == Release(["w1"]) and commit.depart() == Commit({}, [], {})
    assert commit.synced() == Release(["nothing"])


def test_promises_count_for_the_size_of_the_open_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "GROUP_BYTES_MAX", 1000)
    commit: GroupCommit[str] = GroupCommit()
    commit.submit({}, [], "p1", {b"a": bytes(16)})
    commit.depart()
    taken = 0
    with pytest.raises(Overloaded):
        for number in range(100):
            commit.submit({}, [], "p", {b"%02d" % number: bytes(16)})
            taken += 1
    assert 10 <= taken <= 30
    commit.synced()
    group = commit.depart()
    assert isinstance(group, Commit) and len(group.promises) == taken


def test_the_open_group_is_bounded_but_takes_any_single_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "GROUP_BYTES_MAX", 1000)
    commit: GroupCommit[str] = GroupCommit()
    commit.submit({b"a": b"x" * 5000}, [b"a"], "w1")
    commit.depart()
    commit.submit({b"b": b"x" * 5000}, [b"b"], "w2")  # alone in its group
    with pytest.raises(Overloaded):
        commit.submit({b"c": b"x"}, [b"c"], "w3")
    assert commit.overlay(b"c") is None
    assert commit.synced() == Release(["w1"])
    commit.depart()
    commit.submit({b"c": b"x"}, [b"c"], "w4")
    assert commit.synced() == Release(["w2"])
    commit.depart()
    assert commit.synced() == Release(["w4"])


def cycle(commit: GroupCommit[str], replies: list[str]) -> None:
    """A group of so many, with a slow sync."""
    for reply in replies:
        commit.submit({reply.encode(): b"1"}, [], reply)
    effect = commit.depart()
    while isinstance(effect, Pause):
        effect = commit.depart(effect.group)
    assert isinstance(effect, Commit)
    assert commit.synced(patient=True) == Release(replies)


def test_a_group_waits_a_moment_for_as_many_as_the_last_ones_had() -> None:
    commit: GroupCommit[str] = GroupCommit()
    cycle(commit, ["a", "b", "c"])
    assert commit.submit({b"d": b"1"}, [], "d")
    pause = commit.depart()
    assert pause == Pause(1) and commit.depart() is None, "one pause for a group"
    assert not commit.submit({b"e": b"1"}, [], "e")
    assert commit.submit({b"f": b"1"}, [], "f"), "as many as before: no need to wait"
    assert isinstance(commit.depart(), Commit) and commit.depart(1) is None
    assert commit.synced(patient=True) == Release(["d", "e", "f"])


def test_the_end_of_a_pause_counts_for_its_own_group_alone() -> None:
    commit: GroupCommit[str] = GroupCommit()
    cycle(commit, ["a", "b"])
    commit.submit({b"c": b"1"}, [], "c")
    assert commit.depart() == Pause(1)
    commit.submit({b"d": b"1"}, [], "d")
    assert isinstance(commit.depart(), Commit)
    commit.submit({b"e": b"1"}, [], "e")
    commit.synced(patient=True)
    assert commit.depart() == Pause(2) and commit.depart(1) is None
    assert commit.depart(2) == Commit({b"e": b"1"}, [])


def test_nobody_waits_where_writes_come_alone_or_syncs_are_fast() -> None:
    commit: GroupCommit[str] = GroupCommit()
    cycle(commit, ["a"])
    assert commit.submit({b"b": b"1"}, [], "b") and isinstance(commit.depart(), Commit)
    commit.submit({b"c": b"1"}, [], "c")
    commit.submit({b"d": b"1"}, [], "d")
    commit.synced(patient=True)
    commit.depart()
    assert commit.synced(patient=False) == Release(["c", "d"])
    commit.submit({b"e": b"1"}, [], "e")
    assert isinstance(commit.depart(), Commit)
