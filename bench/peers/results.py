"""The results of a run, as they are stored and reported on."""

from __future__ import annotations

import msgspec
from bench.peers.loads import Sample


class Named(msgspec.Struct):
    """A peer."""

    title: str
    guarantee: str
    durability: str
    against: str
    replicated: bool
    threads: bool
    note: str
    versions: list[str]
    cells: dict[str, list[Sample]] = {}
    """Cell -> one sample a round."""
    lacks: dict[str, str] = {}
    """Cell -> why there is none."""


class Results(msgspec.Struct):
    """A run."""

    hardware: list[str]
    load_per_core: float
    """Of other programs, before the run."""
    command: str
    date: str
    rounds: int
    seconds: float
    keys: int
    cells: list[str]
    took_s: float = 0.0
    peers: dict[str, Named] = {}
    skipped: dict[str, str] = {}
    """Peer -> why it has no figures."""
    failed: dict[str, list[str]] = {}
    """Peer -> what went wrong in single turns."""
    bare: dict[str, dict[str, list[float]]] = {}
    """Store -> section -> operations a second of the bare loop, one for each round."""


def values(peer: Named, cell: str, field: str) -> list[float]:
    """One figure of a cell, over the rounds; empty where it was not measured."""
    return [float(getattr(sample, field)) for sample in peer.cells.get(cell, [])]
