"""config check and config show."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from agi.core.dht.config import load_config


def test_check_says_ok_or_names_the_line(run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "node.yaml"
    file.write_text("dht:\n  network:\n    port: 7100\n")
    assert run_cli("config", "check") == (0, b"ok: 0 settings given, the others have their defaults\n", "")
    assert run_cli("config", "check", "--config", str(file), "--json").json == {"ok": True, "settings": 1}
    file.write_text("dht:\n  network:\n    port: 7100\n    prot: 1\n")
    wrong = run_cli("config", "check", "--config", str(file))
    assert wrong.code == 11 and wrong.out == b"" and wrong.err.count("\n") == 1
    assert wrong.err.startswith(f"error: {file}:4: unknown key dht.network.prot")
    for bad in (tmp_path, tmp_path / "none.yaml"):
        assert run_cli("config", "check", "--config", str(bad)).err.startswith(f"error: {bad}: cannot be read: ")
    monkeypatch.setenv("DHT_PORT", "seven")
    wrong = run_cli("config", "check")
    assert wrong.code == 11 and wrong.err.startswith("error: environment variable DHT_PORT: dht.network.port must be")


def test_show_gives_each_value_with_its_source(run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "node.yaml"
    file.write_text("dht:\n  network:\n    port: 7100\n  storage:\n    redis_url: redis://me:secret@host/1\n")
    monkeypatch.setenv("DHT_CLUSTER_NAME", "mine")
    shown = run_cli("config", "show", "--config", str(file), "--json").json
    described = load_config(file, os.environ, {}).describe()
    assert shown == {key: {"value": value, "source": source} for key, value, source in described}
    assert shown["dht.network.port"] == {"value": "7100", "source": f"{file}:3"}
    assert shown["dht.cluster.name"] == {"value": "mine", "source": "environment variable DHT_CLUSTER_NAME"}
    text = run_cli("config", "show", "--config", str(file)).text
    assert "secret" not in text and "redis://***@host/1" in text
    lines = text.splitlines()
    assert len(lines) == len(described) + 1 and lines[0].split() == ["setting", "value", "source"]
    given = run_cli("config", "show", "--config", str(file), "--given", "--json").json
    assert set(given) == {"dht.network.port", "dht.storage.redis_url", "dht.cluster.name"}
