"""What operators order at the nodes of a simulated cluster, and which changes of its members come to their end."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

from agi.core.dht.antientropy import EVERYTHING
from agi.core.dht.changes import Order
from agi.core.dht.errors import ChangeRefused, DHTError, InvalidRequest, Unavailable
from agi.core.dht.node import Node
from agi.core.dht.protocol.view import GONE
from agi.core.dht.testing.scenario import Churn
from agi.core.dht.topology import LEAVING, Topology

if TYPE_CHECKING:
    from agi.core.dht.testing.cluster import SimCluster

PROPOSE_TIMEOUT_S = 2.0
KEEP_UP_S = 0.5
"""Between an order to repair and the next one."""
_DONE = "done: "
_REMOVED = " is removed"
_KINDS = {
    "joins": " joins",
    "replacements": " replaces ",
    "new disks": " joins in its own place",
    "leaves": " leaves",
    "removals": _REMOVED,
    "weights": " gets weight ",
}
"""Of changes, by their notes; the last that fits counts."""


class Operators:
    """
    Attributes:
        proposed, agreed: epochs that change nothing but their note.
        ordered, begun: changes.
        changes: those that were brought to their end, by kind; of the removals, `evictions` are those that nobody had
            ordered.
        keeping_up: repairs and rounds of reclaiming have been ordered, and are ordered all the time.
    """

    def __init__(self, cluster: SimCluster) -> None:
        self.proposed = 0
        self.agreed = 0
        self.ordered = 0
        self.begun = 0
        self.changes: Counter[str] = Counter(dict.fromkeys([*_KINDS, "evictions"], 0))
        self.keeping_up = False
        self._cluster = cluster
        self._seen: set[tuple[str, int, int]] = set()
        self._removing: Counter[str] = Counter()
        self._evicted: set[str] = set()

    def work(self, node: Node, incarnation: int) -> list[asyncio.Task[None]]:
        """Begins to order at this node."""
        stream, name, churn = self._cluster.sim.stream, node.node_id, self._cluster.scenario.churn
        notes = self._note(node, stream(f"operator/{name}/{incarnation}"))
        rng = stream(f"changes/{name}/{incarnation}")
        changes = self._change(node, rng) if churn is None else self._churn(node, rng, churn)
        return [asyncio.create_task(notes), asyncio.create_task(changes)]

    async def _note(self, node: Node, rng: random.Random) -> None:
        """Proposes epochs at this node that change nothing but their note, until the faults are over."""
        cluster = self._cluster
        every_s = cluster.scenario.epochs_every_s * len(cluster.scenario.nodes)
        while every_s and not cluster.settling:
            await asyncio.sleep(rng.expovariate(1 / every_s))
            agreement = node.epochs.agreement
            if agreement is None or cluster.settling:
                continue
            self.proposed += 1
            try:
                await agreement.propose(partial(_noted, f"{node.node_id} {self.proposed}"), PROPOSE_TIMEOUT_S)
            except DHTError as error:
                cluster.sim.trace.record("not-agreed", f"{node.node_id} {type(error).__name__}")
            else:
                self.agreed += 1

    async def _change(self, node: Node, rng: random.Random) -> None:
        """Orders at this node that some node leave, or that a change be undone, until the faults are over."""
        cluster = self._cluster
        every_s = cluster.scenario.changes_every_s * len(cluster.scenario.nodes)
        while every_s and not cluster.settling:
            await asyncio.sleep(rng.expovariate(1 / every_s))
            if node.epochs.agreement is None or cluster.settling:
                continue
            what = rng.choice(("leave", "leave", "remove", "cancel"))
            await self._order(node, Order(what, rng.choice(node.known_topology.members).node_id))

    async def _churn(self, node: Node, rng: random.Random, churn: Churn) -> None:
        """Orders at this node one change after the other; whose disk is lost, is removed, after the faults too, unless
        its host was started to take its place."""
        cluster = self._cluster
        every_s = cluster.scenario.changes_every_s * len(cluster.scenario.nodes)
        while True:
            await asyncio.sleep(rng.expovariate(1 / every_s))
            if node.epochs.agreement is None:
                continue
            topology = node.known_topology
            lost = cluster.still_lost(cluster.newest() or topology)
            dead = [name for name in topology.by_id if node.detector.status(name) in GONE and name != node.node_id]
            if lost and (cluster.settling or rng.getrandbits(1)):
                name = next(iter(lost))
                member = topology.by_id.get(name)
                held_up = topology.in_transition and member is not None and member.state != LEAVING
                replaced = name in cluster.replacing
                if held_up or cluster.settling or not (churn.evicts or replaced):
                    await self._order(node, Order("cancel") if held_up else Order("remove", name, force=True))
            elif cluster.settling:
                continue
            elif topology.in_transition:
                if rng.random() < churn.cancel_share:
                    await self._order(node, Order("cancel"))
            elif not churn.rest_s or cluster.sim.now % (2 * churn.rest_s) < churn.rest_s:
                force = rng.random() < churn.force_share
                what, names = ("remove", dead) if dead and rng.getrandbits(1) else ("leave", list(topology.by_id))
                if rng.random() < churn.weight_share:
                    what = "weight"
                order = Order(what, rng.choice(names), force=force, weight=rng.choice((1.0, 2.0, 3.0)))
                if not (dead and churn.evicts):  # a change in between would begin its patience anew
                    await self._order(node, order)

    async def _order(self, node: Node, order: Order) -> None:
        self.ordered += 1
        removes = order.what == "remove"
        self._removing[order.node] += removes
        try:
            await node.changes.order(order)
        except DHTError as error:
            self._cluster.sim.trace.record("not-changed", f"{node.node_id} {order} {type(error).__name__}")
            if isinstance(error, ChangeRefused | InvalidRequest | Unavailable):  # else it may come about yet
                self._removing[order.node] -= removes
        else:
            self.begun += 1
            self._removing[order.node] -= removes

    def saw(self, topology: Topology) -> None:
        """A topology that is on a disk. What is removed by nobody's order was evicted."""
        name = (topology.origin, *topology.order)
        if name in self._seen:
            return
        self._seen.add(name)
        note = topology.note.removeprefix(_DONE)
        member, removed, _ = note.partition(_REMOVED)
        if note == topology.note:
            if removed and topology.in_transition:
                (self._evicted.discard if self._removing[member] > 0 else self._evicted.add)(member)
            return
        kinds = [kind for kind, words in _KINDS.items() if words in note]
        self.changes.update(kinds[-1:])
        self.changes["evictions"] += bool(removed) and member in self._evicted

    def keep_up(self) -> None:
        """Has the nodes compare their replicas, and reclaim, from now on; they are not started anew for that, so that
        what they remember of the changes is judged with it."""
        self.keeping_up = True
        for name in sorted(self._cluster.running):
            self._cluster.sim.hosts[name].spawn(self._keep_up(self._cluster.running[name]))

    async def _keep_up(self, node: Node) -> None:
        while True:
            try:
                node.antientropy.repair(EVERYTHING)
                await node.reclaimer.round()
            except (DHTError, TimeoutError) as error:
                self._cluster.sim.trace.record("not-kept-up", f"{node.node_id} {type(error).__name__}")
            await asyncio.sleep(KEEP_UP_S)


def _noted(note: str, base: Topology) -> Topology | None:
    """An epoch with this note, once."""
    return None if base.note == note else base.next(base.members, note, 0)
