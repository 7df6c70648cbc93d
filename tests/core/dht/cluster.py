"""A cluster of real nodes in the test's own event loop: links in memory or on loopback, records in memory.

    async with Cluster(3) as cluster:
        client = await cluster.client()
        cluster.rule(lambda src, dst, message: [] if dst == "n2" else None)    # n2 hears nothing any more

Unless told otherwise the nodes resume a topology that was stored for them, so that a cluster is up in milliseconds.
A node that goes `down` loses its links at once, as a killed process does, and keeps its store for `up`.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Self, cast

import msgspec

from agi.core.dht.client import DHTClient, SyncDHTClient
from agi.core.dht.clock import SystemClock
from agi.core.dht.config import Config, load_config
from agi.core.dht.errors import DHTError
from agi.core.dht.identity import Ledger
from agi.core.dht.node import Node
from agi.core.dht.protocol.messages import Hello, Message
from agi.core.dht.protocol.record import pack
from agi.core.dht.protocol.versioning import from_ms, writer_id
from agi.core.dht.ring import token_bytes
from agi.core.dht.storage.base import Batch, StorageBackend
from agi.core.dht.storage.memory import MemoryStore
from agi.core.dht.topology import Member, Topology
from agi.core.dht.transport.base import Link, Listener, Transport
from agi.core.dht.transport.handshake import greet
from agi.core.dht.transport.memory import MemoryNetwork, MemoryTransport
from agi.core.dht.transport.native import NativeTransport
from agi.core.dht.types import PROTOCOL_VERSION

WAIT_S = 10.0
"""For whatever a test waits for; far above what it takes."""
LOST: Sequence[float] = ()
Rule = Callable[[str, str, Message], Sequence[float] | None]
"""(source, destination, message) -> delays of each copy, `LOST` for none, None where another rule may decide."""


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110  # nobody signals what tests look for
            await asyncio.sleep(0.002)


class HostClock(SystemClock):
    """The system's clock, off by `ahead_ms` on the wall."""

    def __init__(self) -> None:
        self.ahead_ms = 0

    def wall_ms(self) -> int:
        return super().wall_ms() + self.ahead_ms


class KeptStore(MemoryStore):
    """A memory store that stands for a disk: what it holds outlives its node."""

    async def close(self) -> None:
        """Kept open for the next start and for the test's own looks."""


class Wire:
    """A link to one node that speaks for itself: which node coordinates, under which ids, is the test's choice."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.closed = False
        self.error: DHTError | None = None
        self._ids = 0
        self.link: Link

    def message(self, link: Link, message: msgspec.Struct) -> None:
        self.heard.append(message)

    def link_closed(self, link: Link, error: DHTError | None) -> None:
        self.closed, self.error = True, error

    async def ask(self, message: Any) -> Any:
        """The reply to a message; its id is chosen here if it is 0."""
        if not message.id:
            self._ids += 1
            message.id = 10_000 + self._ids
        known = len(self.heard)
        self.link.send(message)
        await until(lambda: self.closed or any(getattr(reply, "id", 0) == message.id for reply in self.heard[known:]))
        return next(reply for reply in self.heard[known:] if getattr(reply, "id", 0) == message.id)


class Door:
    """Takes the links of one address for whatever node lives there now."""

    def __init__(self) -> None:
        self.node: Node | None = None

    def message(self, link: Link, message: msgspec.Struct) -> None:
        if self.node is None:
            link.close()
        else:
            self.node.message(link, message)

    def link_closed(self, link: Link, error: DHTError | None) -> None:
        if self.node is not None:
            self.node.link_closed(link, error)


class Cluster:
    """
    Args:
        count: nodes, named n0, n1, ...
        formed: resume a stored topology; False lets the nodes agree on one.
        loopback: real sockets instead of links in memory (rules do not apply then).
        hasty: silent links are given up after 0.3 s.
        settings: of every node, by full name.
        per_node: settings of single nodes by index, over those of every node.
        store: makes the store of the node with this index.
    """

    def __init__(
        self,
        count: int = 3,
        *,
        factor: int = 3,
        formed: bool = True,
        loopback: bool = False,
        hasty: bool = False,
        settings: Mapping[str, object] | None = None,
        per_node: Mapping[int, Mapping[str, object]] | None = None,
        store: Callable[[int], StorageBackend] | None = None,
    ) -> None:
        self.count = count
        self.names = [f"n{i}" for i in range(count)]
        self.addresses = [f"{name}:7000" for name in self.names]
        self.network = MemoryNetwork()
        self.network.policy = self._policy
        self.clocks = [HostClock() for _ in range(count)]
        self.rng = random.Random(7)
        self.nodes: list[Node | None] = [None] * count
        self.fatal: list[DHTError] = []
        self.topology: Topology | None = None
        self._formed = formed
        self._loopback = loopback
        self._patience = {"ping_interval_s": 0.05, "idle_timeout_s": 0.3} if hasty else {}
        self._settings = {
            "dht.replication.factor": factor,
            "dht.ring.virtual_nodes": 8,
            "dht.ring.hash_algorithm": "xxh3",
            "dht.expiry.sweep_interval_ms": 3_600_000,
            "dht.repair.interval_ms": 0,
            **(settings or {}),
        }
        self._per_node = per_node or {}
        self._advertised: dict[int, str] = {}
        make = store or (lambda _: KeptStore(token_bytes("xxh3")))
        self.stores = [make(i) for i in range(count)]
        self._doors = [Door() for _ in range(count)]
        self._rules: list[Rule] = []
        self._clients: list[DHTClient] = []
        self._wires: list[Wire] = []
        self._listeners: list[Listener] = []
        self._seeds: dict[int, Listener] = {}

    # --- life

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _start(self) -> None:
        if self._loopback:
            for i, door in enumerate(self._doors):
                self._seeds[i] = await NativeTransport().listen("127.0.0.1:0", door)
                self.addresses[i] = self._seeds[i].address
        if self._formed:
            await self._form()
        for i in range(self.count):
            await self.up(i, wait=False)
        if self._formed:
            await self.connected()

    async def stop(self) -> None:
        for client in self._clients:
            await client.close()
        for wire in self._wires:
            wire.link.close()
        for i, node in enumerate(self.nodes):
            if node is not None:
                await self._stop(i, node)
        for listener in self._seeds.values():
            await listener.close()
        for store in self.stores:
            if isinstance(store, KeptStore):
                await MemoryStore.close(store)

    async def _stop(self, i: int, node: Node) -> None:
        self._doors[i].node = None
        self.nodes[i] = None
        await node.stop()

    def config(self, i: int) -> Config:
        peers = ",".join(self.addresses)
        own = {"dht.node.id": self.names[i], "dht.node.advertise": self.addresses[i]}
        settings = {**own, **self._settings, **self._per_node.get(i, {})}
        return load_config(None, {}, {"dht.cluster.bootstrap_nodes": peers, **settings})

    async def _form(self) -> None:
        members = []
        ledgers = []
        for i, store in enumerate(self.stores):
            await store.open()
            ledgers.append(Ledger(store))
            identity = await ledgers[i].open(self.names[i], self.config(i), self.rng)
            members.append(Member(self.names[i], identity.disk_id, self.addresses[i]))
        config = self.config(0)
        self.topology = Topology.first(
            config.cluster.name,
            config.replication.factor,
            config.ring.virtual_nodes,
            config.ring.hash_algorithm,
            members,
        )
        for ledger in ledgers:
            await ledger.store_topology(self.topology, self.addresses)

    def _transport(self, host: str) -> Transport:
        if self._loopback:
            return NativeTransport(**self._patience)
        return MemoryTransport(self.network, host, **self._patience)

    async def up(self, i: int, *, wait: bool = True) -> Node:
        """Starts a node on its store; waits until it is connected to the others that are up."""
        transport = self._transport(self.names[i])
        if not self._loopback:
            self._seeds[i] = await transport.listen(self.addresses[i], self._doors[i])
        node = Node(
            self.config(i),
            node_id=self.names[i],
            address=self._advertised.get(i, self.addresses[i]),
            store=self.stores[i],
            seed=transport,
            data=transport,
            data_listen=["127.0.0.1:0" if self._loopback else f"{self.names[i]}:0"],
            clock=self.clocks[i],
            rng=random.Random(i),
            on_fatal=self.fatal.append,
        )
        await node.start()
        self.nodes[i] = self._doors[i].node = node
        if wait:
            await self.connected()
        return node

    async def add(self, *, wait: bool = True, address: str = "") -> Node:
        """Starts one more node, which the others' peer lists do not name; waits until it is a member and all know it.
        `address`: what it advertises, if not the one that it is reached by."""
        i = self.count
        self.count += 1
        self.names.append(f"n{i}")
        self.addresses.append(f"n{i}:7000")
        self.clocks.append(HostClock())
        self.nodes.append(None)
        self.stores.append(KeptStore(token_bytes("xxh3")))
        self._doors.append(Door())
        if address:
            self._advertised[i] = address
        node = await self.up(i, wait=False)
        if wait:
            await self.settled()
            await self.connected()
        return node

    async def renewed(self, i: int) -> Node:
        """Starts a node that is down, on an empty disk; does not wait for anything."""
        old, self.stores[i] = self.stores[i], KeptStore(token_bytes("xxh3"))
        await MemoryStore.close(cast(KeptStore, old))
        return await self.up(i, wait=False)

    async def settled(self) -> None:
        """All nodes that are up are members of one topology, and no change is under way."""

        def done() -> bool:
            topologies = [node.topology for node in self.living()]
            return len({topology and topology.digest for topology in topologies}) == 1 and all(
                topology is not None
                and not topology.in_transition
                and {node.node_id for node in self.living()} <= topology.by_id.keys()
                for topology in topologies
            )

        await until(done)

    async def down(self, i: int, *, noticed: bool = True) -> None:
        """Kills a node: nothing of it is heard any more. `noticed`: its peers' links break at once."""
        node = self.node(i)
        self.network.crash(self.names[i], 0.0 if noticed else None)
        await self._stop(i, node)
        if noticed:
            name = self.names[i]
            await until(lambda: all(name not in other.peers.connected for other in self.living()))

    async def connected(self) -> None:
        """Every node that is up is connected to all others that are up."""
        living = len(self.living())
        await until(
            lambda: all(node.formed.is_set() and len(node.peers.connected) == living - 1 for node in self.living())
        )

    def living(self) -> list[Node]:
        return [node for node in self.nodes if node is not None]

    def node(self, i: int) -> Node:
        node = self.nodes[i]
        assert node is not None, f"n{i} is down"
        return node

    # --- faults

    def rule(self, rule: Rule) -> Callable[[], None]:
        """Adds a rule for what happens to messages, asked before the older ones; returns what removes it."""
        self._rules.insert(0, rule)
        return lambda: self._rules.remove(rule)

    def _policy(self, src: str, dst: str, message: Message) -> Sequence[float]:
        for rule in self._rules:
            delays = rule(src, dst, message)
            if delays is not None:
                return delays
        return (0.0,)

    # --- who asks

    async def client(self, *seeds: int, host: str = "client", **options: Any) -> DHTClient:
        """A connected client, closed with the cluster. `seeds`: the nodes whose addresses it is given (all); `host`:
        the name by which rules know it."""
        transport = self._transport(host)
        client = DHTClient(
            seed_transport=transport, data_transport=transport, rng=random.Random(len(self._clients)), **options
        )
        self._clients.append(client)
        await client.connect([self.addresses[i] for i in seeds or range(self.count)])
        return client

    async def wire(self, i: int, name: str = "c", hello: Hello | None = None) -> Wire:
        """A link to one node on the data wire, as a client of this name."""
        wire = Wire()
        transport = self._transport("client")
        hello = hello or Hello(PROTOCOL_VERSION, "client", name)
        wire.link, _ = await greet(transport, self.node(i).data_address, hello, wire)
        self._wires.append(wire)
        return wire

    # --- what the nodes hold

    def held(self, key: str) -> list[bytes | None]:
        """The record of a key at each node's store."""
        return [store.read([key.encode()])[0] for store in self.stores]

    def holders(self, key: str) -> list[int]:
        """Indexes of the key's replicas."""
        topology = self.node(0).topology
        assert topology is not None
        return [self.names.index(name) for name in topology.ring().preference(key.encode(), topology.replica_count)]

    def plant(
        self, i: int, key: str, value: bytes, *, at_ms: int, flags: int = 0, expires_ms: int = 0, writer: int = 0
    ) -> bytes:
        """Puts a record into one node's store behind its back; returns it. Of that `writer`, the node itself for 0."""
        raw = key.encode()
        record = pack(raw, value, from_ms(at_ms), writer or writer_id(self.names[i], 1), at_ms, expires_ms, flags)
        store = self.stores[i]
        store.write(Batch({raw: record}, [raw] if store.read([raw])[0] is None else []))
        return record


class ThreadedCluster:
    """A cluster on loopback in a thread of its own, for tests of what blocks. `run` performs a coroutine there."""

    def __init__(self, count: int = 3) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.cluster = Cluster(count, loopback=True)
        self.run(self.cluster.__aenter__())

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(WAIT_S)

    def client(self, **options: Any) -> SyncDHTClient:
        """A connected client; the caller closes it."""
        client = SyncDHTClient(seed_transport=NativeTransport(), data_transport=NativeTransport(), **options)
        client.connect(self.cluster.addresses)
        return client

    def stop(self) -> None:
        self.run(self.cluster.stop())
        self.run(asyncio.sleep(0.05))  # closed sockets say goodbye
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_S)
        self._loop.close()
