"""Repair that an operator orders: replicas are compared by hash trees now, not in their turn."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from agi.core.dht.cli import output
from agi.core.dht.cli.connection import DEFAULT_CONNECT, AsJson, Connect, Timeout, connected
from agi.core.dht.errors import BatchError, InvalidRequest

TOKENS = 1 << 64
PROGRESS_S = 2.0
"""Least time between two lines of progress."""
_SUMS = (
    "ranges", "differing_ranges", "differences", "young",
    "keys_sent", "keys_received", "bytes_sent", "bytes_received",
)  # fmt: skip


def repair(
    node: Annotated[
        str | None, typer.Option(metavar="NODE", help="Only what this node shares with others.", show_default=False)
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            "--range",
            metavar="FIRST-LAST",
            help="Only keys with these tokens (`locate` shows a key's), decimal or 0x.",
            show_default=False,
        ),
    ] = None,
    connect: Connect = DEFAULT_CONNECT,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Compare all replicas now, and bring each what it has missed.

    Nodes do this by themselves every `repair.interval_ms`; this does it at once, one node after the other, and says
    what came of it. Replicas that are equal cost next to nothing. Keys that were being written just then are counted
    as young and left to the next time. Exit code 0: every range was compared and repaired; 26: a part was not, since a
    node is away or did not answer.

    --json prints {"complete", "seconds", "ranges", "differing_ranges", "differences", "young", "keys_sent",
    "keys_received", "bytes_sent", "bytes_received", "nodes": [{"node_id", "error", and if reachable these figures,
    "peers", "done", "failed": {peer: why}}]}.

    Examples:

        agi-dht repair

        agi-dht repair --node node2 --range 0-0x7fffffffffffffff
    """
    bounds = None if tokens is None else _bounds(tokens)
    progress = _Progress()
    began = time.monotonic()
    with connected(connect, timeout) as client:
        states = client.repair(node, bounds, progress.show)
    seconds = time.monotonic() - began
    rows = [{"node_id": name, "error": state.get("error"), **state} for name, state in sorted(states.items())]
    sums = {what: sum(row.get(what, 0) for row in rows) for what in _SUMS}
    complete = all(row["error"] is None and not row["failed"] for row in rows)
    if as_json:
        output.document({"complete": complete, "seconds": round(seconds, 3), **sums, "nodes": rows})
    else:
        columns = ("node", "peers", "ranges", "differing", "differences", "sent", "received", "bytes")
        output.table(columns, [_row(row) for row in rows])
        for row in rows:
            for peer, why in {"": row["error"]}.items() if row["error"] else row["failed"].items():
                output.line(output.printable(f"{row['node_id']}{' with ' if peer else ''}{peer}: {why}"))
        young = f", {output.keys_text(sums['young'])} left alone as they were being written" if sums["young"] else ""
        output.line(f"{sums['differences']} differences found in {seconds:.1f} s{young}")
    if not complete:
        raise typer.Exit(BatchError.exit_code)


class _Progress:
    """Lines on stderr, not too many."""

    def __init__(self) -> None:
        self._next = time.monotonic() + PROGRESS_S

    def show(self, node: str, state: dict[str, Any]) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + PROGRESS_S
            what = f"{state['done']} of {state['peers']} peers, {state['differences']} differences so far"
            output.note(f"{node}: {what}")


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    if row["error"] is not None:
        return row["node_id"], "", "", "", "", "", "", ""
    figures = ("ranges", "differing_ranges", "differences", "keys_sent", "keys_received")
    peers = f"{row['done'] - len(row['failed'])}/{row['peers']}"
    size = output.size_text(row["bytes_sent"] + row["bytes_received"])
    return row["node_id"], peers, *(str(row[name]) for name in figures), size


def _bounds(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    try:
        bounds = int(first, 0), int(last, 0)
    except ValueError:
        bounds = 1, 0
    if not dash or not 0 <= bounds[0] <= bounds[1] < TOKENS:
        raise InvalidRequest(f"--range takes FIRST-LAST, tokens from 0 to {TOKENS - 1}, not {text!r}")
    return bounds
