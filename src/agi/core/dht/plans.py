"""What a change of the members would move, told before it is begun."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from agi.core.dht.joint import JointRing, JointSet, majority
from agi.core.dht.ring import TOKENS, Ring
from agi.core.dht.topology import JOINING, LEAVING, Topology

if TYPE_CHECKING:
    from agi.core.dht.node import Node


async def plan(node: Node, topology: Topology) -> dict[str, object]:
    """What a transition moves, as far as this node can tell: {"note", "arcs": of the ring that change hands, "moves":
    {node id: {"arcs", "share": of the ring, "keys", "bytes"}} of what each gains, "shares": {node id: {"before",
    "after", "ideal": the part of the ring of which it holds a replica}}}. Keys and bytes are estimates from this node's
    own density."""
    ring = topology.ring()
    arcs, gains = 0, dict[str, list[int]]()
    own = 0
    for part in ring.partitions():
        replicas = part.replicas
        if node.node_id in (replicas.old if isinstance(replicas, JointSet) else replicas):
            own += part.width
        if isinstance(replicas, JointSet):
            arcs += 1
            for name in set(replicas.new).difference(replicas.old):
                gain = gains.setdefault(name, [0, 0])
                gain[0] += 1
                gain[1] += part.width
    stats = await node.store.stats()
    keys, size = (stats.records / own, stats.bytes / own) if own else (0.0, 0.0)
    moves = {
        name: {"arcs": count, "share": width / TOKENS, "keys": round(width * keys), "bytes": round(width * size)}
        for name, (count, width) in sorted(gains.items())
    }
    return {"note": topology.note, "arcs": arcs, "moves": moves, "shares": _shares(topology, ring)}


def _shares(topology: Topology, ring: Ring | JointRing) -> dict[str, dict[str, float]]:
    before = {member.node_id: member.weight for member in topology.members if member.state != JOINING}
    after = {m.node_id: m.next_weight or m.weight for m in topology.members if m.state != LEAVING}
    lost = {member.node_id: member.weight for member in topology.lost}
    held = topology.ring_before().ownership(min(topology.factor, len({*before, *lost})))
    later = ring.after if isinstance(ring, JointRing) else ring
    replicas = min(topology.factor, len(after))
    holds, total = later.ownership(replicas), sum(after.values())
    return {
        name: {
            "before": held.get(name, 0.0),
            "after": holds.get(name, 0.0),
            "ideal": min(1.0, replicas * after.get(name, 0.0) / total),
        }
        for name in sorted({*before, *after, *lost})
    }


async def plan_recovery(node: Node, base: Topology, topology: Topology, survivors: Sequence[str]) -> dict[str, object]:
    """What a recovery makes of the cluster: `plan`, and {"cluster", "generation", "epoch", "lost", "survivors",
    "voters", "gone_share": the part of the ring of which no replica is left, "doubtful_share": of which a majority is
    lost}."""
    lost = {member.node_id for member in topology.lost}
    gone = doubtful = 0
    for part in topology.ring_before().partitions():
        left = sum(name not in lost for name in part.replicas)
        gone += part.width * (not left)
        doubtful += part.width * (left <= len(part.replicas) - majority(len(part.replicas)))
    return {
        **await plan(node, topology),
        "cluster": base.cluster,
        "generation": topology.generation,
        "epoch": topology.epoch,
        "lost": sorted(lost),
        "survivors": list(survivors),
        "voters": list(topology.voters),
        "gone_share": gone / TOKENS,
        "doubtful_share": doubtful / TOKENS,
    }
