"""The process of one node: `python -m agi.core.dht.server --port 7000 --peers host:port,host:port`.

Announces itself as one JSON line on stdout once its ports are bound. SIGTERM drains and exits 0; an error at the start
is one line on stderr and the error's exit code.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import secrets
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import structlog
import uvloop
from grpc import aio

from agi.core.dht.clock import SystemClock
from agi.core.dht.config import Config, load_config
from agi.core.dht.errors import ConfigError, ConnectFailed, DHTError
from agi.core.dht.node import Node
from agi.core.dht.proto.dht_pb2 import Frame
from agi.core.dht.ring import token_bytes
from agi.core.dht.storage.base import StorageBackend, WalSync
from agi.core.dht.storage.memory import MemoryStore
from agi.core.dht.storage.redis import RedisStore
from agi.core.dht.storage.rocksdb import RocksStore
from agi.core.dht.transport.grpc import GrpcTransport, serve_exchange
from agi.core.dht.transport.native import NativeTransport
from agi.core.dht.types import FRAME_BYTES_MAX, format_address


def _configure_logs(config: Config) -> None:
    """Logs go to stderr: stdout carries the announcement alone."""
    console = config.observability.log_format == "console" or (
        config.observability.log_format == "auto" and sys.stderr.isatty()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(config.observability.log_level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def _exchange(node: Node) -> grpc.GenericRpcHandler:
    """The gRPC method that carries native frames."""

    async def exchange(request_iterator: AsyncIterator[Frame], context: aio.ServicerContext[Frame, Frame]) -> None:
        await serve_exchange(node, request_iterator, context)

    method = grpc.stream_stream_rpc_method_handler(
        exchange, request_deserializer=Frame.FromString, response_serializer=Frame.SerializeToString
    )
    return grpc.method_handlers_generic_handler("agi.core.dht.v1.DHT", {"Exchange": method})


def _store(config: Config, path: Path, node_id: str) -> StorageBackend:
    token_of = token_bytes(config.ring.hash_algorithm)
    if config.storage.backend == "memory":
        return MemoryStore(token_of)
    if config.storage.backend == "redis":
        return RedisStore(config.storage.redis_url, f"{config.cluster.name}:{node_id}", token_of)
    return RocksStore(
        path,
        token_of,
        wal_sync=WalSync(config.storage.wal_sync),
        wal_sync_interval_ms=config.storage.wal_sync_interval_ms,
        cache_size_mb=config.storage.cache_size_mb,
    )


async def _run(config: Config) -> int:
    limits = [("grpc.so_reuseport", int(config.network.reuse_port))]
    limits += [(f"grpc.max_{way}_message_length", FRAME_BYTES_MAX + 65536) for way in ("send", "receive")]
    server = aio.server(options=limits)
    wanted = format_address(config.network.host or "0.0.0.0", config.network.port)
    try:
        port = server.add_insecure_port(wanted)
    except RuntimeError:
        port = 0
    if not port:
        raise ConnectFailed(f"cannot listen on {wanted}: the port is in use or the address is not this machine's")
    fatal: list[DHTError] = []
    stop = asyncio.Event()

    def on_fatal(error: DHTError) -> None:
        fatal.append(error)
        stop.set()

    listen = [format_address(config.network.host or "0.0.0.0", config.data_port)]
    socket_path = config.unix_socket_path(port)
    if socket_path is not None:
        socket_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # before anything runs
        listen.append(f"unix:{socket_path}")
    node = Node(
        config,
        node_id=config.node_id(port),
        address=config.advertised_address(port),
        store=_store(config, config.storage_path(port), config.node_id(port)),
        seed=GrpcTransport(),
        data=NativeTransport(reuse_port=config.network.reuse_port),
        data_listen=listen,
        clock=SystemClock(),
        rng=random.Random(secrets.randbits(64)),
        on_fatal=on_fatal,
    )
    server.add_generic_rpc_handlers((_exchange(node),))
    await node.start()
    await server.start()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    announced = {
        "event": "listening",
        "node_id": node.node_id,
        "pid": os.getpid(),
        "port": port,
        "address": node.address,
        "data_address": node.data_address,
        "unix_socket": node.unix_path,
    }
    sys.stdout.write(json.dumps(announced) + "\n")
    sys.stdout.flush()
    await stop.wait()
    await node.stop(config.network.drain_timeout_ms / 1000)
    await server.stop(1.0)
    if fatal:
        raise fatal[0]
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs a node until it is told to stop; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m agi.core.dht.server", description=__doc__)
    parser.add_argument("--config", type=Path, help="YAML file (configs/dht_config.yaml shows every key)")
    parser.add_argument("--port", help="gRPC port; 0 for any")
    parser.add_argument("--peers", help="gRPC addresses of the other nodes, separated by commas")
    parser.add_argument("--node-id")
    parser.add_argument("--storage", help="rocksdb, memory or redis")
    parser.add_argument("--path", help="data folder")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any other setting")
    given = parser.parse_args(argv)
    overrides: dict[str, object] = {
        "dht.network.port": given.port,
        "dht.cluster.bootstrap_nodes": given.peers,
        "dht.node.id": given.node_id,
        "dht.storage.backend": given.storage,
        "dht.storage.path": given.path,
    }
    try:
        for setting in given.set:
            key, equals, value = setting.partition("=")
            if not equals:
                raise ConfigError(f"--set takes KEY=VALUE, not {setting!r}")
            overrides[key] = value
        config = load_config(given.config, os.environ, overrides)
        _configure_logs(config)
        return uvloop.run(_run(config))
    except DHTError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
