"""A node's counters as Prometheus samples, made when they are asked for: the hot path only adds to integers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate

from prometheus_client import ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.utils import floatToGoString

from agi.core.dht.node import Node
from agi.core.dht.observability.metrics import Histogram
from agi.core.dht.storage.base import StoreStats
from agi.core.dht.types import PROTOCOL_VERSION

_PROCESS = ProcessCollector(registry=None)


class NodeSamples:
    """A collector of one moment. `store` is None where the store did not answer."""

    def __init__(self, node: Node, store: StoreStats | None) -> None:
        self._node = node
        self._store = store

    def collect(self) -> Iterator[Metric]:
        yield from self._requests()
        yield from self._replica()
        yield from self._hints()
        yield from self._repair()
        yield from self._migration()
        yield from self._reclaim()
        yield from self._wires()
        yield from self._cluster()
        yield from self._health()
        if self._store is not None:
            yield from self._storage(self._store)
        yield _gauge("dht_store_up", "Whether the store answered this scrape.", float(self._store is not None))
        yield from _PROCESS.collect()

    def _requests(self) -> Iterator[Metric]:
        metrics = self._node.metrics
        counts = {
            "get": metrics.gets,
            "put": metrics.puts,
            "delete": metrics.deletes,
            "scan": metrics.scans,
            "update": metrics.updates,
        }
        yield _counters("dht_operations", "Keys (scans: pages) that this node coordinated.", "operation", counts)
        yield _counters("dht_failures", "Keys that failed, by error.", "error", metrics.failures)
        yield _histograms(
            "dht_operation_duration_seconds",
            "Time from a request's arrival at its coordinator to its answer; each key counts.",
            "operation",
            {
                "get": metrics.get_latency,
                "put": metrics.put_latency,
                "delete": metrics.delete_latency,
                "scan": metrics.scan_latency,
                "update": metrics.update_latency,
            },
        )
        yield _counter("dht_hedged_reads", "Reads that asked a further replica because one was late.", metrics.hedges)
        yield _counter("dht_read_repairs", "Records that reads brought to replicas.", metrics.read_repairs)
        yield _counter("dht_restamps", "Writes stamped anew above a newer version.", metrics.restamps)
        yield _counter("dht_rounds", "Values of keys under consensus that were chosen.", metrics.rounds)
        yield _counter(
            "dht_rounds_preempted", "Rounds of consensus that another coordinator overtook.", metrics.rounds_preempted
        )
        yield _gauge(
            "dht_promises", "Rounds that this node has promised and not yet accepted.", self._node.acceptor.promises
        )
        yield _counter(
            "dht_retries_deduplicated", "Repeated writes that were answered from memory.", metrics.retries_deduplicated
        )
        coordinator = self._node.coordinator
        pending = coordinator.pending if coordinator is not None else 0
        yield _gauge("dht_requests_pending", "Parts of requests that wait for replicas.", pending)

    def _replica(self) -> Iterator[Metric]:
        metrics = self._node.metrics
        yield _counters(
            "dht_replica_operations",
            "Keys read and written at this node as a replica.",
            "operation",
            {"read": metrics.replica_reads, "write": metrics.replica_writes},
        )
        yield _counter("dht_replica_errors", "Failed requests to replicas.", metrics.replica_errors)
        yield _counter("dht_replica_superseded", "Writes refused for a newer version.", metrics.replica_superseded)
        yield _counter(
            "dht_replica_below_floor",
            "Writes, hints and repairs that came too late: what they bring was reclaimed or may be.",
            metrics.replica_below_floor,
        )
        yield _counter("dht_expired_shrunk", "Expired records shrunk to tombstones.", metrics.expired_shrunk)
        yield _histograms("dht_group_commit_records", "Records of one group commit.", "", {"": metrics.group_commits})
        yield _histograms("dht_sync_duration_seconds", "Time of one sync of the log.", "", {"": metrics.sync_latency})

    def _hints(self) -> Iterator[Metric]:
        handoff = self._node.handoff
        pending = handoff.hints.pending()
        held = GaugeMetricFamily("dht_hints", "Records kept for a node that missed them.", labels=["target"])
        size = GaugeMetricFamily("dht_hint_bytes", "What they count for in hints.bytes_max_mb.", labels=["target"])
        for target in pending:
            held.add_metric([target.node], target.hints)
            size.add_metric([target.node], target.bytes)
        yield held
        yield size
        oldest_ms = min((target.oldest_ms for target in pending), default=None)
        age_s = 0.0 if oldest_ms is None else max(0, self._node.clock.wall_ms() - oldest_ms) / 1000
        yield _gauge("dht_hint_oldest_age_seconds", "Age of the oldest hint; 0 where there is none.", age_s)
        yield _counter("dht_hints_stored", "Hints taken.", handoff.hints.stored)
        yield _counter("dht_hints_replayed", "Hints that their targets confirmed.", handoff.hints.replayed)
        yield _counter("dht_hint_replay_bytes", "Keys and records sent as hints.", handoff.replayed_bytes)
        dropped = {why.value: count for why, count in handoff.hints.dropped.items()}
        yield _counters("dht_hints_dropped", "Hints given up, by reason.", "reason", dropped)

    def _migration(self) -> Iterator[Metric]:
        node = self._node
        migration, topology = node.migration, node.topology
        changing = float(topology is not None and topology.in_transition)
        yield _gauge("dht_change_under_way", "1 while members join or leave, else 0.", changing)
        arcs = {"filled": migration.arcs_done, "lacking": migration.arcs - migration.arcs_done}
        yield _gauges("dht_change_arcs", "Arcs that the change under way gives this node.", "state", arcs)
        yield _counter("dht_migration_keys", "Records brought to this node by changes of the members.", migration.keys)
        yield _counter("dht_migration_bytes", "Keys and records brought to this node so.", migration.bytes)

    def _reclaim(self) -> Iterator[Metric]:
        reclaimer = self._node.reclaimer
        rounds = {"done": reclaimer.rounds, "failed": reclaimer.failed}
        yield _counters("dht_reclaim_rounds", "Rounds that this node led.", "outcome", rounds)
        yield _counter("dht_reclaimed_keys", "Tombstones and expired records taken away.", reclaimer.reclaimed)
        yield _counter("dht_registers_retired", "Registers of absent keys taken away.", reclaimer.retired)
        yield _counter("dht_dropped_keys", "Records of arcs that went to other nodes, dropped.", reclaimer.dropped)
        if reclaimer.dead is not None and (age_s := reclaimer.oldest_dead_s) is not None:  # nobody has looked before
            text = "Dead records that the last look at the store left; absent before the first."
            yield _gauge("dht_tombstones", text, float(reclaimer.dead))
            yield _gauge("dht_tombstone_oldest_seconds", "Age of the oldest of them; 0 without any.", age_s)
        if self._node.topology is not None and (floor_s := reclaimer.floor_age_s) is not None:
            yield _gauge("dht_reclaim_floor_age_seconds", "How old what is not yet reclaimed may be.", floor_s)

    def _repair(self) -> Iterator[Metric]:
        repair = self._node.antientropy
        totals, keeper = repair.totals, repair.keeper
        outcomes = {"done": totals.exchanges - totals.failed, "failed": totals.failed, "served": repair.answers.served}
        yield _counters("dht_repair_exchanges", "Comparisons with peers, begun or served.", "outcome", outcomes)
        ranges = {"equal": totals.ranges - totals.differing, "differing": totals.differing}
        yield _counters("dht_repair_ranges", "Ranges compared.", "result", ranges)
        yield _counter("dht_repair_differences", "Keys of which a replica was behind.", totals.differences)
        keys = {"sent": totals.keys_sent, "received": totals.keys_received}
        yield _counters("dht_repair_keys", "Records brought to a replica.", "direction", keys)
        sizes = {"sent": totals.bytes_sent, "received": totals.bytes_received}
        yield _counters("dht_repair_bytes", "Bytes of all that comparing and repairing took.", "direction", sizes)
        age_s = repair.round_age_s
        if age_s is not None:
            text = "Time since every peer had been compared with in full; absent before the first time."
            yield _gauge("dht_repair_round_age_seconds", text, age_s)
        yield _gauge("dht_repair_pending_keys", "Changed keys that are not in the hash trees yet.", keeper.pending)
        yield _gauge("dht_repair_unknown_ranges", "Ranges whose hash tree is not built yet.", keeper.unknown)
        yield _counter("dht_repair_ranges_built", "Hash trees built from a scan.", keeper.built)

    def _wires(self) -> Iterator[Metric]:
        yield _counter(
            "dht_frames_received", "Messages that arrived, on all wires.", self._node.metrics.frames_received
        )
        traffic = self._node.traffic
        if traffic is not None:
            yield _counter("dht_data_frames_sent", "Messages sent on the native wire.", traffic.frames_sent)
            yield _counter("dht_data_writes", "System calls that sent them.", traffic.writes)
            sizes = {"sent": traffic.bytes_sent, "received": traffic.bytes_received}
            yield _counters("dht_data_bytes", "Bytes on the native wire.", "direction", sizes)

    def _cluster(self) -> Iterator[Metric]:
        node = self._node
        yield _gauge("dht_ready", "Whether the node serves requests.", float(not node.waiting_for))
        yield _gauge("dht_topology_epoch", "The topology's epoch; 0 before there is one.", node.epoch)
        peers = GaugeMetricFamily("dht_peer_connected", "Whether the links to a peer are up.", labels=["peer"])
        for name in node.peers.all:
            peers.add_metric([name], float(name in node.peers.connected))
        yield peers
        yield _gauge("dht_links", "Accepted links.", node.links)
        info = GaugeMetricFamily("dht_node_info", "Always 1.", labels=["node_id", "storage", "protocol"])
        info.add_metric([node.node_id, node.store.name, str(PROTOCOL_VERSION)], 1)
        yield info

    def _health(self) -> Iterator[Metric]:
        detector = self._node.detector
        core = detector.core
        if core is None:
            return
        members = GaugeMetricFamily("dht_members", "Members by what this node holds of them.", labels=["status"])
        for status, count in core.view.counts.items():
            members.add_metric([status.name.lower()], count)
        yield members
        yield _gauge("dht_health_score", "Doubt of this node in itself; 0 is healthy.", core.awareness.score)
        yield _counter("dht_probes", "Members probed.", core.probes)
        yield _counter("dht_probes_failed", "Probes that nobody answered, helpers included.", core.failed_probes)
        yield _counter("dht_suspicions", "Members that this node was the first to suspect.", core.suspicions)
        yield _counter("dht_refutations", "Accusations of this node that it refuted.", core.refutations)
        yield _counter("dht_false_deaths", "Members held to be dead that then refuted it.", core.false_deaths)
        yield _counter("dht_gossip_messages", "Messages sent by the failure detector.", detector.messages)
        yield _counter("dht_gossip_bytes", "Bytes of these.", detector.bytes)

    def _storage(self, store: StoreStats) -> Iterator[Metric]:
        keys = GaugeMetricFamily("dht_keys", "Records held, tombstones included.", labels=["exact"])
        keys.add_metric([str(store.exact).lower()], store.records)
        yield keys
        yield _gauge("dht_store_bytes", "What the records take, on disk or in memory.", store.bytes)
        engine = GaugeMetricFamily("dht_store_engine", "The storage engine's own figures.", labels=["name"])
        for name, value in store.engine.items():
            engine.add_metric([name], value)
        yield engine


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _gauges(name: str, text: str, label: str, values: dict[str, int]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _counters(name: str, text: str, label: str, values: dict[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _histograms(name: str, text: str, label: str, values: dict[str, Histogram]) -> Metric:
    family = HistogramMetricFamily(name, text, labels=[label] if label else [])
    for key, histogram in values.items():
        bounds: Iterable[str] = [*map(floatToGoString, histogram.bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
        family.add_metric([key] if label else [], buckets, histogram.sum)
    return family
