"""Clients: `DHTClient` for asyncio, `SyncDHTClient` for threads, and a mapping view of the latter."""

from agi.core.dht.client.asynchronous import DHTClient

__all__ = ["DHTClient"]
