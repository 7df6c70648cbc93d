"""Changes of the members that an operator orders: leave, remove, cancel; and waiting until the cluster is whole."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from agi.core.dht.cli import output
from agi.core.dht.cli.connection import DEFAULT_CONNECT, AsJson, Connect, connected

Name = Annotated[str, typer.Argument(metavar="NODE", help="Node id, as `status` shows it.")]
Force = Annotated[bool, typer.Option("--force", help="Although fewer nodes than replicas remain.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only show what would move.")]
Patience = Annotated[float, typer.Option(metavar="SECONDS", help="How long to wait for the end of it.")]


def leave(
    node: Name,
    force: Force = False,
    dry_run: DryRun = False,
    wait: Patience = 600.0,
    connect: Connect = DEFAULT_CONNECT,
    as_json: AsJson = False,
) -> None:
    """Take a running node out of the cluster.

    What it holds is brought to the nodes that hold it from then on, while requests go on; then its process ends.
    Refused where fewer nodes than replicas would remain, unless it is forced, and while another change is under way.

    --json prints the topology then: {"epoch", "note", "members": [{"node_id", "state", ...}], ...}; with --dry-run
    {"note", "arcs", "moves": {node: {"arcs", "share", "keys", "bytes"}}}, keys and bytes estimated.

    Example:

        agi-dht leave node4
    """
    with connected(connect, None) as client:
        if dry_run:
            _plan(client.plan("leave", node, force=force), as_json)
        else:
            _show(client.leave(node, force=force, timeout=wait), as_json)


def remove(
    node: Name,
    force: Force = False,
    dry_run: DryRun = False,
    wait: Patience = 600.0,
    connect: Connect = DEFAULT_CONNECT,
    as_json: AsJson = False,
) -> None:
    """Take a dead node out of the cluster.

    What it held is brought to others from the replicas that remain. Refused while the node is alive. Should it come
    back it is a stranger: it joins anew, with an empty data folder.

    --json prints the topology then, as `leave` does.

    Example:

        agi-dht remove node4
    """
    with connected(connect, None) as client:
        if dry_run:
            _plan(client.plan("remove", node, force=force), as_json)
        else:
            _show(client.remove(node, force=force, timeout=wait), as_json)


def cancel(wait: Patience = 60.0, connect: Connect = DEFAULT_CONNECT, as_json: AsJson = False) -> None:
    """Undo the change of the members that is under way.

    Everything is as it was before it; a node that was joining asks again until it is stopped.

    --json prints the topology then, as `leave` does.

    Example:

        agi-dht cancel
    """
    with connected(connect, None) as client:
        _show(client.cancel_change(timeout=wait), as_json)


def wait_healthy(wait: Patience = 60.0, connect: Connect = DEFAULT_CONNECT, as_json: AsJson = False) -> None:
    """Wait until replication is whole.

    That is: every member answers and is ready, no change of the members is under way, and no hint waits. If that is not
    so in time, says what is missing.

    --json prints {"healthy": true}.

    Example:

        agi-dht wait-healthy --wait 120
    """
    with connected(connect, None) as client:
        client.wait_healthy(wait)
    if as_json:
        output.document({"healthy": True})
    else:
        output.line("replication is whole")


def _plan(plan: dict[str, Any], as_json: bool) -> None:
    if as_json:
        output.document(plan)
        return
    output.line(f"{output.printable(plan['note'])}: {plan['arcs']} arcs of the ring would change hands")
    rows = [
        (name, str(move["arcs"]), f"{move['share']:.1%}", str(move["keys"]), output.size_text(move["bytes"]))
        for name, move in plan["moves"].items()
    ]
    output.table(("node that gains", "arcs", "of the ring", "keys, about", "bytes, about"), rows)


def _show(topology: dict[str, Any], as_json: bool) -> None:
    if as_json:
        output.document(topology)
        return
    output.line(f"epoch {topology['epoch']}: {output.printable(topology['note'])}")
    rows = [(member["node_id"], member["address"], member["state"]) for member in topology["members"]]
    output.table(("node", "address", "state"), rows)
