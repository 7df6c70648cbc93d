"""The table of known writes: bounded by keys, oldest out first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agi.core.dht.protocol.dedup import RequestTable


def test_a_batch_is_known_by_client_and_number() -> None:
    table: RequestTable[str] = RequestTable(10)
    table.add("a", 1, "running", 1)
    assert table.get("a", 1) == "running"
    assert table.get("b", 1) is None and table.get("a", 2) is None
    table.update("a", 1, "answer")
    assert table.get("a", 1) == "answer"
    table.update("a", 2, "answer")  # unknown: not remembered after all
    assert table.get("a", 2) is None


def test_the_oldest_leave_and_a_late_answer_does_not_bring_them_back() -> None:
    table: RequestTable[str] = RequestTable(5)
    for number in range(4):
        table.add("a", number, str(number), 2)
    assert [table.get("a", number) for number in range(4)] == [None, None, "2", "3"]
    table.update("a", 0, "late")
    assert table.get("a", 0) is None


def test_a_batch_above_the_bound_is_remembered_alone() -> None:
    table: RequestTable[str] = RequestTable(5)
    table.add("a", 1, "small", 1)
    table.add("a", 2, "large", 100)
    assert table.get("a", 1) is None and table.get("a", 2) == "large"
    table.add("a", 3, "small", 1)
    assert table.get("a", 2) is None and table.get("a", 3) == "small"


def test_a_dropped_batch_is_unknown_and_takes_no_room() -> None:
    table: RequestTable[str] = RequestTable(5)
    table.add("a", 1, "kept", 1)
    table.add("a", 2, "dropped", 4)
    table.drop("a", 2)
    table.drop("a", 2)
    table.drop("b", 1)
    table.add("a", 3, "large", 4)
    assert [table.get("a", number) for number in (1, 2, 3)] == ["kept", None, "large"]


@given(st.lists(st.integers(1, 8), max_size=60), st.integers(1, 20))
def test_it_holds_the_latest_batches_that_fit(sizes: list[int], keys_max: int) -> None:
    table: RequestTable[int] = RequestTable(keys_max)
    expected: list[int] = []
    for number, size in enumerate(sizes):
        table.add("a", number, number, size)
        expected.append(number)
        while sum(sizes[known] for known in expected) > keys_max and len(expected) > 1:
            del expected[0]
        assert [known for known in range(number + 1) if table.get("a", known) is not None] == expected
