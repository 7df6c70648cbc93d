"""Answers to the rare questions of clients and operators: topology, status, stats, locate."""

from __future__ import annotations

import asyncio
import os
import resource
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import structlog

from agi.core.dht.changes import Order
from agi.core.dht.errors import DHTError, InvalidRequest, NotReady, Overloaded, TransportError, from_wire
from agi.core.dht.protocol.consensus import BALLOT_BYTES, is_register, state_of
from agi.core.dht.protocol.messages import Hello, Query, QueryReply, ReplicaRead, ReplicaReadReply, WireError
from agi.core.dht.protocol.record import FLAGS, TOMBSTONE
from agi.core.dht.requests import TIMEOUT_MS_MAX
from agi.core.dht.sessions import Session
from agi.core.dht.transport.base import Link
from agi.core.dht.treekeeper import Own

if TYPE_CHECKING:
    from agi.core.dht.node import Node


_log = structlog.get_logger("agi.core.dht.queries")

QUERIES_MAX = 256
"""Questions under way at one node; past it callers get Overloaded."""


class Queries:
    """
    Args:
        own: runs a coroutine as a task that the node owns.
    """

    def __init__(self, node: Node, own: Own) -> None:
        self._node = node
        self._own = own
        self.under_way = 0

    def request(self, session: Session, link: Link, request: Query) -> None:
        """A client or a peer asks."""
        if self.under_way >= QUERIES_MAX:
            error = Overloaded(f"{self.under_way} questions are under way at {self._node.node_id} already")
            link.send(QueryReply(request.id, b"", error.to_wire()))
            return
        self.under_way += 1
        self._own(self._reply(session, link, request), "query")

    async def _reply(self, session: Session, link: Link, request: Query) -> None:
        try:
            reply = QueryReply(request.id, *await self._try_answer(request))
        finally:
            self.under_way -= 1
        try:
            session.send(link, reply)
        except (TransportError, Overloaded) as error:
            _log.info("reply_undeliverable", peer=session.name, error=str(error))

    async def _try_answer(self, request: Query) -> tuple[bytes, WireError | None]:
        try:
            async with asyncio.timeout(min(max(1, request.timeout_ms), TIMEOUT_MS_MAX) / 1000):
                return await self.answer(request.what, request.key), None
        except DHTError as error:
            return b"", error.to_wire()
        except TimeoutError:
            return b"", NotReady("no answer by the deadline").to_wire()

    async def answer(self, what: str, key: bytes) -> bytes:
        """The MessagePack map of an answer. Raises InvalidRequest for an unknown question."""
        node = self._node
        if what == "status":
            return msgspec.msgpack.encode(await self.status())
        if node.topology is None:
            raise NotReady(f"{node.node_id} is not ready: {node.waiting_for}")
        if what == "topology":
            return msgspec.msgpack.encode(self.topology())
        if what == "history":
            return msgspec.msgpack.encode([msgspec.to_builtins(past) for past in await node.epochs.history()])
        if what == "stats":
            return msgspec.msgpack.encode(await self.stats())
        if what == "missed":
            node.antientropy.missed()
            return msgspec.msgpack.encode({})
        if what == "repair":
            return msgspec.msgpack.encode(node.antientropy.repair(_bounds(key)))
        if what == "change":
            return msgspec.msgpack.encode(await node.changes.order(_order(key)))
        if what == "room":
            await node.reclaimer.drop_leftovers()
            return msgspec.msgpack.encode({})
        if what == "repair_state":
            return msgspec.msgpack.encode(node.antientropy.repair_state())
        if what == "locate" and key:
            return msgspec.msgpack.encode(await self.locate(key))
        raise InvalidRequest(f"unknown question {what!r}")

    def topology(self) -> dict[str, object]:
        """Members with the addresses that clients need; those not connected right now have no data address."""
        node = self._node
        topology = node.topology
        assert topology is not None
        members = []
        for member in topology.members:
            if member.node_id == node.node_id:
                hello: Hello | None = node.hello()
                reachable = True
            else:
                hello = node.peers.all[member.node_id].hello
                reachable = member.node_id in node.peers.connected
            members.append(
                {
                    "node_id": member.node_id,
                    "disk_id": member.disk_id,
                    "address": member.address,
                    "weight": member.weight,
                    "next_weight": member.next_weight,
                    "rack": member.rack,
                    "zone": member.zone,
                    "state": member.state,
                    "data_address": hello.data_address if hello is not None else "",
                    "http_address": hello.http_address if hello is not None else "",
                    "reachable": reachable,
                    "status": node.detector.status(member.node_id).name,
                }
            )
        return {
            "cluster": topology.cluster,
            "generation": topology.generation,
            "epoch": topology.epoch,
            "digest": topology.digest,
            "voters": list(topology.voters),
            "note": topology.note,
            "in_transition": topology.in_transition,
            "lost": [member.node_id for member in topology.lost],
            "decided_ms": topology.decided_ms,
            "factor": topology.factor,
            "virtual_nodes": topology.virtual_nodes,
            "hash_algorithm": topology.hash_algorithm,
            "read_consistency": node.config.replication.read_consistency.name,
            "write_consistency": node.config.replication.write_consistency.name,
            "timeout_ms": node.config.network.timeout_ms,
            "retry_count": node.config.network.retry_count,
            "members": members,
        }

    async def status(self) -> dict[str, object]:
        """This node's own state and its view of the others."""
        node = self._node
        stats = await node.store.stats()
        return {
            "node_id": node.node_id,
            "address": node.address,
            "ready": not node.waiting_for,
            "waiting_for": node.waiting_for,
            "boot": node.identity.boot,
            "epoch": node.topology.epoch if node.topology is not None else 0,
            "generation": node.topology.generation if node.topology is not None else 0,
            "keys": stats.records,
            "keys_exact": stats.exact,
            "bytes": stats.bytes,
            "storage": node.store.name,
            "hints": {target.node: target.hints for target in node.handoff.hints.pending()},
            "hints_lost": dict(node.handoff.hints.lost),
            "repair": node.antientropy.state(),
            "reclaim": node.reclaimer.state() if node.topology is not None else {},
            "change": {
                "note": node.topology.note if node.topology is not None and node.topology.in_transition else "",
                "ready": node.migration.ready,
                "arcs": node.migration.arcs,
                "arcs_done": node.migration.arcs_done,
                "keys": node.migration.keys,
                "bytes": node.migration.bytes,
            },
            "peers": {
                name: {
                    "connected": name in node.peers.connected,
                    "status": node.detector.status(name).name,
                    "error": peer.last_error,
                }
                for name, peer in node.peers.all.items()
            },
        }

    async def stats(self) -> dict[str, object]:
        node = self._node
        stats = await node.store.stats()
        metrics = node.metrics
        used = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "node_id": node.node_id,
            "cpu_s": used.ru_utime + used.ru_stime,
            "rss_bytes": _rss_bytes(),
            "gets": metrics.gets,
            "puts": metrics.puts,
            "deletes": metrics.deletes,
            "scans": metrics.scans,
            "read_repairs": metrics.read_repairs,
            "failures": sum(metrics.failures.values()),
            "keys": stats.records,
            "keys_exact": stats.exact,
            "bytes": stats.bytes,
        }

    async def locate(self, key: bytes) -> dict[str, object]:
        """Token and replicas of a key, and what each replica holds."""
        node = self._node
        ring = node.ring
        assert ring is not None and node.topology is not None
        replicas = ring.preference(key, node.topology.replica_count)
        held = await asyncio.gather(*(self._held(name, key) for name in replicas))
        return {"token": ring.token(key), "replicas": dict(zip(replicas, held, strict=True))}

    async def _held(self, name: str, key: bytes) -> dict[str, object]:
        try:
            record = await self._read(name, key)
        except DHTError as error:
            return {"state": "unreachable", "error": str(error)}
        if record is None:
            return {"state": "absent"}
        state = state_of(record)
        live = state.value is not None and not 0 < state.expires_ms <= self._node.clock.wall_ms()
        return {
            "state": "live" if live else "tombstone" if record[FLAGS] & TOMBSTONE else "expired",
            "version": state.version,
            "bytes": len(record),
            "expires_at": state.expires_ms or None,
            "ballot": record[:BALLOT_BYTES].hex() if is_register(record) else None,
        }

    async def _read(self, name: str, key: bytes) -> bytes | None:
        node = self._node
        if name != node.node_id:
            assert node.topology is not None
            reply = await node.calls.call(name, ReplicaRead(0, node.topology.epoch, "locate", [key]))
            assert isinstance(reply, ReplicaReadReply)
            return reply.records[0]
        found: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        node.replica.read([key], partial(_settle, found))
        return await found


def _order(packed: bytes) -> Order:
    try:
        return msgspec.msgpack.decode(packed, type=Order)
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"a broken order: {error}") from None


def _bounds(packed: bytes) -> tuple[int, int]:
    """First and last token, 8 bytes each; nothing stands for all of them."""
    if not packed:
        return 0, (1 << 64) - 1
    if len(packed) != 16:
        raise InvalidRequest("a range of tokens is two of 8 bytes")
    return int.from_bytes(packed[:8], "big"), int.from_bytes(packed[8:], "big")


def _rss_bytes() -> int:
    """Resident memory of this process right now; its highest so far where /proc does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _settle(future: asyncio.Future[bytes | None], records: list[bytes | None], error: WireError | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(records[0])
    else:
        future.set_exception(from_wire(*error))
