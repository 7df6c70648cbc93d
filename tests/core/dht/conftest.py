"""What tests of several files share."""

from __future__ import annotations

import pytest


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nodes of this process look at once how far a change of the members is, tell each other of it, and ask again
    where no answer came: in memory nothing takes as long as they would give it."""
    monkeypatch.setattr("agi.core.dht.changes.STEP_S", 0.05)
    monkeypatch.setattr("agi.core.dht.epochs.EXCHANGE_S", 0.2)
    monkeypatch.setattr("agi.core.dht.migration.REPLY_TIMEOUT_S", 0.3)
    monkeypatch.setattr("agi.core.dht.migration.RETRY_MAX_S", 0.2)
