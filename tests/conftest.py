"""For all tests."""

from __future__ import annotations

import os
import signal
import tempfile

import pytest

# A shell starts jobs in the background with SIGINT ignored, and processes inherit that; here Ctrl-C has to work.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Python is told to keep no bytecode in many containers: each process that a test starts would compile the package
    anew, which takes twice as long as all else at its start. They keep it in a folder of this run."""
    starts_workers = bool(config.getoption("numprocesses", None))
    if os.environ.get("PYTHONDONTWRITEBYTECODE") and not starts_workers:
        folder = tempfile.TemporaryDirectory(prefix="bytecode-", ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        os.environ["PYTHONPYCACHEPREFIX"] = folder.name
        del os.environ["PYTHONDONTWRITEBYTECODE"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long begins early: whoever begins it last keeps the other workers waiting."""
    items.sort(key=lambda item: "integration" not in item.path.parts and item.get_closest_marker("seeds") is None)
