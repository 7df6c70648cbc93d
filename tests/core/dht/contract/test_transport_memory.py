"""The faults that only the simulated network can produce, and its promise that a run can be repeated."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest
from transport_harness import HASTY, PATIENT, Recorder, large, question, until

from agi.core.dht.errors import ConnectFailed, LinkClosed
from agi.core.dht.protocol.messages import Ping
from agi.core.dht.transport.base import Link
from agi.core.dht.transport.memory import MemoryNetwork, MemoryTransport


class Two:
    """A client on host a and a server on host b."""

    def __init__(self, **timeouts: float) -> None:
        self.network = MemoryNetwork()
        self.timeouts = timeouts or PATIENT
        self.server, self.client = Recorder(), Recorder()

    async def start(self) -> Two:
        self.listener = await MemoryTransport(self.network, "b", **self.timeouts).listen("b:7000", self.server)
        self.transport = MemoryTransport(self.network, "a", **self.timeouts)
        self.link = await self.transport.connect("b:7000", self.client)
        self.link.send(question(0))
        await self.server.until(lambda: self.server.heard)
        self.far: Link = self.server.heard[0][0]
        return self


@pytest.fixture
async def two() -> AsyncIterator[Two]:
    yield await Two().start()


async def test_delays_reorder_and_doubles_double(two: Two) -> None:
    delays = {1: [0.05], 2: [0.0], 3: [0.1, 0.02], 4: []}
    two.network.policy = lambda src, dst, message: delays[message.id]  # type: ignore[attr-defined]
    for number in delays:
        two.link.send(question(number))
    await two.server.until(lambda: len(two.server.heard) == 5)
    assert two.server.ids() == [0, 2, 3, 1, 3]
    assert (two.network.delivered, two.network.dropped, two.network.duplicated) == (5, 1, 1)
    first, second = (message for _, message in two.server.heard if message.id == 3)
    assert first is not second


async def test_equal_delays_keep_the_order_and_take_their_time(two: Two) -> None:
    two.network.policy = lambda src, dst, message: [0.1]
    start = asyncio.get_running_loop().time()
    for number in range(1, 101):
        two.link.send(question(number))
    await two.server.until(lambda: len(two.server.heard) == 101)
    assert two.server.ids() == list(range(101))
    assert asyncio.get_running_loop().time() - start >= 0.099


async def test_the_policy_knows_who_sends_what_to_whom(two: Two) -> None:
    seen = []
    two.network.policy = lambda src, dst, message: seen.append((src, dst, message)) or [0.0]  # type: ignore[func-returns-value]
    two.link.send(question(1))
    two.far.send(question(2))
    await two.client.until(lambda: two.client.heard)
    assert seen == [("a", "b", question(1)), ("b", "a", question(2))]


async def test_messages_are_copies(two: Two) -> None:
    message = large(1, 10)
    two.link.send(message)
    message.keys.append(b"later")
    await two.server.until(lambda: len(two.server.heard) == 2)
    assert two.server.heard[1][1].keys == [b"k"]


async def test_a_reply_is_never_delivered_within_send(two: Two) -> None:
    """A handler that answers may not be called again before it has returned."""
    depth = []

    def answer(link: Link, message: object) -> None:
        depth.append("in")
        link.send(question(len(depth)))
        assert depth[-1] == "in"
        depth.append("out")

    recorder = Recorder(lambda link, message: answer(link, message) if len(depth) < 20 else None)
    await MemoryTransport(two.network, "c").listen("c:1", recorder)
    link = await two.transport.connect("c:1", Recorder(lambda link, message: link.send(message)))
    link.send(question(1))
    await until(lambda: len(depth) == 20)
    assert depth == ["in", "out"] * 10


async def test_refused_or_unanswered_is_the_networks_choice(two: Two) -> None:
    loop = asyncio.get_running_loop()
    two.network.can_connect = lambda src, dst: (src, dst) != ("a", "b")
    start = loop.time()
    with pytest.raises(ConnectFailed, match="no answer in time"):
        await two.transport.connect("b:7000", Recorder(), timeout_s=0.2)
    assert loop.time() - start >= 0.19
    two.network.refuses = lambda src, dst: True
    with pytest.raises(ConnectFailed, match="refused"):
        await asyncio.wait_for(two.transport.connect("b:7000", Recorder(), timeout_s=60), 5)
    await MemoryTransport(two.network, "b").connect("b:7000", Recorder())


async def test_a_crash_with_notice(two: Two) -> None:
    two.far.send(question(1))
    two.network.crash("b", notice_after_s=0.05)
    with pytest.raises(LinkClosed):
        two.far.send(question(2))
    await two.client.until(lambda: two.client.closed)
    assert two.client.ids() == [1], "what had left arrives"
    assert [type(error) for error in two.client.errors(two.link)] == [LinkClosed]
    assert two.server.closed == [], "the dead are told nothing"
    with pytest.raises(ConnectFailed, match="refused"):
        await two.transport.connect("b:7000", Recorder())


async def test_a_crash_without_notice_leaves_links_half_open() -> None:
    two = await Two(**HASTY).start()
    two.network.crash("b")
    two.link.send(question(1))
    assert not two.link.closed
    await two.client.until(lambda: two.client.closed)
    assert "silent" in str(two.client.errors(two.link)[0])
    assert two.server.ids() == [0]


async def test_a_crashed_host_can_start_again_and_its_old_self_stays_dead(two: Two) -> None:
    old = two.listener
    two.network.crash("b", notice_after_s=0.0)
    await two.client.until(lambda: two.client.closed)
    recorder = Recorder()
    reborn = MemoryTransport(two.network, "b")
    await reborn.listen("b:7000", recorder)
    await old.close()
    link = await two.transport.connect("b:7000", Recorder())
    link.send(question(1))
    await recorder.until(lambda: recorder.heard)
    with pytest.raises(ConnectFailed):
        await old.transport.connect("b:7000", Recorder())  # type: ignore[attr-defined]
    with pytest.raises(ConnectFailed):
        await old.transport.listen("b:8000", Recorder())  # type: ignore[attr-defined]
    assert two.server.ids() == [0]


async def test_a_cut_link_is_told_to_both_sides(two: Two) -> None:
    other = await two.transport.connect("b:7000", two.client)
    two.network.cut(two.far)
    await two.client.until(lambda: two.client.closed)
    await two.server.until(lambda: two.server.closed)
    assert [type(error) for error in two.client.errors(two.link) + two.server.errors(two.far)] == [LinkClosed] * 2
    other.send(question(5))
    await two.server.until(lambda: 5 in two.server.ids())


async def test_closing_behind_a_partition_leaves_the_other_side_half_open() -> None:
    two = await Two(**HASTY).start()
    two.network.policy = lambda src, dst, message: []
    two.network.can_connect = lambda src, dst: False
    two.link.close()
    await two.client.until(lambda: two.client.closed)
    assert two.client.errors(two.link) == [None]
    assert not two.far.closed
    await two.server.until(lambda: two.server.closed)
    assert "silent" in str(two.server.errors(two.far)[0])


async def test_the_end_comes_after_what_is_still_under_way(two: Two) -> None:
    two.network.policy = lambda src, dst, message: [0.2 - message.id / 10]  # type: ignore[attr-defined]
    two.link.send(question(1))
    two.link.send(question(2))
    two.link.close()
    await two.server.until(lambda: two.server.closed)
    assert two.server.ids() == [0, 2, 1]
    assert two.server.errors(two.far) == [None]


async def test_a_host_that_crashes_while_it_closes_is_told_nothing(two: Two) -> None:
    two.far.close()
    two.network.crash("b")
    await two.client.until(lambda: two.client.closed)
    await asyncio.sleep(0)
    assert two.server.closed == []


async def test_lost_pings_alone_break_a_link() -> None:
    two = await Two(**HASTY).start()
    two.network.policy = lambda src, dst, message: [] if type(message) is Ping else [0.0]
    await two.client.until(lambda: two.client.closed)
    await two.server.until(lambda: two.server.closed)


async def test_ports_and_addresses() -> None:
    network = MemoryNetwork()
    transport = MemoryTransport(network, "a")
    first = await transport.listen("a:0", Recorder())
    second = await transport.listen("0.0.0.0:0", Recorder())
    assert [first.address, second.address] == ["a:40000", "a:40001"]
    with pytest.raises(ConnectFailed, match="in use"):
        await transport.listen("a:40001", Recorder())
    with pytest.raises(ConnectFailed, match="not an address of a"):
        await transport.listen("b:7000", Recorder())
    local = await transport.listen("unix:/run/a.sock", Recorder())
    assert local.address == "unix:/run/a.sock"
    (await transport.connect("unix:/run/a.sock", Recorder())).close()
    with pytest.raises(ConnectFailed):
        await MemoryTransport(network, "b").connect("unix:/run/a.sock", Recorder())


def _run(seed: int) -> list[str]:
    """The trace of three hosts that talk under random faults, on a loop whose time is not the machine's."""
    trace: list[str] = []

    async def main() -> None:
        draw = random.Random(seed)
        network = MemoryNetwork()
        network.trace = trace.append
        network.policy = lambda src, dst, message: [draw.choice((0.0, 0.001, 0.002))] * draw.choice((0, 1, 1, 1, 2))
        transports = [MemoryTransport(network, host, **PATIENT) for host in "abc"]
        echo = Recorder(lambda link, message: link.send(question(message.id - 1)) if message.id else None)
        for transport in transports:
            await transport.listen(f"{transport.host}:7000", echo)
        links = [await a.connect(f"{b.host}:7000", echo) for a in transports for b in transports if a is not b]
        for number, link in enumerate(links * 5):
            link.send(question(number % 7))
        await asyncio.sleep(0.5)
        network.crash("c", notice_after_s=0.01)
        links[0].close()
        await asyncio.sleep(0.5)

    class VirtualLoop(asyncio.SelectorEventLoop):
        now = 0.0

        def time(self) -> float:
            return self.now

        def _run_once(self) -> None:
            if not self._ready and self._scheduled:  # type: ignore[attr-defined]
                self.now = max(self.now, self._scheduled[0].when())  # type: ignore[attr-defined]
            super()._run_once()  # type: ignore[misc]

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())
    return trace


def test_the_same_seed_gives_the_same_trace() -> None:
    trace = _run(1)
    assert trace == _run(1)
    assert trace != _run(2)
    assert {line.split()[0] for line in trace} == {"connect", "deliver", "drop", "crash", "close"}
    assert trace[0] == "connect a:40000>b:7000"
    assert not any("0x" in line for line in trace)
