"""Runs from the command line: `python -m agi.core.dht.testing.chaos --seconds 120 --nodes 3,5 --seed 7`.

Nodes and clients run in namespaces of their own (network.py); with --no-network on the loopback, without cut links,
the full disk, power losses and wrong clocks. The exit code is 0 only if nothing was violated, 1 if something was, 2 if
the run could not be made.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import secrets
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from agi.core.dht.client import DHTClient
from agi.core.dht.errors import DHTError
from agi.core.dht.testing.chaos import disk as disks
from agi.core.dht.testing.chaos import histories, plan, skew
from agi.core.dht.testing.chaos import network as namespaces
from agi.core.dht.testing.chaos.auditor import Auditor, Kind
from agi.core.dht.testing.chaos.disk import Disk
from agi.core.dht.testing.chaos.faults import Faults
from agi.core.dht.testing.chaos.holders import Holders
from agi.core.dht.testing.chaos.load import Writer
from agi.core.dht.testing.chaos.nodes import Nodes
from agi.core.dht.testing.chaos.report import Journal
from agi.core.dht.testing.chaos.settle import settle
from agi.core.dht.testing.history import History

SECONDS, NODES, WRITERS, KEYS = 120.0, "3,5", 8, 40
NODES_MIN, NODES_MAX = 3, 12
CLIENTS = 2
THINK_S = 0.02
STOPPED = 130
"""The exit code after a Ctrl-C or a SIGTERM."""
FORM_TIMEOUT_S = 60.0
RECOVERED_TIMEOUT_S = 60.0
"""After the faults every writer has to have a call acknowledged within it."""


class Chaos:
    """A run: its parts, and the order in which they are made, used and taken away.

    Args:
        size: nodes at the start.
        folder: for data and logs.
        reports: folder for what is left of the run; None for nothing.
    """

    def __init__(self, given: argparse.Namespace, size: int, folder: Path, reports: Path | None) -> None:
        began = time.monotonic()
        self.auditor = Auditor()
        self._reports = (reports or folder) / f"{size}-nodes"
        self.journal = Journal(lambda: time.monotonic() - began, self._report("jsonl"), say)
        self._given = given
        self._size = size
        self._folder = folder
        self._platters = folder / "platters"
        self._network: namespaces.Network | None = None
        self._small = ""
        self._power = False
        self._without = {fault for fault in plan.Fault if fault in given.without.split(",")}
        self._nodes: Nodes
        self._writers: list[Writer] = []
        self._workers: list[histories.Worker] = []
        self._history = History()
        self._holders: Holders

    def _report(self, kind: str) -> Path:
        return self._reports.with_name(f"{self._reports.name}.{kind}")

    async def run(self) -> None:
        given, journal = self._given, self.journal
        rng = random.Random(f"{given.seed}:run")
        async with AsyncExitStack() as stack:
            stack.callback(journal.close)
            if given.came_from:
                self._network = namespaces.Network(given.came_from)
                stack.push_async_callback(self._network.close)
                await self._network.open()
            await self._look_around(stack)
            clocks = plan.Fault.SKEW not in self._without
            nodes = self._nodes = Nodes(
                self._folder, self._network, self._died, self._event, self._disk_of, clocks=clocks
            )
            stack.push_async_callback(nodes.kill_all)
            self._small = f"n{rng.randrange(self._size)}" if self._network is not None else ""
            for number in range(self._size):
                await nodes.add(f"n{number}")
            nodes.first = [node.address for node in nodes.all.values()]
            for node in nodes.all.values():
                node.wanted = True
            self._holders = Holders(self._folder, nodes.wanted, histories.LOCKS, given.seed, self._client_raised)
            stack.push_async_callback(self._holders.kill_all)
            async with asyncio.TaskGroup() as group:
                supervisor = group.create_task(nodes.supervise())
                await self._clients(stack, rng)
                supervisor.cancel()
            for name, code in (await nodes.stop()).items():
                self.auditor.found(Kind.DIED, name, f"exit code {code} when told to stop", journal.now)
            histories.judge(self._history, self._holders, self._report("history.jsonl"), self.auditor, journal)
            journal.summary(self.auditor, given.seed, self._size)
            table = journal.table(self.auditor, given.seed, self._size)
            self._report("txt").write_text(table + "\n", encoding="utf-8")
            say("\n" + table)

    async def _look_around(self, stack: AsyncExitStack) -> None:
        """What this machine does not allow is left out, and the report says why."""
        if self._network is None:
            self._lacks(plan.NAMESPACES, "on the loopback (--no-network)")
            return
        await disks.open_platters(self._platters)
        stack.push_async_callback(disks.close_platters, self._platters)
        power, clocks = await disks.obstacle(self._platters), await asyncio.to_thread(skew.obstacle, self._folder)
        self._power = not power
        if power:
            self._lacks(plan.POWER, power)
        if clocks:
            self._lacks({plan.Fault.SKEW}, clocks)

    def _lacks(self, faults: Iterable[plan.Fault], why: str) -> None:
        self._without |= set(faults)
        self.journal.absent[", ".join(sorted(faults))] = why
        self.journal.line("not_possible", faults=sorted(faults), why=why)
        self.journal.say(f"not possible here: {', '.join(sorted(faults))}: {why}")

    def _disk_of(self, name: str) -> Disk | None:
        small = name == self._small
        if not small and not self._power:
            return None
        image = self._platters / f"{name}.ext4" if self._power else None
        return Disk(self._folder / f"disk-{name}", disks.SMALL_MB if small else disks.LARGE_MB, image)

    async def _clients(self, stack: AsyncExitStack, rng: random.Random) -> None:
        given, journal, holders = self._given, self.journal, self._holders
        clients = []
        for _ in range(CLIENTS + 1):
            client = DHTClient(unix=False)
            stack.push_async_callback(client.close)
            await client.connect(self._nodes.first, timeout=FORM_TIMEOUT_S)
            clients.append(client)
        *clients, operator = clients
        await operator.wait_healthy(FORM_TIMEOUT_S)
        journal.say(f"{self._size} nodes run; {given.writers} writers begin")
        journal.tally.begin(journal.now)
        self._writers = [
            Writer(name, KEYS, clients, self.auditor, journal, random.Random(f"{given.seed}:{name}"), THINK_S)
            for name in (f"w{number}" for number in range(given.writers))
        ]
        self._workers = [
            histories.Worker(name, self._history, clients, self.auditor, journal, random.Random(f"{given.seed}:{name}"))
            for name in (f"c{number}" for number in range(histories.WORKERS))
        ]
        for _ in range(histories.HOLDERS):
            await holders.add()
        nodes_min = max(3, self._size - 1)
        faults = Faults(self._nodes, self._network, holders, operator, journal, self._small, nodes_min)
        lanes = plan.draw(given.seed, given.seconds, without=self._without)
        if given.each:
            lanes = plan.each(without=self._without)
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for writer in self._writers:
                group.create_task(writer.run(stop))
            for worker in self._workers:
                group.create_task(worker.run(stop))
            await self._suffer(faults, lanes.values())
            await self._recovered()
            await holders.stop()
            stop.set()
        journal.tally.end(journal.now)
        await settle(self._nodes, operator, self.auditor, journal)
        await histories.read_all(self._history, operator, self.auditor, journal)

    async def _suffer(self, faults: Faults, lanes: Iterable[Sequence[plan.Step]]) -> None:
        """All lanes beside each other, to their ends; nothing is left of any fault."""
        began = self.journal.now
        async with asyncio.TaskGroup() as group:
            for steps in lanes:
                group.create_task(faults.run([replace(step, at_s=began + step.at_s) for step in steps]))
        await asyncio.sleep(max(0.0, began + self._given.seconds - self.journal.now))
        await faults.undo()

    async def _recovered(self) -> None:
        """Every writer has had a call acknowledged since now."""
        healed = self.journal.now
        while waiting := [writer for writer in self._writers if writer.acknowledged_s < healed]:
            if self.journal.now > healed + RECOVERED_TIMEOUT_S:
                text = f"{len(waiting)} writers had nothing acknowledged {RECOVERED_TIMEOUT_S:g} s after all faults"
                self.auditor.found(Kind.UNHEALTHY, "cluster", text, self.journal.now)
                break
            await asyncio.sleep(0.05)
        self.journal.figures["recovered_s"] = round(self.journal.now - healed, 2)

    def raised(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """What nobody caught in the loop of the clients."""
        error = context.get("exception")
        text = "".join(traceback.format_exception(error)) if error is not None else str(context)
        self.journal.line("raised", text=text)
        last = f"{context.get('message')}: {type(error).__name__}: {error}"
        self.auditor.found(Kind.RAISED, "client", last, self.journal.now)
        self.journal.say(last)

    def _client_raised(self, process: str, what: str) -> None:
        self.auditor.found(Kind.RAISED, process, what, self.journal.now)
        self._event(process, what)

    def _died(self, node: str, what: str) -> None:
        self.auditor.found(Kind.DIED, node, what, self.journal.now)
        self._event(node, what)

    def _event(self, node: str, what: str) -> None:
        self.journal.line("node", node=node, happened=what)
        self.journal.say(f"{node} {what}")


async def _run(given: argparse.Namespace, size: int, folder: Path, reports: Path | None) -> bool:
    """Whether anything was violated."""
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    chaos = Chaos(given, size, folder, reports)
    loop.set_exception_handler(chaos.raised)
    await chaos.run()
    return bool(chaos.auditor.violations)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m agi.core.dht.testing.chaos", description=__doc__.split("\n")[0])
    made.add_argument("--seconds", type=float, default=SECONDS, help=f"how long faults happen (default {SECONDS:g})")
    made.add_argument(
        "--nodes", default=NODES, help=f"nodes at the start; of several numbers a run each (default {NODES})"
    )
    made.add_argument("--writers", type=int, default=WRITERS, help=f"writers at once (default {WRITERS})")
    made.add_argument("--seed", type=int, help="chooses the faults (default: a random one, which is shown)")
    made.add_argument(
        "--report", type=Path, metavar="FOLDER", help="of each run the report, the history and all that happened"
    )
    made.add_argument(
        "--no-network", action="store_true", help="on the loopback: no cut links, full disk, power loss or wrong clocks"
    )
    made.add_argument(
        "--without", default="", metavar="FAULTS", help="faults that are left out, with commas between them"
    )
    made.add_argument(
        "--each", action="store_true", help="every fault once, in a fixed order, for --seconds or as long as it takes"
    )
    made.add_argument("--keep", action="store_true", help="keep data and logs also if nothing was violated")
    made.add_argument("--came-from", default="", help=argparse.SUPPRESS)
    return made


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # it tells of every connection that is refused
    options = parser()
    given = options.parse_args(arguments)
    sizes = [int(word) if word.isdecimal() else 0 for word in given.nodes.split(",")]
    allowed = all(NODES_MIN <= size <= NODES_MAX for size in sizes)
    if not allowed or given.seconds <= 0 or given.writers < 1:
        options.error(f"--nodes is {NODES_MIN} to {NODES_MAX}, --seconds above 0, --writers at least 1")
    unknown = sorted({*filter(None, given.without.split(","))} - {*plan.Fault})
    if unknown:
        options.error(f"no fault: {', '.join(unknown)}; there are {', '.join(sorted(plan.Fault))}")
    if not given.no_network and not given.came_from:
        obstacle = namespaces.obstacle()
        if obstacle:
            say(f"error: {obstacle}; --no-network runs on the loopback, without cut links and the full disk")
            return 2
        namespaces.enter(arguments)
    if given.seed is None:
        given.seed = secrets.randbits(32)
    say(f"seed {given.seed}; replay the plan with --seed {given.seed}")
    if given.report is not None:
        given.report.mkdir(parents=True, exist_ok=True)
    worst = 0
    for size in sizes:
        code = _one(given, size)
        worst = max(worst, code)
        if code == STOPPED:
            break
    return worst


def _one(given: argparse.Namespace, size: int) -> int:
    """A run; its exit code."""
    folder = Path(tempfile.mkdtemp(prefix=f"dht-chaos-{os.getpid()}-"))
    keep = True
    try:
        violated = asyncio.run(_run(given, size, folder, given.report))
        keep = given.keep or violated
    except (KeyboardInterrupt, asyncio.CancelledError):
        say("stopped; everything is undone")
        keep = given.keep
        return STOPPED
    except (DHTError, BaseExceptionGroup) as error:
        reasons = _reasons(error)
        if not all(isinstance(reason, DHTError) for reason in reasons):
            raise
        say(f"error: {reasons[0]}")
        return 2
    finally:
        if keep:
            say(f"data and logs are in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return 1 if violated else 0


def _reasons(error: BaseException) -> list[BaseException]:
    """The errors of a group, or the error itself."""
    if isinstance(error, BaseExceptionGroup):
        return [reason for part in error.exceptions for reason in _reasons(part)]
    return [error]
