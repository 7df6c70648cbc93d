"""Why replication is not whole, as one node knows it."""

from __future__ import annotations

from collections.abc import Iterator

from agi.core.dht.node import Node
from agi.core.dht.protocol.view import GONE


def not_whole(node: Node) -> list[str]:
    """The reasons, for people; none where, as far as this node knows, every replica holds what it should. Where
    `repair.interval_ms` is 0 no ranges are compared, and what hints did not bring is not known."""
    return list(_reasons(node))


def _reasons(node: Node) -> Iterator[str]:
    topology = node.topology
    if topology is None:
        yield node.waiting_for
        return
    if topology.in_transition:
        yield f"a change is under way: {topology.note}"
    for name, peer in sorted(node.peers.all.items()):
        status = node.detector.status(name)
        if status in GONE:
            yield f"{name} is {status.name}"
        elif name not in node.peers.connected:
            yield f"{name} is not connected: {peer.last_error}"
    more = topology.factor - topology.replica_count
    if more > 0:
        exist = f"{topology.replica_count} of {topology.factor} replicas exist"
        yield f"{exist}: {more} more node{'s are' if more > 1 else ' is'} needed"
    hints, repair = node.handoff.hints, node.antientropy
    for target in hints.pending():
        yield f"{target.hints} hints wait for {target.node}"
    for name, count in sorted(hints.lost.items()):
        yield f"{count} hints for {name} were given up, of which it does not know yet"
    if repair.checked and repair.not_compared:
        yield f"not all ranges were compared yet with {', '.join(repair.not_compared)}"
