"""Topologies as values: equal members, equal bytes; the ring that follows from them; how many replicas there are."""

from __future__ import annotations

from itertools import permutations

import pytest

from agi.core.dht.errors import ClusterError, StorageCorrupt
from agi.core.dht.topology import Member, Topology, unpack

MEMBERS = [Member(f"n{i}", f"disk{i}", f"host{i}:7000", weight=1.0 + i % 2, rack=f"r{i % 2}") for i in range(4)]


def first(members: list[Member], factor: int = 3) -> Topology:
    return Topology.first("dht", factor, 16, "xxh3", members)


def test_equal_members_in_any_order_are_the_same_topology() -> None:
    topologies = [first(list(order)) for order in permutations(MEMBERS)]
    assert len({topology.packed for topology in topologies}) == len({topology.digest for topology in topologies}) == 1
    assert [member.node_id for member in topologies[0].members] == ["n0", "n1", "n2", "n3"]
    assert (topologies[0].generation, topologies[0].epoch) == (1, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"disk_id": "new"},
        {"address": "host9:7000"},
        {"weight": 3.0},
        {"rack": "r9"},
        {"zone": "z"},
        {"state": "leaving"},
    ],
)
def test_any_difference_is_another_digest(change: dict[str, object]) -> None:
    fields = {name: getattr(MEMBERS[0], name) for name in Member.__struct_fields__}
    assert first([Member(**{**fields, **change}), *MEMBERS[1:]]).digest != first(MEMBERS).digest
    assert first(MEMBERS, factor=2).digest != first(MEMBERS).digest


def test_it_survives_packing() -> None:
    topology = first(MEMBERS)
    again = unpack(topology.packed)
    assert again == topology and again.digest == topology.digest and again.by_id["n2"] == MEMBERS[2]


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x93\x01\x02\x03", b"[]", first(MEMBERS).packed[:-1]])
def test_what_cannot_be_read_is_a_typed_error(data: bytes) -> None:
    with pytest.raises(StorageCorrupt):
        unpack(data)


@pytest.mark.parametrize(("nodes", "factor", "replicas"), [(1, 3, 1), (2, 3, 2), (3, 3, 3), (4, 3, 3), (4, 1, 1)])
def test_replicas_are_the_factor_or_all_nodes_while_there_are_fewer(nodes: int, factor: int, replicas: int) -> None:
    topology = first(MEMBERS[:nodes], factor)
    assert topology.replica_count == replicas
    assert len(topology.ring().replicas(b"key")) == replicas


def test_the_ring_follows_from_the_topology_alone() -> None:
    ring, again = first(MEMBERS).ring(), unpack(first(MEMBERS[::-1]).packed).ring()
    keys = [b"key%d" % i for i in range(500)]
    assert [ring.replicas(key) for key in keys] == [again.replicas(key) for key in keys]
    owners = [ring.replicas(key)[0] for key in keys]
    assert owners.count("n1") + owners.count("n3") > owners.count("n0") + owners.count("n2")  # weight 2 against 1
    assert all({member[-1] in "02" for member in ring.replicas(key)} == {True, False} for key in keys)  # both racks


@pytest.mark.parametrize("field", ["node_id", "disk_id", "address"])
def test_members_that_cannot_be_told_apart_are_refused(field: str) -> None:
    fields = {name: getattr(MEMBERS[0], name) for name in Member.__struct_fields__}
    twin = Member(**{**fields, **{name: f"other-{name}" for name in ("node_id", "disk_id")}, "address": "x:7000"})
    first([*MEMBERS, twin]).check_unique()
    twin = Member(**{**{name: getattr(twin, name) for name in Member.__struct_fields__}, field: fields[field]})
    with pytest.raises(ClusterError, match=field):
        first([*MEMBERS, twin]).check_unique()
