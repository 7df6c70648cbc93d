"""Recovery by hand of a cluster that has lost a majority of its voters for ever (PROTOCOLS T12).

No epoch can be decided then. An operator names the nodes that will never come back (`agi-dht topology recover`), and
the first epoch of the next generation is decided without them: by **all** others, each of whom stores its consent. It
is one register (protocol/register.py) per generation, of which every survivor is a quorum of its own. So two operators
who start from different nodes, and even name different losses, get one outcome as long as there is a node that both
count among the survivors; whoever comes second finds what the first began, and completes that. Where there is none,
since each of two halves gave the other up, both halves have the same (generation, epoch) with different contents: their
nodes stop as soon as two of them meet.

What the survivors agree on is a transition: of each arc the replicas that are left count as the old set, and all of
them are merged into the new one (joint.py). Acknowledged writes that only lost nodes held are gone. A lost node that
comes back all the same is of an older generation: it hears of the newer one, which does not name it, and ends.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection
from typing import TYPE_CHECKING

import structlog

from agi.core.dht.errors import ChangeRefused, ClusterError, DHTError, InvalidRequest, OutcomeUnknown, Unavailable
from agi.core.dht.identity import Ledger, Promise
from agi.core.dht.joint import majority
from agi.core.dht.protocol.messages import EpochAccept, EpochPrepare, EpochReply
from agi.core.dht.protocol.register import Accept, Acceptor, Ballot, Chosen, Preempted, Proposer, Reply, State
from agi.core.dht.protocol.versioning import writer_id
from agi.core.dht.tasks import all_of
from agi.core.dht.topology import GENERATION_EPOCHS, JOINING, Topology, unpack

if TYPE_CHECKING:
    from agi.core.dht.node import Node

_log = structlog.get_logger("agi.core.dht.recovery")

SURVIVOR_TIMEOUT_S = 2.0
"""How long a survivor is waited for in one phase."""
PAUSE_S = 0.2
"""Between two attempts, on average: another's ballot was in the way."""

Take = Callable[[str, Reply], Accept | Chosen | Preempted | None]


class Recovery:
    """One node's part: its consent, and its proposals.

    Args:
        adopt: stores a newer topology durably and puts it into force.
        announce: tells the others of it.
    """

    def __init__(
        self,
        node: Node,
        ledger: Ledger,
        rng: random.Random,
        *,
        adopt: Callable[[Topology], Awaitable[None]],
        announce: Callable[[Topology], None],
    ) -> None:
        self._node = node
        self._ledger = ledger
        self._rng = rng
        self._adopt = adopt
        self._announce = announce
        self._lock = asyncio.Lock()
        self._generation = 0
        self._acceptor = Acceptor()
        self._counter = 0
        self._loaded = False

    # --- whether it may be

    def survivors(self, base: Topology, lost: Collection[str]) -> list[str]:
        """Who has to consent. Raises InvalidRequest, ChangeRefused where that cannot be what has happened."""
        me = self._node.node_id
        strangers = sorted(set(lost) - base.by_id.keys())
        if strangers or not lost:
            raise InvalidRequest(f"there is no node {strangers[0]!r}" if strangers else "nobody is named as lost")
        if me in lost:
            raise InvalidRequest(f"{me} is asked itself, and cannot be lost: ask a node that survives")
        self._refuse_while_voters_are_there(base)
        self._refuse_the_living(lost)
        # who was about to join is let go, and joins anew: nothing counted on it yet
        left = [m.node_id for m in base.members if m.state != JOINING and m.node_id not in lost]
        reached = self._reached()
        missing = [name for name in left if name not in reached]
        if missing:
            raise ChangeRefused(
                f"{', '.join(missing)}: neither named as lost nor reached from {me}. Start what can be started, and "
                "name as lost what never comes back: what it alone holds is gone"
            )
        return left

    def _reached(self) -> set[str]:
        return {self._node.node_id, *self._node.peers.usable}

    def _refuse_while_voters_are_there(self, base: Topology) -> None:
        there = [name for name in base.voters if name in self._reached()]
        if len(there) >= majority(len(base.voters)):
            raise ChangeRefused(
                f"{self._node.node_id} reaches a majority of the voters ({', '.join(there)}): there is no need to "
                "recover, remove the dead"
            )

    def _refuse_the_living(self, lost: Collection[str]) -> None:
        alive = sorted(name for name in lost if name in self._node.peers.connected)
        if alive:
            raise ChangeRefused(f"{', '.join(alive)} cannot be lost: {self._node.node_id} is connected to it")

    # --- consent

    async def _load(self) -> None:
        if self._loaded:
            return
        promise = await self._ledger.recovery()
        if promise is not None:
            self._generation = promise.epoch
            self._acceptor = Acceptor(State(Ballot(*promise.promised), Ballot(*promise.accepted), promise.value))
        self._loaded = True

    async def vote(self, request: EpochPrepare | EpochAccept) -> EpochReply:
        """This node's consent, stored; or why it gives none."""
        async with self._lock:
            await self._load()
            mine = self._node.known_topology
            if isinstance(request, EpochPrepare):
                base = unpack(request.base)
                if base.origin != mine.origin:
                    raise ClusterError(f"that is a recovery of another cluster than that of {self._node.node_id}")
                if base.order > mine.order:
                    await self._adopt(base)
                    mine = base
                elif base.order < mine.order:
                    return EpochReply(request.id, newer=mine.packed)
                self._refuse_while_voters_are_there(mine)
            else:
                value = unpack(request.value)
                if mine.generation >= request.generation:
                    return EpochReply(request.id, newer=mine.packed)
                if value.order != (mine.generation + 1, mine.epoch + GENERATION_EPOCHS):
                    raise ChangeRefused(f"{self._node.node_id} has come to epoch {mine.epoch} meanwhile")
                self._refuse_the_living([member.node_id for member in value.lost])
            if request.generation != mine.generation + 1:
                raise ChangeRefused(f"{self._node.node_id} is at generation {mine.generation}")
            return await self._answer(request)

    async def _answer(self, request: EpochPrepare | EpochAccept) -> EpochReply:
        if self._generation != request.generation:
            self._generation, self._acceptor = request.generation, Acceptor()
        before, ballot = self._acceptor.state, Ballot(*request.ballot)
        if isinstance(request, EpochPrepare):
            step = self._acceptor.prepare(ballot)
        else:
            step = self._acceptor.accept(ballot, request.value)
        if step.state is not None:
            state = step.state
            promise = Promise(request.generation, state.promised, state.accepted, state.value)
            try:
                await self._ledger.store_recovery(promise)
            except BaseException:  # nobody has been told of it, so it may be as if it had not happened
                self._acceptor.state = before
                raise
            if isinstance(request, EpochAccept):
                _log.critical("recovery_consented", generation=request.generation, note=unpack(request.value).note)
        said = step.reply.state
        return EpochReply(request.id, step.reply.granted, said.promised, said.accepted, said.value)

    # --- proposing

    async def propose(self, lost: Collection[str], timeout_s: float) -> Topology:
        """The first epoch of the next generation, adopted here and announced. It is what an earlier proposer had begun,
        if there was one: look at its note. Raises InvalidRequest, ChangeRefused, Unavailable where a survivor does not
        answer in time, OutcomeUnknown where some may have consented: then repeat it."""
        node = self._node
        deadline = node.clock.monotonic() + timeout_s
        asked = False
        async with self._lock:
            await self._load()
        generation = node.known_topology.generation
        while True:
            base = node.known_topology
            if base.generation > generation:
                return base  # another's was quicker
            names = self.survivors(base, lost)
            wanted = base.recovered(lost, node.clock.wall_ms())
            self._counter = max(self._counter, self._acceptor.state.promised.counter) + 1
            ballot = Ballot(self._counter, writer_id(node.node_id, node.identity.boot))
            proposer = Proposer([frozenset((name,)) for name in names], ballot, wanted.packed)
            step: Accept | Chosen | Preempted | None = None
            error: DHTError = Unavailable("another recovery is under way")
            try:
                prepare = EpochPrepare(0, wanted.epoch, ballot, base.packed, wanted.generation)
                step = await self._ask(names, prepare, proposer.promised)
                if isinstance(step, Accept):
                    asked = True
                    accept = EpochAccept(0, wanted.epoch, ballot, step.value, wanted.generation)
                    step = await self._ask(names, accept, proposer.accepted)
            except Unavailable as failure:
                error = failure
            if isinstance(step, Chosen):
                topology = unpack(step.value)
                _log.critical(
                    "recovered",
                    generation=topology.generation,
                    epoch=topology.epoch,
                    note=topology.note,
                    by=node.node_id,
                )
                await self._adopt(topology)
                self._announce(topology)
                return topology
            if isinstance(step, Preempted):
                self._counter = max(self._counter, step.ballot.counter)
            if node.clock.monotonic() >= deadline:
                raise (OutcomeUnknown if asked else Unavailable)(
                    f"generation {wanted.generation} is not agreed: {error}"
                )
            await asyncio.sleep(PAUSE_S * (0.5 + self._rng.random()))

    async def _ask(
        self, names: list[str], request: EpochPrepare | EpochAccept, take: Take
    ) -> Accept | Chosen | Preempted | None:
        """Asks every survivor. Raises the first error; None where a newer topology was heard of."""
        answers = await all_of(self._ask_one(name, request) for name in names)
        errors = [answer for answer in answers if isinstance(answer, DHTError)]
        if errors:
            raise min(errors, key=lambda error: error.retryable)
        for name, answer in zip(names, answers, strict=True):
            assert isinstance(answer, EpochReply)
            if answer.newer:
                await self._adopt(unpack(answer.newer))
                return None
            state = State(Ballot(*answer.promised), Ballot(*answer.accepted), answer.value)
            step = take(name, Reply(answer.granted, state))
            if step is not None:
                return step
        return None

    async def _ask_one(self, name: str, request: EpochPrepare | EpochAccept) -> EpochReply | DHTError:
        try:
            async with asyncio.timeout(SURVIVOR_TIMEOUT_S):
                if name == self._node.node_id:
                    return await self.vote(request)
                reply = await self._node.calls.call(name, request)  # encoded before it waits, so they can share it
                assert isinstance(reply, EpochReply)
                return reply
        except DHTError as error:
            return error
        except TimeoutError:
            return Unavailable(f"{name} did not answer within {SURVIVOR_TIMEOUT_S:g} s")
