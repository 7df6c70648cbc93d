"""Drives this node's failure detector (protocol/membership.py) over the links of `Peers`.

One timer, for whatever is due first; no task per probe. A probe to a peer without a link is a lost message; what
answers a message leaves on the link that it came on. Requests look at `Peers.usable`, which is kept up to date from
here: who is dead or has left is taken out, and what waits for the dead fails over at once.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import msgspec
import structlog

from agi.core.dht.clock import Clock
from agi.core.dht.errors import DHTError, Overloaded, ProtocolMismatch, TransportError, Unavailable
from agi.core.dht.peers import Peer, Peers
from agi.core.dht.protocol.membership import Effect, Membership, Pace, Report, Roster, Send
from agi.core.dht.protocol.messages import (
    Gossip,
    IndirectProbe,
    Message,
    Probe,
    ProbeAck,
    ProbeNack,
    ViewDigest,
    ViewState,
)
from agi.core.dht.protocol.view import GONE
from agi.core.dht.sessions import Session
from agi.core.dht.topology import Topology
from agi.core.dht.transport.base import Link
from agi.core.dht.transport.codec import encode
from agi.core.dht.types import MemberStatus

_log = structlog.get_logger("agi.core.dht.gossip")

MESSAGES = (Probe, ProbeAck, IndirectProbe, ProbeNack, Gossip, ViewDigest, ViewState)
STALL_S = 0.1
"""Where the timer is later than this, the process did not get to run, and what it missed is nobody's fault."""

StatusCallback = Callable[[str, MemberStatus], object]


class FailureDetector:
    """
    Args:
        on_dead: told when a member is declared dead: requests need not wait for it any more.

    Attributes:
        core: None until `start`.
        messages, bytes: sent so far.
    """

    def __init__(
        self,
        node_id: str,
        peers: Peers,
        pace: Pace,
        clock: Clock,
        rng: random.Random,
        on_dead: Callable[[str, DHTError], None],
    ) -> None:
        self.core: Membership | None = None
        self.messages = 0
        self.bytes = 0
        self._me = node_id
        self._peers = peers
        self._pace = pace
        self._clock = clock
        self._rng = rng
        self._on_dead = on_dead
        self._callbacks: list[StatusCallback] = []
        self._timer: asyncio.TimerHandle | None = None
        self._due = float("inf")

    # --- life

    def start(self, topology: Topology, boot: int) -> None:
        """The node has formed; its peers are connected from here on."""
        self.core = Membership(
            self._me, boot, _roster(topology), self._pace, self._rng, self._clock.monotonic(), linked=False
        )
        self._schedule()

    def set_members(self, topology: Topology) -> None:
        """Another topology counts."""
        if self.core is None:
            return
        self._perform(self.core.set_members(_roster(topology), self._clock.monotonic()))
        for node_id in self._peers.all:
            self._judge(node_id, self.core.status(node_id))

    def leave(self) -> None:
        """Tells the others that this node stops."""
        if self.core is not None:
            self._perform(self.core.leave(self._clock.monotonic()))

    def stop(self) -> None:
        self.core = None
        if self._timer is not None:
            self._timer.cancel()

    # --- what is known

    def status(self, node_id: str) -> MemberStatus:
        """What is held of a member; this node itself is alive."""
        return self.core.status(node_id) if self.core is not None else MemberStatus.ALIVE

    def on_status(self, callback: StatusCallback) -> None:
        """Calls it with (node id, status) whenever the state of another member changes here."""
        self._callbacks.append(callback)

    # --- events

    def connected(self, peer: Peer) -> None:
        """There are links to that peer."""
        if self.core is not None and peer.hello is not None:
            self._sense()
            self._perform(self.core.link_up(peer.node_id, peer.hello.boot, self._clock.monotonic()))

    def lost(self, node_id: str) -> None:
        """The links to that peer broke."""
        if self.core is not None:
            self._sense()
            self._perform(self.core.link_down(node_id, self._clock.monotonic()))

    def request(self, session: Session, link: Link, message: Message) -> None:
        """A message on an accepted link, which is where an answer goes."""
        if session.kind == "node":
            self._receive(session.name, message, link)

    def reply(self, peer: Peer, message: msgspec.Struct) -> None:
        """A message on this node's own link. Raises ProtocolMismatch where it is none of the failure detector's."""
        if not isinstance(message, MESSAGES):
            raise ProtocolMismatch(f"{type(message).__name__} is no reply")
        self._receive(peer.node_id, message, None)

    def _receive(self, sender: str, message: Message, link: Link | None) -> None:
        if self.core is not None:
            self._sense()
            self._perform(self.core.receive(sender, message, self._clock.monotonic(), link))

    def _look(self) -> None:
        self._timer = None
        if self.core is not None:
            self._sense()
            self._due = float("inf")
            self._perform(self.core.advance(self._clock.monotonic()))

    def _sense(self) -> None:
        """Notices that the process did not run: the timer should have come long ago."""
        late_s = self._clock.monotonic() - self._due
        if late_s > STALL_S:
            assert self.core is not None
            self.core.stalled(late_s)
            self._due += late_s

    # --- effects

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self._send(effect)
            else:
                self._report(effect)
        self._schedule()

    def _send(self, effect: Send) -> None:
        frame = encode(effect.message)
        try:
            if isinstance(effect.via, Link):
                effect.via.send_frame(frame)
            elif (peer := self._peers.connected.get(effect.to)) is not None:
                peer.send(frame)
            else:
                return
        except (TransportError, Overloaded) as error:
            _log.debug("gossip_undeliverable", peer=effect.to, error=str(error))
            return
        self.messages += 1
        self.bytes += len(frame)

    def _report(self, report: Report) -> None:
        node_id, status = report.node, report.status
        level = "info" if status in (MemberStatus.ALIVE, MemberStatus.LEFT) else "warning"
        getattr(_log, level)("member_status", member=node_id, status=status.name, was=report.was.name)
        self._judge(node_id, status)
        if status is MemberStatus.DEAD:
            self._on_dead(node_id, Unavailable(f"{node_id} was declared dead"))
        for callback in self._callbacks:
            try:
                callback(node_id, status)
            except Exception:  # noqa: BLE001  # a stranger's code may not stop the failure detector
                _log.exception("member_status_callback_failed", member=node_id)

    def _judge(self, node_id: str, status: MemberStatus) -> None:
        self._peers.judge(node_id, gone=status in GONE, suspect=status is MemberStatus.SUSPECT)

    def _schedule(self) -> None:
        """One timer, for what is due first."""
        if self.core is None:  # a callback stopped the node
            return
        due = self.core.due
        if self._timer is not None:
            if self._due <= due:
                return  # it comes early enough, and looks again
            self._timer.cancel()
        self._due = due
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(max(0.0, due - self._clock.monotonic()), self._look)


def _roster(topology: Topology) -> Roster:
    return Roster((member.node_id, member.disk_id) for member in topology.members)
