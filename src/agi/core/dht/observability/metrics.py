"""What a node counts: plain integers on the hot path; a collector turns them into Prometheus samples on scrape."""

from __future__ import annotations

from bisect import bisect_left

from agi.core.dht.errors import from_wire
from agi.core.dht.protocol.messages import KeyError_

LATENCY_BUCKETS_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip


class Histogram:
    """Counts per bucket; the last one is beyond all bounds."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...] = LATENCY_BUCKETS_S) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """`count` operations that took `value` each."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.sum += value * count


GROUP_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)


class Metrics:
    """One node's counters since its start. Operations count keys, not batches."""

    def __init__(self) -> None:
        self.gets = 0
        self.puts = 0
        self.deletes = 0
        self.scans = 0
        self.failures: dict[str, int] = {}
        """Failed keys by error class name."""
        self.get_latency = Histogram()
        self.put_latency = Histogram()
        self.delete_latency = Histogram()
        self.scan_latency = Histogram()
        self.update_latency = Histogram()
        self.hedges = 0
        self.read_repairs = 0
        self.restamps = 0
        self.updates = 0
        self.rounds = 0
        self.rounds_preempted = 0
        self.retries_deduplicated = 0
        self.replica_reads = 0
        self.replica_writes = 0
        self.replica_superseded = 0
        self.replica_below_floor = 0
        self.replica_errors = 0
        self.expired_shrunk = 0
        self.frames_received = 0
        self.group_commits = Histogram(GROUP_BUCKETS)
        self.sync_latency = Histogram()

    def fail_keys(self, errors: list[KeyError_]) -> None:
        for _, wire in errors:
            self.fail(from_wire(*wire), 1)

    def fail(self, error: Exception, count: int) -> None:
        name = type(error).__name__
        self.failures[name] = self.failures.get(name, 0) + count
