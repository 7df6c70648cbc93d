"""The frame format: golden bytes, streams cut anywhere, and bytes that are no frames."""

from __future__ import annotations

import itertools
import struct

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agi.core.dht import types
from agi.core.dht.errors import DHTError, FrameTooLarge, ProtocolMismatch
from agi.core.dht.protocol import messages
from agi.core.dht.protocol.messages import Message
from agi.core.dht.transport.codec import KIND_OF, KINDS, MAGIC, FrameReader, encode
from agi.core.dht.types import FRAME_BYTES_MAX, PROTOCOL_VERSION, VALUE_BYTES_MAX

CLAIM = messages.Claim(node="n1", disk=7, boot=3, incarnation=2, status=types.MemberStatus.SUSPECT, by="n2")
SAMPLES: list[Message] = [
    messages.Hello(protocol=1, kind="node", name="n1", cluster="c", peers=["a:1", "b:2"], members_seen=[("n1", "d1")]),
    messages.Refused(error=(51, "another cluster", 0, 0)),
    messages.Ping(),
    messages.Goodbye(),
    messages.Pong(),
    messages.Get(id=1, consistency=2, timeout_ms=500, keys=[b"a", b"b"]),
    messages.GetReply(id=1, records=[b"r", None], errors=[(1, (30, "few", 2, 1))]),
    messages.Put(id=2, consistency=1, timeout_ms=500, keys=[b"a"], values=[b"v" * 300], ttl_ms=9, retry=True),
    messages.PutReply(id=2, versions=[1 << 63]),
    messages.Delete(id=3, consistency=3, timeout_ms=1, keys=[b"a"]),
    messages.DeleteReply(id=3, existed=[True, False]),
    messages.Scan(id=4, consistency=2, timeout_ms=7, start=b"a", end=b"", limit=10),
    messages.ScanReply(id=4, keys=[b"a"], records=[b"r"], next=b"b"),
    messages.Query(id=5, what="locate", timeout_ms=100, key=b"k"),
    messages.QueryReply(id=5, body=b"\x80"),
    messages.ReplicaRead(id=6, epoch=3, trace="c:1", keys=[b"a"]),
    messages.ReplicaReadReply(id=6, records=[None]),
    messages.ReplicaWrite(id=7, epoch=3, trace="", mode=messages.REPAIR, keys=[b"a"], records=[b"r"], want_live=True),
    messages.ReplicaWriteReply(id=7, superseded=[(0, 99)], live=[0]),
    messages.Update(
        id=9,
        timeout_ms=1000,
        ops=[
            messages.Op(bytes(16), b"k", 0, 2, b"v", 7, None, 1000, 0, True),
            messages.Op(bytes(16), b"k", 2, delta=-1, fence=(b"lock:l", 7), since=1 << 62),
        ],
        asked_us=1 << 50,
    ),
    messages.UpdateReply(
        id=9,
        results=[messages.OpResult(8, 0), messages.OpResult(7, 0, b"r", (43, "another version", 0, 0))],
        boottime_us=1 << 50,
        hlc=1 << 62,
    ),
    messages.Watch(id=9, timeout_ms=1000, key=b"lock:l", version=7, waiter="w"),
    messages.WatchReply(id=9, version=8, error=(32, "too many", 0, 0), free=True, known_ms=1500),
    messages.RegisterPrepare(id=8, epoch=3, trace="t", keys=[b"k"], ballots=[b"\x80" + bytes(15)]),
    messages.RegisterPromises(id=8, records=[None, b"r"], refusals=[(1, b"\x80" + bytes(15))]),
    messages.RegisterAccept(id=8, epoch=3, trace="", keys=[b"k"], records=[b"\x80" + bytes(50)]),
    messages.RegisterAccepted(id=8, refusals=None, error=(42, "epoch", 0, 0)),
    messages.ReplicaScan(id=8, epoch=3, trace="", start=b"", end=b"z", limit=5, bytes_max=1000),
    messages.ReplicaScanReply(id=8, keys=[], records=[], complete=True),
    messages.Probe(seq=1, boot=3, incarnation=2, gossip=[CLAIM]),
    messages.ProbeAck(seq=1, boot=3, incarnation=2),
    messages.IndirectProbe(seq=2, target="n3", gossip=[CLAIM, CLAIM]),
    messages.ProbeNack(seq=2),
    messages.Gossip(claims=[CLAIM]),
    messages.ViewDigest(digest=(1 << 64) - 1),
    messages.ViewState(claims=[CLAIM], answer=True),
    messages.EpochPrepare(id=9, epoch=2, ballot=(1, 7), base=b"t"),
    messages.EpochAccept(id=9, epoch=2, ballot=(1, 7), value=b"u"),
    messages.EpochReply(id=9, granted=True, promised=(1, 7), accepted=(1, 7), value=b"u", newer=b"w"),
    messages.TopologyDigest(generation=1, epoch=2, digest="d"),
    messages.TopologyNews(topology=b"t"),
    messages.TreeRoot(id=10, epoch=1, trace="", first=0, last=(1 << 64) - 1, ranges=9, root=1 << 63, records=5),
    messages.TreeRootReply(id=10, totals=bytes(72), unknown=b"\x01"),
    messages.TreeNodes(
        id=11, epoch=1, trace="", first=0, last=9, salt=(1 << 64) - 1, ranges=[1], shifts=[64], indexes=[0], below=[56]
    ),
    messages.TreeNodesReply(id=11, shifts=[56], sums=bytes(8)),
    messages.TreeRecords(
        id=12,
        epoch=1,
        trace="",
        first=0,
        last=9,
        salt=1,
        ranges=[1],
        shifts=[4],
        indexes=[7],
        counts=[1],
        digests=bytes(4),
        start=3,
        end=1 << 63,
    ),
    messages.ArcList(id=14, epoch=2, trace="", spans=bytes(16)),
    messages.ArcListReply(id=14, entries=bytes(24), complete=True, floors=bytes(40)),
    messages.ChangeState(id=15, epoch=2),
    messages.ChangeStateReply(id=15, ready=True, arcs=3, arcs_done=2, keys=9, bytes=900),
    messages.TreeRecordsReply(id=12, missing=[0], extra=bytes(16), nodes=1, up_to=1 << 63),
    messages.TreeFetch(id=13, epoch=1, trace="", tokens=bytes(8)),
    messages.TreeFetchReply(id=13, keys=[b"k"], records=[b"r"], taken=1),
    messages.ReclaimStep(id=16, epoch=2, step=1, version=1 << 40, absent=["n2"]),
    messages.ReclaimStep(16, 2, 4, 1 << 40, [], keys=[b"k"], ballots=[b"\x80" + bytes(15)]),
    messages.ReclaimReply(id=16, kept=[0]),
]
STREAM = b"".join(encode(message) for message in SAMPLES)

# Whoever changes one of these changes the wire: a field may be added at the end, anything else is a new version.
GOLDEN = {
    "ping": (messages.Ping(), "03000000d70390"),
    "refused": (messages.Refused(error=(51, "no", 0, 0)), "0a000000d702919433a26e6f0000"),
    "get": (messages.Get(id=1, consistency=2, timeout_ms=500, keys=[b"k"]), "0c000000d70a940102cd01f491c4016b"),
    "get reply": (messages.GetReply(id=1, records=[b"r", None]), "0b000000d70b940192c40172c0c0c0"),
    "put": (
        messages.Put(id=300, consistency=1, timeout_ms=9, keys=[b"k"], values=[b"v"], ttl_ms=70000),
        "16000000d70c97cd012c010991c4016b91c40176ce00011170c2",
    ),
    "replica write": (
        messages.ReplicaWrite(id=7, epoch=3, trace="c:1", mode=0, keys=[b"k"], records=[b"r"]),
        "13000000d720970703a3633a310091c4016b91c40172c2",
    ),
    "probe": (messages.Probe(seq=1, boot=3, incarnation=2), "07000000d7289401030290"),
    "gossip": (messages.Gossip(claims=[CLAIM]), "0f000000d72c919196a26e3107030201a26e32"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes(name: str) -> None:
    message, golden = GOLDEN[name]
    assert encode(message).hex() == golden
    assert FrameReader().feed(bytes.fromhex(golden)) == [message]


def test_wire_constants() -> None:
    assert PROTOCOL_VERSION == 1
    assert MAGIC == 0xD7
    assert {kind.__name__: number for number, kind in KINDS.items()} == {
        "Hello": 1,
        "Refused": 2,
        "Ping": 3,
        "Pong": 4,
        "Goodbye": 5,
        "Get": 10,
        "GetReply": 11,
        "Put": 12,
        "PutReply": 13,
        "Delete": 14,
        "DeleteReply": 15,
        "Scan": 16,
        "ScanReply": 17,
        "Query": 18,
        "QueryReply": 19,
        "ReplicaRead": 30,
        "ReplicaReadReply": 31,
        "ReplicaWrite": 32,
        "ReplicaWriteReply": 33,
        "ReplicaScan": 34,
        "ReplicaScanReply": 35,
        "RegisterPrepare": 36,
        "RegisterPromises": 37,
        "RegisterAccept": 38,
        "RegisterAccepted": 39,
        "Update": 20,
        "UpdateReply": 21,
        "Watch": 22,
        "WatchReply": 23,
        "Probe": 40,
        "ProbeAck": 41,
        "IndirectProbe": 42,
        "ProbeNack": 43,
        "Gossip": 44,
        "ViewDigest": 45,
        "ViewState": 46,
        "EpochPrepare": 70,
        "EpochAccept": 71,
        "EpochReply": 72,
        "TopologyDigest": 73,
        "TopologyNews": 74,
        "TreeRoot": 60,
        "TreeRootReply": 61,
        "TreeNodes": 62,
        "TreeNodesReply": 63,
        "TreeRecords": 64,
        "TreeRecordsReply": 65,
        "TreeFetch": 66,
        "TreeFetchReply": 67,
        "ArcList": 68,
        "ArcListReply": 69,
        "ChangeState": 75,
        "ChangeStateReply": 76,
        "ReclaimStep": 77,
        "ReclaimReply": 78,
    }
    assert types.KEY_BYTES_MAX == 1024


def test_every_message_has_a_sample_and_survives_the_wire() -> None:
    assert {type(message) for message in SAMPLES} == set(KIND_OF)
    assert FrameReader().feed(STREAM) == SAMPLES


def test_a_stream_cut_in_two_at_every_byte() -> None:
    for at in range(len(STREAM) + 1):
        reader = FrameReader()
        assert reader.feed(STREAM[:at]) + reader.feed(STREAM[at:]) == SAMPLES, at


def test_a_stream_of_single_bytes() -> None:
    reader = FrameReader()
    assert [message for byte in STREAM for message in reader.feed(bytes([byte]))] == SAMPLES


@given(cuts=st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_a_stream_cut_anywhere(cuts: list[int]) -> None:
    reader = FrameReader()
    edges = [0, *sorted(cuts), len(STREAM)]
    got = [message for a, b in itertools.pairwise(edges) for message in reader.feed(STREAM[a:b])]
    assert got == SAMPLES


def test_a_message_is_out_as_soon_as_its_last_byte_is_in() -> None:
    reader = FrameReader()
    assert reader.feed(encode(SAMPLES[0])[:-1]) == []
    assert reader.feed(encode(SAMPLES[0])[-1:]) == [SAMPLES[0]]


def test_values_do_not_share_the_readers_buffer() -> None:
    reader = FrameReader()
    frame = encode(messages.GetReply(id=1, records=[b"first"]))
    reader.feed(frame[:7])
    (message,) = reader.feed(frame[7:])
    reader.feed(frame[:9])
    assert message.records == [b"first"]  # type: ignore[attr-defined]
    assert type(message.records[0]) is bytes  # type: ignore[attr-defined]


def _feed_all(data: bytes, step: int) -> list[Message]:
    reader = FrameReader()
    return [message for at in range(0, len(data), step) for message in reader.feed(data[at : at + step])]


@given(data=st.binary(max_size=300), step=st.integers(1, 300))
def test_random_bytes_raise_nothing_but_the_two_errors(data: bytes, step: int) -> None:
    try:
        _feed_all(data, step)
    except DHTError as error:
        assert type(error) in (ProtocolMismatch, FrameTooLarge)


@given(kind=st.sampled_from(sorted(KINDS)), body=st.binary(max_size=200))
def test_random_bodies_raise_nothing_but_a_mismatch(kind: int, body: bytes) -> None:
    frame = struct.pack("<IBB", len(body) + 2, MAGIC, kind) + body
    try:
        (message,) = FrameReader().feed(frame)
    except ProtocolMismatch:
        return
    assert type(message) is KINDS[kind]


@settings(max_examples=300)
@given(
    sample=st.sampled_from(SAMPLES),
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4),
    step=st.integers(1, 64),
)
def test_mutated_frames_raise_nothing_but_the_two_errors(
    sample: Message, changes: list[tuple[int, int]], step: int
) -> None:
    frame = bytearray(encode(sample))
    for at, byte in changes:
        frame[at % len(frame)] = byte
    try:
        got = _feed_all(bytes(frame) + STREAM, step)
    except DHTError as error:
        assert type(error) in (ProtocolMismatch, FrameTooLarge)
    else:
        assert all(type(message) in KIND_OF for message in got)


nested = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=4) | st.binary(),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(kind=st.sampled_from(sorted(KINDS)), body=nested)
def test_well_formed_bodies_of_the_wrong_shape_are_a_mismatch(kind: int, body: object) -> None:
    packed = msgspec.msgpack.encode(body)
    try:
        (message,) = FrameReader().feed(struct.pack("<IBB", len(packed) + 2, MAGIC, kind) + packed)
    except ProtocolMismatch:
        return
    assert type(message) is KINDS[kind]


def test_a_body_nested_without_end_is_a_mismatch() -> None:
    body = b"\x91" * 100_000
    with pytest.raises(ProtocolMismatch):
        FrameReader().feed(struct.pack("<IBB", len(body) + 2, MAGIC, 10) + body)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_unknown_trailing_fields_are_ignored(sample: Message) -> None:
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(sample))
    body = msgspec.msgpack.encode([*fields, {"of": "a newer version"}, 7])
    assert FrameReader().feed(struct.pack("<IBB", len(body) + 2, MAGIC, KIND_OF[type(sample)]) + body) == [sample]


def test_missing_optional_fields_take_their_defaults() -> None:
    body = msgspec.msgpack.encode([1, "client", "c1"])
    (hello,) = FrameReader().feed(struct.pack("<IBB", len(body) + 2, MAGIC, 1) + body)
    assert hello == messages.Hello(protocol=1, kind="client", name="c1")


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<IBB", 3, 0xD6, 3) + b"\x90",
        struct.pack("<IBB", 3, MAGIC, 99) + b"\x90",
        struct.pack("<IBB", 1, MAGIC, 3),
        struct.pack("<IBB", 0, MAGIC, 3),
        struct.pack("<IBB", 4, MAGIC, 3) + b"\x90\x90",
        struct.pack("<IBB", 2, MAGIC, 3),
        struct.pack("<IBB", FRAME_BYTES_MAX + 1, 0x00, 3),
    ],
    ids=["magic", "kind", "length 1", "length 0", "two bodies", "no body", "magic before length"],
)
def test_what_is_no_frame_is_a_mismatch(data: bytes) -> None:
    with pytest.raises(ProtocolMismatch):
        FrameReader().feed(data)


def test_the_frame_limit_holds_exactly() -> None:
    overhead = len(encode(messages.QueryReply(id=1, body=bytes(1 << 20)))) - (1 << 20) - 4
    largest = messages.QueryReply(id=1, body=bytes(FRAME_BYTES_MAX - overhead))
    frame = encode(largest)
    assert len(frame) == FRAME_BYTES_MAX + 4
    assert FrameReader().feed(frame) == [largest]
    with pytest.raises(FrameTooLarge):
        encode(messages.QueryReply(id=1, body=bytes(FRAME_BYTES_MAX - overhead + 1)))


def test_an_announced_length_over_the_limit_is_refused_at_the_header() -> None:
    reader = FrameReader()
    assert reader.feed(struct.pack("<IB", FRAME_BYTES_MAX + 1, MAGIC)) == []
    with pytest.raises(FrameTooLarge, match=str(FRAME_BYTES_MAX)):
        reader.feed(b"\x03")


def test_the_largest_record_fits_into_a_frame() -> None:
    record = bytes(VALUE_BYTES_MAX + 40)
    encode(messages.ReplicaWrite(id=1, epoch=1, trace="x" * 200, mode=0, keys=[b"k" * 1024], records=[record]))
