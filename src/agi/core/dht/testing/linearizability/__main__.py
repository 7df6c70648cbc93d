"""`python -m agi.core.dht.testing.linearizability FILE...`: a verdict for each history, and what is wrong with it.

The exit code is 0 if all are linearizable; 1 if one is not; 2 if none is known not to be, but one is undecided or no
history.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from agi.core.dht.testing.history import History, MalformedHistory
from agi.core.dht.testing.linearizability.checker import LIMIT, SHOWN, Verdict, check


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m agi.core.dht.testing.linearizability",
        description="Decides whether histories of operations are linearizable.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a history (docs/histories.md)")
    parser.add_argument("--limit", type=int, default=LIMIT, metavar="N", help=f"states per key (default {LIMIT})")
    parser.add_argument("--show", type=int, default=SHOWN, metavar="N", help=f"operations shown (default {SHOWN})")
    given = parser.parse_args(argv)
    codes = []
    for path in given.files:
        try:
            result = check(History.read(path).operations, limit=given.limit)
        except (MalformedHistory, OSError) as error:
            sys.stderr.write(f"{error}\n")
            codes.append(2)
            continue
        sys.stdout.write(f"{path}: {result.describe(given.show)}\n")
        codes.append({Verdict.LINEARIZABLE: 0, Verdict.VIOLATION: 1, Verdict.UNKNOWN: 2}[result.verdict])
    return 1 if 1 in codes else max(codes)


if __name__ == "__main__":
    sys.exit(main())
