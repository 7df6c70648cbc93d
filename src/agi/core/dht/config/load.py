"""The configuration as a whole: reading it from its sources, its cross-field rules, and the values derived from it."""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import xxhash
import yaml

from agi.core.dht.config.kinds import PORT_MAX
from agi.core.dht.config.schema import (
    PRESETS,
    ClusterConfig,
    ExpiryConfig,
    HealthConfig,
    HintsConfig,
    Knob,
    MigrationConfig,
    NetworkConfig,
    NodeConfig,
    ObservabilityConfig,
    ReclaimConfig,
    RepairConfig,
    ReplicationConfig,
    RequestsConfig,
    RingConfig,
    StorageConfig,
    VersionsConfig,
)
from agi.core.dht.errors import ConfigError
from agi.core.dht.protocol.membership import Pace
from agi.core.dht.ring import VNODES_MAX
from agi.core.dht.types import Consistency, Node, format_address, parse_address

ROOT = "dht"
DATA_PORT_OFFSET = 1000
HTTP_PORT_OFFSET = 2000
DEFAULT_SOURCE = "default"
COMMAND_LINE = "command line"
_WILDCARDS = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # what reaches them from this machine


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that can be set, group by group (schema.py describes each setting), and what follows from it.

    `load_config` makes it: it checks each value; this class checks that they agree.

    Where `network.port` is 0 the derived names depend on the port that the node got: pass it as `bound_port`.

    Raises ConfigError where settings contradict each other.
    """

    node: NodeConfig = field(default_factory=NodeConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    replication: ReplicationConfig = field(default_factory=ReplicationConfig)
    ring: RingConfig = field(default_factory=RingConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    versions: VersionsConfig = field(default_factory=VersionsConfig)
    requests: RequestsConfig = field(default_factory=RequestsConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    hints: HintsConfig = field(default_factory=HintsConfig)
    repair: RepairConfig = field(default_factory=RepairConfig)
    migration: MigrationConfig = field(default_factory=MigrationConfig)
    reclaim: ReclaimConfig = field(default_factory=ReclaimConfig)
    expiry: ExpiryConfig = field(default_factory=ExpiryConfig)
    observability: ObservabilityConfig = field(default_factory=ObservabilityConfig)
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Where each setting that is not a default came from: dotted key -> file:line, variable or "command line"."""

    def __post_init__(self) -> None:
        self.validate()

    @property
    def data_port(self) -> int:
        """The port of the native wire to bind; 0 for any."""
        return self._port_or_derived(self.network.data_port, DATA_PORT_OFFSET)

    @property
    def http_port(self) -> int:
        """The port of the HTTP endpoints to bind; 0 for any."""
        return self._port_or_derived(self.network.http_port, HTTP_PORT_OFFSET)

    def advertised_address(self, bound_port: int | None = None) -> str:
        """The address under which others reach this node's gRPC port."""
        if self.node.advertise:
            return self.node.advertise
        port = bound_port or self.network.port
        if not port:
            raise ConfigError("dht.network.port is 0: the advertised address is known once the port is bound")
        host = self.network.host
        return format_address(_WILDCARDS.get(host, host), port)

    def node_id(self, bound_port: int | None = None) -> str:
        return self.node.id or self.advertised_address(bound_port)

    def storage_path(self, bound_port: int | None = None) -> Path:
        """The data folder, absolute."""
        path = self.storage.path
        if "{node_id}" in path:
            safe = re.sub(r"^\.|[^A-Za-z0-9._-]", "_", self.node_id(bound_port))
            path = path.replace("{node_id}", safe)
        return Path(os.path.expanduser(path)).absolute()  # noqa: PTH111  # Path's raises for an unknown user

    def unix_socket_path(self, bound_port: int | None = None) -> Path | None:
        """The Unix socket of the native wire, None for none. Its folder may have to be made, for this user only."""
        if not self.network.unix_socket:
            return None
        if self.network.unix_socket != "auto":
            return Path(self.network.unix_socket)
        # Short whatever the data folder's name is: a socket's path has at most 107 bytes.
        name = xxhash.xxh3_64_hexdigest(f"{self.storage_path(bound_port)}\0{bound_port or self.network.port}".encode())
        return Path(tempfile.gettempdir()) / f"agi-dht-{os.getuid()}" / f"{name}.sock"

    def pace(self) -> Pace:
        """The failure detector's settings, `auto` replaced by what the preset says."""
        health, preset = self.health, PRESETS[self.health.preset]

        def value(name: str) -> int:
            given: int | None = getattr(health, name)
            return preset[name] if given is None else given

        return Pace(
            heartbeat_s=value("heartbeat_interval_ms") / 1000,
            probe_timeout_s=value("probe_timeout_ms") / 1000,
            failure_threshold=health.failure_threshold,
            indirect_probes=health.indirect_probes,
            suspicion_mult=value("suspicion_mult"),
            suspicion_max_mult=health.suspicion_max_mult,
            recovery_s=value("recovery_timeout_ms") / 1000,
            gossip_interval_s=value("gossip_interval_ms") / 1000,
            gossip_nodes=health.gossip_nodes,
            retransmit_mult=health.retransmit_mult,
            sync_interval_s=value("sync_interval_ms") / 1000,
            awareness_max=health.awareness_max,
        )

    def as_node(self, bound_port: int | None = None) -> Node:
        """This node as a member of the ring."""
        address, port = parse_address(self.advertised_address(bound_port))
        labels = {"rack": self.node.rack, "zone": self.node.zone}
        return Node(
            node_id=self.node_id(bound_port),
            address=address,
            port=port,
            weight=self.node.weight,
            virtual_nodes=self.ring.virtual_nodes,
            metadata={label: value for label, value in labels.items() if value},
        )

    def shared_settings(self) -> dict[str, str | int]:
        """What all nodes of a cluster must have in common, under the names of the fields of `messages.Hello`."""
        return {
            "cluster": self.cluster.name,
            "factor": self.replication.factor,
            "virtual_nodes": self.ring.virtual_nodes,
            "hash_algorithm": self.ring.hash_algorithm,
        }

    def describe(self) -> list[tuple[str, str, str]]:
        """(dotted key, value as YAML has it, source) of every setting, in the order of the table. Passwords are masked;
        values that follow from others are shown as what they come to."""
        derived: dict[str, tuple[str, str]] = {}
        if self.network.port:
            derived = {
                "dht.network.data_port": (str(self.data_port), f"port + {DATA_PORT_OFFSET}"),
                "dht.network.http_port": (str(self.http_port), f"port + {HTTP_PORT_OFFSET}"),
                "dht.node.advertise": (self.advertised_address(), "host:port"),
                "dht.node.id": (self.node_id(), "advertise"),
                "dht.storage.path": (str(self.storage_path()), "{node_id}"),
            }
        rows = []
        for key, row in KNOBS.items():
            value, source = as_text(self.value(key)), self.sources.get(key, DEFAULT_SOURCE)
            if source == DEFAULT_SOURCE and key in derived:
                value, how = derived[key]
                source = f"{DEFAULT_SOURCE} ({how})"
            if row.secret:
                value = re.sub(r"(?<=://).*(?=@)|(?<=password=)[^&]*", "***", value)
            rows.append((key, value, source))
        return rows

    def value(self, key: str) -> object:
        """The value of a setting by its dotted key."""
        _, group, name = key.split(".")
        return getattr(getattr(self, group), name)

    def validate(self) -> None:
        """Checks the rules that bind several settings. Raises ConfigError naming them and their sources."""
        ports: dict[int, str] = {}
        for name, port in (("port", self.network.port), ("data_port", self.data_port), ("http_port", self.http_port)):
            if port > PORT_MAX:
                limit = f"{name} = port + {port - self.network.port} would be {port}, past {PORT_MAX}"
                raise ConfigError(f"{self._named('dht.network.port')}: {limit}; set dht.network.{name} (0 for any)")
            if port and ports.setdefault(port, name) != name:
                both = f"{self._named(f'dht.network.{ports[port]}')} and {self._named(f'dht.network.{name}')}"
                raise ConfigError(f"{both} are the same port, {port}")
        if round(self.ring.virtual_nodes * self.node.weight) > VNODES_MAX:
            both = f"{self._named('dht.ring.virtual_nodes')} x {self._named('dht.node.weight')}"
            raise ConfigError(f"{both} is over {VNODES_MAX} points on the ring")
        pace = self.pace()
        if pace.probe_timeout_s > pace.heartbeat_s / 2:
            raise ConfigError(
                f"{self._named('dht.health.probe_timeout_ms')} is {pace.probe_timeout_s * 1000:g}: at most half of "
                f"{self._named('dht.health.heartbeat_interval_ms')}, {pace.heartbeat_s * 1000:g}"
            )
        if self.storage.backend == "redis" and not self.storage.redis_url:
            raise ConfigError(f"{self._named('dht.storage.backend')} is redis: set dht.storage.redis_url")
        if unknown := re.findall(r"\{(?!node_id\})\w*\}", self.storage.path):
            raise ConfigError(f"{self._named('dht.storage.path')}: unknown {unknown[0]}; only {{node_id}} is replaced")
        for address in self.cluster.force_start_without:
            if address not in self.cluster.bootstrap_nodes:
                where = self._named("dht.cluster.force_start_without")
                raise ConfigError(f"{where}: {address} is not one of dht.cluster.bootstrap_nodes")
        remote = [peer for peer in self.cluster.bootstrap_nodes if not _is_loopback(parse_address(peer)[0])]
        host = self.network.host
        if remote and not self.node.advertise and _is_loopback(_WILDCARDS.get(host, host)):
            raise ConfigError(
                f"{self._named('dht.network.host')} is {host!r}, by which {remote[0]} cannot reach this node: "
                "set dht.network.host to an address of this machine, or dht.node.advertise"
            )

    def _port_or_derived(self, port: int | None, offset: int) -> int:
        if port is not None:
            return port
        return self.network.port + offset if self.network.port else 0

    def _named(self, key: str) -> str:
        return f"{key} ({self.sources.get(key, DEFAULT_SOURCE)})"


_GROUPS: dict[str, Any] = {group.name: group.default_factory for group in fields(Config) if group.name != "sources"}
KNOBS: Mapping[str, Knob] = MappingProxyType(
    {f"{ROOT}.{name}.{knob.name}": knob.metadata["knob"] for name, group in _GROUPS.items() for knob in fields(group)}
)
"""The table: dotted key -> its row."""
_SHORT = {"DHT_PORT": "dht.network.port", "DHT_PEERS": "dht.cluster.bootstrap_nodes"}
ENVIRONMENT: Mapping[str, str] = MappingProxyType({key.upper().replace(".", "_"): key for key in KNOBS} | _SHORT)
"""Environment variable -> dotted key."""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def load_config(path: Path | None, environ: Mapping[str, str], overrides: Mapping[str, object]) -> Config:
    """Reads the configuration.

    Args:
        path: a YAML file, or None.
        environ: the environment; variables that do not begin with DHT_ are not looked at.
        overrides: the command line: dotted key (`dht.network.port`; the leading `dht.` may be left out) -> value, as
            text or as itself; None stands for an option that was not given.

    Raises ConfigError for what is unknown, wrong or contradictory, with the file and line, variable or option.
    """
    values: dict[str, object] = {}
    sources: dict[str, str] = {}
    given = list(_from_yaml(path)) if path is not None else []
    for key, text, source in (*given, *_from_environ(environ), *_from_overrides(overrides)):
        values[key], sources[key] = _parse(key, text, source), source
    groups = {
        name: group(**{key.rpartition(".")[2]: value for key, value in values.items() if key.split(".")[1] == name})
        for name, group in _GROUPS.items()
    }
    return Config(**groups, sources=MappingProxyType(sources))


def as_text(value: object) -> str:
    """A value as `load_config` reads it, which for single values is also how YAML has it."""
    if isinstance(value, Consistency):
        return value.name
    if isinstance(value, list | tuple):
        return ",".join(as_text(item) for item in value)
    if isinstance(value, bool):
        return str(value).lower()
    return "auto" if value is None else str(value)


def _parse(key: str, text: str, source: str) -> object:
    try:
        return KNOBS[key].kind.parse(text.strip())
    except ValueError as error:
        shown = "the given value" if KNOBS[key].secret else repr(text)
        what = f" {error}, not {shown}" if str(error).startswith("must") else f": {error}"
        raise ConfigError(f"{source}: {key}{what}") from None


def _from_overrides(overrides: Mapping[str, object]) -> Iterator[tuple[str, str, str]]:
    for name, value in overrides.items():
        key = name if name.startswith(f"{ROOT}.") else f"{ROOT}.{name}"
        if key not in KNOBS:
            raise ConfigError(f"{COMMAND_LINE}: {_unknown(key)}")
        if value is not None:
            yield key, as_text(value), COMMAND_LINE


def _from_environ(environ: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    seen: dict[str, str] = {}
    for name in sorted(environ):
        if not name.startswith("DHT_"):
            continue
        if name not in ENVIRONMENT:
            near = difflib.get_close_matches(name, ENVIRONMENT, 1, 0)
            raise ConfigError(f"environment variable {name}: unknown; did you mean {near[0]}?")
        key = ENVIRONMENT[name]
        other = seen.setdefault(key, name)
        if environ[other] != environ[name]:
            raise ConfigError(f"environment variables {other} and {name} both set {key}, to different values")
        yield key, environ[name], f"environment variable {name}"


def _from_yaml(path: Path) -> Iterator[tuple[str, str, str]]:
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if root is None:
        return
    for top, groups in _mapping(path, root, "the file"):
        if top.value != ROOT:
            raise ConfigError(f"{_at(path, top)}: unknown key {top.value}; the file has the one key {ROOT}")
        for group, settings in _mapping(path, groups, ROOT):
            if group.value not in _GROUPS:
                raise ConfigError(f"{_at(path, group)}: {_unknown(f'{ROOT}.{group.value}')}")
            for name, value in _mapping(path, settings, f"{ROOT}.{group.value}"):
                key = f"{ROOT}.{group.value}.{name.value}"
                if key not in KNOBS:
                    raise ConfigError(f"{_at(path, name)}: {_unknown(key)}")
                yield key, _scalar(path, key, value), _at(path, value)


def _at(path: Path, node: yaml.Node) -> str:
    return f"{path}:{node.start_mark.line + 1}"


def _is_null(node: yaml.Node) -> bool:
    return node.tag == "tag:yaml.org,2002:null"


def _mapping(path: Path, node: yaml.Node, what: str) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
    if _is_null(node):  # a group whose settings are all commented out
        return
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{_at(path, node)}: {what} must be a mapping of keys to values")
    seen: dict[str, int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{_at(path, key)}: a key must be a plain word")
        if key.value in seen:
            raise ConfigError(f"{_at(path, key)}: {key.value} is given twice, first in line {seen[key.value]}")
        seen[key.value] = key.start_mark.line + 1
        yield key, value


def _scalar(path: Path, key: str, node: yaml.Node) -> str:
    if _is_null(node):
        return ""
    if isinstance(node, yaml.ScalarNode):
        return str(node.value)
    if isinstance(node, yaml.SequenceNode) and isinstance(Config().value(key), tuple):
        for item in node.value:
            if not isinstance(item, yaml.ScalarNode):
                raise ConfigError(f"{_at(path, item)}: {key}: each item must be an address")
            _parse(key, item.value, _at(path, item))  # so that an error names the item's own line
        return ",".join(item.value for item in node.value)
    raise ConfigError(f"{_at(path, node)}: {key} must be a single value: {KNOBS[key].kind.accepts}")


def _unknown(key: str) -> str:
    """What to say of a key that does not exist: the nearest one that does."""
    _, _, rest = key.partition(".")
    group, _, name = rest.partition(".")
    same_name = [known for known in KNOBS if name and known.endswith(f".{name}")]
    if not name:
        near = [f"{ROOT}.{close}" for close in difflib.get_close_matches(group, _GROUPS, 1, 0)]
    elif same_name:
        near = same_name
    elif group in _GROUPS:
        in_group = [field.name for field in fields(_GROUPS[group])]
        near = [f"{ROOT}.{group}.{close}" for close in difflib.get_close_matches(name, in_group, 1)]
    else:
        near = []
    near = near or difflib.get_close_matches(key, KNOBS, 1, 0)
    return f"unknown key {key}; did you mean {near[0]}?"
