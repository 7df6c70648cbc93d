"""What happens on the links of a client's session."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from agi.core.dht.errors import DHTError, LinkClosed
from agi.core.dht.transport.base import Link
from agi.core.dht.types import BULK_VALUE_BYTES

if TYPE_CHECKING:
    from agi.core.dht.client.session import Session


BLURRED_S = 1.0
DRIFT = 1 / 8
"""How far apart two clocks run at most, as with leases (protocol/locks.py)."""


class Remote:
    """One node as the client knows it."""

    def __init__(self, node_id: str, address: str) -> None:
        self.node_id = node_id
        self.address = address
        self.links: list[Link] = []
        self.parting: list[Link] = []
        """Links on which nothing is sent any more: the node stops, and answers what it has (links.py)."""
        self.run_id = ""
        self.heard = 0.0
        self.silent = False
        """Whether it owes answers and says nothing (silence.py), and when it last said something."""
        self.hlc = self._boottime_us = 0
        self._told = 0.0
        self.failed = False
        """Whether a try to connect has failed."""
        self.down = asyncio.Event()
        self.wake = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def send(self, frame: bytes) -> None:
        links = self.links
        if not links:
            raise LinkClosed(f"{self.node_id} is not connected")
        links[-1 if len(frame) >= BULK_VALUE_BYTES else 0].send_frame(frame)

    def tell(self, boottime_us: int, hlc: int, now: float) -> None:
        """What it says of its clocks; 0 for nothing: what another process said there before counts no more."""
        self._boottime_us, self.hlc, self._told = boottime_us, hlc, now

    def boottime_us(self, now: float) -> int:
        """Its clock now, or some time before that, however its clock and this one run; 0 for unknown."""
        known = self._boottime_us
        return known + int((now - self._told) * (1 - DRIFT) * 1e6) if known else 0

    def blurred(self, since: float) -> bool:
        """Whether its clock was last heard so long before that `boottime_us` was well behind."""
        return since - self._told > BLURRED_S


class NodeHandler:
    """Of a link to one node."""

    def __init__(self, session: Session, remote: Remote) -> None:
        self._receive = partial(session.receive, remote)
        self._lost = partial(session.link_lost, remote)
        self._ended = session.link_ended

    def message(self, link: Link, message: msgspec.Struct) -> None:
        self._receive(message)

    def link_closed(self, link: Link, error: DHTError | None) -> None:
        self._ended(link)
        self._lost(link, error)


class Asking:
    """Of a link over which only the topology is asked for."""

    def __init__(self, session: Session) -> None:
        self._receive = partial(session.receive, None)
        self._ended = session.link_ended

    def message(self, link: Link, message: msgspec.Struct) -> None:
        self._receive(message)

    def link_closed(self, link: Link, error: DHTError | None) -> None:
        self._ended(link)


class Farewells:
    """Nodes that have said that they stop. They get nothing new, answer what they have, and are then hung up on from
    here: so nothing is ever on its way to a node that does not listen any more, of which nobody could say whether it
    was done."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._parting: list[Remote] = []

    def begin(self, remote: Remote | None) -> None:
        """That node stops."""
        if remote is None or not remote.links:
            return
        remote.parting, remote.links = remote.links, []
        self._session.up = [other for other in self._session.up if other is not remote]
        self._parting.append(remote)

    def look(self) -> None:
        """Hangs up where nothing is owed any more."""
        for remote in self._parting.copy():
            if not remote.parting:
                self._parting.remove(remote)
            elif not self._session.awaits(remote):
                self._session.link_lost(remote, remote.parting[0], LinkClosed(f"{remote.node_id} stops"))
