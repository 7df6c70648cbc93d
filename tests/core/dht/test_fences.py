"""Fences: what a former holder of a lock still sends is refused by whoever decides on the key (L3)."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from cluster import Cluster

from agi.core.dht import (
    Consistency,
    DHTClient,
    DHTError,
    Fence,
    FenceRejected,
    InvalidKey,
    InvalidRequest,
    VersionConflict,
    WrongFence,
)
from agi.core.dht.errors import from_wire
from agi.core.dht.protocol.consensus import (
    ADD,
    IF_VERSION,
    LOOK,
    PUT,
    REMOVE,
    Body,
    State,
    apply,
    ballot,
    register_of,
    state_of,
)
from agi.core.dht.protocol.messages import Op, Update

NOW_MS = 1_700_000_000_000
LOCK, OTHER = b"lock:l", b"lock:m"
_VERSIONS = itertools.count(1000)


def step(state: State, op: Op, now_ms: int = NOW_MS) -> tuple[State, DHTError | None]:
    after, result = apply(op, b"k", state, now_ms, lambda above: max(above + 1, next(_VERSIONS)))
    return after, None if result.error is None else from_wire(*result.error)


def op(kind: int, token: int = 0, lock: bytes = LOCK, **fields: int) -> Op:
    made = Op(bytes(15) + b"n", b"k", kind, value=b"v", fence=(lock, token) if token else None)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize("kind", [PUT, REMOVE, LOOK])
def test_the_mark_rises_and_never_falls(kind: int) -> None:
    state, error = step(State(), op(kind, 5))
    assert error is None and state.fence == (LOCK, 5)
    state, error = step(state, op(kind, 5))
    assert error is None and state.fence == (LOCK, 5)
    state, error = step(state, op(kind, 9))
    assert error is None and state.fence == (LOCK, 9)
    for late in (PUT, REMOVE, LOOK, ADD):
        after, error = step(state, op(late, 8))
        assert type(error) is FenceRejected and after == state
        after, error = step(state, op(late, 10, OTHER))
        assert type(error) is WrongFence and after == state


def test_what_has_no_fence_passes_and_leaves_the_mark() -> None:
    state, _ = step(State(), op(PUT, 5))
    for kind in (PUT, LOOK, REMOVE):
        state, error = step(state, op(kind))
        assert error is None and state.fence == (LOCK, 5)


def test_a_look_keeps_the_version_that_writes_are_bound_to() -> None:
    state, _ = step(State(), op(PUT, 5))
    seen, _ = step(state, op(LOOK, 6))
    assert seen == state._replace(fence=(LOCK, 6))
    after, error = step(seen, op(PUT, 6, condition=IF_VERSION, version=state.version))
    assert error is None and after.version > state.version


def test_a_condition_that_fails_does_not_raise_the_mark() -> None:
    state, _ = step(State(), op(PUT, 5))
    after, error = step(state, op(PUT, 6, condition=IF_VERSION, version=1))
    assert type(error) is VersionConflict and after == state


def test_the_mark_outlives_expiry_and_deletion() -> None:
    state, _ = step(State(), op(PUT, 5, ttl_ms=1000))
    seen, error = step(state, op(LOOK), NOW_MS + 2000)
    assert error is None and seen.value is None and seen.fence == (LOCK, 5)
    after, error = step(state, op(PUT, 4), NOW_MS + 2000)
    assert type(error) is FenceRejected and after.value is None and after.fence == (LOCK, 5)
    state, _ = step(seen, op(REMOVE), NOW_MS + 3000)
    assert type(step(state, op(PUT, 4))[1]) is FenceRejected


def test_the_mark_is_in_the_record_and_older_records_have_none() -> None:
    for value in (b"v", None):
        state = State(7, value, 0, NOW_MS, (), (LOCK, 5))
        assert state_of(register_of(b"k", ballot(NOW_MS, 1), state)) == state
    older = msgspec.msgpack.encode((7, 0, [], b"v"))
    assert msgspec.msgpack.decode(older, type=Body).fence is None
    assert msgspec.msgpack.decode(msgspec.msgpack.encode((bytes(16), b"k", 0)), type=Op).fence is None


async def test_replicas_refuse_a_former_holder() -> None:
    async with Cluster(3) as cluster:
        old, new = await cluster.client(0), await cluster.client(1)
        await old.put("k", b"1", fence=Fence("l", 5))
        await new.put("k", b"2", fence=Fence("l", 9))
        with pytest.raises(FenceRejected):
            await old.put("k", b"late", fence=Fence("l", 5))
        with pytest.raises(FenceRejected):
            await old.delete("k", fence=Fence("l", 5))
        with pytest.raises(FenceRejected):
            await old.get("k", fence=Fence("l", 8))
        with pytest.raises(WrongFence):
            await old.put("k", b"other", fence=Fence("m", 99))
        assert await new.get("k") == b"2"
        assert await new.delete("k", fence=Fence("l", 9))
        with pytest.raises(FenceRejected):
            await old.put("k", b"back", fence=Fence("l", 5))
        with pytest.raises(WrongFence):
            await old.put("k", b"back", fence=Fence("m", 99), if_absent=True)
        assert await new.get("k") is None
        await old.put("k", b"plain")  # nothing is asked of who shows nothing
        with pytest.raises(FenceRejected):
            await old.put("k", b"late", fence=Fence("l", 8))
        assert await new.get("k") == b"plain"


async def test_a_get_keeps_former_holders_out_too() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        version = await client.put("k", b"1", fence=Fence("l", 5))
        assert await client.get("k", fence=Fence("l", 9)) == b"1"
        with pytest.raises(FenceRejected):
            await client.put("k", b"late", fence=Fence("l", 5))
        assert await client.put("k", b"2", fence=Fence("l", 9), if_version=version) > version
        assert await client.get("nothing", fence=Fence("l", 9)) is None
        with pytest.raises(FenceRejected):
            await client.put("nothing", b"late", fence=Fence("l", 5))
        assert await client.get("nothing", consistency=Consistency.LINEARIZABLE) is None


async def test_the_mark_outlives_its_coordinator_and_a_ttl() -> None:
    async with Cluster(3) as cluster:
        client = await cluster.client()
        await client.put("k", b"1", fence=Fence("l", 9), ttl_seconds=100)
        for clock in cluster.clocks:
            clock.ahead_ms += 101_000
        assert await client.get("k") is None
        for i in range(3):
            await cluster.down(i)
            with pytest.raises(FenceRejected):
                await client.put("k", b"late", fence=Fence("l", 5))
            await cluster.up(i)
        assert await client.get("k") is None


async def test_bad_fences_change_nothing() -> None:
    for lock, token in (("", 1), ("l", 0), ("l", -1), ("l", 1 << 63), ("l", True), ("l", 1.5), (7, 1), ("x" * 1020, 1)):
        with pytest.raises(InvalidRequest) as caught:
            Fence(lock, token)  # type: ignore[arg-type]  # that is the test
        assert isinstance(caught.value, InvalidKey) == (token == 1 and token is not True)

    async def refused(client: DHTClient) -> None:
        for fence in (7, "l", object(), ("l", 1)):
            with pytest.raises(InvalidRequest):
                await client.put("k", b"x", fence=fence)  # type: ignore[arg-type]  # that is the test
            with pytest.raises(InvalidRequest):
                await client.get("k", fence=fence)  # type: ignore[arg-type]  # that is the test

    async with Cluster(3) as cluster:
        client, wire = await cluster.client(), await cluster.wire(0)
        await refused(client)
        for number, fence in enumerate([(b"", 1), (b"l", 0), (b"l", 1 << 63), (b"x" * 2000, 1)]):
            reply = await wire.ask(Update(0, 1000, [Op(number.to_bytes(16, "big"), b"k", PUT, fence=fence)]))
            assert type(from_wire(*reply.error)) is InvalidRequest
        assert await client.get("k") is None and cluster.held("k") == [None] * 3
