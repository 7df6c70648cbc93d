"""Turns a client's batch into replica messages and their replies into its answer (DESIGN section 6).

A batch is split by replica set; each part (a group) has one quorum core (protocol/quorum.py), one id on the links and
one entry in the timer wheel, however many keys it holds. The group asks, counts, repairs or stamps anew, and writes
its keys' results into the batch; the answer leaves when no group is left. Nothing here awaits: replies, broken links
and the clock arrive as calls, so that an operation costs no task and no future of its own.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import structlog

from agi.core.dht.clock import Clock
from agi.core.dht.errors import (
    ClockSkew,
    DHTError,
    InvalidKey,
    InvalidRequest,
    LinkClosed,
    OutcomeUnknown,
    Overloaded,
    StaleEpoch,
    StorageFull,
    TransportError,
    Truncated,
    Unavailable,
    from_wire,
)
from agi.core.dht.observability.metrics import Metrics
from agi.core.dht.peers import Peer, Peers
from agi.core.dht.protocol.dedup import RequestTable
from agi.core.dht.protocol.messages import (
    FRESH,
    REPAIR,
    Delete,
    DeleteReply,
    Get,
    GetReply,
    KeyError_,
    Message,
    Put,
    PutReply,
    ReplicaRead,
    ReplicaReadReply,
    ReplicaWrite,
    ReplicaWriteReply,
    WireError,
)
from agi.core.dht.protocol.quorum import Agreed, ReadQuorum, Repair, WriteQuorum, Written
from agi.core.dht.protocol.record import FLAGS, TOMBSTONE, created_ms_of, hlc_of, is_live, pack, pack_batch
from agi.core.dht.protocol.timers import TimerWheel
from agi.core.dht.protocol.versioning import HLC
from agi.core.dht.replica import Replica
from agi.core.dht.ring import Ring
from agi.core.dht.topology import Topology
from agi.core.dht.transport.codec import encode
from agi.core.dht.types import KEY_BYTES_MAX, TTL_MS_MAX, VALUE_BYTES_MAX, Consistency

_log = structlog.get_logger("agi.core.dht.coordinator")

RESTAMPS_MAX = 8
"""How often one key is stamped anew against concurrent writers before the call gives up."""
HEDGE_CREDIT_MAX = 10.0
TIMEOUT_MS_MAX = 600_000
KEY_COST_BYTES = 256
"""What a key under way is counted for beyond its value."""

TRUNCATED = Truncated("the batch's values do not fit one frame: ask again for this key")

ReplyTo: TypeAlias = Callable[[Message], object]
_NOT_STORED = frozenset(kind.code for kind in (ClockSkew, Overloaded, StaleEpoch, StorageFull))
"""Refusals after which a replica certainly does not hold the write (D3)."""


class _Operation:
    """One client batch."""

    __slots__ = (
        "attempts",
        "cost",
        "deadline",
        "errors",
        "existed",
        "id",
        "left",
        "reply",
        "request",
        "results",
        "started",
        "trace",
    )

    def __init__(self, request: Get | Put | Delete, reply: ReplyTo, trace: str, started: float, cost: int) -> None:
        self.request = request
        self.id = request.id
        self.reply = reply
        self.trace = trace
        self.started = started
        self.cost = cost
        self.deadline = started + min(request.timeout_ms, TIMEOUT_MS_MAX) / 1000
        self.left = 0
        self.attempts = 0
        self.results: list[bytes | None] = []
        self.errors: list[KeyError_] | None = None
        self.existed: set[int] = set()


class _ReadGroup:
    """Keys of a batch with one replica set. `indexes` are their places in the batch, None for all of it."""

    __slots__ = (
        "asked",
        "hedged",
        "id",
        "indexes",
        "keys",
        "operation",
        "quorum",
        "repairs",
        "replicas",
        "sent_at",
        "waiting",
    )
    id: int
    quorum: ReadQuorum
    sent_at: float

    def __init__(
        self, operation: _Operation, indexes: list[int] | None, keys: list[bytes], replicas: tuple[str, ...]
    ) -> None:
        self.operation = operation
        self.indexes = indexes
        self.keys = keys
        self.replicas = replicas
        self.waiting: set[str] = set()
        self.asked: set[str] = set()
        self.repairs: dict[str, list[int]] = {}
        self.hedged = False


class _WriteGroup:
    __slots__ = (
        "answered",
        "id",
        "indexes",
        "keys",
        "operation",
        "quorum",
        "records",
        "replicas",
        "waiting",
    )
    id: int
    quorum: WriteQuorum
    records: list[bytes]

    def __init__(
        self, operation: _Operation, indexes: list[int] | None, keys: list[bytes], replicas: tuple[str, ...]
    ) -> None:
        self.operation = operation
        self.indexes = indexes
        self.keys = keys
        self.replicas = replicas
        self.waiting: set[str] = set()
        self.answered = False


_Group: TypeAlias = _ReadGroup | _WriteGroup


class Coordinator:
    """Coordinates requests of clients at one node.

    Args:
        writer: this node's tie-break in versions (versioning.writer_id).
        hedge_budget: hedged reads as a share of all reads; a further replica is asked when the first is later than its
            link's p95.
        dedup_entries: written keys whose retry by the same client is recognised.
        pending_bytes_max: keys and values of unfinished requests; past it requests fail with Overloaded.
    """

    def __init__(
        self,
        node_id: str,
        writer: int,
        topology: Topology,
        ring: Ring,
        replica: Replica,
        peers: Peers,
        hlc: HLC,
        clock: Clock,
        metrics: Metrics,
        *,
        hedge_budget: float,
        dedup_entries: int,
        pending_bytes_max: int,
        slow_request_ms: int,
    ) -> None:
        self._me = node_id
        self._writer = writer
        self._ring = ring
        self._epoch = topology.epoch
        self._replica_count = topology.replica_count
        self._everywhere = topology.replica_count == len(topology.members)
        self._all = tuple(member.node_id for member in topology.members)
        self._replica = replica
        self._peers = peers
        self._hlc = hlc
        self._clock = clock
        self._metrics = metrics
        self._requests: RequestTable[_Operation | Message] = RequestTable(dedup_entries)
        self._pending: dict[int, _Group] = {}
        self._bytes_pending = 0
        self._bytes_max = pending_bytes_max
        self._ids = 0
        self._turn = 0
        self._wheel: TimerWheel[int] = TimerWheel(clock.monotonic())
        self._hedges: deque[tuple[float, _ReadGroup]] = deque()
        self._hedge_timer: asyncio.TimerHandle | None = None
        self._hedge_budget = hedge_budget
        self._hedge_credit = 1.0
        self._slow_s = slow_request_ms / 1000
        self._loop = asyncio.get_running_loop()

    @property
    def pending(self) -> int:
        """Groups that still wait for a replica."""
        return len(self._pending)

    def _replicas(self, key: bytes) -> tuple[str, ...]:
        return self._all if self._everywhere else self._ring.replicas(key)

    def _groups(self, keys: list[bytes]) -> list[tuple[list[int] | None, list[bytes], tuple[str, ...]]]:
        """The batch split by replica set: (places in the batch, keys, replicas)."""
        if self._everywhere:
            return [(None, keys, self._all)]
        if len(keys) == 1:
            return [(None, keys, self._ring.replicas(keys[0]))]
        split: dict[tuple[str, ...], list[int]] = {}
        replicas_of = self._ring.replicas
        for index, key in enumerate(keys):
            split.setdefault(replicas_of(key), []).append(index)
        if len(split) == 1:
            return [(None, keys, next(iter(split)))]
        return [(indexes, [keys[i] for i in indexes], replicas) for replicas, indexes in split.items()]

    def _admit(self, keys: Sequence[bytes], values: Sequence[bytes] = ()) -> int:
        """What the batch counts for. Raises InvalidRequest for what no client of ours sends, Overloaded past the
        bound."""
        if not keys:
            raise InvalidRequest("a batch without keys")
        if max(map(len, keys)) > KEY_BYTES_MAX or not all(keys):
            raise InvalidKey(f"a key has 1 to {KEY_BYTES_MAX} bytes")
        cost = KEY_COST_BYTES * len(keys) + sum(map(len, values))
        if self._bytes_pending + cost > self._bytes_max:
            raise Overloaded(f"requests of {self._bytes_pending} bytes are under way at {self._me} already")
        self._bytes_pending += cost
        return cost

    # --- reads

    def get(self, request: Get, reply: ReplyTo, trace: str) -> None:
        """Reads a batch; `reply` gets one GetReply by the deadline."""
        keys = request.keys
        try:
            needed = Consistency(request.consistency).needed(self._replica_count)
            cost = self._admit(keys)
        except (DHTError, ValueError) as error:
            reply(GetReply(request.id, [], None, _refusal(error).to_wire()))
            return
        operation = _Operation(request, reply, trace, self._clock.monotonic(), cost)
        groups = self._groups(keys)
        operation.left = len(groups)
        if groups[0][0] is not None:
            operation.results = [None] * len(keys)
        repair_to = 0 if request.consistency == Consistency.ONE else needed
        for indexes, group_keys, replicas in groups:
            group = _ReadGroup(operation, indexes, group_keys, replicas)
            group.quorum = ReadQuorum(needed, len(replicas), repair_to)
            self._start_read(group)

    def _start_read(self, group: _ReadGroup) -> None:
        quorum = group.quorum
        self._turn += 1
        me = self._me
        local = me in group.replicas
        others = [name for name in group.replicas if name != me]
        if len(others) > 1 and self._turn % 2:
            others.reverse()
        peers = self._peers.connected
        reachable = [name for name in others if name in peers]
        if len(reachable) + local < quorum.needed:
            error = Unavailable("too few replicas are reachable", needed=quorum.needed, answered=len(reachable) + local)
            self._read_done(group, error)
            return
        ask = quorum.needed - local
        group.id = self._ids = self._ids + 1
        operation = group.operation
        group.sent_at = operation.started
        group.asked.add(me)
        if local:
            group.waiting.add(me)
        self._pending[group.id] = group
        self._wheel.add(operation.deadline, group.id)
        if ask:
            for name in reachable[:ask]:
                self._ask(group, peers[name])
            if len(reachable) > ask:
                self._schedule_hedge(group, peers[reachable[0]])
        if me in group.waiting:
            self._replica.read(group.keys, partial(self._local_read, group))

    def _ask(self, group: _ReadGroup, peer: Peer) -> None:
        group.asked.add(peer.node_id)
        group.waiting.add(peer.node_id)
        try:
            peer.send(encode(ReplicaRead(group.id, self._epoch, group.operation.trace, group.keys)))
        except (TransportError, Overloaded) as error:
            self._read_failed(group, peer.node_id, error)

    def _local_read(self, group: _ReadGroup, records: list[bytes | None], error: WireError | None) -> None:
        self._read_result(group, self._me, records, error)

    def replica_read_reply(self, peer: Peer, reply: ReplicaReadReply) -> None:
        group = self._pending.get(reply.id)
        if not isinstance(group, _ReadGroup):
            return
        if not group.hedged:
            peer.latency.add(self._clock.monotonic() - group.sent_at)
        self._read_result(group, peer.node_id, reply.records, reply.error)

    def _read_result(
        self, group: _ReadGroup, replica: str, records: list[bytes | None], error: WireError | None
    ) -> None:
        if replica not in group.waiting:
            return  # a late or doubled reply
        if error is not None:
            self._read_failed(group, replica, from_wire(*error))
            return
        if len(records) != len(group.keys):
            self._cut_short(group, len(records))
            records = records[: len(group.keys)]
        group.waiting.discard(replica)
        group.quorum.add_reply(replica, records)
        self._read_step(group)

    def _cut_short(self, group: _ReadGroup, count: int) -> None:
        """A replica's records did not fit one frame: the group answers its first keys, the client asks again for the
        rest."""
        if count >= len(group.keys):
            return
        places = group.indexes or range(len(group.keys))
        rest = [(index, TRUNCATED.to_wire()) for index in places[count:]]
        group.operation.errors = (group.operation.errors or []) + rest
        if group.indexes is None:
            group.indexes = list(places)
            group.operation.results = [None] * len(group.keys)
        del group.indexes[count:]
        group.keys = group.keys[:count]
        for _, records in group.quorum.replies:
            del records[count:]

    def _read_failed(self, group: _ReadGroup, replica: str, error: DHTError) -> None:
        """A replica will not answer: ask the next that was not asked."""
        if replica not in group.waiting:
            return
        group.waiting.discard(replica)
        self._metrics.replica_errors += 1
        if group.quorum.repairing:
            self._repair_elsewhere(group, replica)
            return
        group.quorum.add_failure(error)
        for name in group.replicas:
            if name not in group.asked and name in self._peers.connected:
                group.hedged = True
                self._ask(group, self._peers.connected[name])
                break
        else:
            group.quorum.failures = max(
                group.quorum.failures, len(group.replicas) - len(group.waiting) - len(group.quorum.replies)
            )
        self._read_step(group)

    def _read_step(self, group: _ReadGroup) -> None:
        outcome = group.quorum.step()
        if outcome is None:
            return
        if isinstance(outcome, Agreed):
            self._read_done(group, outcome.records)
        elif isinstance(outcome, Repair):
            self._metrics.read_repairs += 1
            group.repairs = dict(outcome.stale)
            group.waiting.clear()
            if not outcome.blocking:
                self._send_repairs(group, outcome)
                self._read_done(group, outcome.records)
                return
            self._pending[group.id] = group
            group.waiting.update(group.repairs)
            self._send_repairs(group, outcome)
        else:
            self._read_done(group, outcome)

    def _send_repairs(self, group: _ReadGroup, repair: Repair) -> None:
        for replica, indexes in repair.stale:
            records = [repair.records[i] or b"" for i in indexes]
            self._repair(group, replica, indexes, records)

    def _repair(self, group: _ReadGroup, replica: str, indexes: list[int], records: list[bytes]) -> None:
        keys = [group.keys[i] for i in indexes]
        if replica == self._me:
            self._replica.write(REPAIR, keys, records, False, partial(self._local_repaired, group))
            return
        peer = self._peers.connected.get(replica)
        message = ReplicaWrite(group.id, self._epoch, group.operation.trace, REPAIR, keys, records)
        try:
            if peer is None:
                raise LinkClosed(f"{replica} is not connected")
            peer.send(encode(message))
        except (TransportError, Overloaded) as error:
            self._read_failed(group, replica, error)

    def _local_repaired(self, group: _ReadGroup, superseded: object, live: object, error: WireError | None) -> None:
        self._repaired(group, self._me, error)

    def _repaired(self, group: _ReadGroup, replica: str, error: WireError | None) -> None:
        """A repair was stored (or the replica holds something newer still, which is as good)."""
        if replica not in group.waiting:
            return
        if error is not None:
            self._read_failed(group, replica, from_wire(*error))
            return
        group.waiting.discard(replica)
        agreed = group.quorum.add_repaired(replica, group.repairs[replica])
        if agreed is not None:
            self._read_done(group, agreed.records)

    def _repair_elsewhere(self, group: _ReadGroup, failed: str) -> None:
        """A stale replica could not be repaired: store the newest records at one that was not asked yet."""
        indexes, records = group.quorum.unrepaired()
        for name in group.replicas:
            if name not in group.asked and name in self._peers.connected:
                group.asked.add(name)
                group.waiting.add(name)
                group.repairs[name] = indexes
                self._repair(group, name, indexes, records)
                return
        if not group.waiting:
            self._read_done(group, group.quorum.shortfall(f"{failed} could not be repaired"))

    def _read_done(self, group: _ReadGroup, outcome: list[bytes | None] | DHTError) -> None:
        group.waiting.clear()
        operation = group.operation
        if hasattr(group, "id"):
            self._pending.pop(group.id, None)
        if isinstance(outcome, DHTError):
            self._fail_keys(operation, group.indexes, len(group.keys), outcome)
            if group.indexes is None:
                operation.results = [None] * len(group.keys)
        elif group.indexes is None:
            operation.results = outcome
        else:
            results = operation.results
            for index, record in zip(group.indexes, outcome, strict=True):
                results[index] = record
        operation.left -= 1
        if not operation.left:
            self._answer_get(operation)

    def _answer_get(self, operation: _Operation) -> None:
        records = operation.results
        now_ms = 0
        for index, record in enumerate(records):
            if record is not None and record[FLAGS]:
                now_ms = now_ms or self._clock.wall_ms()
                if not is_live(record, now_ms):
                    if records is operation.results:
                        records = records.copy()  # the store or a message may hold this list
                    records[index] = None
        self._metrics.gets += len(records)
        self._finish(operation, self._metrics.get_latency.observe, len(records))
        self._reply(operation, GetReply(operation.id, records, operation.errors))

    # --- hedged reads

    def _schedule_hedge(self, group: _ReadGroup, peer: Peer) -> None:
        self._hedge_credit = min(HEDGE_CREDIT_MAX, self._hedge_credit + self._hedge_budget)
        if self._hedge_credit < 1:
            return
        due = group.sent_at + peer.latency.value
        self._hedges.append((due, group))
        if self._hedge_timer is None:
            self._hedge_timer = self._loop.call_later(peer.latency.value, self._hedge)

    def _hedge(self) -> None:
        self._hedge_timer = None
        now = self._clock.monotonic()
        hedges = self._hedges
        while hedges:
            due, group = hedges[0]
            if not group.waiting:
                hedges.popleft()
                continue
            if due > now:
                self._hedge_timer = self._loop.call_later(due - now, self._hedge)
                return
            hedges.popleft()
            if self._hedge_credit < 1 or self._me in group.waiting:
                continue  # no budget, or this node itself is the slow one
            for name in group.replicas:
                peer = self._peers.connected.get(name)
                if peer is not None and name not in group.asked:
                    self._hedge_credit -= 1
                    self._metrics.hedges += 1
                    group.hedged = True
                    self._ask(group, peer)
                    break

    # --- writes

    def put(self, request: Put, reply: ReplyTo, client: str) -> None:
        """Writes a batch; `reply` gets one PutReply by the deadline."""
        error: DHTError | None = None
        if len(request.values) != len(request.keys):
            error = InvalidRequest("a batch needs one value for each key")
        elif not 0 <= request.ttl_ms <= TTL_MS_MAX:
            error = InvalidRequest(f"a ttl is 0 to {TTL_MS_MAX} ms")
        elif request.values and max(map(len, request.values)) > VALUE_BYTES_MAX:
            error = InvalidRequest(f"a value has at most {VALUE_BYTES_MAX} bytes")
        if error is not None:
            reply(PutReply(request.id, [], None, error.to_wire()))
            return
        self._write(request, reply, client)

    def delete(self, request: Delete, reply: ReplyTo, client: str) -> None:
        """Deletes a batch; `reply` gets one DeleteReply by the deadline."""
        self._write(request, reply, client)

    def _write(self, request: Put | Delete, reply: ReplyTo, client: str) -> None:
        known = self._requests.get(client, request.id)
        if known is not None:
            self._metrics.retries_deduplicated += 1
            if isinstance(known, _Operation):
                known.reply = reply
            else:
                reply(known)
            return
        try:
            if request.retry:
                raise OutcomeUnknown(f"{self._me} no longer knows the first try of this write")
            needed = Consistency(request.consistency).needed(self._replica_count)
            cost = self._admit(request.keys, request.values if isinstance(request, Put) else ())
        except (DHTError, ValueError) as error:
            refused = _refusal(error).to_wire()
            put = isinstance(request, Put)
            reply(PutReply(request.id, [], None, refused) if put else DeleteReply(request.id, [], None, refused))
            return
        operation = _Operation(request, reply, f"{client}:{request.id}", self._clock.monotonic(), cost)
        operation.results = [None] * len(request.keys)
        self._requests.add(client, request.id, operation, len(request.keys))
        groups = self._groups(request.keys)
        operation.left = len(groups)
        for indexes, keys, replicas in groups:
            self._start_write(_WriteGroup(operation, indexes, keys, replicas), needed)

    def _start_write(self, group: _WriteGroup, needed: int) -> None:
        me = self._me
        operation = group.operation
        peers = self._peers.connected
        local = me in group.replicas
        quorum = group.quorum = WriteQuorum(needed, len(group.replicas))
        targets = []
        for name in group.replicas:
            if name == me:
                continue
            peer = peers.get(name)
            if peer is None:
                quorum.failures += 1
            else:
                targets.append(peer)
        if operation.attempts:
            quorum.maybe = 1  # an earlier stamp of these keys may have been stored somewhere
        if len(targets) + local < needed:
            self._write_done(group, quorum.unreachable(len(targets) + local))
            return
        try:
            headers = self._replica.headers(group.keys) if local else None
        except DHTError:
            headers = None  # the local write below reports it
        records = group.records = self._stamp(group, headers)
        group.id = self._ids = self._ids + 1
        delete = isinstance(operation.request, Delete)
        self._pending[group.id] = group
        self._wheel.add(operation.deadline, group.id)
        waiting = group.waiting
        if local:
            waiting.add(me)
        if targets:
            frame = encode(ReplicaWrite(group.id, self._epoch, operation.trace, FRESH, group.keys, records, delete))
            for peer in targets:
                waiting.add(peer.node_id)
                try:
                    peer.send(frame)
                except (TransportError, Overloaded) as error:
                    self._write_failed(group, peer.node_id, error, maybe_stored=False)
        if local:
            self._replica.write(FRESH, group.keys, records, delete, partial(self._local_written, group), headers)

    def _stamp(self, group: _WriteGroup, headers: list[bytes | None] | None) -> list[bytes]:
        """Packs the records with versions above everything seen. A key that exists keeps its time of creation."""
        request = group.operation.request
        keys = group.keys
        now_ms = self._clock.wall_ms()
        first = self._hlc.tick(now_ms, len(keys))
        flags, expires_ms = 0, 0
        if isinstance(request, Put):
            indexes = group.indexes
            values = request.values if indexes is None else [request.values[i] for i in indexes]
            if request.ttl_ms:
                expires_ms = now_ms + request.ttl_ms
        else:
            flags = TOMBSTONE
            values = [b""] * len(keys)
        if headers is None or not any(headers):
            return pack_batch(keys, values, first, self._writer, now_ms, expires_ms, flags)
        records = []
        writer = self._writer
        for hlc, (key, value, header) in enumerate(zip(keys, values, headers, strict=True), first):
            created_ms = now_ms
            if header is not None:
                known = hlc_of(header)
                if known >= hlc:
                    self._hlc.observe(known)
                    hlc = self._hlc.tick(now_ms)
                if is_live(header, now_ms):
                    created_ms = created_ms_of(header)
            records.append(
                pack(key, value, hlc=hlc, writer=writer, created_ms=created_ms, expires_ms=expires_ms, flags=flags)
            )
        return records

    def _local_written(
        self,
        group: _WriteGroup,
        superseded: list[tuple[int, int]] | None,
        live: list[int] | None,
        error: WireError | None,
    ) -> None:
        self._write_result(group, self._me, superseded, live, error)

    def replica_write_reply(self, peer: Peer, reply: ReplicaWriteReply) -> None:
        group = self._pending.get(reply.id)
        if group is None:
            return
        if isinstance(group, _ReadGroup):
            self._repaired(group, peer.node_id, reply.error)
        else:
            self._write_result(group, peer.node_id, reply.superseded, reply.live, reply.error)

    def _write_result(
        self,
        group: _WriteGroup,
        replica: str,
        superseded: list[tuple[int, int]] | None,
        live: list[int] | None,
        error: WireError | None,
    ) -> None:
        if error is not None:
            self._write_failed(group, replica, from_wire(*error), maybe_stored=error[0] not in _NOT_STORED)
            return
        waiting = group.waiting
        if replica not in waiting:
            return
        waiting.discard(replica)
        group.quorum.add_ack(superseded)
        if live:
            indexes = group.indexes
            group.operation.existed.update(live if indexes is None else (indexes[i] for i in live))
        self._write_step(group)

    def _write_failed(self, group: _WriteGroup, replica: str, error: DHTError, *, maybe_stored: bool) -> None:
        if replica not in group.waiting:
            return
        group.waiting.discard(replica)
        self._metrics.replica_errors += 1
        group.quorum.add_failure(error, maybe_stored=maybe_stored)
        self._write_step(group)

    def _write_step(self, group: _WriteGroup) -> None:
        if not group.answered:
            outcome = group.quorum.step()
            if isinstance(outcome, Written) and outcome.restamp:
                self._restamp(group, outcome.restamp)
            elif outcome is not None:
                self._write_done(group, outcome)
        if not group.waiting and hasattr(group, "id"):
            self._pending.pop(group.id, None)

    def _restamp(self, group: _WriteGroup, restamp: list[tuple[int, int]]) -> None:
        """Newer versions are in the way of some keys: write those again, above them (V2)."""
        operation = group.operation
        operation.attempts += 1
        self._metrics.restamps += len(restamp)
        for _, hlc in restamp:
            self._hlc.observe(hlc)
        places = [index for index, _ in restamp]
        indexes = places if group.indexes is None else [group.indexes[i] for i in places]
        again = _WriteGroup(operation, indexes, [group.keys[i] for i in places], group.replicas)
        operation.left += 1
        self._write_done(group, Written([]))
        if operation.attempts > RESTAMPS_MAX:
            error = OutcomeUnknown(f"other writers were faster {RESTAMPS_MAX} times")
            again.quorum = group.quorum
            self._write_done(again, error)
            return
        self._start_write(again, group.quorum.needed)

    def _write_done(self, group: _WriteGroup, outcome: Written | DHTError) -> None:
        if group.answered:
            return
        group.answered = True
        operation = group.operation
        if isinstance(outcome, DHTError):
            self._fail_keys(operation, group.indexes, len(group.keys), outcome)
        elif group.indexes is None:
            operation.results[:] = group.records
        else:
            for index, record in zip(group.indexes, group.records, strict=True):
                operation.results[index] = record
        operation.left -= 1
        if not operation.left:
            self._answer_write(operation)

    def _answer_write(self, operation: _Operation) -> None:
        request, metrics = operation.request, self._metrics
        count = len(request.keys)
        failed = {index for index, _ in operation.errors} if operation.errors else ()
        reply: PutReply | DeleteReply
        if isinstance(request, Put):
            metrics.puts += count
            observe = metrics.put_latency.observe
            versions = [
                0 if record is None or index in failed else int.from_bytes(record[:8], "big")
                for index, record in enumerate(operation.results)
            ]
            reply = PutReply(operation.id, versions, operation.errors)
        else:
            metrics.deletes += count
            observe = metrics.delete_latency.observe
            existed = operation.existed
            reply = DeleteReply(operation.id, [i in existed for i in range(count)], operation.errors)
        self._finish(operation, observe, count)
        client, _, _ = operation.trace.rpartition(":")
        self._requests.update(client, operation.id, reply)
        self._reply(operation, reply)

    # --- ends

    def _fail_keys(self, operation: _Operation, indexes: list[int] | None, count: int, error: DHTError) -> None:
        wire = error.to_wire()
        failed: list[KeyError_] = [(index, wire) for index in (range(count) if indexes is None else indexes)]
        if operation.errors is None:
            operation.errors = failed
        else:
            operation.errors += failed
        self._metrics.fail(error, count)

    def _finish(self, operation: _Operation, observe: Callable[[float, int], None], count: int) -> None:
        self._bytes_pending -= operation.cost
        elapsed = self._clock.monotonic() - operation.started
        observe(elapsed, count)
        if elapsed > self._slow_s:
            kind = type(operation.request).__name__
            _log.warning("slow_request", kind=kind, keys=count, ms=round(elapsed * 1000), trace=operation.trace)

    def _reply(self, operation: _Operation, message: Message) -> None:
        try:
            operation.reply(message)
        except (TransportError, Overloaded) as error:
            _log.info("reply_undeliverable", trace=operation.trace, error=str(error))

    def peer_lost(self, node_id: str, error: DHTError) -> None:
        """A link broke: what waits for that peer has failed there."""
        for group in [group for group in self._pending.values() if node_id in group.waiting]:
            if isinstance(group, _ReadGroup):
                self._read_failed(group, node_id, error)
            else:
                self._write_failed(group, node_id, error, maybe_stored=True)

    def advance(self, now: float) -> None:
        """Ends what is past its deadline."""
        for number in self._wheel.advance(now):
            group = self._pending.get(number)
            if group is None:
                continue
            if isinstance(group, _ReadGroup):
                self._read_done(group, group.quorum.shortfall("no quorum by the deadline"))
            else:
                if not group.answered:
                    self._write_done(group, group.quorum.shortfall("no quorum by the deadline"))
                group.waiting.clear()
                self._pending.pop(group.id, None)


def _refusal(error: Exception) -> DHTError:
    return error if isinstance(error, DHTError) else InvalidRequest(str(error))
