"""Frames: `length u32 LE | magic u8 | kind u8 | body`. The length counts magic, kind and body.

`FrameReader` is fed whatever the connection yields and returns whole messages. Anything that is not a frame of this
protocol (wrong magic, unknown kind, a body of the wrong shape) raises ProtocolMismatch, a length over the limit
FrameTooLarge before a byte of it is buffered; the connection has to be closed then.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import msgspec

from agi.core.dht.errors import FrameTooLarge, ProtocolMismatch
from agi.core.dht.protocol import messages
from agi.core.dht.protocol.messages import Message
from agi.core.dht.types import FRAME_BYTES_MAX

MAGIC = 0xD7
KINDS: dict[int, type[Message]] = {
    1: messages.Hello,
    2: messages.Refused,
    3: messages.Ping,
    4: messages.Pong,
    5: messages.Goodbye,
    10: messages.Get,
    11: messages.GetReply,
    12: messages.Put,
    13: messages.PutReply,
    14: messages.Delete,
    15: messages.DeleteReply,
    16: messages.Scan,
    17: messages.ScanReply,
    18: messages.Query,
    19: messages.QueryReply,
    20: messages.Update,
    21: messages.UpdateReply,
    22: messages.Watch,
    23: messages.WatchReply,
    30: messages.ReplicaRead,
    31: messages.ReplicaReadReply,
    32: messages.ReplicaWrite,
    33: messages.ReplicaWriteReply,
    34: messages.ReplicaScan,
    35: messages.ReplicaScanReply,
    36: messages.RegisterPrepare,
    37: messages.RegisterPromises,
    38: messages.RegisterAccept,
    39: messages.RegisterAccepted,
    40: messages.Probe,
    41: messages.ProbeAck,
    42: messages.IndirectProbe,
    43: messages.ProbeNack,
    44: messages.Gossip,
    45: messages.ViewDigest,
    46: messages.ViewState,
    60: messages.TreeRoot,
    61: messages.TreeRootReply,
    62: messages.TreeNodes,
    63: messages.TreeNodesReply,
    64: messages.TreeRecords,
    65: messages.TreeRecordsReply,
    66: messages.TreeFetch,
    67: messages.TreeFetchReply,
    68: messages.ArcList,
    69: messages.ArcListReply,
    70: messages.EpochPrepare,
    71: messages.EpochAccept,
    72: messages.EpochReply,
    75: messages.ChangeState,
    76: messages.ChangeStateReply,
    77: messages.ReclaimStep,
    78: messages.ReclaimReply,
    73: messages.TopologyDigest,
    74: messages.TopologyNews,
}
KIND_OF: dict[type[Message], int] = {kind: number for number, kind in KINDS.items()}

_HEAD = struct.Struct("<IBB")
_HEAD_BYTES = _HEAD.size
_encode: Callable[[object], bytes] = msgspec.msgpack.Encoder().encode
_decoders: dict[int, Callable[[bytes | memoryview], Message]] = {
    kind: msgspec.msgpack.Decoder(message).decode for kind, message in KINDS.items()
}


def encode(message: msgspec.Struct) -> bytes:
    """The frame of a message. Raises FrameTooLarge."""
    body = _encode(message)
    if len(body) + 2 > FRAME_BYTES_MAX:
        raise FrameTooLarge(f"a frame has at most {FRAME_BYTES_MAX} bytes, this one {len(body) + 2}")
    return _HEAD.pack(len(body) + 2, MAGIC, KIND_OF[type(message)]) + body  # type: ignore[index]  # a Message


class FrameReader:
    """Cuts a stream of bytes into messages."""

    __slots__ = ("_rest", "_wanted")

    def __init__(self) -> None:
        self._rest = bytearray()
        self._wanted = 0

    def feed(self, data: bytes) -> list[Message]:
        """The messages that these bytes complete. Raises ProtocolMismatch, FrameTooLarge."""
        if self._rest:
            self._rest += data
            if len(self._rest) < self._wanted:
                return []
            data = bytes(self._rest)
            self._rest.clear()
        whole: list[Message] = []
        view = memoryview(data)
        at, size = 0, len(data)
        while size - at >= _HEAD_BYTES:
            length, magic, kind = _HEAD.unpack_from(data, at)
            decode = _decoders.get(kind)
            if magic != MAGIC or decode is None or length < 2:
                raise ProtocolMismatch("the bytes received are not a frame of this protocol")
            if length > FRAME_BYTES_MAX:
                raise FrameTooLarge(f"a frame of {length} bytes was announced; the limit is {FRAME_BYTES_MAX}")
            end = at + 4 + length
            if end > size:
                self._wanted = end - at
                break
            try:
                whole.append(decode(view[at + _HEAD_BYTES : end]))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise ProtocolMismatch(f"a frame of kind {kind} has a body of the wrong shape: {error}") from None
            at = end
        else:
            self._wanted = _HEAD_BYTES
        if at < size:
            self._rest += view[at:]
        return whole
