"""Which nodes hold a key, and which one coordinates which keys of a batch."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

from agi.core.dht.ring import Ring
from agi.core.dht.types import Node, parse_address


def ring_of(topology: dict[str, Any]) -> Ring:
    """The ring of a topology as nodes answer it."""
    nodes = []
    for member in topology["members"]:
        host, port = parse_address(member["address"])
        labels = {label: member[label] for label in ("rack", "zone") if member[label]}
        nodes.append(Node(member["node_id"], host, port, member["weight"], topology["virtual_nodes"], labels))
    return Ring(nodes, topology["hash_algorithm"], topology["factor"])


def spread(keys: Sequence[bytes], names: Sequence[str], ring: Ring) -> dict[str, list[int]]:
    """The places of the keys by node: a replica of theirs, one that the batch already goes to where there is one, else
    the first in the order of `names`; `names` are those that are connected."""
    by_node: dict[str, list[int]] = {}
    rank = {name: index for index, name in enumerate(names)}
    for index, key in enumerate(keys):
        replicas = [name for name in ring.replicas(key) if name in rank]
        # prefer a replica that this batch already goes to: fewer frames
        name = next((name for name in replicas if name in by_node), None) or min(
            replicas, key=rank.__getitem__, default=names[0]
        )
        by_node.setdefault(name, []).append(index)
    return by_node


def readers(
    keys: Sequence[bytes], names: Sequence[str], ring: Ring, needed: int, turn: int
) -> dict[str, list[int]] | None:
    """The places of the keys by node, so that so many of a key's replicas are asked for it, and few nodes altogether:
    one after the other is left out, another first at each turn, unless it is needed. None where a key has too few
    replicas among `names`.

    >>> ring = Ring([Node(name, "127.0.0.1", 7000) for name in ("a", "b", "c", "d")], factor=3)
    >>> sorted(readers([b"1", b"2", b"3", b"4"], ["a", "b", "c", "d"], ring, 2, 0))
    ['b', 'c', 'd']
    """
    ready = set(names)
    places: dict[tuple[str, ...], list[int]] = {}
    for index, key in enumerate(keys):
        places.setdefault(ring.replicas(key), []).append(index)
    left: list[list[str]] = []
    sets_of: dict[str, list[list[str]]] = {}
    for replicas in places:
        known = [name for name in replicas if name in ready]
        if len(known) < needed:
            return None
        left.append(known)
        for name in known:
            sets_of.setdefault(name, []).append(known)
    first = turn % len(names)
    for name in (*names[first:], *names[:first]):
        held = sets_of.get(name, ())
        if all(len(known) > needed for known in held):
            for known in held:
                known.remove(name)
    by_node: dict[str, list[int]] = {}
    for known, found in zip(left, places.values(), strict=True):
        for name in known[:needed]:
            by_node.setdefault(name, []).extend(found)
    return by_node


def by_key(keys: Sequence[bytes], names: Sequence[str], ring: Ring | None) -> dict[str, list[int]]:
    """As `spread`, but all clients choose the same node for a key: it then decides on that key in one round trip, and
    no other is in its way."""
    by_node: dict[str, list[int]] = {}
    ordered = sorted(names)
    for index, key in enumerate(keys):
        replicas = ordered if ring is None else [name for name in ring.replicas(key) if name in names] or ordered
        at = zlib.crc32(key) % len(replicas) if ring is None else 0
        by_node.setdefault(replicas[at], []).append(index)
    return by_node
