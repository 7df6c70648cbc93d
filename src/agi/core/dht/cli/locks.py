"""Locks for the shell: a command that runs under one, and who holds it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from agi.core.dht.cli import output
from agi.core.dht.cli.connection import DEFAULT_CONNECT, AsJson, Connect, Timeout, connected
from agi.core.dht.cli.data import NOT_FOUND_EXIT_CODE
from agi.core.dht.errors import InvalidRequest, LockHeld, LockLost
from agi.core.dht.protocol.locks import lease_ms_of
from agi.core.dht.types import lock_key

if TYPE_CHECKING:
    from agi.core.dht.client.sync_locks import SyncLock

NAME_VARIABLE, TOKEN_VARIABLE = "AGI_DHT_LOCK_NAME", "AGI_DHT_LOCK_TOKEN"
NOT_FOUND, NOT_EXECUTABLE = 127, 126
"""As shells do."""

app = typer.Typer(add_completion=False, rich_markup_mode=None)


class _UnderLock(TyperCommand):
    """Takes a command only behind `--`: nothing that was meant as one of ours (`lock status`) is run by mistake, and
    every option in front of it is ours."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        rest: list[str] = super().parse_args(ctx, args)
        command = list(ctx.params.get("command") or ())
        if not ctx.resilient_parsing and given[-1 - len(command) :] != ["--", *command]:
            ctx.fail("the command comes after --, and NAME before it: agi-dht lock NAME -- COMMAND...")
        return rest


@app.command(cls=_UnderLock)
def lock(
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False, autocompletion=lambda: ["status"])],
    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND...", help="What runs under the lock.", show_default=False)
    ],
    ttl: Annotated[
        float, typer.Option(metavar="SECONDS", help="The lease, which is renewed as the command runs.")
    ] = 10,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Wait so long for the lock. Default: for ever.", show_default=False),
    ] = None,
    grace: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="From SIGTERM to SIGKILL. Default: a tenth of --ttl.", show_default=False),
    ] = None,
    connect: Connect = DEFAULT_CONNECT,
    as_json: AsJson = False,
) -> None:
    """Run a command while holding a lock.

    Of all who run one under this NAME one does so at a time, in the order in which they came. The command finds NAME
    and the fencing token in AGI_DHT_LOCK_NAME and AGI_DHT_LOCK_TOKEN; `agi-dht put --fence NAME:TOKEN` is refused once
    a later holder has been at the key. If the lease cannot be renewed the command, with all that it has started in its
    process group, gets SIGTERM, and after --grace SIGKILL: by default before another can have the lock. Signals are
    passed on to that group. If agi-dht itself is killed, its lock can be had --ttl after its last renewal, with
    --timeout 0 too. Without a COMMAND, `agi-dht lock status NAME` shows who holds a lock.

    Exit code: the command's, 128 + N where signal N ended it; 30: another held the lock all the time; 29: it was lost.

    --json prints {"name", "token", "exit_code", "lost"} to stderr at the end; token is null where another held it.

    Examples:

        agi-dht lock nightly -- ./reindex.sh --all

        agi-dht lock nightly --timeout 0 -- sh -c 'agi-dht put last now --fence "nightly:$AGI_DHT_LOCK_TOKEN"'
    """
    lock_key(name)
    lease_s = lease_ms_of(ttl) / 1000
    if grace is not None and not 0 <= grace <= 3600:
        raise InvalidRequest(f"--grace is 0 to 3600 seconds, not {grace!r}")
    held: SyncLock | None = None
    failure: LockHeld | LockLost | None = None
    with connected(connect, None) as client:
        try:
            with client.lock(name, ttl=ttl, timeout=timeout) as held:
                code = _run(command, held, lease_s / 10 if grace is None else grace)
        except (LockHeld, LockLost) as error:
            failure, code = error, error.exit_code
    if as_json:
        token, lost = held.token if held else None, isinstance(failure, LockLost)
        output.note_document({"name": name, "token": token, "exit_code": code, "lost": lost})
    if failure is not None:
        raise failure
    raise typer.Exit(code)


def _run(command: list[str], held: SyncLock, grace_s: float) -> int:
    """The exit code of the command. Raises LockLost, once it has ended."""
    from agi.core.dht.cli import jobs

    environment = {**os.environ, NAME_VARIABLE: held.name, TOKEN_VARIABLE: str(held.token)}
    lost = False

    def lose() -> None:
        nonlocal lost
        lost = True
        output.note(f"the lock {held.name!r} is lost: the command is ended")

    try:
        code = jobs.run(command, environment, lambda: held.held, lose, grace_s)
    except OSError as error:
        output.note(f"error: {command[0]}: {error.strerror}")
        return NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
    if lost:
        held.check()
    return code if code >= 0 else 128 - code


def lock_status(
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False)],
    connect: Connect = DEFAULT_CONNECT,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Show who holds a lock.

    A holder is shown as host, process and a random part. One that died is shown until another takes the lock. Exit
    code 3: nobody has ever held it.

    --json prints {"name", "held", "holder", "token", "lease_seconds", "version"}; token is the last holder's where the
    lock is free.

    Examples:

        agi-dht lock status nightly
    """
    lock_key(name)
    with connected(connect, timeout) as client:
        status = client.lock_status(name)
    if status is None:
        output.note(f"not found: no lock {name!r}")
        raise typer.Exit(NOT_FOUND_EXIT_CODE)
    if as_json:
        shown = {"holder": status.holder, "token": status.token, "lease_seconds": status.lease_seconds}
        output.document({"name": name, "held": bool(status.holder), **shown, "version": status.version})
    elif status.holder:
        output.line(f"held by {status.holder}, token {status.token}, lease {status.lease_seconds:g} s")
    else:
        output.line(f"free, last token {status.token}")
