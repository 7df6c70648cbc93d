"""Tasks are ended, whatever they make of a cancellation."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from agi.core.dht import tasks


async def test_a_task_that_loses_a_cancellation_is_cancelled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "CANCEL_AGAIN_S", 0.01)
    lost = 0

    async def deaf() -> None:
        nonlocal lost
        for _ in range(3):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(60)
            lost += 1
        await asyncio.sleep(60)

    async def fails() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            raise ValueError("on the way out")

    async def quick() -> None:
        return None

    running = [asyncio.create_task(each()) for each in (deaf, fails, quick)]
    await asyncio.sleep(0.01)
    async with asyncio.timeout(5):
        await tasks.end(running)
    assert lost == 3 and all(task.done() for task in running)
    await tasks.end([])
