"""The gRPC service of dht.proto in front of one node.

A thin layer: it checks a request, hands it to the node's coordinator or scanner as the message that a native client
would have sent, waits for the reply and puts it into protobuf. A call costs one future. Its deadline is the gRPC
deadline less a margin, so that an error of ours, which says how far the call fell short, is there before gRPC's own.

Writes are named for the coordinator's table of requests (protocol/dedup.py) by the caller's (client_id, sequence), else
by a number of their own. gRPC callers do not say whether they repeat a call: one under a known name takes part in the
write that is under way, or gets its answer, except where that write failed as a whole and nothing of it was stored.

Writes with a condition or a fence, and counters, go to the coordinator as operations under consensus, which are known
by their name at every node. What took effect is remembered here beyond that, and what may have is tried again as such.
Reads with a fence are such operations too, without a name of the caller's: to make one twice does no harm.

A cancelled call leaves its write under way: it may happen all the same.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar, cast

import msgspec
import structlog
import xxhash
from google.protobuf.message import DecodeError
from grpc import aio
from grpc_health.v1 import health
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_reflection.v1alpha import reflection

from agi.core.dht.coordinator import Coordinator
from agi.core.dht.errors import (
    DHTError,
    FenceRejected,
    InvalidRequest,
    NotACounter,
    NotReady,
    OutcomeUnknown,
    Overloaded,
    Unavailable,
    VersionConflict,
    WrongFence,
    from_wire,
)
from agi.core.dht.node import Node
from agi.core.dht.proto import dht_pb2 as pb
from agi.core.dht.proto.dht_pb2_grpc import DHTServicer, add_DHTServicer_to_server
from agi.core.dht.protocol import messages
from agi.core.dht.protocol.consensus import LOOK, NAME_BYTES
from agi.core.dht.protocol.dedup import RequestTable
from agi.core.dht.protocol.record import HEADER
from agi.core.dht.reads import TRUNCATED
from agi.core.dht.requests import TIMEOUT_MS_MAX
from agi.core.dht.service_health import Health
from agi.core.dht.service_messages import (
    Batch,
    Conditional,
    Context,
    TolerantServer,
    client_name,
    cursor_of,
    decided,
    is_conditional,
    level_of,
    operation_of,
    raise_first,
    range_of,
    record_of,
    result_of,
    resume_at,
    trace_of,
    ttl_ms_of,
)
from agi.core.dht.transport.grpc import SERVICE_NAME, serve_exchange
from agi.core.dht.transport.grpc_status import abort
from agi.core.dht.types import PROTOCOL_VERSION, SCAN_LIMIT_MAX, Consistency, check_value, encode_key

_log = structlog.get_logger("agi.core.dht.service")

CALLS_MAX = 1024
"""Calls under way (without Exchange); past it callers get Overloaded."""
REPLY_BYTES_MAX = 3 * 1024 * 1024
"""Of records in one response, unless one alone is larger: gRPC clients take 4 MiB unless they are told otherwise, and
what is around the records needs room too."""
ENTRY_BYTES = 24
"""What a record in a response is counted for beyond its packed bytes and its key."""
MARGIN_MS_MAX = 150
"""By how much a request's deadline is before its call's; a quarter of short ones."""
LAST_ANSWER_S = 0.09
"""How long before the deadline a call that still has no answer fails; a fifth of short ones."""
HEALTH_POLL_S = 0.2
_DECIDED = frozenset((VersionConflict.code, NotACounter.code, WrongFence.code, FenceRejected.code))
"""Errors that only come once it is certain that no earlier try took effect."""

Request = TypeVar("Request")
Response = TypeVar("Response")


class Call:
    """What a call brought along besides its request."""

    __slots__ = ("number", "patience_s", "timeout_ms", "trace")

    def __init__(self, number: int, left_ms: float, trace: str) -> None:
        self.number = number
        self.timeout_ms = max(1, int(left_ms - min(MARGIN_MS_MAX, left_ms / 4)))
        self.patience_s = left_ms / 1000 - min(LAST_ANSWER_S, left_ms / 5000)
        self.trace = trace


class Tried:
    """An operation under consensus that came here: what it asks for, the calls that wait for it, and its result once it
    took effect. `unknown`: it may have, so that the next try has to look."""

    __slots__ = ("content", "result", "under_way", "unknown", "waiting")

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.result: messages.OpResult | None = None
        self.under_way = False
        self.unknown = False
        self.waiting: list[asyncio.Future[messages.OpResult]] = []


class Service(DHTServicer):
    """Serves one node's gRPC port: `register`, then `start` and `stop` around the life of the node.

    Args:
        on_failed: told when the background task ended by an error.
    """

    def __init__(self, node: Node, on_failed: Callable[[DHTError], None]) -> None:
        self._node = node
        self._on_failed = on_failed
        self._started_at_ms = node.clock.wall_ms()
        self._version = _program_version()
        self._name = f"grpc-{secrets.token_hex(8)}"
        """As a client of the coordinator, for callers that give no name: nobody else writes under it."""
        self._under_way = 0
        self._numbers = 0
        self._waiting: dict[asyncio.Future[Any], type[DHTError]] = {}
        self._writes: dict[tuple[str, int], list[asyncio.Future[Any]]] = {}
        """Calls that wait for each write, by its name; several where a caller repeated it."""
        self._tried: RequestTable[Tried] = RequestTable(node.config.requests.dedup_entries)
        self._health = Health(("", SERVICE_NAME))
        self._poll: asyncio.Task[None] | None = None
        self._debug = node.config.observability.log_level == "debug"
        """Then every request is logged with its correlation id."""

    # --- life

    def register(self, server: aio.Server) -> None:
        """Adds this service, health and reflection to a server that has not started yet."""
        add_DHTServicer_to_server(self, cast(aio.Server, TolerantServer(server)))
        add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server)

    def start(self) -> None:
        """Health follows the node's readiness from now on."""
        self._poll = asyncio.get_running_loop().create_task(self._follow(), name="health")
        self._poll.add_done_callback(self._poll_ended)

    def withdraw(self) -> None:
        """The node is about to stop: its health says so before it refuses anything."""
        self._health.close()

    async def stop(self) -> None:
        """After the node has stopped: calls that still wait fail, since nobody will answer them."""
        self._health.close()
        if self._poll is not None:
            self._poll.cancel()
            await asyncio.gather(self._poll, return_exceptions=True)
        for future, kind in list(self._waiting.items()):
            if not future.done():
                future.set_exception(kind(f"{self._node.node_id} stopped before there was an answer"))

    async def _follow(self) -> None:
        while True:
            self._health.set(not self._node.waiting_for)
            await asyncio.sleep(HEALTH_POLL_S)

    def _poll_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.critical("background_task_failed", task=task.get_name(), error=repr(error), exc_info=error)
            self._on_failed(DHTError(f"{task.get_name()} failed: {error!r}"))

    # --- the contract's methods

    async def Get(self, request: pb.GetRequest, context: Context) -> pb.GetResponse:
        return await self._serve(self._get, request, context)

    async def Put(self, request: pb.PutRequest, context: Context) -> pb.PutResponse:
        return await self._serve(self._put, request, context)

    async def Delete(self, request: pb.DeleteRequest, context: Context) -> pb.DeleteResponse:
        return await self._serve(self._delete, request, context)

    async def CompareAndSet(self, request: pb.CompareAndSetRequest, context: Context) -> pb.CompareAndSetResponse:
        return await self._serve(self._compare_and_set, request, context)

    async def Increment(self, request: pb.IncrementRequest, context: Context) -> pb.IncrementResponse:
        return await self._serve(self._increment, request, context)

    async def Scan(self, request: pb.ScanRequest, context: Context) -> pb.ScanResponse:
        return await self._serve(self._scan, request, context)

    async def BatchGet(self, request: pb.BatchGetRequest, context: Context) -> pb.BatchGetResponse:
        return await self._serve(self._batch_get, request, context)

    async def BatchPut(self, request: pb.BatchPutRequest, context: Context) -> pb.BatchPutResponse:
        return await self._serve(self._batch_put, request, context)

    async def BatchDelete(self, request: pb.BatchDeleteRequest, context: Context) -> pb.BatchDeleteResponse:
        return await self._serve(self._batch_delete, request, context)

    async def GetTopology(self, request: pb.GetTopologyRequest, context: Context) -> pb.GetTopologyResponse:
        return await self._serve(self._topology, request, context)

    async def Locate(self, request: pb.LocateRequest, context: Context) -> pb.LocateResponse:
        return await self._serve(self._locate, request, context)

    async def Status(self, request: pb.StatusRequest, context: Context) -> pb.StatusResponse:
        return await self._serve(self._status, request, context)

    async def Exchange(  # type: ignore[override]  # writes through its context
        self, request_iterator: AsyncIterator[pb.Frame], context: Context
    ) -> None:
        await serve_exchange(self._node, request_iterator, context)

    async def _serve(
        self, work: Callable[[Request, Call], Awaitable[Response]], request: Request, context: Context
    ) -> Response:
        """The response, or the end of the call by a typed error."""
        if self._under_way >= CALLS_MAX:
            await abort(context, Overloaded(f"{CALLS_MAX} calls are under way at {self._node.node_id} already"))
        self._under_way += 1
        try:
            if isinstance(request, DecodeError):
                raise InvalidRequest(f"the request cannot be read: {request}")
            return await work(request, self._call(context))
        except DHTError as error:
            await abort(context, error)
        finally:
            self._under_way -= 1

    def _call(self, context: Context) -> Call:
        left_s = context.time_remaining()
        left_ms = self._node.config.network.timeout_ms if left_s is None else min(left_s * 1000, TIMEOUT_MS_MAX)
        self._numbers += 1
        return Call(self._numbers, left_ms, trace_of(context))

    # --- single keys

    async def _get(self, request: pb.GetRequest, call: Call) -> pb.GetResponse:
        keys, level = [encode_key(request.key)], self._read_level(request.consistency)
        if request.HasField("fence"):
            op = operation_of(request)
            op.name = secrets.token_bytes(NAME_BYTES)
            trace = call.trace or f"{self._name}:{call.number}"
            record = (await self._operate(op, Tried(b""), trace, call)).record
        else:
            reply = await self._read(keys, level, call)
            raise_first(reply.errors)
            record = reply.records[0]
        return pb.GetResponse() if record is None else pb.GetResponse(found=True, record=record_of(record))

    async def _put(self, request: pb.PutRequest, call: Call) -> pb.PutResponse:
        keys, values = [encode_key(request.key)], [check_value(request.value)]
        level, ttl_ms = self._write_level(request.consistency), ttl_ms_of(request.ttl_ms)
        if is_conditional(request):
            return pb.PutResponse(version=(await self._update(request, call)).version)
        reply = await self._write(messages.Put(0, level, call.timeout_ms, keys, values, ttl_ms), request, call)
        assert isinstance(reply, messages.PutReply)
        raise_first(reply.errors)
        return pb.PutResponse(version=reply.versions[0])

    async def _delete(self, request: pb.DeleteRequest, call: Call) -> pb.DeleteResponse:
        keys, level = [encode_key(request.key)], self._write_level(request.consistency)
        if is_conditional(request):
            return pb.DeleteResponse(existed=bool((await self._update(request, call)).number))
        reply = await self._write(messages.Delete(0, level, call.timeout_ms, keys), request, call)
        assert isinstance(reply, messages.DeleteReply)
        raise_first(reply.errors)
        return pb.DeleteResponse(existed=reply.existed[0])

    async def _compare_and_set(self, request: pb.CompareAndSetRequest, call: Call) -> pb.CompareAndSetResponse:
        return pb.CompareAndSetResponse(version=(await self._update(request, call)).version)

    async def _increment(self, request: pb.IncrementRequest, call: Call) -> pb.IncrementResponse:
        result = await self._update(request, call)
        return pb.IncrementResponse(value=result.number, version=result.version)

    # --- batches

    async def _batch_get(self, request: pb.BatchGetRequest, call: Call) -> pb.BatchGetResponse:
        level, batch = self._read_level(request.consistency), Batch(request.keys)
        records: Sequence[bytes | None] = ()
        if batch.keys:
            reply = await self._read(batch.keys, level, call)
            batch.failed(reply.errors)
            records = reply.records
        found = dict(zip(batch.places, records, strict=True))
        results = []
        size, cut = 0, False
        for place in range(batch.size):
            detail, record = batch.details.get(place), found.get(place)
            if detail is None and record is not None:
                cut = cut or (size > 0 and size + len(record) + ENTRY_BYTES > REPLY_BYTES_MAX)
                if cut:
                    detail = batch.detail(TRUNCATED.to_wire())
            if detail is not None:
                results.append(pb.BatchGetResponse.Result(error=detail))
            elif record is None:
                results.append(pb.BatchGetResponse.Result())
            else:
                size += len(record) + ENTRY_BYTES
                results.append(pb.BatchGetResponse.Result(found=True, record=record_of(record)))
        return pb.BatchGetResponse(results=results)

    async def _batch_put(self, request: pb.BatchPutRequest, call: Call) -> pb.BatchPutResponse:
        level, ttl_ms = self._write_level(request.consistency), ttl_ms_of(request.ttl_ms)
        batch = Batch([entry.key for entry in request.entries], [entry.value for entry in request.entries])
        done: dict[int, int] = {}
        if batch.keys:
            put = messages.Put(0, level, call.timeout_ms, batch.keys, batch.values, ttl_ms)
            reply = await self._write(put, request, call)
            assert isinstance(reply, messages.PutReply)
            batch.failed(reply.errors)
            done = dict(zip(batch.places, reply.versions, strict=True))
        result, details = pb.BatchPutResponse.Result, batch.details
        return pb.BatchPutResponse(
            results=[
                result(error=details[place]) if place in details else result(version=done[place])
                for place in range(batch.size)
            ]
        )

    async def _batch_delete(self, request: pb.BatchDeleteRequest, call: Call) -> pb.BatchDeleteResponse:
        level, batch = self._write_level(request.consistency), Batch(request.keys)
        done: dict[int, bool] = {}
        if batch.keys:
            reply = await self._write(messages.Delete(0, level, call.timeout_ms, batch.keys), request, call)
            assert isinstance(reply, messages.DeleteReply)
            batch.failed(reply.errors)
            done = dict(zip(batch.places, reply.existed, strict=True))
        result, details = pb.BatchDeleteResponse.Result, batch.details
        return pb.BatchDeleteResponse(
            results=[
                result(error=details[place]) if place in details else result(existed=done[place])
                for place in range(batch.size)
            ]
        )

    # --- scans

    async def _scan(self, request: pb.ScanRequest, call: Call) -> pb.ScanResponse:
        low, high = range_of(request)
        level = self._read_level(request.consistency)
        start = resume_at(request.cursor, low, high) if request.cursor else low
        self._ready()
        scanner = self._node.scanner
        assert scanner is not None
        reply: asyncio.Future[messages.ScanReply] = asyncio.get_running_loop().create_future()
        limit = request.limit or SCAN_LIMIT_MAX
        # with their values even for keys_only: the times and versions are wanted
        scan = messages.Scan(call.number, level, call.timeout_ms, start, high, limit)
        trace = call.trace or f"{self._name}:{call.number}"
        if self._debug:
            _log.debug("scan", trace=trace, limit=limit)
        scanner.scan(scan, partial(_settle, reply), trace)
        page = await self._answer(reply, Unavailable, call)
        if page.error is not None:
            raise from_wire(*page.error)
        response = pb.ScanResponse()
        size, following = 0, page.next
        for key, record in zip(page.keys, page.records, strict=True):
            size += ENTRY_BYTES + len(key) + (HEADER if request.keys_only else len(record))
            if size > REPLY_BYTES_MAX and response.entries:
                following = key
                break
            # a foreign writer of the native wire may have written a key that is no UTF-8
            text = key.decode(errors="replace")
            response.entries.add(key=text, record=record_of(record, keys_only=request.keys_only))
        if following:
            response.next_cursor = cursor_of(following, low, high)
        return response

    # --- the cluster

    async def _topology(self, request: pb.GetTopologyRequest, call: Call) -> pb.GetTopologyResponse:
        self._ready()
        answer: Mapping[str, Any] = self._node.queries.topology()
        nodes = [
            pb.Node(
                node_id=member["node_id"],
                address=member["address"],
                data_address=member["data_address"],
                http_address=member["http_address"],
                weight=member["weight"],
                virtual_nodes=answer["virtual_nodes"],
                metadata={label: member[label] for label in ("rack", "zone") if member[label]},
            )
            for member in answer["members"]
        ]
        return pb.GetTopologyResponse(
            cluster=answer["cluster"],
            epoch=answer["epoch"],
            replication_factor=answer["factor"],
            hash_algorithm=answer["hash_algorithm"],
            nodes=nodes,
        )

    async def _locate(self, request: pb.LocateRequest, call: Call) -> pb.LocateResponse:
        key = encode_key(request.key)
        self._ready()
        ring, topology = self._node.ring, self._node.topology
        assert ring is not None and topology is not None
        replicas = ring.preference(key, topology.replica_count)
        return pb.LocateResponse(token=ring.token(key), node_ids=replicas, epoch=topology.epoch)

    async def _status(self, request: pb.StatusRequest, call: Call) -> pb.StatusResponse:
        node = self._node
        reason, topology = node.waiting_for, node.topology
        replicas = topology.replica_count if topology is not None else 1
        return pb.StatusResponse(
            node_id=node.node_id,
            cluster=node.config.cluster.name,
            program_version=self._version,
            protocol_version=PROTOCOL_VERSION,
            ready=not reason,
            reason=reason,
            epoch=topology.epoch if topology is not None else 0,
            replication_factor=node.config.replication.factor,
            failures_tolerated=replicas - Consistency.QUORUM.needed(replicas),
            started_at_ms=self._started_at_ms,
            peers=[
                pb.StatusResponse.Peer(
                    node_id=name,
                    address=peer.member.address,
                    connected=name in node.peers.connected,
                    status=pb.MemberStatus.Value(f"MEMBER_STATUS_{node.detector.status(name).name}"),
                )
                for name, peer in sorted(node.peers.all.items())
            ],
        )

    # --- to the coordinator and back

    def _ready(self) -> Coordinator:
        """Raises NotReady."""
        node = self._node
        if node.coordinator is None or not node.serving:
            raise NotReady(f"{node.node_id} is not ready: {node.waiting_for}")
        return node.coordinator

    def _read_level(self, given: int) -> Consistency:
        return level_of(given) or self._node.config.replication.read_consistency

    def _write_level(self, given: int) -> Consistency:
        return level_of(given) or self._node.config.replication.write_consistency

    async def _read(self, keys: list[bytes], level: Consistency, call: Call) -> messages.GetReply:
        coordinator = self._ready()
        reply: asyncio.Future[messages.GetReply] = asyncio.get_running_loop().create_future()
        get = messages.Get(call.number, level, call.timeout_ms, keys)
        trace = call.trace or f"{self._name}:{call.number}"
        if self._debug:
            _log.debug("get", trace=trace, keys=len(keys))
        coordinator.get(get, partial(_settle, reply), trace)
        answer = await self._answer(reply, Unavailable, call)
        if answer.error is not None:
            raise from_wire(*answer.error)
        return answer

    async def _write(
        self,
        write: messages.Put | messages.Delete,
        request: pb.PutRequest | pb.DeleteRequest | pb.BatchPutRequest | pb.BatchDeleteRequest,
        call: Call,
    ) -> messages.PutReply | messages.DeleteReply:
        """The reply to a write, which is named here. It is of the right kind and has a result for each key."""
        if isinstance(request, pb.PutRequest | pb.DeleteRequest) and request.retry:
            raise InvalidRequest("retry is for writes with a condition or a fence: a plain one has no way to tell")
        client, write.id = self._named(request, call)
        coordinator = self._ready()
        future: asyncio.Future[messages.PutReply | messages.DeleteReply] = asyncio.get_running_loop().create_future()
        name = (client, write.id)
        same = self._writes.get(name)
        if same is not None:
            same.append(future)
            self._node.metrics.retries_deduplicated += 1
        else:
            coordinator.try_again(*name)
            same = self._writes[name] = [future]
            trace = call.trace or f"{client}:{write.id}"
            if self._debug:
                _log.debug(type(write).__name__.lower(), trace=trace, keys=len(write.keys))
            start = coordinator.put if isinstance(write, messages.Put) else coordinator.delete
            start(write, partial(self._written, name), client, trace)  # type: ignore[arg-type]  # as its kind
        try:
            reply = await self._answer(future, OutcomeUnknown, call)
        finally:
            same.remove(future)
        if reply.error is not None:
            raise from_wire(*reply.error)
        results = reply.versions if isinstance(reply, messages.PutReply) else reply.existed
        if isinstance(reply, messages.PutReply) != isinstance(write, messages.Put) or len(results) != len(write.keys):
            raise InvalidRequest("this client_id and sequence named another write before")
        return reply

    def _named(self, request: Conditional | pb.BatchPutRequest | pb.BatchDeleteRequest, call: Call) -> tuple[str, int]:
        """Client and number of a write: the caller's, or of its own."""
        if not request.client_id:
            return self._name, call.number
        if not request.sequence:
            raise InvalidRequest("a write with a client_id has a sequence of its own, from 1")
        return client_name(request.client_id), request.sequence

    async def _update(self, request: Conditional, call: Call) -> messages.OpResult:
        """The result of an operation under consensus, which is named here. Raises its error."""
        op = operation_of(request)
        client, number = self._named(request, call)
        if request.retry and not request.client_id:
            raise InvalidRequest("only a call with a client_id and a sequence can be told to be a retry")
        self._ready()
        tried = Tried(b"")
        if request.client_id:
            tried = self._known(client, number, xxhash.xxh3_128_digest(msgspec.msgpack.encode(op)))
            op.name = xxhash.xxh3_128_digest(f"{client}:{number}".encode())
            op.retry = request.retry or tried.unknown
        else:
            op.name = secrets.token_bytes(NAME_BYTES)
        if tried.result is not None:
            return tried.result
        return await self._operate(op, tried, call.trace or f"{client}:{number}", call)

    async def _operate(self, op: messages.Op, tried: Tried, trace: str, call: Call) -> messages.OpResult:
        """The result of a named operation; a try that is under way is shared. Raises its error."""
        coordinator = self._ready()
        future: asyncio.Future[messages.OpResult] = asyncio.get_running_loop().create_future()
        tried.waiting.append(future)
        if not tried.under_way:
            tried.under_way = True
            if self._debug:
                _log.debug("update", trace=trace, operation=op.name.hex(), retry=op.retry)
            update = messages.Update(call.number, call.timeout_ms, [op])
            coordinator.update(update, partial(self._updated, tried), self._name)
        otherwise = Unavailable if op.kind == LOOK else OutcomeUnknown  # a look may be repeated blindly
        try:
            return decided(await self._answer(future, otherwise, call))
        finally:
            tried.waiting.remove(future)

    def _known(self, client: str, number: int, content: bytes) -> Tried:
        """What is known here of the operation that has this name."""
        tried = self._tried.get(client, number)
        if tried is None:
            tried = Tried(content)
            self._tried.add(client, number, tried, 1)
        elif tried.content != content:
            raise InvalidRequest("this client_id and sequence named another write before")
        elif tried.result is not None or tried.under_way:
            self._node.metrics.retries_deduplicated += 1
        return tried

    def _updated(self, tried: Tried, reply: messages.Message) -> None:
        assert isinstance(reply, messages.UpdateReply)
        result = result_of(reply)
        tried.under_way = False
        if result.error is None:
            tried.result = result
        elif result.error[0] == OutcomeUnknown.code:
            tried.unknown = True
        elif result.error[0] in _DECIDED:
            tried.unknown = False
        for future in tried.waiting:
            if not future.done():  # its caller may be gone
                future.set_result(result)

    def _written(self, name: tuple[str, int], reply: messages.Message) -> None:
        for future in self._writes.pop(name):
            _settle(future, reply)

    async def _answer(self, future: asyncio.Future[Response], otherwise: type[DHTError], call: Call) -> Response:
        """The reply, or an error of the kind `otherwise` shortly before the deadline of the call."""
        late = asyncio.get_running_loop().call_later(call.patience_s, self._late, future, otherwise)
        self._waiting[future] = otherwise
        try:
            return await future
        finally:
            late.cancel()
            del self._waiting[future]

    def _late(self, future: asyncio.Future[Any], kind: type[DHTError]) -> None:
        """The coordinator has a better error, with numbers, if its own deadline has passed."""
        if self._node.coordinator is not None and not self._node.stopping:
            self._node.coordinator.advance(self._node.clock.monotonic())
        if not future.done():
            future.set_exception(kind("no answer by the deadline"))


def _settle(future: asyncio.Future[Any], reply: messages.Message) -> None:
    if not future.done():  # the caller may be gone
        future.set_result(reply)


def _program_version() -> str:
    try:
        return version("agi-hpc")
    except PackageNotFoundError:  # run from a checkout without an installation
        return "unknown"
