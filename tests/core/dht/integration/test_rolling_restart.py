"""Each of three processes is stopped and started again in its turn, under load at QUORUM: nobody notices."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

from process_harness import ONE_CLOCK

from agi.core.dht.client import DHTClient
from agi.core.dht.errors import DHTError
from agi.core.dht.local import LocalCluster
from agi.core.dht.types import Consistency


async def test_a_rolling_restart_fails_no_call_and_leaves_no_hint(tmp_path: Path) -> None:
    async with LocalCluster(3, tmp_path, settings=ONE_CLOCK) as cluster, DHTClient() as client:
        await client.connect(cluster.addresses)
        failures: list[str] = []
        written: dict[str, bytes] = {}
        calls = 0
        stop = False
        at = "before"

        async def load(number: int) -> None:
            nonlocal calls
            for turn in itertools.count():
                if stop:
                    return
                key, value = f"k{number}:{turn % 50}", b"%d" % turn
                try:
                    if turn % 7 == 3:
                        await client.put_many({f"{key}:{i}": value for i in range(5)})
                        written.update({f"{key}:{i}": value for i in range(5)})
                    elif turn % 50 == 49:
                        await client.scan(f"k{number}:", limit=100)
                    await client.put(key, value)
                    written[key] = value
                    found = await client.get(key)
                    assert found == value, (key, found, value)
                except (DHTError, AssertionError) as error:
                    failures.append(f"{at}: {error!r}")
                calls += 1
                await asyncio.sleep(0.002)

        workers = [asyncio.create_task(load(number)) for number in range(8)]
        await asyncio.sleep(0.5)
        for i in range(3):
            at = f"n{i} stops"
            assert await cluster.stop_node(i) == 0
            at = f"n{i} is down"
            await asyncio.sleep(0.3)
            at = f"n{i} starts"
            await cluster.start_node(i)
            await client.wait_healthy(30)
            at = f"n{i} is back"
            await asyncio.sleep(0.3)
        stop = True
        await asyncio.gather(*workers)
        assert failures == []
        assert calls > 300
        await client.wait_healthy(30)
        states = await client.status()
        assert [state["hints"] for state in states.values()] == [{}, {}, {}]
        assert await client.get_many(written, consistency=Consistency.ALL) == written
