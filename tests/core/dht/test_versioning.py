"""The hybrid logical clock: it never goes back, never gives a version twice, and stays near the wall clock."""

from __future__ import annotations

import doctest
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agi.core.dht.protocol import versioning
from agi.core.dht.protocol.versioning import COUNTER_BITS, HLC, HLC_MAX, from_ms, node_hash, physical_ms, writer_id

NOW = 1_700_000_000_000
walls = st.integers(0, 1 << 47)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("tick"), walls, st.integers(1, 100_000)),
        st.tuples(st.just("observe"), st.integers(0, HLC_MAX >> 1), st.just(0)),
    ),
    max_size=30,
)


@given(steps)
def test_every_version_is_greater_than_all_given_and_seen_before(events: list[tuple[str, int, int]]) -> None:
    clock, greatest = HLC(), -1
    for what, number, count in events:
        if what == "observe":
            clock.observe(number)
            greatest = max(greatest, number)
        else:
            first = clock.tick(number, count)
            assert first > greatest
            assert physical_ms(first) >= number
            greatest = first + count - 1
        assert clock.last == max(greatest, 0)


@given(st.lists(st.tuples(walls, st.integers(1, 200_000)), max_size=20))
def test_reserved_ranges_do_not_overlap(ticks: list[tuple[int, int]]) -> None:
    clock = HLC()
    ranges = [(clock.tick(now, count), count) for now, count in ticks]
    for (first, count), (following, _) in pairwise(ranges):
        assert following >= first + count


def test_tick_follows_the_wall_clock_and_counts_where_it_stands_still_or_goes_back() -> None:
    clock = HLC()
    assert clock.tick(NOW) == from_ms(NOW)
    assert clock.tick(NOW) == from_ms(NOW) + 1
    assert clock.tick(NOW - 5000) == from_ms(NOW) + 2
    assert clock.tick(NOW + 1) == from_ms(NOW + 1)


def test_a_full_counter_carries_into_the_milliseconds() -> None:
    clock = HLC()
    first = clock.tick(NOW, count=1 << COUNTER_BITS)
    assert first == from_ms(NOW)
    assert clock.tick(NOW) == from_ms(NOW + 1)


def test_observe_raises_and_never_lowers() -> None:
    clock = HLC(last=50)
    clock.observe(40)
    assert clock.last == 50
    clock.observe(from_ms(NOW) + 7)
    assert clock.tick(NOW - 1000) == from_ms(NOW) + 8


def test_a_restart_goes_on_from_what_was_stored() -> None:
    clock = HLC()
    before = clock.tick(NOW, 10)
    assert HLC(clock.last).tick(NOW - 60_000) == before + 10


def test_limit_is_measured_from_the_wall_clock_or_what_was_seen() -> None:
    clock = HLC()
    assert clock.limit(NOW, 500) == from_ms(NOW + 500)
    clock.observe(from_ms(NOW + 10_000) + 3)
    assert clock.limit(NOW, 500) == from_ms(NOW + 10_500) + 3  # a clock that stepped back does not stop all writes
    assert clock.last == from_ms(NOW + 10_000) + 3


@given(st.integers(0, (1 << 48) - 1), st.integers(0, (1 << COUNTER_BITS) - 1))
def test_milliseconds_of_a_version(ms: int, counter: int) -> None:
    version = from_ms(ms) + counter
    assert physical_ms(version) == ms
    assert 0 <= version <= HLC_MAX


# --- writers


@given(st.text(min_size=1, max_size=20), st.integers(0, (1 << 32) - 2))
def test_writer_ids_of_a_node_are_ordered_by_boot(node_id: str, boot: int) -> None:
    assert writer_id(node_id, boot) < writer_id(node_id, boot + 1)
    assert writer_id(node_id, boot) >> 32 == node_hash(node_id)
    assert writer_id(node_id, boot) & 0xFFFFFFFF == boot


@pytest.mark.parametrize(("node_id", "number"), [("", 0x02CC5D05), ("n1", 0xAAE5FBC0)])
def test_node_hash_stays_the_same_across_versions(node_id: str, number: int) -> None:
    assert node_hash(node_id) == number


def test_writer_ids_fit_their_field() -> None:
    assert 0 <= writer_id("n1", (1 << 32) - 1) < 1 << 64
    assert writer_id("n1", (1 << 32) + 3) == writer_id("n1", 3)


def test_doctest() -> None:
    result = doctest.testmod(versioning)
    assert result.attempted > 0 and result.failed == 0
