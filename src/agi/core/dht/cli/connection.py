"""How a command reaches the cluster: the options that say where it is, and a client that is connected.

The client logs by `logging`, which nobody configures here: what it warns of is a plain line on stderr.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from agi.core.dht.errors import InvalidAddress

if TYPE_CHECKING:
    from agi.core.dht.client import SyncDHTClient

DEFAULT_CONNECT = "localhost:7000"
FIND_TIMEOUT_S = 3.0
"""How long a cluster is looked for; per address, as one that is silent may come before one that answers."""
FIND_TIMEOUT_S_MAX = 30.0

Connect = Annotated[
    str,
    typer.Option(
        metavar="HOST:PORT,...",
        envvar="AGI_DHT_CONNECT",
        help="gRPC addresses of nodes; one that lives is enough.",
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        help="For each request, retries included, and for finding the cluster. Default: the cluster's, and 3.",
        show_default=False,
    ),
]
Level = Annotated[
    str | None,
    typer.Option(
        "--consistency",
        metavar="ONE|QUORUM|ALL|LINEARIZABLE",
        help="Replicas to wait for. Default: the cluster's.",
        autocompletion=lambda: ["ONE", "QUORUM", "ALL", "LINEARIZABLE"],
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def addresses(connect: str) -> list[str]:
    """The addresses of an option. Raises InvalidAddress."""
    found = [address.strip() for address in connect.split(",") if address.strip()]
    if not found:
        raise InvalidAddress(f"--connect takes HOST:PORT,..., not {connect!r}")
    return found


def find_timeout_s(timeout: float | None, count: int) -> float:
    return timeout if timeout is not None else min(FIND_TIMEOUT_S * count, FIND_TIMEOUT_S_MAX)


@contextlib.contextmanager
def connected(
    connect: str,
    timeout: float | None,
    consistency: str | None = None,
    *,
    request_timeout: float | None = None,
    retry_unknown: bool = False,
    pool_size: int = 1,
) -> Iterator[SyncDHTClient]:
    """A connected client, closed at the end. Raises what `SyncDHTClient.connect` raises.

    The client has a thread of its own, so that neither a slow file nor a reader of stdout that pauses (`less`) keeps it
    from answering the nodes' pings.

    Args:
        request_timeout: for requests where no `timeout` is given; None takes the cluster's.
        pool_size: links to each node; the second carries large values.
    """
    from agi.core.dht.client import SyncDHTClient

    known = addresses(connect)
    client = SyncDHTClient(
        timeout=timeout if timeout is not None else request_timeout,
        read_consistency=consistency,
        write_consistency=consistency,
        retry_unknown=retry_unknown,
        connection_pool_size=pool_size,
    )
    with client:
        client.connect(known, timeout=find_timeout_s(timeout, len(known)))
        yield client
