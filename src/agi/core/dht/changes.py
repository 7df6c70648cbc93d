"""Changes of the members: who may join, leave or be removed, and the two epochs of each change (DESIGN section 5).

A change is first decided as a transition, in which replicas before and after it both count; every node that is to hold
something new fills itself (migration.py); when all have, a voter proposes the final epoch. A change that cannot come to
its end, since a node that has to fill itself is away for long, or since an operator says so, is undone by an epoch too
(T8). There is one change at a time.

Going on without a member that is away is not possible: it may hold the only copy of its quorum's part, and counts as a
replica afterwards without having merged what the others have (T6). So the change is undone, and one that would be
undone at once is not begun; whoever is away for `eviction_timeout` is removed by a change of its own (T9).
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
from agi.core.dht.plans import plan, plan_recovery
from agi.core.dht.protocol.messages import ChangeState, ChangeStateReply, Hello, Query
from agi.core.dht.protocol.versioning import node_hash
from agi.core.dht.ring import VNODES_MAX, check_node_hashes
from agi.core.dht.tasks import all_of
from agi.core.dht.topology import JOINING, LEAVING, NORMAL, Member, Topology
from agi.core.dht.transport.handshake import Nobody, greet
from agi.core.dht.treekeeper import Own
from agi.core.dht.types import MemberStatus

if TYPE_CHECKING:
    from agi.core.dht.node import Node

_log = structlog.get_logger("agi.core.dht.changes")

PROPOSE_TIMEOUT_S = 5.0
ROOM_S = 4.0
"""How long a change waits beforehand for members to make room."""
RECOVER_TIMEOUT_S = 8.0
STEP_S = 0.5
"""How often voters look whether the change under way is complete, on average."""
STATE_TIMEOUT_S = 2.0
REFUSED_MAX = 64
"""Nodes of which is kept why they were not taken in."""
TELL_S = 5.0
"""How often the log says how far a change is."""
SAY_AGAIN_S = 60.0
"""The log repeats so often why a change cannot be ended, or a member not be evicted."""
SECOND_CHOICE_S = 3.0
"""Voters other than the first wait so long before they propose what the first should have."""


class Order(msgspec.Struct, frozen=True):
    """What an operator asks for: `what` is "leave", "remove", "weight", "recover" or "cancel"; as a question only,
    "join" or "replace". `dry_run`: only what would move.

    Attributes:
        force: although fewer nodes than replicas remain.
        lose_data: of "remove": although too few replicas are left; what only the removed held is gone.
        weight: of "weight" and "join". `rack`, `zone`: of "join" and "replace".
        lost, confirm: of "recover": who never comes back, and the cluster's name.
    """

    what: str
    node: str = ""
    force: bool = False
    dry_run: bool = False
    lose_data: bool = False
    weight: float = 0.0
    rack: str = ""
    zone: str = ""
    lost: tuple[str, ...] = ()
    confirm: str = ""


class _Said:
    """Lets a line through that says something new, or the same after so long."""

    def __init__(self, again_s: float = SAY_AGAIN_S) -> None:
        self._again_s = again_s
        self._last = ""
        self._at = 0.0

    def pass_(self, line: str, now: float) -> bool:
        if line == self._last and now - self._at < self._again_s:
            return False
        self._last, self._at = line, now
        return True

    def over(self) -> None:
        """What was said does not hold any more: it is news when it comes about again."""
        self._last = ""


class Changes:
    """
    Args:
        own: runs a coroutine as a task that the node owns.
        join_timeout_s: a change is given up when a node that has to fill itself has been away for so long.
        eviction_timeout_s: a member that has been away for so long is removed; 0 for never.
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
        self._refused: dict[str, DHTError] = {}
        self._away_since: dict[str, float] = {}
        self._not_ended, self._not_evicted, self._suspended = _Said(), _Said(), _Said(float("inf"))

    def start(self) -> None:
        self._own(self._drive(), "changes")
        self._own(self._tell(), "progress of changes")

    # --- joining

    def asked_to_join(self, hello: Hello) -> None:
        """A node that the topology does not name has found this cluster. One at a time is looked at: it asks again, and
        hears why it was refused the last time, which this raises."""
        node = self._node
        topology = node.topology
        if topology is None or node.stopping or self._admitting or topology.in_transition:
            return
        known = topology.by_id.get(hello.name)
        if known is not None and (known.disk_id == hello.disk_id or hello.replaces != hello.name):
            return
        self._admitting = True
        self._own(self._admit(hello), "admit")
        refused = self._refused.get(hello.disk_id)
        if refused is not None:
            raise refused

    async def _admit(self, hello: Hello) -> None:
        try:
            member = Member(
                hello.name, hello.disk_id, hello.address, hello.weight, hello.rack, hello.zone, state=JOINING
            )
            await self._reach(member)
            topology = await self._propose(partial(self._joined, member, hello.replaces))
            _log.info("joining", joiner=member.node_id, epoch=topology.epoch)
            self._refused.pop(hello.disk_id, None)
        except DHTError as error:
            if str(error) != str(self._refused.get(hello.disk_id)):
                _log.warning("join_refused", joiner=hello.name, error=str(error))
            while len(self._refused) >= REFUSED_MAX:
                self._refused.pop(next(iter(self._refused)))
            self._refused[hello.disk_id] = error
        finally:
            self._admitting = False

    async def _reach(self, member: Member) -> None:
        """Its advertised address leads to it, not only it to us. Raises what tells why not."""
        link, theirs = await greet(self._node.seed, member.address, self._node.hello(), Nobody())
        link.close()
        if (theirs.name, theirs.disk_id) != (member.node_id, member.disk_id):
            raise HelloRefused(f"at {member.address}, which {member.node_id} advertises, {theirs.name} answers")

    def _joined(self, member: Member, replaces: str, base: Topology) -> Topology | None:
        known = base.by_id.get(member.node_id)
        if known is not None and (known.disk_id == member.disk_id or replaces != member.node_id):
            return None
        if known is None:
            check_node_hashes([*base.by_id, member.node_id], node_hash)
        if not replaces:
            return self._transition(base, [*base.members, member], f"{member.node_id} joins")
        if replaces not in base.by_id:
            raise InvalidRequest(f"{member.node_id} is to replace {replaces!r}, which is no member")
        if not self._is_dead(replaces):
            raise ChangeRefused(f"{member.node_id} is to replace {replaces}, which is not held to be dead")
        if known is None:
            members = [*_leaving(base, replaces), member]
            return self._transition(base, members, f"{member.node_id} replaces {replaces}")
        members = [*(m for m in base.members if m.node_id != replaces), member]
        return self._transition(base, members, f"{replaces} joins in its own place, with a new disk", lost=(known,))

    # --- what operators order

    async def order(self, order: Order) -> dict[str, object]:
        """Begins a change, or undoes the one under way; returns the topology's epoch and note, and the disk of the node
        that it is about, which tells it from one that joins anew under its name; for a dry run the plan (`plan`).
        Raises ChangeRefused, InvalidRequest, Unavailable, OutcomeUnknown."""
        what: dict[str, Callable[[Topology], Topology | None]] = {
            "leave": partial(self._without, order),
            "remove": partial(self._without, order),
            "weight": partial(self._weighted, order),
            "cancel": self._cancelled,
            "join": partial(self._supposed, order),
            "replace": partial(self._supposed, order),
        }
        if order.what == "recover":
            return await self._recover(order)
        if order.what not in what:
            raise InvalidRequest(f"unknown change {order.what!r}")
        if order.dry_run:
            base = self._node.known_topology
            return await plan(self._node, what[order.what](base) or base)
        if order.what in ("join", "replace"):
            raise InvalidRequest("a node joins by being started: `agi-dht serve`")
        topology = await self._propose(what[order.what])
        member = topology.by_id.get(order.node)
        return {
            "epoch": topology.epoch,
            "note": topology.note,
            "in_transition": topology.in_transition,
            "disk_id": member.disk_id if member is not None else "",
        }

    def _without(self, order: Order, base: Topology) -> Topology | None:
        name = order.node
        member = base.by_id.get(name)
        if member is None:
            if name in {gone.node_id for gone in base.lost}:
                return None
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
            instead = f"start one in its place (`agi-dht replace {name}`)" if dead else "add one first"
            raise ChangeRefused(
                f"without {name} there are {len(base.members) - 1} nodes for {base.factor} replicas: {instead}, or "
                "force it"
            )
        if order.what == "remove" and order.lose_data:
            return self._given_up(base, name)
        return self._transition(
            base, _leaving(base, name), f"{name} {'leaves' if order.what == 'leave' else 'is removed'}"
        )

    def _given_up(self, base: Topology, name: str) -> Topology:
        """The epoch in which a dead node counts no more, whatever it held. Where that is under way for others, it goes
        on for all of them."""
        if base.in_transition and not base.recovering:
            raise ChangeRefused(f"another change is under way: {base.note}")
        names = ", ".join([*(gone.node_id for gone in base.lost), name])
        return base.without([name], f"{names} given up for lost", self._node.clock.wall_ms())

    def _weighted(self, order: Order, base: Topology) -> Topology | None:
        member = base.by_id.get(order.node)
        if member is None:
            raise InvalidRequest(f"there is no node {order.node!r} in the cluster")
        points = order.weight * base.virtual_nodes
        if not (order.weight > 0 and points <= VNODES_MAX):
            raise InvalidRequest(
                f"a weight is above 0 and at most {VNODES_MAX / base.virtual_nodes:g}, not {order.weight}"
            )
        if (member.next_weight or member.weight) == order.weight:
            return None
        members = [
            msgspec.structs.replace(m, next_weight=order.weight) if m.node_id == order.node else m for m in base.members
        ]
        return self._transition(
            base, members, f"{order.node} gets weight {order.weight:g} instead of {member.weight:g}"
        )

    def _supposed(self, order: Order, base: Topology) -> Topology | None:
        """What would follow if a node joined now, or came in the place of another."""
        name = order.node if order.what == "join" and order.node else "(new node)"
        old = base.by_id.get(order.node) if order.what == "replace" else None
        weight = order.weight or (old.weight if old is not None else 1.0)
        if not 0 < weight * base.virtual_nodes <= VNODES_MAX:
            raise InvalidRequest(f"a weight is above 0 and at most {VNODES_MAX / base.virtual_nodes:g}, not {weight}")
        member = Member(name, "", "supposed:1", weight, order.rack, order.zone, state=JOINING)
        if name in base.by_id:
            raise InvalidRequest(f"there is a node {name!r} in the cluster already")
        return self._joined(member, order.node if order.what == "replace" else "", base)

    async def _recover(self, order: Order) -> dict[str, object]:
        node = self._node
        base, recovery = node.known_topology, node.epochs.recovery
        if order.dry_run:
            survivors = recovery.survivors(base, order.lost)
            return await plan_recovery(node, base, base.recovered(order.lost, 0), survivors)
        if order.confirm != base.cluster:
            raise InvalidRequest(f"a recovery is confirmed by the cluster's name, which is not {order.confirm!r}")
        topology = await recovery.propose(order.lost, RECOVER_TIMEOUT_S)
        return {
            "epoch": topology.epoch,
            "generation": topology.generation,
            "note": topology.note,
            "in_transition": topology.in_transition,
            "lost": [member.node_id for member in topology.lost],
        }

    def _cancelled(self, base: Topology) -> Topology | None:
        return base.undone(self._node.clock.wall_ms(), ordered=True) if base.in_transition else None

    def _transition(
        self, base: Topology, members: Sequence[Member], note: str, lost: tuple[Member, ...] = ()
    ) -> Topology:
        """The epoch that begins a change. Raises ChangeRefused where it could not come to its end (T8)."""
        if base.in_transition:
            raise ChangeRefused(f"another change is under way: {base.note}")
        topology = base.next(members, note, self._node.clock.wall_ms(), lost)
        topology.check_unique()
        if not any(member.state == NORMAL for member in topology.members):
            raise ChangeRefused("no node would remain")
        ring = topology.ring()
        assert isinstance(ring, JointRing)
        gone = {member.node_id for member in lost}
        sets = {part.replicas.old for part in ring.partitions() if isinstance(part.replicas, JointSet)}
        sets |= {part.replicas for part in topology.ring_before().partitions() if not gone.isdisjoint(part.replicas)}
        up = {self._node.node_id, *self._node.peers.usable} - gone
        for replicas in sorted(sets):
            if sum(name in up for name in replicas) < majority(len(replicas)):
                missing = ", ".join(name for name in replicas if name not in up)
                raise ChangeRefused(f"too few replicas are reachable to move their data: {missing} missing")
        if missing := ", ".join(self._awaited(topology, self._join_timeout_s, NORMAL)):
            raise ChangeRefused(
                f"{missing} would have to take part, but is away for long: start it, or remove it first (of several: "
                "with --lose-data)"
            )
        return topology

    async def _propose(self, change: Callable[[Topology], Topology | None]) -> Topology:
        agreement = self._node.epochs.agreement
        assert agreement is not None, "the node has not formed"
        try:
            planned = change(self._node.known_topology)
        except DHTError:
            planned = None  # the proposal itself will tell, by the newest topology
        if planned is not None:
            await self._have_room_made(planned)
        return await agreement.propose(change, PROPOSE_TIMEOUT_S)

    async def _have_room_made(self, planned: Topology) -> None:
        """Whoever is to gain something first drops what is left of what it held there before. It does so when it adopts
        the change, too (T10); but then requests wait for it."""
        ring = planned.ring()
        if not isinstance(ring, JointRing):
            return
        sets = {part.replicas for part in ring.partitions() if isinstance(part.replicas, JointSet)}
        gaining = {name for replicas in sets for name in set(replicas.new).difference(replicas.old)}
        await all_of(self._make_room(name) for name in sorted(gaining & self._node.known_topology.by_id.keys()))

    async def _make_room(self, name: str) -> None:
        node = self._node
        try:
            async with asyncio.timeout(ROOM_S):
                if name == node.node_id:
                    await node.reclaimer.drop_leftovers()
                else:
                    await node.calls.call(name, Query(0, "room", int(ROOM_S * 1000)))
        except (DHTError, TimeoutError) as error:
            _log.info("room_not_made", member=name, error=str(error) or "not in time")

    # --- bringing a change to its end

    async def _tell(self) -> None:
        """Says in the log how far this node is, for ever."""
        brought = 0
        while True:
            await asyncio.sleep(TELL_S)
            node, migration = self._node, self._node.migration
            if node.known_topology.in_transition:
                _log.info(
                    "change_under_way",
                    note=node.known_topology.note,
                    away=self._awaited(node.known_topology, 0.0, NORMAL, JOINING),
                    ready=migration.ready,
                    arcs=migration.arcs,
                    arcs_done=migration.arcs_done,
                    keys=migration.keys,
                    bytes=migration.bytes,
                    bytes_per_s=round((migration.bytes - brought) / TELL_S),
                )
            brought = migration.bytes

    async def _drive(self) -> None:
        """Voters bring the change under way to its end, for ever."""
        began, epoch = 0.0, 0
        while True:
            await asyncio.sleep(STEP_S * (0.5 + self._rng.random()))
            node = self._node
            topology = node.known_topology
            now = node.clock.monotonic()
            self._look(topology, now)
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
                if self._hopeless(topology, now - began):
                    await self._propose(partial(self._ended, topology, False))
                elif await self._complete(topology):
                    await self._propose(partial(self._ended, topology, True))
            except DHTError as error:
                if self._not_ended.pass_(f"{topology.epoch} {error}", now):
                    _log.warning("change_not_ended", epoch=topology.epoch, note=topology.note, error=str(error))

    def _ended(self, change: Topology, done: bool, base: Topology) -> Topology | None:
        if base.digest != change.digest:
            return None
        now_ms = self._node.clock.wall_ms()
        return base.finished(now_ms) if done else base.undone(now_ms)

    def _hopeless(self, topology: Topology, under_way_s: float) -> bool:
        """Somebody without whom the change cannot end has been away for long while it was under way: who began it may
        not have known for how long before. A recovery goes on: what is lost is no member any more (T12), and who dies
        amid it can be given up for lost too."""
        if topology.recovering or under_way_s <= self._join_timeout_s:
            return False
        return bool(self._awaited(topology, self._join_timeout_s, NORMAL, JOINING))

    def _awaited(self, topology: Topology, longer_than_s: float, *states: str) -> list[str]:
        """Members in one of these states that have been away for longer; one that leaves is not waited for."""
        away = self._away_s(self._node.clock.monotonic())
        return [m.node_id for m in topology.members if m.state in states and away.get(m.node_id, -1.0) > longer_than_s]

    async def _evict(self, topology: Topology, now: float) -> None:
        """Removes a member that has been away for long: one at a time, none when several are away, and never so that
        fewer nodes than replicas remain (T9). The second of two would have to take part in the removal of the first
        (T6), so however far apart they went, an operator decides."""
        away = self._away_s(now)
        long = [name for name, since_s in away.items() if since_s > self._eviction_timeout_s]
        why = ""
        if not self._eviction_timeout_s or not long:
            pass
        elif len(away) > 1:
            why = f"{', '.join(away)} are away at the same time"
        elif len(topology.members) <= max(2, topology.factor):
            why = f"without {long[0]} fewer nodes than replicas would remain"
        else:
            await self._remove(long[0], away[long[0]], now)
        if not why:
            self._suspended.over()
        elif self._suspended.pass_(why, now):
            _log.warning(
                "eviction_suspended", reason=why, away_s={name: round(since_s) for name, since_s in away.items()}
            )

    async def _remove(self, name: str, away_s: float, now: float) -> None:
        """Several voters may propose it at once: the log of the one whose proposal was chosen tells of it."""
        mine: set[str] = set()

        def without(base: Topology) -> Topology | None:
            wanted = self._without(Order("remove", name), base)
            mine.update([wanted.digest] if wanted is not None else ())
            return wanted

        try:
            topology = await self._propose(without)
        except DHTError as error:
            if self._not_evicted.pass_(f"{name} {error}", now):
                _log.warning("not_evicted", member=name, away_s=round(away_s), error=str(error))
        else:
            self._not_evicted.over()
            if topology.digest in mine:
                _log.warning("evicted", member=name, away_s=round(away_s))

    def _look(self, topology: Topology, now: float) -> None:
        """Notes who is away: dead or stopped, since what either held lacks a replica (T9)."""
        away = sorted(name for name in topology.by_id if self._is_dead(name))
        self._away_since = {name: self._away_since.get(name, now) for name in away}

    def _away_s(self, now: float) -> dict[str, float]:
        """For how many seconds this node has seen each member to be away."""
        return {name: now - since for name, since in self._away_since.items() if self._is_dead(name)}

    def _is_dead(self, name: str) -> bool:
        return self._status(name) in (MemberStatus.DEAD, MemberStatus.LEFT)

    async def _complete(self, topology: Topology) -> bool:
        """Every node that stays or joins holds all that it is to hold: then a majority of each old set has adopted the
        transition too, since each of them was filled from one (T4, T6)."""
        names = [member.node_id for member in topology.members if member.state != LEAVING]
        states = await all_of(self._ready(name, topology.epoch) for name in names)
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
