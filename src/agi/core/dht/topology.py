"""Who owns what: an immutable, epoch-numbered value that the nodes agree on (DESIGN section 5).

A topology names its members by (node id, disk id), so that a wiped disk under a known name is a stranger (I1). Equal
member sets give equal bytes and so equal hashes: nodes compare topologies by `digest`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import msgspec
import xxhash

from agi.core.dht.errors import ClusterError, StorageCorrupt
from agi.core.dht.ring import Ring
from agi.core.dht.types import Node, parse_address


class Member(msgspec.Struct, frozen=True, array_like=True, order=True):
    """A node as the topology knows it. `address` is its advertised gRPC address."""

    node_id: str
    disk_id: str
    address: str
    weight: float = 1.0
    rack: str = ""
    zone: str = ""
    state: str = "normal"


class Topology(msgspec.Struct, frozen=True, array_like=True, dict=True):
    """One epoch. Build it with `first`; members are sorted by node id."""

    cluster: str
    generation: int
    epoch: int
    factor: int
    virtual_nodes: int
    hash_algorithm: str
    members: tuple[Member, ...]

    @classmethod
    def first(
        cls, cluster: str, factor: int, virtual_nodes: int, hash_algorithm: str, members: Sequence[Member]
    ) -> Topology:
        """Epoch 1 over these members."""
        return cls(cluster, 1, 1, factor, virtual_nodes, hash_algorithm, tuple(sorted(members)))

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
        """Replicas of each key: the factor, or all nodes while there are fewer. Quorums are of this number."""
        return min(self.factor, len(self.members))

    def ring(self) -> Ring:
        nodes = []
        for member in self.members:
            host, port = parse_address(member.address)
            labels = {name: value for name, value in (("rack", member.rack), ("zone", member.zone)) if value}
            nodes.append(Node(member.node_id, host, port, member.weight, self.virtual_nodes, labels))
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


def unpack(data: bytes) -> Topology:
    """The topology that `packed` gave. Raises StorageCorrupt."""
    try:
        return msgspec.msgpack.decode(data, type=Topology)
    except msgspec.DecodeError as error:
        raise StorageCorrupt(f"a stored or received topology cannot be read: {error}") from None
