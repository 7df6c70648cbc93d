"""A client process that takes locks and writes what they guard: `python -m agi.core.dht.testing.chaos.holder`.

It is a process of its own so that it can be frozen for longer than its lease, in the midst of whatever it does: in a
write, between looking at its lock and writing, while it waits in a line. It therefore writes with its fencing token
whether or not it still holds the lock, and at times long after it: the key is to refuse what comes too late, nothing
else. All that it does it records in a file of its own as a history (docs/histories.md); what was under way when it is
killed stands there without an end.

It tells on stdout what it holds, a line of JSON each time: {"holds": "lock-0"}, {"holds": null}. The end of its stdin
ends it, after what is under way. The exit code is 0 unless an error came that no call may end in.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import time
import traceback
from pathlib import Path
from typing import IO, Any

from agi.core.dht.client import DHTClient
from agi.core.dht.client.locks import Lock
from agi.core.dht.errors import DHTError, FenceRejected, InvalidRequest, LockHeld, LockLost
from agi.core.dht.testing.chaos.load import nothing_written
from agi.core.dht.testing.history import Function, Value
from agi.core.dht.types import Fence

CONNECT_TIMEOUT_S = 60.0
TIMEOUT_S = 3.0
LOCK_TIMEOUT_S = 3.0
CYCLE_S_MAX = 40.0
"""One turn with a lock, some of it frozen; far above the sum of its deadlines."""
PAUSE_S_MAX = 0.3
WRITES_MAX = 4
LATE_SHARE = 0.4
"""Of the turns, after which it writes once more with the token of the lock that it has given back or lost."""
LATE_S_MAX = 2.0


def guarded(lock: str) -> str:
    """The key that a lock guards."""
    return f"guarded-by-{lock}"


class Recorder:
    """A history that is in the file as far as it has happened, written by one process that may be killed. Its times are
    those of CLOCK_MONOTONIC, which all processes of a machine share."""

    def __init__(self, path: Path, process: str) -> None:
        self._file: IO[str] = path.open("w", encoding="utf-8", buffering=1)
        self._process = process
        self._last_ns = 0

    def close(self) -> None:
        self._file.close()

    def invoke(self, function: Function, key: str, value: Value = None) -> Call:
        self._line("invoke", function, key, value)
        return Call(self, function, key)

    def _line(self, kind: str, function: Function, key: str, value: Value) -> None:
        self._last_ns = max(self._last_ns + 1, time.monotonic_ns())
        told = {"process": self._process, "type": kind, "f": function, "key": key, "value": value}
        self._file.write(json.dumps({**told, "time": self._last_ns}, separators=(",", ":")) + "\n")


class Call:
    """An operation under way."""

    def __init__(self, recorder: Recorder, function: Function, key: str) -> None:
        self._recorder = recorder
        self._what = function, key
        self.over = False

    def ok(self, value: Value = None) -> None:
        self._end("ok", value)

    def failed(self, error: DHTError) -> None:
        """By what it promises."""
        self._end("fail" if nothing_written(error) else "info", None)

    def fail(self) -> None:
        self._end("fail", None)

    def info(self) -> None:
        self._end("info", None)

    def _end(self, kind: str, value: Value) -> None:
        self.over = True
        self._recorder._line(kind, *self._what, value)


class Holder:
    """
    Args:
        name: unlike that of every other process of the history.
        say: tells the lock that is held from now on, or None.
    """

    def __init__(
        self, name: str, client: DHTClient, recorder: Recorder, locks: list[str], lease_s: float, rng: random.Random
    ) -> None:
        self._name = name
        self._client = client
        self._recorder = recorder
        self._locks = locks
        self._lease_s = lease_s
        self._rng = rng
        self._values = 0

    async def run(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            async with asyncio.timeout(CYCLE_S_MAX):
                await self._cycle(self._rng.choice(self._locks))
            await asyncio.sleep(self._rng.uniform(0.0, PAUSE_S_MAX))

    async def _cycle(self, name: str) -> None:
        lock = self._client.lock(name, ttl=self._lease_s, timeout=LOCK_TIMEOUT_S)
        call = self._recorder.invoke(Function.LOCK, name)
        try:
            # where it is lost, what was written last is recorded, and the fence judges it
            with contextlib.suppress(LockLost):
                await self._hold(lock, call)
        except LockHeld:
            call.fail()
            return
        except DHTError:
            if call.over:
                raise
            call.info()  # the last of several tries failed so; an earlier one may have gone well unseen
            return
        finally:
            _say(None)
        if self._rng.random() < LATE_SHARE:
            await asyncio.sleep(self._rng.uniform(0.0, LATE_S_MAX))
            await self._write(name, lock.token)

    async def _hold(self, lock: Lock, call: Call) -> None:
        async with lock:
            call.ok(lock.token)
            _say(lock.name)
            for _ in range(self._rng.randint(1, WRITES_MAX)):
                await self._write(lock.name, lock.token)
                await asyncio.sleep(self._rng.uniform(0.0, PAUSE_S_MAX))
            if self._rng.getrandbits(1):
                await self._read(lock.name)
            await self._unlock(lock)

    async def _unlock(self, lock: Lock) -> None:
        call = self._recorder.invoke(Function.UNLOCK, lock.name, lock.token)
        try:
            await lock.release()
        except (LockLost, InvalidRequest):
            call.fail()
        except DHTError:
            call.info()
        except asyncio.CancelledError:
            call.info()
            raise
        else:
            call.ok()

    async def _write(self, name: str, token: int) -> None:
        """With its token alone, so that the client does not ask first whether the lock is still held."""
        self._values += 1
        value = f"{self._name}:{self._values}"
        call = self._recorder.invoke(Function.FENCED_WRITE, guarded(name), [token, value])
        try:
            await self._client.put(guarded(name), value.encode(), fence=Fence(name, token), timeout=TIMEOUT_S)
        except FenceRejected:
            call.ok(False)
        except DHTError as error:
            call.failed(error)
        except asyncio.CancelledError:
            call.info()
            raise
        else:
            call.ok()

    async def _read(self, name: str) -> None:
        call = self._recorder.invoke(Function.READ, guarded(name))
        try:
            value = await self._client.get(guarded(name), timeout=TIMEOUT_S)
        except DHTError as error:
            call.failed(error)
        except asyncio.CancelledError:
            call.info()
            raise
        else:
            call.ok(None if value is None else value.decode())


def _say(holds: str | None) -> None:
    sys.stdout.write(json.dumps({"holds": holds}) + "\n")
    sys.stdout.flush()


async def _run(given: argparse.Namespace) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    raised: list[str] = []

    def no_one_caught(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        raised.append("".join(traceback.format_exception(error)) if error is not None else str(context))

    loop.set_exception_handler(no_one_caught)

    def left_alone() -> None:
        loop.remove_reader(sys.stdin.fileno())
        stop.set()
        connecting.cancel()  # once it is connected that is nothing

    recorder = Recorder(given.history, given.name)
    client = DHTClient(unix=False)
    connecting = asyncio.ensure_future(client.connect(given.nodes.split(","), timeout=CONNECT_TIMEOUT_S))
    loop.add_reader(sys.stdin.fileno(), left_alone)
    try:
        await asyncio.wait([connecting])
        if connecting.cancelled():
            return 0
        connecting.result()
        rng = random.Random(f"{given.seed}:{given.name}")
        await Holder(given.name, client, recorder, given.locks.split(","), given.lease, rng).run(stop)
    finally:
        await client.close()
        recorder.close()
    sys.stderr.write("".join(raised))
    return 1 if raised else 0


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python -m agi.core.dht.testing.chaos.holder", description=__doc__)
    options.add_argument("--name", required=True, help="of the process in the history")
    options.add_argument("--nodes", required=True, help="addresses, with commas between them")
    options.add_argument("--locks", required=True, help="names, with commas between them")
    options.add_argument("--lease", type=float, required=True, help="seconds")
    options.add_argument("--seed", type=int, required=True)
    options.add_argument("--history", type=Path, required=True, help="file that the history is written to")
    return asyncio.run(_run(options.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
