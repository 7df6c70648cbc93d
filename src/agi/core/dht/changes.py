"""Changes of the members: who may join, leave or be removed, and the two epochs of each change (DESIGN section 5).

A change is first decided as a transition, in which replicas before and after it both count; every node that is to hold
something new fills itself (migration.py); when all have, a voter proposes the final epoch. A change that cannot come to
its end, since a node that joins is dead for long, or since an operator says so, is undone by an epoch too (T8).
There is one change at a time.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import msgspec
import structlog

from agi.core.dht.errors import (
    ChangeRefused,
    DHTError,
    HelloRefused,
    InvalidRequest,
)
from agi.core.dht.joint import JointRing, JointSet, majority
from agi.core.dht.protocol.messages import ChangeState, ChangeStateReply, Hello
from agi.core.dht.protocol.versioning import node_hash
from agi.core.dht.ring import TOKENS, check_node_hashes
from agi.core.dht.topology import JOINING, LEAVING, NORMAL, Member, Topology
from agi.core.dht.transport.handshake import Nobody, greet
from agi.core.dht.treekeeper import Own
from agi.core.dht.types import MemberStatus

if TYPE_CHECKING:
    from agi.core.dht.node import Node

_log = structlog.get_logger("agi.core.dht.changes")

PROPOSE_TIMEOUT_S = 5.0
STEP_S = 0.5
"""How often voters look whether the change under way is complete, on average."""
STATE_TIMEOUT_S = 2.0
SECOND_CHOICE_S = 3.0
"""Voters other than the first wait so long before they propose what the first should have."""


class Order(msgspec.Struct, frozen=True):
    """What an operator asks for: `what` is "leave", "remove" or "cancel". `dry_run`: only what would move."""

    what: str
    node: str = ""
    force: bool = False
    dry_run: bool = False


class Changes:
    """
    Args:
        own: runs a coroutine as a task that the node owns.
        join_timeout_s: a change is given up when a node that joins has been dead for so long.
        eviction_timeout_s: a member that has been dead for so long is removed; 0 for never.
    """

    def __init__(
        self, node: Node, rng: random.Random, own: Own, *, join_timeout_s: float, eviction_timeout_s: float
    ) -> None:
        self._node = node
        self._rng = rng
        self._own = own
        self._join_timeout_s = join_timeout_s
        self._eviction_timeout_s = eviction_timeout_s
        self._admitting = False
        self._dead_since: dict[str, float] = {}

    def start(self) -> None:
        self._own(self._drive(), "changes")

    # --- joining

    def asked_to_join(self, hello: Hello) -> None:
        """A node that the topology does not name has found this cluster. One at a time is looked at: it asks again."""
        node = self._node
        topology = node.topology
        if topology is None or node.stopping or self._admitting or topology.in_transition:
            return
        if hello.name in topology.by_id:
            return
        self._admitting = True
        self._own(self._admit(hello), "admit")

    async def _admit(self, hello: Hello) -> None:
        try:
            member = Member(
                hello.name, hello.disk_id, hello.address, hello.weight, hello.rack, hello.zone, state=JOINING
            )
            await self._reach(member)
            topology = await self._propose(partial(self._joined, member, hello.replaces))
            _log.info("joining", joiner=member.node_id, epoch=topology.epoch)
        except DHTError as error:
            _log.warning("join_refused", joiner=hello.name, error=str(error))
        finally:
            self._admitting = False

    async def _reach(self, member: Member) -> None:
        """Its advertised address leads to it, not only it to us. Raises what tells why not."""
        link, theirs = await greet(self._node.seed, member.address, self._node.hello(), Nobody())
        link.close()
        if (theirs.name, theirs.disk_id) != (member.node_id, member.disk_id):
            raise HelloRefused(f"at {member.address}, which {member.node_id} advertises, {theirs.name} answers")

    def _joined(self, member: Member, replaces: str, base: Topology) -> Topology | None:
        if member.node_id in base.by_id:
            return None
        check_node_hashes([*base.by_id, member.node_id], node_hash)
        if not replaces:
            return self._transition(base, [*base.members, member], f"{member.node_id} joins")
        if replaces not in base.by_id:
            raise InvalidRequest(f"{member.node_id} is to replace {replaces!r}, which is no member")
        if not self._is_dead(replaces):
            raise ChangeRefused(f"{member.node_id} is to replace {replaces}, which is not held to be dead")
        members = [*_leaving(base, replaces), member]
        return self._transition(base, members, f"{member.node_id} replaces {replaces}")

    # --- what operators order

    async def order(self, order: Order) -> dict[str, object]:
        """Begins a change, or undoes the one under way; returns the topology's epoch and note, or for a dry run the
        plan (`plan`). Raises ChangeRefused, InvalidRequest, Unavailable, OutcomeUnknown."""
        if order.dry_run:
            planned = self._without(order, self._node.known_topology)
            return await self.plan(planned or self._node.known_topology)
        if order.what == "cancel":
            topology = await self._propose(self._cancelled)
        elif order.what in ("leave", "remove"):
            topology = await self._propose(partial(self._without, order))
        else:
            raise InvalidRequest(f"unknown change {order.what!r}")
        return {"epoch": topology.epoch, "note": topology.note, "in_transition": topology.in_transition}

    def _without(self, order: Order, base: Topology) -> Topology | None:
        name = order.node
        member = base.by_id.get(name)
        if member is None:
            raise InvalidRequest(f"there is no node {name!r} in the cluster")
        if member.state == LEAVING:
            return None
        dead = self._is_dead(name)
        if order.what == "remove" and not dead:
            raise ChangeRefused(f"{name} is not held to be dead: let it leave")
        if order.what == "leave" and dead:
            raise ChangeRefused(f"{name} is dead: remove it")
        if len(base.members) == 1:
            raise ChangeRefused(f"{name} is the only node")
        if len(base.members) - 1 < base.factor and not order.force:
            raise ChangeRefused(
                f"without {name} there are {len(base.members) - 1} nodes for {base.factor} replicas: add one first, or "
                "force it"
            )
        return self._transition(
            base, _leaving(base, name), f"{name} {'leaves' if order.what == 'leave' else 'is removed'}"
        )

    async def plan(self, topology: Topology) -> dict[str, object]:
        """What a transition moves, as far as this node can tell: {"note", "arcs": of the ring that change hands,
        "moves": {node id: {"arcs", "share": of the ring, "keys", "bytes"}} of what each gains}. Keys and bytes are
        estimates from this node's own density."""
        ring = topology.ring()
        arcs, gains = 0, dict[str, list[int]]()
        own = 0
        for part in ring.partitions():
            replicas = part.replicas
            if self._node.node_id in (replicas.old if isinstance(replicas, JointSet) else replicas):
                own += part.width
            if isinstance(replicas, JointSet):
                arcs += 1
                for name in set(replicas.new).difference(replicas.old):
                    gain = gains.setdefault(name, [0, 0])
                    gain[0] += 1
                    gain[1] += part.width
        stats = await self._node.store.stats()
        keys, size = (stats.records / own, stats.bytes / own) if own else (0.0, 0.0)
        moves = {
            name: {"arcs": count, "share": width / TOKENS, "keys": round(width * keys), "bytes": round(width * size)}
            for name, (count, width) in sorted(gains.items())
        }
        return {"note": topology.note, "arcs": arcs, "moves": moves}

    def _cancelled(self, base: Topology) -> Topology | None:
        return base.undone(self._node.clock.wall_ms()) if base.in_transition else None

    def _transition(self, base: Topology, members: Sequence[Member], note: str) -> Topology:
        """The epoch that begins a change. Raises ChangeRefused where it could not come to its end (T8)."""
        if base.in_transition:
            raise ChangeRefused(f"another change is under way: {base.note}")
        topology = base.next(members, note, self._node.clock.wall_ms())
        topology.check_unique()
        if not any(member.state == NORMAL for member in topology.members):
            raise ChangeRefused("no node would remain")
        ring = topology.ring()
        assert isinstance(ring, JointRing)
        up = {self._node.node_id, *self._node.peers.usable}
        for part in ring.partitions():
            replicas = part.replicas
            if isinstance(replicas, JointSet) and sum(name in up for name in replicas.old) < majority(
                len(replicas.old)
            ):
                missing = ", ".join(name for name in replicas.old if name not in up)
                raise ChangeRefused(f"too few replicas are reachable to move their data: {missing} missing")
        return topology

    async def _propose(self, change: Callable[[Topology], Topology | None]) -> Topology:
        agreement = self._node.epochs.agreement
        assert agreement is not None, "the node has not formed"
        return await agreement.propose(change, PROPOSE_TIMEOUT_S)

    # --- bringing a change to its end

    async def _drive(self) -> None:
        """Voters bring the change under way to its end, for ever."""
        began, epoch = 0.0, 0
        while True:
            await asyncio.sleep(STEP_S * (0.5 + self._rng.random()))
            node = self._node
            topology = node.known_topology
            now = node.clock.monotonic()
            if not topology.in_transition or node.node_id not in topology.voters:
                if node.node_id in topology.voters:
                    await self._evict(topology, now)
                continue
            if topology.epoch != epoch:
                began, epoch = now, topology.epoch
            voters = [name for name in topology.voters if name == node.node_id or name in node.peers.usable]
            if voters[0] != node.node_id and now - began < SECOND_CHOICE_S:
                continue  # another will do it
            try:
                if self._hopeless(topology, now):
                    await self._propose(partial(self._ended, topology, False))
                elif await self._complete(topology):
                    await self._propose(partial(self._ended, topology, True))
            except DHTError as error:
                _log.warning("change_not_ended", epoch=topology.epoch, note=topology.note, error=str(error))

    def _ended(self, change: Topology, done: bool, base: Topology) -> Topology | None:
        if base.digest != change.digest:
            return None
        now_ms = self._node.clock.wall_ms()
        return base.finished(now_ms) if done else base.undone(now_ms)

    def _hopeless(self, topology: Topology, now: float) -> bool:
        """A node that joins has been dead for long."""
        dead = self._dead_for(topology, now)
        return any(dead.get(m.node_id, 0.0) > self._join_timeout_s for m in topology.members if m.state == JOINING)

    async def _evict(self, topology: Topology, now: float) -> None:
        """Removes a member that has been dead for long: one at a time, none when several are gone at once, and never so
        that fewer nodes than replicas remain (T9)."""
        dead = self._dead_for(topology, now)
        if not self._eviction_timeout_s or len(dead) != 1 or len(topology.members) <= max(2, topology.factor):
            return
        name, since_s = next(iter(dead.items()))
        if since_s <= self._eviction_timeout_s:
            return
        try:
            await self._propose(partial(self._without, Order("remove", name)))
        except DHTError as error:
            _log.warning("not_evicted", member=name, dead_s=round(since_s), error=str(error))
        else:
            _log.warning("evicted", member=name, dead_s=round(since_s))

    def _dead_for(self, topology: Topology, now: float) -> dict[str, float]:
        """How many seconds this node has seen each dead member to be dead."""
        dead = set()
        for member in topology.members:
            status = self._status(member.node_id)
            stopped = status is MemberStatus.LEFT and member.state == JOINING  # others are expected back
            if status is MemberStatus.DEAD or stopped:
                dead.add(member.node_id)
        self._dead_since = {name: self._dead_since.get(name, now) for name in sorted(dead)}
        return {name: now - since for name, since in self._dead_since.items()}

    def _is_dead(self, name: str) -> bool:
        return self._status(name) in (MemberStatus.DEAD, MemberStatus.LEFT)

    async def _complete(self, topology: Topology) -> bool:
        """Every node that stays or joins holds all that it is to hold: then a majority of each old set has adopted the
        transition too, since each of them was filled from one (T4, T6)."""
        names = [member.node_id for member in topology.members if member.state != LEAVING]
        states = await asyncio.gather(*(self._ready(name, topology.epoch) for name in names))
        return all(states)

    async def _ready(self, name: str, epoch: int) -> bool:
        node = self._node
        if name == node.node_id:
            return node.migration.ready and node.epoch == epoch
        try:
            async with asyncio.timeout(STATE_TIMEOUT_S):
                reply = await node.calls.call(name, ChangeState(0, epoch))
        except (DHTError, TimeoutError) as error:
            _log.debug("change_state_unknown", peer=name, error=str(error))
            return False
        assert isinstance(reply, ChangeStateReply)
        return reply.ready

    def _status(self, name: str) -> MemberStatus:
        if name == self._node.node_id:
            return MemberStatus.ALIVE
        return self._node.detector.status(name)


def _leaving(base: Topology, name: str) -> list[Member]:
    return [msgspec.structs.replace(m, state=LEAVING) if m.node_id == name else m for m in base.members]
