"""The command line; see the package for what it does."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import msgspec
import uvloop
from bench.peers import report
from bench.peers.loads import BATCH_KEYS, FULL, QUICK, Plan
from bench.peers.results import Results
from bench.peers.runner import Options, run
from bench.peers.systems import PEERS

QUICK_BUDGET_S = 6.5 * 60
"""The last turn's end, the bare loop and the report take the rest of 8 minutes."""
FULL_BUDGET_S = 6 * 3600.0
QUICK_TURN_S, FULL_TURN_S = 40.0, 900.0
QUICK_SKIPS = ("redis-standalone-always", "redis-cluster-always", "redis-cluster-wait-always", "etcd-rust", "dragon")
"""What a quick run leaves out unless it is asked for: second variants, and what polls with too many processes."""
QUICK_ROUNDS, QUICK_SECONDS, QUICK_KEYS = 3, 0.4, BATCH_KEYS
FULL_ROUNDS, FULL_SECONDS, FULL_KEYS = 5, 1.5, 10_000


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description="The cluster beside its peers.")
    names = [peer.facts.name for peer in PEERS]
    parser.add_argument("--quick", action="store_true", help="fewer cells, at most 8 minutes")
    parser.add_argument("--peers", help=f"of {', '.join(names)}; a beginning of a name means all that begin so")
    parser.add_argument("--rounds", type=int, help=f"{FULL_ROUNDS}, quick {QUICK_ROUNDS}")
    parser.add_argument("--seconds", type=float, help=f"of a cell: {FULL_SECONDS}, quick {QUICK_SECONDS}")
    parser.add_argument("--keys", type=int, help=f"at least {BATCH_KEYS}: {FULL_KEYS}, quick {QUICK_KEYS}")
    parser.add_argument("--bare", type=Path, help="a program to hold our figures against: bare.py says what it prints")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--docs", type=Path, help="a Markdown file whose generated part is written anew, with plots")
    parser.add_argument("--from", type=Path, dest="source", metavar="FILE", help="no run: report on these results")
    options = parser.parse_args()
    if options.source is not None:
        results = msgspec.json.decode(options.source.read_bytes(), type=Results)
    else:
        results = _run(parser, options)
    if options.json is not None:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")
    if options.docs is not None:
        report.write(results, options.docs)
    print(report.text(results))


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Results:
    quick = options.quick
    rounds = options.rounds or (QUICK_ROUNDS if quick else FULL_ROUNDS)
    seconds = options.seconds or (QUICK_SECONDS if quick else FULL_SECONDS)
    keys = options.keys or (QUICK_KEYS if quick else FULL_KEYS)
    if rounds < 1 or seconds <= 0 or keys < BATCH_KEYS:
        parser.error(f"at least 1 round, more than 0 seconds, {BATCH_KEYS} keys")
    if options.bare is not None and not options.bare.is_file():
        parser.error(f"{options.bare} is no file")
    chosen = tuple(peer for peer in PEERS if not quick or peer.facts.name not in QUICK_SKIPS)
    if options.peers:
        wanted = options.peers.split(",")
        if unknown := [want for want in wanted if not any(_means(want, peer.facts.name) for peer in PEERS)]:
            parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(peer.facts.name for peer in PEERS)}")
        chosen = tuple(peer for peer in PEERS if any(_means(want, peer.facts.name) for want in wanted))
    plan = Plan(QUICK if quick else FULL, keys, seconds)
    budget, turn = (QUICK_BUDGET_S, QUICK_TURN_S) if quick else (FULL_BUDGET_S, FULL_TURN_S)
    logging.disable(logging.CRITICAL)  # clients log what they also raise, a line for each call
    results = uvloop.run(run(chosen, Options(plan, rounds, budget, turn, options.bare, _command(options), _say)))
    if quick and not options.peers:
        results.skipped.update(dict.fromkeys(QUICK_SKIPS, "left out of a quick run"))
    return results


def _command(options: argparse.Namespace) -> str:
    """As it is typed, without the paths of this machine."""
    parts = ["make bench-peers", "QUICK=1" if options.quick else ""]
    for name in ("peers", "rounds", "seconds"):
        value = getattr(options, name)
        parts.append(f"{name.upper()}={value}" if value else "")
    parts.append("BARE=..." if options.bare else "")
    return " ".join(part for part in parts if part)


def _means(wanted: str, name: str) -> bool:
    return name == wanted or name.startswith(f"{wanted}-")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


main()
