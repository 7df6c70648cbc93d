"""Questions to single nodes: these answer before their cluster has formed, and while others are down."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from dataclasses import dataclass, field
from typing import Any

import msgspec
import uvloop

from agi.core.dht.errors import DHTError, Unavailable, from_wire
from agi.core.dht.protocol.messages import Hello, Query, QueryReply
from agi.core.dht.transport.base import Link
from agi.core.dht.transport.grpc import GrpcTransport
from agi.core.dht.transport.handshake import greet
from agi.core.dht.types import PROTOCOL_VERSION, format_address, parse_address

CLOSE_TIMEOUT_S = 1.0


@dataclass(slots=True)
class Survey:
    """What the nodes of a cluster say of themselves.

    Attributes:
        topology: as one of them knows it (queries.py); None while none is in a cluster.
        states: node id -> its status, or the error that came instead.
        silent: addresses asked that nobody answered at and that are no member's, with the error.
    """

    topology: dict[str, Any] | None = None
    states: dict[str, dict[str, Any] | DHTError] = field(default_factory=dict)
    silent: dict[str, DHTError] = field(default_factory=dict)


def survey(addresses: list[str], timeout_s: float) -> Survey:
    """Asks these nodes, and then the other members that they name, each within the time. Raises InvalidAddress, or the
    first error where nobody answers."""
    return uvloop.run(_survey([format_address(*parse_address(address)) for address in addresses], timeout_s))


def histories(addresses: list[str], timeout_s: float) -> list[dict[str, Any]]:
    """The epochs that any of these nodes remembers, oldest first (queries.py); who does not answer adds nothing."""
    answers = uvloop.run(_ask_histories(addresses, timeout_s))
    known = {(past["generation"], past["epoch"], past["digest"]): past for each in answers for past in each}
    return [known[order] for order in sorted(known)]


async def _ask_histories(addresses: list[str], timeout_s: float) -> list[list[dict[str, Any]]]:
    answers = await asyncio.gather(*(_ask(address, "history", timeout_s) for address in addresses))
    return [answer for answer in answers if not isinstance(answer, DHTError)]


async def _survey(addresses: list[str], timeout_s: float) -> Survey:
    found = Survey()
    answers = await _ask_all(addresses, timeout_s)
    if all(isinstance(answer, DHTError) for answer in answers.values()):
        error = next(iter(answers.values()))
        assert isinstance(error, DHTError)
        raise error
    for address, answer in answers.items():
        if isinstance(answer, DHTError):
            found.silent[address] = answer
        else:
            found.states[answer["node_id"]] = answer
            if answer["epoch"] and found.topology is None:
                topology = await _ask(address, "topology", timeout_s)
                found.topology = topology if isinstance(topology, dict) else None
    if found.topology is not None:
        members = {member["node_id"]: member["address"] for member in found.topology["members"]}
        others = {name: address for name, address in members.items() if name not in found.states}
        known = {address: answer for address, answer in found.silent.items() if address in others.values()}
        later = await _ask_all([address for address in others.values() if address not in known], timeout_s)
        for name, address in others.items():
            found.silent.pop(address, None)
            answer = known.get(address) or later[address]
            if isinstance(answer, dict) and answer["node_id"] != name:
                answer = Unavailable(f"{address} answers as {answer['node_id']}")
            found.states[name] = answer
    return found


async def _ask_all(addresses: list[str], timeout_s: float) -> dict[str, dict[str, Any] | DHTError]:
    answers = await asyncio.gather(*(_ask(address, "status", timeout_s) for address in addresses))
    return dict(zip(addresses, answers, strict=True))


async def _ask(address: str, what: str, timeout_s: float) -> Any | DHTError:
    asking = _Asking()
    try:
        async with asyncio.timeout(timeout_s):
            hello = Hello(PROTOCOL_VERSION, "client", f"c{secrets.token_hex(6)}")
            link, _ = await greet(GrpcTransport(), address, hello, asking, timeout_s)
            try:
                link.send(Query(1, what, max(1, int(timeout_s * 1000))))
                reply = await asking.reply
            finally:
                link.close()
    except TimeoutError:
        return Unavailable(f"{address} did not answer within {timeout_s:g} s")
    except DHTError as error:
        return error
    with contextlib.suppress(TimeoutError):  # it has answered; the loop's end takes the rest
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await asking.ended.wait()
    if reply.error is not None:
        return from_wire(*reply.error)
    return msgspec.msgpack.decode(reply.body)


class _Asking:
    """A LinkHandler that waits for one reply."""

    def __init__(self) -> None:
        self.reply: asyncio.Future[QueryReply] = asyncio.get_running_loop().create_future()
        self.ended = asyncio.Event()

    def message(self, link: Link, message: msgspec.Struct) -> None:
        if isinstance(message, QueryReply) and not self.reply.done():
            self.reply.set_result(message)

    def link_closed(self, link: Link, error: DHTError | None) -> None:
        self.ended.set()
        if not self.reply.done():
            self.reply.set_exception(error or Unavailable(f"{link.peer} closed the link"))
            self.reply.exception()  # whoever waited may have given up
