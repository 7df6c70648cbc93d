"""Changes of the members that an operator orders: leave, remove, replace, weight, cancel; what one more node would
get; and waiting until the cluster is whole."""

from __future__ import annotations

import shlex
import time
from typing import Annotated, Any

import typer

from agi.core.dht.cli import output
from agi.core.dht.cli.connection import DEFAULT_CONNECT, AsJson, Connect, connected
from agi.core.dht.cli.output import NOT_CHECKED
from agi.core.dht.errors import InvalidRequest

PROGRESS_S = 2.0
"""Least time between two lines of progress."""

Name = Annotated[str, typer.Argument(metavar="NODE", help="Node id, as `status` shows it.")]
Force = Annotated[bool, typer.Option("--force", help="Although fewer nodes than replicas remain.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only show what would move.")]
Patience = Annotated[float, typer.Option(metavar="SECONDS", help="How long to wait for the end of it.")]
Weight = Annotated[float, typer.Option(metavar="W", help="Share of the ring relative to the other nodes.")]
Rack = Annotated[str, typer.Option(metavar="RACK", help="Replicas are spread over racks.")]
Zone = Annotated[str, typer.Option(metavar="ZONE", help="And over zones first.")]


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
    How far it is is told on stderr. (`agi-dht serve --leave` does this when its process is told to stop.) Exit code 0
    means that it is no member any more; 17 that it is one: refused, or undone by `cancel`, by a recovery, or since a
    node that had to take part was away for migration.join_timeout_ms.

    --json prints the topology then: {"epoch", "note", "members": [{"node_id", "state", ...}], ...}; with --dry-run
    {"note", "arcs", "moves": {node: {"arcs", "share", "keys", "bytes"}}, "shares": {node: {"before", "after",
    "ideal"}}}, keys and bytes estimated.

    Example:

        agi-dht leave node4
    """
    with connected(connect, None) as client:
        if dry_run:
            show_plan(client.plan("leave", node, force=force), as_json)
        else:
            show_topology(client.leave(node, force=force, timeout=wait, on_progress=Progress().show), as_json)


def remove(
    node: Name,
    force: Force = False,
    lose_data: Annotated[
        bool, typer.Option("--lose-data", help="Although what only it held is gone. It cannot be cancelled.")
    ] = False,
    dry_run: DryRun = False,
    wait: Patience = 600.0,
    connect: Connect = DEFAULT_CONNECT,
    as_json: AsJson = False,
) -> None:
    """Take a dead node out of the cluster.

    What it held is brought to others from the replicas that remain. Refused while the node is alive. Should it come
    back it is a stranger: it joins anew, with an empty data folder. Exit codes are those of `leave`.

    Refused where a majority of the replicas of something is dead: start one of them. If none can be started,
    --lose-data goes on with what is left of each key's replicas. Acknowledged writes that only the dead held are gone.
    Of several dead nodes remove one after the other so, without waiting (--wait 1): it ends for all of them together.

    --json prints the topology then, as `leave` does.

    Examples:

        agi-dht remove node4

        agi-dht remove node4 --lose-data
    """
    with connected(connect, None) as client:
        if dry_run:
            show_plan(client.plan("remove", node, force=force, lose_data=lose_data), as_json)
        else:
            after = client.remove(node, force=force, lose_data=lose_data, timeout=wait, on_progress=Progress().show)
            show_topology(after, as_json)


def weight(
    node: Name,
    weight: Annotated[float, typer.Argument(metavar="WEIGHT", help="2 holds twice what 1 holds.", show_default=False)],
    dry_run: DryRun = False,
    wait: Patience = 600.0,
    connect: Connect = DEFAULT_CONNECT,
    as_json: AsJson = False,
) -> None:
    """Give a node another share of the data.

    Only what moves with that is moved, while requests go on. The cluster keeps the weight; the node's own setting,
    `node.weight`, counts only when it joins. A node cannot hold a key twice: with as many nodes as replicas each holds
    everything, whatever its weight. Exit code 17 if it keeps its weight: refused, or undone as in `leave`.

    --json prints the topology then, as `leave` does, or with --dry-run the plan.

    Examples:

        agi-dht weight node4 2 --dry-run

        agi-dht weight node4 2
    """
    with connected(connect, None) as client:
        if dry_run:
            show_plan(client.plan("weight", node, weight=weight), as_json)
        else:
            show_topology(client.set_weight(node, weight, timeout=wait, on_progress=Progress().show), as_json)


def replace(
    node: Name,
    wait: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="Wait so long until a new node is in its place. Default: do not wait."),
    ] = 0.0,
    dry_run: DryRun = False,
    connect: Connect = DEFAULT_CONNECT,
    as_json: AsJson = False,
) -> None:
    """Show how to start a new node in the place of a dead one, or wait for it.

    Replacing moves the data once, removing and joining twice. The new node asks for the place itself, by `agi-dht serve
    --replace NODE`; this checks that the old one is held to be dead (exit code 17 if not), shows what would move, and
    the command to run. The new node may have the same id, if the old data folder is gone for good. With --wait the exit
    code is 17, too, if the change was undone.

    --json prints the plan, as `plan` does, and "command": its words, without them with --dry-run; with --wait the
    topology then, as `leave` does.

    Examples:

        agi-dht replace node4 --dry-run

        agi-dht replace node4 --wait 600
    """
    with connected(connect, None) as client:
        plan = client.plan("replace", node)
        if dry_run:
            show_plan(plan, as_json)
            return
        topology = client.topology()
        members = {member["node_id"]: member for member in topology["members"]}
        peers = ",".join(member["address"] for name, member in members.items() if name != node)
        command = ["agi-dht", "serve", "--replace", node, "--peers", peers]
        for label, usual in (("weight", 1.0), ("rack", ""), ("zone", "")):
            if members[node][label] != usual:
                command += ["--set", f"node.{label}={members[node][label]}"]
        if not wait:
            if as_json:
                output.document({**plan, "command": command})
                return
            show_plan(plan, False)
            output.line("start the new node, with a port and a data folder of its own:")
            output.line(f"    {output.printable(shlex.join(command), keep_backslash=True)}")
            return
        output.note(f"waiting for {shlex.join(command)}")
        show_topology(client.wait_replaced(node, timeout=wait, on_progress=Progress().show), as_json)


def plan(
    weight: Weight = 1.0,
    rack: Rack = "",
    zone: Zone = "",
    connect: Connect = DEFAULT_CONNECT,
    as_json: AsJson = False,
) -> None:
    """Show what one more node would hold, and what would move to it.

    A node joins by being started (`agi-dht serve --peers ...`); nothing is changed here. Which arcs it would get hangs
    on its id too: the figures are right for a node of some id, and near for any.

    --json prints {"note", "arcs", "moves": {node: {"arcs", "share", "keys", "bytes"}}, "shares": {node: {"before",
    "after", "ideal"}}}; shares are of the ring, from 0 to 1, keys and bytes are estimates.

    Examples:

        agi-dht plan

        agi-dht plan --weight 2 --rack r7
    """
    if not weight > 0:  # to the nodes 0 is what was not said
        raise InvalidRequest(f"a weight is above 0, not {weight:g}")
    with connected(connect, None) as client:
        show_plan(client.plan("join", weight=weight, rack=rack, zone=zone), as_json)


def cancel(wait: Patience = 60.0, connect: Connect = DEFAULT_CONNECT, as_json: AsJson = False) -> None:
    """Undo the change of the members that is under way.

    Everything is as it was before it; a node that was joining sets its data aside and ends. Whoever waits for that
    change hears that it was undone. Refused in a recovery; where no change is under way it says so, with exit code 0.

    --json prints the topology then, as `leave` does.

    Example:

        agi-dht cancel
    """
    with connected(connect, None) as client:
        before = client.topology()
        after = client.cancel_change(timeout=wait)
    if not before["in_transition"] and after["epoch"] == before["epoch"]:
        output.note("no change is under way: nothing was undone")
    show_topology(after, as_json)


def wait_healthy(wait: Patience = 60.0, connect: Connect = DEFAULT_CONNECT, as_json: AsJson = False) -> None:
    """Wait until replication is whole.

    That is: every member answers, is ready and connected to the others, no change of the members is under way, no hint
    waits, and each node has compared its replicas with all who share them since one of them came back or a hint was
    given up. That takes a few seconds after a node has started. If it is not so in time, says what is missing.

    With fewer nodes than replicas it waits until each of them has all, as no wait brings more nodes, and says on stderr
    how many are needed.

    Nodes whose repair.interval_ms is 0 compare nothing: what no hint brought to them is not noticed. They are named on
    stderr.

    --json prints {"healthy": true, "unchecked": [names of such nodes], "too_few": [a line where nodes are needed]}.

    Example:

        agi-dht wait-healthy --wait 120
    """
    from agi.core.dht.client.changes import too_few

    with connected(connect, None) as client:
        unchecked = client.wait_healthy(wait)
        lacking = too_few(client.topology())
    for line in lacking:
        output.note(line)
    if unchecked:
        output.note(NOT_CHECKED + ", ".join(unchecked))
    if as_json:
        output.document({"healthy": True, "unchecked": unchecked, "too_few": lacking})
    else:
        output.line("each node has all, but there are too few nodes" if lacking else "replication is whole")


class Progress:
    """How far a change is, as lines on stderr, not too many."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._next = self._began

    def show(self, state: dict[str, Any]) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + PROGRESS_S
        rate = output.size_text(round(state["bytes"] / max(now - self._began, 0.001)))
        brought = f"{output.keys_text(state['keys'])}, {output.size_text(state['bytes'])}, {rate}/s"
        output.note(f"{state['note']}: {state['arcs_done']} of {state['arcs']} arcs, {brought}")


def show_plan(plan: dict[str, Any], as_json: bool) -> None:
    if as_json:
        output.document(plan)
        return
    output.line(f"{output.printable(plan['note'])}: {plan['arcs']} arcs of the ring would change hands")
    show_moves(plan)
    rows = [
        (name, *(f"{share[when]:.1%}" for when in ("before", "after", "ideal")))
        for name, share in plan["shares"].items()
    ]
    output.table(("node", "holds now", "then", "ideal"), rows)


def show_moves(plan: dict[str, Any]) -> None:
    rows = [
        (name, str(move["arcs"]), f"{move['share']:.1%}", str(move["keys"]), output.size_text(move["bytes"]))
        for name, move in plan["moves"].items()
    ]
    output.table(("node that gains", "arcs", "of the ring", "keys, about", "bytes, about"), rows)


def show_topology(topology: dict[str, Any], as_json: bool) -> None:
    if as_json:
        output.document(topology)
        return
    output.line(f"epoch {topology['epoch']}: {output.printable(topology['note'])}")
    rows = [
        (member["node_id"], member["address"], member["state"], f"{member['weight']:g}")
        for member in topology["members"]
    ]
    output.table(("node", "address", "state", "weight"), rows)
