"""A part of the store as a dict: `client.map("agent:", codec=Json(type=AgentState))`.

The view holds nothing: each operation is a call to the cluster, with that call's errors (Unavailable, OutcomeUnknown
and so on) besides KeyError. Keys are named without the prefix and come in the order of their UTF-8 bytes. `len`,
iteration and `clear` scan; while others write, they see a key that exists throughout exactly once.

Nothing that takes two calls is atomic: `pop`, `popitem` and `setdefault` read and then write, so another writer may
come between the two and one of the writes be lost. Two callers may `pop` the same value.

A codec turns values into bytes and back; what it cannot translate raises InvalidValue, and nothing is written.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, Mapping, MutableMapping, ValuesView
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast

import msgspec

from agi.core.dht.errors import InvalidKey, InvalidValue
from agi.core.dht.types import encode_key

if TYPE_CHECKING:
    from agi.core.dht.client.sync import SyncDHTClient

V = TypeVar("V")

CHUNK_KEYS = 1000
"""Keys that `clear` and `update` send in one call."""


class Codec(Protocol[V]):
    """Values to bytes and back. Both raise InvalidValue for what they cannot translate."""

    def encode(self, value: V) -> bytes: ...

    def decode(self, data: bytes) -> V: ...


class Raw:
    """Values are bytes already."""

    def encode(self, value: bytes) -> bytes:
        return value

    def decode(self, data: bytes) -> bytes:
        return data


class Text:
    """Strings, as UTF-8."""

    def encode(self, value: str) -> bytes:
        if not isinstance(value, str):
            raise InvalidValue(f"the codec takes str, not {type(value).__name__}")
        try:
            return value.encode()
        except UnicodeEncodeError as error:
            raise InvalidValue(f"the value is not valid Unicode: {error.reason} at index {error.start}") from None

    def decode(self, data: bytes) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise InvalidValue(f"the stored value is not UTF-8: {error.reason} at byte {error.start}") from None


class _Packed(Generic[V]):
    """Values that msgspec packs."""

    def __init__(self, name: str, encoder: Any, decoder: Any) -> None:
        self._name = name
        self._encode = encoder.encode
        self._decode = decoder.decode

    def encode(self, value: V) -> bytes:
        try:
            return cast(bytes, self._encode(value))
        except (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise InvalidValue(f"the value cannot be written as {self._name}: {error}") from None

    def decode(self, data: bytes) -> V:
        try:
            return cast(V, self._decode(data))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidValue(f"the stored value cannot be read as {self._name}: {error}") from None


class Json(_Packed[V]):
    """Values as JSON.

    Args:
        type: what values are decoded to and checked against: a dataclass, a msgspec.Struct, `dict[str, int]`, ...; by
            default whatever the JSON says.
    """

    def __init__(self, type: type[V] | Any = Any) -> None:
        super().__init__("JSON", msgspec.json.Encoder(), msgspec.json.Decoder(type))


class MessagePack(_Packed[V]):
    """Values as MessagePack: more compact than JSON, and it knows bytes.

    Args:
        type: as for `Json`.
    """

    def __init__(self, type: type[V] | Any = Any) -> None:
        super().__init__("MessagePack", msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(type))


RAW = Raw()
TEXT = Text()


class MappingView(MutableMapping[str, V]):
    """The keys under a prefix, as `SyncDHTClient.map` returns them."""

    def __init__(self, client: SyncDHTClient, prefix: str, codec: Codec[V]) -> None:
        if prefix:
            encode_key(prefix)
        self._client = client
        self._prefix = prefix
        self._codec = codec

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._prefix!r}>"

    def _key(self, key: object) -> str:
        if not isinstance(key, str):
            raise InvalidKey(f"a key is a str, not {type(key).__name__}")
        return self._prefix + key

    # --- single keys

    def __getitem__(self, key: str) -> V:
        data = self._client.get(self._key(key))
        if data is None:
            raise KeyError(key)
        return self._codec.decode(data)

    def __contains__(self, key: object) -> bool:
        try:
            return self._client.exists(self._key(key))
        except InvalidKey:  # what cannot be a key is not in here
            return False

    def __setitem__(self, key: str, value: V) -> None:
        self._client.put(self._key(key), self._codec.encode(value))

    def __delitem__(self, key: str) -> None:
        if not self._client.delete(self._key(key)):
            raise KeyError(key)

    # --- all keys

    def __iter__(self) -> Iterator[str]:
        cut = len(self._prefix)
        for key in self._client.iterate_keys(self._prefix):
            yield key[cut:]

    def __len__(self) -> int:
        """By scan, of keys alone: takes as long as there are keys. (`list(view)` asks for it too; `[*iter(view)]` and
        loops do not.)"""
        return sum(1 for _ in self._client.iterate_keys(self._prefix))

    def __bool__(self) -> bool:
        """Whether there is a key; asks for one alone."""
        return bool(self._client.scan(self._prefix, 1))

    def _pairs(self) -> Iterator[tuple[str, V]]:
        cut = len(self._prefix)
        for key, data in self._client.iterate(self._prefix):
            yield key[cut:], self._codec.decode(data)

    def items(self) -> ItemsView[str, V]:
        """Pairs in order; iterating fetches pages, not a key at a time."""
        return _Items(self)

    def values(self) -> ValuesView[V]:
        """Values in the order of their keys; iterating fetches pages, not a key at a time."""
        return _Values(self)

    def update(self, other: Mapping[str, V] | Iterable[tuple[str, V]] = (), /, **named: V) -> None:  # type: ignore[override]  # one signature for the overloads
        """Stores many values in few calls. Not atomic: raises BatchError with the keys (prefix included) that failed;
        a value that cannot be translated is found before anything is written."""
        items = {self._key(key): self._codec.encode(value) for key, value in dict(other, **named).items()}
        pairs = iter(items.items())
        while chunk := dict(islice(pairs, CHUNK_KEYS)):
            self._client.put_many(chunk)

    def clear(self) -> None:
        """Deletes what a scan finds, a chunk at a time. Not atomic: keys written meanwhile may stay."""
        keys = self._client.iterate_keys(self._prefix)
        while chunk := list(islice(keys, CHUNK_KEYS)):
            self._client.delete_many(chunk)


class _Items(ItemsView[str, V]):
    _mapping: MappingView[V]

    def __iter__(self) -> Iterator[tuple[str, V]]:
        return self._mapping._pairs()


class _Values(ValuesView[V]):
    _mapping: MappingView[V]

    def __iter__(self) -> Iterator[V]:
        for _, value in self._mapping._pairs():
            yield value

    def __contains__(self, value: object) -> bool:
        return any(held is value or held == value for held in self)
