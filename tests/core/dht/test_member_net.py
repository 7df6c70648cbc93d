"""Many failure detectors together, in virtual time: what has to hold of all of them, and golden traces of a few.

GOLDEN=write pytest tests/core/dht/test_member_net.py -k golden      writes the traces anew: read the difference
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from agi.core.dht.protocol.broadcast import CLAIMS_BYTES_MAX
from agi.core.dht.protocol.membership import Pace, Report
from agi.core.dht.protocol.messages import Claim, Gossip, IndirectProbe, Message, Probe, ProbeAck, ProbeNack, ViewState
from agi.core.dht.protocol.suspicion import bounds
from agi.core.dht.testing.membership import MemberNet
from agi.core.dht.types import MemberStatus

ALIVE, SUSPECT, DEAD, LEFT = MemberStatus
GOLDEN = Path(__file__).parent / "golden"
SEEDS = range(5)
VICTIM = "m0001"


def bound_s(members: int, pace: Pace) -> float:
    """By when a death is known to all, whoever is probed when, if others come to it too."""
    rounds = pace.failure_threshold * (pace.heartbeat_s + pace.probe_timeout_s)
    least_s, _ = bounds(members, pace.heartbeat_s, pace.suspicion_mult, pace.suspicion_max_mult)
    # the first heartbeats that hit it, the rounds, the suspicion, and the news
    return 3 * pace.heartbeat_s + rounds + least_s + 20 * pace.gossip_interval_s


# --- deaths


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("count", [3, 8, 50])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_death_is_known_to_all_within_the_bound(seed: int, count: int, links: bool) -> None:
    net = MemberNet(count, seed=seed, links=links, boot=1)
    net.run(10.0)
    assert net.at_peace and net.reports == []
    net.kill(VICTIM)
    took_s = net.run_until(lambda: net.all_hold(VICTIM, DEAD), within_s=60)
    least_s, _ = bounds(count, net.pace.heartbeat_s, net.pace.suspicion_mult, net.pace.suspicion_max_mult)
    assert least_s < took_s < bound_s(count, net.pace)
    assert {what.node for _, _, what in net.reports} == {VICTIM}


@pytest.mark.parametrize("seed", SEEDS)
def test_the_last_two_of_two_and_a_dead_majority_are_found_too(seed: int) -> None:
    net = MemberNet(2, seed=seed)
    net.kill(VICTIM)
    net.run_until(lambda: net.all_hold(VICTIM, DEAD), within_s=10)
    net = MemberNet(5, seed=seed, links=True)
    dead = net.names[1:4]
    for name in dead:
        net.kill(name)
    _, longest_s = bounds(5, net.pace.heartbeat_s, net.pace.suspicion_mult, net.pace.suspicion_max_mult)
    net.run_until(lambda: all(net.all_hold(name, DEAD) for name in dead), within_s=longest_s + 10)
    assert all(net.members[name].status(other) is ALIVE for name in net.members for other in net.members)


@pytest.mark.parametrize("seed", SEEDS)
def test_nobody_is_declared_dead_under_moderate_loss(seed: int) -> None:
    net = MemberNet(10, seed=seed, loss=0.1, delay_s=(0.001, 0.1))
    net.run(600.0)
    assert net.held_dead() == []


@pytest.mark.parametrize("seed", SEEDS)
def test_a_death_is_found_under_loss_too(seed: int) -> None:
    net = MemberNet(10, seed=seed, loss=0.1)
    net.run(20.0)
    net.kill(VICTIM)
    net.run_until(lambda: net.all_hold(VICTIM, DEAD), within_s=40)


def test_a_pair_that_cannot_hear_each_other_is_kept_alive_by_the_others() -> None:
    net = MemberNet(8, seed=1)
    net.dropped = lambda src, dst, message: {src, dst} == {"m0001", "m0002"}
    net.run(120.0)
    assert net.reports == []
    assert net.members["m0001"].probes > 100 and net.members["m0001"].failed_probes == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_a_deaf_member_kills_nobody_and_a_mute_one_dies(seed: int) -> None:
    net = MemberNet(8, seed=seed)
    net.dropped = lambda src, dst, message: dst == VICTIM
    net.run(60.0)
    deaths = {who for where, who in net.held_dead() if where != VICTIM}
    assert deaths <= {VICTIM}, "it cannot answer either"
    net = MemberNet(8, seed=seed)
    net.dropped = lambda src, dst, message: src == VICTIM
    net.run_until(lambda: net.all_hold(VICTIM, DEAD), within_s=20)
    assert {who for where, who in net.held_dead() if where != VICTIM} == {VICTIM}


# --- pauses


@pytest.mark.parametrize("seed", SEEDS)
def test_a_paused_member_is_declared_dead_and_refutes_when_it_goes_on(seed: int) -> None:
    net = MemberNet(8, seed=seed, links=True, boot=1)
    net.run(5.0)
    net.pause(VICTIM)
    net.run_until(lambda: net.all_hold(VICTIM, DEAD), within_s=30)
    net.run(20.0)
    net.resume(VICTIM)
    net.run_until(lambda: net.at_peace, within_s=2.0)
    net.run(30.0)
    assert net.at_peace
    assert net.members[VICTIM].refutations >= 1
    assert all(what.node == VICTIM for _, _, what in net.reports), "it did not take its own sleep for their death"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_short_pause_is_a_suspicion_at_most(seed: int) -> None:
    net = MemberNet(8, seed=seed, boot=1)
    for _ in range(20):
        net.run(5.0)
        net.pause(VICTIM)
        net.run(2.0)
        net.resume(VICTIM)
    assert net.held_dead() == []


@pytest.mark.parametrize("seed", SEEDS)
def test_a_member_that_stalls_again_and_again_kills_no_healthy_one(seed: int) -> None:
    net = MemberNet(10, seed=seed)
    rng = random.Random(seed)
    for _ in range(40):
        net.pause(VICTIM)
        net.run(rng.uniform(0.1, 4.0))
        net.resume(VICTIM)
        net.run(rng.uniform(0.01, 0.3))
    assert {who for _, who in net.held_dead()} <= {VICTIM}


def test_when_all_stop_at_once_nobody_is_accused_afterwards() -> None:
    net = MemberNet(10, seed=1)
    net.run(5.0)
    for name in net.names:
        net.pause(name)
    net.run(300.0)
    for name in net.names:
        net.resume(name)
    net.run(30.0)
    assert net.held_dead() == []


# --- partitions


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_healed_partition_merges(seed: int, links: bool) -> None:
    net = MemberNet(10, seed=seed, links=links, boot=1)
    net.run(5.0)
    ours, theirs = net.names[:5], net.names[5:]
    net.partition(ours)
    net.run_until(
        lambda: all(
            net.members[a].status(b) is DEAD and net.members[b].status(a) is DEAD for a in ours for b in theirs
        ),
        within_s=60,
    )
    assert all(net.members[a].status(b) is ALIVE for a in ours for b in ours if a != b)
    net.run(60.0)
    net.reports.clear()
    net.heal()
    net.run_until(lambda: net.at_peace, within_s=2.0 if links else net.pace.recovery_s + 2.0)
    net.run(60.0)
    assert net.at_peace
    assert net.held_dead() == [], "neither side buries its own on the other's word"
    assert len({member.view.digest for member in net.members.values()}) == 1


@pytest.mark.parametrize("links", [True, False])
def test_everybody_alone_and_back(links: bool) -> None:
    net = MemberNet(6, seed=3, links=links)
    if links:
        for one in net.names:
            for other in net.names:
                if one != other:
                    net._perform(one, net.members[one].link_down(other, net.now))
    alone = {"all": True}
    net.dropped = lambda src, dst, message: alone["all"]
    net.run_until(lambda: all(net.all_hold(name, DEAD) for name in net.names), within_s=120)
    alone["all"] = False
    if links:
        for one in net.names:
            for other in net.names:
                if one != other:
                    net._perform(one, net.members[one].link_up(other, 0, net.now))
    net.run_until(lambda: net.at_peace, within_s=3.0 if links else net.pace.recovery_s * 2)
    net.run(30.0)
    assert net.at_peace


# --- restarts, leaves


@pytest.mark.parametrize("seed", SEEDS)
def test_a_restart_is_alive_at_once_and_old_claims_do_not_touch_it(seed: int) -> None:
    net = MemberNet(8, seed=seed, links=True, boot=1)
    old: list[tuple[str, str, Message]] = []

    def record(src: str, dst: str, message: Message) -> bool:
        old.append((src, dst, message))
        return False

    net.dropped = record
    net.run(5.0)
    net.kill(VICTIM)
    net.run_until(lambda: net.all_hold(VICTIM, DEAD), within_s=30)
    dead, old = old, []
    net.restart(VICTIM)
    net.run_until(lambda: net.at_peace, within_s=1.0)
    net.run(5.0)
    net.reports.clear()
    for src, dst, message in dead:  # everything that was ever said comes again
        net._arrive(src, dst, message)
        assert net.members[dst].status(VICTIM) is ALIVE or dst == VICTIM
    net.run(30.0)
    assert net.reports == [] and net.at_peace


@pytest.mark.parametrize("seed", SEEDS)
def test_a_leave_is_known_to_all_at_once_and_is_no_death(seed: int) -> None:
    net = MemberNet(8, seed=seed, links=True, boot=1)
    net.run(5.0)
    net.leave(VICTIM)
    net.run_until(lambda: net.all_hold(VICTIM, LEFT), within_s=0.1)
    net.run(60.0)
    assert {what.status for _, _, what in net.reports} == {LEFT}
    net.restart(VICTIM)
    net.run_until(lambda: net.at_peace, within_s=1.0)


def test_messages_are_bounded_whatever_happens() -> None:
    net = MemberNet(100, seed=1, boot=1)
    net.run(10.0)
    for name in net.names[:70]:
        net.kill(name)
    net.run(10.0)
    for name in net.names[:70]:
        net.restart(name)
    net.run(20.0)
    assert net.at_peace
    # a state of 100 members goes in a message of up to 256 claims; all else is a packet
    assert net.largest < 256 * 50
    carried: list[int] = []

    def look(src: str, dst: str, message: Message) -> bool:
        if not isinstance(message, ViewState):
            carried.append(len(getattr(message, "gossip", ()) or getattr(message, "claims", ())))
        return False

    net.dropped = look
    net.bytes = net.largest = 0
    net.kill(VICTIM)
    net.run_until(lambda: net.all_hold(VICTIM, DEAD), within_s=60)
    assert 0 < max(carried) < 34 and net.largest < CLAIMS_BYTES_MAX + 100


def test_traffic_of_a_cluster_at_peace_does_not_grow_with_its_size() -> None:
    rates = []
    for count in (10, 100):
        net = MemberNet(count, seed=1)
        net.run(10.0)
        net.messages = 0
        net.run(60.0)
        rates.append(net.messages / 60 / count)
    assert rates == pytest.approx([4.0, 4.0], abs=0.5)


def test_a_run_is_of_its_seed_alone() -> None:
    def run(seed: int) -> tuple[int, int, list[tuple[float, str, Report]]]:
        net = MemberNet(20, seed=seed, loss=0.05, links=True, boot=1)
        net.run(5.0)
        net.kill(VICTIM)
        net.run(20.0)
        return net.messages, net.bytes, net.reports

    assert run(1) == run(1) != run(2)


# --- golden traces


def _claim(told: Claim) -> str:
    by = f" by {told.by}" if told.by else ""
    return f"{told.node} {told.status.name} {told.boot}.{told.incarnation}{by}"


def _shown(message: Message) -> str:
    claims = ", ".join(map(_claim, getattr(message, "gossip", ()) or getattr(message, "claims", ())))
    told = f" [{claims}]" if claims else ""
    match message:
        case Probe() | ProbeAck():
            return f"{type(message).__name__} {message.seq} I am {message.boot}.{message.incarnation}{told}"
        case IndirectProbe():
            return f"IndirectProbe {message.seq} of {message.target}{told}"
        case ProbeNack():
            return f"ProbeNack {message.seq}{told}"
        case Gossip() | ViewState():
            return f"{type(message).__name__}{told}"
    return type(message).__name__


def _death(net: MemberNet) -> None:
    net.run(1.0)
    net.kill("m0001")
    net.run_until(lambda: net.all_hold("m0001", DEAD), within_s=20)


def _refutation(net: MemberNet) -> None:
    net.run(1.0)
    net.pause("m0001")
    net.run_until(lambda: net.all_hold("m0001", SUSPECT), within_s=20)
    net.resume("m0001")
    net.run_until(lambda: net.at_peace, within_s=20)


def _restart(net: MemberNet) -> None:
    net.run(1.0)
    net.leave("m0001")
    net.run(0.5)
    net.restart("m0001")
    net.run_until(lambda: net.at_peace, within_s=20)
    net.run(0.3)


def _one_way(net: MemberNet) -> None:
    heard = net.dropped
    net.dropped = lambda src, dst, message: (src, dst) == ("m0000", "m0001") or heard(src, dst, message)
    net.run(1.5)


@pytest.mark.parametrize("scenario", [_death, _refutation, _restart, _one_way], ids=lambda each: each.__name__[1:])
def test_golden(scenario: Callable[[MemberNet], None]) -> None:
    """What is lost on the way is not shown; a message to who is down or paused is."""
    lines: list[str] = []

    def report(now: float, where: str, what: Report) -> None:
        lines.append(f"{now:7.3f} {where} holds {what.node} {what.was.name} -> {what.status.name}")

    def look(src: str, dst: str, message: Message) -> bool:
        lines.append(f"{net.now:7.3f} {src} -> {dst} {_shown(message)}")
        return False

    net = MemberNet(3, seed=1, boot=1, links=scenario is not _one_way, watch=report)
    net.dropped = look
    scenario(net)
    path = GOLDEN / f"membership_{scenario.__name__[1:]}.txt"
    trace = "\n".join(lines) + "\n"
    if os.environ.get("GOLDEN") == "write":
        path.write_text(trace)
    assert trace == path.read_text()
