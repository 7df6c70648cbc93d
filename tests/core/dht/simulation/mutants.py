"""Planted bugs: each negates one rule of the protocol, and the simulation has to catch each within a few seeds.

The product has no switches for this; a bug is a patch of one method. `python -m tests.core.dht.simulation.mutants`
(`make sim-mutants`) runs them over the seeds that `make sim` runs, and prints which seed caught which, by what check.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from agi.core.dht import node
from agi.core.dht.errors import Unavailable
from agi.core.dht.protocol.bootstrap import Bootstrap, StoreVote
from agi.core.dht.protocol.commit import GroupCommit
from agi.core.dht.protocol.dedup import RequestTable
from agi.core.dht.protocol.quorum import ReadQuorum, WriteQuorum
from agi.core.dht.protocol.versioning import writer_id
from agi.core.dht.testing.formation import run_formation
from agi.core.dht.testing.report import Report
from agi.core.dht.testing.scenario import Profile
from agi.core.dht.testing.trial import run_seed

SEEDS_MAX = 200
"""Within so many seeds of `make sim` each planted bug has to be caught."""


@dataclass(frozen=True)
class Mutant:
    """A planted bug.

    Attributes:
        rule: what it breaks.
        plant: makes the patch.
        profile: the seeds that look for this kind of bug, for the short form; None for a bug of the formation.
    """

    name: str
    rule: str
    plant: Callable[[], AbstractContextManager[Any]]
    profile: Profile | None


def _w_is_one() -> AbstractContextManager[Any]:
    real = WriteQuorum.__init__

    def init(self: WriteQuorum, needed: int, replicas: int) -> None:
        real(self, 1, replicas)

    return mock.patch.object(WriteQuorum, "__init__", init)


def _acknowledge_before_persist() -> AbstractContextManager[Any]:
    real = GroupCommit.submit

    def submit(self: GroupCommit[Any], records: Any, inserts: Any, reply: Callable[[Any], None]) -> Any:
        effect = real(self, records, inserts, lambda error: None)
        reply(None)
        return effect

    return mock.patch.object(GroupCommit, "submit", submit)


def _read_before_sync() -> AbstractContextManager[Any]:
    def park(self: GroupCommit[Any], reply: Callable[[Any], None]) -> None:
        reply(None)

    return mock.patch.object(GroupCommit, "park", park)


def _no_read_repair() -> AbstractContextManager[Any]:
    real = ReadQuorum.__init__

    def init(self: ReadQuorum, needed: int, replicas: int, repair_to: int) -> None:
        real(self, needed, replicas, 0)

    return mock.patch.object(ReadQuorum, "__init__", init)


def _superseded_counts() -> AbstractContextManager[Any]:
    real = WriteQuorum.add_ack

    def add_ack(self: WriteQuorum, superseded: Any) -> None:
        real(self, None)

    return mock.patch.object(WriteQuorum, "add_ack", add_ack)


def _version_reused() -> AbstractContextManager[Any]:
    return mock.patch.object(node, "writer_id", lambda node_id, boot: writer_id(node_id, 1))


def _formed_by_majority() -> AbstractContextManager[Any]:
    real = Bootstrap.step
    settled = Bootstrap.settled

    def content(self: Bootstrap) -> frozenset[str]:
        """Addresses that may stay silent, once more than half have answered."""
        missing = [address for address in self.addresses if address not in self._answers]
        return frozenset(missing) if 2 * len(missing) < len({*self.addresses, self._me.address}) else frozenset()

    def patched_step(self: Bootstrap) -> Any:
        with mock.patch.object(self, "_without", self._without | content(self)):
            return real(self)

    def patched_settled(self: Bootstrap) -> bool:
        with mock.patch.object(self, "_without", self._without | content(self)):
            return bool(settled.fget(self))  # type: ignore[attr-defined]

    return mock.patch.multiple(Bootstrap, step=patched_step, settled=property(patched_settled))


def _vote_before_persist() -> AbstractContextManager[Any]:
    real = Bootstrap.step

    def step(self: Bootstrap) -> Any:
        effect = real(self)
        if isinstance(effect, StoreVote):
            self.voted(effect.topology)
        return effect

    return mock.patch.object(Bootstrap, "step", step)


def _no_deduplication() -> AbstractContextManager[Any]:
    return mock.patch.object(RequestTable, "get", lambda self, client, number: None)


def _unknown_as_failed() -> AbstractContextManager[Any]:
    def shortfall(self: WriteQuorum, what: str) -> Unavailable:
        return Unavailable(what, needed=self.needed, answered=self.acks)

    return mock.patch.object(WriteQuorum, "shortfall", shortfall)


MUTANTS = (
    Mutant("w-is-one", "a write is acknowledged by W replicas", _w_is_one, Profile.NETWORK),
    Mutant("ack-before-persist", "D1: persist before send", _acknowledge_before_persist, Profile.POWER),
    Mutant("read-before-sync", "D2: a read of an unsynced record waits", _read_before_sync, Profile.POWER),
    Mutant("no-read-repair", "a stale reply is repaired before the read returns", _no_read_repair, Profile.CHAOS),
    Mutant("superseded-counts", "V2: superseded is no acknowledgement", _superseded_counts, Profile.CLOCKS),
    Mutant("version-reused", "V1: the boot counter is part of a version", _version_reused, Profile.CLOCKS),
    Mutant("no-deduplication", "a write that arrives twice takes effect once", _no_deduplication, Profile.NETWORK),
    Mutant("unknown-as-failed", "D3: Unavailable only if nothing was stored", _unknown_as_failed, Profile.CHAOS),
    Mutant("vote-before-persist", "D1: a vote is durable before others hear of it", _vote_before_persist, None),
    Mutant("formed-by-majority", "T11: all of the listed nodes decide epoch 1", _formed_by_majority, None),
)


def hunt(mutant: Mutant, seeds: range, *, aimed: bool = False) -> Report | None:
    """The report of the first seed that catches the bug; `aimed`: of the seeds of its profile."""
    for seed in seeds:
        with mutant.plant():
            if mutant.profile is None:
                report = run_formation(seed)
            else:
                report = run_seed(seed, profile=mutant.profile if aimed else None)
        if report.findings:
            return report
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.core.dht.simulation.mutants", description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS_MAX, help="how many to try on each")
    given = parser.parse_args(argv)
    missed = 0
    print(f"{'planted bug':20} {'seed':>5} {'check':12} {'s':>6}  rule")
    for mutant in MUTANTS:
        began = time.perf_counter()
        report = hunt(mutant, range(1, given.seeds + 1))
        seed, check = ("-", "MISSED") if report is None else (str(report.seed), report.findings[0].check)
        missed += report is None
        print(f"{mutant.name:20} {seed:>5} {check:12} {time.perf_counter() - began:6.1f}  {mutant.rule}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
