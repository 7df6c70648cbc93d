"""Our errors as gRPC statuses, and back.

A call that fails ends with the nearest status code, for clients that know only that, and an ErrorDetail in the trailing
metadata `dht-error-bin`, from which our client builds the same error again.
"""

from __future__ import annotations

import contextlib
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from agi.core.dht import errors
from agi.core.dht.errors import DHTError
from agi.core.dht.proto.dht_pb2 import ErrorDetail

ERROR_METADATA_KEY = "dht-error-bin"
ERROR_MESSAGE_BYTES_MAX = 2048
"""Of an error's text, so that it fits into HTTP/2 metadata, which peers limit to 8 KiB."""

_STATUS: tuple[tuple[type[DHTError], grpc.StatusCode], ...] = (  # the first class that fits
    (errors.InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.Unavailable, grpc.StatusCode.UNAVAILABLE),
    (errors.OutcomeUnknown, grpc.StatusCode.UNKNOWN),  # not UNAVAILABLE: many clients repeat that by themselves
    (errors.StaleEpoch, grpc.StatusCode.ABORTED),
    (errors.VersionConflict, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.FenceRejected, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.LockLost, grpc.StatusCode.ABORTED),
    (errors.LockHeld, grpc.StatusCode.ABORTED),
    (errors.StorageFull, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.StorageCorrupt, grpc.StatusCode.DATA_LOSS),
    (errors.StorageError, grpc.StatusCode.INTERNAL),
    (errors.FrameTooLarge, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.ProtocolMismatch, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.TransportError, grpc.StatusCode.UNAVAILABLE),
    (errors.ClientClosed, grpc.StatusCode.CANCELLED),
    (errors.ClockSkew, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.ClusterError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.ConfigError, grpc.StatusCode.FAILED_PRECONDITION),
    (DHTError, grpc.StatusCode.INTERNAL),
)
_BARE: dict[grpc.StatusCode, type[DHTError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
    grpc.StatusCode.UNIMPLEMENTED: errors.ProtocolMismatch,
    grpc.StatusCode.UNAUTHENTICATED: errors.HelloRefused,
    grpc.StatusCode.PERMISSION_DENIED: errors.HelloRefused,
    grpc.StatusCode.FAILED_PRECONDITION: errors.ClusterError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    # The connection may have broken after the request had left.
    grpc.StatusCode.UNAVAILABLE: errors.LinkClosed,
    grpc.StatusCode.CANCELLED: errors.LinkClosed,
}
"""Statuses that gRPC itself ended a call with; any other leaves a write's outcome unknown."""


def error_detail(error: DHTError) -> ErrorDetail:
    """The error as the gRPC wire carries it."""
    code, message, needed, answered = error.to_wire()
    return ErrorDetail(
        code=code,
        message=_cut(message),
        needed=needed,
        answered=answered,
        retryable=error.retryable,
        current_version=error.version if isinstance(error, errors.VersionConflict) else 0,
    )


def to_status(error: DHTError) -> tuple[grpc.StatusCode, tuple[tuple[str, bytes], ...]]:
    """The status to end a failed call with, and its trailing metadata."""
    status = next(status for kind, status in _STATUS if isinstance(error, kind))
    return status, ((ERROR_METADATA_KEY, error_detail(error).SerializeToString()),)


async def abort(context: aio.ServicerContext[Any, Any], error: DHTError) -> NoReturn:
    """Ends the call with that error."""
    status, metadata = to_status(error)
    await context.abort(status, _cut(str(error)), metadata)


def from_rpc_error(error: aio.AioRpcError) -> DHTError:
    """The error that ended a call: the server's own, or, from gRPC itself, the nearest of ours.

    A bare DEADLINE_EXCEEDED, INTERNAL or UNKNOWN becomes OutcomeUnknown, a broken connection LinkClosed: neither says
    whether a write took effect. Where the call was a read, nothing was written of course.
    """
    for key, value in error.trailing_metadata() or ():
        if key == ERROR_METADATA_KEY and isinstance(value, bytes):
            with contextlib.suppress(DecodeError):
                detail = ErrorDetail.FromString(value)
                found = errors.from_wire(detail.code, detail.message, detail.needed, detail.answered)
                if isinstance(found, errors.VersionConflict):
                    found.version = detail.current_version
                return found
    kind = _BARE.get(error.code(), errors.OutcomeUnknown)
    details = error.details() or ""
    if kind is errors.Overloaded and "larger than max" in details:
        kind = errors.FrameTooLarge  # the same status for another thing
    return kind(f"gRPC {error.code().name}: {details}")


def _cut(text: str) -> str:
    """At most ERROR_MESSAGE_BYTES_MAX of UTF-8; a lone surrogate, which protobuf refuses, becomes a question mark."""
    return text.encode(errors="replace")[:ERROR_MESSAGE_BYTES_MAX].decode(errors="ignore")
