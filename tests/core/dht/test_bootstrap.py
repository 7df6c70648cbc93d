"""The agreement on the first topology (PROTOCOLS T11): case by case, then under any order of messages and crashes."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

import msgspec
import pytest
from cluster import Cluster, KeptStore, until
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agi.core.dht.errors import BootstrapConflict, ClusterError, HelloRefused
from agi.core.dht.protocol.bootstrap import Bootstrap, StoreTopology, StoreVote, Waiting
from agi.core.dht.protocol.messages import Hello
from agi.core.dht.ring import token_bytes
from agi.core.dht.topology import Member, Topology, unpack
from agi.core.dht.types import PROTOCOL_VERSION


@dataclass
class Disk:
    """What outlives a crash."""

    disk_id: str
    vote: Topology | None = None
    topology: Topology | None = None


@dataclass
class Server:
    """One node's core with its driver: stores what it is told to store, then says hello accordingly."""

    name: str
    peers: list[str]
    disk: Disk
    without: list[str] = field(default_factory=list)
    core: Bootstrap = field(init=False)

    def __post_init__(self) -> None:
        self.boot()

    def boot(self) -> None:
        me = Member(self.name, self.disk.disk_id, f"{self.name}:7000")
        self.core = Bootstrap(me, self.peers, self.without, _first, self.disk.vote)

    def hello(self) -> Hello:
        formed = self.disk.topology
        return Hello(
            PROTOCOL_VERSION, "node", self.name, disk_id=self.disk.disk_id, address=f"{self.name}:7000",
            peers=self.peers,
            topology=formed.packed if formed is not None else b"",
            vote=self.core.vote.packed if formed is None and self.core.vote is not None else b"",
            members_seen=self.core.members_seen if formed is None else [],
            settled=formed is None and self.core.settled,
        )  # fmt: skip

    def hear(self, address: str, hello: Hello) -> None:
        if self.disk.topology is None:
            stored = self.core.answered(address, hello)
            if stored is not None:
                self.disk.topology = stored.topology

    def act(self) -> str:
        """One step; returns why it waits."""
        if self.disk.topology is not None:
            return "formed"
        effect = self.core.step()
        if isinstance(effect, StoreVote):
            self.disk.vote = effect.topology
            self.core.voted(effect.topology)
            return "voted"
        if isinstance(effect, StoreTopology):
            self.disk.topology = effect.topology
            return "formed"
        return effect.reason


def _first(members: list[Member]) -> Topology:
    return Topology.first("dht", 3, 8, "md5", members)


class World:
    """Servers that reach each other under addresses; several may name one server."""

    def __init__(self, **lists: list[str]) -> None:
        self.servers = {name: Server(name, peers, Disk(f"disk-{name}")) for name, peers in lists.items()}
        self.addresses: dict[str, str] = {f"{name}:7000": name for name in lists}
        self.down: set[str] = set()

    def ask(self, name: str) -> None:
        """One round of one server: every address it knows is asked."""
        server = self.servers[name]
        for address in server.core.addresses:
            other = self.addresses.get(address)
            if other is None or other in self.down:
                server.core.unreachable(address, "refused")
            else:
                server.hear(address, self.servers[other].hello())

    def rounds(self, count: int = 8, order: list[str] | None = None) -> dict[str, str]:
        """Everybody asks and acts, so many times; the last reasons."""
        said: dict[str, str] = {}
        for _ in range(count):
            for name in order or list(self.servers):
                if name in self.down:
                    continue
                try:
                    self.ask(name)
                    said[name] = self.servers[name].act()
                except ClusterError as error:
                    said[name] = str(error)
        return said

    def formed(self) -> dict[str, tuple[str, ...]]:
        return {
            name: tuple(member.node_id for member in server.disk.topology.members)
            for name, server in self.servers.items()
            if server.disk.topology is not None
        }


ABC = ["a:7000", "b:7000", "c:7000"]


@pytest.mark.parametrize("order", [["a", "b", "c"], ["c", "b", "a"], ["b", "a", "c"]])
def test_three_that_list_each_other_form_one_topology_in_any_order(order: list[str]) -> None:
    world = World(a=["b:7000", "c:7000"], b=["a:7000", "c:7000"], c=["a:7000", "b:7000"])
    world.rounds(order=order)
    assert world.formed() == dict.fromkeys("abc", ("a", "b", "c"))
    topologies = [server.disk.topology for server in world.servers.values()]
    assert len({topology.digest for topology in topologies if topology is not None}) == 1
    assert topologies[0] is not None and topologies[0].epoch == 1


def test_nobody_forms_before_the_last_one_has_come() -> None:
    world = World(a=ABC, b=ABC, c=ABC)
    world.down = {"c"}
    said = world.rounds(20)
    assert world.formed() == {} and all(server.disk.vote is None for server in world.servers.values())
    assert said["a"] == "waiting for 1 of 2 configured peers (c:7000: refused)"
    world.down = {"b"}  # and a majority of others is no better
    world.rounds(20)
    assert world.formed() == {}
    world.down = set()
    world.rounds()
    assert world.formed() == dict.fromkeys("abc", ("a", "b", "c"))


def test_without_peers_a_node_is_a_cluster_of_one() -> None:
    world = World(a=[])
    assert world.rounds(2)["a"] == "formed" and world.formed() == {"a": ("a",)}
    alone = World(a=["a:7000"])  # listing oneself is the same
    alone.rounds(2)
    assert alone.formed() == {"a": ("a",)}


def test_a_chain_of_lists_reaches_everybody() -> None:
    world = World(a=["b:7000"], b=["c:7000", "a:7000"], c=["d:7000", "b:7000"], d=["a:7000", "c:7000"])
    world.rounds(12)
    assert world.formed() == dict.fromkeys("abcd", ("a", "b", "c", "d"))


def test_aliases_of_one_node_are_one_node() -> None:
    world = World(a=["localhost:7000", "127.0.0.1:7000", "b:7000"], b=["here:7000", "a:7000", "10.0.0.1:7000"])
    world.addresses |= {"localhost:7000": "a", "127.0.0.1:7000": "a", "here:7000": "b", "10.0.0.1:7000": "a"}
    world.rounds()
    assert world.formed() == dict.fromkeys("ab", ("a", "b"))


def test_a_node_that_the_others_do_not_list_waits_and_is_not_voted_in() -> None:
    world = World(a=["b:7000"], b=["a:7000"], d=["a:7000", "b:7000"])
    said = world.rounds(order=["d", "a", "b"])
    assert world.formed() == dict.fromkeys("ab", ("a", "b"))
    assert "to be taken in" in said["d"] and world.servers["d"].disk.vote is None
    # nor before the others have formed
    world = World(a=["b:7000", "c:7000"], b=["a:7000", "c:7000"], c=ABC, d=["a:7000", "b:7000"])
    world.down = {"c"}
    world.rounds()
    assert world.formed() == {} and world.servers["d"].disk.vote is None


def test_a_disk_wiped_before_any_vote_is_just_another_start() -> None:
    world = World(a=ABC, b=ABC, c=ABC)
    world.down = {"c"}
    world.rounds()
    world.servers["b"].disk = Disk("disk-b2")
    world.servers["b"].boot()
    world.down = set()
    world.rounds()
    formed = world.servers["a"].disk.topology
    assert formed is not None and formed.by_id["b"].disk_id == "disk-b2" and len(world.formed()) == 3


def test_a_disk_wiped_after_votes_is_a_conflict_for_people() -> None:
    world = World(a=["b:7000"], b=["a:7000"])
    for _ in range(3):  # both see the same; only a has voted
        world.ask("a")
        world.ask("b")
    assert world.servers["a"].act() == "voted"
    world.servers["b"].disk = Disk("disk-b2")
    world.servers["b"].boot()
    with pytest.raises(BootstrapConflict, match="changed after this node had voted"):
        for _ in range(4):
            world.ask("b")
            world.ask("a")
            world.servers["a"].act()
    said = world.rounds()
    assert world.formed() == {} and "voted" in said["a"] and "voted for another first topology" in said["b"]
    world.servers["a"].disk = Disk("disk-a2")  # nothing was stored: empty folders start anew
    world.servers["a"].boot()
    world.servers["b"].disk = Disk("disk-b3")
    world.servers["b"].boot()
    world.rounds()
    assert world.formed() == dict.fromkeys("ab", ("a", "b"))


def test_every_vote_is_needed_and_one_that_saw_them_all_tells_the_rest() -> None:
    world = World(a=ABC, b=ABC, c=ABC)
    for _ in range(3):
        for name in "abc":
            world.ask(name)
    assert [world.servers[name].act() for name in "ab"] == ["voted", "voted"]
    world.ask("a")
    assert world.servers["a"].act() == "waiting for the vote of c"
    assert world.servers["c"].act() == "voted"
    world.ask("a")
    assert world.servers["a"].act() == "formed"
    world.down = {"b"}  # c never sees b's vote, but a has formed
    world.ask("c")
    assert world.servers["c"].act() == "formed"
    assert world.formed() == dict.fromkeys("ac", ("a", "b", "c"))
    world.down = set()
    world.rounds(1)
    assert len(world.formed()) == 3


def test_who_voted_and_was_let_go_before_it_heard_of_the_cluster_asks_to_be_taken_in() -> None:
    world = World(a=ABC, b=ABC, c=ABC)
    for _ in range(3):
        for name in "abc":
            world.ask(name)
    for name in "abc":
        world.servers[name].act()
    vote = world.servers["c"].disk.vote
    assert vote is not None
    for formed, asks in ((vote, True), (Topology.first("dht", 3, 8, "md5", vote.members[:2]), False)):
        world.servers["c"].boot()
        gone = formed.next([m for m in formed.members if m.node_id != "c"], "c is gone", 0)
        hello = msgspec.structs.replace(world.servers["a"].hello(), topology=gone.packed)
        with pytest.raises(ClusterError, match="to be taken in"):
            world.servers["c"].core.answered("a:7000", hello)
        assert world.servers["c"].core.joining is asks  # another cluster than that of its vote is for people


def test_a_vote_outlives_its_process_and_stays_the_only_one() -> None:
    world = World(a=["b:7000"], b=["a:7000"])
    for _ in range(3):
        world.ask("a")
        world.ask("b")
    assert world.servers["a"].act() == "voted"
    vote = world.servers["a"].disk.vote
    world.servers["a"].peers = ["b:7000", "c:7000"]  # an operator edits the list meanwhile
    world.servers["a"].boot()
    world.servers["c"] = Server("c", ["a:7000", "b:7000"], Disk("disk-c"))
    world.addresses["c:7000"] = "c"
    world.rounds()
    assert world.servers["a"].disk.vote is vote
    digests = {s.disk.topology.digest for s in world.servers.values() if s.disk.topology is not None}
    assert len(digests) <= 1


def test_a_vote_is_not_shown_before_it_is_stored() -> None:
    world = World(a=["b:7000"], b=["a:7000"])
    for _ in range(3):
        world.ask("a")
        world.ask("b")
    core = world.servers["a"].core
    effect = core.step()
    assert isinstance(effect, StoreVote)
    assert core.vote is None and world.servers["a"].hello().vote == b""
    again = core.step()  # the store has not answered yet: the same vote, not another
    assert isinstance(again, StoreVote) and again.topology.digest == effect.topology.digest
    core.voted(effect.topology)
    assert core.vote is not None and unpack(world.servers["a"].hello().vote).digest == effect.topology.digest
    assert isinstance(core.step(), Waiting)


def test_force_start_without_leaves_the_dead_out() -> None:
    world = World(a=ABC, b=ABC, c=ABC)
    world.down = {"c"}
    for name in "ab":
        world.servers[name].without = ["c:7000"]
        world.servers[name].boot()
    world.rounds()
    assert world.formed() == dict.fromkeys("ab", ("a", "b"))
    world.down = set()
    said = world.rounds()
    assert "to be taken in" in said["c"] and "c" not in world.formed()


def test_formed_peers_are_joined_only_where_they_name_this_node_and_disk() -> None:
    world = World(a=["b:7000"], b=["a:7000"])
    world.rounds()
    formed = world.servers["a"].hello()
    newcomer = Server("n", ["a:7000"], Disk("disk-n"))
    with pytest.raises(HelloRefused, match="asking the cluster at a:7000 to be taken in"):
        newcomer.core.answered("a:7000", formed)
    returning = Server("b", ["a:7000"], Disk("disk-b"))
    assert isinstance(returning.core.answered("a:7000", formed), StoreTopology)
    wiped = Server("b", ["a:7000"], Disk("disk-b2"))
    with pytest.raises(ClusterError, match="with another disk"):
        wiped.core.answered("a:7000", formed)


def test_two_clusters_are_not_joined_into_one() -> None:
    world = World(a=[], b=[])
    world.rounds()
    bridge = Server("n", ["a:7000", "b:7000"], Disk("disk-n"))
    with pytest.raises(HelloRefused):
        bridge.core.answered("a:7000", world.servers["a"].hello())
    assert bridge.core.joining
    with pytest.raises(ClusterError, match="a:7000, b:7000 belong to different clusters"):
        bridge.core.answered("b:7000", world.servers["b"].hello())
    assert not bridge.core.joining
    assert bridge.disk.topology is None
    assert isinstance(bridge.core.step(), Waiting)


def test_one_name_on_two_disks_is_an_error() -> None:
    server = Server("a", ["b:7000"], Disk("disk-a"))
    twin = Server("a", ["a:7000"], Disk("disk-x"))
    with pytest.raises(ClusterError, match="this node's id"):
        server.core.answered("b:7000", twin.hello())


# --- every order


class BootstrapMachine(RuleBasedStateMachine):
    """Messages are asked for, kept and delivered late; servers crash, lose disks and come back. Two different
    topologies are never both stored."""

    @initialize(
        lists=st.lists(st.lists(st.integers(0, 3), max_size=4, unique=True), min_size=2, max_size=4),
        aliased=st.booleans(),
    )
    def begin(self, lists: list[list[int]], aliased: bool) -> None:
        names = "abcd"[: len(lists)]
        peers = {
            name: [f"{'abcd'[i % len(lists)]}:{7001 if aliased and i % 2 else 7000}" for i in listed]
            for name, listed in zip(names, lists, strict=True)
        }
        self.world = World(**peers)
        self.world.addresses |= {f"{name}:7001": name for name in names}
        self.names = list(names)
        self.mail: list[tuple[str, str, str, Hello]] = []
        self.wiped = 0
        self.stored: list[Topology] = []

    def pick(self, number: int) -> Server:
        return self.world.servers[self.names[number % len(self.names)]]

    @rule(asker=st.integers(0, 3), which=st.integers(0, 9))
    def ask(self, asker: int, which: int) -> None:
        """Somebody asks one address; the answer is under way."""
        server = self.pick(asker)
        addresses = server.core.addresses
        if addresses:
            address = addresses[which % len(addresses)]
            answer = self.world.servers[self.world.addresses[address]].hello()
            self.mail.append((server.name, server.disk.disk_id, address, answer))

    @precondition(lambda self: self.mail)
    @rule(which=st.integers(0, 99), keep=st.booleans())
    def deliver(self, which: int, keep: bool) -> None:
        place = which % len(self.mail)
        name, disk_id, address, hello = self.mail[place] if keep else self.mail.pop(place)
        server = self.world.servers[name]
        if server.disk.disk_id != disk_id:
            return
        try:
            server.hear(address, hello)
        except ClusterError:
            return

    @rule(who=st.integers(0, 3))
    def act(self, who: int) -> None:
        try:
            self.pick(who).act()
        except ClusterError:
            return

    @rule(who=st.integers(0, 3))
    def ask_and_act(self, who: int) -> None:
        server = self.pick(who)
        try:
            self.world.ask(server.name)
            server.act()
        except ClusterError:
            return

    @rule(who=st.integers(0, 3), which=st.integers(0, 9))
    def unreachable(self, who: int, which: int) -> None:
        core = self.pick(who).core
        if core.addresses:
            core.unreachable(core.addresses[which % len(core.addresses)], "silence")

    @rule(who=st.integers(0, 3), before_the_vote_is_stored=st.booleans())
    def crash(self, who: int, before_the_vote_is_stored: bool) -> None:
        server = self.pick(who)
        if before_the_vote_is_stored and server.disk.topology is None:
            with contextlib.suppress(ClusterError):
                server.core.step()
        server.boot()

    @precondition(lambda self: self.wiped < 2)
    @rule(who=st.integers(0, 3))
    def wipe(self, who: int) -> None:
        self.wiped += 1
        server = self.pick(who)
        server.disk = Disk(f"{server.disk.disk_id}+")
        server.boot()

    @invariant()
    def one_topology(self) -> None:
        if not hasattr(self, "world"):
            return
        for server in self.world.servers.values():
            topology = server.disk.topology
            if topology is not None and topology.digest not in {known.digest for known in self.stored}:
                self.stored.append(topology)
        for i, one in enumerate(self.stored):  # also of disks that were wiped since
            for other in self.stored[:i]:
                shared = {(m.node_id, m.disk_id) for m in one.members} & {(m.node_id, m.disk_id) for m in other.members}
                assert not shared, f"{shared} belong to two topologies"


TestBootstrapOrders = BootstrapMachine.TestCase
TestBootstrapOrders.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


# --- real nodes


async def test_real_nodes_form_in_any_order_and_a_lone_one_waits() -> None:
    async with Cluster(3, formed=False) as cluster:
        await cluster.connected()
        topologies = [node.topology for node in cluster.living()]
        assert len({topology.digest for topology in topologies if topology is not None}) == 1
        client = await cluster.client()
        assert await client.put("k", b"1") > 0
    async with Cluster(3, formed=False) as cluster:
        cluster.network.can_connect = lambda src, dst: "n2" not in (src, dst)
        cluster.network.refuses = lambda src, dst: True
        await until(lambda: "n2:7000" in cluster.node(0).waiting_for and "n2:7000" in cluster.node(1).waiting_for)
        await asyncio.sleep(0.3)
        assert not any(node.formed.is_set() for node in cluster.living())
        cluster.network.can_connect = lambda src, dst: True
        await cluster.connected()


async def test_real_nodes_of_other_settings_or_names_are_refused() -> None:
    async with Cluster(2, formed=False) as cluster:
        await cluster.connected()
        hello = cluster.node(1).hello()
        for name, value in (("cluster", "other"), ("factor", 5), ("virtual_nodes", 9), ("hash_algorithm", "md5")):
            odd = cluster.node(1).hello()
            setattr(odd, name, value)
            with pytest.raises(HelloRefused, match=name):
                await cluster.wire(0, hello=odd)
        assert (await cluster.wire(0, hello=hello)).error is None


async def test_a_vote_is_durable_before_any_hello_shows_it() -> None:
    class SlowStore(KeptStore):
        gate: asyncio.Event

        async def put_meta(self, name: str, value: bytes) -> None:
            if name == "vote":
                await self.gate.wait()
            await super().put_meta(name, value)

    stores = [SlowStore(token_bytes("xxh3")) for _ in range(2)]
    for store in stores:
        store.gate = asyncio.Event()
    async with Cluster(2, formed=False, store=stores.__getitem__) as cluster:
        await until(lambda: all(node.hello().settled for node in cluster.living()))
        await asyncio.sleep(0.3)  # both may have decided to vote by now; a broken node shows it
        assert [node.hello().vote for node in cluster.living()] == [b"", b""]
        for store in stores:
            store.gate.set()
        await cluster.connected()
