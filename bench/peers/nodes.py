"""Node processes of the libraries that bring no server; each runs until it is ended.

python -m bench.peers.nodes kademlia PORT [PORT OF ONE THAT RUNS]
python -m bench.peers.nodes pysyncobj PORT PARTNER PARTNER
"""

from __future__ import annotations

import asyncio
import sys
import threading

from bench.peers.processes import HOST


async def _kademlia(port: int, others: list[int]) -> None:
    from kademlia.network import Server

    server = Server()
    await server.listen(port, interface=HOST)
    if others:
        await server.bootstrap([(HOST, other) for other in others])
    await asyncio.Event().wait()


def _pysyncobj(port: int, others: list[int]) -> None:
    from bench.peers.systems.pysyncobj import make_store

    _held = make_store(port, others)  # its thread ends with it
    threading.Event().wait()


def main(kind: str, port: int, others: list[int]) -> None:
    if kind == "kademlia":
        asyncio.run(_kademlia(port, others))
    elif kind == "pysyncobj":
        _pysyncobj(port, others)
    else:
        raise SystemExit(f"unknown library {kind!r}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), [int(port) for port in sys.argv[3:]])
