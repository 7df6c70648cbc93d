"""Files of a user: read within the value limit, replaced in one step, walked and written without leaving a folder.

Names come from keys and from disks that others fill, so nothing here trusts one: reading follows no link out of the
folder, and writing opens each folder of a path by itself, from its parent's descriptor, without following links.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import os
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from agi.core.dht.cli.output import printable
from agi.core.dht.errors import InvalidRequest, InvalidValue
from agi.core.dht.types import VALUE_BYTES_MAX

_OF_THE_NAME = frozenset(
    {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.EINVAL, errno.EILSEQ}
)
"""Errors that one name meets; with any other (disk full, no permission) the rest would fail too."""


def failure(path: object, error: OSError) -> InvalidRequest:
    """The error of a file that the caller named."""
    return InvalidRequest(f"{printable(str(path), keep_backslash=True)}: {error.strerror or error}")


def read_value(path: Path, *, follow: bool = True) -> bytes:
    """What a file holds. Raises InvalidValue where it is over the value limit, InvalidRequest where it cannot be
    read."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
        if stat.S_ISDIR(os.fstat(number).st_mode):
            os.close(number)
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with open(number, "rb") as file:  # noqa: PTH123  # Path has no way to open a descriptor
            data = file.read(VALUE_BYTES_MAX + 1)
    except OSError as error:
        raise failure(path, error) from None
    if len(data) > VALUE_BYTES_MAX:
        raise InvalidValue(f"{path}: a value has at most {VALUE_BYTES_MAX} bytes; this file has more")
    return data


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` at the end, in one step; after an error nothing has changed.

    A link is followed; a device or pipe is written to as it is. Raises InvalidRequest where it cannot be written.
    """
    target = Path(os.path.realpath(path))
    try:
        special = target.exists() and not target.is_file()
        part = target if special else target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}")
        file = part.open("wb" if special else "xb")
    except OSError as error:
        raise failure(path, error) from None
    try:
        with file:
            yield file
        if not special:
            part.replace(target)
    except BaseException as error:
        if not special:
            with contextlib.suppress(OSError):
                part.unlink()
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


@dataclass(frozen=True, slots=True)
class Found:
    """A file beneath a folder, by its relative POSIX path; `skipped` or `error` say why it is not to be read."""

    name: str
    path: Path
    skipped: str = ""
    error: str = ""


def walk(folder: Path, pattern: str | None = None) -> Iterator[Found]:
    """Every file beneath a folder, in the order of names. Links to files inside it are followed, others are skipped.

    `pattern`: as a shell's; matched with the file's name, or with the relative path where it has a slash.
    Raises InvalidRequest where the folder itself cannot be read.
    """
    try:
        root = folder.resolve(strict=True)
        first = sorted(os.scandir(folder), key=lambda entry: entry.name, reverse=True)
    except OSError as error:
        raise failure(folder, error) from None
    left = [("", entry) for entry in first]
    while left:
        parent, entry = left.pop()
        name = f"{parent}{entry.name}"
        path = Path(entry.path)
        try:
            if entry.is_dir(follow_symlinks=False):
                inside = sorted(os.scandir(entry.path), key=lambda each: each.name, reverse=True)
                left += [(f"{name}/", each) for each in inside]
                continue
        except OSError as error:
            yield Found(name, path, error=error.strerror or str(error))
            continue
        if pattern is not None and not fnmatch.fnmatchcase(name if "/" in pattern else entry.name, pattern):
            continue
        yield _file(name, path, root, entry)


def _file(name: str, path: Path, root: Path, entry: os.DirEntry[str]) -> Found:
    try:
        if entry.is_symlink():
            target = path.resolve(strict=True)
            if not target.is_relative_to(root):
                return Found(name, path, skipped="a link out of the folder")
            if not target.is_file():
                return Found(name, path, skipped="a link to what is no file")
            return Found(name, target)
        if not entry.is_file(follow_symlinks=False):
            return Found(name, path, skipped="no regular file")
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        why = error.strerror if isinstance(error, OSError) else None
        return Found(name, path, skipped=f"a link that leads nowhere ({why or 'too many levels of links'})")
    return Found(name, path)


class Refused(Exception):
    """A key that cannot be the path of a file here; says why."""


class FolderWriter:
    """Writes files beneath a folder, never outside it.

    A path that is no plain one (empty, `.` or `..` segments, a leading or trailing slash, NUL) is refused, and so is
    one whose place is taken: a file where it needs a folder, a folder where it is to be a file, an equal name on a
    file system that does not tell them apart.

    Args:
        overwrite: the folder need not be empty, and files in it are replaced.

    Raises InvalidRequest where the folder cannot be used.
    """

    def __init__(self, folder: Path, *, overwrite: bool) -> None:
        self._overwrite = overwrite
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._open = [os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)]
            taken = bool(os.listdir(self._open[0]))  # noqa: PTH208  # of the descriptor
        except OSError as error:
            raise failure(folder, error) from None
        self._names: list[str] = []  # of the open folders below the first
        if taken and not overwrite:
            self.close()
            raise InvalidRequest(f"{folder}: the folder is not empty: --overwrite writes into it all the same")

    def close(self) -> None:
        while self._open:
            os.close(self._open.pop())

    def write(self, name: str, data: bytes) -> None:
        """Raises Refused; OSError where the disk is at fault."""
        *folders, last = _segments(name)
        try:
            self._enter(folders)
            parent = self._open[-1]
            if self._overwrite:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(last, dir_fd=parent)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            number = os.open(last, flags, 0o666, dir_fd=parent)
        except OSError as error:
            if error.errno in _OF_THE_NAME:
                raise Refused(_why(error)) from None
            raise
        try:
            with open(number, "wb") as file:  # noqa: PTH123  # Path has no way to open a descriptor
                file.write(data)
        except BaseException:
            os.unlink(last, dir_fd=parent)
            raise

    def _enter(self, folders: list[str]) -> None:
        """Makes the last of `_open` this folder, keeping what is open on the way to it: keys come in order."""
        same = 0
        while same < len(folders) and same < len(self._names) and folders[same] == self._names[same]:
            same += 1
        while len(self._names) > same:
            self._names.pop()
            os.close(self._open.pop())
        for name in folders[same:]:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, dir_fd=self._open[-1])
            self._open.append(
                os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._open[-1])
            )
            self._names.append(name)


def _segments(name: str) -> list[str]:
    if not name:
        raise Refused("nothing is left of the key without the prefix")
    segments = name.split("/")
    if "" in segments:
        raise Refused("an empty path segment")
    if "." in segments or ".." in segments:
        raise Refused("a path segment . or ..")
    if "\0" in name:
        raise Refused("a NUL character")
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        raise Refused("the locale's encoding lacks one of its characters") from None
    return segments


def _why(error: OSError) -> str:
    if error.errno == errno.ENAMETOOLONG:
        return "a path segment is too long for this file system"
    if error.errno in (errno.ENOTDIR, errno.ELOOP):
        return "one of its folders is a file or a link already"
    if error.errno in (errno.EISDIR, errno.EEXIST):
        return "a folder or file of this name is there already"
    return error.strerror or str(error)
