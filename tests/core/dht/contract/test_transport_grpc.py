"""What only the gRPC tunnel has: errors as statuses, TLS, one channel for many links."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc import aio
from transport_harness import DEADLINE_S, PATIENT, Recorder, large, question, until

from agi.core.dht import errors
from agi.core.dht.errors import BatchError, ConnectFailed, DHTError, LinkClosed, ProtocolMismatch, Unavailable
from agi.core.dht.proto import dht_pb2
from agi.core.dht.proto.dht_pb2 import ErrorDetail, Frame
from agi.core.dht.proto.dht_pb2_grpc import DHTServicer, DHTStub, add_DHTServicer_to_server
from agi.core.dht.transport.codec import encode
from agi.core.dht.transport.grpc import (
    CHANNEL_OPTIONS,
    PIECE_BYTES_MAX,
    SERVER_OPTIONS,
    GrpcTransport,
    abort,
    from_rpc_error,
    to_status,
)
from agi.core.dht.types import VALUE_BYTES_MAX

KINDS = [getattr(errors, name) for name in errors.__all__ if name != "from_wire"]
STATUS = {
    "INVALID_ARGUMENT": "InvalidRequest InvalidKey InvalidValue InvalidTTL InvalidConsistency InvalidAddress "
    "NotACounter WrongFence",
    "UNAVAILABLE": "Unavailable NotReady Truncated TransportError ConnectFailed LinkClosed",
    "RESOURCE_EXHAUSTED": "Overloaded StorageFull FrameTooLarge",
    "UNKNOWN": "OutcomeUnknown",
    "ABORTED": "StaleEpoch LockLost LockHeld",
    "DATA_LOSS": "StorageCorrupt",
    "CANCELLED": "ClientClosed",
    "FAILED_PRECONDITION": "ConfigError ClockSkew ClusterError HelloRefused UnknownDisk ClonedNode BootstrapConflict "
    "ChangeRefused Removed ProtocolMismatch VersionConflict FenceRejected",
    "INTERNAL": "DHTError BatchError StorageError StorageClosed FolderMismatch FolderUnusable",
}


class Service(DHTServicer):
    """Ends every Get with one error, and answers every Put with the size of its value."""

    def __init__(self, error: DHTError | None = None) -> None:
        self.error = error

    async def Get(  # type: ignore[override]  # noqa: N802  # the name is the contract's
        self, request: dht_pb2.GetRequest, context: aio.ServicerContext[dht_pb2.GetRequest, dht_pb2.GetResponse]
    ) -> dht_pb2.GetResponse:
        if self.error is None:
            await asyncio.sleep(DEADLINE_S)
            raise AssertionError
        await abort(context, self.error)

    async def Put(  # type: ignore[override]  # noqa: N802  # the name is the contract's
        self, request: dht_pb2.PutRequest, context: aio.ServicerContext[dht_pb2.PutRequest, dht_pb2.PutResponse]
    ) -> dht_pb2.PutResponse:
        return dht_pb2.PutResponse(version=len(request.value))


@pytest.fixture
async def service() -> AsyncIterator[tuple[Service, DHTStub]]:
    """A server of the whole contract, and a stub to it."""
    server = aio.server(options=SERVER_OPTIONS)
    service = Service()
    add_DHTServicer_to_server(service, server)  # type: ignore[arg-type]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with aio.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
        yield service, DHTStub(channel)
    await server.stop(None)


def test_every_error_has_its_status() -> None:
    table = {name: status for status, names in STATUS.items() for name in names.split()}
    assert set(table) == {kind.__name__ for kind in KINDS}
    for kind in KINDS:
        error = BatchError({"k": Unavailable("few")}) if kind is BatchError else kind("why")
        assert to_status(error)[0].name == table[kind.__name__], kind


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not BatchError])
async def test_errors_survive_a_call(service: tuple[Service, DHTStub], kind: type[DHTError]) -> None:
    service[0].error = kind("naïve\nwhy", needed=2, answered=1)
    with pytest.raises(aio.AioRpcError) as caught:
        await service[1].Get(dht_pb2.GetRequest(key="k"), timeout=DEADLINE_S)
    back = from_rpc_error(caught.value)
    assert type(back) is kind
    assert (back.message, back.needed, back.answered) == ("naïve\nwhy", 2, 1)
    detail = ErrorDetail.FromString(dict(caught.value.trailing_metadata() or ())["dht-error-bin"])
    assert (detail.code, detail.retryable) == (kind.code, kind.retryable)


@pytest.mark.parametrize("version", [0, 1, (1 << 63) - 1])
async def test_a_conflict_brings_the_version_that_there_is(service: tuple[Service, DHTStub], version: int) -> None:
    service[0].error = errors.VersionConflict("moved", version=version)
    with pytest.raises(aio.AioRpcError) as caught:
        await service[1].Get(dht_pb2.GetRequest(key="k"), timeout=DEADLINE_S)
    back = from_rpc_error(caught.value)
    assert isinstance(back, errors.VersionConflict) and back.version == version
    detail = ErrorDetail.FromString(dict(caught.value.trailing_metadata() or ())["dht-error-bin"])
    assert detail.current_version == version


async def test_a_long_or_broken_text_does_not_lose_the_error(service: tuple[Service, DHTStub]) -> None:
    service[0].error = Unavailable("ä" * 100_000 + "\udc80")
    with pytest.raises(aio.AioRpcError) as caught:
        await service[1].Get(dht_pb2.GetRequest(key="k"), timeout=DEADLINE_S)
    back = from_rpc_error(caught.value)
    assert type(back) is Unavailable
    assert back.message == "ä" * 1024
    service[0].error = Unavailable("\udc80")
    with pytest.raises(aio.AioRpcError) as caught:
        await service[1].Get(dht_pb2.GetRequest(key="k"), timeout=DEADLINE_S)
    assert from_rpc_error(caught.value).message == "?"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("UNAVAILABLE", errors.LinkClosed),
        ("CANCELLED", errors.LinkClosed),
        ("DEADLINE_EXCEEDED", errors.OutcomeUnknown),
        ("INTERNAL", errors.OutcomeUnknown),
        ("UNKNOWN", errors.OutcomeUnknown),
        ("UNIMPLEMENTED", errors.ProtocolMismatch),
        ("INVALID_ARGUMENT", errors.InvalidRequest),
        ("RESOURCE_EXHAUSTED", errors.Overloaded),
        ("UNAUTHENTICATED", errors.HelloRefused),
        ("PERMISSION_DENIED", errors.HelloRefused),
    ],
)
@pytest.mark.parametrize("metadata", [None, aio.Metadata(("dht-error-bin", b"\xff\xff"))], ids=["bare", "damaged"])
def test_statuses_without_our_detail(status: str, kind: type[DHTError], metadata: aio.Metadata | None) -> None:
    error = aio.AioRpcError(grpc.StatusCode[status], aio.Metadata(), metadata or aio.Metadata(), details="because")
    back = from_rpc_error(error)
    assert type(back) is kind
    assert "because" in str(back)
    assert status in str(back)


async def test_the_deadline_of_a_call_leaves_its_outcome_unknown(service: tuple[Service, DHTStub]) -> None:
    with pytest.raises(aio.AioRpcError) as caught:
        await service[1].Get(dht_pb2.GetRequest(key="k"), timeout=0.1)
    assert type(from_rpc_error(caught.value)) is errors.OutcomeUnknown


async def test_the_largest_value_fits_into_a_call_and_a_larger_message_is_typed(
    service: tuple[Service, DHTStub],
) -> None:
    request = dht_pb2.PutRequest(key="k" * 1024, value=bytes(VALUE_BYTES_MAX))
    assert (await service[1].Put(request, timeout=DEADLINE_S)).version == VALUE_BYTES_MAX
    with pytest.raises(aio.AioRpcError) as caught:
        await service[1].Put(dht_pb2.PutRequest(value=bytes(2 * VALUE_BYTES_MAX + 1)), timeout=DEADLINE_S)
    assert type(from_rpc_error(caught.value)) is errors.FrameTooLarge


async def test_a_server_without_the_tunnel_cannot_be_connected_to() -> None:
    server = aio.server(options=SERVER_OPTIONS)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    with pytest.raises(ConnectFailed, match="Method not found"):
        await GrpcTransport().connect(f"127.0.0.1:{port}", Recorder())
    await server.stop(None)


class Two:
    """A listening transport and one that connects to it."""

    def __init__(self, server: GrpcTransport | None = None, client: GrpcTransport | None = None) -> None:
        self.server, self.client = Recorder(), Recorder()
        self._accepts = server or GrpcTransport(**PATIENT)
        self.transport = client or GrpcTransport(**PATIENT)

    async def __aenter__(self) -> Two:
        self.listener = await self._accepts.listen("127.0.0.1:0", self.server)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.listener.close()
        await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})


async def _wait_for_end(two: Two, links: int) -> None:
    await two.client.until(lambda: len(two.client.closed) == links)
    await two.server.until(lambda: len(two.server.closed) == links)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The target of each channel that is opened."""
    targets: list[str] = []
    insecure_channel = aio.insecure_channel

    def record(target: str, **kwargs: Any) -> aio.Channel:
        targets.append(target)
        return insecure_channel(target, **kwargs)

    monkeypatch.setattr(aio, "insecure_channel", record)
    return targets


async def test_links_share_a_channel_until_the_last_has_ended(opened: list[str]) -> None:
    async with Two() as two:
        links = [await two.transport.connect(two.listener.address, two.client) for _ in range(4)]
        for number, link in enumerate(links):
            link.send(question(number))
        await two.server.until(lambda: len(two.server.heard) == 4)
        assert len({link.peer for link, _ in two.server.heard}) == 1, "one connection"
        links[0].close()
        await _wait_for_end(two, 1)
        links[1].send(question(9))
        await two.server.until(lambda: 9 in two.server.ids())
        assert len(opened) == 1
        for link in links:
            link.close()
        await _wait_for_end(two, 4)
        (await two.transport.connect(two.listener.address, two.client)).close()
        await _wait_for_end(two, 5)
        assert len(opened) == 2


async def test_after_a_broken_link_the_next_gets_a_new_channel_and_the_others_keep_theirs(opened: list[str]) -> None:
    async with Two() as two:
        kept, broken = [await two.transport.connect(two.listener.address, two.client) for _ in range(2)]
        broken.send_frame(b"nonsense")
        await _wait_for_end(two, 1)
        assert [(link, type(error)) for link, error in two.client.closed] == [(broken, ProtocolMismatch)]
        assert len(opened) == 1
        fresh = await two.transport.connect(two.listener.address, two.client)
        assert len(opened) == 2
        for number, link in enumerate((kept, fresh)):
            link.send(question(number))
            await two.server.until(lambda number=number: number in two.server.ids())
            link.close()
        await _wait_for_end(two, 3)


async def test_a_client_that_vanishes_is_a_broken_link() -> None:
    async with Two() as two, aio.insecure_channel(two.listener.address) as channel:
        call = DHTStub(channel).Exchange(timeout=DEADLINE_S)
        await call.write(Frame(data=encode(question(1))))
        await two.server.until(lambda: two.server.heard)
        call.cancel()
        await two.server.until(lambda: two.server.closed)
        assert [type(error) for _, error in two.server.closed] == [LinkClosed]


async def test_a_stream_that_just_ends_is_a_broken_link_and_a_last_piece_an_orderly_end() -> None:
    async with Two() as two, aio.insecure_channel(two.listener.address) as channel:
        for last, kind in ((False, LinkClosed), (True, type(None))):
            call = DHTStub(channel).Exchange(timeout=DEADLINE_S)
            await call.write(Frame(data=encode(question(1)), last=last))
            await call.done_writing()
            while await call.read() is not aio.EOF:
                pass
            assert await call.code() is grpc.StatusCode.OK
            assert type(two.server.closed.pop()[1]) is kind
        assert two.server.ids() == [1, 1]


async def test_a_client_whose_bytes_are_no_frames_learns_so() -> None:
    async with Two() as two, aio.insecure_channel(two.listener.address) as channel:
        call = DHTStub(channel).Exchange(timeout=DEADLINE_S)
        await call.write(Frame(data=b"nonsense"))
        with pytest.raises(aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert type(from_rpc_error(caught.value)) is ProtocolMismatch


async def test_pieces_stay_below_the_default_limits_of_other_clients() -> None:
    async with Two() as two, aio.insecure_channel(two.listener.address) as channel:
        call = DHTStub(channel).Exchange(timeout=DEADLINE_S)
        await call.write(Frame(data=encode(question(1))))
        await two.server.until(lambda: two.server.heard)
        frames = [
            encode(large(number, size)) for number, size in enumerate((10, 3 << 20, 10, VALUE_BYTES_MAX, 700_000))
        ]
        for frame in frames * 2:
            two.server.heard[0][0].send_frame(frame)
        two.server.heard[0][0].close()
        data, sizes = b"", []
        while (piece := await call.read()) is not aio.EOF:
            data += piece.data
            sizes.append(len(piece.data))
        assert data == b"".join(frames * 2)
        assert max(sizes) == PIECE_BYTES_MAX


async def test_a_port_in_use_is_refused_for_another_server_too() -> None:
    """gRPC's default would let two processes share it."""
    async with Two() as two:
        other = aio.server(options=SERVER_OPTIONS)
        with pytest.raises(RuntimeError):
            other.add_insecure_port(two.listener.address)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """The key of a certificate for 127.0.0.1 that signs itself, and the certificate."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl program to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=node"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run([*command.split(), *names], cwd=folder, check=True, capture_output=True, timeout=30)
    return (folder / "key.pem").read_bytes(), (folder / "cert.pem").read_bytes()


async def test_tls(certificate: tuple[bytes, bytes]) -> None:
    server = grpc.ssl_server_credentials([certificate])
    trusting = grpc.ssl_channel_credentials(root_certificates=certificate[1])
    async with Two(
        GrpcTransport(server_credentials=server, **PATIENT), GrpcTransport(channel_credentials=trusting, **PATIENT)
    ) as two:
        link = await two.transport.connect(two.listener.address, two.client)
        link.send(large(1, VALUE_BYTES_MAX))
        await two.server.until(lambda: two.server.heard)
        for stranger in (GrpcTransport(), GrpcTransport(channel_credentials=grpc.ssl_channel_credentials())):
            with pytest.raises(ConnectFailed):
                await stranger.connect(two.listener.address, Recorder(), timeout_s=2)
        link.close()
        await _wait_for_end(two, 1)
