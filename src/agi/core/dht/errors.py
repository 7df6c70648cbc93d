"""Every error that the DHT raises, whose fault it is, and whether trying again can help.

    DHTError
     +- InvalidRequest               the caller's fault; nothing was written; a retry cannot help
     |   +- InvalidKey               empty, over 1 KiB, not a str, or with a lone surrogate
     |   +- InvalidValue             not bytes, or over the value limit
     |   +- InvalidTTL               negative, zero, not a number, or past the representable time
     |   +- InvalidConsistency       not ONE, QUORUM, ALL or LINEARIZABLE
     |   +- InvalidAddress           not host:port, a port out of range
     |   +- NotACounter              the value is no decimal number of 64 bits, or would be none; nothing was changed
     |   +- WrongFence               the key is fenced by another lock; nothing was changed
     +- ConfigError                  a configuration that cannot be used; names the key and its source
     +- Unavailable                  too few replicas answered; nothing was written; retryable
     |   +- NotReady                 the node has not formed or joined its cluster yet
     |   +- Overloaded               a bound was reached (queue, bytes, connections)
     |   +- Truncated                a batch's values did not fit one frame; ask again for this key (clients do)
     +- OutcomeUnknown               some replica may have stored the write; read before deciding what to do
     +- VersionConflict              a condition did not hold; nothing was changed; `.version` is the key's version
     +- FenceRejected                a later holder of the lock has been here already; nothing was changed
     +- LockLost                     the lock is no longer this holder's, or may be another's by now
     +- LockHeld                     another held the lock for as long as it was waited for
     +- ClockSkew                    a version too far ahead of a replica's clock was refused; nothing was written
     +- StaleEpoch                   a message of another topology; the coordinator refreshes and restarts
     +- ClusterError                 two programs that must not work together
     |   +- HelloRefused             cluster name, factor, ring or protocol differ; names the difference
     |   +- UnknownDisk              a known node id with another data folder
     |   +- ClonedNode               a restored or copied data folder: its boot counter is behind, or runs twice
     |   +- BootstrapConflict        the nodes voted for different first topologies
     |   +- ChangeRefused            a change of the members that cannot be made now, or was undone: all is as before
     |   +- Removed                  the cluster has let this node go
     +- StorageError                 the store failed
     |   +- StorageFull              no space left; reads go on
     |   +- StorageCorrupt           a checksum or structure does not hold; the record is not served
     |   +- StorageClosed            used before open or after close
     |   +- FolderMismatch           the folder belongs to another node, cluster or configured set
     |   +- FolderUnusable           not writable, or locked by another process
     +- TransportError               a connection failed or broke its protocol
     |   +- ConnectFailed            nobody answered at that address
     |   +- LinkClosed               the connection ended while a reply was awaited
     |   +- ProtocolMismatch         the other side speaks another version, or garbage
     |   +- FrameTooLarge            a frame over the limit
     +- ClientClosed                 the client was closed
     +- BatchError                   some keys of a batch failed; `.failed` maps each of them to its error

Each class has a `code`, stable across versions, under which it travels on the wires (`to_wire`, `from_wire`) and, for
the command line, an `exit_code`. `retryable` says whether the same call can succeed later as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

__all__ = [
    "BatchError",
    "BootstrapConflict",
    "ChangeRefused",
    "ClientClosed",
    "ClockSkew",
    "ClonedNode",
    "ClusterError",
    "ConfigError",
    "ConnectFailed",
    "DHTError",
    "FenceRejected",
    "FolderMismatch",
    "FolderUnusable",
    "FrameTooLarge",
    "HelloRefused",
    "InvalidAddress",
    "InvalidConsistency",
    "InvalidKey",
    "InvalidRequest",
    "InvalidTTL",
    "InvalidValue",
    "LinkClosed",
    "LockHeld",
    "LockLost",
    "NotACounter",
    "NotReady",
    "OutcomeUnknown",
    "Overloaded",
    "ProtocolMismatch",
    "Removed",
    "StaleEpoch",
    "StorageClosed",
    "StorageCorrupt",
    "StorageError",
    "StorageFull",
    "TransportError",
    "Truncated",
    "Unavailable",
    "UnknownDisk",
    "VersionConflict",
    "WrongFence",
    "from_wire",
]


class DHTError(Exception):
    """Base of all errors of this package."""

    code: ClassVar[int] = 1
    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    def __init__(self, message: str = "", *, needed: int = 0, answered: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.needed = needed
        """How many replicas the call needed (0 where that means nothing)."""
        self.answered = answered
        """How many had answered when it failed."""

    def __str__(self) -> str:
        if self.needed:
            return f"{self.message} (needed {self.needed} replicas, {self.answered} answered)"
        return self.message

    def to_wire(self) -> tuple[int, str, int, int]:
        return (self.code, self.message, self.needed, self.answered)


class InvalidRequest(DHTError):
    code, exit_code = 10, 10


class InvalidKey(InvalidRequest):
    code = 11


class InvalidValue(InvalidRequest):
    code = 12


class InvalidTTL(InvalidRequest):
    code = 13


class InvalidConsistency(InvalidRequest):
    code = 14


class InvalidAddress(InvalidRequest):
    code = 15


class NotACounter(InvalidRequest):
    code = 16


class WrongFence(InvalidRequest):
    code = 17


class ConfigError(DHTError):
    code, exit_code = 20, 11


class Unavailable(DHTError):
    code, exit_code, retryable = 30, 12, True


class NotReady(Unavailable):
    code, exit_code = 31, 13


class Overloaded(Unavailable):
    code, exit_code = 32, 14


class Truncated(Unavailable):
    code = 33


class OutcomeUnknown(DHTError):
    code, exit_code = 40, 15


class VersionConflict(DHTError):
    """A condition did not hold, and nothing was changed.

    Attributes:
        version: the key's version, 0 where it is absent.
    """

    code, exit_code = 43, 27

    def __init__(self, message: str = "", *, version: int = 0, needed: int = 0, answered: int = 0) -> None:
        super().__init__(message, needed=needed, answered=answered)
        self.version = version


class FenceRejected(DHTError):
    code, exit_code = 44, 28


class LockLost(DHTError):
    code, exit_code = 45, 29


class LockHeld(DHTError):
    code, exit_code, retryable = 46, 30, True


class ClockSkew(DHTError):
    code, exit_code, retryable = 41, 16, True


class StaleEpoch(DHTError):
    code, exit_code, retryable = 42, 12, True


class ClusterError(DHTError):
    code, exit_code = 50, 17


class HelloRefused(ClusterError):
    code = 51


class UnknownDisk(ClusterError):
    code = 52


class ClonedNode(ClusterError):
    code = 53


class BootstrapConflict(ClusterError):
    code = 54


class ChangeRefused(ClusterError):
    code = 55


class Removed(ClusterError):
    code = 56
    asks_again = False
    """It was only joining, and nobody ordered that to end: as a new node it may ask again."""


class StorageError(DHTError):
    code, exit_code = 60, 18


class StorageFull(StorageError):
    code, exit_code, retryable = 61, 19, True


class StorageCorrupt(StorageError):
    code, exit_code = 62, 20


class StorageClosed(StorageError):
    code = 63


class FolderMismatch(StorageError):
    code, exit_code = 64, 21


class FolderUnusable(StorageError):
    code, exit_code = 65, 22


class TransportError(DHTError):
    code, exit_code, retryable = 70, 23, True


class ConnectFailed(TransportError):
    code = 71


class LinkClosed(TransportError):
    code = 72


class ProtocolMismatch(TransportError):
    code, exit_code, retryable = 73, 24, False


class FrameTooLarge(TransportError):
    code, retryable = 74, False


class ClientClosed(DHTError):
    code, exit_code = 80, 25


class BatchError(DHTError):
    """Some keys of a batch failed. The others took effect: a batch is not atomic.

    Attributes:
        failed: each failed key with its error.
    """

    code, exit_code = 90, 26

    def __init__(self, failed: Mapping[str, DHTError]) -> None:
        self.failed: dict[str, DHTError] = dict(failed)
        first = next(iter(self.failed.items()))
        super().__init__(f"{len(self.failed)} keys failed, first {first[0]!r}: {first[1]}")


def _tree(root: type[DHTError]) -> dict[int, type[DHTError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


_BY_CODE = _tree(DHTError)


def from_wire(code: int, message: str, needed: int = 0, answered: int = 0) -> DHTError:
    """The error that `to_wire` described; a code of a newer version becomes a plain `DHTError`."""
    kind = _BY_CODE.get(code, DHTError)
    if kind is BatchError:
        kind = DHTError
    return kind(message, needed=needed, answered=answered)


def named(error: DHTError) -> str:
    """As it is told to people where no code goes with it."""
    return f"{type(error).__name__}: {error}"
