"""One contract for every wire (transport/base.py): native over TCP and Unix sockets, the gRPC tunnel, memory."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from transport_harness import DEADLINE_S, HASTY, PATIENT, WIRES, Pair, Recorder, Wire, large, question, until

from agi.core.dht.errors import (
    ConnectFailed,
    FrameTooLarge,
    HelloRefused,
    LinkClosed,
    Overloaded,
    ProtocolMismatch,
)
from agi.core.dht.transport.base import SEND_BUFFER_BYTES_MAX, Link
from agi.core.dht.transport.codec import MAGIC, encode
from agi.core.dht.types import FRAME_BYTES_MAX, VALUE_BYTES_MAX

MIB = 1024 * 1024
with_black_hole = pytest.mark.parametrize("wire", ["native-tcp", "grpc", "memory"], indirect=True)
with_raw_bytes = pytest.mark.parametrize("wire", ["native-tcp", "native-unix", "grpc"], indirect=True)


@pytest.fixture(params=WIRES)
async def wire(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Wire]:
    """A kind of transport. Fails the test that leaves a task behind."""

    def left() -> set[asyncio.Task[object]]:
        return asyncio.all_tasks() - {asyncio.current_task()}

    async with contextlib.AsyncExitStack() as stack:
        wire = WIRES[request.param](tmp_path, stack)
        yield wire
        await wire.end()
    with contextlib.suppress(TimeoutError):
        await until(lambda: not left())
    assert left() == set()


async def _settled(wire: Wire, pair: Pair) -> None:
    """Returns when anything that the other links of this pair had to tell has been told."""
    fresh = await wire.another(pair)
    for number in (1, 2):
        fresh.far.send(question(number))
        await pair.client.until(lambda number=number: number in pair.client.ids(fresh.link))
        fresh.link.send(question(number))
        await pair.server.until(lambda number=number: number in pair.server.ids(fresh.far))


async def test_messages_pass_both_ways_unchanged(wire: Wire) -> None:
    pair = await wire.pair()
    assert pair.link.context is None
    assert pair.far.context is None
    assert not pair.link.closed
    assert pair.link.peer == pair.listener.address
    message = large(3, 100)
    assert pair.link.send(message) == len(encode(message))
    pair.far.send(question(4))
    await pair.server.until(lambda: len(pair.server.heard) == 2)
    await pair.client.until(lambda: pair.client.heard)
    assert pair.server.heard[1] == (pair.far, message)
    assert pair.client.heard == [(pair.link, question(4))]


async def test_frames_packed_beforehand_pass(wire: Wire) -> None:
    pair = await wire.pair()
    pair.link.send_frame(encode(question(9)))
    await pair.server.until(lambda: pair.server.ids() == [0, 9])


async def test_ten_thousand_messages_keep_their_order_both_ways(wire: Wire) -> None:
    pair = await wire.pair()
    count = 10_000
    for start in range(1, count + 1, 500):
        for number in range(start, start + 500):
            pair.link.send(question(number))
            pair.far.send(question(number))
        await asyncio.sleep(0)
    await pair.server.until(lambda: len(pair.server.heard) == count + 1)
    await pair.client.until(lambda: len(pair.client.heard) == count)
    assert pair.server.ids() == list(range(count + 1))
    assert pair.client.ids() == list(range(1, count + 1))


async def test_the_largest_values_pass_both_ways(wire: Wire) -> None:
    pair = await wire.pair()
    messages = [large(1, VALUE_BYTES_MAX), question(2), large(3, VALUE_BYTES_MAX)]
    for message in messages:
        pair.link.send(message)
        pair.far.send(message)
    await pair.server.until(lambda: len(pair.server.heard) == 4)
    await pair.client.until(lambda: len(pair.client.heard) == 3)
    assert [message for _, message in pair.server.heard[1:]] == messages
    assert [message for _, message in pair.client.heard] == messages


async def test_a_frame_over_the_limit_is_refused_and_the_link_lives_on(wire: Wire) -> None:
    pair = await wire.pair()
    for side in (pair.link, pair.far):
        with pytest.raises(FrameTooLarge):
            side.send(large(1, FRAME_BYTES_MAX))
        side.send(question(2))
    await pair.server.until(lambda: len(pair.server.heard) > 1)
    await pair.client.until(lambda: pair.client.heard)
    assert pair.server.ids() == [0, 2]
    assert pair.client.ids() == [2]
    assert not pair.link.closed


async def test_a_peer_that_does_not_read_overloads_its_link_until_it_has_caught_up(wire: Wire) -> None:
    peer = await wire.stalled_peer()
    recorder = Recorder()
    link = await wire.connect(wire.transport("client", **PATIENT), peer.address, recorder)
    accepted = accepted_bytes = 0
    with pytest.raises(Overloaded):
        while accepted_bytes <= 2 * SEND_BUFFER_BYTES_MAX:
            accepted_bytes += link.send(large(accepted, 4 * MIB))
            accepted += 1
            await asyncio.sleep(0)
    assert SEND_BUFFER_BYTES_MAX - 5 * MIB < accepted_bytes < SEND_BUFFER_BYTES_MAX + 16 * MIB
    with pytest.raises(Overloaded):
        link.send(large(accepted, 4 * MIB))
    assert not link.closed

    peer.resumed.set()
    await until(lambda: len(peer.received) == accepted)
    await until(lambda: link.send(question(accepted)) > 0)
    await until(lambda: len(peer.received) == accepted + 1)
    assert [message.id for message in peer.received] == list(range(accepted + 1))  # type: ignore[attr-defined]
    assert {len(message.values[0]) for message in peer.received[:-1]} == {4 * MIB}  # type: ignore[attr-defined]
    assert recorder.closed == []


async def test_a_silent_peer_is_found_within_the_idle_timeout(wire: Wire) -> None:
    recorder = Recorder()
    link = await wire.connect_to_silent(wire.transport("client", **HASTY), recorder)
    start = asyncio.get_running_loop().time()
    await recorder.until(lambda: recorder.closed)
    took = asyncio.get_running_loop().time() - start
    assert [type(error) for error in recorder.errors(link)] == [LinkClosed]
    assert "silent" in str(recorder.errors(link)[0])
    assert link.closed
    assert 0.5 * HASTY["idle_timeout_s"] < took < HASTY["idle_timeout_s"] + 3.0
    with pytest.raises(LinkClosed):
        link.send(question(1))


async def test_a_silent_peer_with_a_full_buffer_is_found_too(wire: Wire) -> None:
    recorder = Recorder()
    link = await wire.connect_to_silent(wire.transport("client", **HASTY), recorder)
    for number in range(8):
        link.send(large(number, 4 * MIB))
    await recorder.until(lambda: recorder.closed)
    assert [type(error) for error in recorder.errors(link)] == [LinkClosed]


async def test_closing_towards_a_peer_that_does_not_read_ends(wire: Wire) -> None:
    recorder = Recorder()
    link = await wire.connect_to_silent(wire.transport("client", **HASTY), recorder)
    for number in range(8):
        link.send(large(number, 4 * MIB))
    await asyncio.sleep(0)
    link.close()
    await recorder.until(lambda: recorder.closed)
    assert len(recorder.closed) == 1


@pytest.mark.parametrize("hasty", ["client", "server"])
async def test_pings_keep_a_quiet_link_open(wire: Wire, hasty: str) -> None:
    """One side pings, and lives on what the other, too patient to ping, answers."""
    pair = await wire.pair(
        client=HASTY if hasty == "client" else PATIENT, server=HASTY if hasty == "server" else PATIENT
    )
    await asyncio.sleep(2.5 * HASTY["idle_timeout_s"])  # the time is what is tested
    assert pair.client.closed == pair.server.closed == []
    assert pair.client.heard == [], "pings and pongs are not for handlers"
    assert pair.server.ids() == [0]
    pair.link.send(question(1))
    await pair.server.until(lambda: pair.server.ids() == [0, 1])


async def test_nobody_there_fails_at_once(wire: Wire) -> None:
    address = await wire.nobody()
    transport = wire.transport("client", **PATIENT)
    async with asyncio.timeout(5):
        for _ in range(2):
            with pytest.raises(ConnectFailed, match=r"server|127|unix"):
                await transport.connect(address, Recorder(), timeout_s=15)


@with_black_hole
async def test_a_black_hole_fails_at_the_timeout(wire: Wire) -> None:
    address = await wire.black_hole()
    loop = asyncio.get_running_loop()
    start = loop.time()
    with pytest.raises(ConnectFailed):
        await wire.transport("client", **PATIENT).connect(address, Recorder(), timeout_s=0.4)
    assert 0.3 < loop.time() - start < 3.0


@with_raw_bytes
@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        encode(question(1)) + b"\x02\x00\x00\x00\x00\x00",
        struct.pack("<IBB", 3, MAGIC, 10) + b"\x00",
        struct.pack("<IBB", 2, MAGIC, 255),
    ],
    ids=["http", "after a message", "body of the wrong shape", "unknown kind"],
)
async def test_garbage_ends_that_link_alone(wire: Wire, garbage: bytes) -> None:
    pair = await wire.pair()
    await wire.throw(pair.listener.address, garbage)
    await pair.server.until(lambda: pair.server.closed)
    assert [type(error) for _, error in pair.server.closed] == [ProtocolMismatch]
    assert pair.server.closed[0][0] is not pair.far
    await _settled(wire, pair)
    pair.link.send(question(7))
    await pair.server.until(lambda: 7 in pair.server.ids(pair.far))


@with_raw_bytes
async def test_an_announced_frame_over_the_limit_ends_the_link_at_its_header(wire: Wire) -> None:
    pair = await wire.pair()
    await wire.throw(pair.listener.address, struct.pack("<IBB", FRAME_BYTES_MAX + 1, MAGIC, 12))
    await pair.server.until(lambda: pair.server.closed)
    assert [type(error) for _, error in pair.server.closed] == [FrameTooLarge]
    await _settled(wire, pair)


@pytest.mark.parametrize("side", ["link", "far"])
async def test_an_orderly_end_is_told_once_to_each_side(wire: Wire, side: str) -> None:
    pair = await wire.pair()
    closing: Link = getattr(pair, side)
    other_side = pair.far if side == "link" else pair.link
    other_side.send(question(5))
    closing.close()
    assert closing.closed
    closing.close()
    with pytest.raises(LinkClosed):
        closing.send(question(6))
    await pair.client.until(lambda: pair.client.closed)
    await pair.server.until(lambda: pair.server.closed)
    assert pair.link.closed
    assert pair.far.closed
    other_side.close()
    with pytest.raises(LinkClosed):
        other_side.send(question(6))
    await _settled(wire, pair)
    assert pair.client.errors(pair.link) == [None]
    assert pair.server.errors(pair.far) == [None]
    assert pair.client.after_close == pair.server.after_close == []


async def test_both_sides_may_close_at_once(wire: Wire) -> None:
    pair = await wire.pair()
    pair.link.close()
    pair.far.close()
    await pair.client.until(lambda: pair.client.closed)
    await pair.server.until(lambda: pair.server.closed)
    await _settled(wire, pair)
    assert len(pair.client.errors(pair.link)) == len(pair.server.errors(pair.far)) == 1


async def test_the_error_of_close_reaches_the_own_handler(wire: Wire) -> None:
    pair = await wire.pair()
    reason = HelloRefused("another cluster")
    pair.far.close(reason)
    await pair.server.until(lambda: pair.server.closed)
    await pair.client.until(lambda: pair.client.closed)
    assert pair.server.errors(pair.far) == [reason]
    assert pair.client.errors(pair.link) == [None]


@pytest.mark.parametrize("side", ["link", "far"])
async def test_what_was_queued_before_close_arrives(wire: Wire, side: str) -> None:
    pair = await wire.pair()
    closing: Link = getattr(pair, side)
    hears, before = (pair.server, 1) if side == "link" else (pair.client, 0)
    for number in range(1, 2001):
        closing.send(question(number))
    closing.send(large(2001, VALUE_BYTES_MAX))
    closing.close()
    await hears.until(lambda: hears.closed)
    assert hears.ids()[before:] == list(range(1, 2002))
    assert [error for _, error in hears.closed] == [None]


@pytest.mark.parametrize("side", ["link", "far"])
async def test_what_was_queued_before_close_arrives_though_the_other_side_talks(wire: Wire, side: str) -> None:
    """What the closing side leaves unread may not cost the other side the last words, such as a refusal."""
    pair = await wire.pair()
    closing, talking, hears = (
        (pair.link, pair.far, pair.server) if side == "link" else (pair.far, pair.link, pair.client)
    )
    before = len(hears.heard)
    for number in range(1, 4):
        talking.send(large(number, MIB))
    await asyncio.sleep(0)
    closing.send(question(4))
    closing.close()
    await hears.until(lambda: hears.closed)
    assert hears.ids()[before:] == [4]
    assert [error for _, error in hears.closed] == [None]


async def test_a_handler_that_raises_loses_its_link_alone(wire: Wire) -> None:
    def answer(link: Link, message: msgspec.Struct) -> None:
        if message.id == 13:  # type: ignore[attr-defined]
            raise ZeroDivisionError

    pair = await wire.pair(answer)
    other = await wire.another(pair)
    for number in (13, 14):
        pair.link.send(question(number))
    await pair.server.until(lambda: pair.server.closed)
    await pair.client.until(lambda: pair.client.closed)
    assert [type(error) for error in pair.server.errors(pair.far)] == [LinkClosed]
    assert "ZeroDivisionError" in str(pair.server.errors(pair.far)[0])
    assert len(pair.client.errors(pair.link)) == 1
    assert pair.server.ids(pair.far) == [0, 13]
    other.link.send(question(15))
    await pair.server.until(lambda: 15 in pair.server.ids(other.far))
    await _settled(wire, pair)
    assert not other.link.closed


async def test_a_handler_may_close_its_link_while_it_is_told(wire: Wire) -> None:
    pair = await wire.pair(lambda link, message: link.close() if message.id == 3 else None)
    for number in (1, 2, 3, 4, 5):
        pair.link.send(question(number))
    await pair.client.until(lambda: pair.client.closed)
    await pair.server.until(lambda: pair.server.closed)
    assert pair.server.ids(pair.far) == [0, 1, 2, 3]
    assert pair.client.errors(pair.link) == pair.server.errors(pair.far) == [None]


async def test_an_address_in_use_cannot_be_listened_on(wire: Wire) -> None:
    pair = await wire.pair()
    with pytest.raises(ConnectFailed, match="cannot listen"):
        await wire.transport("server", **PATIENT).listen(pair.listener.address, Recorder())
    await _settled(wire, pair)


async def test_a_closed_listener_keeps_its_links_and_takes_no_more(wire: Wire) -> None:
    pair = await wire.pair()
    await pair.listener.close()
    with pytest.raises(ConnectFailed):
        await pair.transport.connect(pair.listener.address, Recorder(), timeout_s=DEADLINE_S)
    pair.link.send(question(1))
    pair.far.send(question(2))
    await pair.server.until(lambda: pair.server.ids() == [0, 1])
    await pair.client.until(lambda: pair.client.ids() == [2])


async def test_flush_keeps_the_order(wire: Wire) -> None:
    pair = await wire.pair()
    pair.link.send(question(1))
    pair.link.flush()
    pair.link.send(question(2))
    pair.link.flush()
    pair.link.flush()
    await pair.server.until(lambda: len(pair.server.heard) == 3)
    assert pair.server.ids() == [0, 1, 2]


@pytest.mark.parametrize("wire", ["native-tcp", "native-unix"], indirect=True)
async def test_flush_writes_without_a_turn_of_the_loop(wire: Wire) -> None:
    listening, address = wire.listening_socket()  # type: ignore[attr-defined]
    link = await wire.connect(wire.transport("client", **PATIENT), address, Recorder())
    taken, _ = await asyncio.get_running_loop().sock_accept(listening)
    with taken:
        link.send(question(1))
        with pytest.raises(BlockingIOError):
            taken.recv(1000)
        link.flush()
        assert taken.recv(1000) == encode(question(1))


@pytest.mark.parametrize("wire", ["grpc"], indirect=True)
async def test_a_port_that_takes_connections_and_speaks_no_grpc_fails_at_the_timeout(wire: Wire) -> None:
    _, address = wire.listening_socket()  # type: ignore[attr-defined]
    with pytest.raises(ConnectFailed):
        await wire.transport("client", **PATIENT).connect(address, Recorder(), timeout_s=0.4)


@pytest.mark.parametrize("wire", ["native-unix"], indirect=True)
async def test_a_socket_file_left_behind_is_replaced(wire: Wire, tmp_path: Path) -> None:
    path = tmp_path / "left.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    recorder = Recorder()
    listener = await wire.transport("server", **PATIENT).listen(f"unix:{path}", recorder)
    wire.stack.push_async_callback(listener.close)
    link = await wire.connect(wire.transport("client", **PATIENT), listener.address, Recorder())
    link.send(question(1))
    await recorder.until(lambda: recorder.heard)
    wire.links.append((recorder.heard[0][0], recorder))


@pytest.mark.parametrize("wire", ["native-tcp"], indirect=True)
async def test_a_link_that_was_reset_unheard_closes_all_the_same(wire: Wire) -> None:
    pair = await wire.pair()
    await _settled(wire, pair)
    taken = pair.link._socket.get_extra_info("socket").fileno()  # type: ignore[attr-defined]  # of the native link
    no_family = (ctypes.c_char * 16)()  # AF_UNSPEC: the connection is gone, and the loop has still to hear of it
    assert ctypes.CDLL(None).connect(taken, no_family, 16) == 0
    pair.link.close()
    await pair.client.until(lambda: pair.client.errors(pair.link))
    assert pair.client.errors(pair.link) == [None]
