"""The client for threads: the asyncio client's interface, many threads, interrupts, forks, its end."""

from __future__ import annotations

import concurrent.futures
import gc
import inspect
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from cluster import WAIT_S, ThreadedCluster

from agi.core.dht import (
    BatchError,
    ClientClosed,
    ConnectFailed,
    DHTClient,
    InvalidConsistency,
    InvalidKey,
    InvalidRequest,
    OutcomeUnknown,
    SyncDHTClient,
    Unavailable,
)
from agi.core.dht.transport.native import NativeTransport


@pytest.fixture(scope="module")
def nodes() -> Iterator[ThreadedCluster]:
    cluster = ThreadedCluster()
    yield cluster
    cluster.stop()


@pytest.fixture
def client(nodes: ThreadedCluster) -> Iterator[SyncDHTClient]:
    with nodes.client() as client:
        yield client
        client.delete_many([key for key, _ in client.iterate()])


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "dht-client"]


def test_both_clients_have_the_same_methods_and_signatures() -> None:
    def public(kind: type) -> dict[str, object]:
        names = [name for name in dir(kind) if not name.startswith("_") and callable(getattr(kind, name))]
        return {name: getattr(kind, name) for name in names}

    ours, theirs = public(SyncDHTClient), public(DHTClient)
    assert set(ours) - set(theirs) == {"map"} and set(theirs) <= set(ours)
    for name in [*theirs, "__init__"]:
        mine = inspect.signature(getattr(SyncDHTClient, name))
        other = inspect.signature(getattr(DHTClient, name))
        assert mine.parameters == other.parameters, name
        returned = str(other.return_annotation).replace("AsyncIterator", "Iterator")
        returned = re.sub(r"\bLock\b", "SyncLock", returned)
        assert mine.return_annotation == returned, name
        assert name == "__init__" or (getattr(SyncDHTClient, name).__doc__ or "").split("\n")[0], name


def test_every_call_does_what_it_says(client: SyncDHTClient) -> None:
    assert client.get("k") is None and not client.exists("k") and client.get_entry("k") is None
    version = client.put("k", b"1", ttl_seconds=60)
    entry = client.get_entry("k")
    assert entry is not None and entry.version == version and entry.value == b"1" and entry.expires_at is not None
    assert client.get("k", consistency="ALL", timeout=5) == b"1" and client.exists("k")
    assert client.delete("k") and not client.delete("k")
    items = {f"k{i}": b"%d" % i for i in range(50)}
    assert list(client.put_many(items)) == list(items)
    assert client.get_many(iter(items)) == items
    assert client.scan("k", 3) == [("k0", b"0"), ("k1", b"1"), ("k10", b"10")]
    assert client.delete_many(key for key in ["k0", "none"]) == {"k0": True, "none": False}
    topology = client.topology()
    assert [member["node_id"] for member in topology["members"]] == ["n0", "n1", "n2"]
    assert set(client.status()) == set(client.stats()) == {"n0", "n1", "n2"}
    assert client.locate("k1")["replicas"]["n0"]["state"] == "live"


def test_errors_are_those_of_the_asyncio_client(client: SyncDHTClient) -> None:
    with pytest.raises(InvalidKey):
        client.get("")
    with pytest.raises(InvalidConsistency):
        SyncDHTClient(read_consistency="TWO")
    with pytest.raises(InvalidRequest):
        client.connect(["localhost:1"])
    with pytest.raises(InvalidRequest):
        next(client.iterate(page_size=0))
    assert issubclass(BatchError, Exception) and client.get("k") is None


def test_iterate_fetches_pages_as_they_are_asked_for(nodes: ThreadedCluster, client: SyncDHTClient) -> None:
    client.put_many({f"p{i:03}": b"%d" % i for i in range(100)})

    def scans() -> int:
        return sum(node.metrics.scans for node in nodes.cluster.living())

    before = scans()
    pairs = client.iterate("p", page_size=10)
    assert scans() == before
    assert next(pairs) == ("p000", b"0") and scans() == before + 1
    assert [key for key, _ in (next(pairs) for _ in range(9))] == [f"p{i:03}" for i in range(1, 10)]
    assert scans() == before + 1
    client.put("p0105", b"new")  # what comes before a page is fetched is in it
    assert [key for key, _ in (next(pairs) for _ in range(2))] == ["p010", "p0105"]
    pairs.close()
    assert len(list(client.iterate("p", page_size=7, start="p05", end="p09"))) == 40


def test_many_threads_share_one_client(client: SyncDHTClient) -> None:
    def work(worker: int) -> int:
        for i in range(40):
            key = f"t{worker}:{i}"
            client.put(key, b"%d" % i)
            assert client.get(key) == b"%d" % i
        assert client.delete(f"t{worker}:0")
        return len(list(client.iterate(f"t{worker}:", page_size=11)))

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert list(pool.map(work, range(16))) == [39] * 16


def test_calls_of_threads_share_frames(nodes: ThreadedCluster, client: SyncDHTClient) -> None:
    before = sum(node.metrics.frames_received for node in nodes.cluster.living())
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        list(pool.map(lambda i: client.put(f"k{i % 64}", b"1"), range(1500)))
    frames = sum(node.metrics.frames_received for node in nodes.cluster.living()) - before
    assert frames < 1500 * 5 * 0.6, frames  # alone, a put is one frame in, two to replicas and two back


def test_after_close_every_call_says_so_and_nothing_is_left(nodes: ThreadedCluster) -> None:
    before = len(_threads())
    client = nodes.client()
    view = client.map("m:")
    pages = client.iterate()
    assert len(_threads()) == before + 1
    client.close()
    client.close()
    assert len(_threads()) == before
    for call in (
        lambda: client.get("k"),
        lambda: client.put("k", b"1"),
        lambda: client.delete_many(["k"]),
        lambda: client.scan(),
        lambda: next(pages),
        lambda: view["k"],
        lambda: client.topology(),
        lambda: client.connect(["127.0.0.1:1"]),
    ):
        with pytest.raises(ClientClosed):
            call()
    fresh = SyncDHTClient()
    with pytest.raises(ClientClosed, match="connect"):
        fresh.get("k")
    fresh.close()
    with pytest.raises(ClientClosed):
        fresh.connect(["127.0.0.1:1"])


def test_a_failed_connect_can_be_repeated(nodes: ThreadedCluster) -> None:
    with SyncDHTClient(seed_transport=NativeTransport(), data_transport=NativeTransport()) as client:
        with pytest.raises(ConnectFailed):
            client.connect(["127.0.0.1:1"], timeout=0.2)
        with pytest.raises(ClientClosed):
            client.get("k")
        client.connect(nodes.cluster.addresses)
        assert client.get("k") is None


def test_close_fails_the_calls_of_other_threads(nodes: ThreadedCluster) -> None:
    client = nodes.client(timeout=60, retry_count=10)
    _stall(nodes, True)
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            calls = [pool.submit(client.get, "k"), pool.submit(client.put, "k", b"1"), pool.submit(client.scan)]
            deadline = time.monotonic() + WAIT_S
            while len(client._loop._calls) < 3 and time.monotonic() < deadline:  # type: ignore[union-attr]
                threading.Event().wait(0.005)
            client.close()
            for call in calls:
                with pytest.raises(ClientClosed):
                    call.result(WAIT_S)
    finally:
        _stall(nodes, False)


def _stall(nodes: ThreadedCluster, stalled: bool) -> None:
    """Nodes take requests and never answer."""

    async def switch() -> None:
        for node in nodes.cluster.living():
            if stalled:
                node.message = lambda link, message: None  # type: ignore[method-assign]
            else:
                del node.message

    nodes.run(switch())


def test_a_call_ends_by_its_deadline(nodes: ThreadedCluster, client: SyncDHTClient) -> None:
    _stall(nodes, True)
    try:
        started = time.monotonic()
        with pytest.raises(Unavailable):
            client.get("k", timeout=0.3)
        with pytest.raises(OutcomeUnknown):
            client.put("k", b"1", timeout=0.3)
        assert time.monotonic() - started < 1.2
    finally:
        _stall(nodes, False)


def test_an_interrupt_ends_the_wait_and_leaves_the_client_usable(nodes: ThreadedCluster, client: SyncDHTClient) -> None:
    client.put("k", b"1")
    _stall(nodes, True)
    try:
        timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            client.get("k", timeout=30)
        assert time.monotonic() - started < 5
        timer.join()
    finally:
        _stall(nodes, False)
    assert client.get("k") == b"1"
    deadline = time.monotonic() + WAIT_S
    while client._loop._calls and time.monotonic() < deadline:  # type: ignore[union-attr]
        threading.Event().wait(0.005)
    assert not client._loop._calls  # type: ignore[union-attr]  # the call was given up, not left behind


def test_a_callback_that_calls_the_client_is_told_not_to(client: SyncDHTClient) -> None:
    client.put("k", b"1")
    lock = client.lock("l", timeout=0)
    iterator = client.iterate()

    def take() -> None:
        with lock:
            pass

    calls: list[Callable[[], object]] = [
        lambda: client.get("k"),
        lambda: client.update("k", lambda value: b"3"),
        lambda: next(iterator),
        take,
    ]
    errors: list[InvalidRequest] = []

    def change(value: bytes | None) -> bytes:
        for call in calls:
            with pytest.raises(InvalidRequest, match="callback") as caught:
                call()
            errors.append(caught.value)
        return b"2"

    done = threading.Event()

    def work() -> None:
        assert client.update("k", change) == b"2"
        told = client.repair(on_progress=lambda name, state: client.get("k"))
        assert all("callback" in state["error"] for state in told.values()), told
        done.set()

    threading.Thread(target=work, daemon=True).start()
    assert done.wait(WAIT_S)
    assert len(errors) == len(calls) and client.get("k") == b"2"


def test_a_forked_child_is_told_and_does_not_disturb_its_parent(client: SyncDHTClient) -> None:
    client.put("k", b"1")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            client.get("k")
        except ClientClosed as error:
            client.close()
            code = 0 if "forked" in str(error) else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert client.get("k") == b"1"


def test_a_forgotten_client_ends_its_thread(nodes: ThreadedCluster) -> None:
    before = len(_threads())
    client = nodes.client()
    assert client.get("k") is None and len(_threads()) == before + 1
    del client
    gc.collect()
    assert len(_threads()) == before
