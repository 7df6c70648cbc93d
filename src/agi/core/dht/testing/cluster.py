"""A simulated cluster: the node's own code on hosts, disks and a network that fail as a plan says.

Beside running it, this module watches from outside what the nodes promise on the wire: what a Hello tells of is durable
at its sender (PROTOCOLS D1, T2, T11), so is every vote on a key that is told of (votes.py), and one version names one
value, as does one ballot (V1, R3).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import msgspec

from agi.core.dht.antientropy import Totals
from agi.core.dht.client import DHTClient
from agi.core.dht.config import Config, load_config
from agi.core.dht.errors import DHTError, Removed
from agi.core.dht.identity import Identity, Promise
from agi.core.dht.node import Node
from agi.core.dht.observability.metrics import Metrics
from agi.core.dht.protocol.consensus import is_register, is_retired
from agi.core.dht.protocol.floors import is_dead
from agi.core.dht.protocol.hints import Hints
from agi.core.dht.protocol.messages import (
    ArcList,
    ArcListReply,
    EpochAccept,
    EpochPrepare,
    EpochReply,
    Hello,
    Message,
    ReclaimStep,
    RegisterAccept,
    RegisterAccepted,
    RegisterPrepare,
    RegisterPromises,
    ReplicaWrite,
    TopologyNews,
)
from agi.core.dht.protocol.record import EXPIRES, FLAGS, HEADER, SHRUNK
from agi.core.dht.protocol.versioning import from_ms
from agi.core.dht.protocol.view import GONE
from agi.core.dht.reclaim import Reclaimer
from agi.core.dht.ring import Ring, token_bytes
from agi.core.dht.testing.checks import Finding
from agi.core.dht.testing.disk import SimDisk
from agi.core.dht.testing.host import Host
from agi.core.dht.testing.network import SimNetwork, SimTransport
from agi.core.dht.testing.operators import Operators
from agi.core.dht.testing.reclaiming import early, leftover, not_retired, unlevelled
from agi.core.dht.testing.scenario import Churn, Scenario, address_of
from agi.core.dht.testing.simulation import Simulation
from agi.core.dht.testing.votes import Votes
from agi.core.dht.testing.workload import TIMED
from agi.core.dht.topology import NORMAL, Topology, unpack
from agi.core.dht.types import MemberStatus

PING_INTERVAL_S, IDLE_TIMEOUT_S = 0.5, 1.5
"""Shorter than by default: most of a simulation would be waiting for dead links."""
CONVERGE_S = 30.0
ALIVE_S = 10.0
"""By when nodes that are connected hold each other to be alive: some turns of the slowest detector."""
EQUAL_S = 30.0
RECLAIM_S, RECLAIM_LAG_MS = 60.0, 3000
"""By when replicas are equal without being read: some intervals after the last write has ceased to be young, which
clocks that are behind delay."""
_POLL_S = 0.05


class SimCluster:
    """Hosts, disks and nodes of one scenario.

    Attributes:
        network, disks: of the simulation; a disk by the name of its node.
        running: the Node of each host that is up.
        metrics, hints, repairs, reclaimers: of every process that was started.
        findings: what was seen on the wire.
        votes: what was told of votes on keys.
        operators: what is ordered at nodes.
        starts_failed, exits: processes that could not start, and those that ended by themselves.
        lost: members whose disk was lost, and that disk's id, until the cluster has let the member go.
    """

    def __init__(self, sim: Simulation, scenario: Scenario) -> None:
        self.sim = sim
        self.scenario = scenario
        self.network = SimNetwork(sim.loop, sim.stream("network"))
        self.disks: dict[str, SimDisk] = {}
        self.votes = Votes(self.disks, self._find)
        self.network.policy = self._watched(self.network.policy)
        self.wiped: list[SimDisk] = []
        self.running: dict[str, Node] = {}
        self.metrics: list[Metrics] = []
        self.hints: list[Hints] = []
        self.repairs: list[Totals] = []
        self.reclaimers: list[Reclaimer] = []
        self.findings: list[Finding] = []
        self.starts_failed = 0
        self.exits = 0
        self.settling = False
        """The faults are over: no new epoch is proposed."""
        self.operators = Operators(self)
        self.absent = set(scenario.joiners)
        """Those that are not to be started yet."""
        self.let_go: set[str] = set()
        """Those that the cluster has let go, and whose process has still to end."""
        self.left = 0
        self.gone: set[str] = set()
        """Those that the cluster has let go for good."""
        self.declared_dead = 0
        self.false_deaths = 0
        self._epochs: dict[tuple[str, int, int], str] = {}
        self._places: dict[str, list[tuple[int, str]]] = {}
        """Member -> epochs that were met, and its disk in each."""
        self.lost: dict[str, str] = {}
        self.disks_lost = 0
        self.replacing: set[str] = set()
        """Hosts that were started to take a member's place."""
        self._asked: dict[tuple[str, str, int], int] = {}
        self._configs: dict[str, Config] = {}
        self._records: dict[tuple[bytes, bytes], bytes] = {}
        for name in scenario.nodes:
            host = sim.host(name, skew_ms=scenario.skews_ms[name], rate=scenario.rates[name])
            self._new_disk(name)
            host.on_end.append(lambda power_loss, name=name: self._ended(name, power_loss))  # type: ignore[misc]  # mypy and defaults of lambdas
            self.network.attach(host)
            self._configure(name, scenario.peers[name])

    def _configure(self, name: str, peers: Iterable[str], replaces: str = "") -> None:
        settings = {
            **self.scenario.settings,
            "node.id": name,
            "node.advertise": address_of(name),
            "cluster.bootstrap_nodes": ",".join(peers),
            "cluster.replaces": replaces,
        }
        self._configs[name] = load_config(None, {}, settings)

    def _new_disk(self, name: str) -> None:
        stream = self.sim.stream(f"disk/{name}/{len(self.wiped)}")
        disk = self.disks[name] = SimDisk(name, stream, self.sim.trace, self._hash_algorithm)
        before: Topology | None = None

        def stored(what: str, value: bytes) -> None:
            nonlocal before
            if what == "topology":
                topology = unpack(value)
                self.operators.saw(topology)
                for key in leftover(name, before, topology, disk, self.scenario.workload.names):
                    self._find("leftover", f"{name} gains {key} in epoch {topology.epoch} and holds old data of it")
                before = topology

        token_of = token_bytes(self._hash_algorithm)

        def purged(key: bytes, record: bytes) -> None:
            text = early(name, disk, int.from_bytes(token_of(key), "big"), key, record)
            if text:
                self._find("reclaim", text)

        disk.on_meta = stored
        disk.on_purge = purged

    @property
    def _hash_algorithm(self) -> str:
        return str(self.scenario.settings.get("ring.hash_algorithm", "xxh3"))

    def wipe(self, name: str) -> None:
        """The host's disk is replaced by an empty one; its process must not be running."""
        self.wiped.append(self.disks[name])
        self._new_disk(name)
        self.sim.trace.record("wipe", name)

    def lose(self, name: str) -> bool:
        """The host's disk is lost, and it has an empty one. Only one member's at a time, and only of three or more that
        are to stay: more the cluster need not survive. False if it is not."""
        newest = self.newest()
        if newest is None or self.still_lost(newest) or self.settling:
            return False
        member = newest.by_id.get(name)
        staying = sum(other.state == NORMAL for other in newest.members)
        if member is None or member.state != NORMAL or member.disk_id != _disk_id(self.disks[name]) or staying < 3:
            return False
        self.lost[name] = member.disk_id
        self.disks_lost += 1
        self.sim.hosts[name].kill(power_loss=True)
        self._renew(name)
        churn = self.scenario.churn
        if churn is not None and self.sim.stream(f"lost/{self.disks_lost}").random() < churn.replaces_share:
            self._configure(name, map(address_of, self.scenario.nodes), name)
            self.replacing.add(name)
        return True

    def still_lost(self, newest: Topology) -> dict[str, str]:
        """`lost` as of now: without those that the cluster has let go, or taken back, which it must not."""
        if self.lost and not newest.in_transition:
            disks = {member.node_id: member.disk_id for member in newest.members}
            back = {node.identity.disk_id for node in self.running.values()}
            self.lost = {name: disk for name, disk in self.lost.items() if disks.get(name) == disk and disk not in back}
        return self.lost

    def _renew(self, name: str) -> None:
        """An empty disk for a host that is to join as new: from all who may be there, as those that its list named once
        may be new themselves, and would form another cluster with it."""
        self.wipe(name)
        if self.scenario.churn is not None:
            self._configure(name, map(address_of, self.scenario.nodes))

    def newest(self) -> Topology | None:
        """The newest topology that a disk in use durably holds."""
        stored = [disk.durable_meta("topology") for disk in self.disks.values()]
        return max(
            (unpack(packed) for packed in stored if packed is not None), key=lambda each: each.order, default=None
        )

    # --- processes

    def boot(self, name: str) -> None:
        """Starts the node of this name, unless it runs, or is to be started only later."""
        host = self.sim.hosts[name]
        if name in self.absent or name in self.gone:
            return
        if not host.alive and self.sim.now >= self.scenario.start_s[name]:
            if self.scenario.churn is not None and not self.settling:
                self._replace_dead(name, self.scenario.churn)
            host.boot(lambda: self._main(host))

    def _replace_dead(self, name: str, churn: Churn) -> None:
        """A host that is new to the cluster may be started to take the place of a member that is down."""
        newest = self.newest()
        if newest is None or name in newest.by_id or self.disks[name].durable_meta("topology") is not None:
            return
        rng = self.sim.stream(f"replaces/{name}/{self.sim.hosts[name].incarnation}")
        down = [other for other in newest.by_id if other in self.lost or not self.sim.hosts[other].alive]
        if down and rng.random() < churn.replaces_share:
            self._configure(name, map(address_of, self.scenario.nodes), rng.choice(down))
            self.replacing.add(name)

    def _give_up_replacing(self) -> None:
        """Who was started to replace a member that is alive again, or gone, is started without that."""
        for name in sorted(self.replacing):
            self.replacing.discard(name)
            self._configure(name, map(address_of, self.scenario.nodes))
            node = self.running.get(name)
            if node is not None and node.topology is None:
                self.sim.hosts[name].kill(power_loss=False)

    async def _main(self, host: Host) -> None:
        """A node as a process: it ends when it cannot start or cannot go on."""
        name = host.name
        fatal = asyncio.Event()

        def ended(error: DHTError) -> None:
            if isinstance(error, Removed):
                self.let_go.add(name)
                self.sim.trace.record("gone", name)
            fatal.set()

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
            on_fatal=ended,
        )
        self.metrics.append(node.metrics)
        self.hints.append(node.handoff.hints)
        self.repairs.append(node.antientropy.totals)
        self.reclaimers.append(node.reclaimer)
        node.on_member_status(partial(self._member_status, node, {}))
        try:
            await node.start()
        except DHTError as error:  # a full or failing disk
            self.starts_failed += 1
            self.sim.trace.record("start-failed", f"{name} {type(error).__name__}")
            return
        await seed.listen(address_of(name), node)
        self.running[name] = node
        orders = self.operators.work(node, host.incarnation)
        await fatal.wait()
        for each in orders:
            each.cancel()
        self.exits += 1

    def _ended(self, name: str, power_loss: bool) -> None:
        self.running.pop(name, None)
        self.disks[name].end_hook(power_loss)
        if name in self.let_go:  # its data is set aside: it does not come back, or comes back as new
            self.let_go.remove(name)
            self.left += 1
            self._renew(name)
            rng, churn = self.sim.stream(f"gone/{self.left}"), self.scenario.churn
            if churn is not None:
                if not self.settling:
                    self.absent.add(name)
                    self.sim.loop.call_later(rng.uniform(*churn.away_s), self.come_back, name)
            elif rng.getrandbits(1):
                self.gone.add(name)

    def come_back(self, name: str) -> None:
        """Who was not to be started yet is."""
        if name in self.absent:
            self.absent.discard(name)
            self.boot(name)

    # --- state

    @property
    def converged(self) -> bool:
        """Every node is up, has formed, is connected to every other, and all have one topology."""
        names = self.present
        if self.running.keys() != names:
            return False
        topologies = {node.topology.digest: node.topology for node in self.running.values() if node.topology}
        if len(topologies) != 1 or any(node.topology is None for node in self.running.values()):
            return False
        topology = next(iter(topologies.values()))
        if topology.in_transition or topology.by_id.keys() != names:
            return False
        return all(len(node.peers.connected) == len(names) - 1 for node in self.running.values())

    @property
    def present(self) -> set[str]:
        """Those that are to be members."""
        return set(self.scenario.nodes) - self.absent - self.gone

    async def wait_converged(self, within_s: float = CONVERGE_S) -> Finding | None:
        """Waits for it, starting what has ended, as an init system does. What is missing, if that is too long."""
        deadline = self.sim.now + within_s
        while not self.converged:
            if self.sim.now > deadline:
                return Finding(
                    "convergence", f"after {within_s:g} s: {'; '.join(map(self._state, sorted(self.present)))}"
                )
            if self.settling:
                self._give_up_replacing()
            for name in self.scenario.nodes:
                self.boot(name)
            await asyncio.sleep(_POLL_S)
        return None

    async def wait_all_alive(self, within_s: float = ALIVE_S) -> Finding | None:
        """Waits until every node holds every other to be alive. Who is not, if that is too long."""
        deadline = self.sim.now + within_s
        while wrong := [
            f"{name} holds {other} {node.detector.status(other).name}"
            for name, node in self.running.items()
            for other in self.present
            if other != name and node.detector.status(other) is not MemberStatus.ALIVE
        ]:
            if self.sim.now > deadline:
                return Finding("liveness", f"after {within_s:g} s: {'; '.join(wrong)}")
            await asyncio.sleep(_POLL_S)
        return None

    async def wait_handed_off(self, within_s: float = CONVERGE_S) -> Finding | None:
        """Waits until no node has hints left. Which are left, if that is too long."""
        deadline = self.sim.now + within_s
        while left := {name: node.handoff.hints.pending() for name, node in self.running.items() if node.handoff.hints}:
            if self.sim.now > deadline:
                return Finding("handoff", f"after {within_s:g} s: {left}")
            await asyncio.sleep(_POLL_S)
        return None

    async def wait_equal(self, keys: Iterable[str], within_s: float = EQUAL_S) -> Finding | None:
        """Waits until all replicas of each key durably hold the same. What they hold, if that is too long."""
        deadline = self.sim.now + within_s
        while different := [key for key in keys if len(set(self.held(key).values())) > 1]:
            if self.sim.now > deadline:
                held = self.held(different[0])
                shown = ", ".join(f"{n} {'nothing' if r is None else r[:HEADER].hex()}" for n, r in held.items())
                return Finding("equal", f"after {within_s:g} s {different} differ, {different[0]}: {shown}")
            await asyncio.sleep(_POLL_S)
        return None

    async def wait_reclaimed(self, keys: Iterable[str], within_s: float = RECLAIM_S) -> Finding | None:
        """Waits until no node holds anything dead any more, nor anything of arcs that it has given up."""
        deadline = self.sim.now + within_s
        while left := [(key, name) for key in keys for name in self.running if not self._tidy(key, name)]:
            if self.sim.now > deadline:
                return Finding("reclaimed", f"after {within_s:g} s there still is {left}")
            await asyncio.sleep(_POLL_S)
        return None

    def _tidy(self, key: str, name: str) -> bool:
        record = self.disks[name].durable(key.encode())
        if record is None:
            return True
        if name not in self.held(key):
            return False
        settled_ms = min(self.sim.hosts[each].clock.wall_ms() for each in self.running) - RECLAIM_LAG_MS
        height = from_ms(settled_ms)  # those of the future, by these clocks, stay
        return not is_dead(record, height) and not is_retired(record, height)

    def held(self, key: str) -> dict[str, bytes | None]:
        """What each replica of a key durably holds."""
        ring = next(node.ring for node in self.running.values() if node.ring is not None)
        return {name: self.disks[name].durable(key.encode()) for name in ring.replicas(key.encode())}

    def check_ttl(self, keys: Iterable[str]) -> Iterable[Finding]:
        """A record keeps its TTL, however it came to where it is."""
        for key in keys:
            for name, record in self.held(key).items():
                if record is not None and record[HEADER:].startswith(TIMED) and not record[FLAGS] & EXPIRES:
                    yield Finding("ttl", f"{key} at {name} has lost its TTL: {record[:HEADER].hex()}")

    def _state(self, name: str) -> str:
        node = self.running.get(name)
        if node is None:
            return f"{name} is down"
        if node.topology is None:
            return f"{name} {node.waiting_for or 'is ready'}"
        epoch = f" at epoch {node.epoch} ({node.topology.digest[:8]})"
        missing = [f"{peer.node_id} ({peer.last_error})" for peer in node.peers.all.values() if not peer.links]
        return f"{name}{epoch} misses {', '.join(missing)}" if missing else f"{name}{epoch} is ready"

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
        for _, topology in stored:
            self._check_epoch("a disk", topology)
        if len({topology.origin for _, topology in stored}) <= 1:
            return []
        shown = "; ".join(f"{name}: {', '.join(topology.by_id)} ({topology.digest[:8]})" for name, topology in stored)
        return [Finding("topology", f"different ones were stored: {shown}")]

    # --- clients

    def client_host(self, name: str, *, skew_ms: int = 0, rate: float = 1.0) -> Host:
        """A host for client code, attached to the network; its clock as in SimClock."""
        host = self.sim.host(name, skew_ms=skew_ms, rate=rate)
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

    # --- watching

    def _member_status(
        self, node: Node, ended: dict[str, tuple[int, tuple[int, int], int]], member: str, status: MemberStatus
    ) -> None:
        """Who was declared dead is alive again only by a later start or incarnation of its own. A name with another
        disk is another, of which nothing is remembered, nor is it where the first has its place again: a change that
        was to give it to the other was undone."""
        assert node.detector.core is not None
        claim = node.detector.core.view.get(member)
        if claim.status is not status:
            return  # one message told of this and of what came after it; only the latter can be seen now
        life = (claim.boot, claim.incarnation)
        self.sim.trace.record("member", f"{node.node_id} holds {member} {status.name} {life}")
        if status in GONE:
            self.declared_dead += status is MemberStatus.DEAD
            ended[member] = claim.disk, life, node.known_topology.epoch
            return
        disk, end, epoch = ended.pop(member, (0, (0, 0), 0))
        if disk != claim.disk or life == (0, 0):  # of which nothing was heard: it was let go and has joined again
            return
        since = range(epoch, node.known_topology.epoch + 1)
        if len({disk for number, disk in self._places.get(member, ()) if number in since}) > 1:
            return
        self.false_deaths += end[0] == claim.boot
        if life <= end:
            self._find("revived", f"{node.node_id} took {member} {life} for {status.name} after its end {end}")

    def _watched(
        self, policy: Callable[[str, str, Message], Sequence[float]]
    ) -> Callable[[str, str, Message], Sequence[float]]:
        # by class, as nearly all messages are of those that nothing is asked about
        checks: dict[type[Message], Callable[[str, str, Any], None]] = {
            ReplicaWrite: lambda src, dst, write: self._check_values(write.keys, write.records),
            RegisterPrepare: self.votes.prepare,
            RegisterAccept: self._check_accept,
            RegisterPromises: self.votes.promises,
            RegisterAccepted: self.votes.accepted,
            Hello: lambda src, dst, hello: self._check_hello(src, hello),
            EpochPrepare: self._asks_for_vote,
            EpochAccept: self._asks_for_vote,
            EpochReply: self._check_vote,
            ReclaimStep: self._check_reclaim,
            ArcList: self._asks_for_list,
            ArcListReply: self._check_list,
            TopologyNews: lambda src, dst, news: self._check_told(src, news.topology),
        }

        def watch(src: str, dst: str, message: Message) -> Sequence[float]:
            check = checks.get(message.__class__)
            if check is not None:
                check(src, dst, message)
            return policy(src, dst, message)

        return watch

    def _check_hello(self, src: str, hello: Hello) -> None:
        if hello.kind != "node":
            return
        if hello.vote and self.disks[src].durable_meta("vote") != hello.vote:
            self._find("durable", f"{src} told of its vote before it was on its disk")
        if hello.topology:
            self._check_told(src, hello.topology)

    def _check_told(self, src: str, packed: bytes) -> None:
        """What a node tells of an epoch is on its disk (T2), or was: it may have adopted a newer one since."""
        topology = unpack(packed)
        self._check_epoch(src, topology)
        stored = self.disks[src].durable_meta("topology")
        if stored is None or unpack(stored).order < topology.order:
            self._find("durable", f"{src} told of epoch {topology.epoch} before it was on its disk")

    def _check_epoch(self, source: str, topology: Topology) -> None:
        """An epoch has one value, wherever and whenever it is met (T1)."""
        name = (topology.origin, *topology.order)
        if name not in self._epochs:
            for member in topology.members:
                self._places.setdefault(member.node_id, []).append((topology.epoch, member.disk_id))
        known = self._epochs.setdefault(name, topology.digest)
        if known != topology.digest:
            self._find("one epoch", f"epoch {topology.epoch} is {known[:8]} and, says {source}, {topology.digest[:8]}")

    def _asks_for_vote(self, src: str, dst: str, message: EpochPrepare | EpochAccept) -> None:
        self._asked[src, dst, message.id] = message.epoch

    def _check_vote(self, src: str, dst: str, reply: EpochReply) -> None:
        """A vote is on the voter's disk before its answer leaves (D1)."""
        epoch = self._asked.get((dst, src, reply.id))
        packed = self.disks[src].durable_meta("acceptor")
        if not reply.granted or epoch is None:
            return
        promise = None if packed is None else msgspec.msgpack.decode(packed, type=Promise)
        if promise is None or promise.epoch < epoch:
            stored = False
        else:
            ahead = promise.epoch > epoch
            stored = ahead or (promise.promised >= reply.promised and promise.accepted >= reply.accepted)
        if not stored:
            self._find("durable", f"{src} told of its vote on epoch {epoch} before it was on its disk")

    def _asks_for_list(self, src: str, dst: str, message: ArcList) -> None:
        self._asked[src, dst, message.id] = message.epoch

    def _check_list(self, src: str, dst: str, reply: ArcListReply) -> None:
        """A source has durably adopted a change before it tells what it holds for it (T2, T6)."""
        epoch = self._asked.get((dst, src, reply.id))
        packed = self.disks[src].durable_meta("topology")
        if reply.error is None and epoch is not None and (packed is None or unpack(packed).epoch < epoch):
            self._find("durable", f"{src} listed records for epoch {epoch} before it had adopted that")

    def _check_reclaim(self, src: str, dst: str, step: ReclaimStep) -> None:
        node = self.running.get(src)
        if node is None or not isinstance(node.ring, Ring):
            return
        members = [self.running.get(member.node_id) for member in node.known_topology.members]
        if any(each is None or each.known_topology.epoch != step.epoch for each in members):
            return  # some do not hear it, or refuse it
        names = [name.encode() for name in self.scenario.workload.names]
        wrong = unlevelled(src, step, node.ring, self.disks, names)
        for text in wrong + not_retired(step, node.ring, self.disks):
            self._find("reclaim", text)

    def _check_accept(self, src: str, dst: str, accept: RegisterAccept) -> None:
        self._check_values(accept.keys, accept.records)
        self.votes.accept(src, dst, accept)

    def _check_values(self, keys: Sequence[bytes], records: Sequence[bytes]) -> None:
        """A version of a writer names one value of a key, and so does a ballot with its place in its round."""
        for key, record in zip(keys, records, strict=True):
            if record[FLAGS] & SHRUNK:
                continue
            before = self._records.setdefault((key, record[:16]), record)
            if before != record:
                what = "ballot" if is_register(record) else "version"
                name = f"{record[:8].hex()} of writer {record[8:16].hex()}"
                self._find("one value", f"{what} {name} names two values of {key.decode()}")

    def _find(self, check: str, text: str) -> None:
        self.sim.trace.record("finding", f"{check}: {text}")
        if len(self.findings) < 100:
            self.findings.append(Finding(check, text))


def _disk_id(disk: SimDisk) -> str:
    packed = disk.durable_meta("identity")
    return "" if packed is None else msgspec.msgpack.decode(packed, type=Identity).disk_id
