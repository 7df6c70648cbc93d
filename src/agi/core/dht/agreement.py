"""How the next epoch of the topology is decided: this node's vote, and its proposals (PROTOCOLS T1, T2, T12).

Epoch e + 1 is one register (protocol/register.py) whose acceptors are the voters that epoch e names. Any member may
propose. What was chosen is adopted by the proposer, who tells all others; whoever misses that hears of it by the
digests that nodes exchange. A proposer that dies between the two leaves an accepted value: a voter that has held one
for FINISH_S without hearing of the epoch proposes it itself.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from functools import partial

import structlog

from agi.core.dht.calls import Calls
from agi.core.dht.clock import Clock
from agi.core.dht.errors import ClusterError, DHTError, HelloRefused, NotReady, OutcomeUnknown, Unavailable
from agi.core.dht.identity import Ledger, Promise
from agi.core.dht.protocol.messages import EpochAccept, EpochPrepare, EpochReply
from agi.core.dht.protocol.register import ZERO, Accept, Acceptor, Ballot, Chosen, Preempted, Proposer, Reply, State
from agi.core.dht.topology import Topology, unpack

_log = structlog.get_logger("agi.core.dht.agreement")

VOTER_TIMEOUT_S = 1.0
"""How long a voter is waited for in one phase."""
BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 1.0
FINISH_S = 3.0

Change = Callable[[Topology], Topology | None]
"""What should follow an epoch; None where nothing is left to be done."""


class Agreement:
    """
    Args:
        writer: this process as a proposer: node and boot counter, so that no ballot is used twice.
        current: the topology that this node has adopted.
        adopt: stores a newer one durably and puts it into force.
        announce: tells the others of it.
    """

    def __init__(
        self,
        me: str,
        writer: int,
        ledger: Ledger,
        calls: Calls,
        clock: Clock,
        rng: random.Random,
        *,
        current: Callable[[], Topology],
        adopt: Callable[[Topology], Awaitable[None]],
        announce: Callable[[Topology], None],
    ) -> None:
        self._me = me
        self._writer = writer
        self._ledger = ledger
        self._calls = calls
        self._clock = clock
        self._rng = rng
        self._current = current
        self._adopt = adopt
        self._announce = announce
        self._lock = asyncio.Lock()
        self._epoch = 0
        self._acceptor = Acceptor()
        self._held_since = 0.0
        self._counter = 0
        self._loaded = False

    async def _load(self) -> None:
        """What this node promised before it restarted; once, before anything else."""
        if self._loaded:
            return
        promise = await self._ledger.promise()
        if promise is not None:
            self._epoch = promise.epoch
            self._acceptor = Acceptor(State(Ballot(*promise.promised), Ballot(*promise.accepted), promise.value))
            self._held_since = self._clock.monotonic()
        self._loaded = True

    # --- voting

    async def prepare(self, request: EpochPrepare) -> EpochReply:
        """This node's promise, stored; or why it gives none."""
        async with self._lock:
            await self._load()
            await self._catch_up(request.base)
            return await self._vote(request.id, request.epoch, Ballot(*request.ballot), None)

    async def accept(self, request: EpochAccept) -> EpochReply:
        """This node's acceptance, stored; or why there is none."""
        async with self._lock:
            await self._load()
            return await self._vote(request.id, request.epoch, Ballot(*request.ballot), request.value)

    async def _catch_up(self, base: bytes) -> None:
        topology = unpack(base)
        current = self._current()
        if topology.origin != current.origin:
            raise ClusterError(f"that is a proposal for another cluster than that of {self._me}")
        if topology.order > current.order:
            await self._adopt(topology)

    async def _vote(self, number: int, epoch: int, ballot: Ballot, value: bytes | None) -> EpochReply:
        topology = self._current()
        if epoch <= topology.epoch:
            return EpochReply(number, newer=topology.packed)
        if epoch > topology.epoch + 1:
            raise NotReady(f"{self._me} is at epoch {topology.epoch} and has not heard of {epoch - 1}")
        if self._me not in topology.voters:
            raise HelloRefused(f"{self._me} is no voter of epoch {topology.epoch}")
        if self._epoch != epoch:
            self._epoch, self._acceptor = epoch, Acceptor()
        before = self._acceptor.state
        step = self._acceptor.prepare(ballot) if value is None else self._acceptor.accept(ballot, value)
        if step.state is not None:
            state = step.state
            try:
                await self._ledger.store_promise(Promise(epoch, state.promised, state.accepted, state.value))
            except BaseException:  # nobody has been told of it, so it may be as if it had not happened
                self._acceptor.state = before
                raise
            if value is not None:
                self._held_since = self._clock.monotonic()
        said = step.reply.state
        return EpochReply(number, step.reply.granted, said.promised, said.accepted, said.value)

    # --- proposing

    async def propose(self, change: Change, timeout_s: float) -> Topology:
        """Brings the topology to where `change` has nothing to add. It is asked anew for each epoch that others decide
        meanwhile, so it has to look at what it is given.

        Raises Unavailable where no majority of voters could be had in time, OutcomeUnknown where one may yet accept.
        """
        deadline = self._clock.monotonic() + timeout_s
        async with self._lock:
            await self._load()
        attempt = 0
        asked = False
        while True:
            base = self._current()
            wanted = change(base)
            if wanted is None:
                return base
            proposer = Proposer([frozenset(base.voters)], self._ballot(), wanted.packed)
            outcome = await self._attempt(base, proposer)
            if isinstance(outcome, Chosen):
                topology = unpack(outcome.value)
                await self._adopt(topology)
                self._announce(topology)
                attempt, asked = 0, False
                continue
            if self._current().order > base.order:
                continue  # a voter told of a newer one
            asked = asked or proposer.asked
            if isinstance(outcome, Preempted):
                self._counter = max(self._counter, outcome.ballot.counter)
            delay_s = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** min(attempt, 10)) * (0.5 + self._rng.random())
            attempt += 1
            if self._clock.monotonic() + delay_s >= deadline:
                kind = OutcomeUnknown if asked else Unavailable
                needed, answered = len(base.voters) // 2 + 1, proposer.answered
                raise kind(f"epoch {base.epoch + 1} could not be decided", needed=needed, answered=answered)
            await asyncio.sleep(delay_s)

    def _ballot(self) -> Ballot:
        self._counter = max(self._counter, self._acceptor.state.promised.counter) + 1
        return Ballot(self._counter, self._writer)

    async def _attempt(self, base: Topology, proposer: Proposer) -> Chosen | Preempted | None:
        epoch, ballot = base.epoch + 1, proposer.ballot
        step = await self._ask(base, EpochPrepare(0, epoch, ballot, base.packed), proposer.promised)
        if isinstance(step, Accept):
            step = await self._ask(base, EpochAccept(0, epoch, ballot, step.value), proposer.accepted)
        return step if isinstance(step, Chosen | Preempted) else None

    async def _ask(
        self,
        base: Topology,
        request: EpochPrepare | EpochAccept,
        take: Callable[[str, Reply], Accept | Chosen | Preempted | None],
    ) -> Accept | Chosen | Preempted | None:
        """Asks every voter; returns as soon as the answers decide something, None where they do not."""
        tasks = [asyncio.ensure_future(self._ask_one(name, request)) for name in base.voters]
        try:
            for next_answer in asyncio.as_completed(tasks):
                name, answer = await next_answer
                if isinstance(answer, DHTError):
                    _log.debug("voter_failed", voter=name, epoch=base.epoch + 1, error=str(answer))
                    continue
                if answer.newer:
                    newer = unpack(answer.newer)
                    if newer.order > base.order and newer.origin == base.origin:
                        await self._adopt(newer)
                        return None
                    continue
                state = State(Ballot(*answer.promised), Ballot(*answer.accepted), answer.value)
                step = take(name, Reply(answer.granted, state))
                if step is not None:
                    return step
            return None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask_one(self, name: str, request: EpochPrepare | EpochAccept) -> tuple[str, EpochReply | DHTError]:
        try:
            async with asyncio.timeout(VOTER_TIMEOUT_S):
                if name == self._me:
                    vote = self.prepare(request) if isinstance(request, EpochPrepare) else self.accept(request)
                    return name, await vote
                reply = await self._calls.call(name, request)  # encoded before it waits, so they can share it
                assert isinstance(reply, EpochReply)
                return name, reply
        except DHTError as error:
            return name, error
        except TimeoutError:
            return name, Unavailable(f"{name} did not answer within {VOTER_TIMEOUT_S:g} s")

    # --- finishing what others began

    async def finish(self) -> None:
        """Proposes what this voter accepted and nobody told the end of, for ever."""
        async with self._lock:
            await self._load()
        while True:
            await asyncio.sleep(FINISH_S * (0.5 + self._rng.random()))
            held, epoch = self._acceptor.state, self._epoch
            overdue = self._clock.monotonic() - self._held_since > FINISH_S
            if held.accepted == ZERO or epoch != self._current().epoch + 1 or not overdue:
                continue
            try:
                await self.propose(partial(_finished, epoch, unpack(held.value)), FINISH_S)
            except DHTError as error:
                _log.warning("epoch_not_finished", epoch=epoch, error=str(error))


def _finished(epoch: int, held: Topology, base: Topology) -> Topology | None:
    return held if base.epoch + 1 == epoch else None
