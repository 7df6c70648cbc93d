"""Performs a plan: begins each fault, waits, undoes it, and writes both down."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from agi.core.dht.client import DHTClient
from agi.core.dht.errors import DHTError
from agi.core.dht.testing.chaos.holders import Holders
from agi.core.dht.testing.chaos.network import CLIENTS, Cut, Network
from agi.core.dht.testing.chaos.nodes import Node, Nodes
from agi.core.dht.testing.chaos.plan import Fault, Step
from agi.core.dht.testing.chaos.report import Journal
from agi.core.dht.testing.chaos.skew import OFFSETS_S

JOIN_TIMEOUT_S = 25.0
LEAVE_TIMEOUT_S = 20.0
POLL_S = 0.3
PATIENCE_S = 5.0
"""How long a fault waits for a node to hit, while all are down."""
SPARES = 2
"""Nodes beyond the first ones that may join."""


class Faults:
    """
    Args:
        holders: of locks.
        client: for orders to the cluster, not for data.
        small: the node whose disk is filled; empty if there is none.
        nodes_min: so many members are left at least.
    """

    def __init__(
        self,
        nodes: Nodes,
        network: Network | None,
        holders: Holders,
        client: DHTClient,
        journal: Journal,
        small: str,
        nodes_min: int,
    ) -> None:
        self._nodes = nodes
        self._holders = holders
        self._small = small
        self._network = network
        self._client = client
        self._journal = journal
        self._nodes_min = nodes_min
        self._names_max = len(nodes.all) + SPARES
        self._hit: set[str] = set()

    async def run(self, steps: Sequence[Step]) -> None:
        """One lane. A step that begins late, since one before it took longer, begins at once."""
        for step in steps:
            await asyncio.sleep(max(0.0, step.at_s - self._journal.now))
            await self._perform(step)

    async def undo(self) -> None:
        """Whatever may be left: nothing is cut, full, frozen, held down or shows a wrong time any more."""
        if self._network is not None:
            await self._network.mend_all()
        for node in self._nodes.all.values():
            if node.disk is not None:
                await node.disk.free()
            if node.clock is not None:
                node.clock.shift(0.0)
            while node.frozen:
                self._nodes.thaw(node)
            while node.held:
                self._nodes.release(node)

    async def _perform(self, step: Step) -> None:
        match step.fault:
            case Fault.JOIN:
                await self._join(step)
            case Fault.LEAVE:
                await self._leave(step)
            case Fault.KILL_ALL:
                await self._kill(step, self._wanted())
            case Fault.POWER_LOSS_ALL:
                await self._lose_power(step, self._wanted())
            case Fault.SKEW:
                await self._skew(step)
            case Fault.HOLDER_FREEZE | Fault.HOLDER_KILL:
                await self._hit_holder(step)
            case Fault.FULL_DISK:
                await self._fill(step)
            case _:
                await self._hit_one(step)

    async def _hit_one(self, step: Step) -> None:
        until = self._journal.now + PATIENCE_S
        while not (candidates := [node for node in self._nodes.running() if node.name not in self._hit]):
            if self._journal.now > until:
                self._skipped(step, "no node was left to be hit")
                return
            await asyncio.sleep(POLL_S)
        node = candidates[step.picks[0] % len(candidates)]
        self._hit.add(node.name)
        try:
            if step.fault is Fault.KILL:
                await self._kill(step, [node])
            elif step.fault is Fault.POWER_LOSS:
                await self._lose_power(step, [node])
            elif step.fault is Fault.FREEZE:
                await self._freeze(step, node)
            else:
                await self._cut(step, node)
        finally:
            self._hit.discard(node.name)

    async def _kill(self, step: Step, victims: Sequence[Node]) -> None:
        for node in victims:
            self._nodes.kill(node)
        await self._lasts(step, _names(victims))
        for node in victims:
            self._nodes.release(node)

    async def _freeze(self, step: Step, node: Node) -> None:
        self._nodes.freeze(node)
        await self._lasts(step, node.name)
        self._nodes.thaw(node)

    async def _cut(self, step: Step, node: Node) -> None:
        """DEAF and MUTE take one node and some others, PARTITION one or two against all; clients now and then."""
        assert self._network is not None
        names = sorted(self._nodes.all)
        others = [name for name in names if name != node.name]
        chosen = [name for name, pick in zip(others, step.picks[1:-1], strict=False) if pick % 3] or others[:1]
        if step.picks[-1] % 2:
            chosen.append(CLIENTS)
        cuts: list[Cut]
        if step.fault is Fault.DEAF:
            cuts = [(node.name, name) for name in chosen]
            where = f"{node.name} does not hear {', '.join(chosen)}"
        elif step.fault is Fault.MUTE:
            cuts = [(name, node.name) for name in chosen]
            where = f"{node.name} is not heard by {', '.join(chosen)}"
        else:
            inner = [node.name]
            if step.picks[1] % 3 == 0:
                inner.append(others[step.picks[2] % len(others)])
            outer = [name for name in names if name not in inner] + ([CLIENTS] if step.picks[-1] % 2 else [])
            cuts = [pair for a in inner for b in outer for pair in ((a, b), (b, a))]
            where = f"{', '.join(inner)} | {', '.join(outer)}"
        await self._network.cut(cuts)
        await self._lasts(step, where)
        await self._network.mend(cuts)

    async def _lose_power(self, step: Step, victims: Sequence[Node]) -> None:
        """All of them at once. Either the process is stopped first, so that it ends at the very moment at which its
        file system does; or it meets a disk that fails for some moments more, and must acknowledge nothing by it."""
        stopped_first = step.picks[-1] % 2 == 0

        async def lose(node: Node) -> None:
            async def end() -> None:
                await self._nodes.gone(node)

            assert node.disk is not None
            if stopped_first:
                self._nodes.freeze(node)
            try:
                await node.disk.lose_power(end)
            finally:
                if stopped_first:
                    self._nodes.thaw(node)

        for node in victims:
            self._nodes.hold(node)
        await asyncio.gather(*map(lose, victims))
        await self._lasts(step, f"{_names(victims)}, {'stopped first' if stopped_first else 'the disk first'}")
        for node in victims:
            self._nodes.release(node)

    async def _fill(self, step: Step) -> None:
        node = self._nodes.all[self._small]
        assert node.disk is not None
        if not node.runs:
            self._skipped(step, f"{node.name} does not run")
            return
        await node.disk.fill()
        await self._lasts(step, node.name)
        await node.disk.free()

    async def _skew(self, step: Step) -> None:
        candidates = self._wanted()
        if not candidates:
            self._skipped(step, "no node is to run")
            return
        node = candidates[step.picks[0] % len(candidates)]
        offset_s = OFFSETS_S[step.picks[1] % len(OFFSETS_S)]
        restarted = step.picks[2] % 2 == 0
        await self._set_clock(node, offset_s, restarted=restarted)
        how = "started again" if restarted else "in the midst"
        await self._lasts(step, f"{node.name}, {abs(offset_s):g} s {'ahead' if offset_s > 0 else 'behind'}, {how}")
        await self._set_clock(node, 0.0, restarted=restarted)

    async def _set_clock(self, node: Node, offset_s: float, *, restarted: bool) -> None:
        assert node.clock is not None
        if not restarted:
            node.clock.shift(offset_s)
            return
        self._nodes.hold(node)
        try:
            await self._nodes.gone(node)
            node.clock.shift(offset_s)
        finally:
            self._nodes.release(node)

    async def _hit_holder(self, step: Step) -> None:
        candidates = await self._holders.holding(PATIENCE_S)
        if not candidates:
            self._skipped(step, "nobody held a lock")
            return
        holding = candidates[step.picks[0] % len(candidates)]
        where = f"{holding.name}, which holds {holding.holds}"
        if step.fault is Fault.HOLDER_KILL:
            await self._holders.kill(holding)
            await self._lasts(step, where)
            await self._holders.add()
            return
        self._holders.freeze(holding)
        await self._lasts(step, where)
        self._holders.thaw(holding)

    def _wanted(self) -> list[Node]:
        return [node for node in self._nodes.all.values() if node.wanted]

    async def _lasts(self, step: Step, where: str) -> None:
        began = self._journal.now
        await asyncio.sleep(step.lasts_s)
        self._journal.fault(step.fault, where, began, "undone")

    def _skipped(self, step: Step, why: str) -> None:
        self._journal.fault(step.fault, "", self._journal.now, f"skipped: {why}")

    # --- members

    async def _join(self, step: Step) -> None:
        absent = [node for node in self._nodes.all.values() if not node.wanted]
        if not absent and len(self._nodes.all) < self._names_max:
            absent = [await self._nodes.add(f"n{len(self._nodes.all)}")]
        if not absent:
            self._skipped(step, "every node is a member")
            return
        node = absent[step.picks[0] % len(absent)]
        node.wanted, node.refusals = True, 0

        async def joined() -> str:
            return "joined" if await self._state_of(node.name) == "normal" else ""

        await self._change(step, node, joined, JOIN_TIMEOUT_S)

    async def _leave(self, step: Step) -> None:
        members = [node for node in self._nodes.running() if node.name not in self._hit]
        if len([node for node in self._nodes.all.values() if node.wanted]) <= self._nodes_min or not members:
            self._skipped(step, "too few nodes are left")
            return
        node = members[step.picks[0] % len(members)]

        async def left() -> str:
            try:
                await self._client.leave(node.name, timeout=LEAVE_TIMEOUT_S)
            except DHTError as error:
                return f"{type(error).__name__}: {error}"
            return "left"

        await self._change(step, node, left, LEAVE_TIMEOUT_S + JOIN_TIMEOUT_S)

    async def _change(self, step: Step, node: Node, done: Callable[[], Awaitable[str]], timeout_s: float) -> None:
        began = self._journal.now
        outcome = ""
        while not outcome and self._journal.now - began < timeout_s:
            outcome = await done()
            await asyncio.sleep(POLL_S)
        self._journal.fault(step.fault, node.name, began, outcome or "still under way")

    async def _state_of(self, name: str) -> str:
        try:
            topology: dict[str, Any] = await self._client.topology()
        except DHTError:
            return ""
        return next((str(member["state"]) for member in topology["members"] if member["node_id"] == name), "")


def _names(nodes: Sequence[Node]) -> str:
    return ", ".join(node.name for node in nodes)
