"""Folders: nothing is read or written outside them, whatever keys and names there are."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agi.core.dht.cli import files
from agi.core.dht.cli.files import FolderWriter, Refused
from agi.core.dht.errors import InvalidRequest, InvalidValue


def _tree(folder: Path) -> dict[str, bytes]:
    found = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


names = st.lists(st.sampled_from(["a", "b", ".", "..", "/", "é", "\0", "~", "\n", "\\", "x" * 90]), max_size=8)


@settings(max_examples=200, deadline=None)
@given(keys=st.lists(names.map("".join), max_size=12))
def test_a_key_becomes_its_file_or_is_refused_and_nothing_else_changes(keys: list[str]) -> None:
    with TemporaryDirectory() as around:
        folder = Path(around, "in", "folder")
        with contextlib.closing(FolderWriter(folder, overwrite=False)) as writer:
            written: dict[str, bytes] = {}
            for number, key in enumerate(keys):
                try:
                    writer.write(key, b"%d" % number)
                except Refused:
                    continue
                written[key] = b"%d" % number
        found = {each.name: files.read_value(each.path) for each in files.walk(folder)}
        assert found == written
        assert _tree(Path(around)) == {f"in/folder/{name}": value for name, value in written.items()}
        plain = [key for key in keys if key and set(key) <= {"a", "b", "é"}]
        assert set(written) >= {key for key in plain if not any(other.startswith(f"{key}/") for other in keys)}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "nothing is left of the key"),
        ("/etc/passwd", "an empty path segment"),
        ("a//b", "an empty path segment"),
        ("a/", "an empty path segment"),
        ("../up", "a path segment . or .."),
        ("a/../../up", "a path segment . or .."),
        ("./a", "a path segment . or .."),
        ("..", "a path segment . or .."),
        ("a\0b", "a NUL character"),
        ("n" * 256, "too long for this file system"),
        ("d/" + "é" * 128, "too long for this file system"),
        ("file/below", "is a file or a link already"),
        ("file/below/that", "is a file or a link already"),
        ("folder", "is there already"),
        ("file", "is there already"),
    ],
)
def test_what_is_refused_and_why(tmp_path: Path, name: str, why: str) -> None:
    folder = tmp_path / "out"
    with contextlib.closing(FolderWriter(folder, overwrite=False)) as writer:
        writer.write("file", b"1")
        writer.write("folder/file", b"2")
        with pytest.raises(Refused, match=why):
            writer.write(name, b"x")
        writer.write("folder/next", b"3")
    assert _tree(tmp_path) == {"out/file": b"1", "out/folder/file": b"2", "out/folder/next": b"3"}


def test_links_in_the_folder_are_not_followed(tmp_path: Path) -> None:
    folder, outside = tmp_path / "out", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (outside / "precious").write_bytes(b"1")
    (folder / "way").symlink_to(outside)
    (folder / "file").symlink_to(outside / "precious")
    (folder / "old").write_bytes(b"old")
    with pytest.raises(InvalidRequest, match="not empty"):
        FolderWriter(folder, overwrite=False)
    with contextlib.closing(FolderWriter(folder, overwrite=True)) as writer:
        with pytest.raises(Refused, match="a file or a link"):
            writer.write("way/precious", b"x")
        writer.write("file", b"2")  # takes the place of the link itself
        writer.write("old", b"3")
        with pytest.raises(Refused):
            writer.write("old/deep", b"x")
    assert _tree(outside) == {"precious": b"1"} and _tree(folder) == {"file": b"2", "old": b"3"}
    with pytest.raises(InvalidRequest, match=r"old: File exists|old: Not a directory"):
        FolderWriter(folder / "old", overwrite=True)


def test_an_error_of_the_disk_is_no_refusal_and_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = FolderWriter(tmp_path / "out", overwrite=False)
    real = os.open

    def full(path: str, *args: int, **kwargs: int) -> int:
        number = real(path, *args, **kwargs)
        if path == "full":
            os.close(number)
            return real("/dev/full", os.O_WRONLY)
        return number

    monkeypatch.setattr(os, "open", full)
    with contextlib.closing(writer), pytest.raises(OSError, match="No space left"):
        writer.write("full", b"x")
    assert _tree(tmp_path) == {}


def test_open_folders_are_closed_as_keys_move_on(tmp_path: Path) -> None:
    before = _open_files()
    with contextlib.closing(FolderWriter(tmp_path / "out", overwrite=False)) as writer:
        for i in range(300):
            writer.write(f"d{i}/e/f", b"")
        assert _open_files() <= before + 3
        writer.write("/".join("d" * 400), b"")
    assert _open_files() == before


def test_a_walk_finds_files_in_order_and_names_what_it_leaves_out(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "b" / "deep").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret").write_bytes(b"s")
    for name in ("a.txt", "b/deep/c.txt", "b/x.bin", "c"):
        (root / name).write_bytes(name.encode())
    (root / "l-dir").symlink_to(root / "b")
    (root / "l-in").symlink_to("b/x.bin")
    (root / "l-out").symlink_to(outside / "secret")
    (root / "l-up").symlink_to("../outside/secret")
    (root / "l-gone").symlink_to("nowhere")
    (root / "l-loop").symlink_to("l-loop")
    os.mkfifo(root / "pipe")
    found = list(files.walk(root))
    assert [each.name for each in found] == [
        "a.txt", "b/deep/c.txt", "b/x.bin", "c", "l-dir", "l-gone", "l-in", "l-loop", "l-out", "l-up", "pipe"
    ]  # fmt: skip
    skipped = {each.name: each.skipped for each in found if each.skipped}
    assert set(skipped) == {"l-dir", "l-gone", "l-loop", "l-out", "l-up", "pipe"}
    assert skipped["l-out"] == skipped["l-up"] == "a link out of the folder"
    read = {each.name: files.read_value(each.path, follow=False) for each in found if not each.skipped}
    assert read == {
        "a.txt": b"a.txt",
        "b/deep/c.txt": b"b/deep/c.txt",
        "b/x.bin": b"b/x.bin",
        "c": b"c",
        "l-in": b"b/x.bin",
    }
    assert [each.name for each in files.walk(root, "*.txt")] == ["a.txt", "b/deep/c.txt"]
    assert [each.name for each in files.walk(root, "b/*")] == ["b/deep/c.txt", "b/x.bin"]
    link = tmp_path / "to-root"
    link.symlink_to(root)
    assert [each.name for each in files.walk(link)] == [each.name for each in found]
    with pytest.raises(InvalidRequest, match="nowhere: No such file"):
        list(files.walk(tmp_path / "nowhere"))


def test_a_folder_that_cannot_be_read_is_an_error_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "open").write_bytes(b"")
    real = os.scandir

    def denied(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", denied)
    found = list(files.walk(tmp_path))
    assert [(each.name, each.error) for each in found] == [("closed", "Permission denied"), ("open", "")]


def test_reading_is_bounded_and_replacing_is_all_or_nothing(tmp_path: Path) -> None:
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate((8 << 20) + 1)
    with pytest.raises(InvalidValue, match="this file has more"):
        files.read_value(big)
    with pytest.raises(InvalidRequest, match="Is a directory"):
        files.read_value(tmp_path)
    target = tmp_path / "target"
    target.write_bytes(b"old")
    with pytest.raises(RuntimeError), files.replacing(target) as file:
        file.write(b"half")
        raise RuntimeError
    assert _tree(tmp_path).keys() == {"big", "target"} and target.read_bytes() == b"old"
    with pytest.raises(OSError, match="No space left"), files.replacing(Path("/dev/full")) as file:
        file.write(b"x")
