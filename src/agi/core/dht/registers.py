"""Consensus at a coordinator: runs the rounds of protocol/consensus.py for the keys that it is asked about.

One round at a time for each key; what arrives meanwhile waits and is taken together, up to WINDOW operations a round.
What many keys have to ask of the same replicas in one turn of the event loop goes out as one frame. The ballot of the
last chosen value is remembered, so that the next round of this coordinator needs no prepare.

Contention: who is refused waits a random time, longer each time, and prepares above what it was refused for. An
operation that was sent out for acceptance and whose outcome is not seen by its deadline ends in OutcomeUnknown; one
that was not, in Unavailable (R4).
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial

import structlog

from agi.core.dht.acceptor import Acceptor, Refusals
from agi.core.dht.clock import Clock
from agi.core.dht.errors import (
    ClockSkew,
    DHTError,
    FrameTooLarge,
    InvalidRequest,
    InvalidTTL,
    InvalidValue,
    OutcomeUnknown,
    Overloaded,
    StorageCorrupt,
    TransportError,
    Unavailable,
    from_wire,
)
from agi.core.dht.joint import JointSet
from agi.core.dht.peers import Peer
from agi.core.dht.protocol.consensus import (
    ADD,
    ANYHOW,
    BALLOT_BYTES,
    IF_EQUALS,
    LOOK,
    LOOK_NAME,
    LOOK_WITHIN_S,
    NAME_BYTES,
    PUT,
    WINDOW,
    Done,
    Round,
    apply,
    ballot,
    ms_of,
    newest_of,
    next_ballot,
    outcome,
    register_of,
    state_of,
)
from agi.core.dht.protocol.dedup import RequestTable
from agi.core.dht.protocol.messages import (
    Op,
    OpResult,
    RegisterAccept,
    RegisterAccepted,
    RegisterPrepare,
    RegisterPromises,
    Update,
    UpdateReply,
    WireError,
)
from agi.core.dht.protocol.timers import TimerWheel
from agi.core.dht.protocol.versioning import HLC
from agi.core.dht.requests import ReplyTo, Requests, refusal
from agi.core.dht.transport.codec import encode
from agi.core.dht.types import KEY_BYTES_MAX, TTL_MS_MAX, VALUE_BYTES_MAX
from agi.core.dht.watches import Watches

_log = structlog.get_logger("agi.core.dht.registers")

TIMEOUT_MS_MAX = 3_600_000
NEVER_LATE = math.inf
ROUND_S = 1.0
"""How long replicas are waited for in one phase before the round is begun anew."""
BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.004, 0.25
WAITING_MAX = 1024
"""Operations that may wait for one key."""
REMEMBERED_KEYS, REMEMBERED_BYTES, REMEMBERED_RECORD_BYTES = 8192, 32 * 1024 * 1024, 64 * 1024
"""Chosen values that are kept for the next round of their keys."""
SETTLE_AT_ONCE = 64
"""Abandoned rounds that are ended at a time."""
FRAME_RECORDS_BYTES = 4 * 1024 * 1024

Answer = Callable[[OpResult], None]


class Waiting:
    """An operation on its way. `planned`: the version that the round under way would make of it; `sent`: the least
    that it was sent out with; 0 for none. `seen`: the newest operation met so far (protocol/consensus.py, `outcome`);
    `look_by`: until when it is in time for that, by `Clock.boottime`."""

    __slots__ = ("answer", "look_by", "number", "op", "over", "planned", "seen", "sent")

    def __init__(self, number: int, op: Op, answer: Answer, look_by: float) -> None:
        self.number = number
        self.op = op
        self.answer = answer
        self.look_by = look_by
        self.seen: Done | None = None
        self.sent = 0
        self.planned = 0
        self.over = False


class _UnderWay:
    """A batch that is not answered yet, and where its answer goes."""

    __slots__ = ("reply",)

    def __init__(self, reply: ReplyTo) -> None:
        self.reply = reply


class _Key:
    """One key's operations, and its round under way."""

    __slots__ = ("attempts", "key", "queue", "resting", "results", "round", "taken")

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.queue: deque[Waiting] = deque()
        self.taken: list[Waiting] = []
        self.results: list[OpResult] = []
        self.round: Round | None = None
        self.attempts = 0
        self.resting: asyncio.TimerHandle | None = None


class _Frame:
    """What was asked of the replicas of some keys in one message; a group of `Requests`."""

    __slots__ = ("accepting", "id", "items", "registers", "waiting")

    def __init__(self, registers: Registers, items: list[tuple[_Key, Round]], *, accepting: bool) -> None:
        self.registers = registers
        self.items = items
        self.accepting = accepting
        self.waiting: dict[str, None] = {}
        self.id = 0

    def lost(self, replica: str, error: DHTError) -> None:
        if replica in self.waiting:
            del self.waiting[replica]
            self.registers.replica_failed(self, replica)
            self.settle()

    def expired(self) -> None:
        self.waiting.clear()
        self.settle()
        for key, round_ in self.items:
            if key.round is round_ and round_.accepting == self.accepting:
                self.registers.begin_anew(key)

    def restart(self) -> None:
        self.waiting.clear()  # `Registers.adopt` begins its rounds anew

    def settle(self) -> None:
        if not self.waiting:
            self.registers.requests.pending.pop(self.id, None)


class Registers:
    """All rounds of one coordinator.

    Args:
        proposer: this process, node and boot counter (versioning.writer_id).
        floor: the version below which nothing of a key may be made any more (protocol/floors.py).
        limit: the greatest version that is not too far ahead of this node's clock.
        dedup_entries: operations whose repeated message is recognised.
    """

    def __init__(
        self,
        requests: Requests,
        acceptor: Acceptor,
        hlc: HLC,
        proposer: int,
        clock: Clock,
        rng: random.Random,
        floor: Callable[[bytes], int],
        limit: Callable[[], int],
        dedup_entries: int,
    ) -> None:
        self.requests = requests
        self._acceptor = acceptor
        self._hlc = hlc
        self._proposer = proposer
        self._clock = clock
        self._rng = rng
        self._floor = floor
        self._limit = limit
        self._keys: dict[bytes, _Key] = {}
        self._chosen: OrderedDict[bytes, bytes] = OrderedDict()
        self._chosen_bytes = 0
        self._ms = 0
        self._known: RequestTable[_UnderWay | UpdateReply] = RequestTable(dedup_entries)
        self._outbox: dict[tuple[tuple[str, ...], bool], list[tuple[_Key, Round]]] = {}
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[int, Waiting] = {}
        self._number = 0
        self.watches = Watches(clock, self._chosen.get)
        self._wheel: TimerWheel[int] = TimerWheel(clock.monotonic())

    # --- what comes in

    def start(self, request: Update, reply: ReplyTo, client: str) -> None:
        """Runs a batch of operations; `reply` gets one UpdateReply by the deadline. The same message once more changes
        nothing: what failed the first time is not to succeed later."""
        requests = self.requests
        known = self._known.get(client, request.id)
        if isinstance(known, UpdateReply):
            requests.metrics.retries_deduplicated += 1
            reply(known)
            return
        if known is not None:
            requests.metrics.retries_deduplicated += 1
            known.reply = reply
            return
        results: list[OpResult] = [OpResult()] * len(request.ops)
        try:
            if request.retry:
                raise OutcomeUnknown(f"{requests.me} no longer knows the first try of these operations")
            if not request.ops:
                raise InvalidRequest("a batch without operations")
            limit = self._limit()
            for op in request.ops:
                _check(op)
                if op.since > limit:
                    raise ClockSkew(f"{requests.me} is too far behind the node that had the operation before")
            started = self._clock.monotonic()
            cost = requests.admit(started, [op.key for op in request.ops], [op.value for op in request.ops])
        except DHTError as error:
            answer = self._stamped(UpdateReply(request.id, [], refusal(error).to_wire()))
            self._known.add(client, request.id, answer, 1)  # a first try that is still on its way comes too late
            reply(answer)
            return
        under_way = _UnderWay(reply)
        self._known.add(client, request.id, under_way, len(request.ops))
        left = len(request.ops)

        def answered(place: int, result: OpResult) -> None:
            nonlocal left
            results[place] = result
            left -= 1
            if left:
                return
            now = self._clock.monotonic()
            requests.release(now, cost, len(results))
            requests.metrics.updates += len(results)
            requests.metrics.update_latency.observe(now - started, len(results))
            requests.metrics.fail_keys([(i, r.error) for i, r in enumerate(results) if r.error is not None])
            answer = self._stamped(UpdateReply(request.id, results))
            self._known.update(client, request.id, answer)
            try:
                under_way.reply(answer)
            except (TransportError, Overloaded) as error:
                _log.info("reply_undeliverable", error=str(error))

        deadline = started + min(request.timeout_ms, TIMEOUT_MS_MAX) / 1000
        look_by = NEVER_LATE
        if request.asked_us:
            look_by = min(request.asked_us / 1e6, self._clock.boottime()) + LOOK_WITHIN_S
        for place, op in enumerate(request.ops):
            self.run(op, deadline, partial(answered, place), look_by)

    def _stamped(self, reply: UpdateReply) -> UpdateReply:
        reply.boottime_us, reply.hlc = self.now()
        return reply

    def now(self) -> tuple[int, int]:
        """What clients hear of this node's clocks: `boottime_us` and `hlc` of an UpdateReply."""
        return int(self._clock.boottime() * 1e6), self._hlc.tick(self._clock.wall_ms())

    def run(self, op: Op, deadline: float, answer: Answer, look_by: float = NEVER_LATE) -> None:
        """Runs one operation; `answer` gets its result by the deadline. `look_by`: as in Waiting; never, for what
        nobody else will try."""
        state = self._keys.get(op.key)
        if state is None:
            state = self._keys[op.key] = _Key(op.key)
        if len(state.queue) >= WAITING_MAX:
            answer(OpResult(error=Overloaded(f"{WAITING_MAX} operations wait for this key already").to_wire()))
            return
        self._number = number = self._number + 1
        waiting = self._waiting[number] = Waiting(number, op, answer, look_by)
        self._wheel.add(deadline, number)
        state.queue.append(waiting)
        if state.round is None and state.resting is None:
            self._begin(state)

    @property
    def pending(self) -> int:
        """Operations that are not answered yet."""
        return len(self._waiting)

    def settle_abandoned(self) -> None:
        """Ends rounds of coordinators that are gone: until then plain writes of their keys wait, and hints and repairs
        are refused."""
        deadline = self._clock.monotonic() + 2 * ROUND_S
        for key in self._acceptor.abandoned(SETTLE_AT_ONCE):
            if self.requests.me not in self.requests.replicas(key):
                self._acceptor.forget(key)
                continue
            self.run(Op(LOOK_NAME, key, LOOK), deadline, _ignore)

    # --- rounds

    def _begin(self, key: _Key) -> None:
        """The next round of a key, if there is anything to do."""
        key.resting = None
        queue = key.queue
        key.taken = [waiting for waiting in key.taken if not waiting.over]
        while queue and len(key.taken) < WINDOW:
            waiting = queue.popleft()
            if not waiting.over:
                key.taken.append(waiting)
        if not key.taken:
            self._keys.pop(key.key, None)
            return
        requests = self.requests
        replicas = requests.replicas(key.key)
        sets = (replicas.old, replicas.new) if type(replicas) is JointSet else (replicas,)
        chosen = self._chosen.get(key.key)
        if chosen is None or next_ballot(chosen) is None:
            self._ms = max(self._ms + 1, self._clock.wall_ms())
            key.round = Round(sets, ballot(self._ms, self._proposer))
        else:
            key.round = Round(sets, chosen[:BALLOT_BYTES])
            self._propose(key, chosen)
        self._send(replicas, key)

    def _propose(self, key: _Key, base: bytes | None) -> None:
        """The round's value: what the operations make of what was found."""
        round_ = key.round
        assert round_ is not None
        state = found = state_of(base)
        now_ms = self._clock.wall_ms()
        now = self._clock.boottime()  # read after what the base is: what is in time now was met in time
        newest = newest_of(state)
        results: list[OpResult] = []
        # who was told that nothing happened is left out; a round without any ends what it has been promised
        key.taken = [waiting for waiting in key.taken if not waiting.over]
        for waiting in key.taken:
            late = now > waiting.look_by
            floor = self._floor_of(key) if late or waiting.sent or waiting.op.retry else 0
            result = outcome(waiting.op, state, found, waiting.seen, waiting.sent, floor, late=late)
            waiting.planned = 0
            if result is None:
                waiting.seen = newest
                before = state.version
                state, result = apply(waiting.op, key.key, state, now_ms, partial(self._tick, key))
                if state.version != before and state.done and state.done[-1].name == waiting.op.name:
                    waiting.planned = state.version
            results.append(result)
        key.results = results
        following = next_ballot(round_.ballot)
        assert following is not None, "a round begins with room in its sequence"
        round_.propose(register_of(key.key, following, state))

    def _floor_of(self, key: _Key) -> int:
        """Up to which version the key may have been taken away (R8). Those who held it before know; what they promise
        is above that."""
        replicas = self.requests.replicas(key.key)
        if self.requests.me in (replicas.old if isinstance(replicas, JointSet) else replicas):
            return self._floor(key.key)
        assert key.round is not None
        return ms_of(key.round.ballot) << 16

    def _tick(self, key: _Key, above: int) -> int:
        """A version above that one and the key's floor (R3)."""
        self._hlc.observe(max(above, self._floor_of(key)))
        return self._hlc.tick(self._clock.wall_ms())

    def _send(self, replicas: tuple[str, ...], key: _Key) -> None:
        round_ = key.round
        assert round_ is not None
        if not self._outbox:
            self._loop.call_soon(self._flush)
        self._outbox.setdefault((replicas, round_.accepting), []).append((key, round_))

    def _flush(self) -> None:
        outbox, self._outbox = self._outbox, {}
        for (replicas, accepting), items in outbox.items():
            for name in replicas:
                if name != self.requests.me and name not in self.requests.peers.usable:
                    self._unreachable(items, name)
            items = [(key, round_) for key, round_ in items if key.round is round_]
            while items:
                count, size = 0, 0
                while count < len(items) and (not count or size < FRAME_RECORDS_BYTES):
                    size += len(items[count][0].key) + len(items[count][1].record) + 64
                    count += 1
                self._ask(replicas, items[:count], accepting=accepting)
                items = items[count:]

    def _ask(self, replicas: tuple[str, ...], items: list[tuple[_Key, Round]], *, accepting: bool) -> None:
        requests = self.requests
        frame = _Frame(self, items, accepting=accepting)
        usable, me = requests.peers.usable, requests.me
        targets = [usable[name] for name in replicas if name in usable]
        frame.waiting = dict.fromkeys([peer.node_id for peer in targets])
        if me in replicas:
            frame.waiting[me] = None
        frame.id = requests.enter_until(frame, self._clock.monotonic() + ROUND_S)
        keys = [key.key for key, _ in items]
        trace = next((waiting.op.name.hex() for key, _ in items for waiting in key.taken), "")
        records = [round_.record if accepting else round_.ballot for _, round_ in items]
        message = (RegisterAccept if accepting else RegisterPrepare)(frame.id, requests.epoch, trace, keys, records)
        for key, _ in items if accepting else ():
            for waiting in key.taken:
                waiting.sent = waiting.sent or waiting.planned
        if targets:
            try:
                packed = encode(message)
            except FrameTooLarge:
                for key, _ in items:
                    self._fail(key, InvalidValue("the value does not fit a frame between nodes"))
                frame.waiting.clear()
                frame.settle()
                return
            for peer in targets:
                try:
                    peer.send(packed)
                except (TransportError, Overloaded) as error:
                    frame.lost(peer.node_id, error)
        if me in frame.waiting:
            if accepting:
                self._acceptor.accept(keys, records, partial(self._accepted, frame, me))
            else:
                self._acceptor.prepare(keys, records, partial(self._promised, frame, me))

    # --- answers

    def reply(self, peer: Peer, reply: RegisterPromises | RegisterAccepted) -> None:
        """What a peer answered."""
        frame = self.requests.pending.get(reply.id)
        if not isinstance(frame, _Frame):
            return
        if isinstance(reply, RegisterPromises):
            self._promised(frame, peer.node_id, reply.records, reply.refusals, reply.error)
        else:
            self._accepted(frame, peer.node_id, reply.refusals, reply.error)

    def _promised(
        self, frame: _Frame, replica: str, records: list[bytes | None], refusals: Refusals, error: WireError | None
    ) -> None:
        if frame.accepting or not self._counts(frame, replica, error):
            return
        if len(records) != len(frame.items):
            self.replica_failed(frame, replica)
            return
        refused = dict(refusals or ())
        for index, ((key, round_), record) in enumerate(zip(frame.items, records, strict=True)):
            if key.round is not round_ or round_.accepting:
                continue
            higher = refused.get(index)
            if higher is not None:
                self._preempted(key, higher)
            elif round_.promised(replica, record):
                try:
                    self._propose(key, round_.found)
                except StorageCorrupt as failure:
                    self._fail(key, failure)
                    continue
                self._send(self.requests.replicas(key.key), key)

    def _accepted(self, frame: _Frame, replica: str, refusals: Refusals, error: WireError | None) -> None:
        if not frame.accepting or not self._counts(frame, replica, error):
            return
        refused = dict(refusals or ())
        for index, (key, round_) in enumerate(frame.items):
            if key.round is not round_:
                continue
            higher = refused.get(index)
            if higher is not None:
                self._preempted(key, higher)
            elif round_.accepted(replica):
                self._chose(key, round_)

    def _counts(self, frame: _Frame, replica: str, error: WireError | None) -> bool:
        """Whether this is the replica's first answer, and no error."""
        if replica not in frame.waiting:
            return False
        if error is not None and self.requests.stale(replica, error):
            return False  # a newer topology will begin the round anew
        del frame.waiting[replica]
        if error is not None:
            self.requests.metrics.replica_errors += 1
            self.replica_failed(frame, replica, error)
        frame.settle()
        return error is None

    def replica_failed(self, frame: _Frame, replica: str, error: WireError | None = None) -> None:
        """That replica does not answer this frame."""
        for key, round_ in frame.items:
            if key.round is round_ and round_.accepting == frame.accepting and round_.failed(replica):
                needed, answered = round_.shortfall()
                reason = "too few replicas" if error is None else f"too few replicas: {from_wire(*error).message}"
                self._fail(key, Unavailable(reason, needed=needed, answered=answered))

    def _unreachable(self, items: list[tuple[_Key, Round]], replica: str) -> None:
        """That replica is not connected: where no quorum is left, nothing is sent to anyone."""
        for key, round_ in items:
            if key.round is round_ and round_.failed(replica):
                needed, reachable = round_.shortfall(reachable=True)
                self._fail(key, Unavailable("too few replicas are reachable", needed=needed, answered=reachable))

    def _chose(self, key: _Key, round_: Round) -> None:
        self.requests.metrics.rounds += 1
        key.round = None
        key.attempts = 0
        self._remember(key.key, round_.record)
        self.watches.chose(key.key, round_.record)
        taken, key.taken = key.taken, []
        for waiting, result in zip(taken, key.results, strict=True):
            self._answer(waiting, result)
        if key.round is None and key.resting is None:
            self._begin(key)

    def _preempted(self, key: _Key, higher: bytes) -> None:
        """Another coordinator is at it: try again above, after a random time."""
        self.requests.metrics.rounds_preempted += 1
        self._ms = max(self._ms, ms_of(higher))
        self.begin_anew(key)

    def begin_anew(self, key: _Key) -> None:
        """The round came to nothing."""
        key.round = None
        self._forget(key.key)
        key.attempts += 1
        ceiling_s = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** min(key.attempts, 10))
        if key.resting is None:
            key.resting = self._loop.call_later(ceiling_s * self._rng.random(), self._begin, key)

    def _fail(self, key: _Key, error: DHTError) -> None:
        """No quorum can be had: operations end with what is known of them."""
        key.round = None
        self._forget(key.key)
        taken, key.taken = key.taken, []
        for waiting in taken:
            self._answer(waiting, _ended(waiting, error))
        if key.round is None and key.resting is None:
            self._begin(key)

    def advance(self, now: float) -> None:
        """Ends what is past its deadline."""
        self.watches.advance(now)
        for number in self._wheel.advance(now):
            waiting = self._waiting.get(number)
            if waiting is None:
                continue
            key = self._keys.get(waiting.op.key)
            round_ = key.round if key is not None else None
            needed, answered = round_.shortfall() if round_ is not None else (0, 0)
            late = Unavailable("no decision in time", needed=needed, answered=answered)
            if round_ is not None and round_.accepting:  # what was proposed leaves at the end of this turn
                waiting.sent = waiting.sent or waiting.planned
            self._answer(waiting, _ended(waiting, late))

    def _answer(self, waiting: Waiting, result: OpResult) -> None:
        if not waiting.over:
            waiting.over = True
            del self._waiting[waiting.number]
            waiting.answer(result)

    def adopt(self) -> None:
        """Another epoch: every round ends, and nothing chosen is remembered (R6)."""
        self._chosen.clear()
        self._chosen_bytes = 0
        self.watches.end()
        for key in list(self._keys.values()):
            if key.round is not None:
                self.begin_anew(key)

    # --- what was chosen last

    def _remember(self, key: bytes, record: bytes) -> None:
        self._forget(key)
        if len(record) > REMEMBERED_RECORD_BYTES:
            return
        self._chosen[key] = record
        self._chosen_bytes += len(record)
        while len(self._chosen) > REMEMBERED_KEYS or self._chosen_bytes > REMEMBERED_BYTES:
            self._chosen_bytes -= len(self._chosen.popitem(last=False)[1])

    def _forget(self, key: bytes) -> None:
        record = self._chosen.pop(key, None)
        if record is not None:
            self._chosen_bytes -= len(record)


def _ended(waiting: Waiting, error: DHTError) -> OpResult:
    looks = waiting.op.kind == LOOK and waiting.op.fence is None  # which writes nothing, however often it is tried
    if not looks and (waiting.sent or waiting.op.retry):
        what = f"{error.message}; some replica may have accepted it"
        error = OutcomeUnknown(what, needed=error.needed, answered=error.answered)
    return OpResult(error=error.to_wire())


def _ignore(_result: OpResult) -> None:
    """Of a round that was only to be ended."""


def _check(op: Op) -> None:
    """Raises InvalidRequest and its kinds for what no client of ours sends."""
    if len(op.name) != NAME_BYTES:
        raise InvalidRequest(f"an operation is named by {NAME_BYTES} bytes")
    if not 1 <= len(op.key) <= KEY_BYTES_MAX:
        raise InvalidRequest(f"a key has 1 to {KEY_BYTES_MAX} bytes")
    if not PUT <= op.kind <= LOOK or not ANYHOW <= op.condition <= IF_EQUALS:
        raise InvalidRequest(f"unknown operation {op.kind}, or condition {op.condition}")
    if len(op.value) > VALUE_BYTES_MAX:
        raise InvalidValue(f"a value has at most {VALUE_BYTES_MAX} bytes")
    if not 0 <= op.ttl_ms <= TTL_MS_MAX:
        raise InvalidTTL(f"a ttl is above 0 and at most {TTL_MS_MAX} ms")
    if op.kind == ADD and not -(1 << 63) <= op.delta < 1 << 63:
        raise InvalidRequest("a counter changes by a number of 64 bits")
    if op.fence is not None and not (1 <= len(op.fence[0]) <= KEY_BYTES_MAX and 0 < op.fence[1] < 1 << 63):
        raise InvalidRequest("a fence is the key of a lock and a token above 0")
