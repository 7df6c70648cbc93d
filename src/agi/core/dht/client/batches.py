"""Batches under way at a client: what they carry, and where their results go.

A batch is one request frame. Its results go into a sink by place: one future per caller where single calls of a loop
turn were coalesced, one list for a `get_many`. What has to be tried again becomes a smaller batch with the same sink.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeAlias

from agi.core.dht.errors import DHTError, OutcomeUnknown
from agi.core.dht.protocol.messages import Delete, Get, Op, Put, Update
from agi.core.dht.types import BATCH_BYTES_MAX, Consistency

BATCH_KEYS_MAX = 10_000
"""Keys of one request frame; larger batches are split."""


class Kind(enum.IntEnum):
    GET = 0
    PUT = 1
    DELETE = 2
    UPDATE = 3
    BOUND = 4
    """Operations under consensus that two nodes may try at any time: looks, and writes bound to a version."""


Ended: TypeAlias = Callable[[int, bool], None]
"""Told how many calls have ended, and whether the cluster has carried them out."""


class Sink(Protocol):
    def ok(self, places: Sequence[int] | None, results: Sequence[Any]) -> None:
        """Results of these places (None: all, in order)."""

    def fail(self, places: Iterable[int], error: DHTError) -> None: ...


def _carried_out(error: DHTError) -> bool:
    """Whether a call that ended so was one that the cluster has dealt with."""
    return not (error.retryable or isinstance(error, OutcomeUnknown))


class Futures:
    """One future per key: coalesced single calls. `ended` is told of how many have a result or an error."""

    __slots__ = ("_ended", "futures")

    def __init__(self, ended: Ended) -> None:
        self._ended = ended
        self.futures: list[asyncio.Future[Any]] = []

    def ok(self, places: Sequence[int] | None, results: Sequence[Any]) -> None:
        self._ended(len(results), True)
        futures = self.futures if places is None else [self.futures[i] for i in places]
        for future, result in zip(futures, results, strict=True):
            if not future.done():  # a caller may have given up
                future.set_result(result)

    def fail(self, places: Iterable[int], error: DHTError) -> None:
        count = 0
        for place in places:
            count += 1
            if not self.futures[place].done():
                self.futures[place].set_exception(error)
        self._ended(count, _carried_out(error))


class Gathered:
    """One future for many keys: `done` is set when every place has a result or an error."""

    __slots__ = ("_ended", "_left", "done", "errors", "results")

    def __init__(self, size: int, ended: Ended) -> None:
        self._ended = ended
        self.results: list[Any] = [None] * size
        self.errors: dict[int, DHTError] = {}
        self._left = size
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def ok(self, places: Sequence[int] | None, results: Sequence[Any]) -> None:
        if places is None:
            self.results = list(results)
        else:
            for place, result in zip(places, results, strict=True):
                self.results[place] = result
        self._count(len(results), True)

    def fail(self, places: Iterable[int], error: DHTError) -> None:
        count = 0
        for place in places:
            self.errors[place] = error
            count += 1
        self._count(count, _carried_out(error))

    def _count(self, finished: int, carried_out: bool) -> None:
        self._ended(finished, carried_out)
        self._left -= finished
        if self._left <= 0 and not self.done.done():
            self.done.set_result(None)


class Batch:
    """One request. `node` and `run_id` name the process that has it, `id` is the correlation id it was sent under,
    `sent` when, `asked_us` when by that node's clock, `moved` whether another node had it first and said nothing
    (silence.py)."""

    __slots__ = (
        "asked_us",
        "attempts",
        "blurred",
        "bytes",
        "consistency",
        "deadline",
        "id",
        "keys",
        "kind",
        "moved",
        "node",
        "ops",
        "places",
        "run_id",
        "sent",
        "sink",
        "ttl_ms",
        "values",
    )

    def __init__(self, kind: Kind, consistency: Consistency, deadline: float, ttl_ms: int, sink: Sink) -> None:
        self.kind = kind
        self.consistency = consistency
        self.deadline = deadline
        self.ttl_ms = ttl_ms
        self.sink = sink
        self.keys: list[bytes] = []
        self.values: list[bytes] = []
        self.ops: list[Op] = []
        self.places: list[int] | None = None
        self.bytes = 0
        self.attempts = 0
        self.moved = False
        self.asked_us = 0
        self.blurred = False
        self.id = 0
        self.node = ""
        self.run_id = ""
        self.sent = 0.0

    def message(self, timeout_ms: int, retry: bool) -> Get | Put | Delete | Update:
        if self.kind is Kind.GET:
            return Get(self.id, self.consistency, timeout_ms, self.keys)
        if self.kind is Kind.PUT:
            return Put(self.id, self.consistency, timeout_ms, self.keys, self.values, self.ttl_ms, retry)
        if self.kind >= Kind.UPDATE:
            return Update(self.id, timeout_ms, self.ops, retry, self.asked_us)
        return Delete(self.id, self.consistency, timeout_ms, self.keys, retry)

    def for_node(self, hlc: int, boottime_us: int, blurred: bool) -> None:
        """Says on what terms a node whose clocks show this may do the operations (protocol/consensus.py, `outcome`).
        `blurred`: it may find them late, only because its clock was not heard for a while."""
        self.asked_us, self.blurred = boottime_us, blurred
        for op in self.ops:
            if not op.retry:
                op.since = hlc

    @property
    def movable(self) -> bool:
        """Whether another node may try the operations too, once MOVE_AFTER_S have passed."""
        return self.kind is Kind.UPDATE and self.asked_us > 0

    def part(self, indexes: Iterable[int]) -> Batch:
        """The batch of these keys alone, results going to the same sink."""
        part = Batch(self.kind, self.consistency, self.deadline, self.ttl_ms, self.sink)
        part.attempts, part.moved, part.node = self.attempts, self.moved, self.node
        part.asked_us, part.sent = self.asked_us, self.sent
        part.places = []
        for index in indexes:
            part.keys.append(self.keys[index])
            part.places.append(index if self.places is None else self.places[index])
            if self.ops:
                part.ops.append(self.ops[index])
            if self.values:
                part.values.append(self.values[index])
        part.bytes = sum(map(len, part.keys)) + sum(map(len, part.values))
        return part

    def all_places(self) -> Iterable[int]:
        return range(len(self.keys)) if self.places is None else self.places

    def ok(self, results: Sequence[Any]) -> None:
        self.sink.ok(self.places, results)

    def fail(self, error: DHTError) -> None:
        if error.retryable and any(op.retry for op in self.ops):
            # that try did nothing; what one before it did is not known
            error = OutcomeUnknown(error.message, needed=error.needed, answered=error.answered)
        self.sink.fail(self.all_places(), error)


class OpenBatch(Batch):
    """A batch that still takes single calls; `futures` are those of its sink."""

    __slots__ = ("futures",)

    def __init__(self, kind: Kind, consistency: Consistency, deadline: float, ttl_ms: int, ended: Ended) -> None:
        sink = Futures(ended)
        Batch.__init__(self, kind, consistency, deadline, ttl_ms, sink)
        self.futures = sink.futures


def spans(keys: list[bytes], values: list[bytes] | None) -> Iterable[tuple[int, int]]:
    """Spans of a batch that each fit one frame."""
    if values is None:
        for first in range(0, len(keys), BATCH_KEYS_MAX):
            yield first, min(first + BATCH_KEYS_MAX, len(keys))
        return
    sizes = list(map(len, values))
    if len(keys) <= BATCH_KEYS_MAX and sum(sizes) <= BATCH_BYTES_MAX // 2:
        yield 0, len(keys)
        return
    first = total = 0
    for index, size in enumerate(sizes):
        total += size + len(keys[index]) + 16
        if index > first and (total > BATCH_BYTES_MAX or index - first >= BATCH_KEYS_MAX):
            yield first, index
            first, total = index, size
    yield first, len(keys)
