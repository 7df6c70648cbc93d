"""What one seed of the cluster simulation runs: sizes, settings, workload and faults, all drawn from the seed.

A seed has a profile, which says what it is mostly about, so that not all faults mask each other:

    calm      messages are late, out of order, sometimes lost; nothing else happens
    network   partitions in one or both directions, held-up links, loss, duplicates
    power     crashes and power cuts, of one node or of all at once; disks that are slow, full or fail
    clocks    wall clocks that jump, are set back for good, and crashes meanwhile
    chaos     all of it
    churn     members come and go, one change after the other, while records and news of the changes get lost on the
              way to some; nothing heals replicas but reads
    consensus all of it in short; contended registers, counters and sets, and in half of the seeds locks
"""

from __future__ import annotations

import enum
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from agi.core.dht.testing.disk import DiskFaults
from agi.core.dht.testing.faults import Fault, FaultKind, FaultMix, FaultPlan
from agi.core.dht.testing.network import LinkFaults
from agi.core.dht.testing.workload import Locking, Operation, Workload

NODES_MIN, NODES_MAX = 3, 7
SKEW_MS_MAX = 2_000
"""How far a node's wall clock is off when it starts."""
SET_BACK_MS_MAX = 3_600_000
DRIFT = 0.01
ONLY_ROUNDS_SHARE = 0.3


class Profile(enum.StrEnum):
    CALM = "calm"
    NETWORK = "network"
    POWER = "power"
    CLOCKS = "clocks"
    CHAOS = "chaos"
    CHURN = "churn"
    CONSENSUS = "consensus"


_SHARES = {Profile.CALM: 1, Profile.NETWORK: 3, Profile.POWER: 3, Profile.CLOCKS: 2, Profile.CHAOS: 3}
_NETWORK = {FaultKind.PARTITION: 3.0, FaultKind.ONE_WAY: 4.0, FaultKind.CLOG: 2.0}
_POWER = {FaultKind.CRASH: 2.0}
_CLOCKS = {FaultKind.CLOCK_JUMP: 2.0, FaultKind.CRASH: 3.0}
_CHAOS = {
    **_NETWORK,
    FaultKind.CRASH: 4.0,
    FaultKind.PAUSE: 4.0,
    FaultKind.CLOCK_JUMP: 4.0,
    FaultKind.SWIZZLE: 5.0,
}
_CONSENSUS = {
    FaultKind.PARTITION: 3.0,
    FaultKind.ONE_WAY: 3.0,
    FaultKind.CLOG: 3.0,
    FaultKind.CRASH: 2.0,
    FaultKind.PAUSE: 2.0,
    FaultKind.CLOCK_JUMP: 4.0,
    FaultKind.ISOLATE: 2.5,
    FaultKind.SWIZZLE: 6.0,
}
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
    Profile.CONSENSUS: FaultMix(
        every_s=_CONSENSUS, for_s=(0.02, 1.0), power_loss_chance=0.7, links=_LINKS, disk=SLOW_DISK
    ),
}  # fmt: skip
_KEYS = (1, 2, 4, 8)
_KEYS_HOT = (1, 1, 2, 4)
"""Versions can only meet where a key is written again and again."""
WIDE_SHARE, WIDE_KEYS = 0.4, 16
"""Of the seeds with more nodes than replicas, and the keys, any number of which may be in a batch."""
_BLACKOUT_EVERY_S = {Profile.CONSENSUS: 4.0, Profile.POWER: 1.5, Profile.CLOCKS: 1.5, Profile.CHAOS: 5.0}
"""Mean time between power cuts of the whole cluster."""
_CALMER = 2.5
"""By what the mean times between the nodes' faults are longer where there are locks: a holder has to get on for some
leases."""
_STOP_EVERY_S, _SET_EVERY_S = 0.8, 1.5
"""Mean times between two pauses of a host that competes for locks, and between two settings of its clock."""

CHURN_SHARE = 0.25
CONSENSUS_SHARE = 0.15
"""Of all seeds."""
_CHURN = FaultMix(
    every_s={FaultKind.DEAF: 0.3, FaultKind.UNTOLD: 3.0, FaultKind.CLOG: 8.0},
    for_s=(0.5, 2.5),
    deaf_percent=(100, 100, 50),
    links=replace(_LINKS, loss_chance=0.004),
    disk=SLOW_DISK,
)
"""Nothing that holds a change up for long: members have to come and go while replicas are behind."""


class Turn(enum.StrEnum):
    """What churn is about in a seed."""

    MOVE = "move"
    """Replicas move while some are behind."""
    LAG = "lag"
    """Some hear of changes a little late; keys are few and busy."""
    STRAY = "stray"
    """So late that they go on as before the change when it is over."""
    SHRINK = "shrink"
    """So many leave that fewer remain than the factor, down to one."""
    LOSE = "lose"
    """Disks are lost, and their nodes started again at once."""
    ALL = "all"
    """Crashes, pauses and partitions too."""


_TURNS = {Turn.MOVE: 3, Turn.LAG: 2, Turn.STRAY: 2, Turn.SHRINK: 2, Turn.LOSE: 2, Turn.ALL: 1}
_TURN_EVERY_S: dict[Turn, dict[FaultKind, float]] = {
    Turn.MOVE: {},
    Turn.LAG: {FaultKind.UNTOLD: 0.8, FaultKind.DEAF: 0.4},
    Turn.STRAY: {FaultKind.UNTOLD: 0.8, FaultKind.DEAF: 0.4},
    Turn.SHRINK: {FaultKind.DEAF: 2.0},
    Turn.LOSE: {FaultKind.WIPE: 1.0},
    Turn.ALL: {FaultKind.ONE_WAY: 6.0, FaultKind.PAUSE: 6.0, FaultKind.CRASH: 6.0, FaultKind.WIPE: 6.0},
}
EVICTION_MS = 200
"""Of clusters that are left to evict who is dead: so short that they get to it before it is back."""
_TURN_FOR_S = {Turn.LAG: (0.3, 1.2), Turn.SHRINK: (3.0, 6.0)}


@dataclass(frozen=True, slots=True)
class Churn:
    """How members change.

    Attributes:
        turn: what it is about.
        rest_s: after so long of orders to leave there are none for as long; 0 for no such rest.
        away_s: how long who was let go is away before it joins as new, at least and at most.
        force_share: of the orders to leave, those that are forced where fewer nodes than replicas remain.
        cancel_share: of the orders that fall into a change, those that undo it; the others are not given.
        replaces_share: of the nodes that start as new while a member is down, those that are to take its place.
        weight_share: of the orders, those that change a member's weight instead.
        evicts: who is dead is left to the cluster, which removes it by itself; meanwhile nothing is ordered.
    """

    turn: Turn
    rest_s: float
    away_s: tuple[float, float]
    force_share: float
    cancel_share: float
    replaces_share: float
    weight_share: float
    evicts: bool = False


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
        churn: how members change all the time, instead.
        read_last: whether the judge reads only after all replicas have become equal without that; else it reads first,
            so that what repair would hide is seen. Where members churn it reads first anyway, half of the keys.
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
    churn: Churn | None = None

    @classmethod
    def draw(cls, seed: int, profile: Profile | None = None, turn: Turn | None = None) -> Scenario:
        """The scenario of a seed; of a given profile, and of a given turn of churn, only for tests that look for one
        kind of fault."""
        rng = random.Random(f"{seed}/scenario")
        drawn = rng.choices(list(_SHARES), list(_SHARES.values()))[0]
        profile = profile or drawn
        if profile is Profile.CHURN:
            return _churn(seed, turn)
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
                **_reclaim(random.Random(f"{seed}/reclaim"), profile),
                "migration.join_timeout_ms": changing.choice((1000, 3000)),
            },
            {name: rng.randint(-SKEW_MS_MAX, SKEW_MS_MAX) for name in nodes},
            {name: 1.0 + rng.uniform(-DRIFT, DRIFT) for name in nodes},
            start_s,
            rng.getrandbits(2) == 0 and profile is not Profile.CONSENSUS,
            rng.choice((0.0, 0.2, 1.0)),
            (workload := _widened(_workload(rng, profile, seed), seed, profile, count > factor)),
            _plan(rng, profile, nodes, safety_s, workload.locking),
            random.Random(f"{seed}/read last").getrandbits(1) == 0,
            joiners,
            changing.choice((0.0, 1.0, 3.0)),
        )

    def __str__(self) -> str:
        workload = self.workload
        about = self.profile if self.churn is None else f"{self.profile} ({self.churn.turn})"
        return (
            f"seed {self.seed}: {about}, {len(self.nodes)} nodes, factor {self.factor}, {workload.clients} x "
            f"{workload.workers} clients, {workload.keys} keys, {self.plan.safety_s:.1f} s of faults"
            f"{' from the start' if self.faults_from_start else ''}"
            f"{f', {len(self.joiners)} of the nodes join' if self.joiners else ''}"
            f"{', locks' if workload.locking is not None else ''}"
        )


def churns(seed: int) -> bool:
    """Whether a seed of a cluster is one of churn, if nothing else is asked for. `draw` has no say in this, so that
    the bootstrap of the same number is about bootstrapping."""
    return random.Random(f"{seed}/churn").random() < CHURN_SHARE


def decides(seed: int) -> bool:
    """Whether a seed that does not churn is one of contended decisions."""
    return random.Random(f"{seed}/consensus").random() < CONSENSUS_SHARE / (1 - CHURN_SHARE)


def _churn(seed: int, turn: Turn | None) -> Scenario:
    """Few points on the ring, so that a change moves much; hints and comparisons are off, so that nothing but reads and
    later writes brings to a replica what it missed, until operators have it repaired when the faults are over."""
    rng = random.Random(f"{seed}/churning")
    drawn = rng.choices(list(_TURNS), list(_TURNS.values()))[0]
    turn = turn or drawn
    shrinks, lags = turn is Turn.SHRINK, turn in (Turn.LAG, Turn.STRAY)
    factor = 5 if shrinks and rng.getrandbits(1) else 3
    count = 5 if factor == 5 or lags else rng.choice((4, 5) if not shrinks else (3, 4))
    nodes = tuple(f"n{number}" for number in range(1, 1 + count + (1 if shrinks else 2)))
    first, joiners = nodes[:count], nodes[count:]
    safety_s = rng.uniform(8.0, 12.0)
    evicts = turn in (Turn.LOSE, Turn.ALL) and random.Random(f"{seed}/evicts").getrandbits(1) == 0
    mix = replace(
        _CHURN,
        every_s={**_CHURN.every_s, **_TURN_EVERY_S[turn]},
        for_s=_TURN_FOR_S.get(turn, _CHURN.for_s),
        few=1 if shrinks and factor == 3 else 2,
        down_max=1,
        disk=rng.choice((_NO_DISK, SLOW_DISK)),
    )
    listed = tuple(map(address_of, first))
    clients = rng.choice((2, 3))
    locking = _locking(random.Random(f"{seed}/locking")) if turn in (Turn.MOVE, Turn.LOSE, Turn.ALL) else None
    return Scenario(
        seed,
        Profile.CHURN,
        nodes,
        factor,
        dict.fromkeys(first, listed) | dict.fromkeys(joiners, tuple(map(address_of, nodes))),
        {
            "ring.virtual_nodes": rng.choice((1, 2, 3)),
            "replication.factor": factor,
            "network.connection_pool_size": 1,
            "requests.hedge_budget": rng.choice((0.0, 0.05)),
            "hints.bytes_max_mb": 0,
            **_health(random.Random(f"{seed}/health")),
            "repair.interval_ms": 0,
            "network.timeout_ms": 300,
            "migration.join_timeout_ms": 1000,
            "migration.bytes_per_s": rng.choice((4096, 1 << 24)),
            "migration.eviction_timeout_ms": rng.choice((0, 0, 1000)),
            **({"migration.eviction_timeout_ms": EVICTION_MS} if evicts else {}),
            "reclaim.lag_ms": 500,
        },
        {name: rng.randint(-SKEW_MS_MAX, SKEW_MS_MAX) for name in nodes},
        {name: 1.0 + rng.uniform(-DRIFT, DRIFT) for name in nodes},
        dict.fromkeys(nodes, 0.0),
        False,
        0.0,
        Workload(
            clients,
            workers=3 if lags else 2,
            keys=4 if lags else 24,
            weights={
                Operation.GET: 2.0,
                Operation.GET_ENTRY: 2.0,
                Operation.PUT: 3.0 if lags else 6.0,
                Operation.DELETE: 0.3,
                Operation.GET_MANY: 0.1,
                Operation.PUT_MANY: 0.2,
                Operation.SCAN: 0.05,
            },
            think_s=rng.choice((0.005, 0.015)) * clients * 2,
            timeout_s=rng.choice((0.2, 0.3) if lags else (0.3, 0.5)),
            batch_max=3,
            page_size=1000,
            all_share=0.0,
            registers=(registers := random.Random(f"{seed}/registers")).choice((0, 1, 3)),
            counters=registers.choice((0, 1)),
            sets=random.Random(f"{seed}/sets").choice((0, 1)),
            locking=locking,
        ),
        _with_stops(FaultPlan.draw(rng, nodes, safety_s=safety_s, mix=mix), locking, random.Random(f"{seed}/stops")),
        rng.getrandbits(1) == 0,
        joiners,
        0.1,
        Churn(
            turn,
            rest_s=2.5 if shrinks else 0.0,
            away_s=(1.0, 2.5) if shrinks else (0.05, 0.6),
            force_share=0.8 if shrinks else 0.0,
            cancel_share=rng.choice((0.0, 0.02)),
            replaces_share=0.5,
            weight_share=0.0 if shrinks else rng.choice((0.0, 0.3)),
            evicts=evicts,
        ),
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


def _reclaim(rng: random.Random, profile: Profile) -> dict[str, object]:
    """Rounds while the faults last, up to versions so young that writes under way come too late for them. In some seeds
    nothing else brings to a replica what it missed."""
    settings: dict[str, object] = {
        "reclaim.interval_ms": rng.choice((200, 500, 2000)),
        "reclaim.lag_ms": rng.choice((0, 50, 500)),
    }
    if profile is Profile.NETWORK and rng.random() < ONLY_ROUNDS_SHARE:
        return {"reclaim.interval_ms": 300, "reclaim.lag_ms": 0, "hints.bytes_max_mb": 0, "repair.interval_ms": 0}
    return settings


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


def _workload(rng: random.Random, profile: Profile, seed: int) -> Workload:
    if profile is Profile.CONSENSUS:
        return _decisions(rng, rng.randint(2, 3), _locking(random.Random(f"{seed}/locking")))
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
        registers=(registers := random.Random(f"{seed}/registers")).choice((0, 1, 1, 2)),
        counters=registers.choice((0, 1)),
    )


def _widened(workload: Workload, seed: int, profile: Profile, spread: bool) -> Workload:
    """In some of the seeds whose keys have different replica sets batches are large, so that one goes to many sets."""
    if not spread or profile is Profile.CONSENSUS or random.Random(f"{seed}/batches").random() >= WIDE_SHARE:
        return workload
    weights = {**workload.weights, Operation.GET_MANY: 2.0, Operation.PUT_MANY: 2.0, Operation.SCAN: 0.1}
    return replace(workload, keys=WIDE_KEYS, weights=weights, batch_max=WIDE_KEYS, think_s=2 * workload.think_s)


def _locking(rng: random.Random) -> Locking | None:
    """In half of the seeds."""
    if rng.getrandbits(1):
        return None
    lease_s = rng.choice((0.3, 0.3, 0.6, 1.2))
    return Locking(
        contenders=3,
        tasks=rng.choice((1, 2)),
        locks=rng.choice((1, 1, 1, 2)),
        lease_s=lease_s,
        wait_s=3 * lease_s,
        hold_s=lease_s * rng.choice((0.1, 0.3, 0.6)),
        think_s=rng.choice((0.02, 0.1)),
        timeout_s=rng.choice((0.3, 1.0)),
    )


def _decisions(rng: random.Random, clients: int, locking: Locking | None) -> Workload:
    """Contended registers, counters and sets, with just so much plain work that all parts of the cluster are busy."""
    return Workload(
        clients if locking is None else 1,
        workers=1,
        keys=2,
        weights={Operation.GET_ENTRY: 1.0, Operation.PUT: 1.0},
        think_s=rng.choice((0.01, 0.03)),
        timeout_s=rng.choice((0.3, 0.5, 1.0, 2.0)),
        batch_max=2,
        page_size=1000,
        all_share=0.0,
        registers=rng.choice((1, 1, 2)),
        counters=1,
        deciders=rng.choice((1, 2)),
        fresh_s=rng.choice((0.0, 0.3, 1.0)),
        sets=rng.choice((0, 1)),
        locking=locking,
    )


def _plan(
    rng: random.Random, profile: Profile, nodes: tuple[str, ...], safety_s: float, locking: Locking | None
) -> FaultPlan:
    mix = replace(_MIXES[profile], down_max=rng.choice((0, 1, (len(nodes) - 1) // 2)))
    if profile is Profile.CONSENSUS:
        mix = replace(mix, clock_jump_ms_max=rng.choice((5_000, SET_BACK_MS_MAX)))
    if locking is not None:
        mix = replace(mix, every_s={kind: _CALMER * every_s for kind, every_s in mix.every_s.items()})
    plan = FaultPlan.draw(rng, nodes, safety_s=safety_s, mix=mix)
    faults = list(plan.faults)
    every_s = _BLACKOUT_EVERY_S.get(profile)
    if every_s is not None:
        every_s *= 1.0 if locking is None else _CALMER
        at_s = rng.expovariate(1.0 / every_s)
        while at_s < safety_s:
            faults += _blackout(rng, nodes, at_s, safety_s)
            at_s += 0.5 + rng.expovariate(1.0 / every_s)
        if rng.getrandbits(1):  # and just before the healing, so that what is lost stays lost
            faults += _blackout(rng, nodes, safety_s - 0.001, safety_s)
    if profile is Profile.CLOCKS and rng.getrandbits(2):
        at_s, back_ms = rng.uniform(0.2, 1.0), rng.randint(10_000, SET_BACK_MS_MAX)
        faults += [Fault(at_s, safety_s - at_s, FaultKind.CLOCK_JUMP, (name,), -back_ms) for name in nodes]
    return _with_stops(replace(plan, faults=tuple(sorted(faults, key=lambda fault: fault.at_s))), locking, rng)


def _with_stops(plan: FaultPlan, locking: Locking | None, rng: random.Random) -> FaultPlan:
    if locking is None:
        return plan
    stops = [fault for name in locking.hosts for fault in _stops(rng, name, locking.lease_s, plan.safety_s)]
    return replace(plan, faults=tuple(sorted([*plan.faults, *stops], key=lambda fault: fault.at_s)))


def _stops(rng: random.Random, name: str, lease_s: float, end_s: float) -> Iterator[Fault]:
    """Who competes for locks is stopped for longer than a lease. Its clock may have stood still meanwhile, as that of a
    machine that was moved, and is set right a while later; it jumps at other times too."""
    at_s = rng.expovariate(1.0 / _STOP_EVERY_S)
    while at_s < end_s:
        for_s = min(lease_s * rng.uniform(1.0, 3.0), end_s - at_s)
        yield Fault(at_s, for_s, FaultKind.PAUSE, (name,))
        if rng.getrandbits(1):
            yield Fault(at_s, min(for_s + lease_s, end_s - at_s), FaultKind.CLOCK_JUMP, (name,), -int(for_s * 1000))
        at_s += for_s + rng.expovariate(1.0 / _STOP_EVERY_S)
    at_s = rng.expovariate(1.0 / _SET_EVERY_S)
    while at_s < end_s:
        for_s = min(lease_s * rng.uniform(0.3, 2.5), end_s - at_s)
        by_ms = rng.choice((5_000, SET_BACK_MS_MAX))
        yield Fault(at_s, for_s, FaultKind.CLOCK_JUMP, (name,), rng.randint(-by_ms, by_ms))
        at_s += for_s + rng.expovariate(1.0 / _SET_EVERY_S)


def _blackout(rng: random.Random, nodes: tuple[str, ...], at_s: float, end_s: float) -> list[Fault]:
    return [Fault(at_s, min(rng.uniform(0.1, 0.5), end_s - at_s), FaultKind.CRASH, (name,), 1) for name in nodes]
