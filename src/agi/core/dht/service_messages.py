"""What requests of the gRPC service say, checked, and what its responses are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import grpc
import xxhash
from google.protobuf.message import DecodeError, Message
from grpc import aio

from agi.core.dht.errors import InvalidConsistency, InvalidRequest, InvalidTTL, VersionConflict, from_wire
from agi.core.dht.proto import dht_pb2 as pb
from agi.core.dht.protocol.consensus import ADD, IF_ABSENT, IF_EQUALS, IF_VERSION, LOOK, PUT, REMOVE
from agi.core.dht.protocol.messages import KeyError_, Op, OpResult, UpdateReply, WireError
from agi.core.dht.protocol.record import HEADER, created_ms_of, expires_ms_of, hlc_of
from agi.core.dht.transport.grpc_status import error_detail
from agi.core.dht.types import KEY_BYTES_MAX, TTL_MS_MAX, Consistency, Fence, check_value, encode_key, lock_key

BATCH_KEYS_MAX = 10_000
"""Keys of one batch, so that its results fit a message even if each of them is an error."""
KEY_ERROR_CHARS_MAX = 256
"""Of the text of a single key's error."""
CLIENT_ID_BYTES_MAX = 128
TRACE_CHARS_MAX = 128
TRACE_METADATA_KEY = "x-correlation-id"

Context: TypeAlias = "aio.ServicerContext[Any, Any]"
Conditional: TypeAlias = "pb.PutRequest | pb.DeleteRequest | pb.CompareAndSetRequest | pb.IncrementRequest"
"""What goes through consensus: all of the latter two, and of the others those that have a condition or a fence."""


class Batch:
    """The keys (and values) of a batch that can be used, with their places in it, and what is wrong at other places."""

    def __init__(self, keys: Sequence[str], values: Sequence[bytes] | None = None) -> None:
        if len(keys) > BATCH_KEYS_MAX:
            raise InvalidRequest(f"a batch has at most {BATCH_KEYS_MAX} keys, this one {len(keys)}")
        self.size = len(keys)
        self.keys: list[bytes] = []
        self.values: list[bytes] = []
        self.places: list[int] = []
        self.details: dict[int, pb.ErrorDetail] = {}
        self._known: dict[WireError, pb.ErrorDetail] = {}
        for place, key in enumerate(keys):
            try:
                raw = encode_key(key)
                if values is not None:
                    self.values.append(check_value(values[place]))
            except InvalidRequest as error:
                self.details[place] = self.detail(error.to_wire())
            else:
                self.keys.append(raw)
                self.places.append(place)

    def failed(self, errors: list[KeyError_] | None) -> None:
        """The coordinator's errors, by index into `keys`."""
        for index, wire in errors or ():
            self.details[self.places[index]] = self.detail(wire)

    def detail(self, wire: WireError) -> pb.ErrorDetail:
        """Many keys of a batch fail for one reason."""
        known = self._known.get(wire)
        if known is None:
            code, message, needed, answered = wire
            error = from_wire(code, message[:KEY_ERROR_CHARS_MAX], needed, answered)
            known = self._known[wire] = error_detail(error)
        return known


class TolerantServer:
    """Stands in for the server where handlers are added: a request that is no protobuf message (or whose key is no
    UTF-8) reaches its method as the DecodeError, to be refused in the way of all others; gRPC would answer UNKNOWN,
    which leaves open whether something was written."""

    def __init__(self, server: aio.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """What these know is added below, method by method."""

    def add_registered_method_handlers(self, service: str, methods: Mapping[str, Any]) -> None:
        tolerant = {
            name: method._replace(request_deserializer=partial(_decoded, method.request_deserializer))
            for name, method in methods.items()
            if not method.request_streaming
        }
        handler = grpc.method_handlers_generic_handler(service, {**methods, **tolerant})
        self._server.add_generic_rpc_handlers((handler,))


def _decoded(decode: Callable[[bytes], Message], data: bytes) -> Message | DecodeError:
    try:
        return decode(data)
    except DecodeError as error:
        return error


def raise_first(errors: list[KeyError_] | None) -> None:
    """A single key's failure is the failure of its call."""
    if errors:
        raise from_wire(*errors[0][1])


def level_of(given: int) -> Consistency | None:
    """The level with this number of the contract; None for 0, the default. Raises InvalidConsistency."""
    if not given:
        return None
    try:
        return Consistency(given)
    except ValueError:
        raise InvalidConsistency(
            f"unknown consistency {given}: use ONE (1), QUORUM (2), ALL (3) or LINEARIZABLE (4)"
        ) from None


def ttl_ms_of(given: int) -> int:
    if given > TTL_MS_MAX:
        raise InvalidTTL(f"ttl_ms is at most {TTL_MS_MAX}, not {given}")
    return given


def is_conditional(request: pb.PutRequest | pb.DeleteRequest) -> bool:
    bound = request.HasField("if_version") or request.HasField("fence")
    return bound or (isinstance(request, pb.PutRequest) and request.if_absent)


def operation_of(request: Conditional | pb.GetRequest) -> Op:
    """The operation that a request asks for, not named yet. Raises InvalidRequest and its kinds."""
    op = Op(b"", encode_key(request.key), REMOVE)
    if isinstance(request, pb.GetRequest):
        op.kind = LOOK
    elif isinstance(request, pb.IncrementRequest):
        op.kind, op.delta = ADD, request.delta
    elif isinstance(request, pb.PutRequest | pb.DeleteRequest):
        if request.HasField("if_version"):
            op.condition, op.version = IF_VERSION, request.if_version
        if isinstance(request, pb.PutRequest):
            op.kind, op.value = PUT, check_value(request.value)
            if request.if_absent and op.condition == IF_VERSION:
                raise InvalidRequest("a key is absent, or at a version: not both")
            if request.if_absent:
                op.condition = IF_ABSENT
    else:
        op.condition = IF_EQUALS
        op.expected = check_value(request.expected) if request.HasField("expected") else None
        if request.HasField("value"):
            op.kind, op.value = PUT, check_value(request.value)
    if not isinstance(request, pb.GetRequest | pb.DeleteRequest):
        op.ttl_ms = ttl_ms_of(request.ttl_ms)
        if op.ttl_ms and op.kind == REMOVE:
            raise InvalidRequest("a deletion has no ttl")
    if isinstance(request, pb.GetRequest | pb.PutRequest | pb.DeleteRequest) and request.HasField("fence"):
        op.fence = fence_of(request.fence)
    if op.condition == IF_VERSION and not 0 < op.version < 1 << 63:
        raise InvalidRequest(f"a version is a positive number as reads and writes return it, not {op.version}")
    return op


def fence_of(given: pb.Fence) -> tuple[bytes, int]:
    """A fence as operations carry it. Raises InvalidKey, InvalidRequest."""
    fence = Fence(given.lock, given.token)
    return lock_key(fence.lock), fence.token


def result_of(reply: UpdateReply) -> OpResult:
    """Of a request of one operation; its error is in it."""
    return OpResult(error=reply.error) if reply.error is not None else reply.results[0]


def decided(result: OpResult) -> OpResult:
    """The result of what took effect. Raises its error otherwise."""
    if result.error is None:
        return result
    error = from_wire(*result.error)
    if isinstance(error, VersionConflict):
        error.version = result.version
    raise error


def client_name(client_id: str) -> str:
    """A native client, whatever it is called, has another name."""
    if len(client_id.encode()) > CLIENT_ID_BYTES_MAX or not client_id.isprintable():
        raise InvalidRequest(f"a client_id is printable and has at most {CLIENT_ID_BYTES_MAX} bytes")
    return f"grpc-client:{client_id}"


def trace_of(context: Context) -> str:
    """The caller's correlation id; empty where there is none that can be used."""
    for key, value in context.invocation_metadata() or ():
        if key != TRACE_METADATA_KEY or not isinstance(value, str):
            continue
        if 0 < len(value) <= TRACE_CHARS_MAX and value.isascii() and value.isprintable():
            return value
    return ""


def record_of(packed: bytes, *, keys_only: bool = False) -> pb.Record:
    hlc = hlc_of(packed)
    return pb.Record(
        value=b"" if keys_only else packed[HEADER:],
        version=hlc,
        expires_at_ms=expires_ms_of(packed),
        created_at_ms=created_ms_of(packed),
        updated_at_ms=hlc >> 16,
    )


# --- scans: the range, and cursors

_CURSOR_CHECK_BYTES = 8


def range_of(request: pb.ScanRequest) -> tuple[bytes, bytes]:
    """First key, and the end (empty for none)."""
    low, high = b"", b""
    if request.prefix:
        low = encode_key(request.prefix)
        high = low + b"\xff"  # above every key with the prefix: this byte does not occur in UTF-8
    if request.start:
        low = max(low, encode_key(request.start))
    if request.end:
        end = encode_key(request.end)
        high = min(high, end) if high else end
    return low, high


def cursor_of(following: bytes, low: bytes, high: bytes) -> bytes:
    """Where to go on, with a check value that ties it to its scan: on another range it would silently skip keys."""
    return _cursor_check(following, low, high) + following


def resume_at(cursor: bytes, low: bytes, high: bytes) -> bytes:
    """The key at which to go on. Raises InvalidRequest."""
    check, following = cursor[:_CURSOR_CHECK_BYTES], cursor[_CURSOR_CHECK_BYTES:]
    if len(following) > KEY_BYTES_MAX + 1 or check != _cursor_check(following, low, high):
        raise InvalidRequest("the cursor is not one of this scan: all other fields must be those of its first page")
    return max(low, following)


def _cursor_check(following: bytes, low: bytes, high: bytes) -> bytes:
    return xxhash.xxh3_64_digest(following, seed=xxhash.xxh3_64_intdigest(low + b"\xff" + high))
