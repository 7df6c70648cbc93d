"""The first exchange on a link: each side says who it is and may refuse the other.

The side that connects sends its Hello and waits for the other's; until then nothing else is allowed. A side that may
not work with what it hears answers Refused with its reason and closes; both sides see the same typed error.
"""

from __future__ import annotations

import asyncio

import msgspec

from agi.core.dht.errors import ConnectFailed, DHTError, LinkClosed, ProtocolMismatch, from_wire
from agi.core.dht.protocol.messages import Hello, Refused
from agi.core.dht.transport.base import CONNECT_TIMEOUT_S, Link, LinkHandler, Transport
from agi.core.dht.types import PROTOCOL_VERSION


class _Greeting:
    """A LinkHandler that takes the Hello and passes on all that follows it."""

    def __init__(self, handler: LinkHandler) -> None:
        self._handler = handler
        self._welcome = False
        self.hello: asyncio.Future[Hello] = asyncio.get_running_loop().create_future()

    def message(self, link: Link, message: msgspec.Struct) -> None:
        if self._welcome:
            self._handler.message(link, message)
        elif isinstance(message, Hello):
            self._welcome = True
            if not self.hello.done():
                self.hello.set_result(message)
        elif isinstance(message, Refused):
            self._fail(from_wire(*message.error))
        else:
            raise ProtocolMismatch("the first message of a link is a Hello")

    def link_closed(self, link: Link, error: DHTError | None) -> None:
        if self._welcome:
            self._handler.link_closed(link, error)
        else:
            self._fail(error or LinkClosed(f"{link.peer} closed the link"))

    def _fail(self, error: DHTError) -> None:
        if not self.hello.done():
            self.hello.set_exception(error)
            self.hello.exception()  # whoever waited may have given up


async def greet(
    transport: Transport, address: str, hello: Hello, handler: LinkHandler, timeout_s: float = CONNECT_TIMEOUT_S
) -> tuple[Link, Hello]:
    """A link to `address` on which both sides have said hello. `handler` gets what follows.

    Raises ConnectFailed, LinkClosed, ProtocolMismatch, or the ClusterError with which the other side refused.
    """
    greeting = _Greeting(handler)
    link = await transport.connect(address, greeting, timeout_s)
    try:
        link.send(hello)
        async with asyncio.timeout(timeout_s):
            theirs = await greeting.hello
        if theirs.protocol != PROTOCOL_VERSION:
            raise ProtocolMismatch(f"{address} speaks protocol {theirs.protocol}, this program {PROTOCOL_VERSION}")
    except TimeoutError:
        link.close()
        raise ConnectFailed(f"{address} did not say hello within {timeout_s} s") from None
    except BaseException:
        link.close()
        raise
    return link, theirs


class Nobody:
    """A LinkHandler for a link that ends after the Hello."""

    def message(self, link: Link, message: msgspec.Struct) -> None:
        raise ProtocolMismatch("nothing was asked on this link")

    def link_closed(self, link: Link, error: DHTError | None) -> None:
        return None
