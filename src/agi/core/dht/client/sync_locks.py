"""A lock for threads: the asyncio client's, which is renewed in the client's own thread."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Self

from agi.core.dht.client.locks import Lock
from agi.core.dht.errors import ClientClosed, DHTError, LockHeld, LockLost
from agi.core.dht.types import Fence

Call = Callable[[Coroutine[Any, Any, Any]], Any]


class SyncLock:
    """One acquisition of a lock; `client.lock` and `client.try_lock` make it. As `Lock`, but nothing can interrupt a
    thread: a lock that was lost shows in `held`, at the next `check()`, and at the end of the block.

    Attributes:
        name: of the lock.
    """

    def __init__(self, lock: Lock, call: Call) -> None:
        self.name = lock.name
        self._lock = lock
        self._call = call

    @property
    def token(self) -> int:
        """As `Lock.token`."""
        return self._lock.token

    @property
    def fence(self) -> Fence:
        """As `Lock.fence`."""
        return self._lock.fence

    @property
    def held(self) -> bool:
        """Whether nobody else can have it at this moment."""
        return self._lock.held

    def check(self) -> None:
        """Raises LockLost if it is not held."""
        self._lock.check()

    def release(self) -> None:
        """Gives it back; raises as `Lock.release`."""
        self._call(self._lock.release())

    def acquire(self, *, wait: bool) -> bool:
        """Whether it is held now; for the client."""
        try:
            return bool(self._call(self._lock._acquire(wait=wait)))
        except DHTError:
            raise
        except BaseException:  # an interrupt: it may be held by now, and nobody would know
            self._call(self._lock._drop())
            raise

    def __enter__(self) -> Self:
        if self._lock._enter():
            self.check()
        elif not self.acquire(wait=True):
            raise LockHeld(self._lock._in_vain())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            self._call(self._lock._leave(failed=kind is not None))
        except ClientClosed:
            if kind is None:
                raise LockLost(f"the lock {self.name!r} was given up: its client was closed") from None
