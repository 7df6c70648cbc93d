"""Every setting, declared once: type, default, unit, formula, and what raising or lowering it costs.

The loader, `docs/configuration.md`, `configs/dht_config.yaml` and `agi-dht config show` are all read from this table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar, cast

from agi.core.dht.config.kinds import (
    ADDRESS,
    ADDRESSES,
    AUTO,
    BOOLEAN,
    LABEL,
    LEVEL,
    NODE_ID,
    PORT_MAX,
    PORT_OR_AUTO,
    Kind,
    choice,
    integer,
    integer_or_auto,
    number,
    text,
)
from agi.core.dht.ring import HASH_ALGORITHMS
from agi.core.dht.types import Consistency

T = TypeVar("T")


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


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """What this node is."""

    id: str = knob(
        "",
        NODE_ID,
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
    replaces: str = knob("", NODE_ID, "The dead member whose place this node takes when it joins; empty: nobody's.")
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
    queue_ms: int = knob(
        500,
        integer(10, 60_000),
        "How long requests may wait where more come than the node can carry out: once this has stood for as long, new "
        "ones fail with Overloaded until it is shorter. 4,096 keys are taken in any case.",
        unit="ms",
        more="answers come later under overload, near or past their deadlines",
        less="short slowness of a disk or a peer is taken for overload sooner",
    )


PRESETS: dict[str, dict[str, int]] = {
    "local": {
        "heartbeat_interval_ms": 200,
        "probe_timeout_ms": 100,
        "suspicion_mult": 4,
        "recovery_timeout_ms": 1000,
        "gossip_interval_ms": 50,
        "sync_interval_ms": 10_000,
    },
    "lan": {
        "heartbeat_interval_ms": 500,
        "probe_timeout_ms": 200,
        "suspicion_mult": 4,
        "recovery_timeout_ms": 5000,
        "gossip_interval_ms": 100,
        "sync_interval_ms": 30_000,
    },
    "wan": {
        "heartbeat_interval_ms": 2000,
        "probe_timeout_ms": 1000,
        "suspicion_mult": 6,
        "recovery_timeout_ms": 30_000,
        "gossip_interval_ms": 500,
        "sync_interval_ms": 60_000,
    },
}
"""What `auto` stands for, by preset."""


def _auto(name: str) -> str:
    return f"`auto`: by the preset, {', '.join(f'{preset} {values[name]}' for preset, values in PRESETS.items())}."


@dataclass(frozen=True, slots=True)
class HealthConfig:
    """How nodes find out which of them are alive: SWIM with Lifeguard, in the words of memberlist. With n nodes, a dead
    one is known to all after about (failure_threshold x heartbeat_interval_ms) + (suspicion_mult x max(1, log10(n)) x
    heartbeat_interval_ms) if others notice it too, with the lan preset after 3 s, or 2 s if its links broke; a node may
    be slow or unreachable for so long without being declared dead."""

    preset: str = knob(
        "lan",
        choice(*PRESETS),
        "What the settings that are `auto` are: `local` for nodes on one machine, `lan` for one network, `wan` for "
        "nodes far apart. A setting that is given wins.",
    )
    heartbeat_interval_ms: int | None = knob(
        None,
        integer_or_auto(20, 600_000),
        "Each node probes one other every so often, in shuffled rounds, so that each is probed about once in it by "
        f"somebody. {_auto('heartbeat_interval_ms')}",
        unit="ms",
        more="failures are found later",
        less="more messages: 2 per node and interval",
    )
    probe_timeout_ms: int | None = knob(
        None,
        integer_or_auto(10, 600_000),
        "How long a probe waits before others are asked to try as well; at most half of the heartbeat interval. Set "
        f"it to the 99th percentile of the network's round trips, stalls included. {_auto('probe_timeout_ms')}",
        unit="ms",
        more="less time for the others' tries",
        less="more indirect probes, and more self-doubt, for replies that are merely late",
    )
    failure_threshold: int = knob(
        2,
        integer(1, 100),
        "Failed probes in a row, helpers included, after which a member is suspected. After the first it is probed "
        "again without waiting for its turn.",
        unit="probes",
        more="each delays a suspicion by up to a heartbeat interval",
        less="with 1, a single lost exchange of messages makes a suspicion",
    )
    indirect_probes: int = knob(
        3,
        integer(0, 100),
        "Members that are asked to probe one that did not answer, so that a broken path is not taken for a death.",
        unit="members",
        more="more messages per failed probe",
        less="with 0, whom one node cannot reach is suspected",
    )
    suspicion_mult: int | None = knob(
        None,
        integer_or_auto(1, 100),
        "Least time from suspicion to death: suspicion_mult x max(1, log10(nodes)) x heartbeat interval, once "
        f"suspicion_mult - 2 others suspect the same. {_auto('suspicion_mult')}",
        unit="heartbeat intervals",
        more="deaths are declared later",
        less="slow nodes have less time to refute, and may be declared dead for a moment",
    )
    suspicion_max_mult: int = knob(
        6,
        integer(1, 100),
        "Longest time from suspicion to death, where nobody else suspects the same: this times the least.",
        unit="times the least",
        more="a death that only one node can see is declared later",
        less="with 1, a node that is itself slow declares others dead as fast as a sound one",
    )
    recovery_timeout_ms: int | None = knob(
        None,
        integer_or_auto(20, 3_600_000),
        "How often each dead node is tried again by each other; beside that, whenever a link to it comes up. "
        f"{_auto('recovery_timeout_ms')}",
        unit="ms",
        more="a partition may heal later",
        less="more messages to the dead",
    )
    gossip_interval_ms: int | None = knob(
        None,
        integer_or_auto(10, 60_000),
        "While a node has news, it sends some to `gossip_nodes` others every so often. News reaches all after about "
        f"log(nodes) intervals. {_auto('gossip_interval_ms')}",
        unit="ms",
        more="news spreads more slowly",
        less="more messages for a while after each change",
    )
    gossip_nodes: int = knob(
        3,
        integer(0, 100),
        "Members that news is sent to each time.",
        unit="members",
        more="more messages for a while after each change",
        less="news spreads more slowly; with 0 it rides on probes alone",
    )
    retransmit_mult: int = knob(
        4,
        integer(1, 100),
        "How often a node passes each piece of news on: retransmit_mult x ceil(log10(nodes + 1)).",
        unit="times ceil(log10(nodes + 1))",
        more="more bytes for each change",
        less="news may miss some nodes until the next full exchange",
    )
    sync_interval_ms: int | None = knob(
        None,
        integer_or_auto(100, 3_600_000),
        "How often a node compares all that it holds with another: a hash, and everything only where that differs. "
        f"Beyond 32 nodes rarer by one interval for each doubling. {_auto('sync_interval_ms')}",
        unit="ms",
        more="what gossip has missed is learnt later",
        less="more messages",
    )
    awareness_max: int = knob(
        8,
        integer(0, 100),
        "The highest score of a node's doubt in itself. Probe timeout and heartbeat interval are scaled by 1 + score.",
        unit="score",
        more="a node that is overloaded for long finds failures later",
        less="with 0, an overloaded node suspects the others",
    )


@dataclass(frozen=True, slots=True)
class HintsConfig:
    """What a replica misses while it is away: the coordinators of those writes keep it and bring it afterwards."""

    bytes_max_mb: int = knob(
        128,
        integer(0, 65_536),
        "What a node keeps for one other, in memory and in its store; past it the oldest go. A hint counts for its "
        "record, its key and 400 bytes: time covered = bytes_max / (missed writes a second x hint). 0: no hints.",
        unit="MiB for each node that is away",
        more="memory and disk of the process: this times the nodes that are away at once, and the start after a crash "
        "takes longer",
        less="what a node misses in a longer absence, or under more writes, has to be found by comparison",
    )
    age_max_s: int = knob(
        10_800,
        integer(1, 2_592_000),
        "How long a hint is kept for a node that stays away.",
        unit="s",
        more="space is held for longer for a node that may never return",
        less="what a node misses in a longer absence has to be found by comparison",
    )
    replay_bytes_per_s: int = knob(
        16_777_216,
        integer(1024, 1 << 34),
        "Keys and records that a node brings to those that are back, over all of them. A returning node is brought up "
        "to that many from each other node at once, beside its requests.",
        unit="bytes a second",
        more="requests at the returning node are slower while it catches up",
        less="it holds old records for longer, and its reads are repaired one by one",
    )


@dataclass(frozen=True, slots=True)
class RepairConfig:
    """Anti-entropy: replicas are compared by hash trees, and what one of them missed is brought to it, whether or not
    anybody reads it."""

    interval_ms: int = knob(
        20_000,
        integer(0, 86_400_000),
        "How often two nodes that hold replicas in common compare them, give or take a quarter; beside that, 1 to 4 s "
        "after a link between them comes up. 0: only when `agi-dht repair` orders it, and whether replicas differ is "
        "then not part of what `wait-healthy` waits for.",
        unit="ms",
        more="what writes and hints have missed is repaired later",
        less="2 small messages per pair of nodes and interval while replicas are equal; under heavy writes, which "
        "overtake every comparison, up to 50 ms of each node's time",
    )
    bytes_per_s: int = knob(
        8_388_608,
        integer(1024, 1 << 34),
        "What comparing and repairing may send and receive, of the exchanges that a node begins.",
        unit="bytes a second",
        more="requests are slower while much is repaired",
        less="it takes longer: bytes of all that differs / bytes_per_s",
    )
    build_keys_per_s: int = knob(
        50_000,
        integer(100, 10_000_000),
        "Keys that a node reads to build its hash trees after a start; until then it does not compare. So keys / "
        "build_keys_per_s seconds, beside its requests.",
        unit="keys a second",
        more="requests are slower for a while after a start (at 50,000 about 15 % of a core)",
        less="repair begins later after a start",
    )


@dataclass(frozen=True, slots=True)
class MigrationConfig:
    """Nodes that join or leave: what moves is brought to its new replicas while requests go on."""

    bytes_per_s: int = knob(
        67_108_864,
        integer(1024, 1 << 34),
        "What a node takes in of the data that a change of the members gives it.",
        unit="bytes a second",
        more="requests are slower while data moves",
        less="a change takes longer: bytes that a node is to hold / bytes_per_s",
    )
    join_timeout_ms: int = knob(
        300_000,
        integer(1000, 86_400_000),
        "A change is given up when a node that has to fill itself for it, newcomer or member, has been dead or stopped "
        "for so long; none is begun that needs such a node.",
        unit="ms",
        more="writes may need the answer of a dead node for longer",
        less="a node that restarts while it joins, or a member that restarts meanwhile, makes the change begin anew",
    )
    eviction_timeout_ms: int = knob(
        3_600_000,
        integer(0, 2_592_000_000),
        "A member that has been dead or stopped for so long is removed and its replicas are made anew: one at a time, "
        "none while several are away, and never so that fewer nodes than replicas remain. 0: never.",
        unit="ms",
        more="data stays with one replica less for longer after a loss",
        less="data moves for a node that would have come back",
    )


@dataclass(frozen=True, slots=True)
class ReclaimConfig:
    """Tombstones and expired records go in rounds that all replicas of an arc agree on; until then they take space."""

    interval_ms: int = knob(
        600_000,
        integer(0, 86_400_000),
        "Pause between two rounds of a node, give or take a quarter; each reads through the node's store. 0: never; "
        "then the store is read every ten minutes only to count what waits.",
        unit="ms",
        more="what was deleted takes space for longer",
        less="stores are read through more often (at `repair.build_keys_per_s`)",
    )
    lag_ms: int = knob(
        60_000,
        integer(0, 86_400_000),
        "How old a tombstone must be to go, and by how much a record must have expired. Clock differences and messages "
        "under way longer than this cost a second try of a write, never data.",
        unit="ms",
        more="what was deleted takes space for longer",
        less="more writes are tried twice, since they come too late for an arc that was sealed meanwhile",
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
