"""What a ring and a topology of thousands of nodes cost: to build, to ask, to keep, and to change by one node.

Shares are exact, from the widths of the arcs, and the same on every machine. Times are processor time of this one, with
the garbage collector set as a server sets it.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import TypeVar

import xxhash

from agi.core.dht.joint import JointRing, JointSet
from agi.core.dht.ring import TOKENS, Ring
from agi.core.dht.server import COLLECT_AT
from agi.core.dht.topology import JOINING, Member, Topology, unpack

KEYS, ROUNDS = 100_000, 3
"""Keys that are looked up, so many times; the best round counts."""
JOINS_MIN, JOINS_MAX, JOINS_MEMBERS = 3, 10, 1_000
"""Nodes that join, each alone: so many that joins x members is about the last, within the first two."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Shape:
    """How keys are dealt out; docs/configuration.md describes each under its name."""

    factor: int = 3
    virtual_nodes: int = 150
    hash_algorithm: str = "xxh3"


@dataclass(slots=True)
class RingFigures:
    """One ring of so many equal nodes, and what one more changes. Times in seconds of the processor, sizes in bytes.

    Attributes:
        points: of the ring, virtual_nodes for each node.
        build_s: the ring, from a topology.
        fill_s: the replica sets of all arcs, which are else made when first asked for.
        lookup_us: microseconds for the replicas of a key, once its arc's are made.
        built_bytes, filled_bytes: all objects of the ring, before and after that.
        primary_max, primary_min, held_max, held_min: share of the fullest and the emptiest node over the mean, of the
            keys of which a node is the first replica, and of those of which it holds one.
        joins: nodes that joined, each alone; of them all are the means and maxima below.
        moved, moved_max, moved_ideal: share of all stored data, replicas counted, that a join moves; mean, the most,
            and what the newcomer is to hold, 1 / (n + 1).
        primary_moved: share of the keys that have another first replica than before.
        moved_else: share of all stored data that moves to others than the newcomer.
        topology_bytes: the topology as it is sent and stored.
        adopt_s: from its bytes to both rings: reading the topology of a join, its digests, the joint ring, one pass
            over all arcs; the median. A node does it at once, and does nothing else meanwhile.
        final_s: the same for the topology that ends the join.
        joint_bytes: all objects of the joint ring, which holds both rings.
    """

    points: int
    build_s: float
    fill_s: float
    lookup_us: float
    built_bytes: int
    filled_bytes: int
    primary_max: float
    primary_min: float
    held_max: float
    held_min: float
    joins: int
    moved: float
    moved_max: float
    moved_ideal: float
    primary_moved: float
    moved_else: float
    topology_bytes: int
    adopt_s: float
    final_s: float
    joint_bytes: int


def measure_ring(members: int, shape: Shape) -> RingFigures:
    """Builds and asks a ring of that many nodes, and has further ones join it."""
    with _collecting():
        topology = _topology(members, shape)
        ring, build_s = _timed(topology.ring)
        assert isinstance(ring, Ring)
        built_bytes = deep_bytes(ring)
        _, fill_s = _timed(lambda: sum(1 for _ in ring.partitions()))
        keys = [b"key:%d" % number for number in range(KEYS)]
        lookup_s = min(_timed(lambda: [ring.replicas(key) for key in keys])[1] for _ in range(ROUNDS))
        primary, held = ring.ownership(1).values(), ring.ownership(shape.factor).values()
        joins = [_join(topology, number) for number in range(_joins(members))]
        return RingFigures(
            points=ring.vnode_count,
            build_s=build_s,
            fill_s=fill_s,
            lookup_us=lookup_s / KEYS * 1e6,
            built_bytes=built_bytes,
            filled_bytes=deep_bytes(ring),
            primary_max=max(primary) * members,
            primary_min=min(primary) * members,
            held_max=max(held) * members / sum(held),
            held_min=min(held) * members / sum(held),
            joins=len(joins),
            moved=statistics.mean(join.moved for join in joins),
            moved_max=max(join.moved for join in joins),
            moved_ideal=1 / (members + 1),
            primary_moved=statistics.mean(join.primary_moved for join in joins),
            moved_else=max(join.moved_else for join in joins),
            topology_bytes=len(topology.packed),
            adopt_s=statistics.median(join.adopt_s for join in joins),
            final_s=statistics.median(join.final_s for join in joins),
            joint_bytes=joins[0].joint_bytes,
        )


@dataclass(slots=True)
class _Join:
    moved: float
    moved_else: float
    primary_moved: float
    adopt_s: float
    final_s: float
    joint_bytes: int


def _join(topology: Topology, number: int) -> _Join:
    newcomer = _member(f"join{number:05d}", 1 << 20 | number, JOINING)
    transition = topology.next([*topology.members, newcomer], f"{newcomer.node_id} joins", 0)
    sent, final = transition.packed, transition.finished(0).packed
    (joint, _), adopt_s = _timed(lambda: _adopt(sent, topology.members[0].node_id))
    assert isinstance(joint, JointRing)
    _, final_s = _timed(lambda: _adopt(final, topology.members[0].node_id))
    moved = moved_else = primary_moved = total = 0
    for part in joint.partitions():
        replicas = part.replicas
        if not isinstance(replicas, JointSet):
            total += part.width * len(replicas)
            continue
        total += part.width * len(replicas.new)
        gained = set(replicas.new).difference(replicas.old)
        moved += part.width * len(gained)
        moved_else += part.width * len(gained - {newcomer.node_id})
        primary_moved += part.width * (replicas.old[0] != replicas.new[0])
    return _Join(
        moved=moved / total,
        moved_else=moved_else / total,
        primary_moved=primary_moved / TOKENS,
        adopt_s=adopt_s,
        final_s=final_s,
        joint_bytes=deep_bytes(joint) if number == 0 else 0,
    )


def _adopt(data: bytes, me: str) -> tuple[Ring | JointRing, list[tuple[int, int]]]:
    """What a node does with a topology that it is sent (epochs.py, node.py), but for the store and the links: the ring,
    and the token ranges that it gains."""
    topology = unpack(data)
    assert topology.digest and topology.placement
    ring = topology.ring()
    gained = [
        span
        for part in ring.partitions()
        if isinstance(part.replicas, JointSet) and me in part.replicas.new and me not in part.replicas.old
        for span in part.ranges()
    ]
    return ring, gained


def _joins(members: int) -> int:
    return min(JOINS_MAX, max(JOINS_MIN, JOINS_MEMBERS // members))


def _topology(members: int, shape: Shape) -> Topology:
    nodes = [_member(f"node{number:05d}", number) for number in range(members)]
    return Topology.first("scale", shape.factor, shape.virtual_nodes, shape.hash_algorithm, nodes)


def _member(node_id: str, number: int, state: str = "normal") -> Member:
    disk_id = xxhash.xxh3_128_hexdigest(node_id.encode())  # as long as real ones
    address = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}:7000"
    return Member(node_id, disk_id, address, state=state)


def _timed(action: Callable[[], T]) -> tuple[T, float]:
    gc.collect()
    began = time.process_time()
    found = action()
    return found, time.process_time() - began


@contextmanager
def _collecting() -> Iterator[None]:
    """Garbage is looked for as in a server, since this is part of what making many objects costs."""
    thresholds, enabled = gc.get_threshold(), gc.isenabled()
    gc.enable()
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AT, 10, 10)
    try:
        yield
    finally:
        gc.unfreeze()
        gc.set_threshold(*thresholds)
        if not enabled:
            gc.disable()


_SHARED = (type, ModuleType, FunctionType, BuiltinFunctionType)
"""Kinds of objects that are there once, whoever holds them."""


def deep_bytes(root: object) -> int:
    """Memory of all objects that can be reached from this one, each counted once, as the allocator was asked for it."""
    total, left, seen = 0, [root], {id(root)}
    while left:
        found = left.pop()
        total += sys.getsizeof(found)
        keys = found if isinstance(found, dict) else ()  # the collector does not look at keys that are strings
        for part in chain(gc.get_referents(found), keys):
            if id(part) not in seen and not isinstance(part, _SHARED):
                seen.add(id(part))
                left.append(part)
    return total
