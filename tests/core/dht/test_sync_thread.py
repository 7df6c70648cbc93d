"""The thread that does a store's blocking work: its order, its errors, and pauses that other work ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from agi.core.dht.errors import Overloaded, StorageError
from agi.core.dht.storage import sync_thread
from agi.core.dht.storage.sync_thread import SyncThread

SOON_S = 10.0
LONG_S = 300.0


@contextmanager
def running() -> Iterator[SyncThread]:
    thread = SyncThread("test")
    yield thread
    thread.stop()
    thread.join(SOON_S)
    assert not thread._thread.is_alive()


async def test_work_is_done_in_order_and_each_hears_of_its_own_end() -> None:
    said: list[object] = []
    ended = asyncio.Event()

    def broken() -> None:
        raise StorageError("broken")

    with running() as thread:
        thread.submit(lambda: said.append("first"), lambda error: said.append(error))
        thread.submit(broken, lambda error: said.append(str(error)))
        thread.pause(0.001, lambda error: said.append(error))
        thread.submit(lambda: said.append("last"), lambda error: ended.set())
        async with asyncio.timeout(SOON_S):
            await ended.wait()
    assert said[0] == "first" and sorted(map(str, said[1:])) == ["None", "None", "broken", "last"]
    assert thread.pending == 0


async def test_a_pause_ends_by_itself_or_with_the_next_work() -> None:
    with running() as thread:
        for seconds, work in ((0.001, False), (LONG_S, True)):
            paused, worked = asyncio.Event(), asyncio.Event()
            thread.pause(seconds, lambda error, paused=paused: paused.set())  # type: ignore[misc]  # it is called with one
            if work:
                await asyncio.sleep(0.01)
                assert not paused.is_set()
                thread.submit(lambda: None, lambda error, worked=worked: worked.set())  # type: ignore[misc]  # the same
            async with asyncio.timeout(SOON_S):
                await paused.wait()
                if work:
                    await worked.wait()


async def test_who_stops_does_not_wait_for_a_pause() -> None:
    with running() as thread:
        thread.pause(LONG_S, lambda error: None)


async def test_the_queue_is_bounded_for_pauses_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync_thread, "QUEUE_ITEMS_MAX", 1)
    gate = threading.Event()
    with running() as thread:
        thread.submit(lambda: gate.wait(SOON_S) and None, lambda error: None)
        with pytest.raises(Overloaded):
            thread.pause(0.001, lambda error: None)
        gate.set()
