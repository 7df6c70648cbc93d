"""The consistent-hash ring: which nodes hold a key (Karger et al., "Consistent Hashing and Random Trees", 1997).

A node owns `round(virtual_nodes * weight)` points on a circle of 2^64 tokens; a key belongs to the first point at or
after its token. The nodes met from there on, clockwise and without doubles, are its preference list; the first
`factor` of them are its replicas. Points are sorted by (token, node_id, vnode), so every node computes the same ring
from the same members, whatever the order in which they came.

Where members carry `zone` or `rack` labels, the list takes at each step the next node of the least used zone, and
among these of the least used rack: replicas spread over failure domains first, then over nodes, and every prefix of
the list is spread as well as its length allows. Members without a label count as one domain.

`Ring` is an immutable snapshot, built once per topology epoch: lookups cost one hash and one binary search. `HashRing`
is a mutable convenience over it.

>>> ring = HashRing([Node(f"n{i}", "10.0.0.1", 7000 + i) for i in range(5)])
>>> [node.node_id for node in ring.get_nodes("agent:1", 3)]
['n1', 'n3', 'n4']
>>> ring.remove_node("n3")
>>> [node.node_id for node in ring.get_nodes("agent:1", 3)]
['n1', 'n4', 'n2']
"""

from __future__ import annotations

import difflib
import hashlib
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice, pairwise

import xxhash

from agi.core.dht.errors import ConfigError, InvalidKey, InvalidRequest, Unavailable
from agi.core.dht.types import KEY_BYTES_MAX, Node, encode_key

__all__ = ["HASH_ALGORITHMS", "TOKENS", "HashRing", "Partition", "Ring", "check_node_hashes", "token_bytes"]

TOKENS = 1 << 64
"""Tokens are 0 <= t < TOKENS."""
VNODES_MAX = 1 << 16
"""Points of one node: bounds what a wrong weight costs every other node."""


def _md5(data: bytes) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()[:8]  # FIPS hosts refuse md5 without the flag


_HASHES: dict[str, Callable[[bytes], bytes]] = {"md5": _md5, "xxh3": xxhash.xxh3_64_digest}
HASH_ALGORITHMS = tuple(_HASHES)


def token_bytes(algorithm: str) -> Callable[[bytes], bytes]:
    """The function that gives a key's token as 8 big-endian bytes, for storage keys. Raises ConfigError."""
    try:
        return _HASHES[algorithm]
    except KeyError:
        near = difflib.get_close_matches(str(algorithm), HASH_ALGORITHMS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f": use {' or '.join(HASH_ALGORITHMS)}"
        raise ConfigError(f"unknown hash algorithm {algorithm!r}{hint}") from None


def check_node_hashes(node_ids: Iterable[str], node_hash: Callable[[str], int]) -> None:
    """Raises ConfigError if two node ids share the hash that names them in versions (protocol/versioning.py passes it
    in): their writes could tie, and replicas would differ for ever."""
    seen: dict[int, str] = {}
    for node_id in sorted(set(node_ids)):
        other = seen.setdefault(node_hash(node_id), node_id)
        if other != node_id:
            raise ConfigError(
                f"the node ids {other!r} and {node_id!r} share a hash: give one of them another dht.node.id"
            )


@dataclass(frozen=True, slots=True)
class Partition:
    """An arc of the ring: tokens first <= t <= last; it wraps past 0 where first > last.

    Attributes:
        replicas: node ids, in the order of the preference list.
    """

    first: int
    last: int
    replicas: tuple[str, ...]

    @property
    def width(self) -> int:
        """How many tokens it covers: 1 to 2^64, never 0."""
        return (self.last - self.first) % TOKENS + 1

    def ranges(self) -> tuple[tuple[int, int], ...]:
        """The arc as inclusive ranges that do not wrap: one, or two at the end of the circle."""
        if self.first <= self.last:
            return ((self.first, self.last),)
        return ((0, self.last), (self.first, TOKENS - 1))


def _vnodes(node: Node) -> int:
    if node.virtual_nodes < 1 or not (node.weight > 0 and math.isfinite(node.weight)):
        raise ConfigError(
            f"node {node.node_id!r}: weight must be above 0 and virtual_nodes at least 1, "
            f"not {node.weight} and {node.virtual_nodes}"
        )
    count = max(1, round(node.virtual_nodes * node.weight))
    if count > VNODES_MAX:
        raise ConfigError(
            f"node {node.node_id!r}: {count} virtual nodes (virtual_nodes * weight), at most {VNODES_MAX}"
        )
    return count


class Ring:
    """An immutable ring. Equal arguments give equal answers on every machine.

    Args:
        nodes: the members, in any order. May be empty; then lookups return nobody.
        hash_algorithm: "md5" (the first 8 bytes) or "xxh3"; all nodes of a cluster use the same.
        factor: replicas per key, at least 1. A smaller ring has as many as it has nodes.

    Raises ConfigError for a double node id, a weight that is not above 0, virtual_nodes or factor below 1.
    """

    __slots__ = (
        "_everyone",
        "_hash",
        "_interned",
        "_memo",
        "_owners",
        "_rack_of",
        "_tokens",
        "_zone_of_rack",
        "factor",
        "hash_algorithm",
        "nodes",
    )

    def __init__(self, nodes: Iterable[Node], hash_algorithm: str = "md5", factor: int = 3) -> None:
        if factor < 1:
            raise ConfigError(f"the replication factor is at least 1, not {factor}")
        self.nodes: tuple[Node, ...] = tuple(sorted(nodes, key=lambda node: node.node_id))
        self.hash_algorithm = hash_algorithm
        self.factor = factor
        self._hash = token_bytes(hash_algorithm)
        for node, following in pairwise(self.nodes):
            if node.node_id == following.node_id:
                raise ConfigError(f"two members of the ring have the node id {node.node_id!r}")
        points = sorted(
            (int.from_bytes(self._hash(f"{node.node_id}#{vnode}".encode()), "big"), index, vnode)
            for index, node in enumerate(self.nodes)  # indexes sort as node ids do
            for vnode in range(_vnodes(node))
        )
        self._tokens = [token for token, _, _ in points]
        self._owners = [index for _, index, _ in points]
        racks: dict[tuple[str, str], int] = {}
        self._rack_of = [
            racks.setdefault((node.metadata.get("zone", ""), node.metadata.get("rack", "")), len(racks))
            for node in self.nodes
        ]
        self._zone_of_rack = [zone for zone, _ in racks]
        self._everyone = tuple(node.node_id for node in self.nodes) if len(self.nodes) <= factor else None
        self._memo: list[tuple[str, ...] | None] = [None] * (len(points) + 1)  # the last stands for the wrap to 0
        self._interned: dict[tuple[str, ...], tuple[str, ...]] = {}

    @property
    def node_count(self) -> int:
        return len(self.nodes)

    @property
    def vnode_count(self) -> int:
        return len(self._tokens)

    def token(self, key: bytes) -> int:
        return int.from_bytes(self._hash(key), "big")

    def replicas(self, key: bytes) -> tuple[str, ...]:
        """The node ids that hold a key: min(factor, node_count) of them, distinct.

        They come in the order of the preference list, except where the ring has no more nodes than `factor`: then
        every node is a replica, nothing is hashed, and the order is that of the node ids. Equal answers are one object.
        """
        if self._everyone is not None:
            return self._everyone
        index = bisect_left(self._tokens, int.from_bytes(self._hash(key), "big"))
        return self._memo[index] or self._fill(index)

    def replicas_at(self, token: int) -> tuple[str, ...]:
        """`replicas` of the keys with this token."""
        if self._everyone is not None:
            return self._everyone
        index = bisect_left(self._tokens, token)
        return self._memo[index] or self._fill(index)

    def preference(self, key: bytes, count: int) -> tuple[str, ...]:
        """The first `count` nodes of a key's preference list, fewer if the ring has fewer. A shorter list is always the
        beginning of a longer one, and as a set `preference(key, factor)` is `replicas(key)`."""
        if count < 1:
            raise InvalidRequest(f"a preference list has at least 1 node, not {count}")
        index = bisect_left(self._tokens, self.token(key))
        return self._list(index)[:count] if count <= self.factor else self._names(self._spread(index, count))

    def partition(self, key: bytes) -> Partition:
        """The arc that a key lies in. Raises Unavailable for an empty ring."""
        return self.partition_at(self.token(key))

    def partition_at(self, token: int) -> Partition:
        """The arc that a token lies in. Raises Unavailable for an empty ring."""
        if not self._tokens:
            raise Unavailable("the ring has no nodes", needed=1)
        index = bisect_left(self._tokens, token) % len(self._tokens)
        last = self._tokens[index]
        return Partition((self._tokens[index - 1] + 1) % TOKENS, last, self._list(index))

    def partitions(self) -> Iterator[Partition]:
        """Every arc once, in token order; together they cover each token exactly once. The first one wraps past 0."""
        for index, first, last in self._arcs():
            yield Partition(first, last, self._list(index))

    def ownership(self, factor: int = 1) -> dict[str, float]:
        """Each node's share of the circle, exact: as primary, or as one of `factor` replicas. The shares add up to
        min(factor, node_count)."""
        width = dict.fromkeys((node.node_id for node in self.nodes), 0)
        for index, first, last in self._arcs():
            for owner in self._spread(index, factor):
                width[self.nodes[owner].node_id] += (last - first) % TOKENS + 1
        return {node_id: tokens / TOKENS for node_id, tokens in width.items()}

    def _arcs(self) -> Iterator[tuple[int, int, int]]:
        """(index, first, last) of every arc. Of equal tokens only the first owns one."""
        for index, last in enumerate(self._tokens):
            before = self._tokens[index - 1]
            if index == 0 or last != before:
                yield index, (before + 1) % TOKENS, last

    def _list(self, index: int) -> tuple[str, ...]:
        """The preference list of an arc, in ring order however few nodes there are."""
        return self._memo[index] or self._fill(index)

    def _fill(self, index: int) -> tuple[str, ...]:
        found = self._names(self._spread(index, self.factor))
        found = self._memo[index] = self._interned.setdefault(found, found)
        return found

    def _names(self, owners: list[int]) -> tuple[str, ...]:
        return tuple(self.nodes[owner].node_id for owner in owners)

    def _clockwise(self, index: int) -> Iterator[int]:
        """The nodes in the order of their first point from this one on, once around."""
        seen: set[int] = set()
        owners = self._owners
        for position in chain(range(index, len(owners)), range(index)):
            owner = owners[position]
            if owner not in seen:
                seen.add(owner)
                yield owner

    def _spread(self, index: int, count: int) -> list[int]:
        """The first `count` nodes of an arc's preference list, as indexes of `nodes`."""
        count = min(count, len(self.nodes))
        walk = self._clockwise(index % max(1, len(self._owners)))
        if len(self._zone_of_rack) <= 1:
            return list(islice(walk, count))
        left = Counter(self._rack_of)  # nodes of each rack that are not chosen yet
        used_zones: Counter[str] = Counter()
        used_racks: Counter[int] = Counter()
        met: list[int] = []  # passed by, not chosen yet, in the order of the walk
        chosen: list[int] = []

        def rank(rack: int) -> tuple[int, int]:
            return used_zones[self._zone_of_rack[rack]], used_racks[rack]

        while len(chosen) < count:
            best = min(rank(rack) for rack in left)
            found = next((owner for owner in met if rank(self._rack_of[owner]) == best), None)
            if found is not None:
                met.remove(found)
            else:
                for found in walk:
                    if rank(self._rack_of[found]) == best:
                        break
                    met.append(found)
            assert found is not None
            chosen.append(found)
            rack = self._rack_of[found]
            used_zones[self._zone_of_rack[rack]] += 1
            used_racks[rack] += 1
            left[rack] -= 1
            if not left[rack]:
                del left[rack]
        return chosen


class HashRing:
    """A ring to which nodes can be added and removed; every change makes a new `Ring`, at the next lookup.

    Args:
        nodes: the first members.
        hash_algorithm: "md5" or "xxh3".
        factor: replicas of a key, for `get_partition` and as the default of `get_nodes`.

    Keys are str or bytes; a str counts as its UTF-8 bytes. Lookups raise InvalidKey for a wrong key.
    """

    def __init__(self, nodes: Iterable[Node] = (), hash_algorithm: str = "md5", factor: int = 3) -> None:
        self._nodes: dict[str, Node] = {}
        self._ring: Ring | None = Ring((), hash_algorithm, factor)  # checks the arguments
        self._hash_algorithm = hash_algorithm
        self._factor = factor
        for node in nodes:
            self.add_node(node)

    def add_node(self, node: Node) -> None:
        """Adds a node, or replaces the one with its id. Raises ConfigError for a wrong weight or virtual_nodes."""
        _vnodes(node)
        self._nodes[node.node_id] = node
        self._ring = None

    def remove_node(self, node_id: str) -> None:
        """Removes a node. Raises InvalidRequest if it is not in the ring."""
        if node_id not in self._nodes:
            raise InvalidRequest(f"no node {node_id!r} in the ring")
        del self._nodes[node_id]
        self._ring = None

    @property
    def ring(self) -> Ring:
        """The snapshot of the present members."""
        if self._ring is None:
            self._ring = Ring(self._nodes.values(), self._hash_algorithm, self._factor)
        return self._ring

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The members, by node id."""
        return self.ring.nodes

    @property
    def node_count(self) -> int:
        return len(self._nodes)

    @property
    def vnode_count(self) -> int:
        return self.ring.vnode_count

    def get_node(self, key: str | bytes) -> Node:
        """The primary of a key: the head of its preference list. Raises Unavailable for an empty ring."""
        found = self.get_nodes(key, 1)
        if not found:
            raise Unavailable("the ring has no nodes", needed=1)
        return found[0]

    def get_nodes(self, key: str | bytes, count: int | None = None) -> list[Node]:
        """The first `count` (default: factor) distinct nodes of a key's preference list, fewer if the ring has fewer.
        Raises InvalidRequest for a count below 1."""
        names = self.ring.preference(_key_bytes(key), self._factor if count is None else count)
        return [self._nodes[name] for name in names]

    def get_partition(self, key: str | bytes) -> Partition:
        """The arc of the ring that a key lies in. Raises Unavailable for an empty ring."""
        return self.ring.partition(_key_bytes(key))

    def ownership(self, factor: int = 1) -> dict[str, float]:
        """Each node's share of the keys as primary, or as one of `factor` replicas (see `Ring.ownership`)."""
        return self.ring.ownership(factor)


def _key_bytes(key: str | bytes) -> bytes:
    if not isinstance(key, bytes):
        return encode_key(key)
    if not 0 < len(key) <= KEY_BYTES_MAX:
        raise InvalidKey(f"a key has 1 to {KEY_BYTES_MAX} bytes, this one {len(key)}")
    return key
