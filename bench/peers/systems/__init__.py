"""Every peer that the harness knows, ours first. A module of `systems` imports its client only when it runs."""

from __future__ import annotations

from bench.peers.base import Peer
from bench.peers.systems import dragon, etcd, kademlia, memcached, nats, ours, pysyncobj, redis, zookeeper

PEERS: tuple[Peer, ...] = (
    *ours.PEERS,
    *redis.PEERS,
    *etcd.PEERS,
    *nats.PEERS,
    *zookeeper.PEERS,
    *memcached.PEERS,
    *dragon.PEERS,
    *pysyncobj.PEERS,
    *kademlia.PEERS,
)
