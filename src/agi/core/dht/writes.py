"""Writes at a coordinator: stamps records, sends them to all replicas, answers at W (protocol/quorum.py has the rules).

A key in whose way a replica holds something newer is stamped anew above it and written again (PROTOCOLS V2), so that a
write begun after another was acknowledged wins, whatever the coordinators' clocks say.
"""

from __future__ import annotations

from collections.abc import Container
from functools import partial

import xxhash

from agi.core.dht.errors import (
    ClockSkew,
    DHTError,
    FrameTooLarge,
    InvalidRequest,
    InvalidValue,
    NotReady,
    OutcomeUnknown,
    Overloaded,
    StorageFull,
    TransportError,
    Unavailable,
    from_wire,
)
from agi.core.dht.fanout import WriteFanout
from agi.core.dht.joint import JointSet
from agi.core.dht.peers import Peer
from agi.core.dht.protocol.consensus import PUT, REMOVE
from agi.core.dht.protocol.dedup import RequestTable
from agi.core.dht.protocol.messages import (
    FRESH,
    Delete,
    DeleteReply,
    Op,
    OpResult,
    Put,
    PutReply,
    ReplicaWrite,
    ReplicaWriteReply,
    WireError,
)
from agi.core.dht.protocol.quorum import JointWriteQuorum, WriteQuorum, Written
from agi.core.dht.protocol.record import REGISTERED, TOMBSTONE, created_ms_of, hlc_of, is_live, pack, pack_batch
from agi.core.dht.protocol.versioning import HLC
from agi.core.dht.requests import Operation, ReplyTo, Requests
from agi.core.dht.transport.codec import encode
from agi.core.dht.types import BULK_VALUE_BYTES, TTL_MS_MAX, VALUE_BYTES_MAX, Consistency

RESTAMPS_MAX = 8
"""How often a batch is stamped anew against concurrent writers before the call gives up."""

_NOT_STORED = frozenset(kind.code for kind in (ClockSkew, NotReady, Overloaded, StorageFull))
"""Refusals after which a replica certainly does not hold the write (D3)."""


class WriteOperation(Operation):
    """`existed`: places that held a live record at a replica that answered."""

    def __init__(
        self, request: Put | Delete, reply: ReplyTo, trace: str, started: float, cost: int, client: str
    ) -> None:
        Operation.__init__(self, request, reply, trace, started, cost)
        self.client = client
        self.existed: set[int] | None = None
        self.delete = request.__class__ is Delete


class Writes:
    """All writes of one coordinator.

    Args:
        writer: this node's tie-break in versions (versioning.writer_id).
        dedup_entries: written keys whose retry by the same client is recognised.
        max_clock_skew_ms: replicas refuse what is further ahead of them (V3).
    """

    def __init__(self, requests: Requests, hlc: HLC, writer: int, dedup_entries: int, max_clock_skew_ms: int) -> None:
        self._requests = requests
        self.skew_ms = max_clock_skew_ms
        self.hlc = hlc
        self.writer = writer
        self._known: RequestTable[WriteOperation | PutReply | DeleteReply] = RequestTable(dedup_entries)

    def start(self, request: Put | Delete, reply: ReplyTo, client: str, trace: str) -> None:
        """Writes a batch; `reply` gets one PutReply or DeleteReply by the deadline."""
        requests = self._requests
        known = self._known.get(client, request.id)
        if known is not None:
            requests.metrics.retries_deduplicated += 1
            if isinstance(known, WriteOperation):
                known.reply = reply
            else:
                reply(known)
            return
        try:
            if request.retry:
                raise OutcomeUnknown(f"{requests.me} no longer knows the first try of this write")
            values: list[bytes] = []
            if isinstance(request, Put):
                values = request.values
                _check_put(request)
            needed = requests.needed(request.consistency)
            started = requests.clock.monotonic()
            cost = requests.admit(started, request.keys, values)
        except DHTError as error:
            kind = PutReply if isinstance(request, Put) else DeleteReply
            refusal = kind(request.id, [], None, error.to_wire())
            if not request.retry:  # its client goes elsewhere with it: a doubled frame is not to be taken after all
                self._known.add(client, request.id, refusal, 1)
            reply(refusal)
            return
        trace = trace or f"{client}:{request.id}"
        operation = WriteOperation(request, reply, trace, started, cost, client)
        self._known.add(client, request.id, operation, len(request.keys))
        if request.consistency == Consistency.LINEARIZABLE:
            operation.results = [None] * len(request.keys)
            operation.left = 0
            self.decide(operation, list(range(len(request.keys))))
            return
        parts = requests.parts(operation, None, request.keys)
        fanout = WriteFanout(requests, operation) if len(parts) > 1 else None
        for places, keys, replicas in parts:
            group = JointWriteGroup if type(replicas) is JointSet else WriteGroup
            group(self, requests, operation, places, keys, replicas, needed).start(fanout)
        if fanout is not None:
            fanout.send()

    def try_again(self, client: str, number: int) -> None:
        """The caller that names its writes itself repeats one of them: if nothing of it was stored, it is a new try."""
        known = self._known.get(client, number)
        if known is not None and _came_to_nothing(known):
            self._known.drop(client, number)

    def decide(self, operation: WriteOperation, places: list[int], maybe_stored: Container[int] = ()) -> None:
        """Writes the keys at these places under consensus; the operation waits for each of them. `maybe_stored`: places
        whose plain record some replica took before, or may have."""
        request = operation.request
        operation.left += len(places)
        for place in places:
            name: bytes = xxhash.xxh3_128_digest(f"{operation.client}:{request.id}:{place}".encode())
            if isinstance(request, Put):
                op = Op(name, request.keys[place], PUT, value=request.values[place], ttl_ms=request.ttl_ms)
            else:
                op = Op(name, request.keys[place], REMOVE)
            answer = partial(self._decided, operation, place, maybe_stored=place in maybe_stored)
            self._requests.decide(op, operation.deadline, answer)

    def _decided(self, operation: WriteOperation, place: int, result: OpResult, *, maybe_stored: bool) -> None:
        if result.error is not None:
            error = from_wire(*result.error)
            if maybe_stored and isinstance(error, Unavailable | InvalidValue):  # a round may begin with that record
                what = f"{error.message}; some replica may have stored it"
                error = OutcomeUnknown(what, needed=error.needed, answered=error.answered)
            operation.fail([place], error)
        else:
            operation.results[place] = result.version.to_bytes(8, "big")
            if result.number and operation.delete:
                operation.existed = (operation.existed or set()) | {place}
        operation.left -= 1
        if not operation.left:
            self.answer(operation)

    def restart(
        self, operation: WriteOperation, places: list[int] | None, keys: list[bytes], records: list[bytes]
    ) -> None:
        """Writes these records again, unchanged, as the replica sets have changed."""
        requests = self._requests
        needed = requests.needed(operation.request.consistency)
        by_place = dict(zip(range(len(keys)) if places is None else places, records, strict=True))
        for part, part_keys, replicas in requests.parts(operation, places, keys):
            make = JointWriteGroup if type(replicas) is JointSet else WriteGroup
            group = make(self, requests, operation, part, part_keys, replicas, needed)
            group.records = records if part is places else [by_place[place] for place in part or ()]
            group.start()

    def reply(self, group: WriteGroup | WriteFanout, peer: Peer, reply: ReplicaWriteReply) -> None:
        """A peer answered a write of that group, or of several."""
        self._requests.peers.heard_clock(peer, reply.now_ms)
        if isinstance(group, WriteFanout):
            group.reply(peer, reply)
        else:
            group.result(peer.node_id, reply.superseded, reply.live, reply.error)

    def answer(self, operation: WriteOperation) -> None:
        """Every key is decided."""
        request, metrics = operation.request, self._requests.metrics
        count = len(request.keys)
        reply: PutReply | DeleteReply
        if operation.delete:
            metrics.deletes += count
            observe = metrics.delete_latency.observe
            existed = operation.existed or ()
            reply = DeleteReply(request.id, [place in existed for place in range(count)], operation.errors)
        else:
            metrics.puts += count
            observe = metrics.put_latency.observe
            failed = {place for place, _ in operation.errors} if operation.errors else ()
            versions = [
                0 if record is None or place in failed else int.from_bytes(record[:8], "big")
                for place, record in enumerate(operation.results)
            ]
            reply = PutReply(request.id, versions, operation.errors)
        self._known.update(operation.client, request.id, reply)
        self._requests.finish(operation, observe, reply)


class WriteGroup(WriteQuorum):
    """Keys of a batch with one replica set, and their quorum. It stays until every replica has answered or failed.

    What a replica did not take of an acknowledged batch becomes a hint for it, at the answer or when it fails."""

    __slots__ = (
        "acknowledged",
        "answered",
        "deferred",
        "id",
        "keys",
        "missed",
        "operation",
        "places",
        "records",
        "replica_set",
        "requests",
        "restamped",
        "waiting",
        "writes",
    )

    def __init__(
        self,
        writes: Writes,
        requests: Requests,
        operation: WriteOperation,
        places: list[int] | None,
        keys: list[bytes],
        replicas: tuple[str, ...],
        needed: int,
    ) -> None:
        WriteQuorum.__init__(self, needed, len(replicas))
        self.writes = writes
        self.requests = requests
        self.operation = operation
        self.places = places
        self.keys = keys
        self.replica_set = replicas
        self.waiting: dict[str, None] = {}
        self.records: list[bytes] = []
        self.acknowledged = False
        self.answered = False
        self.deferred = False
        self.missed: list[str] | None = None
        self.restamped: list[int] | None = None
        self.id = 0

    def start(self, fanout: WriteFanout | None = None) -> None:
        """Sends the batch to its replicas; with a `fanout`, once that is sent."""
        requests, operation = self.requests, self.operation
        me, usable, waiting = requests.me, requests.peers.usable, self.waiting
        targets = []
        for name in self.replica_set:
            if name == me:
                waiting[me] = None
            elif name in usable:
                waiting[name] = None
                targets.append(usable[name])
            else:
                self.absent(name)
                self._miss(name)
        local = me in waiting
        again = bool(self.records)
        if again or operation.attempts:
            self.maybe = 1  # an earlier try, or an earlier stamp, may have been stored somewhere
        if self.missed is not None and self.hopeless:
            reachable = len(waiting)
            waiting.clear()
            if again and not requests.late(operation):
                self.id = requests.postpone(self, operation)
            else:
                self._done(self.unreachable(reachable))
            return
        # This node's own replica judges a version by this node's clock. Where that seems to run ahead of the others',
        # it stores only what another has taken: else a read would repair a refused write over acknowledged ones.
        limit_ms = requests.clock.wall_ms() - requests.clock.monotonic() * 1000 - self.writes.skew_ms
        ahead = sum(peer.clock_ms < limit_ms for peer in targets)
        self.deferred = local and ahead * 2 > len(targets)
        headers = None
        if local and not again:
            try:
                headers = requests.replica.headers(self.keys)
            except DHTError:
                headers = None  # the local write below reports it
        if not again:
            self.records = self._stamp(headers)
        self.id = requests.enter(self, operation)
        if fanout is not None and sum(map(len, self.records)) < BULK_VALUE_BYTES:  # else it is encoded once for all
            for peer in targets:
                fanout.ask(peer, self)
            if local and not self.deferred:
                fanout.store(self, headers)
            return
        if targets and not self.send(targets):
            return
        if local and not self.deferred:
            requests.replica.write(FRESH, self.keys, self.records, operation.delete, partial(self.result, me), headers)

    def send(self, targets: list[Peer]) -> bool:
        """Sends the batch to these; whether it fits a frame, else it has failed."""
        requests, operation = self.requests, self.operation
        message = ReplicaWrite(
            self.id, requests.epoch, operation.trace, FRESH, self.keys, self.records, operation.delete
        )
        try:
            frame = encode(message)
        except FrameTooLarge:  # a record is longer than its value
            self.waiting.clear()
            requests.pending.pop(self.id, None)
            kind = OutcomeUnknown if self.maybe else InvalidRequest
            self._done(kind("the batch does not fit a frame between nodes: write fewer keys at a time"))
            return False
        for peer in targets:
            try:
                peer.send(frame)
            except (TransportError, Overloaded) as error:
                self.failed(peer.node_id, error, maybe_stored=False)
        return True

    def _stamp(self, headers: list[bytes | None] | None) -> list[bytes]:
        """Packs the records with versions above everything seen. A key that exists keeps its time of creation."""
        request, keys, hlc, writer = self.operation.request, self.keys, self.writes.hlc, self.writes.writer
        now_ms = self.requests.clock.wall_ms()
        first = hlc.tick(now_ms, len(keys))
        flags, expires_ms = 0, 0
        if isinstance(request, Put):
            values = request.values if self.places is None else [request.values[i] for i in self.places]
            if request.ttl_ms:
                expires_ms = now_ms + request.ttl_ms
        else:
            flags = TOMBSTONE
            values = [b""] * len(keys)
        if headers is None or not any(headers):
            return pack_batch(keys, values, first, writer, now_ms, expires_ms, flags)
        records = []
        for version, (key, value, header) in enumerate(zip(keys, values, headers, strict=True), first):
            created_ms = now_ms
            if header is not None:
                known = hlc_of(header)
                if REGISTERED > known >= version:  # a register's replicas will say so
                    hlc.observe(known)
                    version = hlc.tick(now_ms)
                if is_live(header, now_ms):
                    created_ms = created_ms_of(header)
            records.append(pack(key, value, version, writer, created_ms, expires_ms, flags))
        return records

    def result(
        self, replica: str, superseded: list[tuple[int, int]] | None, live: list[int] | None, error: WireError | None
    ) -> None:
        """What a replica answered. Late and doubled answers are ignored."""
        if error is not None:
            if replica in self.waiting and not self.requests.stale(replica, error):
                self.failed(replica, from_wire(*error), maybe_stored=error[0] not in _NOT_STORED)
            return
        if replica not in self.waiting:
            return
        del self.waiting[replica]
        self.add_ack(replica, superseded)
        if self.deferred:
            self.deferred = False
            requests, me = self.requests, self.requests.me
            requests.replica.write(FRESH, self.keys, self.records, self.operation.delete, partial(self.result, me))
        if live:
            existed = self.operation.existed
            if existed is None:
                existed = self.operation.existed = set()
            existed.update(live if self.places is None else [self.places[i] for i in live])
        self._step()

    def lost(self, replica: str, error: DHTError) -> None:
        self.failed(replica, error, maybe_stored=True)

    def restart(self) -> None:
        if self.answered or self.requests.late(self.operation):
            self.expired()
            return
        self.answered = True  # by those that take over
        self.waiting.clear()
        self.writes.restart(self.operation, self.places, self.keys, self.records)

    def expired(self) -> None:
        if not self.answered:
            self._done(self.shortfall("no quorum by the deadline"))
        for silent in self.waiting:
            self._miss(silent)
        self.waiting.clear()
        self.requests.pending.pop(self.id, None)

    def failed(self, replica: str, error: DHTError, *, maybe_stored: bool) -> None:
        """A replica did not take the batch, or nobody knows."""
        if replica not in self.waiting:
            return
        del self.waiting[replica]
        self.requests.metrics.replica_errors += 1
        self.add_failure(replica, error, maybe_stored=maybe_stored)
        self._miss(replica)
        if self.deferred and list(self.waiting) == [self.requests.me]:
            self.waiting.clear()  # nobody took it, so this node does not either
            self.add_failure(self.requests.me, error, maybe_stored=False)
        self._step()

    def _miss(self, replica: str) -> None:
        """A replica does not take the batch: if that is acknowledged, it gets a hint, now or then."""
        if self.acknowledged:
            self._hint(replica)
        elif self.missed is None:
            self.missed = [replica]
        else:
            self.missed.append(replica)

    def _hint(self, replica: str) -> None:
        keys, records = self.keys, self.records
        if self.restamped is not None:  # those are written again, and hinted then
            kept = sorted(set(range(len(keys))).difference(self.restamped))
            keys, records = [keys[i] for i in kept], [records[i] for i in kept]
        if keys:
            self.requests.hint(replica, keys, records)

    def _step(self) -> None:
        if not self.answered:
            outcome = self.step()
            if outcome is not None:
                if isinstance(outcome, Written) and outcome.restamp:
                    self._restamp(outcome.restamp)
                else:
                    self._done(outcome)
        if not self.waiting:
            self.requests.pending.pop(self.id, None)

    def _restamp(self, restamp: list[tuple[int, int]]) -> None:
        """Newer versions are in the way of some keys: write those again, above them (V2). Others have come under
        consensus: write those with it (R1)."""
        operation = self.operation
        operation.attempts += 1
        self.requests.metrics.restamps += len(restamp)
        self.restamped = [index for index, _ in restamp]
        registers = [index for index, hlc in restamp if hlc >= REGISTERED]
        again = [index for index, hlc in restamp if hlc < REGISTERED]
        self.writes.hlc.observe(max((hlc for _, hlc in restamp if hlc < REGISTERED), default=0))
        operation.left += 1  # until all of the following has begun
        self._done(Written([]))
        if registers:
            maybe = [index for index in registers if self.maybe_holds(index)]
            places = self.places
            if places is not None:
                registers, maybe = [places[i] for i in registers], [places[i] for i in maybe]
            self.writes.decide(operation, registers, maybe)
        if again:
            places = again if self.places is None else [self.places[i] for i in again]
            if operation.attempts > RESTAMPS_MAX:
                operation.fail(places, OutcomeUnknown(f"other writers were faster {RESTAMPS_MAX} times"))
            else:
                operation.left += 1
                keys = [self.keys[i] for i in again]
                self.__class__(
                    self.writes, self.requests, operation, places, keys, self.replica_set, self.needed
                ).start()
        operation.left -= 1
        if not operation.left:
            self.writes.answer(operation)

    def _done(self, outcome: Written | DHTError) -> None:
        self.answered = True
        operation = self.operation
        if isinstance(outcome, DHTError):
            if self.places is None:
                operation.results = [None] * len(self.keys)
            operation.fail(range(len(self.keys)) if self.places is None else self.places, outcome)
        else:
            self.acknowledged = True
            if self.places is None:
                operation.results = list(self.records)
            else:
                for place, record in zip(self.places, self.records, strict=True):
                    operation.results[place] = record
        operation.left -= 1
        if not operation.left:
            self.writes.answer(operation)
        if self.missed is not None and self.acknowledged:
            for replica in self.missed:
                self._hint(replica)


class JointWriteGroup(JointWriteQuorum, WriteGroup):
    """Keys that change hands: as a `WriteGroup`, with a quorum of the old replicas and one of the new."""

    __slots__ = ()

    def __init__(
        self,
        writes: Writes,
        requests: Requests,
        operation: WriteOperation,
        places: list[int] | None,
        keys: list[bytes],
        replicas: tuple[str, ...],
        needed: int,
    ) -> None:
        assert type(replicas) is JointSet
        WriteGroup.__init__(self, writes, requests, operation, places, keys, replicas, needed)
        level = Consistency(operation.request.consistency)
        old, new = replicas.old, replicas.new
        self._share(old, new, level.needed(len(old)), level.needed(len(new)))


def _came_to_nothing(known: WriteOperation | PutReply | DeleteReply) -> bool:
    """Every key of a batch failed, and in a way that tells that it is stored nowhere (D3)."""
    if isinstance(known, WriteOperation):
        return False
    if known.errors is None:
        return known.error is not None
    keys = len(known.versions if isinstance(known, PutReply) else known.existed)
    return len(known.errors) == keys and all(
        isinstance(from_wire(*wire), Unavailable | ClockSkew | InvalidRequest) for _, wire in known.errors
    )


def _check_put(request: Put) -> None:
    if len(request.values) != len(request.keys):
        raise InvalidRequest("a batch needs one value for each key")
    if not 0 <= request.ttl_ms <= TTL_MS_MAX:
        raise InvalidRequest(f"a ttl is 0 to {TTL_MS_MAX} ms")
    if request.values and max(map(len, request.values)) > VALUE_BYTES_MAX:
        raise InvalidRequest(f"a value has at most {VALUE_BYTES_MAX} bytes")
