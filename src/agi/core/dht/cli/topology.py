"""The topology: which epoch is in force, and how a cluster goes on that has lost a majority of its voters."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from agi.core.dht.cli import output
from agi.core.dht.cli.connection import DEFAULT_CONNECT, FIND_TIMEOUT_S, AsJson, Connect, Timeout, connected
from agi.core.dht.cli.members import Patience, Progress, show_moves, show_topology

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def topology(
    context: typer.Context,
    connect: Connect = DEFAULT_CONNECT,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Show the epoch of the topology, its voters, and the epochs before it.

    The members that an epoch names own the keys; its voters, 1, 3 or 5 of them, decide the next one by majority. The
    history is what the members that can be reached remember together: a node that joined later knows less. A generation
    is begun by `agi-dht topology recover`.

    --json prints {"cluster", "generation", "epoch", "digest", "voters", "factor", "in_transition", "lost": given up in
    the change under way, "members": [{"node_id", "address", "state", "status", "voter"}], "history": [{"generation",
    "epoch", "digest", "note", "decided_ms", "voters"}]}.

    Example:

        agi-dht topology
    """
    if context.invoked_subcommand is not None:
        return
    from agi.core.dht.cli.asking import histories

    with connected(connect, timeout) as client:
        found, history = client.topology(), client.history()
    reachable = [member["address"] for member in found["members"] if member["reachable"]]
    history = histories(reachable, FIND_TIMEOUT_S if timeout is None else timeout) or history
    voters = set(found["voters"])
    shown_of_each = ("node_id", "address", "state", "status")
    members = [
        {name: member[name] for name in shown_of_each} | {"voter": member["node_id"] in voters}
        for member in found["members"]
    ]
    if as_json:
        shown = {
            name: found[name]
            for name in ("cluster", "generation", "epoch", "digest", "voters", "factor", "in_transition", "lost")
        }
        output.document({**shown, "members": members, "history": history})
        return
    epoch = f"epoch {found['epoch']} of generation {found['generation']}"
    output.line(f"cluster {found['cluster']}, {epoch}, {found['factor']} replicas")
    columns = ("node", "address", "state", "status", "voter")
    rows = [(m["node_id"], m["address"], m["state"], m["status"], "yes" if m["voter"] else "") for m in members]
    output.table(columns, rows)
    output.table(
        ("epoch", "decided", "what changed"),
        [(str(past["epoch"]), _decided(past), past["note"]) for past in reversed(history)],
    )
    if history and history[0]["epoch"] > 1:
        output.line(f"nobody who was reached remembers what was before epoch {history[0]['epoch']}")


def _decided(past: dict[str, Any]) -> str:
    """The first epoch carries no time: each node makes the same bytes of it."""
    return output.time_text(past["decided_ms"]) if past["decided_ms"] else "at formation"


@app.command()
def recover(
    lost: Annotated[
        str, typer.Option("--lost", metavar="NODE,...", help="The nodes that never come back.", show_default=False)
    ],
    confirm: Annotated[
        str | None,
        typer.Option(metavar="CLUSTER", help="Do it: the name of the cluster. Without, only show.", show_default=False),
    ] = None,
    wait: Patience = 600.0,
    connect: Connect = DEFAULT_CONNECT,
    as_json: AsJson = False,
) -> None:
    """Go on without a majority of the voters, which is lost for ever.

    THE LAST RESORT: data may be lost. Writes that were acknowledged and that only lost nodes held are gone; so is every
    key of which no replica is left. While a majority of the voters can still be started, start them; while one is
    reachable, `agi-dht remove` the dead.

    --lost names every node that will never come back. All others have to be up: each stores its consent before the
    first epoch of the next generation counts. From then on the lost are no members, and what is left of each key's
    replicas is copied until there are enough again. It cannot be cancelled. A lost node that is started after all is
    told so, sets its data aside and ends; started again it joins as a new one.

    Without --confirm nothing is changed: it shows what would be. If it ends with exit code 12 or 15, repeat it: it
    completes what was begun, also from another node. Never give up two halves of a cluster for each other: nodes of
    both stop when they meet.

    --json prints the topology then, as `leave` does; without --confirm {"cluster", "generation", "epoch", "lost",
    "survivors", "voters", "gone_share", "doubtful_share", "note", "arcs", "moves", "shares"}, shares from 0 to 1.

    Examples:

        agi-dht topology recover --lost node3,node4,node5

        agi-dht topology recover --lost node3,node4,node5 --confirm dht
    """
    names = [name.strip() for name in lost.split(",") if name.strip()]
    with connected(connect, None) as client:
        if confirm is not None:
            after = client.recover(names, confirm=confirm, timeout=wait, on_progress=Progress().show)
            show_topology(after, as_json)
            return
        plan = client.plan("recover", lost=names)
    if as_json:
        output.document(plan)
    else:
        _show_recovery(plan)
    output.note(f"nothing was changed; to do it: --confirm {plan['cluster']}")


def _show_recovery(plan: dict[str, Any]) -> None:
    output.line(f"cluster {plan['cluster']} would come to generation {plan['generation']}, epoch {plan['epoch']}")
    output.line(f"lost for ever: {', '.join(plan['lost'])}")
    output.line(f"survivors, all of whom have to consent: {', '.join(plan['survivors'])}")
    output.line(f"voters then: {', '.join(plan['voters'])}")
    output.line(f"{plan['gone_share']:.1%} of the keys have no replica left: they are gone")
    output.line(
        f"{plan['doubtful_share']:.1%} have lost a majority of their replicas: what only lost nodes held is gone"
    )
    show_moves(plan)
