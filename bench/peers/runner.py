"""Rounds of turns: in each round every peer is started, measured and stopped; each round begins with another one."""

from __future__ import annotations

import asyncio
import datetime
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from bench.peers import bare
from bench.peers.base import Facts, Peer, PeerFailed, Running, missing
from bench.peers.loads import Cell, Plan, Sample, fill, measure, refusal
from bench.peers.machine import hardware, package_version
from bench.peers.results import Named, Results

START_TIMEOUT_S = 120.0
"""For servers, the client, and all they need to be whole."""
WARM_S, WARM_SEED = 0.3, -1
TURN_SPREAD = 1.3
"""A turn may take so much longer than the longest one of its peer before."""
CELL_FAILURES_MAX = 2
"""A turn ends when more of its cells fail."""
ERROR_CHARACTERS_MAX = 300
TURN_MIN_S = 20.0
"""A turn that was not taken yet does not begin with less time left."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a run is asked for."""

    plan: Plan
    rounds: int
    budget_s: float
    """Of the whole run: no turn begins that took longer than what is left, and none goes on beyond it."""
    turn_max_s: float
    bare: Path | None = None
    command: str = "make bench-peers"
    say: Callable[[str], None] = lambda _: None


async def run(peers: Sequence[Peer], options: Options) -> Results:
    """All rounds, or as many as the budget allows. A peer that cannot run is skipped, with its reason."""
    plan, began = options.plan, time.monotonic()
    results = Results(
        hardware=await asyncio.to_thread(hardware),
        load_per_core=round(os.getloadavg()[0] / (os.cpu_count() or 1), 2),
        command=options.command,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        rounds=0,
        seconds=plan.seconds,
        keys=plan.keys,
        cells=[cell.name for cell in plan.cells],
    )
    ready = []
    for peer in peers:
        if why := missing(peer.facts):
            results.skipped[peer.facts.name] = why
            options.say(f"{peer.facts.name}: skipped, {why}")
        else:
            ready.append(peer)
    longest: dict[str, float] = {}
    for number in range(options.rounds):
        shift = number * max(1, len(ready) // max(1, options.rounds)) % max(1, len(ready))
        for peer in ready[shift:] + ready[:shift]:
            name, start = peer.facts.name, time.monotonic()
            left = options.budget_s - (start - began)
            if left < longest.get(name, TURN_MIN_S) * TURN_SPREAD:
                if not number:
                    results.skipped[name] = "no time left"
                continue
            try:
                async with asyncio.timeout(min(left, options.turn_max_s)):
                    await _turn(peer, plan, number, results)
            except TimeoutError:
                _note(results, name, PeerFailed(f"round {number + 1}: its turn did not end in time"))
            except Exception as error:  # noqa: BLE001  # a client may raise anything; the others still have their turns
                _note(results, name, error)
            longest[name] = max(longest.get(name, 0.0), time.monotonic() - start)
            options.say(f"round {number + 1} of {options.rounds}: {name}, {time.monotonic() - start:.1f} s")
        if options.bare is not None and (not number or time.monotonic() - began < options.budget_s):
            for store in bare.STORES:
                options.say(f"round {number + 1} of {options.rounds}: the bare loop, {store}")
                figures = await asyncio.to_thread(bare.measure, options.bare, store, plan.seconds)
                for section, ops in figures.items():
                    results.bare.setdefault(store, {}).setdefault(section, []).append(ops)
        results.rounds = number + 1
        if time.monotonic() - began + min(longest.values(), default=0.0) > options.budget_s:
            break
    for name in [name for name, peer in results.peers.items() if not peer.cells]:
        del results.peers[name]
        results.skipped[name] = results.failed.pop(name, ["nothing was measured"])[0]
    results.took_s = round(time.monotonic() - began, 1)
    return results


async def _turn(peer: Peer, plan: Plan, number: int, results: Results) -> None:
    """Start, fill, warm, measure every cell, stop. Raises PeerFailed, or what its client raises."""
    facts = peer.facts
    plan = replace(plan, keys=min(plan.keys, facts.keys_max))
    named = results.peers.setdefault(facts.name, _named(facts))
    with tempfile.TemporaryDirectory(prefix="peers-", ignore_cleanup_errors=True) as name:
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(START_TIMEOUT_S):
                    running = await stack.enter_async_context(peer.running(Path(name)))
            except TimeoutError:
                raise PeerFailed(f"it did not start within {START_TIMEOUT_S:g} s") from None
            await _fill(running, facts, plan)
            refusals = {cell: refusal(facts, running.calls, cell) for cell in plan.cells}
            named.lacks.update({cell.name: why for cell, why in refusals.items() if why})
            cells = [cell for cell, why in refusals.items() if not why]
            # Connections of a pool are made here and not in the first cell of so many callers.
            warm = replace(cells[0], callers=max(cell.callers for cell in cells))
            await _measure(running, replace(plan, seconds=WARM_S), warm, WARM_SEED)
            failures = 0
            for cell in cells:
                try:
                    sample = await _measure(running, plan, cell, number)
                except TimeoutError:  # of the turn
                    raise
                except Exception as error:  # preparing raises whatever a client does
                    failures += 1
                    if failures > CELL_FAILURES_MAX:
                        raise
                    _note(results, facts.name, error)
                else:
                    named.cells.setdefault(cell.name, []).append(sample)


async def _fill(running: Running, facts: Facts, plan: Plan) -> None:
    if running.fill is not None:
        await running.fill(plan)
    elif running.calls is not None and running.calls.put is not None:
        await fill(running.calls, facts, plan)


async def _measure(running: Running, plan: Plan, cell: Cell, seed: int) -> Sample:
    if running.measure is not None:
        return await running.measure(plan, cell, seed)
    assert running.calls is not None  # one of the two is there
    return await measure(running.calls, running.pids, plan, cell, seed)


def _named(facts: Facts) -> Named:
    versions = [f"{name} {metadata.version(name)}" for name in facts.distributions]
    versions += [found for package in facts.packages if (found := package_version(package))]
    return Named(
        facts.title,
        facts.guarantee,
        facts.durability,
        facts.against,
        facts.replicated,
        facts.threads,
        facts.note,
        versions,
    )


def _note(results: Results, name: str, error: Exception) -> None:
    while isinstance(error, ExceptionGroup):  # of callers that failed alike
        error = error.exceptions[0]
    text = " ".join(f"{type(error).__name__}: {error}".split())[:ERROR_CHARACTERS_MAX]
    results.failed.setdefault(name, []).append(text)
