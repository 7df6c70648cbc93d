"""Watches from outside what replicas tell of votes on keys under consensus (PROTOCOLS D1, R1 to R3).

Who says on the wire that it has promised a round durably holds that promise, or an accepted record, or another promise,
of no lesser ballot; who says that it has accepted a record holds that one or a later one. A vote that was seen to be
durable once may go: a node gives up what it holds of arcs that are not its own any more. And what is to be accepted in
a round is asked for under the epoch that the round was promised under (R6).

A reply is matched with its request by both ends and the id, which a coordinator that was started anew uses again. So
it is found only if it is wrong as an answer to each request that it may belong to.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeAlias

from agi.core.dht.protocol.consensus import BALLOT_BYTES, is_register, round_of
from agi.core.dht.protocol.messages import RegisterAccept, RegisterAccepted, RegisterPrepare, RegisterPromises
from agi.core.dht.testing.disk import SimDisk

_Asked: TypeAlias = defaultdict[tuple[str, str, int], list[tuple[Sequence[bytes], Sequence[bytes]]]]
"""(coordinator, replica, id) -> (keys, ballots) of the requests that had it."""


class Votes:
    """
    Args:
        disks: by the name of their node, as they are now.
        find: told the check and what violates it.

    Attributes:
        coordinator: who asked for acceptances last; empty before the first time.
        checked: replies that were looked at.
    """

    def __init__(self, disks: Mapping[str, SimDisk], find: Callable[[str, str], None]) -> None:
        self.coordinator = ""
        self.checked = 0
        self._disks = disks
        self._find = find
        self._prepares: _Asked = defaultdict(list)
        self._accepts: _Asked = defaultdict(list)
        self._epochs: dict[tuple[bytes, bytes], int] = {}
        self._promised: dict[tuple[SimDisk, bytes], bytes] = {}
        self._accepted: dict[tuple[SimDisk, bytes], bytes] = {}

    def prepare(self, src: str, dst: str, request: RegisterPrepare) -> None:
        self._prepares[src, dst, request.id].append((request.keys, request.ballots))
        for key, ballot in zip(request.keys, request.ballots, strict=True):
            self._epochs.setdefault((key, ballot), request.epoch)

    def accept(self, src: str, dst: str, request: RegisterAccept) -> None:
        self.coordinator = src
        ballots = [record[:BALLOT_BYTES] for record in request.records]
        self._accepts[src, dst, request.id].append((request.keys, ballots))
        for key, ballot in zip(request.keys, ballots, strict=True):
            epoch = self._epochs.get((key, round_of(ballot)), request.epoch)
            if epoch != request.epoch:
                text = f"{src} began {ballot.hex()} on {key.decode(errors='replace')} under epoch {epoch}"
                self._find("one round", f"{text} and goes on under {request.epoch}")

    def promises(self, src: str, dst: str, reply: RegisterPromises) -> None:
        if reply.error is None:
            refused = [index for index, _ in reply.refusals or ()]
            self._judge(src, self._prepares.get((dst, src, reply.id), ()), refused, self._holds_promise, "promise")

    def accepted(self, src: str, dst: str, reply: RegisterAccepted) -> None:
        if reply.error is None:
            refused = [index for index, _ in reply.refusals or ()]
            self._judge(src, self._accepts.get((dst, src, reply.id), ()), refused, self._holds_record, "acceptance")

    def _judge(
        self,
        src: str,
        requests: Sequence[tuple[Sequence[bytes], Sequence[bytes]]],
        refused: Collection[int],
        holds: Callable[[SimDisk, bytes, bytes], bool],
        what: str,
    ) -> None:
        self.checked += 1
        disk = self._disks[src]
        lacking = ""
        for keys, ballots in requests:
            for index, (key, ballot) in enumerate(zip(keys, ballots, strict=True)):
                if index not in refused and not holds(disk, key, ballot):
                    lacking = f"{what} of {ballot.hex()} on {key.decode(errors='replace')}"
                    break
            else:
                return
        if lacking:
            self._find("durable", f"{src} told of its {lacking} before it was on its disk")

    def _holds_promise(self, disk: SimDisk, key: bytes, ballot: bytes) -> bool:
        record = disk.durable(key)
        held = max(disk.durable_promise(key), round_of(record) if is_register(record) else b"")
        if held < ballot:
            return self._promised.get((disk, key), b"") >= ballot
        self._promised[disk, key] = held
        return True

    def _holds_record(self, disk: SimDisk, key: bytes, ballot: bytes) -> bool:
        record = disk.durable(key)
        held = record[:BALLOT_BYTES] if is_register(record) else b""
        if held < ballot:
            return self._accepted.get((disk, key), b"") >= ballot
        self._accepted[disk, key] = held
        return True
