"""For how long a node has known the version of a lock's record: what it may say, and what it may not."""

from __future__ import annotations

import pytest

from agi.core.dht import watches
from agi.core.dht.clock import SystemClock
from agi.core.dht.protocol.consensus import State, ballot, register_of
from agi.core.dht.protocol.locks import LockRecord, pack_lock
from agi.core.dht.protocol.messages import Watch, WatchReply
from agi.core.dht.watches import Watches

KEY = b"lock:l"


class Clock(SystemClock):
    def __init__(self) -> None:
        self.awake_s = 100.0
        self.slept_s = 0.0

    def monotonic(self) -> float:
        return self.awake_s

    def boottime(self) -> float:
        return self.awake_s + self.slept_s


class Node:
    """The watches of a node, and what they answer."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.watches = Watches(self.clock, lambda key: None)
        self.replies: list[WatchReply] = []

    def chose(self, version: int, key: bytes = KEY, holder: str = "h") -> None:
        state = State(version, pack_lock(LockRecord(holder, 1000)))
        self.watches.chose(key, register_of(key, ballot(version, 1), state))

    def known_ms(self, version: int, key: bytes = KEY) -> int:
        self.watches.start(Watch(len(self.replies), 0, key, version, "w"), self.replies.append)
        reply = self.replies[-1]
        assert reply.id == len(self.replies) - 1 and reply.error is None and not reply.free
        assert self.watches.places == 0  # who only asks stands in no line
        return reply.known_ms

    def passes(self, awake_s: float, slept_s: float = 0.0) -> None:
        self.clock.awake_s += awake_s
        self.clock.slept_s += slept_s


def test_a_version_is_known_since_it_was_chosen_also_while_the_machine_sleeps() -> None:
    node = Node()
    node.chose(7)
    node.passes(2.0, slept_s=3.0)
    assert node.known_ms(7) == 5000
    node.chose(7)  # a look that had to decide proposes it again
    assert node.known_ms(7) == 5000
    node.chose(8)  # a renewal
    assert node.known_ms(8) == 0 == node.known_ms(7)
    node.passes(1.5)
    assert node.known_ms(8) == 1500 and node.known_ms(7) == 0


def test_a_version_that_is_told_is_known_from_then_on() -> None:
    node = Node()
    assert node.known_ms(7) == 0
    node.passes(4.0)
    assert node.known_ms(7) == 4000
    assert node.known_ms(6) == 0 and node.known_ms(7) == 4000  # who is late changes nothing
    assert node.known_ms(9) == 0  # it was renewed through another node
    node.passes(1.0)
    assert node.known_ms(9) == 1000 and node.known_ms(7) == 0


def test_a_version_that_was_made_up_makes_none_older_that_is_chosen_here() -> None:
    node = Node()
    node.chose(5)
    assert node.known_ms(7) == 0
    node.passes(60.0)
    node.chose(7)
    assert node.known_ms(7) == 0
    node.passes(1.0)
    assert node.known_ms(7) == 1000
    assert node.known_ms(1 << 62) == 0
    node.chose(8)
    node.passes(1.0)
    assert node.known_ms(8) == 1000


def test_who_waits_tells_his_version_too() -> None:
    node = Node()
    node.watches.start(Watch(0, 5000, KEY, 7, "first"), node.replies.append)
    node.passes(2.0)
    assert not node.replies and node.watches.places == 1
    node.watches.start(Watch(0, 0, KEY, 7, "first"), node.replies.append)
    assert node.replies[-1].known_ms == 2000 and node.watches.places == 1


def test_an_epoch_and_what_came_later_make_it_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watches, "KNOWN_MAX", 3)
    node = Node()
    node.chose(7)
    node.passes(1.0)
    node.watches.end()
    assert node.known_ms(7) == 0
    for number in range(4):
        node.chose(7, b"lock:%d" % number)
        node.passes(1.0)
        assert node.known_ms(7, b"lock:0") in (0, 1000 * (number + 1))  # who is asked for stays
    assert node.known_ms(7, b"lock:0") == 4000 and node.known_ms(7, b"lock:3") == 1000
    assert node.known_ms(7, b"lock:1") == 0
    assert len(node.watches._since) == 3


def test_of_keys_that_are_no_locks_nothing_is_remembered() -> None:
    node = Node()
    node.chose(7, b"k")
    node.watches.start(Watch(0, 5000, b"k", 7, "w"), node.replies.append)
    node.chose(8, b"k")
    assert not node.watches._since
