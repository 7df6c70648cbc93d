"""A client that knows nothing but dht.proto: run with the stubs compiled from it on its path, and nothing of ours.

foreign_client.py whole ADDRESS...     everything, against nodes of a cluster that is well
foreign_client.py alone ADDRESS        what a node answers that has lost its peers
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import dht_pb2 as pb
import grpc
from dht_pb2_grpc import DHTStub
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

WAIT_S = 20.0
SIZES = [("grpc.max_receive_message_length", 16 << 20), ("grpc.max_send_message_length", 16 << 20)]


def failure(call: Callable[[], Any]) -> tuple[grpc.StatusCode, Any]:
    try:
        answer = call()
    except grpc.RpcError as error:
        trailing = dict(error.trailing_metadata())  # type: ignore[attr-defined]
        return error.code(), pb.ErrorDetail.FromString(trailing["dht-error-bin"])  # type: ignore[attr-defined]
    raise AssertionError(f"should have failed, answered {answer}")


def single_keys(stub: DHTStub, other: DHTStub) -> None:
    assert not stub.Get(pb.GetRequest(key="absent"), timeout=WAIT_S).found
    put = stub.Put(pb.PutRequest(key="ключ", value=b"\x00\xff", ttl_ms=3_600_000), timeout=WAIT_S)
    got = other.Get(pb.GetRequest(key="ключ"), timeout=WAIT_S)
    assert got.found and got.record.value == b"\x00\xff" and got.record.version == put.version
    assert abs(got.record.updated_at_ms - time.time() * 1000) < 60_000
    assert got.record.expires_at_ms - got.record.updated_at_ms in range(3_599_000, 3_601_000)
    assert other.Delete(pb.DeleteRequest(key="ключ", consistency=pb.CONSISTENCY_ALL), timeout=WAIT_S).existed
    assert not stub.Get(pb.GetRequest(key="ключ"), timeout=WAIT_S).found

    large = bytes(range(256)) * 16384
    stub.Put(pb.PutRequest(key="large", value=large + large), timeout=WAIT_S)
    assert other.Get(pb.GetRequest(key="large"), timeout=WAIT_S).record.value == large + large
    other.Delete(pb.DeleteRequest(key="large"), timeout=WAIT_S)

    named = pb.PutRequest(key="once", value=b"1", client_id="foreign", sequence=1)
    first = stub.Put(named, timeout=WAIT_S)
    newer = stub.Put(pb.PutRequest(key="once", value=b"2"), timeout=WAIT_S)
    assert stub.Put(named, timeout=WAIT_S) == first
    got = other.Get(pb.GetRequest(key="once"), timeout=WAIT_S)
    assert got.record.version == newer.version and got.record.value == b"2"
    stub.Delete(pb.DeleteRequest(key="once"), timeout=WAIT_S)


def under_consensus(stub: DHTStub, other: DHTStub) -> None:
    first = stub.Put(pb.PutRequest(key="lead", value=b"a", if_absent=True), timeout=WAIT_S).version
    code, detail = failure(lambda: other.Put(pb.PutRequest(key="lead", value=b"b", if_absent=True), timeout=WAIT_S))
    assert (code, detail.code, detail.current_version) == (grpc.StatusCode.FAILED_PRECONDITION, 43, first)
    swap = pb.CompareAndSetRequest(key="lead", expected=b"a", value=b"b")
    second = other.CompareAndSet(swap, timeout=WAIT_S).version
    code, detail = failure(lambda: stub.Delete(pb.DeleteRequest(key="lead", if_version=first), timeout=WAIT_S))
    assert (code, detail.code, detail.current_version) == (grpc.StatusCode.FAILED_PRECONDITION, 43, second)
    assert stub.Delete(pb.DeleteRequest(key="lead", if_version=second), timeout=WAIT_S).existed

    named = pb.IncrementRequest(key="count", delta=-7, client_id="foreign", sequence=2)
    assert [node.Increment(named, timeout=WAIT_S).value for node in (stub, other, stub)] == [-7] * 3
    got = other.Get(pb.GetRequest(key="count", consistency=pb.CONSISTENCY_LINEARIZABLE), timeout=WAIT_S)
    assert got.record.value == b"-7"
    other.Delete(pb.DeleteRequest(key="count"), timeout=WAIT_S)


def batches_and_scans(stub: DHTStub, other: DHTStub) -> None:
    keys = [f"scan:{i:03}" for i in range(250)]
    entries = [pb.BatchPutRequest.Entry(key=key, value=key.encode()) for key in [*keys, ""]]
    put = stub.BatchPut(pb.BatchPutRequest(entries=entries), timeout=WAIT_S)
    assert len(put.results) == 251 and all(result.version for result in put.results[:-1])
    assert put.results[-1].error.code == 11 and not put.results[0].HasField("error")
    got = other.BatchGet(pb.BatchGetRequest(keys=[*keys, "absent"]), timeout=WAIT_S)
    assert [result.record.value for result in got.results[:-1]] == [key.encode() for key in keys]
    assert not got.results[-1].found and not got.results[-1].HasField("error")

    found, cursor, pages = [], b"", 0
    while cursor or not pages:
        node = (stub, other)[pages % 2]  # a cursor holds at any node
        page = node.Scan(pb.ScanRequest(prefix="scan:", limit=60, cursor=cursor), timeout=WAIT_S)
        found += [(entry.key, entry.record.value) for entry in page.entries]
        cursor, pages = page.next_cursor, pages + 1
        assert pages < 50
    assert found == [(key, key.encode()) for key in keys] and pages >= 5
    bare = stub.Scan(pb.ScanRequest(start="scan:010", end="scan:012", keys_only=True), timeout=WAIT_S)
    assert [(entry.key, entry.record.value) for entry in bare.entries] == [("scan:010", b""), ("scan:011", b"")]
    gone = stub.BatchDelete(pb.BatchDeleteRequest(keys=[*keys, "absent"]), timeout=WAIT_S)
    assert [result.existed for result in gone.results] == [True] * 250 + [False]
    assert not other.Scan(pb.ScanRequest(), timeout=WAIT_S).entries


def cluster(stub: DHTStub, addresses: list[str]) -> None:
    topology = stub.GetTopology(pb.GetTopologyRequest(), timeout=WAIT_S)
    assert sorted(node.address for node in topology.nodes) == sorted(addresses)
    assert topology.epoch == 1 and topology.replication_factor == 3 and topology.cluster
    assert all(node.data_address for node in topology.nodes)
    status = stub.Status(pb.StatusRequest(), timeout=WAIT_S)
    assert status.ready and status.failures_tolerated == 1 and status.node_id in {n.node_id for n in topology.nodes}
    assert len(status.peers) == 2 and all(peer.connected for peer in status.peers)
    located = stub.Locate(pb.LocateRequest(key="k"), timeout=WAIT_S)
    assert set(located.node_ids) == {node.node_id for node in topology.nodes}


def refusals(stub: DHTStub) -> None:
    code, detail = failure(lambda: stub.Get(pb.GetRequest(key=""), timeout=WAIT_S))
    assert (code, detail.code, detail.retryable) == (grpc.StatusCode.INVALID_ARGUMENT, 11, False)
    code, detail = failure(lambda: stub.Scan(pb.ScanRequest(cursor=b"garbage"), timeout=WAIT_S))
    assert (code, detail.code) == (grpc.StatusCode.INVALID_ARGUMENT, 10)
    code, detail = failure(lambda: stub.Put(pb.PutRequest(key="k", value=bytes((8 << 20) + 1)), timeout=WAIT_S))
    assert (code, detail.code) == (grpc.StatusCode.INVALID_ARGUMENT, 12)


def health(channel: grpc.Channel, service: str, wanted: int) -> None:
    """Waits until the service has this state."""
    stub = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
    call = stub.Watch(health_pb2.HealthCheckRequest(service=service), timeout=WAIT_S)
    while next(call).status != wanted:
        pass
    call.cancel()
    assert stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=WAIT_S).status == wanted


def reflection(channel: grpc.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = stub.ServerReflectionInfo(iter([question]), timeout=WAIT_S)
    names = {service.name for service in answer.list_services_response.service}
    ours = "agi.core.dht.v1.DHT"
    assert names == {ours, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}, names


def main(what: str, addresses: list[str]) -> None:
    channels = [grpc.insecure_channel(address, options=SIZES) for address in addresses]
    stubs = [DHTStub(channel) for channel in channels]
    serving = health_pb2.HealthCheckResponse.ServingStatus
    if what == "whole":
        for channel in channels:
            health(channel, "agi.core.dht.v1.DHT", serving.SERVING)
        single_keys(stubs[0], stubs[1])
        under_consensus(stubs[0], stubs[2])
        batches_and_scans(stubs[1], stubs[2])
        cluster(stubs[2], addresses)
        refusals(stubs[0])
        health(channels[0], "", serving.SERVING)
        reflection(channels[0])
    else:
        health(channels[0], "", serving.NOT_SERVING)
        for call in (
            lambda: stubs[0].Put(pb.PutRequest(key="k", value=b"v"), timeout=WAIT_S),
            lambda: stubs[0].Get(pb.GetRequest(key="k"), timeout=WAIT_S),
        ):
            code, detail = failure(call)
            assert (code, detail.code, detail.needed, detail.answered, detail.retryable) == (
                grpc.StatusCode.UNAVAILABLE, 30, 2, 1, True,
            )  # fmt: skip
        status = stubs[0].Status(pb.StatusRequest(), timeout=WAIT_S)
        assert not status.ready and status.reason
    for channel in channels:
        channel.close()
    assert not [name for name in sys.modules if name == "agi" or name.startswith("agi.")]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
