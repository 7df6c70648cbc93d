"""What a peer is: facts about it, and a context in which its servers run and a client is connected.

A peer offers what its client offers. What it lacks is None in its `Calls` and has its reason in `Facts.lacks`; nothing
is built on top of a client that its documentation does not show.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from bench.peers.loads import Cell, Plan, Sample

CALLERS_MAX = 256
"""Pools of connections and threads are made for so many callers."""
CALL_TIMEOUT_S = 15.0
"""For clients that take a timeout of their own; a whole cell has one beside it."""
SERVER_FOLDERS = ("/usr/sbin", "/sbin")
"""Where Debian puts some servers; a user's PATH may lack them."""


class PeerFailed(Exception):
    """A peer's servers did not start or did not do what was asked of them; the text says which and why."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What has to be known of a peer to read its figures."""

    name: str
    """By which PEERS= and the results know it."""
    title: str
    guarantee: str
    durability: str
    against: str
    """Which of our own variants promises about the same: ours-memory, ours-interval or ours-group."""
    modules: tuple[str, ...] = ()
    """What has to be importable."""
    distributions: tuple[str, ...] = ()
    """Of the client, for its version."""
    programs: tuple[str, ...] = ()
    """What has to be on the machine; `packages` has them in Debian."""
    packages: tuple[str, ...] = ()
    replicated: bool = True
    threads: bool = False
    """The client is synchronous, or does its work in a thread of its own."""
    value_bytes_max: int = 1 << 20
    callers_max: int = CALLERS_MAX
    keys_max: int = 1 << 30
    """Of each size of value, for who needs long to store them."""
    lacks: Mapping[str, str] = field(default_factory=dict)
    """Workload -> why it has none."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Calls:
    """What a connected client can do. Each call raises its client's own errors."""

    get: Callable[[str], Awaitable[bytes | None]]
    put: Callable[[str, bytes], Awaitable[object]] | None = None
    get_many: Callable[[list[str]], Awaitable[list[bytes | None]]] | None = None
    put_many: Callable[[dict[str, bytes]], Awaitable[object]] | None = None
    fill: Callable[[dict[str, bytes]], Awaitable[object]] | None = None
    """Stores keys that do not exist yet, where that differs from `put_many`."""
    swap_begin: Callable[[str, bytes], Awaitable[Any]] | None = None
    """Creates a key; returns what the next `swap` of it expects."""
    swap: Callable[[str, Any, bytes], Awaitable[Any]] | None = None
    """Compare-and-set: stores if the key is at what is expected, and returns what the next one expects; else raises."""
    lock: Callable[[str], Awaitable[object]] | None = None
    """Acquires a lock that nobody holds, and releases it."""
    scan: Callable[[str], Awaitable[list[bytes]]] | None = None
    """The values of all keys under a prefix."""


@dataclass(frozen=True, slots=True)
class Running:
    """A peer whose servers run. `fill` and `measure` are given where the load has to run in another process."""

    calls: Calls | None
    pids: tuple[int, ...]
    """Of its servers, without their children."""
    fill: Callable[[Plan], Awaitable[None]] | None = None
    measure: Callable[[Plan, Cell, int], Awaitable[Sample]] | None = None


class Peer(Protocol):
    """One system at one stated guarantee and durability."""

    @property
    def facts(self) -> Facts: ...

    def running(self, folder: Path) -> AbstractAsyncContextManager[Running]:
        """Servers started in an empty folder and a client connected. Raises PeerFailed, or what the client raises."""


def program(name: str) -> str | None:
    """The path of an executable, also where only root's PATH has it."""
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(SERVER_FOLDERS))


def missing(facts: Facts) -> str:
    """Why a peer cannot run here, or nothing."""
    absent = [name for name in facts.programs if program(name) is None and not Path(name).exists()]
    if absent:
        return f"{', '.join(absent)} not found (Debian: {' '.join(facts.packages)})"
    absent = [name for name in facts.modules if not importable(name)]
    if absent:
        return f"Python module {', '.join(absent)} not installed (PyPI: {' '.join(facts.distributions)})"
    return ""


def importable(module: str) -> bool:
    """Whether a module is installed, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False
