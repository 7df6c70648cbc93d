"""What `/metrics` tells of a cluster that has done known things."""

from __future__ import annotations

import asyncio

import pytest
from cluster import LOST, Cluster, until
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from agi.core.dht.admin.samples import NodeSamples
from agi.core.dht.node import Node
from agi.core.dht.protocol.messages import ArcListReply
from agi.core.dht.protocol.record import TOMBSTONE
from agi.core.dht.types import MemberStatus


async def _scrape(node: Node) -> dict[tuple[str, str], float]:
    """(sample name, its label values) -> value, read back by the reference parser."""
    text = generate_latest(NodeSamples(node, await node.store.stats())).decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    found = {(s.name, ",".join(value for key, value in sorted(s.labels.items()))): s.value for s in samples}
    assert len(found) == len(samples), "every sample has its own labels"
    return found


async def test_operations_are_counted_once_each_where_they_were_coordinated() -> None:
    async with Cluster(3, loopback=True) as cluster:
        client = await cluster.client()
        await client.put_many({f"k{i}": b"v" for i in range(10)})
        await asyncio.gather(*(client.get(f"k{i}", consistency="ALL") for i in range(7)))
        await client.delete("k0")
        await client.scan("k")
        scrapes = [await _scrape(node) for node in cluster.living()]

    def total(name: str, label: str = "") -> float:
        return sum(scrape[name, label] for scrape in scrapes)

    assert total("dht_operations_total", "put") == 10
    assert total("dht_operations_total", "get") == 7
    assert total("dht_operations_total", "delete") == 1
    assert total("dht_operations_total", "scan") == 1
    assert total("dht_operation_duration_seconds_count", "put") == 10
    assert total("dht_operation_duration_seconds_bucket", "+Inf,put") == 10
    assert total("dht_replica_operations_total", "write") == 3 * (10 + 1)
    assert total("dht_keys", "true") == 3 * 10
    assert total("dht_data_bytes_total", "sent") > 0 and total("dht_data_bytes_total", "received") > 0
    assert total("dht_data_frames_sent_total") >= total("dht_data_writes_total") > 0
    assert total("dht_frames_received_total") > 0
    assert [scrape["dht_peer_connected", peer] for scrape, peer in zip(scrapes, ("n1", "n2", "n0"), strict=True)] == [
        1
    ] * 3
    assert all(scrape["dht_ready", ""] == 1 and scrape["dht_topology_epoch", ""] == 1 for scrape in scrapes)
    assert all(scrape["process_resident_memory_bytes", ""] > 1 << 20 for scrape in scrapes)


async def test_failures_and_lost_peers_show() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client(0, timeout=0.3, retry_count=0)
        await cluster.down(1)
        await cluster.down(2)
        try:
            await client.get("k")
        except Exception as error:  # noqa: BLE001  # which one is for other tests
            name = type(error).__name__
        scrape = await _scrape(cluster.node(0))
    assert scrape["dht_failures_total", name] == 1
    assert scrape["dht_peer_connected", "n1"] == scrape["dht_peer_connected", "n2"] == 0
    assert scrape["dht_ready", ""] == 0


async def test_what_the_failure_detector_does_shows() -> None:
    quick = {"dht.health.heartbeat_interval_ms": 40, "dht.health.probe_timeout_ms": 20}
    async with Cluster(3, settings=quick) as cluster:
        scrape = await _scrape(cluster.node(0))
        assert scrape["dht_members", "alive"] == 3 and scrape["dht_members", "dead"] == 0
        await cluster.down(1)
        await until(lambda: cluster.node(0).detector.status("n1") is MemberStatus.DEAD)
        scrape = await _scrape(cluster.node(0))
        other = await _scrape(cluster.node(2))
    assert [scrape["dht_members", s] for s in ("alive", "suspect", "dead", "left")] == [2, 0, 1, 0]
    assert scrape["dht_probes_total", ""] > scrape["dht_probes_failed_total", ""] > 0
    assert scrape["dht_suspicions_total", ""] + other["dht_suspicions_total", ""] >= 1
    assert scrape["dht_refutations_total", ""] == scrape["dht_false_deaths_total", ""] == 0
    assert 0 <= scrape["dht_health_score", ""] <= 8
    assert scrape["dht_gossip_bytes_total", ""] > 10 * scrape["dht_gossip_messages_total", ""] > 0


async def test_hints_show_by_target_and_what_became_of_them() -> None:
    async with Cluster(3, settings={"dht.hints.bytes_max_mb": 1}) as cluster:
        client = await cluster.client(0)
        await cluster.down(1)
        await cluster.down(2)
        await client.put_many({f"k{i}": b"v" * 300_000 for i in range(4)}, consistency="ONE")
        cluster.clocks[0].ahead_ms = 30_000
        away = await _scrape(cluster.node(0))
        await cluster.up(1)
        await cluster.up(2)
        await until(lambda: not cluster.node(0).handoff.hints)
        back = await _scrape(cluster.node(0))
    assert away["dht_hints", "n1"] == away["dht_hints", "n2"] == 3
    assert 900_000 < away["dht_hint_bytes", "n1"] <= 1 << 20
    assert away["dht_hints_stored_total", ""] == 8 and away["dht_hints_replayed_total", ""] == 0
    assert away["dht_hints_dropped_total", "full"] == 2 and away["dht_hints_dropped_total", "old"] == 0
    assert 30 <= away["dht_hint_oldest_age_seconds", ""] < 60
    assert ("dht_hints", "n1") not in back and back["dht_hint_oldest_age_seconds", ""] == 0
    assert back["dht_hints_replayed_total", ""] == 6 and back["dht_hint_replay_bytes_total", ""] > 6 * 300_000


async def test_what_repair_found_and_what_it_took_shows() -> None:
    async with Cluster(3, settings={"dht.hints.bytes_max_mb": 0}) as cluster:
        for i in range(20):
            cluster.plant(0, f"k{i}", b"v", at_ms=cluster.clocks[0].wall_ms() - 60_000)
        cluster.node(0).antientropy.keeper.forget()
        before = await _scrape(cluster.node(0))
        await until(lambda: all(node.antientropy.keeper.unknown == 0 for node in cluster.living()))
        for other in ("n1", "n2"):
            await cluster.node(0).antientropy.exchange(other)
        await (await cluster.client(0)).put("pending", b"v", consistency="ALL")
        scrape = await _scrape(cluster.node(0))
        served = await _scrape(cluster.node(1))
    assert before["dht_repair_unknown_ranges", ""] > 100 and ("dht_repair_round_age_seconds", "") not in before
    assert [scrape["dht_repair_exchanges_total", each] for each in ("done", "failed", "served")] == [2, 0, 0]
    assert served["dht_repair_exchanges_total", "served"] == 1
    assert scrape["dht_repair_differences_total", ""] == scrape["dht_repair_keys_total", "sent"] == 40
    assert scrape["dht_repair_keys_total", "received"] == 0
    assert scrape["dht_repair_ranges_total", "equal"] > scrape["dht_repair_ranges_total", "differing"] > 20
    assert scrape["dht_repair_bytes_total", "sent"] > 1000 < scrape["dht_repair_bytes_total", "received"]
    assert 0 <= scrape["dht_repair_round_age_seconds", ""] < 10
    assert scrape["dht_repair_pending_keys", ""] >= 1 and scrape["dht_repair_unknown_ranges", ""] == 0
    assert scrape["dht_repair_ranges_built_total", ""] > 100


async def test_a_store_that_does_not_answer_is_told() -> None:
    async with Cluster(1, factor=1) as cluster:
        text = generate_latest(NodeSamples(cluster.node(0), None)).decode()
    assert "\ndht_store_up 0.0\n" in text and "dht_keys" not in text


@pytest.mark.usefixtures("hurried")
async def test_a_change_of_the_members_shows() -> None:
    async with Cluster(3) as cluster:
        for i in range(20):
            cluster.plant(0, f"k{i}", b"v", at_ms=1)
        before = await _scrape(cluster.node(0))
        end = cluster.rule(lambda src, dst, m: LOST if isinstance(m, ArcListReply) and dst != "n3" else None)
        joiner = await cluster.add(wait=False)
        await until(lambda: joiner.topology is not None and joiner.migration.ready)
        during = await _scrape(cluster.node(0))
        end()
        await cluster.settled()
        after, joined = await _scrape(cluster.node(0)), await _scrape(joiner)
    assert [each["dht_change_under_way", ""] for each in (before, during, after)] == [0, 1, 0]
    assert during["dht_change_arcs", "lacking"] > 0 == after["dht_change_arcs", "lacking"]
    assert joined["dht_migration_keys_total", ""] > 0 < joined["dht_migration_bytes_total", ""]


async def test_what_was_reclaimed_and_what_is_left_shows() -> None:
    async with Cluster(3, settings={"dht.reclaim.interval_ms": 0, "dht.reclaim.lag_ms": 0}) as cluster:
        now_ms = cluster.clocks[0].wall_ms()
        for i in range(3):
            cluster.plant(i, "old", b"", at_ms=now_ms - 5000, flags=TOMBSTONE)
            cluster.plant(i, "new", b"", at_ms=now_ms + 4000, flags=TOMBSTONE)
        before = await _scrape(cluster.node(0))
        await cluster.node(0).reclaimer.round()
        cluster.clocks[0].ahead_ms = 9000
        await cluster.node(0).reclaimer.clear()
        after = await _scrape(cluster.node(0))
    assert ("dht_reclaim_floor_age_seconds", "") not in before
    assert before["dht_reclaim_rounds_total", "done"] == 0
    assert not {("dht_tombstones", ""), ("dht_tombstone_oldest_seconds", "")} & before.keys()  # nobody has looked
    assert after["dht_reclaim_rounds_total", "done"] == after["dht_reclaimed_keys_total", ""] == 1
    assert after["dht_tombstones", ""] == 1 and 4 < after["dht_tombstone_oldest_seconds", ""] < 9
    assert 9 <= after["dht_reclaim_floor_age_seconds", ""] < 30
    assert after["dht_dropped_keys_total", ""] == 0
