"""Two rings at once: while a change of members is under way, a key has its old replicas and its new ones.

In a transition everything needs a quorum of the old set **and** one of the new (PROTOCOLS T5). Most keys keep their
replicas; only where the sets differ a lookup gives a `JointSet`: the names of both, with the two sets as attributes.

>>> from agi.core.dht.types import Node
>>> nodes = [Node(name, "127.0.0.1", 7000) for name in ("a", "b", "c", "d")]
>>> ring = JointRing(Ring(nodes[:3], factor=2), Ring(nodes, factor=2))
>>> moved = next(part.replicas for part in ring.partitions() if isinstance(part.replicas, JointSet))
>>> moved, moved.old, moved.new
(('c', 'b', 'd'), ('c', 'b'), ('c', 'd'))
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator

from agi.core.dht.ring import TOKENS, Partition, Ring

__all__ = ["JointRing", "JointSet", "SurvivorRing", "majority"]


class JointSet(tuple[str, ...]):
    """The replicas of an arc that is changing hands: those of `old`, then those that only `new` has.

    `sources` is how many of `old` the arc is filled from: a majority, or all where some of the old are lost.
    """

    old: tuple[str, ...]
    new: tuple[str, ...]
    sources: int

    @classmethod
    def of(cls, old: tuple[str, ...], new: tuple[str, ...], sources: int = 0) -> JointSet:
        joint = cls((*old, *(name for name in new if name not in old)))
        joint.old = old
        joint.new = new
        joint.sources = sources or majority(len(old))
        return joint

    def __eq__(self, other: object) -> bool:
        return isinstance(other, JointSet) and (self.old, self.new) == (other.old, other.new)

    def __hash__(self) -> int:
        return hash((self.old, self.new))


def majority(count: int) -> int:
    """The least number of `count` of which two sets always have a member in common."""
    return count // 2 + 1


class _Arcs:
    """Arcs with the replicas of each: cut wherever one of two rings has a point."""

    hash_algorithm: str
    _ring: Ring

    def _cut(self, one: Ring | SurvivorRing, other: Ring) -> None:
        self._ends = sorted({part.last for ring in (one, other) for part in ring.partitions()})
        self._sets: list[tuple[str, ...]] = []

    def token(self, key: bytes) -> int:
        return self._ring.token(key)

    def replicas(self, key: bytes) -> tuple[str, ...]:
        """The node ids that hold a key; a `JointSet` where they are changing."""
        return self.replicas_at(self.token(key))

    def replicas_at(self, token: int) -> tuple[str, ...]:
        """`replicas` of the keys with this token."""
        return self._sets[bisect_left(self._ends, token) % len(self._ends)]

    def partitions(self) -> Iterator[Partition]:
        """Every arc once, in token order; together they cover each token exactly once. The first one wraps past 0."""
        for index, last in enumerate(self._ends):
            yield Partition((self._ends[index - 1] + 1) % TOKENS, last, self._sets[index])


class SurvivorRing(_Arcs):
    """A ring some of whose nodes are lost: an arc has those of its replicas that are left. One of which none is left
    has the replicas that it is to have afterwards, and begins anew with what they hold.

    >>> from agi.core.dht.types import Node
    >>> nodes = [Node(name, "127.0.0.1", 7000) for name in ("a", "b", "c", "d")]
    >>> whole, left = Ring(nodes, factor=2), Ring(nodes[:3], factor=2)
    >>> ring = SurvivorRing(whole, left, frozenset("d"))
    >>> {part.replicas for part in whole.partitions()} >= {("d", "c"), ("a", "d")}
    True
    >>> {part.replicas for part in ring.partitions()} >= {("c",), ("a",)}
    True
    """

    def __init__(self, before: Ring, after: Ring, lost: frozenset[str]) -> None:
        self._ring = before
        self._lost = lost
        self.hash_algorithm = before.hash_algorithm
        self._cut(before, after)
        interned: dict[tuple[str, ...], tuple[str, ...]] = {}
        for end in self._ends:
            left = tuple(name for name in before.partition_at(end).replicas if name not in lost)
            left = left or after.partition_at(end).replicas
            self._sets.append(interned.setdefault(left, left))

    def whole(self, token: int) -> bool:
        """Whether no replica of this token is lost."""
        return self._lost.isdisjoint(self._ring.partition_at(token).replicas)

    def preference(self, key: bytes, count: int) -> tuple[str, ...]:
        """The first `count` nodes of a key's preference list that are not lost."""
        known = self._ring.preference(key, count + len(self._lost))
        return tuple(name for name in known if name not in self._lost)[:count]


class JointRing(_Arcs):
    """Answers as a `Ring` does, for the ring before a change and the one after it together."""

    def __init__(self, before: Ring | SurvivorRing, after: Ring) -> None:
        self._ring = after
        self.before = before
        self.after = after
        self.hash_algorithm = before.hash_algorithm
        self._cut(before, after)
        interned: dict[tuple[tuple[str, ...], tuple[str, ...]], tuple[str, ...]] = {}
        for end in self._ends:
            if isinstance(before, SurvivorRing):
                old, whole = before.replicas_at(end), before.whole(end)
            else:
                old, whole = before.partition_at(end).replicas, True
            new = after.partition_at(end).replicas
            sources = majority(len(old)) if whole else len(old)
            found = interned.get((old, new))  # one object for equal sets, so that keys can be grouped by it
            if found is None:
                stays = set(old) == set(new) and sources == majority(len(old))
                found = old if stays else JointSet.of(old, new, sources)
                interned[old, new] = found
            self._sets.append(found)

    def preference(self, key: bytes, count: int) -> tuple[str, ...]:
        """The first `count` nodes of a key's preference list before the change."""
        return self.before.preference(key, count)

    def sets(self) -> Iterable[tuple[str, ...]]:
        """Every replica set of either ring."""
        for ring in (self.before, self.after):
            for part in ring.partitions():
                yield part.replicas
