"""Reads of large values: how many keys one frame asks for, and how much is asked for at a time.

A node answers with no more than a frame's worth (replica.py). What is read is expected to be as large as what was read
of late: a batch that would bring much is sent in parts that a reply holds, and no more of them at once than a window
has room for. The rest waits here, so that no node's links, nor this process, hold all of it at the same time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from agi.core.dht.client.batches import Batch, Sink
from agi.core.dht.protocol.sizes import RecordSizes
from agi.core.dht.types import BATCH_BYTES_MAX

if TYPE_CHECKING:
    from agi.core.dht.errors import DHTError

PACED_BYTES = BATCH_BYTES_MAX // 4
"""Batches that are expected to bring less go at once."""
PART_BYTES = BATCH_BYTES_MAX - 64 * 1024
"""Of one frame: less than a reply holds, as records differ."""
WINDOW_BYTES = 4 * BATCH_BYTES_MAX
"""That may be under way; one part always may."""


class _Counted:
    """Hands results on, and says when all of a part have come."""

    __slots__ = ("_ended", "_left", "_sink")

    def __init__(self, sink: Sink, keys: int, ended: Callable[[], None]) -> None:
        self._sink = sink
        self._left = keys
        self._ended = ended

    def ok(self, places: Sequence[int] | None, results: Sequence[Any]) -> None:
        self._sink.ok(places, results)
        self._count(len(results))

    def fail(self, places: Iterable[int], error: DHTError) -> None:
        failed = list(places)
        self._sink.fail(failed, error)
        self._count(len(failed))

    def _count(self, keys: int) -> None:
        left, self._left = self._left, self._left - keys
        if self._left <= 0 < left:
            self._ended()


class Pacing:
    """The reads of one session.

    Args:
        send: sends a part.

    Attributes:
        sizes: of what was read of late.
        under_way: bytes that are expected of the parts that were sent.
    """

    def __init__(self, send: Callable[[Batch], None]) -> None:
        self._send = send
        self._waiting: deque[Batch] = deque()
        self._sending = False
        self._parts = 0
        self.sizes = RecordSizes()
        self.under_way = 0.0

    def takes(self, batch: Batch) -> bool:
        """Whether a batch would bring much: then it is sent from here. The rest of a part is counted with it."""
        keys, record_bytes = len(batch.keys), self.sizes.mean_bytes
        if keys * record_bytes < PACED_BYTES or isinstance(batch.sink, _Counted):
            return False
        most = max(1, int(PART_BYTES / record_bytes))
        if keys <= most:
            self._waiting.append(batch)
        else:
            parts = (range(first, min(first + most, keys)) for first in range(0, keys, most))
            self._waiting.extend(batch.part(places) for places in parts)
        self._go_on()
        return True

    def expired(self, now: float) -> list[Batch]:
        """Those whose time is over before they were sent; they are forgotten here."""
        over = [batch for batch in self._waiting if batch.deadline <= now]
        if over:
            self._waiting = deque(batch for batch in self._waiting if batch.deadline > now)
        return over

    def end(self) -> list[Batch]:
        """Those that were not sent; they are forgotten here."""
        waiting, self._waiting = list(self._waiting), deque()
        return waiting

    def _go_on(self) -> None:
        if self._sending:  # a part that ends at once is followed by the next one in the loop below
            return
        self._sending = True
        while self._waiting:
            expected = len(self._waiting[0].keys) * self.sizes.mean_bytes
            if self._parts and self.under_way + expected > WINDOW_BYTES:
                break
            batch = self._waiting.popleft()
            self._parts += 1
            self.under_way += expected
            batch.sink = _Counted(batch.sink, len(batch.keys), partial(self._ended, expected))
            self._send(batch)
        self._sending = False

    def _ended(self, expected: float) -> None:
        self._parts -= 1
        self.under_way = self.under_way - expected if self._parts else 0.0
        self._go_on()
