"""The standard health service of gRPC (grpc.health.v1.Health) for one server whose services share one state.

The servicer that comes with grpcio-health-checking is not used: there, the first watcher of a service that leaves
makes all others of it deaf.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

import grpc
from grpc import aio
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthServicer

from agi.core.dht.errors import Overloaded
from agi.core.dht.transport.grpc_status import abort

WATCHERS_MAX = 256
"""Open Watch calls; past it callers get Overloaded."""


class Health(HealthServicer):
    """NOT_SERVING until it is told otherwise.

    Args:
        services: the names that it knows; "" stands for the server as a whole.
    """

    def __init__(self, services: Collection[str]) -> None:
        self._services = frozenset(services)
        self._serving = False
        self._closed = False
        self._changed = asyncio.Event()
        self._watchers = 0

    def set(self, serving: bool) -> None:
        """Tells every watcher, if this is news."""
        if serving != self._serving and not self._closed:
            self._serving = serving
            self._wake()

    def close(self) -> None:
        """NOT_SERVING for good; watchers hear it, and their calls end."""
        self._closed, self._serving = True, False
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _status(self, service: str) -> int:
        if service not in self._services:
            return HealthCheckResponse.SERVICE_UNKNOWN
        return HealthCheckResponse.SERVING if self._serving else HealthCheckResponse.NOT_SERVING

    async def Check(self, request: HealthCheckRequest, context: aio.ServicerContext[Any, Any]) -> HealthCheckResponse:
        """The state now; NOT_FOUND for a service that it does not know."""
        status = self._status(request.service)
        if status == HealthCheckResponse.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"unknown service {request.service!r}")
        return HealthCheckResponse(status=status)

    async def Watch(self, request: HealthCheckRequest, context: aio.ServicerContext[Any, Any]) -> None:
        """The state now, and every later one."""
        if self._watchers >= WATCHERS_MAX:
            await abort(context, Overloaded(f"{WATCHERS_MAX} calls watch the health of this node already"))
        self._watchers += 1
        try:
            told = None
            while True:
                changed, closed, status = self._changed, self._closed, self._status(request.service)
                if status != told:
                    await context.write(HealthCheckResponse(status=status))
                    told = status
                if closed:
                    return
                await changed.wait()
        finally:
            self._watchers -= 1
