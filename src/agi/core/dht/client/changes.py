"""Changes of the members that a program orders, and waiting until the cluster is whole again."""

from __future__ import annotations

import abc
import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from agi.core.dht.client.session import Session
from agi.core.dht.errors import ChangeRefused, DHTError, InvalidRequest, StorageFull, Unavailable

POLL_S = 0.25
PROGRESS_S = 1.0
ORDER_TIMEOUT_S = 10.0
LOOKS = 2

Progress = Callable[[dict[str, Any]], object]
"""Told, every second or so while a change runs, {"note", "arcs": to be filled on all nodes, "arcs_done", "keys",
"bytes": brought so far}."""


async def order_change(session: Session, names: list[str], order: dict[str, Any]) -> dict[str, Any]:
    """Asks one node after the other, since one may not be reachable. `order` has the fields of the nodes'
    `changes.Order`. Raises the error with which the order was refused, Unavailable or StorageFull where nobody
    could take it."""
    packed = msgspec.msgpack.encode(order)
    last: DHTError = Unavailable("no node is reachable")
    for name in names:
        try:
            answer: dict[str, Any] = await session.query(name, "change", packed, ORDER_TIMEOUT_S)
        except (Unavailable, StorageFull) as error:
            last = error
        else:
            return answer
    raise last


class Watch:
    """Follows a change to its end. `begin` it before the change, so that what was brought earlier does not count."""

    def __init__(
        self, topology_of: Callable[[], Any], status_of: Callable[[], Any], on_progress: Progress | None = None
    ) -> None:
        self._topology_of = topology_of
        self._status_of = status_of
        self._on_progress = on_progress
        self._before: dict[str, dict[str, Any]] = {}

    async def begin(self) -> None:
        if self._on_progress is not None:
            self._before = await self._changes()

    async def _changes(self) -> dict[str, dict[str, Any]]:
        states: dict[str, dict[str, Any]] = await self._status_of()
        return {name: state["change"] for name, state in states.items() if "change" in state}

    async def until_done(self, epoch: int, timeout: float) -> dict[str, Any]:
        """The topology once the change that this epoch began is over, done or undone: the caller looks which. Raises
        Unavailable."""
        unfinished = f"the change that epoch {epoch} began is not over after {timeout:g} s: it goes on"
        return await self._until(lambda topology: topology["epoch"] > epoch, timeout, unfinished)

    async def until_gone(self, name: str, disk_id: str, timeout: float) -> dict[str, Any]:
        """The topology once that disk is no member's. Raises Unavailable; ChangeRefused where a change that was to take
        it out is seen to be undone."""
        going = False

        def over(topology: dict[str, Any]) -> bool:
            nonlocal going
            states = [member["state"] for member in topology["members"] if member["disk_id"] == disk_id]
            if topology["in_transition"]:
                going = states != ["normal"]
            return going or not states

        after = await self._until(over, timeout, f"nobody has come in that place within {timeout:g} s")
        _check_gone(name, disk_id, after)
        return after

    async def _until(
        self, condition: Callable[[dict[str, Any]], bool], timeout: float, unfinished: str
    ) -> dict[str, Any]:
        now = asyncio.get_running_loop().time
        told = now()
        try:
            async with asyncio.timeout(timeout):
                while True:
                    with contextlib.suppress(DHTError):  # whoever was asked is on its way out; another is next
                        topology: dict[str, Any] = await self._topology_of()
                        if condition(topology) and not topology["in_transition"]:
                            return topology
                        if self._on_progress and topology["in_transition"] and now() - told >= PROGRESS_S:
                            told = now()
                            self._on_progress(self._sum(topology["note"], await self._changes()))
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise Unavailable(unfinished) from None

    def _sum(self, note: str, states: dict[str, dict[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {"note": note, "arcs": 0, "arcs_done": 0, "keys": 0, "bytes": 0}
        for name, state in states.items():
            before = self._before.get(name, {})
            found["arcs"] += state["arcs"]
            found["arcs_done"] += state["arcs_done"]
            for what in ("keys", "bytes"):
                earlier = before.get(what, 0)
                found[what] += state[what] - earlier if state[what] >= earlier else state[what]  # less: it restarted
        return found


def _check_gone(name: str, disk_id: str | None, topology: dict[str, Any]) -> None:
    """What counts is whether it is a member: the note is another's where the next change came soon. Raises
    ChangeRefused.

    Args:
        disk_id: of the member that was to go, since it may have joined anew; None from a node that does not tell.
    """
    for member in topology["members"]:
        if member["node_id"] == name and disk_id in (member["disk_id"], None):
            raise ChangeRefused(f"{name} is still a member at epoch {topology['epoch']} ({topology['note']})")


def _check_weight(name: str, weight: float, topology: dict[str, Any]) -> None:
    """Raises ChangeRefused."""
    for member in topology["members"]:
        if member["node_id"] == name and member["weight"] != weight:
            has = f"{name} has weight {member['weight']:g} at epoch {topology['epoch']}"
            raise ChangeRefused(f"{has} ({topology['note']})")


def too_few(topology: dict[str, Any]) -> list[str]:
    """A line where there are fewer members than wanted replicas; else none. It is no part of `missing`, since waiting
    does not bring nodes."""
    count, factor = sum(member["state"] != "joining" for member in topology["members"]), topology["factor"]
    if count >= factor:
        return []
    more = factor - count
    return [f"{count} of {factor} replicas exist: {more} more node{'s are' if more > 1 else ' is'} needed"]


def missing(topology: dict[str, Any], states: dict[str, dict[str, Any]]) -> list[str]:
    """What keeps the members from holding all that they are to hold, as lines for people; empty if nothing does."""
    members = topology["members"]
    lines = [f"{member['node_id']} is {member['state']}" for member in members if member["state"] != "normal"]
    if topology["in_transition"] and not lines:
        lines.append(f"a change is under way: {topology['note']}")
    names = [member["node_id"] for member in members]
    lines += [f"{name} was not asked: it is not known here yet" for name in names if name not in states]
    for name, state in sorted(states.items()):
        if "error" in state:
            lines.append(f"{name} does not answer: {state['error']}")
            continue
        if not state["ready"]:
            lines.append(f"{name} is not ready: {state['waiting_for']}")
        if state["epoch"] != topology["epoch"]:
            lines.append(f"{name} is at epoch {state['epoch']}, not {topology['epoch']}")
        lines += [f"{name} keeps {count} hints for {target}" for target, count in state["hints"].items() if count]
        for target, count in state.get("hints_lost", {}).items():
            lines.append(f"{name} gave up {count} hints for {target}, which does not know of it yet")
        for peer, link in sorted(state["peers"].items()):
            if "error" in states.get(peer, ()):
                continue  # it says so itself by its silence
            if link["status"] in ("DEAD", "LEFT"):
                lines.append(f"{name} holds {peer} {link['status']}")
            if not link["connected"]:
                lines.append(f"{name} to {peer}: {link['error']}")
        change = state.get("change", {})
        if topology["in_transition"] and change.get("arcs_done", 0) < change.get("arcs", 0):
            lines.append(f"{name} has filled {change['arcs_done']} of {change['arcs']} arcs")
        if not_compared := state["repair"].get("not_compared"):
            lines.append(f"{name} has not compared all ranges yet with {', '.join(not_compared)}")
    return lines


def unchecked(states: dict[str, dict[str, Any]]) -> list[str]:
    """The nodes that do not compare their replicas with others' (`repair.interval_ms` is 0)."""
    return [name for name, state in sorted(states.items()) if not state.get("repair", {}).get("checked", True)]


async def wait_healthy(topology_of: Callable[[], Any], status_of: Callable[[], Any], timeout: float) -> list[str]:
    """Returns the nodes that are `unchecked` when nothing is `missing`. Raises Unavailable with what is missing."""
    if timeout <= 0:
        raise InvalidRequest(f"a timeout is above 0, not {timeout}")
    lines = ["nothing was asked yet"]
    whole = 0
    try:
        async with asyncio.timeout(timeout):
            while True:
                try:
                    topology, states = await topology_of(), await status_of()
                    lines = missing(topology, states)
                except DHTError as error:
                    lines = [str(error)]
                # twice in a row: that something was missed may have been on its way from one answer to the other
                whole = 0 if lines else whole + 1
                if whole == LOOKS:
                    return unchecked(states)
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise Unavailable(f"not healthy after {timeout:g} s: {'; '.join(lines)}") from None


class MembershipCalls(abc.ABC):
    """What a client may order of the members."""

    @abc.abstractmethod
    def _live(self) -> Session: ...

    @abc.abstractmethod
    async def topology(self) -> dict[str, Any]: ...

    @abc.abstractmethod
    async def status(self) -> dict[str, dict[str, Any]]: ...

    async def leave(
        self, node_id: str, *, force: bool = False, timeout: float = 600.0, on_progress: Progress | None = None
    ) -> dict[str, Any]:
        """Takes a node out: its data is brought to those that hold it from then on, then its process ends. Returns the
        topology when that is over. Raises ChangeRefused (another change is under way, the node is dead, fewer nodes
        than replicas would remain and it is not forced; or the change was undone: by `cancel_change`, by a recovery, or
        since a node that had to take part was away for `join_timeout`), InvalidRequest (no such node), Unavailable
        (also: not over in time; it goes on)."""
        return await self._change({"what": "leave", "node": node_id, "force": force}, timeout, on_progress)

    async def remove(
        self,
        node_id: str,
        *,
        force: bool = False,
        lose_data: bool = False,
        timeout: float = 600.0,
        on_progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Takes a dead node out: what it held is brought to others from the replicas that remain. As `leave`.

        Args:
            lose_data: although too few replicas of something remain: acknowledged writes that only the dead node held
                are gone. It begins at once, and cannot be cancelled.
        """
        order = {"what": "remove", "node": node_id, "force": force, "lose_data": lose_data}
        return await self._change(order, timeout, on_progress)

    async def set_weight(
        self, node_id: str, weight: float, *, timeout: float = 600.0, on_progress: Progress | None = None
    ) -> dict[str, Any]:
        """Gives a node another share of the ring, in proportion to the others' weights; only what moves with that is
        moved. As `leave`."""
        return await self._change({"what": "weight", "node": node_id, "weight": float(weight)}, timeout, on_progress)

    async def recover(
        self, lost: Sequence[str], *, confirm: str, timeout: float = 600.0, on_progress: Progress | None = None
    ) -> dict[str, Any]:
        """After a majority of the voters is lost for ever: goes on without these nodes, by the consent of all others.
        Acknowledged writes that only lost nodes held are gone. Ask `plan("recover", lost=...)` first.

        Returns the topology when all replicas are made anew; its generation is one higher. Raises ChangeRefused (a
        majority of the voters is reachable, a node named as lost lives, one not named is not reachable),
        InvalidRequest, Unavailable, OutcomeUnknown (repeat it).

        Args:
            confirm: the name of the cluster.
        """
        return await self._change({"what": "recover", "lost": list(lost), "confirm": confirm}, timeout, on_progress)

    async def wait_replaced(
        self, node_id: str, *, timeout: float = 600.0, on_progress: Progress | None = None
    ) -> dict[str, Any]:
        """Returns the topology once another node, or the same one with another disk, has taken the place of this
        member. Raises ChangeRefused (a change that was to take it out was undone), InvalidRequest (no such node),
        Unavailable."""
        watch = Watch(self.topology, self.status, on_progress)
        await watch.begin()
        topology = await self.topology()
        disks = {member["node_id"]: member["disk_id"] for member in topology["members"]}
        if node_id not in disks:
            raise InvalidRequest(f"there is no node {node_id!r} in the cluster")
        return await watch.until_gone(node_id, disks[node_id], timeout)

    async def cancel_change(self, *, timeout: float = 60.0) -> dict[str, Any]:
        """Undoes the change of the members that is under way, if there is one; returns the topology. Whoever waits for
        that change hears ChangeRefused. Raises ChangeRefused in a recovery."""
        return await self._change({"what": "cancel"}, timeout, None)

    async def wait_healthy(self, timeout: float = 60.0) -> list[str]:
        """Returns when replication is whole: every member answers, is ready and connected to the others, no change is
        under way, no hint waits, and each node has compared its replicas with all who share them since one of them came
        back or a hint was given up. That takes a few seconds after a node has started, more where it has many keys to
        read for it first (`repair.build_keys_per_s`). Raises Unavailable that says what is missing. With fewer members
        than the factor it returns when each of them has all: it does not wait for nodes to be added.

        Nodes whose `repair.interval_ms` is 0 compare nothing: what no hint brought to them is not noticed. Their names
        are returned; usually there are none."""
        self._live()
        return await wait_healthy(self.topology, self.status, timeout)

    async def plan(
        self,
        what: str,
        node_id: str = "",
        *,
        force: bool = False,
        lose_data: bool = False,
        weight: float = 0.0,
        rack: str = "",
        zone: str = "",
        lost: Sequence[str] = (),
    ) -> dict[str, Any]:
        """What a "leave", "remove", "weight", "join", "replace" or "recover" would move, which does not begin: {"note",
        "arcs": of the ring that change hands, "moves": {node id: {"arcs", "share": of the ring, "keys", "bytes"}} of
        what each gains, "shares": {node id: {"before", "after", "ideal"}} of the ring of which it holds a replica}; of
        a recovery more (plans.py). Keys and bytes are estimates. Raises as the change itself does."""
        order = {"what": what, "node": node_id, "force": force, "lose_data": lose_data, "weight": float(weight)}
        order |= {"rack": rack, "zone": zone, "lost": list(lost), "dry_run": True}
        return await order_change(self._live(), self._besides(node_id), order)

    def _besides(self, node_id: str) -> list[str]:
        return [remote.node_id for remote in self._live().up if remote.node_id != node_id] or [node_id]

    async def _change(self, order: dict[str, Any], timeout: float, on_progress: Progress | None) -> dict[str, Any]:
        watch = Watch(self.topology, self.status, on_progress)
        await watch.begin()
        begun = await order_change(self._live(), self._besides(order.get("node", "")), order)
        over_before = begun["epoch"] - (not begun["in_transition"])  # who is asked next need not know of it yet
        after = await watch.until_done(over_before, timeout)
        if order["what"] in ("leave", "remove"):
            _check_gone(order["node"], begun.get("disk_id"), after)
        elif order["what"] == "weight":
            _check_weight(order["node"], order["weight"], after)
        return after
