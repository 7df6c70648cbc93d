"""The judge of histories, on small histories with known verdicts."""

from __future__ import annotations

import pytest

from agi.core.dht.testing import Action, Call, History, Outcome, check_history
from agi.core.dht.testing.checks import NEVER, check_scan
from agi.core.dht.types import Consistency


class Story:
    """Builds a history. Times are (invoked, returned); an unknown or failed call may have them too."""

    def __init__(self) -> None:
        self.history = History()

    def _add(self, action: Action, value: str | None, when: tuple[float, float], **more: object) -> Story:
        number = len(self.history.calls)
        raw = None if value is None else value.encode()
        fields = {"level": Consistency.QUORUM, "outcome": Outcome.OK, "limit_s": 100.0, "key": "k", **more}
        self.history.calls.append(
            Call(number=number, client="c", action=action, value=raw, invoked=when[0], returned=when[1], **fields)  # type: ignore[arg-type]
        )
        return self

    def put(self, value: str, *when: float, **more: object) -> Story:
        return self._add(Action.PUT, value, (when[0], when[1]), **more)

    def delete(self, *when: float, **more: object) -> Story:
        return self._add(Action.DELETE, None, (when[0], when[1]), **more)

    def get(self, value: str | None, *when: float, **more: object) -> Story:
        return self._add(Action.READ, value, (when[0], when[1]), **more)

    def verdict(self) -> list[str]:
        return [finding.check for finding in check_history(self.history)]


UNKNOWN = {"outcome": Outcome.UNKNOWN}
ONE = {"level": Consistency.ONE}

ALLOWED = {
    "a read after a write returns it": Story().put("a", 0, 1).get("a", 2, 3),
    "nothing before the first write": Story().get(None, 0, 1).put("a", 2, 3),
    "a read during a write may see it or not": Story().put("a", 0, 9).get("a", 1, 2).put("b", 10, 20).get("a", 11, 12),
    "concurrent writes are ordered either way": Story().put("a", 0, 5).put("b", 1, 4).get("a", 6, 7),
    "concurrent writes, the other way": Story().put("a", 0, 5).put("b", 1, 4).get("b", 6, 7),
    "an unknown write may appear late": Story().put("u", 0, 1, **UNKNOWN).put("a", 2, 3).get("a", 4, 5).get("u", 6, 7),
    "or never": Story().put("a", 0, 1).put("u", 2, 3, **UNKNOWN).get("a", 4, 5),
    "a delete hides a write": Story().put("a", 0, 1).delete(2, 3).get(None, 4, 5),
    "a delete of unknown outcome may have happened": Story().put("a", 0, 1).delete(2, 3, **UNKNOWN).get(None, 4, 5),
    "or not": Story().put("a", 0, 1).delete(2, 3, **UNKNOWN).get("a", 4, 5),
    "a delete under way may be seen": Story().put("a", 0, 1).delete(2, 9).get(None, 4, 5),
    "events of one moment are not ordered": Story().put("a", 0, 1).put("b", 1, 2).get("a", 2, 3),
    "keys have nothing to do with each other": Story().put("a", 0, 1).put("b", 2, 3, key="other").get("a", 4, 5),
    "a read at ONE may be behind": Story().put("a", 0, 1).put("b", 2, 3).get("a", 4, 5, **ONE),
    "a write at ONE promises nothing": Story().put("a", 0, 1).put("b", 2, 3, **ONE).get("a", 4, 5),
    "a failed read promises nothing": Story().put("a", 0, 1).get(None, 2, 3, outcome=Outcome.FAILED),
    "a put takes effect before a newer one, is read so by an older read, and then again": (
        Story().get("b", 0, 5).put("a", 1, 2, version=7).put("b", 3, 9, version=8).get("a", 6, 7).get("b", 10, 11)),
    "versions grow": Story().put("a", 0, 1, version=5).get("a", 2, 3, version=5).put("b", 4, 5, version=6),
    "versions of concurrent calls": Story().put("a", 0, 9, version=5).put("b", 1, 2, version=4),
    "a call that ends just by its deadline": Story().get(None, 0, 100),
}  # fmt: skip

FORBIDDEN = {
    "an acknowledged write is lost": (Story().put("a", 0, 1).get(None, 2, 3), "order"),
    "an older value is read": (Story().put("a", 0, 1).put("b", 2, 3).get("a", 4, 5), "order"),
    "a read goes back behind a read": (
        Story().put("a", 0, 1).put("u", 2, 3, **UNKNOWN).get("u", 4, 5).get("a", 6, 7), "order"),
    "behind a read of the version that was acknowledged": (
        Story().get("b", 0, 5, version=8).put("a", 1, 2, version=7).put("b", 3, 9, version=8).get("a", 6, 7), "order"),
    "an unknown write that was seen is lost": (
        Story().put("u", 0, 1, **UNKNOWN).get("u", 2, 3).get(None, 4, 5), "order"),
    "a deleted key is back": (Story().put("a", 0, 1).delete(2, 3).get("a", 4, 5), "order"),
    "an old delete hides a newer write": (Story().delete(0, 1).put("a", 2, 3).get(None, 4, 5), "order"),
    "a future delete is seen": (Story().put("a", 0, 1).get(None, 2, 3).delete(4, 5), "order"),
    "a failed delete is seen": (Story().put("a", 0, 1).delete(2, 3, outcome=Outcome.FAILED).get(None, 4, 5), "order"),
    "a value from nowhere": (Story().put("a", 0, 1).get("x", 2, 3), "origin"),
    "a value from nowhere, at ONE": (Story().get("x", 2, 3, **ONE), "origin"),
    "a value of another key": (Story().put("a", 0, 1, key="other").get("a", 2, 3), "origin"),
    "a value from the future": (Story().get("a", 0, 1).put("a", 2, 3), "origin"),
    "a write that was reported as not stored": (
        Story().put("a", 0, 1, outcome=Outcome.FAILED).get("a", 2, 3), "origin"),
    "a version goes back from read to read": (
        Story().put("a", 0, 9).get("a", 1, 2, version=5).get("a", 3, 4, version=4), "version"),
    "by one step of the counter, at today's clock": (
        Story().put("a", 0, 9).get("a", 1, 2, version=2**57 + 1).get("a", 3, 4, version=2**57), "version"),
    "a write is acknowledged below an earlier one": (
        Story().put("a", 0, 1, version=5).put("b", 2, 3, version=4), "version"),
    "a call is late": (Story().get(None, 0, 100.1), "deadline"),
    "a call does not return": (Story().get(None, 0, NEVER, outcome=Outcome.PENDING), "deadline"),
}  # fmt: skip


@pytest.mark.parametrize("name", ALLOWED)
def test_an_allowed_history_has_no_finding(name: str) -> None:
    assert ALLOWED[name].verdict() == []


@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_forbidden_history_is_found(name: str) -> None:
    story, check = FORBIDDEN[name]
    assert story.verdict() == [check]


def test_acknowledged_counts_writes_of_a_quorum() -> None:
    story = Story().put("a", 0, 1).delete(2, 3).put("b", 4, 5, **ONE).put("c", 6, 7, **UNKNOWN).get("a", 8, 9)
    assert story.history.acknowledged() == 2


def test_a_finding_names_the_calls() -> None:
    text = str(check_history(Story().put("a", 0, 1).put("b", 2, 3).get("a", 4, 5).history)[0])
    assert text.startswith("order: #2 c read k a ok [4.000000, 5.000000] returned #0 c put k a ok")


@pytest.mark.parametrize(
    ("found", "good"),
    [
        ([("a", b"1"), ("b", b"2")], True),
        ([("b", b"2"), ("a", b"1")], False),
        ([("a", b"1")], False),
        ([("a", b"1"), ("b", b"3")], False),
        ([("a", b"1"), ("b", b"2"), ("c", b"4")], False),
        ([("a", b"1"), ("a", b"1"), ("b", b"2")], False),
    ],
)
def test_a_scan_at_rest_is_the_live_set_in_order(found: list[tuple[str, bytes]], good: bool) -> None:
    assert (check_scan(found, {"a": b"1", "b": b"2"}) == []) is good
