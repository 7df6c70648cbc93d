"""Nodes that say nothing though they owe answers: cut off, frozen, or in a long pause.

A link is given up only after seconds of silence. Until then new batches go to other nodes, and what is safe to be tried
by two nodes at once is tried by one more: reads, and operations under consensus that are bound to a version, since no
version comes twice, so that at most one of the tries takes effect; a little later all other operations under consensus,
which a node that begins with them so late takes for what they are (protocol/consensus.py, `outcome`). Plain writes wait
for their deadline.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agi.core.dht.client.batches import Kind
from agi.core.dht.protocol.consensus import MOVE_AFTER_S
from agi.core.dht.protocol.timers import TICK_S

if TYPE_CHECKING:
    from agi.core.dht.client.batches import Batch
    from agi.core.dht.client.links import Remote
    from agi.core.dht.client.session import Session

SILENT_S, SILENT_WRITES = 0.25, 4
"""Silence is longer than this, and than so many small writes usually take."""
ASLEEP_S = TICK_S + 0.05
"""A look that is later than this tells of this process, not of the nodes: their answers may wait to be read."""


class Silence:
    """
    Attributes:
        now: monotonic time of the last look.
        nodes: those that are silent.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.now = session.clock.monotonic()
        self._awake_since = self.now
        self.nodes: set[Remote] = set()

    def heard(self, remote: Remote) -> None:
        """That node has said something."""
        remote.heard = self.now
        if remote.silent:
            self.forget(remote)

    def forget(self, remote: Remote) -> None:
        """It is heard again, or its links are gone."""
        remote.silent = False
        self.nodes.discard(remote)

    def look(self, now: float, batches: dict[int, Batch]) -> None:
        """Finds who is silent; `batches` are those under way, in the order in which they were sent."""
        if now - self.now > ASLEEP_S:
            self._awake_since = now
        self.now = now
        before = now - max(SILENT_S, SILENT_WRITES * self._session.write_s.value)
        if self._awake_since > before:
            return
        elsewhere = []
        for batch in batches.values():
            if batch.sent > before:
                break
            remote = self._session.nodes.get(batch.node)
            if remote is None or remote.heard > before:
                continue
            if not remote.silent:
                remote.silent = True
                self.nodes.add(remote)
            safe = batch.kind in (Kind.GET, Kind.BOUND) or (batch.movable and batch.sent <= now - MOVE_AFTER_S)
            if safe and not batch.moved:
                elsewhere.append(batch)
        if len(self.nodes) < len(self._session.up):  # else there is no better one
            for batch in elsewhere:
                self._session.move(batch)
