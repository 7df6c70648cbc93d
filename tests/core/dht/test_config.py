"""The configuration: every setting from every source, precedence, errors that name their place, current documents."""

from __future__ import annotations

import dataclasses
import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from agi.core.dht import config as config_module
from agi.core.dht.config import ENVIRONMENT, KNOBS, Config, NetworkConfig, load_config
from agi.core.dht.errors import ConfigError
from agi.core.dht.protocol.messages import Hello
from agi.core.dht.ring import Ring
from agi.core.dht.types import Consistency

REPOSITORY = Path(__file__).parents[3]

# (key, its default, then for YAML, environment and command line: the text given and the value it must become)
TABLE: list[tuple[str, object, tuple[str, object], tuple[str, object], tuple[object, object]]] = [
    ("dht.node.id", "", ("a", "a"), ("b", "b"), ("c", "c")),
    ("dht.node.advertise", "", ("h1:1", "h1:1"), ("h2:2", "h2:2"), (" [::1]:3 ", "[::1]:3")),
    ("dht.node.weight", 1.0, ("0.5", 0.5), ("2", 2.0), (3, 3.0)),
    ("dht.node.rack", "", ("007", "007"), ("r2", "r2"), ("r3", "r3")),
    ("dht.node.zone", "", ("no", "no"), ("z2", "z2"), ("z3", "z3")),
    ("dht.cluster.name", "dht", ("one", "one"), ("two", "two"), ("three", "three")),
    (
        "dht.cluster.bootstrap_nodes",
        (),
        ("['127.0.0.1:1', '[::1]:2']", ("127.0.0.1:1", "[::1]:2")),
        ("localhost:3, 127.0.0.1:4", ("localhost:3", "127.0.0.1:4")),
        (["localhost:5"], ("localhost:5",)),
    ),
    ("dht.cluster.replaces", "", ("n1", "n1"), ("n2", "n2"), ("host:7000", "host:7000")),
    ("dht.cluster.force_start_without", (), ("[]", ()), ("", ()), ((), ())),  # test_force_start_without goes on
    ("dht.replication.factor", 3, ("1", 1), ("5", 5), (7, 7)),
    (
        "dht.replication.read_consistency",
        Consistency.QUORUM,
        ("ONE", Consistency.ONE),
        ("all", Consistency.ALL),
        (Consistency.ONE, Consistency.ONE),
    ),
    (
        "dht.replication.write_consistency",
        Consistency.QUORUM,
        ("one", Consistency.ONE),
        ("ALL", Consistency.ALL),
        (Consistency.ONE, Consistency.ONE),
    ),
    ("dht.ring.virtual_nodes", 150, ("1", 1), ("64", 64), (10000, 10000)),
    ("dht.ring.hash_algorithm", "xxh3", ("md5", "md5"), ("XXH3", "xxh3"), ("md5", "md5")),
    ("dht.storage.backend", "rocksdb", ("memory", "memory"), ("rocksdb", "rocksdb"), ("memory", "memory")),
    ("dht.storage.path", "./dht-data/{node_id}", ("/a", "/a"), ("/b", "/b"), (Path("/c"), "/c")),
    ("dht.storage.cache_size_mb", 64, ("8", 8), ("64", 64), (1024, 1024)),
    ("dht.storage.wal_sync", "group", ("none", "none"), ("interval", "interval"), ("group", "group")),
    ("dht.storage.wal_sync_interval_ms", 100, ("1", 1), ("50", 50), (60000, 60000)),
    (
        "dht.storage.redis_url",
        "",
        ("redis://a", "redis://a"),
        ("unix:///b", "unix:///b"),
        ("rediss://c:1/2", "rediss://c:1/2"),
    ),
    ("dht.network.host", "127.0.0.1", ("::1", "::1"), ("localhost", "localhost"), ("0.0.0.0", "0.0.0.0")),
    ("dht.network.port", 7000, ("0", 0), ("1", 1), ("63535", 63535)),
    ("dht.network.data_port", None, ("0", 0), ("5", 5), ("auto", None)),
    ("dht.network.http_port", None, ("65535", 65535), ("AUTO", None), (7, 7)),
    ("dht.network.unix_socket", "auto", ("/a.sock", "/a.sock"), ("", ""), ("/b.sock", "/b.sock")),
    ("dht.network.timeout_ms", 2000, ("10", 10), ("100", 100), (600000, 600000)),
    ("dht.network.retry_count", 3, ("0", 0), ("1", 1), (10, 10)),
    ("dht.network.connection_pool_size", 2, ("1", 1), ("3", 3), (64, 64)),
    ("dht.network.reuse_port", False, ("true", True), ("FALSE", False), (True, True)),
    ("dht.network.drain_timeout_ms", 10000, ("0", 0), ("1", 1), (600000, 600000)),
    ("dht.versions.max_clock_skew_ms", 5000, ("1", 1), ("250", 250), (3600000, 3600000)),
    ("dht.requests.hedge_percentile", 0.95, ("0.5", 0.5), ("0.9", 0.9), (0.99, 0.99)),
    ("dht.requests.hedge_budget", 0.05, ("0", 0.0), ("0.1", 0.1), (1, 1.0)),
    ("dht.requests.dedup_entries", 65536, ("1", 1), ("2", 2), (16777216, 16777216)),
    ("dht.requests.pending_bytes_max_mb", 256, ("16", 16), ("17", 17), (65536, 65536)),
    ("dht.requests.queue_ms", 500, ("10", 10), ("11", 11), (60000, 60000)),
    ("dht.health.preset", "lan", ("local", "local"), ("WAN", "wan"), ("lan", "lan")),
    ("dht.health.heartbeat_interval_ms", None, ("400", 400), ("auto", None), (600000, 600000)),
    ("dht.health.probe_timeout_ms", None, ("10", 10), ("AUTO", None), (250, 250)),
    ("dht.health.failure_threshold", 2, ("1", 1), ("3", 3), (100, 100)),
    ("dht.health.indirect_probes", 3, ("0", 0), ("1", 1), (100, 100)),
    ("dht.health.suspicion_mult", None, ("1", 1), ("auto", None), (100, 100)),
    ("dht.health.suspicion_max_mult", 6, ("1", 1), ("2", 2), (100, 100)),
    ("dht.health.recovery_timeout_ms", None, ("20", 20), ("auto", None), (3600000, 3600000)),
    ("dht.health.gossip_interval_ms", None, ("10", 10), ("auto", None), (60000, 60000)),
    ("dht.health.gossip_nodes", 3, ("0", 0), ("1", 1), (100, 100)),
    ("dht.health.retransmit_mult", 4, ("1", 1), ("2", 2), (100, 100)),
    ("dht.health.sync_interval_ms", None, ("100", 100), ("auto", None), (3600000, 3600000)),
    ("dht.health.awareness_max", 8, ("0", 0), ("1", 1), (100, 100)),
    ("dht.hints.bytes_max_mb", 128, ("0", 0), ("1", 1), (65536, 65536)),
    ("dht.hints.age_max_s", 10800, ("1", 1), ("2", 2), (2592000, 2592000)),
    ("dht.hints.replay_bytes_per_s", 16777216, ("1024", 1024), ("1025", 1025), (1 << 34, 1 << 34)),
    ("dht.repair.interval_ms", 20_000, ("0", 0), ("500", 500), (86_400_000, 86_400_000)),
    ("dht.repair.bytes_per_s", 8_388_608, ("1024", 1024), ("5000", 5000), (1 << 34, 1 << 34)),
    ("dht.repair.build_keys_per_s", 50_000, ("100", 100), ("101", 101), (10_000_000, 10_000_000)),
    ("dht.migration.bytes_per_s", 67_108_864, ("1024", 1024), ("5000", 5000), (1 << 34, 1 << 34)),
    ("dht.migration.join_timeout_ms", 300_000, ("1000", 1000), ("2000", 2000), (86_400_000, 86_400_000)),
    ("dht.migration.eviction_timeout_ms", 3_600_000, ("0", 0), ("1", 1), (2_592_000_000, 2_592_000_000)),
    ("dht.reclaim.interval_ms", 600_000, ("0", 0), ("500", 500), (86_400_000, 86_400_000)),
    ("dht.reclaim.lag_ms", 60_000, ("0", 0), ("500", 500), (86_400_000, 86_400_000)),
    ("dht.expiry.sweep_interval_ms", 1000, ("10", 10), ("11", 11), (3600000, 3600000)),
    ("dht.expiry.sweep_step", 1000, ("1", 1), ("2", 2), (100000, 100000)),
    ("dht.observability.log_level", "info", ("debug", "debug"), ("WARNING", "warning"), ("error", "error")),
    ("dht.observability.log_format", "auto", ("json", "json"), ("console", "console"), ("auto", "auto")),
    ("dht.observability.slow_request_ms", 500, ("0", 0), ("1", 1), (600000, 600000)),
]


def write(folder: Path, text: str) -> Path:
    path = folder / "dht.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def yaml_of(folder: Path, key: str, text: str) -> Path:
    root, group, name = key.split(".")
    return write(folder, f"{root}:\n  {group}:\n    {name}: {text}\n")


def variable_of(key: str) -> str:
    return key.upper().replace(".", "_")


def source_of(config: Config, key: str) -> str:
    return next(source for name, _, source in config.describe() if name == key)


def refused(path: Path | None = None, environ: dict[str, str] | None = None, **overrides: object) -> str:
    """The error of a configuration; keyword `network__port` stands for `dht.network.port`."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, environ or {}, {key.replace("__", "."): value for key, value in overrides.items()})
    return str(caught.value)


# --- every setting


def test_the_table_of_this_test_has_every_setting() -> None:
    assert [row[0] for row in TABLE] == list(KNOBS)


@pytest.mark.parametrize(("key", "default", "in_yaml", "in_environ", "in_overrides"), TABLE, ids=[r[0] for r in TABLE])
def test_every_setting_is_read_from_every_source_in_order_of_precedence(
    tmp_path: Path,
    key: str,
    default: object,
    in_yaml: tuple[str, object],
    in_environ: tuple[str, object],
    in_overrides: tuple[object, object],
) -> None:
    path = yaml_of(tmp_path, key, in_yaml[0])
    environ = {variable_of(key): in_environ[0], "PATH": "/bin"}
    overrides = {key: in_overrides[0]}
    for expected, config, source in (
        (default, load_config(None, {}, {}), "default"),
        (in_yaml[1], load_config(path, {}, {}), f"{path}:3"),
        (in_environ[1], load_config(None, environ, {}), f"environment variable {variable_of(key)}"),
        (in_overrides[1], load_config(None, {}, overrides), "command line"),
        (in_environ[1], load_config(path, environ, {}), f"environment variable {variable_of(key)}"),
        (in_overrides[1], load_config(path, {}, overrides), "command line"),
        (in_overrides[1], load_config(None, environ, overrides), "command line"),
        (in_overrides[1], load_config(path, environ, overrides), "command line"),
    ):
        assert config.value(key) == expected
        assert type(config.value(key)) is type(expected)
        assert source_of(config, key).startswith(source)
        others = [row for row in config.describe() if row[0] != key and not row[2].startswith("default")]
        assert others == []


@pytest.mark.parametrize(
    "row", [row for row in TABLE if row[0] != "dht.cluster.force_start_without"], ids=lambda r: r[0]
)
def test_the_values_above_tell_the_sources_apart(
    row: tuple[str, object, tuple[str, object], tuple[str, object], tuple[object, object]],
) -> None:
    _, default, *given = row
    values = [value for _, value in given]
    assert values[0] != default and values[1] != values[0] and values[2] != values[1]


def test_force_start_without(tmp_path: Path) -> None:
    key, peers = "dht.cluster.force_start_without", "localhost:1,localhost:2,localhost:3"
    path = yaml_of(tmp_path, key, "['localhost:1']")
    environ = {"DHT_PEERS": peers}
    assert load_config(path, environ, {}).cluster.force_start_without == ("localhost:1",)
    environ[variable_of(key)] = "localhost:2"
    assert load_config(path, environ, {}).cluster.force_start_without == ("localhost:2",)
    assert load_config(path, environ, {key: ["localhost:3"]}).cluster.force_start_without == ("localhost:3",)
    message = refused(path, {"DHT_PEERS": "localhost:9"})
    assert message == f"{key} ({path}:3): localhost:1 is not one of dht.cluster.bootstrap_nodes"


def test_short_variable_names() -> None:
    config = load_config(None, {"DHT_NODE_ID": "n", "DHT_PORT": "7100", "DHT_PEERS": "localhost:7000"}, {})
    assert (config.node.id, config.network.port) == ("n", 7100)
    assert config.cluster.bootstrap_nodes == ("localhost:7000",)
    assert source_of(config, "dht.network.port") == "environment variable DHT_PORT"
    assert load_config(None, {"DHT_PORT": "7", "DHT_NETWORK_PORT": "7"}, {}).network.port == 7
    message = refused(environ={"DHT_PORT": "7", "DHT_NETWORK_PORT": "8"})
    assert message == (
        "environment variables DHT_NETWORK_PORT and DHT_PORT both set dht.network.port, to different values"
    )


def test_variables_are_unambiguous() -> None:
    assert len(ENVIRONMENT) == len(KNOBS) + 2
    assert set(ENVIRONMENT.values()) == set(KNOBS)


def test_command_line_options_that_were_not_given_change_nothing() -> None:
    assert load_config(None, {"DHT_PORT": "7100"}, {"dht.network.port": None}).network.port == 7100
    assert load_config(None, {}, {"network.port": 7200}).network.port == 7200


def test_lists_may_be_one_string_in_yaml(tmp_path: Path) -> None:
    path = yaml_of(tmp_path, "dht.cluster.bootstrap_nodes", "localhost:1, localhost:2")
    assert load_config(path, {}, {}).cluster.bootstrap_nodes == ("localhost:1", "localhost:2")


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "dht:\n", "dht:\n  network:\n", "dht:\n  network:\n    # port: 1\n"]
)
def test_a_file_may_leave_everything_out(tmp_path: Path, text: str) -> None:
    assert load_config(write(tmp_path, text), {}, {}) == Config()


# --- errors


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dth:\n  network: {}\n", "1: unknown key dth; the file has the one key dht"),
        ("dht:\n  netwrok:\n    port: 1\n", "2: unknown key dht.netwrok; did you mean dht.network?"),
        ("dht:\n\n  wealth:\n    port: 1\n", "3: unknown key dht.wealth; did you mean "),
        ("dht:\n  network:\n    prot: 1\n", "3: unknown key dht.network.prot; did you mean dht.network.port?"),
        ("dht:\n  ring:\n    factor: 1\n", "3: unknown key dht.ring.factor; did you mean dht.replication.factor?"),
        ("dht:\n  ring:\n    <<: {}\n", "3: unknown key dht.ring.<<; did you mean "),
        ("dht:\n  network:\n    port: 1\n    port: 1\n", "4: port is given twice, first in line 3"),
        ("dht:\n  ring: {}\n  ring: {}\n", "3: ring is given twice, first in line 2"),
        ("dht: {}\ndht: {}\n", "2: dht is given twice, first in line 1"),
        ("dht:\n  network:\n    port: x\n", "3: dht.network.port must be an integer from 0 to 65535, not 'x'"),
        ("dht:\n  network:\n    port:\n", "3: dht.network.port must be an integer from 0 to 65535, not ''"),
        ("dht:\n  network:\n    port: [1]\n", "3: dht.network.port must be a single value: integer, 0 to 65535"),
        ("dht:\n  network: 7000\n", "2: dht.network must be a mapping of keys to values"),
        ("- dht\n", "1: the file must be a mapping of keys to values"),
        ("dht:\n  ? [a]\n  : 1\n", "2: a key must be a plain word"),
        (
            "dht:\n  cluster:\n    bootstrap_nodes:\n      - localhost:1\n      - localhost\n",
            "5: dht.cluster.bootstrap_nodes: 'localhost' is not host:port",
        ),
        (
            "dht:\n  cluster:\n    bootstrap_nodes:\n      - ['a:1']\n",
            "4: dht.cluster.bootstrap_nodes: each item must be an address",
        ),
        ("dht:\n  network:\n    port: 'x\n", ": not valid YAML: "),
        ("dht: {}\n---\ndht: {}\n", "2: not valid YAML: but found another document"),
        ("dht: \x01\n", ": not valid YAML: "),
    ],
)
def test_errors_name_file_and_line_and_the_nearest_key(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    found = refused(path)
    assert found.startswith(f"{path}:") and message in found


def test_unreadable_files(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.yaml") == f"{tmp_path / 'none.yaml'}: cannot be read: No such file or directory"
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"dht: \xe9\n")
    assert refused(path) == f"{path}: not UTF-8 at byte 5"


def test_errors_name_the_variable_and_the_nearest_one() -> None:
    assert refused(environ={"DHT_PROT": "1"}) == "environment variable DHT_PROT: unknown; did you mean DHT_PORT?"
    message = refused(environ={"DHT_NETWORK_TIMEOUT": "1"})
    assert message == "environment variable DHT_NETWORK_TIMEOUT: unknown; did you mean DHT_NETWORK_TIMEOUT_MS?"
    assert refused(environ={"DHT_PORT": ""}).startswith("environment variable DHT_PORT: dht.network.port must be")


def test_errors_name_the_command_line() -> None:
    assert refused(network__prot=1) == "command line: unknown key dht.network.prot; did you mean dht.network.port?"
    assert refused(network__port=True).endswith("not 'true'")


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("dht.node.id", ["two words", "n\n1", "é", "x" * 129]),
        ("dht.node.advertise", ["host", "host:0", "::1:7000", "host:65536"]),
        ("dht.node.weight", ["0", "-1", "nan", "inf", "101", "x", ""]),
        ("dht.node.rack", ["a b", "x" * 65]),
        ("dht.cluster.name", ["", "a b", "x" * 65]),
        ("dht.cluster.bootstrap_nodes", ["host", "host:70000", "a:1,b", "::1"]),
        ("dht.replication.factor", ["0", "8", "3.0", "-1", "1_0", "0x3", ""]),
        ("dht.replication.read_consistency", ["TWO", "2", ""]),
        ("dht.ring.virtual_nodes", ["0", "10001"]),
        ("dht.ring.hash_algorithm", ["sha1", ""]),
        ("dht.storage.backend", ["disk", ""]),
        ("dht.storage.path", [""]),
        ("dht.storage.cache_size_mb", ["7", "1048577"]),
        ("dht.storage.wal_sync", ["yes"]),
        ("dht.storage.redis_url", ["localhost:6379", "http://a"]),
        ("dht.network.host", ["a b", "[::1]"]),
        ("dht.network.port", ["-1", "65536"]),
        ("dht.network.data_port", ["-1", "65536", "any", ""]),
        ("dht.network.unix_socket", ["/" + "x" * 100]),
        ("dht.network.timeout_ms", ["9", "600001"]),
        ("dht.network.retry_count", ["-1", "11"]),
        ("dht.requests.hedge_percentile", ["0.4", "1"]),
        ("dht.requests.hedge_budget", ["-0.1", "1.1"]),
        ("dht.observability.log_level", ["trace"]),
    ],
)
def test_wrong_values(key: str, wrong: list[str]) -> None:
    for text in wrong:
        message = refused(environ={variable_of(key): text})
        assert message.startswith(f"environment variable {variable_of(key)}: {key}")


def test_a_wrong_secret_is_not_shown() -> None:
    assert "hunter2" not in refused(storage__redis_url="http://:hunter2@host")


# --- rules that bind several settings


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"network.data_port": 7000},
            "dht.network.port (default) and dht.network.data_port (command line) are the same",
        ),
        (
            {"network.http_port": 8000},
            "dht.network.data_port (default) and dht.network.http_port (command line) are the",
        ),
        (
            {"network.http_port": 7000},
            "dht.network.port (default) and dht.network.http_port (command line) are the same",
        ),
        ({"network.port": 63536}, "http_port = port + 2000 would be 65536, past 65535; set dht.network.http_port"),
        ({"network.port": 65000}, "data_port = port + 1000 would be 66000, past 65535; set dht.network.data_port"),
        ({"ring.virtual_nodes": 10000, "node.weight": 7}, "is over 65536 points on the ring"),
        ({"storage.backend": "redis"}, "dht.storage.backend (command line) is redis: set dht.storage.redis_url"),
        ({"storage.path": "/x/{nodeid}"}, "unknown {nodeid}; only {node_id} is replaced"),
        (
            {"cluster.bootstrap_nodes": "localhost:7000,h:7000"},
            "dht.network.host (default) is '127.0.0.1', by which h:7000 cannot reach this node",
        ),
        (
            {"cluster.bootstrap_nodes": "10.0.0.1:7000", "network.host": "0.0.0.0"},
            "dht.network.host (command line) is '0.0.0.0', by which 10.0.0.1:7000 cannot reach this node",
        ),
    ],
)
def test_contradictions(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(None, {}, overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        {"network.port": 0, "network.data_port": 0, "network.http_port": 0},
        {"network.port": 65000, "network.data_port": 0, "network.http_port": 1},
        {"storage.backend": "redis", "storage.redis_url": "redis://localhost"},
        {"cluster.bootstrap_nodes": "localhost:1,127.0.0.2:1,[::1]:2", "network.host": "0.0.0.0"},
        {"cluster.bootstrap_nodes": "h:7000", "network.host": "10.0.0.1"},
        {"cluster.bootstrap_nodes": "h:7000", "network.host": "", "node.advertise": "h2:7000"},
        {"network.host": "::"},
    ],
)
def test_what_the_rules_allow(overrides: dict[str, object]) -> None:
    load_config(None, {}, overrides)


def test_a_config_checks_itself_and_is_frozen() -> None:
    with pytest.raises(ConfigError, match="same port"):
        Config(network=NetworkConfig(data_port=7000))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().network.port = 1  # type: ignore[misc]


# --- derived values


def test_ports() -> None:
    config = load_config(None, {}, {"network.port": 7300})
    assert (config.data_port, config.http_port) == (8300, 9300)
    config = load_config(None, {}, {"network.port": 0})
    assert (config.data_port, config.http_port) == (0, 0)
    config = load_config(None, {}, {"network.port": 0, "network.data_port": 5, "network.http_port": 6})
    assert (config.data_port, config.http_port) == (5, 6)


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("10.0.0.1", "10.0.0.1:7000"),
        ("0.0.0.0", "127.0.0.1:7000"),
        ("", "127.0.0.1:7000"),
        ("::", "[::1]:7000"),
        ("fe80::1", "[fe80::1]:7000"),
    ],
)
def test_address_and_names_follow_from_host_and_port(host: str, address: str) -> None:
    config = load_config(None, {}, {"network.host": host})
    assert config.advertised_address() == config.node_id() == address
    config = load_config(None, {}, {"network.host": host, "node.advertise": "h:9"})
    assert config.advertised_address() == config.node_id() == "h:9"
    config = load_config(None, {}, {"network.host": host, "node.advertise": "h:9", "node.id": "n1"})
    assert (config.advertised_address(), config.node_id()) == ("h:9", "n1")


def test_with_port_0_the_names_follow_from_the_port_that_was_bound() -> None:
    config = load_config(None, {}, {"network.port": 0, "storage.path": "/d/{node_id}"})
    with pytest.raises(ConfigError, match="known once the port is bound"):
        config.node_id()
    assert config.advertised_address(41234) == config.node_id(41234) == "127.0.0.1:41234"
    assert config.storage_path(41234) == Path("/d/127.0.0.1_41234")
    assert config.unix_socket_path(41234) != config.unix_socket_path(41235)
    assert ("dht.node.id", "", "default") in config.describe()
    named = load_config(None, {}, {"network.port": 0, "node.id": "n1", "node.advertise": "h:1"})
    assert (named.node_id(), named.advertised_address()) == ("n1", "h:1")


def test_storage_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Config().storage_path() == tmp_path / "dht-data" / "127.0.0.1_7000"
    for node_id, folder in (("[::1]:7", "___1__7"), ("../x", "_._x"), ("..", "_."), (".", "_"), ("a/b", "a_b")):
        path = load_config(None, {}, {"node.id": node_id}).storage_path()
        assert path == tmp_path / "dht-data" / folder
    assert load_config(None, {}, {"storage.path": "~/d"}).storage_path() == tmp_path / "home/d"
    assert load_config(None, {}, {"storage.path": "/d/{node_id}/x"}).storage_path() == Path("/d/127.0.0.1_7000/x")


def test_unix_socket_path(tmp_path: Path) -> None:
    assert load_config(None, {}, {"network.unix_socket": ""}).unix_socket_path() is None
    assert load_config(None, {}, {"network.unix_socket": "/a.sock"}).unix_socket_path() == Path("/a.sock")
    long = {"storage.path": str(tmp_path / ("x" * 200))}
    path = load_config(None, {}, long).unix_socket_path()
    assert path is not None and path.parent.name == f"agi-dht-{os.getuid()}"
    assert len(path.name) == len("0123456789abcdef.sock")
    assert load_config(None, {}, long).unix_socket_path() == path != Config().unix_socket_path()


def test_this_node_as_a_member_of_the_ring() -> None:
    config = load_config(
        None,
        {},
        {"node.weight": 2, "ring.virtual_nodes": 10, "node.rack": "r1", "network.host": "::1", "node.id": "n1"},
    )
    node = config.as_node()
    assert (node.node_id, node.address, node.port, node.metadata) == ("n1", "::1", 7000, {"rack": "r1"})
    assert Ring([node]).vnode_count == 20


def test_shared_settings_are_fields_of_hello() -> None:
    config = load_config(None, {}, {"cluster.name": "c", "replication.factor": 5, "ring.hash_algorithm": "xxh3"})
    shared = config.shared_settings()
    assert shared == {"cluster": "c", "factor": 5, "virtual_nodes": 150, "hash_algorithm": "xxh3"}
    hello = Hello(1, "node", "n1", **shared)  # type: ignore[arg-type]
    assert (hello.cluster, hello.factor, hello.virtual_nodes, hello.hash_algorithm) == tuple(shared.values())


def test_describe_shows_what_derived_values_come_to_and_masks_passwords() -> None:
    url = "rediss://user:s3:cr/et@h:1/0?password=s3cret&db=1"
    rows = {row[0]: row[1:] for row in load_config(None, {"DHT_STORAGE_REDIS_URL": url}, {}).describe()}
    assert list(rows) == list(KNOBS)
    assert rows["dht.network.data_port"] == ("8000", "default (port + 1000)")
    assert rows["dht.network.http_port"] == ("9000", "default (port + 2000)")
    assert rows["dht.node.id"] == ("127.0.0.1:7000", "default (advertise)")
    assert rows["dht.replication.read_consistency"] == ("QUORUM", "default")
    assert rows["dht.storage.redis_url"][0] == "rediss://***@h:1/0?password=***&db=1"


# --- documents


@pytest.mark.parametrize(
    ("what", "path"), [("docs", "docs/configuration.md"), ("example", "configs/dht_config.yaml")], ids=str
)
def test_generated_documents_are_current(what: str, path: str) -> None:
    command = [sys.executable, "-m", "agi.core.dht.config", what]
    made = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    assert (REPOSITORY / path).read_text(encoding="utf-8") == made


def test_the_example_has_every_setting_with_its_default() -> None:
    path = REPOSITORY / "configs/dht_config.yaml"
    config = load_config(path, {}, {})
    assert config == Config()
    assert list(config.sources) == list(KNOBS)
    lines = path.read_text(encoding="utf-8").splitlines()
    for key, source in config.sources.items():
        assert lines[int(source.rpartition(":")[2]) - 1].strip().startswith(f"{key.rpartition('.')[2]}:")
    # An ordinary YAML reader sees the same values as this one, so nothing needs more quotes.
    for group, settings in yaml.safe_load("\n".join(lines))["dht"].items():
        for name, value in settings.items():
            key = f"dht.{group}.{name}"
            assert load_config(None, {}, {key: value}).value(key) == Config().value(key)


def test_the_reference_explains_every_amount() -> None:
    for key, row in KNOBS.items():
        assert row.doc.endswith("."), key
        if isinstance(Config().value(key), int | float) and not key.endswith("port") and "consistency" not in key:
            assert row.more and row.less, f"{key}: say what raising and lowering it costs"


def test_usage_of_the_generator() -> None:
    command = [sys.executable, "-m", "agi.core.dht.config", "dcos"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "usage: python -m agi.core.dht.config docs|example\n"


def test_doctest() -> None:
    result = doctest.testmod(config_module)
    assert result.attempted > 0 and result.failed == 0
