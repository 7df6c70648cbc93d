"""Who waits for a lock, at the node that decides on its key: in a line, so that each release wakes one, the first.

A watch is a hint and nothing rests on it: who is woken tries, by a condition on the version; who is not looks again
when his watch is over. It helps while all clients send what concerns a key to the same node, which they do.

A waiter keeps its place while it looks for itself between two watches, so one that was woken and came second to
somebody who had not waited is the next again. If who was woken does nothing about it, the next one is.

One thing that is told here does count: for how long this node has known the very version of a lock's record that
somebody has seen (`known_ms`), by a clock that runs while machines sleep. No node knows a version before it was
written, nor was it written before its holder began to count; and what is chosen for a key has a version above all
before, so that it names one write. So the record is at least that old, and whoever waits for the end of its lease may
count from then, also if he was not there: so processes that look once and give up can follow a dead holder.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import structlog

from agi.core.dht.clock import Clock
from agi.core.dht.errors import DHTError, InvalidRequest, Overloaded, TransportError
from agi.core.dht.protocol.consensus import state_of
from agi.core.dht.protocol.locks import HOLDER_BYTES_MAX, unpack_lock
from agi.core.dht.protocol.messages import Watch, WatchReply
from agi.core.dht.protocol.timers import TimerWheel
from agi.core.dht.requests import ReplyTo
from agi.core.dht.types import KEY_BYTES_MAX, LOCK_PREFIX

_log = structlog.get_logger("agi.core.dht.watches")

WATCHES_MAX = 16_384
"""Places in all lines of one node."""
WATCH_MS_MAX = 60_000
WAKE_S = 0.5
"""Who was woken has so long before the next one is."""
PLACE_S = 3.0
"""A place is kept so long for a waiter that looks for itself."""
KNOWN_MAX = 4096
"""Locks of which a node remembers since when it knows their version."""


class _Known(NamedTuple):
    """Of a lock: a version, and since when this node knows it, by `Clock.boottime`. `chosen`: it was chosen here."""

    version: int
    since: float
    chosen: bool


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
        self._since: OrderedDict[bytes, _Known] = OrderedDict()
        self._lines: dict[bytes, _Line] = {}
        self._places = 0
        self._serial = 0
        self._wheel: TimerWheel[tuple[bytes, str, int]] = TimerWheel(clock.monotonic())

    @property
    def places(self) -> int:
        return self._places

    def start(self, request: Watch, reply: ReplyTo) -> None:
        """`reply` gets one WatchReply: when it is this waiter's turn, at once where the key has moved on or nobody
        waits, or at its time."""
        error: DHTError | None = None
        if not 1 <= len(request.key) <= KEY_BYTES_MAX or not 1 <= len(request.waiter.encode()) <= HOLDER_BYTES_MAX:
            error = InvalidRequest("a watch has a key and the name of who waits")
        only_asks = request.timeout_ms <= 0
        line = self._lines.get(request.key)
        place = None if line is None else line.places.get(request.waiter)
        if not only_asks and place is None and self._places >= WATCHES_MAX:
            error = Overloaded(f"{WATCHES_MAX} wait for locks at this node already")
        if error is not None:
            reply(WatchReply(request.id, error=error.to_wire()))
            return
        known_ms = self._told(request.key, request.version)
        if only_asks:
            reply(WatchReply(request.id, known_ms=known_ms))
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
        is_lock = key.startswith(LOCK_PREFIX)
        if line is None and not is_lock:
            return
        version, holder = _holder(record)
        known = self._since.get(key)
        if is_lock and (known is None or known.version != version or not known.chosen):
            self._remember(key, version, chosen=True)
        if line is None:
            return
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
        self._since.clear()
        for key, line in list(self._lines.items()):
            for waiter, place in list(line.places.items()):
                if place.reply is not None:
                    self._answer(key, waiter, place, 0, free=False)
                self._leave(key, waiter)

    # --- inside

    def _told(self, key: bytes, version: int) -> int:
        """For how many milliseconds that version of a lock, which somebody has seen, is known here. A node that has
        just come to decide on the key hears of a dead holder's version in no other way.

        What somebody says is believed, but only from now on, so a version that was ever chosen is never taken for older
        than it is. One that was made up tells nobody anything: it counts for those alone who see that very version, it
        is dropped when a version is chosen here, even that one, and a lower one does not take the place of what is
        known. Who could guess the version that another node will make could as well delete the lock."""
        known = self._since.get(key)
        if known is not None and known.version == version:
            self._since.move_to_end(key)
            return max(0, int((self._clock.boottime() - known.since) * 1000))
        if key.startswith(LOCK_PREFIX) and version > (0 if known is None else known.version):
            self._remember(key, version, chosen=False)
        return 0

    def _remember(self, key: bytes, version: int, *, chosen: bool) -> None:
        self._since.pop(key, None)
        self._since[key] = _Known(version, self._clock.boottime(), chosen)
        if len(self._since) > KNOWN_MAX:
            self._since.popitem(last=False)

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
