"""The other side of accepted links."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from agi.core.dht.errors import Overloaded, TransportError
from agi.core.dht.protocol.messages import Goodbye, Message
from agi.core.dht.transport.base import Link
from agi.core.dht.transport.codec import encode
from agi.core.dht.types import BATCH_BYTES_MAX, BULK_VALUE_BYTES

REFUSED_MAX = 1024
"""Refused writes of one client that a node remembers."""


class Session:
    """The other side of an accepted link, after its Hello. Links of one peer share it: replies too large for the link
    of the request leave on another."""

    __slots__ = ("kind", "links", "member", "name", "refused", "run_id")

    def __init__(self, kind: str, name: str, run_id: str, member: bool) -> None:
        self.kind = kind
        self.name = name
        self.run_id = run_id
        self.member = member
        self.links: list[Link] = []
        self.refused: dict[int, None] = {}

    def turns_away(self, number: int, ready: bool) -> bool:
        """Whether a write is not taken. One that was refused stays so: its client has gone elsewhere with it, and a
        doubled frame would write it a second time."""
        refused = self.refused
        if ready and number not in refused:
            return False
        refused[number] = None
        if len(refused) > REFUSED_MAX:
            del refused[next(iter(refused))]
        return True

    def send(self, link: Link, message: Message) -> None:
        """Answers on the link of the request, or for large frames on another of the pool. Raises TransportError."""
        frame = encode(message)
        if len(frame) >= BULK_VALUE_BYTES and len(self.links) > 1:
            link = self.links[-1] if link is self.links[0] else link
        link.send_frame(frame)


def say_goodbye(sessions: Iterable[Session]) -> None:
    """Tells clients that this node stops: they close their links when they have their answers."""
    for session in sessions:
        if session.kind == "client":
            for link in session.links.copy():
                with contextlib.suppress(TransportError, Overloaded):  # gone, or so far behind that it will notice
                    link.send(Goodbye())


def cut(records: list[bytes | None], bytes_max: int = BATCH_BYTES_MAX) -> list[bytes | None]:
    """The first records that are together no longer than that, at least one: who asked asks again for the rest."""
    try:
        total = sum(map(len, records))  # type: ignore[arg-type]  # mostly none is absent, and this is the hot path
    except TypeError:
        total = sum(map(len, filter(None, records)))
    if total <= bytes_max:
        return records
    size = 0
    for index, record in enumerate(records):
        size += len(record) if record is not None else 0
        if size > bytes_max and index:
            return records[:index]
    return records
