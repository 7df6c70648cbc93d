"""The bounded table that keeps a retried write from becoming a second one.

A client names each write batch (client id, sequence) and repeats that name when it retries at the same coordinator. The
table remembers the latest batches: still running, or with the reply that was given. What has left the table is unknown,
and the retry is refused rather than written again.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

T = TypeVar("T")


class RequestTable(Generic[T]):
    """`T` is the state or the reply of a batch. Past the bound the oldest leave.

    Args:
        keys_max: sum of the keys of all remembered batches.
    """

    __slots__ = ("_batches", "_keys", "_keys_max")

    def __init__(self, keys_max: int) -> None:
        self._keys_max = keys_max
        self._keys = 0
        self._batches: OrderedDict[tuple[str, int], tuple[T, int]] = OrderedDict()

    def get(self, client: str, sequence: int) -> T | None:
        found = self._batches.get((client, sequence))
        return None if found is None else found[0]

    def add(self, client: str, sequence: int, state: T, keys: int) -> None:
        """Remembers a batch of so many keys."""
        batches = self._batches
        batches[client, sequence] = (state, keys)
        self._keys += keys
        while self._keys > self._keys_max and len(batches) > 1:
            _, (_, dropped) = batches.popitem(last=False)
            self._keys -= dropped

    def drop(self, client: str, sequence: int) -> None:
        """Forgets a batch, if it is known."""
        found = self._batches.pop((client, sequence), None)
        if found is not None:
            self._keys -= found[1]

    def update(self, client: str, sequence: int, state: T) -> None:
        """Its reply, once it has one; nothing if it has left the table."""
        found = self._batches.get((client, sequence))
        if found is not None:
            self._batches[client, sequence] = (state, found[1])
