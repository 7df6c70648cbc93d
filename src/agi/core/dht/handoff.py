"""Hinted handoff: keeps what replicas missed (protocol/hints.py) and brings it to them when they are back.

Three tasks. One writes new hints to the store, all that a turn of the event loop made in one batch, never before the
acknowledgement of their write (PROTOCOLS D4). The other replays: while a target can be reached, it gets its hints in
order, a batch at a time, and a batch is forgotten only when the target has confirmed it. A target that fails keeps its
hints and is tried again later. The third tells a target that hints for it were given up: it then compares its replicas
with all others' (antientropy.py), since the coordinator of a write need not hold it.

    put k -> n0, n1 stored it; n2 is down                 n0: hint (n2 on disk d, epoch 1, k)
    n2 connects, on disk d                                n0 -> n2: ReplicaWrite HINT k; the answer removes the hint
    n2 connects, on disk e                                n0: the hint is dropped

One batch is under way at a time over all targets, and at most `bytes_per_s` of them leave in a second: that, and how
many nodes have hints for it, is what a returning node has to bear beside its requests.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import structlog

from agi.core.dht.calls import Calls
from agi.core.dht.clock import Clock
from agi.core.dht.errors import DHTError, StorageClosed, StorageCorrupt, StorageError, from_wire
from agi.core.dht.observability.logs import Throttle
from agi.core.dht.peers import Peer, Peers
from agi.core.dht.protocol.hints import Hint, Hints
from agi.core.dht.protocol.messages import HINT, Query, ReplicaWrite, WireError
from agi.core.dht.replica import Replica
from agi.core.dht.storage.base import StorageBackend
from agi.core.dht.topology import Topology

_log = structlog.get_logger("agi.core.dht.handoff")

BATCH_BYTES_MAX = 256 * 1024
"""Of one replayed message, unless a single record is larger. All that is ever under way."""
BATCH_HINTS_MAX = 1000
REPLY_TIMEOUT_S = 5.0
BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 10.0
AGE_CHECK_S = 60.0
"""How often hints for targets that stay away are looked at for their age."""
PAUSE_MIN_S = 0.001
TELL_EVERY_S = 1.0
"""A target that loses hints all the time is told no more often."""
SAVE_CHANGES_MAX = 1000
SAVE_BYTES_MAX = 1024 * 1024
"""Of one write to the store, which holds the event loop meanwhile."""
SAVE_RETRY_S = 1.0
STORE_TIMEOUT_S = 10.0
LOAD_HINTS = 1000


class Handoff:
    """
    Args:
        me: this node. Its own store may miss a write too, while it is full.
        bytes_max: of one target's hints; 0 for no hints at all.
        age_max_s: how long a hint is kept.
        bytes_per_s: keys and records that are replayed, over all targets.
        on_own_loss: told when hints for this node itself were given up.

    Attributes:
        hints: the core, with its counts.
        stopping: no further batch is sent.
        replayed_bytes: keys and records sent so far.
    """

    def __init__(
        self,
        me: str,
        store: StorageBackend,
        replica: Replica,
        peers: Peers,
        calls: Calls,
        clock: Clock,
        *,
        bytes_max: int,
        age_max_s: int,
        bytes_per_s: int,
        on_own_loss: Callable[[], None],
    ) -> None:
        self.hints = Hints(bytes_max, age_max_s * 1000)
        self.stopping = False
        self.replayed_bytes = 0
        self._me = me
        self._store = store
        self._replica = replica
        self._peers = peers
        self._calls = calls
        self._clock = clock
        self._enabled = bytes_max > 0
        self._bytes_per_s = bytes_per_s
        self._epoch = 0
        self._disks: dict[str, str] = {}
        self._last = ""
        self._free_at = 0.0
        self._retry: dict[str, tuple[float, float]] = {}
        self._on_own_loss = on_own_loss
        self._unsaved = asyncio.Event()
        self._losses = asyncio.Event()
        self._wake = asyncio.Event()
        self._saving = asyncio.Lock()
        self._sending = asyncio.Lock()
        self._failures = Throttle(1)

    # --- events

    def missed(self, node: str, keys: list[bytes], records: list[bytes]) -> None:
        """That replica did not take these records of acknowledged writes."""
        disk = self._disks.get(node)
        if disk is None:
            return
        if not self._enabled:
            self.hints.lose(node, len(keys))
            self._losses.set()
            return
        self.hints.add(node, disk, self._epoch, keys, records, self._clock.wall_ms())
        self._unsaved.set()
        if self.hints.lost:
            self._losses.set()
        if node in self._peers.usable or node == self._me:
            self._wake.set()

    def connected(self, peer: Peer) -> None:
        """A peer is back."""
        if peer.hello is not None and self._disks.get(peer.node_id) == peer.hello.disk_id:
            self._retry.pop(peer.node_id, None)
            self.wake()

    def wake(self) -> None:
        """Something has changed about who can be reached."""
        self._wake.set()
        self._losses.set()

    def adopt(self, topology: Topology) -> None:
        """Hints for nodes, or disks of them, that this topology does not name are of no use any more."""
        self._epoch = topology.epoch
        self._disks = {member.node_id: member.disk_id for member in topology.members}
        self.hints.keep(self._disks)
        self._unsaved.set()
        self.wake()

    async def drop(self, condition: Callable[[Hint], bool]) -> int:
        """Forgets the hints that meet it, durably when this returns, with none of them under way (PROTOCOLS T10);
        returns how many. Raises StorageError kinds: then some of them may be there again after a restart.

        `lambda hint: hint.node == "n2"` are those of a target, `lambda hint: low <= ring.token(hint.key) <= high` those
        of an arc."""
        async with self._sending:
            count = self.hints.drop(condition)
            await self._save(synced=True)
        return count

    @property
    def busy(self) -> bool:
        """Whether a batch is under way."""
        return self._sending.locked()

    # --- the store

    async def load(self) -> None:
        """Reads what an earlier process kept. Raises StorageError kinds where the store as a whole fails."""
        found: list[Hint] = []
        start = b""
        while True:
            try:
                async with asyncio.timeout(STORE_TIMEOUT_S):
                    page = await self._store.load_hints(start, LOAD_HINTS)
            except StorageCorrupt as error:  # the node can do without what lies behind the damage
                _log.error("hints_damaged", error=str(error))
                self.hints.forget([start])
                break
            except TimeoutError:
                raise StorageError("the store did not return its hints in time") from None
            found += page.hints
            self.hints.forget(page.damaged)
            if page.damaged:
                _log.error("hints_damaged", hints=len(page.damaged))
            start = page.next
            if not start:
                break
            await asyncio.sleep(0)
        self.hints.restore(found)
        self._unsaved.set()

    async def save(self) -> None:
        """Brings new hints to the store, for ever."""
        while True:
            await self._unsaved.wait()
            self._unsaved.clear()
            try:
                await self._save()
            except DHTError as error:
                if self._failures.pass_(self._clock.monotonic()):
                    _log.warning("hints_not_saved", error=str(error))
                await asyncio.sleep(SAVE_RETRY_S)
                self._unsaved.set()

    async def _save(self, *, synced: bool = False) -> None:
        async with self._saving:
            while True:
                changes = self.hints.take_unsaved(SAVE_CHANGES_MAX, SAVE_BYTES_MAX)
                if not (changes.hints or changes.gone or synced):
                    return
                done = False
                try:
                    async with asyncio.timeout(STORE_TIMEOUT_S):
                        await self._store.save_hints(changes.hints, changes.gone, synced=synced)
                    done = True
                except TimeoutError:
                    raise StorageError("the store did not take hints in time") from None
                finally:
                    if done:
                        self.hints.saved()
                    else:
                        self.hints.not_saved()
                if synced and not (changes.hints or changes.gone):
                    return
                await asyncio.sleep(0)

    async def stop(self) -> None:
        """Saves what is not saved yet, once the tasks have ended."""
        try:
            await self._save()
        except DHTError as error:
            if not isinstance(error, StorageClosed):  # else it never opened
                _log.warning("hints_not_saved", error=str(error), hints=len(self.hints))

    # --- replay

    async def replay(self) -> None:
        """Brings hints to whoever can take them, for ever."""
        while True:
            self.hints.expire(self._clock.wall_ms())
            if self.hints.lost:
                self._losses.set()
            now = self._clock.monotonic()
            node, due = self._next(now)
            if node is not None:
                await self._deliver(node)
                continue
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if due is None else max(PAUSE_MIN_S, due - now)):
                    await self._wake.wait()

    async def tell(self) -> None:
        """Tells targets that can be reached of the hints that were given up, for ever."""
        while True:
            await self._losses.wait()
            self._losses.clear()
            for node in sorted(self.hints.lost):
                if node != self._me and node not in self._peers.usable:
                    continue  # `wake` when it is
                count = self.hints.lost.get(node, 0)
                try:
                    async with asyncio.timeout(REPLY_TIMEOUT_S):
                        await self._tell(node)
                except (DHTError, TimeoutError) as error:
                    self._losses.set()
                    _log.info("loss_not_told", peer=node, hints=count, error=str(error) or "no answer in time")
                else:
                    self.hints.told(node, count)
            await asyncio.sleep(TELL_EVERY_S)

    async def _tell(self, node: str) -> None:
        if node == self._me:
            self._on_own_loss()
        else:
            await self._calls.call(node, Query(0, "missed", round(REPLY_TIMEOUT_S * 1000)))

    def _next(self, now: float) -> tuple[str | None, float | None]:
        """Whose turn it is; or nobody's, and when to look again (None: when something happens)."""
        due: float | None = None
        ready: list[str] = []
        for target in self.hints.pending():
            node = target.node
            at = now + AGE_CHECK_S
            if (node in self._peers.usable or node == self._me) and not self.stopping:
                at = max(self._free_at, self._retry.get(node, (0.0, 0.0))[1])
                if at <= now:
                    ready.append(node)
            due = at if due is None else min(due, at)
        if not ready:
            return None, due
        self._last = next((node for node in ready if node > self._last), ready[0])
        return self._last, None

    async def _deliver(self, node: str) -> None:
        async with self._sending:
            batch = self.hints.batch(node, min(BATCH_BYTES_MAX, self._bytes_per_s), BATCH_HINTS_MAX)
            if not batch:
                return
            size = sum(len(hint.key) + len(hint.record) for hint in batch)
            now = self._clock.monotonic()
            self._free_at = now + size / self._bytes_per_s
            self.replayed_bytes += size
            try:
                async with asyncio.timeout(REPLY_TIMEOUT_S):
                    await self._send(node, batch)
            except (DHTError, TimeoutError) as error:
                delay_s = min(BACKOFF_MAX_S, 2 * self._retry.get(node, (BACKOFF_FIRST_S / 2, 0.0))[0])
                self._retry[node] = (delay_s, self._clock.monotonic() + delay_s)
                _log.info("hints_not_taken", peer=node, hints=len(batch), error=str(error) or "no answer in time")
                return
            self._retry.pop(node, None)
            self.hints.delivered(batch)
            self._unsaved.set()
            _log.debug("hints_replayed", peer=node, hints=len(batch), bytes=size)

    async def _send(self, node: str, batch: list[Hint]) -> None:
        """Returns when the target holds each record or a newer one."""
        keys, records = [hint.key for hint in batch], [hint.record for hint in batch]
        if node != self._me:
            await self._calls.call(node, ReplicaWrite(0, self._epoch, f"hints:{self._me}", HINT, keys, records))
            return
        written: asyncio.Future[WireError | None] = asyncio.get_running_loop().create_future()

        def done(superseded: object, live: object, error: WireError | None) -> None:
            if not written.done():
                written.set_result(error)

        self._replica.write(HINT, keys, records, False, done)
        error = await written
        if error is not None:
            raise from_wire(*error)
