"""Clients: `DHTClient` for asyncio, `SyncDHTClient` for threads, and a mapping view of the latter with its codecs."""

from agi.core.dht.client.asynchronous import DHTClient
from agi.core.dht.client.mapping import RAW, TEXT, Codec, Json, MappingView, MessagePack
from agi.core.dht.client.sync import SyncDHTClient

__all__ = ["RAW", "TEXT", "Codec", "DHTClient", "Json", "MappingView", "MessagePack", "SyncDHTClient"]
