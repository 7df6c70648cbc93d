"""Every setting, declared once: type, default, unit, formula, and what raising or lowering it costs.

The loader, `docs/configuration.md`, `configs/dht_config.yaml` and `agi-dht config show` are all read from this table.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar, cast

from agi.core.dht.errors import DHTError
from agi.core.dht.ring import HASH_ALGORITHMS
from agi.core.dht.types import Consistency, format_address, parse_address

T = TypeVar("T")
AUTO = "auto"
PORT_MAX = 65535


@dataclass(frozen=True, slots=True)
class Kind(Generic[T]):
    """What a setting accepts. `parse` reads it from text and raises ValueError with what is wrong."""

    accepts: str
    parse: Callable[[str], T]


@dataclass(frozen=True, slots=True)
class Knob:
    """One row of the table. `more` and `less`: what raising and lowering it costs, for settings that are amounts."""

    kind: Kind[object]
    doc: str
    unit: str
    more: str
    less: str
    secret: bool


def knob(
    default: T, kind: Kind[T], doc: str, *, unit: str = "", more: str = "", less: str = "", secret: bool = False
) -> T:
    row = Knob(cast(Kind[object], kind), doc, unit, more, less, secret)
    return field(default=default, metadata={"knob": row})


def integer(low: int, high: int) -> Kind[int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]+", text) or not low <= int(text) <= high:
            raise ValueError(f"must be an integer from {low} to {high}")
        return int(text)

    return Kind(f"integer, {low} to {high}", parse)


def number(low: float, high: float) -> Kind[float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:  # also refuses NaN
            raise ValueError(f"must be a number from {low:g} to {high:g}")
        return value

    return Kind(f"number, {low:g} to {high:g}", parse)


def choice(*names: str) -> Kind[str]:
    def parse(text: str) -> str:
        if text.lower() not in names:
            raise ValueError(f"must be one of {', '.join(names)}")
        return text.lower()

    return Kind(" or ".join(f"`{name}`" for name in names), parse)


def text(accepts: str, pattern: str) -> Kind[str]:
    def parse(given: str) -> str:
        if not re.fullmatch(pattern, given):
            raise ValueError(f"must be {accepts}")
        return given

    return Kind(accepts, parse)


def _address(given: str) -> str:
    if not given:
        return ""
    try:
        return format_address(*parse_address(given))
    except DHTError as error:
        raise ValueError(str(error)) from None


def _addresses(given: str) -> tuple[str, ...]:
    return tuple(_address(part.strip()) for part in given.split(",") if part.strip())


def _port_or_auto(given: str) -> int | None:
    if given.lower() == AUTO:
        return None
    if not re.fullmatch(r"[0-9]+", given) or int(given) > PORT_MAX:
        raise ValueError(f"must be auto or an integer from 0 to {PORT_MAX}")
    return int(given)


def _boolean(given: str) -> bool:
    if given.lower() not in ("true", "false"):
        raise ValueError("must be true or false")
    return given.lower() == "true"


def _consistency(given: str) -> Consistency:
    try:
        return Consistency.parse(given)
    except DHTError:
        raise ValueError("must be one of ONE, QUORUM, ALL") from None


ADDRESS = Kind("host:port, [ipv6]:port or empty", _address)
ADDRESSES = Kind("list of host:port or [ipv6]:port; comma-separated outside YAML", _addresses)
PORT_OR_AUTO: Kind[int | None] = Kind(f"`{AUTO}` or integer, 0 to {PORT_MAX}", _port_or_auto)
BOOLEAN = Kind("`true` or `false`", _boolean)
LEVEL = Kind("`ONE`, `QUORUM` or `ALL`", _consistency)
LABEL = text("up to 64 letters, digits, '.', '_' and '-', or empty", r"[A-Za-z0-9._-]{0,64}")


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """What this node is."""

    id: str = knob(
        "",
        text("up to 128 printable ASCII characters without spaces, or empty", r"[!-~]{0,128}"),
        "Unique name of this node in its cluster. Empty: the advertised address. It belongs to the data folder: a "
        "node that restarts under another name is another node. With port 0, set it.",
    )
    advertise: str = knob(
        "",
        ADDRESS,
        "The address under which others reach this node. Empty: `network.host`:`network.port`, with 127.0.0.1 or "
        "[::1] for a wildcard host. Must be given where that is a loopback address and a bootstrap node is not.",
    )
    weight: float = knob(
        1.0,
        number(0.01, 100),
        "Share of the ring relative to the other nodes: virtual nodes = max(1, round(`ring.virtual_nodes` x weight)).",
        more="more keys, requests and disk on this node",
        less="fewer; below 1 / `ring.virtual_nodes` it has no further effect",
    )
    rack: str = knob("", LABEL, "Failure domain below the zone: replicas spread over racks as far as there are enough.")
    zone: str = knob("", LABEL, "Failure domain: replicas spread over zones first.")


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """Which cluster, and how to find it."""

    name: str = knob(
        "dht",
        text("1 to 64 letters, digits, '.', '_' and '-'", r"[A-Za-z0-9._-]{1,64}"),
        "Nodes of different names refuse each other. The same on all nodes.",
    )
    bootstrap_nodes: tuple[str, ...] = knob(
        (),
        ADDRESSES,
        "gRPC addresses at which to find the cluster; this node's own may be among them. The first start of a "
        "cluster needs every node of the list; later any one suffices. Empty: a cluster of one.",
    )
    force_start_without: tuple[str, ...] = knob(
        (),
        ADDRESSES,
        "DANGEROUS. Members of `bootstrap_nodes` that are dead for good: the first start does not wait for them. If "
        "one of them is alive after all, two clusters may form and the data of one be lost. Remove it once the "
        "cluster runs.",
    )


@dataclass(frozen=True, slots=True)
class ReplicationConfig:
    """How many copies, and how many of them a call waits for. A call may name another level."""

    factor: int = knob(
        3,
        integer(1, 7),
        "Replicas of each key; a quorum is floor(factor / 2) + 1. The same on all nodes.",
        unit="replicas",
        more="each write costs one more store and message; 5 outlives 2 failures where 3 outlives 1",
        less="1 loses data with its disk; 2 has quorums of 2 and outlives no failure",
    )
    read_consistency: Consistency = knob(  # noqa: RUF009  # it is a dataclasses.field
        Consistency.QUORUM,
        LEVEL,
        "Replies that a read waits for. With both levels at QUORUM a read sees every acknowledged write; ONE may not.",
    )
    write_consistency: Consistency = knob(  # noqa: RUF009  # it is a dataclasses.field
        Consistency.QUORUM,
        LEVEL,
        "Replicas that must have stored a write before it is acknowledged. ONE may lose it with one disk.",
    )


@dataclass(frozen=True, slots=True)
class RingConfig:
    """How keys are dealt out. The same on all nodes, and fixed once a cluster has formed."""

    virtual_nodes: int = knob(
        150,
        integer(1, 10000),
        "Points on the ring per unit of weight. The uneven part of a node's load falls with 1 / sqrt(virtual_nodes); "
        "docs/ring.md has the measured figures.",
        unit="points",
        more="rings build more slowly and have more arcs to compare in repair",
        less="less even load",
    )
    hash_algorithm: str = knob(
        "xxh3",
        choice(*HASH_ALGORITHMS),
        "What turns a key into its token: `md5` (its first 8 bytes) or `xxh3` (64 bits, about twice as fast).",
    )


@dataclass(frozen=True, slots=True)
class StorageConfig:
    """Where this node keeps its records."""

    backend: str = knob(
        "rocksdb",
        choice("memory", "rocksdb", "redis"),
        "`rocksdb`: on this machine's disk. `memory`: forgets at exit, and the node rejoins as an empty one. "
        "`redis`: in a Redis server of this node's own.",
    )
    path: str = knob(
        "./dht-data/{node_id}",
        text("a path", r".+"),
        "The data folder. `{node_id}` stands for the node id, with '_' for characters unsafe in a path; '~' for the "
        "home folder. Two nodes may not share a folder. The memory store does not use it.",
    )
    cache_size_mb: int = knob(
        64,
        integer(8, 1 << 20),
        "Block cache of RocksDB.",
        unit="MiB",
        more="memory of the process",
        less="more reads reach the disk",
    )
    wal_sync: str = knob(
        "group",
        choice("group", "interval", "none"),
        "When an acknowledged write is on the disk itself; kill -9 never loses one. `group`: before the "
        "acknowledgement, one fsync for all writes at hand. `interval`: within `wal_sync_interval_ms`. `none`: when "
        "the operating system sees fit. Topology and identity are synced whatever this says.",
    )
    wal_sync_interval_ms: int = knob(
        100,
        integer(1, 60_000),
        "Longest time between syncs with `wal_sync: interval`; without effect otherwise.",
        unit="ms",
        more="power loss takes up to this much of the acknowledged writes",
        less="more fsyncs",
    )
    redis_url: str = knob(
        "",
        text("redis://, rediss:// or unix:// and what follows, or empty", r"|(rediss?|unix)://\S+"),
        "The Redis server of `backend: redis`, which needs it.",
        secret=True,
    )


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """Addresses, deadlines and connections."""

    host: str = knob(
        "127.0.0.1",
        text("a host name, an IP address, or empty for all interfaces", r"[A-Za-z0-9._:-]*"),
        "The interface to listen on, for all ports. `0.0.0.0`, `::` or empty: all of them. The default serves this "
        "machine alone.",
    )
    port: int = knob(
        7000,
        integer(0, PORT_MAX),
        "gRPC port; 0 takes any free one, which the start message on stdout tells. Nodes on one machine should not "
        "be 1000 or 2000 apart, because of the ports derived from it.",
    )
    data_port: int | None = knob(
        None,
        PORT_OR_AUTO,
        "Port of the native wire, which nodes and the Python client speak. `auto`: `port` + 1000, or any free one "
        "where `port` is 0. 0: any free one.",
    )
    http_port: int | None = knob(
        None,
        PORT_OR_AUTO,
        "Port of `/metrics`, `/healthz`, `/readyz` and the console. `auto`: `port` + 2000, or any free one where "
        "`port` is 0. 0: any free one.",
    )
    unix_socket: str = knob(
        AUTO,
        text("`auto`, a path of at most 100 bytes, or empty", r"[^\0]{0,100}"),
        "Unix socket of the native wire: clients on this machine use it, about 15 % faster at one caller. `auto`: a "
        "socket in a folder of this user in the temporary directory. Empty: none.",
    )
    timeout_ms: int = knob(
        2000,
        integer(10, 600_000),
        "Deadline of a request that states none, retries included.",
        unit="ms",
        more="callers wait longer for a cluster that cannot answer",
        less="requests fail during short stalls (fsync, garbage collection, a failover)",
    )
    retry_count: int = knob(
        3,
        integer(0, 10),
        "How often a client repeats a call that failed with a retryable error, within its deadline. A put whose "
        "outcome is unknown is never repeated unless asked for.",
        unit="attempts beyond the first",
        more="more load on a cluster in trouble",
        less="more errors reach the caller during failovers",
    )
    connection_pool_size: int = knob(
        2,
        integer(1, 64),
        "Connections kept to each peer. The first carries small messages; values from 128 KiB on take the others in "
        "turn, or the same one where there is only 1.",
        unit="connections",
        more="file descriptors, on both sides",
        less="at 1 a large value delays the small messages behind it",
    )
    reuse_port: bool = knob(
        False,
        BOOLEAN,
        "Bind the ports although another process of this user holds them with SO_REUSEPORT, for a launcher that keeps "
        "them reserved. Two nodes on one port then go unnoticed.",
    )
    drain_timeout_ms: int = knob(
        10_000,
        integer(0, 600_000),
        "How long a node that is told to stop finishes what it began before it closes its connections.",
        unit="ms",
        more="a stop may take that long; keep it below the supervisor's kill timeout",
        less="requests under way fail and are retried elsewhere",
    )


@dataclass(frozen=True, slots=True)
class VersionsConfig:
    """The hybrid logical clock that orders writes."""

    max_clock_skew_ms: int = knob(
        5000,
        integer(1, 3_600_000),
        "A fresh write whose version is further than this ahead of a replica's clock is refused with ClockSkew. "
        "Within it of its expiry, a key with a TTL may be seen by one reader and not by the next.",
        unit="ms",
        more="a wrong clock may overrule the others' writes for longer",
        less="nodes whose clocks drift apart refuse each other's writes; keep it well above what NTP achieves",
    )


@dataclass(frozen=True, slots=True)
class RequestsConfig:
    """How a coordinator treats requests."""

    hedge_percentile: float = knob(
        0.95,
        number(0.5, 0.999),
        "A read that has waited longer than this percentile of recent replica latencies asks a further replica.",
        more="slow replicas hold reads up for longer",
        less="more double reads, until `hedge_budget` ends them",
    )
    hedge_budget: float = knob(
        0.05,
        number(0, 1),
        "Hedged reads per read, at most, on average. 0 turns hedging off.",
        more="more load on the replicas when all of them are slow",
        less="fewer slow reads are rescued",
    )
    dedup_entries: int = knob(
        65_536,
        integer(1, 16_777_216),
        "Results of client writes that a node remembers, so that a repeated request is answered and not carried out "
        "again.",
        unit="results (about 200 bytes each)",
        more="memory of the process",
        less="a late retry of a write may be carried out twice: the window is dedup_entries / (writes a second)",
    )
    pending_bytes_max_mb: int = knob(
        256,
        integer(16, 65_536),
        "Keys and values of unfinished requests that a node holds; past it a request fails with Overloaded.",
        unit="MiB",
        more="memory of the process under load",
        less="bursts are refused sooner",
    )


@dataclass(frozen=True, slots=True)
class ExpiryConfig:
    """Expired records are found by a sweep and shrunk to tombstones. A reader never sees one, swept or not."""

    sweep_interval_ms: int = knob(
        1000,
        integer(10, 3_600_000),
        "Pause between two sweeps of a node.",
        unit="ms",
        more="the values of expired records take space for longer",
        less="more wake-ups of an idle node",
    )
    sweep_step: int = knob(
        1000,
        integer(1, 100_000),
        "Records that one sweep shrinks; so sweep_step x 1000 / `sweep_interval_ms` a second.",
        unit="records",
        more="a sweep holds other requests up for longer",
        less="expired records pile up if more of them expire a second",
    )


@dataclass(frozen=True, slots=True)
class ObservabilityConfig:
    """Logs."""

    log_level: str = knob("info", choice("debug", "info", "warning", "error"), "The least severity that is logged.")
    log_format: str = knob(
        "auto",
        choice("json", "console", "auto"),
        "`json`: one object a line. `console`: for people. `auto`: console on a terminal, else json.",
    )
    slow_request_ms: int = knob(
        500,
        integer(0, 600_000),
        "A request that took at least this long is logged with its correlation id. 0 turns that off.",
        unit="ms",
        more="fewer slow requests are seen",
        less="a larger log",
    )
