"""Which commands there are, and how a run of one ends.

A command's module is imported when the command is run, so that `get` does not pay for RocksDB, nor `--help` for all of
them: until then a stub with its one line of help stands in the list.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from agi.core.dht.cli import output
from agi.core.dht.commands import run
from agi.core.dht.errors import DHTError

NAME = "agi-dht"


class Lazy(NamedTuple):
    """Where a command is: a function, or a typer app of subcommands. `help` is its docstring's first line."""

    module: str
    attribute: str
    help: str


COMMANDS = {
    "serve": Lazy("agi.core.dht.server", "serve", "Run a node until SIGTERM or SIGINT."),
    "demo": Lazy(
        "agi.core.dht.cli.demo",
        "demo",
        "Start three nodes, store the standard library, kill a node, read everything back.",
    ),
    "bench": Lazy(
        "agi.core.dht.cli.bench", "bench", "Measure throughput, latency, and the CPU and memory that it costs."
    ),
    "get": Lazy("agi.core.dht.cli.data", "get", "Print the value of a key."),
    "put": Lazy("agi.core.dht.cli.data", "put", "Store a value; print its version."),
    "delete": Lazy("agi.core.dht.cli.data", "delete", "Delete keys."),
    "cas": Lazy("agi.core.dht.cli.data", "cas", "Store a value if the key holds a certain other; print its version."),
    "incr": Lazy("agi.core.dht.cli.data", "incr", "Add to a counter; print what it is then."),
    "lock": Lazy("agi.core.dht.cli.locks", "app", "Run a command while holding a lock."),
    "lock status": Lazy("agi.core.dht.cli.locks", "lock_status", "Show who holds a lock."),
    "scan": Lazy("agi.core.dht.cli.data", "scan", "List keys in order."),
    "load": Lazy("agi.core.dht.cli.load", "load", "Store the files of a folder, or the lines of a JSONL file."),
    "dump": Lazy("agi.core.dht.cli.dump", "dump", "Write keys to a folder, or to a JSONL file."),
    "status": Lazy("agi.core.dht.cli.cluster", "status", "Show the state of every node."),
    "topology": Lazy(
        "agi.core.dht.cli.topology", "app", "Show the epoch of the topology, its voters, and the epochs before it."
    ),
    "ring": Lazy("agi.core.dht.cli.cluster", "ring", "Show each node's share of the keys."),
    "locate": Lazy("agi.core.dht.cli.cluster", "locate", "Show where a key lies and what each replica holds."),
    "repair": Lazy("agi.core.dht.cli.repair", "repair", "Compare all replicas now, and bring each what it has missed."),
    "leave": Lazy("agi.core.dht.cli.members", "leave", "Take a running node out of the cluster."),
    "remove": Lazy("agi.core.dht.cli.members", "remove", "Take a dead node out of the cluster."),
    "replace": Lazy(
        "agi.core.dht.cli.members",
        "replace",
        "Show how to start a new node in the place of a dead one, or wait for it.",
    ),
    "weight": Lazy("agi.core.dht.cli.members", "weight", "Give a node another share of the data."),
    "plan": Lazy("agi.core.dht.cli.members", "plan", "Show what one more node would hold, and what would move to it."),
    "cancel": Lazy("agi.core.dht.cli.members", "cancel", "Undo the change of the members that is under way."),
    "wait-healthy": Lazy("agi.core.dht.cli.members", "wait_healthy", "Wait until replication is whole."),
    "config": Lazy("agi.core.dht.cli.settings", "app", "Check and show the settings of a node."),
}


class _Stub(TyperCommand):
    """Stands for a command in lists."""

    def __init__(self, name: str, lazy: Lazy) -> None:
        super().__init__(name, short_help=lazy.help)  # which, unlike help, is not cut to a line
        self.lazy = lazy

    def load(self) -> Any:
        found = getattr(importlib.import_module(self.lazy.module), self.lazy.attribute)
        if not isinstance(found, typer.Typer):
            alone = typer.Typer(add_completion=False, rich_markup_mode=None)
            alone.command(self.name)(found)
            found = alone
        command = typer.main.get_command(found)
        command.name = self.name
        return command


class _Group(TyperGroup):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, lazy in COMMANDS.items():
            self.commands.setdefault(name, _Stub(name, lazy))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[:2] == ["lock", "status"] and "--" not in args:  # with it, "status" is the name of a lock
            args = ["lock status", *args[2:]]
        stub = self.commands.get(args[0])
        if isinstance(stub, _Stub):
            self.commands[args[0]] = stub.load()
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """As the shell completes words, without what is two of them."""
        return [item for item in super().shell_complete(ctx, incomplete) if " " not in item.value]


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        output.line(f"{NAME} {version('agi-hpc')}")
        raise typer.Exit


app = typer.Typer(
    cls=_Group,
    rich_markup_mode=None,  # rich's boxes join no lines of a paragraph, and are slower
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 2 wrong usage, 3 no such key, 10 a wrong argument, 11 wrong settings, "
    "12 too few replicas, 13 a node is not ready, 23 nobody answers, 26 a part failed, "
    "27 a condition did not hold, 28 a later holder of the lock was there, 29 a lock was lost, 30 another holds it; "
    "docs/errors.md has them all.",
)


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """A replicated key-value store: run nodes, read and write keys, look at the cluster.

    --connect, or the environment variable AGI_DHT_CONNECT, says where the cluster is. Each command has --json, and
    --help with examples.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command (`argv` without the program's name; None: the process's own). Returns its exit code."""
    try:
        code = run(app, argv, name=NAME)
        output.flush()
    except output.Closed:
        return output.CLOSED_EXIT_CODE
    except OSError as error:  # of a file, or of stdout; what the network does is a DHTError
        where = f"{error.filename}: " if isinstance(error.filename, str) else ""
        output.note(f"error: {where}{error.strerror or error}")
        return DHTError.exit_code
    return code
