"""The simulated network: a MemoryNetwork whose events belong to no host, and its faults.

`SimNetwork` runs on true time and outside of every host, so that a message survives its sender and neither the death,
the clock nor the pause of one host disturbs the others. `SimTransport` is one host's access: what it calls into the
host runs as the process that listened or connected; never if that is dead, after `resume` if it is paused.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from contextvars import Context
from dataclasses import dataclass
from functools import partial

import msgspec

from agi.core.dht.errors import DHTError, LinkClosed, Overloaded, TransportError
from agi.core.dht.protocol.messages import Message, Ping, Pong
from agi.core.dht.testing.host import Host
from agi.core.dht.testing.loop import SimLoop
from agi.core.dht.testing.process import Process, context_of, current_process
from agi.core.dht.transport.base import CONNECT_TIMEOUT_S, Link, LinkHandler, Listener
from agi.core.dht.transport.memory import MemoryNetwork, MemoryTransport, _MemoryLink

NOTICE_S = 0.001
"""How soon peers hear that a process died whose machine lives on."""


@dataclass(slots=True)
class LinkFaults:
    """How messages fare; chances are per message, times in seconds. May be changed at any time.

    Attributes:
        delay_min_s, delay_mean_s: a delay is the minimum plus an exponential of this mean ...
        delay_max_s: ... and at most this.
        loss_chance: a message never arrives.
        duplicate_chance: a message arrives twice, the second time up to `reorder_s` later.
        reorder_chance, reorder_s: a message is held back for up to so long, so that later ones overtake it.
    """

    delay_min_s: float = 0.0002
    delay_mean_s: float = 0.0005
    delay_max_s: float = 0.1
    loss_chance: float = 0.0
    duplicate_chance: float = 0.0
    reorder_chance: float = 0.0
    reorder_s: float = 0.05


class SimNetwork(MemoryNetwork):
    """The network of one simulation; itself the policy that decides about every message.

    Messages of a direction (src, dst) arrive in the order of sending unless a fault reorders them, as on a connection.

    Args:
        loop: of the simulation.
        rng: draws delays and faults.

    Attributes:
        faults: see LinkFaults.
        lost, reordered, blocked: messages dropped by chance, held back, and dropped by a partition. (`duplicated`,
            `dropped` and `delivered` are MemoryNetwork's.)
        partitions: how many times `block` or `partition` was called.
    """

    def __init__(self, loop: SimLoop, rng: random.Random) -> None:
        super().__init__()
        self.faults = LinkFaults()
        self.lost = 0
        self.reordered = 0
        self.blocked = 0
        self.partitions = 0
        self._loop = loop
        self._rng = rng
        self._hosts: dict[str, Host] = {}
        self._blocked: set[tuple[str, str]] = set()
        self._clogged_until: dict[tuple[str, str], float] = {}
        self._last_arrival: dict[tuple[str, str], float] = {}
        self.policy = self._delays
        self.can_connect = self._reachable
        self.trace = self._record

    def attach(self, host: Host) -> None:
        """The network notices the ends of this host's processes: with a power loss its links just fall silent."""
        self._hosts[host.name] = host
        host.on_end.append(lambda power_loss: self.crash(host.name, None if power_loss else NOTICE_S))

    # --- faults

    def block(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Messages of these directions (src, dst) are lost until `heal`: a one-way partition."""
        self.partitions += 1
        self._blocked.update(pairs)

    def partition(self, group: Iterable[str]) -> None:
        """Nothing passes between these hosts and all others attached, in either direction, until `heal`."""
        inside = set(group)
        outside = self._hosts.keys() - inside
        self.block(pair for a in inside for b in outside for pair in ((a, b), (b, a)))

    def unblock(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Lifts part of what was blocked."""
        self._blocked.difference_update(pairs)

    def clog(self, src: str, dst: str, for_s: float) -> None:
        """What is sent in this direction from now on arrives only after so long, then in order."""
        self._clogged_until[src, dst] = self._loop.now + for_s

    def heal(self) -> None:
        """Lifts every partition, clogging and chance of a fault. What is under way arrives when it was to arrive."""
        self._blocked.clear()
        self._clogged_until.clear()
        self.faults = LinkFaults()

    # --- MemoryNetwork's clock and hooks

    def now(self) -> float:
        return self._loop.now

    def at(self, when: float, action: Callable[[], None]) -> None:
        self._loop.at(when, action)

    def unheard(self, link: Link) -> None:
        """A machine that is up and knows no such connection answers with a reset, as TCP does."""
        assert isinstance(link, _MemoryLink)
        src, dst = link._transport.host, link.other._transport.host
        host = self._hosts.get(dst)
        if host is not None and host.alive and (dst, src) not in self._blocked:
            self.at(self.now() + self._delay(), partial(link.ended, LinkClosed(f"{link.peer} reset the link")))

    def _record(self, line: str) -> None:
        kind, _, rest = line.partition(" ")
        self._loop.trace.record(f"net-{kind}", rest)

    def _reachable(self, src: str, dst: str) -> bool:
        return (src, dst) not in self._blocked and (dst, src) not in self._blocked

    def _delays(self, src: str, dst: str, message: Message) -> Sequence[float]:
        pair = (src, dst)
        if pair in self._blocked:
            self.blocked += 1
            return ()
        if message.__class__ is Ping or message.__class__ is Pong:
            for name in pair:  # the link answers these by itself, which a stopped process does not
                if name in self._hosts and self._hosts[name].paused:
                    return ()
        faults, draw, now = self.faults, self._rng.random, self._loop.now
        if faults.loss_chance and draw() < faults.loss_chance:
            self.lost += 1
            return ()
        arrival = max(now, self._clogged_until.get(pair, 0.0)) + self._delay()
        if faults.reorder_chance and draw() < faults.reorder_chance:
            self.reordered += 1
            arrival += draw() * faults.reorder_s
        else:
            arrival = max(arrival, self._last_arrival.get(pair, 0.0))
            self._last_arrival[pair] = arrival
        if faults.duplicate_chance and draw() < faults.duplicate_chance:
            return (arrival - now, arrival - now + self._delay() + draw() * faults.reorder_s)
        return (arrival - now,)

    def _delay(self) -> float:
        faults = self.faults
        return min(faults.delay_min_s + self._rng.expovariate(1.0 / faults.delay_mean_s), faults.delay_max_s)


class SimTransport(MemoryTransport):
    """A process's access to the SimNetwork: make one per process, not per host. Arguments as MemoryTransport's."""

    async def listen(self, address: str, handler: LinkHandler) -> Listener:
        return await super().listen(address, _owned(handler))

    async def connect(self, address: str, handler: LinkHandler, timeout_s: float = CONNECT_TIMEOUT_S) -> Link:
        return await super().connect(address, _owned(handler), timeout_s)


def _owned(handler: LinkHandler) -> LinkHandler:
    process = current_process()
    return handler if process is None else _OwnedHandler(handler, process, context_of(process))


class _OwnedHandler:
    """Calls a handler as the process that it belongs to."""

    __slots__ = ("_context", "_handler", "_loop", "_process")

    def __init__(self, handler: LinkHandler, process: Process, context: Context) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        self._loop = loop
        self._handler = handler
        self._process = process
        self._context = context

    def message(self, link: Link, message: msgspec.Struct) -> None:
        self._loop.call_into(self._process, self._context, self._message, link, message)

    def link_closed(self, link: Link, error: DHTError | None) -> None:
        self._loop.call_into(self._process, self._context, self._handler.link_closed, link, error)

    def _message(self, link: Link, message: msgspec.Struct) -> None:
        try:
            self._handler.message(link, message)
        except (TransportError, Overloaded) as error:  # the link went while it was answered; any other error is a bug
            link.close(error)
