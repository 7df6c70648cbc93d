"""Measures how evenly the ring deals out keys: the tables of docs/ring.md.

.venv/bin/python scripts/ring_balance.py            the balance table (exact, the same on every machine)
.venv/bin/python scripts/ring_balance.py --time     what building and looking up cost on this machine
"""

import statistics
import sys
import time
from collections.abc import Iterator

from agi.core.dht.ring import HASH_ALGORITHMS, Ring
from agi.core.dht.types import Node

NAME_SETS = 20
"""Rings of each kind: the shares depend on the node ids, so one ring says little."""
CASES = ((10, 50), (10, 150), (10, 600), (100, 150))
"""(nodes, virtual nodes)"""
FACTOR = 3


def members(count: int, virtual_nodes: int, name_set: int) -> list[Node]:
    return [Node(f"rack{name_set}-node{i}", "127.0.0.1", 7000, virtual_nodes=virtual_nodes) for i in range(count)]


def balance() -> Iterator[str]:
    """Rows of the table: for primaries and for replicas, the most and the least loaded node against the mean."""
    yield "| nodes | virtual nodes | hash | primary max/mean | primary min/mean | RF 3 max/mean | RF 3 min/mean |"
    yield "|---|---|---|---|---|---|---|"
    for count, virtual_nodes in CASES:
        for algorithm in HASH_ALGORITHMS:
            cells = []
            rings = [Ring(members(count, virtual_nodes, n), algorithm, FACTOR) for n in range(NAME_SETS)]
            for factor in (1, FACTOR):
                shares = [[share * count / factor for share in ring.ownership(factor).values()] for ring in rings]
                most, least = [max(row) for row in shares], [min(row) for row in shares]
                cells += [f"{statistics.median(most):.2f} (worst {max(most):.2f})"]
                cells += [f"{statistics.median(least):.2f} (worst {min(least):.2f})"]
            yield f"| {count} | {virtual_nodes} | {algorithm} | {' | '.join(cells)} |"


def timing() -> Iterator[str]:
    keys = [f"session:{i}".encode() for i in range(100_000)]
    yield "| nodes | hash | build | lookup, first time | lookup |"
    yield "|---|---|---|---|---|"
    for count in (3, 10, 100):
        for algorithm in HASH_ALGORITHMS:
            nodes = members(count, 150, 0)
            builds, firsts, lookups = [], [], []
            for _ in range(5):
                start = time.perf_counter()
                ring = Ring(nodes, algorithm, FACTOR)
                built = time.perf_counter()
                for key in keys[: ring.vnode_count]:
                    ring.replicas(key)
                first = time.perf_counter()
                for key in keys:
                    ring.replicas(key)
                builds.append(built - start)
                firsts.append((first - built) / min(len(keys), ring.vnode_count))
                lookups.append((time.perf_counter() - first) / len(keys))
            cells = (f"{min(builds) * 1e3:.1f} ms", f"{min(firsts) * 1e6:.2f} us", f"{min(lookups) * 1e6:.2f} us")
            yield f"| {count} | {algorithm} | {' | '.join(cells)} |"


if __name__ == "__main__":
    for line in timing() if "--time" in sys.argv[1:] else balance():
        sys.stdout.write(line + "\n")
