"""The command line; see the package for what it does."""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import msgspec
import uvloop
from bench.growth import plots, report
from bench.growth.plan import DIMENSIONS, scope, shortage, sites
from bench.growth.runner import Results, run
from bench.growth.site import free_bytes

from agi.core.dht.testing.plots import PlotsUnavailable
from agi.core.dht.testing.plots import check as check_plots

KEYS_MAX, QUICK_KEYS_MAX = 1_000_000, 100_000
QUICK_BUDGET_S = 4.5 * 60
"""Stopping and the report take the rest of 5 minutes."""
FULL_BUDGET_S = 8 * 3600.0


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.growth",
        description="Throughput, latency, CPU, memory, disk and start-up as work grows, held against theory.",
    )
    parser.add_argument("--dimensions", default=",".join(DIMENSIONS), help="of %(default)s")
    parser.add_argument("--keys-max", type=int, help=f"{KEYS_MAX:,}, quick {QUICK_KEYS_MAX:,}; at most 10,000,000")
    parser.add_argument("--quick", action="store_true", help="fewer points and rounds, at most 5 minutes")
    parser.add_argument("--rounds", type=int, help="5, quick 2")
    parser.add_argument("--seconds", type=float, help="of each figure in each round: 1.5, quick 0.4")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the data goes meanwhile: %(default)s"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results go")
    parser.add_argument(
        "--docs", type=Path, metavar="FILE", help="a Markdown file whose generated part is written anew, with plots"
    )
    parser.add_argument("--read", type=Path, metavar="FILE", help="no run: report on these results")
    given = parser.parse_args()
    try:
        if given.docs is not None:
            check_plots()  # before it takes an hour
        results = _read(given.read) if given.read is not None else _run(given)
        if given.json is not None:
            given.json.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")
        if given.docs is not None:
            report.write(results, given.docs)
            plots.write(results, given.docs.with_suffix(""))
    except (PlotsUnavailable, ValueError, OSError) as error:
        parser.error(str(error))
    print(report.text(results))


def _read(path: Path) -> Results:
    return msgspec.json.decode(path.read_bytes(), type=Results)


def _run(given: argparse.Namespace) -> Results:
    """Raises ValueError for what cannot be run."""
    scoped = scope(quick=given.quick, keys_max=given.keys_max or (QUICK_KEYS_MAX if given.quick else KEYS_MAX))
    scoped = replace(scoped, rounds=given.rounds or scoped.rounds, seconds=given.seconds or scoped.seconds)
    if scoped.rounds < 1 or scoped.seconds <= 0:
        raise ValueError("at least 1 round, and more than 0 seconds")
    chosen = sites(scoped, given.dimensions.split(","))
    if lacking := shortage(chosen, free_bytes(given.folder)):
        raise ValueError(lacking)
    return uvloop.run(run(scoped, chosen, given.folder, QUICK_BUDGET_S if given.quick else FULL_BUDGET_S, _say))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


main()
