"""A replicated, self-healing key-value store with no central coordinator.

    from agi.core.dht import SyncDHTClient

    with SyncDHTClient() as client:
        client.connect(["localhost:7000"])
        client.put("greeting", b"hello", ttl_seconds=60)
        client.get("greeting")

What is exported here is the public API; all else may change. `DHTClient` is the same client for asyncio. Every error
is a `DHTError` (errors.py draws the tree).

Module map, from what users see down to what everything stands on; imports only point down:

    cli                 command line
    testing             simulated clock, network, disk and hosts, for tests of this package and of its users
    bench, local        load and its measure; clusters of processes on this machine
    server              the process of one node
    client              asyncio client, client for threads, mapping view
    service, admin      the gRPC calls (service_messages, service_health); the HTTP pages
    commands            how a command ends
    node                wires one node together
    queries, hello      answers to operators: topology, status, stats, locate; whom a node lets in
    coordinator, scan   requests of clients: reads, writes, requests; ordered scans
    antientropy         replicas compared and repaired: tree_answers, treekeeper
    calls, peers        links to the other nodes
    gossip              which of them are alive
    replica             this node's copy of its keys
    bootstrap, identity how a cluster forms; what a data folder knows
    storage, transport  memory, RocksDB, Redis; native frames, gRPC, memory
    observability       counters, logs
    config, clock       settings; injected time
    protocol            pure state machines: quorums, group commit, versions, first topology, hash trees, messages
    topology, ring      who owns what; consistent hashing
    types, errors       values, limits, the error tree
"""

from agi.core.dht.client import (
    RAW,
    TEXT,
    Codec,
    DHTClient,
    Json,
    Lock,
    MappingView,
    MessagePack,
    SyncDHTClient,
    SyncLock,
)
from agi.core.dht.errors import (
    BatchError,
    BootstrapConflict,
    ChangeRefused,
    ClientClosed,
    ClockSkew,
    ClonedNode,
    ClusterError,
    ConfigError,
    ConnectFailed,
    DHTError,
    FenceRejected,
    FolderMismatch,
    FolderUnusable,
    FrameTooLarge,
    HelloRefused,
    InvalidAddress,
    InvalidConsistency,
    InvalidKey,
    InvalidRequest,
    InvalidTTL,
    InvalidValue,
    LinkClosed,
    LockHeld,
    LockLost,
    NotACounter,
    NotReady,
    OutcomeUnknown,
    Overloaded,
    ProtocolMismatch,
    Removed,
    StaleEpoch,
    StorageClosed,
    StorageCorrupt,
    StorageError,
    StorageFull,
    TransportError,
    Truncated,
    Unavailable,
    UnknownDisk,
    VersionConflict,
    WrongFence,
)
from agi.core.dht.ring import HashRing, Partition
from agi.core.dht.types import Consistency, Entry, Fence, LockStatus, MemberStatus, Node

__all__ = [
    "RAW",
    "TEXT",
    "BatchError",
    "BootstrapConflict",
    "ChangeRefused",
    "ClientClosed",
    "ClockSkew",
    "ClonedNode",
    "ClusterError",
    "Codec",
    "ConfigError",
    "ConnectFailed",
    "Consistency",
    "DHTClient",
    "DHTError",
    "Entry",
    "Fence",
    "FenceRejected",
    "FolderMismatch",
    "FolderUnusable",
    "FrameTooLarge",
    "HashRing",
    "HelloRefused",
    "InvalidAddress",
    "InvalidConsistency",
    "InvalidKey",
    "InvalidRequest",
    "InvalidTTL",
    "InvalidValue",
    "Json",
    "LinkClosed",
    "Lock",
    "LockHeld",
    "LockLost",
    "LockStatus",
    "MappingView",
    "MemberStatus",
    "MessagePack",
    "Node",
    "NotACounter",
    "NotReady",
    "OutcomeUnknown",
    "Overloaded",
    "Partition",
    "ProtocolMismatch",
    "Removed",
    "StaleEpoch",
    "StorageClosed",
    "StorageCorrupt",
    "StorageError",
    "StorageFull",
    "SyncDHTClient",
    "SyncLock",
    "TransportError",
    "Truncated",
    "Unavailable",
    "UnknownDisk",
    "VersionConflict",
    "WrongFence",
]
