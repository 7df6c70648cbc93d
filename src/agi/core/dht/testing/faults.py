"""What goes wrong in a simulation, and when: drawn from a seed beforehand, so that it can be printed and replayed.

A plan has a safety phase of a given length, in which anything may fail at any time, and then everything is healed: in
the healed phase the cluster must converge. `FaultDriver.run` performs the plan and returns at the moment of healing.

    plan = FaultPlan.draw(sim.stream("plan"), ["n1", "n2", "n3"], safety_s=30.0)
    await FaultDriver(sim, network, disks, boot, plan).run()
"""

from __future__ import annotations

import asyncio
import enum
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from agi.core.dht.protocol.messages import EpochPrepare, Message, ReplicaWrite, TopologyNews
from agi.core.dht.testing.disk import DiskFaults, SimDisk
from agi.core.dht.testing.network import LinkFaults, SimNetwork
from agi.core.dht.testing.simulation import Simulation
from agi.core.dht.topology import unpack

Policy: TypeAlias = Callable[[str, str, Message], Sequence[float]]
"""Of a network: (src, dst, message) -> the delays after which it arrives, none if it is lost."""


class FaultKind(enum.StrEnum):
    PARTITION = "partition"
    """Nothing passes between `hosts` and the others."""
    ONE_WAY = "one-way"
    """Nothing passes from `hosts` to the others; the other direction works."""
    CLOG = "clog"
    """What hosts[0] sends to hosts[1] is held up."""
    CRASH = "crash"
    """hosts[0] dies, by kill -9 or (amount 1) by power loss, and is booted again."""
    PAUSE = "pause"
    """hosts[0] stops and goes on."""
    CLOCK_JUMP = "clock-jump"
    """The wall clock of hosts[0] jumps by `amount` ms, and back afterwards."""
    DEAF = "deaf"
    """Of the records that are sent to `hosts`, `amount` percent are lost; everything else arrives."""
    UNTOLD = "untold"
    """`hosts` hear of the next epoch late: once somebody tells of it, no news of epochs reaches them for so long, and
    nobody asks them for votes; everything else arrives."""
    WIPE = "wipe"
    """hosts[0] gets an empty disk and is booted again at once, under its old name."""
    ISOLATE = "isolate"
    """The host that coordinates at this moment, hosts[0] if none is known, is cut off from the plan's other hosts, and
    with amount 1 from those of clients too."""
    SWIZZLE = "swizzle"
    """All that hosts[0] sends and is sent is held up. Some are, one after the other, and go on one by one."""


_NEWS = (TopologyNews, EpochPrepare)


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: from `at_s` for `for_s` seconds. `hosts` and `amount` are as its kind says."""

    at_s: float
    for_s: float
    kind: FaultKind
    hosts: tuple[str, ...]
    amount: int = 0


@dataclass(frozen=True, slots=True)
class FaultMix:
    """What a plan is drawn from. Times in seconds, chances per message or disk operation.

    Attributes:
        every_s: the mean time between two faults of a kind; a kind that is not named does not occur.
        for_s: least and most length of a fault; drawn so that short and long ones are equally common.
        down_max: how many hosts may be crashed or paused at once; 0 for all of them.
        power_loss_chance: of a crash; otherwise only the process dies.
        clock_jump_ms_max: either way.
        deaf_percent: how much of what they are sent DEAF hosts miss: one of these.
        few: how many hosts are DEAF or UNTOLD at a time, at most.
        links, disk: upper bounds. Each chance of them is drawn between 0 and its bound for the whole phase, and is 0 in
            half of the plans, so that not all faults mask each other.
    """

    every_s: Mapping[FaultKind, float] = field(
        default_factory=lambda: {
            FaultKind.PARTITION: 6.0,
            FaultKind.ONE_WAY: 12.0,
            FaultKind.CLOG: 4.0,
            FaultKind.CRASH: 5.0,
            FaultKind.PAUSE: 8.0,
            FaultKind.CLOCK_JUMP: 8.0,
        }
    )
    for_s: tuple[float, float] = (0.05, 8.0)
    down_max: int = 0
    power_loss_chance: float = 0.5
    clock_jump_ms_max: int = 5_000
    deaf_percent: tuple[int, ...] = (100,)
    few: int = 2
    links: LinkFaults = field(
        default_factory=lambda: LinkFaults(loss_chance=0.05, duplicate_chance=0.05, reorder_chance=0.2)
    )
    disk: DiskFaults = field(
        default_factory=lambda: DiskFaults(slow_sync_chance=0.05, full_chance=0.01, sync_error_chance=0.002)
    )


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """Faults in the order of their beginning; those of links and disks hold for the whole phase.

    Attributes:
        safety_s: when all is healed. Faults end by then.
        hosts: those of the nodes. Faults may name others too: hosts of clients, to be paused or have their clocks set.
    """

    safety_s: float
    hosts: tuple[str, ...]
    faults: tuple[Fault, ...]
    links: LinkFaults = field(default_factory=LinkFaults)
    disk: DiskFaults = field(default_factory=DiskFaults)

    @classmethod
    def draw(
        cls, rng: random.Random, hosts: Sequence[str], *, safety_s: float, mix: FaultMix | None = None
    ) -> FaultPlan:
        """A plan for these hosts. A host is never crashed or paused twice at one time. Raises ValueError for fewer than
        two hosts."""
        if len(hosts) < 2:
            raise ValueError("faults between hosts need at least two of them")
        mix = mix or FaultMix()
        links = replace(
            mix.links,
            loss_chance=_chance(rng, mix.links.loss_chance),
            duplicate_chance=_chance(rng, mix.links.duplicate_chance),
            reorder_chance=_chance(rng, mix.links.reorder_chance),
        )
        disk = replace(
            mix.disk,
            slow_sync_chance=_chance(rng, mix.disk.slow_sync_chance),
            full_chance=_chance(rng, mix.disk.full_chance),
            sync_error_chance=_chance(rng, mix.disk.sync_error_chance),
        )
        starts = sorted(
            (at_s, kind) for kind, every_s in mix.every_s.items() for at_s in _arrivals(rng, every_s, safety_s)
        )
        down_until: dict[str, float] = {}
        faults: list[Fault] = []
        for at_s, kind in starts:
            shortest, longest = mix.for_s
            for_s = min(shortest * (longest / shortest) ** rng.uniform(0.0, 1.0), safety_s - at_s)
            if kind in (FaultKind.CRASH, FaultKind.PAUSE):
                up = [host for host in hosts if down_until.get(host, 0.0) < at_s]
                if not up or (mix.down_max and len(hosts) - len(up) >= mix.down_max):
                    continue
                host = rng.choice(up)
                down_until[host] = at_s + for_s
                power_loss = kind is FaultKind.CRASH and rng.uniform(0.0, 1.0) < mix.power_loss_chance
                faults.append(Fault(at_s, for_s, kind, (host,), int(power_loss)))
            elif kind is FaultKind.CLOCK_JUMP:
                jump_ms = rng.randint(-mix.clock_jump_ms_max, mix.clock_jump_ms_max)
                faults.append(Fault(at_s, for_s, kind, (rng.choice(hosts),), jump_ms))
            elif kind is FaultKind.CLOG:
                faults.append(Fault(at_s, for_s, kind, tuple(rng.sample(hosts, 2))))
            elif kind in (FaultKind.DEAF, FaultKind.UNTOLD):
                group = rng.sample(hosts, rng.randint(1, min(mix.few, len(hosts))))
                amount = rng.choice(mix.deaf_percent) if kind is FaultKind.DEAF else 100
                faults.append(Fault(at_s, for_s, kind, tuple(sorted(group)), amount))
            elif kind is FaultKind.WIPE:
                faults.append(Fault(at_s, 0.0, kind, (rng.choice(hosts),)))
            elif kind is FaultKind.ISOLATE:
                faults.append(Fault(at_s, for_s, kind, (rng.choice(hosts),), rng.getrandbits(1)))
            elif kind is FaultKind.SWIZZLE:
                for host in rng.sample(hosts, rng.randint(2, len(hosts))):
                    begin_s, end_s = (at_s + for_s * rng.uniform(low, low + 0.5) for low in (0.0, 0.5))
                    faults.append(Fault(begin_s, end_s - begin_s, kind, (host,)))
            else:
                group = rng.sample(hosts, rng.randint(1, len(hosts) - 1))
                faults.append(Fault(at_s, for_s, kind, tuple(sorted(group))))
        faults.sort(key=lambda fault: fault.at_s)
        return cls(safety_s, tuple(hosts), tuple(faults), links, disk)

    def __str__(self) -> str:
        lines = [f"{f.at_s:9.3f} +{f.for_s:.3f} s  {f.kind} {','.join(f.hosts)} {f.amount or ''}" for f in self.faults]
        return "\n".join([f"healed at {self.safety_s} s; {self.links}; {self.disk}", *lines])


def _chance(rng: random.Random, bound: float) -> float:
    return rng.uniform(0.0, bound) if rng.getrandbits(1) else 0.0


def _arrivals(rng: random.Random, every_s: float, end_s: float) -> Iterator[float]:
    at_s = rng.expovariate(1.0 / every_s)
    while at_s < end_s:
        yield at_s
        at_s += rng.expovariate(1.0 / every_s)


class FaultDriver:
    """Performs a plan on the hosts that it names.

    Args:
        sim, network: of the simulation; the hosts are `sim.hosts`, attached to the network. There must be all that the
            plan names when it runs.
        disks: each host's disk, if it has one.
        boot: boots a host of this name. Also called for a host whose process ended by itself (a failed disk, say), at
            the next event of the plan, and at the end for every host that is not alive.
        wipe: kills a host and gives it an empty disk; False where that would be more than the cluster has to survive.
        coordinator: the host that coordinates at this moment; "" if that is not known.

    Attributes:
        counts: how many faults of each kind began.
    """

    def __init__(
        self,
        sim: Simulation,
        network: SimNetwork,
        disks: Mapping[str, SimDisk],
        boot: Callable[[str], None],
        plan: FaultPlan,
        wipe: Callable[[str], bool] = lambda name: False,
        coordinator: Callable[[], str] = lambda: "",
    ) -> None:
        self.counts: Counter[FaultKind] = Counter()
        self._sim = sim
        self._network = network
        self._disks = disks
        self._boot = boot
        self._plan = plan
        self._wipe = wipe
        self._coordinator = coordinator
        self._isolated: dict[Fault, list[tuple[str, str]]] = {}
        self._down: set[str] = set()
        self._deaf: list[Fault] = []
        self._untold: list[Fault] = []
        self._late: dict[str, float] = {}
        self._newest = (0, 0)
        self._chance = sim.stream("deaf")
        if any(fault.kind in (FaultKind.DEAF, FaultKind.UNTOLD) for fault in plan.faults):
            network.policy = self._lossy(network.policy)

    async def run(self) -> None:
        """Runs the safety phase from now on, heals everything, and returns."""
        plan, started = self._plan, self._sim.now
        touched = dict.fromkeys([*plan.hosts, *(name for fault in plan.faults for name in fault.hosts)])
        skews = {name: self._sim.hosts[name].clock.skew_ms for name in touched}
        self._network.faults = replace(plan.links)
        for disk in self._disks.values():
            disk.faults = replace(plan.disk)
        begins = [(fault.at_s, number, self._begin, fault) for number, fault in enumerate(plan.faults)]
        ends = [(fault.at_s + fault.for_s, number, self._end, fault) for number, fault in enumerate(plan.faults)]
        for at_s, _, act, fault in sorted(begins + ends, key=lambda event: event[:2]):
            if at_s >= plan.safety_s:
                break
            await asyncio.sleep(started + at_s - self._sim.now)
            act(fault)
            self._revive()
        await asyncio.sleep(started + plan.safety_s - self._sim.now)
        self._heal(skews)

    def _begin(self, fault: Fault) -> None:
        if fault.kind is FaultKind.WIPE and not self._wipe(fault.hosts[0]):
            return
        self.counts[fault.kind] += 1
        self._sim.trace.record("fault", f"{fault.kind} {','.join(fault.hosts)} {fault.for_s:.6f} {fault.amount}")
        host = self._sim.hosts[fault.hosts[0]]
        match fault.kind:
            case FaultKind.PARTITION | FaultKind.ONE_WAY:
                self._network.block(self._pairs(fault))
            case FaultKind.CLOG:
                self._network.clog(fault.hosts[0], fault.hosts[1], fault.for_s)
            case FaultKind.CRASH:
                self._down.add(host.name)
                host.kill(power_loss=bool(fault.amount))
            case FaultKind.PAUSE:
                host.pause()
            case FaultKind.CLOCK_JUMP:
                host.clock.jump(fault.amount)
            case FaultKind.DEAF:
                self._deaf.append(fault)
            case FaultKind.UNTOLD:
                self._untold.append(fault)
            case FaultKind.WIPE:
                self._down.discard(host.name)
            case FaultKind.ISOLATE:
                name = self._coordinator() or host.name
                self._isolated[fault] = pairs = self._pairs(replace(fault, hosts=(name,)))
                self._network.block(pairs)
            case FaultKind.SWIZZLE:
                for other in self._sim.hosts:
                    if other != host.name:
                        self._network.clog(host.name, other, fault.for_s)
                        self._network.clog(other, host.name, fault.for_s)

    def _end(self, fault: Fault) -> None:
        host = self._sim.hosts[fault.hosts[0]]
        match fault.kind:
            case FaultKind.PARTITION | FaultKind.ONE_WAY:
                self._network.unblock(self._pairs(fault))
            case FaultKind.CRASH:
                self._down.discard(host.name)
            case FaultKind.PAUSE:
                host.resume()
            case FaultKind.CLOCK_JUMP:
                host.clock.jump(-fault.amount)
            case FaultKind.DEAF:
                self._deaf.remove(fault)
            case FaultKind.ISOLATE:
                self._network.unblock(self._isolated.pop(fault))
            case FaultKind.CLOG | FaultKind.SWIZZLE | FaultKind.UNTOLD | FaultKind.WIPE:
                pass  # what was held up arrives by itself; what was wiped is gone

    def _pairs(self, fault: Fault) -> list[tuple[str, str]]:
        among = self._plan.hosts if fault.kind is FaultKind.ISOLATE and not fault.amount else self._sim.hosts
        others = [name for name in among if name not in fault.hosts]
        pairs = [(a, b) for a in fault.hosts for b in others]
        return pairs if fault.kind is FaultKind.ONE_WAY else pairs + [(b, a) for a, b in pairs]

    def _lossy(self, policy: Policy) -> Policy:
        """The network's policy, without what DEAF and UNTOLD hosts do not hear."""

        def deliver(src: str, dst: str, message: Message) -> Sequence[float]:
            if self._unheard(dst, message):
                self._network.lost += 1
                return ()
            return policy(src, dst, message)

        return deliver

    def _unheard(self, dst: str, message: Message) -> bool:
        if isinstance(message, ReplicaWrite):
            return any(dst in fault.hosts and self._chance.randrange(100) < fault.amount for fault in self._deaf)
        if isinstance(message, TopologyNews) and (order := unpack(message.topology).order) > self._newest:
            self._newest = order
            for fault in self._untold:
                self._late |= dict.fromkeys(fault.hosts, self._sim.now + fault.for_s)
            self._untold.clear()
        return isinstance(message, _NEWS) and self._late.get(dst, 0.0) > self._sim.now

    def _revive(self) -> None:
        for name in self._plan.hosts:
            if name not in self._down and not self._sim.hosts[name].alive:
                self._boot(name)

    def _heal(self, skews: Mapping[str, int]) -> None:
        self._sim.trace.record("heal")
        self._network.heal()
        self._deaf.clear()
        self._untold.clear()
        self._late.clear()
        for disk in self._disks.values():
            disk.faults = DiskFaults()
        for name, skew_ms in skews.items():
            host = self._sim.hosts[name]
            host.clock.skew_ms = skew_ms
            host.resume()
        self._down.clear()
        self._revive()
