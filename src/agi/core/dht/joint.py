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

__all__ = ["JointRing", "JointSet", "majority"]


class JointSet(tuple[str, ...]):
    """The replicas of an arc that is changing hands: those of `old`, then those that only `new` has."""

    old: tuple[str, ...]
    new: tuple[str, ...]

    @classmethod
    def of(cls, old: tuple[str, ...], new: tuple[str, ...]) -> JointSet:
        joint = cls((*old, *(name for name in new if name not in old)))
        joint.old = old
        joint.new = new
        return joint

    def __eq__(self, other: object) -> bool:
        return isinstance(other, JointSet) and (self.old, self.new) == (other.old, other.new)

    def __hash__(self) -> int:
        return hash((self.old, self.new))


def majority(count: int) -> int:
    """The least number of `count` of which two sets always have a member in common."""
    return count // 2 + 1


class JointRing:
    """Answers as a `Ring` does, for the ring before a change and the one after it together.

    Arcs are those of both rings: cut wherever one of them has a point.
    """

    def __init__(self, before: Ring, after: Ring) -> None:
        self.before = before
        self.after = after
        self.hash_algorithm = before.hash_algorithm
        self._interned: dict[tuple[tuple[str, ...], tuple[str, ...]], tuple[str, ...]] = {}
        ends = sorted({part.last for ring in (before, after) for part in ring.partitions()})
        self._ends = ends
        self._sets = [self._pair(before.partition_at(end).replicas, after.partition_at(end).replicas) for end in ends]

    def _pair(self, old: tuple[str, ...], new: tuple[str, ...]) -> tuple[str, ...]:
        """One object for equal sets, so that keys can be grouped by it."""
        found = self._interned.get((old, new))
        if found is None:
            found = old if set(old) == set(new) else JointSet.of(old, new)
            self._interned[old, new] = found
        return found

    def token(self, key: bytes) -> int:
        return self.before.token(key)

    def replicas(self, key: bytes) -> tuple[str, ...]:
        """The node ids that hold a key; a `JointSet` where they are changing."""
        return self.replicas_at(self.before.token(key))

    def replicas_at(self, token: int) -> tuple[str, ...]:
        """`replicas` of the keys with this token."""
        return self._sets[bisect_left(self._ends, token) % len(self._ends)]

    def preference(self, key: bytes, count: int) -> tuple[str, ...]:
        """The first `count` nodes of a key's preference list before the change."""
        return self.before.preference(key, count)

    def partitions(self) -> Iterator[Partition]:
        """Every arc once, in token order; together they cover each token exactly once. The first one wraps past 0."""
        for index, last in enumerate(self._ends):
            yield Partition((self._ends[index - 1] + 1) % TOKENS, last, self._sets[index])

    def sets(self) -> Iterable[tuple[str, ...]]:
        """Every replica set of either ring."""
        for ring in (self.before, self.after):
            for part in ring.partitions():
                yield part.replicas
