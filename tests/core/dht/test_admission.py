"""What is admitted: bursts are, a standing queue is not."""

from __future__ import annotations

import asyncio
import random
from collections import deque

import pytest
from cluster import LOST, Cluster

from agi.core.dht.client.asynchronous import CALLS_LEAST
from agi.core.dht.errors import BatchError, InvalidRequest, OutcomeUnknown, Overloaded
from agi.core.dht.protocol.admission import BURST_MAX, Admission
from agi.core.dht.protocol.messages import PutReply

DELAY_S, LEAST = 0.5, 100


class Server:
    """Answers calls in turn at a steady rate, so many at a time; `offer` brings so many a second, in steps of a
    millisecond."""

    def __init__(self, rate: float, lump: int = 1) -> None:
        self.admission = Admission(DELAY_S, LEAST)
        self.rate = rate
        self.lump = lump
        self.now = 0.0
        self.queue: deque[float] = deque()
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
            while self._part >= self.lump:
                self._part -= self.lump
                done = [self.queue.popleft() for _ in range(min(self.lump, len(self.queue)))]
                self.waits += [self.now - began for began in done]
                self.admission.leave(len(done), self.now)

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


def test_answers_that_come_many_at_a_time_do_not_make_bursts_of_a_load_that_is_too_much() -> None:
    server = Server(rate=10_000, lump=3000)
    server.offer(8_000, 2)
    server.offer(30_000, 30)
    late = server.waits[100_000:]
    assert max(late) < 1.1 * DELAY_S + 3000 / 10_000
    assert len(server.waits) > 0.95 * 30 * 10_000


def test_what_is_refused_elsewhere_is_no_work_done() -> None:
    """Else who is refused much, and at once, would be taken for fast, and more would be sent to be refused."""
    admission = Admission(DELAY_S, LEAST)
    for tick in range(300):
        now = tick / 100
        for ended, done in ((10, True), (1000, False)):
            admission.enter(ended)
            admission.leave(ended, now, done=done)
    admission.enter(1000)
    refused = [tick for tick in range(100) if not admission.admits(3.0 + tick / 100)]
    assert refused[0] == pytest.approx(50, abs=1)  # of 1000 a second no more than 500 may stand


async def test_a_client_counts_what_the_cluster_has_carried_out() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client(timeout=0.2)
        counted: list[tuple[int, bool]] = []

        class Noted(Admission):
            def leave(self, count: int, now: float, *, done: bool = True) -> None:
                counted.append((count, done))
                super().leave(count, now, done=done)

        client._admission = Noted(DELAY_S, LEAST)
        await client.put("k", b"1")
        await client.get_many(["k", "other"])
        await client.incr("n")
        await client.put("n", b"no number")
        with pytest.raises(InvalidRequest):
            await client.incr("n")
        cluster.rule(lambda src, dst, message: LOST if isinstance(message, PutReply) else None)
        with pytest.raises(OutcomeUnknown):
            await client.put("k", b"2")
        with pytest.raises(BatchError):
            await client.put_many({"k": b"3", "other": b"4"})
        assert counted == [(1, True), (2, True), (1, True), (1, True), (1, True), (1, False), (2, False)]


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
