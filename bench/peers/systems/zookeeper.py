"""ZooKeeper, three nodes, through kazoo: a synchronous client whose own threads hand its answers over to the loop.

Every write is agreed by Zab and synced by a majority; reads are of the node that one is connected to, here the leader.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers.base import CALL_TIMEOUT_S, CALLERS_MAX, Calls, Facts, PeerFailed, Running
from bench.peers.processes import HOST, START_TIMEOUT_S, Servers, free_ports

NODES = 3
JAR = "/usr/share/java/zookeeper.jar"
"""Where Debian's package puts it; it names the jars that it needs."""
HEAP_MIB = 1000
POLL_S = 0.2
REPLY_BYTES_MAX = 4096


@dataclass(frozen=True)
class ZooKeeper:
    facts: Facts

    @asynccontextmanager
    async def running(self, folder: Path) -> AsyncIterator[Running]:
        from kazoo.client import KazooClient

        async with Servers(folder) as servers:
            ports = free_ports(3 * NODES)
            clients, members = ports[:NODES], list(zip(ports[NODES::2], ports[NODES + 1 :: 2], strict=True))
            for number in range(NODES):
                await asyncio.to_thread(_configure, folder, number, clients[number], members)
                await servers.spawn(
                    f"zookeeper-{number}", "java", "-cp", JAR, f"-Xmx{HEAP_MIB}m",
                    "org.apache.zookeeper.server.quorum.QuorumPeerMain", folder / f"n{number}.cfg",
                )  # fmt: skip
            for number, port in enumerate(clients):
                await servers.listening(f"zookeeper-{number}", port)
            client = KazooClient(hosts=f"{HOST}:{await _leader(clients)}", timeout=CALL_TIMEOUT_S)
            await asyncio.to_thread(client.start, START_TIMEOUT_S)
            threads = ThreadPoolExecutor(CALLERS_MAX, thread_name_prefix="kazoo-caller")
            try:
                yield Running(_calls(client, threads), servers.pids)
            finally:
                await asyncio.to_thread(client.stop)
                await asyncio.to_thread(client.close)
                threads.shutdown(wait=False, cancel_futures=True)


def _configure(folder: Path, number: int, port: int, members: list[tuple[int, int]]) -> None:
    data = folder / f"n{number}"
    data.mkdir()
    (data / "myid").write_text(f"{number + 1}\n")
    servers = "\n".join(f"server.{i + 1}={HOST}:{peer}:{election}" for i, (peer, election) in enumerate(members))
    (folder / f"n{number}.cfg").write_text(f"""
tickTime=2000
initLimit=10
syncLimit=5
dataDir={data}
clientPort={port}
clientPortAddress={HOST}
maxClientCnxns=0
admin.enableServer=false
4lw.commands.whitelist=srvr
{servers}
""")


async def _leader(ports: list[int]) -> int:
    """The port of the leader, once there is one."""
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while True:
                for port in ports:
                    if b"Mode: leader" in await _ask(port):
                        return port
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise PeerFailed("ZooKeeper has no leader") from None


async def _ask(port: int) -> bytes:
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(b"srvr")
    try:
        return await reader.read(REPLY_BYTES_MAX)
    except ConnectionError:
        return b""
    finally:
        writer.close()


def _calls(client: Any, threads: ThreadPoolExecutor) -> Calls:
    loop = asyncio.get_running_loop()

    async def answer(result: Any) -> Any:
        """Awaits one of kazoo's results, which complete in its thread."""
        future: asyncio.Future[Any] = loop.create_future()
        result.rawlink(lambda done: loop.call_soon_threadsafe(_settle, future, done))
        return await future

    async def get(key: str) -> bytes | None:
        return bytes((await answer(client.get_async(_path(key))))[0])

    async def put(key: str, value: bytes) -> None:
        await answer(client.set_async(_path(key), value))

    async def get_many(keys: list[str]) -> list[bytes | None]:
        return list(await asyncio.gather(*(get(key) for key in keys)))

    async def put_many(items: dict[str, bytes]) -> None:
        transaction = client.transaction()
        for key, value in items.items():
            transaction.set_data(_path(key), value)
        _committed(await answer(transaction.commit_async()))

    async def fill(items: dict[str, bytes]) -> None:
        for folder in {_path(key).rpartition("/")[0] for key in items}:
            await answer(client.ensure_path_async(folder))
        transaction = client.transaction()
        for key, value in items.items():
            transaction.create(_path(key), value)
        _committed(await answer(transaction.commit_async()))

    async def create(key: str, value: bytes) -> int:
        await answer(client.create_async(_path(key), value, makepath=True))
        return 0

    async def swap(key: str, expected: int, value: bytes) -> int:
        return int((await answer(client.set_async(_path(key), value, version=expected))).version)

    def lock_and_release(name: str) -> None:
        with client.Lock(_path(name)):
            return

    async def lock(name: str) -> None:
        await loop.run_in_executor(threads, lock_and_release, name)

    async def scan(prefix: str) -> list[bytes]:
        folder = _path(prefix).rstrip("/")
        names = sorted(await answer(client.get_children_async(folder)))
        found = await asyncio.gather(*(answer(client.get_async(f"{folder}/{name}")) for name in names))
        return [value for value, _ in found]

    return Calls(
        get=get,
        put=put,
        get_many=get_many,
        put_many=put_many,
        fill=fill,
        swap_begin=create,
        swap=swap,
        lock=lock,
        scan=scan,
    )


def _settle(future: asyncio.Future[Any], done: Any) -> None:
    if future.done():  # its caller was cancelled
        return
    if done.exception is not None:
        future.set_exception(done.exception)
    else:
        future.set_result(done.value)


def _committed(results: list[Any]) -> None:
    """A transaction that fails returns its errors instead of raising one."""
    for result in results:
        if isinstance(result, Exception):
            raise result


def _path(key: str) -> str:
    return "/" + key.replace(".", "/")


PEERS = (
    ZooKeeper(
        Facts(
            name="zookeeper",
            title="ZooKeeper",
            guarantee="linearizable writes of 3 replicas (Zab); reads of one node, in its order",
            durability="fsync on 2 of 3 nodes before the answer",
            against="ours-group",
            modules=("kazoo",),
            distributions=("kazoo",),
            programs=("java", JAR),
            packages=("zookeeper", "default-jre-headless"),
            threads=True,
            value_bytes_max=1_000_000,
            note="a batch put is one transaction; a batch get and a scan are 1,000 gets at once",
        )
    ),
)
