"""Drives the agreement on the first topology (protocol/bootstrap.py): asks every known address until it is decided."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import structlog

from agi.core.dht.errors import ClusterError, DHTError, named
from agi.core.dht.identity import Ledger
from agi.core.dht.protocol.bootstrap import Bootstrap, StoreTopology, StoreVote
from agi.core.dht.protocol.messages import Hello
from agi.core.dht.topology import Topology
from agi.core.dht.transport.base import Transport
from agi.core.dht.transport.handshake import Nobody, greet

_log = structlog.get_logger("agi.core.dht.bootstrap")

ASK_INTERVAL_S = 0.1
ASK_INTERVAL_MAX_S = 1.0
LOG_INTERVAL_S = 10.0
"""The reason for waiting is logged when it changes, and again after so long."""


class Bootstrapper:
    """Runs one node's part until it has a topology. `reason` says what it waits for."""

    def __init__(
        self,
        core: Bootstrap,
        ledger: Ledger,
        transport: Transport,
        hello: Callable[[], Hello],
        check: Callable[[Hello], None],
        rng: random.Random,
    ) -> None:
        self.core = core
        self.reason = "starting"
        self._ledger = ledger
        self._transport = transport
        self._hello = hello
        self._check = check
        self._rng = rng
        self._logged_at = float("-inf")
        self._loop = asyncio.get_running_loop()

    async def run(self) -> Topology:
        """The decided topology, already stored. Waits as long as it takes; cancel it to give up."""
        interval_s = ASK_INTERVAL_S
        while True:
            topology = await self._round()
            if topology is not None:
                addresses = [*self.core.addresses, *(member.address for member in topology.members)]
                await self._ledger.store_topology(topology, sorted(set(addresses)))
                return topology
            await asyncio.sleep(interval_s * (0.5 + self._rng.random()))
            interval_s = min(ASK_INTERVAL_MAX_S, interval_s * 1.2)

    async def _round(self) -> Topology | None:
        addresses = self.core.addresses
        answers = await asyncio.gather(*(self._ask(address) for address in addresses))
        try:
            for address, answer in zip(addresses, answers, strict=True):
                if isinstance(answer, Hello):
                    adopted = self.core.answered(address, answer)
                    if adopted is not None:
                        return adopted.topology
                else:
                    self.core.unreachable(address, named(answer))
            effect = self.core.step()
            if isinstance(effect, StoreVote):
                await self._ledger.store_vote(effect.topology)
                self.core.voted(effect.topology)
                self._say(f"voted for the first topology over {len(effect.topology.members)} nodes")
                effect = self.core.step()
            if isinstance(effect, StoreTopology):
                return effect.topology
            if not isinstance(effect, StoreVote):
                self._say(effect.reason)
        except ClusterError as error:
            self._say(named(error))
        return None

    async def _ask(self, address: str) -> Hello | DHTError:
        try:
            link, hello = await greet(self._transport, address, self._hello(), Nobody())
        except DHTError as error:
            return error
        link.close()
        try:
            self._check(hello)
        except DHTError as error:
            return error
        return hello

    def _say(self, reason: str) -> None:
        now = self._loop.time()
        if reason != self.reason or now - self._logged_at > LOG_INTERVAL_S:
            self.reason = reason
            self._logged_at = now
            _log.warning("bootstrap_waiting", reason=reason)
