"""One message per peer and operation: what the groups of an operation ask of the same peer travels together.

With more nodes than a key has replicas, a batch falls into groups of few keys each (requests.py), and a frame for each
group and replica would cost more than all else. A fan-out gathers what the groups ask while they start, sends each peer
its keys under one id, and hands every group its share of the reply. It decides nothing: a group counts, fails, hedges,
repairs and restarts as if it had been answered alone, and what it asks later it asks by itself.

    keys a (n0 n1 n2), b (n0 n1 n3), c (n0 n2 n3), written at n0:    n1 <- a b    n2 <- a c    n3 <- b c
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar

from agi.core.dht.errors import DHTError, FrameTooLarge, Overloaded, TransportError
from agi.core.dht.peers import Peer
from agi.core.dht.protocol.messages import (
    FRESH,
    ReplicaRead,
    ReplicaReadReply,
    ReplicaWrite,
    ReplicaWriteReply,
    WireError,
)
from agi.core.dht.requests import Operation, Requests
from agi.core.dht.transport.codec import encode

if TYPE_CHECKING:
    from agi.core.dht.reads import ReadGroup
    from agi.core.dht.writes import WriteGroup, WriteOperation

AnyGroup = TypeVar("AnyGroup", "ReadGroup", "WriteGroup")
Share: TypeAlias = tuple[AnyGroup, int]
"""A group, and how many of a message's keys are its: it may give some up before the reply."""


class Fanout(Generic[AnyGroup]):
    """What was asked of each peer. An entry among the groups under way, so that it ends as they do; `waiting` has the
    shares of who has not answered, in the order of the message's keys."""

    __slots__ = ("_local", "_requests", "id", "peers", "waiting")

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._local: list[Share[AnyGroup]] = []
        self.waiting: dict[str, list[Share[AnyGroup]]] = {}
        self.peers: dict[str, Peer] = {}
        self.id = 0

    def ask(self, peer: Peer, group: AnyGroup) -> None:
        """That peer is asked for the group's keys with those of others."""
        name = peer.node_id
        if name in self.peers:
            self.waiting[name].append((group, len(group.keys)))
        else:
            self.peers[name] = peer
            self.waiting[name] = [(group, len(group.keys))]

    def lost(self, replica: str, error: DHTError) -> None:
        self._take(replica)  # the groups hear of it themselves

    def expired(self) -> None:
        self.end()

    def restart(self) -> None:
        self.end()

    def end(self) -> None:
        """What is still answered is of no use to anybody."""
        self.waiting.clear()
        self._requests.pending.pop(self.id, None)

    def _take(self, replica: str) -> Sequence[Share[AnyGroup]]:
        """The shares of a replica that is waited for no longer."""
        shares = self.waiting.pop(replica, ())
        if not self.waiting:
            self._requests.pending.pop(self.id, None)
        return shares

    def _answered(self, replica: str, error: WireError | None) -> Sequence[Share[AnyGroup]]:
        """As `_take`, for a reply: nobody's, where it is late, doubled, or refused by a newer topology."""
        if replica not in self.waiting or (error is not None and self._requests.stale(replica, error)):
            return ()
        return self._take(replica)


class ReadFanout(Fanout["ReadGroup"]):
    """The reads of one operation."""

    __slots__ = ("_operation",)

    def __init__(self, requests: Requests, operation: Operation) -> None:
        Fanout.__init__(self, requests)
        self._operation = operation

    def look(self, group: ReadGroup) -> None:
        """This node's own replica is asked for the group's keys with those of others."""
        self._local.append((group, len(group.keys)))

    def send(self) -> None:
        """All groups have started."""
        requests, operation = self._requests, self._operation
        if self.waiting:
            self.id = operation.fanout = requests.enter(self, operation)
        for name, peer in self.peers.items():
            if name not in self.waiting:
                continue
            keys = [key for group, _ in self.waiting[name] for key in group.keys]
            try:
                peer.send(encode(ReplicaRead(self.id, requests.epoch, operation.trace, keys)))
            except (TransportError, Overloaded) as error:
                for group, _ in self._take(name):
                    group.lost(name, error)
        if self._local:
            keys = [key for group, _ in self._local for key in group.keys]
            requests.replica.read_batch(keys, partial(self._hand_out, requests.me, self._local))

    def reply(self, peer: Peer, reply: ReplicaReadReply) -> None:
        """What a peer answered."""
        shares = self._answered(peer.node_id, reply.error)
        if shares:
            peer.latency.add(self._requests.clock.monotonic() - self._operation.started)
            self._hand_out(peer.node_id, shares, reply.records, reply.error)

    def _hand_out(
        self, replica: str, shares: Sequence[Share[ReadGroup]], records: list[bytes | None], error: WireError | None
    ) -> None:
        """A reply that was cut leaves the last groups with fewer records, or none."""
        at = 0
        for group, count in shares:
            group.result(replica, records[at : at + count], error)
            at += count


class WriteFanout(Fanout["WriteGroup"]):
    """The writes of one operation."""

    __slots__ = ("_headers", "_operation")

    def __init__(self, requests: Requests, operation: WriteOperation) -> None:
        Fanout.__init__(self, requests)
        self._operation = operation
        self._headers: list[bytes | None] | None = []

    def store(self, group: WriteGroup, headers: list[bytes | None] | None) -> None:
        """This node's own replica takes the group's records with those of others; `headers` as Replica.write has it."""
        self._local.append((group, len(group.keys)))
        if headers is None:
            self._headers = None
        elif self._headers is not None:
            self._headers += headers

    def send(self) -> None:
        """All groups have started."""
        requests, operation = self._requests, self._operation
        if self.waiting:
            self.id = requests.enter(self, operation)
        for name, peer in self.peers.items():
            if name not in self.waiting:
                continue
            keys, records = _columns(self.waiting[name])
            message = ReplicaWrite(self.id, requests.epoch, operation.trace, FRESH, keys, records, operation.delete)
            try:
                peer.send(encode(message))
            except FrameTooLarge:
                for group, _ in self._take(name):
                    if name in group.waiting:
                        group.send([peer])
            except (TransportError, Overloaded) as error:
                for group, _ in self._take(name):
                    group.failed(name, error, maybe_stored=False)
        local = [share for share in self._local if requests.me in share[0].waiting]
        if local:
            keys, records = _columns(local)
            headers = self._headers if len(local) == len(self._local) else None
            done = partial(self._hand_out, requests.me, local)
            requests.replica.write(FRESH, keys, records, operation.delete, done, headers)

    def reply(self, peer: Peer, reply: ReplicaWriteReply) -> None:
        """What a peer answered."""
        shares = self._answered(peer.node_id, reply.error)
        if shares:
            self._hand_out(peer.node_id, shares, reply.superseded, reply.live, reply.error)

    def _hand_out(
        self,
        replica: str,
        shares: Sequence[Share[WriteGroup]],
        superseded: list[tuple[int, int]] | None,
        live: list[int] | None,
        error: WireError | None,
    ) -> None:
        if not superseded and not live:
            for group, _ in shares:
                group.result(replica, None, None, error)
            return
        starts = list(accumulate((count for _, count in shares), initial=0))
        theirs: list[list[tuple[int, int]]] = [[] for _ in shares]
        living: list[list[int]] = [[] for _ in shares]
        for index, hlc in superseded or ():
            at = bisect_right(starts, index) - 1
            theirs[at].append((index - starts[at], hlc))
        for index in live or ():
            at = bisect_right(starts, index) - 1
            living[at].append(index - starts[at])
        for (group, _), behind, alive in zip(shares, theirs, living, strict=True):
            group.result(replica, behind, alive, error)


def _columns(shares: Sequence[Share[WriteGroup]]) -> tuple[list[bytes], list[bytes]]:
    """The keys and the records of these groups, one after the other."""
    return [key for group, _ in shares for key in group.keys], [r for group, _ in shares for r in group.records]
