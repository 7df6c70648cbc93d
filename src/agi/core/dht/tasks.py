"""Ending asyncio tasks for good."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")

CANCEL_AGAIN_S = 0.5


async def end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancels these tasks and returns once all have ended, however they end.

    One cancellation can get lost: to a library that takes it for one of its own (grpc.aio, now and then), or to code
    that meets it while it handles another error. So what still runs after a while is cancelled again.
    """
    pending = list(dict.fromkeys(tasks))  # in order, as a set's is that of addresses
    while pending:
        for task in pending:
            task.cancel()
        ended, _ = await asyncio.wait(pending, timeout=CANCEL_AGAIN_S)
        pending = [task for task in pending if task not in ended]
        for task in ended:
            if not task.cancelled():
                task.exception()  # whoever owns the task has its own eyes on it


async def all_of(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results, in order, once all are done; at the first error the others are cancelled and it is raised. Unlike
    `asyncio.gather`, one that fails while the whole is being cancelled does not take the place of the cancellation."""
    tasks = [asyncio.ensure_future(each) for each in work]
    if not tasks:
        return []
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            if task in done and not task.cancelled() and (error := task.exception()) is not None:
                raise error
        return [task.result() for task in tasks]
    finally:
        await end(tasks)
