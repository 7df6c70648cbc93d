"""The heights of arcs, against a model that keeps them token by token."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agi.core.dht.errors import StorageCorrupt
from agi.core.dht.protocol.floors import NONE, Floors, Height, is_dead, unpack
from agi.core.dht.protocol.record import SHRUNK, TOMBSTONE, pack, shrink
from agi.core.dht.protocol.versioning import from_ms

TOKENS = 40


@st.composite
def apart(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Spans in token order that have no token in common."""
    cuts = sorted(draw(st.sets(st.integers(0, TOKENS - 1), max_size=8)))
    return [(first, end - 1) for first, end in zip(cuts[::2], cuts[1::2], strict=False)]


heights = st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9)).map(
    lambda h: Height(h[0], min(h[0], h[1]), min(h))
)
steps = st.lists(st.tuples(st.sampled_from(["raise", "drop"]), apart(), heights), max_size=8)


def played(changes: list[tuple[str, list[tuple[int, int]], Height]]) -> tuple[Floors, list[Height]]:
    floors, model = Floors(), [NONE] * TOKENS
    for what, spans, to in changes:
        floors = floors.raised(spans, to) if what == "raise" else floors.without(spans)
        for first, last in spans:
            for token in range(first, last + 1):
                model[token] = model[token].over(to) if what == "raise" else NONE
    return floors, model


@given(steps)
def test_every_token_has_the_height_that_it_was_raised_to(
    changes: list[tuple[str, list[tuple[int, int]], Height]],
) -> None:
    floors, model = played(changes)
    assert [floors.at(token) for token in range(TOKENS)] == model
    for (_, last, height), (first, _, after) in zip(floors.spans, floors.spans[1:], strict=False):
        assert last < first
        assert last + 1 < first or height != after  # in as few spans as can be
    assert unpack(floors.packed).spans == floors.spans
    assert int.from_bytes(floors.mark, "big") == max((height.sealed + 1 for height in model), default=0) * any(
        height != NONE for height in model
    )


@given(steps, steps, apart())
def test_the_greater_of_two_and_a_part_of_one(
    one: list[tuple[str, list[tuple[int, int]], Height]],
    other: list[tuple[str, list[tuple[int, int]], Height]],
    spans: list[tuple[int, int]],
) -> None:
    floors, model = played(one)
    others, theirs = played(other)
    both = floors.over(others)
    assert [both.at(token) for token in range(TOKENS)] == [
        mine.over(their) for mine, their in zip(model, theirs, strict=True)
    ]
    part = floors.within(spans)
    inside = {token for first, last in spans for token in range(first, last + 1)}
    assert [part.at(token) for token in range(TOKENS)] == [
        height if token in inside else NONE for token, height in enumerate(model)
    ]


@pytest.mark.parametrize("data", [b"x", bytes(40) * 2, (9).to_bytes(8, "big") + bytes(32)])
def test_what_was_not_packed_is_refused(data: bytes) -> None:
    with pytest.raises(StorageCorrupt):
        unpack(data)


def test_the_mark_parts_records_at_a_seal_from_those_above() -> None:
    floors = Floors().raised([(0, 9)], Height(7, 0, 0))
    assert pack(b"k", b"v", hlc=7, writer=(1 << 64) - 1) < floors.mark < pack(b"k", b"", hlc=8, writer=0)
    assert pack(b"k", b"", hlc=0, writer=0) > Floors().mark


def test_what_is_dead_does_not_depend_on_a_clock_or_on_being_shrunk() -> None:
    version = from_ms(1000)
    assert is_dead(pack(b"k", b"", version, 1, flags=TOMBSTONE), version)
    assert not is_dead(pack(b"k", b"", version + 1, 1, flags=TOMBSTONE), version)
    assert not is_dead(pack(b"k", b"v", version, 1), version)
    expiring = pack(b"k", b"v", from_ms(900), 1, expires_ms=1000)
    later = pack(b"k", b"v", from_ms(900), 1, expires_ms=1001)
    assert is_dead(expiring, version) and is_dead(shrink(b"k", expiring), version)
    assert not is_dead(later, version) and not is_dead(shrink(b"k", later), version)
    assert shrink(b"k", later)[16] & SHRUNK
