"""Links inside one process, for tests and whole-cluster simulations: faults on demand, and the same run every time.

A `MemoryNetwork` joins hosts; a `MemoryTransport` is one host's access to it. Messages pass through the codec, so that
no object is shared and every frame limit holds. Hooks of the network decide what happens to each message and each
attempt to connect. Nothing here draws randomness or depends on the order of a set: with deterministic hooks on a
deterministic loop the trace of two runs is equal.

    network = MemoryNetwork()
    server = await MemoryTransport(network, "b").listen("b:7000", handler)
    link = await MemoryTransport(network, "a").connect("b:7000", other_handler)
    network.policy = lambda src, dst, message: [0.010, 0.500] if src == "a" else []   # twice there, never back

A message that the policy drops is lost alone and the link lives on. That is harsher than TCP, and within the contract:
messages are delivered at most once unless the policy duplicates them.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
import math
import zlib
from collections.abc import Callable, Sequence
from functools import partial

from agi.core.dht.errors import ConnectFailed, DHTError, LinkClosed, Overloaded
from agi.core.dht.protocol.messages import Message, Ping, Pong
from agi.core.dht.transport.base import (
    CONNECT_TIMEOUT_S,
    IDLE_TIMEOUT_S,
    PING_INTERVAL_S,
    SEND_BUFFER_BYTES_MAX,
    Link,
    LinkHandler,
    Listener,
    Transport,
)
from agi.core.dht.transport.codec import FrameReader, encode
from agi.core.dht.types import format_address, parse_address

_log = logging.getLogger("agi.core.dht.transport")
_PING = encode(Ping())
_PONG = encode(Pong())
_FIRST_PORT = 40_000
_WILDCARDS = ("", "0.0.0.0", "::")
_AT_ONCE = (0.0,)


def _deliver_at_once(src: str, dst: str, message: Message) -> Sequence[float]:
    return _AT_ONCE


def _yes(src: str, dst: str) -> bool:
    return True


def _no(src: str, dst: str) -> bool:
    return False


class MemoryNetwork:
    """What the transports of one test or simulation share. Hosts are plain names.

    Hooks (they must not change the message):
        policy(src, dst, message): the delay in seconds of each copy that arrives; `[]` loses the message, two entries
            duplicate it. Pings and pongs are asked for too. Default: one copy at once, in order.
        can_connect(src, dst): whether packets of a connection attempt get through; asked too when a link is closed:
            where they do not, the other side is left half-open. Default: always.
        refuses(src, dst): where `can_connect` said no, whether the attempt fails at once (True) or waits for its
            timeout as in a partition (False, the default).
        trace(line): told of every connect, delivery, drop and close, in words that are equal from run to run.

    Attributes:
        delivered, dropped, duplicated: copies of messages so far. A message that finds its link closed is dropped.
    """

    def __init__(self) -> None:
        self.policy: Callable[[str, str, Message], Sequence[float]] = _deliver_at_once
        self.can_connect: Callable[[str, str], bool] = _yes
        self.refuses: Callable[[str, str], bool] = _no
        self.trace: Callable[[str], None] | None = None
        self.delivered = 0
        self.dropped = 0
        self.duplicated = 0
        self._listeners: dict[tuple[str, str], _MemoryListener] = {}
        self._transports: dict[str, list[MemoryTransport]] = {}
        self._next_port: dict[str, int] = {}
        # One heap of our own: the loop's is not first-in first-out among equal times.
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self._wake: asyncio.Handle | None = None
        self._wake_at = 0.0

    def crash(self, host: str, notice_after_s: float | None = None) -> None:
        """The host stops: its links, listeners and transports are gone, and none of its handlers hears of it.

        What it had sent still arrives. Its peers get `link_closed` after `notice_after_s` (a process was killed and its
        kernel says so), or, with None, find out by their idle timeout (the machine is gone). A new MemoryTransport
        of the same name is the host started again.
        """
        self._say(f"crash {host}")
        for transport in self._transports.pop(host, []):
            transport.crashed = True
            for link in list(transport.links):
                link.vanish()
                if notice_after_s is not None:
                    error = LinkClosed(f"{link.other.peer} crashed")
                    self.at(self.now() + notice_after_s, partial(link.other.ended, error))
        for key in [key for key in self._listeners if key[0] == host]:
            del self._listeners[key]

    def cut(self, link: Link) -> None:
        """Breaks one link: both sides get `link_closed` with LinkClosed; what was under way is lost."""
        assert isinstance(link, _MemoryLink)
        for end in (link, link.other):
            self.at(self.now(), partial(end.ended, LinkClosed(f"the link to {end.peer} was cut")))

    # --- for the transports

    def unheard(self, link: Link) -> None:
        """A message came to an end that is closed already. Here nothing follows; a simulation may reset the link."""

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def at(self, when: float, action: Callable[[], None]) -> None:
        """Runs the action at that loop time; actions of equal times in the order of these calls."""
        self._sequence += 1
        heapq.heappush(self._queue, (when, self._sequence, action))
        if self._wake is None or when < self._wake_at:
            self._arm()

    def _arm(self) -> None:
        if self._wake is not None:
            self._wake.cancel()
        loop = asyncio.get_running_loop()
        self._wake_at = self._queue[0][0]
        if self._wake_at <= loop.time():
            self._wake = loop.call_soon(self._run)
        else:
            self._wake = loop.call_at(self._wake_at, self._run)

    def _run(self) -> None:
        # A timer may fire a clock tick early; what it was set for is due all the same.
        now = max(self.now(), self._wake_at)
        last = self._sequence  # what these actions cause belongs to the next turn
        self._wake_at = -math.inf  # and arms no timer before this turn is over
        queue = self._queue
        try:
            while queue and queue[0][0] <= now and queue[0][1] <= last:
                heapq.heappop(queue)[2]()
        finally:
            self._wake = None
            if queue:
                self._arm()

    def _say(self, line: str) -> None:
        if self.trace is not None:
            self.trace(line)

    def _port(self, host: str) -> int:
        port = self._next_port.get(host, _FIRST_PORT)
        while (host, str(port)) in self._listeners:
            port += 1
        self._next_port[host] = port + 1
        return port


class MemoryTransport(Transport):
    """One host's access to a MemoryNetwork.

    Listens on its own name, on a wildcard host, or on `unix:/path`, which only the same host reaches.

    Args:
        network: what it shares with the other hosts.
        host: its name, as in the addresses that others connect to.
        ping_interval_s: a link that has heard nothing for so long sends a ping.
        idle_timeout_s: a link that has heard nothing for so long is closed.
    """

    def __init__(
        self,
        network: MemoryNetwork,
        host: str,
        *,
        ping_interval_s: float = PING_INTERVAL_S,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
    ) -> None:
        self.network = network
        self.host = host
        self.crashed = False
        self.ping_interval_s = ping_interval_s
        self.idle_timeout_s = idle_timeout_s
        self.links: dict[_MemoryLink, None] = {}
        network._transports.setdefault(host, []).append(self)

    async def listen(self, address: str, handler: LinkHandler) -> Listener:
        network = self.network
        if address.startswith("unix:"):
            key = (self.host, address)
        else:
            host, _, port = address.rpartition(":")
            if host.strip("[]") not in (self.host, *_WILDCARDS):
                raise ConnectFailed(f"cannot listen on {address}: not an address of {self.host}")
            key = (self.host, port if int(port) else str(network._port(self.host)))
            address = format_address(self.host, int(key[1]))
        if self.crashed or key in network._listeners:
            raise ConnectFailed(f"cannot listen on {address}: {'the host is down' if self.crashed else 'in use'}")
        listener = network._listeners[key] = _MemoryListener(self, key, address, handler)
        return listener

    async def connect(self, address: str, handler: LinkHandler, timeout_s: float = CONNECT_TIMEOUT_S) -> Link:
        network = self.network
        unix = address.startswith("unix:")
        host, port = (self.host, address) if unix else parse_address(address)
        if not network.can_connect(self.host, host):
            if network.refuses(self.host, host):
                network._say(f"refuse {self.host}>{address}")
                raise ConnectFailed(f"cannot connect to {address}: refused")
            network._say(f"unanswered {self.host}>{address}")
            await asyncio.sleep(timeout_s)
            raise ConnectFailed(f"cannot connect to {address}: no answer in time")
        await asyncio.sleep(0)
        listener = network._listeners.get((host, str(port)))
        if self.crashed or listener is None:
            network._say(f"refuse {self.host}>{address}")
            raise ConnectFailed(f"cannot connect to {address}: {'this host is down' if self.crashed else 'refused'}")
        here = address if unix else format_address(self.host, network._port(self.host))
        link = _MemoryLink(self, handler, peer=address)
        link.other = _MemoryLink(listener.transport, listener.handler, peer=here)
        link.other.other = link
        network._say(f"connect {link.name}")
        link.opened()
        link.other.opened()
        return link


class _MemoryListener(Listener):
    def __init__(self, transport: MemoryTransport, key: tuple[str, str], address: str, handler: LinkHandler) -> None:
        self.transport = transport
        self.handler = handler
        self.address = address
        self._key = key

    async def close(self) -> None:
        listeners = self.transport.network._listeners
        if listeners.get(self._key) is self:
            del listeners[self._key]


class _MemoryLink(Link):
    """One end of a link; `other` is the end that gets what this one sends."""

    other: _MemoryLink

    def __init__(self, transport: MemoryTransport, handler: LinkHandler, peer: str) -> None:
        self.peer = peer
        self.context = None
        self.closed = False
        self._transport = transport
        self._network = transport.network
        self._handler = handler
        self._heard_at = self._network.now()
        self._under_way_bytes = 0
        self._last_arrival = 0.0

    @property
    def name(self) -> str:
        return f"{self.other.peer}>{self.peer}"

    def opened(self) -> None:
        self._transport.links[self] = None
        self._network.at(self._network.now() + self._transport.ping_interval_s, self._tick)

    # --- Link

    def send_frame(self, frame: bytes) -> None:
        if self.closed:
            raise LinkClosed(f"the link to {self.peer} is closed")
        if self._under_way_bytes and self._under_way_bytes + len(frame) > SEND_BUFFER_BYTES_MAX:
            raise Overloaded(f"{self._under_way_bytes} bytes wait for {self.peer} already")
        self._launch(frame)

    def flush(self) -> None:
        """Nothing is held back: what was sent is under way."""

    def close(self, error: DHTError | None = None) -> None:
        if self.closed:
            return
        network = self._network
        self._forget()
        network.at(network.now(), partial(self._tell, error))
        if network.can_connect(self._transport.host, self.other._transport.host):
            network.at(max(network.now(), self._last_arrival), partial(self.other.ended, None))

    # --- the network's side

    def ended(self, error: DHTError | None) -> None:
        """The network tells that the link is over."""
        if not self.closed:
            self._forget()
            self._tell(error)

    def vanish(self) -> None:
        """The host crashed: no callback."""
        self._forget()

    def _forget(self) -> None:
        self.closed = True
        self._transport.links.pop(self, None)

    def _tell(self, error: DHTError | None) -> None:
        if self._transport.crashed:
            return
        self._network._say(f"close {self.name} {type(error).__name__ if error else 'in order'}")
        try:
            self._handler.link_closed(self, error)
        except Exception:  # noqa: BLE001  # whatever a handler raises stays with its link
            _log.exception("the handler of the link to %s failed", self.peer)

    def _launch(self, frame: bytes) -> None:
        network = self._network
        message = _decode(frame)
        delays = network.policy(self._transport.host, self.other._transport.host, message)
        if not delays:
            self._drop(frame, message, "lost")
            return
        now = network.now()
        network.duplicated += len(delays) - 1
        for number, delay_s in enumerate(delays):
            copy = _decode(frame) if number else message
            arrival = now + delay_s
            self._last_arrival = max(self._last_arrival, arrival)
            self._under_way_bytes += len(frame)
            network.at(arrival, partial(self._arrive, frame, copy))

    def _arrive(self, frame: bytes, message: Message) -> None:
        self._under_way_bytes -= len(frame)
        if self.other.closed:
            self._drop(frame, message, "closed")
            self._network.unheard(self)
            return
        self._network.delivered += 1
        if self._network.trace is not None:
            self._network.trace(f"deliver {self.name} {_describe(frame, message)}")
        self.other._receive(message)

    def _drop(self, frame: bytes, message: Message, why: str) -> None:
        self._network.dropped += 1
        if self._network.trace is not None:
            self._network.trace(f"drop {self.name} {_describe(frame, message)} {why}")

    def _receive(self, message: Message) -> None:
        self._heard_at = self._network.now()
        if message.__class__ is Ping:
            with contextlib.suppress(Overloaded):
                self.send_frame(_PONG)
        elif message.__class__ is not Pong:
            try:
                self._handler.message(self, message)
            except Exception as error:  # noqa: BLE001  # whatever a handler raises ends its link alone
                _log.exception("the handler of the link to %s failed", self.peer)
                self.close(LinkClosed(f"a message could not be handled: {type(error).__name__}"))

    def _tick(self) -> None:
        """Looks for silence, once per ping interval."""
        if self.closed:
            return
        silence_s = self._network.now() - self._heard_at
        if silence_s > self._transport.idle_timeout_s:
            self.close(LinkClosed(f"{self.peer} was silent for {silence_s:.1f} s"))
            return
        if silence_s >= self._transport.ping_interval_s:
            with contextlib.suppress(Overloaded):
                self.send_frame(_PING)
        self._network.at(self._network.now() + self._transport.ping_interval_s, self._tick)


def _decode(frame: bytes) -> Message:
    return FrameReader().feed(frame)[0]


def _describe(frame: bytes, message: Message) -> str:
    return f"{type(message).__name__} {len(frame)} bytes {zlib.crc32(frame):08x}"
