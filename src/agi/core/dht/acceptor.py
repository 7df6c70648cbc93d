"""This node's votes on keys under consensus: promises and acceptances, durable before they are told (PROTOCOLS R1, D1).

protocol/consensus.py judges; the replica stores. What was accepted is the key's record. A promise above it is kept
beside the record, durably, and in memory while the node runs: there are few, as the round that got it ends with an
acceptance. Where it does not, since its coordinator is gone, a round of this node's own settles the key (`abandoned`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeAlias

from agi.core.dht.clock import Clock
from agi.core.dht.errors import DHTError, NotReady, Overloaded, from_wire
from agi.core.dht.protocol.consensus import BALLOT_BYTES, is_retired, judge_accept, judge_prepare
from agi.core.dht.protocol.floors import promise_of
from agi.core.dht.protocol.messages import WireError
from agi.core.dht.replica import STORE_TIMEOUT_S, Replica
from agi.core.dht.storage.base import Batch

PROMISES_MAX = 100_000
"""Promises that may be outstanding; past it new ones are refused with Overloaded."""
PAGE = 1000
ABANDONED_S = 2.0
"""How long a round may take to end with an acceptance before this node ends it itself."""

Refusals: TypeAlias = list[tuple[int, bytes]] | None
Promised: TypeAlias = Callable[[list[bytes | None], Refusals, WireError | None], None]
Accepted: TypeAlias = Callable[[Refusals, WireError | None], None]


class Acceptor:
    """The votes of one replica."""

    def __init__(self, replica: Replica, clock: Clock) -> None:
        self._replica = replica
        self._clock = clock
        self._given: dict[bytes, float] = {}  # key -> when its promise was given, in this order

    async def load(self) -> None:
        """What was promised before the node stopped. Raises StorageError kinds."""
        if self._replica.store.voting_refusal:
            return
        start = b""
        while True:
            page = await self._replica.store.load_promises(start, PAGE)
            self._replica.promises.update(page.items)
            if not page.next:
                break
            start = page.next
        now = self._clock.monotonic()
        self._given = dict.fromkeys(self._replica.promises, now)

    @property
    def promises(self) -> int:
        """How many are outstanding."""
        return len(self._replica.promises)

    def prepare(self, keys: list[bytes], ballots: list[bytes], done: Promised) -> None:
        """Promises these rounds, each key once; `done` hears which not, and what is held."""
        promises, floors = self._replica.promises, self._replica.floors
        held: list[bytes | None] = []
        refusals: list[tuple[int, bytes]] = []

        def decide(records: list[bytes | None]) -> Batch:
            held.extend(records)
            given: dict[bytes, bytes] = {}
            for index, (key, ballot, record) in enumerate(zip(keys, ballots, records, strict=True)):
                known = promises.get(key, b"")
                if ballot[:6] <= floors.promise[:6]:
                    known = max(known, self._sealed(key))
                higher = judge_prepare(ballot, known, record)
                if higher is not None:
                    refusals.append((index, higher))
                else:  # also one that is known: storing it may have failed the first time (D1)
                    given[key] = ballot
            if len(promises) + sum(key not in promises for key in given) > PROMISES_MAX:
                raise Overloaded(f"{len(promises)} rounds of consensus are open at this node already")
            # From here on plain writes are refused; if it cannot be stored, that refuses more than it has to.
            promises.update(given)
            now = self._clock.monotonic()
            for key in given:
                self._given.pop(key, None)  # so that the last given come last
                self._given[key] = now
            return Batch(promises=given)

        def decided(error: WireError | None) -> None:
            done(held, refusals or None, None) if error is None else done([], None, error)

        self._decide(keys, decide, decided, values=True)

    def accept(self, keys: list[bytes], records: list[bytes], done: Accepted) -> None:
        """Accepts these records, each key once; `done` hears which not."""
        promises, floors = self._replica.promises, self._replica.floors
        refusals: list[tuple[int, bytes]] = []
        kept: dict[bytes, bytes] = {}

        def decide(held: list[bytes | None]) -> Batch:
            batch = Batch()
            for index, (key, record, known) in enumerate(zip(keys, records, held, strict=True)):
                promise = promises.get(key, b"")
                least = promise if record[:6] > floors.promise[:6] else max(promise, self._sealed(key))
                higher = judge_accept(record, least, known)
                if higher is not None:
                    refusals.append((index, higher))
                    continue
                if promise:
                    kept[key] = promise
                    batch.promises[key] = b""
                if known is None:
                    batch.inserts.append(key)
                elif known[:BALLOT_BYTES] == record[:BALLOT_BYTES]:
                    continue  # delivered twice
                batch.records[key] = record
            return batch

        def decided(error: WireError | None) -> None:
            if error is None:
                for key, promise in kept.items():  # not before: had it failed, the promise would stand
                    if promises.get(key) == promise:
                        del promises[key]
                        self._given.pop(key, None)
            done(refusals or None, error)

        self._decide(keys, decide, decided, values=False)

    def _sealed(self, key: bytes) -> bytes:
        """What the seal of the key's arc stands for (protocol/floors.py)."""
        return promise_of(self._replica.floors.at(self._replica.token_of(key)).sealed)

    # --- taking registers away (reclaim.py)

    async def retire(self, keys: list[bytes], ballots: list[bytes], version: int) -> list[int]:
        """Replaces these tombstones, each accepted under its ballot and no newer than that version, by a promise to
        nobody: the key is absent and a register still. Returns the places of those of which something else is held.
        Raises DHTError kinds, TimeoutError."""
        replica, kept = self._replica, list[int]()
        if replica.store.voting_refusal:
            return list(range(len(keys)))

        def decide(held: list[bytes | None]) -> Batch:
            batch = Batch()
            for index, (key, ballot, record) in enumerate(zip(keys, ballots, held, strict=True)):
                if record is None:
                    continue
                fits = record[:BALLOT_BYTES] == ballot and is_retired(record, version)
                if not fits or key in replica.promises or key in replica.unsettled():
                    kept.append(index)
                else:
                    batch.purges.append(key)
            batch.promises.update(dict.fromkeys(batch.purges, promise_of(version)))
            replica.promises.update(batch.promises)
            now = self._clock.monotonic()
            self._given.update(dict.fromkeys(batch.purges, now))  # unless they are set free, a round makes them whole
            return batch

        await self._decided(keys, decide, values=True)
        return kept

    async def free(self, keys: list[bytes], version: int) -> None:
        """Forgets what `retire` has promised of these keys: they are under consensus no more. Raises as it does."""
        promises = self._replica.promises
        freed = {key: promises[key] for key in keys if promises.get(key) == promise_of(version)}
        if not freed:
            return

        def decide(_held: list[bytes | None]) -> Batch:
            return Batch(promises={key: b"" for key, promise in freed.items() if promises.get(key) == promise})

        await self._decided(list(freed), decide, values=False)
        for key, promise in freed.items():
            if promises.get(key) == promise:
                del promises[key]
                self._given.pop(key, None)

    async def _decided(self, keys: list[bytes], decide: Callable[[list[bytes | None]], Batch], *, values: bool) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def done(error: WireError | None) -> None:
            if not future.done():
                future.set_result(None) if error is None else future.set_exception(from_wire(*error))

        self._decide(keys, decide, done, values=values)
        async with asyncio.timeout(STORE_TIMEOUT_S):
            await future

    def forget(self, key: bytes) -> None:
        """This node does not hold the key any more, and has no vote on it: what it promised binds nobody (R6)."""
        promises = self._replica.promises
        promise = promises.get(key)

        def forgotten(error: WireError | None) -> None:
            if error is None and promises.get(key) == promise:
                promises.pop(key, None)
                self._given.pop(key, None)

        self._decide([key], lambda _: Batch(promises={key: b""}), forgotten, values=False)

    def _decide(
        self,
        keys: list[bytes],
        decide: Callable[[list[bytes | None]], Batch],
        done: Callable[[WireError | None], None],
        *,
        values: bool,
    ) -> None:
        refusal = self._replica.store.voting_refusal
        if refusal:
            done(NotReady(f"this node takes no part in consensus: {refusal}").to_wire())
            return

        def decided(error: DHTError | None) -> None:
            done(None if error is None else error.to_wire())

        self._replica.decide(keys, decide, decided, values=values)

    def abandoned(self, limit: int) -> list[bytes]:
        """Keys whose rounds should have ended; each is named again only after as long."""
        now = self._clock.monotonic()
        found: list[bytes] = []
        for key, given in self._given.items():
            if given > now - ABANDONED_S or len(found) >= limit:
                break
            found.append(key)
        for key in found:
            del self._given[key]
            if key in self._replica.promises:
                self._given[key] = now
        return [key for key in found if key in self._given]


def is_whole(keys: list[bytes], ballots: list[bytes]) -> bool:
    """Whether these are keys, each once, and a ballot or record of a register for each."""
    if not keys or len(keys) != len(ballots) or len(set(keys)) != len(keys) or not all(keys):
        return False
    return all(len(b) >= BALLOT_BYTES and b[0] >= 0x80 for b in ballots)
