"""Quorum reads that the client does itself: it asks R replicas at once and answers if they agree.

That saves the two hops through a coordinator. It is only the short cut for the common case: whenever the replicas
differ, one fails or is late, or a record's life hangs on a clock, the whole batch goes to a coordinator, which repairs
and judges (reads.py). What the short cut returns is what R replicas hold, so it is as safe as a coordinator's answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agi.core.dht.client.batches import Batch
from agi.core.dht.errors import Overloaded, TransportError
from agi.core.dht.protocol.consensus import as_plain, state_of
from agi.core.dht.protocol.latency import Quantile
from agi.core.dht.protocol.messages import ReplicaRead, ReplicaReadReply
from agi.core.dht.protocol.record import EXPIRES, FLAGS, REGISTER, UNVOTED
from agi.core.dht.protocol.timers import TimerWheel
from agi.core.dht.transport.codec import encode

if TYPE_CHECKING:
    from agi.core.dht.client.links import Remote
    from agi.core.dht.client.session import Session

DIRECT_KEYS_MAX = 64
"""Larger batches gain nothing: their replies cost the client more than the hops do."""
LATE_PERCENTILE = 0.99
LATE_FLOOR_S = 0.01
LATE_CEILING_S = 0.25
"""However slow replicas have been, a coordinator is asked after this, or after half of the call's time."""


class _Read:
    __slots__ = ("batch", "records", "waiting")

    def __init__(self, batch: Batch, nodes: list[Remote]) -> None:
        self.batch = batch
        self.waiting = nodes.copy()
        self.records: list[bytes | None] | None = None


class DirectReads:
    """The direct reads of one session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._reads: dict[int, _Read] = {}
        self._late: TimerWheel[int] = TimerWheel(session.clock.monotonic())
        self._latency = Quantile(LATE_PERCENTILE, start_s=0.05, floor_s=LATE_FLOOR_S)

    @property
    def pending(self) -> int:
        return len(self._reads)

    def start(self, batch: Batch, number: int, nodes: list[Remote], epoch: int, trace: str) -> bool:
        """Asks these nodes; False where one could not be asked, so that the batch has to go another way."""
        frame = encode(ReplicaRead(number, epoch, trace, batch.keys))
        self._reads[number] = _Read(batch, nodes)
        try:
            for node in nodes:
                node.send(frame)
        except (TransportError, Overloaded):
            del self._reads[number]
            return False
        now = self._session.clock.monotonic()
        patience_s = min(self._latency.value, LATE_CEILING_S, (batch.deadline - now) / 2)
        self._late.add(now + patience_s, number)
        return True

    def reply(self, node: Remote, reply: ReplicaReadReply) -> None:
        """What a node answered. Late and doubled answers are ignored: one replica may not count for two."""
        read = self._reads.get(reply.id)
        if read is None or node not in read.waiting:
            return
        batch, records = read.batch, reply.records
        if reply.error is not None or len(records) != len(batch.keys):
            self._fall_back(reply.id)
            return
        read.waiting.remove(node)
        if read.records is None:
            read.records = records
        elif read.records != records:
            self._fall_back(reply.id)
            return
        if read.waiting:
            return
        for index, record in enumerate(records):
            if record is not None and record[FLAGS]:
                if record[FLAGS] & REGISTER:
                    if record[FLAGS] & UNVOTED or state_of(record).expires_ms:
                        self._fall_back(reply.id)
                        return
                    records[index] = as_plain(batch.keys[index], record)
                    continue
                if record[FLAGS] == EXPIRES:
                    self._fall_back(reply.id)  # a coordinator judges by its clock
                    return
                records[index] = None
        del self._reads[reply.id]
        self._session.settled()
        batch.ok(records)

    def look(self, now: float) -> None:
        """Gives up on what is late; its coordinator hedges further."""
        for number in self._late.advance(now):
            if number in self._reads:
                if self._latency.value < LATE_CEILING_S:
                    self._latency.add(float("inf"))
                self._fall_back(number)
            else:
                self._latency.add(0.0)

    def lost(self, node: Remote) -> None:
        """A node's links broke."""
        for number in [number for number, read in self._reads.items() if node in read.waiting]:
            self._fall_back(number)

    def end(self) -> list[Batch]:
        """The batches under way; they are forgotten here."""
        batches = [read.batch for read in self._reads.values()]
        self._reads.clear()
        return batches

    def _fall_back(self, number: int) -> None:
        read = self._reads.pop(number)
        self._session.coordinate(read.batch)
