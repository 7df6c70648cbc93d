"""The configuration: one frozen value, read from the command line, the environment and a YAML file, in this order of
precedence, over the defaults.

`schema` declares every setting once; `load` reads and checks them. `python -m agi.core.dht.config docs` writes the
reference of all settings, `python -m agi.core.dht.config example` the commented example file.

>>> config = load_config(None, {"DHT_PORT": "7100"}, {"dht.replication.factor": 5})
>>> config.network.port, config.http_port, config.replication.factor, config.node_id()
(7100, 9100, 5, '127.0.0.1:7100')
"""

from agi.core.dht.config.load import ENVIRONMENT, KNOBS, Config, load_config
from agi.core.dht.config.schema import (
    ClusterConfig,
    ExpiryConfig,
    HintsConfig,
    NetworkConfig,
    NodeConfig,
    ObservabilityConfig,
    ReplicationConfig,
    RequestsConfig,
    RingConfig,
    StorageConfig,
    VersionsConfig,
)

__all__ = [
    "ENVIRONMENT",
    "KNOBS",
    "ClusterConfig",
    "Config",
    "ExpiryConfig",
    "HintsConfig",
    "NetworkConfig",
    "NodeConfig",
    "ObservabilityConfig",
    "ReplicationConfig",
    "RequestsConfig",
    "RingConfig",
    "StorageConfig",
    "VersionsConfig",
    "load_config",
]
