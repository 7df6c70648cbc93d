"""What the transport suite needs of each wire: transports, free addresses, and peers that misbehave."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import msgspec
from grpc import aio

from agi.core.dht.errors import DHTError
from agi.core.dht.proto.dht_pb2 import Frame
from agi.core.dht.proto.dht_pb2_grpc import DHTStub
from agi.core.dht.protocol.messages import Message, Put, Query
from agi.core.dht.transport.base import Link, Listener, Transport
from agi.core.dht.transport.codec import FrameReader
from agi.core.dht.transport.grpc import CHANNEL_OPTIONS, SERVER_OPTIONS, SERVICE_NAME, GrpcTransport
from agi.core.dht.transport.memory import MemoryNetwork, MemoryTransport
from agi.core.dht.transport.native import NativeTransport

DEADLINE_S = 20.0
"""For whatever a test waits for; far above what it takes."""
PATIENT = {"ping_interval_s": 5.0, "idle_timeout_s": 60.0}
"""Timeouts that play no part in a test."""
HASTY = {"ping_interval_s": 0.05, "idle_timeout_s": 0.4}
STALL_S = 1.0


def question(number: int) -> Query:
    return Query(id=number, what="status", timeout_ms=1000)


def large(number: int, size: int) -> Put:
    return Put(id=number, consistency=1, timeout_ms=1000, keys=[b"k"], values=[bytes([number % 251]) * size])


class Recorder:
    """A LinkHandler that keeps what it hears."""

    def __init__(self, answer: Callable[[Link, Any], None] | None = None) -> None:
        self.heard: list[tuple[Link, Any]] = []
        self.closed: list[tuple[Link, DHTError | None]] = []
        self.after_close: list[tuple[Link, Any]] = []
        self._answer = answer
        self._changed = asyncio.Event()

    def message(self, link: Link, message: msgspec.Struct) -> None:
        self.heard.append((link, message))
        if any(link is closed for closed, _ in self.closed):
            self.after_close.append((link, message))
        self._changed.set()
        if self._answer is not None:
            self._answer(link, message)

    def link_closed(self, link: Link, error: DHTError | None) -> None:
        self.closed.append((link, error))
        self._changed.set()

    def ids(self, link: Link | None = None) -> list[int]:
        return [message.id for heard, message in self.heard if link is None or heard is link]

    def errors(self, link: Link) -> list[DHTError | None]:
        """One entry for each time that the link's end was told."""
        return [error for closed, error in self.closed if closed is link]

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


async def until(condition: Callable[[], object]) -> None:
    """For what no Recorder hears of."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110  # nobody could set an event
            await asyncio.sleep(0.005)


class StalledPeer:
    """Takes a link, answers nothing, and reads nothing before it is resumed."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.resumed = asyncio.Event()
        self.received: list[Message] = []


class Wire(abc.ABC):
    """One kind of transport. `stack` closes whatever a test opened."""

    def __init__(self, tmp_path: Path, stack: contextlib.AsyncExitStack) -> None:
        self.tmp_path = tmp_path
        self.stack = stack
        self.links: list[tuple[Link, Recorder]] = []

    @abc.abstractmethod
    def transport(self, host: str, **timeouts: float) -> Transport: ...

    @abc.abstractmethod
    def free_address(self) -> str:
        """To listen on."""

    @abc.abstractmethod
    async def nobody(self) -> str:
        """An address that nobody listens on."""

    @abc.abstractmethod
    async def stalled_peer(self) -> StalledPeer: ...

    async def black_hole(self) -> str:
        """An address that never answers."""
        raise NotImplementedError

    async def connect_to_silent(self, transport: Transport, handler: Recorder) -> Link:
        """A link whose other side says nothing, not even pong."""
        return await self.connect(transport, (await self.stalled_peer()).address, handler)

    async def throw(self, address: str, data: bytes) -> None:
        """Sends raw bytes to a listener and returns when it has ended the connection."""
        raise NotImplementedError

    async def listen(self, handler: Recorder, transport: Transport | None = None) -> Listener:
        transport = transport or self.transport("server", **PATIENT)
        listener = await transport.listen(self.free_address(), handler)
        self.stack.push_async_callback(listener.close)
        return listener

    async def connect(self, transport: Transport, address: str, handler: Recorder, **kwargs: float) -> Link:
        link = await transport.connect(address, handler, **kwargs)
        self.links.append((link, handler))
        return link

    async def pair(
        self,
        answer: Callable[[Link, Any], None] | None = None,
        client: Mapping[str, float] = PATIENT,
        server: Mapping[str, float] = PATIENT,
    ) -> Pair:
        """Two linked sides with these timeouts. The first message, with id 0, has passed."""
        hears = Recorder(answer)
        listener = await self.listen(hears, self.transport("server", **server))
        return await self.another(Pair(self.transport("client", **client), listener, Recorder(), hears))

    async def another(self, pair: Pair) -> Pair:
        """A further link between the same two sides."""
        link = await self.connect(pair.transport, pair.listener.address, pair.client)
        before = len(pair.server.heard)
        link.send(question(0))
        await pair.server.until(lambda: len(pair.server.heard) > before)
        far = pair.server.heard[before][0]
        self.links.append((far, pair.server))
        return Pair(pair.transport, pair.listener, pair.client, pair.server, link, far)

    async def end(self) -> None:
        """Closes every link, and fails if one of them does not tell so."""
        for link, _ in self.links:
            link.close()
        for link, handler in self.links:
            await handler.until(lambda link=link, handler=handler: handler.errors(link))


class Pair:
    def __init__(
        self,
        transport: Transport,
        listener: Listener,
        client: Recorder,
        server: Recorder,
        link: Link | None = None,
        far: Link | None = None,
    ) -> None:
        self.transport = transport
        self.listener = listener
        self.client = client
        self.server = server
        self._link = link
        self._far = far

    @property
    def link(self) -> Link:
        """The client's end."""
        assert self._link is not None
        return self._link

    @property
    def far(self) -> Link:
        """The server's end."""
        assert self._far is not None
        return self._far


class _SocketWire(Wire):
    """What TCP and Unix sockets share."""

    family: int

    def transport(self, host: str, **timeouts: float) -> Transport:
        return NativeTransport(**timeouts)

    def listening_socket(self, backlog: int = 8) -> tuple[socket.socket, str]:
        sock = socket.socket(self.family)
        sock.setblocking(False)
        self.stack.callback(sock.close)
        address = self._bind(sock)
        sock.listen(backlog)
        return sock, address

    @abc.abstractmethod
    def _bind(self, sock: socket.socket) -> str: ...

    @abc.abstractmethod
    def _target(self, address: str) -> Any: ...

    async def stalled_peer(self) -> StalledPeer:
        sock, address = self.listening_socket()
        peer = StalledPeer(address)
        task = asyncio.create_task(self._stall(sock, peer))
        self.stack.push_async_callback(_stop, task)
        return peer

    async def _stall(self, sock: socket.socket, peer: StalledPeer) -> None:
        loop = asyncio.get_running_loop()
        taken, _ = await loop.sock_accept(sock)
        with taken:
            await peer.resumed.wait()
            reader = FrameReader()
            while data := await loop.sock_recv(taken, 1 << 20):
                peer.received += reader.feed(data)

    async def throw(self, address: str, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        with socket.socket(self.family) as sock:
            sock.setblocking(False)
            await loop.sock_connect(sock, self._target(address))
            await loop.sock_sendall(sock, data)
            async with asyncio.timeout(DEADLINE_S):
                with contextlib.suppress(ConnectionResetError):
                    while await loop.sock_recv(sock, 65536):
                        pass


class NativeTcp(_SocketWire):
    family = socket.AF_INET

    def free_address(self) -> str:
        return "127.0.0.1:0"

    def _bind(self, sock: socket.socket) -> str:
        sock.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{sock.getsockname()[1]}"

    def _target(self, address: str) -> Any:
        host, _, port = address.rpartition(":")
        return host, int(port)

    async def nobody(self) -> str:
        sock = socket.socket(self.family)  # bound and not listening: refused, and nobody else can take the port
        self.stack.callback(sock.close)
        return self._bind(sock)

    async def black_hole(self) -> str:
        # A listener whose queue is full drops what else knocks.
        _, address = self.listening_socket(backlog=0)
        loop = asyncio.get_running_loop()
        for _ in range(16):
            sock = socket.socket(self.family)
            sock.setblocking(False)
            self.stack.callback(sock.close)
            try:
                await asyncio.wait_for(loop.sock_connect(sock, self._target(address)), 0.3)
            except TimeoutError:
                return address
        raise AssertionError("the listen queue does not fill up")


class NativeUnix(_SocketWire):
    family = socket.AF_UNIX
    _count = 0

    def free_address(self) -> str:
        self._count += 1
        return f"unix:{self.tmp_path}/{self._count}.sock"

    def _bind(self, sock: socket.socket) -> str:
        address = self.free_address()
        sock.bind(address[5:])
        return address

    def _target(self, address: str) -> Any:
        return address[5:]

    async def nobody(self) -> str:
        return self.free_address()


class Grpc(NativeTcp):
    """The tunnel. It shares TCP's addresses and black hole; its own misbehaving peers speak gRPC."""

    def transport(self, host: str, **timeouts: float) -> Transport:
        return GrpcTransport(**timeouts)

    async def stalled_peer(self) -> StalledPeer:
        server = aio.server(options=SERVER_OPTIONS)
        peer = StalledPeer("")

        async def exchange(incoming: AsyncIterator[Frame], context: aio.ServicerContext[Frame, Frame]) -> None:
            await context.send_initial_metadata(())
            await peer.resumed.wait()
            reader = FrameReader()
            async for piece in incoming:
                peer.received += reader.feed(piece.data)
                if piece.last:
                    return

        method = grpc.stream_stream_rpc_method_handler(exchange, Frame.FromString, Frame.SerializeToString)
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE_NAME, {"Exchange": method})])
        peer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        self.stack.push_async_callback(server.stop, None)
        return peer

    async def throw(self, address: str, data: bytes) -> None:
        async with aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
            call = DHTStub(channel).Exchange(timeout=DEADLINE_S)
            await call.write(Frame(data=data))
            with contextlib.suppress(aio.AioRpcError):
                while await call.read() is not aio.EOF:
                    pass


class Memory(Wire):
    def __init__(self, tmp_path: Path, stack: contextlib.AsyncExitStack) -> None:
        super().__init__(tmp_path, stack)
        self.network = MemoryNetwork()

    def transport(self, host: str, **timeouts: float) -> Transport:
        return MemoryTransport(self.network, host, **timeouts)

    def free_address(self) -> str:
        return "server:0"

    async def nobody(self) -> str:
        return "server:7000"

    async def black_hole(self) -> str:
        self.network.can_connect = lambda src, dst: dst != "nowhere"
        return "nowhere:7000"

    async def stalled_peer(self) -> StalledPeer:
        # What is under way stands for what a peer has not read; resuming is the passing of time.
        recorder = Recorder(lambda link, message: peer.received.append(message))
        peer = StalledPeer((await self.listen(recorder)).address)
        self.network.policy = lambda src, dst, message: [STALL_S] if not peer.resumed.is_set() else [0.0]
        return peer

    async def connect_to_silent(self, transport: Transport, handler: Recorder) -> Link:
        listener = await self.listen(Recorder())
        link = await self.connect(transport, listener.address, handler)
        self.network.crash("server")
        return link


WIRES: dict[str, type[Wire]] = {
    "native-tcp": NativeTcp,
    "native-unix": NativeUnix,
    "grpc": Grpc,
    "memory": Memory,
}


async def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, OSError):
        await task
