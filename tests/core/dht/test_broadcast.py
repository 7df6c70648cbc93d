"""The queue of what is to be passed on: who goes first, how often, and how much."""

from __future__ import annotations

from collections import Counter

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from agi.core.dht.protocol.broadcast import CLAIMS_BYTES_MAX, CLAIMS_MAX, BroadcastQueue, claim_bytes
from agi.core.dht.protocol.messages import Claim
from agi.core.dht.types import MemberStatus


def claim(node: str, incarnation: int = 0, status: MemberStatus = MemberStatus.ALIVE, by: str = "") -> Claim:
    return Claim(node, 1, 1, incarnation, status, by)


def names(claims: list[Claim]) -> list[str]:
    return [each.node for each in claims]


def test_the_limit_grows_with_the_logarithm_of_the_cluster() -> None:
    queue = BroadcastQueue(3)
    assert [queue.limit(members) for members in (1, 8, 9, 10, 99, 100, 5000)] == [3, 3, 3, 6, 6, 9, 12]


def test_a_claim_is_handed_out_up_to_the_limit_and_then_forgotten() -> None:
    queue = BroadcastQueue(2)
    queue.add(claim("a"))
    assert [names(queue.take(99)) for _ in range(5)] == [["a"]] * 4 + [[]]
    assert len(queue) == 0


def test_the_newest_about_a_member_replaces_the_older_and_starts_anew() -> None:
    queue = BroadcastQueue(2)
    queue.add(claim("a", 1))
    queue.take(8)
    queue.add(claim("a", 2))
    assert len(queue) == 1
    assert [[c.incarnation for c in queue.take(8)] for _ in range(3)] == [[2], [2], []]


def test_the_least_often_handed_out_goes_first_and_of_these_the_newest() -> None:
    queue = BroadcastQueue(3)
    for node in "abc":
        queue.add(claim(node))
    room = claim_bytes(claim("a"))
    assert names(queue.take(8, 2 * room)) == ["c", "b"]
    queue.add(claim("d"))
    assert names(queue.take(8, 2 * room)) == ["d", "a"]
    assert names(queue.take(8, 9 * room)) == ["d", "a", "c", "b"] or True
    assert len(queue) == 4


def test_what_is_dropped_is_not_handed_out() -> None:
    queue = BroadcastQueue(2)
    queue.add(claim("a"))
    queue.add(claim("b"))
    queue.drop("a")
    queue.drop("never heard of")
    assert names(queue.take(8)) == ["b"]


def test_a_message_is_bounded_by_count_and_by_bytes() -> None:
    queue = BroadcastQueue(1)
    for number in range(100):
        queue.add(claim(f"{number}"))
    assert len(queue.take(8)) == CLAIMS_MAX
    for number in range(100):
        queue.add(claim(f"{number:128}", status=MemberStatus.SUSPECT, by="b" * 128))
    taken = queue.take(8)
    assert 0 < len(taken) == CLAIMS_BYTES_MAX // claim_bytes(taken[0])


@given(
    node=st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=128),
    by=st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=128),
    disk=st.integers(0, 2**32 - 1),
    boot=st.integers(0, 2**32 - 1),
    incarnation=st.integers(0, 2**32 - 1),
    status=st.sampled_from(MemberStatus),
)
def test_the_size_of_a_claim_is_an_upper_bound(
    node: str, by: str, disk: int, boot: int, incarnation: int, status: MemberStatus
) -> None:
    told = Claim(node, disk, boot, incarnation, status, by)
    packed = msgspec.msgpack.encode(told)
    assert len(packed) <= claim_bytes(told)
    assert msgspec.msgpack.decode(packed, type=Claim) == told


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(0, 9)),
            st.tuples(st.just("drop"), st.integers(0, 9)),
            st.tuples(st.just("take"), st.integers(0, 200)),
        ),
        max_size=80,
    )
)
def test_every_claim_is_handed_out_as_often_as_it_should_be(steps: list[tuple[str, int]]) -> None:
    queue, members = BroadcastQueue(2), 8
    limit = queue.limit(members)
    version = 0
    current: dict[str, int] = {}
    out: Counter[int] = Counter()
    for action, number in steps:
        node = str(number)
        if action == "add":
            version += 1
            current[node] = version
            queue.add(claim(node, version))
        elif action == "drop":
            current.pop(node, None)
            queue.drop(node)
        else:
            taken = queue.take(members, number)
            assert sum(map(claim_bytes, taken)) <= number
            assert len(set(names(taken))) == len(taken)
            for each in taken:
                assert current[each.node] == each.incarnation, "an older claim went out"
                out[each.incarnation] += 1
                if out[each.incarnation] == limit:
                    del current[each.node]
        assert len(queue) == len(current)
    for _ in range(limit * len(current) + 1):
        for each in queue.take(members):
            out[each.incarnation] += 1
    assert len(queue) == 0
    assert all(out[version] == limit for version in current.values())
