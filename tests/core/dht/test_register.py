"""One register: exact steps, and every interleaving that Hypothesis finds of proposers, losses and crashes."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agi.core.dht.protocol.register import ZERO, Accept, Acceptor, Ballot, Chosen, Preempted, Proposer, Reply, State

ABC = frozenset("abc")


def test_a_promise_is_stored_with_its_answer_and_refuses_what_is_below() -> None:
    acceptor = Acceptor()
    step = acceptor.prepare(Ballot(2, 1))
    assert step.state == State(Ballot(2, 1)) and step.reply.granted
    lower = acceptor.prepare(Ballot(1, 9))
    assert lower.state is None and not lower.reply.granted and lower.reply.state.promised == Ballot(2, 1)
    assert not acceptor.accept(Ballot(1, 9), b"x").reply.granted
    assert acceptor.state == State(Ballot(2, 1))
    again = acceptor.prepare(Ballot(2, 1))
    assert again.state is None and again.reply.granted  # a doubled message


def test_an_accepted_value_is_told_to_whoever_prepares_next() -> None:
    acceptor = Acceptor()
    acceptor.prepare(Ballot(1, 1))
    assert acceptor.accept(Ballot(1, 1), b"v").state == State(Ballot(1, 1), Ballot(1, 1), b"v")
    assert acceptor.accept(Ballot(1, 1), b"v").state is None  # doubled
    reply = acceptor.prepare(Ballot(2, 2)).reply
    assert reply.granted and (reply.state.accepted, reply.state.value) == (Ballot(1, 1), b"v")


def test_a_proposer_takes_the_newest_value_that_it_finds() -> None:
    proposer = Proposer([frozenset("abcde")], Ballot(9, 1), b"mine")
    assert proposer.promised("a", Reply(True, State(Ballot(9, 1), Ballot(3, 2), b"old"))) is None
    assert proposer.promised("b", Reply(True, State(Ballot(9, 1), Ballot(4, 2), b"newer"))) is None
    assert proposer.promised("c", Reply(True, State(Ballot(9, 1)))) == Accept(Ballot(9, 1), b"newer")


def test_doubled_answers_count_once_and_late_ones_nothing() -> None:
    proposer = Proposer([ABC], Ballot(1, 1), b"v")
    granted = Reply(True, State(Ballot(1, 1)))
    assert proposer.promised("a", granted) is None
    assert proposer.promised("a", granted) is None and proposer.answered == 1 and not proposer.asked
    assert proposer.promised("b", granted) == Accept(Ballot(1, 1), b"v") and proposer.asked
    assert proposer.promised("c", granted) is None
    assert proposer.accepted("a", granted) is None and proposer.accepted("a", granted) is None
    assert proposer.accepted("b", granted) == Chosen(b"v")
    assert proposer.accepted("c", granted) is None


def test_a_refusal_ends_the_attempt_with_the_ballot_to_beat() -> None:
    proposer = Proposer([ABC], Ballot(1, 1), b"v")
    assert proposer.promised("a", Reply(False, State(Ballot(5, 2)))) == Preempted(Ballot(5, 2))
    assert proposer.promised("b", Reply(True, State(Ballot(1, 1)))) is None and proposer.over


def test_two_quorums_are_both_needed_and_who_is_in_both_counts_twice() -> None:
    proposer = Proposer([frozenset("abc"), frozenset("bcd")], Ballot(1, 1), b"v")
    granted = Reply(True, State(Ballot(1, 1)))
    assert proposer.promised("a", granted) is None
    assert proposer.promised("b", granted) is None  # a majority of the first alone
    assert isinstance(proposer.promised("c", granted), Accept)
    assert proposer.accepted("c", granted) is None
    assert proposer.accepted("d", granted) is None  # a majority of the second alone
    assert proposer.accepted("a", granted) == Chosen(b"v")


def test_a_ballot_of_another_process_is_another_ballot() -> None:
    assert ZERO < Ballot(1, 0) < Ballot(1, 1) < Ballot(2, 0)


# --- every interleaving: messages may be lost, late and doubled; acceptors crash and come back with what they stored


@dataclass
class World:
    """Acceptors with their disks, proposers under way, and messages in the air."""

    acceptors: dict[str, Acceptor] = field(default_factory=lambda: {name: Acceptor() for name in "abc"})
    disks: dict[str, State] = field(default_factory=lambda: {name: State() for name in "abc"})
    proposers: list[Proposer] = field(default_factory=list)
    air: list[tuple[str, int, str, object]] = field(default_factory=list)
    chosen: list[bytes] = field(default_factory=list)
    accepted_by: dict[tuple[Ballot, bytes], set[str]] = field(default_factory=dict)

    def propose(self, counter: int) -> None:
        number = len(self.proposers)
        self.proposers.append(Proposer([ABC], Ballot(counter, number + 1), b"v%d" % number))
        self.air += [("prepare", number, name, None) for name in "abc"]

    def deliver(self, index: int, keep: bool) -> None:
        kind, number, name, what = self.air[index % len(self.air)]
        if not keep:
            self.air.pop(index % len(self.air))
        proposer, acceptor = self.proposers[number], self.acceptors[name]
        if kind in ("prepare", "accept"):
            step = acceptor.prepare(proposer.ballot) if kind == "prepare" else acceptor.accept(proposer.ballot, what)  # type: ignore[arg-type]
            if step.state is not None:
                self.disks[name] = step.state  # before the reply leaves
            if kind == "accept" and step.reply.granted:
                holders = self.accepted_by.setdefault((proposer.ballot, what), set())  # type: ignore[arg-type]
                holders.add(name)
            self.air.append((f"{kind}ed", number, name, step.reply))
            return
        take = proposer.promised if kind == "prepareed" else proposer.accepted
        outcome = take(name, what)  # type: ignore[arg-type]
        if isinstance(outcome, Accept):
            self.air += [("accept", number, other, outcome.value) for other in "abc"]
        elif isinstance(outcome, Chosen):
            self.chosen.append(outcome.value)

    def crash(self, name: str) -> None:
        self.acceptors[name] = Acceptor(self.disks[name])


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("propose"), st.integers(1, 4)),
        st.tuples(st.just("deliver"), st.integers(0, 1000)),
        st.tuples(st.just("double"), st.integers(0, 1000)),
        st.tuples(st.just("crash"), st.integers(0, 2)),
        st.tuples(st.just("lose"), st.integers(0, 1000)),
    ),
    max_size=80,
)


def run(actions: list[tuple[str, int]], world: World) -> None:
    for action, number in actions:
        if action == "propose" and len(world.proposers) < 4:
            world.propose(number)
        elif action in ("deliver", "double") and world.air:
            world.deliver(number, keep=action == "double")
        elif action == "crash":
            world.crash("abc"[number])
        elif action == "lose" and world.air:
            world.air.pop(number % len(world.air))


@settings(max_examples=400, deadline=None)
@given(ACTIONS)
def test_at_most_one_value_is_ever_chosen(actions: list[tuple[str, int]]) -> None:
    world = World()
    run(actions, world)
    values = {value for (_, value), holders in world.accepted_by.items() if len(holders) >= 2} | set(world.chosen)
    assert len(values) <= 1, values


def test_the_model_finds_an_acceptor_that_forgets() -> None:
    """The check has teeth: without the disk two values are chosen."""

    class Forgetful(World):
        def crash(self, name: str) -> None:
            self.acceptors[name] = Acceptor()

    world = Forgetful()
    world.propose(1)
    for _ in range(200):
        if world.chosen:
            break
        world.deliver(0, keep=False)
    for name in "abc":
        world.crash(name)
    world.air.clear()
    world.propose(2)
    for _ in range(200):
        if len(world.chosen) > 1:
            break
        world.deliver(0, keep=False)
    with pytest.raises(AssertionError):
        assert len(set(world.chosen)) <= 1
