"""The judgement of chaos runs: every kind of broken promise is noticed, and what is allowed is let be."""

from __future__ import annotations

from collections import Counter

import pytest

from agi.core.dht.testing.chaos import plan
from agi.core.dht.testing.chaos.auditor import Auditor, Held, Kind, Outcome, Write
from agi.core.dht.testing.chaos.plan import Fault
from agi.core.dht.testing.chaos.report import Journal, Tally, quantile

KEY = "k"
ABSENT = {name: Held("absent") for name in ("n0", "n1", "n2")}


class Story:
    """One key, told step by step; time passes by itself."""

    def __init__(self) -> None:
        self.auditor = Auditor()
        self._now = 0.0

    @property
    def now(self) -> float:
        self._now += 1.0
        return self._now

    def put(self, value: bytes, outcome: Outcome = Outcome.OK, version: int = 0) -> Write:
        write = self.auditor.begin(KEY, value, self.now)
        self.auditor.settle(write, outcome, self.now, version)
        return write

    def delete(self, outcome: Outcome = Outcome.OK) -> Write:
        write = self.auditor.begin(KEY, None, self.now)
        self.auditor.settle(write, outcome, self.now)
        return write

    def read(self, value: bytes | None, version: int = 0) -> None:
        self.auditor.read(KEY, value, version, self.now)

    def final(self, value: bytes | None, version: int = 0, replicas: dict[str, Held] | None = None) -> None:
        held = Held("live", version, 9) if value is not None else Held("tombstone", 1 << 60, 9)
        self.auditor.final(KEY, value, version, replicas or dict.fromkeys(ABSENT, held), self.now)

    @property
    def kinds(self) -> list[Kind]:
        return [violation.kind for violation in self.auditor.violations]


@pytest.fixture
def story() -> Story:
    return Story()


# --- what is allowed


def test_what_was_acknowledged_last_is_there(story: Story) -> None:
    story.put(b"a", version=10)
    story.read(b"a", 10)
    story.put(b"b", version=20)
    story.final(b"b", 20)
    assert story.kinds == []
    assert (story.auditor.reads, story.auditor.checked, story.auditor.acknowledged()) == (1, 1, 2)


def test_a_deleted_key_is_gone(story: Story) -> None:
    story.put(b"a", version=10)
    story.delete()
    story.read(None)
    story.final(None)
    assert story.kinds == []


def test_a_key_that_was_never_acknowledged_may_be_absent(story: Story) -> None:
    story.put(b"a", Outcome.UNKNOWN)
    story.put(b"b", Outcome.FAILED)
    story.final(None, replicas=ABSENT)
    assert story.kinds == []


@pytest.mark.parametrize("seen", [True, False])
def test_a_later_write_of_unknown_outcome_may_be_there_or_not(story: Story, seen: bool) -> None:
    story.put(b"a", version=10)
    story.put(b"b", Outcome.UNKNOWN)
    story.final(*((b"b", 20) if seen else (b"a", 10)))
    assert story.kinds == []
    assert story.auditor.late == 0


@pytest.mark.parametrize("held", [Held("absent"), Held("tombstone", 11, 5)])
def test_a_delete_of_unknown_outcome_may_have_happened(story: Story, held: Held) -> None:
    """Its tombstone may have been reclaimed since."""
    story.put(b"a", version=10)
    story.delete(Outcome.UNKNOWN)
    story.final(None, replicas=dict.fromkeys(ABSENT, held))
    assert story.kinds == []


def test_a_write_of_unknown_outcome_may_come_after_later_ones_and_is_counted(story: Story) -> None:
    story.put(b"a", Outcome.UNKNOWN)
    story.put(b"b", version=20)
    story.read(b"a", 21)
    story.final(b"a", 21)
    assert story.kinds == []
    assert story.auditor.late == 1


def test_a_write_of_unknown_outcome_may_come_after_a_delete(story: Story) -> None:
    story.put(b"a", version=10)
    story.put(b"b", Outcome.UNKNOWN)
    story.delete()
    story.final(b"b", 21)
    assert story.kinds == []
    assert story.auditor.late == 1


def test_a_call_that_never_ended_counts_as_unknown(story: Story) -> None:
    story.put(b"a", version=10)
    story.auditor.begin(KEY, b"b", story.now)
    story.final(b"b", 11)
    assert story.kinds == []


def test_the_version_of_an_acknowledged_write_may_be_learnt_by_reading(story: Story) -> None:
    story.put(b"a", version=10)
    story.put(b"b")  # in a batch of which another part failed
    story.read(b"b", 20)
    story.final(b"b", 20)
    assert story.kinds == []


# --- what is not


def test_a_lost_write_is_noticed(story: Story) -> None:
    story.put(b"a", version=10)
    story.put(b"b", version=20)
    story.final(b"a", 10)
    assert story.kinds == [Kind.LOST]
    assert "put #1" in story.auditor.violations[0].text and "put #2" in story.auditor.violations[0].text


def test_a_write_that_left_nothing_is_noticed(story: Story) -> None:
    story.put(b"a", version=10)
    story.final(None, replicas=ABSENT)
    assert story.kinds == [Kind.LOST]


def test_a_lost_write_of_unknown_version_is_noticed(story: Story) -> None:
    story.put(b"a", version=10)
    story.put(b"b")
    story.final(b"a", 10)
    assert story.kinds == [Kind.LOST]


@pytest.mark.parametrize("held", [Held("tombstone", 9, 5), Held("tombstone", 10, 5), Held("live", 10, 9)])
def test_an_uncertain_delete_does_not_hide_a_loss(story: Story, held: Held) -> None:
    story.put(b"a", version=10)
    story.delete(Outcome.UNKNOWN)
    story.final(None, replicas=dict.fromkeys(ABSENT, held))
    assert story.kinds == [Kind.LOST]


def test_an_uncertain_write_does_not_hide_a_loss(story: Story) -> None:
    story.put(b"a", Outcome.UNKNOWN)
    story.put(b"b", version=20)
    story.final(b"a", 19)
    assert story.kinds == [Kind.LOST]


def test_what_a_read_has_shown_may_not_go_away_again(story: Story) -> None:
    story.put(b"a", version=10)
    story.put(b"b", Outcome.UNKNOWN)
    story.read(b"b", 20)
    story.final(b"a", 10)
    assert story.kinds == [Kind.LOST]


@pytest.mark.parametrize("at_the_end", [True, False])
def test_a_resurrected_value_is_noticed(story: Story, at_the_end: bool) -> None:
    story.put(b"a", version=10)
    story.delete()
    (story.final if at_the_end else story.read)(b"a", 10)
    assert story.kinds == [Kind.RESURRECTED]


def test_a_value_that_comes_back_after_a_read_found_nothing_is_noticed(story: Story) -> None:
    story.put(b"a", version=10)
    story.delete(Outcome.UNKNOWN)
    story.read(None)
    story.read(b"a", 10)
    assert story.kinds == [Kind.RESURRECTED]


@pytest.mark.parametrize(("value", "version"), [(b"a", 10), (None, 0)])
def test_a_stale_read_is_noticed(story: Story, value: bytes | None, version: int) -> None:
    story.put(b"a", version=10)
    story.put(b"b", version=20)
    story.read(value, version)
    assert story.kinds == [Kind.STALE]


def test_a_value_that_nobody_wrote_is_noticed(story: Story) -> None:
    story.put(b"a", version=10)
    story.read(b"x", 11)
    assert story.kinds == [Kind.PHANTOM]


def test_a_value_that_was_reported_as_not_written_is_noticed(story: Story) -> None:
    story.put(b"a", version=10)
    story.put(b"b", Outcome.FAILED)
    story.final(b"b", 20)
    assert story.kinds == [Kind.PHANTOM]


def test_versions_that_go_back_are_noticed(story: Story) -> None:
    story.put(b"a", version=20)
    story.put(b"b", version=20)
    assert story.kinds == [Kind.ORDER]


def test_a_write_that_changes_its_version_is_noticed(story: Story) -> None:
    story.put(b"a", version=10)
    story.read(b"a", 11)
    assert story.kinds == [Kind.ORDER]


@pytest.mark.parametrize(
    "third",
    [Held("live", 9, 9), Held("absent"), Held("unreachable"), Held("tombstone", 10, 9), Held("live", 10, 8)],
)
def test_unequal_replicas_are_noticed(story: Story, third: Held) -> None:
    story.put(b"a", version=10)
    story.final(b"a", 10, {"n0": Held("live", 10, 9), "n1": Held("live", 10, 9), "n2": third})
    assert story.kinds == [Kind.UNEQUAL]
    assert "n2" in story.auditor.violations[0].text


def test_replicas_that_nobody_could_name_are_noticed(story: Story) -> None:
    story.put(b"a", version=10)
    story.auditor.final(KEY, b"a", 10, {}, story.now)
    assert story.kinds == [Kind.UNEQUAL]


def test_a_scan_that_differs_from_the_reads_is_noticed(story: Story) -> None:
    read = {"a": b"1", "b": None, "c": b"3", "d": b"4"}
    story.auditor.scanned({"a": b"1", "b": b"2", "c": b"x"}, read, story.now)
    assert [(each.kind, each.subject) for each in story.auditor.violations] == [(Kind.SCAN, key) for key in "bcd"]
    assert story.auditor.tally() == {Kind.SCAN: 3}


# --- plans


def test_a_seed_is_a_plan() -> None:
    first, again, other = (plan.draw(seed, 120) for seed in (7, 7, 8))
    assert first == again != other


@pytest.mark.parametrize("without", [frozenset(), plan.NAMESPACES, plan.POWER, plan.MEMBERS | {Fault.SKEW}])
def test_a_plan_of_two_minutes_has_every_fault_and_ends_in_time(without: frozenset[Fault]) -> None:
    for seed in range(50):
        steps = [step for lane in plan.draw(seed, 120, without=without).values() for step in lane]
        assert {step.fault for step in steps} == set(Fault) - without
        assert all(step.at_s > 0 and step.at_s + step.lasts_s < 120 for step in steps)


def test_whoever_is_frozen_loses_every_lease_meanwhile() -> None:
    frozen = {Fault.FREEZE, Fault.HOLDER_FREEZE}
    for seed in range(50):
        steps = [step for lane in plan.draw(seed, 120).values() for step in lane if step.fault in frozen]
        assert steps and all(step.lasts_s > plan.LEASE_S for step in steps)


# --- the report


def test_the_longest_time_without_an_acknowledgement_counts_to_the_end() -> None:
    tally = Tally()
    tally.begin(10.0)
    for now in (11.0, 14.0, 15.0):
        tally.acknowledged("put", now, 0.1)
    assert (tally.gap_s, tally.gap_ended_s) == (3.0, 14.0)
    tally.end(19.0)
    assert (tally.gap_s, tally.gap_ended_s) == (4.0, 19.0)


def test_quantiles() -> None:
    assert quantile([], 0.5) == 0.0
    assert [quantile(list(range(100)), share) for share in (0.5, 0.99, 1.0)] == [50, 99, 99]


def test_the_report_tells_of_violations(story: Story) -> None:
    said: list[str] = []
    journal = Journal(lambda: 0.0, None, said.append)
    story.put(b"a", version=10)
    story.read(None)
    journal.absent["skew"] = "no library"
    journal.histories["cas"] = Counter(ok=2, refused=1, info=3, pending=1)
    table = journal.table(story.auditor, 1, 3)
    assert "VIOLATED" in table and "seed 1, 3 nodes" in table and "not possible here: skew: no library" in table
    assert next(line.split() for line in table.splitlines() if line.startswith("cas ")) == [
        "cas",
        *map(str, (7, 2, 1, 4, 0)),
    ]
    assert journal.summary(story.auditor, 1, 3)["violations"] == {kind.value: int(kind is Kind.STALE) for kind in Kind}
    journal.fault(Fault.LEAVE, "n1", 0.0, "ChangeRefused: another one is under way")
    journal.fault(Fault.KILL, "", 0.0, "skipped: no node")
    assert (journal.faults, journal.skipped) == ({Fault.LEAVE: 1}, {Fault.KILL: 1})
    assert journal.members == {"leave ChangeRefused": 1}
    assert len(said) == 2
