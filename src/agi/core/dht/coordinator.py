"""Turns a client's batch into replica messages and their replies into its answer (DESIGN section 6).

Reads (reads.py), writes (writes.py) and rounds of consensus (registers.py) keep their books together (requests.py).
Nothing here awaits: requests, replies, broken links and the clock arrive as calls, so that an operation costs no task
and no future of its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from agi.core.dht.acceptor import Acceptor
from agi.core.dht.clock import Clock
from agi.core.dht.fanout import ReadFanout, WriteFanout
from agi.core.dht.joint import JointRing
from agi.core.dht.observability.metrics import Metrics
from agi.core.dht.peers import Peer, Peers
from agi.core.dht.protocol.messages import Delete, Get, Put, ReplicaReadReply, ReplicaWriteReply, Update
from agi.core.dht.protocol.versioning import HLC
from agi.core.dht.reads import ReadGroup, Reads
from agi.core.dht.registers import Registers
from agi.core.dht.replica import Replica
from agi.core.dht.requests import Hint, ReplyTo, Requests
from agi.core.dht.ring import Ring
from agi.core.dht.topology import Topology
from agi.core.dht.writes import WriteGroup, Writes


class Coordinator:
    """Coordinates requests of clients at one node; requests.py, reads.py and writes.py explain the settings."""

    def __init__(
        self,
        node_id: str,
        writer: int,
        topology: Topology,
        ring: Ring | JointRing,
        replica: Replica,
        peers: Peers,
        acceptor: Acceptor,
        hlc: HLC,
        clock: Clock,
        rng: random.Random,
        metrics: Metrics,
        *,
        hint: Hint,
        hedge_budget: float,
        dedup_entries: int,
        max_clock_skew_ms: int,
        pending_bytes_max: int,
        queue_s: float,
        slow_request_ms: int,
        on_stale: Callable[[str], None] = lambda replica: None,
    ) -> None:
        self._requests = Requests(
            node_id,
            topology,
            ring,
            replica,
            peers,
            clock,
            metrics,
            hint=hint,
            first_id=(writer & 0xFFFF) << 40,
            pending_bytes_max=pending_bytes_max,
            queue_s=queue_s,
            slow_s=slow_request_ms / 1000,
            on_stale=on_stale,
        )
        self._reads = Reads(self._requests, hedge_budget)
        self._writes = Writes(self._requests, hlc, writer, dedup_entries, max_clock_skew_ms)
        self.registers = Registers(
            self._requests,
            acceptor,
            hlc,
            writer,
            clock,
            rng,
            lambda key: replica.floors.at(replica.token_of(key)).sealed,
            replica.limit,
            dedup_entries,
        )
        self._requests.decide = self.registers.run
        self.peer_lost = self._requests.peer_lost

    def advance(self, now: float) -> None:
        """Ends what is past its deadline, and tries again what was postponed."""
        self._requests.advance(now)
        self.registers.advance(now)

    def adopt(self, topology: Topology, ring: Ring | JointRing) -> None:
        """Requests go by this topology. Those under way start again where it changes replica sets."""
        self._requests.adopt(topology, ring)
        self.registers.adopt()

    @property
    def pending(self) -> int:
        """Parts of requests that still wait for a replica, and operations under consensus."""
        return len(self._requests.pending) + self.registers.pending

    def get(self, request: Get, reply: ReplyTo, trace: str) -> None:
        """Reads a batch; `reply` gets one GetReply by the deadline. `trace` is the correlation id."""
        self._reads.start(request, reply, trace)

    def put(self, request: Put, reply: ReplyTo, client: str, trace: str = "") -> None:
        """Writes a batch; `reply` gets one PutReply by the deadline. (client, request.id) names the write; they are
        its correlation id too, unless there is a `trace`."""
        self._writes.start(request, reply, client, trace)

    def try_again(self, client: str, number: int) -> None:
        """A write of that name comes once more, on purpose: it is written if the last try stored nothing."""
        self._writes.try_again(client, number)

    def delete(self, request: Delete, reply: ReplyTo, client: str, trace: str = "") -> None:
        """Deletes a batch; `reply` gets one DeleteReply by the deadline."""
        self._writes.start(request, reply, client, trace)

    def update(self, request: Update, reply: ReplyTo, client: str) -> None:
        """Runs operations under consensus; `reply` gets one UpdateReply by the deadline. (client, request.id) names the
        batch."""
        self.registers.start(request, reply, client)

    def replica_read_reply(self, peer: Peer, reply: ReplicaReadReply) -> None:
        group = self._requests.pending.get(reply.id)
        if isinstance(group, (ReadGroup, ReadFanout)):
            self._reads.reply(group, peer, reply)

    def replica_write_reply(self, peer: Peer, reply: ReplicaWriteReply) -> None:
        group = self._requests.pending.get(reply.id)
        if isinstance(group, (WriteGroup, WriteFanout)):
            self._writes.reply(group, peer, reply)
        elif isinstance(group, ReadGroup):
            group.repaired(peer.node_id, reply.superseded, reply.error)
