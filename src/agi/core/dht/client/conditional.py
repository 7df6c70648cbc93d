"""Calls under consensus: linearizable for each key, whatever fails (PROTOCOLS R1 to R10).

Each operation has a name of its own, by which its value knows it: it takes effect once, also where it is tried again
through another node. That happens only once the node that had it does not try it any more; where that cannot be known,
as its link broke and it does not come back, the call ends in OutcomeUnknown. A key on which one of these was called is
under consensus from then on, and plain puts and deletes of it take the same path.
"""

from __future__ import annotations

import abc
import secrets
from collections.abc import Callable

from agi.core.dht.client.session import MAYBE
from agi.core.dht.clock import Clock
from agi.core.dht.errors import InvalidRequest, OutcomeUnknown, Unavailable, VersionConflict, from_wire
from agi.core.dht.protocol.consensus import (
    ADD,
    ANYHOW,
    COUNTER_MAX,
    COUNTER_MIN,
    IF_ABSENT,
    IF_EQUALS,
    IF_VERSION,
    LOOK,
    NAME_BYTES,
    PUT,
    REMOVE,
)
from agi.core.dht.protocol.messages import Op, OpResult
from agi.core.dht.protocol.record import HEADER, hlc_of
from agi.core.dht.types import Consistency, Fence, Fencing, check_value, encode_key, lock_key, ttl_to_ms

Change = Callable[[bytes | None], bytes | None]
UPDATE_PARTS = 8
"""Steps of `update` have whole parts of its time, so that those of many callers travel together (equal timeouts do)."""


class ConditionalCalls(abc.ABC):
    """What `DHTClient` offers of them."""

    _clock: Clock

    @abc.abstractmethod
    def _until(self, timeout: float | None) -> float:
        """The monotonic time at which a call that begins now has to end. Raises InvalidRequest, ClientClosed."""

    @abc.abstractmethod
    async def _operate(self, op: Op, timeout: float | None, urgent: bool = False) -> OpResult:
        """Runs one operation, an `urgent` one however much waits already; its error is in the result."""

    async def compare_and_set(
        self,
        key: str,
        expected: bytes | None,
        value: bytes | None,
        *,
        ttl_seconds: float | None = None,
        timeout: float | None = None,
    ) -> int:
        """Stores `value` if the key holds `expected`; None stands for an absent key, so a `value` of None deletes.
        Returns the new version.

        Raises VersionConflict with the key's version where it holds something else; InvalidKey, InvalidValue,
        InvalidTTL, InvalidRequest; Unavailable (nothing written); OutcomeUnknown.
        """
        if value is None and ttl_seconds is not None:
            raise InvalidRequest("a deletion has no ttl")
        op = self._op(key, REMOVE if value is None else PUT, ttl_seconds)
        if value is not None:
            op.value = check_value(value)
        op.condition, op.expected = IF_EQUALS, None if expected is None else check_value(expected)
        return (await self._decided(op, timeout)).version

    async def incr(
        self, key: str, delta: int = 1, *, ttl_seconds: float | None = None, timeout: float | None = None
    ) -> int:
        """Adds to a counter, a decimal number of 64 bits that begins at 0; returns what it is then. Its TTL stays
        unless one is given.

        Raises NotACounter where the key holds something else or the sum does not fit; else as `compare_and_set`.
        """
        if isinstance(delta, bool) or not isinstance(delta, int) or not COUNTER_MIN <= delta <= COUNTER_MAX:
            raise InvalidRequest(f"a counter changes by a number of 64 bits, not {delta!r}")
        op = self._op(key, ADD, ttl_seconds)
        op.delta = delta
        return (await self._decided(op, timeout)).number

    async def update(
        self, key: str, change: Change, *, ttl_seconds: float | None = None, timeout: float | None = None
    ) -> bytes | None:
        """Stores what `change` makes of the key's value (None: absent, and deletes), once nothing has come between;
        returns it. `change` is called anew each time that something has, so it must have no other effects. It is all
        one call: `timeout` is for every try together.

        Raises what `change` raises; VersionConflict where others were faster until the time was over; else as
        `compare_and_set`.
        """
        if not callable(change):
            raise InvalidRequest(f"what changes the value is a function, not {change!r:.40}")
        until = self._until(timeout)
        part_s = (until - self._clock.monotonic()) / UPDATE_PARTS

        def left_s() -> float:
            return max(0.0, (until - self._clock.monotonic()) // part_s * part_s)

        step: float | None = timeout
        conflict: VersionConflict | None = None
        while step != 0:
            found = await self._look(key, step)
            value = None if found is None else found[HEADER:]
            wanted = change(value)
            if wanted is None and value is None:
                return None
            version = 0 if found is None else hlc_of(found)
            step = left_s()
            try:
                if step:
                    await self._write_over(key, wanted, ttl_seconds, version, step)
                    return wanted
            except VersionConflict as error:
                conflict = error
                step = left_s()
        raise conflict or Unavailable("the time was over before anything was written")

    async def _write_over(
        self,
        key: str,
        value: bytes | None,
        ttl_seconds: float | None,
        version: int | None,
        timeout: float | None,
        fence: Fencing | None = None,
        urgent: bool = False,
    ) -> OpResult:
        """Writes, or deletes, a key that is at this version; 0 for absent, None for any."""
        op = self._op(key, REMOVE if value is None else PUT, ttl_seconds)
        if value is not None:
            op.value = check_value(value)
        if version is not None:
            op.condition, op.version = (IF_VERSION, version) if version else (IF_ABSENT, 0)
        op.fence = fence_of(fence)
        return await self._decided(op, timeout, urgent)

    async def _look(self, key: str, timeout: float | None, fence: Fencing | None = None) -> bytes | None:
        """The key's record, plain, as a step of its own among its writes."""
        op = self._op(key, LOOK, None)
        op.fence = fence_of(fence)
        try:
            return (await self._decided(op, timeout)).record
        except OutcomeUnknown as error:
            if fence is not None:
                raise  # the mark may have been raised
            # it travels with writes, and its batch ends as theirs; but it has written nothing
            message = error.message.replace(f"{MAYBE}: ", "").replace(f": {MAYBE}", "")
            raise Unavailable(message, needed=error.needed, answered=error.answered) from None

    async def _decided(self, op: Op, timeout: float | None, urgent: bool = False) -> OpResult:
        result = await self._operate(op, timeout, urgent)
        if result.error is not None:
            error = from_wire(*result.error)
            if isinstance(error, VersionConflict):
                error.version = result.version
            raise error
        return result

    @staticmethod
    def _op(key: str, kind: int, ttl_seconds: float | None) -> Op:
        return Op(secrets.token_bytes(NAME_BYTES), encode_key(key), kind, ANYHOW, ttl_ms=ttl_to_ms(ttl_seconds))


def fence_of(fencing: Fencing | None) -> tuple[bytes, int] | None:
    """A fence as operations carry it. Raises InvalidRequest; LockLost for a lock that was lost."""
    if fencing is None:
        return None
    fence = getattr(fencing, "fence", None)
    if not isinstance(fence, Fence):
        raise InvalidRequest(f"a fence is a lock that was held, or a Fence, not {fencing!r:.40}")
    return lock_key(fence.lock), fence.token


def check_level(consistency: object) -> None:
    """Of a call under consensus, which has its own: it is no less a mistake there. Raises InvalidConsistency."""
    if consistency is not None:
        Consistency.parse(consistency)


def checked_version(version: object) -> int:
    """A version that a write may be bound to. Raises InvalidRequest."""
    if isinstance(version, bool) or not isinstance(version, int) or not 0 < version < 1 << 63:
        raise InvalidRequest(f"a version is a positive number as get_entry and put return it, not {version!r}")
    return version
