"""What a node and a client need from a wire: links that carry messages.

A `Link` is one connection. `send` queues a message (a Struct of protocol/messages.py) and never waits; the messages of
one event-loop turn leave as one write. A handler gets what arrives, in order, and one `link_closed` at the end; nothing
arrives after it. Messages are delivered at most once. A link that hears nothing for `idle_timeout` although it pinged
is closed (a half-open peer). A link whose unsent bytes pass `SEND_BUFFER_BYTES_MAX` refuses with Overloaded.
"""

from __future__ import annotations

import abc
from typing import Protocol

import msgspec

from agi.core.dht.errors import DHTError
from agi.core.dht.transport.codec import encode

SEND_BUFFER_BYTES_MAX = 64 * 1024 * 1024
PING_INTERVAL_S = 1.0
IDLE_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 3.0


class Traffic:
    """What a transport counts over all its links."""

    __slots__ = ("bytes_received", "bytes_sent", "frames_sent", "writes")

    def __init__(self) -> None:
        self.frames_sent = 0
        self.writes = 0
        """Writes to sockets: one carries all frames of a loop turn."""
        self.bytes_sent = 0
        self.bytes_received = 0


class Link(abc.ABC):
    """One connection to a peer."""

    peer: str
    """The other side's address, for messages to people."""
    context: object
    """Whatever the handler keeps with the link (a node's session or a client's); starts as None."""
    closed: bool

    def send(self, message: msgspec.Struct) -> int:
        """Queues a message and returns its size in bytes. Raises LinkClosed, FrameTooLarge, Overloaded; then nothing
        of the message was sent."""
        frame = encode(message)
        self.send_frame(frame)
        return len(frame)

    @abc.abstractmethod
    def send_frame(self, frame: bytes) -> None:
        """`send` of a message that codec.encode has packed already: one packing serves many links."""

    @abc.abstractmethod
    def flush(self) -> None:
        """Hands what is queued to the operating system now, not at the end of this loop turn."""

    @abc.abstractmethod
    def close(self, error: DHTError | None = None) -> None:
        """Ends the connection after what was queued has left; the handler gets `link_closed(link, error)`."""


class LinkHandler(Protocol):
    def message(self, link: Link, message: msgspec.Struct) -> None:
        """One message arrived. An exception from here closes the link and is logged; it never ends the process."""

    def link_closed(self, link: Link, error: DHTError | None) -> None:
        """The link ended: None where either side closed it in order."""


class Listener(abc.ABC):
    address: str
    """Where it listens: `host:port`, with the port that the system chose for 0; or `unix:/path`."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Stops accepting. Links that were accepted stay."""


class Transport(abc.ABC):
    """Makes links. Addresses are `host:port`, `[ipv6]:port` or `unix:/path`."""

    traffic: Traffic | None = None
    """None where the transport does not count."""

    @abc.abstractmethod
    async def listen(self, address: str, handler: LinkHandler) -> Listener:
        """Accepts links at an address. Raises ConnectFailed where it cannot be bound (port in use)."""

    @abc.abstractmethod
    async def connect(self, address: str, handler: LinkHandler, timeout_s: float = CONNECT_TIMEOUT_S) -> Link:
        """A link to that address. Raises ConnectFailed."""
