"""Clients: `DHTClient` for asyncio, `SyncDHTClient` for threads, and a mapping view of the latter with its codecs."""

from agi.core.dht.client.asynchronous import DHTClient
from agi.core.dht.client.locks import Lock
from agi.core.dht.client.mapping import RAW, TEXT, Codec, Json, MappingView, MessagePack
from agi.core.dht.client.sync import SyncDHTClient
from agi.core.dht.client.sync_locks import SyncLock

__all__ = [
    "RAW",
    "TEXT",
    "Codec",
    "DHTClient",
    "Json",
    "Lock",
    "MappingView",
    "MessagePack",
    "SyncDHTClient",
    "SyncLock",
]
