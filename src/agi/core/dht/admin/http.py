"""A small HTTP/1.1 server for GET and HEAD (h11 speaks the protocol): enough for probes and scrapers, no more.

It is no way into the data, and bounded: so many connections, so long a request, so long a silence.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus

import h11
import structlog

from agi.core.dht.errors import ConnectFailed
from agi.core.dht.types import format_address

_log = structlog.get_logger("agi.core.dht.http")

CONNECTIONS_MAX = 64
IDLE_TIMEOUT_S = 30.0
"""How long a connection may wait for its next request, or take to send one."""
ANSWER_TIMEOUT_S = 10.0
REQUEST_BYTES_MAX = 16 * 1024
"""Of a request's line and headers."""


@dataclass(frozen=True, slots=True)
class Answer:
    body: bytes
    content_type: str = "application/json"
    status: int = 200


Route = Callable[[], Awaitable[Answer]]


class HttpServer:
    """Answers each path by its route, until `close`."""

    def __init__(self, routes: Mapping[str, Route]) -> None:
        self._routes = routes
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self.port = 0

    async def listen(self, host: str, port: int, *, reuse_port: bool = False) -> None:
        """Raises ConnectFailed where the address cannot be bound."""
        try:
            self._server = await asyncio.start_server(
                self._accept, host or None, port, limit=REQUEST_BYTES_MAX, reuse_port=reuse_port and port != 0
            )
        except OSError as error:
            reason = error.strerror or error
            raise ConnectFailed(f"cannot listen on {format_address(host, port)} for HTTP: {reason}") from error
        self.port = int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._connections) >= CONNECTIONS_MAX:
            writer.transport.abort()
            return
        self._connections.add(task)
        try:
            await self._serve(reader, writer)
        except (OSError, TimeoutError, h11.RemoteProtocolError) as error:
            _log.debug("http_connection_ended", reason=str(error))
        finally:
            self._connections.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=REQUEST_BYTES_MAX)
        while True:
            try:
                async with asyncio.timeout(IDLE_TIMEOUT_S):
                    request = await self._request(connection, reader)
            except h11.RemoteProtocolError as error:
                await self._send(connection, writer, Answer(b"", status=error.error_status_hint), head=False)
                return
            if request is None:
                return
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                answer = await self._answer(request)
            await self._send(connection, writer, answer, head=request.method == b"HEAD")
            if connection.our_state is h11.MUST_CLOSE:
                return
            connection.start_next_cycle()

    async def _request(self, connection: h11.Connection, reader: asyncio.StreamReader) -> h11.Request | None:
        """The next request, its body skipped; None where the client has left."""
        request: h11.Request | None = None
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(REQUEST_BYTES_MAX))
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.EndOfMessage):
                return request
            elif isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
                return None

    async def _answer(self, request: h11.Request) -> Answer:
        if request.method not in (b"GET", b"HEAD"):
            return Answer(b'{"error":"only GET and HEAD"}', status=405)
        route = self._routes.get(request.target.split(b"?", 1)[0].decode("ascii", "replace"))
        if route is None:
            return Answer(b'{"error":"no such page"}', status=404)
        try:
            return await route()
        except Exception as error:  # noqa: BLE001  # a page that fails is its own failure
            _log.exception("http_page_failed", target=request.target.decode("ascii", "replace"))
            return Answer(b'{"error":"%s"}' % type(error).__name__.encode(), status=500)

    async def _send(self, connection: h11.Connection, writer: asyncio.StreamWriter, answer: Answer, head: bool) -> None:
        headers = [
            ("content-type", answer.content_type),
            ("content-length", str(len(answer.body))),
            ("cache-control", "no-store"),
        ]
        if connection.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            reason = HTTPStatus(answer.status).phrase.encode()
            out = [connection.send(h11.Response(status_code=answer.status, headers=headers, reason=reason))]
            if not head:
                out.append(connection.send(h11.Data(data=answer.body)))
            out.append(connection.send(h11.EndOfMessage()))
            writer.write(b"".join(part for part in out if part))
            async with asyncio.timeout(IDLE_TIMEOUT_S):
                await writer.drain()
