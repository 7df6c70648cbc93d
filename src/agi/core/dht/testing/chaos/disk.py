"""A small disk of one node, which can be filled to the last byte and freed again.

A tmpfs in the run's own mount namespace: it ends with the run. Its data folder lies below the mount, so that the node
can set it aside.
"""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

from agi.core.dht.testing.chaos.network import command

SIZE_MB = 256
"""Room for what a node writes in a run, and for the 64 MiB to which its log may grow."""
BLOCK_BYTES = 1 << 20


class SmallDisk:
    """
    Args:
        folder: where it is mounted; made if need be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.full = False
        self.freed_s = float("-inf")
        """When it was freed last, by the loop's clock."""
        self._ballast = folder / "ballast"

    async def open(self) -> None:
        self.folder.mkdir(exist_ok=True)
        await command("mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m", "tmpfs", str(self.folder))

    async def close(self) -> None:
        await command("umount", "--lazy", str(self.folder))

    async def fill(self) -> None:
        self.full = True
        await asyncio.to_thread(self._fill)

    async def free(self) -> None:
        await asyncio.to_thread(self._ballast.unlink, missing_ok=True)
        self.full, self.freed_s = False, asyncio.get_running_loop().time()

    def was_full_since(self, then_s: float) -> bool:
        """At any time from then, by the loop's clock, until now."""
        return self.full or self.freed_s >= then_s

    def _fill(self) -> None:
        block = bytes(BLOCK_BYTES)
        file = os.open(self._ballast, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            for _ in range(2 * SIZE_MB):
                os.write(file, block)  # a short write fills what is left; the next one fails
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        finally:
            os.close(file)
