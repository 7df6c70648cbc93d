"""The gRPC contract as a stranger sees it: real nodes, and a client made of nothing but dht.proto."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from agi.core.dht.local import LocalCluster
from agi.core.dht.proto import dht_pb2 as pb
from agi.core.dht.proto.dht_pb2_grpc import DHTStub

CLIENT = Path(__file__).parent / "foreign_client.py"
WAIT_S = 60.0


async def run(*arguments: object, path: Path) -> None:
    """Runs Python on these arguments with only that folder on its path; it has to succeed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, *map(str, arguments),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        cwd=path, env={**os.environ, "PYTHONPATH": str(path)},
    )  # fmt: skip
    try:
        async with asyncio.timeout(WAIT_S):
            said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, said.decode()


async def test_stubs_from_the_contract_alone_reach_everything(tmp_path: Path) -> None:
    stubs, data = tmp_path / "stubs", tmp_path / "data"
    stubs.mkdir()
    data.mkdir()
    with as_file(files("agi.core.dht.proto") / "dht.proto") as contract:
        shutil.copy(contract, stubs)
    await run("-m", "grpc_tools.protoc", "-I.", "--python_out=.", "--grpc_python_out=.", "dht.proto", path=stubs)
    async with LocalCluster(3, data) as cluster:
        await run(CLIENT, "whole", *cluster.addresses, path=stubs)
        await cluster.kill(1)
        await cluster.kill(2)
        await run(CLIENT, "alone", cluster.addresses[0], path=stubs)
        assert await cluster.stop_node(0) == 0


async def test_a_node_that_stops_tells_the_watchers_of_its_health(tmp_path: Path) -> None:
    async with (
        LocalCluster(1, tmp_path, storage="memory") as cluster,
        asyncio.timeout(WAIT_S),
        aio.insecure_channel(cluster.addresses[0]) as channel,
    ):
        stub: Any = HealthStub(channel)  # type: ignore[no-untyped-call]
        call = stub.Watch(HealthCheckRequest(service="agi.core.dht.v1.DHT"))
        while (await call.read()).status != HealthCheckResponse.SERVING:
            pass
        assert await cluster.stop_node(0) == 0
        assert (await call.read()).status == HealthCheckResponse.NOT_SERVING
        assert await call.read() is aio.EOF


async def test_a_call_under_way_at_a_node_that_stops_ends_in_a_typed_error(tmp_path: Path) -> None:
    settings = {"network.drain_timeout_ms": "100"}
    async with (
        LocalCluster(3, tmp_path, storage="memory", settings=settings) as cluster,
        asyncio.timeout(WAIT_S),
        aio.insecure_channel(cluster.addresses[0]) as channel,
    ):
        stub: Any = DHTStub(channel)
        frozen = [cluster.node(i).process for i in (1, 2)]
        try:
            for process in frozen:
                process.send_signal(signal.SIGSTOP)
            put = stub.Put(pb.PutRequest(key="k", value=b"v"), timeout=WAIT_S)
            for _ in range(2):  # these come after the put on the same connection
                assert (await stub.Status(pb.StatusRequest(), timeout=WAIT_S)).node_id == "n0"
            assert await cluster.stop_node(0) == 0
            with pytest.raises(aio.AioRpcError) as caught:
                await put
        finally:
            for process in frozen:
                process.send_signal(signal.SIGCONT)
        details = dict(caught.value.trailing_metadata() or ())
        detail = pb.ErrorDetail.FromString(details["dht-error-bin"])  # type: ignore[arg-type]
        assert caught.value.code() == grpc.StatusCode.UNKNOWN and detail.code == 40 and "stopped" in detail.message
