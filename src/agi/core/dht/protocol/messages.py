"""The messages between clients and nodes, and between nodes. Each is one frame and carries a whole batch.

On the wire a frame is `length u32 LE | magic u8 | kind u8 | MessagePack array`; the array is the Struct's fields in
order (msgspec `array_like`), so a field can be added at the end without a new protocol version. `id` correlates a reply
with its request: unique per sender. Node-to-node requests carry the topology's epoch and `trace`, the correlation id
`client id:sequence` of the client request that caused them.

A batch is columns, not rows: `keys[i]` goes with `records[i]`. Errors travel as `(code, message, needed, answered)`
(errors.py); `errors` lists (index, error) for single keys of a batch, `error` the failure of the whole.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec

from agi.core.dht.types import MemberStatus

WireError: TypeAlias = tuple[int, str, int, int]
KeyError_: TypeAlias = tuple[int, WireError]


class Message(msgspec.Struct, array_like=True, gc=False):
    """Base of all messages."""


# --- any link


class Hello(Message):
    """First message of a link, in both directions. `kind` is "node" or "client"; a client fills only the first four."""

    protocol: int
    kind: str
    name: str
    """The node id, or the client's random id."""
    cluster: str = ""
    """Cluster name. A client may leave it empty: it takes the cluster that it finds."""
    disk_id: str = ""
    boot: int = 0
    run_id: str = ""
    """Random per process: two processes with one boot counter are a cloned folder."""
    runs: list[str] = []
    """The run ids of the starts before, the last first: another one than was seen is a cloned folder too."""
    address: str = ""
    """The advertised gRPC address."""
    data_address: str = ""
    http_address: str = ""
    unix_path: str = ""
    """Unix socket of the data wire, for co-located clients; used only where it exists and the host is the same."""
    weight: float = 1.0
    rack: str = ""
    zone: str = ""
    factor: int = 0
    virtual_nodes: int = 0
    hash_algorithm: str = ""
    peers: list[str] = []
    topology: bytes = b""
    """The packed topology of a formed node, else empty."""
    vote: bytes = b""
    """The packed first topology that this node durably voted for, else empty."""
    members_seen: list[tuple[str, str]] = []
    """(node id, disk id) of every node reachable through the lists, as far as this one knows; complete if `settled`."""
    settled: bool = False
    join: bool = False
    """The sender has found a cluster that does not name it, and asks to be taken in."""
    replaces: str = ""
    """The dead member whose place it is to take then."""
    now_ms: int = 0
    """The sender's clock: its wall clock, or its newest version where that is ahead."""
    boottime_us: int = 0
    hlc: int = 0
    """To clients, as in UpdateReply; 0 from a node that is not ready yet."""


class Refused(Message):
    """The last message of a link whose other side may not work with this one."""

    error: WireError


class Ping(Message):
    pass


class Pong(Message):
    pass


class Goodbye(Message):
    """A node that stops says so to its clients: it answers what it has and refuses what still comes. A client sends
    nothing more, and closes the link when it has its answers."""


# --- client to node


class Get(Message):
    id: int
    consistency: int
    timeout_ms: int
    keys: list[bytes]


class GetReply(Message):
    """The packed record of each key; None where the key is absent, deleted or expired."""

    id: int
    records: list[bytes | None]
    errors: list[KeyError_] | None = None
    error: WireError | None = None


class Put(Message):
    """`ttl_ms` is 0 for none and holds for every key of the batch. `retry` marks a repeated (client id, id)."""

    id: int
    consistency: int
    timeout_ms: int
    keys: list[bytes]
    values: list[bytes]
    ttl_ms: int = 0
    retry: bool = False


class PutReply(Message):
    """The version that each key got; 0 where it failed."""

    id: int
    versions: list[int]
    errors: list[KeyError_] | None = None
    error: WireError | None = None


class Delete(Message):
    id: int
    consistency: int
    timeout_ms: int
    keys: list[bytes]
    retry: bool = False


class DeleteReply(Message):
    """`existed[i]`: one of the replicas that answered held a live record."""

    id: int
    existed: list[bool]
    errors: list[KeyError_] | None = None
    error: WireError | None = None


class Scan(Message):
    """Keys with start <= key < end (end empty: no bound), at most `limit` live ones."""

    id: int
    consistency: int
    timeout_ms: int
    start: bytes
    end: bytes
    limit: int
    keys_only: bool = False


class ScanReply(Message):
    """`next` is where to go on; empty where the scan is complete. A page may hold fewer than `limit`, even none."""

    id: int
    keys: list[bytes]
    records: list[bytes]
    next: bytes = b""
    error: WireError | None = None


class Op(msgspec.Struct, array_like=True, gc=False):
    """An operation on one key under consensus (protocol/consensus.py has the kinds and conditions). `name` is its own
    for ever, also where it is tried again: 16 random bytes. `retry`: another coordinator has had it before."""

    name: bytes
    key: bytes
    kind: int
    condition: int = 0
    value: bytes = b""
    version: int = 0
    expected: bytes | None = None
    ttl_ms: int = 0
    delta: int = 0
    retry: bool = False
    fence: tuple[bytes, int] | None = None
    """The key of the lock under which it is done, and the token."""
    since: int = 0
    """Whoever does it makes a version above this; 0 for any."""


class OpResult(msgspec.Struct, array_like=True, gc=False):
    """What came of it. `version`: that it made or met, 0 for an absent key; `number`: a counter, or 1 where something
    was deleted; `record`: what it looked at, packed as a plain record."""

    version: int = 0
    number: int = 0
    record: bytes | None = None
    error: WireError | None = None


class Update(Message):
    """Operations under consensus, each on a key of its own or one after the other on the same. `retry` as in Put.
    `asked_us`: when this was sent, or before that, by the node's own `boottime_us`; 0 for unknown."""

    id: int
    timeout_ms: int
    ops: list[Op]
    retry: bool = False
    asked_us: int = 0


class UpdateReply(Message):
    """`boottime_us`: the node's clock when it replied; `hlc`: what it makes from now on has a version above this."""

    id: int
    results: list[OpResult]
    error: WireError | None = None
    boottime_us: int = 0
    hlc: int = 0


class Watch(Message):
    """Tell me when it is my turn for a lock (watches.py). `version`: what I have seen; `waiter`: my name in line. With
    a `timeout_ms` of 0 only `known_ms` is asked for, at once, and nobody stands in a line."""

    id: int
    timeout_ms: int
    key: bytes
    version: int
    waiter: str = ""


class WatchReply(Message):
    """`version`: what is known of the key, 0 where the time is over. `free`: at that version, and it is your turn.
    `known_ms`: for how long this node has known the version that you have seen, 0 where it knows another
    or was not asked for that."""

    id: int
    version: int = 0
    error: WireError | None = None
    free: bool = False
    known_ms: int = 0


class Query(Message):
    """Rare questions: `what` is "topology", "history", "status", "stats", "locate" (with a key), "repair" (`key`:
    empty, or first and last token), "repair_state", "change" (`key`: packed changes.Order), "missed" (handoff.py) or
    "room" (changes.py)."""

    id: int
    what: str
    timeout_ms: int
    key: bytes = b""


class QueryReply(Message):
    """`body` is a MessagePack map whose shape belongs to `what` (ARCHITECTURE.md lists them)."""

    id: int
    body: bytes = b""
    error: WireError | None = None


# --- node to node

FRESH, REPAIR, HINT = 0, 1, 2


class ReplicaRead(Message):
    id: int
    epoch: int
    trace: str
    keys: list[bytes]


class ReplicaReadReply(Message):
    id: int
    records: list[bytes | None]
    error: WireError | None = None


class ReplicaWrite(Message):
    """Store these records. `mode` FRESH is a client's write (clock skew is checked), REPAIR brings what another replica
    holds, HINT what this one missed.
    With `want_live` the reply tells which keys held a live record before."""

    id: int
    epoch: int
    trace: str
    mode: int
    keys: list[bytes]
    records: list[bytes]
    want_live: bool = False


class ReplicaWriteReply(Message):
    """`superseded` lists (index, HLC of the newer version held): those records were not stored, hence not acknowledged.
    `live` lists the indexes that held a live record, where that was asked for."""

    id: int
    superseded: list[tuple[int, int]] | None = None
    live: list[int] | None = None
    error: WireError | None = None
    now_ms: int = 0
    """As in Hello: a coordinator whose clock runs ahead of its replicas notices before it stores anything."""


class RegisterPrepare(Message):
    """Will you take part in these rounds? Each key once; ballots as in protocol/consensus.py."""

    id: int
    epoch: int
    trace: str
    keys: list[bytes]
    ballots: list[bytes]


class RegisterPromises(Message):
    """`refusals` lists (index, the promise to get past); the others are promised, durably. `records` are held."""

    id: int
    records: list[bytes | None]
    refusals: list[tuple[int, bytes]] | None = None
    error: WireError | None = None


class RegisterAccept(Message):
    """Accept these records of registers."""

    id: int
    epoch: int
    trace: str
    keys: list[bytes]
    records: list[bytes]


class RegisterAccepted(Message):
    """`refusals` lists (index, the promise to get past); the others are accepted, durably."""

    id: int
    refusals: list[tuple[int, bytes]] | None = None
    error: WireError | None = None


class ReplicaScan(Message):
    id: int
    epoch: int
    trace: str
    start: bytes
    end: bytes
    limit: int
    bytes_max: int


class ReplicaScanReply(Message):
    """`complete`: this replica holds nothing more below `end`."""

    id: int
    keys: list[bytes]
    records: list[bytes]
    complete: bool
    error: WireError | None = None


# --- failure detection (protocol/membership.py)

Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class Claim(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Somebody holds that a member is in this state. Of two claims the one with the greater (boot, incarnation, status)
    counts."""

    node: str
    disk: Count
    """A tag of the member's disk (view.disk_tag): what was said of a replaced disk does not concern its successor."""
    boot: Count
    incarnation: Count
    status: MemberStatus
    by: str = ""
    """Who suspects it, where it is suspected."""


class Probe(Message):
    """Are you there? `boot` and `incarnation` are the sender's; all of these messages carry gossip."""

    seq: int
    boot: Count
    incarnation: Count
    gossip: list[Claim] = []


class ProbeAck(Message):
    """The answer, also one that was relayed; `boot` and `incarnation` are those of the node that was probed."""

    seq: int
    boot: Count
    incarnation: Count
    gossip: list[Claim] = []


class IndirectProbe(Message):
    """Probe that node for me."""

    seq: int
    target: str
    gossip: list[Claim] = []


class ProbeNack(Message):
    """I am here, but whom you asked about does not answer me."""

    seq: int
    gossip: list[Claim] = []


class Gossip(Message):
    claims: list[Claim]


class ViewDigest(Message):
    """A hash over all that the sender holds; whoever holds something else answers with a ViewState."""

    digest: int


class ViewState(Message):
    """A part of all that the sender holds. `answer`: the last part, and the receiver's state is asked for."""

    claims: list[Claim]
    answer: bool = False


# --- the topology's epochs (protocol/register.py)


class EpochPrepare(Message):
    """Will you take part in deciding this epoch under this ballot? `base` is the packed topology before it, so that a
    voter that has not heard of it yet can vote. `generation`: of a recovery, which each survivor is asked for
    (recovery.py); else 0."""

    id: int
    epoch: int
    ballot: tuple[int, int]
    base: bytes
    generation: int = 0


class EpochAccept(Message):
    """Accept this topology as that epoch."""

    id: int
    epoch: int
    ballot: tuple[int, int]
    value: bytes
    generation: int = 0


class EpochReply(Message):
    """A voter's answer to both: its state, stored before; or `newer`, a packed topology that settles the question."""

    id: int
    granted: bool = False
    promised: tuple[int, int] = (0, 0)
    accepted: tuple[int, int] = (0, 0)
    value: bytes = b""
    newer: bytes = b""
    error: WireError | None = None


class TopologyDigest(Message):
    """The sender's newest topology; whoever has a newer one answers with TopologyNews, who has an older one asks."""

    generation: int
    epoch: int
    digest: str


class TopologyNews(Message):
    topology: bytes


# --- anti-entropy (protocol/exchange.py)

# A node of a tree is named by the position of its range among those that both replicas hold, in token order, and by
# (shift, index) as in protocol/merkle.py. `first` and `last` bound the comparison: ranges that lie in them in part
# count. Sums and digests are cut to 32 bits, after a multiplication by `salt`: what hides once shows the next time.


class TreeRoot(Message):
    """Do you hold what I hold? `root` and `records` are of all ranges; `unknown` is a bitmap of those that the sender's
    root leaves out, empty if none."""

    id: int
    epoch: int
    trace: str
    first: int
    last: int
    ranges: int
    root: int
    records: int
    unknown: bytes = b""
    completed: bool = False
    """The last comparison that the sender began with the receiver came to its end."""


class TreeRootReply(Message):
    """`totals`: 8 bytes a range, empty if the roots are equal. `unknown` as in the request."""

    id: int
    totals: bytes = b""
    unknown: bytes = b""
    error: WireError | None = None


class TreeNodes(Message):
    """The sums under these nodes, `below[i]` the shift that is asked for."""

    id: int
    epoch: int
    trace: str
    first: int
    last: int
    salt: int
    ranges: list[int]
    shifts: list[int]
    indexes: list[int]
    below: list[int]


class TreeNodesReply(Message):
    """`shifts[i]` is what the sender has: at least `below[i]`; where it is no less than the node's own there are no
    sums. `sums`: 4 bytes each, node after node."""

    id: int
    shifts: list[int]
    sums: bytes = b""
    error: WireError | None = None


class TreeRecords(Message):
    """What the sender holds under these nodes: `counts[i]` records under the i-th, 4 bytes of `digests` each. Of the
    first node only tokens from `start` on are meant, of the last only those up to `end`."""

    id: int
    epoch: int
    trace: str
    first: int
    last: int
    salt: int
    ranges: list[int]
    shifts: list[int]
    indexes: list[int]
    counts: list[int]
    digests: bytes
    start: int
    end: int


class TreeRecordsReply(Message):
    """`missing`: positions of the digests that the sender does not hold. `extra`: (token, HLC) of what it holds beyond
    the digests, 16 bytes each. `up_to`: the token, of the last node looked at, up to which this was compared; `nodes`:
    how many nodes were."""

    id: int
    missing: list[int] = []
    extra: bytes = b""
    nodes: int = 0
    up_to: int = 0
    error: WireError | None = None


class TreeFetch(Message):
    """The records with these tokens, 8 bytes each."""

    id: int
    epoch: int
    trace: str
    tokens: bytes


class TreeFetchReply(Message):
    """`taken`: how many of the tokens were looked at; ask again for the rest."""

    id: int
    keys: list[bytes]
    records: list[bytes]
    taken: int = 0
    error: WireError | None = None


# --- changes of the members (migration.py)


class ArcList(Message):
    """What do you hold in these spans of tokens (first and last, 8 bytes each, in token order)?"""

    id: int
    epoch: int
    trace: str
    spans: bytes


class ArcListReply(Message):
    """`entries`: token, HLC and writer of each record, 8 bytes each, in token order. `complete`: of all the spans;
    else ask again from the last token on. `floors`: of the spans (protocol/floors.py)."""

    id: int
    entries: bytes = b""
    complete: bool = False
    floors: bytes = b""
    error: WireError | None = None


class ChangeState(Message):
    """How far are you with the change that this epoch began?"""

    id: int
    epoch: int


class ChangeStateReply(Message):
    """`ready`: the sender holds all that it is to hold after the change. `arcs`, `arcs_done`, `keys`, `bytes`: arcs
    that change and in which it has a part, those of them that are filled, what was brought to it so far."""

    id: int
    ready: bool = False
    arcs: int = 0
    arcs_done: int = 0
    keys: int = 0
    bytes: int = 0
    error: WireError | None = None


# --- reclaiming (reclaim.py)


class ReclaimStep(Message):
    """SEAL, CLOSE or RECLAIM, up to `version`, the arcs whose first replica by name is the sender and which none of
    the `absent` nodes holds; or RETIRE or FREE of these `keys`, accepted last under `ballots`, the registers there."""

    id: int
    epoch: int
    step: int
    version: int
    absent: list[str]
    keys: list[bytes] = []
    ballots: list[bytes] = []


class ReclaimReply(Message):
    """`kept`: the places of those of the keys that may not be set free."""

    id: int
    error: WireError | None = None
    kept: list[int] = []
