"""The native wire: frames over TCP or a Unix socket, with TLS where an `ssl.SSLContext` is given.

Everything that one event-loop turn sends on a link leaves as one write. What a received read causes to be sent leaves
at the end of that read, not a turn later: at one caller this is the difference between 4 and 5 wake-ups an operation.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from pathlib import Path
from typing import cast

from agi.core.dht.errors import (
    ConnectFailed,
    DHTError,
    FrameTooLarge,
    LinkClosed,
    Overloaded,
    ProtocolMismatch,
    TransportError,
)
from agi.core.dht.protocol.messages import Ping, Pong
from agi.core.dht.transport.base import (
    CONNECT_TIMEOUT_S,
    IDLE_TIMEOUT_S,
    PING_INTERVAL_S,
    SEND_BUFFER_BYTES_MAX,
    Link,
    LinkHandler,
    Listener,
    Traffic,
    Transport,
)
from agi.core.dht.transport.codec import FrameReader, encode
from agi.core.dht.types import format_address, parse_address

_log = logging.getLogger("agi.core.dht.transport")
LINGER_S = 1.0
"""How long a closed link waits for the other side's end before it is cut."""
_PING = encode(Ping())
_PONG = encode(Pong())


class NativeTransport(Transport):
    """Links over TCP and Unix sockets.

    Args:
        ssl_server, ssl_client: TLS for accepted and for opened links; None for plain sockets.
        ping_interval_s: a link that has heard nothing for so long sends a ping.
        idle_timeout_s: a link that has heard nothing for so long is closed.
        reuse_port: bind a TCP port, other than 0, although a process of this user holds it with SO_REUSEPORT.
    """

    def __init__(
        self,
        ssl_server: ssl.SSLContext | None = None,
        ssl_client: ssl.SSLContext | None = None,
        *,
        ping_interval_s: float = PING_INTERVAL_S,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
        reuse_port: bool = False,
    ) -> None:
        self._ssl_server = ssl_server
        self._ssl_client = ssl_client
        self._ping_interval_s = ping_interval_s
        self._idle_timeout_s = idle_timeout_s
        self._reuse_port = reuse_port
        self.traffic: Traffic = Traffic()
        self._links: set[_NativeLink] = set()
        self._dirty: list[_NativeLink] = []
        self._reading = False
        self._pinger: asyncio.TimerHandle | None = None

    async def listen(self, address: str, handler: LinkHandler, *, sock: socket.socket | None = None) -> Listener:
        """As Transport.listen; `sock` is a bound socket to use instead of binding one."""
        loop = asyncio.get_running_loop()

        def accept() -> _NativeLink:
            return _NativeLink(self, handler)

        try:
            if sock is not None:
                server = await loop.create_server(accept, sock=sock, ssl=self._ssl_server)
            elif address.startswith("unix:"):
                return await self._listen_unix(address, accept)
            else:
                host, _, port = address.rpartition(":")
                server = await loop.create_server(
                    accept,
                    host.strip("[]") or None,
                    int(port),
                    ssl=self._ssl_server,
                    reuse_port=self._reuse_port and int(port) != 0,
                )
        except OSError as error:
            raise ConnectFailed(f"cannot listen on {address}: {error.strerror or error}") from error
        bound = server.sockets[0].getsockname()
        return _NativeListener(server, format_address(bound[0], bound[1]), None)

    async def _listen_unix(self, address: str, accept: object) -> Listener:
        path = Path(address[5:])
        if path.is_socket():  # noqa: ASYNC240  # once, before anything runs
            probe = socket.socket(socket.AF_UNIX)
            try:
                probe.settimeout(0.2)
                probe.connect(str(path))
            except OSError:
                path.unlink()  # noqa: ASYNC240  # left behind by a process that was killed
            else:
                raise ConnectFailed(f"cannot listen on {address}: another process does")
            finally:
                probe.close()
        server = await asyncio.get_running_loop().create_unix_server(accept, str(path), ssl=self._ssl_server)  # type: ignore[arg-type]  # a protocol factory
        return _NativeListener(server, address, path)

    async def connect(self, address: str, handler: LinkHandler, timeout_s: float = CONNECT_TIMEOUT_S) -> Link:
        loop = asyncio.get_running_loop()
        link = _NativeLink(self, handler)
        try:
            async with asyncio.timeout(timeout_s):
                if address.startswith("unix:"):
                    await loop.create_unix_connection(
                        lambda: link,
                        address[5:],
                        ssl=self._ssl_client,
                        server_hostname="localhost" if self._ssl_client else None,
                    )
                else:
                    host, port = parse_address(address)
                    await loop.create_connection(lambda: link, host, port, ssl=self._ssl_client)
        except (OSError, TimeoutError) as error:
            reason = "no answer in time" if isinstance(error, TimeoutError) else error.strerror or str(error)
            raise ConnectFailed(f"cannot connect to {address}: {reason}") from error
        link.peer = address
        return link

    # One timer for all links looks for silence.

    def _opened(self, link: _NativeLink) -> None:
        self._links.add(link)
        if self._pinger is None:
            self._pinger = link.loop.call_later(self._ping_interval_s, self._ping, link.loop)

    def _ping(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for link in list(self._links):
            silence = now - link.heard_at
            if silence > self._idle_timeout_s:
                link.close(LinkClosed(f"{link.peer} was silent for {silence:.1f} s"))
                link.abort()
            elif silence >= self._ping_interval_s:
                with contextlib.suppress(TransportError, Overloaded):
                    link.send_frame(_PING)
        self._pinger = loop.call_later(self._ping_interval_s, self._ping, loop) if self._links else None

    def _flush(self) -> None:
        dirty, self._dirty = self._dirty, []
        for link in dirty:
            link.flush()


class _NativeListener(Listener):
    def __init__(self, server: asyncio.AbstractServer, address: str, path: Path | None) -> None:
        self._server = server
        self._path = path
        self.address = address

    async def close(self) -> None:
        self._server.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)


class _NativeLink(Link, asyncio.Protocol):
    def __init__(self, owner: NativeTransport, handler: LinkHandler) -> None:
        self.peer = "?"
        self.context: object = None
        self.closed = False
        self.loop = asyncio.get_running_loop()
        self.heard_at = self.loop.time()
        self._owner = owner
        self._traffic = owner.traffic
        self._handler = handler
        self._reader = FrameReader()
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._socket: asyncio.Transport | None = None
        self._paused = False
        self._error: DHTError | None = None

    # --- the wire

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._socket = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        peer = transport.get_extra_info("peername")
        self.peer = format_address(peer[0], peer[1]) if isinstance(peer, tuple) else f"unix:{peer or 'client'}"
        self._socket.set_write_buffer_limits(high=1024 * 1024)
        self.heard_at = self.loop.time()
        self._owner._opened(self)

    def data_received(self, data: bytes) -> None:
        if self.closed:
            return  # we have ended; this side only waits for the other's end
        owner = self._owner
        self.heard_at = self.loop.time()
        self._traffic.bytes_received += len(data)
        owner._reading = True
        try:
            for message in self._reader.feed(data):
                if self.closed:
                    break
                if message.__class__ is Ping:
                    with contextlib.suppress(TransportError, Overloaded):  # who reads nothing needs no pong
                        self.send_frame(_PONG)
                elif message.__class__ is not Pong:
                    self._handler.message(self, message)
        except (ProtocolMismatch, FrameTooLarge) as error:
            self.close(error)
        except Exception as error:  # noqa: BLE001  # whatever a handler raises ends its link, not the process
            _log.exception("the handler of the link to %s failed", self.peer)
            self.close(LinkClosed(f"a message could not be handled: {type(error).__name__}"))
        finally:
            owner._reading = False
            if owner._dirty:
                owner._flush()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self.flush()

    def connection_lost(self, error: Exception | None) -> None:
        self._owner._links.discard(self)
        if not self.closed and self._error is None and error is not None:
            self._error = LinkClosed(f"the link to {self.peer} broke: {error}")
        self.closed = True
        self._out.clear()
        self._socket = None
        self._handler.link_closed(self, self._error)

    # --- Link

    def send_frame(self, frame: bytes) -> None:
        if self.closed:
            raise LinkClosed(f"the link to {self.peer} is closed")
        out = self._out
        if not out:
            owner = self._owner
            if not owner._dirty and not owner._reading:
                self.loop.call_soon(owner._flush)
            owner._dirty.append(self)
        elif self._out_bytes + len(frame) > SEND_BUFFER_BYTES_MAX:
            raise Overloaded(f"{self._out_bytes} bytes wait for {self.peer} already")
        out.append(frame)
        self._out_bytes += len(frame)

    def flush(self) -> None:
        if self._paused or not self._out or self._socket is None:
            return
        out, self._out = self._out, []
        traffic = self._traffic
        traffic.writes += 1
        traffic.frames_sent += len(out)
        traffic.bytes_sent += self._out_bytes
        self._out_bytes = 0
        self._socket.write(out[0] if len(out) == 1 else b"".join(out))

    def close(self, error: DHTError | None = None) -> None:
        if self.closed:
            return
        self._error = error
        self._paused = False
        self.flush()
        self.closed = True
        if self._socket is None:
            return
        if self._socket.can_write_eof() and not self._socket.is_closing():
            # closing with unread bytes would reset the connection and lose what was queued: read on until the peer ends
            try:
                self._socket.write_eof()
            except OSError:  # it was reset, and the loop has not heard of it yet
                self.abort()
            else:
                self.loop.call_later(LINGER_S, self.abort)
        else:
            self._socket.close()

    def abort(self) -> None:
        """Ends the connection without waiting for what was queued: the peer does not read."""
        if self._socket is not None:
            self._socket.abort()
