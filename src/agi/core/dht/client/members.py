"""What the cluster last said of its members' health, and who wants to hear of changes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from agi.core.dht.types import MemberStatus

_log = logging.getLogger("agi.core.dht.client")

StatusCallback = Callable[[str, MemberStatus], object]


class MemberStates:
    """The state of each member as the node that was asked last holds it. A member is alive until one says otherwise."""

    def __init__(self) -> None:
        self._known: dict[str, MemberStatus] = {}
        self._callbacks: list[StatusCallback] = []

    def on_status(self, callback: StatusCallback) -> None:
        self._callbacks.append(callback)

    def learn(self, members: Sequence[dict[str, Any]]) -> None:
        """The members of a topology answer (queries.py)."""
        before, self._known = self._known, {}
        for member in members:
            name, status = member["node_id"], MemberStatus[member["status"]]
            self._known[name] = status
            if status is not before.get(name, MemberStatus.ALIVE):
                self._tell(name, status)

    def _tell(self, name: str, status: MemberStatus) -> None:
        for callback in self._callbacks:
            try:
                callback(name, status)
            except Exception:  # noqa: BLE001  # a stranger's code may not stop the client
                _log.exception("a callback for the state of %s failed", name)
