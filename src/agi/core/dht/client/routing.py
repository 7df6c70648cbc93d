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
