"""The load process of systems/dragon.py: `dragon -s dragon_load.py PORT` runs it inside Dragon's runtime.

It makes the dictionary, connects to the harness, does what it is told, and ends when the harness hangs up.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
from bench.peers.base import Calls, PeerFailed
from bench.peers.loads import FILL_TIMEOUT_S, fill, measure
from bench.peers.processes import HOST, MARK, marked
from bench.peers.systems.dragon import CALLERS_MAX, LINE_BYTES_MAX, PEERS, Answer, Order

MANAGERS = 3
MEMORY_BYTES = MANAGERS * (256 << 20)


async def calls_of(dictionary: Any, threads: ThreadPoolExecutor, attach: Any) -> Calls:
    """One handle serves one thread at a time: each thread of the pool attaches for itself, before anything is timed."""
    loop = asyncio.get_running_loop()
    local = threading.local()
    whole = dictionary.serialize()

    def mine() -> Any:
        if not hasattr(local, "handle"):
            local.handle = attach(whole)
        return local.handle

    def store(key: str, value: bytes) -> None:
        mine()[key] = value

    def store_many(items: dict[str, bytes]) -> None:
        handle = mine()
        handle.start_batch_put(persist=False)
        for key, value in items.items():
            handle[key] = value
        handle.end_batch_put()

    together = threading.Barrier(CALLERS_MAX)  # so that no thread does it twice

    def attached() -> None:
        mine()
        together.wait(FILL_TIMEOUT_S)

    await asyncio.gather(*(loop.run_in_executor(threads, attached) for _ in range(CALLERS_MAX)))

    async def get(key: str) -> bytes | None:
        value: bytes = await loop.run_in_executor(threads, lambda: mine()[key])
        return value

    async def put(key: str, value: bytes) -> None:
        await loop.run_in_executor(threads, store, key, value)

    async def put_many(items: dict[str, bytes]) -> None:
        await loop.run_in_executor(threads, store_many, items)

    return Calls(get=get, put=put, put_many=put_many)


async def _serve(port: int, dictionary: Any, attach: Any) -> None:
    reader, writer = await asyncio.open_connection(HOST, port, limit=LINE_BYTES_MAX)
    threads = ThreadPoolExecutor(CALLERS_MAX)
    calls: Calls | None = None
    mark = os.environ[MARK]
    while line := await reader.readline():
        order = msgspec.json.decode(line, type=Order)
        try:
            if calls is None:
                calls = await calls_of(dictionary, threads, attach)
            if order.cell is None:
                await fill(calls, PEERS[0].facts, order.plan)
                answer = Answer()
            else:
                answer = Answer(await measure(calls, marked(mark), order.plan, order.cell, order.seed))
        except (PeerFailed, ExceptionGroup, threading.BrokenBarrierError) as error:
            answer = Answer(error=str(error))
        writer.write(msgspec.json.encode(answer) + b"\n")
        await writer.drain()
    threads.shutdown(wait=False, cancel_futures=True)


def main() -> None:
    from dragon.data.ddict import DDict

    multiprocessing.set_start_method("dragon")
    dictionary = DDict(MANAGERS, 1, MEMORY_BYTES)
    try:
        asyncio.run(_serve(int(sys.argv[1]), dictionary, DDict.attach))
    finally:
        dictionary.destroy()


if __name__ == "__main__":
    main()
