"""Reads at a coordinator: asks R replicas, hedges, repairs what differs, answers (protocol/quorum.py has the rules)."""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial

from agi.core.dht.errors import (
    DHTError,
    LinkClosed,
    Overloaded,
    StorageCorrupt,
    TransportError,
    Truncated,
    Unavailable,
    from_wire,
)
from agi.core.dht.fanout import ReadFanout
from agi.core.dht.joint import JointSet
from agi.core.dht.peers import Peer
from agi.core.dht.protocol.consensus import LOOK, LOOK_NAME, as_plain, is_settled
from agi.core.dht.protocol.messages import (
    REPAIR,
    Get,
    GetReply,
    Op,
    OpResult,
    ReplicaRead,
    ReplicaReadReply,
    ReplicaWrite,
    WireError,
)
from agi.core.dht.protocol.quorum import Agreed, JointReadQuorum, ReadQuorum, Repair
from agi.core.dht.protocol.record import FLAGS, REGISTER, REGISTERED, is_live
from agi.core.dht.requests import Operation, ReplyTo, Requests, refusal
from agi.core.dht.transport.codec import encode
from agi.core.dht.types import Consistency

HEDGE_CREDIT_MAX = 10.0
"""Hedges that may follow each other at once after a quiet time."""
TRUNCATED = Truncated("the batch's values do not fit one frame: ask again for this key")


class Reads:
    """All reads of one coordinator.

    Args:
        hedge_budget: hedged reads as a share of all reads; a further replica is asked when the first is later than its
            link's percentile of recent latencies.
    """

    def __init__(self, requests: Requests, hedge_budget: float) -> None:
        self._requests = requests
        self._budget = hedge_budget
        self._credit = 1.0 if hedge_budget else 0.0
        self._hedges: deque[tuple[float, ReadGroup]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    def start(self, request: Get, reply: ReplyTo, trace: str) -> None:
        """Reads a batch; `reply` gets one GetReply by the deadline."""
        requests = self._requests
        try:
            needed = requests.needed(request.consistency)
            started = requests.clock.monotonic()
            cost = requests.admit(started, request.keys, read_from=needed)
        except DHTError as error:
            reply(GetReply(request.id, [], None, refusal(error).to_wire()))
            return
        operation = Operation(request, reply, trace, started, cost)
        self.begin(operation, None, request.keys)

    def begin(self, operation: Operation, places: list[int] | None, keys: list[bytes], *, again: bool = False) -> None:
        """Reads these keys of the operation; `again`: as the replica sets have changed."""
        requests, consistency = self._requests, operation.request.consistency
        needed = requests.needed(consistency)
        repair_to = 0 if consistency == Consistency.ONE else needed
        parts = requests.parts(operation, places, keys)
        fanout = None
        if len(parts) > 1 and not again:
            fanout = ReadFanout(requests, operation)
            requests.turn += 1  # once for all groups: their number may always be even
        for part, part_keys, replicas in parts:
            kind = JointReadGroup if type(replicas) is JointSet else ReadGroup
            group = kind(self, requests, operation, part, part_keys, replicas, needed, repair_to)
            group.again = again
            group.start(fanout)
        if fanout is not None:
            fanout.send()

    def reply(self, group: ReadGroup | ReadFanout, peer: Peer, reply: ReplicaReadReply) -> None:
        """A peer answered a read of that group, or of several."""
        if isinstance(group, ReadFanout):
            group.reply(peer, reply)
            return
        if not (group.hedged or group.again):  # else the time since its start says nothing of the link
            peer.latency.add(self._requests.clock.monotonic() - group.operation.started)
        group.result(peer.node_id, reply.records, reply.error)

    # --- hedging

    def watch(self, group: ReadGroup, peer: Peer) -> None:
        """A further replica is asked if this peer is late, within the budget."""
        credit = self._credit
        if credit < HEDGE_CREDIT_MAX:
            self._credit = credit = credit + self._budget
        if credit < 1:
            return
        self._hedges.append((group.operation.started + peer.latency.value, group))
        if self._timer is None:
            self._timer = self._loop.call_later(peer.latency.value, self._look)

    def _look(self) -> None:
        self._timer = None
        now = self._requests.clock.monotonic()
        hedges = self._hedges
        while hedges:
            due, group = hedges[0]
            if group.waiting and due > now:
                self._timer = self._loop.call_later(due - now, self._look)
                return
            hedges.popleft()
            # where this node itself is the slow one, another replica does not help
            slow = group.waiting and not group.repairing and self._requests.me not in group.waiting
            if slow and self._credit >= 1 and group.ask_another():
                self._credit -= 1
                self._requests.metrics.hedges += 1


class ReadGroup(ReadQuorum):
    """Keys of a batch with one replica set, and their quorum. It is over when nobody is waited for."""

    __slots__ = (
        "again",
        "asked",
        "hedged",
        "id",
        "keys",
        "operation",
        "places",
        "reads",
        "repairs",
        "replica_set",
        "requests",
        "waiting",
    )

    def __init__(
        self,
        reads: Reads,
        requests: Requests,
        operation: Operation,
        places: list[int] | None,
        keys: list[bytes],
        replicas: tuple[str, ...],
        needed: int,
        repair_to: int,
    ) -> None:
        ReadQuorum.__init__(self, needed, len(replicas), repair_to)
        self.reads = reads
        self.requests = requests
        self.operation = operation
        self.places = places
        self.keys = keys
        self.replica_set = replicas
        self.waiting: dict[str, None] = {}
        self.asked: dict[str, None] = {}
        self.hedged = False
        self.again = False
        self.id = 0

    def start(self, fanout: ReadFanout | None = None) -> None:
        """Asks as many replicas as it needs; with a `fanout`, once that is sent, and those that it asks already."""
        requests = self.requests
        me, usable, replicas = requests.me, requests.peers.usable, self.replica_set
        reachable = [usable[name] for name in replicas if name in usable]
        local = me in replicas
        ask = self.needed - local
        if len(reachable) < ask:
            self._unreachable(
                Unavailable("too few replicas are reachable", needed=self.needed, answered=len(reachable) + local)
            )
            return
        if fanout is None:
            requests.turn += 1
        if len(reachable) > 1:
            first = requests.turn % len(reachable)
            if first:
                reachable = reachable[first:] + reachable[:first]
            if fanout is not None:
                reachable.sort(key=lambda peer: peer.node_id not in fanout.peers)
        if requests.peers.suspects:
            reachable.sort(key=lambda peer: peer.node_id in requests.peers.suspects)
        self.id = requests.enter(self, self.operation)
        self.asked[me] = None
        if local:
            self.waiting[me] = None
        if ask:
            for peer in reachable[:ask]:
                if fanout is None:
                    self._ask(peer)
                else:
                    self.asked[peer.node_id] = self.waiting[peer.node_id] = None
                    fanout.ask(peer, self)
            if len(reachable) > ask:
                self.reads.watch(self, reachable[0])
        if me not in self.waiting:
            return
        if fanout is None:
            requests.replica.read_batch(self.keys, partial(self.result, me))
        else:
            fanout.look(self)

    def _unreachable(self, error: Unavailable) -> None:
        self.waiting.clear()
        if self.again and not self.requests.late(self.operation):
            self.id = self.requests.postpone(self, self.operation)
        else:
            self._done(error)

    def _ask(self, peer: Peer) -> None:
        name = peer.node_id
        self.asked[name] = self.waiting[name] = None
        try:
            peer.send(encode(ReplicaRead(self.id, self.requests.epoch, self.operation.trace, self.keys)))
        except (TransportError, Overloaded) as error:
            self.lost(name, error)

    def ask_another(self) -> bool:
        """Asks a usable replica that was not asked yet, a suspected one last; False where there is none."""
        usable = self.requests.peers.usable
        for name in sorted(self.replica_set, key=self.requests.peers.suspects.__contains__):
            if name not in self.asked and name in usable:
                self.hedged = True
                self._ask(usable[name])
                return True
        return False

    def result(self, replica: str, records: list[bytes | None], error: WireError | None) -> None:
        """What a replica answered. Late and doubled answers are ignored."""
        if replica not in self.waiting or self.repairing:  # during a repair, others are waited for
            return
        if error is not None:
            if not self.requests.stale(replica, error):
                self.lost(replica, from_wire(*error))
            return
        del self.waiting[replica]
        if len(records) != len(self.keys):
            records = self._cut_short(records)
            if not self.keys:  # the reply was full before it came to this group
                self._done([])
                return
        self.add_reply(replica, records)
        self._step()

    def lost(self, replica: str, error: DHTError) -> None:
        """A replica will not answer: the next that was not asked takes its place."""
        if replica not in self.waiting:
            return
        del self.waiting[replica]
        self.requests.metrics.replica_errors += 1
        if self.repairing:
            self._repair_elsewhere(replica)
            return
        self.add_failure(replica, error)
        if not self.ask_another():
            self.failures = max(self.failures, self.replicas - len(self.waiting) - len(self.replies))
        if self.id in self.requests.pending:  # else a failure before this one has ended it
            self._step()

    def restart(self) -> None:
        if self.requests.late(self.operation):
            self.expired()
            return
        self.waiting.clear()
        self.reads.begin(self.operation, self.places, self.keys, again=True)

    def expired(self) -> None:
        self._done(self.shortfall("no quorum by the deadline"))

    def _step(self) -> None:
        outcome = self.step()
        if outcome is None:
            return
        if isinstance(outcome, Agreed):
            self._done(outcome.records)
        elif isinstance(outcome, Repair):
            self.requests.metrics.read_repairs += sum(len(indexes) for _, indexes in outcome.stale)
            self.repairs = dict(outcome.stale)
            self.waiting = dict.fromkeys(self.repairs) if outcome.blocking else {}
            for replica, indexes in outcome.stale:
                self._repair(replica, indexes, [outcome.records[i] or b"" for i in indexes])
            if not outcome.blocking:
                self._done(outcome.records)
        else:
            self._done(outcome)

    def _cut_short(self, records: list[bytes | None]) -> list[bytes | None]:
        """A replica's records did not fit one frame: the group answers its first keys, the client asks again for the
        rest."""
        count = len(records)
        if count >= len(self.keys):
            return records[: len(self.keys)]
        places = self.places or list(range(len(self.keys)))
        self.operation.fail(places[count:], TRUNCATED)
        if self.places is None:
            self.operation.results = [None] * len(self.keys)
        self.places = places[:count]
        self.keys = self.keys[:count]
        for _, known in self.replies:
            del known[count:]
        return records

    # --- repair

    def _repair(self, replica: str, indexes: list[int], records: list[bytes]) -> None:
        keys = [self.keys[i] for i in indexes]
        requests = self.requests
        if replica == requests.me:
            requests.replica.write(REPAIR, keys, records, False, partial(self._repaired_here, replica))
            return
        peer = requests.peers.usable.get(replica)
        try:
            if peer is None:
                raise LinkClosed(f"{replica} is not connected")
            peer.send(encode(ReplicaWrite(self.id, requests.epoch, self.operation.trace, REPAIR, keys, records)))
        except (TransportError, Overloaded) as error:
            self.lost(replica, error)

    def _repaired_here(
        self, replica: str, superseded: list[tuple[int, int]] | None, live: object, error: WireError | None
    ) -> None:
        self.repaired(replica, superseded, error)

    def repaired(self, replica: str, superseded: list[tuple[int, int]] | None, error: WireError | None) -> None:
        """A repair was stored, or the replica holds something newer still, which is as good. Where it has come under
        consensus meanwhile it may hold nothing newer: a round has to tell what the key holds (R1)."""
        if replica not in self.waiting:
            return
        if error is not None:
            if not self.requests.stale(replica, error):
                self.lost(replica, from_wire(*error))
            return
        del self.waiting[replica]
        if superseded:
            places = self.repairs[replica]
            decided = [places[i] for i, hlc in superseded if hlc >= REGISTERED]
            self.contested = {*self.contested, *decided}
        agreed = self.add_repaired(replica, self.repairs[replica])
        if agreed is not None:
            self._done(agreed.records)
        elif not self.waiting:
            self._repair_elsewhere(replica)

    def _repair_elsewhere(self, failed: str) -> None:
        """A stale replica could not be repaired: store the newest records at one that was not asked yet."""
        usable = self.requests.peers.usable
        for name in self.replica_set:
            if name not in self.asked and name in usable:
                indexes, records = self.unrepaired()
                self.asked[name] = self.waiting[name] = None
                self.repairs[name] = indexes
                self._repair(name, indexes, records)
                return
        if not self.waiting:
            self._done(self.shortfall(f"{failed} could not be repaired"))  # or is not enough

    # --- end

    def _done(self, outcome: list[bytes | None] | DHTError) -> None:
        self.waiting.clear()
        requests, operation = self.requests, self.operation
        requests.pending.pop(self.id, None)
        if isinstance(outcome, DHTError):
            if self.places is None:
                operation.results = [None] * len(self.keys)
            operation.fail(range(len(self.keys)) if self.places is None else self.places, outcome)
        elif self.places is None:
            operation.results = outcome
        else:
            results = operation.results
            for place, record in zip(self.places, outcome, strict=True):
                results[place] = record
        if self.contested:
            contested = self.contested if self.places is None else [self.places[i] for i in self.contested]
            operation.contested = {*contested, *(operation.contested or ())}
        operation.left -= 1
        if operation.left:
            return
        if operation.fanout:
            requests.pending.pop(operation.fanout, None)
        records = operation.results
        now_ms = 0
        looks = list(operation.contested or ())
        for index, record in enumerate(records):
            if record is not None and record[FLAGS]:
                now_ms = now_ms or requests.clock.wall_ms()
                register = record[FLAGS] & REGISTER
                if not register and is_live(record, now_ms):
                    continue
                if records is operation.results:
                    records = records.copy()  # a replica's reply holds this list
                if not register:
                    records[index] = None
                elif index not in looks and not self._shown(records, index, now_ms):
                    looks.append(index)
        if looks and records is operation.results:
            records = records.copy()
        operation.results = records
        if not looks:
            self._finish()
            return
        operation.left = len(looks)  # what replicas do not agree on, or is to expire, is decided first (R9)
        keys = operation.request.keys
        for index in looks:
            requests.decide(Op(LOOK_NAME, keys[index], LOOK), operation.deadline, partial(self._looked, index))

    def _shown(self, records: list[bytes | None], index: int, now_ms: int) -> bool:
        """Puts a register's value in the place of its record; whether that is what was chosen."""
        operation, record = self.operation, records[index]
        assert record is not None
        try:
            if operation.request.consistency != Consistency.ONE and not is_settled(record, now_ms):
                return False
            plain = as_plain(operation.request.keys[index], record)
        except StorageCorrupt as error:
            operation.fail([index], error)
            plain = None
        records[index] = plain if is_live(plain, now_ms) else None
        return True

    def _looked(self, index: int, result: OpResult) -> None:
        operation = self.operation
        operation.results[index] = result.record
        if result.error is not None:
            error = from_wire(*result.error)
            operation.fail([index], error)
        operation.left -= 1
        if not operation.left:
            self._finish()

    def _finish(self) -> None:
        operation, metrics = self.operation, self.requests.metrics
        metrics.gets += len(operation.results)
        self.requests.sizes.learn(operation.results)
        answer = GetReply(operation.request.id, operation.results, operation.errors)
        self.requests.finish(operation, metrics.get_latency.observe, answer)


class JointReadGroup(JointReadQuorum, ReadGroup):
    """Keys that change hands: needs a quorum of the old replicas and one of the new.

    Those that are in both sets count in both, and hold what the newcomers have yet to get: where they are enough, only
    they are asked, and a change costs a read nothing. Else, or once one of them fails or is late, all are.
    """

    __slots__ = ()

    def __init__(
        self,
        reads: Reads,
        requests: Requests,
        operation: Operation,
        places: list[int] | None,
        keys: list[bytes],
        replicas: tuple[str, ...],
        needed: int,
        repair_to: int,
    ) -> None:
        assert type(replicas) is JointSet
        ReadGroup.__init__(self, reads, requests, operation, places, keys, replicas, needed, repair_to)
        level = Consistency(operation.request.consistency)
        old, new = replicas.old, replicas.new
        self._share(old, new, level.needed(len(old)), 0 if level is Consistency.ONE else level.needed(len(new)))

    def start(self, fanout: ReadFanout | None = None) -> None:
        """Asks by itself."""
        requests = self.requests
        me, usable, suspects = requests.me, requests.peers.usable, requests.peers.suspects
        old, new = (half.names for half in self._halves)
        requests.turn += 1
        few = [name for name in old if name in new and name != me and name in usable and name not in suspects]
        if requests.turn & 1:
            few.reverse()
        if me in old and me in new:
            few.insert(0, me)
        few = few[: self.needed] if len(few) >= self.needed else []
        missing = [name for name in self.replica_set if name != me and name not in usable]
        for name in missing:
            self.asked[name] = None
            self.add_failure(name, LinkClosed(f"{name} is not connected"))
        if self.hopeless:
            self._unreachable(self.unreachable([name for name in self.replica_set if name not in missing]))
            return
        self.id = requests.enter(self, self.operation)
        for name in few or self.replica_set:
            self._ask_or_look(name)
        others = [name for name in few if name != me]
        if others and self.id in requests.pending:
            self.reads.watch(self, usable[others[0]])

    def _ask_or_look(self, name: str) -> None:
        requests = self.requests
        if name in self.asked or self.id not in requests.pending:
            return
        if name == requests.me:
            self.asked[name] = self.waiting[name] = None
            requests.replica.read_batch(self.keys, partial(self.result, name))
        elif name in requests.peers.usable:
            self._ask(requests.peers.usable[name])

    def ask_another(self) -> bool:
        """All that were not asked yet; False where there are none."""
        before = len(self.asked)
        for name in self.replica_set:
            self._ask_or_look(name)
        self.hedged |= len(self.asked) > before
        return len(self.asked) > before
