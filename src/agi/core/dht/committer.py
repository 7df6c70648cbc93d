"""Drives a store's group commit (protocol/commit.py): departures at the end of a turn, syncs, pauses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeAlias

import structlog

from agi.core.dht.clock import Clock
from agi.core.dht.errors import DHTError, StorageClosed, StorageError, StorageFull
from agi.core.dht.observability.metrics import Metrics
from agi.core.dht.protocol.commit import Commit, Fail, GroupCommit, Pause, Release
from agi.core.dht.storage.base import Batch, StorageBackend

_log = structlog.get_logger("agi.core.dht.replica")

Parked: TypeAlias = Callable[[DHTError | None], None]
SLOW_S = 0.0004
"""A sync that takes longer is worth a pause for others."""
PAUSE_SHARE, PAUSE_MAX_S = 0.5, 0.001
"""How long one is: that share of a sync, at most so long."""
SMOOTHING = 0.1


class Committer(GroupCommit[Parked]):
    """The groups of one store.

    Args:
        failed: is told once when the store can no longer be written.
    """

    def __init__(
        self, store: StorageBackend, clock: Clock, metrics: Metrics, failed: Callable[[DHTError], None]
    ) -> None:
        super().__init__()
        self._store = store
        self._clock = clock
        self._metrics = metrics
        self._on_failed = failed
        self._sync_started = 0.0
        self._sync_s = 0.0

    def commit(
        self,
        records: dict[bytes, bytes],
        inserts: Sequence[bytes],
        reply: Parked,
        promises: dict[bytes, bytes] | None = None,
    ) -> None:
        """Takes a write; `reply` is told of its end. Raises as `submit`."""
        if self.submit(records, inserts, reply, promises):
            asyncio.get_running_loop().call_soon(self._depart)

    def _depart(self, paused: int | None = None) -> None:
        effect = self.depart(paused)
        if isinstance(effect, Commit):
            self._write(effect)
        elif isinstance(effect, Pause):
            pause_s = min(PAUSE_MAX_S, self._sync_s * PAUSE_SHARE)
            try:
                self._store.pause(pause_s, lambda _: self._depart(effect.group))
            except StorageClosed as error:
                self._tell(self.failed(error, fatal=True))

    def _write(self, group: Commit) -> None:
        self._metrics.group_commits.observe(len(group.records))
        self._sync_started = self._clock.monotonic()
        try:
            self._store.write(Batch(group.records, group.inserts, promises=group.promises))
        except StorageFull as error:
            self._tell(self.failed(error, fatal=False))
        except StorageClosed as error:  # the node has stopped meanwhile
            self._tell(self.failed(error, fatal=True))
        except DHTError as error:
            self._failed(error)
        else:
            self._store.sync(self._synced)

    def _synced(self, error: Exception | None) -> None:
        if error is not None:
            self._failed(error if isinstance(error, DHTError) else StorageError(f"a sync failed: {error}"))
            return
        took_s = self._clock.monotonic() - self._sync_started
        self._metrics.sync_latency.observe(took_s)
        self._sync_s += SMOOTHING * (took_s - self._sync_s)
        self._tell(self.synced(patient=self._sync_s > SLOW_S))
        asyncio.get_running_loop().call_soon(self._depart)  # with what they ask next

    def _failed(self, error: DHTError) -> None:
        _log.critical("store_failed", error=str(error))
        self._tell(self.failed(error, fatal=True))
        self._on_failed(error)

    def _tell(self, effect: Release[Parked] | Fail[Parked]) -> None:
        if isinstance(effect, Release):
            for reply in effect.replies:
                reply(None)
            return
        self._metrics.replica_errors += len(effect.replies)
        for reply in effect.replies:
            reply(effect.error)
