"""Sizes and durations as people write them: ``"100MB"``, ``"64MiB"``, ``"12h"``, or plain numbers."""

import re
from datetime import timedelta

from djp_dagster.errors import InvalidSettingError

_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
_BYTES = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base ** (power + 1)
    for power, prefix in enumerate("kmgt")
    for suffix, base in (("b", 1000), ("ib", 1024))
}
_SECONDS = {"": 1.0, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}

Size = int | float | str
Duration = int | float | str | timedelta


def is_count(value: object) -> bool:
    """Whether the value is a whole number, and not True or False."""
    return isinstance(value, int) and not isinstance(value, bool)


def parse_bytes(value: Size, *, name: str = "bytes") -> int:
    """Bytes from a number or a text with a unit: kB, MB, GB, TB are decimal, KiB, MiB, GiB, TiB binary.

    Raises:
        InvalidSettingError: naming the setting, the value and the accepted units.

    Example:
        >>> parse_bytes("100MB"), parse_bytes("64MiB"), parse_bytes(512)
        (100000000, 67108864, 512)
    """
    return round(_parse(value, _BYTES, name, "a size such as 1048576, '100MB' or '64MiB'"))


def parse_seconds(value: Duration, *, name: str = "seconds") -> float:
    """Seconds from a number, a timedelta, or a text with one of the units us, ms, s, min, h, d, w.

    Raises:
        InvalidSettingError: naming the setting, the value and the accepted units.

    Example:
        >>> parse_seconds("12h"), parse_seconds("250ms"), parse_seconds(3)
        (43200.0, 0.25, 3.0)
    """
    if isinstance(value, timedelta):
        value = value.total_seconds()
    return _parse(value, _SECONDS, name, "a duration such as 30, '250ms', '15min', '12h' or '7d'")


def _parse(value: object, units: dict[str, float] | dict[str, int], name: str, accepted: str) -> float:
    number: float | None = None
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
    elif isinstance(value, str) and (match := _QUANTITY.fullmatch(value)):
        factor = units.get(match[2].lower())
        number = None if factor is None else float(match[1]) * factor
    if number is None or not number >= 0 or number == float("inf"):
        raise InvalidSettingError(f"{name}={value!r} is not {accepted}", setting=name, value=value)
    return number
