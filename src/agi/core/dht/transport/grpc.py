"""Links through the gRPC port: native frames inside the bidirectional call `Exchange`.

For clients and nodes that reach only the gRPC port. Each direction of the call is one stream of bytes, cut into pieces
of at most PIECE_BYTES_MAX; the receiver joins them again (codec.FrameReader). Through HTTP/2 flow control a peer that
does not read shows as unsent bytes here, which `send` bounds. All links to one address share a channel.

The order of an orderly end: the side that closes sends what was queued with `last` set on the final piece; the other
side ends its stream on reading that. A stream that just ends was broken.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeAlias, cast
from urllib.parse import unquote

# Off is what Python's gRPC defaults to; said so, its core does not warn whenever this process starts another.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import grpc
from grpc import aio

from agi.core.dht.errors import ConnectFailed, DHTError, LinkClosed, Overloaded, TransportError
from agi.core.dht.proto.dht_pb2 import DESCRIPTOR, Frame
from agi.core.dht.proto.dht_pb2_grpc import DHTStub
from agi.core.dht.protocol.messages import Message, Ping, Pong
from agi.core.dht.tasks import end
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
from agi.core.dht.transport.grpc_status import abort, error_detail, from_rpc_error, to_status
from agi.core.dht.types import FRAME_BYTES_MAX, parse_address

__all__ = [
    "CHANNEL_OPTIONS",
    "SERVER_OPTIONS",
    "GrpcTransport",
    "abort",
    "error_detail",
    "from_rpc_error",
    "serve_exchange",
    "to_status",
]

PIECE_BYTES_MAX = 1024 * 1024
MESSAGE_BYTES_MAX = FRAME_BYTES_MAX
SERVICE_NAME = DESCRIPTOR.services_by_name["DHT"].full_name
KEEPALIVE_MS = 10_000
KEEPALIVE_TIMEOUT_MS = 5_000

_SIZES = (("grpc.max_send_message_length", MESSAGE_BYTES_MAX), ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX))
_KEEPALIVE = (("grpc.keepalive_time_ms", KEEPALIVE_MS), ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS))
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    *_SIZES,
    *_KEEPALIVE,
    ("grpc.enable_http_proxy", 0),  # clusters set http_proxy for the web; nodes are reached directly
    ("grpc.use_local_subchannel_pool", 1),  # a new channel is a new connection, never a dead one from the pool
    ("grpc.initial_reconnect_backoff_ms", 100),  # whoever holds the link backs off; the channel need not
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.min_reconnect_backoff_ms", int(CONNECT_TIMEOUT_S * 1000)),  # in truth the time for one attempt
)
"""For every channel to a node."""
SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *_SIZES,
    *_KEEPALIVE,
    ("grpc.so_reuseport", 0),  # else two processes share a port and neither notices
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),  # else keepalive looks like an attack
)
"""For every server of a node."""

_log = logging.getLogger("agi.core.dht.transport")
_PING = encode(Ping())
_PONG = encode(Pong())
Context: TypeAlias = "aio.ServicerContext[Frame, Frame]"


class GrpcTransport(Transport):
    """Links through `Exchange`.

    Args:
        server_credentials, channel_credentials: TLS for accepted and for opened links; None for plain connections.
        ping_interval_s: a link that has heard nothing for so long sends a ping.
        idle_timeout_s: a link that has heard nothing for so long is closed.
    """

    def __init__(
        self,
        server_credentials: grpc.ServerCredentials | None = None,
        channel_credentials: grpc.ChannelCredentials | None = None,
        *,
        ping_interval_s: float = PING_INTERVAL_S,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
    ) -> None:
        self._server_credentials = server_credentials
        self._channel_credentials = channel_credentials
        self._ping_interval_s = ping_interval_s
        self._idle_timeout_s = idle_timeout_s
        self._channels: dict[str, _SharedChannel] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(self, address: str, handler: LinkHandler) -> Listener:
        """A server with nothing but `Exchange`. A node's own server has the whole service and calls serve_exchange."""
        server = aio.server(options=SERVER_OPTIONS)
        timing = {"ping_interval_s": self._ping_interval_s, "idle_timeout_s": self._idle_timeout_s}

        async def exchange(request_iterator: AsyncIterator[Frame], context: Context) -> None:
            await serve_exchange(handler, request_iterator, context, **timing)

        method = grpc.stream_stream_rpc_method_handler(exchange, Frame.FromString, Frame.SerializeToString)
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE_NAME, {"Exchange": method})])
        try:
            if self._server_credentials is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, self._server_credentials)
        except RuntimeError as error:
            raise ConnectFailed(f"cannot listen on {address}: {error}") from error
        await server.start()
        if not address.startswith("unix:"):
            address = f"{address.rpartition(':')[0]}:{port}"
        return _GrpcListener(server, address, self._own)

    async def connect(self, address: str, handler: LinkHandler, timeout_s: float = CONNECT_TIMEOUT_S) -> Link:
        if not address.startswith("unix:"):
            parse_address(address)
        channel = self._lease(address)
        call = DHTStub(channel.channel).Exchange()
        try:
            async with asyncio.timeout(timeout_s):
                await call.initial_metadata()
                if call.done():
                    raise ConnectFailed(f"cannot connect to {address}: {await call.details() or await call.code()}")
        except BaseException as error:  # also a cancelled attempt gives its channel back
            call.cancel()
            await self._release(channel, broken=True)
            if isinstance(error, TimeoutError):
                raise ConnectFailed(f"cannot connect to {address}: no answer in time") from error
            raise
        link = _TunnelLink(address, handler, call.write, self._ping_interval_s, self._idle_timeout_s)
        self._own(self._carry(link, channel, call))
        return link

    async def _carry(
        self, link: _TunnelLink, channel: _SharedChannel, call: aio.StreamStreamCall[Frame, Frame]
    ) -> None:
        """The life of a link that this side opened."""

        async def no_more() -> None:
            await call.done_writing()

        try:
            await link.run(_received(call), no_more)
        finally:
            call.cancel()
            await self._release(channel, broken=link.error is not None)
            link.tell_closed()

    def _own(self, work: Awaitable[None]) -> None:
        """Holds a background task until it ends, and says so when it fails."""

        def done(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                _log.error("a task of the transport failed", exc_info=error)

        async def run() -> None:
            await work

        task = asyncio.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(done)

    def _lease(self, address: str) -> _SharedChannel:
        shared = self._channels.get(address)
        if shared is None:
            target = address if address.startswith("unix:") else f"dns:///{address}"
            if self._channel_credentials is None:
                channel = aio.insecure_channel(target, options=CHANNEL_OPTIONS)
            else:
                channel = aio.secure_channel(target, self._channel_credentials, options=CHANNEL_OPTIONS)
            shared = self._channels[address] = _SharedChannel(address, channel)
        shared.links += 1
        return shared

    async def _release(self, shared: _SharedChannel, broken: bool) -> None:
        shared.links -= 1
        if (broken or not shared.links) and self._channels.get(shared.address) is shared:
            del self._channels[shared.address]  # the next link gets a connection of its own
        if not shared.links:
            await shared.channel.close()


async def serve_exchange(
    handler: LinkHandler,
    request_iterator: AsyncIterator[Frame],
    context: Context,
    *,
    ping_interval_s: float = PING_INTERVAL_S,
    idle_timeout_s: float = IDLE_TIMEOUT_S,
) -> None:
    """The server half of a tunnel: to be awaited by a servicer's `Exchange`. Returns, or aborts the call with the
    status of the error, when the link has ended and the handler was told."""
    await context.send_initial_metadata(())
    link = _TunnelLink(_peer_name(context.peer()), handler, context.write, ping_interval_s, idle_timeout_s)

    async def no_more() -> None:
        link.end(None)  # the returning servicer ends the stream, after everything that was written

    try:
        await link.run(request_iterator, no_more)
    except asyncio.CancelledError:
        # the server stops or the peer gave the call up; grpc.aio would log a cancelled servicer as an error
        link.end(None)
    finally:
        link.tell_closed()
    if link.violation is not None:
        await abort(context, link.violation)


class _GrpcListener(Listener):
    def __init__(self, server: aio.Server, address: str, own: Callable[[Awaitable[None]], None]) -> None:
        self.address = address
        self._server = server
        self._own = own

    async def close(self) -> None:
        # The server refuses new calls at once; it ends with its last link, each of which has its own deadlines.
        self._own(self._server.stop(grace=float(365 * 86400)))
        await asyncio.sleep(0)


class _SharedChannel:
    def __init__(self, address: str, channel: aio.Channel) -> None:
        self.address = address
        self.channel = channel
        self.links = 0


async def _received(call: aio.StreamStreamCall[Frame, Frame]) -> AsyncIterator[Frame]:
    """The pieces that the server sends. A stream that ends in order stands for a last piece."""
    while (frame := await call.read()) is not aio.EOF:
        yield cast(Frame, frame)
    yield Frame(last=True)


class _TunnelLink(Link):
    def __init__(
        self,
        peer: str,
        handler: LinkHandler,
        write: Callable[[Frame], Awaitable[None]],
        ping_interval_s: float,
        idle_timeout_s: float,
    ) -> None:
        self.peer = peer
        self.context = None
        self.closed = False
        self.error: DHTError | None = None
        self.violation: DHTError | None = None
        """Set where the peer's bytes broke the protocol: the peer is told."""
        self._handler = handler
        self._write = write
        self._ping_interval_s = ping_interval_s
        self._idle_timeout_s = idle_timeout_s
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._heard_at = self._loop.time()
        self._close_by: float | None = None
        self._queue: deque[memoryview] = deque()
        self._unsent_bytes = 0
        self._wake = asyncio.Event()

    # --- Link

    def send_frame(self, frame: bytes) -> None:
        if self.closed:
            raise LinkClosed(f"the link to {self.peer} is closed")
        if self._unsent_bytes and self._unsent_bytes + len(frame) > SEND_BUFFER_BYTES_MAX:
            raise Overloaded(f"{self._unsent_bytes} bytes wait for {self.peer} already")
        self._queue.append(memoryview(frame))
        self._unsent_bytes += len(frame)
        self._wake.set()

    def flush(self) -> None:
        """The writing task is awake already; grpc.aio offers no sooner way."""

    def close(self, error: DHTError | None = None) -> None:
        if self.closed:
            return
        self.closed = True
        self.error = error
        self._close_by = self._loop.time() + self._idle_timeout_s
        self._wake.set()

    # --- its life

    def end(self, error: DHTError | None) -> None:
        """The link is over; nothing more is sent. After close() the reason of that stands."""
        if not self.closed:
            self.closed = True
            self.error = error
        if not self._ended.done():
            self._ended.set_result(None)

    def tell_closed(self) -> None:
        """Once, as the last thing."""
        try:
            self._handler.link_closed(self, self.error)
        except Exception:  # noqa: BLE001  # whatever a handler raises stays with its link
            _log.exception("the handler of the link to %s failed", self.peer)

    async def run(self, incoming: AsyncIterator[Frame], no_more: Callable[[], Awaitable[None]]) -> None:
        """Carries messages until the link has ended. `no_more` ends this side's stream, after the last piece."""
        tasks = [asyncio.create_task(self._read_all(incoming)), asyncio.create_task(self._write_all(no_more))]
        for task in tasks:
            task.add_done_callback(self._task_done)
        try:
            while not self._ended.done():
                await asyncio.wait({self._ended}, timeout=self._ping_interval_s)
                self._look_for_silence()
        finally:
            self.end(LinkClosed(f"the link to {self.peer} broke"))  # where the call itself was cancelled
            await end(tasks)
            self._queue.clear()

    def _task_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a task of the link to %s failed", self.peer, exc_info=error)
            self.end(TransportError(f"the link to {self.peer} failed: {type(error).__name__}"))

    def _look_for_silence(self) -> None:
        now = self._loop.time()
        silence_s = now - self._heard_at
        if self._close_by is not None:
            if now >= self._close_by:
                self.end(None)
        elif silence_s > self._idle_timeout_s:
            self.end(LinkClosed(f"{self.peer} was silent for {silence_s:.1f} s"))
        elif silence_s >= self._ping_interval_s:
            with contextlib.suppress(TransportError, Overloaded):
                self.send_frame(_PING)

    async def _read_all(self, incoming: AsyncIterator[Frame]) -> None:
        reader = FrameReader()
        try:
            async for piece in incoming:
                self._heard_at = self._loop.time()
                for message in reader.feed(piece.data):
                    if self.closed:
                        break
                    self._received(message)
                if piece.last:
                    self.end(None)
                    return
            self.end(LinkClosed(f"{self.peer} ended its stream without closing the link"))
        except aio.AioRpcError as error:
            self.end(from_rpc_error(error))
        except (aio.BaseError, asyncio.InvalidStateError) as error:
            self.end(LinkClosed(f"the link to {self.peer} broke: {error}"))
        except DHTError as error:
            if not self.closed:
                self.violation = error
            self.end(error)

    def _received(self, message: Message) -> None:
        if message.__class__ is Ping:
            with contextlib.suppress(Overloaded):
                self.send_frame(_PONG)
        elif message.__class__ is not Pong:
            try:
                self._handler.message(self, message)
            except Exception as error:  # noqa: BLE001  # whatever a handler raises ends its link alone
                _log.exception("the handler of the link to %s failed", self.peer)
                self.close(LinkClosed(f"a message could not be handled: {type(error).__name__}"))

    async def _write_all(self, no_more: Callable[[], Awaitable[None]]) -> None:
        try:
            last = False
            while not last:
                await self._wake.wait()
                self._wake.clear()
                last = self.closed  # before the queue is emptied: close() comes after the last send
                while self._queue:
                    piece = self._next_piece()
                    await self._write(Frame(data=piece))
                    self._unsent_bytes -= len(piece)
            await self._write(Frame(last=True))
            await no_more()
        except (aio.AioRpcError, aio.BaseError, asyncio.InvalidStateError):
            return  # the call is over; why is for the reading side to tell

    def _next_piece(self) -> bytes:
        """The next bytes of the stream: as many whole frames as fit, or a part of a large one."""
        queue = self._queue
        parts = [queue.popleft()]
        size = len(parts[0])
        if size > PIECE_BYTES_MAX:
            queue.appendleft(parts[0][PIECE_BYTES_MAX:])
            parts[0] = parts[0][:PIECE_BYTES_MAX]
        while queue and (size := size + len(queue[0])) <= PIECE_BYTES_MAX:
            parts.append(queue.popleft())
        return b"".join(parts)


def _peer_name(peer: str) -> str:
    """`ipv4:127.0.0.1:50000` as the other transports write it."""
    kind, _, rest = peer.partition(":")
    return unquote(rest) if kind in ("ipv4", "ipv6") else unquote(peer)
