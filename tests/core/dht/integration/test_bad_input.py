"""What must not work: nodes that may not start, nodes that do not fit, strangers on the wire, wrong calls.

Each ends in one clear line and an exit code, or in a typed error at the caller; nothing is written, nothing hangs, and
the nodes that run serve on.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from process_harness import ANY_PORTS, NodeProcess, asking, held_ports, node, refused, until

from agi.core.dht.client import DHTClient, session
from agi.core.dht.errors import (
    ConfigError,
    ConnectFailed,
    DHTError,
    FolderMismatch,
    FolderUnusable,
    HelloRefused,
    InvalidAddress,
    InvalidConsistency,
    InvalidKey,
    InvalidRequest,
    InvalidTTL,
    InvalidValue,
    LinkClosed,
    ProtocolMismatch,
)
from agi.core.dht.protocol.messages import Get, Hello, Put
from agi.core.dht.transport.base import IDLE_TIMEOUT_S
from agi.core.dht.transport.codec import MAGIC, encode
from agi.core.dht.transport.handshake import greet
from agi.core.dht.transport.native import NativeTransport
from agi.core.dht.types import FRAME_BYTES_MAX, KEY_BYTES_MAX, PROTOCOL_VERSION, VALUE_BYTES_MAX, Consistency


async def serves(running: NodeProcess, keys: int = 0) -> None:
    """The node lives, writes and reads, and holds so many keys beside the one written here."""
    assert running.process.returncode is None
    async with asking(running.data_address) as asker:
        await asker.until_status(lambda status: status["ready"])
        written = await asker.ask(Put(1, Consistency.QUORUM, 5000, [b"probe"], [b"1"]))
        assert written.error is None and written.errors is None
        read = await asker.ask(Get(2, Consistency.QUORUM, 5000, [b"probe"]))
        assert read.records[0].endswith(b"1")
        assert (await asker.query("status"))["keys"] == keys + 1


# --- ports


async def test_ports_derived_from_one_nodes_that_another_has(tmp_path: Path) -> None:
    with held_ports(3) as (port, data_port, http_port):
        own = ["--set", "network.reuse_port=true", "--set", f"network.data_port={data_port}"]
        own += ["--set", f"network.http_port={http_port}"]
        async with node(tmp_path, "--port", port, *own) as running:
            for taken in (port, data_port, http_port):  # as where two nodes' ports are 1000 or 2000 apart
                arguments = ["--port", 0, "--storage", "memory", *ANY_PORTS, "--set"]
                options = ("network.port", "network.data_port", "network.http_port")
                for ended in await asyncio.gather(
                    *(refused(tmp_path, *arguments, f"{option}={taken}") for option in options)
                ):
                    assert ended.code == ConnectFailed.exit_code
                    assert f"127.0.0.1:{taken}" in ended.error
            await serves(running)


async def test_ports_of_one_node_that_meet(tmp_path: Path) -> None:
    for settings, message in (
        (["--port", 7000, "--set", "network.data_port=7000"], "are the same port, 7000"),
        (["--port", 7000, "--set", "network.http_port=8000"], "are the same port, 8000"),
        (["--port", 65000], "data_port = port + 1000 would be 66000, past 65535"),
    ):
        ended = await refused(tmp_path, *settings)
        assert ended.code == ConfigError.exit_code and message in ended.error
    assert not (tmp_path / "dht-data").exists()


# --- folders


@pytest.mark.parametrize("where", ["under a file", "a file", "nowhere"])
async def test_a_data_folder_that_cannot_be_made(tmp_path: Path, where: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"not a folder")
    path = {"under a file": file / "data", "a file": file, "nowhere": Path("/proc/no/such/folder")}[where]
    ended = await refused(tmp_path, "--port", 0, *ANY_PORTS, "--path", path)
    assert ended.code == FolderUnusable.exit_code and str(path) in ended.error
    assert file.read_bytes() == b"not a folder"


async def test_a_unix_socket_that_cannot_be_made(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"not a socket")
    for path in (file, file / "a.sock", tmp_path):
        arguments = ["--port", 0, "--storage", "memory", *ANY_PORTS, "--set", f"network.unix_socket={path}"]
        ended = await refused(tmp_path, *arguments)
        assert ended.code == ConnectFailed.exit_code and f"unix:{path}" in ended.error
    assert file.read_bytes() == b"not a socket"


async def test_a_folder_of_another_node_cluster_or_set(tmp_path: Path) -> None:
    mine = ["--node-id", "mine", "--path", tmp_path / "data"]
    async with node(tmp_path, *mine, storage="rocksdb") as running:
        await serves(running)
    for difference, message in (
        (["--node-id", "other"], "belongs to node mine, not other"),
        (["--set", "cluster.name=other"], "belongs to cluster dht, not other"),
        (["--set", "replication.factor=5"], "has replication factor 3, the configuration says 5"),
        (["--set", "ring.virtual_nodes=7"], "has virtual nodes 150, the configuration says 7"),
        (["--set", "ring.hash_algorithm=md5"], "has hash algorithm xxh3, the configuration says md5"),
        (["--peers", "127.0.0.1:1"], "formed by other peers: it does not know 127.0.0.1:1"),
    ):
        ended = await refused(tmp_path, "--port", 0, *ANY_PORTS, *mine, *difference)
        assert ended.code == FolderMismatch.exit_code and message in ended.error
    known = f"{running.address},127.0.0.1:1"  # as where a node is still to join, or has left
    async with node(tmp_path, *mine, "--peers", known, storage="rocksdb") as running:
        await serves(running)
    async with node(tmp_path, *mine, storage="rocksdb") as running:  # none of them did it any harm
        async with asking(running.data_address) as asker:
            assert (await asker.until_status(lambda status: status["ready"]))["keys"] == 1
        await serves(running)


async def test_two_processes_on_one_folder(tmp_path: Path) -> None:
    mine = ["--node-id", "mine", "--path", tmp_path / "data"]
    async with node(tmp_path, *mine, storage="rocksdb") as running:
        ended = await refused(tmp_path, "--port", 0, *ANY_PORTS, *mine)
        assert ended.code == FolderUnusable.exit_code and str(tmp_path / "data") in ended.error
        await serves(running)


# --- settings


async def test_a_wrong_configuration_file_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "dht.yaml"
    path.write_text("dht:\n  network:\n    port: 0\n    prot: 1\n", encoding="utf-8")
    ended = await refused(tmp_path, "--config", path)
    assert ended.code == ConfigError.exit_code
    assert ended.error == f"{path}:4: unknown key dht.network.prot; did you mean dht.network.port?"
    assert not (tmp_path / "dht-data").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "localhost"], "'localhost' is not host:port"),
        (["--peers", "localhost:7001,localhost:70000"], "'localhost:70000': the port must be 1 to 65535"),
        (["--peers", "::1:7001"], "'::1:7001' is not host:port (write an IPv6 address as [::1]:7000)"),
        (["--peers", "a b:1"], "'a b:1' is not host:port"),
        (["--peers", "10.0.0.9:7000"], "by which 10.0.0.9:7000 cannot reach this node"),
        (["--port", "seven"], "dht.network.port must be an integer from 0 to 65535, not 'seven'"),
        (["--set", "replication.factor"], "--set takes KEY=VALUE, not 'replication.factor'"),
        (["--set", "replication.fcator=3"], "unknown key dht.replication.fcator"),
        (["--storage", "disk"], "dht.storage.backend must be one of memory, rocksdb, redis"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
async def test_wrong_settings(tmp_path: Path, arguments: list[str], message: str) -> None:
    ended = await refused(tmp_path, "--port", "0", *arguments)
    assert ended.code == ConfigError.exit_code and message in ended.error
    assert list(tmp_path.iterdir()) == []  # nothing else runs here


async def test_port_0_with_peers_waits_for_them_under_its_real_address(tmp_path: Path) -> None:
    """A launcher may start nodes so; one whose peers do not list it says what it waits for."""
    async with node(tmp_path, "--peers", "127.0.0.1:1,127.0.0.1:2") as lone, asking(lone.data_address) as asker:
        assert lone.announced["port"] > 0 and lone.announced["node_id"] == f"127.0.0.1:{lone.announced['port']}"
        status = await asker.until_status(lambda status: "waiting for 2 of 2" in status["waiting_for"])
        assert not status["ready"] and "127.0.0.1:1" in status["waiting_for"] and "127.0.0.1:2" in status["waiting_for"]
        reply = await asker.ask(Put(1, Consistency.ONE, 5000, [b"k"], [b"v"]))
        assert "is not ready: waiting for 2 of 2 configured peers" in reply.error[1]
        assert (await asker.query("status"))["keys"] == 0


# --- nodes that do not fit


DIFFERENCES = {
    "cluster": ("cluster.name=other", "cluster is 'other' at {theirs} and 'dht' at {ours}"),
    "factor": ("replication.factor=5", "factor is 5 at {theirs} and 3 at {ours}"),
    "points": ("ring.virtual_nodes=7", "virtual_nodes is 7 at {theirs} and 150 at {ours}"),
    "hash": ("ring.hash_algorithm=md5", "hash_algorithm is 'md5' at {theirs} and 'xxh3' at {ours}"),
}


async def test_nodes_whose_settings_differ_refuse_each_other_and_both_logs_say_in_what(tmp_path: Path) -> None:
    with held_ports(1 + len(DIFFERENCES)) as ports:
        addresses = dict(zip(["fits", *DIFFERENCES], (f"127.0.0.1:{port}" for port in ports), strict=True))
        async with AsyncExitStack() as stack:
            nodes = {}
            for name, address in addresses.items():
                peers = addresses["fits"] if name != "fits" else ",".join(addresses[other] for other in DIFFERENCES)
                arguments = ["--port", address.rpartition(":")[2], "--peers", peers, "--node-id", name]
                arguments += ["--set", "network.reuse_port=true", "--set", "observability.log_format=json"]
                if name != "fits":
                    arguments += ["--set", DIFFERENCES[name][0]]
                nodes[name] = await stack.enter_async_context(node(tmp_path, *arguments, name=name))

            def logged(running: NodeProcess, event: str, field: str) -> str:
                return "\n".join(str(line[field]) for line in running.events(event))

            for name, (_, message) in DIFFERENCES.items():
                # Each side hears the other's Hello, or is refused by it; either way both names and values are said.
                said = message.format(theirs=name, ours="fits")
                key, _, rest = said.partition(" is ")
                theirs, _, ours = rest.partition(" and ")
                turned = f"{key} is {ours} and {theirs}"

                def says(running: NodeProcess, said: str = said, turned: str = turned) -> bool:
                    log = logged(running, "bootstrap_waiting", "reason") + logged(running, "hello_refused", "error")
                    return said in log or turned in log

                await until(lambda: says(nodes["fits"]), f"the node itself names: {said}")  # awaited here
                await until(lambda: says(nodes[name]), f"{name} names: {said}")  # noqa: B023
            for running in nodes.values():
                async with asking(running.data_address) as asker:
                    status = await asker.query("status")
                    assert status["epoch"] == 0 and not status["ready"]


# --- strangers on the wire


@asynccontextmanager
async def raw(running: NodeProcess) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, _, port = running.data_address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.close()
        await writer.wait_closed()


async def hung_up(reader: asyncio.StreamReader) -> bytes:
    """What the node still said before it ended the connection, which it has to."""
    async with asyncio.timeout(20):
        return await reader.read()


HELLO = encode(Hello(PROTOCOL_VERSION, "client", "stranger"))
GARBAGE = {
    "noise": (bytes(range(256)) * 4, "not a frame of this protocol"),
    "http": (b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n", "not a frame of this protocol"),
    "tls": (bytes.fromhex("16030100c8010000c40303") + bytes(200), "not a frame of this protocol"),
    "an oversized frame": (struct.pack("<IBB", FRAME_BYTES_MAX + 1, MAGIC, 1), f"the limit is {FRAME_BYTES_MAX}"),
    "a wrong body": (struct.pack("<IBB", 6, MAGIC, 1) + b"\xc1\xc1\xc1\xc1", "a body of the wrong shape"),
    "a request before the hello": (encode(Get(1, 2, 1000, [b"k"])), "the first message of a link is a Hello"),
    "a reply": (HELLO + encode(Hello(PROTOCOL_VERSION, "client", "again")), "is no request"),
    "garbage after the hello": (HELLO + b"\xff" * 64, "not a frame of this protocol"),
}


async def test_garbage_ends_its_link_and_nothing_else(tmp_path: Path) -> None:
    async with node(tmp_path, "--set", "observability.log_format=json") as running:
        await serves(running)
        for sent, _ in GARBAGE.values():
            async with raw(running) as (reader, writer):
                writer.write(sent)
                await hung_up(reader)
            await serves(running)
        logged = [line["error"] for line in running.events("link_refused")]
        assert len(logged) == len(GARBAGE)
        for (what, (_, message)), line in zip(GARBAGE.items(), logged, strict=True):
            assert message in line, what
        assert "Traceback" not in running.said() and running.events("link_handler_failed") == []


async def test_half_a_frame_and_then_silence_is_hung_up_on(tmp_path: Path) -> None:
    async with node(tmp_path) as running, raw(running) as (early, silent), raw(running) as (late, after_hello):
        silent.write(HELLO[: len(HELLO) // 2])
        after_hello.write(HELLO + encode(Put(1, 1, 1000, [b"k"], [b"v" * 1000]))[:100])
        started = time.monotonic()
        await serves(running)
        assert time.monotonic() - started < IDLE_TIMEOUT_S  # nobody waits for them
        await asyncio.gather(hung_up(early), hung_up(late))
        assert time.monotonic() - started > IDLE_TIMEOUT_S / 2  # it was the silence that ended them
        await serves(running)  # and what came in half was not written


async def test_another_protocol_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with node(tmp_path) as running:
        future = Hello(PROTOCOL_VERSION + 1, "client", "future")

        class Nobody:
            def message(self, link: object, message: object) -> None: ...

            def link_closed(self, link: object, error: DHTError | None) -> None: ...

        said = (
            f"future speaks protocol {PROTOCOL_VERSION + 1}, {running.announced['node_id']} speaks {PROTOCOL_VERSION}"
        )
        with pytest.raises(ProtocolMismatch) as caught:
            await greet(NativeTransport(), running.data_address, future, Nobody())
        assert str(caught.value) == said
        assert [line["error"] for line in running.events("hello_refused")] == [said]
        monkeypatch.setattr(session, "PROTOCOL_VERSION", PROTOCOL_VERSION + 1)
        client = DHTClient()
        started = time.monotonic()
        with pytest.raises(ProtocolMismatch, match=f"speaks {PROTOCOL_VERSION}$"):
            await client.connect([running.address], timeout=20)
        assert time.monotonic() - started < 10  # at once: trying again cannot help
        await client.close()
        await serves(running)


# --- wrong calls


async def test_wrong_calls_are_typed_errors_and_write_nothing(tmp_path: Path) -> None:
    async with node(tmp_path) as running, DHTClient() as client:
        await client.connect([running.address])
        calls: list[tuple[type[DHTError], Callable[[], Awaitable[object]]]] = []
        bad: object
        for bad in ("", "k" * (KEY_BYTES_MAX + 1), "ü" * (KEY_BYTES_MAX // 2 + 1), "\ud800", b"k", 1, None):
            calls += [
                (InvalidKey, lambda bad=bad: client.get(bad)),
                (InvalidKey, lambda bad=bad: client.put(bad, b"v")),
                (InvalidKey, lambda bad=bad: client.delete(bad)),
                (InvalidKey, lambda bad=bad: client.get_many(["good", bad])),
                (InvalidKey, lambda bad=bad: client.put_many({"good": b"v", bad: b"v"})),
                (InvalidKey, lambda bad=bad: client.locate(bad)),
            ]
        for bad in ("text", 1, None, [b"v"], b"v" * (VALUE_BYTES_MAX + 1)):
            calls += [
                (InvalidValue, lambda bad=bad: client.put("good", bad)),
                (InvalidValue, lambda bad=bad: client.put_many({"fine": b"v", "good": bad})),
            ]
        for bad in (-1, 0, float("nan"), float("inf"), 1e12, "60", True):
            calls += [
                (InvalidTTL, lambda bad=bad: client.put("good", b"v", ttl_seconds=bad)),
                (InvalidTTL, lambda bad=bad: client.put_many({"good": b"v"}, ttl_seconds=bad)),
            ]
        for bad in ("MOST", "", 2.5, 9):
            calls += [
                (InvalidConsistency, lambda bad=bad: client.put("good", b"v", consistency=bad)),
                (InvalidConsistency, lambda bad=bad: client.get("good", consistency=bad)),
                (InvalidConsistency, lambda bad=bad: client.scan("good", consistency=bad)),
            ]
        for bad in (0, -1, float("nan"), "1", 1e9):
            calls += [(InvalidRequest, lambda bad=bad: client.put("good", b"v", timeout=bad))]
        for bad in (0, -1, 1.5):
            calls += [(InvalidRequest, lambda bad=bad: client.scan("good", bad))]
        for kind, call in calls:
            with pytest.raises(DHTError) as caught:
                await call()
            assert type(caught.value) is kind and not caught.value.retryable and str(caught.value)
        assert await client.scan() == []
        await serves(running)


async def test_wrong_addresses_and_clusters_at_the_client(tmp_path: Path) -> None:
    async with node(tmp_path) as running:
        for address in ("localhost", "localhost:", "localhost:0", "localhost:65536", "::1:7000", "a b:1", ""):
            with pytest.raises(InvalidAddress):
                await DHTClient().connect([address])
        for addresses in ([], running.address):
            with pytest.raises(InvalidRequest):
                await DHTClient().connect(addresses)
        with pytest.raises(HelloRefused, match="this is cluster 'dht', not 'other'"):
            await DHTClient(cluster="other").connect([running.address], timeout=20)
        with pytest.raises(ConnectFailed):
            await DHTClient().connect(["127.0.0.1:1"], timeout=0.3)
        with pytest.raises((ConnectFailed, LinkClosed)):  # the native wire is not the gRPC port
            await DHTClient().connect([running.data_address], timeout=0.5)
        await serves(running)
