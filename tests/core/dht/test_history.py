"""Histories: what is recorded comes back from a file, and what no history can be is refused and changes nothing."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agi.core.dht.testing.history import Function, History, MalformedHistory, Outcome


def test_the_example_of_the_documentation_runs() -> None:
    text = (Path(__file__).parents[3] / "docs" / "histories.md").read_text()
    example = text.partition("```python\n")[2].partition("```")[0]
    done = subprocess.run([sys.executable, "-W", "error", "-c", example], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("linearizable (1 objects, 20 operations, "), done


def ticking() -> History:
    return History(itertools.count(10, 5).__next__)


def test_the_lines_are_those_of_the_documented_format() -> None:
    history = ticking()
    write = history.invoke("c1", Function.WRITE, "cart", {"items": [1, 2.5, None]})
    add = history.invoke(2, "incr", "hits", 3)
    write.ok()
    add.ok(7)
    swap = history.invoke(2, "cas", "cart", [None, True])
    history.invoke("c1", "lock", "door").info()
    swap.fail()
    history.invoke("c1", "read", "cart")
    assert list(history.lines()) == [
        '{"process":"c1","type":"invoke","f":"write","key":"cart","value":{"items":[1,2.5,null]},"time":10}',
        '{"process":2,"type":"invoke","f":"incr","key":"hits","value":3,"time":15}',
        '{"process":"c1","type":"ok","f":"write","key":"cart","value":null,"time":20}',
        '{"process":2,"type":"ok","f":"incr","key":"hits","value":7,"time":25}',
        '{"process":2,"type":"invoke","f":"cas","key":"cart","value":[null,true],"time":30}',
        '{"process":"c1","type":"invoke","f":"lock","key":"door","value":null,"time":35}',
        '{"process":"c1","type":"info","f":"lock","key":"door","value":null,"time":40}',
        '{"process":2,"type":"fail","f":"cas","key":"cart","value":null,"time":45}',
        '{"process":"c1","type":"invoke","f":"read","key":"cart","value":null,"time":50}',
    ]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
INVOKED: dict[str, st.SearchStrategy[Any]] = {
    "read": st.none(),
    "write": JSON,
    "delete": st.none(),
    "cas": st.lists(JSON, min_size=2, max_size=2),
    "incr": st.integers(),
    "fenced_write": st.tuples(st.integers(), JSON).map(list),
    "lock": st.none(),
    "unlock": st.integers(),
}
RESULTS: dict[str, st.SearchStrategy[Any]] = {
    "read": JSON,
    "cas": st.sampled_from((None, True, False)),
    "incr": st.integers(),
    "fenced_write": st.sampled_from((None, True, False)),
    "lock": st.integers(),
}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_history_comes_back_from_its_lines(data: st.DataObject) -> None:
    history = History(itertools.accumulate(itertools.repeat(data.draw(st.integers(0, 10)))).__next__)
    running: dict[int | str, Any] = {}
    for _ in range(data.draw(st.integers(0, 12))):
        process = data.draw(st.sampled_from((0, 1)) | st.sampled_from(("1", "ü\ud800")))
        if process in running:
            handle = running.pop(process)
            end = data.draw(st.sampled_from(("ok", "fail", "info")))
            if end == "ok":
                handle.ok(data.draw(RESULTS.get(handle.operation.f, st.none())))
            else:
                getattr(handle, end)()
        else:
            f = data.draw(st.sampled_from(list(Function)))
            running[process] = history.invoke(process, f, data.draw(st.text(max_size=3)), data.draw(INVOKED[f]))
    again = History.parse(history.lines())
    assert again.operations == history.operations
    assert list(again.lines()) == list(history.lines())


def test_a_file_comes_back_and_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    history = ticking()
    history.invoke("a", "write", "k", "line\nbreak\u2028and more").ok()
    history.write(path)
    assert path.read_bytes().count(b"\n") == 2
    assert History.read(path).operations == history.operations
    history.invoke("a", "read", "k").ok("x")
    history.write(path)
    assert len(History.read(path)) == 2
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "run.jsonl.part").mkdir()
    with pytest.raises(OSError):
        ticking().write(path)
    assert len(History.read(path)) == 2
    with pytest.raises(OSError):
        History.read(tmp_path / "missing")


def test_no_events_are_a_history(tmp_path: Path) -> None:
    ticking().write(tmp_path / "none.jsonl")
    assert History.read(tmp_path / "none.jsonl").operations == []


def test_what_others_add_is_ignored_and_an_answer_may_repeat_the_question() -> None:
    (op,) = History.parse(
        [
            b'{"process": 1, "type": "invoke", "f": "cas", "key": "k", "value": [1, 2], "time": 5, "index": 0}',
            '{"process": 1, "type": "ok", "f": "cas", "key": "k", "value": [1, 2], "time": 5, "node": "n1"}',
        ]
    ).operations
    assert (op.outcome, op.result, op.invoked, op.returned) == (Outcome.OK, [1, 2], 0, 1)
    (op,) = History.parse([line("invoke", "read", None), line("info", "read", "timed out")]).operations
    assert (op.outcome, op.result) == (Outcome.INFO, None)


def line(kind: str = "invoke", f: object = "write", value: object = 1, **other: Any) -> str:
    return json.dumps({"process": 1, "type": kind, "f": f, "key": "k", "value": value, "time": 7, **other})


MALFORMED = [
    ("", "not JSON"),
    ("{", "not JSON"),
    (b'{"process": "\xff"}', "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("[]", "a JSON object"),
    ("{}", "without process, type, f, key, value, time"),
    (line().replace('"value": 1, ', ""), "without value"),
    (line(value=float("nan")), "NaN is not JSON"),
    (line().replace('"value": 1', '"value": 1, "value": 2'), "stands twice"),
    (line().replace("1,", '{"x": 1, "x": 2},', 1), "stands twice"),
    (line("begin"), "no type: 'begin'"),
    (line([]), "no type: []"),  # type: ignore[arg-type]  # on purpose
    (line(f="append"), "no f: 'append'"),
    (line(f=["write"]), "no f"),
    (line(process=None), "a process is"),
    (line(process=True), "a process is"),
    (line(process=[1]), "a process is"),
    (line(key=3), "a key is a string"),
    (line(time=1.5), "a time is an int"),
    (line(time=True), "a time is an int"),
    (line(time=-1), "a time is an int"),
    (line(time=4), "time went back, from 5 to 4 ns"),
    (line(process=0), "in the midst of #0"),
    (line("ok"), "process 1 has begun nothing"),
    (line("ok", process=[0]), "has begun nothing"),
    (line("ok", process=0), "began read of 'k', and ends 'write' of 'k'"),
    (line("ok", "read", key="other", process=0), "and ends 'read' of 'other'"),
    (line(f="read", value=1), "read is not invoked with 1"),
    (line(f="delete", value=1), "delete is not invoked with 1"),
    (line(f="lock", value=1), "lock is not invoked with 1"),
    (line(f="unlock", value=None), "unlock is not invoked with None"),
    (line(f="unlock", value=True), "unlock is not invoked with True"),
    (line(f="incr", value=1.0), "incr is not invoked with 1.0"),
    (line(f="cas", value=[1]), "cas is not invoked with"),
    (line(f="cas", value=1), "cas is not invoked with"),
    (line(f="fenced_write", value=["1", 2]), "fenced_write is not invoked with"),
]


@pytest.mark.parametrize(("bad", "problem"), MALFORMED, ids=lambda part: str(part)[:40])
def test_a_malformed_line_is_told_by_file_and_line(bad: str | bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    first = line(f="read", value=None, process=0, time=5).encode()
    path.write_bytes(first + b"\n" + (bad if isinstance(bad, bytes) else bad.encode()) + b"\n")
    with pytest.raises(MalformedHistory) as caught:
        History.read(path)
    assert problem in caught.value.problem
    assert (caught.value.file, caught.value.line) == (str(path), 2)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert isinstance(caught.value, ValueError)


RESULTS_REFUSED = [
    ("write", 1, 2),
    ("write", 1, False),
    ("delete", None, False),
    ("cas", [1, 2], [1, 3]),
    ("cas", [1, 2], 0),
    ("incr", 1, None),
    ("incr", 1, True),
    ("fenced_write", [1, 2], 1),
    ("lock", None, None),
    ("lock", None, "7"),
    ("unlock", 7, 8),
    ("unlock", 1, False),
    ("read", None, {1, 2}),
    ("read", None, b"bytes"),
    ("read", None, float("inf")),
    ("read", None, {1: 2}),
]


@pytest.mark.parametrize(("f", "value", "result"), RESULTS_REFUSED)
def test_a_result_that_cannot_be_is_refused_and_changes_nothing(f: str, value: Any, result: Any) -> None:
    history = ticking()
    handle = history.invoke("a", f, "k", value)
    before = list(history.lines())
    with pytest.raises(MalformedHistory) as caught:
        handle.ok(result)
    assert (caught.value.file, caught.value.line) == ("", 0)
    assert list(history.lines()) == before
    handle.info()
    assert handle.operation.outcome is Outcome.INFO


def test_a_call_that_cannot_be_is_refused_and_changes_nothing() -> None:
    history = ticking()
    handle = history.invoke("a", "write", "k", 1)
    endless: list[Any] = []
    endless.append(endless)
    before = list(history.lines())
    for process, f, value, problem in [
        ("a", "read", None, "process a is in the midst of #0"),
        ("b", "read", 1, "read is not invoked with 1"),
        ("b", "append", 1, "no f"),
        ("b", "write", endless, "nested too deeply"),
        ("b", "write", object(), "not a value of JSON"),
        (2.5, "write", 1, "a process is"),
    ]:
        with pytest.raises(MalformedHistory, match=problem):
            history.invoke(process, f, "k", value)  # type: ignore[arg-type]  # on purpose
    assert list(history.lines()) == before
    handle.ok()
    for again in (handle.ok, handle.fail, handle.info):
        with pytest.raises(MalformedHistory, match="completed already"):
            again()
    assert len(list(history.lines())) == 2
    history.invoke("a", "read", "k").ok(1)


def test_a_clock_that_goes_back_is_noticed() -> None:
    times = iter((5, 4, 5, 3, 6))
    history = History(times.__next__)
    handle = history.invoke("a", "read", "k")
    with pytest.raises(MalformedHistory, match="time went back, from 5 to 4 ns"):
        handle.ok(1)
    handle.ok(1)
    with pytest.raises(MalformedHistory, match="time went back"):
        history.invoke("a", "read", "k")
    history.invoke("a", "read", "k")
    assert [(op.invoked_ns, op.returned_ns) for op in history.operations] == [(5, 5), (6, None)]


def test_a_value_that_is_changed_later_stays_as_it_was() -> None:
    history = ticking()
    value: list[Any] = [1, {"x": [2]}]
    handle = history.invoke("a", "write", "k", value)
    value[1]["x"].append(3)
    value.append(4)
    handle.ok()
    assert history.operations[0].value == [1, {"x": [2]}]


def test_an_operation_tells_of_itself() -> None:
    history = History(itertools.count(1_000_000, 500_000).__next__)
    history.invoke("a", "incr", "k", 1).ok(1)
    history.invoke("a", "write", "k", "x").ok(True)
    history.invoke("a", "cas", "k", [1, 2]).ok(False)
    history.invoke("a", "read", "k").ok(None)
    history.invoke("a", "read", "k")
    assert [str(op) for op in history.operations] == [
        "#0 process a: incr 1 -> 1, ok [1.000000, 1.500000] ms",
        '#1 process a: write "x", ok [2.000000, 2.500000] ms',
        "#2 process a: cas [1, 2] -> false, ok [3.000000, 3.500000] ms",
        "#3 process a: read -> null, ok [4.000000, 4.500000] ms",
        "#4 process a: read, pending [5.000000, ] ms",
    ]
