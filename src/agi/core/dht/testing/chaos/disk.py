"""The disks of nodes: one that is small and can be filled to the last byte, and such as lose power.

A disk is mounted in the run's own mount namespace, so that it ends with the run; the data folder lies below the mount,
so that the node can set it aside. Without loop mounts a disk is a tmpfs, which can be filled. With them it is an ext4
in a file, which can also lose power: `xfs_io -x -c shutdown` ends it where it stands. Without `-f` nothing is flushed
first, neither the pages that were only written nor what the journal still holds in memory, so what was not synced is
gone. It is then mounted anew, and the journal replayed.

That the file system forgets is tried each time: a run on such disks first writes two files, syncs one of them, cuts the
power, and finds the one and not the other (`obstacle`).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from agi.core.dht.errors import DHTError
from agi.core.dht.testing.chaos.network import command

SMALL_MB = 256
"""Room for what a node writes in a run, and for the 64 MiB to which its log may grow."""
LARGE_MB = 2048
"""Of a file with holes: it takes what is written."""
TRIAL_MB = 64
JOURNAL_MB = 16
BLOCKS_BYTES = (16 << 20, 1 << 20, 64 << 10, 4 << 10)
"""Of the ballast: from coarse to fine."""
UNMOUNT_TRIES = 50
UNMOUNT_PAUSE_S = 0.1
"""A process that was killed lets go of its files when the kernel comes to it."""
TOOLS = {"xfs_io": "xfsprogs", "mkfs.ext4": "e2fsprogs"}
"""What a power loss takes, and the Debian package that has it."""


async def open_platters(folder: Path) -> None:
    """What the files of ext4 disks lie in: memory, so that their speed is not that of two file systems, one on the
    other, and none of it is on the machine's disk. It ends with the run."""
    await asyncio.to_thread(folder.mkdir, exist_ok=True)
    await command("mount", "-t", "tmpfs", "tmpfs", str(folder))


async def close_platters(folder: Path) -> None:
    await command("umount", "--lazy", str(folder))


class Disk:
    """
    Args:
        folder: where it is mounted; made if need be.
        size_mb: how large it is.
        image: the file that an ext4 is made in; None for a tmpfs, which cannot lose power.
    """

    def __init__(self, folder: Path, size_mb: int, image: Path | None) -> None:
        self.folder = folder
        self.full = False
        self.freed_s = float("-inf")
        """When it was freed last, by the loop's clock."""
        self._size_mb = size_mb
        self._image = image
        self._ballast = folder / "ballast"
        self._busy = asyncio.Lock()
        self._mounted = False

    async def open(self) -> None:
        self.folder.mkdir(exist_ok=True)
        if self._image is not None:
            with self._image.open("wb") as file:
                file.truncate(self._size_mb << 20)
            await command("mkfs.ext4", "-q", "-F", "-m", "0", "-J", f"size={JOURNAL_MB}", str(self._image))
        await _whole(self._mount())

    async def close(self) -> None:
        """Whatever is left of it is gone; a file system that somebody still uses ends with its last user."""
        if self._mounted:
            await command("umount", "--lazy", str(self.folder))
            self._mounted = False
        if self._image is not None:
            self._image.unlink(missing_ok=True)

    async def fill(self) -> None:
        async with self._busy:
            self.full = True
            await asyncio.to_thread(self._fill)

    async def free(self) -> None:
        async with self._busy:
            await asyncio.to_thread(self._unload)
            self.full, self.freed_s = False, asyncio.get_running_loop().time()

    def was_full_since(self, then_s: float) -> bool:
        """At any time from then, by the loop's clock, until now."""
        return self.full or self.freed_s >= then_s

    async def lose_power(self, end: Callable[[], Awaitable[None]]) -> None:
        """Everything that was not synced is gone; `end` then ends the processes that have files open there. Returns
        with the file system mounted again. Raises DHTError where it cannot be."""
        assert self._image is not None, "a tmpfs cannot lose power"

        async def lose() -> None:
            await command("xfs_io", "-x", "-c", "shutdown", str(self.folder))
            await end()
            await self._unmount()
            await self._mount()

        async with self._busy:
            await _whole(lose())

    async def _mount(self) -> None:
        if self._image is None:
            await command("mount", "-t", "tmpfs", "-o", f"size={self._size_mb}m", "tmpfs", str(self.folder))
        else:
            await command("mount", "-o", "loop,discard", str(self._image), str(self.folder))
        self._mounted = True

    async def _unmount(self) -> None:
        for left in reversed(range(UNMOUNT_TRIES)):
            try:
                await command("umount", str(self.folder))
            except DHTError as error:
                if not left or "busy" not in error.message:
                    raise
                await asyncio.sleep(UNMOUNT_PAUSE_S)
            else:
                self._mounted = False
                return

    def _fill(self) -> None:
        file = os.open(self._ballast, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            size = os.fstat(file).st_size
            for block in BLOCKS_BYTES:
                with contextlib.suppress(_Full):
                    while size < 2 * self._size_mb << 20:
                        size += _grow(file, size, block)
        finally:
            os.close(file)

    def _unload(self) -> None:
        """For good: a power loss may not bring the ballast back."""
        self._ballast.unlink(missing_ok=True)
        file = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


async def _whole(steps: Coroutine[Any, Any, None]) -> None:
    """A cancellation waits for its end: nothing stays half mounted."""
    task = asyncio.create_task(steps)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


class _Full(Exception):
    """No block of that size is left."""


def _grow(file: int, size: int, block: int) -> int:
    try:
        os.posix_fallocate(file, size, block)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise _Full from error
    return block


async def obstacle(folder: Path) -> str:
    """Why no disk here can lose power, for people; empty if one can. To be asked in the run's own namespaces."""
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        packages = " ".join(sorted({TOOLS[tool] for tool in absent}))
        return f"{', '.join(absent)} not found (apt-get install {packages})"
    disk = Disk(folder / "trial", TRIAL_MB, folder / "trial.ext4")
    synced, written = disk.folder / "synced", disk.folder / "written"

    async def nobody() -> None:
        """Nothing runs there."""

    try:
        await disk.open()
        with synced.open("wb") as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
        written.write_bytes(b"x")
        await disk.lose_power(nobody)
        kept = [path.name for path in (synced, written) if path.exists()]
    except DHTError as error:
        return f"no ext4 can be mounted from a file and shut down here: {error.message}"
    finally:
        await disk.close()
    if kept != ["synced"]:
        return f"of a file that was synced and one that was not, a power loss here leaves {kept or 'none'}"
    return ""
