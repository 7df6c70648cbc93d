"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

QUERY_TIMEOUT_S = 10.0
SYNCS = 50


def hardware() -> list[str]:
    """Lines for a reader: processor, memory, kernel, interpreter, and how long one fdatasync takes."""
    return [
        f"{os.cpu_count()} x {_field('/proc/cpuinfo', 'model name') or platform.machine()}",
        f"{int(_field('/proc/meminfo', 'MemTotal').split()[0]) / (1 << 20):.0f} GiB of memory",
        f"Linux {platform.release().partition('-')[0]}, {_system()}",
        f"Python {platform.python_version()}, {'the distribution' if sys.base_prefix == '/usr' else 'another'}'s build",
        f"fdatasync of 4 KiB: {_sync_ms():.2f} ms",
    ]


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        return "unknown distribution"


def _sync_ms() -> float:
    """In the folder where the servers keep their data."""
    block, times = bytes(4096), []
    with tempfile.TemporaryFile(prefix="peers-") as file:
        for _ in range(SYNCS):
            file.write(block)
            file.flush()
            start = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append((time.perf_counter() - start) * 1000)
    return median(times)


def package_version(package: str) -> str:
    """Name and version of an installed Debian package, or nothing."""
    query = shutil.which("dpkg-query")
    if query is None:
        return ""
    done = subprocess.run(
        [query, "-W", "-f", "${Version}", package],
        capture_output=True,
        text=True,
        timeout=QUERY_TIMEOUT_S,
        check=False,
    )
    return f"{package} {done.stdout}" if done.returncode == 0 and done.stdout else ""
