"""A timer wheel: thousands of deadlines behind one timer (after Varghese and Lauck, 1987).

Deadlines are kept in slots of `tick_s`; `advance(now)` returns what is due, at most one tick late, never early. Adding
and dropping cost a dictionary operation; what finished in time is dropped by its owner or simply ignored when it
comes due.
"""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")

TICK_S = 0.05


class TimerWheel(Generic[T]):
    __slots__ = ("_next", "_slots", "_tick_s")

    def __init__(self, now: float, tick_s: float = TICK_S) -> None:
        self._tick_s = tick_s
        self._slots: dict[int, list[T]] = {}
        self._next = int(now / tick_s)

    def add(self, deadline: float, item: T) -> None:
        """`item` comes out of the first `advance` at or after `deadline`."""
        slot = int(deadline / self._tick_s) + 1
        if slot < self._next:
            slot = self._next
        waiting = self._slots.get(slot)
        if waiting is None:
            self._slots[slot] = [item]
        else:
            waiting.append(item)

    def advance(self, now: float) -> list[T]:
        current = int(now / self._tick_s)
        due: list[T] = []
        if current - self._next > len(self._slots):  # a long pause: do not walk the empty slots
            for slot in sorted(slot for slot in self._slots if slot <= current):
                due += self._slots.pop(slot)
        else:
            for slot in range(self._next, current + 1):
                if slot in self._slots:
                    due += self._slots.pop(slot)
        self._next = max(self._next, current + 1)
        return due

    def __len__(self) -> int:
        return sum(map(len, self._slots.values()))
