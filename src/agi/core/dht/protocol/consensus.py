"""The register of one key: what an acceptor answers, how a round goes, and what operations do (PROTOCOLS R1 to R10).

CASPaxos (Rystsov, 2018): a register has no log; a round finds the newest value, changes it and has it accepted. The
acceptors are the key's replicas, a quorum is a majority of each of its sets (T5). Three things are added:

A *ballot* is 16 bytes: the highest bit set, 47 bits of milliseconds, 16 bits of a sequence, 64 of the proposer (node
and boot counter). Milliseconds only count; a new round's are above all that its acceptors have promised, so that no
two proposers ever get the same accepted, and byte order is ballot order. Who was promised a ballot may have one value
after the other accepted under it, with rising sequence, each once the one before was chosen: one round trip in the
steady state, as with a leader in "Paxos Made Simple" (Lamport, 2001, section 3). An acceptor that accepted a ballot has
promised its round; only a promise above that is kept beside the record (16 bytes, sequence 0).

The *value* carries its version and the last operations with their results (R4), so that one that is tried again finds
itself. A value that is proposed anew keeps its version. It also carries the highest token that it was fenced with, and
its tombstone does: what a former holder of the lock still sends is refused by whoever decides (L3).

A key that no register has yet begins with its plain record as value (R2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeGuard

import msgspec

from agi.core.dht.errors import (
    DHTError,
    FenceRejected,
    InvalidRequest,
    NotACounter,
    OutcomeUnknown,
    StorageCorrupt,
    Unavailable,
    VersionConflict,
    WrongFence,
)
from agi.core.dht.protocol.messages import Op, OpResult
from agi.core.dht.protocol.record import (
    EXPIRES,
    FLAGS,
    HEADER,
    REGISTER,
    REGISTERED,
    TOMBSTONE,
    UNVOTED,
    created_ms_of,
    expires_ms_of,
    height_of,
    hlc_of,
    pack,
)

NAME_BYTES = 16
WINDOW = 16
"""Operations whose results a value remembers, and the most that one round takes."""
BALLOT_BYTES = 16
MS_MAX = (1 << 47) - 1
_SEQUENCE_MAX = 0xFFFF

PUT, REMOVE, ADD, LOOK = 0, 1, 2, 3
"""What an operation does: store a value, delete, add to a counter, nothing."""
ANYHOW, IF_ABSENT, IF_VERSION, IF_EQUALS = 0, 1, 2, 3
"""Under which condition."""
LOOK_NAME = bytes(16)
"""Nothing remembers who only looked."""
LOOK_WITHIN_S, MOVE_AFTER_S = 0.6, 0.75
"""A coordinator begins with an operation at most so long after it was sent, where it matters (`outcome`); who sent it
has it tried by another one no sooner than so long after. Between them is room for clocks that run apart."""
COUNTER_MIN, COUNTER_MAX = -(1 << 63), (1 << 63) - 1


# --- ballots


def ballot(ms: int, proposer: int) -> bytes:
    """The first ballot of a round."""
    return (REGISTERED | ms << 16).to_bytes(8, "big") + proposer.to_bytes(8, "big")


def next_ballot(last: bytes) -> bytes | None:
    """The next of the same round, None where it has no more."""
    first = int.from_bytes(last[:8], "big")
    if first & _SEQUENCE_MAX == _SEQUENCE_MAX:
        return None
    return (first + 1).to_bytes(8, "big") + last[8:]


def round_of(ballot: bytes) -> bytes:
    """The promise that it belongs to."""
    return ballot[:6] + b"\0\0" + ballot[8:BALLOT_BYTES]


def ms_of(ballot: bytes) -> int:
    return int.from_bytes(ballot[:6], "big") & MS_MAX


def is_register(record: bytes | None) -> TypeGuard[bytes]:
    return record is not None and record[0] >= 0x80


# --- acceptors


def judge_prepare(wanted: bytes, promise: bytes, record: bytes | None) -> bytes | None:
    """None if the promise is given (and to be stored unless it stands already), else the promise to get past.

    `promise` is what is kept beside the record, empty for nothing.
    """
    accepted = round_of(record) if is_register(record) else b""
    if wanted == promise and accepted < wanted:
        return None  # delivered twice
    highest = max(promise, accepted)
    return None if wanted[:6] > highest[:6] else highest


def judge_accept(record: bytes, promise: bytes, held: bytes | None) -> bytes | None:
    """None if the record is to be stored, or is held already; else the promise to get past."""
    if round_of(record) < promise:
        return promise
    if held is not None and held[:BALLOT_BYTES] > record[:BALLOT_BYTES] and is_register(held):
        return max(promise, round_of(held))
    return None


# --- values


class Done(NamedTuple):
    """An operation that took effect: its name, the version it made, and what it returned. Or one that was tried before
    and was refused: below 0 as its version, and the code of its error. Each version is above those before it."""

    name: bytes
    version: int
    number: int


NOTHING = Done(b"", 0, 0)


class Body(msgspec.Struct, array_like=True, gc=False):
    """What a register record holds behind its header."""

    version: int
    expires_ms: int
    done: list[Done]
    value: bytes
    fence: tuple[bytes, int] | None = None


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Body).decode


class State(NamedTuple):
    """A key as operations see it. `value` is None where it is absent; `version` is then that of its deletion, or 0.
    `fence`: the key of its lock, and the highest token seen; None for one that was never fenced."""

    version: int = 0
    value: bytes | None = None
    expires_ms: int = 0
    created_ms: int = 0
    done: tuple[Done, ...] = ()
    fence: tuple[bytes, int] | None = None


def state_of(record: bytes | None) -> State:
    """What a record says, plain or register. Raises StorageCorrupt."""
    if record is None:
        return State()
    created_ms = created_ms_of(record)
    if not is_register(record):
        gone = record[FLAGS] & ~EXPIRES
        return State(hlc_of(record), None if gone else record[HEADER:], expires_ms_of(record), created_ms)
    try:
        body = _decode(record[HEADER:])
    except msgspec.MsgspecError as error:
        raise StorageCorrupt(f"the value of a register cannot be read: {error}") from None
    gone = record[FLAGS] & TOMBSTONE
    return State(body.version, None if gone else body.value, body.expires_ms, created_ms, tuple(body.done), body.fence)


def register_of(key: bytes, ballot: bytes, state: State) -> bytes:
    """The record in which this state is accepted under this ballot."""
    body = Body(state.version, state.expires_ms, list(state.done), state.value or b"", state.fence)
    return pack(
        key,
        _encode(body),
        hlc=int.from_bytes(ballot[:8], "big"),
        writer=int.from_bytes(ballot[8:], "big"),
        created_ms=state.created_ms,
        flags=REGISTER | (TOMBSTONE if state.value is None else 0),
    )


def as_plain(key: bytes, record: bytes) -> bytes | None:
    """A register's value as readers know records; None where the key is absent. Raises StorageCorrupt."""
    state = state_of(record)
    if state.value is None:
        return None
    return pack(key, state.value, state.version, 0, state.created_ms, state.expires_ms)


def is_settled(record: bytes, now_ms: int) -> bool:
    """Whether a quorum that shows this register record alike has told all: it voted, and the value has not expired.
    Expiry is a transition that has to be chosen first (V4). Raises StorageCorrupt."""
    if record[FLAGS] & UNVOTED:
        return False
    state = state_of(record)
    return not state.expires_ms or state.value is None or state.expires_ms > now_ms


def has_expired(record: bytes, now_ms: int) -> bool:
    """Whether this is a register whose value has expired, which nobody has decided on yet (V4). Raises
    StorageCorrupt."""
    if not record[FLAGS] & REGISTER or record[FLAGS] & TOMBSTONE:
        return False
    return 0 < state_of(record).expires_ms <= now_ms


def is_retired(record: bytes, height: int) -> bool:
    """Whether this is the register of an absent key, whose ballot and version are no newer than that, and which
    remembers no fence: nothing is lost with it but the last operations' results (R8). Raises StorageCorrupt."""
    if not (record[FLAGS] & REGISTER and record[FLAGS] & TOMBSTONE) or height_of(hlc_of(record)) > height:
        return False
    state = state_of(record)
    return state.fence is None and max(state.version, *(abs(done.version) for done in state.done), 0) <= height


def unvoted(record: bytes) -> bytes:
    """The record as it is shown by an acceptor that has promised more since."""
    return record[:FLAGS] + bytes((record[FLAGS] | UNVOTED,)) + record[FLAGS + 1 :]


# --- operations


def apply(op: Op, key: bytes, state: State, now_ms: int, tick: Callable[[int], int]) -> tuple[State, OpResult]:
    """What an operation makes of a state, and what it returns once that is chosen. `tick` gives a version above the
    one that it is given. An error changes nothing; but where another coordinator has had the operation before, the
    value remembers that it was refused: the condition may hold again, and that one might do it then. A fence raises
    the mark also where the value stays as it is, and its version with it."""
    if state.expires_ms and state.value is not None and state.expires_ms <= now_ms:
        state = State(tick(state.version), None, 0, now_ms, state.done, state.fence)
    try:
        fence = _fence(op, state)
        _check(op, state)
        after, number = _changed(op, state, now_ms)
    except DHTError as error:
        result = OpResult(state.version if state.value is not None else 0, 0, None, error.to_wire())
        if op.retry and op.kind != LOOK and op.condition != IF_VERSION:
            done = (*state.done, Done(op.name, -tick(_last(op, state)), error.code))[-WINDOW:]
            state = state._replace(done=done, created_ms=now_ms if state.value is None else state.created_ms)
        return state, result
    if after is None:
        shown = None
        if state.value is not None:
            shown = pack(key, state.value, state.version, 0, state.created_ms, state.expires_ms)
        if fence != state.fence:
            created_ms = now_ms if state.value is None else state.created_ms  # a tombstone's age counts from its mark
            state = state._replace(fence=fence, created_ms=created_ms)
        return state, OpResult(state.version, 0, shown)
    version = tick(_last(op, state))
    done = (*state.done, Done(op.name, version, number))[-WINDOW:]
    return after._replace(version=version, done=done, fence=fence), OpResult(version, number)


def _last(op: Op, state: State) -> int:
    """What its version has to be above."""
    return max(state.version, op.since, abs(state.done[-1].version) if state.done else 0)


def _fence(op: Op, state: State) -> tuple[bytes, int] | None:
    """The mark after the operation. One without a fence passes, and leaves it (L3)."""
    if op.fence is None or state.fence is None:
        return op.fence or state.fence
    (lock, token), (known, highest) = op.fence, state.fence
    if lock != known:
        raise WrongFence(
            f"the key is fenced by {known.decode(errors='replace')}, not by {lock.decode(errors='replace')}"
        )
    if token < highest:
        raise FenceRejected(f"token {token} is behind {highest}, which has been here")
    return op.fence


def _check(op: Op, state: State) -> None:
    version = state.version if state.value is not None else 0
    if op.condition == IF_ABSENT and state.value is not None:
        raise VersionConflict("the key exists", version=version)
    if op.condition == IF_VERSION and version != op.version:
        what = f"the key is at version {version}" if version else "the key is absent"
        raise VersionConflict(f"{what}, not at {op.version}", version=version)
    if op.condition == IF_EQUALS and state.value != op.expected:
        raise VersionConflict("the value is another", version=version)


def _changed(op: Op, state: State, now_ms: int) -> tuple[State | None, int]:
    """The state after the operation, but for its version, and the number that it returns; None where it stays."""
    if op.kind == LOOK:
        return None, 0
    if op.kind == REMOVE:
        if state.value is None and op.condition != ANYHOW:
            return None, 0
        return State(0, None, 0, now_ms), int(state.value is not None)
    expires_ms = now_ms + op.ttl_ms if op.ttl_ms else 0
    created_ms = now_ms if state.value is None else state.created_ms
    if op.kind == PUT:
        return State(0, op.value, expires_ms, created_ms), 0
    if op.kind != ADD:
        raise InvalidRequest(f"unknown operation {op.kind}")
    number = _counter(state.value) + op.delta
    if not COUNTER_MIN <= number <= COUNTER_MAX:
        raise NotACounter(f"the counter would be {number}, past 64 bits")
    return State(0, b"%d" % number, expires_ms if op.ttl_ms else state.expires_ms, created_ms), number


def _counter(value: bytes | None) -> int:
    if value is None:
        return 0
    digits = value[1:] if value[:1] == b"-" else value
    if not digits.isdigit() or len(digits) > 19 or b"%d" % int(value) != value:
        raise NotACounter("the value is no counter")
    return int(value)


def outcome(
    op: Op, state: State, base: State, seen: Done | None, sent: int, floor: int, *, late: bool
) -> OpResult | None:
    """What a state that a quorum holds, or held, tells of an operation that may have taken effect already: its result,
    an error, or None where it certainly had no effect and is to be applied (R4).

    A value remembers the last WINDOW operations, or all since it was taken away as a tombstone (R8), if it was. Where
    it does not name this one, that may be among those that it forgot, unless
    - they are all older: whoever applies it makes a version above `op.since`, or
    - the state is the one to whose version it is bound, or
    - what its coordinator met as the newest when it judged last is still remembered, or
    - nobody else can have had it yet, as the time for that has not come; then its coordinator alone may have sent it.
    *Without: one that is tried by two coordinators takes effect twice, the second time once 16 others have come.*

    Args:
        state: what the round's operations before this one make of `base`, which was found.
        seen: the newest operation that its coordinator met when it last judged so, NOTHING for none, None for not yet.
            Its version tells it from one of the same name that was done anew, since that state was never chosen.
        sent: the least version that its coordinator sent it out with, 0 for none yet.
        floor: up to which version the key may have been taken away.
        late: LOOK_WITHIN_S have passed since it was sent to its coordinator.
    """
    if op.kind == LOOK:  # it has no effect that could be hidden
        return None
    done = base.done
    for known in done if state is base else (*done, *state.done):
        if known.name == op.name:
            if known.version > 0:
                return OpResult(known.version, known.number)
            version = state.version if state.value is not None else 0
            return OpResult(version, 0, None, (known.number, "it was refused when it was tried before", 0, 0))
    forgotten = abs(done[0].version) if len(done) >= WINDOW else floor
    if forgotten <= op.since:
        return None
    if op.condition == IF_VERSION and op.version == state.version:
        return None
    if not late and not op.retry:
        hidden = bool(sent) and forgotten >= sent
    elif seen is not None:
        hidden = seen not in done
    elif op.retry:
        hidden = True
    else:
        return OpResult(error=Unavailable("it came too late to be told from one that another node tries").to_wire())
    if hidden:
        return OpResult(
            error=OutcomeUnknown(f"{WINDOW} later operations, or a deletion, hide whether it took effect").to_wire()
        )
    return None


def newest_of(state: State) -> Done:
    """The operation that a state is the result of."""
    return state.done[-1] if state.done else NOTHING


# --- rounds


class Round:
    """One attempt at a key's register by its coordinator: prepare, where the ballot is not promised yet, and accept.

    Args:
        sets: the replica sets, of each of which a majority is needed.
    """

    __slots__ = ("_answered", "_failed", "_sets", "accepting", "ballot", "found", "record")

    def __init__(self, sets: Sequence[Sequence[str]], ballot: bytes) -> None:
        self._sets = sets
        self.ballot = ballot
        self.accepting = False
        self.found: bytes | None = None
        """The newest record among those who promised."""
        self.record: bytes = b""
        """What is being accepted."""
        self._answered: set[str] = set()
        self._failed: set[str] = set()

    def promised(self, replica: str, record: bytes | None) -> bool:
        """A replica has promised, and shown what it holds; whether a quorum has."""
        if self.accepting or replica in self._answered:
            return False
        self._answered.add(replica)
        if record is not None and (self.found is None or record > self.found):
            self.found = record
        return self._enough()

    def propose(self, record: bytes) -> None:
        """From now on this record is to be accepted."""
        self.record = record
        self.ballot = record[:BALLOT_BYTES]
        self.accepting = True
        self._answered = set()
        self._failed = set()

    def accepted(self, replica: str) -> bool:
        """A replica has accepted; whether a quorum has: then the record is chosen, for ever."""
        if not self.accepting or replica in self._answered:
            return False
        self._answered.add(replica)
        return self._enough()

    def failed(self, replica: str) -> bool:
        """A replica does not answer; whether a quorum cannot be had any more."""
        if replica not in self._answered:
            self._failed.add(replica)
        return any(2 * (len(names) - sum(n in self._failed for n in names)) <= len(names) for names in self._sets)

    def shortfall(self, *, reachable: bool = False) -> tuple[int, int]:
        """(needed, answered) of the set that is furthest from a quorum; or, needed and `reachable`: not failed."""
        pairs = []
        for names in self._sets:
            had = sum(n not in self._failed if reachable else n in self._answered for n in names)
            pairs.append((len(names) // 2 + 1, had))
        return max(pairs, key=lambda pair: pair[0] - pair[1])

    def _enough(self) -> bool:
        return all(2 * sum(n in self._answered for n in names) > len(names) for names in self._sets)
