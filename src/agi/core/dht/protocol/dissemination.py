"""What a node holds of the members, and how that spreads (Das et al. 2002, "SWIM"; Dadgar et al. 2017, "Lifeguard").

News rides on all messages and, while there is any, travels by itself (broadcast.py). Whatever goes to a member that is
not held to be alive carries the accusation first, so that it can refute: only the accused can, by a higher incarnation.
A suspicion that is not refuted in time (suspicion.py) becomes a death.

Now and then two members compare a hash of all they hold and, where it differs, exchange everything. A death that is
learnt so, about an incarnation that this node knows as well, is a `doubt`: the node looks for itself first. After a
partition each side holds the other to be dead, and may not bury its own because of that.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from agi.core.dht.protocol.agenda import Agenda
from agi.core.dht.protocol.awareness import Awareness
from agi.core.dht.protocol.broadcast import CLAIMS_BYTES_MAX, BroadcastQueue, claim_bytes
from agi.core.dht.protocol.messages import Claim, Gossip, ViewDigest, ViewState
from agi.core.dht.protocol.suspicion import Suspicion, bounds
from agi.core.dht.protocol.view import GONE, Roster, View, newer
from agi.core.dht.types import MemberStatus

ALIVE, SUSPECT, DEAD, LEFT = MemberStatus

PICKS_MAX = 32
"""Members that are looked at for each one that is sought."""
STATE_CLAIMS_MAX = 256
"""Claims of one ViewState."""
LEAVE_NODES_MAX = 64
"""Members that a leaving node tells itself."""
SYNC_SCALE_MEMBERS = 32
"""From this size on each doubling of the cluster makes full exchanges rarer by one interval."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Times in seconds and counts; config/schema.py describes each under its name."""

    heartbeat_s: float = 0.5
    probe_timeout_s: float = 0.2
    failure_threshold: int = 2
    indirect_probes: int = 3
    suspicion_mult: int = 4
    suspicion_max_mult: int = 6
    recovery_s: float = 5.0
    gossip_interval_s: float = 0.1
    gossip_nodes: int = 3
    retransmit_mult: int = 4
    sync_interval_s: float = 30.0
    awareness_max: int = 8


class Dissemination:
    """The part of a node's failure detector that knows.

    Args:
        me, boot: this node, and its boot counter.
        linked: whether members count as linked until told otherwise.
        look: called for a member that should be probed ahead of its turn.

    Attributes:
        gone: members that are dead or have left, the one tried longest ago first.
        unlinked: members to which there is no link.
        order: the other members, in any order.
        refutations, false_deaths: as in Membership.
    """

    def __init__(
        self,
        me: str,
        boot: int,
        roster: Roster,
        pace: Pace,
        rng: random.Random,
        agenda: Agenda,
        awareness: Awareness,
        look: Callable[[str], None],
        *,
        linked: bool,
    ) -> None:
        self._me = me
        self._pace = pace
        self._rng = rng
        self._agenda = agenda
        self._awareness = awareness
        self._look = look
        self._linked = linked
        self._suspicions: dict[str, Suspicion] = {}
        self._doubts: dict[str, Claim] = {}
        self._gossiping = self._syncing = False
        self._synced_at = -math.inf
        self.boot = boot
        self.incarnation = 0
        self.leaving = False
        self.refutations = 0
        self.false_deaths = 0
        self.view = View(roster)
        self.queue = BroadcastQueue(pace.retransmit_mult)
        self.gone: dict[str, None] = {}
        self.order = [name for name in roster.names if name != me]
        self.unlinked: set[str] = set() if linked else set(self.order)
        agenda.after(rng.random() * self._sync_interval_s(), self._sync)
        if boot:
            self._say_alive()

    # --- members

    @property
    def roster(self) -> Roster:
        return self.view.roster

    def adopt_roster(self, roster: Roster) -> list[str]:
        """Other members. Returns those of which all is forgotten: who went, and whose disk was replaced."""
        before = self.view.roster
        self.view.adopt(roster)
        strangers = [name for name, disk in before.disks.items() if roster.disks.get(name) != disk]
        for name in strangers:
            self._suspicions.pop(name, None)
            self._doubts.pop(name, None)
            self.gone.pop(name, None)
            self.queue.drop(name)
        self.order = [name for name in roster.names if name != self._me]
        self.unlinked.intersection_update(roster.names)
        if not self._linked:
            self.unlinked.update(name for name in self.order if before.disks.get(name) != roster.disks[name])
        if self._me in roster and self.boot and not self.leaving:
            self._say_alive()
        return strangers

    def pick(self, count: int, target: str = "") -> list[str]:
        """Some members at random, not that one, that can be asked for help or told the news."""
        order = self.order
        if len(order) <= PICKS_MAX:
            able = [name for name in order if self._is_able(name, target)]
            return able if len(able) <= count else self._rng.sample(able, count)
        picked: dict[str, None] = {}
        for _ in range(PICKS_MAX * count):
            name = order[int(self._rng.random() * len(order))]
            if self._is_able(name, target):
                picked[name] = None
                if len(picked) == count:
                    break
        return list(picked)

    def _is_able(self, name: str, target: str) -> bool:
        return name != target and name not in self.gone and name not in self.unlinked

    # --- claims

    def take(self, claims: list[Claim], *, hearsay: bool = False) -> None:
        """What somebody says of members. `hearsay`: it is all that he holds, however old."""
        get = self.view.get
        for claim in claims:
            if claim.node not in self.view.roster.disks or get(claim.node) != claim:  # else it is no news
                self._merge(claim, hearsay)

    def _merge(self, claim: Claim, hearsay: bool) -> None:
        node = claim.node
        if self.view.roster.disks.get(node) != claim.disk:
            return
        if node == self._me:
            self._answer(claim)
            return
        known = self.view.get(node)
        same = claim.boot == known.boot and claim.incarnation == known.incarnation
        if not newer(claim, known):
            if same and claim.status is SUSPECT and known.status is SUSPECT:
                self._confirm(known, claim.by)
        elif hearsay and same and claim.status is DEAD:
            self._doubts[node] = claim
            self._look(node)
        else:
            self._adopt(claim)

    def _answer(self, claim: Claim) -> None:
        """Somebody speaks of this node. What is not so is refuted by a higher incarnation."""
        if self.leaving or claim.boot != self.boot or claim.incarnation < self.incarnation:
            return
        if claim.status is ALIVE and claim.incarnation == self.incarnation:
            return
        self.incarnation = claim.incarnation + 1
        if claim.status is not ALIVE:
            self.refutations += 1
            self._awareness.add(1)
        self._say_alive()

    def heard(self, node: str, boot: int, incarnation: int) -> None:
        """A member said so of itself."""
        known = self.view.get(node)
        if (boot, incarnation) > (known.boot, known.incarnation):
            self._adopt(Claim(node, known.disk, boot, incarnation, ALIVE))

    def answered(self, node: str, boot: int, incarnation: int) -> None:
        """A probe of it was answered."""
        self._doubts.pop(node, None)
        self.heard(node, boot, incarnation)

    def settle_doubt(self, node: str) -> bool:
        """A probe of it failed. Whether that decides a doubt: then others were right, and it is dead."""
        doubt = self._doubts.pop(node, None)
        if doubt is None or not newer(doubt, self.view.get(node)):
            return False
        self._adopt(doubt)
        return True

    def accuse(self, node: str) -> bool:
        """This node finds by itself that a member does not answer. Whether it is the first, as far as it knows."""
        known = self.view.get(node)
        if known.status is SUSPECT:
            self._confirm(known, self._me)
            return False
        self._adopt(Claim(node, known.disk, known.boot, known.incarnation, SUSPECT, self._me))
        return True

    def _adopt(self, claim: Claim) -> None:
        node, status = claim.node, claim.status
        boot = self.view.get(node).boot
        was = self.view.put(claim)
        self._pass_on(claim)
        self._suspicions.pop(node, None)
        if status is SUSPECT:
            self._suspect(claim)
        if status in GONE:
            self.gone[node] = None
        elif self.gone:
            self.gone.pop(node, None)
        if was is DEAD and status < was and boot == claim.boot:
            self.false_deaths += 1
        if status is not was:
            self._agenda.report(node, status, was)

    # --- suspicions

    def _suspect(self, claim: Claim) -> None:
        pace, members = self._pace, len(self.view.roster)
        least_s, longest_s = bounds(members, pace.heartbeat_s, pace.suspicion_mult, pace.suspicion_max_mult)
        others = self.view.counts[ALIVE] - 1
        expected = max(0, min(pace.suspicion_mult - 2, others))
        suspicion = Suspicion(claim.by, self._agenda.now, expected, least_s, longest_s)
        self._suspicions[claim.node] = suspicion
        self._agenda.at(suspicion.deadline, self._suspicion_over, claim.node)

    def _confirm(self, known: Claim, by: str) -> None:
        suspicion = self._suspicions.get(known.node)
        if suspicion is not None and by in self.view.roster and suspicion.confirm(by):
            self._pass_on(Claim(known.node, known.disk, known.boot, known.incarnation, SUSPECT, by))
            self._agenda.at(suspicion.deadline, self._suspicion_over, known.node)

    def _suspicion_over(self, node: str) -> None:
        suspicion = self._suspicions.get(node)
        if suspicion is None or not self._agenda.is_due(suspicion.deadline) or self.leaving:
            return
        known = self.view.get(node)
        self._adopt(Claim(node, known.disk, known.boot, known.incarnation, DEAD))

    # --- passing on

    def leave(self) -> None:
        """This node stops, and says so itself; from here on it accuses nobody and refutes nothing."""
        self.leaving = True
        if self._me in self.view.roster:
            claim = self._mine(LEFT)
            self.view.put(claim)
            self.queue.drop(self._me)
            for node in self.pick(LEAVE_NODES_MAX):
                self._agenda.send(node, Gossip([claim]))

    def _mine(self, status: MemberStatus) -> Claim:
        return Claim(self._me, self.view.roster.disks[self._me], self.boot, self.incarnation, status)

    def _say_alive(self) -> None:
        claim = self._mine(ALIVE)
        self.view.put(claim)
        self._pass_on(claim)

    def _pass_on(self, claim: Claim) -> None:
        self.queue.add(claim)
        self._start_gossip()

    def _start_gossip(self, delay_s: float = 0.0) -> None:
        if not self._gossiping:
            self._gossiping = True
            self._agenda.after(delay_s, self._gossip)

    def _gossip(self, _: None) -> None:
        self._gossiping = False
        if self.leaving or not len(self.queue):
            return
        told = self.pick(self._pace.gossip_nodes)
        for node in told:
            claims = self.claims_for(node)
            if claims:
                self._agenda.send(node, Gossip(claims))
        if told and len(self.queue):  # where nobody can be told, a link or more news begins it anew
            self._start_gossip(self._pace.gossip_interval_s)

    def claims_for(self, node: str, first: Claim | None = None) -> list[Claim]:
        """What a message to that member carries: what it should refute, this one, and the news."""
        urgent = [claim for claim in (self.accusation(node), first) if claim is not None]
        left = CLAIMS_BYTES_MAX - sum(map(claim_bytes, urgent))
        news = self.queue.take(len(self.view.roster), left)
        if urgent and news:
            news = [claim for claim in news if claim.node != node and claim not in urgent]
        return urgent + news

    def accusation(self, node: str) -> Claim | None:
        """What that member would have to refute."""
        doubt = self._doubts.get(node)
        if doubt is not None:
            return doubt
        return self.view.get(node) if self.view.status(node) is not ALIVE else None

    # --- full exchanges

    def _sync_interval_s(self) -> float:
        doublings = math.ceil(math.log2(max(1, (len(self.order) + 1) / SYNC_SCALE_MEMBERS)))
        return self._pace.sync_interval_s * (1 + doublings)

    def sync_soon(self, node: str) -> None:
        """With that member, which may have been away; one such exchange a heartbeat is enough."""
        self._start_gossip()
        if not self._syncing:
            self._syncing = True
            self._agenda.at(max(self._agenda.now, self._synced_at + self._pace.heartbeat_s), self._sync_with, node)

    def _sync(self, _: None) -> None:
        if self.leaving:
            return
        for node in self.pick(1):
            self._sync_with(node)
        self._agenda.after(self._sync_interval_s(), self._sync)

    def _sync_with(self, node: str) -> None:
        self._syncing = False
        if not self.leaving and node in self.view.roster and node not in self.unlinked:
            self._synced_at = self._agenda.now
            self._agenda.send(node, ViewDigest(self.view.digest))

    def on_gossip(self, sender: str, message: Gossip, via: object) -> None:
        self.take(message.claims)

    def on_digest(self, sender: str, message: ViewDigest, via: object) -> None:
        if message.digest != self.view.digest:
            self._send_state(sender, via, answer=True)

    def on_state(self, sender: str, message: ViewState, via: object) -> None:
        self.take(message.claims, hearsay=True)
        if message.answer:
            self._send_state(sender, None, answer=False)

    def _send_state(self, node: str, via: object, *, answer: bool) -> None:
        claims = list(self.view.known())
        for first in range(0, max(1, len(claims)), STATE_CLAIMS_MAX):
            last = first + STATE_CLAIMS_MAX >= len(claims)
            part = claims[first : first + STATE_CLAIMS_MAX]
            self._agenda.send(node, ViewState(part, answer and last), via)
