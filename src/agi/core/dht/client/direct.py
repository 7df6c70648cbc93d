"""Quorum reads that the client does itself: it asks R replicas of each key at once and answers where they agree.

That saves the two hops through a coordinator. It is only the short cut for the common case: keys on which the replicas
differ, or whose life hangs on a clock, go to a coordinator, which repairs and judges (reads.py), and so do those of
which a node fails or is late. What the short cut returns is what R replicas hold, so it is as safe as a coordinator's
answer.

Where not every node holds every key, each node is asked once, for all keys of the batch that it is to answer for, and
few nodes are asked (routing.py). A node that says no more than a frame's worth is asked again for the rest.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from agi.core.dht.client.batches import Batch
from agi.core.dht.client.routing import readers
from agi.core.dht.errors import Overloaded, StaleEpoch, TransportError
from agi.core.dht.protocol.consensus import as_plain, state_of
from agi.core.dht.protocol.latency import Quantile
from agi.core.dht.protocol.messages import ReplicaRead, ReplicaReadReply
from agi.core.dht.protocol.record import EXPIRES, FLAGS, REGISTER, UNVOTED
from agi.core.dht.protocol.timers import TimerWheel
from agi.core.dht.transport.codec import encode
from agi.core.dht.types import Consistency

if TYPE_CHECKING:
    from agi.core.dht.client.links import Remote
    from agi.core.dht.client.session import Session

DIRECT_KEYS_MAX = 64
"""Where every node holds every key, larger batches gain nothing: their replies cost the client more than the hops."""
SPREAD_KEYS_MAX = 1024
"""Else a coordinator has to ask several nodes itself: the hops cost more."""
LATE_PERCENTILE = 0.99
LATE_FLOOR_S = 0.01
LATE_CEILING_S = 0.25
"""However slow replicas have been, a coordinator is asked after this, or after half of the call's time."""
SPARED_MAX, SPARED_EACH = 32.0, 2.0
"""Late reads that may be asked again at once in a row, and how many more may for each read that was in time: all that a
slow node is asked, but where most reads are late the nodes have too much to do, and asking twice only adds to it. Such
a read waits for half of the time that is left to it."""
LATE_BYTES_PER_S = 32 * 1024 * 1024
"""Large values take their time: so much longer is waited for what is under way."""
_UNREAD = b""


class _Read:
    """A batch under way: `waiting` has the nodes that have not answered, and the places of the keys that each was asked
    for, None for all."""

    __slots__ = ("batch", "cut", "differ", "records", "waiting")

    def __init__(self, batch: Batch, asked: dict[Remote, list[int] | None]) -> None:
        self.batch = batch
        self.waiting = asked
        self.records: list[bytes | None] = []
        self.differ: set[int] = set()
        self.cut: set[int] = set()

    def add(self, node: Remote, records: list[bytes | None]) -> bool:
        """What a node holds; whether that can be an answer to what it was asked."""
        places, known, keys = self.waiting.pop(node), self.records, self.batch.keys
        if not records or len(records) > (len(keys) if places is None else len(places)):
            self.waiting[node] = places
            return False
        if places is None:
            if not known and len(records) == len(keys):
                self.records = records
                return True
            if known == records:
                return True
            places = list(range(len(keys)))
        if not known:
            self.records = known = [_UNREAD] * len(keys)
        for place, record in zip(places, records, strict=False):
            if known[place] == _UNREAD:
                known[place] = record
            elif known[place] != record:
                self.differ.add(place)
        self.cut.update(places[len(records) :])
        return True

    def missing(self) -> Collection[int]:
        """Places of which a node has still to answer."""
        asked = self.waiting.values()
        if None in asked:
            return range(len(self.batch.keys))
        return {place for places in asked for place in places or ()}


class DirectReads:
    """The direct reads of one session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._reads: dict[int, _Read] = {}
        self._late: TimerWheel[int] = TimerWheel(session.clock.monotonic())
        self._latency = Quantile(LATE_PERCENTILE, start_s=0.05, floor_s=LATE_FLOOR_S)
        self._credit = SPARED_MAX
        self._turn = 0

    @property
    def pending(self) -> int:
        return len(self._reads)

    def start(self, batch: Batch) -> bool:
        """Asks the replicas of the batch's keys; False where it has to go another way."""
        session = self._session
        if batch.consistency is Consistency.ALL or not session.direct_reads:
            return False
        self._turn += 1
        needed = batch.consistency.needed(session.replica_count)
        if session.ring is None:
            return len(batch.keys) <= DIRECT_KEYS_MAX and self._ask_some(batch, session.up, needed)
        if len(batch.keys) == 1:
            nodes = session.nodes
            up = [remote for name in session.ring.replicas(batch.keys[0]) if (remote := nodes[name]).links]
            return self._ask_some(batch, up, needed)
        if len(batch.keys) > SPREAD_KEYS_MAX:
            return False
        ready = [remote.node_id for remote in session.up if not remote.silent]
        by_node = readers(batch.keys, ready, session.ring, needed, self._turn)
        if by_node is None:
            return False
        return self._ask(batch, {session.nodes[name]: places for name, places in by_node.items()})

    def _ask_some(self, batch: Batch, up: list[Remote], needed: int) -> bool:
        """Asks so many of these nodes, which all hold the keys, for all of them."""
        if self._session.silence.nodes:
            up = [remote for remote in up if not remote.silent]
        if len(up) < needed:
            return False
        first = self._turn % len(up)
        nodes = up[first : first + needed]
        if len(nodes) < needed:
            nodes += up[: needed - len(nodes)]
        return self._ask(batch, dict.fromkeys(nodes))

    def _ask(self, batch: Batch, asked: dict[Remote, list[int] | None]) -> bool:
        session, keys = self._session, batch.keys
        number = session.number()
        trace, frame = f"{session.name}:{number}", b""
        self._reads[number] = _Read(batch, asked)
        try:
            for node, places in list(asked.items()):
                if places is not None:
                    frame = encode(ReplicaRead(number, session.epoch, trace, [keys[place] for place in places]))
                elif not frame:
                    frame = encode(ReplicaRead(number, session.epoch, trace, keys))
                node.send(frame)
        except (TransportError, Overloaded):
            return self._reads.pop(number, None) is None
        now = session.clock.monotonic()
        patience_s = min(self._latency.value, LATE_CEILING_S) + session.pacing.under_way / LATE_BYTES_PER_S
        patience_s = min(patience_s, (batch.deadline - now) / 2)
        self._late.add(now + patience_s, number)
        return True

    def reply(self, node: Remote, reply: ReplicaReadReply) -> None:
        """What a node answered. Late and doubled answers are ignored: one replica may not count for two."""
        read = self._reads.get(reply.id)
        if read is None or node not in read.waiting:
            return
        if reply.error is not None and reply.error[0] == StaleEpoch.code:
            self._session.outdated.set()
        if reply.error is not None or not read.add(node, reply.records) or not read.waiting:
            self._end(reply.id)

    def look(self, now: float) -> None:
        """Gives up on what is late; its coordinator hedges further. A negative number has been late once."""
        for number in self._late.advance(now):
            read = self._reads.get(abs(number))
            if number < 0:
                if read is not None:
                    self._end(-number)
            elif read is None:
                self._latency.add(0.0)
                self._credit = min(SPARED_MAX, self._credit + SPARED_EACH)
            else:
                if self._latency.value < LATE_CEILING_S:
                    self._latency.add(float("inf"))
                if self._credit >= 1:
                    self._credit -= 1
                    self._end(number)
                else:
                    self._late.add((now + read.batch.deadline) / 2, -number)

    def lost(self, node: Remote) -> None:
        """A node's links broke."""
        for number in [number for number, read in self._reads.items() if node in read.waiting]:
            self._end(number)

    def end(self) -> list[Batch]:
        """The batches under way; they are forgotten here."""
        batches = [read.batch for read in self._reads.values()]
        self._reads.clear()
        return batches

    def _end(self, number: int) -> None:
        """Answers what is known; a coordinator gets what is not, and the nodes once more what they had no room for."""
        read = self._reads.pop(number)
        batch, records, cut, session = read.batch, read.records, read.cut, self._session
        session.pacing.sizes.learn(records)
        unclear = read.differ
        if read.waiting:
            unclear.update(read.missing())
        for place, record in enumerate(records):
            if record and record[FLAGS]:
                if not record[FLAGS] & REGISTER:
                    if record[FLAGS] == EXPIRES:
                        unclear.add(place)  # a coordinator judges by its clock
                    records[place] = None
                elif record[FLAGS] & UNVOTED or state_of(record).expires_ms:
                    unclear.add(place)
                else:
                    records[place] = as_plain(batch.keys[place], record)
        if not unclear and not cut:
            session.settled()
            batch.ok(records)
            return
        cut -= unclear
        places = range(len(batch.keys))
        clear = [place for place in places if place not in unclear and place not in cut]
        if not clear and not cut:
            session.coordinate(batch)
            return
        if clear:
            session.settled()
            batch.part(clear).ok([records[place] for place in clear])
        if cut:
            session.submit(batch.part(sorted(cut)))
        if unclear:
            session.coordinate(batch.part(sorted(unclear)))
