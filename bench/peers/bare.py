"""The bare loop as the limit: any program that takes `--store memory|rocksdb-fsync --seconds S --json` and prints one
JSON object with `ops_per_s` for "1", "32", "256" callers (half puts, half gets), "batch_put" and "batch_get"."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from bench.peers.base import PeerFailed
from bench.peers.loads import SMALL

STORES = {"memory": "ours-memory", "rocksdb-fsync": "ours-group"}
"""The program's store -> the variant of ours that is held against it."""
SECTIONS = {
    "1": f"a/{SMALL}/1",
    "32": f"a/{SMALL}/32",
    "256": f"a/{SMALL}/256",
    "batch_put": f"batch_put/{SMALL}/1",
    "batch_get": f"batch_get/{SMALL}/1",
}
"""The program's sections -> our cells."""
START_S = 60.0


def measure(program: Path, store: str, seconds: float) -> dict[str, float]:
    """Section -> operations a second. Raises PeerFailed."""
    try:
        done = subprocess.run(
            [sys.executable, str(program), "--store", store, "--seconds", str(seconds), "--json"],
            stdout=subprocess.PIPE,
            timeout=START_S + len(SECTIONS) * seconds,
            check=True,
        )
        result = json.loads(done.stdout)
        return {section: float(result[section]["ops_per_s"]) for section in SECTIONS}
    except (subprocess.SubprocessError, OSError, ValueError, KeyError) as error:
        raise PeerFailed(f"the bare loop {program.name} on {store}: {error}") from error
