"""Clocks that are wrong: libfaketime before a node's program, and a file per node that says by how much.

Only the wall clock is shifted. CLOCK_MONOTONIC and CLOCK_BOOTTIME, which timeouts and leases go by, stay true. The
library looks into the file once a second, so that a clock can also jump in the midst of a node's work.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PACKAGE = "faketime"
PLACES = ("/usr/lib", "/usr/local/lib", "/usr/lib64")
NAMES = ("faketime/libfaketimeMT.so.1", "*/faketime/libfaketimeMT.so.1")
REREAD_S = 1
OFFSETS_S = (0.4, -0.4, 3.0, -3.0, 20.0, -20.0, 600.0, -600.0, 3600.0, -3600.0)
"""Within the `versions.max_clock_skew_ms` of 5 s, and far beyond it."""
TRIAL_S = 3600.0
TRIAL_TIMEOUT_S = 20.0
TRIAL = "import time; print(time.time(), time.monotonic(), time.clock_gettime(time.CLOCK_BOOTTIME))"


def library() -> Path | None:
    """libfaketime for programs with threads."""
    found = (path for place in PLACES for name in NAMES for path in sorted(Path(place).glob(name)))
    return next(found, None)


def obstacle(folder: Path) -> str:
    """Why no clock can be shifted here, for people; empty if one can. Writes a file into the folder for that."""
    if library() is None:
        return f"libfaketime not found (apt-get install {PACKAGE})"
    clock = Clock(folder / "clock-trial")
    clock.shift(TRIAL_S)
    shown = []
    for before in ([], clock.before()):
        try:
            tried = subprocess.run(
                [*before, sys.executable, "-c", TRIAL],
                capture_output=True,
                text=True,
                timeout=TRIAL_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"a program under libfaketime did not end within {TRIAL_TIMEOUT_S:g} s"
        if tried.returncode:
            return f"libfaketime does not work here: {tried.stderr.strip()[-200:] or tried.returncode}"
        shown.append([float(word) for word in tried.stdout.split()])
    wall_s, *true_s = (after - before for before, after in zip(*shown, strict=True))
    if not abs(wall_s - TRIAL_S) < TRIAL_TIMEOUT_S or any(abs(each) > TRIAL_TIMEOUT_S for each in true_s):
        return f"libfaketime shifts the wall clock by {wall_s:.0f} s instead of {TRIAL_S:.0f} s, others by {true_s}"
    return ""


class Clock:
    """The wall clock of a node; true at first.

    Args:
        path: of the file, made here.
    """

    def __init__(self, path: Path) -> None:
        self.offset_s = 0.0
        self._path = path
        self.shift(0.0)

    def shift(self, offset_s: float) -> None:
        """From now on, or a second later, it is so far ahead, or behind if negative."""
        self.offset_s = offset_s
        part = self._path.with_name(self._path.name + ".part")
        part.write_text(f"{offset_s:+.3f}\n", encoding="ascii")
        part.replace(self._path)

    def before(self) -> list[str]:
        """What comes before a command whose clock this is to be."""
        settings = {
            "LD_PRELOAD": str(library()),
            "FAKETIME_TIMESTAMP_FILE": str(self._path),
            "FAKETIME_CACHE_DURATION": str(REREAD_S),
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",  # the older name
            "NO_FAKE_STAT": "1",
            "FAKETIME_FORCE_MONOTONIC_FIX": "0",  # the fix is for old C libraries; with it monotonic waits end late
        }
        return ["env", "--unset=FAKETIME", *(f"{name}={value}" for name, value in settings.items())]
