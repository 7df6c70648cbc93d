"""A simulated cluster: the node's own code on hosts, disks and a network that fail as a plan says.

Beside running it, this module watches from outside what the nodes promise on the wire: what a Hello tells of is durable
at its sender (PROTOCOLS D1, T2, T11), and one version names one value (V1).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

import msgspec

from agi.core.dht.client import DHTClient
from agi.core.dht.config import Config, load_config
from agi.core.dht.errors import DHTError
from agi.core.dht.identity import Identity
from agi.core.dht.node import Node
from agi.core.dht.observability.metrics import Metrics
from agi.core.dht.protocol.messages import Hello, Message, ReplicaWrite
from agi.core.dht.protocol.record import FLAGS, SHRUNK
from agi.core.dht.testing.checks import Finding
from agi.core.dht.testing.disk import SimDisk
from agi.core.dht.testing.host import Host
from agi.core.dht.testing.network import SimNetwork, SimTransport
from agi.core.dht.testing.scenario import Scenario, address_of
from agi.core.dht.testing.simulation import Simulation
from agi.core.dht.topology import Topology, unpack

PING_INTERVAL_S, IDLE_TIMEOUT_S = 0.5, 1.5
"""Shorter than by default: most of a simulation would be waiting for dead links."""
CONVERGE_S = 30.0
_POLL_S = 0.05


class SimCluster:
    """Hosts, disks and nodes of one scenario.

    Attributes:
        network, disks: of the simulation; a disk by the name of its node.
        running: the Node of each host that is up.
        metrics: of every process that was started.
        findings: what was seen on the wire.
        starts_failed, exits: processes that could not start, and those that ended by themselves.
    """

    def __init__(self, sim: Simulation, scenario: Scenario) -> None:
        self.sim = sim
        self.scenario = scenario
        self.network = SimNetwork(sim.loop, sim.stream("network"))
        self.network.policy = self._watched(self.network.policy)
        self.disks: dict[str, SimDisk] = {}
        self.wiped: list[SimDisk] = []
        self.running: dict[str, Node] = {}
        self.metrics: list[Metrics] = []
        self.findings: list[Finding] = []
        self.starts_failed = 0
        self.exits = 0
        self._configs: dict[str, Config] = {}
        self._records: dict[tuple[bytes, bytes], bytes] = {}
        for name in scenario.nodes:
            host = sim.host(name, skew_ms=scenario.skews_ms[name], rate=scenario.rates[name])
            self._new_disk(name)
            host.on_end.append(lambda power_loss, name=name: self._ended(name, power_loss))  # type: ignore[misc]  # mypy and defaults of lambdas
            self.network.attach(host)
            settings = {
                **scenario.settings,
                "node.id": name,
                "node.advertise": address_of(name),
                "cluster.bootstrap_nodes": ",".join(scenario.peers[name]),
            }
            self._configs[name] = load_config(None, {}, settings)

    def _new_disk(self, name: str) -> None:
        stream = self.sim.stream(f"disk/{name}/{len(self.wiped)}")
        self.disks[name] = SimDisk(name, stream, self.sim.trace, self._hash_algorithm)

    @property
    def _hash_algorithm(self) -> str:
        return str(self.scenario.settings.get("ring.hash_algorithm", "xxh3"))

    def wipe(self, name: str) -> None:
        """The host's disk is replaced by an empty one; its process must not be running."""
        self.wiped.append(self.disks[name])
        self._new_disk(name)
        self.sim.trace.record("wipe", name)

    # --- processes

    def boot(self, name: str) -> None:
        """Starts the node of this name, unless it runs, or is to be started only later."""
        host = self.sim.hosts[name]
        if not host.alive and self.sim.now >= self.scenario.start_s[name]:
            host.boot(lambda: self._main(host))

    async def _main(self, host: Host) -> None:
        """A node as a process: it ends when it cannot start or cannot go on."""
        name = host.name
        fatal = asyncio.Event()
        seed, data = (
            SimTransport(self.network, name, ping_interval_s=PING_INTERVAL_S, idle_timeout_s=IDLE_TIMEOUT_S)
            for _ in range(2)
        )
        node = Node(
            self._configs[name],
            node_id=name,
            address=address_of(name),
            store=self.disks[name].store(),
            seed=seed,
            data=data,
            data_listen=[f"{name}:0"],
            clock=host.clock,
            rng=self.sim.stream(f"node/{name}/{host.incarnation}"),
            on_fatal=lambda error: fatal.set(),
        )
        self.metrics.append(node.metrics)
        try:
            await node.start()
        except DHTError as error:  # a full or failing disk
            self.starts_failed += 1
            self.sim.trace.record("start-failed", f"{name} {type(error).__name__}")
            return
        await seed.listen(address_of(name), node)
        self.running[name] = node
        await fatal.wait()
        self.exits += 1

    def _ended(self, name: str, power_loss: bool) -> None:
        self.running.pop(name, None)
        self.disks[name].end_hook(power_loss)

    # --- state

    @property
    def converged(self) -> bool:
        """Every node is up, has formed, and is connected to every other."""
        others = len(self.scenario.nodes) - 1
        return len(self.running) == len(self.scenario.nodes) and all(
            node.topology is not None and len(node.peers.connected) == others for node in self.running.values()
        )

    async def wait_converged(self, within_s: float = CONVERGE_S) -> Finding | None:
        """Waits for it, starting what has ended, as an init system does. What is missing, if that is too long."""
        deadline = self.sim.now + within_s
        while not self.converged:
            if self.sim.now > deadline:
                return Finding(
                    "convergence", f"after {within_s:g} s: {'; '.join(map(self._state, self.scenario.nodes))}"
                )
            for name in self.scenario.nodes:
                self.boot(name)
            await asyncio.sleep(_POLL_S)
        return None

    def _state(self, name: str) -> str:
        node = self.running.get(name)
        if node is None:
            return f"{name} is down"
        if node.topology is None:
            return f"{name} {node.waiting_for or 'is ready'}"
        missing = [f"{peer.node_id} ({peer.last_error})" for peer in node.peers.all.values() if not peer.links]
        return f"{name} misses {', '.join(missing)}" if missing else f"{name} is ready"

    def topologies(self) -> list[tuple[str, Topology]]:
        """(node, topology) for every topology that any disk, wiped ones too, durably holds."""
        disks = [*self.disks.values(), *self.wiped]
        stored = [(disk.name, disk.durable_meta("topology")) for disk in disks]
        return [(name, unpack(packed)) for name, packed in stored if packed is not None]

    def check_topologies(self) -> list[Finding]:
        """Two different first topologies are never stored (guarantee 6), unless all disks that decided one of them are
        lost: then nothing is left of that cluster."""
        lost = {_disk_id(disk) for disk in self.wiped}
        stored = [
            (name, topology)
            for name, topology in self.topologies()
            if any(member.disk_id not in lost for member in topology.members)
        ]
        if len({topology.digest for _, topology in stored}) <= 1:
            return []
        shown = "; ".join(f"{name}: {', '.join(topology.by_id)} ({topology.digest[:8]})" for name, topology in stored)
        return [Finding("topology", f"different ones were stored: {shown}")]

    # --- clients

    def client_host(self, name: str) -> Host:
        """A host for client code, attached to the network."""
        host = self.sim.host(name)
        self.network.attach(host)
        return host

    def client(self, host: Host, rng: random.Random) -> DHTClient:
        """A client for code that runs on this host."""
        transports = [
            SimTransport(self.network, host.name, ping_interval_s=PING_INTERVAL_S, idle_timeout_s=IDLE_TIMEOUT_S)
            for _ in range(2)
        ]
        return DHTClient(
            seed_transport=transports[0],
            data_transport=transports[1],
            clock=host.clock,
            rng=rng,
            unix=False,
            connection_pool_size=1,
        )

    # --- watching the wire

    def _watched(
        self, policy: Callable[[str, str, Message], Sequence[float]]
    ) -> Callable[[str, str, Message], Sequence[float]]:
        def watch(src: str, dst: str, message: Message) -> Sequence[float]:
            kind = message.__class__
            if kind is ReplicaWrite:
                self._check_versions(message)  # type: ignore[arg-type]  # mypy does not narrow by __class__
            elif kind is Hello:
                self._check_hello(src, message)  # type: ignore[arg-type]  # as above
            return policy(src, dst, message)

        return watch

    def _check_hello(self, src: str, hello: Hello) -> None:
        if hello.kind != "node":
            return
        disk = self.disks[src]
        for name, told in (("vote", hello.vote), ("topology", hello.topology)):
            if told and disk.durable_meta(name) != told:
                self._find("durable", f"{src} told of its {name} before it was on its disk")

    def _check_versions(self, write: ReplicaWrite) -> None:
        for key, record in zip(write.keys, write.records, strict=True):
            if record[FLAGS] & SHRUNK:
                continue
            before = self._records.setdefault((key, record[:16]), record)
            if before != record:
                version, writer = record[:8].hex(), record[8:16].hex()
                self._find("one value", f"version {version} of writer {writer} names two values of {key.decode()}")

    def _find(self, check: str, text: str) -> None:
        self.sim.trace.record("finding", f"{check}: {text}")
        if len(self.findings) < 100:
            self.findings.append(Finding(check, text))


def _disk_id(disk: SimDisk) -> str:
    packed = disk.durable_meta("identity")
    return "" if packed is None else msgspec.msgpack.decode(packed, type=Identity).disk_id
