"""Who waits for a lock, at the node that decides on its key: in a line, so that each release wakes one, the first.

A watch is a hint and nothing rests on it: who is woken tries, by a condition on the version; who is not looks again
when his watch is over. It helps while all clients send what concerns a key to the same node, which they do.

A waiter keeps its place while it looks for itself between two watches, so one that was woken and came second to
somebody who had not waited is the next again. If who was woken does nothing about it, the next one is.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from agi.core.dht.clock import Clock
from agi.core.dht.errors import DHTError, InvalidRequest, Overloaded, TransportError
from agi.core.dht.protocol.consensus import state_of
from agi.core.dht.protocol.locks import HOLDER_BYTES_MAX, unpack_lock
from agi.core.dht.protocol.messages import Watch, WatchReply
from agi.core.dht.protocol.timers import TimerWheel
from agi.core.dht.requests import ReplyTo
from agi.core.dht.types import KEY_BYTES_MAX

_log = structlog.get_logger("agi.core.dht.watches")

WATCHES_MAX = 16_384
"""Places in all lines of one node."""
WATCH_MS_MAX = 60_000
WAKE_S = 0.5
"""Who was woken has so long before the next one is."""
PLACE_S = 3.0
"""A place is kept so long for a waiter that looks for itself."""


class _Place:
    """`reply` is None while its waiter is not there; `serial` names what its timer is for."""

    __slots__ = ("id", "reply", "serial")

    def __init__(self) -> None:
        self.id = 0
        self.reply: ReplyTo | None = None
        self.serial = 0


class _Line:
    """Of one key. `free_at`: the version at which the lock is free, 0 where it is held or that is not known; `serial`
    as in a place: of the timer after which the next one is woken."""

    __slots__ = ("free_at", "places", "serial")

    def __init__(self) -> None:
        self.places: dict[str, _Place] = {}
        self.free_at = 0
        self.serial = 0


class Watches:
    """
    Args:
        known: the record that was chosen last for a key, if that is remembered.
    """

    def __init__(self, clock: Clock, known: Callable[[bytes], bytes | None]) -> None:
        self._clock = clock
        self._known = known
        self._lines: dict[bytes, _Line] = {}
        self._places = 0
        self._serial = 0
        self._wheel: TimerWheel[tuple[bytes, str, int]] = TimerWheel(clock.monotonic())

    @property
    def places(self) -> int:
        return self._places

    def start(self, request: Watch, reply: ReplyTo) -> None:
        """`reply` gets one WatchReply: when it is this waiter's turn, at once where the key has moved on, or at its
        time."""
        error: DHTError | None = None
        if not 1 <= len(request.key) <= KEY_BYTES_MAX or not 1 <= len(request.waiter.encode()) <= HOLDER_BYTES_MAX:
            error = InvalidRequest("a watch has a key and the name of who waits")
        line = self._lines.get(request.key)
        place = None if line is None else line.places.get(request.waiter)
        if place is None and self._places >= WATCHES_MAX:
            error = Overloaded(f"{WATCHES_MAX} wait for locks at this node already")
        if error is not None:
            reply(WatchReply(request.id, error=error.to_wire()))
            return
        if line is None:
            line = self._lines[request.key] = _Line()
        if place is None:
            place = line.places[request.waiter] = _Place()
            self._places += 1
        place.id, place.reply = request.id, reply
        version, free = self._state(request.key)
        first = next(iter(line.places.values())) is place
        if version > request.version and not (free and not first and line.serial):
            self._answer(request.key, request.waiter, place, version, free=free)
            return
        timeout_ms = min(max(1, request.timeout_ms), WATCH_MS_MAX)
        place.serial = self._timer(request.key, request.waiter, timeout_ms / 1000)

    def chose(self, key: bytes, record: bytes) -> None:
        """This is the key's value now."""
        line = self._lines.get(key)
        if line is None:
            return
        version, holder = _holder(record)
        line.serial = 0
        if holder:
            line.free_at = 0
            self._leave(key, holder)
        else:
            line.free_at = version
            self._wake(key, line)

    def advance(self, now: float) -> None:
        """Ends what is past its time."""
        for key, waiter, serial in self._wheel.advance(now):
            line = self._lines.get(key)
            if line is None:
                continue
            if not waiter:
                if line.serial == serial:
                    self._wake(key, line)
                continue
            place = line.places.get(waiter)
            if place is None or place.serial != serial:
                continue
            if place.reply is None:
                self._leave(key, waiter)
            else:
                self._answer(key, waiter, place, 0, free=False)

    def end(self) -> None:
        """Everybody is to look for himself: this node stops, or others decide on their keys."""
        for key, line in list(self._lines.items()):
            for waiter, place in list(line.places.items()):
                if place.reply is not None:
                    self._answer(key, waiter, place, 0, free=False)
                self._leave(key, waiter)

    # --- inside

    def _state(self, key: bytes) -> tuple[int, bool]:
        """The version that is known, 0 for none, and whether the lock is free at it."""
        record = self._known(key)
        if record is None:
            return 0, False
        version, holder = _holder(record)
        return version, not holder

    def _wake(self, key: bytes, line: _Line) -> None:
        """The first who is there; the next one if that comes to nothing."""
        for waiter, place in list(line.places.items()):
            if place.reply is not None and self._answer(key, waiter, place, line.free_at, free=True):
                line.serial = self._timer(key, "", WAKE_S)
                return
        line.serial = 0

    def _answer(self, key: bytes, waiter: str, place: _Place, version: int, *, free: bool) -> bool:
        """Whether it could be sent. The place is kept for a while if so."""
        reply, place.reply = place.reply, None
        assert reply is not None
        try:
            reply(WatchReply(place.id, version, None, free))
        except (TransportError, Overloaded) as error:
            _log.info("reply_undeliverable", error=str(error))
            self._leave(key, waiter)
            return False
        place.serial = self._timer(key, waiter, PLACE_S)
        return True

    def _leave(self, key: bytes, waiter: str) -> None:
        line = self._lines.get(key)
        if line is not None and line.places.pop(waiter, None) is not None:
            self._places -= 1
            if not line.places:
                del self._lines[key]

    def _timer(self, key: bytes, waiter: str, delay_s: float) -> int:
        self._serial += 1
        self._wheel.add(self._clock.monotonic() + delay_s, (key, waiter, self._serial))
        return self._serial


def _holder(record: bytes) -> tuple[int, str]:
    """Version and holder; no holder where the lock is free, or the key holds something else."""
    try:
        state = state_of(record)
        return state.version, "" if state.value is None else unpack_lock(state.value).holder
    except DHTError:
        return 0, ""
