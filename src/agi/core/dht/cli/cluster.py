"""The cluster as a whole: status, ring, locate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from agi.core.dht.cli import output
from agi.core.dht.cli.connection import (
    DEFAULT_CONNECT,
    FIND_TIMEOUT_S,
    AsJson,
    Connect,
    Timeout,
    addresses,
    connected,
)
from agi.core.dht.errors import DHTError, InvalidRequest, NotReady
from agi.core.dht.ring import Ring
from agi.core.dht.types import Consistency, Node, encode_key, parse_address

TIMEOUT_S_MAX = 600.0


def status(connect: Connect = DEFAULT_CONNECT, timeout: Timeout = None, as_json: AsJson = False) -> None:
    """Show the state of every node.

    Asks each node itself, so it works while nodes are down, and before the cluster has formed. Exit code 0: all nodes
    are ready, though replication may not be whole (`wait-healthy` is for that); 13: some are not, or do not answer; 23:
    nobody answers.

    Below the table: how many more nodes may fail, whichever they are, before some keys have too few replicas for
    quorums; and all that replication is missing, as `wait-healthy` waits for it, and the nodes that are missing for the
    configured number of replicas, for which it does not. A number of keys after ~ is an estimate; tombstones count.
    Hints are records that a node keeps for others that missed them. Repaired: how long ago the node had been compared
    with each that shares replicas with it. Tombstones: what was deleted or has expired, as the node last counted, and
    is not reclaimed yet; - before the first count, which comes within a minute or so of a start.

    --json prints {"ready", "cluster", "epoch", "failures_tolerated": negative where some keys have no quorum now, null
    before the cluster has formed, "missing": [what replication is missing, as lines], "unchecked": [nodes whose
    repair.interval_ms is 0], "nodes": [{"node_id", "address", "reachable", "error", and if reachable
    "ready", "waiting_for", "storage", "keys", "keys_exact", "bytes", "generation", "epoch", "boot", "hints": {node id:
    records kept for it}, "hints_lost": {node id: records given up, which it does not know yet}, "repair": {
    "last_round_s", "unknown_ranges", "pending_keys", "checked", "not_compared": [node ids]}, "change": {"note",
    "ready", "arcs", "arcs_done", "keys", "bytes"}, "reclaim": {"floor_age_s", "tombstones", "oldest_tombstone_s": both
    null before the first count, "reclaimed"}, "peers": {node id: {"connected", "status", "error"}}}]}; a peer's status
    is ALIVE, SUSPECT, DEAD or LEFT.

    Examples:

        agi-dht status

        agi-dht status --connect node1:7000,node2:7000 --json
    """
    if timeout is not None and not 0 < timeout <= TIMEOUT_S_MAX:
        raise InvalidRequest(f"a timeout is above 0 and at most {TIMEOUT_S_MAX:g} seconds, not {timeout!r}")
    from agi.core.dht.cli.asking import survey
    from agi.core.dht.client.changes import missing, too_few, unchecked

    found = survey(addresses(connect), FIND_TIMEOUT_S if timeout is None else timeout)
    topology = found.topology or {}
    where = {member["node_id"]: member["address"] for member in topology.get("members", ())}
    nodes = []
    for name, state in sorted(found.states.items()):
        shown: dict[str, Any] = {"node_id": name, "address": where.get(name, ""), "reachable": True, "error": None}
        if isinstance(state, DHTError):
            nodes.append({**shown, "reachable": False, "error": str(state)})
        else:
            nodes.append({**shown, **state})
    for address, error in found.silent.items():
        if found.topology is None:
            nodes.append({"node_id": "", "address": address, "reachable": False, "error": str(error)})
        else:
            output.note(f"nobody answers at {address}: {error}")
    ready = found.topology is not None and all(node.get("ready", False) for node in nodes)
    states = {name: _or_error(state) for name, state in found.states.items()}
    lines = [*too_few(topology), *missing(topology, states)] if topology else []
    up = {node["node_id"] for node in nodes if node["reachable"]}
    if as_json:
        summary = {"ready": ready, "cluster": topology.get("cluster"), "epoch": topology.get("epoch", 0)}
        summary |= {"failures_tolerated": _tolerated(topology, up) if topology else None, "missing": lines}
        output.document({**summary, "unchecked": unchecked(states), "nodes": nodes})
    else:
        first = ("node", "address", "state", "storage", "keys", "bytes", "epoch", "boot")
        output.table((*first, "hints", "repaired", "tombstones", "peers"), [_status_row(node) for node in nodes])
        if topology:
            output.line(_tolerance(topology, up))
            lines = ["replication is not whole:", *lines] if lines else ["replication is whole"]
        more = [line for node in nodes for line in _troubles(node, bool(topology)) if line not in lines]
        for trouble in (*lines, *more):
            output.line(output.printable(trouble, keep_backslash=True))
        if blind := unchecked(states):
            output.line(output.NOT_CHECKED + ", ".join(blind))
    if not ready:
        raise typer.Exit(NotReady.exit_code)


def _status_row(node: dict[str, Any]) -> tuple[str, ...]:
    name = node["node_id"] or "?"
    if not node["reachable"]:
        return name, node["address"], "unreachable", "", "", "", "", "", "", "", "", ""
    peers = node["peers"]
    return (
        name,
        node["address"],
        "ready" if node["ready"] else "waiting",
        node["storage"],
        f"{'' if node['keys_exact'] else '~'}{node['keys']}",
        output.size_text(node["bytes"]),
        str(node["epoch"]) if node.get("generation", 1) <= 1 else f"{node['epoch']} of generation {node['generation']}",
        str(node["boot"]),
        str(sum(node.get("hints", {}).values())),
        _repaired(node.get("repair", {}).get("last_round_s")),
        _counted(node.get("reclaim", {}).get("tombstones")),
        f"{sum(peer['connected'] for peer in peers.values())}/{len(peers)}",
    )


def _counted(tombstones: int | None) -> str:
    return "-" if tombstones is None else str(tombstones)


def _repaired(age_s: float | None) -> str:
    """How long ago all replicas had been compared."""
    return "-" if age_s is None else f"{max(0.0, age_s):.0f}s" if age_s < 600 else f"{age_s / 60:.0f}min"


def _or_error(state: dict[str, Any] | DHTError) -> dict[str, Any]:
    return {"error": str(state)} if isinstance(state, DHTError) else state


def _troubles(node: dict[str, Any], formed: bool) -> Iterator[str]:
    """What is wrong with a node, beside what its cluster is missing."""
    name = node["node_id"] or node["address"]
    if not node["reachable"]:
        if not formed:
            yield f"{name}: {node['error']}"
        return
    if not node["ready"] and not formed:
        yield f"{name} waits: {node['waiting_for']}"
    for peer, link in sorted(node["peers"].items()):
        if link["status"] != "ALIVE":
            yield f"{name} holds {peer} {link['status']}"
        if not link["connected"]:
            yield f"{name} to {peer}: {link['error']}"


def _tolerance(topology: dict[str, Any], up: set[str]) -> str:
    """How many failures the cluster tolerates now, and why no more."""
    count = _tolerated(topology, up)
    replicas = min(topology["factor"], sum(member["state"] != "joining" for member in topology["members"]))
    why = f"quorums are {Consistency.QUORUM.needed(replicas)} of {replicas} replicas"
    if replicas < topology["factor"]:
        why += f", as there are too few nodes for {topology['factor']}"
    return f"failures tolerated now: {max(0, count)} ({why}{'; some keys have no quorum' if count < 0 else ''})"


def _tolerated(topology: dict[str, Any], up: set[str]) -> int:
    """By how many the replicas that are up exceed a quorum, of the keys that have the fewest. While a change is under
    way that holds of the replicas before it and of those after."""
    members = topology["members"]
    after = [{**m, "weight": m["next_weight"] or m["weight"]} for m in members if m["state"] != "leaving"]
    before = [] if topology["lost"] else [member for member in members if member["state"] != "joining"]
    worst = []
    for chosen in (before, after):
        if chosen:
            ring = Ring(_members({**topology, "members": chosen}), topology["hash_algorithm"], topology["factor"])
            sets = {part.replicas for part in ring.partitions()}
            worst += [len(up.intersection(names)) - Consistency.QUORUM.needed(len(names)) for names in sets]
    return min(worst)


def ring(connect: Connect = DEFAULT_CONNECT, timeout: Timeout = None, as_json: AsJson = False) -> None:
    """Show each node's share of the keys.

    `primary` is the part of the ring of which a node comes first, `with replicas` the part of which it holds a replica;
    both are computed, and right for many keys.

    --json prints {"cluster", "epoch", "factor", "replicas", "hash_algorithm", "nodes": [{"node_id", "address", "state",
    "reachable", "primary_share", "replica_share", "virtual_nodes", "weight", "rack", "zone"}]}; shares are from 0 to 1.

    Examples:

        agi-dht ring

        agi-dht ring --json
    """
    with connected(connect, timeout) as client:
        topology = client.topology()
    nodes = _members(topology)
    built = Ring(nodes, topology["hash_algorithm"], topology["factor"])
    replicas = min(topology["factor"], len(nodes))
    primary, held = built.ownership(1), built.ownership(replicas)
    rows = []
    for node, member in zip(nodes, topology["members"], strict=True):
        rows.append(
            {
                "node_id": node.node_id,
                "address": member["address"],
                "state": member["state"],
                "reachable": member["reachable"],
                "primary_share": primary[node.node_id],
                "replica_share": held[node.node_id],
                "virtual_nodes": Ring([node], topology["hash_algorithm"], 1).vnode_count,
                "weight": node.weight,
                "rack": member["rack"],
                "zone": member["zone"],
            }
        )
    if as_json:
        shown = {name: topology[name] for name in ("cluster", "epoch", "factor")}
        output.document({**shown, "replicas": replicas, "hash_algorithm": topology["hash_algorithm"], "nodes": rows})
        return
    columns = ("node", "address", "state", "primary", "with replicas", "vnodes", "weight", "rack", "zone")
    output.table(
        columns,
        [
            (
                row["node_id"],
                row["address"],
                row["state"] if row["reachable"] else f"{row['state']}, unreachable",
                f"{row['primary_share']:.1%}",
                f"{row['replica_share']:.1%}",
                str(row["virtual_nodes"]),
                f"{row['weight']:g}",
                row["rack"] or "-",
                row["zone"] or "-",
            )
            for row in rows
        ],
    )


def _members(topology: dict[str, Any]) -> list[Node]:
    nodes = []
    for member in topology["members"]:
        host, port = parse_address(member["address"])
        labels = {label: member[label] for label in ("rack", "zone") if member[label]}
        nodes.append(Node(member["node_id"], host, port, member["weight"], topology["virtual_nodes"], labels))
    return nodes


def locate(
    key: Annotated[str, typer.Argument(metavar="KEY", show_default=False)],
    connect: Connect = DEFAULT_CONNECT,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Show where a key lies and what each replica holds.

    A replica's state is live, absent, tombstone (deleted), expired or unreachable. Replicas may differ for a while; a
    read at QUORUM settles it. The size is that of the whole record, 40 bytes more than the value's.

    --json prints {"key", "token", "replicas": [{"node_id", "state", and what it holds: "version", "bytes",
    "expires_at", "ballot" (of a key under consensus), or "error"}]}, in the order of preference.

    Example:

        agi-dht locate agent:42
    """
    encode_key(key)
    with connected(connect, timeout) as client:
        located = client.locate(key)
    replicas = [{"node_id": name, **held} for name, held in located["replicas"].items()]
    if as_json:
        output.document({"key": key, "token": located["token"], "replicas": replicas})
        return
    output.line(f"token {located['token']}")
    rows = []
    for held in replicas:
        size = f"{held['bytes']} B" if "bytes" in held else ""
        expires = output.time_text(held["expires_at"]) if "expires_at" in held else ""
        state = f"{held['state']}: {held['error']}" if "error" in held else held["state"]
        rows.append((held["node_id"], state, str(held.get("version", "")), size, expires))
    output.table(("replica", "state", "version", "record", "expires"), rows)
