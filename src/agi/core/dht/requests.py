"""What the reads and writes under way at one coordinator share: admission, grouping, ids, deadlines, the answer.

A client batch is an `Operation`. It is split by replica set into groups (reads.py, writes.py); each has one id on the
links and one entry in the timer wheel, however many keys it holds; what several groups ask of one peer is one message
(fanout.py). The answer leaves when no group is left.

Where the replica sets change meanwhile, the groups that wait start again under the new ones, within their deadline
(PROTOCOLS T3): nothing that was answered under the old ones counts.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from typing import Protocol, TypeAlias

import structlog

from agi.core.dht.clock import Clock
from agi.core.dht.errors import (
    DHTError,
    InvalidConsistency,
    InvalidKey,
    InvalidRequest,
    Overloaded,
    StaleEpoch,
    TransportError,
)
from agi.core.dht.joint import JointRing, JointSet
from agi.core.dht.observability.logs import Throttle
from agi.core.dht.observability.metrics import Metrics
from agi.core.dht.peers import Peers
from agi.core.dht.protocol.admission import Admission
from agi.core.dht.protocol.messages import Delete, Get, KeyError_, Message, Op, OpResult, Put, WireError
from agi.core.dht.protocol.sizes import RecordSizes
from agi.core.dht.protocol.timers import TimerWheel
from agi.core.dht.replica import Replica
from agi.core.dht.ring import Ring
from agi.core.dht.topology import Topology
from agi.core.dht.types import BATCH_BYTES_MAX, KEY_BYTES_MAX, LOCK_PREFIX, Consistency

_log = structlog.get_logger("agi.core.dht.coordinator")

TIMEOUT_MS_MAX = 600_000
KEY_COST_BYTES = 256
"""What a key under way is counted for beyond its value, or the values that are to be read."""
KEYS_LEAST = 4096
"""Keys that may be under way however slow they are."""

ReplyTo: TypeAlias = Callable[[Message], object]
Hint: TypeAlias = Callable[[str, list[bytes], list[bytes]], None]
"""(replica, keys, records): it missed these of an acknowledged write."""
Part: TypeAlias = tuple[list[int] | None, list[bytes], tuple[str, ...]]
"""A part of a batch with one replica set: places in the batch (None: all of it), keys, replicas."""
Decide: TypeAlias = Callable[[Op, float, Callable[[OpResult], None]], None]


class Operation:
    """One client batch. `results` are by place; a failed place is named in `errors`. `fanout`: the id of what several
    of its groups read together (fanout.py), 0 for none."""

    errors: list[KeyError_] | None = None
    contested: set[int] | None = None
    fanout = 0
    attempts = 0
    left = 1

    def __init__(self, request: Get | Put | Delete, reply: ReplyTo, trace: str, started: float, cost: int) -> None:
        self.request = request
        self.reply = reply
        self.trace = trace
        self.started = started
        self.cost = cost
        self.results: list[bytes | None] = []

    @property
    def deadline(self) -> float:
        """Monotonic."""
        return self.started + min(self.request.timeout_ms, TIMEOUT_MS_MAX) / 1000

    def fail(self, places: Iterable[int], error: DHTError) -> None:
        wire = error.to_wire()
        failed: list[KeyError_] = [(place, wire) for place in places]
        self.errors = failed if self.errors is None else self.errors + failed


class Group(Protocol):
    """A part of an operation that waits for replicas."""

    @property
    def waiting(self) -> Container[str]:
        """Replicas that have still to answer."""

    def lost(self, replica: str, error: DHTError) -> None:
        """The link to a replica broke."""

    def expired(self) -> None:
        """The deadline has come."""

    def restart(self) -> None:
        """The replica sets have changed: what is not answered yet begins again, as other groups."""


class Requests:
    """The coordinator's books.

    Args:
        hint: told what a replica missed.
        first_id: ids start above it; another at each start of the node, so that no late reply meets a stranger.
        pending_bytes_max: keys and values of unfinished requests, and what reads will bring; past it requests fail with
            Overloaded.
        queue_s: how long requests may wait where more come than this node can carry out; past it they fail with
            Overloaded (protocol/admission.py).
        slow_s: operations that took at least this long are logged; 0 for none.
        on_stale: told of a replica that goes by a newer topology.
    """

    def __init__(
        self,
        me: str,
        topology: Topology,
        ring: Ring | JointRing,
        replica: Replica,
        peers: Peers,
        clock: Clock,
        metrics: Metrics,
        *,
        hint: Hint,
        first_id: int,
        pending_bytes_max: int,
        queue_s: float,
        slow_s: float,
        on_stale: Callable[[str], None] = lambda replica: None,
    ) -> None:
        self.me = me
        self.replica = replica
        self.peers = peers
        self.clock = clock
        self.metrics = metrics
        self.hint = hint
        self.pending: dict[int, Group] = {}
        self._postponed: list[int] = []
        self.turn = 0
        self.epoch = topology.epoch
        self._placement = topology.placement
        self.adopt(topology, ring)
        self._on_stale = on_stale
        self._ids = first_id
        self._bytes = 0
        self.sizes = RecordSizes()
        self._bytes_max = pending_bytes_max
        self._admission = Admission(queue_s, KEYS_LEAST)
        self._wheel: TimerWheel[int] = TimerWheel(clock.monotonic())
        self._slow_s = slow_s or float("inf")
        self._slow = Throttle()
        self.decide: Decide = undecided
        """Runs an operation under consensus (registers.py): (operation, deadline, what to tell of its result)."""

    def adopt(self, topology: Topology, ring: Ring | JointRing) -> None:
        """Requests go by this topology. Those under way start again where it changes replica sets, or may have: an
        epoch that this node missed can have changed them and this one changed them back."""
        changed = topology.placement != self._placement or topology.epoch > self.epoch + 1
        self._placement = topology.placement
        self.epoch = topology.epoch
        self._ring = ring
        self._all = tuple(member.node_id for member in topology.members)
        self._everywhere = not topology.in_transition and topology.replica_count == len(topology.members)
        self._sets: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._needed = {level: level.needed(topology.replica_count) for level in Consistency}
        if changed:
            pending, self.pending = self.pending, {}
            for group in pending.values():
                group.restart()

    def late(self, operation: Operation) -> bool:
        """The operation's deadline has passed."""
        return self.clock.monotonic() >= operation.deadline

    def postpone(self, group: Group, operation: Operation) -> int:
        """A group that has to start again cannot reach its replicas yet: new ones are connected only after the change.
        It tries again soon, under the id that is returned."""
        number = self.enter(group, operation)
        self._postponed.append(number)
        return number

    def stale(self, replica: str, error: WireError) -> bool:
        """Whether a replica refuses because the topology has changed: it is no failure, as the request starts again
        once this node goes by the newer one."""
        if error[0] != StaleEpoch.code:
            return False
        self._on_stale(replica)
        return True

    def needed(self, consistency: int) -> int:
        """Replicas that a level waits for. Raises InvalidConsistency."""
        needed = self._needed.get(consistency)  # type: ignore[call-overload]  # an IntEnum is found by its number
        if needed is None:
            raise InvalidConsistency(f"unknown consistency {consistency}")
        return int(needed)

    def admit(self, now: float, keys: Sequence[bytes], values: Sequence[bytes] = (), read_from: int = 0) -> int:
        """The bytes that the batch counts for, with what so many replicas of each key are expected to bring. Raises
        InvalidRequest for what no client of ours sends, Overloaded past the bounds. Locks wait in no queue: who cannot
        renew its lease in time has lost it."""
        if not keys:
            raise InvalidRequest("a batch without keys")
        if max(map(len, keys)) > KEY_BYTES_MAX or not all(keys):
            raise InvalidKey(f"a key has 1 to {KEY_BYTES_MAX} bytes")
        cost = KEY_COST_BYTES * len(keys) + sum(map(len, values))
        if read_from:
            replies = read_from if self._everywhere else len(self._all)
            expected = int(self.sizes.mean_bytes * len(keys) * read_from)
            # no reply brings more than a batch; what would never fit is read when nothing else is under way
            cost = min(cost + min(expected, replies * BATCH_BYTES_MAX), self._bytes_max)
        refused = ""
        if self._bytes + cost > self._bytes_max:
            refused = f"requests of {self._bytes} bytes are under way at {self.me} already"
        elif not self._admission.admits(now) and not all(key.startswith(LOCK_PREFIX) for key in keys):
            refused = f"{self._admission.pending} keys wait at {self.me} already"
        if refused:
            error = Overloaded(refused)
            self.metrics.fail(error, len(keys))
            raise error
        self._admission.enter(len(keys))
        self._bytes += cost
        return cost

    def parts(self, operation: Operation, places: list[int] | None, keys: list[bytes]) -> list[Part]:
        """These keys of an operation split by replica set; `places` is where they are in its batch (None: all of it).
        The operation then waits for each of the parts. In which order the ring names a key's replicas says nothing to a
        quorum, so that keys with the same replicas are one part."""
        if self._everywhere:
            return [(places, keys, self._all)]
        replicas_of, sets = self._ring.replicas, self._sets
        split: dict[tuple[str, ...], list[int]] = {}
        for index, key in enumerate(keys):
            replicas = replicas_of(key)
            split.setdefault(sets.get(replicas) or self._sorted(replicas), []).append(index)
        if len(split) == 1:
            return [(places, keys, next(iter(split)))]
        operation.left += len(split) - 1
        if places is None:
            operation.results = [None] * len(keys)
            return [(found, [keys[i] for i in found], replicas) for replicas, found in split.items()]
        return [([places[i] for i in found], [keys[i] for i in found], replicas) for replicas, found in split.items()]

    def _sorted(self, replicas: tuple[str, ...]) -> tuple[str, ...]:
        """One and the same for every order of these replicas."""
        if type(replicas) is JointSet:
            old, new = tuple(sorted(replicas.old)), tuple(sorted(replicas.new))
            found: tuple[str, ...] = JointSet.of(old, new, replicas.sources)
        else:
            found = tuple(sorted(replicas))
        self._sets[replicas] = found
        return found

    def enter(self, group: Group, operation: Operation) -> int:
        """The group's id; it ends at the operation's deadline at the latest."""
        return self.enter_until(group, operation.deadline)

    def enter_until(self, group: Group, deadline: float) -> int:
        """As `enter`, until that monotonic time."""
        self._ids = number = self._ids + 1
        self.pending[number] = group
        self._wheel.add(deadline, number)
        return number

    def replicas(self, key: bytes) -> tuple[str, ...]:
        """Of one key; a JointSet where they are changing."""
        return self._all if self._everywhere else self._ring.replicas(key)

    def release(self, now: float, cost: int, keys: int) -> None:
        """A batch that was admitted for this cost has been answered."""
        self._bytes -= cost
        self._admission.leave(keys, now)

    def finish(self, operation: Operation, observe: Callable[[float, int], None], answer: Message) -> None:
        """Sends the answer of an operation whose groups have all ended."""
        count, now = len(operation.request.keys), self.clock.monotonic()
        self.release(now, operation.cost, count)
        elapsed = now - operation.started
        observe(elapsed, count)
        if operation.errors is not None:
            self.metrics.fail_keys(operation.errors)
        if elapsed > self._slow_s and self._slow.pass_(operation.started):
            kind = type(operation.request).__name__
            _log.warning("slow_request", kind=kind, keys=count, ms=round(elapsed * 1000), trace=operation.trace)
        try:
            operation.reply(answer)
        except (TransportError, Overloaded) as error:
            _log.info("reply_undeliverable", trace=operation.trace, error=str(error))

    def peer_lost(self, node_id: str, error: DHTError) -> None:
        """A link broke: what waits for that peer has failed there."""
        for group in [group for group in self.pending.values() if node_id in group.waiting]:
            group.lost(node_id, error)

    def advance(self, now: float) -> None:
        """Ends what is past its deadline, and tries again what was postponed."""
        for number in self._wheel.advance(now):
            group = self.pending.get(number)
            if group is not None:
                group.expired()
        if self._postponed:
            postponed, self._postponed = self._postponed, []
            for number in postponed:
                group = self.pending.pop(number, None)
                if group is not None:
                    group.restart()


def undecided(op: Op, deadline: float, answer: Callable[[OpResult], None]) -> None:
    raise AssertionError("the coordinator has not been put together")


def refusal(error: Exception) -> DHTError:
    return error if isinstance(error, DHTError) else InvalidRequest(str(error))
