"""Runs seeds of the cluster simulation from the command line.

    python -m agi.core.dht.testing.run --seeds 1000             many, over all processors
    python -m agi.core.dht.testing.run --seed 42                one, with all that happened in it
    python -m agi.core.dht.testing.run --seed 42 --trace t.txt  and its trace as text, to read or to compare
    python -m agi.core.dht.testing.run --profile churn --turn lag  clusters of one kind only, many or one

Each seed of many runs a cluster (trial.py) and then, under the same number, a bootstrap (formation.py). The exit code
is 1 if a seed failed, or if a fault that the run is about did not occur in it at all.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from agi.core.dht.testing.formation import run_formation
from agi.core.dht.testing.report import MANY_SEEDS, MUST_HAPPEN, RARE, Report
from agi.core.dht.testing.scenario import Profile, Turn
from agi.core.dht.testing.trial import run_seed

CHUNK_SEEDS = 4
"""Seeds that a worker process takes at a time."""
WORKER_CHUNKS = 25
"""A worker makes room for a new one after so many: what a process of long runs has grown to is given back."""


def run_both(seed: int, profile: Profile | None = None, turn: Turn | None = None) -> list[Report]:
    """The cluster and the formation of one seed; where a profile is named, only the cluster, of that profile."""
    if profile is not None:
        return [run_seed(seed, profile=profile, turn=turn)]
    return [run_seed(seed), run_formation(seed)]


def run_seeds(
    seeds: Sequence[int], jobs: int, profile: Profile | None = None, turn: Turn | None = None
) -> Iterator[Report]:
    """Reports of these seeds, as they come, from `jobs` processes."""
    run = partial(run_both, profile=profile, turn=turn)
    if jobs == 1:
        for seed in seeds:
            yield from run(seed)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=WORKER_CHUNKS) as pool:
        for reports in pool.imap(run, seeds, CHUNK_SEEDS):
            yield from reports


def missing(counts: Counter[str], seeds: int) -> list[str]:
    """What had to happen in a run of so many seeds and did not."""
    return [name for name in MUST_HAPPEN + (RARE if seeds >= MANY_SEEDS else ()) if not counts[name]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m agi.core.dht.testing.run", description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--seeds", type=int, metavar="N", default=200, help="run N seeds (default 200)")
    what.add_argument("--seed", type=int, metavar="K", help="run one seed and show it in full")
    parser.add_argument("--first", type=int, default=1, help="the first of the N seeds (default 1)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: all processors)")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="with --seed: write the trace as text")
    parser.add_argument("--formation", action="store_true", help="with --seed: its bootstrap, not its cluster")
    parser.add_argument("--profile", type=Profile, choices=list(Profile), help="clusters of this profile only")
    parser.add_argument("--turn", type=Turn, choices=list(Turn), help="of the profile churn, of this turn only")
    given = parser.parse_args(argv)
    if given.turn is not None and given.profile is not Profile.CHURN:
        parser.error("a turn is one of the profile churn")
    if given.seed is not None:
        run = partial(run_seed, profile=given.profile, turn=given.turn)
        report = (run_formation if given.formation else run)(given.seed, trace_path=given.trace)
        _say(f"{report}\n\n{report.plan}")
        return 1 if report.findings else 0
    return _run_many(range(given.first, given.first + given.seeds), given.jobs, given.profile, given.turn)


def _run_many(seeds: Sequence[int], jobs: int, profile: Profile | None, turn: Turn | None) -> int:
    began = time.perf_counter()
    counts: Counter[str] = Counter()
    failed: list[Report] = []
    for report in run_seeds(seeds, jobs, profile, turn):
        counts.update(report.counts)
        if report.findings:
            failed.append(report)
        _say(str(report) if report.findings else report.line)
    elapsed_s = time.perf_counter() - began
    _say(f"\n{len(seeds)} seeds in {elapsed_s:.1f} s: {len(seeds) / elapsed_s:.1f} a second, {jobs} processes")
    _say("in all: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    for report in failed:
        _say(f"FAILED: {report.findings[0].check}; replay it with {_replay(report, profile, turn)}")
    lacking = missing(counts, len(seeds)) if profile is None else []
    if lacking:
        _say(f"FAILED: nothing was tested, for these never happened: {', '.join(lacking)}")
    return 1 if failed or lacking else 0


def _replay(report: Report, profile: Profile | None, turn: Turn | None) -> str:
    if profile is None:
        return f"`make sim SEED={report.replay}`"
    return f"--profile {profile}{'' if turn is None else f' --turn {turn}'} --seed {report.replay}"


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
