"""Locks with leases and fencing tokens, on the key `lock:{name}` (PROTOCOLS L1 to L4; protocol/locks.py).

A holder renews its lease by writes that are bound to the version that it knows, and stops believing in it before
anybody else may take it. Who waits stands in a line at the node that decides on the key (watches.py), and counts the
lease of a holder that is not heard of from when he first saw its record, or that node did. Neither looks at a wall
clock.

A lease cannot keep a holder that was paused from going on afterwards for a moment, believing what it believed before.
So each acquisition has a token, higher than all before, and writes that show it (`fence=`) are refused once a later
holder has been at their key.
"""

from __future__ import annotations

import abc
import asyncio
import logging
import os
import secrets
import socket
from collections import OrderedDict
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from agi.core.dht.client.conditional import ConditionalCalls
from agi.core.dht.client.routing import by_key
from agi.core.dht.errors import (
    ClientClosed,
    DHTError,
    InvalidRequest,
    LockHeld,
    LockLost,
    OutcomeUnknown,
    Unavailable,
    VersionConflict,
    from_wire,
)
from agi.core.dht.protocol.locks import RENEW_AFTER, LockRecord, holder_s, lease_ms_of, pack_lock, unpack_lock
from agi.core.dht.protocol.messages import Watch, WatchReply
from agi.core.dht.tasks import end
from agi.core.dht.types import Consistency, Entry, Fence, LockStatus, lock_key

if TYPE_CHECKING:
    from agi.core.dht.client.session import Session

_log = logging.getLogger("agi.core.dht.client")

WATCH_S_MAX = 5.0
"""Who waits looks again after so long at the latest: the line that he stands in may be at another node by now."""
SLICE_S = 0.5
"""No timer counts while the machine sleeps, so that a holder looks at its clock so often."""
PAUSE_S = 0.05
"""Before another try after an error; a twentieth of the lease if that is less."""
ANSWER_S = 0.5
"""After the end of a watch its answer is waited for so long."""
STEP_S_MAX = 5.0
"""For one read or write."""
SEEN_MAX = 1024
"""Locks of which a client remembers what it saw."""
RELEASED = "was released"
WAIT_S_MAX = 366 * 24 * 3600.0


class _Seen(NamedTuple):
    """A record as it was read; `since`: when this version was first seen, by this client's clock. `asked`: by anybody,
    as the node that decides on the key says."""

    version: int
    record: LockRecord
    since: float
    asked: bool = False


class LockCalls(ConditionalCalls):
    """What `DHTClient` offers of them."""

    def __init__(self) -> None:
        self._seen: OrderedDict[str, _Seen] = OrderedDict()
        self._lock_tasks: dict[asyncio.Task[None], None] = {}
        self.closed_by: asyncio.Task[Any] | None = None
        """The task that closes the client: it is not cancelled for the locks that it loses by that."""

    @abc.abstractmethod
    def _live(self) -> Session: ...

    @abc.abstractmethod
    async def get_entry(
        self, key: str, *, consistency: Consistency | str | None = None, timeout: float | None = None
    ) -> Entry | None: ...

    def lock(self, name: str, *, ttl: float = 10.0, timeout: float | None = None) -> Lock:
        """A lock to be held by `async with`, waited for in a line for up to `timeout` seconds (None: for ever).

        It is renewed while the block runs. If that fails, the block's task is cancelled before anybody else can have
        the lock, and the block ends in LockLost. What the block does to keys is safe against its own delay only with
        `fence=` (docs/locks.md).

        Args:
            ttl: the lease: so many seconds after the last renewal of a holder that died another may have it.

        Raises InvalidKey, InvalidTTL, InvalidRequest; by the block: LockHeld after `timeout`, Unavailable,
        OutcomeUnknown, LockLost.
        """
        if timeout is not None and (
            isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 <= timeout <= WAIT_S_MAX
        ):
            raise InvalidRequest(f"a lock is waited for 0 to {WAIT_S_MAX:g} seconds, not {timeout!r:.40}")
        return Lock(self, name, lease_ms_of(ttl), timeout)

    async def try_lock(self, name: str, *, ttl: float = 10.0) -> Lock | None:
        """The lock, held, or None where another has it; never waits. `release` it, or let `async with` do so. One whose
        holder is dead can be had a lease after its last renewal (docs/locks.md).

        Raises InvalidKey, InvalidTTL, Unavailable, OutcomeUnknown.
        """
        lock = Lock(self, name, lease_ms_of(ttl), None)
        return lock if await lock._acquire(wait=False) else None

    async def lock_status(self, name: str, *, timeout: float | None = None) -> LockStatus | None:
        """Who holds the lock; None where nobody ever has. A holder that died is shown until another takes it.

        Raises InvalidKey, InvalidRequest, Unavailable.
        """
        entry = await self.get_entry(lock_key(name).decode(), consistency=Consistency.LINEARIZABLE, timeout=timeout)
        if entry is None:
            return None
        record = unpack_lock(entry.value)
        return LockStatus(name, record.holder, record.token or entry.version, record.lease_ms / 1000, entry.version)

    async def _look_at_lock(self, key: str, timeout: float) -> _Seen:
        """The record, read after everything that was acknowledged before. An absent one has version 0."""
        entry = await self.get_entry(key, consistency=Consistency.LINEARIZABLE, timeout=timeout)
        version = 0 if entry is None else entry.version
        before = self._seen.pop(key, None)
        if before is None or before.version != version:
            record = LockRecord("", 0) if entry is None else unpack_lock(entry.value)
            before = _Seen(version, record, self._clock.boottime())
        self._saw(key, before)
        return before

    def _saw(self, key: str, seen: _Seen) -> None:
        self._seen.pop(key, None)
        self._seen[key] = seen
        if len(self._seen) > SEEN_MAX:
            self._seen.popitem(last=False)

    def _own_task(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._lock_tasks[task] = None
        task.add_done_callback(self._lock_task_ended)
        return task

    def _lock_task_ended(self, task: asyncio.Task[None]) -> None:
        self._lock_tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, DHTError):
            _log.critical("the task %s failed", task.get_name(), exc_info=error)

    async def _end_locks(self) -> None:
        self.closed_by = asyncio.current_task()
        await end(self._lock_tasks)


class Lock:
    """One acquisition of a lock; `client.lock` and `client.try_lock` make it. It is for one task, and for one time.

    Attributes:
        name: of the lock.
    """

    def __init__(self, client: LockCalls, name: str, lease_ms: int, timeout: float | None) -> None:
        self.name = name
        self._client = client
        self._clock = client._clock
        self._key = lock_key(name).decode()
        self._lease_ms = lease_ms
        self._lease_s = lease_ms / 1000
        self._timeout = timeout
        self._holder = f"{socket.gethostname()[:64]}:{os.getpid()}:{secrets.token_hex(8)}"
        self._used = False
        self._entered = False
        self._over = ""
        """Why it is not held any more; `_lost`: not by its holder's will."""
        self._lost = False
        self._token = 0
        self._version = 0
        self._deadline = 0.0
        self._attempt: tuple[int, float] | None = None
        """The version that an attempt of unknown outcome was bound to, and when the first one was sent."""
        self._renewals: asyncio.Task[None] | None = None
        self._block: asyncio.Task[Any] | None = None
        self._cancelling = 0
        self._cancelled = False

    # --- what the holder asks

    @property
    def token(self) -> int:
        """Higher than that of every earlier holder, whatever becomes of this one. Raises InvalidRequest where the lock
        was never held."""
        if not self._token:
            raise InvalidRequest(f"the lock {self.name!r} was not acquired")
        return self._token

    @property
    def fence(self) -> Fence:
        """What `put`, `delete` and `get` take as `fence`, to be passed on to other processes. Raises as `token`;
        LockLost once it was lost."""
        fence = Fence(self.name, self.token)
        if self._over != RELEASED:  # who lost it is told so, even while nobody has followed yet
            self.check()
        return fence

    @property
    def held(self) -> bool:
        """Whether nobody else can have it at this moment."""
        return bool(self._token) and not self._over and self._clock.boottime() < self._deadline

    def check(self) -> None:
        """Raises LockLost if it is not held."""
        if not self.held:
            raise LockLost(f"the lock {self.name!r} {self._why()}")

    def _why(self) -> str:
        return self._over or ("was not renewed in time" if self._token else "was not acquired")

    async def release(self) -> None:
        """Gives it back: who waits longest gets it. Raises LockLost, or InvalidRequest where it was released before or
        never held, with nothing changed; OutcomeUnknown, Unavailable if that could not be confirmed within the lease,
        which is over then."""
        if not self._token or (self._over and not self._lost):
            raise InvalidRequest(f"the lock {self.name!r} {self._why()}")
        self.check()
        self._over = RELEASED
        # whoever cancels this call cannot mean that the lock stays taken
        await asyncio.shield(self._client._own_task(self._give_back(), f"release {self._key}"))

    async def __aenter__(self) -> Self:
        if self._enter():
            self.check()
        elif not await self._acquire(wait=True):
            raise LockHeld(self._in_vain())
        self._block = asyncio.current_task()
        assert self._block is not None
        self._cancelling = self._block.cancelling()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        block, self._block = self._block, None
        assert block is not None
        if self._cancelled:
            # a cancellation from elsewhere, on top of ours, stays one
            ours_alone = block.uncancel() <= self._cancelling
            if kind is None or (ours_alone and kind is asyncio.CancelledError):
                raise LockLost(f"the lock {self.name!r} {self._why()}") from error
            return
        await self._leave(failed=kind is not None)

    def _enter(self) -> bool:
        """Whether it is held already, from `try_lock`; of those who enter at once, the others must not think so."""
        if self._entered:
            raise InvalidRequest(f"the block of the lock {self.name!r} was entered before: call lock() for each")
        self._entered = True
        return bool(self._token)

    async def _leave(self, *, failed: bool) -> None:
        """The end of a block, which has `failed` with an error of its own."""
        if self._over and not self._lost:
            return  # released within the block
        try:
            await self.release()
        except LockLost:
            if not failed:
                raise
        except DHTError as error:  # the block has done its work, and the lease ends by itself
            _log.warning("the lock %r is free only when its lease is over: %s", self.name, error)

    async def _drop(self) -> None:
        """Releases it if it is held after all."""
        if self.held:
            await self._leave(failed=True)

    def _in_vain(self) -> str:
        return f"the lock {self.name!r} was held by another for {self._timeout or 0:g} s"

    # --- getting it

    async def _acquire(self, *, wait: bool) -> bool:
        """Whether it is held now. Raises what the cluster answers, where that is not waited for."""
        if self._used:
            raise InvalidRequest("a lock object is for one acquisition: call lock() again")
        self._used = True
        try:
            return await self._compete(wait)
        finally:
            if self._attempt is not None and not self._token:  # given up, but it may yet take effect
                self._client._own_task(self._undo(), f"undo {self._key}")

    async def _compete(self, wait: bool) -> bool:
        until = None if self._timeout is None else self._clock.monotonic() + self._timeout
        if not wait:
            until = self._clock.monotonic() + 2 * STEP_S_MAX  # to learn what came of its attempt
        free_at = 0
        while True:
            try:
                version, free_at = free_at, 0
                if not version:
                    seen = await self._client._look_at_lock(self._key, self._step_s(until))
                    self._judge_attempt(seen)
                    if self._token:
                        return True
                    left_s = self._taken_s(seen)
                    if left_s > 0 and not seen.asked:
                        left_s = self._taken_s(await self._ask_since(seen))
                    if left_s > 0:
                        if not wait or self._left_s(until) <= 0:
                            return False
                        free_at = await self._watch(seen.version, min(left_s, self._left_s(until)))
                        continue
                    version = seen.version
                if await self._take(version, self._step_s(until)):
                    return True
            except DHTError as error:
                unknown = isinstance(error, OutcomeUnknown)
                if not _passes(error) or self._left_s(until) <= 0 or not (wait or unknown):
                    raise
                await self._pause()

    def _left_s(self, until: float | None) -> float:
        return WAIT_S_MAX if until is None else until - self._clock.monotonic()

    def _step_s(self, until: float | None) -> float:
        """For the next read or write: what is left, but enough for one that is answered."""
        return min(STEP_S_MAX, max(self._left_s(until), min(1.0, self._lease_s)))

    async def _pause(self) -> None:
        await asyncio.sleep(min(PAUSE_S, self._lease_s / 20))

    def _taken_s(self, seen: _Seen) -> float:
        """How long the record has to be taken for held yet."""
        if not seen.record.holder or seen.record.holder == self._holder:
            return 0.0
        return seen.since + seen.record.lease_ms / 1000 - self._clock.boottime()

    def _judge_attempt(self, seen: _Seen) -> None:
        """What the record says of an attempt of unknown outcome."""
        if self._attempt is None:
            return
        bound_to, sent = self._attempt
        if seen.record.holder == self._holder:
            if self._clock.boottime() < sent + holder_s(self._lease_ms):
                self._begin(seen.version, sent)
        elif seen.version > bound_to:
            self._attempt = None  # it cannot find that version any more

    async def _take(self, version: int, timeout: float) -> bool:
        """Writes this holder over the record at that version."""
        sent = self._clock.boottime()
        before = self._attempt
        self._attempt = (version, before[1] if before else sent)
        value = pack_lock(LockRecord(self._holder, self._lease_ms))
        try:
            result = await self._client._write_over(self._key, value, None, version, timeout)
        except (VersionConflict, Unavailable) as error:
            self._attempt = before
            if isinstance(error, Unavailable):
                raise
            return False
        if self._clock.boottime() >= sent + holder_s(self._lease_ms):
            self._attempt = (result.version, sent)  # it came too late: once more, over this very record
            return False
        self._begin(result.version, sent)
        return True

    def _begin(self, version: int, sent: float) -> None:
        self._attempt = None
        self._token = self._version = version
        self._deadline = sent + holder_s(self._lease_ms)
        self._renewals = self._client._own_task(self._renew(sent), f"renew {self._key}")
        self._renewals.add_done_callback(self._renewals_ended)

    async def _watch(self, version: int, left_s: float) -> int:
        """Waits for a release, but no longer than that; the version at which the lock is free then, 0 where that has to
        be looked up."""
        left_s = min(left_s, WATCH_S_MAX)
        over = self._clock.monotonic() + left_s
        try:
            reply = await self._ask(version, max(1, int(left_s * 1000)))
        except DHTError as error:
            if not _passes(error):
                raise
            _log.debug("the lock %r cannot be watched: %s", self.name, error)
            await asyncio.sleep(max(0.0, min(over - self._clock.monotonic(), self._lease_s / 4)))
            return 0
        return reply.version if reply.free else 0

    async def _ask_since(self, seen: _Seen) -> _Seen:
        """The same, and how long it is known to the node that decides on the key: a holder that died before this client
        came is followed a lease after its last renewal. Sound, as the node came to know that very version after its
        holder began to count (watches.py), and the answer's way only adds to that."""
        try:
            known_ms = (await self._ask(seen.version, 0)).known_ms
        except DHTError as error:  # then it is waited for as long as if nobody knew
            _log.debug("the lock %r: nobody says how old its record is: %s", self.name, error)
            return seen
        since = min(seen.since, self._clock.boottime() - known_ms / 1000)
        seen = seen._replace(since=since, asked=True)
        self._client._saw(self._key, seen)
        return seen

    async def _ask(self, version: int, timeout_ms: int) -> WatchReply:
        """The answer of the node that decides on the key. Raises DHTError kinds."""
        session, key = self._client._live(), self._key.encode()
        if not session.up:
            raise Unavailable("no node is reachable")
        (name,) = by_key([key], [remote.node_id for remote in session.up], session.ring)
        request = Watch(0, timeout_ms, key, version, self._holder)
        reply = await session.call(session.nodes[name].links[0], name, request, timeout_ms / 1000 + ANSWER_S)
        assert isinstance(reply, WatchReply)
        if reply.error is not None:
            raise from_wire(*reply.error)
        return reply

    # --- keeping it

    async def _renew(self, sent: float) -> None:
        clock, every_s = self._clock, self._lease_s * RENEW_AFTER
        due = sent + every_s
        while not self._over:
            now = clock.boottime()
            if now >= self._deadline:
                self._lose("was not renewed in time")
                return
            if now < due:
                await asyncio.sleep(min(due - now, self._deadline - now, SLICE_S))
                continue
            within_s = min(self._deadline - now, every_s, STEP_S_MAX)
            value = pack_lock(LockRecord(self._holder, self._lease_ms, self._token))
            try:
                async with asyncio.timeout(within_s):
                    result = await self._client._write_over(
                        self._key, value, None, self._version, within_s, urgent=True
                    )
            except VersionConflict:
                if not await self._still_ours():
                    self._lose("was taken by another")
                    return
            except (TimeoutError, DHTError) as error:
                if not _passes(error):
                    self._lose(f"cannot be renewed: {error}")
                    return
                _log.debug("the lock %r could not be renewed: %s", self.name, error)
                await self._pause()
            else:
                if clock.boottime() < self._deadline:  # else it was over, and stays so
                    self._version = result.version
                    self._deadline = now + holder_s(self._lease_ms)
                    due = now + every_s

    async def _still_ours(self) -> bool:
        """After a conflict: whether the record is ours, at another version than we knew."""
        within_s = max(self._deadline - self._clock.boottime(), 0.001)
        try:
            async with asyncio.timeout(within_s):
                seen = await self._client._look_at_lock(self._key, min(within_s, STEP_S_MAX))
        except (TimeoutError, DHTError) as error:
            return _passes(error)  # not known: the deadline decides
        if seen.record.holder == self._holder:
            self._version = seen.version
        return seen.record.holder == self._holder

    def _lose(self, why: str) -> None:
        if self._over:
            return
        self._over, self._lost = why, True
        _log.warning("the lock %r %s", self.name, why)
        if self._block not in (None, self._client.closed_by) and not self._block.done():
            self._cancelled = True
            self._block.cancel()

    def _renewals_ended(self, task: asyncio.Task[None]) -> None:
        self._lose("was given up: its client was closed" if task.cancelled() else "is not renewed any more")

    # --- giving it back

    async def _give_back(self) -> None:
        assert self._renewals is not None
        await end([self._renewals])
        value = pack_lock(LockRecord("", 0, self._token))
        doubtful = False
        while True:
            left_s = self._deadline - self._clock.boottime()
            try:
                if left_s <= 0:
                    raise OutcomeUnknown(f"the lock {self.name!r} could not be released: its lease is over by now")
                within_s = min(left_s, STEP_S_MAX)
                try:
                    await self._client._write_over(self._key, value, None, self._version, within_s, urgent=True)
                    return
                except VersionConflict:
                    seen = await self._client._look_at_lock(self._key, within_s)
                if seen.record.holder != self._holder:
                    if doubtful:
                        return  # an earlier try has done it
                    self._over, self._lost = "was taken by another", True
                    raise LockLost(f"the lock {self.name!r} {self._over}")
                self._version = seen.version
            except DHTError as error:
                if left_s <= 0 or not _passes(error):
                    raise
                doubtful = doubtful or isinstance(error, OutcomeUnknown)
                await self._pause()

    async def _undo(self) -> None:
        """An attempt was given up while its outcome was not known: if it takes effect, the lock is let go of again."""
        assert self._attempt is not None
        until = self._attempt[1] + self._lease_s  # what takes effect later than that is rare, and held for one lease
        while self._clock.boottime() < until:
            try:
                seen = await self._client._look_at_lock(self._key, min(self._lease_s, STEP_S_MAX))
                if seen.record.holder == self._holder:
                    value = pack_lock(LockRecord("", 0, seen.record.token or seen.version))
                    await self._client._write_over(self._key, value, None, seen.version, min(self._lease_s, STEP_S_MAX))
                    return
                if seen.version > self._attempt[0]:
                    return
            except DHTError as error:
                if isinstance(error, ClientClosed):
                    return
                _log.debug("an attempt at the lock %r cannot be undone yet: %s", self.name, error)
            await asyncio.sleep(self._lease_s / 8)


def _passes(error: BaseException) -> bool:
    """Whether the same may go well soon."""
    return isinstance(error, TimeoutError | OutcomeUnknown) or (isinstance(error, DHTError) and error.retryable)
