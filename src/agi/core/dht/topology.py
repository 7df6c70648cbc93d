"""Who owns what: an immutable, epoch-numbered value that the nodes agree on (DESIGN section 5).

A topology names its members by (node id, disk id), so that a wiped disk under a known name is a stranger (I1). Equal
member sets give equal bytes and so equal hashes: nodes compare topologies by `digest`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from functools import cached_property

import msgspec
import xxhash

from agi.core.dht.errors import ChangeRefused, ClusterError, StorageCorrupt
from agi.core.dht.joint import JointRing, SurvivorRing
from agi.core.dht.ring import Ring
from agi.core.dht.types import Node, parse_address

NORMAL, JOINING, LEAVING = "normal", "joining", "leaving"

_GIVEN_UP, _ORDERED = "given up: ", "given up by order: "

GENERATION_EPOCHS = 1000
"""By so much the epoch jumps with the generation: the lost voters may have decided epochs that no survivor has heard
of, and a message or a promise of one of those must not be taken for one of the new generation."""


class Member(msgspec.Struct, frozen=True, array_like=True, order=True):
    """A node as the topology knows it.

    Attributes:
        address: its advertised gRPC address.
        state: NORMAL; JOINING or LEAVING while the change is under way that brings it in or takes it out.
        next_weight: the weight that the change under way gives it; 0 where it keeps its own.
    """

    node_id: str
    disk_id: str
    address: str
    weight: float = 1.0
    rack: str = ""
    zone: str = ""
    state: str = NORMAL
    next_weight: float = 0.0


class Topology(msgspec.Struct, frozen=True, array_like=True, dict=True):
    """One epoch. Build it with `first` or `next`; members are sorted by node id.

    Attributes:
        generation: raised only where an operator starts anew after a majority of voters was lost (T12).
        voters: the nodes that decide the next epoch: 1, 3 or 5 of the `normal` members (T1).
        lineage: the digest of the first epoch, empty there: epochs of two clusters are never compared by number alone.
        note, decided_ms: for people: what this epoch changed, and when.
        lost: while a change is under way, nodes that count no more at once, with nothing that they hold: those given up
            in a recovery, or the old disk of a member that joins in its own place.
    """

    cluster: str
    generation: int
    epoch: int
    factor: int
    virtual_nodes: int
    hash_algorithm: str
    members: tuple[Member, ...]
    voters: tuple[str, ...] = ()
    lineage: str = ""
    note: str = ""
    decided_ms: int = 0
    lost: tuple[Member, ...] = ()

    @classmethod
    def first(
        cls, cluster: str, factor: int, virtual_nodes: int, hash_algorithm: str, members: Sequence[Member]
    ) -> Topology:
        """Epoch 1 over these members. Equal members give equal bytes, whoever builds it."""
        ordered = tuple(sorted(members))
        voters = choose_voters(ordered, ())
        return cls(cluster, 1, 1, factor, virtual_nodes, hash_algorithm, ordered, voters, note="formed")

    def next(
        self, members: Sequence[Member], note: str, now_ms: int, lost: tuple[Member, ...] | None = None
    ) -> Topology:
        """The epoch after this one, with these members. Voters that are still normal members stay, and so do the lost
        unless others are given."""
        ordered = tuple(sorted(members))
        return msgspec.structs.replace(
            self,
            epoch=self.epoch + 1,
            members=ordered,
            voters=choose_voters(ordered, self.voters),
            lineage=self.origin,
            note=note,
            decided_ms=now_ms,
            lost=self.lost if lost is None else lost,
        )

    @property
    def in_transition(self) -> bool:
        """Whether a change of replica sets is under way: then everything needs quorums of the sets before and after."""
        return bool(self.lost) or any(member.state != NORMAL or member.next_weight for member in self.members)

    @property
    def recovering(self) -> bool:
        """Whether the change under way makes the replicas of lost nodes anew: it cannot be undone."""
        return any(member.node_id not in self.by_id for member in self.lost)

    def finished(self, now_ms: int) -> Topology:
        """The final epoch of the change under way: those that join are in, those that leave or are lost are gone."""
        members = [
            msgspec.structs.replace(member, state=NORMAL, weight=member.next_weight or member.weight, next_weight=0.0)
            for member in self.members
            if member.state != LEAVING
        ]
        return self.next(members, f"done: {self.note}", now_ms, lost=())

    def undone(self, now_ms: int, *, ordered: bool = False) -> Topology:
        """The epoch that gives the change under way up: everything is as it was before. Raises ChangeRefused.

        Args:
            ordered: an operator wants it so: who was to join does not ask again.
        """
        if self.recovering:
            raise ChangeRefused("a recovery cannot be undone: what was lost is not a member any more")
        return self.next(self._before(), f"{_ORDERED if ordered else _GIVEN_UP}{self.note}", now_ms, lost=())

    @property
    def cancelled(self) -> bool:
        """Whether this epoch undid a change because an operator had ordered it."""
        return self.note.startswith(_ORDERED)

    def _before(self) -> list[Member]:
        """The members as they were before the change under way."""
        kept = [
            msgspec.structs.replace(member, state=NORMAL, next_weight=0.0)
            for member in self.members
            if member.state != JOINING
        ]
        return [*kept, *(member for member in self.lost if not self.recovering)]

    def without(self, names: Collection[str], note: str, now_ms: int) -> Topology:
        """The epoch in which these nodes are given up for lost; a change under way is undone by it, a recovery under
        way goes on with more to make anew."""
        before = self._before()
        gone = [member for member in before if member.node_id in names]
        gone += self.lost if self.recovering else ()
        left = [member for member in before if member.node_id not in names]
        return self.next(left, note, now_ms, lost=tuple(sorted(gone)))

    def recovered(self, lost: Collection[str], now_ms: int) -> Topology:
        """The first epoch of the next generation (T12), in which these nodes are given up for lost."""
        topology = self.without(lost, f"recovered without {', '.join(sorted(lost))}", now_ms)
        return msgspec.structs.replace(topology, generation=self.generation + 1, epoch=self.epoch + GENERATION_EPOCHS)

    @property
    def origin(self) -> str:
        """What all epochs of one cluster have in common."""
        return self.lineage or self.digest

    @property
    def order(self) -> tuple[int, int]:
        """The greater one replaces the other (T12)."""
        return self.generation, self.epoch

    @cached_property
    def placement(self) -> str:
        """A digest of what decides who holds which key: epochs in which no replica set changed have the same (T3). Each
        change has one of its own: what was done for one that was given up does not count when it is tried again."""
        members = [(m.node_id, m.disk_id, m.weight, m.rack, m.zone, m.state, m.next_weight) for m in self.members]
        change = self.epoch if self.in_transition else 0
        what = (self.factor, self.virtual_nodes, self.hash_algorithm, members, change)
        return str(xxhash.xxh3_128_hexdigest(msgspec.msgpack.encode(what)))

    @cached_property
    def packed(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @cached_property
    def digest(self) -> str:
        return str(xxhash.xxh3_128_hexdigest(self.packed))

    @cached_property
    def by_id(self) -> dict[str, Member]:
        return {member.node_id: member for member in self.members}

    @cached_property
    def replica_count(self) -> int:
        """Replicas of each key: the factor, or all nodes while there are fewer. Quorums are of this number. Those that
        join do not count yet."""
        return min(self.factor, sum(member.state != JOINING for member in self.members))

    def ring(self) -> Ring | JointRing:
        """Who holds which key now: while a change is under way, the replicas before and after it. Made once."""
        return self._now

    @cached_property
    def _now(self) -> Ring | JointRing:
        if not self.in_transition:
            return self._ring([(member, member.weight) for member in self.members])
        before = self.ring_before()
        after = self._ring([(m, m.next_weight or m.weight) for m in self.members if m.state != LEAVING])
        if not self.lost:
            return JointRing(before, after)
        return JointRing(SurvivorRing(before, after, frozenset(member.node_id for member in self.lost)), after)

    def ring_before(self) -> Ring:
        """The ring before the change under way, the lost included."""
        held = [member for member in self.members if member.state != JOINING]
        return self._ring([(member, member.weight) for member in (*held, *self.lost)])

    def _ring(self, members: Sequence[tuple[Member, float]]) -> Ring:
        nodes = []
        for member, weight in members:
            host, port = parse_address(member.address)
            labels = {name: value for name, value in (("rack", member.rack), ("zone", member.zone)) if value}
            nodes.append(Node(member.node_id, host, port, weight, self.virtual_nodes, labels))
        return Ring(nodes, self.hash_algorithm, self.factor)

    def check_unique(self) -> None:
        """Raises ClusterError where two members cannot be told apart."""
        for field in ("node_id", "disk_id", "address"):
            seen: dict[str, Member] = {}
            for member in self.members:
                name = getattr(member, field)
                if name in seen:
                    raise ClusterError(f"two members have the {field} {name!r}")
                seen[name] = member


def choose_voters(members: Sequence[Member], kept: Sequence[str]) -> tuple[str, ...]:
    """5, 3 or 1 of the normal members, as there are members; `kept` ones first, then spread over zones and racks.

    >>> nodes = [Member(f"n{i}", "d", f"h:{7000 + i}", zone=f"z{i % 2}") for i in range(4)]
    >>> choose_voters(nodes, ()), choose_voters(nodes[1:], ("n0", "n1", "n2"))
    (('n0', 'n1', 'n2'), ('n1', 'n2', 'n3'))
    """
    normal = {member.node_id: member for member in members if member.state == NORMAL}
    count = 5 if len(normal) >= 5 else 3 if len(normal) >= 3 else min(1, len(normal))
    chosen = [normal[name] for name in kept if name in normal][:count]
    while len(chosen) < count:
        zones = Counter(member.zone for member in chosen)
        racks = Counter((member.zone, member.rack) for member in chosen)
        left = [member for member in normal.values() if member not in chosen]
        chosen.append(min(left, key=lambda m: (zones[m.zone], racks[m.zone, m.rack], m.node_id)))
    return tuple(sorted(member.node_id for member in chosen))


def unpack(data: bytes) -> Topology:
    """The topology that `packed` gave. Raises StorageCorrupt."""
    try:
        return msgspec.msgpack.decode(data, type=Topology)
    except msgspec.DecodeError as error:
        raise StorageCorrupt(f"a stored or received topology cannot be read: {error}") from None
