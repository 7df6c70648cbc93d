"""The side-by-side benchmark with real servers: our cluster beside whatever peer is installed. Nothing is timed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from bench.peers.base import Peer, missing
from bench.peers.loads import BATCH_KEYS, SMALL, Cell, Plan
from bench.peers.runner import Options, run
from bench.peers.systems import PEERS

CELLS = tuple(
    [Cell(load, SMALL, 1) for load in ("a", "put", "cas", "lock", "batch_put", "batch_get", "scan")]
    + [Cell("a", SMALL, 8)]
)
BEST_FIRST = ("redis-standalone-everysec", "memcached", "etcd", "nats", "zookeeper")
"""Light ones first."""
ROOT = Path(__file__).parents[4]


def _peer(name: str) -> Peer:
    return next(peer for peer in PEERS if peer.facts.name == name)


async def test_ours_beside_a_peer() -> None:
    installed = [peer for name in BEST_FIRST if not missing((peer := _peer(name)).facts)]
    if not installed:
        pytest.skip(f"none of {', '.join(BEST_FIRST)} is installed: {missing(_peer(BEST_FIRST[0]).facts)}")
    peers = [_peer("ours-group"), installed[0]]
    found = await run(peers, Options(Plan(CELLS, BATCH_KEYS, 0.05), rounds=1, budget_s=100.0, turn_max_s=60.0))
    assert not found.failed and not found.skipped
    assert list(found.peers) == [peer.facts.name for peer in peers]
    ours = found.peers["ours-group"]
    assert set(ours.cells) == {cell.name for cell in CELLS} and not ours.lacks
    for peer in found.peers.values():
        for name, (sample,) in peer.cells.items():
            assert sample.operations > 0 and not sample.errors, name
            assert sample.server_rss_mib > 0 and sample.client_rss_mib > 0


def test_the_command_line_refuses_what_it_does_not_know() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.peers", "--peers", "nobody"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2 and "unknown: nobody; there are ours-memory," in done.stderr
