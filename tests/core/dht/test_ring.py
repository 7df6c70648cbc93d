"""The ring: determinism, minimal movement, spread, weights, and a lookup that equals brute force."""

from __future__ import annotations

import doctest
import hashlib
import json
import random
import runpy
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from agi.core.dht import ring as ring_module
from agi.core.dht.errors import ConfigError, InvalidKey, InvalidRequest, Unavailable
from agi.core.dht.protocol.versioning import node_hash
from agi.core.dht.ring import HASH_ALGORITHMS, TOKENS, HashRing, Partition, Ring, check_node_hashes, token_bytes
from agi.core.dht.types import Node

REPOSITORY = Path(__file__).parents[3]
KEYS = [f"agent:{i}".encode() for i in range(2000)]

algorithms = st.sampled_from(HASH_ALGORITHMS)


def node(
    name: str, *, zone: str = "", rack: str = "", weight: float = 1.0, virtual_nodes: int = 150, port: int = 7000
) -> Node:
    labels = {label: value for label, value in (("zone", zone), ("rack", rack)) if value}
    return Node(name, "127.0.0.1", port, weight, virtual_nodes, labels)


@st.composite
def members(draw: st.DrawFn, min_size: int = 1, labels: bool = True) -> list[Node]:
    names = draw(st.lists(st.text("abc#:01", min_size=1, max_size=4), min_size=min_size, max_size=9, unique=True))
    zones = st.sampled_from(["", "z1", "z2", "z3"] if labels else [""])
    racks = st.sampled_from(["", "r1", "r2"] if labels else [""])
    return [
        node(name, zone=draw(zones), rack=draw(racks), virtual_nodes=draw(st.integers(1, 12)), weight=draw(weights))
        for name in names
    ]


weights = st.sampled_from([0.01, 0.5, 1.0, 1.7, 3.0])


def brute_force(nodes: list[Node], algorithm: str, key: bytes, count: int) -> list[str]:
    """The rules of docs/ring.md, as literally as can be."""

    def digest(data: bytes) -> int:
        raw = hashlib.md5(data).digest() if algorithm == "md5" else xxhash.xxh3_64(data).digest()
        return int.from_bytes(raw[:8], "big")

    points = [
        (digest(f"{n.node_id}#{v}".encode()), n.node_id, v)
        for n in nodes
        for v in range(max(1, round(n.virtual_nodes * n.weight)))
    ]
    points.sort()
    token = digest(key)
    clockwise = [p for p in points if p[0] >= token] + [p for p in points if p[0] < token]
    walk = list(dict.fromkeys(name for _, name, _ in clockwise))
    by_name = {n.node_id: n for n in nodes}

    def zone(name: str) -> str:
        return by_name[name].metadata.get("zone", "")

    def rack(name: str) -> tuple[str, str]:
        return zone(name), by_name[name].metadata.get("rack", "")

    chosen: list[str] = []
    while walk and len(chosen) < count:
        best = min(
            walk,
            key=lambda name: (
                sum(zone(other) == zone(name) for other in chosen),
                sum(rack(other) == rack(name) for other in chosen),
                walk.index(name),
            ),
        )
        walk.remove(best)
        chosen.append(best)
    return chosen


# --- lookups


@settings(max_examples=150, deadline=None)
@given(members(), algorithms, st.integers(1, 5), st.lists(st.binary(min_size=1, max_size=9), min_size=1, max_size=8))
def test_lookup_equals_brute_force(nodes: list[Node], algorithm: str, factor: int, keys: list[bytes]) -> None:
    ring = Ring(nodes, algorithm, factor)
    for key in keys:
        expected = brute_force(nodes, algorithm, key, factor)
        if len(nodes) > factor:
            assert list(ring.replicas(key)) == expected
        else:
            assert list(ring.replicas(key)) == sorted(expected) == sorted(n.node_id for n in nodes)
        assert ring.replicas_at(ring.token(key)) == ring.replicas(key)
        for count in (1, factor, len(nodes) + 1):
            assert list(ring.preference(key, count)) == brute_force(nodes, algorithm, key, count)
        assert list(ring.partition(key).replicas) == expected


@settings(max_examples=100, deadline=None)
@given(members(), algorithms, st.integers(1, 5), st.randoms(use_true_random=False))
def test_join_order_does_not_matter(nodes: list[Node], algorithm: str, factor: int, rng: random.Random) -> None:
    shuffled = nodes[:]
    rng.shuffle(shuffled)
    one, other = Ring(nodes, algorithm, factor), Ring(shuffled, algorithm, factor)
    assert list(one.partitions()) == list(other.partitions())
    assert one.nodes == other.nodes


@settings(max_examples=100, deadline=None)
@given(members(), st.integers(1, 5))
def test_replicas_are_distinct_and_as_many_as_can_be(nodes: list[Node], factor: int) -> None:
    ring = Ring(nodes, "xxh3", factor)
    for part in ring.partitions():
        assert len(set(part.replicas)) == len(part.replicas) == min(factor, len(nodes))
        assert set(ring.replicas_at(part.last)) == set(part.replicas)


def test_points_of_equal_token_are_ordered_by_node_id_and_own_one_arc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ring_module._HASHES, "xxh3", lambda data: bytes(7) + b"\x05")
    ring = Ring([node(name, virtual_nodes=2) for name in "cba"], "xxh3", 2)
    whole = Partition(6, 5, ("a", "b"))
    assert list(ring.partitions()) == [whole] and whole.width == TOKENS
    assert ring.partition(b"any") == whole and ring.replicas(b"any") == ("a", "b")
    assert ring.ownership() == {"a": 1.0, "b": 0.0, "c": 0.0}


@pytest.mark.parametrize("algorithm", HASH_ALGORITHMS)
def test_a_key_that_hashes_onto_a_point_belongs_to_its_node(algorithm: str) -> None:
    ring = Ring([node(name) for name in "abcd"], algorithm, 2)
    for name in "abcd":
        key = f"{name}#7".encode()
        assert ring.replicas(key)[0] == ring.preference(key, 1)[0] == ring.partition(key).replicas[0] == name
        assert ring.replicas_at(ring.token(key)) == ring.replicas(key)
        assert ring.partition(key).last == ring.token(key)


def test_golden_ring_stays_the_same_across_versions() -> None:
    """A cluster in use relies on these: whoever changes them moves every key."""
    nodes = [node(f"n{i}", zone=f"z{i % 2}", rack=f"r{i}") for i in range(6)]
    keys = (b"agent:1", b"plan:2", b"lock:\xf0\x9f\x94\x92")
    found = {algorithm: [Ring(nodes, algorithm).replicas(key) for key in keys] for algorithm in HASH_ALGORITHMS}
    assert found == GOLDEN
    assert token_bytes("md5")(b"agent:1") == hashlib.md5(b"agent:1").digest()[:8]
    assert token_bytes("xxh3")(b"").hex() == "2d06800538d394c2"  # the published digest of nothing


GOLDEN = {
    "md5": [("n5", "n4", "n1"), ("n4", "n5", "n1"), ("n4", "n3", "n1")],
    "xxh3": [("n1", "n2", "n3"), ("n1", "n4", "n2"), ("n2", "n1", "n3")],
}


def test_lookup_is_the_same_under_every_hash_seed() -> None:
    program = (
        "import json; from agi.core.dht.ring import Ring; from agi.core.dht.types import Node;"
        "names = {f'n{i}' for i in range(9)};"  # a set: its order depends on the hash seed
        "nodes = [Node(n, 'h', 1, metadata={'zone': 'z' + str(int(n[1:]) % 3)}) for n in names];"
        "ring = Ring(nodes); print(json.dumps([ring.replicas(str(i).encode()) for i in range(200)]))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        ).stdout
        for seed in ("0", "1", "42")
    }
    assert len(outputs) == 1
    nodes = [node(f"n{i}", zone=f"z{i % 3}") for i in range(9)]
    assert json.loads(outputs.pop()) == [list(Ring(nodes).replicas(str(i).encode())) for i in range(200)]


# --- movement


@settings(max_examples=60, deadline=None)
@given(members(min_size=2), algorithms, st.integers(1, 4))
def test_primaries_move_only_to_the_node_that_joins(nodes: list[Node], algorithm: str, factor: int) -> None:
    joiner, before = nodes[0], Ring(nodes[1:], algorithm, factor)
    after = Ring(nodes, algorithm, factor)
    for key in KEYS[:200]:
        old, new = before.preference(key, 1), after.preference(key, 1)
        assert new in (old, (joiner.node_id,))


@settings(max_examples=60, deadline=None)
@given(members(min_size=2, labels=False), algorithms, st.integers(1, 4))
def test_without_labels_a_replica_set_changes_only_by_the_node_that_joins(
    nodes: list[Node], algorithm: str, factor: int
) -> None:
    joiner, before = nodes[0].node_id, Ring(nodes[1:], algorithm, factor)
    after = Ring(nodes, algorithm, factor)
    for key in KEYS[:200]:
        old, new = set(before.replicas(key)), set(after.replicas(key))
        assert new - old <= {joiner}
        assert len(old - new) <= 1
        assert joiner in new or old == new


@pytest.mark.parametrize("algorithm", HASH_ALGORITHMS)
def test_a_join_moves_its_fair_share_and_a_leave_is_the_mirror(algorithm: str) -> None:
    ring = HashRing([node(f"n{i}") for i in range(9)], algorithm)
    before = {key: ring.get_node(key).node_id for key in KEYS}
    ring.add_node(node("joiner"))
    joined = {key: ring.get_node(key).node_id for key in KEYS}
    moved = [key for key in KEYS if joined[key] != before[key]]
    assert {joined[key] for key in moved} == {"joiner"}
    assert 0.07 < len(moved) / len(KEYS) < 0.13  # 1 in 10
    ring.remove_node("joiner")
    assert {key: ring.get_node(key).node_id for key in KEYS} == before


# --- failure domains


@pytest.mark.parametrize(
    ("zones", "racks", "count", "zones_used", "racks_used"),
    [
        (3, 1, 3, 3, 3),
        (3, 4, 3, 3, 3),
        (2, 3, 3, 2, 3),
        (2, 3, 4, 2, 4),
        (1, 3, 3, 1, 3),
        (1, 2, 3, 1, 2),
        (5, 1, 3, 3, 3),
    ],
)
def test_replicas_spread_over_zones_then_racks(
    zones: int, racks: int, count: int, zones_used: int, racks_used: int
) -> None:
    nodes = [
        node(f"z{z}r{r}n{n}", zone=f"z{z}", rack=f"r{r}") for z in range(zones) for r in range(racks) for n in range(3)
    ]
    where = {n.node_id: (n.metadata["zone"], n.metadata["rack"]) for n in nodes}
    for part in Ring(nodes, "xxh3", count).partitions():
        domains = [where[name] for name in part.replicas]
        assert len({zone for zone, _ in domains}) == zones_used
        assert len(set(domains)) == racks_used
        per_zone = [sum(zone == z for zone, _ in domains) for z in {zone for zone, _ in domains}]
        assert max(per_zone) - min(per_zone) <= 1


def test_racks_count_without_zones_and_a_rack_name_in_two_zones_is_two_racks() -> None:
    nodes = [node("a1", rack="a"), node("a2", rack="a"), node("b1", rack="b"), node("b2", rack="b")]
    for part in Ring(nodes, "xxh3", 2).partitions():
        assert len({name[0] for name in part.replicas}) == 2
    nodes = [node("y1", zone="y", rack="r"), node("y2", zone="y", rack="s"), node("z1", zone="z", rack="r")]
    for part in Ring(nodes, "xxh3", 2).partitions():
        assert "z1" in part.replicas


# --- shares


@settings(max_examples=50, deadline=None)
@given(members(), algorithms, st.integers(1, 4))
def test_ownership_is_the_width_of_the_arcs(nodes: list[Node], algorithm: str, factor: int) -> None:
    ring = Ring(nodes, algorithm, factor)
    width = dict.fromkeys((n.node_id for n in nodes), 0)
    for part in ring.partitions():
        for name in part.replicas:
            width[name] += part.width
    assert ring.ownership(factor) == {name: tokens / TOKENS for name, tokens in width.items()}
    assert sum(ring.ownership(factor).values()) == pytest.approx(min(factor, len(nodes)))
    assert sum(ring.ownership().values()) == pytest.approx(1)


def test_shares_follow_weights() -> None:
    nodes = [node(f"n{i}", weight=weight, virtual_nodes=600) for i, weight in enumerate((0.5, 1, 1, 2, 4))]
    ring = Ring(nodes)
    assert ring.vnode_count == 600 * 8.5
    for share, n in zip(ring.ownership().values(), nodes, strict=True):
        assert share == pytest.approx(n.weight / 8.5, rel=0.15)
    counts = dict.fromkeys((n.node_id for n in nodes), 0)
    for key in KEYS:
        counts[ring.preference(key, 1)[0]] += 1
    for n in nodes:
        assert counts[n.node_id] / len(KEYS) == pytest.approx(ring.ownership()[n.node_id], abs=0.03)


@pytest.mark.parametrize(("virtual_nodes", "weight", "points"), [(150, 1.5, 225), (150, 0.001, 1), (1, 1, 1)])
def test_points_of_a_node(virtual_nodes: int, weight: float, points: int) -> None:
    assert Ring([node("a", weight=weight, virtual_nodes=virtual_nodes)]).vnode_count == points


def test_documented_balance_is_current() -> None:
    table = list(runpy.run_path(str(REPOSITORY / "scripts/ring_balance.py"))["balance"]())
    documented = (REPOSITORY / "docs/ring.md").read_text().split("<!-- balance -->")[1].split("<!-- /balance -->")[0]
    assert documented.split("\n")[1:-1] == table
    ten, hundred = table[4], table[-2]
    assert ten.startswith("| 10 | 150 | md5 | 1.1") and hundred.startswith("| 100 | 150 | md5 | 1.2")


# --- partitions


@settings(max_examples=80, deadline=None)
@given(members(), algorithms)
def test_partitions_cover_every_token_once(nodes: list[Node], algorithm: str) -> None:
    parts = list(Ring(nodes, algorithm).partitions())
    assert sum(part.width for part in parts) == TOKENS
    ranges = sorted(r for part in parts for r in part.ranges())
    assert ranges[0][0] == 0 and ranges[-1][1] == TOKENS - 1
    for (_, last), (first, _) in pairwise(ranges):
        assert first == last + 1


@settings(max_examples=80, deadline=None)
@given(members(), st.integers(0, TOKENS - 1))
def test_partition_holds_its_token_and_its_ends_belong_to_it(nodes: list[Node], token: int) -> None:
    ring = Ring(nodes, "xxh3", 2)
    part = ring.partition_at(token)
    assert any(first <= token <= last for first, last in part.ranges())
    assert ring.partition_at(part.first) == ring.partition_at(part.last) == part
    if part.width < TOKENS:
        assert ring.partition_at((part.last + 1) % TOKENS) != part
    assert part in list(ring.partitions())


def test_one_point_owns_the_whole_circle() -> None:
    ring = Ring([node("a", virtual_nodes=1)], factor=1)
    (part,) = ring.partitions()
    assert part.width == TOKENS and part == ring.partition(b"any")
    assert sum(last - first + 1 for first, last in part.ranges()) == TOKENS
    assert ring.ownership() == {"a": 1.0}


@pytest.mark.parametrize(
    ("part", "ranges", "width"),
    [
        (Partition(5, 9, ()), ((5, 9),), 5),
        (Partition(5, 5, ()), ((5, 5),), 1),
        (Partition(TOKENS - 2, 1, ()), ((0, 1), (TOKENS - 2, TOKENS - 1)), 4),
        (Partition(0, TOKENS - 1, ()), ((0, TOKENS - 1),), TOKENS),
        (Partition(8, 7, ()), ((0, 7), (8, TOKENS - 1)), TOKENS),
    ],
)
def test_partition_ranges(part: Partition, ranges: tuple[tuple[int, int], ...], width: int) -> None:
    assert part.ranges() == ranges
    assert part.width == width


# --- the fast path, and identity


def test_a_ring_of_at_most_factor_nodes_hashes_nothing() -> None:
    ring = Ring([node(name) for name in "cab"], "md5", 3)
    ring._hash = lambda data: pytest.fail("hashed")
    assert ring.replicas(b"any") == ring.replicas_at(7) == ("a", "b", "c")


def test_equal_replica_sets_are_one_object() -> None:
    ring = Ring([node(name) for name in "abcd"], "xxh3", 2)
    found = [ring.replicas(key) for key in KEYS]
    assert len({id(replicas) for replicas in found}) == len(set(found)) <= 12


# --- HashRing


def test_hash_ring_names() -> None:
    ring = HashRing()
    assert (ring.node_count, ring.vnode_count, ring.nodes, ring.ownership()) == (0, 0, (), {})
    for i in range(4):
        ring.add_node(node(f"n{i}", port=7000 + i))
    assert (ring.node_count, ring.vnode_count) == (4, 600)
    found = ring.get_nodes("agent:1")
    assert len(found) == 3 and found[0] == ring.get_node("agent:1") == ring.get_node(b"agent:1")
    assert ring.get_nodes("agent:1", 2) == found[:2]
    assert sorted(n.node_id for n in ring.get_nodes("agent:1", 99)) == ["n0", "n1", "n2", "n3"]
    part = ring.get_partition("agent:1")
    assert part.replicas == tuple(n.node_id for n in found)
    assert any(first <= ring.ring.token(b"agent:1") <= last for first, last in part.ranges())
    assert set(ring.ownership(2)) == {"n0", "n1", "n2", "n3"}
    ring.remove_node("n0")
    assert ring.node_count == 3 and ring.vnode_count == 450


def test_adding_a_known_id_replaces_the_node() -> None:
    ring = HashRing([node("a")])
    ring.add_node(node("a", weight=2, port=7009))
    assert (ring.node_count, ring.vnode_count, ring.get_node("k").port) == (1, 300, 7009)


def test_a_snapshot_does_not_change_with_its_hash_ring() -> None:
    ring = HashRing([node("a"), node("b")], factor=1)
    snapshot = ring.ring
    before = [snapshot.replicas(key) for key in KEYS[:50]]
    ring.remove_node("a")
    assert [snapshot.replicas(key) for key in KEYS[:50]] == before
    assert ring.ring is not snapshot and ring.ring is ring.ring


# --- errors


def test_an_empty_ring_has_nobody() -> None:
    ring = HashRing()
    assert ring.get_nodes("k", 3) == [] and Ring(()).replicas(b"k") == () and list(Ring(()).partitions()) == []
    with pytest.raises(Unavailable, match="no nodes"):
        ring.get_node("k")
    with pytest.raises(Unavailable, match="no nodes"):
        ring.get_partition("k")


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_wrong_weight(weight: float) -> None:
    with pytest.raises(ConfigError, match="weight must be above 0"):
        HashRing().add_node(node("a", weight=weight))
    with pytest.raises(ConfigError, match="weight must be above 0"):
        Ring([node("a", weight=weight)])


def test_wrong_rings() -> None:
    with pytest.raises(ConfigError, match="virtual_nodes at least 1"):
        Ring([node("a", virtual_nodes=0)])
    with pytest.raises(ConfigError, match="70000 virtual nodes"):
        Ring([node("a", virtual_nodes=70_000)])
    with pytest.raises(ConfigError, match="two members of the ring have the node id 'a'"):
        Ring([node("a"), node("b"), node("a")])
    with pytest.raises(ConfigError, match="at least 1, not 0"):
        Ring([node("a")], factor=0)
    with pytest.raises(ConfigError, match="'xxh'; did you mean 'xxh3'"):
        Ring([], "xxh")
    with pytest.raises(ConfigError, match="'sha256': use md5 or xxh3"):
        token_bytes("sha256")


def test_wrong_calls() -> None:
    ring = HashRing([node("a")])
    with pytest.raises(InvalidRequest, match="no node 'b'"):
        ring.remove_node("b")
    with pytest.raises(InvalidRequest, match="at least 1 node, not 0"):
        ring.get_nodes("k", 0)
    for key in ("", b"", b"k" * 1025, "k" * 1025, "\ud800", 7):
        with pytest.raises(InvalidKey):
            ring.get_node(key)  # type: ignore[arg-type]


def test_node_hash_collision_is_refused() -> None:
    check_node_hashes(["a", "b", "a"], node_hash)
    with pytest.raises(ConfigError, match=r"'n1' and 'n2' share a hash: .*dht\.node\.id"):
        check_node_hashes(["n2", "n1"], lambda name: 7)


def test_doctest() -> None:
    result = doctest.testmod(ring_module)
    assert result.attempted > 0 and result.failed == 0
