"""What is admitted: bursts are, a standing queue is not."""

from __future__ import annotations

import asyncio
import random

import pytest
from cluster import LOST, Cluster

from agi.core.dht.client.asynchronous import CALLS_LEAST
from agi.core.dht.errors import BatchError, InvalidRequest, OutcomeUnknown, Overloaded
from agi.core.dht.protocol.admission import BURST_MAX, Admission
from agi.core.dht.protocol.messages import PutReply

DELAY_S, LEAST = 0.5, 100


class Server:
    """Answers calls in turn at a steady rate; `offer` brings so many a second, in steps of a millisecond."""

    def __init__(self, rate: float) -> None:
        self.admission = Admission(DELAY_S, LEAST)
        self.rate = rate
        self.now = 0.0
        self.queue: list[float] = []
        self.waits: list[float] = []
        self.refused = 0
        self._part = 0.0

    def offer(self, rate: float, seconds: float) -> None:
        self.waits, self.refused = [], 0
        rng, coming = random.Random(1), 0.0
        for _ in range(int(seconds * 1000)):
            self.now += 0.001
            coming += rate / 1000 * rng.uniform(0.5, 1.5)
            while coming >= 1:
                coming -= 1
                self.call()
            self._part += self.rate / 1000
            while self._part >= 1:
                self._part -= 1
                if self.queue:
                    self.waits.append(self.now - self.queue.pop(0))
                    self.admission.leave(1, self.now)

    def call(self) -> None:
        if self.admission.admits(self.now):
            self.admission.enter(1)
            self.queue.append(self.now)
        else:
            self.refused += 1


def test_nothing_is_refused_where_work_ends_as_fast_as_it_comes() -> None:
    server = Server(rate=10_000)
    server.offer(9_000, 20)
    assert server.refused == 0 and max(server.waits) < 0.05


@pytest.mark.parametrize("times", [1.5, 3, 20])
def test_past_what_can_be_done_what_is_taken_ends_in_time(times: float) -> None:
    server = Server(rate=10_000)
    server.offer(8_000, 2)
    server.offer(10_000 * times, 30)
    assert len(server.waits) > 0.99 * 30 * 10_000  # it is never idle
    late = server.waits[100_000:]  # until it stands, a queue is taken for a burst
    assert max(late) < 1.1 * DELAY_S
    assert max(server.waits) < min(DELAY_S * (times + 1), (BURST_MAX + 1) / 10_000)
    server.offer(5_000, 5)
    assert server.refused == 0 and max(server.waits[-5_000:]) < 0.05


def test_a_burst_is_taken_whole() -> None:
    server = Server(rate=10_000)
    server.offer(1_000, 1)
    for _ in range(50_000):
        server.call()
    assert server.refused == 0
    server.offer(0, 6)
    assert not server.queue and server.admission.pending == 0


def test_who_does_nothing_any_more_is_given_no_more_than_waits_already() -> None:
    server = Server(rate=10_000)
    server.offer(9_000, 2)
    server.rate = 0
    server.offer(9_000, 10)
    assert len(server.queue) < 9_000 * 2 * DELAY_S + 10_000 * DELAY_S + LEAST
    server.rate = 10_000
    server.offer(5_000, 2)
    server.offer(5_000, 2)
    assert server.refused == 0


def test_slow_work_may_have_the_least_under_way() -> None:
    server = Server(rate=10)
    for _ in range(40):
        for _ in range(LEAST - len(server.queue)):
            server.call()
        server.offer(0, 0.5)
    assert server.refused == 0


async def test_a_client_refuses_what_would_wait_too_long() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client(queue_s=0.05)
        many = {f"k{n}": b"v" for n in range(CALLS_LEAST + 1)}
        lost = cluster.rule(lambda src, dst, message: LOST if isinstance(message, PutReply) else None)
        waiting = asyncio.ensure_future(client.put_many(many, timeout=3.0))
        await asyncio.sleep(0)
        burst = asyncio.ensure_future(client.put("burst", b"v", timeout=3.0))
        await asyncio.sleep(0.2)
        for call in (client.put("k", b"v"), client.get("k"), client.get_many(["k"]), client.incr("n")):
            with pytest.raises(Overloaded, match="4098 calls wait for the cluster already"):
                await call
        lost()
        with pytest.raises(OutcomeUnknown):
            await burst
        with pytest.raises(BatchError):
            await waiting
        await client.put("k", b"v")
        for wrong in (0, -1.0, True, "1"):
            with pytest.raises(InvalidRequest, match="timeout"):
                await cluster.client(queue_s=wrong)


async def test_a_lock_is_kept_and_given_back_however_much_waits_at_its_client() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client(queue_s=0.05)
        async with client.lock("kept", ttl=0.6) as lock:
            many = {f"k{n}": b"v" for n in range(CALLS_LEAST + 1)}
            cluster.rule(lambda src, dst, message: LOST if isinstance(message, PutReply) else None)
            waiting = asyncio.ensure_future(client.put_many(many, timeout=4.0))
            refused = 0
            while refused < 20:
                await asyncio.sleep(0.05)
                lock.check()
                try:
                    await client.incr("n")
                except Overloaded:
                    refused += 1
        assert not waiting.done()
        status = await (await cluster.client()).lock_status("kept")
        assert status is not None and not status.holder
        with pytest.raises(BatchError):
            await waiting


async def test_nodes_take_what_keeps_a_lock_however_much_waits() -> None:
    async with Cluster(1) as cluster:
        client = await cluster.client()
        coordinator = cluster.node(0).coordinator
        assert coordinator is not None
        coordinator._requests._admission.enter(BURST_MAX)
        with pytest.raises(Overloaded, match="keys wait at"):
            await client.put("k", b"v", timeout=0.5)
        async with client.lock("kept", ttl=0.6) as lock:
            await asyncio.sleep(1.0)
            lock.check()
        with pytest.raises(Overloaded, match="keys wait at"):
            await client.put("k", b"v", timeout=0.5)
