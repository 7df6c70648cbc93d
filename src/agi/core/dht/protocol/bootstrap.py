"""How the configured nodes agree on the first topology, once, in any start order (PROTOCOLS T11).

Peer addresses only reach nodes. Each node keeps asking every address that it knows, of its own list and its peers'
lists, for a Hello; U is everything reachable through the lists. Epoch 1 is decided by **all** of U, once:

    1. U is `settled` at a node when every address of every list in U has answered.
    2. A node votes, durably and once in the life of its data folder, for the topology over U when every member reports
       the same settled U.
    3. A node has formed when it has seen the same vote from every member; it stores the topology. Whoever sees a formed
       peer that names it as a member stores that topology: it was decided.

*By majority: {A,B} form while C never started; A is wiped, B is cut off, A and C form again.* All-of-U cannot do that:
a second topology needs the vote of a node that has given its only one. A node whose vote cannot be completed any more
(a member was wiped in the midst) says so and waits for an operator: nothing was stored yet, so the folders may be
emptied and the start repeated, or the dead be left out by the operator's explicit flag.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from agi.core.dht.errors import BootstrapConflict, ClusterError, HelloRefused
from agi.core.dht.protocol.messages import Hello
from agi.core.dht.protocol.versioning import node_hash
from agi.core.dht.topology import Member, Topology, unpack


@dataclass(frozen=True, slots=True)
class StoreVote:
    """Store the vote durably, then report it with `voted`: no Hello tells of it before."""

    topology: Topology


@dataclass(frozen=True, slots=True)
class StoreTopology:
    """Store the topology durably; the node has formed or joined."""

    topology: Topology


@dataclass(frozen=True, slots=True)
class Waiting:
    """Nothing to do but to ask again; `reason` is for people."""

    reason: str


class Bootstrap:
    """One node's part in the agreement.

    Args:
        me: this node as a member.
        addresses: the configured peer list (gRPC addresses).
        without: addresses that an operator declared dead for this start.
        first: makes epoch 1 over the given members.
        vote: the vote stored by an earlier start, if any.
        replaces: the member whose place this node is to take; it may be the one of its own name, with another disk.
    """

    def __init__(
        self,
        me: Member,
        addresses: Iterable[str],
        without: Iterable[str],
        first: Callable[[list[Member]], Topology],
        vote: Topology | None,
        replaces: str = "",
    ) -> None:
        self._me = me
        self._replaces = replaces
        self._lists: dict[str, tuple[str, ...]] = {me.node_id: tuple(addresses)}
        self._without = frozenset(without)
        self._first = first
        self._hellos: dict[str, Hello] = {}
        self._answers: dict[str, str] = {}
        self._errors: dict[str, str] = {}
        self._found: dict[str, str] = {}
        self.vote = vote

    @property
    def addresses(self) -> list[str]:
        """Every address to ask, in the order in which they were learnt."""
        found: dict[str, None] = {}
        for addresses in self._lists.values():
            found |= dict.fromkeys(addresses)
        return [address for address in found if address not in self._without]

    @property
    def members_seen(self) -> list[tuple[str, str]]:
        """U as far as it is known: (node id, disk id), sorted."""
        return sorted((member.node_id, member.disk_id) for member in self._members())

    @property
    def settled(self) -> bool:
        return all(address in self._answers for address in self.addresses)

    @property
    def joining(self) -> bool:
        """Whether a cluster was found that runs without this node: it asks to be taken in."""
        # one that came of this node's vote, and has let it go before it heard of it, takes it in like any other
        origins = set(self._found.values())
        return len(origins) == 1 and (self.vote is None or origins == {self.vote.origin})

    def _members(self) -> list[Member]:
        members = [self._me]
        for hello in self._hellos.values():
            members.append(Member(hello.name, hello.disk_id, hello.address, hello.weight, hello.rack, hello.zone))
        return members

    def unreachable(self, address: str, reason: str) -> None:
        """Nobody answered there this time. What it said before no longer counts as reachable."""
        self._errors[address] = reason
        self._answers.pop(address, None)

    def answered(self, address: str, hello: Hello) -> StoreTopology | None:
        """The Hello of whoever answers at that address. Raises ClusterError where two clusters would be mixed; then the
        address counts as unanswered, so that nothing is formed without it."""
        self._answers.pop(address, None)
        try:
            formed = self._judge(address, hello)
        except ClusterError as error:
            self._errors[address] = str(error)
            raise
        self._errors.pop(address, None)
        self._answers[address] = hello.name
        return formed

    def _judge(self, address: str, hello: Hello) -> StoreTopology | None:
        if hello.name == self._me.node_id:
            if hello.disk_id != self._me.disk_id:
                raise ClusterError(f"{address} answers as {hello.name}, which is this node's id, with another disk")
            return None
        if node_hash(hello.name) == node_hash(self._me.node_id):
            raise ClusterError(f"the ids {hello.name!r} and {self._me.node_id!r} hash alike: choose another node id")
        if hello.topology:
            return self._formed(address, unpack(hello.topology))
        self._hellos[hello.name] = hello
        self._lists[hello.name] = tuple(hello.peers)
        return None

    def _formed(self, address: str, topology: Topology) -> StoreTopology | None:
        mine = topology.by_id.get(self._me.node_id)
        if mine is None or (mine.disk_id != self._me.disk_id and self._replaces == mine.node_id):
            self._found[address] = topology.origin
            if len(set(self._found.values())) > 1:
                raise ClusterError(f"the peers {', '.join(sorted(self._found))} belong to different clusters")
            raise HelloRefused(f"asking the cluster at {address} to be taken in")
        if mine.disk_id != self._me.disk_id:
            raise ClusterError(
                f"the cluster at {address} knows {mine.node_id} with another disk: start it with `--replace "
                f"{mine.node_id}`, or remove {mine.node_id} first"
            )
        return StoreTopology(topology)

    def voted(self, topology: Topology) -> None:
        """The vote is durable; from here on it is this node's only one."""
        self.vote = topology

    def step(self) -> StoreVote | StoreTopology | Waiting:
        """What to do now. Raises BootstrapConflict where the votes can never agree."""
        missing = [address for address in self.addresses if address not in self._answers]
        if missing:
            said = "; ".join(f"{address}: {self._errors.get(address, 'not asked yet')}" for address in missing)
            others = [address for address in self.addresses if self._answers.get(address) != self._me.node_id]
            return Waiting(f"waiting for {len(missing)} of {len(others)} configured peers ({said})")
        seen = self.members_seen
        unsure = [
            hello.name for hello in self._hellos.values() if not hello.settled or sorted(hello.members_seen) != seen
        ]
        for hello in self._hellos.values():
            if self._me.node_id not in {name for name, _ in hello.members_seen} and hello.settled:
                return Waiting(f"{hello.name} does not list this node: waiting to be added")
        if unsure and self.vote is None:
            return Waiting(f"waiting until {', '.join(sorted(unsure))} see the same {len(seen)} nodes")
        if self.vote is None:
            topology = self._first(self._members())
            topology.check_unique()
            return StoreVote(topology)
        for hello in self._hellos.values():
            if hello.vote and unpack(hello.vote).digest != self.vote.digest:
                raise BootstrapConflict(
                    f"{hello.name} voted for another first topology than this node: empty the data folders of a "
                    "cluster that never formed, or start every node with the same peers"
                )
        voted = {hello.name for hello in self._hellos.values() if hello.vote}
        wanted = {member.node_id for member in self.vote.members if member.node_id != self._me.node_id}
        disks = dict(seen)
        changed = [m.node_id for m in self.vote.members if disks.get(m.node_id, m.disk_id) != m.disk_id]
        if changed:
            raise BootstrapConflict(f"the disk of {', '.join(changed)} changed after this node had voted")
        if wanted <= voted:
            return StoreTopology(self.vote)
        return Waiting(f"waiting for the vote of {', '.join(sorted(wanted - voted))}")
