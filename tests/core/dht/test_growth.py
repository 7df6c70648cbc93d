"""The benchmark of growth: what it reckons from what it measures, and one small run."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
from bench.growth import plots, report, theory
from bench.growth.measure import Sample, quantile
from bench.growth.plan import DIMENSIONS, Base, Cell, Data, Site, scope, shortage, sites
from bench.growth.runner import Point, Results, run
from bench.growth.site import Filled, Start
from bench.growth.theory import RULES, SENTENCES, Rule, constant, fit, interpolate, itself, judge, slope

DOCS = Path(__file__).parents[3] / "docs"
BASE = Base()

# --- theory


def test_a_fit_finds_the_fixed_part_and_the_share() -> None:
    found = fit([1, 2, 3, 5], [12, 22, 32, 52])
    assert found.fixed == pytest.approx(2) and found.share == pytest.approx(10)
    assert found.at(4) == pytest.approx(42)


@pytest.mark.parametrize(
    ("works", "figures", "fixed", "share"),
    [
        ([1, 10, 100], [100, 90, 80], None, 0),  # it falls: no share
        ([1, 2, 4], [1, 4, 16], 0, None),  # it would begin below nothing: no fixed part
        ([1, 1, 1], [7, 7, 7], None, None),
        ([3], [6], None, None),
    ],
)
def test_no_part_of_a_fit_is_below_nothing(
    works: list[float], figures: list[float], fixed: float | None, share: float | None
) -> None:
    found = fit(works, figures)
    assert found.fixed >= 0 and found.share >= 0
    assert fixed is None or found.fixed == fixed
    assert share is None or found.share == share
    assert min(figures) <= found.at(works[len(works) // 2]) <= max(figures)


def test_a_fit_counts_relative_errors() -> None:
    """Else the largest value would be all that counts, and the smallest could be anything."""
    works = [16.0, 4096.0, 4_194_304.0]
    found = fit(works, [100, 139, 40_000])
    assert found.at(16) == pytest.approx(100, rel=0.1) and found.at(works[-1]) == pytest.approx(40_000, rel=0.1)


@pytest.mark.parametrize(("works", "figures"), [([], []), ([1], [1, 2]), ([1, 2], [0, 1])])
def test_a_fit_needs_figures(works: list[float], figures: list[float]) -> None:
    with pytest.raises(ValueError, match="as many works"):
        fit(works, figures)


@pytest.mark.parametrize("power", [0, 0.5, 1, 2])
def test_a_slope_is_the_power(power: float) -> None:
    xs = [1, 3, 10, 500]
    assert slope(xs, [7 * x**power for x in xs]) == pytest.approx(power)


def test_a_slope_needs_two_points() -> None:
    with pytest.raises(ValueError, match="two different"):
        slope([3, 3], [1, 2])


def test_interpolation_is_straight_in_logarithms_and_flat_outside() -> None:
    points = [(1.0, 100.0), (100.0, 1.0)]
    assert [round(interpolate(x, points), 6) for x in (0.5, 1, 10, 100, 1000)] == [100, 100, 10, 1, 1]


def _rounds(figures: list[float], scatter: float = 0.02) -> list[tuple[int, list[float]]]:
    return [(x, [y * (1 - scatter), y, y * (1 + scatter)]) for x, y in zip((1, 2, 3, 5), figures, strict=True)]


def test_what_grows_as_its_work_is_as_the_theory_says() -> None:
    verdict = judge(Rule("put CPU", itself), BASE, _rounds([12, 22, 32, 52]), None)
    assert verdict is not None and not verdict.faster
    assert verdict.factor == pytest.approx(52 / 12) == pytest.approx(verdict.theory)
    assert verdict.strain == pytest.approx(1) and verdict.fitted == pytest.approx((12, 22, 32, 52))


def test_what_grows_faster_is_found_with_where() -> None:
    verdict = judge(Rule("put CPU", itself), BASE, _rounds([12, 24, 48, 130]), None)
    assert verdict is not None and verdict.faster and verdict.where[1] == 5
    level = judge(Rule("get CPU", constant), BASE, _rounds([50, 51, 50, 80]), None)
    assert level is not None and level.faster and level.where == (1, 5)
    assert level.theory == pytest.approx(1) and level.strain == pytest.approx(1.6)


def test_what_falls_and_rises_again_is_found_too() -> None:
    verdict = judge(Rule("put CPU", constant), BASE, _rounds([100, 40, 40, 80]), None)
    assert verdict is not None and verdict.faster and verdict.factor < 1


def test_what_the_rounds_scatter_by_is_no_growth() -> None:
    verdict = judge(Rule("get CPU", constant), BASE, _rounds([50, 51, 50, 80], scatter=0.4), None)
    assert verdict is not None and not verdict.faster and verdict.strain == pytest.approx(1.6)


def test_thinner_frames_are_allowed_for_where_their_cost_is_known() -> None:
    rule = Rule("get CPU", constant, thinned=True)
    assert judge(rule, BASE, _rounds([50, 50, 50, 90]), None) is None
    verdict = judge(rule, BASE, _rounds([50, 50, 50, 90]), lambda nodes: 1.8 if nodes > 3 else 1.0)
    assert verdict is not None and not verdict.faster and verdict.theory == pytest.approx(1.8)


def test_too_little_is_not_judged() -> None:
    assert judge(Rule("get CPU", constant), BASE, [(1, [5.0]), (2, []), (3, [0.0])], None) is None


def test_work_of_copies_and_quorums() -> None:
    assert [theory.copies_of_nodes(n, BASE) for n in (1, 2, 3, 5, 8)] == [1, 2, 3, 3, 3]
    assert [theory.quorum_of_nodes(n, BASE) for n in (1, 2, 3, 5, 8)] == [1, 2, 2, 2, 2]
    assert [theory.quorum_of_copies(n, BASE) for n in (1, 2, 3, 4, 5)] == [1, 2, 2, 3, 3]


def test_memory_may_grow_until_what_is_bounded_is_full() -> None:
    known = [theory.kept_in_memory(keys, BASE) for keys in (0, 10**4, 10**6, 10**7)]
    assert known[0] == 0 and known[1] == 10**4 * (100 + 18 + 40 + 210 + 2)
    assert known[3] - known[2] == 2 * 9 * 10**6


def test_every_dimension_has_its_theory() -> None:
    assert RULES.keys() == SENTENCES.keys() == DIMENSIONS.keys()
    assert {rule.figure for rules in RULES.values() for rule in rules} == report.FIGURES.keys()


# --- the plan


@pytest.mark.parametrize("quick", [True, False])
def test_one_thing_at_a_time_varies_around_the_base_point(quick: bool) -> None:
    scoped = scope(quick=quick, keys_max=1_000_000)
    base, chosen = scoped.base, sites(scoped, DIMENSIONS)
    assert {cell.dimension for site in chosen for cell in site.cells} == DIMENSIONS.keys()
    for site in chosen:
        assert site.factor <= site.nodes
        for cell in site.cells:
            varied = [
                site.nodes != base.nodes or site.factor != base.factor,
                cell.data.keys != base.keys and cell.dimension != "values",  # large ones have fewer
                cell.data.value_bytes != base.value_bytes,
                cell.callers != base.callers and cell.dimension != "nodes-scaled",
            ]
            assert sum(varied) <= 1 or cell.dimension == "memory"
    assert max(scoped.nodes) == 8 and max(scoped.factors) == 5 and max(scoped.callers) == 1024
    assert (min(scoped.value_bytes), max(scoped.value_bytes)) == (16, 4 << 20)


def test_keys_go_as_far_as_was_asked() -> None:
    assert scope(quick=False, keys_max=10_000_000).keys == (10**4, 10**5, 10**6, 10**7)
    assert scope(quick=False, keys_max=300_000).keys == (10**4, 10**5, 300_000)
    for wrong in (10_000, 20_000_000):
        with pytest.raises(ValueError, match="keys go up to"):
            scope(quick=False, keys_max=wrong)


def test_only_what_was_named_is_measured() -> None:
    scoped = scope(quick=True, keys_max=100_000)
    assert [site.name for site in sites(scoped, ["callers", "nodes"])] == ["nodes-1", "nodes-3", "nodes-8", "callers"]
    with pytest.raises(ValueError, match="unknown: colours"):
        sites(scoped, ["colours"])


def test_a_disk_that_is_too_small_is_said_so_before() -> None:
    many = sites(scope(quick=False, keys_max=10_000_000), ["keys"])
    assert shortage(many, 1 << 40) == ""
    assert re.search(r"may need \d+\.\d GB of disk, 5\.0 GB are free: lower --keys-max", shortage(many, 5 * 10**9))
    assert shortage(sites(scope(quick=False, keys_max=10_000_000), ["memory"]), 2 << 30) == ""


def test_keys_have_one_length() -> None:
    assert len({len(data.key(n)) for data in (Data(16, 10), Data(4 << 20, 10)) for n in (0, 9_999_999)}) == 1


@pytest.mark.parametrize(("q", "value"), [(0.5, 3.0), (0.99, 4.0), (0.0, 1.0)])
def test_quantiles(q: float, value: float) -> None:
    assert quantile([1.0, 2.0, 3.0, 4.0], q) == value
    assert quantile([], q) == 0


# --- the report


def _results(put_us: float = 100.0) -> Results:
    """All dimensions, every figure as its theory says; puts of the last two cells cost what is given."""
    scoped = scope(quick=True, keys_max=100_000)
    dimensions: dict[str, list[Point]] = {}
    for site in sites(scoped, DIMENSIONS):
        for cell in site.cells:
            point = Point(cell.x, site.nodes, site.factor, cell.data.value_bytes, cell.callers, 10_000, 10_000)
            point.rss_bytes = [90_000_000 + 10 * cell.data.keys]
            point.filled = [Filled(2.0, 10_000, 80_000_000)]
            if cell.dimension != "memory":
                last = cell.dimension == "keys" and cell.x == 100_000
                point.get = [_sample(20.0), _sample(21.0)]
                point.put = [_sample(put_us if last else 100.0), _sample(put_us if last else 101.0)]
                point.disk_bytes = [300 * cell.data.keys]
                point.starts = [Start(1.0, 1.5, 1.0 + cell.data.keys / 50_000)]
                point.killed = [Start(1.0, 1.5)]
            dimensions.setdefault(cell.dimension, []).append(point)
    base = scoped.base
    return Results(
        ["2 x a processor", "4 GiB of memory"],
        "python -m bench.growth",
        "2026-01-01",
        0.5,
        True,
        0.4,
        base.nodes,
        base.factor,
        base.value_bytes,
        base.callers,
        base.keys,
        2,
        60.0,
        {name: dimensions[name] for name in DIMENSIONS},
    )


def _sample(cpu_us: float) -> Sample:
    return Sample(0.4, 1000, 2500.0, 1.0, 2.0, cpu_us - 5, 5.0, {"Overloaded": 3})


def test_a_report_shows_every_dimension_with_its_theory_and_what_is_faster() -> None:
    sound = report.text(_results())
    assert "No figure grows faster than its theory." in sound
    for dimension in DIMENSIONS:
        assert SENTENCES[dimension] in sound and f"growth/{dimension}.svg" in sound
    assert "6 Overloaded" not in sound and "12 Overloaded" in sound  # two rounds of gets and puts
    lines = sound.splitlines()
    assert all(a.count("|") == b.count("|") for a, b in pairwise(lines) if a.startswith("|") and b.startswith("|"))
    strained = _results(put_us=250.0)
    assert report.faster(strained) == ["keys: put CPU from 10,000 to 100,000, 2.49 times the theory"]
    assert "**faster**, 10,000 to 100,000" in report.text(strained)


def test_nodes_are_judged_with_the_frames_that_callers_tell_of() -> None:
    results = _results()
    assert {verdict.figure for verdict in report.verdicts(results, "nodes")} == {
        "get CPU",
        "put CPU",
        "get p99",
        "put p99",
    }
    del results.dimensions["callers"]
    assert report.verdicts(results, "nodes") == []


def test_a_report_goes_between_the_marks_of_its_document(tmp_path: Path) -> None:
    document = tmp_path / "growth.md"
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write(_results(), document)
    said = document.read_text()
    assert said.startswith("before\n") and said.endswith("\nafter\n") and "\nold\n" not in said
    report.write(_results(), document)
    assert document.read_text() == said
    document.write_text("no marks")
    with pytest.raises(ValueError, match="has no lines"):
        report.write(_results(), document)


def test_plots_have_every_figure_and_are_the_same_again(tmp_path: Path) -> None:
    results = _results()
    results.dimensions = {name: results.dimensions[name] for name in ("keys", "memory")}  # the others have one way
    written = plots.write(results, tmp_path)
    assert [path.stem for path in written] == ["keys", "memory"]
    series = _series(tmp_path / "keys.svg")
    assert {"keys-get-cpu", "keys-put-p99-theory", "keys-start--trees-built", "keys-disk-of-all-nodes"} <= series
    assert _series(tmp_path / "memory.svg") == {"memory-memory-of-a-node", "memory-memory-of-a-node-theory"}
    before = (tmp_path / "memory.svg").read_bytes()
    del results.dimensions["keys"]
    (again,) = plots.write(results, tmp_path)
    assert again.read_bytes() == before


def _series(path: Path) -> set[str]:
    groups = ElementTree.parse(path).getroot().iter("{http://www.w3.org/2000/svg}g")
    return {name for group in groups if (name := group.get("id", "")).startswith(f"{path.stem}-")}


def test_the_document_shows_the_kept_figures() -> None:
    results = msgspec.json.decode((DOCS / "growth" / "result.json").read_bytes(), type=Results)
    said = (DOCS / "growth.md").read_text()
    assert said.split(f"{report.BEGIN}\n")[1].split(f"\n{report.END}")[0] == report.text(results)
    shown = sorted(re.findall(r"\(growth/([\w-]+\.svg)\)", said))
    assert shown == sorted(path.name for path in (DOCS / "growth").glob("*.svg"))


# --- a run


async def test_a_small_run_measures_every_point(tmp_path: Path) -> None:
    data = Data(50, 300)
    kept = Site(
        "kept", 2, 2, (data,), (Cell("callers", 1, data, 1), Cell("callers", 4, data, 4)), "rocksdb", starts=True
    )
    forgets = Site("forgets", 1, 1, (data,), (Cell("memory", 300, data, 1),), "memory")
    scoped = replace(scope(quick=True, keys_max=100_000), rounds=1, seconds=0.05)
    said: list[str] = []
    results = await run(scoped, [kept, forgets], tmp_path, 600.0, said.append)
    assert results.rounds == 1 and [point.x for point in results.dimensions["callers"]] == [1, 4]
    for point in results.dimensions["callers"]:
        for sample in [*point.get, *point.put]:
            assert sample.operations > 0 and not sample.refused and sample.node_cpu_us >= 0
        assert len(point.get) == len(point.put) == len(point.starts) == len(point.killed) == 1
        assert all(start.listens_s <= start.ready_s <= (start.trees_s or 0) for start in point.starts)
        assert min(point.disk_bytes) > data.bytes
    (memory,) = results.dimensions["memory"]
    assert len(memory.rss_bytes) == len(memory.filled) == 1 and not memory.get
    assert any("300 keys stored" in each for each in said)
    assert list(tmp_path.iterdir()) == []  # nothing is left
