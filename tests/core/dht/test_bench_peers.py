"""The side-by-side benchmark: what of it can be looked at without a server."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from bench.peers import bare, report, stats, targets
from bench.peers.base import Calls, Facts, Peer, PeerFailed, Running, missing
from bench.peers.loads import BATCH_KEYS, FULL, LARGE, QUICK, SMALL, Cell, Plan, Sample, fill, measure, refusal
from bench.peers.processes import Servers, cost, free_ports, marked
from bench.peers.results import Named, Results, values
from bench.peers.runner import Options, run
from bench.peers.systems import PEERS

SHORT_S = 0.02
ALL = tuple(Cell(load, SMALL, 1) for load in ("a", "b", "c", "put", "batch_put", "batch_get", "cas", "lock", "scan"))


def facts(name: str = "dict", **more: Any) -> Facts:
    return Facts(name=name, title=name, guarantee="none", durability="none", against=name, **more)


def in_memory() -> Calls:
    """Everything that a client may offer, on a dictionary."""
    kept: dict[str, bytes] = {}

    async def get(key: str) -> bytes | None:
        await asyncio.sleep(0)
        return kept.get(key)

    async def put(key: str, value: bytes) -> None:
        await asyncio.sleep(0)
        kept[key] = value

    async def put_many(items: dict[str, bytes]) -> None:
        await asyncio.sleep(0)
        kept.update(items)

    async def get_many(keys: list[str]) -> list[bytes | None]:
        await asyncio.sleep(0)
        return [kept.get(key) for key in keys]

    async def begin(key: str, value: bytes) -> int:
        await put(key, value)
        return 0

    async def swap(key: str, expected: int, value: bytes) -> int:
        await put(key, value)
        return expected + 1

    async def lock(name: str) -> None:
        await asyncio.sleep(0)

    async def scan(prefix: str) -> list[bytes]:
        await asyncio.sleep(0)
        return [value for key, value in kept.items() if key.startswith(prefix)]

    return Calls(get, put, get_many, put_many, None, begin, swap, lock, scan)


class Fake:
    """A peer without processes."""

    def __init__(self, about: Facts, calls: Calls | None = None, error: Exception | None = None) -> None:
        self._facts, self._calls, self._error = about, calls or in_memory(), error
        self.turns = 0

    @property
    def facts(self) -> Facts:
        return self._facts

    @asynccontextmanager
    async def running(self, folder: Path) -> AsyncIterator[Running]:
        self.turns += 1
        if self._error is not None:
            raise self._error
        assert not list(folder.iterdir())
        yield Running(self._calls, ())


def options(cells: tuple[Cell, ...] = ALL, rounds: int = 2, budget_s: float = 60.0) -> Options:
    return Options(Plan(cells, BATCH_KEYS, SHORT_S), rounds, budget_s, turn_max_s=30.0)


def sample(ops_per_s: float, p50_ms: float = 1.0, p99_ms: float = 2.0, **errors: int) -> Sample:
    return Sample(ops_per_s, 1000, p50_ms, p99_ms, 10.0, 5.0, 100.0, 50.0, errors)


def results(**peers: Named) -> Results:
    return Results(
        ["2 x a processor"], 0.1, "make", "2026-11-30", 3, 0.4, 1000, [cell.name for cell in QUICK], peers=peers
    )


def named(title: str, against: str, cells: dict[str, list[Sample]], *, replicated: bool = True) -> Named:
    return Named(title, "some", "some", against, replicated, False, "", ["x 1.0"], cells)


# --- statistics


def test_a_spread_is_a_median_with_its_extremes() -> None:
    assert stats.spread([3.0, 1.0, 20.0]) == stats.Spread(3.0, 1.0, 20.0)
    assert stats.spread([]) is None


@pytest.mark.parametrize(
    ("value", "shown"),
    [(12_345.6, "12,346"), (123.4, "123"), (12.34, "12.3"), (1.234, "1.23"), (7.0, "7"), (0.0, "0"), (0.066, "0.07")],
)
def test_a_figure_has_three_digits_that_count(value: float, shown: str) -> None:
    assert stats.number(value) == shown


def test_a_spread_says_its_extremes_only_where_there_are_some() -> None:
    assert str(stats.Spread(5.0, 5.0, 5.0)) == "5"
    assert str(stats.Spread(1500.0, 900.0, 2100.5)) == "1,500 (900 to 2,100)"


def test_quantiles() -> None:
    ordered = [float(i) for i in range(100)]
    assert [stats.quantile(ordered, q) for q in (0, 0.5, 0.99, 1)] == [0, 50, 99, 99]
    assert stats.quantile([], 0.5) == 0
    with pytest.raises(ValueError, match="between 0 and 1"):
        stats.quantile(ordered, 1.5)


def test_a_ratio_is_of_medians_and_of_nothing_unmeasured() -> None:
    assert stats.ratio([4.0, 100.0, 2.0], [2.0]) == 2.0
    assert stats.ratio([], [2.0]) is None
    assert stats.ratio([2.0], []) is None
    assert stats.ratio([2.0], [0.0]) is None


# --- peers


def test_every_peer_has_a_name_of_its_own_and_a_variant_of_ours_to_be_held_against() -> None:
    names = [peer.facts.name for peer in PEERS]
    assert len(set(names)) == len(names)
    assert {peer.facts.against for peer in PEERS} <= {*names, ""}
    assert set(targets.TARGETS) <= set(names)
    for peer in PEERS:
        unknown = set(peer.facts.lacks) - {cell.workload for cell in FULL}
        assert not unknown, f"{peer.facts.name} lacks what nobody asks for: {unknown}"


def test_what_the_machine_lacks_is_named() -> None:
    assert missing(facts()) == ""
    assert "no-such-server not found (Debian: a-package)" in missing(
        facts(programs=("no-such-server",), packages=("a-package",))
    )
    assert "no_such_module not installed (PyPI: a-client)" in missing(
        facts(modules=("no_such_module",), distributions=("a-client",))
    )
    assert "no_such_package.part" in missing(facts(modules=("no_such_package.part",)))


@pytest.mark.parametrize(
    ("about", "cell", "why"),
    [
        (facts(lacks={"cas": "it has none"}), Cell("cas", SMALL, 1), "it has none"),
        (facts(value_bytes_max=1000), Cell("a", LARGE, 1), "values of at most 1,000 bytes"),
        (facts(callers_max=32), Cell("a", SMALL, 256), "at most 32 callers"),
        (facts(), Cell("a", SMALL, 1), ""),
    ],
)
def test_a_cell_that_a_peer_cannot_do_has_a_reason(about: Facts, cell: Cell, why: str) -> None:
    assert refusal(about, in_memory(), cell) == why


@pytest.mark.parametrize("load", ["a", "b", "put", "batch_put", "batch_get", "cas", "lock", "scan"])
def test_a_client_that_only_reads_is_asked_for_nothing_else(load: str) -> None:
    calls = Calls(in_memory().get)
    assert refusal(facts(), calls, Cell(load, SMALL, 1)) == "not offered"
    assert refusal(facts(), calls, Cell("c", SMALL, 1)) == ""


def test_a_quick_run_is_a_part_of_a_full_one() -> None:
    assert set(QUICK) <= set(FULL)
    assert all(Plan(QUICK, 10_000, 1.0).keys_of(cell.value_bytes) >= 256 for cell in FULL)


# --- loads


async def test_every_workload_counts_what_it_did() -> None:
    calls, plan = in_memory(), Plan(ALL, BATCH_KEYS, SHORT_S)
    await fill(calls, facts(), plan)
    for cell in (*ALL, Cell("a", SMALL, 8)):
        found = await measure(calls, (os.getpid(),), plan, cell, 0)
        assert found.operations > 0 and not found.errors, cell.name
        assert found.operations % (BATCH_KEYS if cell.workload in ("batch_put", "batch_get", "scan") else 1) == 0
        assert 0 <= found.p50_ms <= found.p99_ms


async def test_keys_are_stored_one_by_one_where_a_client_has_no_batch() -> None:
    whole, plan = in_memory(), Plan((Cell("c", SMALL, 1),), BATCH_KEYS, SHORT_S)
    await fill(Calls(whole.get, whole.put), facts(), plan)
    assert len(await whole.get(plan.names(SMALL)[-1]) or b"") == SMALL


async def test_a_wrong_answer_is_an_error_and_no_figure() -> None:
    async def short(_: str) -> bytes:
        return b"short"

    with pytest.raises(PeerFailed, match="WrongAnswer"):
        await measure(Calls(short), (), Plan(ALL, BATCH_KEYS, SHORT_S), Cell("c", SMALL, 1), 0)


async def test_a_scan_that_lacks_a_key_is_an_error() -> None:
    async def scan(_: str) -> list[bytes]:
        return [bytes(SMALL)] * (BATCH_KEYS - 1)

    calls = Calls(in_memory().get, scan=scan)
    with pytest.raises(PeerFailed, match="999 right values of 999"):
        await measure(calls, (), Plan(ALL, BATCH_KEYS, SHORT_S), Cell("scan", SMALL, 1), 0)


# --- turns


async def test_rounds_are_interleaved_and_samples_kept_by_round() -> None:
    peers: list[Peer] = [Fake(facts("one")), Fake(facts("two"))]
    said: list[str] = []
    chosen = options()
    found = await run(peers, Options(chosen.plan, 2, 60.0, 30.0, say=said.append))
    assert found.rounds == 2 and not found.skipped and not found.failed
    assert [line.split()[4].rstrip(",") for line in said] == ["one", "two", "two", "one"]
    assert {cell: len(samples) for cell, samples in found.peers["one"].cells.items()} == {c.name: 2 for c in ALL}


async def test_a_peer_that_cannot_start_is_skipped_and_the_others_run() -> None:
    broken = Fake(facts("broken"), error=PeerFailed("it does not listen"))
    found = await run([broken, Fake(facts("sound"))], options(rounds=1))
    assert list(found.peers) == ["sound"]
    assert found.skipped == {"broken": "PeerFailed: it does not listen"} and not found.failed


async def test_a_peer_that_is_not_installed_is_skipped_without_a_turn() -> None:
    absent = Fake(facts("absent", programs=("no-such-server",), packages=("a-package",)))
    found = await run([absent], options(rounds=1))
    assert absent.turns == 0 and "no-such-server" in found.skipped["absent"]


async def test_a_cell_that_fails_leaves_the_others_and_is_said() -> None:
    async def fail(name: str) -> None:
        raise RuntimeError(f"no lock {name}")

    calls = in_memory()
    broken = Calls(calls.get, calls.put, calls.get_many, calls.put_many, lock=fail, scan=calls.scan)
    found = await run([Fake(facts("half"), broken)], options(rounds=1))
    assert "lock/100/1" not in found.peers["half"].cells and "a/100/1" in found.peers["half"].cells
    assert "no lock lock.1-0" in found.failed["half"][0]
    assert found.peers["half"].lacks == {"cas/100/1": "not offered"}


async def test_no_turn_begins_without_time_left() -> None:
    late = Fake(facts("late"))
    found = await run([late], options(budget_s=1.0))
    assert late.turns == 0 and found.skipped == {"late": "no time left"}


# --- processes


async def test_a_server_is_ended_by_its_pid(tmp_path: Path) -> None:
    async with Servers(tmp_path) as servers:
        (port,) = free_ports(1)
        process = await servers.spawn("web", sys.executable, "-m", "http.server", port, "--bind", "127.0.0.1")
        await servers.listening("web", port)
        assert cost(servers.pids).rss_bytes > 1 << 20
    assert process.returncode is not None
    assert cost(servers.pids).rss_bytes == 0


async def test_a_server_that_ends_tells_its_last_words(tmp_path: Path) -> None:
    async with Servers(tmp_path) as servers:
        await servers.spawn("bad", sys.executable, "-c", "raise SystemExit('no such option')")
        with pytest.raises(PeerFailed, match="bad ended with 1: no such option"):
            await servers.listening("bad", free_ports(1)[0])


async def test_a_process_that_left_its_parents_is_ended_too(tmp_path: Path) -> None:
    orphan = "import os, time\nif os.fork() == 0: os.setsid(); time.sleep(60)"
    async with Servers(tmp_path) as servers:
        process = await servers.spawn("parent", sys.executable, "-c", orphan)
        await asyncio.wait_for(process.wait(), 30)
        assert len(marked(servers.mark)) == 1
    for _ in range(500):  # init has to take it off the table
        if not marked(servers.mark):
            break
        await asyncio.sleep(0.01)
    assert not marked(servers.mark)


def test_ports_are_free_and_so_are_those_above_them() -> None:
    ports = free_ports(6, also=10_000)
    assert len(set(ports)) == 6
    for port in ports:
        for each in (port, port + 10_000):
            with socket.socket() as bound:
                bound.bind(("127.0.0.1", each))


def test_the_cost_of_a_process_has_its_children_but_never_this_one() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; input()"], stdin=subprocess.PIPE)
    try:
        alone, family = cost((child.pid,)), cost((os.getpid(),))
        assert alone.rss_bytes > 0
        assert family.rss_bytes == 0, "this process is the client"
        assert cost((os.getppid(),)).rss_bytes > 0
    finally:
        child.communicate()


# --- the bare loop


def test_a_bare_loop_is_any_program_that_prints_its_figures(tmp_path: Path) -> None:
    program = tmp_path / "loop.py"
    program.write_text(
        "import json, sys\n"
        "assert sys.argv[1:] == ['--store', 'memory', '--seconds', '0.5', '--json'], sys.argv\n"
        "names = ['1', '32', '256', 'batch_put', 'batch_get']\n"
        "print(json.dumps({name: {'ops_per_s': number} for number, name in enumerate(names, 1)}))\n"
    )
    assert bare.measure(program, "memory", 0.5) == {"1": 1, "32": 2, "256": 3, "batch_put": 4, "batch_get": 5}
    program.write_text("print('{}')")
    with pytest.raises(PeerFailed, match=r"loop\.py on memory"):
        bare.measure(program, "memory", 0.5)


# --- the report


def compared() -> Results:
    """Ours at twice a peer's speed with 32 callers, and at half with one."""
    ours = {f"a/{SMALL}/1": [sample(100)], f"a/{SMALL}/32": [sample(900), sample(1000), sample(1300)]}
    ours |= {targets.PUT_32: [sample(1000)], targets.CAS_32: [sample(500)]}
    ours |= {targets.PUT_1: [sample(100, p50_ms=1.0)], targets.LOCK_1: [sample(20, p50_ms=6.0)]}
    theirs = {f"a/{SMALL}/1": [sample(200)], f"a/{SMALL}/32": [sample(500, p99_ms=1.5)], targets.CAS_32: [sample(300)]}
    return results(
        **{
            "ours-group": named("ours, group", "ours-group", ours),
            "etcd": named("etcd", "ours-group", theirs),
            "one": named("one server", "ours-group", {f"a/{SMALL}/32": [sample(2000)]}, replicated=False),
        }
    )


def test_ratios_stand_beside_their_targets() -> None:
    found = targets.ratios(compared(), "etcd")
    assert [each.value for each in found] == [0.5, 2.0, None, None, None]
    assert [each.target for each in found] == [1.5, 5.0, 8.0, 8.0, 8.0]
    assert [each.missed for each in found] == [True, True, False, False, False]
    assert all(each.target is None for each in targets.ratios(compared(), "one"))


def test_where_a_peer_is_faster_is_found() -> None:
    assert targets.wins(compared(), "etcd") == {f"a/{SMALL}/1": 0.5}
    assert targets.wins(compared(), "one") == {f"a/{SMALL}/32": 0.5}
    assert targets.wins(compared(), "ours-group") == {}


def test_the_other_targets_are_judged() -> None:
    held = {check.claim: (check.measured, check.holds) for check in targets.checks(compared())}
    assert list(held.values()) == [
        ("2.00 ms against 1.50 ms of etcd", False),
        ("0.50", True),
        ("1.67", False),
        ("6.00", False),
    ]
    without = targets.checks(results(**{"ours-group": named("ours", "ours-group", {})}))
    assert [(check.measured, check.holds) for check in without] == [("not measured", None)] * 3


def test_the_report_says_who_is_faster_what_was_missed_and_what_lacks() -> None:
    found = compared()
    found.skipped["nats"] = "nats-server not found"
    found.peers["etcd"].lacks["scan/100/1"] = "it has none"
    found.peers["etcd"].cells[f"a/{SMALL}/1"].append(sample(200, Timeout=3))
    found.bare = {"rocksdb-fsync": {"1": [200.0], "32": [1250.0]}}
    text = report.text(found)
    assert "| ours, group | 100 | 1,000 (900 to 1,300) |" in text
    assert "**2,000**" in text, "the fastest of a column is bold"
    assert "| ours, group / etcd | **0.50 (1.5)** | **2 (5)** |".replace("2 (5)", "2.00 (5)") in text
    assert "- etcd against ours, group: workload a, 1 caller (0.50)" in text
    assert "- nats: nats-server not found" in text
    assert "- etcd: not prefix scan of 1,000, 1 caller: it has none" in text
    assert "- etcd: calls failed: Timeout 3" in text
    assert "| ours, group / bare loop on rocksdb-fsync | 0.50 (200) | 0.80 (1,250) | - | - | - |" in text


def test_a_report_on_nothing_has_no_tables() -> None:
    found = results()
    found.skipped["etcd"] = "etcd not found"
    assert "|" not in report.text(found) and "- etcd: etcd not found" in report.text(found)


def test_a_report_of_a_busy_machine_says_so() -> None:
    found = compared()
    assert "Provisional" not in report.text(found)
    found.load_per_core = 5.4
    assert "**Provisional**" in report.text(found) and "5.4 a core" in report.text(found)


def test_a_report_replaces_the_generated_part_of_a_document_and_nothing_else(tmp_path: Path) -> None:
    document = tmp_path / "benchmarks.md"
    document.write_text(f"# Head\n\n{report.BEGIN}\nof yesterday\n{report.END}\n\nTail\n")
    plots = report.write(compared(), document)
    once = document.read_text()
    assert once.startswith("# Head\n") and once.endswith("\n\nTail\n") and "yesterday" not in once
    for plot in plots:
        assert plot.read_text().lstrip().startswith("<?xml") and f"benchmarks/{plot.name}" in once
    first = [plot.read_bytes() for plot in plots]
    report.write(compared(), document)
    assert document.read_text() == once and [plot.read_bytes() for plot in plots] == first
    document.write_text("# No marks\n")
    with pytest.raises(report.NoPlace):
        report.write(compared(), document)


def test_results_survive_their_file() -> None:
    found = compared()
    again = msgspec.json.decode(msgspec.json.encode(found), type=Results)
    assert again == found
    assert values(again.peers["etcd"], f"a/{SMALL}/32", "p99_ms") == [1.5]
