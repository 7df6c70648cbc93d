"""A measurement of load: what it counts."""

from __future__ import annotations

import pytest
from cluster import Cluster

from agi.core.dht.bench import Load, measure, preload
from agi.core.dht.errors import ConfigError


async def test_a_measurement_counts_what_the_nodes_counted() -> None:
    load = Load(keys=50, value_bytes=10, batch=20)
    async with Cluster(3) as cluster:
        client = await cluster.client(read_consistency="ALL")  # so that a coordinator sees every read
        await preload(client, load)
        before = [(node.metrics.gets, node.metrics.puts) for node in cluster.living()]
        samples = [await measure(client, load, "a", 3, 0.2), await measure(client, load, "batch_put", 1, 0.1)]
        counted = sum(
            node.metrics.gets - gets + node.metrics.puts - puts
            for node, (gets, puts) in zip(cluster.living(), before, strict=True)
        )
        assert sum(sample.operations for sample in samples) == counted > 0
        assert not any(sample.errors for sample in samples)
        assert all(sample.p50_ms <= sample.p99_ms <= sample.p999_ms for sample in samples)
        assert set(samples[0].nodes) == {"n0", "n1", "n2"}
        await cluster.down(1)
        await cluster.down(2)
        failing = await measure(client, load, "c", 2, 0.1)
        assert failing.operations == 0 and failing.errors.keys() == {"Unavailable"}
        with pytest.raises(ConfigError, match="unknown workload"):
            await measure(client, load, "z", 1, 0.1)
