"""What one seed of the cluster simulation runs: sizes, settings, workload and faults, all drawn from the seed.

A seed has a profile, which says what it is mostly about, so that not all faults mask each other:

    calm      messages are late, out of order, sometimes lost; nothing else happens
    network   partitions in one or both directions, held-up links, loss, duplicates
    power     crashes and power cuts, of one node or of all at once; disks that are slow, full or fail
    clocks    wall clocks that jump, are set back for good, and crashes meanwhile
    chaos     all of it
"""

from __future__ import annotations

import enum
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from agi.core.dht.testing.disk import DiskFaults
from agi.core.dht.testing.faults import Fault, FaultKind, FaultMix, FaultPlan
from agi.core.dht.testing.network import LinkFaults
from agi.core.dht.testing.workload import Operation, Workload

NODES_MIN, NODES_MAX = 3, 7
SKEW_MS_MAX = 2_000
"""How far a node's wall clock is off when it starts."""
SET_BACK_MS_MAX = 3_600_000
DRIFT = 0.01


class Profile(enum.StrEnum):
    CALM = "calm"
    NETWORK = "network"
    POWER = "power"
    CLOCKS = "clocks"
    CHAOS = "chaos"


_SHARES = {Profile.CALM: 1, Profile.NETWORK: 3, Profile.POWER: 3, Profile.CLOCKS: 2, Profile.CHAOS: 3}
_NETWORK = {FaultKind.PARTITION: 3.0, FaultKind.ONE_WAY: 4.0, FaultKind.CLOG: 2.0}
_POWER = {FaultKind.CRASH: 2.0}
_CLOCKS = {FaultKind.CLOCK_JUMP: 2.0, FaultKind.CRASH: 3.0}
_CHAOS = {**_NETWORK, FaultKind.CRASH: 4.0, FaultKind.PAUSE: 4.0, FaultKind.CLOCK_JUMP: 4.0}
_LINKS = LinkFaults(loss_chance=0.05, duplicate_chance=0.05, reorder_chance=0.2, reorder_s=0.05)
_NO_DISK = DiskFaults()
SLOW_DISK = DiskFaults(sync_s=(0.001, 0.02), slow_sync_chance=0.5, slow_sync_s=(0.02, 0.2))
"""A power cut takes only what is not synced yet: with quick disks it would seldom find anything."""
_DISK = replace(SLOW_DISK, full_chance=0.01, sync_error_chance=0.004)
_MIXES = {
    Profile.CALM: FaultMix(every_s={}, links=LinkFaults(loss_chance=0.01, reorder_chance=0.3), disk=_NO_DISK),
    Profile.NETWORK: FaultMix(every_s=_NETWORK, for_s=(0.05, 3.0), links=_LINKS, disk=_NO_DISK),
    Profile.POWER: FaultMix(
        every_s=_POWER, for_s=(0.05, 1.0), power_loss_chance=0.8, links=replace(_LINKS, loss_chance=0.02), disk=_DISK
    ),
    Profile.CLOCKS: FaultMix(
        every_s=_CLOCKS, for_s=(0.05, 0.5), power_loss_chance=0.8, links=replace(_LINKS, loss_chance=0.02),
        disk=SLOW_DISK,
    ),
    Profile.CHAOS: FaultMix(every_s=_CHAOS, for_s=(0.05, 3.0), links=_LINKS, disk=_DISK),
}  # fmt: skip
_KEYS = (1, 2, 4, 8)
_KEYS_HOT = (1, 1, 2, 4)
"""Versions can only meet where a key is written again and again."""
_BLACKOUT_EVERY_S = {Profile.POWER: 1.5, Profile.CLOCKS: 1.5, Profile.CHAOS: 5.0}
"""Mean time between power cuts of the whole cluster."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One seed's parameters; `draw` makes it.

    Attributes:
        nodes: node names; their hosts have these names too.
        peers: the configured addresses of each node; through all lists together every node can be reached.
        settings: of the configuration, beside names and addresses.
        skews_ms, rates: of each node's clock.
        start_s: when each node is first booted.
        faults_from_start: whether the faults begin at once, or when the cluster has formed.
        epochs_every_s: mean time between proposals of a new epoch, each at some node; 0 for none.
        joiners: of the nodes, those that start once the cluster has formed; the others' lists do not name them.
        changes_every_s: mean time between orders that a node leave, or that a change be undone, each given at some
            node; 0 for none.
        read_last: whether the judge reads only after all replicas have become equal without that; else it reads first,
            so that what repair would hide is seen.
    """

    seed: int
    profile: Profile
    nodes: tuple[str, ...]
    factor: int
    peers: Mapping[str, tuple[str, ...]]
    settings: Mapping[str, object]
    skews_ms: Mapping[str, int]
    rates: Mapping[str, float]
    start_s: Mapping[str, float]
    faults_from_start: bool
    epochs_every_s: float
    workload: Workload
    plan: FaultPlan = field(repr=False)
    read_last: bool = False
    joiners: tuple[str, ...] = ()
    changes_every_s: float = 0.0

    @classmethod
    def draw(cls, seed: int, profile: Profile | None = None) -> Scenario:
        """The scenario of a seed; of a given profile only for tests that look for one kind of fault."""
        rng = random.Random(f"{seed}/scenario")
        drawn = rng.choices(list(_SHARES), list(_SHARES.values()))[0]
        profile = profile or drawn
        count = rng.choice((3, 3, 3, 4, 5, 5, 6, 7))
        nodes = tuple(f"n{number}" for number in range(1, count + 1))
        factor = rng.choice((3, 3, 5))
        everyone = rng.getrandbits(2) > 0
        start_s = {name: rng.uniform(0.0, 1.0) for name in nodes}
        safety_s = rng.uniform(3.0, 9.0)
        changing = random.Random(f"{seed}/changes")
        joiners = tuple(f"n{count + number}" for number in range(1, 1 + changing.choice((0, 0, 1, 1, 2))))
        peers = {name: _peers(nodes, index, everyone) for index, name in enumerate(nodes)}
        peers |= {name: _peers(nodes, 0, everyone) for name in joiners}
        start_s |= dict.fromkeys(joiners, 0.0)
        nodes += joiners
        return cls(
            seed,
            profile,
            nodes,
            factor,
            peers,
            {
                "ring.virtual_nodes": 8,
                "replication.factor": factor,
                "network.connection_pool_size": rng.choice((1, 1, 2)),
                "requests.hedge_budget": rng.choice((0.0, 0.05, 0.5)),
                **_health(random.Random(f"{seed}/health")),
                **_repair(random.Random(f"{seed}/repair")),
                "migration.join_timeout_ms": changing.choice((1000, 3000)),
            },
            {name: rng.randint(-SKEW_MS_MAX, SKEW_MS_MAX) for name in nodes},
            {name: 1.0 + rng.uniform(-DRIFT, DRIFT) for name in nodes},
            start_s,
            rng.getrandbits(2) == 0,
            rng.choice((0.0, 0.2, 1.0)),
            _workload(rng, profile),
            _plan(rng, profile, nodes, safety_s),
            random.Random(f"{seed}/read last").getrandbits(1) == 0,
            joiners,
            changing.choice((0.0, 1.0, 3.0)),
        )

    def __str__(self) -> str:
        workload = self.workload
        return (
            f"seed {self.seed}: {self.profile}, {len(self.nodes)} nodes, factor {self.factor}, {workload.clients} x "
            f"{workload.workers} clients, {workload.keys} keys, {self.plan.safety_s:.1f} s of faults"
            f"{' from the start' if self.faults_from_start else ''}"
            f"{f', {len(self.joiners)} of the nodes join' if self.joiners else ''}"
        )


def address_of(name: str) -> str:
    return f"{name}:7000"


def _peers(nodes: tuple[str, ...], index: int, everyone: bool) -> tuple[str, ...]:
    """All nodes, or this one and the next two: a list that reaches the others only through theirs."""
    known = nodes if everyone else tuple(nodes[(index + step) % len(nodes)] for step in range(3))
    return tuple(address_of(name) for name in known)


def _repair(rng: random.Random) -> dict[str, object]:
    """Comparisons while the faults last. Records are left alone as young for `timeout_ms`; clients state their own."""
    return {"repair.interval_ms": rng.choice((200, 500, 2000)), "network.timeout_ms": rng.choice((100, 300, 1000))}


def _health(rng: random.Random) -> dict[str, object]:
    """A failure detector so hasty that deaths are declared, and refuted, while the faults last."""
    heartbeat_ms = rng.choice((200, 200, 500))
    return {
        "health.heartbeat_interval_ms": heartbeat_ms,
        "health.probe_timeout_ms": heartbeat_ms // 4,
        "health.failure_threshold": rng.choice((1, 2)),
        "health.suspicion_mult": rng.choice((1, 2, 4)),
        "health.suspicion_max_mult": rng.choice((1, 3)),
        "health.recovery_timeout_ms": 500,
        "health.sync_interval_ms": rng.choice((500, 5000)),
    }


def _workload(rng: random.Random, profile: Profile) -> Workload:
    weights = {
        Operation.GET: 2.0,
        Operation.GET_ENTRY: 6.0,
        Operation.GET_ONE: 0.5,
        Operation.PUT: 6.0,
        Operation.DELETE: 1.5,
        Operation.GET_MANY: 1.0,
        Operation.PUT_MANY: 1.0,
        Operation.DELETE_MANY: 0.3,
        Operation.SCAN: 0.5,
    }
    clients, workers = rng.randint(1, 3), rng.randint(2, 4)
    return Workload(
        clients,
        workers,
        keys=rng.choice(_KEYS_HOT if profile is Profile.CLOCKS else _KEYS),
        weights={operation: weight * rng.uniform(0.2, 1.8) for operation, weight in weights.items()},
        think_s=rng.choice((0.002, 0.01)) * clients * workers,
        timeout_s=rng.choice((0.3, 0.5, 1.0, 2.0)),
        batch_max=4,
        page_size=rng.choice((2, 1000)),
        all_share=rng.choice((0.0, 0.0, 0.1)),
    )


def _plan(rng: random.Random, profile: Profile, nodes: tuple[str, ...], safety_s: float) -> FaultPlan:
    mix = replace(_MIXES[profile], down_max=rng.choice((0, 1, (len(nodes) - 1) // 2)))
    plan = FaultPlan.draw(rng, nodes, safety_s=safety_s, mix=mix)
    faults = list(plan.faults)
    every_s = _BLACKOUT_EVERY_S.get(profile)
    if every_s is not None:
        at_s = rng.expovariate(1.0 / every_s)
        while at_s < safety_s:
            faults += _blackout(rng, nodes, at_s, safety_s)
            at_s += 0.5 + rng.expovariate(1.0 / every_s)
        if rng.getrandbits(1):  # and just before the healing, so that what is lost stays lost
            faults += _blackout(rng, nodes, safety_s - 0.001, safety_s)
    if profile is Profile.CLOCKS and rng.getrandbits(2):
        at_s, back_ms = rng.uniform(0.2, 1.0), rng.randint(10_000, SET_BACK_MS_MAX)
        faults += [Fault(at_s, safety_s - at_s, FaultKind.CLOCK_JUMP, (name,), -back_ms) for name in nodes]
    return replace(plan, faults=tuple(sorted(faults, key=lambda fault: fault.at_s)))


def _blackout(rng: random.Random, nodes: tuple[str, ...], at_s: float, end_s: float) -> list[Fault]:
    return [Fault(at_s, min(rng.uniform(0.1, 0.5), end_s - at_s), FaultKind.CRASH, (name,), 1) for name in nodes]
