"""What is varied, around which base point, and which clusters that takes.

A site is one cluster with its data; a cell is one point of a dimension that is measured there. Points that differ in
what the cluster is (nodes, replicas, keys) need a site each, points that differ in what is asked of it share one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

RECORD_HEADER_BYTES = 40
KEY_BYTES = 18
DISK_FACTOR = 2.0
"""Disk that a site takes at most, over the bytes of its records: the key a second time, compactions under way."""
DISK_NODE_BYTES = 96 << 20
"""And beside that for each node: its write-ahead log and what it has not compacted yet."""
DISK_SPARE_BYTES = 1 << 30
KEYS_MIN = 10_000
KEYS_MAX = 10_000_000
MEMORY_KEYS_MAX = 1_000_000
VALUES_MIN = 4
"""Keys of the largest values."""

DIMENSIONS = {
    "nodes": "nodes",
    "nodes-scaled": "nodes",
    "replicas": "replicas of a key",
    "keys": "keys",
    "memory": "keys, memory store",
    "values": "bytes of a value",
    "callers": "callers",
}
"""Name -> what its points count. `nodes-scaled`: as nodes, with callers in proportion."""


@dataclass(frozen=True, slots=True)
class Base:
    """The point around which one thing at a time is varied."""

    nodes: int = 3
    factor: int = 3
    value_bytes: int = 100
    callers: int = 32
    keys: int = 100_000


@dataclass(frozen=True, slots=True)
class Data:
    """Keys of one size of value."""

    value_bytes: int
    keys: int

    @property
    def bytes(self) -> int:
        return self.keys * (self.value_bytes + KEY_BYTES + RECORD_HEADER_BYTES)

    def key(self, number: int) -> str:
        """Of one length, whatever the number, so that only what is meant varies."""
        return f"{self.value_bytes:08d}:{number:09d}"


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of a dimension."""

    dimension: str
    x: int
    data: Data
    callers: int


@dataclass(frozen=True, slots=True)
class Site:
    """One cluster. `starts`: a start after kill -9 is timed too."""

    name: str
    nodes: int
    factor: int
    data: tuple[Data, ...]
    cells: tuple[Cell, ...]
    storage: str = "rocksdb"
    starts: bool = False

    @property
    def disk_bytes(self) -> int:
        """What it may take at most; 0 for one that keeps nothing."""
        if self.storage == "memory":
            return 0
        stored = sum(data.bytes for data in self.data) * self.factor
        return int(stored * DISK_FACTOR) + self.nodes * DISK_NODE_BYTES


@dataclass(frozen=True, slots=True)
class Scope:
    """The points of each dimension, and how long they are measured."""

    quick: bool
    base: Base
    nodes: tuple[int, ...]
    factors: tuple[int, ...]
    keys: tuple[int, ...]
    value_bytes: tuple[int, ...]
    callers: tuple[int, ...]
    rounds: int
    seconds: float
    value_data_bytes: int
    """Of each size of value, at most: large ones have fewer keys."""


def scope(*, quick: bool, keys_max: int) -> Scope:
    """What is measured. Raises ValueError for a limit of keys that leaves nothing to compare."""
    if not 10 * KEYS_MIN <= keys_max <= KEYS_MAX:
        raise ValueError(f"keys go up to {10 * KEYS_MIN} at least and {KEYS_MAX} at most")
    keys = tuple(10**power for power in range(4, 8) if 10**power <= keys_max)
    if keys[-1] != keys_max:
        keys = (*keys, keys_max)
    if quick:
        return Scope(
            quick=True,
            base=Base(keys=KEYS_MIN),
            nodes=(1, 3, 8),
            factors=(1, 3, 5),
            keys=keys,
            value_bytes=(16, 4096, 262_144, 4_194_304),
            callers=(1, 32, 1024),
            rounds=2,
            seconds=0.4,
            value_data_bytes=8 << 20,
        )
    return Scope(
        quick=False,
        base=Base(),
        nodes=(1, 2, 3, 5, 8),
        factors=(1, 2, 3, 4, 5),
        keys=keys,
        value_bytes=(16, 128, 1024, 8192, 65_536, 524_288, 4_194_304),
        callers=(1, 4, 16, 32, 64, 256, 1024),
        rounds=5,
        seconds=1.5,
        value_data_bytes=32 << 20,
    )


def sites(scope: Scope, dimensions: Iterable[str]) -> list[Site]:
    """The clusters that these dimensions need. Raises ValueError for an unknown one."""
    base, wanted = scope.base, set(dimensions)
    if unknown := wanted - DIMENSIONS.keys():
        raise ValueError(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(DIMENSIONS)}")
    data = Data(base.value_bytes, base.keys)
    found = []
    for nodes in scope.nodes:
        cells = {"nodes": base.callers, "nodes-scaled": max(1, round(base.callers * nodes / base.nodes))}
        found.append(_site(f"nodes-{nodes}", nodes, min(base.factor, nodes), nodes, data, cells))
    most = max(scope.factors)
    for factor in scope.factors:
        found.append(_site(f"replicas-{factor}", most, factor, factor, data, {"replicas": base.callers}))
    for keys in scope.keys:
        many = Data(base.value_bytes, keys)
        cell = Cell("keys", keys, many, base.callers)
        found.append(Site(f"keys-{keys}", base.nodes, base.factor, (many,), (cell,), starts=True))
    for keys in scope.keys:
        if keys <= MEMORY_KEYS_MAX:
            many = Data(base.value_bytes, keys)
            cell = Cell("memory", keys, many, base.callers)
            found.append(Site(f"memory-{keys}", 1, 1, (many,), (cell,), storage="memory"))
    sizes = tuple(
        Data(size, max(VALUES_MIN, min(base.keys, scope.value_data_bytes // size))) for size in scope.value_bytes
    )
    cells_of_sizes = tuple(Cell("values", each.value_bytes, each, base.callers) for each in sizes)
    found.append(Site("values", base.nodes, base.factor, sizes, cells_of_sizes))
    cells_of_callers = tuple(Cell("callers", callers, data, callers) for callers in scope.callers)
    found.append(Site("callers", base.nodes, base.factor, (data,), cells_of_callers))
    return [chosen for site in found if (chosen := _only(site, wanted)).cells]


def _site(name: str, nodes: int, factor: int, x: int, data: Data, callers: Mapping[str, int]) -> Site:
    cells = tuple(Cell(dimension, x, data, count) for dimension, count in callers.items())
    return Site(name, nodes, factor, (data,), cells)


def _only(site: Site, dimensions: set[str]) -> Site:
    cells = tuple(cell for cell in site.cells if cell.dimension in dimensions)
    return Site(site.name, site.nodes, site.factor, site.data, cells, site.storage, site.starts)


def shortage(chosen: Iterable[Site], free_bytes: int) -> str:
    """What to say where the disk is too small for these sites, which all keep their data until the end; else
    nothing."""
    needed = sum(site.disk_bytes for site in chosen) + DISK_SPARE_BYTES
    if needed <= free_bytes:
        return ""
    return (
        f"the clusters may need {needed / 1e9:.1f} GB of disk, {free_bytes / 1e9:.1f} GB are free: "
        "lower --keys-max, name fewer --dimensions, or give another --folder"
    )
