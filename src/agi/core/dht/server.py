"""The process of one node: `python -m agi.core.dht.server --port 7000 --peers host:port,host:port`, or `agi-dht serve`.

Announces itself as one JSON line on stdout once its ports are bound. SIGTERM drains and exits 0; with `--leave` the
node leaves the cluster first. An error at the start is one line on stderr and the error's exit code. A node whose
joining was given up, though nobody ordered that, starts anew on an empty folder and asks again.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import secrets
import shutil
import signal
import sys
from pathlib import Path
from typing import Annotated, NamedTuple

import structlog
import typer
import uvloop
from grpc import aio

from agi.core.dht.admin.endpoints import admin_server
from agi.core.dht.clock import SystemClock
from agi.core.dht.commands import run
from agi.core.dht.config import Config, load_config
from agi.core.dht.departure import leave_when_told
from agi.core.dht.errors import ConfigError, ConnectFailed, DHTError, Removed
from agi.core.dht.node import Node
from agi.core.dht.observability.logs import configure
from agi.core.dht.ring import token_bytes
from agi.core.dht.service import Service
from agi.core.dht.storage.base import StorageBackend, WalSync
from agi.core.dht.storage.memory import MemoryStore
from agi.core.dht.storage.redis import RedisStore
from agi.core.dht.storage.rocksdb import RocksStore
from agi.core.dht.transport.grpc import SERVER_OPTIONS, GrpcTransport
from agi.core.dht.transport.native import NativeTransport
from agi.core.dht.types import format_address, parse_address

_log = structlog.get_logger("agi.core.dht.server")

LEAVE_TIMEOUT_S = 600.0
SET_ASIDE_MAX = 100
"""Folders of a node that the cluster has let go; past it the last stays where it is, and refuses to start."""
COLLECT_AT = 10_000
"""Objects that may be born before those among them that are garbage are looked for."""


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


class _Told:
    """What the process was told to do: to stop, or first to leave. It outlives a node that starts anew.

    Attributes:
        stop: told so, or the node cannot go on.
        leave: SIGTERM or SIGINT came, and the node is to leave first.
        ended: whether anybody told the process to stop.
    """

    def __init__(self, leaves: bool) -> None:
        self.stop, self.leave = asyncio.Event(), asyncio.Event()
        self.ended = False
        self._leaves = leaves

    def signalled(self) -> None:
        self.ended = True
        (self.stop if self.leave.is_set() or not self._leaves else self.leave).set()  # the second does not wait

    def end(self) -> None:
        self.ended = True
        self.stop.set()


async def _run(config: Config, stop_with_stdin: bool, leave_s: float = 0.0) -> None:
    told = _Told(bool(leave_s))
    again = await _live(config, told, stop_with_stdin, leave_s)
    while again is not None and not told.ended:
        told.stop.clear()
        aside = again.aside
        again = await _live(config, told, False, leave_s, again.port)  # under the address that it was known by
        if again is not None and aside is not None:  # copies that never counted: one of them is enough
            await asyncio.to_thread(shutil.rmtree, aside, ignore_errors=True)


class _Again(NamedTuple):
    """A node may ask to join as a new one, at this port; what it had is in this folder."""

    port: int
    aside: Path | None


async def _live(
    config: Config, told: _Told, stop_with_stdin: bool, leave_s: float, port_before: int | None = None
) -> _Again | None:
    """One life of a node, and whether another one follows. Raises what it could not go on for."""
    options = {**dict(SERVER_OPTIONS), "grpc.so_reuseport": int(config.network.reuse_port)}
    server = aio.server(options=tuple(options.items()))
    wanted = format_address(
        config.network.host or "0.0.0.0", config.network.port if port_before is None else port_before
    )
    try:
        port = server.add_insecure_port(wanted)
    except RuntimeError:
        port = 0
    if not port:
        raise ConnectFailed(f"cannot listen on {wanted}: the port is in use or the address is not this machine's")
    fatal: list[DHTError] = []

    def on_fatal(error: DHTError) -> None:
        fatal.append(error)
        told.stop.set()

    listen = [format_address(config.network.host or "0.0.0.0", config.data_port)]
    socket_path = config.unix_socket_path(port)
    if socket_path is not None:
        try:
            socket_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # before anything runs
        except OSError as error:
            raise ConnectFailed(f"cannot make the folder of unix:{socket_path}: {error.strerror}") from error
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
    service = Service(node, on_fatal)
    service.register(server)
    admin = admin_server(node)
    await admin.listen(config.network.host, config.http_port, reuse_port=config.network.reuse_port)
    node.http_address = format_address(parse_address(node.address)[0], admin.port)
    try:
        await node.start()
    except BaseException:
        await admin.close()
        raise
    service.start()
    await server.start()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.signalled)
    leaving = loop.create_task(leave_when_told(node, told.leave, told.stop, leave_s), name="leave")
    if stop_with_stdin:
        await loop.connect_read_pipe(lambda: _StdinWatch(told), sys.stdin)
    announced = {
        "event": "listening",
        "node_id": node.node_id,
        "pid": os.getpid(),
        "port": port,
        "address": node.address,
        "data_address": node.data_address,
        "http_address": node.http_address,
        "unix_socket": node.unix_path,
    }
    if port_before is None:
        sys.stdout.write(json.dumps(announced) + "\n")
        sys.stdout.flush()
    else:  # nobody may read stdout any more
        _log.warning("asks_again", **{key: value for key, value in announced.items() if key != "event"})
    _spare_collections()
    await told.stop.wait()
    leaving.cancel()
    service.withdraw()
    await node.stop(config.network.drain_timeout_ms / 1000)
    await service.stop()
    await server.stop(1.0)
    await admin.close()
    await asyncio.gather(leaving, return_exceptions=True)
    if not fatal:
        return None
    if not isinstance(fatal[0], Removed):
        raise fatal[0]
    aside = _set_aside(config.storage_path(port)) if config.storage.backend == "rocksdb" else None
    empty = aside is not None or config.storage.backend == "memory"
    return _Again(port, aside) if empty and fatal[0].asks_again else None


def _spare_collections() -> None:
    """What the program itself consists of is not looked through for garbage again: a full collection stops the node for
    10 to 30 ms otherwise, every few seconds while it moves data."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AT, 10, 10)


def _set_aside(folder: str | Path) -> Path | None:
    """The folder of a node that the cluster let go: it does not count any more, and the node may join as a new one.
    Returns where it is now, None if it could not be moved."""
    path = Path(folder)
    for number in range(1, SET_ASIDE_MAX):
        aside = path.with_name(f"{path.name}.removed-{number}")
        if not aside.exists():
            path.rename(aside)
            _log.warning("data_set_aside", folder=str(aside))
            return aside
    _log.error("data_not_set_aside", folder=str(path), reason=f"{SET_ASIDE_MAX} folders were set aside already")
    return None


class _StdinWatch(asyncio.Protocol):
    """Has the process stop when stdin ends: whoever holds its other end is gone."""

    def __init__(self, told: _Told) -> None:
        self._told = told

    def connection_lost(self, error: Exception | None) -> None:
        self._told.end()


def serve(
    config: Annotated[Path | None, typer.Option(help="YAML file; configs/dht_config.yaml shows every key.")] = None,
    port: Annotated[str | None, typer.Option(help="gRPC port; 0 for any. Default 7000.")] = None,
    peers: Annotated[
        str | None, typer.Option(metavar="HOST:PORT,...", help="gRPC addresses of the other nodes; none: alone.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Interface to listen on. Default 127.0.0.1.")] = None,
    advertise: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Address by which others reach this node.")
    ] = None,
    node_id: Annotated[str | None, typer.Option(help="Name of this node. Default: the advertised address.")] = None,
    storage: Annotated[str | None, typer.Option(help="rocksdb (default), memory or redis.")] = None,
    path: Annotated[str | None, typer.Option(help="Data folder. Default ./dht-data/{node_id}.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting, such as network.timeout_ms=500."),
    ] = None,
    replace: Annotated[
        str | None, typer.Option(metavar="NODE", help="Join in the place of this dead node.", show_default=False)
    ] = None,
    leave: Annotated[
        bool, typer.Option("--leave", help="At SIGTERM leave the cluster for good; a second one only stops.")
    ] = False,
    leave_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="With --leave: stop all the same after so long.")
    ] = LEAVE_TIMEOUT_S,
    stop_with_stdin: Annotated[
        bool, typer.Option("--stop-with-stdin", help="Stop when stdin ends, so that no node outlives its launcher.")
    ] = False,
) -> None:
    """Run a node until SIGTERM or SIGINT.

    With --leave its data is brought to the others first, as by `agi-dht leave`, and its folder is set aside: for nodes
    that come and go. Where it cannot leave (fewer nodes than replicas would remain, no quorum of voters) it says so in
    its log and only stops.

    With --replace it takes the place of a dead member, whose data is copied from the other replicas; that may be the
    one of its own id, on a new data folder, if the old one is gone for good.

    Settings come from here, then from DHT_* environment variables, then from the YAML file, then from the defaults.

    Example of three nodes on one machine, each in a terminal of its own:

        agi-dht serve --port 7000 --peers localhost:7001,localhost:7002

        agi-dht serve --port 7001 --peers localhost:7000,localhost:7002

        agi-dht serve --port 7002 --peers localhost:7000,localhost:7001
    """
    overrides: dict[str, object] = {
        "dht.network.port": port,
        "dht.network.host": host,
        "dht.cluster.bootstrap_nodes": peers,
        "dht.cluster.replaces": replace,
        "dht.node.id": node_id,
        "dht.node.advertise": advertise,
        "dht.storage.backend": storage,
        "dht.storage.path": path,
    }
    for setting in settings or ():
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set takes KEY=VALUE, not {setting!r}")
        overrides[key] = value
    loaded = load_config(config, os.environ, overrides)
    configure(loaded.observability.log_level, loaded.observability.log_format)
    if leave_timeout <= 0:
        raise ConfigError(f"--leave-timeout is above 0, not {leave_timeout:g}")
    uvloop.run(_run(loaded, stop_with_stdin, leave_timeout if leave else 0.0))


_app = typer.Typer(add_completion=False)
_app.command()(serve)


def main(arguments: list[str] | None = None) -> int:
    """Runs a node until it is told to stop; returns its exit code."""
    return run(_app, arguments, name="python -m agi.core.dht.server")


if __name__ == "__main__":
    sys.exit(main())
