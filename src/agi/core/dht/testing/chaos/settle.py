"""After the faults: the cluster has to become whole, its replicas equal, and what was acknowledged has to be there."""

from __future__ import annotations

import asyncio

from agi.core.dht.client import DHTClient
from agi.core.dht.errors import DHTError, Unavailable
from agi.core.dht.testing.chaos.auditor import Auditor, Held, Kind, same
from agi.core.dht.testing.chaos.load import PREFIX
from agi.core.dht.testing.chaos.nodes import Nodes
from agi.core.dht.testing.chaos.report import Journal

WHOLE_TIMEOUT_S = 120.0
EQUAL_TIMEOUT_S = 60.0
READ_TIMEOUT_S = 10.0
QUESTIONS_MAX = 16
"""Under way at once."""
POLL_S = 0.5


async def settle(nodes: Nodes, client: DHTClient, auditor: Auditor, journal: Journal) -> None:
    """The faults are undone and the load is over. Tells the auditor of all that is not as it has to be."""
    began = journal.now
    try:
        await _wait_members(nodes, client, journal)
        await client.wait_healthy(WHOLE_TIMEOUT_S)
    except DHTError as error:
        auditor.found(Kind.UNHEALTHY, "cluster", str(error), journal.now)
    journal.figures["whole_s"] = round(journal.now - began, 2)
    journal.say(f"whole again after {journal.now - began:.1f} s")

    began = journal.now
    repaired = await client.repair()
    for name, state in repaired.items():
        if "error" in state or state["failed"]:
            auditor.found(Kind.UNHEALTHY, name, f"repair: {state.get('error') or state['failed']}", journal.now)
    states = await client.status()
    journal.figures["reclaimed"] = sum(int(state.get("reclaim", {}).get("reclaimed", 0)) for state in states.values())
    journal.figures["repaired"] = sum(int(state.get("differences", 0)) for state in repaired.values())
    located = await _wait_equal(client, auditor.keys, journal)
    journal.figures["equal_s"] = round(journal.now - began, 2)
    journal.say(f"replicas compared {journal.now - began:.1f} s after that")
    await _read_all(client, auditor, located, journal)


async def _wait_members(nodes: Nodes, client: DHTClient, journal: Journal) -> None:
    """Every process that is to run is a member, and every member runs: joins and leaves have come to their end. A
    process that the cluster let go while it was down hears of it once it runs, and ends. Raises Unavailable."""
    until = journal.now + WHOLE_TIMEOUT_S
    while True:
        try:
            members = sorted(str(member["node_id"]) for member in (await client.topology())["members"])
        except DHTError:
            members = []
        wanted = sorted(node.name for node in nodes.all.values() if node.wanted)
        listening = sorted(node.name for node in nodes.all.values() if node.listens)
        if members == wanted == listening:
            return
        if journal.now > until:
            told = f"members are {', '.join(members)}; to run are {', '.join(wanted)}; {', '.join(listening)} run"
            raise Unavailable(f"after {WHOLE_TIMEOUT_S:g} s {told}")
        await asyncio.sleep(POLL_S)


async def _wait_equal(client: DHTClient, keys: list[str], journal: Journal) -> dict[str, dict[str, Held]]:
    """What the replicas of each key hold, once that is equal, or else at the end of the time; nothing is read, since
    a read would repair."""
    located: dict[str, dict[str, Held]] = {}
    until = journal.now + EQUAL_TIMEOUT_S
    waiting = keys
    places = asyncio.Semaphore(QUESTIONS_MAX)

    async def locate(key: str) -> None:
        async with places:
            try:
                replicas = (await client.locate(key))["replicas"]
            except DHTError:
                located.setdefault(key, {})
            else:
                located[key] = {name: Held.of(held) for name, held in replicas.items()}

    while True:
        await asyncio.gather(*map(locate, waiting))
        waiting = [key for key in waiting if not same(located[key])]
        if not waiting or journal.now > until:
            return located
        await asyncio.sleep(POLL_S)


async def _read_all(client: DHTClient, auditor: Auditor, located: dict[str, dict[str, Held]], journal: Journal) -> None:
    places = asyncio.Semaphore(QUESTIONS_MAX)
    values: dict[str, bytes | None] = {}

    async def read(key: str) -> None:
        async with places:
            try:
                entry = await client.get_entry(key, timeout=READ_TIMEOUT_S)
            except DHTError as error:
                auditor.found(Kind.UNREADABLE, key, str(error), journal.now)
                return
        values[key] = None if entry is None else entry.value
        auditor.final(key, values[key], 0 if entry is None else entry.version, located[key], journal.now)

    await asyncio.gather(*map(read, auditor.keys))
    try:
        found = {key: value async for key, value in client.iterate(PREFIX, timeout=READ_TIMEOUT_S)}
    except DHTError as error:
        auditor.found(Kind.UNREADABLE, PREFIX, f"scan: {error}", journal.now)
    else:
        auditor.scanned(found, values, journal.now)
