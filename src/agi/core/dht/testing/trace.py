"""A running digest of all that happened in a simulation: two runs of one seed must end with the same hash.

The loop adds the time and the handle count of every jump of the clock; the network, the disks and the fault driver add
a line per event. A line may not hold an address (`0x7f...`): it would differ between runs, so it is refused. The hash
does not depend on PYTHONHASHSEED as long as the traced program does not iterate over sets of strings, which is one of
the faults that this trace is there to find.
"""

from __future__ import annotations

import struct
from collections import Counter
from pathlib import Path
from typing import TextIO

import xxhash

_JUMP = struct.Struct("<dQ")
_BUFFER_BYTES_MAX = 64 * 1024


class Trace:
    """An append-only digest of events.

    Args:
        path: also write every line as text to this file, to compare two runs of a seed with `diff`; None for no text.

    Attributes:
        now: virtual seconds, kept by the loop; the time that `record` stamps on a line.
        counts: how many lines of each kind were recorded.
    """

    __slots__ = ("_buffer", "_digest", "_text", "counts", "now")

    def __init__(self, path: Path | None = None) -> None:
        self.now = 0.0
        self.counts: Counter[str] = Counter()
        self._digest = xxhash.xxh3_128()
        self._buffer = bytearray()
        self._text: TextIO | None = None if path is None else path.open("w")

    def advance(self, now: float, handles: int) -> None:
        """The clock jumps to `now` after `handles` callbacks in all: a cheap digest of the whole schedule."""
        self.now = now
        buffer = self._buffer
        buffer += _JUMP.pack(now, handles)
        if len(buffer) > _BUFFER_BYTES_MAX:
            self._flush()
        if self._text is not None:
            self._text.write(f"{now:.9f} jump {handles}\n")

    def record(self, kind: str, text: str = "") -> None:
        """One event. `text` names what happened by stable names and numbers. Raises ValueError for an address in it."""
        if " 0x" in text:
            raise ValueError(f"a trace line may not hold an address: {kind} {text}")
        self.counts[kind] += 1
        line = f"{self.now:.9f} {kind} {text}\n"
        buffer = self._buffer
        buffer += line.encode()
        if len(buffer) > _BUFFER_BYTES_MAX:
            self._flush()
        if self._text is not None:
            self._text.write(line)

    def hash(self) -> str:
        """128 bits in hexadecimal over all that was recorded so far."""
        self._flush()
        return str(self._digest.hexdigest())

    def close(self) -> None:
        """Ends the text file. The digest can still be read."""
        if self._text is not None:
            self._text.close()
            self._text = None

    def _flush(self) -> None:
        self._digest.update(bytes(self._buffer))
        self._buffer.clear()
