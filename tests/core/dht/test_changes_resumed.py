"""A change goes on where it was when a node that is filled, or one that it is filled from, crashes amid it and comes
back with its disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest
from cluster import LOST, Cluster, until
from test_changes import HASTY, KEYS, away, filled, placed

from agi.core.dht.node import Node
from agi.core.dht.protocol.messages import ArcListReply, Message, TreeFetchReply

pytestmark = pytest.mark.usefixtures("hurried")
LISTS = 2
"""Lists that the joiner gets before it gets no more; there are far more."""
PATIENT = {**HASTY, "dht.migration.join_timeout_ms": 60_000, "dht.migration.eviction_timeout_ms": 300}
"""No change is given up here, and nobody is evicted amid one."""


async def half_filled(cluster: Cluster, hampered: Callable[[str], bool]) -> tuple[Node, Callable[[], None]]:
    """A fourth node joins, and stops amid its fill, as these sources do not answer it any more. Returns what lets it go
    on, too."""
    heard = 0

    def rule(src: str, dst: str, message: Message) -> Sequence[float] | None:
        nonlocal heard
        if dst != "n3" or not hampered(src) or not isinstance(message, ArcListReply | TreeFetchReply):
            return None
        heard += isinstance(message, ArcListReply)
        return None if heard <= LISTS else LOST

    end = cluster.rule(rule)
    joiner = await cluster.add(wait=False)
    await until(lambda: heard > LISTS and joiner.migration.keys > 0)
    await until(lambda: all(node.topology and node.topology.in_transition for node in cluster.living()))
    assert not joiner.migration.ready
    return joiner, end


async def test_a_joiner_that_crashes_amid_its_fill_goes_on_with_what_it_has() -> None:
    async with Cluster(3, settings=PATIENT) as cluster:
        client = await filled(cluster)
        joiner, end = await half_filled(cluster, lambda source: True)
        brought = joiner.migration.keys
        await cluster.down(3)
        await away(cluster, 3)
        held = {key for key in KEYS if cluster.held(key)[3] is not None}
        assert held
        await client.put_many(dict.fromkeys(KEYS[:10], b"new"))  # meanwhile
        end()
        again = await cluster.up(3, wait=False)
        assert again.identity.disk_id == joiner.identity.disk_id
        await cluster.settled()
        assert cluster.node(0).epoch == 3  # formed, transition, final: nothing was given up
        assert placed(cluster)
        own = {key for key in KEYS if 3 in cluster.holders(key)}
        assert held < own
        assert again.migration.keys <= len(own) - brought + 10  # of what it had, only what is newer came again
        expected = {key: b"new" if key in KEYS[:10] else key.encode() for key in KEYS}
        assert await client.get_many(KEYS) == expected
        assert not cluster.fatal


@pytest.mark.parametrize("source", [0, 2])
async def test_a_source_that_crashes_amid_the_fill_is_asked_again(source: int) -> None:
    """Of three sources two are needed, and another one does not answer the joiner at all."""
    mute, crashing = f"n{2 - source}", f"n{source}"
    async with Cluster(3, settings=PATIENT) as cluster:
        client = await filled(cluster)
        cluster.rule(lambda src, dst, m: LOST if (src, dst) == (mute, "n3") and isinstance(m, ArcListReply) else None)
        joiner, end = await half_filled(cluster, lambda source: source == crashing)
        epoch = cluster.node(source).epoch
        await cluster.down(source)
        await away(cluster, source)
        end()
        await asyncio.sleep(0.5)
        assert not joiner.migration.ready
        again = await cluster.up(source, wait=False)
        assert again.epoch == epoch == 2  # it comes back in the transition
        await until(lambda: joiner.migration.ready)
        await cluster.settled()
        assert cluster.node(1).epoch == 3
        assert placed(cluster)
        assert await client.get_many(KEYS) == {key: key.encode() for key in KEYS}
        assert not cluster.fatal
