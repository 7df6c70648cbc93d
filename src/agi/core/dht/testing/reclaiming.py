"""Watches from outside that nothing is reclaimed before all replicas have what deletes it (PROTOCOLS G1), and that
who gains an arc has nothing old of it (T10)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from agi.core.dht.joint import JointRing, JointSet
from agi.core.dht.protocol.consensus import is_register
from agi.core.dht.protocol.floors import is_dead
from agi.core.dht.protocol.floors import unpack as unpack_floors
from agi.core.dht.protocol.messages import ReclaimStep
from agi.core.dht.protocol.record import height_of, hlc_of
from agi.core.dht.reclaim import FREE, RECLAIM
from agi.core.dht.ring import Ring
from agi.core.dht.testing.disk import SimDisk
from agi.core.dht.topology import Topology, unpack


def unlevelled(
    leader: str, step: ReclaimStep, ring: Ring, disks: Mapping[str, SimDisk], keys: Sequence[bytes]
) -> list[str]:
    """What speaks against a leader's word to reclaim, a line for a key: of the versions up to that of the round each
    replica durably holds the newest, or a newer record (a register is); or nothing, where the newest is dead and may
    have gone before."""
    if step.step != RECLAIM:
        return []
    wrong = []
    for key in keys:
        replicas = ring.replicas(key)
        if min(replicas) != leader or any(name in step.absent for name in replicas):
            continue
        held = {name: disks[name].durable(key) for name in replicas}
        old = [record for record in held.values() if record is not None and hlc_of(record) <= step.version]
        newest = max(old, key=hlc_of, default=None)
        if newest is None:
            continue
        lacking = [
            name
            for name, record in held.items()
            if (not is_dead(newest, step.version) if record is None else hlc_of(record) < hlc_of(newest))
        ]
        if lacking:
            wrong.append(
                f"{leader} has version {step.version} of {key.decode()} reclaimed while {', '.join(lacking)} "
                f"lacks {hlc_of(newest)}"
            )
    return wrong


def not_retired(step: ReclaimStep, ring: Ring, disks: Mapping[str, SimDisk]) -> list[str]:
    """What speaks against a leader's word to set keys free: a replica that still shows the register of a time at or
    before the round's version, behind which a plain record would be hidden (R8)."""
    if step.step != FREE:
        return []
    wrong = []
    for key in step.keys:
        for name in ring.replicas(key):
            record = disks[name].durable(key)
            if is_register(record) and height_of(hlc_of(record)) <= step.version:
                wrong.append(f"{key.decode()} is set free up to {step.version} while {name} holds a register of it")
    return wrong


def early(name: str, disk: SimDisk, token: int, key: bytes, record: bytes) -> str:
    """What speaks against a node's removing a record of an arc that it holds: rounds have not come so far, by what it
    has stored. Nothing is said of arcs without a round: a node that gains one drops what it has of it, and may have
    held it in the last epoch that it heard of. That all have closed is durable; the order to reclaim need not be."""
    packed, floors = disk.durable_meta("topology"), disk.durable_meta("floors")
    ring = None if packed is None else unpack(packed).ring()
    if not isinstance(ring, Ring) or name not in ring.replicas(key):
        return ""
    closed = unpack_floors(floors or b"").at(token).closed
    if not closed or height_of(hlc_of(record)) <= closed:
        return ""
    return f"{name} takes {key.decode()} at {hlc_of(record)} away, having closed up to {closed}"


def leftover(name: str, before: Topology | None, after: Topology, disk: SimDisk, keys: Sequence[str]) -> list[str]:
    """What a node durably holds of arcs that a topology gives it, when it has just stored that topology; where it had
    them under the one before, too, it may have been written meanwhile, and nothing was reclaimed in between."""
    ring = after.ring()
    if not isinstance(ring, JointRing):
        return []
    known = None if before is None else before.ring()
    found = []
    for key in keys:
        raw = key.encode()
        sets = ring.replicas(raw)
        gained = isinstance(sets, JointSet) and name in sets.new and name not in sets.old
        if gained and disk.durable(raw) is not None and (known is None or name not in known.replicas(raw)):
            found.append(key)
    return found
