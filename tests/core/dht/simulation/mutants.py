"""Planted bugs: each negates one rule of the protocol, and the simulation has to catch each within a few seeds.

The product has no switches for this; a bug is a patch of one method. `python -m tests.core.dht.simulation.mutants`
(`make sim-mutants`) runs them over the seeds that `make sim` runs, and prints which seed caught which, by what check.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import msgspec

from agi.core.dht import acceptor, node, registers, tree_answers
from agi.core.dht.client.locks import Lock
from agi.core.dht.epochs import Epochs
from agi.core.dht.errors import Unavailable
from agi.core.dht.hello import KnownBoots, check_hello
from agi.core.dht.identity import Ledger
from agi.core.dht.migration import Migration
from agi.core.dht.node import Node
from agi.core.dht.protocol import consensus, dissemination
from agi.core.dht.protocol.bootstrap import Bootstrap, StoreTopology, StoreVote
from agi.core.dht.protocol.commit import GroupCommit
from agi.core.dht.protocol.consensus import Round, round_of, state_of
from agi.core.dht.protocol.dedup import RequestTable
from agi.core.dht.protocol.floors import Height, is_dead
from agi.core.dht.protocol.locks import LockRecord, pack_lock
from agi.core.dht.protocol.messages import FRESH, HINT, Claim, Hello, TreeRoot, TreeRootReply
from agi.core.dht.protocol.quorum import JointReadQuorum, JointWriteQuorum, ReadQuorum, WriteQuorum
from agi.core.dht.protocol.record import EXPIRES, FLAGS, HEADER, created_ms_of, hlc_of, pack
from agi.core.dht.protocol.register import Proposer, Reply, State
from agi.core.dht.protocol.versioning import writer_id
from agi.core.dht.reclaim import CLOSE, RECLAIM, RETIRE, Reclaimer
from agi.core.dht.registers import Registers
from agi.core.dht.replica import Replica
from agi.core.dht.testing.clock import EPOCH_MS, SimClock
from agi.core.dht.testing.formation import run_formation
from agi.core.dht.testing.report import Report
from agi.core.dht.testing.scenario import Profile, Turn
from agi.core.dht.testing.trial import run_seed
from agi.core.dht.topology import Topology, unpack
from agi.core.dht.tree_answers import TreeAnswers
from agi.core.dht.treekeeper import TreeKeeper
from agi.core.dht.types import MemberStatus
from agi.core.dht.watches import Watches, _Known
from agi.core.dht.writes import WriteGroup

SEEDS_MAX = 200
"""Within so many seeds of `make sim` each planted bug has to be caught."""


@dataclass(frozen=True)
class Mutant:
    """A planted bug.

    Attributes:
        rule: what it breaks.
        plant: makes the patch.
        profile: the seeds that look for this kind of bug, for the short form; None for a bug of the formation.
        seed: the hunt of the short form begins here, where an earlier one has ended.
        turn: of churn, which alone looks for it: among the ordinary seeds there are too few of a turn.
        check: what has to find it, where something else finds what goes with it.
    """

    name: str
    rule: str
    plant: Callable[[], AbstractContextManager[Any]]
    profile: Profile | None
    turn: Turn | None = None
    seed: int = 1
    check: str = ""

    def run(self, seed: int, *, aimed: bool) -> Report:
        """A seed of the kind that looks for it; `aimed`: of its profile, as are those of a turn and of consensus, of
        which there are few among the ordinary ones."""
        if self.profile is None:
            return run_formation(seed)
        aimed = aimed or self.turn is not None or self.profile is Profile.CONSENSUS
        return run_seed(seed, profile=self.profile if aimed else None, turn=self.turn)


def _w_is_one() -> AbstractContextManager[Any]:
    real = WriteQuorum.__init__

    def init(self: WriteQuorum, needed: int, replicas: int) -> None:
        real(self, 1, replicas)

    return mock.patch.object(WriteQuorum, "__init__", init)


def _acknowledge_before_persist() -> AbstractContextManager[Any]:
    real = GroupCommit.submit

    def submit(
        self: GroupCommit[Any], records: Any, inserts: Any, reply: Callable[[Any], None], promises: Any = None
    ) -> Any:
        effect = real(self, records, inserts, lambda error: None, promises)
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

    def add_ack(self: WriteQuorum, replica: str, superseded: Any) -> None:
        real(self, replica, None)

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


def _epoch_by_one_voter() -> AbstractContextManager[Any]:
    return mock.patch.object(Proposer, "_quorum", lambda self, answered: bool(answered))


def _vote_not_persisted() -> AbstractContextManager[Any]:
    async def store_promise(self: Ledger, promise: Any) -> None:
        return None

    return mock.patch.object(Ledger, "store_promise", store_promise)


def _epoch_not_persisted() -> AbstractContextManager[Any]:
    real = Ledger.store_topology

    async def store_topology(self: Ledger, topology: Topology, addresses: Any = None) -> None:
        if addresses is not None:  # the first one
            await real(self, topology, addresses)

    return mock.patch.object(Ledger, "store_topology", store_topology)


def _found_value_ignored() -> AbstractContextManager[Any]:
    real = Proposer.promised

    def promised(self: Proposer, acceptor: str, reply: Reply) -> Any:
        return real(self, acceptor, Reply(reply.granted, State(reply.state.promised)))

    return mock.patch.object(Proposer, "promised", promised)


def _dead_incarnation_revived() -> AbstractContextManager[Any]:
    real = dissemination.newer

    def newer(one: Claim, other: Claim) -> bool:
        revives = one.status is MemberStatus.ALIVE and other.status is MemberStatus.DEAD and one.boot == other.boot
        return revives or real(one, other)

    return mock.patch.object(dissemination, "newer", newer)


def _suspicion_never_refuted() -> AbstractContextManager[Any]:
    return mock.patch.object(dissemination.Dissemination, "_answer", lambda self, claim: None)


def _hint_overwrites_newer_record() -> AbstractContextManager[Any]:
    """What comes as a hint is stored whatever is there."""
    real = Replica._merge

    def merge(self: Replica, mode: int, keys: Any, records: Any, headers: Any, want_live: bool) -> Any:
        if mode != HINT:
            return real(self, mode, keys, records, headers, want_live)
        new = [key for key, header in zip(keys, headers, strict=True) if header is None]
        return dict(zip(keys, records, strict=True)), new, None, None

    return mock.patch.object(Replica, "_merge", merge)


def _hint_of_a_failed_write() -> AbstractContextManager[Any]:
    real = WriteGroup._done

    def done(self: WriteGroup, outcome: Any) -> None:
        real(self, outcome)
        if not self.acknowledged:
            self.records = self.records or self._stamp(None)
            for replica in self.missed or ():
                self._hint(replica)

    return mock.patch.object(WriteGroup, "_done", done)


def _ttl_dropped_in_repair() -> AbstractContextManager[Any]:
    read, records_at = TreeKeeper.read, TreeKeeper.records_at

    def kept(key: bytes, record: bytes) -> bytes:
        return record if record[FLAGS] != EXPIRES else _without_ttl(key, record)

    async def pushed(self: TreeKeeper, keys: list[bytes]) -> list[bytes | None]:
        records = await read(self, keys)
        return [None if record is None else kept(key, record) for key, record in zip(keys, records, strict=True)]

    async def fetched(self: TreeKeeper, tokens: Any) -> Any:
        keys, records, taken = await records_at(self, tokens)
        return keys, list(map(kept, keys, records)), taken

    return mock.patch.multiple(TreeKeeper, read=pushed, records_at=fetched)


def _without_ttl(key: bytes, record: bytes) -> bytes:
    writer, created_ms = int.from_bytes(record[8:16], "big"), created_ms_of(record)
    return pack(key, record[HEADER:], hlc_of(record), writer, created_ms)


def _differences_unseen() -> AbstractContextManager[Any]:
    def answer(trees: Any, positions: Any, request: TreeRoot) -> TreeRootReply:
        return TreeRootReply(request.id)

    return mock.patch.object(tree_answers, "answer_root", answer)


# --- changes of the members


def _epoch_unchecked() -> AbstractContextManager[Any]:
    return mock.patch.object(Epochs, "covers", lambda self, epoch: True)


def _one_write_quorum() -> AbstractContextManager[Any]:
    return _new_set_not_needed(JointWriteQuorum)


def _reads_of_the_old_set_only() -> AbstractContextManager[Any]:
    return _new_set_not_needed(JointReadQuorum)


def _new_set_not_needed(kind: Any) -> AbstractContextManager[Any]:
    real = kind._share

    def share(self: Any, old: Any, new: Any, old_needed: int, new_needed: int) -> None:
        real(self, old, new, old_needed, 0)

    return mock.patch.object(kind, "_share", share)


def _copied_from_one() -> AbstractContextManager[Any]:
    real = Migration._fill

    async def fill(self: Migration, placement: str, work: Any) -> None:
        for arc in work:
            arc.sources = 1
        await real(self, placement, work)

    return mock.patch.object(Migration, "_fill", fill)


def _only_filled(chosen: Any) -> AbstractContextManager[Any]:
    """Of what a node is to fill, it fills only the arcs that `chosen(node id, replicas)` names."""
    real = Migration._fill

    async def fill(self: Migration, placement: str, work: Any) -> None:
        await real(self, placement, {arc: spans for arc, spans in work.items() if chosen(self._me, arc)})

    return mock.patch.object(Migration, "_fill", fill)


def _only_newcomers_are_filled() -> AbstractContextManager[Any]:
    return _only_filled(lambda me, arc: me not in arc.old)


def _no_member_is_filled() -> AbstractContextManager[Any]:
    return _only_filled(lambda me, arc: False)


def _primary_ranges_only() -> AbstractContextManager[Any]:
    return _only_filled(lambda me, arc: arc.new[0] == me)


def _reclaimed_by_time_alone() -> AbstractContextManager[Any]:
    def sort(self: Reclaimer, page: list[Any]) -> tuple[list[Any], list[Any]]:
        height = max(0, self._node.clock.wall_ms() - self._lag_ms) << 16
        return [item for item in page if is_dead(item[1], height)], []

    return mock.patch.object(Reclaimer, "_sort", sort)


def _closed_without_a_look() -> AbstractContextManager[Any]:
    async def level_with(self: Reclaimer, name: str, version: int) -> None:
        return None

    return mock.patch.object(Reclaimer, "_level_with", level_with)


def _snapshot_before_epoch() -> AbstractContextManager[Any]:
    """A source lists and sends at once, whether it has adopted the change and settled what it took before or not."""
    request, fetch = Migration.request, TreeAnswers.request

    def listed(self: Migration, session: Any, link: Any, message: Any) -> None:
        with mock.patch.multiple(self, _stale=lambda session, epoch: None, _settled=self._placement):
            request(self, session, link, message)

    def fetched(self: TreeAnswers, session: Any, link: Any, message: Any) -> None:
        stale = self._stale if not message.trace.startswith("migration") else lambda session, epoch: None
        with mock.patch.object(self, "_stale", stale):
            fetch(self, session, link, message)

    patches = ExitStack()
    patches.enter_context(mock.patch.object(Migration, "request", listed))
    patches.enter_context(mock.patch.object(TreeAnswers, "request", fetched))
    return patches


def _round_without_close() -> AbstractContextManager[Any]:
    """After the seal all reclaim."""
    real = Reclaimer._step

    async def step(self: Reclaimer, leader: str, message: Any, *, wait: bool) -> list[int]:
        if message.step == CLOSE:
            return []
        height = Height(message.version, message.version, message.version * (message.step > RECLAIM))
        with mock.patch.object(self, "_lowest", lambda spans: height):
            return await real(self, leader, message, wait=wait)

    return mock.patch.object(Reclaimer, "_step", step)


def _register_freed_at_once() -> AbstractContextManager[Any]:
    """Who leads takes a register away, and has it forgotten, without the others."""
    real = Reclaimer._all

    async def all_(self: Reclaimer, others: list[str], message: Any) -> set[int]:
        return await real(self, others if message.step != RETIRE else [], message)

    return mock.patch.object(Reclaimer, "_all", all_)


def _leftover_kept() -> AbstractContextManager[Any]:
    """Who gains an arc keeps what it has of it. What covers for that is taken away too: data of arcs that a node gave
    up goes in the background."""

    async def make_room(self: Reclaimer, topology: Topology) -> None:
        return None

    async def drop(self: Reclaimer, span: Any, allowed: Any) -> int:
        return 0

    return mock.patch.multiple(Reclaimer, make_room=make_room, _drop=drop)


def _nothing_dropped() -> AbstractContextManager[Any]:
    """What a node holds of arcs that it has given up stays for ever."""

    async def drop(self: Reclaimer, span: Any, allowed: Any) -> int:
        return 0

    return mock.patch.object(Reclaimer, "_drop", drop)


def _wiped_disk_accepted() -> AbstractContextManager[Any]:
    """Who has a member's name is that member: it takes over the identity that the topology names."""

    def check(self: Node, theirs: Hello) -> None:
        member = None if self.topology is None else self.topology.by_id.get(theirs.name)
        if member is not None:
            theirs = msgspec.structs.replace(theirs, disk_id=member.disk_id)
        check_hello(self, self._boots, theirs)

    def take_over(self: Node, topology: Topology) -> None:
        assert self._identity is not None
        mine = topology.by_id.get(self.node_id)
        if mine is not None and mine.disk_id != self._identity.disk_id:
            boot = self._identity.boot + 1000  # a counter that went back would be noticed (I3)
            self._identity = msgspec.structs.replace(self._identity, disk_id=mine.disk_id, boot=boot)

    form = Node._form

    def formed(self: Node, topology: Topology) -> None:
        take_over(self, topology)
        form(self, topology)

    judge = Bootstrap._judge

    def judged(self: Bootstrap, address: str, hello: Hello) -> StoreTopology | None:
        if hello.topology and self._me.node_id in (topology := unpack(hello.topology)).by_id:
            return StoreTopology(topology)
        return judge(self, address, hello)

    patches = ExitStack()
    patches.enter_context(mock.patch.object(KnownBoots, "check", lambda self, theirs: None))
    patches.enter_context(mock.patch.object(Bootstrap, "_judge", judged))
    patches.enter_context(mock.patch.multiple(Node, check_hello=check, _check_own=take_over, _form=formed))
    return patches


# --- consensus


def _round_with_one_vote() -> AbstractContextManager[object]:
    return mock.patch.object(Round, "_enough", lambda self: True)


def _acceptance_before_sync() -> AbstractContextManager[object]:
    decide = Replica.decide

    def hasty(self: Any, keys: Any, what: Any, done: Any, *, values: bool) -> None:
        if values:  # it is asked for promises
            decide(self, keys, what, done, values=values)
            return
        told: list[object] = []

        def once(error: Any) -> None:
            if not told:
                told.append(error)
                done(error)

        decide(self, keys, what, once, values=values)
        once(None)

    return mock.patch.object(Replica, "decide", hasty)


def _promises_not_persisted() -> AbstractContextManager[object]:
    """Promises are given, and kept in memory alone."""
    submit = GroupCommit.submit

    def forgetful(self: Any, records: Any, inserts: Any, reply: Any, promises: Any = None) -> Any:
        return submit(self, records, inserts, reply, None)

    return mock.patch.object(GroupCommit, "submit", forgetful)


class _Stopped:
    """A wall clock that always shows the same."""

    def __init__(self, clock: Any) -> None:
        self.monotonic, self.boottime = clock.monotonic, clock.boottime

    def wall_ms(self) -> int:
        return EPOCH_MS


def _ballots_reused() -> AbstractContextManager[object]:
    """A ballot does not tell which start of its node made it: one that was started anew goes on with the last. What
    covers for that is taken away too: acceptors refuse a round that is not above all that they have promised."""
    init, begin, judge = Registers.__init__, Registers._begin, acceptor.judge_prepare
    last: dict[int, int] = {}

    def unaware(self: Any, requests: Any, votes: Any, hlc: Any, proposer: int, clock: Any, *rest: Any) -> None:
        init(self, requests, votes, hlc, proposer >> 32 << 32, _Stopped(clock), *rest)  # type: ignore[arg-type]  # a Clock by what it has
        self._ms = last.get(proposer >> 32, EPOCH_MS) - 1

    def begun(self: Any, key: Any) -> None:
        begin(self, key)
        last[self._proposer >> 32] = self._ms

    def granted(wanted: bytes, promise: bytes, record: bytes | None) -> bytes | None:
        accepted = round_of(record) if record is not None and record[0] & 0x80 else b""
        return None if wanted == max(promise, accepted) else judge(wanted, promise, record)

    stack = ExitStack()
    stack.enter_context(mock.patch.multiple(Registers, __init__=unaware, _begin=begun))
    stack.enter_context(mock.patch.object(acceptor, "judge_prepare", granted))
    return stack


def _plain_put_past_a_register() -> AbstractContextManager[object]:
    """Plain puts go by the value's version, as if there were no register."""
    merge = Replica._merge

    def careless(self: Any, mode: int, keys: Any, records: Any, headers: Any, want_live: bool) -> Any:
        if mode == FRESH:
            headers = [bytes(HEADER) if header and header[0] & 0x80 else header for header in headers]
        return merge(self, mode, keys, records, headers, want_live)

    return mock.patch.object(Replica, "_merge", careless)


def _registered_at_acceptance() -> AbstractContextManager[object]:
    """A promise does not keep plain puts out yet."""
    return mock.patch.object(Replica, "_promised", lambda self, keys, records, superseded: set())


def _registers_left_behind() -> AbstractContextManager[object]:
    """A change of members brings plain records only."""
    lacking = Migration._lacking

    def plain(self: Any, mine: Any, listed: Any) -> Any:
        return lacking(self, mine, [(token, version) for token, version in listed if version[0] < 0x80])

    return mock.patch.object(Migration, "_lacking", plain)


def _registers_by_version() -> AbstractContextManager[object]:
    """Of two accepted values the one with the later version counts, whatever their ballots."""

    def promised(self: Any, replica: str, record: Any) -> bool:
        if self.accepting or replica in self._answered:
            return False
        self._answered.add(replica)
        if record is not None and (self.found is None or state_of(record).version > state_of(self.found).version):
            self.found = record
        return bool(self._enough())

    def judge(record: bytes, promise: bytes, held: Any) -> Any:
        if round_of(record) < promise:
            return promise
        if held is not None and state_of(held).version > state_of(record).version:
            return max(promise, round_of(held)) if held[0] & 0x80 else None
        return None

    stack = ExitStack()
    stack.enter_context(mock.patch.object(Round, "promised", promised))
    stack.enter_context(mock.patch.object(acceptor, "judge_accept", judge))
    return stack


def _conflict_on_a_value_not_chosen() -> AbstractContextManager[object]:
    propose = Registers._propose

    def hasty(self: Any, key: Any, base: Any) -> None:
        propose(self, key, base)
        for waiting, result in zip(key.taken, key.results, strict=True):
            if result.error is not None:
                self._answer(waiting, result)

    return mock.patch.object(Registers, "_propose", hasty)


def _retry_without_a_name() -> AbstractContextManager[object]:
    return mock.patch.object(registers, "outcome", lambda *_, **__: None)


def _round_across_epochs() -> AbstractContextManager[object]:
    """A new epoch ends no round, and leaves the ballots that were promised under the one before."""

    def wait_on(self: Any) -> None:
        if self.waiting:
            self.registers.requests.pending[self.id] = self

    stack = ExitStack()
    stack.enter_context(mock.patch.object(Registers, "adopt", lambda self: None))
    stack.enter_context(mock.patch.object(registers._Frame, "restart", wait_on))
    return stack


# --- locks


def _fence_unchecked() -> AbstractContextManager[object]:
    return mock.patch.object(consensus, "_fence", lambda op, state: op.fence or state.fence)


def _lease_by_the_wall_clock() -> AbstractContextManager[object]:
    return mock.patch.object(SimClock, "boottime", lambda self: self.wall_ms() / 1000)


def _age_of_another() -> AbstractContextManager[Any]:
    real = Watches._told

    def told(self: Watches, key: bytes, version: int) -> int:
        since = self._since.get(key)
        return real(self, key, version if since is None else since.version)

    def remember(self: Watches, key: bytes, version: int, *, chosen: bool) -> None:
        self._since.setdefault(key, _Known(version, self._clock.boottime(), chosen))

    patches = ExitStack()
    patches.enter_context(mock.patch.object(Watches, "_told", told))
    patches.enter_context(mock.patch.object(Watches, "_remember", remember))
    return patches


def _released_by_a_stale_holder() -> AbstractContextManager[object]:
    """Whoever was a holder frees the lock, whether it is his still or another's."""

    async def release(self: Any) -> None:
        self._over = "was released"
        self._renewals.cancel()
        value = pack_lock(LockRecord("", 0, self._token))
        await self._client._write_over(self._key, value, None, None, self._lease_s)

    return mock.patch.object(Lock, "release", release)


MUTANTS = (
    Mutant("w-is-one", "a write is acknowledged by W replicas", _w_is_one, Profile.NETWORK),
    Mutant("ack-before-persist", "D1: persist before send", _acknowledge_before_persist, Profile.POWER, seed=34),
    Mutant("read-before-sync", "D2: a read of an unsynced record waits", _read_before_sync, Profile.POWER, seed=3),
    Mutant(
        "no-read-repair", "a stale reply is repaired before the read returns", _no_read_repair, Profile.CHAOS, seed=3
    ),
    Mutant("superseded-counts", "V2: superseded is no acknowledgement", _superseded_counts, Profile.CLOCKS),
    Mutant("version-reused", "V1: the boot counter is part of a version", _version_reused, Profile.CLOCKS, seed=7),
    Mutant(
        "no-deduplication", "a write that arrives twice takes effect once", _no_deduplication, Profile.NETWORK, seed=3
    ),
    Mutant(
        "unknown-as-failed", "D3: Unavailable only if nothing was stored", _unknown_as_failed, Profile.CHAOS, seed=6
    ),
    Mutant("vote-before-persist", "D1: a vote is durable before others hear of it", _vote_before_persist, None, seed=5),
    Mutant("epoch-by-one-voter", "T1: a majority of voters decides an epoch", _epoch_by_one_voter, Profile.CHAOS),
    Mutant("vote-not-persisted", "D1: a voter's promise is durable first", _vote_not_persisted, Profile.CHAOS),
    Mutant("epoch-not-persisted", "T2: an epoch is durable before it counts", _epoch_not_persisted, Profile.CHAOS),
    Mutant(
        "found-value-ignored",
        "an accepted value is proposed again",
        _found_value_ignored,
        Profile.CHAOS,
        seed=7,
        check="one epoch",
    ),
    Mutant(
        "dead-is-revived", "an old claim does not revive the dead", _dead_incarnation_revived, Profile.NETWORK, seed=15
    ),
    Mutant("never-refuted", "an accused node refutes", _suspicion_never_refuted, Profile.NETWORK),
    Mutant(
        "hint-overwrites",
        "a hint never replaces a newer record",
        _hint_overwrites_newer_record,
        Profile.NETWORK,
        seed=109,
    ),
    Mutant("hint-of-failure", "D3: a failed write leaves no hint", _hint_of_a_failed_write, Profile.NETWORK, seed=17),
    Mutant("ttl-dropped", "a record is repaired whole, with its TTL", _ttl_dropped_in_repair, Profile.CHAOS),
    Mutant("differences-unseen", "replicas become equal without reads", _differences_unseen, Profile.NETWORK),
    Mutant("formed-by-majority", "T11: all of the listed nodes decide epoch 1", _formed_by_majority, None, seed=46),
    Mutant("epoch-unchecked", "T3: messages of another epoch are refused", _epoch_unchecked, Profile.CHURN, Turn.STRAY),
    Mutant("one-write-quorum", "T5: both sets take a write", _one_write_quorum, Profile.CHURN, Turn.MOVE, seed=1),
    Mutant("reads-of-old-set", "T5: both sets are read", _reads_of_the_old_set_only, Profile.CHURN, Turn.LAG),
    Mutant("copied-from-one", "T6: an arc is merged from a majority", _copied_from_one, Profile.CHURN, Turn.MOVE),
    Mutant(
        "newcomers-only",
        "T6: who stays is filled too",
        _only_newcomers_are_filled,
        Profile.CHURN,
        Turn.SHRINK,
        seed=153,
    ),
    Mutant(
        "primary-ranges-only", "T6: every arc of a member is filled", _primary_ranges_only, Profile.CHURN, Turn.MOVE
    ),
    Mutant("final-too-early", "T7: the final epoch waits for the data", _no_member_is_filled, Profile.CHURN, Turn.MOVE),
    Mutant("reclaimed-by-time", "G1: a tombstone goes by agreement", _reclaimed_by_time_alone, Profile.NETWORK),
    Mutant("closed-unlevelled", "G1: who closes has what others had", _closed_without_a_look, Profile.NETWORK, seed=25),
    Mutant("unclosed-round", "G1: a round closes before it reclaims", _round_without_close, Profile.NETWORK, seed=25),
    Mutant("freed-at-once", "R8: all take a register away, then forget", _register_freed_at_once, Profile.CONSENSUS),
    Mutant("snapshot-before-epoch", "T6: a source adopts first", _snapshot_before_epoch, Profile.CHURN, Turn.LAG),
    Mutant(
        "leftover-kept",
        "T10: who gains an arc drops old data",
        _leftover_kept,
        Profile.CHURN,
        Turn.MOVE,
        seed=2,
        check="leftover",
    ),
    Mutant("unequal-after-change", "replicas become equal", _differences_unseen, Profile.CHURN, Turn.MOVE, seed=10),
    Mutant("given-up-kept", "data of arcs that were given up goes", _nothing_dropped, Profile.CHURN, Turn.MOVE, seed=2),
    Mutant(
        "wiped-disk", "I1: a name with another disk is another", _wiped_disk_accepted, Profile.CHURN, Turn.LOSE, seed=6
    ),
    Mutant("round-of-one", "R: a quorum promises and accepts", _round_with_one_vote, Profile.CONSENSUS),
    Mutant(
        "hasty-acceptance",
        "D1: an acceptance is durable first",
        _acceptance_before_sync,
        Profile.CONSENSUS,
    ),
    Mutant("promise-lost", "D1: a promise is durable first", _promises_not_persisted, Profile.CONSENSUS),
    Mutant("ballot-reused", "R3: the boot counter is part of a ballot", _ballots_reused, Profile.CONSENSUS, seed=10),
    Mutant(
        "plain-past-register",
        "R1: plain puts take the path of the register",
        _plain_put_past_a_register,
        Profile.CONSENSUS,
    ),
    Mutant("registered-late", "R1: a promise makes the register", _registered_at_acceptance, Profile.CONSENSUS),
    Mutant(
        "register-left-behind",
        "R2: a change moves registers",
        _registers_left_behind,
        Profile.CHURN,
        Turn.MOVE,
        seed=9,
    ),
    Mutant("register-by-version", "R2: registers compare by ballot", _registers_by_version, Profile.CONSENSUS),
    Mutant(
        "hasty-conflict", "R5: a conflict is told of a chosen value", _conflict_on_a_value_not_chosen, Profile.CONSENSUS
    ),
    Mutant("nameless-retry", "R4: an operation finds itself", _retry_without_a_name, Profile.CONSENSUS),
    Mutant("round-across-epochs", "R6: an epoch change ends every round", _round_across_epochs, Profile.CONSENSUS),
    Mutant("fence-unchecked", "L3: a lower token is refused", _fence_unchecked, Profile.CONSENSUS, seed=4),
    Mutant("lease-by-wall-clock", "L2: leases are counted, not dated", _lease_by_the_wall_clock, Profile.CONSENSUS),
    Mutant("age-of-another", "L2: the age that a node tells is of that version", _age_of_another, Profile.CONSENSUS),
    Mutant(
        "stale-release", "L2: a release is bound to its version", _released_by_a_stale_holder, Profile.CONSENSUS, seed=5
    ),
)


def hunt(mutant: Mutant, seeds: range, *, aimed: bool = False) -> Report | None:
    """The report of the first seed that catches the bug; `aimed`: of the seeds of its profile. A seed in which the bug
    only makes the program fail catches nothing: that is not what the checks are for. Nor do changes that come to no end
    where the bug is about what they do to records. Raises AssertionError for a patch that does not fit what it patches
    any more."""
    others = {"program", "convergence"} if mutant.turn is not None else {"program"}
    for seed in seeds:
        with mutant.plant():
            report = mutant.run(seed, aimed=aimed)
        failures = [finding.text for finding in report.findings if finding.check == "program"]
        misfits = [text for text in failures if "TypeError" in text and "argument" in text]
        assert not misfits, f"{mutant.name} does not fit: {misfits[0]}"
        checks = [finding.check for finding in report.findings]
        if mutant.check in checks if mutant.check else checks and checks[0] not in others:
            return report
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.core.dht.simulation.mutants", description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS_MAX, help="how many to try on each")
    given = parser.parse_args(argv)
    missed = 0
    print(f"{'planted bug':20} {'seed':>5} {'check':12} {'s':>6}  {'of':10} rule")
    for mutant in MUTANTS:
        began = time.perf_counter()
        report = hunt(mutant, range(1, given.seeds + 1))
        seed, check = (
            ("-", "MISSED") if report is None else (str(report.seed), mutant.check or report.findings[0].check)
        )
        missed += report is None
        kind = "formation" if mutant.profile is None else mutant.turn or ""
        kind = "consensus" if mutant.profile is Profile.CONSENSUS else kind
        print(
            f"{mutant.name:20} {seed:>5} {check:12} {time.perf_counter() - began:6.1f}  {kind:10} {mutant.rule}",
            flush=True,
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
