"""The quorum cores against naive oracles, over every order of every reply of up to five replicas."""

from __future__ import annotations

from itertools import permutations, product

import pytest

from agi.core.dht.errors import ClockSkew, DHTError, LinkClosed, OutcomeUnknown, StorageFull, Unavailable
from agi.core.dht.protocol.quorum import Agreed, ReadQuorum, Repair, WriteQuorum, Written, merge

ACK, NEWER, REFUSED, LOST = "ANRL"
"""A replica stored both keys; holds something newer of key 0; refused without storing; may have stored or not."""


def _apply(quorum: WriteQuorum, place: int, event: str) -> None:
    if event == ACK:
        quorum.add_ack(None)
    elif event == NEWER:
        quorum.add_ack([(0, 100 + place)])
    elif event == REFUSED:
        quorum.add_failure(StorageFull("no"), maybe_stored=False)
    else:
        quorum.add_failure(LinkClosed("gone"), maybe_stored=True)


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


def test_an_earlier_stamp_makes_the_outcome_unknown() -> None:
    quorum = WriteQuorum(2, 3)
    assert type(quorum.unreachable(1)) is Unavailable
    quorum.maybe = 1
    error = quorum.unreachable(1)
    assert type(error) is OutcomeUnknown and (error.needed, error.answered) == (2, 1)


def test_an_error_names_its_last_reason() -> None:
    quorum = WriteQuorum(2, 2)
    quorum.add_failure(LinkClosed("n1 was lost"), maybe_stored=True)
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
            quorum.add_failure(LinkClosed("gone"))
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
    for _ in range(3):
        quorum.add_failure(ClockSkew("the version is ahead"), maybe_stored=False)
    assert type(quorum.step()) is ClockSkew
    quorum = WriteQuorum(2, 3)
    quorum.add_failure(ClockSkew("the version is ahead"), maybe_stored=False)
    quorum.add_failure(LinkClosed("gone"), maybe_stored=True)
    assert type(quorum.step()) is OutcomeUnknown
