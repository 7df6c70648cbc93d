"""What happens on the links of a client's session."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import msgspec

from agi.core.dht.errors import DHTError
from agi.core.dht.transport.base import Link

if TYPE_CHECKING:
    from agi.core.dht.client.session import Remote, Session


class NodeHandler:
    """Of a link to one node."""

    def __init__(self, session: Session, remote: Remote) -> None:
        self._receive = partial(session.receive, remote)
        self._lost = partial(session.link_lost, remote)
        self._ended = session.link_ended

    def message(self, link: Link, message: msgspec.Struct) -> None:
        self._receive(message)

    def link_closed(self, link: Link, error: DHTError | None) -> None:
        self._ended(link)
        self._lost(link, error)


class Asking:
    """Of a link over which only the topology is asked for."""

    def __init__(self, session: Session) -> None:
        self._receive = partial(session.receive, None)
        self._ended = session.link_ended

    def message(self, link: Link, message: msgspec.Struct) -> None:
        self._receive(message)

    def link_closed(self, link: Link, error: DHTError | None) -> None:
        self._ended(link)
