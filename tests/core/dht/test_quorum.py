"""The quorum cores against naive oracles, over every order of every reply of up to five replicas."""

from __future__ import annotations

from itertools import permutations, product
from typing import NamedTuple

import pytest

from agi.core.dht.errors import ClockSkew, DHTError, LinkClosed, OutcomeUnknown, StorageFull, Unavailable
from agi.core.dht.protocol.quorum import (
    Agreed,
    JointReadQuorum,
    JointWriteQuorum,
    ReadQuorum,
    Repair,
    WriteQuorum,
    Written,
    merge,
)

ACK, NEWER, REFUSED, LOST = "ANRL"
"""A replica stored both keys; holds something newer of key 0; refused without storing; may have stored or not."""


def _apply(quorum: WriteQuorum, place: int, event: str) -> None:
    if event == ACK:
        quorum.add_ack(f"n{place}", None)
    elif event == NEWER:
        quorum.add_ack(f"n{place}", [(0, 100 + place)])
    elif event == REFUSED:
        quorum.add_failure(f"n{place}", StorageFull("no"), maybe_stored=False)
    else:
        quorum.add_failure(f"n{place}", LinkClosed("gone"), maybe_stored=True)


def _write_oracle(events: str, needed: int, replicas: int) -> object:
    """What must have been answered after these events, from the definitions: "wait", "unavailable", "unknown" or the
    version to write key 0 again above (0 for none)."""
    pending = replicas - len(events)
    acks = events.count(ACK) + events.count(NEWER)
    if acks >= needed:
        if events.count(ACK) >= needed or NEWER not in events:
            return 0
        if events.count(ACK) + pending >= needed:
            return "wait"
        return max(100 + place for place, event in enumerate(events) if event == NEWER)
    if acks + pending >= needed:
        return "wait"
    if acks or LOST in events:
        return "unknown"
    return "wait" if pending else "unavailable"


@pytest.mark.parametrize("replicas", [1, 2, 3, 4, 5])
def test_write_quorum_in_every_order(replicas: int) -> None:
    for needed in range(1, replicas + 1):
        for events in product((ACK, NEWER, REFUSED, LOST), repeat=replicas):
            quorum = WriteQuorum(needed, replicas)
            for place, event in enumerate(events):
                _apply(quorum, place, event)
                seen = "".join(events[: place + 1])
                expected, outcome = _write_oracle(seen, needed, replicas), quorum.step()
                if expected == "wait":
                    assert outcome is None, (seen, needed)
                elif isinstance(expected, int):
                    assert outcome == Written([(0, expected)] if expected else []), (seen, needed)
                else:
                    kind = Unavailable if expected == "unavailable" else OutcomeUnknown
                    assert type(outcome) is kind, (seen, needed)
                    assert isinstance(outcome, DHTError)
                    acks = seen.count(ACK) + seen.count(NEWER)
                    assert (outcome.needed, outcome.answered) == (needed, acks)
            assert quorum.complete and quorum.step() is not None  # nothing waits for ever


@pytest.mark.parametrize("replicas", [1, 2, 3, 4, 5])
def test_unavailable_is_said_only_where_no_replica_can_hold_the_write(replicas: int) -> None:
    """At the deadline too, when some have not answered (D3)."""
    for needed in range(1, replicas + 1):
        for count in range(replicas + 1):
            for events in product((ACK, NEWER, REFUSED, LOST), repeat=count):
                quorum = WriteQuorum(needed, replicas)
                for place, event in enumerate(events):
                    _apply(quorum, place, event)
                error = quorum.shortfall("late")
                certain = all(event == REFUSED for event in events) and count == replicas
                assert type(error) is (Unavailable if certain else OutcomeUnknown)
                nowhere = set(events) <= {REFUSED, NEWER} and count == replicas
                assert quorum.maybe_holds(0) is not nowhere
                assert quorum.maybe_holds(1) is not certain


def test_an_earlier_stamp_makes_the_outcome_unknown() -> None:
    quorum = WriteQuorum(2, 3)
    assert type(quorum.unreachable(1)) is Unavailable
    quorum.maybe = 1
    error = quorum.unreachable(1)
    assert type(error) is OutcomeUnknown and (error.needed, error.answered) == (2, 1)


def test_an_error_names_its_last_reason() -> None:
    quorum = WriteQuorum(2, 2)
    quorum.add_failure("n1", LinkClosed("n1 was lost"), maybe_stored=True)
    assert "n1 was lost" in str(quorum.step())


# --- reads

VALUES = (None, b"1", b"2")


def _newest(values: list[bytes | None]) -> bytes | None:
    return max((value for value in values if value is not None), default=None)


@pytest.mark.parametrize(("replicas", "keys"), [(1, 2), (2, 2), (3, 2), (4, 1), (5, 1)])
def test_read_quorum_in_every_order(replicas: int, keys: int) -> None:
    replies = [*product(VALUES, repeat=keys), "failed"]
    for needed in range(1, replicas + 1):
        for repair_to in {0, needed}:
            for events in product(replies, repeat=replicas):
                _check_read(list(events), needed, replicas, repair_to, keys)


def _check_read(events: list[object], needed: int, replicas: int, repair_to: int, keys: int) -> None:
    quorum = ReadQuorum(needed, replicas, repair_to)
    answered: dict[str, list[bytes | None]] = {}
    for place, event in enumerate(events):
        if isinstance(event, tuple):
            answered[f"n{place}"] = list(event)
            quorum.add_reply(f"n{place}", list(event))
        else:
            quorum.add_failure(f"n{place}", LinkClosed("gone"))
        outcome = quorum.step()
        pending = replicas - place - 1
        if len(answered) + pending < needed:
            assert type(outcome) is Unavailable and (outcome.needed, outcome.answered) == (needed, len(answered))
            return
        if len(answered) < needed:
            assert outcome is None
            continue
        newest = [_newest([values[i] for values in answered.values()]) for i in range(keys)]
        stale = {
            name: behind
            for name, values in answered.items()
            if (behind := [i for i in range(keys) if values[i] != newest[i]])
        }
        if not stale or not repair_to:
            assert outcome == Agreed(newest)
            return
        holders = [{name for name, values in answered.items() if values[i] == newest[i]} for i in range(keys)]
        assert isinstance(outcome, Repair)
        assert outcome.records == newest and dict(outcome.stale) == stale
        # only what differs has to be brought to a quorum; what all agree on is there already
        differs = {i for behind in stale.values() for i in behind}
        short = {i for i in differs if len(holders[i]) < repair_to}
        assert outcome.blocking == bool(short)
        if outcome.blocking:
            _check_repairs(quorum, stale, holders, short, repair_to, newest)
        return
    raise AssertionError("never decided")


def _check_repairs(
    quorum: ReadQuorum,
    stale: dict[str, list[int]],
    holders: list[set[str]],
    short: set[int],
    repair_to: int,
    newest: list[bytes | None],
) -> None:
    assert quorum.repairing and quorum.step() is None
    assert quorum.unrepaired() == (sorted(short), [newest[i] for i in sorted(short)])
    assert "could not be stored on a quorum" in str(quorum.shortfall("late"))
    for name, behind in stale.items():
        for i in behind:
            holders[i].add(name)
        done = all(len(holders[i]) >= repair_to for i in short)
        agreed = quorum.add_repaired(name, behind)
        assert agreed == (Agreed(newest) if done else None)
        assert quorum.add_repaired(name, behind) == agreed  # a doubled acknowledgement is one
        if done:
            return
    raise AssertionError("all stale replicas were repaired, and still no quorum")


def test_a_repair_may_be_stored_at_a_replica_that_was_not_asked() -> None:
    quorum = ReadQuorum(2, 3, 2)
    quorum.add_reply("a", [b"2", b"x"])
    quorum.add_reply("b", [b"1", b"x"])
    assert isinstance(quorum.step(), Repair)
    assert quorum.unrepaired() == ([0], [b"2"])
    assert quorum.add_repaired("c", [0]) == Agreed([b"2", b"x"])


def test_merging_does_not_depend_on_order() -> None:
    replies = [[None, b"1", b"3"], [b"0", None, b"2"], [None, b"2", None]]
    assert {tuple(merge(list(order))) for order in permutations(replies)} == {(b"0", b"2", b"3")}


def test_a_write_that_only_clocks_refused_says_so() -> None:
    quorum = WriteQuorum(2, 3)
    for place in range(3):
        quorum.add_failure(f"n{place}", ClockSkew("the version is ahead"), maybe_stored=False)
    assert type(quorum.step()) is ClockSkew
    quorum = WriteQuorum(2, 3)
    quorum.add_failure("n0", ClockSkew("the version is ahead"), maybe_stored=False)
    quorum.add_failure("n1", LinkClosed("gone"), maybe_stored=True)
    assert type(quorum.step()) is OutcomeUnknown


# --- keys that change hands


class Change(NamedTuple):
    """Two replica sets, and how many of each are needed."""

    old: str
    new: str
    old_needed: int
    new_needed: int

    @property
    def union(self) -> list[str]:
        return sorted({*self.old, *self.new})

    @property
    def halves(self) -> tuple[tuple[str, int], ...]:
        return (self.old, self.old_needed), (self.new, self.new_needed)


CHANGES = [
    Change("abc", "bcd", 2, 2),
    Change("abc", "bcd", 1, 1),
    Change("abc", "bcd", 3, 3),
    Change("abc", "ade", 2, 2),
    Change("a", "b", 1, 1),
    Change("ab", "abc", 2, 2),
    Change("abc", "ab", 2, 2),
]


def _joint_write(change: Change) -> JointWriteQuorum:
    return JointWriteQuorum(tuple(change.old), tuple(change.new), change.old_needed, change.new_needed)


def _joint_event(quorum: JointWriteQuorum, name: str, event: str) -> None:
    if event == REFUSED:
        quorum.add_failure(name, StorageFull("no"), maybe_stored=False)
    elif event == LOST:
        quorum.add_failure(name, LinkClosed("gone"), maybe_stored=True)
    else:
        quorum.add_ack(name, [(0, 100 + ord(name))] if event == NEWER else None)


def _joint_write_oracle(seen: dict[str, str], change: Change) -> object:
    """As `_write_oracle`, for two sets that both have to agree."""
    stored = [name for name, event in seen.items() if event in (ACK, NEWER)]
    short = again = waiting = hopeless = False
    for names, needed in change.halves:
        acks = sum(name in stored for name in names)
        good = sum(seen.get(name) == ACK for name in names)
        pending = sum(name not in seen for name in names)
        hopeless |= acks + pending < needed
        short |= acks < needed
        again |= good + pending < needed
        waiting |= good < needed
    if hopeless:
        if stored or LOST in seen.values():
            return "unknown"
        return "unavailable" if len(seen) == len(change.union) else "wait"
    if short:
        return "wait"
    if again:
        return max(100 + ord(name) for name, event in seen.items() if event == NEWER)
    return "wait" if waiting else 0


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_joint_write_needs_a_quorum_of_each_set_in_every_order(change: Change) -> None:
    for order in permutations(change.union) if len(change.union) < 5 else [change.union, change.union[::-1]]:
        for events in product((ACK, NEWER, REFUSED, LOST), repeat=len(order)):
            quorum = _joint_write(change)
            seen: dict[str, str] = {}
            for name, event in zip(order, events, strict=True):
                _joint_event(quorum, name, event)
                seen[name] = event
                expected, outcome = _joint_write_oracle(seen, change), quorum.step()
                if expected == "wait":
                    assert outcome is None, seen
                elif isinstance(expected, int):
                    assert outcome == Written([(0, expected)] if expected else []), seen
                else:
                    assert type(outcome) is (Unavailable if expected == "unavailable" else OutcomeUnknown), seen
                    assert isinstance(outcome, DHTError)
                    acks = [sum(seen.get(name) in (ACK, NEWER) for name in names) for names, _ in change.halves]
                    short = [(n, a) for (_, n), a in zip(change.halves, acks, strict=True) if a < n]
                    assert (outcome.needed, outcome.answered) in short, seen
            assert quorum.complete and quorum.step() is not None  # nothing waits for ever


def test_a_joint_write_is_unavailable_only_where_no_replica_of_either_set_can_hold_it() -> None:
    """At the deadline too, when some have not answered (D3)."""
    change = CHANGES[0]
    for count in range(5):
        for names in permutations(change.union, count):
            for events in product((ACK, REFUSED, LOST), repeat=count):
                quorum = _joint_write(change)
                for name, event in zip(names, events, strict=True):
                    _joint_event(quorum, name, event)
                certain = count == 4 and set(events) == {REFUSED}
                assert type(quorum.shortfall("late")) is (Unavailable if certain else OutcomeUnknown)


def test_a_joint_write_whose_new_set_cannot_be_reached_says_so() -> None:
    quorum = JointWriteQuorum(("a", "b", "c"), ("c", "d", "e"), 2, 2)
    for name in "de":
        assert not quorum.hopeless
        quorum.absent(name)
    assert quorum.hopeless
    error = quorum.unreachable(3)
    assert type(error) is Unavailable and (error.needed, error.answered) == (2, 1)
    quorum.maybe = 1  # an earlier try
    assert type(quorum.unreachable(3)) is OutcomeUnknown


def _joint_read(change: Change, *, repair: bool) -> JointReadQuorum:
    return JointReadQuorum(
        tuple(change.old), tuple(change.new), change.old_needed, change.new_needed if repair else 0, repair=repair
    )


@pytest.mark.parametrize("repair", [True, False])
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_joint_read_needs_a_quorum_of_each_set_in_every_order(change: Change, repair: bool) -> None:
    for order in permutations(change.union) if len(change.union) < 5 else [change.union, change.union[::-1]]:
        for events in product((*VALUES, "failed"), repeat=len(order)):
            _check_joint_read(dict(zip(order, events, strict=True)), change, repair)


def _check_joint_read(events: dict[str, object], change: Change, repair: bool) -> None:
    quorum = _joint_read(change, repair=repair)
    halves = [(names, needed if repair or names is change.old else 0) for names, needed in change.halves]
    answered: dict[str, bytes | None] = {}
    failed = 0
    for name, event in events.items():
        if event == "failed":
            failed += 1
            quorum.add_failure(name, LinkClosed("gone"))
        else:
            assert event is None or isinstance(event, bytes)
            answered[name] = event
            quorum.add_reply(name, [event])
        outcome = quorum.step()
        pending = set(events) - set(list(events)[: len(answered) + failed])
        counts = [(sum(n in answered for n in names), sum(n in pending for n in names)) for names, _ in halves]
        if any(have + more < needed for (have, more), (_, needed) in zip(counts, halves, strict=True)):
            short = [(needed, have) for (have, _), (_, needed) in zip(counts, halves, strict=True) if have < needed]
            assert type(outcome) is Unavailable and (outcome.needed, outcome.answered) in short, events
            return
        if any(have < needed for (have, _), (_, needed) in zip(counts, halves, strict=True)):
            assert outcome is None, events
            continue
        newest = _newest(list(answered.values()))
        stale = [n for n, value in answered.items() if value != newest]
        if not stale or not repair:
            assert outcome == Agreed([newest]), events
            return
        holders = set(answered) - set(stale)
        assert isinstance(outcome, Repair) and outcome.records == [newest], events
        assert outcome.stale == [(n, [0]) for n in stale]
        assert outcome.blocking == (not _held_by_both(holders, halves)), events
        for n in stale if outcome.blocking else ():
            late = quorum.shortfall("late")
            assert (late.needed, late.answered) in [
                (needed, len(holders & set(names))) for names, needed in halves if len(holders & set(names)) < needed
            ]
            holders.add(n)
            done = _held_by_both(holders, halves)
            assert quorum.add_repaired(n, [0]) == (Agreed([newest]) if done else None), events
            if done:
                return
        assert not outcome.blocking, "all stale replicas were repaired, and still no quorum"
        return
    raise AssertionError("never decided")


def _held_by_both(holders: set[str], halves: list[tuple[str, int]]) -> bool:
    return all(len(holders & set(names)) >= needed for names, needed in halves)
