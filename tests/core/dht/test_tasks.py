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


async def test_all_results_come_in_order_and_the_first_error_ends_the_rest() -> None:
    async def after(turns: int, result: int) -> int:
        for _ in range(turns):
            await asyncio.sleep(0)
        if result < 0:
            raise ValueError(result)
        return result

    assert await tasks.all_of([after(3, 1), after(0, 2), after(1, 3)]) == [1, 2, 3]
    assert await tasks.all_of([]) == []
    before = asyncio.all_tasks()
    with pytest.raises(ValueError, match="-1"):
        await tasks.all_of([after(10_000, 1), after(1, -1), after(10_000, 2)])
    assert asyncio.all_tasks() == before


async def test_a_failure_on_the_way_out_does_not_hide_the_cancellation() -> None:
    async def fails() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise ValueError("lost") from None

    whole = asyncio.create_task(tasks.all_of([fails(), fails()]))
    await asyncio.sleep(0.01)
    whole.cancel()
    with pytest.raises(asyncio.CancelledError):
        await whole
