"""What a setting accepts, as text from a file, the environment or the command line."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from agi.core.dht.errors import DHTError
from agi.core.dht.types import Consistency, format_address, parse_address

T = TypeVar("T")
AUTO = "auto"
PORT_MAX = 65535


@dataclass(frozen=True, slots=True)
class Kind(Generic[T]):
    """What a setting accepts. `parse` reads it from text and raises ValueError with what is wrong."""

    accepts: str
    parse: Callable[[str], T]


def integer(low: int, high: int) -> Kind[int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]+", text) or not low <= int(text) <= high:
            raise ValueError(f"must be an integer from {low} to {high}")
        return int(text)

    return Kind(f"integer, {low} to {high}", parse)


def number(low: float, high: float) -> Kind[float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:  # also refuses NaN
            raise ValueError(f"must be a number from {low:g} to {high:g}")
        return value

    return Kind(f"number, {low:g} to {high:g}", parse)


def choice(*names: str) -> Kind[str]:
    def parse(text: str) -> str:
        if text.lower() not in names:
            raise ValueError(f"must be one of {', '.join(names)}")
        return text.lower()

    return Kind(" or ".join(f"`{name}`" for name in names), parse)


def text(accepts: str, pattern: str) -> Kind[str]:
    def parse(given: str) -> str:
        if not re.fullmatch(pattern, given):
            raise ValueError(f"must be {accepts}")
        return given

    return Kind(accepts, parse)


def _address(given: str) -> str:
    if not given:
        return ""
    try:
        return format_address(*parse_address(given))
    except DHTError as error:
        raise ValueError(str(error)) from None


def _addresses(given: str) -> tuple[str, ...]:
    return tuple(_address(part.strip()) for part in given.split(",") if part.strip())


def _port_or_auto(given: str) -> int | None:
    if given.lower() == AUTO:
        return None
    if not re.fullmatch(r"[0-9]+", given) or int(given) > PORT_MAX:
        raise ValueError(f"must be auto or an integer from 0 to {PORT_MAX}")
    return int(given)


def integer_or_auto(low: int, high: int) -> Kind[int | None]:
    number_of = integer(low, high)

    def parse(given: str) -> int | None:
        if given.lower() == AUTO:
            return None
        try:
            return number_of.parse(given)
        except ValueError:
            raise ValueError(f"must be {AUTO} or an integer from {low} to {high}") from None

    return Kind(f"`{AUTO}` or integer, {low} to {high}", parse)


def _boolean(given: str) -> bool:
    if given.lower() not in ("true", "false"):
        raise ValueError("must be true or false")
    return given.lower() == "true"


def _consistency(given: str) -> Consistency:
    try:
        return Consistency.parse(given)
    except DHTError:
        raise ValueError("must be one of ONE, QUORUM, ALL") from None


ADDRESS = Kind("host:port, [ipv6]:port or empty", _address)
ADDRESSES = Kind("list of host:port or [ipv6]:port; comma-separated outside YAML", _addresses)
PORT_OR_AUTO: Kind[int | None] = Kind(f"`{AUTO}` or integer, 0 to {PORT_MAX}", _port_or_auto)
BOOLEAN = Kind("`true` or `false`", _boolean)
LEVEL = Kind("`ONE`, `QUORUM` or `ALL`", _consistency)
NODE_ID = text("up to 128 printable ASCII characters without spaces, or empty", r"[!-~]{0,128}")
LABEL = text("up to 64 letters, digits, '.', '_' and '-', or empty", r"[A-Za-z0-9._-]{0,64}")
