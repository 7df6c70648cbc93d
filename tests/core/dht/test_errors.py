"""The errors: one tree, stable codes, and a round trip over the wire."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from agi.core.dht import errors
from agi.core.dht.errors import BatchError, DHTError, StorageFull, Unavailable, from_wire

REPOSITORY = Path(__file__).parents[3]
CATALOGUE = runpy.run_path(str(REPOSITORY / "scripts/error_catalogue.py"))

# name: (code, exit code, retryable). These travel between versions: add, never change or reuse.
CODES = {
    "DHTError": (1, 1, False),
    "InvalidRequest": (10, 10, False),
    "InvalidKey": (11, 10, False),
    "InvalidValue": (12, 10, False),
    "InvalidTTL": (13, 10, False),
    "InvalidConsistency": (14, 10, False),
    "InvalidAddress": (15, 10, False),
    "ConfigError": (20, 11, False),
    "Unavailable": (30, 12, True),
    "NotReady": (31, 13, True),
    "Overloaded": (32, 14, True),
    "Truncated": (33, 12, True),
    "OutcomeUnknown": (40, 15, False),
    "NotACounter": (16, 10, False),
    "WrongFence": (17, 10, False),
    "VersionConflict": (43, 27, False),
    "FenceRejected": (44, 28, False),
    "LockLost": (45, 29, False),
    "LockHeld": (46, 30, True),
    "ClockSkew": (41, 16, True),
    "StaleEpoch": (42, 12, True),
    "ClusterError": (50, 17, False),
    "HelloRefused": (51, 17, False),
    "UnknownDisk": (52, 17, False),
    "ClonedNode": (53, 17, False),
    "BootstrapConflict": (54, 17, False),
    "ChangeRefused": (55, 17, False),
    "Removed": (56, 17, False),
    "StorageError": (60, 18, False),
    "StorageFull": (61, 19, True),
    "StorageCorrupt": (62, 20, False),
    "StorageClosed": (63, 18, False),
    "FolderMismatch": (64, 21, False),
    "FolderUnusable": (65, 22, False),
    "TransportError": (70, 23, True),
    "ConnectFailed": (71, 23, True),
    "LinkClosed": (72, 23, True),
    "ProtocolMismatch": (73, 24, False),
    "FrameTooLarge": (74, 23, False),
    "ClientClosed": (80, 25, False),
    "BatchError": (90, 26, False),
}


def classes(root: type[DHTError] = DHTError, depth: int = 0) -> Iterator[tuple[int, type[DHTError]]]:
    """(depth, class) of all errors of the module, in the order of their definition."""
    yield depth, root
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from classes(child, depth + 1)


KINDS = [kind for _, kind in classes()]


def test_docstring_tree_equals_the_class_tree() -> None:
    drawn = [(depth, name) for depth, name, _ in CATALOGUE["tree"]()]
    assert drawn == [(depth, kind.__name__) for depth, kind in classes()]


def test_every_error_has_a_meaning() -> None:
    assert all(meaning and meaning[-1] != "." for _, _, meaning in CATALOGUE["tree"]())


def test_catalogue_is_current() -> None:
    assert (REPOSITORY / "docs/errors.md").read_text(encoding="utf-8") == CATALOGUE["catalogue"]()


def test_the_grpc_contract_lists_every_code() -> None:
    contract = (REPOSITORY / "src/agi/core/dht/proto/dht.proto").read_text(encoding="utf-8")
    listed = re.search(r"// Stable number of the kind of error: ([^;]*?)  uint32 code = 1;", contract)
    assert listed is not None
    codes: list[int] = []
    for first, last in re.findall(r"\b(\d+)(?:-(\d+))?\b", listed[1]):
        codes += range(int(first), int(last or first) + 1)
    assert set(codes) == {kind.code for kind in KINDS}


def test_codes_are_stable_and_unique() -> None:
    assert {kind.__name__: (kind.code, kind.exit_code, kind.retryable) for kind in KINDS} == CODES
    assert len({kind.code for kind in KINDS}) == len(KINDS)
    assert all(0 < kind.exit_code < 64 for kind in KINDS)  # shells use 64 and up, and 126 on, for themselves


def test_exported_names() -> None:
    assert errors.__all__ == [*sorted(kind.__name__ for kind in KINDS), "from_wire"]
    assert all(hasattr(errors, name) for name in errors.__all__)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not BatchError], ids=lambda kind: kind.__name__)
def test_wire_round_trip(kind: type[DHTError]) -> None:
    error = kind("disk é", needed=2, answered=1)
    again = from_wire(*error.to_wire())
    assert type(again) is kind
    assert (again.message, again.needed, again.answered) == ("disk é", 2, 1)
    assert again.to_wire() == error.to_wire() and str(again) == str(error)


def test_a_code_of_a_newer_version_is_still_an_error() -> None:
    error = from_wire(9999, "new", 3, 2)
    assert type(error) is DHTError and not error.retryable
    assert (error.message, error.needed, error.answered) == ("new", 3, 2)


def test_messages_say_how_far_short() -> None:
    assert str(Unavailable("no quorum", needed=2, answered=1)) == "no quorum (needed 2 replicas, 1 answered)"
    assert str(Unavailable("no quorum")) == "no quorum"
    assert str(DHTError()) == ""


def test_batch_error_names_each_key() -> None:
    failed: dict[str, DHTError] = {"a": StorageFull("full"), "b": Unavailable("down", needed=2, answered=1)}
    error = BatchError(failed)
    assert error.failed == failed and error.failed is not failed
    assert str(error) == "2 keys failed, first 'a': full"
    again = from_wire(*error.to_wire())  # the keys' errors travel beside it, so it comes back as a plain one
    assert type(again) is DHTError and again.message == str(error)
