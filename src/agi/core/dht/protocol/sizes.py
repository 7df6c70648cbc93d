"""How large records are: what was read of late tells what the next read will bring.

One large record among small ones is believed at once and forgotten slowly, since to expect too little costs memory, and
to expect too much only time.

>>> sizes = RecordSizes()
>>> sizes.learn([b"x" * 100, None]); sizes.mean_bytes
100.0
>>> sizes.learn([b"x" * 900]); sizes.learn([b"x" * 100]); sizes.mean_bytes
850.0
"""

from __future__ import annotations

from collections.abc import Sequence

SAMPLES = 8
"""Records of a batch that are looked at, at most."""
FORGET = 1 / 16
"""Of the difference, with each batch."""


class RecordSizes:
    """
    Attributes:
        mean_bytes: of a record, by what was read of late; 0 before the first.
    """

    __slots__ = ("mean_bytes",)

    def __init__(self) -> None:
        self.mean_bytes = 0.0

    def learn(self, records: Sequence[bytes | None]) -> None:
        """These were read; keys without a record tell nothing, and of many records a few tell enough."""
        found = list(filter(None, records[:: 1 + len(records) // SAMPLES]))
        if found:
            mean, known = sum(map(len, found)) / len(found), self.mean_bytes
            self.mean_bytes = mean if mean > known else known + (mean - known) * FORGET
