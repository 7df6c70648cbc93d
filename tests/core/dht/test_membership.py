"""One node's failure detector, message by message, and a state machine that looks for contradictions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agi.core.dht.protocol.broadcast import CLAIMS_BYTES_MAX, CLAIMS_MAX, claim_bytes
from agi.core.dht.protocol.dissemination import STATE_CLAIMS_MAX
from agi.core.dht.protocol.membership import RELAYS_MAX, ROUNDS_MAX, Effect, Membership, Pace, Report, Roster, Send
from agi.core.dht.protocol.messages import (
    Claim,
    Gossip,
    IndirectProbe,
    Message,
    Probe,
    ProbeAck,
    ProbeNack,
    ViewDigest,
    ViewState,
)
from agi.core.dht.protocol.view import View, disk_tag, newer
from agi.core.dht.types import MemberStatus

ALIVE, SUSPECT, DEAD, LEFT = MemberStatus
PACE = Pace(gossip_nodes=0, sync_interval_s=1e9)
"""Nothing but probes."""

M = TypeVar("M", bound=Message)


def claim(node: str, status: MemberStatus, incarnation: int = 0, boot: int = 1, by: str = "", disk: str = "") -> Claim:
    return Claim(node, disk_tag(disk or f"disk of {node}"), boot, incarnation, status, by)


def roster(*names: str) -> Roster:
    return Roster((name, f"disk of {name}") for name in names)


class One:
    """The failure detector of `a`, whose world is the test. It is driven by `to`, which keeps what comes of it."""

    def __init__(self, *others: str, pace: Pace = PACE, boot: int = 1, linked: bool = True) -> None:
        self.now = 0.0
        self.core = Membership("a", boot, roster("a", *others), pace, random.Random(1), 0.0, linked=linked)
        self.sent: list[Send] = []
        self.reports: list[Report] = []
        for other in others:  # everybody is known
            self.hear(other, Gossip([claim(other, ALIVE)]))
        self.sent.clear()

    def keep(self, effects: list[Effect]) -> None:
        for effect in effects:
            (self.sent if isinstance(effect, Send) else self.reports).append(effect)  # type: ignore[arg-type]  # sorted by kind

    def to(self, now: float) -> None:
        """Time passes, timer by timer."""
        while self.core.due <= now:
            self.now = max(self.now, self.core.due)
            self.keep(self.core.advance(self.now))
        self.now = now
        self.keep(self.core.advance(now))

    def hear(self, sender: str, message: Message, via: object = None) -> None:
        self.keep(self.core.receive(sender, message, self.now, via))

    def take(self, kind: type[M], to: str | None = None) -> list[tuple[str, M]]:
        """(receiver, message) of that kind sent since it was last asked."""
        found = [
            (send.to, send.message)
            for send in self.sent
            if isinstance(send.message, kind) and (to is None or send.to == to)
        ]
        self.sent = [send for send in self.sent if not isinstance(send.message, kind)]
        return found

    def next_probe(self, answer: bool = True, to: str | None = None) -> tuple[str, Probe]:
        """The next probe, perhaps of a given member (those before it are answered)."""
        for _ in range(1000):
            self.to(self.core.due)
            for target, probe in self.take(Probe):
                wanted = to is None or target == to
                if answer or not wanted:
                    self.ack(target, probe)
                if wanted:
                    return target, probe
        raise AssertionError("no probe")

    def ack(self, target: str, probe: Probe, incarnation: int | None = None, boot: int = 1) -> None:
        """As the target would: an accusation is refuted."""
        mine = max((c.incarnation + (c.status is not ALIVE) for c in probe.gossip if c.node == target), default=0)
        known = self.core.view.get(target).incarnation
        told = max(mine, known) if incarnation is None else incarnation
        self.hear(target, ProbeAck(probe.seq, boot, told))

    def suspect(self, target: str) -> None:
        """Fails rounds of it until it is suspected."""
        for _ in range(PACE.failure_threshold):
            self.next_probe(answer=False, to=target)
        while self.core.status(target) is ALIVE:
            self.to(self.core.due)
            for other, probe in self.take(Probe):
                if other != target:
                    self.ack(other, probe)


# --- rounds


def test_members_are_probed_one_each_heartbeat_in_shuffled_rounds() -> None:
    one = One(*"bcdefgh")
    rounds = [[one.next_probe()[0] for _ in range(7)] for _ in range(6)]
    assert all(sorted(each) == list("bcdefgh") for each in rounds), "somebody is probed twice before all were"
    assert len({tuple(each) for each in rounds}) > 1, "the rounds are not shuffled"
    started = one.now
    for _ in range(10):
        one.next_probe()
    assert one.now - started == pytest.approx(10 * PACE.heartbeat_s)


def test_an_answer_in_time_ends_the_round() -> None:
    one = One("b", "c")
    one.next_probe()
    one.to(one.now + PACE.heartbeat_s * 0.99)
    assert one.take(IndirectProbe) == [] and one.core.failed_probes == 0


def test_without_an_answer_helpers_are_asked_and_one_that_reaches_it_is_enough() -> None:
    one = One(*"bcdef")
    target, probe = one.next_probe(answer=False)
    one.to(one.now + PACE.probe_timeout_s * 0.99)
    assert one.take(IndirectProbe) == []
    one.to(one.now + PACE.probe_timeout_s * 0.02)
    asked = one.take(IndirectProbe)
    assert len({helper for helper, _ in asked}) == PACE.indirect_probes
    assert all(message.target == target != helper and message.seq == probe.seq for helper, message in asked)
    one.hear(asked[0][0], ProbeAck(probe.seq, 1, 0))
    one.to(one.now + 0.29)
    assert one.core.failed_probes == 0 and one.core.status(target) is ALIVE


def test_an_answer_of_somebody_else_does_not_count() -> None:
    one = One(*"bcdef")
    target, probe = one.next_probe(answer=False)
    stranger = next(name for name in "bcdef" if name != target)
    one.hear(stranger, ProbeAck(probe.seq, 1, 0))
    one.hear(target, ProbeAck(probe.seq + 1000, 1, 0))
    one.to(one.now + PACE.heartbeat_s + 0.01)
    assert one.core.failed_probes == 1


def test_a_late_direct_answer_counts_until_the_round_is_over() -> None:
    one = One(*"bcd")
    target, probe = one.next_probe(answer=False)
    one.to(one.now + PACE.heartbeat_s * 0.9)
    one.ack(target, probe)
    one.to(one.now + 0.1)
    assert one.core.failed_probes == 0


@pytest.mark.parametrize("threshold", [1, 2, 3])
def test_so_many_failed_rounds_in_a_row_make_a_suspicion(threshold: int) -> None:
    one = One(*"bcdefgh", pace=Pace(gossip_nodes=0, failure_threshold=threshold, awareness_max=0))
    for _ in range(threshold - 1):
        one.next_probe(answer=False, to="b")
    one.next_probe(answer=True, to="b")  # it was not in a row
    assert one.core.status("b") is ALIVE
    began = None
    for _ in range(threshold):
        assert one.core.status("b") is ALIVE
        one.next_probe(answer=False, to="b")
        began = began or one.now
    one.to(one.now + PACE.heartbeat_s + 0.01)
    assert one.core.status("b") is SUSPECT
    assert one.reports == [Report("b", SUSPECT, ALIVE)]
    assert one.core.suspicions == 1
    # it is not left to its turn, which comes every 3.5 s
    assert one.now - began < threshold * (PACE.heartbeat_s + PACE.probe_timeout_s) + 0.1


def test_the_dead_are_not_probed_in_turn_but_each_once_in_recovery_time() -> None:
    one = One(*"bcde", pace=Pace(gossip_nodes=0, recovery_s=4.0, sync_interval_s=1e9))
    one.hear("b", Gossip([claim("c", DEAD), claim("d", DEAD)]))
    one.to(4.0)
    one.take(Probe)
    one.to(20.0)
    probed = [target for target, _ in one.take(Probe)]
    assert probed.count("c") == 4 == probed.count("d")


def test_rounds_under_way_are_bounded() -> None:
    names = [f"m{i:03}" for i in range(300)]
    one = One(*names, linked=False)
    for name in names:
        one.keep(one.core.link_up(name, 1, one.now))
    for name in names[:-1]:
        one.keep(one.core.link_down(name, one.now))
    one.to(one.now)
    assert len(one.core._rounds) <= ROUNDS_MAX
    for _ in range(10):
        one.to(one.now + 0.2)
        assert len(one.core._rounds) <= ROUNDS_MAX
    assert one.core.probes > 2 * ROUNDS_MAX


# --- helping


def test_a_helper_relays_a_probe_and_its_answer() -> None:
    one = One("b", "c")
    one.hear("b", IndirectProbe(77, "c"), via="the link")
    ((target, probe),) = one.take(Probe)
    assert target == "c"
    one.hear("c", ProbeAck(probe.seq, 1, 5))
    (sent,) = [send for send in one.sent if isinstance(send.message, ProbeAck)]
    assert (sent.to, sent.via) == ("b", "the link")
    assert (sent.message.seq, sent.message.incarnation) == (77, 5)
    one.to(one.now + 1)
    assert one.take(ProbeNack) == []


def test_a_helper_that_gets_no_answer_says_so_in_time() -> None:
    one = One("b", "c")
    one.hear("b", IndirectProbe(77, "c"), via="the link")
    one.to(one.now + PACE.probe_timeout_s)
    ((receiver, nack),) = one.take(ProbeNack)
    assert (receiver, nack.seq) == ("b", 77)


def test_a_helper_without_a_link_says_so_at_once() -> None:
    one = One("b", "c", linked=False)
    one.keep(one.core.link_up("b", 1, 0.0))
    one.hear("b", IndirectProbe(77, "c"))
    assert [nack.seq for _, nack in one.take(ProbeNack)] == [77]
    assert one.take(Probe) == []


def test_who_is_asked_about_itself_answers_itself() -> None:
    one = One("b", "c")
    one.hear("b", IndirectProbe(77, "a"))
    assert [(ack.seq, ack.boot) for _, ack in one.take(ProbeAck)] == [(77, 1)]


def test_probes_for_others_are_bounded() -> None:
    one = One("b", "c")
    for seq in range(RELAYS_MAX + 10):
        one.hear("b", IndirectProbe(seq, "c"))
    assert len(one.take(Probe)) == RELAYS_MAX
    assert len(one.take(ProbeNack)) == 10
    one.to(one.now + 1)
    assert one.core._relays == {}


# --- links


def test_a_broken_link_has_the_helpers_asked_at_once_and_alone_proves_nothing() -> None:
    one = One(*"bcde", linked=False)
    for name in "bcde":
        one.keep(one.core.link_up(name, 1, 0.0))
    one.to(0.0)
    one.take(Probe)
    one.keep(one.core.link_down("b", 0.0))
    one.to(0.0)
    asked = one.take(IndirectProbe)
    assert sorted(helper for helper, _ in asked) == ["c", "d", "e"]
    assert one.take(Probe, "b") == []
    one.hear("c", ProbeAck(asked[0][1].seq, 1, 0))
    assert one.core.failed_probes == 0
    for _ in range(40):  # helpers reach it all the time: it stays alive although this node never does
        one.to(one.now + 0.5)
        for _, message in one.take(IndirectProbe)[:1]:
            one.hear(_, ProbeAck(message.seq, 1, 0))
        for target, probe in one.take(Probe):
            one.ack(target, probe)
    assert one.core.status("b") is ALIVE and one.reports == []


def test_where_helpers_have_no_link_either_it_is_suspected_soon_but_not_dead() -> None:
    one = One(*"bcde", linked=False)
    for name in "bcde":
        one.keep(one.core.link_up(name, 1, 0.0))
    one.keep(one.core.link_down("b", 0.0))
    while one.core.status("b") is ALIVE:
        one.to(one.core.due)
        for helper, message in one.take(IndirectProbe):
            one.hear(helper, ProbeNack(message.seq))
        for target, probe in one.take(Probe):
            one.ack(target, probe)
    assert one.now < 2 * PACE.probe_timeout_s
    assert one.core.awareness.score == 0, "helpers that answered are no sign of a fault here"
    began = one.now
    while one.core.status("b") is SUSPECT:
        one.to(one.core.due)
        for target, probe in one.take(Probe):
            one.ack(target, probe)
    assert one.now - began == pytest.approx(24 * PACE.heartbeat_s), "nobody else suspects it: the longest timeout"


def test_a_link_that_comes_up_has_a_dead_member_probed_and_all_compared_at_once() -> None:
    one = One("b", "c", linked=False)
    one.hear("c", Gossip([claim("b", DEAD)]))
    one.keep(one.core.link_up("b", 1, 0.0))
    one.to(0.0)
    ((target, probe),) = one.take(Probe)
    assert target == "b" and probe.gossip[0] == claim("b", DEAD)
    assert [to for to, _ in one.take(ViewDigest)] == ["b"]
    one.ack("b", probe)
    assert one.core.status("b") is ALIVE and one.core.false_deaths == 1


def test_a_restart_is_known_from_the_hello_of_its_link() -> None:
    one = One("b", "c", linked=False)
    one.hear("c", Gossip([claim("b", DEAD, 7)]))
    one.keep(one.core.link_up("b", 2, 0.0))
    assert one.core.status("b") is ALIVE and one.core.false_deaths == 0
    assert one.reports[-1] == Report("b", ALIVE, DEAD)


# --- suspicion, refutation, death


def test_a_suspicion_becomes_a_death_sooner_with_each_other_accuser() -> None:
    for accusers, longest in (((), 12.0), (("c",), 5.8), (("c", "d"), 2.0), (("c", "d", "e", "f"), 2.0)):
        one = One(*"bcdefgh", pace=Pace(gossip_nodes=0))
        one.hear("h", Gossip([claim("b", SUSPECT, by="h")]))
        began = one.now
        for accuser in accusers:
            one.hear("h", Gossip([claim("b", SUSPECT, by=accuser)]))
        while one.core.status("b") is SUSPECT:
            one.to(one.core.due)
            for target, probe in one.take(Probe):
                if target != "b":
                    one.ack(target, probe)
        assert one.core.status("b") is DEAD
        assert one.now - began < longest + 0.3
        assert one.now - began > 1.9


def test_the_accused_member_hears_of_it_with_the_probe_and_its_reply_clears_it() -> None:
    one = One(*"bcd")
    one.suspect("b")
    _, probe = one.next_probe(answer=False, to="b")
    assert probe.gossip[0] == claim("b", SUSPECT, by="a")
    one.ack("b", probe)
    assert one.core.status("b") is ALIVE and one.core.view.get("b").incarnation == 1
    assert one.reports == [Report("b", SUSPECT, ALIVE), Report("b", ALIVE, SUSPECT)]


def test_everything_sent_to_the_accused_carries_the_accusation() -> None:
    one = One(*"bcd")
    one.hear("c", Gossip([claim("b", DEAD)]))
    accusation = claim("b", DEAD)
    one.hear("b", Probe(5, 1, 0))
    assert one.take(ProbeAck)[0][1].gossip[0] == accusation
    one.hear("b", IndirectProbe(6, "nobody"))
    assert one.take(ProbeNack)[0][1].gossip[0] == accusation


def test_a_helper_is_told_of_what_the_member_should_refute() -> None:
    one = One(*"bcd")
    one.suspect("b")
    one.take(IndirectProbe)
    one.next_probe(answer=False, to="b")
    one.to(one.now + PACE.probe_timeout_s + 0.01)
    assert all(claim("b", SUSPECT, by="a") in message.gossip for _, message in one.take(IndirectProbe))


@pytest.mark.parametrize("status", [SUSPECT, DEAD, LEFT])
def test_an_accused_node_refutes_with_a_higher_incarnation(status: MemberStatus) -> None:
    one = One(*"bcd", pace=Pace())
    one.hear("b", Probe(5, 1, 0, [claim("a", status, 4, by="c")]))
    ((_, ack),) = one.take(ProbeAck)
    assert (ack.boot, ack.incarnation) == (1, 5)
    assert one.core.refutations == 1 and one.core.awareness.score == 1
    assert claim("a", ALIVE, 5) in ack.gossip
    one.hear("b", Gossip([claim("a", status, 4, by="d"), claim("a", DEAD, 3), claim("a", DEAD, 9, boot=0)]))
    assert one.core.incarnation == 5 and one.core.refutations == 1, "what is refuted already is no accusation"
    assert one.reports == [], "a node does not report on itself"


def test_claims_of_a_later_boot_of_this_node_are_no_business_of_this_process() -> None:
    one = One("b")
    one.hear("b", Gossip([claim("a", DEAD, 0, boot=2)]))
    assert one.core.incarnation == 0


def test_an_old_incarnation_neither_revives_a_dead_member_nor_kills_a_newer_one() -> None:
    one = One(*"bcd")
    one.hear("c", Gossip([claim("b", DEAD, 5)]))
    for old in (claim("b", ALIVE, 5), claim("b", ALIVE, 4), claim("b", SUSPECT, 5), claim("b", ALIVE, 99, boot=0)):
        one.hear("c", Gossip([old]))
        one.hear("b", Probe(1, old.boot, old.incarnation))
        one.hear("c", ViewState([old]))
        assert one.core.status("b") is DEAD
    one.hear("c", Gossip([claim("b", ALIVE, 6)]))
    assert one.core.status("b") is ALIVE and one.core.false_deaths == 1
    for old in (claim("b", DEAD, 5), claim("b", SUSPECT, 5, by="c"), claim("b", LEFT, 5), claim("b", DEAD, 9, boot=0)):
        one.hear("c", Gossip([old]))
        one.hear("c", ViewState([old]))
        assert one.core.status("b") is ALIVE
    one.hear("c", Gossip([claim("b", ALIVE, 0, boot=2)]))
    one.hear("c", Gossip([claim("b", DEAD, 6)]))
    assert one.core.status("b") is ALIVE, "a restart overrides all that was said before"


def test_a_death_read_in_a_whole_state_is_looked_into_first() -> None:
    for answers in (True, False):
        one = One(*"bcd")
        one.hear("c", ViewState([claim("b", DEAD)]))
        assert one.core.status("b") is ALIVE and one.reports == []
        one.to(one.now)
        ((target, probe),) = one.take(Probe)
        assert target == "b" and probe.gossip[0] == claim("b", DEAD), "it should refute that"
        if answers:
            one.ack("b", probe)
        one.to(one.now + PACE.heartbeat_s + 0.01)
        assert one.core.status("b") is (ALIVE if answers else DEAD)
    one = One(*"bcd")
    one.hear("c", ViewState([claim("b", DEAD, 1), claim("d", LEFT)]))
    assert one.core.status("b") is DEAD, "of that incarnation this node knew nothing"
    assert one.core.status("d") is LEFT, "that it said itself"


def test_a_death_by_gossip_counts_at_once() -> None:
    one = One(*"bcd")
    one.hear("c", Gossip([claim("b", DEAD)]))
    assert one.reports == [Report("b", DEAD, ALIVE)]


def test_news_that_nobody_can_be_told_waits_for_a_link() -> None:
    one = One("b", "c", pace=Pace(sync_interval_s=1e9), linked=False)
    one.to(0.0)
    due = []
    while one.now < 5.0:
        one.to(one.core.due)
        due.append(one.now)
    assert len(due) < 60, "it wakes for its heartbeats and their rounds, not for news every 0.1 s"
    assert one.core.queued == 3
    one.keep(one.core.link_up("b", 1, one.now))
    one.to(one.now)
    assert [to for to, _ in one.take(Gossip)] == ["b"]


# --- self-doubt


def test_a_node_that_nobody_answers_slows_down() -> None:
    one = One("b", "c", pace=Pace(gossip_nodes=0, awareness_max=8))
    one.to(60.0)
    assert one.core.awareness.score > 3
    began, probes = one.now, one.core.probes
    one.to(began + 20)
    assert one.core.probes - probes < 20


def test_stalled_time_does_not_count() -> None:
    one = One(*"bcd")
    target, probe = one.next_probe(answer=False)
    one.hear("c", Gossip([claim("d", SUSPECT, by="c")]))
    one.core.stalled(100.0)
    one.now += 100.0
    one.to(one.now)
    assert one.core.status("d") is SUSPECT and one.core.failed_probes == 0
    assert one.core.awareness.score == 1
    one.ack(target, probe)
    one.hear("c", Gossip([claim("d", ALIVE, 1)]))
    one.to(one.now + 0.1)
    assert all(report.status is not DEAD for report in one.reports)


# --- leaving, other members


def test_who_leaves_says_so_and_accuses_nobody_any_more() -> None:
    one = One(*"bcde")
    one.keep(one.core.leave(one.now))
    told = one.take(Gossip)
    assert sorted(to for to, _ in told) == list("bcde")
    assert all(message.claims == [claim("a", LEFT)] for _, message in told)
    one.to(one.now + 100)
    assert one.take(Probe) == [] and one.reports == []
    for told in (claim("a", LEFT), claim("a", SUSPECT, 3), claim("a", DEAD, 3)):
        one.hear("b", Probe(3, 1, 0, [told]))
        assert [ack.incarnation for _, ack in one.take(ProbeAck)] == [0], "it does not refute that it goes"


def test_a_member_that_left_is_not_suspected_and_a_restart_brings_it_back() -> None:
    one = One(*"bcde")
    one.hear("b", Gossip([claim("b", LEFT)]))
    assert one.reports == [Report("b", LEFT, ALIVE)]
    for _ in range(100):
        one.to(one.now + 0.5)
        for target, probe in one.take(Probe):
            assert target != "b" or probe.gossip[0].status is LEFT
            if target != "b":
                one.ack(target, probe)
    assert one.reports == [Report("b", LEFT, ALIVE)]
    one.hear("b", Probe(1, 2, 0))
    assert one.reports[-1] == Report("b", ALIVE, LEFT)


def test_other_members_keep_what_is_known_and_a_replaced_disk_is_a_stranger() -> None:
    one = One(*"bcde")
    one.hear("b", Gossip([claim("c", DEAD, 3), claim("d", SUSPECT, 2, by="b"), claim("e", DEAD, 3)]))
    fresh = Roster([(n, f"disk of {n}") for n in "abc"] + [("e", "another disk"), ("f", "disk of f")])
    one.reports.clear()
    one.keep(one.core.set_members(fresh, one.now))
    assert [one.core.status(name) for name in "bcef"] == [ALIVE, DEAD, ALIVE, ALIVE]
    assert sum(one.core.view.counts.values()) == 5
    one.hear("b", Gossip([claim("e", DEAD, 99, boot=50)]))
    assert one.core.status("e") is ALIVE, "that was said of the old disk"
    one.hear("d", Probe(1, 1, 0))
    assert one.take(ProbeAck) == [], "who is no member any more is not heard"
    probed = {one.next_probe()[0] for _ in range(12)}
    assert probed >= {"b", "e", "f"} and "d" not in probed
    one.to(one.now + 100)
    assert all(report.node != "d" for report in one.reports)


def test_a_node_that_is_no_member_judges_nobody() -> None:
    one = One(*"bcd")
    one.keep(one.core.set_members(roster(*"bcd"), one.now))
    one.to(one.now + 50)
    assert one.take(Probe) == [] and one.reports == []
    one.keep(one.core.set_members(roster(*"abcd"), one.now))
    one.next_probe()


def test_what_strangers_say_and_what_is_said_of_strangers_is_ignored() -> None:
    one = One("b")
    one.hear("z", Probe(1, 1, 0, [claim("b", DEAD)]))
    one.hear("b", Gossip([claim("z", DEAD), claim("b", SUSPECT, by="z")]))
    assert one.sent == [] and one.core.status("b") is SUSPECT


# --- whole states


def test_equal_views_cost_a_hash_and_others_are_exchanged() -> None:
    one, other = One(*"bcd"), One(*"bcd")
    one.hear("b", ViewDigest(other.core.view.digest))
    assert one.sent == []
    other.hear("c", Gossip([claim("c", SUSPECT, 3, by="d")]))
    one.hear("b", ViewDigest(other.core.view.digest), via="the link")
    (sent,) = one.sent
    assert isinstance(sent.message, ViewState) and sent.message.answer and sent.via == "the link"
    assert {c.node for c in sent.message.claims} == set("abcd")


def test_a_large_state_comes_in_parts_and_is_asked_for_once() -> None:
    names = [f"m{i:04}" for i in range(3 * STATE_CLAIMS_MAX)]
    one = One(*names)
    one.hear(names[0], ViewDigest(0))
    states = [message for _, message in one.take(ViewState)]
    assert len(states) == 4 and all(len(state.claims) <= STATE_CLAIMS_MAX for state in states)
    assert [state.answer for state in states] == [False, False, False, True]


def test_a_view_is_a_maximum_whose_hash_does_not_depend_on_the_way_there() -> None:
    told = [
        claim("b", status, incarnation, boot) for boot in (1, 2) for incarnation in (0, 1) for status in MemberStatus
    ]
    digests = set()
    for seed in range(20):
        view = View(roster("a", "b", "c"))
        for each in random.Random(seed).sample(told, len(told)):
            if newer(each, view.get("b")):
                view.put(each)
        assert view.get("b") == told[-1]
        digests.add(view.digest)
        assert view.counts == {ALIVE: 2, SUSPECT: 0, DEAD: 0, LEFT: 1}
    assert len(digests) == 1 and digests != {View(roster("a", "b", "c")).digest}


# --- a state machine


class Contradictions(RuleBasedStateMachine):
    """Three nodes and a network that delays, doubles, reorders and loses; what no order of events may bring about."""

    NAMES: Sequence[str] = ("a", "b", "c")

    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed: int) -> None:
        self.now = 0.0
        self.roster = roster(*self.NAMES)
        self.pace = Pace(sync_interval_s=2.0, recovery_s=1.0, suspicion_max_mult=2)
        self.seed = seed
        self.boots = dict.fromkeys(self.NAMES, 0)
        self.cores: dict[str, Membership] = {}
        self.wire: list[tuple[str, str, Message]] = []
        self.seen: dict[tuple[str, str], tuple[int, int, int]] = {}
        self.highest: dict[tuple[str, int], int] = {}
        for name in self.NAMES:
            self.start(name)

    def start(self, name: str) -> None:
        self.boots[name] += 1
        rng = random.Random(f"{self.seed}/{name}/{self.boots[name]}")
        self.cores[name] = Membership(name, self.boots[name], self.roster, self.pace, rng, self.now)
        self.seen = {pair: order for pair, order in self.seen.items() if pair[0] != name}

    def perform(self, name: str, effects: list[Effect]) -> None:
        self.highest[name, self.boots[name]] = self.cores[name].incarnation
        for effect in effects:
            if isinstance(effect, Report):
                assert effect.status is not effect.was and effect.node != name
                assert self.cores[name].status(effect.node) is not None
                continue
            claims = getattr(effect.message, "gossip", None) or getattr(effect.message, "claims", [])
            for told in claims:
                if told.boot == self.boots[told.node]:
                    assert told.incarnation <= self.highest.get((told.node, told.boot), 0), "nobody can know that"
            if isinstance(effect.message, Gossip | Probe | ProbeAck | ProbeNack | IndirectProbe):
                assert len(claims) <= CLAIMS_MAX + 2
                assert sum(map(claim_bytes, claims)) <= CLAIMS_BYTES_MAX
            self.wire.append((name, effect.to, effect.message))

    @rule(name=st.sampled_from(NAMES), for_s=st.floats(0.0, 3.0))
    def pass_time(self, name: str, for_s: float) -> None:
        self.now += for_s
        if name in self.cores:
            self.perform(name, self.cores[name].advance(self.now))

    @precondition(lambda self: self.wire)
    @rule(at=st.integers(0, 10**6), keep=st.booleans())
    def deliver(self, at: int, keep: bool) -> None:
        src, dst, message = self.wire[at % len(self.wire)] if keep else self.wire.pop(at % len(self.wire))
        if dst in self.cores:
            self.perform(dst, self.cores[dst].receive(src, message, self.now))

    @precondition(lambda self: self.wire)
    @rule()
    def deliver_all(self) -> None:
        wire, self.wire = self.wire, []
        for src, dst, message in wire:
            if dst in self.cores:
                self.perform(dst, self.cores[dst].receive(src, message, self.now))

    @rule()
    def lose_all(self) -> None:
        self.wire.clear()

    @rule(name=st.sampled_from(NAMES), seconds=st.floats(0, 20))
    def stall(self, name: str, seconds: float) -> None:
        if name in self.cores:
            self.cores[name].stalled(seconds)
            self.now += seconds

    @rule(name=st.sampled_from(NAMES))
    def kill(self, name: str) -> None:
        self.cores.pop(name, None)

    @rule(name=st.sampled_from(NAMES))
    def leave(self, name: str) -> None:
        if name in self.cores:
            self.perform(name, self.cores[name].leave(self.now))
            del self.cores[name]

    @rule(name=st.sampled_from(NAMES))
    def restart(self, name: str) -> None:
        if name not in self.cores:
            self.start(name)

    @rule(name=st.sampled_from(NAMES), other=st.sampled_from(NAMES), up=st.booleans())
    def link(self, name: str, other: str, up: bool) -> None:
        if name in self.cores and name != other:
            core = self.cores[name]
            self.perform(
                name,
                core.link_up(other, self.boots[other], self.now) if up else core.link_down(other, self.now),
            )

    @invariant()
    def claims_only_grow(self) -> None:
        for name, core in getattr(self, "cores", {}).items():
            for other in self.NAMES:
                held = core.view.get(other)
                order = (held.boot, held.incarnation, int(held.status))
                assert self.seen.get((name, other), (0, 0, 0)) <= order
                self.seen[name, other] = order
            assert core.status(name) is ALIVE, "a node that runs holds itself to be alive"

    @invariant()
    def books_agree(self) -> None:
        for name, core in getattr(self, "cores", {}).items():
            held = [core.view.get(other) for other in self.NAMES]
            counts = {status: sum(c.status is status for c in held) for status in MemberStatus}
            assert counts == core.view.counts
            fresh = View(self.roster)
            for each in held:
                fresh.put(each)
            assert fresh.digest == core.view.digest
            assert set(core._news.gone) == {c.node for c in held if c.status in (DEAD, LEFT)}
            assert set(core._news._suspicions) == {c.node for c in held if c.status is SUSPECT and c.node != name}
            assert len(core._rounds) == len(core._probing) <= len(self.NAMES) - 1
            assert core.queued <= len(self.NAMES)
            assert 0 <= core.awareness.score <= self.pace.awareness_max

    def teardown(self) -> None:
        """Whatever has happened: once messages arrive, all who run hold all who run to be alive."""
        if not getattr(self, "cores", None):
            return
        self.wire.clear()
        for name, core in self.cores.items():
            for other in self.NAMES:
                if other != name:
                    live = other in self.cores
                    self.perform(
                        name,
                        core.link_up(other, self.boots[other], self.now) if live else core.link_down(other, self.now),
                    )
        for _ in range(600):
            self.now += 0.1
            for name, core in self.cores.items():
                self.perform(name, core.advance(self.now))
            wire, self.wire = self.wire, []
            for src, dst, message in wire:
                if dst in self.cores:
                    self.perform(dst, self.cores[dst].receive(src, message, self.now))
            self.claims_only_grow()
        for _name, core in self.cores.items():
            for other in self.NAMES:
                assert (core.status(other) is ALIVE) == (other in self.cores)
        assert len({core.view.digest for core in self.cores.values()}) <= 1


Contradictions.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestContradictions: Any = Contradictions.TestCase
