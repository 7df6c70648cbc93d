"""What one node holds of all members: the newest claim about each.

Claims about a member are totally ordered by (boot counter, incarnation, status), so taking them in is `max()`: it does
not matter in which order, how often or by which way they come. The boot counter is first, since a node that restarted
knows nothing of the incarnations it had; the incarnation is the member's own count of accusations that it has refuted;
at equal incarnations bad news wins, so only the accused can refute (Das et al. 2002, "SWIM", section 4.2).

Only what differs from "alive, boot 0, incarnation 0", which every member starts with, takes memory. `digest` is equal
at two nodes exactly when they hold the same (but for collisions of a 64-bit hash); it is kept up to date by xor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import xxhash

from agi.core.dht.protocol.messages import Claim
from agi.core.dht.types import MemberStatus

GONE = (MemberStatus.DEAD, MemberStatus.LEFT)


def disk_tag(disk_id: str) -> int:
    """32 bits that tell the disks of one member apart."""
    return int(xxhash.xxh3_64_intdigest(disk_id.encode())) & 0xFFFFFFFF


class Roster:
    """The members of a topology: names in order, and the tag of each one's disk. Nodes of a simulation share it."""

    __slots__ = ("disks", "names")

    def __init__(self, members: Iterable[tuple[str, str]]) -> None:
        """Members as (node id, disk id)."""
        self.disks = {node: disk_tag(disk) for node, disk in sorted(members)}
        self.names = tuple(self.disks)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, node: str) -> bool:
        return node in self.disks

    def first(self, node: str) -> Claim:
        """What is held of a member before anything was heard."""
        return Claim(node, self.disks[node], 0, 0, MemberStatus.ALIVE)


def newer(one: Claim, other: Claim) -> bool:
    """Whether the first claim counts more than the second, about the same member."""
    return (one.boot, one.incarnation, one.status) > (other.boot, other.incarnation, other.status)


class View:
    """The newest claim about each member of a roster."""

    __slots__ = ("_claims", "counts", "digest", "roster")

    def __init__(self, roster: Roster) -> None:
        self.roster = roster
        self._claims: dict[str, Claim] = {}
        self.digest = 0
        self.counts = dict.fromkeys(MemberStatus, 0)
        """Members in each state."""
        self.counts[MemberStatus.ALIVE] = len(roster)

    def get(self, node: str) -> Claim:
        """Raises KeyError for who is no member."""
        return self._claims.get(node) or self.roster.first(node)

    def status(self, node: str) -> MemberStatus:
        claim = self._claims.get(node)
        return MemberStatus.ALIVE if claim is None else claim.status

    def put(self, claim: Claim) -> MemberStatus:
        """Takes a claim, newer or not; returns the status before."""
        before = self.get(claim.node)
        self._claims[claim.node] = claim
        self.counts[before.status] -= 1
        self.counts[claim.status] += 1
        self.digest ^= _hash(before) ^ _hash(claim)
        return before.status

    def known(self) -> Iterator[Claim]:
        """What differs from the beginning, in no special order but the same in every run."""
        return iter(self._claims.values())

    def adopt(self, roster: Roster) -> None:
        """Other members: what is known of those that stay is kept; a replaced disk is a stranger."""
        self.roster = roster
        self._claims = {node: claim for node, claim in self._claims.items() if roster.disks.get(node) == claim.disk}
        self.counts = dict.fromkeys(MemberStatus, 0)
        self.counts[MemberStatus.ALIVE] = len(roster) - len(self._claims)
        self.digest = 0
        for claim in self._claims.values():
            self.counts[claim.status] += 1
            self.digest ^= _hash(claim)


def _hash(claim: Claim) -> int:
    """0 for the beginning, so that a member of which nothing was heard counts nothing."""
    if not (claim.boot or claim.incarnation or claim.status):
        return 0
    text = f"{claim.node}\0{claim.disk}\0{claim.boot}\0{claim.incarnation}\0{claim.status:d}"
    return int(xxhash.xxh3_64_intdigest(text.encode()))
