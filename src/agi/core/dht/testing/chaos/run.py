"""One run from the command line: `python -m agi.core.dht.testing.chaos --seconds 120 --nodes 5 --seed 7`.

Nodes and clients run in namespaces of their own (network.py); with --no-network on the loopback, without cut links and
the full disk. The exit code is 0 only if nothing was violated, 1 if something was, 2 if the run could not be made.
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
from agi.core.dht.testing.chaos import network as namespaces
from agi.core.dht.testing.chaos import plan
from agi.core.dht.testing.chaos.auditor import Auditor, Kind
from agi.core.dht.testing.chaos.disk import SmallDisk
from agi.core.dht.testing.chaos.faults import Faults
from agi.core.dht.testing.chaos.load import Writer
from agi.core.dht.testing.chaos.nodes import Nodes
from agi.core.dht.testing.chaos.report import Journal
from agi.core.dht.testing.chaos.settle import settle

SECONDS, NODES, WRITERS, KEYS = 120.0, 5, 8, 40
NODES_MIN, NODES_MAX = 4, 12
CLIENTS = 2
THINK_S = 0.02
FORM_TIMEOUT_S = 60.0
RECOVERED_TIMEOUT_S = 60.0
"""After the faults every writer has to have a call acknowledged within it."""


class Chaos:
    """A run: its parts, and the order in which they are made, used and taken away."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        began = time.monotonic()
        self.auditor = Auditor()
        self.journal = Journal(lambda: time.monotonic() - began, given.report, say)
        self._given = given
        self._folder = folder
        self._network: namespaces.Network | None = None
        self._nodes: Nodes
        self._writers: list[Writer] = []

    async def run(self) -> None:
        given = self._given
        rng = random.Random(f"{given.seed}:run")
        async with AsyncExitStack() as stack:
            stack.callback(self.journal.close)
            if given.came_from:
                self._network = namespaces.Network(given.came_from)
                await self._network.open()
            nodes = self._nodes = Nodes(self._folder, self._network, self._died, self._event)
            stack.push_async_callback(nodes.kill_all)
            with_disk = f"n{rng.randrange(given.nodes)}" if self._network is not None else ""
            for number in range(given.nodes):
                name = f"n{number}"
                disk = None
                if name == with_disk:
                    disk = SmallDisk(self._folder / "small-disk")
                    await disk.open()
                    stack.push_async_callback(disk.close)
                await nodes.add(name, disk)
            nodes.first = [node.address for node in nodes.all.values()]
            for node in nodes.all.values():
                node.wanted = True
            async with asyncio.TaskGroup() as group:
                supervisor = group.create_task(nodes.supervise())
                await self._clients(stack, rng)
                supervisor.cancel()
            for name, code in (await nodes.stop()).items():
                self.auditor.found(Kind.DIED, name, f"exit code {code} when told to stop", self.journal.now)
            self.journal.summary(self.auditor, given.seed)
            say("\n" + self.journal.table(self.auditor, given.seed))

    async def _clients(self, stack: AsyncExitStack, rng: random.Random) -> None:
        given, journal = self._given, self.journal
        clients = []
        for _ in range(CLIENTS + 1):
            client = DHTClient(unix=False)
            stack.push_async_callback(client.close)
            await client.connect(self._nodes.first, timeout=FORM_TIMEOUT_S)
            clients.append(client)
        *clients, operator = clients
        await operator.wait_healthy(FORM_TIMEOUT_S)
        journal.say(f"{given.nodes} nodes run; {given.writers} writers begin")
        journal.tally.begin(journal.now)
        self._writers = [
            Writer(name, KEYS, clients, self.auditor, journal, random.Random(f"{given.seed}:{name}"), THINK_S)
            for name in (f"w{number}" for number in range(given.writers))
        ]
        faults = Faults(self._nodes, self._network, operator, journal, max(3, given.nodes - 1))
        lanes = plan.draw(given.seed, given.seconds, namespaces=self._network is not None)
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for writer in self._writers:
                group.create_task(writer.run(stop))
            await self._suffer(faults, lanes.values())
            await self._recovered()
            stop.set()
        journal.tally.end(journal.now)
        await settle(self._nodes, operator, self.auditor, journal)

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

    def _died(self, node: str, what: str) -> None:
        self.auditor.found(Kind.DIED, node, what, self.journal.now)
        self._event(node, what)

    def _event(self, node: str, what: str) -> None:
        self.journal.line("node", node=node, happened=what)
        self.journal.say(f"{node} {what}")


async def _run(given: argparse.Namespace, folder: Path) -> Chaos:
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    chaos = Chaos(given, folder)
    loop.set_exception_handler(chaos.raised)
    await chaos.run()
    return chaos


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m agi.core.dht.testing.chaos", description=__doc__.split("\n")[0])
    made.add_argument("--seconds", type=float, default=SECONDS, help=f"how long faults happen (default {SECONDS:g})")
    made.add_argument("--nodes", type=int, default=NODES, help=f"nodes at the start (default {NODES})")
    made.add_argument("--writers", type=int, default=WRITERS, help=f"writers at once (default {WRITERS})")
    made.add_argument("--seed", type=int, help="chooses the faults (default: a random one, which is shown)")
    made.add_argument("--report", type=Path, metavar="FILE", help="faults, violations and a summary as JSON lines")
    made.add_argument("--no-network", action="store_true", help="on the loopback: no cut links, no full disk")
    made.add_argument("--keep", action="store_true", help="keep data and logs also if nothing was violated")
    made.add_argument("--came-from", default="", help=argparse.SUPPRESS)
    return made


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # it tells of every connection that is refused
    options = parser()
    given = options.parse_args(arguments)
    if not NODES_MIN <= given.nodes <= NODES_MAX or given.seconds <= 0 or given.writers < 1:
        options.error(f"--nodes is {NODES_MIN} to {NODES_MAX}, --seconds above 0, --writers at least 1")
    if not given.no_network and not given.came_from:
        obstacle = namespaces.obstacle()
        if obstacle:
            say(f"error: {obstacle}; --no-network runs on the loopback, without cut links and the full disk")
            return 2
        namespaces.enter(arguments)
    if given.seed is None:
        given.seed = secrets.randbits(32)
    say(f"seed {given.seed}; replay the plan with --seed {given.seed}")
    folder = Path(tempfile.mkdtemp(prefix=f"dht-chaos-{os.getpid()}-"))
    keep = True
    try:
        violations = asyncio.run(_run(given, folder)).auditor.violations
        keep = given.keep or bool(violations)
    except (KeyboardInterrupt, asyncio.CancelledError):
        say("stopped; everything is undone")
        keep = given.keep
        return 130
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
    return 1 if violations else 0


def _reasons(error: BaseException) -> list[BaseException]:
    """The errors of a group, or the error itself."""
    if isinstance(error, BaseExceptionGroup):
        return [reason for part in error.exceptions for reason in _reasons(part)]
    return [error]
