"""Failure detection at sizes that no test machine runs: deaths, news, traffic and stalls in virtual time.

The state machines are the shipped ones (protocol/membership.py), without links: a broken link, which real nodes notice,
makes detection faster. No message is lost; each takes 0.2 to 2 ms.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from itertools import chain

from agi.core.dht.protocol.membership import Pace, Report
from agi.core.dht.protocol.suspicion import bounds
from agi.core.dht.testing.membership import MemberNet
from agi.core.dht.types import MemberStatus

WARM_S, PEACE_S, DETECT_S_MAX, NEWS_S_MAX = 5.0, 30.0, 120.0, 60.0
"""Virtual seconds: before anything is measured, of peace, at most for a death and for news."""
DEATHS_MIN, DEATHS_MAX, DEATHS_MEMBERS = 5, 20, 10_000
"""Members killed, one after the other: so many that deaths x members is about the last, within the first two."""
LEAVES = 3
CURVE = 40
"""Steps of the curve that tells how the knowledge of a death spreads."""
STALLED_SHARE = 0.05
STALLS_S = ((0.5, 1.0), (0.5, 2.0), (0.5, 4.0), (0.5, 8.0))
"""How long a stalled member stands still each time, least and most."""
STALLS_MEMBERS_MAX = 100
"""Up to this size each of them is tried; above only the last one, as each takes minutes."""
RUN_S = (0.1, 1.0)
"""How long it runs in between."""
STALLED_S_MIN, STALLED_S_MAX, STALLED_MEMBER_S = 15.0, 300.0, 30_000
"""How long that goes on: so many virtual seconds over all members, but the first two for each at least and at most."""


@dataclass(slots=True)
class Detection:
    """Deaths, news and traffic. Times in virtual seconds; p50 and p99 are over all pairs of a death and a member.

    Attributes:
        deaths: members that were killed and came back, one after the other.
        expected_s: what the documentation of the settings promises for a death (config/schema.py, HealthConfig).
        first_s: from a death until the first other member holds it; the median.
        p50_s, p99_s, all_s: until a member holds it; the last of all members in the worst death.
        known_s: [CURVE + 1] times by which 0, 1 / CURVE, ... 1 of the members hold it.
        news_p50_s, news_p99_s, news_all_s: from a restart, of which only the restarted member tells, until a member has
            heard of it; the last of all members in the worst case.
        leave_all_s: until all have heard of a member that leaves and tells some of them itself; the median.
        messages, bytes: per member and second at peace.
        death_messages, death_bytes: what one death costs a member beyond that, until all hold it.
        largest_bytes: the largest message.
    """

    deaths: int
    expected_s: float
    first_s: float
    p50_s: float
    p99_s: float
    all_s: float
    known_s: list[float]
    news_p50_s: float
    news_p99_s: float
    news_all_s: float
    leave_all_s: float
    messages: float
    bytes: float
    death_messages: float
    death_bytes: float
    largest_bytes: int


@dataclass(slots=True)
class Stalls:
    """Some members stand still again and again: who is declared dead though it runs?

    Attributes:
        still_s: how long each time, least and most.
        lifeguard: whether with self-doubt, long suspicions and a sense of one's own stalls, or SWIM alone.
        stalled: members that do so.
        seconds: virtual, how long that went on.
        false_sound, false_stalled: deaths of members that never stood still, and of the others; once for each
            incarnation, however many members held it.
        messages, bytes: per member and second meanwhile.
    """

    still_s: tuple[float, float]
    lifeguard: bool
    stalled: int
    seconds: float
    false_sound: int
    false_stalled: int
    messages: float
    bytes: float

    def rates(self, members: int) -> tuple[float, float]:
        """(sound, stalled) false deaths per hour and member of that kind."""
        hours = self.seconds / 3600
        return self.false_sound / hours / (members - self.stalled), self.false_stalled / hours / self.stalled


class _Watch:
    """Takes reports; keeping those of thousands of members would take more room than the members."""

    def __init__(self) -> None:
        self.net: MemberNet | None = None
        """Whose false deaths are counted."""
        self.deaths: set[tuple[str, int]] = set()
        self._member, self._status = "", MemberStatus.DEAD
        self._since = 0.0
        self._heard: dict[str, float] = {}

    def expect(self, now: float, member: str, status: MemberStatus) -> None:
        """From now on, times are of that state of that member."""
        self._member, self._status, self._since, self._heard = member, status, now, {}

    @property
    def count(self) -> int:
        return len(self._heard)

    @property
    def times(self) -> list[float]:
        """[members that have heard of it] seconds since `expect`, ascending."""
        return list(self._heard.values())

    def __call__(self, now: float, where: str, what: Report) -> None:
        if what.node == self._member and what.status is self._status:
            self._heard.setdefault(where, now - self._since)
        if what.status is MemberStatus.DEAD and self.net is not None:
            self.deaths.add((what.node, self.net.members[where].view.get(what.node).incarnation))


def expected_s(members: int, pace: Pace) -> float:
    """By when a death should be known: failed rounds, then the shortest suspicion."""
    least_s, _ = bounds(members, pace.heartbeat_s, pace.suspicion_mult, pace.suspicion_max_mult)
    return pace.failure_threshold * pace.heartbeat_s + least_s


def quantile(ordered: list[float], share: float) -> float:
    """The least of the ascending values that at least that share of them do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def measure_detection(members: int, pace: Pace, seed: int) -> Detection:
    """Kills members one after the other and has them back."""
    watch = _Watch()
    net = MemberNet(members, seed=seed, pace=pace, watch=watch)
    net.run(WARM_S)
    messages, size = net.messages, net.bytes
    net.run(PEACE_S)
    messages_s, bytes_s = (net.messages - messages) / PEACE_S, (net.bytes - size) / PEACE_S
    others = members - 1

    def all_heard(member: str, status: MemberStatus, within_s: float) -> list[float]:
        watch.expect(net.now, member, status)
        {MemberStatus.DEAD: net.kill, MemberStatus.LEFT: net.leave, MemberStatus.ALIVE: net.restart}[status](member)
        net.run_until(lambda: watch.count == others, within_s=within_s)
        return watch.times

    deaths: list[list[float]] = []
    news: list[list[float]] = []
    death_messages = death_bytes = 0.0
    for number in range(min(DEATHS_MAX, max(DEATHS_MIN, DEATHS_MEMBERS // members))):
        victim = net.names[(1 + number) % members]
        messages, size, began = net.messages, net.bytes, net.now
        deaths.append(all_heard(victim, MemberStatus.DEAD, DETECT_S_MAX))
        took_s = net.now - began
        death_messages += net.messages - messages - messages_s * took_s
        death_bytes += net.bytes - size - bytes_s * took_s
        news.append(all_heard(victim, MemberStatus.ALIVE, NEWS_S_MAX))
    leaves = []
    for number in range(LEAVES):
        leaver = net.names[number % members]
        leaves.append(all_heard(leaver, MemberStatus.LEFT, NEWS_S_MAX)[-1])
        all_heard(leaver, MemberStatus.ALIVE, NEWS_S_MAX)
    known, heard = sorted(chain.from_iterable(deaths)), sorted(chain.from_iterable(news))
    return Detection(
        deaths=len(deaths),
        expected_s=expected_s(members, pace),
        first_s=quantile(sorted(times[0] for times in deaths), 0.5),
        p50_s=quantile(known, 0.5),
        p99_s=quantile(known, 0.99),
        all_s=known[-1],
        known_s=[quantile(known, step / CURVE) for step in range(CURVE + 1)],
        news_p50_s=quantile(heard, 0.5),
        news_p99_s=quantile(heard, 0.99),
        news_all_s=heard[-1],
        leave_all_s=quantile(sorted(leaves), 0.5),
        messages=messages_s / members,
        bytes=bytes_s / members,
        death_messages=death_messages / len(deaths) / members,
        death_bytes=death_bytes / len(deaths) / members,
        largest_bytes=net.largest,
    )


def stalls_of(members: int) -> tuple[tuple[float, float], ...]:
    """The kinds of stalls that are tried in a cluster of that size."""
    return STALLS_S if members <= STALLS_MEMBERS_MAX else STALLS_S[-1:]


def measure_stalls(members: int, pace: Pace, seed: int, still_s: tuple[float, float], *, lifeguard: bool) -> Stalls:
    """Has 5 % of the members, at least one, stand still again and again, at the same times whatever the detector."""
    watch = _Watch()
    net = MemberNet(
        members,
        seed=seed,
        pace=pace if lifeguard else without_lifeguard(pace),
        watch=watch,
        notice_stalls=lifeguard,
    )
    net.run(WARM_S)
    rng = random.Random(f"stalls/{seed}")
    stalled = rng.sample(net.names, max(1, round(STALLED_SHARE * members)))
    draws = {name: random.Random(f"stalls/{seed}/{name}") for name in stalled}

    def pause(name: str) -> None:
        net.pause(name)
        net.at(draws[name].uniform(*still_s), resume, name)

    def resume(name: str) -> None:
        net.resume(name)
        net.at(draws[name].uniform(*RUN_S), pause, name)

    for name in stalled:
        net.at(draws[name].uniform(0, still_s[1]), pause, name)
    seconds = min(STALLED_S_MAX, max(STALLED_S_MIN, STALLED_MEMBER_S / members))
    watch.net, messages, size = net, net.messages, net.bytes
    net.run(seconds)
    own = set(stalled)
    return Stalls(
        still_s=still_s,
        lifeguard=lifeguard,
        stalled=len(stalled),
        seconds=seconds,
        false_sound=sum(name not in own for name, _ in watch.deaths),
        false_stalled=sum(name in own for name, _ in watch.deaths),
        messages=(net.messages - messages) / seconds / members,
        bytes=(net.bytes - size) / seconds / members,
    )


def without_lifeguard(pace: Pace) -> Pace:
    """What SWIM alone has: no doubt in oneself, suspicions of one length, and one failed round is enough for one."""
    return replace(pace, awareness_max=0, suspicion_max_mult=1, failure_threshold=1)
