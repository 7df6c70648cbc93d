"""Who of the members is alive: one node's part in SWIM (Das et al. 2002) with Lifeguard (Dadgar et al. 2017).

Who is a member is decided elsewhere, by the agreed topology; nothing here adds or removes one. Each heartbeat a node
probes the next member of a shuffled round:

    A                    B (probed)                  C, D, E (helpers)
    Probe ------------->
          <------------- ProbeAck        in time: B is alive, the round ends
    IndirectProbe -------------------------------->  Probe to B
          <----------------------------------------  ProbeAck of B, or ProbeNack: "I am here, B is silent"

1. `failure_threshold` failed rounds in a row make B suspected; a suspicion that is not refuted becomes a death, the
   sooner the more members come to it on their own (dissemination.py, suspicion.py).
2. A probe of a member that is not held to be alive carries the accusation, which it refutes in its reply (Lifeguard's
   buddy system). So a reply always refreshes its sender's state.
3. A node that has reason to doubt itself slows down (awareness.py). Time in which its process did not run at all does
   not count (`stalled`): no deadline passes because nobody was there to see the answer.
4. Members that are gone are still probed, slowly, and at once when a link to them comes up: every partition heals,
   even if everybody holds everybody to be dead.

Links say something too. Where there is none, the helpers are asked at once, and a member whose link broke is probed
ahead of its turn; but a broken link alone is never proof: only this node may be cut off.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from agi.core.dht.protocol.agenda import Agenda, Effect, Report, Send
from agi.core.dht.protocol.awareness import Awareness
from agi.core.dht.protocol.dissemination import Dissemination, Pace
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
from agi.core.dht.protocol.view import Roster
from agi.core.dht.types import MemberStatus

__all__ = ["Effect", "Membership", "Pace", "Report", "Roster", "Send"]

ROUNDS_MAX = 64
"""Members that a node probes at a time; further ones wait for a probe timeout."""
RELAYS_MAX = 1024
"""Probes under way for others; past it a node says at once that it got no answer."""
PICKS_MAX = 32
"""Members that one heartbeat looks at in search of one to probe."""
NACK_SHARE = 0.8
"""A helper says that it got no answer after this part of the probe timeout, so that its word arrives in time."""


class _Round:
    """A probe of a member, with all its helpers. `tentative`: of one that is gone. `asked` is None until they are."""

    __slots__ = ("asked", "nacked", "seq", "target", "tentative")

    def __init__(self, seq: int, target: str, tentative: bool) -> None:
        self.seq = seq
        self.target = target
        self.tentative = tentative
        self.asked: list[str] | None = None
        self.nacked: set[str] = set()


class _Relay:
    """A probe for somebody else."""

    __slots__ = ("origin", "seq", "target", "via")

    def __init__(self, origin: str, seq: int, via: object, target: str) -> None:
        self.origin = origin
        self.seq = seq
        self.via = via
        self.target = target


class Membership:
    """One node's failure detector. Every verb takes the time and returns what to do; `due` tells when `advance` has to
    be called at the latest.

    Args:
        me, boot: this node, and its boot counter.
        linked: whether members count as linked until `link_down` tells otherwise.

    Attributes:
        view: what is held of each member.
        probes, failed_probes: rounds begun, and those of them without an answer.
        suspicions: members that this node was the first to suspect, as far as it knew.
    """

    def __init__(
        self, me: str, boot: int, roster: Roster, pace: Pace, rng: random.Random, now: float, *, linked: bool = True
    ) -> None:
        self._me = me
        self._pace = pace
        self._rng = rng
        self._agenda = Agenda(now)
        self.awareness = Awareness(pace.awareness_max)
        self._news = Dissemination(
            me, boot, roster, pace, rng, self._agenda, self.awareness, self._probe_soon, linked=linked
        )
        self.view = self._news.view
        self.probes = self.failed_probes = self.suspicions = 0
        self._turn = 0
        self._seq = 0
        self._rounds: dict[int, _Round] = {}
        self._probing: dict[str, int] = {}
        self._relays: dict[int, _Relay] = {}
        self._failures: dict[str, int] = {}
        self._soon: set[str] = set()
        self._receivers: dict[type[Message], Callable[[str, Any, object], None]] = {
            Probe: self._on_probe,
            ProbeAck: self._on_ack,
            IndirectProbe: self._on_indirect_probe,
            ProbeNack: self._on_nack,
            Gossip: self._news.on_gossip,
            ViewDigest: self._news.on_digest,
            ViewState: self._news.on_state,
        }
        self._agenda.after(rng.random() * pace.heartbeat_s, self._heartbeat)
        self._agenda.after(rng.random() * pace.recovery_s, self._recover)

    # --- what is known

    @property
    def due(self) -> float:
        """When something is to be done though nothing arrives."""
        return self._agenda.due

    @property
    def incarnation(self) -> int:
        """How often this node had to refute an accusation since its start, or more."""
        return self._news.incarnation

    @property
    def refutations(self) -> int:
        """Accusations of this node that it refuted."""
        return self._news.refutations

    @property
    def false_deaths(self) -> int:
        """Members that were held to be dead and then refuted it."""
        return self._news.false_deaths

    @property
    def queued(self) -> int:
        """Claims that this node still passes on."""
        return len(self._news.queue)

    def status(self, node: str) -> MemberStatus:
        """What is held of a member right now."""
        return self.view.status(node)

    # --- verbs

    def advance(self, now: float) -> list[Effect]:
        """Time has passed."""
        out = self._agenda.begin(now)
        self._agenda.run()
        return out

    def receive(self, sender: str, message: Message, now: float, via: object = None) -> list[Effect]:
        """A message of a node arrived; `via` goes with what answers it."""
        out = self._agenda.begin(now)
        if sender in self.view.roster and sender != self._me:
            self._receivers[message.__class__](sender, message, via)
        return out

    def stalled(self, seconds: float) -> None:
        """This process did not run for so long: no deadline came nearer."""
        self._agenda.stalled(seconds)
        self.awareness.add(1)

    def link_up(self, node: str, boot: int, now: float) -> list[Effect]:
        """There is a link to that member, whose Hello named its boot counter."""
        out = self._agenda.begin(now)
        if node in self.view.roster and node != self._me:
            self._news.unlinked.discard(node)
            self._news.heard(node, boot, 0)
            if self.view.status(node) is not MemberStatus.ALIVE:
                self._probe_soon(node)
            self._news.sync_soon(node)
        return out

    def link_down(self, node: str, now: float) -> list[Effect]:
        """The links to that member broke."""
        out = self._agenda.begin(now)
        if node not in self.view.roster or node == self._me:
            return out
        self._news.unlinked.add(node)
        seq = self._probing.get(node)
        if seq is not None:
            self._ask_helpers(seq)
            self._settle(seq)
        elif node not in self._news.gone:
            self._probe_soon(node)
        return out

    def leave(self, now: float) -> list[Effect]:
        """This node stops: the others need not find out by themselves. It accuses nobody from here on."""
        out = self._agenda.begin(now)
        self._news.leave()
        return out

    def set_members(self, roster: Roster, now: float) -> list[Effect]:
        """The topology changed. What is known of members that stay is kept."""
        out = self._agenda.begin(now)
        for name in self._news.adopt_roster(roster):
            self._failures.pop(name, None)
            self._soon.discard(name)
            seq = self._probing.pop(name, None)
            if seq is not None:
                del self._rounds[seq]
            for number in [number for number, relay in self._relays.items() if name in (relay.target, relay.origin)]:
                del self._relays[number]
        self._turn = 0
        return out

    # --- rounds

    @property
    def _idle(self) -> bool:
        """A node that leaves, or is no member, judges nobody."""
        return self._news.leaving or self._me not in self.view.roster

    def _heartbeat(self, _: None) -> None:
        target = None if self._idle else self._next()
        if target is not None and len(self._rounds) < ROUNDS_MAX:
            self._probe(target)
        self._agenda.after(self.awareness.scale(self._pace.heartbeat_s), self._heartbeat)

    def _next(self) -> str | None:
        """The next of the round: a shuffle (Fisher and Yates) done one step at a time."""
        order = self._news.order
        for _ in range(min(PICKS_MAX, len(order))):
            if self._turn >= len(order):
                self._turn = 0
            turn = self._turn
            other = turn + int(self._rng.random() * (len(order) - turn))
            order[turn], order[other] = order[other], order[turn]
            self._turn = turn + 1
            if order[turn] not in self._news.gone and order[turn] not in self._probing:
                return order[turn]
        return None

    def _probe_soon(self, node: str, delay_s: float = 0.0) -> None:
        """Ahead of its turn."""
        if node not in self._soon:
            self._soon.add(node)
            self._agenda.after(delay_s, self._probe_now, node)

    def _probe_now(self, node: str) -> None:
        if node not in self._soon:
            return
        self._soon.discard(node)
        if self._idle or node in self._probing:
            return
        if len(self._rounds) >= ROUNDS_MAX:
            self._probe_soon(node, self._pace.probe_timeout_s)
        else:
            self._probe(node)

    def _probe(self, target: str) -> None:
        self.probes += 1
        self._seq = seq = self._seq + 1
        self._rounds[seq] = _Round(seq, target, target in self._news.gone)
        self._probing[target] = seq
        scale, pace = self.awareness.scale, self._pace
        self._agenda.after(scale(pace.heartbeat_s), self._round_over, seq)
        if target in self._news.unlinked:
            self._ask_helpers(seq)
            self._settle(seq)
        else:
            self._send_probe(target, seq)
            self._agenda.after(scale(pace.probe_timeout_s), self._ask_helpers, seq)

    def _send_probe(self, target: str, seq: int) -> None:
        news = self._news
        self._agenda.send(target, Probe(seq, news.boot, news.incarnation, news.claims_for(target)))

    def _ask_helpers(self, seq: int) -> None:
        """There is no answer yet, or no link."""
        round_ = self._rounds.get(seq)
        if round_ is None or round_.tentative or round_.asked is not None:
            return
        news, target = self._news, round_.target
        round_.asked = news.pick(self._pace.indirect_probes, target)
        for helper in round_.asked:
            claims = news.claims_for(helper, news.accusation(target))
            self._agenda.send(helper, IndirectProbe(seq, target, claims))

    def _settle(self, seq: int) -> None:
        """Where no answer can come any more, the round is over."""
        round_ = self._rounds.get(seq)
        if round_ is None or round_.target not in self._news.unlinked:
            return
        if len(round_.nacked) == len(round_.asked or ()):
            self._round_over(seq)

    def _round_over(self, seq: int) -> None:
        round_ = self._rounds.pop(seq, None)
        if round_ is None:
            return
        target = round_.target
        del self._probing[target]
        if round_.tentative or target in self._news.gone or self._idle:
            return
        self.failed_probes += 1
        # helpers that could not even say so are a sign that the fault is here
        self.awareness.add(len(round_.asked) - len(round_.nacked) if round_.asked else 1)
        if self._news.settle_doubt(target):
            self._failures.pop(target, None)
            return
        failures = self._failures.get(target, 0) + 1
        if failures < self._pace.failure_threshold:
            self._failures[target] = failures
            self._probe_soon(target, self._pace.probe_timeout_s)
        else:
            self._failures.pop(target, None)
            self.suspicions += self._news.accuse(target)

    def _recover(self, _: None) -> None:
        """Tries one of those that are gone; all of them once in `recovery_s`."""
        gone = self._news.gone
        if gone and not self._idle:
            node = next(iter(gone))
            del gone[node]
            gone[node] = None
            if node not in self._news.unlinked and node not in self._probing and len(self._rounds) < ROUNDS_MAX:
                self._probe(node)
        pause_s = max(self._pace.heartbeat_s, self._pace.recovery_s / max(1, len(gone)))
        self._agenda.after(pause_s, self._recover)

    # --- messages

    def _on_probe(self, sender: str, message: Probe, via: object) -> None:
        self._news.heard(sender, message.boot, message.incarnation)
        self._news.take(message.gossip)
        self._acknowledge(sender, message.seq, via)

    def _acknowledge(self, sender: str, seq: int, via: object) -> None:
        news = self._news
        self._agenda.send(sender, ProbeAck(seq, news.boot, news.incarnation, news.claims_for(sender)), via)

    def _on_ack(self, sender: str, message: ProbeAck, via: object) -> None:
        self._news.take(message.gossip)
        round_ = self._rounds.get(message.seq)
        if round_ is not None:
            if sender == round_.target or sender in (round_.asked or ()):
                del self._rounds[message.seq]
                del self._probing[round_.target]
                self._failures.pop(round_.target, None)
                self.awareness.add(-1)
                self._news.answered(round_.target, message.boot, message.incarnation)
            return
        relay = self._relays.get(message.seq)
        if relay is not None and relay.target == sender:
            del self._relays[message.seq]
            self._news.heard(sender, message.boot, message.incarnation)
            claims = self._news.claims_for(relay.origin)
            ack = ProbeAck(relay.seq, message.boot, message.incarnation, claims)
            self._agenda.send(relay.origin, ack, relay.via)

    def _on_indirect_probe(self, sender: str, message: IndirectProbe, via: object) -> None:
        news, target = self._news, message.target
        news.take(message.gossip)
        if target == self._me:
            self._acknowledge(sender, message.seq, via)
        elif target not in news.roster or target in news.unlinked or len(self._relays) >= RELAYS_MAX:
            self._agenda.send(sender, ProbeNack(message.seq, news.claims_for(sender)), via)
        else:
            self._seq = seq = self._seq + 1
            self._relays[seq] = _Relay(sender, message.seq, via, target)
            self._send_probe(target, seq)
            self._agenda.after(NACK_SHARE * self._pace.probe_timeout_s, self._relay_late, seq)
            self._agenda.after(self._pace.heartbeat_s, self._relay_over, seq)

    def _relay_late(self, seq: int) -> None:
        relay = self._relays.get(seq)
        if relay is not None:
            self._agenda.send(relay.origin, ProbeNack(relay.seq, self._news.claims_for(relay.origin)), relay.via)

    def _relay_over(self, seq: int) -> None:
        self._relays.pop(seq, None)

    def _on_nack(self, sender: str, message: ProbeNack, via: object) -> None:
        self._news.take(message.gossip)
        round_ = self._rounds.get(message.seq)
        if round_ is not None and sender in (round_.asked or ()):
            round_.nacked.add(sender)
            self._settle(message.seq)
