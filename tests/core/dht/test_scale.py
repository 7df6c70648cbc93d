"""The measures of large clusters, at small sizes: what they find has to agree with theory, and is the same again."""

from __future__ import annotations

import gc
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from agi.core.dht.protocol.broadcast import CLAIMS_BYTES_MAX
from agi.core.dht.protocol.membership import Pace
from agi.core.dht.protocol.suspicion import bounds
from agi.core.dht.testing import scale, scale_members, scale_plots, scale_ring
from agi.core.dht.testing.scale_members import STALLS_S, Detection, Stalls
from agi.core.dht.testing.scale_ring import RingFigures, Shape, measure_ring

SIZES = [10, 40]
DOCS = Path(__file__).parents[3] / "docs"
SVG = "{http://www.w3.org/2000/svg}"


@contextmanager
def _quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scale_members, "STALLED_S_MAX", 60.0)
        patch.setattr(scale_members, "STALLED_MEMBER_S", 800)
        patch.setattr(scale_members, "DEATHS_MAX", 8)
        patch.setattr(scale_ring, "KEYS", 2000)
        patch.setattr(scale_ring, "JOINS_MAX", 4)
        yield


@pytest.fixture
def quick() -> Iterator[None]:
    """Less of everything, to end in seconds."""
    with _quick():
        yield


@pytest.fixture(scope="module")
def result() -> scale.Result:
    with _quick():
        scales = scale.measure(reversed(SIZES), Pace(), Shape(), 1, jobs=0)
    return scale.Result("lan", 1, "3.11", Pace(), Shape(), scales)


# --- the detector


def test_a_death_is_known_when_the_settings_say(result: scale.Result) -> None:
    found = [each.detection for each in result.sizes]
    for members, one in zip(SIZES, found, strict=True):
        least_s, _ = bounds(members, 0.5, 4, 6)
        assert one.expected_s == pytest.approx(2 * 0.5 + least_s)
        assert least_s < one.first_s <= one.p50_s <= one.p99_s <= one.all_s < one.expected_s + 2.5
        assert one.p50_s == pytest.approx(one.expected_s, abs=1)
        assert one.known_s == sorted(one.known_s) and len(one.known_s) == scale_members.CURVE + 1
        assert (one.known_s[scale_members.CURVE // 2], one.known_s[-1]) == (one.p50_s, one.all_s)
    assert found[1].p50_s - found[0].p50_s == pytest.approx(found[1].expected_s - found[0].expected_s, abs=0.5)


def test_news_spreads_in_some_gossip_intervals_and_traffic_does_not_grow(result: scale.Result) -> None:
    for one in (each.detection for each in result.sizes):
        assert 0 < one.news_p50_s <= one.news_p99_s <= one.news_all_s < 10 * 0.5  # a probe tells whom gossip missed
        assert one.news_p50_s < 3 * 0.1 and one.news_p99_s < 10 * 0.1
        assert 0 < one.leave_all_s < 3 * 0.1
        assert one.messages == pytest.approx(
            4, abs=0.1
        )  # a probe and an answer, of one's own and to one other, at 2 Hz
        assert one.messages * 8 < one.bytes < one.messages * 16
        assert 3 < one.death_messages < one.all_s * 3 / 0.1  # gossip_nodes each gossip_interval at the most
        assert one.death_messages * 8 < one.death_bytes < one.death_messages * CLAIMS_BYTES_MAX
        assert one.death_bytes / one.death_messages < one.largest_bytes < CLAIMS_BYTES_MAX + 100


def test_a_measure_is_of_its_seed_alone(quick: None) -> None:
    def found(seed: int) -> tuple[Detection, Stalls]:
        stalls = scale_members.measure_stalls(12, Pace(), seed, (0.5, 4.0), lifeguard=False)
        return scale_members.measure_detection(12, Pace(), seed), stalls

    first, again, other = found(1), found(1), found(2)
    assert first == again and first[0] != other[0] and first[1] != other[1]


def test_lifeguard_declares_fewer_of_those_that_stall_dead(result: scale.Result) -> None:
    for each in result.sizes:
        assert [(one.still_s, one.lifeguard) for one in each.stalls] == [
            (s, g) for s in STALLS_S for g in (True, False)
        ]
        assert not any(one.false_sound for one in each.stalls if one.lifeguard)
        assert {one.stalled for one in each.stalls} == {max(1, each.members // 20)}
        guarded, plain = (each.stalled((0.5, 4.0), lifeguard) for lifeguard in (True, False))
        assert guarded is not None and plain is not None
        assert guarded.false_stalled < plain.false_stalled and guarded.bytes < plain.bytes
        assert guarded.messages > each.detection.messages + 1
        assert each.stalled((0.5, 9.0), True) is None
    assert scale_members.stalls_of(1000) == STALLS_S[-1:]


def test_a_rate_is_of_the_members_of_its_kind_and_of_an_hour() -> None:
    assert Stalls((0.5, 1), True, 2, 1800, 4, 3, 1, 1).rates(10) == (4 / 0.5 / 8, 3 / 0.5 / 2)


# --- the ring


@pytest.mark.parametrize("members", [10, 100])
def test_a_ring_is_as_even_as_documented_and_a_join_moves_its_share(quick: None, members: int) -> None:
    found = measure_ring(members, Shape())
    row = re.search(rf"^\| {members} \| 150 \| xxh3 \|(.*)\|$", (DOCS / "ring.md").read_text(), re.MULTILINE)
    assert row is not None
    worst = [float(cell) for cell in re.findall(r"worst ([\d.]+)", row[1])]
    assert worst[1] < found.primary_min < 1 < found.primary_max < worst[0]
    assert worst[3] < found.held_min < 1 < found.held_max < worst[2]
    assert found.primary_min < found.held_min and found.held_max < found.primary_max
    assert found.moved_ideal == 1 / (members + 1)
    assert found.moved == pytest.approx(found.moved_ideal, rel=0.15)
    assert found.primary_moved == pytest.approx(found.moved_ideal, rel=0.15)
    assert found.moved < found.moved_max < 1.25 * found.moved_ideal
    assert found.moved_else == 0  # nothing moves but to the newcomer
    assert found.points == 150 * members
    assert found.topology_bytes / members == pytest.approx(89, abs=8)  # of which the disk's id takes 34
    assert 0 < found.build_s < found.adopt_s and 0 < found.final_s < found.adopt_s
    assert found.fill_s > 0 and 0 < found.lookup_us < 100
    assert found.points * (8 + 32) < found.built_bytes < found.filled_bytes < found.joint_bytes / 1.8


def test_a_join_of_fewer_nodes_than_replicas_gives_the_newcomer_everything(quick: None) -> None:
    found = measure_ring(3, Shape(factor=5, virtual_nodes=20))
    assert found.moved == found.moved_max == found.moved_ideal == 1 / 4
    assert (found.held_max, found.held_min) == (1, 1)


def test_every_object_is_counted_once() -> None:
    shared = ["a string of some length"]
    parts = [shared, shared, {"key": shared}, len]
    once: list[object] = [parts, shared, shared[0], parts[2], "key"]
    assert scale_ring.deep_bytes(parts) == sum(map(sys.getsizeof, once))


def test_garbage_is_looked_for_as_before_afterwards() -> None:
    before = gc.get_threshold()
    try:
        gc.set_threshold(701, 11, 12)
        measure_ring(3, Shape(virtual_nodes=2))
        assert (gc.isenabled(), gc.get_threshold()) == (True, (701, 11, 12))
    finally:
        gc.set_threshold(*before)


# --- what is shown


def test_the_json_has_every_figure_and_comes_back(result: scale.Result, tmp_path: Path) -> None:
    data = msgspec.json.encode(result)
    assert msgspec.json.decode(data, type=scale.Result) == result
    for size in msgspec.json.decode(data)["sizes"]:
        for kind, shown in ((Detection, size["detection"]), (RingFigures, size["ring"]), (Stalls, size["stalls"][0])):
            assert set(shown) == {field.name for field in fields(kind)}


def test_the_table_has_every_figure(result: scale.Result) -> None:
    lines = [line.strip("| ").split(" | ") for line in scale.table(result.sizes).splitlines() if line]
    rows = {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}
    assert all(len(cells) == len(SIZES) for cells in rows.values())
    assert rows["failure detection; members"] == ["10", "40"]
    expected: dict[str, Callable[[scale.Scale], str]] = {
        "death known to a member, p50, s": lambda s: f"{s.detection.p50_s:.2f}",
        "death known to a member, p99, s": lambda s: f"{s.detection.p99_s:.2f}",
        "worst news known to all, s": lambda s: f"{s.detection.news_all_s:.2f}",
        "messages a member a second, at peace": lambda s: f"{s.detection.messages:.2f}",
        "bytes a member a second, at peace": lambda s: f"{s.detection.bytes:.0f}",
        "ring: build, s": lambda s: f"{s.ring.build_s:.3f}",
        "ring: lookup of the replicas of a key, us": lambda s: f"{s.ring.lookup_us:.2f}",
        "ring: memory with all replica sets, MiB": lambda s: f"{s.ring.filled_bytes / 2**20:.1f}",
        "fullest / mean, all replicas": lambda s: f"{s.ring.held_max:.2f}",
        "join: stored data that moves, mean, %": lambda s: f"{100 * s.ring.moved:.3g}",
        "topology, encoded, KiB": lambda s: f"{s.ring.topology_bytes / 1024:.1f}",
        "0.5 to 4 s, plain SWIM: stalled members declared dead": lambda s: (
            f"{s.stalls[5].false_stalled} ({s.stalls[5].rates(s.members)[1]:.3g})"
        ),
    }
    for name, show in expected.items():
        assert rows[name] == [show(each) for each in result.sizes], name
    known = [*scale.MEMBER_ROWS, *scale.stall_rows(), *scale.RING_ROWS]
    assert len(rows) == len(known) + 3 + len({line[0] for line in lines if set(line[0]) == {"-"}})


def _series(path: Path) -> dict[str, int]:
    """The series of a plot, with the points of each."""
    assert b"<dc:date>" not in path.read_bytes() and path.stat().st_size < 100_000
    root = ElementTree.parse(path).getroot()
    assert root.tag == f"{SVG}svg"
    found = {}
    for group in root.iter(f"{SVG}g"):
        if group.get("id", "").startswith(f"{path.stem}-"):
            line = group.find(f"{SVG}path")
            assert line is not None
            found[group.attrib["id"].removeprefix(f"{path.stem}-")] = len(re.findall(r"[ML] ", line.attrib["d"]))
    return found


def _expected_series(sizes: list[int]) -> dict[str, dict[str, int]]:
    all_stalls = [size for size in sizes if len(scale_members.stalls_of(size)) > 1]
    over_sizes = {
        "detection": ("all", "p99", "p50", "first", "expected"),
        "gossip": (
            "news_all",
            "news_p99",
            "news_p50",
            "leave_all",
            "messages",
            "bytes",
            "death_messages",
            "death_bytes",
        ),
        "stalls": ("sound-lifeguard", "sound-plain", "stalled-lifeguard", "stalled-plain"),
        "ring": ("adopt", "final", "fill", "build", "joint", "filled", "built", "topology"),
        "balance": ("primary_max", "held_max", "held_min", "primary_min", "moved", "moved_max", "moved_ideal"),
    }
    expected = {name: dict.fromkeys(series, len(sizes)) for name, series in over_sizes.items()}
    expected["known"] = {str(size): scale_members.CURVE + 1 for size in sizes}
    for size in all_stalls:
        expected["stalls"] |= {f"{size}-{detector}": len(STALLS_S) for detector in ("lifeguard", "plain")}
    return expected


def test_plots_have_every_series_and_are_the_same_again(
    result: scale.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = scale_plots.write(result.sizes, tmp_path / "new" / "folder")
    expected = _expected_series(SIZES)
    assert {path.stem: _series(path) for path in written} == expected
    monkeypatch.setattr(scale_plots, "PLOTS", {"stalls": scale_plots.PLOTS["stalls"]})  # all have one way
    (again,) = scale_plots.write(result.sizes, tmp_path)
    assert again.read_bytes() == (tmp_path / "new" / "folder" / "stalls.svg").read_bytes()


def test_without_matplotlib_the_command_says_so_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(scale, "measure", lambda *args: pytest.fail("it has begun"))
    with pytest.raises(SystemExit):
        scale.main(["--plots", str(tmp_path)])
    assert "pip install 'matplotlib>=3.10'" in capsys.readouterr().err


# --- the command


def test_the_command_measures_keeps_and_shows_again(
    quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale_plots, "PLOTS", {"known": scale_plots.PLOTS["known"]})
    kept = tmp_path / "result.json"
    assert scale.main(["--sizes", "5,3", "--preset", "local", "--jobs", "0", "--result", str(kept)]) == 0
    table = capsys.readouterr().out
    assert [cell.strip() for cell in table.splitlines()[0].split("|")[2:4]] == ["3", "5"]
    result = msgspec.json.decode(kept.read_bytes(), type=scale.Result)
    assert (result.preset, result.pace.heartbeat_s, [each.members for each in result.sizes]) == ("local", 0.2, [3, 5])
    assert scale.main(["--read", str(kept), "--plots", str(tmp_path)]) == 0
    assert capsys.readouterr().out == table
    assert [path.name for path in tmp_path.glob("*.svg")] == ["known.svg"]


@pytest.mark.parametrize("sizes", ["2", "20001", "10,x", ""])
def test_sizes_that_cannot_be_are_refused(sizes: str) -> None:
    with pytest.raises(SystemExit):
        scale.main(["--sizes", sizes])


def test_processes_find_what_one_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = scale._works(3, Pace(), Shape(virtual_nodes=5), 1)
    monkeypatch.setattr(scale, "_works", lambda *args: parts[-3:])  # one kind of stalls, to end soon
    alone, apart = (scale.measure([3], Pace(), Shape(), 1, jobs)[0] for jobs in (0, 2))
    assert (apart.detection, apart.stalls) == (alone.detection, alone.stalls)
    assert (apart.ring.moved, apart.took_s > 0) == (alone.ring.moved, True)


# --- docs/scale.md


def test_the_document_shows_the_kept_figures() -> None:
    result = msgspec.json.decode((DOCS / "scale" / "result.json").read_bytes(), type=scale.Result)
    assert [each.members for each in result.sizes] == list(scale.SIZES)
    text = (DOCS / "scale.md").read_text()
    assert text.split("<!-- table -->\n")[1].split("\n<!-- /table -->")[0] == scale.table(result.sizes)
    plots = sorted((DOCS / "scale").glob("*.svg"))
    assert sorted(re.findall(r"\(scale/(\w+\.svg)\)", text)) == [path.name for path in plots]
    assert {path.stem: _series(path) for path in plots} == _expected_series(list(scale.SIZES))
