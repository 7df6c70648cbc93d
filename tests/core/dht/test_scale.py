"""The measures of large clusters, at small sizes: what they find has to be plausible, and is the same again."""

from __future__ import annotations

import json

import pytest

from agi.core.dht.protocol.membership import Pace
from agi.core.dht.testing import scale


def test_json_and_table_show_every_size(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "KEYS", 2000)
    monkeypatch.setattr(scale, "LOOKUPS", 2000)
    monkeypatch.setattr(scale, "STALLED_S", 10.0)
    assert scale.main(["--sizes", "5,20", "--json", "--jobs", "1"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["preset"], [size["members"] for size in shown["sizes"]]) == ("lan", [5, 20])
    for size in shown["sizes"]:
        assert 2.0 < size["detect_first_s"] <= size["detect_p50_s"] <= size["detect_p99_s"] <= size["detect_all_s"] < 10
        assert 0 < size["spread_s"] < 1
        assert size["messages"] == pytest.approx(4, abs=0.3) and 20 < size["bytes"] < 200
        assert size["false_healthy"] == 0
        assert size["moved"] == pytest.approx(size["moved_ideal"], rel=0.5) and size["balance"] > 1
        assert size["lookup_us"] > 0 and size["ring_build_s"] > 0
    assert scale.main(["--sizes", "3", "--preset", "local", "--jobs", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["members", "3"] and len(lines) == len(scale.ROWS) + 1
    with pytest.raises(SystemExit):
        scale.main(["--sizes", "2"])


def test_a_measure_is_of_its_seed_alone() -> None:
    def found(seed: int) -> scale.Scale:
        result = scale.Scale(15)
        scale.measure_members(result, Pace(), seed)
        return result

    assert found(1) == found(1) != found(2)


def test_lifeguard_declares_fewer_of_those_that_stall_dead() -> None:
    with_it = scale.measure_stalls(60, Pace(), 1)
    without = scale.measure_stalls(60, scale.without_lifeguard(Pace()), 1, notice_stalls=False)
    assert with_it[0] == 0 and sum(with_it) < sum(without)
