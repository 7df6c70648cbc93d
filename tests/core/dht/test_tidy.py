"""The house's style, where no linter knows it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SOURCES = sorted(path for path in (ROOT / "src").rglob("*.py") if "_pb2" not in path.name)
LINES_MAX = 700
"""A file answers one question; from 500 lines on ask whether it is two."""
WAIVER = re.compile(r"#\s*(?:noqa|type: ignore)(?:\[[\w,-]+\]|:\s*[A-Z]+[0-9]+(?:\s*,\s*[A-Z]+[0-9]+)*)?\s*(#.*)?$")


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(params=SOURCES, ids=_name)
def source(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def _lines(pattern: str, path: Path) -> list[str]:
    return [
        f"{_name(path)}:{number}"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]


def test_a_module_says_what_it_does(source: Path) -> None:
    text = source.read_text()
    assert not text or ast.get_docstring(ast.parse(text)), "a module opens with what it does"


def test_a_file_is_not_two(source: Path) -> None:
    assert len(source.read_text().splitlines()) <= LINES_MAX


def test_nothing_is_left_for_later(source: Path) -> None:
    assert _lines(r"\b(TODO|FIXME|XXX|HACK)\b", source) == []


def test_a_waiver_has_its_reason(source: Path) -> None:
    bare = [
        f"{_name(source)}:{number}"
        for number, line in enumerate(source.read_text().splitlines(), 1)
        if (found := WAIVER.search(line)) and not found[1]
    ]
    assert bare == []


def test_no_error_is_swallowed(source: Path) -> None:
    silent = [node.lineno for node in _handlers(source) if all(isinstance(part, ast.Pass) for part in node.body)]
    assert silent == []


def _handlers(path: Path) -> Iterator[ast.ExceptHandler]:
    return (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ExceptHandler))


def test_protocol_cores_do_not_await() -> None:
    for path in SOURCES:
        if path.parent.name == "protocol":
            tree = ast.parse(path.read_text())
            assert not [n for n in ast.walk(tree) if isinstance(n, ast.AsyncFunctionDef | ast.Await)], _name(path)


def test_no_task_is_left_without_an_owner(source: Path) -> None:
    """`create_task` as a statement: nobody holds the task, and its death goes unnoticed."""
    lost = [
        node.lineno
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Attribute)
        and node.value.func.attr in ("create_task", "ensure_future")
        and not (isinstance(node.value.func.value, ast.Name) and node.value.func.value.id == "group")
    ]
    assert lost == [], "a TaskGroup named `group` owns its tasks; all else has to be held"
