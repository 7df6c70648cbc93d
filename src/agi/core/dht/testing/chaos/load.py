"""The clients of a run: writers that each own some keys, and tell the auditor of every call."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

from agi.core.dht.client import DHTClient
from agi.core.dht.errors import BatchError, ClockSkew, DHTError, InvalidRequest, Unavailable
from agi.core.dht.testing.chaos.auditor import Auditor, Kind, Outcome, Write
from agi.core.dht.testing.chaos.report import Journal
from agi.core.dht.types import BULK_VALUE_BYTES

PREFIX = "chaos:"
TIMEOUT_S = 3.0
HUNG_S = 12.0
"""A call that takes so long beyond its deadline hangs; far above what this process's own pauses cost."""
BATCH_KEYS_MAX = 6
SMALL_BYTES_MAX = 400
LARGE_SHARE = 0.005
"""Of puts, with a value that takes the link for large ones."""
OPERATIONS = {"put": 40, "put_many": 8, "delete": 14, "get": 38}


class Writer:
    """One call at a time, on keys that nobody else writes; any of the clients carries it.

    Args:
        think_s: mean time between two calls.
    """

    def __init__(
        self,
        name: str,
        keys: int,
        clients: Sequence[DHTClient],
        auditor: Auditor,
        journal: Journal,
        rng: random.Random,
        think_s: float,
    ) -> None:
        self._keys = [f"{PREFIX}{name}:{number:03d}" for number in range(keys)]
        self._name = name
        self._clients = clients
        self._auditor = auditor
        self._journal = journal
        self._rng = rng
        self._think_s = think_s
        self._values = 0
        self.acknowledged_s = 0.0
        """When its last call was acknowledged."""

    async def run(self, stop: asyncio.Event) -> None:
        """Until told to stop; the call under way is finished."""
        names, weights = list(OPERATIONS), list(OPERATIONS.values())
        while not stop.is_set():
            operation = self._rng.choices(names, weights)[0]
            client = self._clients[self._rng.randrange(len(self._clients))]
            try:
                async with asyncio.timeout(TIMEOUT_S + HUNG_S):
                    await self._perform(client, operation)
            except TimeoutError:
                text = f"{operation} took {TIMEOUT_S + HUNG_S:g} s, its deadline is {TIMEOUT_S:g} s"
                self._auditor.found(Kind.HUNG, self._name, text, self._journal.now)
            await asyncio.sleep(self._rng.expovariate(1.0 / self._think_s))

    async def _perform(self, client: DHTClient, operation: str) -> None:
        key = self._rng.choice(self._keys)
        match operation:
            case "get":
                await self._get(client, key)
            case "put":
                await self._put(client, key)
            case "delete":
                await self._delete(client, key)
            case _:
                await self._put_many(client, self._rng.sample(self._keys, self._rng.randint(2, BATCH_KEYS_MAX)))

    async def _get(self, client: DHTClient, key: str) -> None:
        began = self._journal.now
        try:
            entry = await client.get_entry(key, timeout=TIMEOUT_S)
        except DHTError as error:
            self._journal.tally.failed("get", self._journal.now - began, Outcome.FAILED, error)
            return
        now = self._journal.now
        self._acknowledged("get", began)
        value, version = (entry.value, entry.version) if entry is not None else (None, 0)
        self._auditor.read(key, value, version, now)

    async def _put(self, client: DHTClient, key: str) -> None:
        value = self._value()
        write = self._auditor.begin(key, value, self._journal.now)
        try:
            version = await client.put(key, value, timeout=TIMEOUT_S)
        except DHTError as error:
            self._failed("put", write, error)
        else:
            self._auditor.settle(write, Outcome.OK, self._journal.now, version)
            self._acknowledged("put", write.begun_s)

    async def _delete(self, client: DHTClient, key: str) -> None:
        write = self._auditor.begin(key, None, self._journal.now)
        try:
            await client.delete(key, timeout=TIMEOUT_S)
        except DHTError as error:
            self._failed("delete", write, error)
        else:
            self._auditor.settle(write, Outcome.OK, self._journal.now)
            self._acknowledged("delete", write.begun_s)

    async def _put_many(self, client: DHTClient, keys: Sequence[str]) -> None:
        """Each of its keys counts as a put."""
        items = {key: self._value() for key in keys}
        writes = {key: self._auditor.begin(key, value, self._journal.now) for key, value in items.items()}
        failed: dict[str, DHTError] = {}
        versions: dict[str, int] = {}
        try:
            versions = await client.put_many(items, timeout=TIMEOUT_S)
        except BatchError as error:
            failed = error.failed
        except DHTError as error:
            failed = dict.fromkeys(keys, error)
        for key, write in writes.items():
            if key in failed:
                self._failed("put_many", write, failed[key])
            else:
                self._auditor.settle(write, Outcome.OK, self._journal.now, versions.get(key, 0))
                self._acknowledged("put_many", write.begun_s)

    def _acknowledged(self, operation: str, began: float) -> None:
        self.acknowledged_s = self._journal.now
        self._journal.tally.acknowledged(operation, self.acknowledged_s, self.acknowledged_s - began)

    def _failed(self, operation: str, write: Write, error: DHTError) -> None:
        outcome = Outcome.FAILED if nothing_written(error) else Outcome.UNKNOWN
        self._auditor.settle(write, outcome, self._journal.now)
        self._journal.tally.failed(operation, self._journal.now - write.begun_s, outcome, error)

    def _value(self) -> bytes:
        self._values += 1
        name = f"{self._name}:{self._values}:".encode()
        large = self._rng.uniform(0.0, 1.0) < LARGE_SHARE
        return name + self._rng.randbytes(BULK_VALUE_BYTES if large else self._rng.randrange(SMALL_BYTES_MAX))


def nothing_written(error: DHTError) -> bool:
    """Whether the caller is told so (docs/consistency.md); of all else the outcome is unknown."""
    return isinstance(error, Unavailable | InvalidRequest | ClockSkew)
