"""The gRPC service in front of real nodes: every method, every refusal, retries, deadlines, health and reflection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from cluster import LOST, Cluster, until
from grpc import aio
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub

from agi.core.dht import service as service_module
from agi.core.dht import service_health
from agi.core.dht.errors import DHTError, FenceRejected
from agi.core.dht.node import Node
from agi.core.dht.proto import dht_pb2 as pb
from agi.core.dht.proto.dht_pb2_grpc import DHTStub
from agi.core.dht.protocol.consensus import COUNTER_MAX, WINDOW, is_register
from agi.core.dht.protocol.messages import (
    Message,
    Put,
    RegisterAccept,
    RegisterPrepare,
    RegisterPromises,
    ReplicaRead,
    ReplicaScan,
    ReplicaWrite,
)
from agi.core.dht.protocol.record import hlc_of
from agi.core.dht.service import Service
from agi.core.dht.service_messages import BATCH_KEYS_MAX, CLIENT_ID_BYTES_MAX, cursor_of
from agi.core.dht.transport.grpc import CHANNEL_OPTIONS, SERVER_OPTIONS
from agi.core.dht.types import KEY_BYTES_MAX, SCAN_LIMIT_MAX, TTL_MS_MAX, VALUE_BYTES_MAX, Consistency, Fence

INVALID = grpc.StatusCode.INVALID_ARGUMENT
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
UNKNOWN = grpc.StatusCode.UNKNOWN
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
FAILED = grpc.StatusCode.FAILED_PRECONDITION
PATIENT_S = 10.0
"""The deadline of calls that are to succeed."""


@dataclass
class Served:
    service: Service
    channel: aio.Channel
    address: str
    fatal: list[DHTError]

    @property
    def stub(self) -> Any:
        """Untyped: the generated stubs describe the sync calls."""
        return DHTStub(self.channel)

    async def put(self, key: str, value: bytes = b"v", timeout: float = PATIENT_S, **more: Any) -> int:
        response = await self.stub.Put(pb.PutRequest(key=key, value=value, **more), timeout=timeout)
        return int(response.version)

    async def get(self, key: str, timeout: float = PATIENT_S, **more: Any) -> pb.GetResponse:
        response: pb.GetResponse = await self.stub.Get(pb.GetRequest(key=key, **more), timeout=timeout)
        return response

    async def delete(self, key: str, timeout: float = PATIENT_S, **more: Any) -> bool:
        return bool((await self.stub.Delete(pb.DeleteRequest(key=key, **more), timeout=timeout)).existed)

    async def swap(
        self, key: str, expected: bytes | None, value: bytes | None, timeout: float = PATIENT_S, **more: Any
    ) -> int:
        request = pb.CompareAndSetRequest(key=key, expected=expected, value=value, **more)
        return int((await self.stub.CompareAndSet(request, timeout=timeout)).version)

    async def add(self, key: str, delta: int = 1, timeout: float = PATIENT_S, **more: Any) -> int:
        return int(
            (await self.stub.Increment(pb.IncrementRequest(key=key, delta=delta, **more), timeout=timeout)).value
        )

    async def scan(self, **fields: Any) -> pb.ScanResponse:
        response: pb.ScanResponse = await self.stub.Scan(pb.ScanRequest(**fields), timeout=PATIENT_S)
        return response


@asynccontextmanager
async def serving(node: Node, options: Any = CHANNEL_OPTIONS) -> AsyncIterator[Served]:
    server = aio.server(options=SERVER_OPTIONS)
    fatal: list[DHTError] = []
    service = Service(node, fatal.append)
    service.register(server)
    port = server.add_insecure_port("127.0.0.1:0")
    service.start()
    await server.start()
    address = f"127.0.0.1:{port}"
    try:
        async with aio.insecure_channel(address, options=options) as channel:
            yield Served(service, channel, address, fatal)
    finally:
        await service.stop()
        await server.stop(0)
    assert not fatal


@pytest.fixture
async def one() -> AsyncIterator[Served]:
    """A cluster of one node."""
    async with Cluster(1) as cluster, serving(cluster.node(0)) as served:
        yield served


async def failure(call: Awaitable[Any]) -> tuple[grpc.StatusCode, pb.ErrorDetail]:
    """How a call ended that must fail by an error of ours."""
    with pytest.raises(aio.AioRpcError) as caught:
        await call
    details = [value for key, value in caught.value.trailing_metadata() or () if key == "dht-error-bin"]
    assert len(details) == 1 and isinstance(details[0], bytes), f"not an error of ours: {caught.value}"
    detail = pb.ErrorDetail.FromString(details[0])
    assert detail.message and detail.message in str(caught.value.details())
    return caught.value.code(), detail


def lose(*kinds: type[Message]) -> Callable[[str, str, Message], Any]:
    return lambda src, dst, message: LOST if isinstance(message, kinds) else None


# --- single keys


@pytest.mark.parametrize("value", [b"", b"v", bytes(range(256)) * 4096], ids=["empty", "short", "1 MiB"])
@pytest.mark.parametrize("key", ["k", "ключ:鍵:\U0001f600", "a b\n\0", "x" * KEY_BYTES_MAX], ids=range(4))
async def test_what_is_put_is_got_until_it_is_deleted(key: str, value: bytes) -> None:
    async with Cluster(3) as cluster, serving(cluster.node(0)) as served:
        assert await served.get(key) == pb.GetResponse()
        before_ms = cluster.clocks[0].wall_ms()
        version = await served.put(key, value)
        got = await served.get(key)
        assert got.found and got.record.value == value and got.record.version == version
        assert got.record.updated_at_ms == version >> 16 >= before_ms
        assert got.record.created_at_ms >= before_ms and got.record.expires_at_ms == 0
        assert await served.put(key, value + b"2") > version
        again = await served.get(key)
        assert again.record.value == value + b"2" and again.record.created_at_ms == got.record.created_at_ms
        delete = pb.DeleteRequest(key=key)
        assert (await served.stub.Delete(delete, timeout=PATIENT_S)).existed
        assert not (await served.stub.Delete(delete, timeout=PATIENT_S)).existed
        assert await served.get(key) == pb.GetResponse()


async def test_the_largest_value_fits(one: Served) -> None:
    value = b"x" * VALUE_BYTES_MAX
    key = "k" * KEY_BYTES_MAX
    await one.put(key, value)
    assert (await one.get(key)).record.value == value
    page = await one.scan()
    assert [entry.key for entry in page.entries] == [key] and page.entries[0].record.value == value
    batch = await one.stub.BatchGet(pb.BatchGetRequest(keys=[key]), timeout=PATIENT_S)
    assert batch.results[0].record.value == value


async def test_a_ttl_becomes_a_time_of_expiry(one: Served) -> None:
    version = await one.put("k", ttl_ms=3_600_000)
    assert (await one.get("k")).record.expires_at_ms - (version >> 16) in range(3_599_000, 3_601_000)
    await one.put("short", ttl_ms=1)
    async with asyncio.timeout(PATIENT_S):
        while (await one.get("short")).found:
            pass


async def test_levels_count_the_replicas_and_have_their_defaults_from_the_configuration() -> None:
    settings = {"dht.replication.read_consistency": "ONE", "dht.replication.write_consistency": "ALL"}
    async with Cluster(3, settings=settings) as cluster, serving(cluster.node(0)) as served:
        await served.put("k")
        await cluster.down(2)
        assert (await failure(served.put("k")))[1].needed == 3  # the configured ALL
        gone = served.stub.Delete(pb.DeleteRequest(key="k"), timeout=PATIENT_S)
        assert (await failure(gone))[1].needed == 3
        assert (await served.get("k", consistency=Consistency.QUORUM)).found
        await served.put("k", b"2", consistency=Consistency.QUORUM)
        await cluster.down(1)
        assert (await served.get("k")).record.value == b"2"  # the configured ONE
        status, detail = await failure(served.get("k", consistency=Consistency.QUORUM))
        assert (status, detail.code, detail.needed, detail.answered) == (UNAVAILABLE, 30, 2, 1) and detail.retryable
        delete = pb.DeleteRequest(key="k", consistency=Consistency.ONE)
        assert (await served.stub.Delete(delete, timeout=PATIENT_S)).existed


# --- refusals

LONG = "k" * (KEY_BYTES_MAX + 1)
BIG = b"x" * (VALUE_BYTES_MAX + 1)
BAD_FENCES = [
    (pb.Fence(), 11),
    (pb.Fence(token=1), 11),
    (pb.Fence(lock="x" * (KEY_BYTES_MAX - 4), token=1), 11),  # with `lock:` one byte more than a key may have
    (pb.Fence(lock="l"), 10),
    (pb.Fence(lock="l", token=1 << 63), 10),
    (pb.Fence(lock="l", token=2**64 - 1), 10),
]
REFUSALS: list[tuple[str, Any, int]] = [
    *[("Get", pb.GetRequest(key="k", fence=fence), code) for fence, code in BAD_FENCES],
    *[("Put", pb.PutRequest(key="k", fence=fence), code) for fence, code in BAD_FENCES],
    *[("Put", pb.PutRequest(key="k", if_absent=True, fence=fence), code) for fence, code in BAD_FENCES],
    *[("Delete", pb.DeleteRequest(key="k", fence=fence), code) for fence, code in BAD_FENCES],
    ("Get", pb.GetRequest(fence=pb.Fence(lock="l", token=1)), 11),
    ("Get", pb.GetRequest(key="k", fence=pb.Fence(lock="l", token=1), consistency=5), 14),  # type: ignore[arg-type]
    ("Put", pb.PutRequest(key="k", fence=pb.Fence(lock="l", token=1), value=BIG), 12),
    ("Put", pb.PutRequest(key="k", fence=pb.Fence(lock="l", token=1), ttl_ms=TTL_MS_MAX + 1), 13),
    ("Put", pb.PutRequest(key="k", fence=pb.Fence(lock="l", token=1), if_version=0), 10),
    ("Put", pb.PutRequest(key="k", fence=pb.Fence(lock="l", token=1), if_version=1, if_absent=True), 10),
    ("Put", pb.PutRequest(key="k", fence=pb.Fence(lock="l", token=1), retry=True), 10),
    ("Delete", pb.DeleteRequest(key="k", fence=pb.Fence(lock="l", token=1), if_version=0), 10),
    ("Get", pb.GetRequest(), 11),
    ("Get", pb.GetRequest(key=LONG), 11),
    ("Get", pb.GetRequest(key="é" * (KEY_BYTES_MAX // 2 + 1)), 11),
    ("Get", pb.GetRequest(key="k", consistency=5), 14),  # type: ignore[arg-type]  # a newer client's
    ("Put", pb.PutRequest(value=b"v"), 11),
    ("Put", pb.PutRequest(key=LONG), 11),
    ("Put", pb.PutRequest(key="k", value=BIG), 12),
    ("Put", pb.PutRequest(key="k", ttl_ms=TTL_MS_MAX + 1), 13),
    ("Put", pb.PutRequest(key="k", ttl_ms=2**64 - 1), 13),
    ("Put", pb.PutRequest(key="k", consistency=-1), 14),  # type: ignore[arg-type]
    ("Put", pb.PutRequest(key="k", client_id="c"), 10),
    ("Put", pb.PutRequest(key="k", client_id="c" * (CLIENT_ID_BYTES_MAX + 1), sequence=1), 10),
    ("Put", pb.PutRequest(key="k", client_id="\x1b[2J", sequence=1), 10),
    ("Delete", pb.DeleteRequest(), 11),
    ("Delete", pb.DeleteRequest(key=LONG), 11),
    ("Delete", pb.DeleteRequest(key="k", consistency=99), 14),  # type: ignore[arg-type]
    ("Delete", pb.DeleteRequest(key="k", client_id="c"), 10),
    ("Put", pb.PutRequest(key="k", if_version=0), 10),
    ("Put", pb.PutRequest(key="k", if_version=1 << 63), 10),
    ("Put", pb.PutRequest(key="k", if_version=1, if_absent=True), 10),
    ("Put", pb.PutRequest(key="k", if_version=0, if_absent=True), 10),
    ("Put", pb.PutRequest(key=LONG, if_absent=True), 11),
    ("Put", pb.PutRequest(key="k", if_absent=True, value=BIG), 12),
    ("Put", pb.PutRequest(key="k", if_absent=True, ttl_ms=2**64 - 1), 13),
    ("Put", pb.PutRequest(key="k", if_absent=True, consistency=5), 14),  # type: ignore[arg-type]
    ("Put", pb.PutRequest(key="k", if_absent=True, client_id="c"), 10),
    ("Put", pb.PutRequest(key="k", if_absent=True, retry=True), 10),  # of what?
    ("Put", pb.PutRequest(key="k", client_id="c", sequence=1, retry=True), 10),  # no condition
    ("Delete", pb.DeleteRequest(key="k", if_version=0), 10),
    ("Delete", pb.DeleteRequest(key="k", if_version=2**64 - 1), 10),
    ("Delete", pb.DeleteRequest(key="k", if_version=1, consistency=5), 14),  # type: ignore[arg-type]
    ("Delete", pb.DeleteRequest(key="k", client_id="c", sequence=1, retry=True), 10),
    ("CompareAndSet", pb.CompareAndSetRequest(value=b"v"), 11),
    ("CompareAndSet", pb.CompareAndSetRequest(key="k", value=BIG), 12),
    ("CompareAndSet", pb.CompareAndSetRequest(key="k", expected=BIG), 12),
    ("CompareAndSet", pb.CompareAndSetRequest(key="k", value=b"v", ttl_ms=TTL_MS_MAX + 1), 13),
    ("CompareAndSet", pb.CompareAndSetRequest(key="k", expected=b"v", ttl_ms=5), 10),
    ("CompareAndSet", pb.CompareAndSetRequest(key="k", value=b"v", client_id="c"), 10),
    ("CompareAndSet", pb.CompareAndSetRequest(key="k", value=b"v", retry=True), 10),
    ("Increment", pb.IncrementRequest(delta=1), 11),
    ("Increment", pb.IncrementRequest(key="k", delta=1, ttl_ms=TTL_MS_MAX + 1), 13),
    ("Increment", pb.IncrementRequest(key="k", delta=1, client_id="c"), 10),
    ("Increment", pb.IncrementRequest(key="k", delta=1, client_id="\x1b[2J", sequence=1), 10),
    ("Increment", pb.IncrementRequest(key="k", delta=1, retry=True), 10),
    ("Scan", pb.ScanRequest(limit=SCAN_LIMIT_MAX + 1), 10),
    ("Scan", pb.ScanRequest(prefix=LONG), 11),
    ("Scan", pb.ScanRequest(start=LONG), 11),
    ("Scan", pb.ScanRequest(end=LONG), 11),
    ("Scan", pb.ScanRequest(consistency=7), 14),  # type: ignore[arg-type]
    ("Scan", pb.ScanRequest(cursor=b"x"), 10),
    ("Scan", pb.ScanRequest(cursor=b"twelve bytes"), 10),
    ("Scan", pb.ScanRequest(prefix="a", cursor=cursor_of(b"b", b"b", b"b\xff")), 10),  # of another scan
    ("Scan", pb.ScanRequest(cursor=cursor_of(b"k" * (KEY_BYTES_MAX + 2), b"", b"")), 10),
    ("BatchGet", pb.BatchGetRequest(keys=["k"], consistency=5), 14),  # type: ignore[arg-type]
    ("BatchGet", pb.BatchGetRequest(keys=["k"] * (BATCH_KEYS_MAX + 1)), 10),
    ("BatchPut", pb.BatchPutRequest(consistency=5), 14),  # type: ignore[arg-type]
    ("BatchPut", pb.BatchPutRequest(ttl_ms=TTL_MS_MAX + 1), 13),
    ("BatchPut", pb.BatchPutRequest(entries=[pb.BatchPutRequest.Entry(key="k")], client_id="c"), 10),
    ("BatchDelete", pb.BatchDeleteRequest(keys=["k"], consistency=5), 14),  # type: ignore[arg-type]
    ("Locate", pb.LocateRequest(), 11),
    ("Locate", pb.LocateRequest(key=LONG), 11),
]


async def test_what_cannot_be_done_is_refused_with_its_code(one: Served) -> None:
    for method, request, code in REFUSALS:
        status, detail = await failure(getattr(one.stub, method)(request, timeout=PATIENT_S))
        assert (status, detail.code) == (INVALID, code), (method, str(request)[:100], detail)
        assert not detail.retryable
    assert not (await one.scan()).entries


@pytest.mark.parametrize("body", [b"\x0a\x02\xff\xfe", b"\xff\xff\xff"], ids=["no UTF-8", "no protobuf"])
async def test_a_request_that_is_no_message_is_refused(one: Served, body: bytes) -> None:
    for method in ("Get", "Put", "CompareAndSet", "BatchDelete", "Locate"):
        call = one.channel.unary_unary(f"/agi.core.dht.v1.DHT/{method}")
        status, detail = await failure(call(body, timeout=PATIENT_S))  # type: ignore[arg-type]
        assert (status, detail.code) == (INVALID, 10)


async def test_a_node_that_is_not_ready_says_so() -> None:
    methods = {
        "Get": pb.GetRequest(key="k"),
        "Put": pb.PutRequest(key="k"),
        "Delete": pb.DeleteRequest(key="k", if_version=1),
        "CompareAndSet": pb.CompareAndSetRequest(key="k"),
        "Increment": pb.IncrementRequest(key="k"),
        "Scan": pb.ScanRequest(),
        "BatchGet": pb.BatchGetRequest(keys=["k"]),
        "BatchPut": pb.BatchPutRequest(entries=[pb.BatchPutRequest.Entry(key="k")]),
        "BatchDelete": pb.BatchDeleteRequest(keys=["k"]),
        "GetTopology": pb.GetTopologyRequest(),
        "Locate": pb.LocateRequest(key="k"),
    }

    async def all_refused(served: Served, reason: str) -> None:
        for method, request in methods.items():
            status, detail = await failure(getattr(served.stub, method)(request, timeout=PATIENT_S))
            assert (status, detail.code, detail.retryable) == (UNAVAILABLE, 31, True), method
            assert reason in detail.message
        answer = await served.stub.Status(pb.StatusRequest(), timeout=PATIENT_S)
        assert not answer.ready and reason in answer.reason

    cluster = Cluster(3, formed=False)
    cluster.rule(lambda src, dst, message: LOST)
    async with cluster, serving(cluster.node(0)) as served:
        await until(lambda: "n1:7000" in cluster.node(0).waiting_for)
        await all_refused(served, "n1:7000")
        status = await served.stub.Status(pb.StatusRequest(), timeout=PATIENT_S)
        assert status.node_id == "n0" and status.epoch == 0 and not status.peers
    async with Cluster(1) as cluster, serving(cluster.node(0)) as served:
        cluster.node(0).stopping = True
        await all_refused(served, "stopping")


# --- retries


def stored(cluster: Cluster, key: str) -> set[int]:
    """The versions of a key that the nodes hold."""
    return {hlc_of(record) for record in cluster.held(key) if record is not None}


async def test_a_repeated_write_is_not_a_second_one() -> None:
    async with Cluster(3) as cluster, serving(cluster.node(0)) as served:
        pair: dict[str, Any] = {"client_id": "alice", "sequence": 1}
        first = await served.put("k", b"1", **pair)
        between = await served.put("k", b"2", client_id="alice", sequence=2)
        assert await served.put("k", b"1", **pair) == first
        assert (await served.get("k")).record.version == between
        other = await served.put("k", b"3", client_id="bob", sequence=1)
        assert (await served.get("k")).record.version == other > between

        delete = pb.DeleteRequest(key="k", client_id="alice", sequence=3)
        assert (await served.stub.Delete(delete, timeout=PATIENT_S)).existed
        assert (await served.stub.Delete(delete, timeout=PATIENT_S)).existed  # as it answered then
        entries = [pb.BatchPutRequest.Entry(key=key, value=b"v") for key in ("a", "b", "")]
        batch = pb.BatchPutRequest(entries=entries, client_id="alice", sequence=4)
        done = await served.stub.BatchPut(batch, timeout=PATIENT_S)
        assert await served.stub.BatchPut(batch, timeout=PATIENT_S) == done
        gone = pb.BatchDeleteRequest(keys=["a", "x"], client_id="alice", sequence=5)
        for _ in range(2):
            answer = await served.stub.BatchDelete(gone, timeout=PATIENT_S)
            assert [result.existed for result in answer.results] == [True, False]
        assert cluster.node(0).metrics.retries_deduplicated == 4


async def test_writes_without_a_client_id_are_all_different() -> None:
    async with Cluster(1) as cluster, serving(cluster.node(0)) as first, serving(cluster.node(0)) as second:
        versions = [await served.put("k", sequence=1) for served in (first, second, first, second)]
        assert sorted(set(versions)) == versions


async def test_a_name_that_is_used_for_another_write_is_refused(one: Served) -> None:
    version = await one.put("k", client_id="c", sequence=1)
    entry = pb.BatchPutRequest.Entry(key="k", value=b"other")
    for call in (
        one.stub.Delete(pb.DeleteRequest(key="k", client_id="c", sequence=1), timeout=PATIENT_S),
        one.stub.BatchPut(pb.BatchPutRequest(entries=[entry] * 2, client_id="c", sequence=1), timeout=PATIENT_S),
    ):
        status, detail = await failure(call)
        assert (status, detail.code) == (INVALID, 10)
    assert (await one.get("k")).record.version == version


async def test_a_native_client_of_the_same_name_is_somebody_else() -> None:
    async with Cluster(1) as cluster, serving(cluster.node(0)) as served:
        wire = await cluster.wire(0, "alice")
        native = await wire.ask(Put(7, Consistency.QUORUM, 5000, [b"k"], [b"native"]))
        assert await served.put("k", b"foreign", client_id="alice", sequence=7) > native.versions[0]
        assert (await served.get("k")).record.value == b"foreign"


async def test_calls_that_repeat_a_write_under_way_share_it() -> None:
    async with Cluster(3) as cluster, serving(cluster.node(0)) as served:
        writes: list[Message] = []

        def slow(src: str, dst: str, message: Message) -> Any:
            if not isinstance(message, ReplicaWrite):
                return None
            writes.append(message)
            return (0.3,)

        cluster.rule(slow)
        pair: dict[str, Any] = {"client_id": "alice", "sequence": 1}
        gone = served.stub.Put(pb.PutRequest(key="k", value=b"v", **pair), timeout=PATIENT_S)
        await until(lambda: writes)
        calls = [asyncio.ensure_future(served.put("k", **pair)) for _ in range(3)]
        await until(lambda: len(served.service._waiting) == 4)
        gone.cancel()
        await until(lambda: len(served.service._waiting) == 3)
        assert [len(waiting) for waiting in served.service._writes.values()] == [3]
        versions = set(await asyncio.gather(*calls))
        assert len(versions) == 1 and len(writes) == 2
        await until(lambda: stored(cluster, "k") == versions and None not in cluster.held("k"))
        assert not served.service._writes and not served.service._waiting


async def test_a_write_of_which_nothing_was_stored_is_tried_again_under_its_name() -> None:
    async with Cluster(3) as cluster, serving(cluster.node(0)) as served:
        await cluster.down(1)
        await cluster.down(2)
        pair: dict[str, Any] = {"client_id": "alice", "sequence": 1}
        for _ in range(2):
            status, detail = await failure(served.put("k", **pair))
            assert (status, detail.code, detail.needed, detail.answered) == (UNAVAILABLE, 30, 2, 1)
        await cluster.up(1)
        version = await served.put("k", **pair)
        assert await served.put("k", **pair) == version
        assert (await served.get("k")).record.version == version


async def test_a_write_of_which_something_may_be_stored_is_not() -> None:
    async with Cluster(3) as cluster, serving(cluster.node(0)) as served:
        heal = cluster.rule(lose(ReplicaWrite))
        pair: dict[str, Any] = {"client_id": "alice", "sequence": 1}
        assert (await failure(served.put("k", timeout=0.5, **pair)))[1].code == 40
        heal()
        version = await served.put("k", b"newer")
        status, detail = await failure(served.put("k", **pair))
        assert (status, detail.code) == (UNKNOWN, 40)  # as it answered then
        assert (await served.get("k")).record.version == version


# --- under consensus


async def test_a_write_may_be_bound_to_a_version_or_to_absence() -> None:
    async with Cluster(3) as cluster, serving(cluster.node(0)) as served, serving(cluster.node(1)) as other:
        first = await served.put("k", b"1", if_absent=True)
        status, detail = await failure(other.put("k", b"x", if_absent=True))
        assert (status, detail.code, detail.current_version, detail.retryable) == (FAILED, 43, first, False)
        second = await other.put("k", b"2", if_version=first, ttl_ms=3_600_000)
        assert second > first
        for call in (served.put("k", b"x", if_version=first), served.delete("k", if_version=first)):
            status, detail = await failure(call)
            assert (status, detail.code, detail.current_version) == (FAILED, 43, second)
        got = await served.get("k", consistency=Consistency.LINEARIZABLE)
        assert (got.record.value, got.record.version) == (b"2", second)
        assert got.record.expires_at_ms - got.record.updated_at_ms in range(3_599_000, 3_601_000)
        assert await served.delete("k", if_version=second)
        for call in (served.put("k", b"x", if_version=second), served.delete("k", if_version=second)):
            status, detail = await failure(call)
            assert (status, detail.code, detail.current_version) == (FAILED, 43, 0)
        assert await other.put("k", b"3", if_absent=True) > second
        assert (await other.get("k")).record.value == b"3"


async def test_compare_and_set_looks_at_the_value() -> None:
    async with Cluster(3) as cluster, serving(cluster.node(0)) as served, serving(cluster.node(1)) as other:
        first = await served.swap("k", None, b"")
        status, detail = await failure(other.swap("k", None, b"x"))  # an empty value is a value
        assert (status, detail.code, detail.current_version) == (FAILED, 43, first)
        second = await other.swap("k", b"", b"2", ttl_ms=3_600_000)
        status, detail = await failure(served.swap("k", b"", b"x"))
        assert (status, detail.code, detail.current_version) == (FAILED, 43, second > first and second)
        assert (await served.get("k")).record.value == b"2" and (await served.get("k")).record.expires_at_ms
        assert await served.swap("k", b"2", None) > second
        assert not (await other.get("k")).found
        status, detail = await failure(served.swap("k", b"2", None))
        assert (status, detail.code, detail.current_version) == (FAILED, 43, 0)


async def test_a_counter_counts() -> None:
    async with Cluster(3) as cluster, serving(cluster.node(0)) as served, serving(cluster.node(1)) as other:
        # no more than a value remembers: past that, one that was overtaken may end in OutcomeUnknown
        seen = await asyncio.gather(*(served.add("n") for _ in range(8)), *(other.add("n") for _ in range(8)))
        assert sorted(seen) == list(range(1, 17))
        answer = await served.stub.Increment(
            pb.IncrementRequest(key="n", delta=-26, ttl_ms=3_600_000), timeout=PATIENT_S
        )
        got = (await other.get("n")).record
        assert (answer.value, answer.version) == (-10, got.version) and got.value == b"-10" and got.expires_at_ms
        assert await other.add("n", 0) == -10 and (await other.get("n")).record.expires_at_ms == got.expires_at_ms


async def test_what_is_no_counter_stays_as_it_is(one: Served) -> None:
    versions = [await one.put("word", b"word"), await one.put("n", b"%d" % COUNTER_MAX)]
    for key, delta in (("word", 1), ("word", 0), ("n", 1), ("n", COUNTER_MAX)):
        status, detail = await failure(one.add(key, delta))
        assert (status, detail.code, detail.current_version) == (INVALID, 16, 0)
    assert [(await one.get(key)).record.version for key in ("word", "n")] == versions


async def test_the_level_linearizable_puts_keys_under_consensus() -> None:
    async with Cluster(3) as cluster, serving(cluster.node(0)) as served, serving(cluster.node(1)) as other:
        level: dict[str, Any] = {"consistency": Consistency.LINEARIZABLE}
        version = await served.put("k", b"1", **level)
        assert all(is_register(record) for record in cluster.held("k") if record is not None)
        page = await other.scan(**level)
        assert [(entry.key, entry.record.value, entry.record.version) for entry in page.entries] == [
            ("k", b"1", version)
        ]
        await served.stub.BatchPut(pb.BatchPutRequest(entries=[entry_of("b", b"2")], **level), timeout=PATIENT_S)
        got = await other.stub.BatchGet(pb.BatchGetRequest(keys=["b", "k"], **level), timeout=PATIENT_S)
        assert [result.record.value for result in got.results] == [b"2", b"1"]
        assert await other.delete("k", **level) and not await served.delete("k", **level)
        assert not (await served.get("k", **level)).found


async def test_a_repeated_operation_takes_effect_once_at_whichever_node() -> None:
    async with Cluster(3) as cluster, serving(cluster.node(0)) as served, serving(cluster.node(1)) as other:
        pair: dict[str, Any] = {"client_id": "alice", "sequence": 1}
        for again in (served, served, other):
            assert await again.add("n", 5, **pair) == 5
        assert await other.add("n", 5, retry=True, **pair) == 5
        assert await served.add("n", 5, client_id="alice", sequence=2) == 10
        assert await served.add("n", 5, client_id="bob", sequence=1) == 15
        pair["sequence"] = 7
        put = await served.put("k", b"1", if_absent=True, **pair)
        assert {await again.put("k", b"1", if_absent=True, **pair) for again in (served, other)} == {put}
        pair["sequence"] = 3
        swapped = await served.swap("k", b"1", b"2", **pair)
        assert {await again.swap("k", b"1", b"2", **pair) for again in (served, other)} == {swapped}
        pair["sequence"] = 4
        for again in (served, other):
            assert await again.delete("k", if_version=swapped, **pair)
        assert cluster.node(0).metrics.retries_deduplicated == 3
        calls = [served.add("m", client_id="c", sequence=9) for _ in range(5)]
        assert await asyncio.gather(*calls) == [1] * 5
        assert cluster.node(0).metrics.retries_deduplicated == 7  # four shared the first's


async def test_an_operation_without_a_name_is_a_new_one_each_time(one: Served) -> None:
    assert [await one.add("n", sequence=1) for _ in range(3)] == [1, 2, 3]


async def test_a_call_that_met_a_conflict_may_be_made_again_under_its_name(one: Served) -> None:
    pair: dict[str, Any] = {"client_id": "alice", "sequence": 1}
    version = await one.put("k", b"1")
    for _ in range(2):
        assert (await failure(one.swap("k", b"2", b"3", **pair)))[1].current_version == version
    version = await one.put("k", b"2")
    assert await one.swap("k", b"2", b"3", **pair) > version


async def test_what_was_refused_when_it_was_repeated_stays_so(one: Served) -> None:
    """Its first try may still be on its way: it is not to do what the caller was told had not been done."""
    pair: dict[str, Any] = {"client_id": "alice", "sequence": 1}
    await one.put("k", b"1")
    await failure(one.swap("k", b"2", b"3", retry=True, **pair))
    version = await one.put("k", b"2")
    for retry in (False, True):
        status, detail = await failure(one.swap("k", b"2", b"3", retry=retry, **pair))
        assert (status, detail.current_version) == (grpc.StatusCode.FAILED_PRECONDITION, version)
    assert (await one.get("k")).record.value == b"2"


async def test_the_name_of_an_operation_cannot_name_another(one: Served) -> None:
    pair: dict[str, Any] = {"client_id": "alice", "sequence": 1}
    await one.add("n", **pair)
    for call in (one.add("n", 2, **pair), one.add("m", **pair), one.swap("n", b"1", b"7", **pair)):
        status, detail = await failure(call)
        assert (status, detail.code) == (INVALID, 10)
    assert (await one.get("n")).record.value == b"1"


async def test_a_key_that_is_written_often_does_not_hide_first_tries_but_those_that_are_repeated_too_late() -> None:
    async with Cluster(3) as cluster, serving(cluster.node(0)) as served, serving(cluster.node(1)) as other:
        pair: dict[str, Any] = {"client_id": "alice", "sequence": 1}
        assert await served.add("n", **pair) == 1
        for number in range(2, WINDOW + 4):
            assert await served.add("n", client_id="alice", sequence=number) == number
        assert await served.add("n", **pair) == 1  # this node remembers it longer
        status, detail = await failure(other.add("n", retry=True, **pair))
        assert (status, detail.code, detail.retryable) == (UNKNOWN, 40, False)
        assert (await other.get("n")).record.value == b"%d" % (WINDOW + 3)


async def test_what_may_have_taken_effect_is_found_out_by_the_next_try() -> None:
    async with Cluster(3) as cluster, serving(cluster.node(0)) as served:
        pair: dict[str, Any] = {"client_id": "alice", "sequence": 1}
        heal = cluster.rule(lose(RegisterAccept))
        status, detail = await failure(served.add("n", timeout=0.6, **pair))
        assert (status, detail.code) == (UNKNOWN, 40)
        heal()
        assert await served.add("n", **pair) == 1
        assert (await served.get("n")).record.value == b"1"
        heal = cluster.rule(lose(RegisterAccept))
        pair["sequence"] = 2
        assert (await failure(served.add("n", timeout=0.6, **pair)))[1].code == 40
        heal()
        await asyncio.gather(*(served.add("n") for _ in range(WINDOW)))
        assert (await served.get("n")).record.value == b"%d" % (WINDOW + 2)  # it took effect, and is hidden
        assert (await failure(served.add("n", **pair)))[1].code == 40  # this node knows that it was tried
        assert (await served.get("n")).record.value == b"%d" % (WINDOW + 2)


async def test_what_was_found_to_have_had_no_effect_is_a_first_try_again() -> None:
    async with Cluster(3) as cluster, serving(cluster.node(0)) as served, serving(cluster.node(1)) as other:
        pair: dict[str, Any] = {"client_id": "alice", "sequence": 1}
        heal = cluster.rule(lose(RegisterAccept))
        assert (await failure(served.swap("k", None, b"1", timeout=0.6, **pair)))[1].code == 40
        heal()
        heal = cluster.rule(lambda src, dst, m: LOST if isinstance(m, RegisterPrepare) and dst == "n0" else None)
        version = await other.swap("k", None, b"2")  # by those who have not heard of it
        heal()
        status, detail = await failure(served.swap("k", None, b"1", **pair))
        assert (status, detail.code, detail.current_version) == (FAILED, 43, version)
        for number in range(WINDOW):
            await other.swap("k", b"%d" % (number + 2), b"%d" % (number + 3))
        assert await other.delete("k")
        assert await served.swap("k", None, b"1", **pair) > version


async def test_without_a_quorum_an_operation_fails_in_time_and_changes_nothing() -> None:
    async with Cluster(3) as cluster, serving(cluster.node(0)) as served:
        heal = cluster.rule(lose(RegisterPromises))
        status, detail = await failure(served.add("n", timeout=0.6))
        assert (status, detail.code, detail.needed, detail.answered) == (UNAVAILABLE, 30, 2, 1) and detail.retryable
        heal()
        assert not (await served.get("n")).found


async def test_an_operation_whose_caller_is_gone_is_remembered_all_the_same() -> None:
    async with Cluster(3) as cluster, serving(cluster.node(0)) as served:
        heal = cluster.rule(lambda src, dst, message: (0.2,) if isinstance(message, RegisterAccept) else None)
        pair: dict[str, Any] = {"client_id": "alice", "sequence": 1}
        gone = served.stub.Increment(pb.IncrementRequest(key="n", delta=1, **pair), timeout=PATIENT_S)
        await until(lambda: served.service._waiting)
        gone.cancel()
        await until(lambda: not served.service._waiting and not served.service._under_way)
        heal()
        assert await served.add("n", **pair) == 1
        assert (await served.get("n")).record.value == b"1"


# --- fences


def fence(token: int, lock: str = "l") -> pb.Fence:
    return pb.Fence(lock=lock, token=token)


async def refused_for_ever(served: Served, key: str, shown: pb.Fence, status: grpc.StatusCode, code: int) -> None:
    """Whatever shows this fence is refused, and the key stays as it is."""
    level = Consistency.LINEARIZABLE
    before = await served.get(key, consistency=level)
    for call in (
        served.put(key, b"late", fence=shown),
        served.put(key, b"late", fence=shown, if_absent=True),
        served.put(key, b"late", fence=shown, if_version=before.record.version or 1),
        served.put(key, b"late", fence=shown, client_id="late", sequence=shown.token),
        served.delete(key, fence=shown),
        served.get(key, fence=shown),
    ):
        got, detail = await failure(call)
        assert (got, detail.code, detail.retryable, detail.current_version) == (status, code, False, 0), detail
    assert await served.get(key, consistency=level) == before


async def test_who_was_handed_the_token_of_a_lock_is_refused_once_another_has_been_there() -> None:
    async with Cluster(3) as cluster, serving(cluster.node(0)) as served, serving(cluster.node(1)) as other:
        client = await cluster.client()
        async with client.lock("l", ttl=30) as lock:
            former = fence(lock.token)
            first = await served.put("k", b"1", fence=former, ttl_ms=3_600_000)
            got = (await other.get("k", fence=former)).record
            assert (got.value, got.version) == (b"1", first)
            assert got.expires_at_ms - got.updated_at_ms in range(3_599_000, 3_601_000)
        async with client.lock("l", ttl=30) as lock:
            second = await other.put("k", b"2", fence=fence(lock.token))
            assert second > first
            await refused_for_ever(served, "k", former, FAILED, 44)
            with pytest.raises(FenceRejected):  # it is one mark for all clients
                await client.put("k", b"late", fence=Fence("l", former.token))
            await client.put("k", b"3", fence=lock)
            assert await served.put("k", b"4", fence=fence(lock.token)) > second
            assert (await other.get("k")).record.value == b"4"


async def test_the_fence_of_another_lock_is_refused() -> None:
    async with Cluster(3) as cluster, serving(cluster.node(0)) as served, serving(cluster.node(1)) as other:
        await served.put("k", b"1", fence=fence(5))
        for token in (4, 5, 99):
            await refused_for_ever(other, "k", fence(token, "nobody's"), INVALID, 17)
        await served.put("k", b"2", fence=fence(5))
        await other.put("k", b"3")  # nothing is asked of who shows nothing
        await refused_for_ever(other, "k", fence(99, "nobody's"), INVALID, 17)
        assert (await served.get("k")).record.value == b"3"


async def test_a_get_with_a_fence_shuts_former_holders_out() -> None:
    async with Cluster(3) as cluster, serving(cluster.node(0)) as served, serving(cluster.node(1)) as other:
        version = await served.put("k", b"1", fence=fence(5))
        got = await other.get("k", fence=fence(9))
        assert got == await served.get("k") and (got.record.value, got.record.version) == (b"1", version)
        await refused_for_ever(served, "k", fence(8), FAILED, 44)
        assert await served.get("nothing", fence=fence(9)) == pb.GetResponse()
        await refused_for_ever(other, "nothing", fence(8), FAILED, 44)
        assert await other.put("k", b"2", fence=fence(9), if_version=version) > version


async def test_a_get_with_a_fence_sees_what_was_written_whatever_its_level() -> None:
    async with Cluster(3) as cluster, serving(cluster.node(0)) as served, serving(cluster.node(1)) as other:
        cluster.rule(lambda src, dst, message: LOST if isinstance(message, ReplicaWrite) and dst == "n0" else None)
        version = await other.put("k", b"1", consistency=Consistency.QUORUM)
        assert cluster.held("k")[0] is None
        assert not (await served.get("k", consistency=Consistency.ONE)).found
        got = await served.get("k", consistency=Consistency.ONE, fence=fence(1))
        assert (got.record.value, got.record.version) == (b"1", version)


async def test_a_delete_with_a_fence_leaves_the_mark() -> None:
    async with Cluster(3) as cluster, serving(cluster.node(0)) as served, serving(cluster.node(1)) as other:
        version = await served.put("k", b"1", fence=fence(5))
        status, detail = await failure(other.delete("k", fence=fence(9), if_version=version - 1))
        assert (status, detail.code, detail.current_version) == (FAILED, 43, version)
        assert await other.delete("k", fence=fence(9), if_version=version)
        assert not (await served.get("k")).found
        await refused_for_ever(served, "k", fence(8), FAILED, 44)
        assert not await served.delete("k", fence=fence(10))
        await refused_for_ever(other, "k", fence(9), FAILED, 44)


async def test_a_condition_may_stand_beside_a_fence_and_a_conflict_leaves_no_mark(one: Served) -> None:
    first = await one.put("k", b"1", fence=fence(5), if_absent=True)
    for more in ({"if_absent": True}, {"if_version": first + 1}):
        status, detail = await failure(one.put("k", b"x", fence=fence(9), **more))
        assert (status, detail.code, detail.current_version) == (FAILED, 43, first)
    assert await one.put("k", b"2", fence=fence(5), if_version=first) > first
    assert (await one.get("k")).record.value == b"2"


async def test_a_repeated_write_with_a_fence_takes_effect_once() -> None:
    async with Cluster(3) as cluster, serving(cluster.node(0)) as served, serving(cluster.node(1)) as other:
        pair: dict[str, Any] = {"client_id": "alice", "sequence": 1}
        version = await served.put("k", b"1", fence=fence(5), **pair)
        status, detail = await failure(served.put("k", b"1", fence=fence(6), **pair))  # another call
        assert (status, detail.code) == (INVALID, 10)
        newer = await other.put("k", b"2", fence=fence(9))
        for again in (served, other):
            assert await again.put("k", b"1", fence=fence(5), retry=True, **pair) == version  # as it answered then
        assert (await served.get("k")).record.version == newer
        pair["sequence"] = 2
        for again in (served, other):
            assert await again.delete("k", fence=fence(9), retry=True, **pair)


@pytest.mark.parametrize(("lock", "refusal"), [("l", (FAILED, 44)), ("another", (INVALID, 17))])
async def test_a_fence_that_is_refused_says_that_no_earlier_try_took_effect(
    lock: str, refusal: tuple[grpc.StatusCode, int]
) -> None:
    async with Cluster(3) as cluster, serving(cluster.node(0)) as served, serving(cluster.node(1)) as other:
        late: dict[str, Any] = {"client_id": "alice", "sequence": 1, "fence": fence(5, lock)}
        heal = cluster.rule(lose(RegisterAccept))
        assert (await failure(served.put("k", b"1", timeout=0.6, **late)))[1].code == 40
        heal()
        heal = cluster.rule(lambda src, dst, m: LOST if isinstance(m, RegisterPrepare) and dst == "n0" else None)
        await other.put("k", b"2", fence=fence(9))  # by those who have not heard of it
        heal()
        for _ in range(2):
            status, detail = await failure(served.put("k", b"1", **late))
            assert (status, detail.code) == refusal
            for _ in range(WINDOW):  # they would hide one that may have taken effect
                await other.put("k", b"3", fence=fence(9))
        assert (await served.get("k")).record.value == b"3"


@pytest.mark.parametrize("lost", [RegisterPromises, RegisterAccept])
async def test_a_get_with_a_fence_that_fails_may_be_repeated(
    lost: type[Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Cluster(3) as cluster, serving(cluster.node(0)) as served:
        node = cluster.node(0)
        node.stopping = True
        status, detail = await failure(served.get("k", fence=fence(1)))
        assert (status, detail.code, detail.retryable) == (UNAVAILABLE, 31, True)
        node.stopping = False
        heal = cluster.rule(lose(lost))
        status, detail = await failure(served.get("k", timeout=0.6, fence=fence(1)))
        assert (status, detail.code, detail.retryable) == (UNAVAILABLE, 30, True)
        with monkeypatch.context() as patch:
            patch.setattr(node.coordinator, "advance", lambda now: None)
            status, detail = await failure(served.get("k", timeout=0.6, fence=fence(1)))
            assert (status, detail.code, detail.message) == (UNAVAILABLE, 30, "no answer by the deadline")
        heal()
        assert not (await served.get("k", fence=fence(1))).found


# --- deadlines, cancellation, bounds


async def test_a_quorum_that_does_not_answer_is_a_typed_error_before_the_deadline() -> None:
    async with Cluster(3) as cluster, serving(cluster.node(0)) as served:
        cluster.rule(lose(ReplicaWrite, ReplicaRead, ReplicaScan))
        batch = pb.BatchPutRequest(entries=[pb.BatchPutRequest.Entry(key=key, value=b"v") for key in "ab"])
        got, put, many, page = await asyncio.gather(
            failure(served.get("k", timeout=1.0)),
            failure(served.put("k", timeout=1.0)),
            served.stub.BatchPut(batch, timeout=1.0),
            failure(served.stub.Scan(pb.ScanRequest(), timeout=1.0)),
        )
        assert (got[0], got[1].code, got[1].needed, got[1].answered) == (UNAVAILABLE, 30, 2, 1)
        assert (put[0], put[1].code, put[1].needed, put[1].answered) == (UNKNOWN, 40, 2, 1)
        for result in many.results:
            error = result.error
            assert (error.code, error.needed, error.answered, error.retryable) == (40, 2, 1, False)
            assert result.version == 0
        assert (page[0], page[1].code, page[1].needed) == (UNAVAILABLE, 30, 2)


async def test_short_deadlines_end_in_typed_errors_too() -> None:
    async with Cluster(3) as cluster, serving(cluster.node(0)) as served:
        await served.get("k")  # the connection is up
        cluster.rule(lose(ReplicaWrite, ReplicaRead))
        assert (await failure(served.get("k", timeout=0.4)))[1].code == 30
        assert (await failure(served.put("k", timeout=0.4)))[1].code == 40


async def test_a_typed_error_is_there_in_time_whatever_the_coordinator_does(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Cluster(3) as cluster, serving(cluster.node(0)) as served:
        node = cluster.node(0)
        cluster.rule(lose(ReplicaWrite))
        next(task for task in node._tasks if task.get_name() == "tick").cancel()  # nothing looks for deadlines any more
        status, detail = await failure(served.put("k", timeout=1.0))
        assert (status, detail.code, detail.needed, detail.answered) == (UNKNOWN, 40, 2, 1)
        monkeypatch.setattr(node.coordinator, "advance", lambda now: None)
        status, detail = await failure(served.put("k", timeout=0.5))
        assert (status, detail.code, detail.message) == (UNKNOWN, 40, "no answer by the deadline")


async def test_a_call_that_was_answered_leaves_no_timer(one: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    late: list[object] = []
    monkeypatch.setattr(one.service, "_late", lambda *what: late.append(what))
    await one.get("k")  # the connection is up
    await one.get("k", timeout=0.4)
    await asyncio.sleep(0.5)
    assert not late


async def test_a_call_without_a_deadline_gets_the_configured_one() -> None:
    async with Cluster(3, settings={"dht.network.timeout_ms": 300}) as cluster, serving(cluster.node(0)) as served:
        cluster.rule(lose(ReplicaWrite))
        async with asyncio.timeout(5):
            status, detail = await failure(served.stub.Put(pb.PutRequest(key="k", value=b"v")))
        assert (status, detail.code) == (UNKNOWN, 40)


async def test_a_longer_deadline_than_the_configured_one_is_used() -> None:
    async with Cluster(3, settings={"dht.network.timeout_ms": 50}) as cluster, serving(cluster.node(0)) as served:
        cluster.rule(lambda src, dst, message: (0.3,) if isinstance(message, ReplicaWrite) else None)
        await served.put("k")


async def test_a_cancelled_call_leaves_nothing_behind_but_perhaps_its_write() -> None:
    async with Cluster(3) as cluster, serving(cluster.node(0)) as served:
        node = cluster.node(0)
        assert node.coordinator is not None
        links = [list(peer.links) for peer in node.peers.all.values()]
        heal = cluster.rule(
            lambda src, dst, message: (0.2,) if isinstance(message, ReplicaWrite | ReplicaRead) else None
        )
        calls = [
            served.stub.Put(pb.PutRequest(key="k", value=b"v", client_id="c", sequence=1), timeout=PATIENT_S),
            served.stub.Get(pb.GetRequest(key="k"), timeout=PATIENT_S),
            served.stub.BatchGet(pb.BatchGetRequest(keys=["k"]), timeout=PATIENT_S),
        ]
        await until(lambda: len(served.service._waiting) == 3)
        for call in calls:
            call.cancel()
        await until(lambda: not served.service._waiting and not served.service._under_way)
        await until(lambda: not node.coordinator.pending and not served.service._writes)  # type: ignore[union-attr]
        heal()
        version = await served.put("k", client_id="c", sequence=1)
        got = await served.get("k")
        assert got.record.version == version and {version} == stored(cluster, "k")
        assert node.metrics.retries_deduplicated == 1
        assert [peer.links for peer in node.peers.all.values()] == links  # no reply ended a link by an error


async def test_calls_past_the_bound_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "CALLS_MAX", 2)
    async with Cluster(3) as cluster, serving(cluster.node(0)) as served:
        await served.put("k")
        heal = cluster.rule(lose(ReplicaRead))
        waiting = [served.stub.Get(pb.GetRequest(key="k"), timeout=PATIENT_S) for _ in range(2)]
        await until(lambda: len(served.service._waiting) == 2)
        for call in (served.get("k"), served.put("k"), served.stub.Status(pb.StatusRequest(), timeout=PATIENT_S)):
            status, detail = await failure(call)
            assert (status, detail.code, detail.retryable) == (EXHAUSTED, 32, True)
        waiting[0].cancel()
        heal()
        await until(lambda: served.service._under_way == 1)
        assert (await served.get("k")).found
        waiting[1].cancel()
        await until(lambda: served.service._under_way == 0)


async def test_what_the_coordinator_refuses_as_a_whole_fails_the_call() -> None:
    settings = {"dht.requests.pending_bytes_max_mb": 16}
    async with Cluster(1, settings=settings) as cluster, serving(cluster.node(0)) as served:
        entries = [entry_of(f"k{i}", bytes(7_500_000 if i < 2 else 0)) for i in range(9000)]  # a key counts too
        status, detail = await failure(served.stub.BatchPut(pb.BatchPutRequest(entries=entries), timeout=PATIENT_S))
        assert (status, detail.code) == (EXHAUSTED, 32)
        await served.put("k", bytes(7_500_000))


async def test_calls_that_wait_when_the_node_has_stopped_fail() -> None:
    async with Cluster(3) as cluster, serving(cluster.node(0)) as served:
        cluster.rule(lose(ReplicaWrite, ReplicaRead))
        calls = [asyncio.ensure_future(failure(call)) for call in (served.get("k"), served.put("k"))]
        await until(lambda: len(served.service._waiting) == 2)
        await cluster.down(0, noticed=False)
        await served.service.stop()
        async with asyncio.timeout(5):
            got, put = await asyncio.gather(*calls)
        assert (got[0], got[1].code, put[0], put[1].code) == (UNAVAILABLE, 30, UNKNOWN, 40)
        assert "stopped" in got[1].message


# --- correlation


async def test_the_correlation_id_reaches_the_replicas() -> None:
    async with Cluster(3) as cluster, serving(cluster.node(0)) as served:
        seen: list[str] = []

        def watch(src: str, dst: str, message: Message) -> None:
            if isinstance(message, ReplicaWrite | ReplicaRead | ReplicaScan) and message.trace not in seen:
                seen.append(message.trace)

        cluster.rule(watch)

        async def traces(trace: str | None, **pair: Any) -> list[str]:
            seen.clear()
            metadata = (("x-correlation-id", trace),) if trace is not None else ()
            more = {"timeout": PATIENT_S, "metadata": metadata}
            await served.stub.Put(pb.PutRequest(key="k", value=b"v", **pair), **more)
            await served.stub.Get(pb.GetRequest(key="k"), **more)
            await served.stub.Scan(pb.ScanRequest(), **more)
            await served.stub.Delete(pb.DeleteRequest(key="k"), **more)
            return seen

        for given in ("job 42/step-7", "x" * 128):
            assert await traces(given) == [given]
        for ignored in ("x" * 129, "", None):
            found = await traces(ignored)
            assert len(found) == 4 and all(trace.startswith("grpc-") for trace in found)
        assert "grpc-client:alice:9" in await traces(None, client_id="alice", sequence=9)


# --- batches


def entry_of(key: str, value: bytes) -> pb.BatchPutRequest.Entry:
    return pb.BatchPutRequest.Entry(key=key, value=value)


async def test_batches_answer_key_by_key_in_order() -> None:
    async with Cluster(3) as cluster, serving(cluster.node(0)) as served:
        keys = [f"k{i}" for i in range(500)] + ["鍵", "empty"]
        values = {key: b"" if key == "empty" else key.encode() for key in keys}
        put = await served.stub.BatchPut(
            pb.BatchPutRequest(entries=[entry_of(*item) for item in values.items()], ttl_ms=60_000), timeout=PATIENT_S
        )
        assert all(result.version and not result.HasField("error") for result in put.results)
        asked = ["absent", *reversed(keys), "k3"]
        got = await served.stub.BatchGet(pb.BatchGetRequest(keys=asked), timeout=PATIENT_S)
        assert [r.record.value if r.found else None for r in got.results] == [values.get(key) for key in asked]
        versions = dict(zip(keys, (result.version for result in put.results), strict=True))
        assert [r.record.version for r in got.results[1:]] == [versions[key] for key in asked[1:]]
        assert all(r.record.expires_at_ms for r in got.results[1:]) and not got.results[0].HasField("error")
        gone = await served.stub.BatchDelete(pb.BatchDeleteRequest(keys=["absent", "k1", "鍵"]), timeout=PATIENT_S)
        assert [result.existed for result in gone.results] == [False, True, True]
        assert not (await served.get("鍵")).found


async def test_empty_batches_are_answered(one: Served) -> None:
    assert not (await one.stub.BatchGet(pb.BatchGetRequest(), timeout=PATIENT_S)).results
    assert not (await one.stub.BatchPut(pb.BatchPutRequest(), timeout=PATIENT_S)).results
    assert not (await one.stub.BatchDelete(pb.BatchDeleteRequest(), timeout=PATIENT_S)).results


async def test_a_key_that_is_twice_in_a_batch_gets_its_last_value(one: Served) -> None:
    await one.put("k", b"0")
    entries = [entry_of("k", b"1"), entry_of("other", b"x"), entry_of("k", b"2")]
    put = await one.stub.BatchPut(pb.BatchPutRequest(entries=entries), timeout=PATIENT_S)
    got = await one.get("k")
    assert got.record.value == b"2" and got.record.version == put.results[2].version


async def test_bad_keys_of_a_batch_fail_alone(one: Served) -> None:
    entries = [entry_of("", b"v"), entry_of("a", b"1"), entry_of("b", BIG), entry_of(LONG, b"v"), entry_of("c", b"3")]
    put = await one.stub.BatchPut(pb.BatchPutRequest(entries=entries), timeout=PATIENT_S)
    assert [result.error.code for result in put.results] == [11, 0, 12, 11, 0]
    assert [bool(result.version) for result in put.results] == [False, True, False, False, True]
    got = await one.stub.BatchGet(pb.BatchGetRequest(keys=["a", LONG, "b", "", "c"]), timeout=PATIENT_S)
    assert [result.error.code for result in got.results] == [0, 11, 0, 11, 0]
    assert [result.record.value for result in got.results] == [b"1", b"", b"", b"", b"3"]
    gone = await one.stub.BatchDelete(pb.BatchDeleteRequest(keys=["", "a", LONG]), timeout=PATIENT_S)
    assert [(r.existed, r.error.code) for r in gone.results] == [(False, 11), (True, 0), (False, 11)]
    for result in (put.results[0], got.results[1], gone.results[0]):
        assert not result.error.retryable and "key" in result.error.message
    only = await one.stub.BatchPut(pb.BatchPutRequest(entries=[entry_of("", b"")]), timeout=PATIENT_S)
    assert [result.error.code for result in only.results] == [11]


async def test_keys_without_a_quorum_fail_alone() -> None:
    async with Cluster(5) as cluster, serving(cluster.node(0)) as served:
        keys = [f"k{i}" for i in range(60)]
        entries = [entry_of(key, b"v") for key in keys]
        await served.stub.BatchPut(pb.BatchPutRequest(entries=entries), timeout=PATIENT_S)
        lacking = {key for key in keys if {3, 4} <= set(cluster.holders(key))}
        assert 0 < len(lacking) < len(keys)
        await cluster.down(3)
        await cluster.down(4)
        bad = entry_of("", b"")
        put = await served.stub.BatchPut(pb.BatchPutRequest(entries=[bad, *entries]), timeout=PATIENT_S)
        got = await served.stub.BatchGet(pb.BatchGetRequest(keys=["", *keys]), timeout=PATIENT_S)
        gone = await served.stub.BatchDelete(pb.BatchDeleteRequest(keys=["", *keys]), timeout=PATIENT_S)
        for results, done in ((put.results, "version"), (got.results, "found"), (gone.results, "existed")):
            assert results[0].error.code == 11
            for key, result in zip(keys, results[1:], strict=True):
                assert bool(getattr(result, done)) is (key not in lacking)
                assert result.HasField("error") is (key in lacking)
                if key in lacking:
                    assert (result.error.code, result.error.needed, result.error.answered) == (30, 2, 1)


async def test_values_that_do_not_fit_one_message_are_to_be_asked_for_again() -> None:
    async with Cluster(3) as cluster, serving(cluster.node(0), options=()) as served:  # gRPC's own limit of 4 MiB
        keys = [f"k{i}" for i in range(9)]
        for key in keys:
            await served.put(key, key.encode() * 500_000)
        asked, rounds = [*keys, "absent"], 0
        found: dict[str, bytes] = {}
        while asked:
            rounds += 1
            got = await served.stub.BatchGet(pb.BatchGetRequest(keys=asked), timeout=PATIENT_S)
            later = []
            for key, result in zip(asked, got.results, strict=True):
                if result.HasField("error"):
                    assert result.error.code == 33 and result.error.retryable and not result.found
                    later.append(key)
                elif result.found:
                    found[key] = result.record.value
                else:
                    assert key == "absent"
            assert len(later) < len(asked)
            asked = later
        assert found == {key: key.encode() * 500_000 for key in keys} and rounds == 3


async def test_the_errors_of_the_largest_batch_fit_a_message(one: Served) -> None:
    keys = ["" for _ in range(BATCH_KEYS_MAX)]
    got = await one.stub.BatchGet(pb.BatchGetRequest(keys=keys), timeout=PATIENT_S)
    assert len(got.results) == BATCH_KEYS_MAX and got.results[-1].error.code == 11


# --- scans


async def pages(served: Served, **fields: Any) -> list[pb.ScanResponse]:
    found = [await served.scan(**fields)]
    while found[-1].next_cursor:
        found.append(await served.scan(**fields, cursor=found[-1].next_cursor))
        assert len(found) < 1000
    return found


async def test_pages_follow_each_other_in_the_order_of_utf8_bytes() -> None:
    async with Cluster(3) as cluster, serving(cluster.node(0)) as served, serving(cluster.node(1)) as other:
        keys = [f"k{i}" for i in range(120)] + ["a", "k", "kä", "k\uffff", "k\U0001f600", "l", "鍵"]
        await served.stub.BatchPut(
            pb.BatchPutRequest(entries=[entry_of(key, key.encode()) for key in keys]), timeout=PATIENT_S
        )
        order = sorted(keys, key=str.encode)

        async def scanned(**fields: Any) -> list[str]:
            found = [entry for page in await pages(served, **fields) for entry in page.entries]
            assert all(entry.record.value == entry.key.encode() for entry in found)
            return [entry.key for entry in found]

        for limit in (0, 1, 7, 126, 127, 1000):
            assert await scanned(limit=limit) == order
        sized = await pages(served, limit=50)
        assert [len(page.entries) for page in sized] == [50, 50, 27]
        under_k = [key for key in order if key.startswith("k")]
        assert await scanned(prefix="k", limit=10) == under_k
        assert await scanned(prefix="kä") == ["kä"] and await scanned(prefix="nothing") == []
        assert await scanned(start="k2", end="k30") == [key for key in order if "k2" <= key < "k30"]
        assert await scanned(prefix="k1", start="k15", end="k3", limit=3) == [
            key for key in order if key.startswith("k1") and key >= "k15"
        ]
        assert await scanned(prefix="k", end="k11") == [key for key in under_k if key < "k11"]
        assert await scanned(prefix="k", start="a") == under_k and await scanned(prefix="k", start="l") == []
        assert await scanned(start="l", end="a") == []
        first = await served.scan(prefix="k", limit=3)
        rest = await other.scan(prefix="k", cursor=first.next_cursor)  # a cursor holds at any node
        assert [entry.key for entry in [*first.entries, *rest.entries]] == under_k
        status, detail = await failure(served.scan(prefix="k1", cursor=first.next_cursor))
        assert (status, detail.code) == (INVALID, 10)


async def test_keys_only_leaves_out_the_values_alone(one: Served) -> None:
    version = await one.put("k", b"value", ttl_ms=60_000)
    whole, bare = await one.scan(), await one.scan(keys_only=True)
    whole.entries[0].record.value = b""
    assert whole == bare and bare.entries[0].record.version == version and bare.entries[0].record.expires_at_ms


async def test_a_page_is_no_larger_than_what_every_client_takes() -> None:
    async with Cluster(1) as cluster, serving(cluster.node(0), options=()) as served:
        keys = [f"k{i}" for i in range(9)]
        for key in keys:
            await served.put(key, bytes(1_000_000))
        found = await pages(served)
        assert [entry.key for page in found for entry in page.entries] == keys
        assert [len(page.entries) for page in found] == [3, 3, 3]


async def test_a_part_of_the_ring_that_is_not_covered_fails_the_scan() -> None:
    async with Cluster(3) as cluster, serving(cluster.node(0)) as served:
        await cluster.down(1)
        await cluster.down(2)
        status, detail = await failure(served.scan())
        assert (status, detail.code, detail.needed, detail.answered) == (UNAVAILABLE, 30, 2, 1)
        assert not (await served.scan(consistency=Consistency.ONE)).entries


# --- the cluster


async def test_topology_places_and_status() -> None:
    async with Cluster(4) as cluster, serving(cluster.node(0)) as served:
        topology = await served.stub.GetTopology(pb.GetTopologyRequest(), timeout=PATIENT_S)
        assert (topology.cluster, topology.epoch, topology.replication_factor) == ("dht", 1, 3)
        assert topology.hash_algorithm == "xxh3"
        assert [(node.node_id, node.address) for node in topology.nodes] == [(f"n{i}", f"n{i}:7000") for i in range(4)]
        assert all(node.weight == 1 and node.virtual_nodes == 8 for node in topology.nodes)
        assert [node.data_address for node in topology.nodes] == [cluster.node(i).data_address for i in range(4)]

        located = await served.stub.Locate(pb.LocateRequest(key="k"), timeout=PATIENT_S)
        ring = cluster.node(0).ring
        assert ring is not None and located.token == ring.token(b"k") and located.epoch == 1
        assert list(located.node_ids) == [f"n{i}" for i in cluster.holders("k")]

        status = await served.stub.Status(pb.StatusRequest(), timeout=PATIENT_S)
        assert (status.node_id, status.cluster, status.ready, status.reason) == ("n0", "dht", True, "")
        assert (status.epoch, status.replication_factor, status.failures_tolerated) == (1, 3, 1)
        assert status.protocol_version == 1 and status.program_version
        assert abs(status.started_at_ms - cluster.clocks[0].wall_ms()) < 60_000
        expected = [(f"n{i}", f"n{i}:7000", True, pb.MEMBER_STATUS_ALIVE) for i in (1, 2, 3)]
        assert [(peer.node_id, peer.address, peer.connected, peer.status) for peer in status.peers] == expected
        await cluster.down(2)
        status = await served.stub.Status(pb.StatusRequest(), timeout=PATIENT_S)
        assert [peer.connected for peer in status.peers] == [True, False, True]
        cluster.node(0).detector.leave()
        status = await served.stub.Status(pb.StatusRequest(), timeout=PATIENT_S)
        assert all(peer.status != pb.MEMBER_STATUS_UNSPECIFIED for peer in status.peers)


async def test_failures_tolerated_are_those_of_the_replicas_that_there_are() -> None:
    for nodes, tolerated in ((1, 0), (2, 0), (3, 1)):
        async with Cluster(nodes) as cluster, serving(cluster.node(0)) as served:
            status = await served.stub.Status(pb.StatusRequest(), timeout=PATIENT_S)
            assert status.failures_tolerated == tolerated


# --- health and reflection

SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING
NAME = "agi.core.dht.v1.DHT"


async def test_health_follows_readiness_both_ways() -> None:
    async with Cluster(3) as cluster, serving(cluster.node(0)) as served:
        stub: Any = HealthStub(served.channel)

        async def becomes(expected: int) -> None:
            async with asyncio.timeout(PATIENT_S):
                for name in ("", NAME):
                    while (await stub.Check(HealthCheckRequest(service=name))).status != expected:
                        pass  # a call is a wait

        await becomes(SERVING)
        await cluster.down(1)
        await cluster.down(2)
        await becomes(NOT_SERVING)
        await cluster.up(1)
        await becomes(SERVING)
        served.service.withdraw()
        assert (await stub.Check(HealthCheckRequest())).status == NOT_SERVING
        await asyncio.sleep(2 * service_module.HEALTH_POLL_S)  # the poll does not take it back
        assert (await stub.Check(HealthCheckRequest(service=NAME))).status == NOT_SERVING
        with pytest.raises(aio.AioRpcError) as caught:
            await stub.Check(HealthCheckRequest(service="other"))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_a_node_that_has_not_formed_is_not_serving() -> None:
    cluster = Cluster(3, formed=False)
    cluster.rule(lambda src, dst, message: LOST)
    async with cluster, serving(cluster.node(0)) as served:
        stub: Any = HealthStub(served.channel)
        for name in ("", NAME):
            assert (await stub.Check(HealthCheckRequest(service=name))).status == NOT_SERVING


async def test_watchers_hear_every_change_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_health, "WATCHERS_MAX", 3)
    async with Cluster(3) as cluster, serving(cluster.node(0)) as served:
        stub: Any = HealthStub(served.channel)
        async with asyncio.timeout(2 * PATIENT_S):
            watchers = [stub.Watch(HealthCheckRequest(service=NAME)) for _ in range(2)]
            stranger = stub.Watch(HealthCheckRequest(service="other"))
            assert (await stranger.read()).status == HealthCheckResponse.SERVICE_UNKNOWN
            for watcher in watchers:
                while (await watcher.read()).status != SERVING:
                    pass
            status, detail = await failure(stub.Watch(HealthCheckRequest()).read())
            assert (status, detail.code) == (EXHAUSTED, 32)
            watchers[0].cancel()  # the others hear on
            await until(lambda: served.service._health._watchers == 2)
            await cluster.down(1)
            await cluster.down(2)
            assert (await watchers[1].read()).status == NOT_SERVING
            await cluster.up(2)
            assert (await watchers[1].read()).status == SERVING
            served.service.withdraw()
            assert (await watchers[1].read()).status == NOT_SERVING
            assert await watchers[1].read() is aio.EOF and await stranger.read() is aio.EOF


async def test_a_health_poll_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Cluster(1) as cluster:
        fatal: list[DHTError] = []
        service = Service(cluster.node(0), fatal.append)

        def broken(serving: bool) -> None:
            raise RuntimeError("broken")

        monkeypatch.setattr(service._health, "set", broken)
        service.start()
        await until(lambda: fatal)
        assert "broken" in str(fatal[0])
        await service.stop()


async def test_reflection_lists_and_describes_the_services(one: Served) -> None:
    stub: Any = ServerReflectionStub(one.channel)
    call = stub.ServerReflectionInfo(timeout=PATIENT_S)
    await call.write(ServerReflectionRequest(list_services=""))
    listed = await call.read()
    assert {service.name for service in listed.list_services_response.service} == {
        NAME,
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    await call.write(ServerReflectionRequest(file_containing_symbol=NAME))
    described = await call.read()
    assert any(b"BatchGetRequest" in file for file in described.file_descriptor_response.file_descriptor_proto)
    await call.done_writing()
    assert await call.read() is aio.EOF
