"""What a data folder knows about its node: who it is, how often it started, what it voted for, what it belongs to.

All of it lives in the store itself (`put_meta`, always synced), so that it is lost exactly when the data is.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeVar

import msgspec

from agi.core.dht.config import Config
from agi.core.dht.errors import DHTError, FolderMismatch, StorageCorrupt, StorageError, StorageFull
from agi.core.dht.protocol.floors import Floors
from agi.core.dht.protocol.floors import unpack as unpack_floors
from agi.core.dht.storage.base import StorageBackend
from agi.core.dht.topology import Topology, unpack

T = TypeVar("T")

_IDENTITY, _TOPOLOGY, _VOTE, _BOOTS, _ADDRESSES = "identity", "topology", "vote", "starts", "addresses"
_ACCEPTOR, _HISTORY, _FLOORS, _RECOVERY = "acceptor", "history", "floors", "recovery"

RUNS_MAX = 32
"""Starts that a folder remembers: a copy and what it was copied from differ in one of them (I3)."""
HISTORY_EPOCHS_MAX = 100
"""Past epochs that a node remembers, for people."""


class Identity(msgspec.Struct, frozen=True):
    """One start of one node on one disk. `run_id` is random per process."""

    node_id: str
    disk_id: str
    cluster: str
    boot: int
    run_id: str = ""
    runs: tuple[str, ...] = ()
    """The run ids of the starts before this one, the last first."""


class Past(msgspec.Struct, frozen=True):
    """An epoch that this node has adopted."""

    generation: int
    epoch: int
    digest: str
    note: str
    decided_ms: int
    voters: tuple[str, ...]


class Promise(msgspec.Struct, frozen=True):
    """What this node, as a voter, may not forget of one epoch (protocol/register.py); in a recovery `epoch` is the
    generation."""

    epoch: int
    promised: tuple[int, int]
    accepted: tuple[int, int]
    value: bytes


class Ledger:
    """Reads and writes the node's own facts in its store."""

    def __init__(self, store: StorageBackend) -> None:
        self._store = store
        self.on_failed: Callable[[DHTError], None] = lambda error: None
        """Told when the store failed for good (not merely for want of space): the node cannot go on (D2)."""

    async def _put(self, name: str, value: bytes) -> None:
        try:
            await self._store.put_meta(name, value)
        except StorageFull:
            raise
        except StorageError as error:
            self.on_failed(error)
            raise

    async def open(self, node_id: str, config: Config, rng: random.Random, address: str = "") -> Identity:
        """Checks that the folder is this node's, raises its boot counter and stores it before anything else happens
        (I3). A new folder gets a new disk id. `address` is where the node is reached now. Raises FolderMismatch."""
        raw = await self._store.get_meta(_IDENTITY)
        run_id = f"{rng.getrandbits(64):016x}"
        if raw is None:
            identity = Identity(node_id, f"{rng.getrandbits(128):032x}", config.cluster.name, 1, run_id)
        else:
            known = _decode(raw, Identity)
            if known.node_id != node_id:
                raise FolderMismatch(f"the data folder belongs to node {known.node_id}, not {node_id}")
            if known.cluster != config.cluster.name:
                raise FolderMismatch(f"the data folder belongs to cluster {known.cluster}, not {config.cluster.name}")
            runs = (known.run_id, *known.runs)[:RUNS_MAX]
            identity = Identity(known.node_id, known.disk_id, known.cluster, known.boot + 1, run_id, runs)
        topology = await self.topology()
        if topology is not None:
            await self._check_set(config, topology, address)
        await self._put(_IDENTITY, msgspec.msgpack.encode(identity))
        return identity

    async def _check_set(self, config: Config, topology: Topology, own: str) -> None:
        for what, ours, theirs in (
            ("replication factor", config.replication.factor, topology.factor),
            ("virtual nodes", config.ring.virtual_nodes, topology.virtual_nodes),
            ("hash algorithm", config.ring.hash_algorithm, topology.hash_algorithm),
        ):
            if ours != theirs:
                raise FolderMismatch(f"the data folder's cluster has {what} {theirs}, the configuration says {ours}")
        raw = await self._store.get_meta(_ADDRESSES)
        known = set(_decode(raw, list[str])) if raw else set()
        known |= {member.address for member in topology.members}
        others = [address for address in config.cluster.bootstrap_nodes if address != own]
        # a list may name who left, and who is still to join; but one of strangers alone is another cluster's
        if others and known.isdisjoint(others):
            raise FolderMismatch(
                f"the data folder's cluster was formed by other peers: it does not know {', '.join(others)}"
            )

    async def topology(self) -> Topology | None:
        raw = await self._store.get_meta(_TOPOLOGY)
        return None if raw is None else unpack(raw)

    async def store_topology(self, topology: Topology, addresses: list[str] | None = None) -> None:
        """Durable before anybody hears of it (T2). `addresses` are the names under which the members were reached."""
        if addresses is not None:
            await self._put(_ADDRESSES, msgspec.msgpack.encode(addresses))
        past = Past(
            topology.generation, topology.epoch, topology.digest, topology.note, topology.decided_ms, topology.voters
        )
        history = [known for known in await self.history() if known.digest != past.digest]
        await self._put(_HISTORY, msgspec.msgpack.encode([*history, past][-HISTORY_EPOCHS_MAX:]))
        await self._put(_TOPOLOGY, topology.packed)

    async def history(self) -> list[Past]:
        """The epochs that this node has adopted, oldest first."""
        raw = await self._store.get_meta(_HISTORY)
        return [] if raw is None else _decode(raw, list[Past])

    async def promise(self) -> Promise | None:
        raw = await self._store.get_meta(_ACCEPTOR)
        return None if raw is None else _decode(raw, Promise)

    async def store_promise(self, promise: Promise) -> None:
        """Durable before the reply that tells of it (D1)."""
        await self._put(_ACCEPTOR, msgspec.msgpack.encode(promise))

    async def recovery(self) -> Promise | None:
        raw = await self._store.get_meta(_RECOVERY)
        return None if raw is None else _decode(raw, Promise)

    async def store_recovery(self, promise: Promise) -> None:
        """Durable before the reply that tells of it (D1)."""
        await self._put(_RECOVERY, msgspec.msgpack.encode(promise))

    async def vote(self) -> Topology | None:
        raw = await self._store.get_meta(_VOTE)
        return None if raw is None else unpack(raw)

    async def store_vote(self, topology: Topology) -> None:
        await self._put(_VOTE, topology.packed)

    async def floors(self) -> Floors:
        raw = await self._store.get_meta(_FLOORS)
        return Floors() if raw is None else unpack_floors(raw)

    async def store_floors(self, floors: Floors) -> None:
        """Durable before the reply that tells of it (G1)."""
        await self._put(_FLOORS, floors.packed)

    async def boots(self) -> dict[str, tuple[int, str]]:
        """The last start seen of each `node id/disk id`: its boot counter and run id."""
        raw = await self._store.get_meta(_BOOTS)
        return {} if raw is None else _decode(raw, dict[str, tuple[int, str]])

    async def store_boots(self, boots: dict[str, tuple[int, str]]) -> None:
        await self._put(_BOOTS, msgspec.msgpack.encode(boots))


def _decode(raw: bytes, kind: type[T]) -> T:
    try:
        return msgspec.msgpack.decode(raw, type=kind)
    except msgspec.DecodeError as error:
        raise StorageCorrupt(f"the store's own facts cannot be read: {error}") from None
