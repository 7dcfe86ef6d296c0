"""Keys of the shuffle: as an Arrow column that sorts as they do, and to which reducer each goes.

A column of keys is ``text``, ``bytes`` or ``int`` if all keys are; else each key is encoded so that the bytes sort as
the keys do. All four sort alike: text by code points is UTF-8 by bytes. So runs of different kinds can be merged, by
encoding the keys of those that are typed.

The encoding of a key is a tag, then: nothing (None, False, True); big-endian bytes, their number in the tag (int); the
IEEE bits, negative ones inverted (float); UTF-8 or bytes with ``00`` escaped as ``00 ff``, and ended by ``00`` (str,
bytes); the ordinal (date); the encoded items, ended by ``00`` (tuple). After FoundationDB's tuple layer.
"""

import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import date, datetime
from typing import TYPE_CHECKING, Any, Literal
from zlib import crc32

from djp_dagster.errors import InvalidValueError
from djp_dagster.partitioning import stable_hash

if TYPE_CHECKING:
    import pyarrow as pa

KeyKind = Literal["text", "bytes", "int", "encoded"]

_NONE, _FALSE, _TRUE, _INT_ZERO, _FLOAT, _BYTES, _TEXT, _DATE, _TUPLE = 1, 2, 3, 0x14, 0x21, 0x30, 0x32, 0x3C, 0x40
_INT_BIG = 0x1D
_LONGEST_INT = 255
_ALLOWED = "None, bool, int, float, str, bytes, date, or a tuple of these"


def encode_order(value: Any) -> bytes:
    """What values are sorted by as bytes that sort as they do; whole numbers and fractions by their size.

    Raises:
        InvalidValueError: it is of a type that no key may be of.

    Example:
        >>> sorted([2, 1.5, 1, 0.5], key=encode_order)
        [0.5, 1, 1.5, 2]
    """
    out = bytearray()
    _encode(value, out, by_size=True)
    return bytes(out)


def encode_key(key: Any) -> bytes:
    """The key as bytes that sort as keys do, and that no other key has.

    Raises:
        InvalidValueError: no key is of that type.

    Example:
        >>> encode_key(("a", 2)) < encode_key(("a", 10)) < encode_key(("b", -1))
        True
    """
    out = bytearray()
    _encode(key, out)
    return bytes(out)


def _encode(key: Any, out: bytearray, *, by_size: bool = False) -> None:
    kind = type(key)
    if by_size and kind is int:
        # As the nearest fraction, and then by how far it is from that: exact for numbers of any size.
        try:
            nearest = float(key)
        except OverflowError as error:
            raise invalid_key(key) from error
        _encode(nearest, out)
        _encode_int(key - int(nearest), out)
    elif by_size and kind is float:
        _encode(key, out)
        _encode_int(0, out)
    elif kind is str:
        out.append(_TEXT)
        out += key.encode("utf-8", "surrogatepass").replace(b"\0", b"\0\xff")
        out.append(0)
    elif kind is int:
        _encode_int(key, out)
    elif kind is bytes:
        out.append(_BYTES)
        out += key.replace(b"\0", b"\0\xff")
        out.append(0)
    elif kind is tuple:
        out.append(_TUPLE)
        for item in key:
            _encode(item, out, by_size=by_size)
        out.append(0)
    elif kind is float and key == key:  # a NaN equals nothing, so it cannot be found again  # noqa: PLR0124
        (bits,) = struct.unpack(">Q", struct.pack(">d", key + 0.0))
        out.append(_FLOAT)
        out += struct.pack(">Q", bits ^ (0xFFFFFFFFFFFFFFFF if bits >> 63 else 1 << 63))
    elif key is None or kind is bool:
        out.append(_NONE if key is None else _TRUE if key else _FALSE)
    elif isinstance(key, date) and not isinstance(key, datetime):
        out.append(_DATE)
        out += struct.pack(">I", key.toordinal())
    else:
        raise invalid_key(key)


def _encode_int(key: int, out: bytearray) -> None:
    size = (abs(key).bit_length() + 7) // 8
    if size > _LONGEST_INT:
        raise invalid_key(key)
    if size > 8:
        out += bytes((_INT_BIG, size) if key > 0 else (2 * _INT_ZERO - _INT_BIG, 255 - size))
    else:
        out.append(_INT_ZERO + (size if key > 0 else -size))
    out += (key if key >= 0 else key + (1 << 8 * size) - 1).to_bytes(size, "big")


def decode_key(encoded: bytes) -> Any:
    """The key that `encode_key` encoded."""
    key, _ = _decode(encoded, 0)
    return key


def _decode(data: bytes, at: int) -> tuple[Any, int]:
    tag = data[at]
    at += 1
    if tag in (_TEXT, _BYTES):
        end = data.index(b"\0", at)
        while data[end + 1 : end + 2] == b"\xff":
            end = data.index(b"\0", end + 2)
        raw = data[at:end].replace(b"\0\xff", b"\0")
        return (raw.decode("utf-8", "surrogatepass") if tag == _TEXT else raw), end + 1
    if tag == _TUPLE:
        items = []
        while data[at]:
            item, at = _decode(data, at)
            items.append(item)
        return tuple(items), at + 1
    if tag == _FLOAT:
        (bits,) = struct.unpack_from(">Q", data, at)
        (number,) = struct.unpack(">d", struct.pack(">Q", bits ^ ((1 << 63) if bits >> 63 else 0xFFFFFFFFFFFFFFFF)))
        return number, at + 8
    if tag == _DATE:
        return date.fromordinal(struct.unpack_from(">I", data, at)[0]), at + 4
    if tag in (_NONE, _FALSE, _TRUE):
        return {_NONE: None, _FALSE: False, _TRUE: True}[tag], at
    return _decode_int(data, tag, at)


def _decode_int(data: bytes, tag: int, at: int) -> tuple[int, int]:
    if tag == _INT_BIG:
        size, at = data[at], at + 1
    elif tag == 2 * _INT_ZERO - _INT_BIG:
        size, at = 255 - data[at], at + 1
    else:
        size = abs(tag - _INT_ZERO)
    number = int.from_bytes(data[at : at + size], "big")
    return (number if tag >= _INT_ZERO else number - (1 << 8 * size) + 1), at + size


def invalid_key(key: Any) -> InvalidValueError:
    """The error for what cannot be a key."""
    name = type(key).__name__
    why = "a NaN, which equals nothing" if name == "float" else "too long" if name == "int" else f"a {name}"
    return InvalidValueError(
        f"a key of a map-reduce must be {_ALLOWED}, not {why}; give its text, isoformat() or a tuple", type=name
    )


def plain(values: Sequence[Any]) -> Sequence[Any]:
    """The values without numpy's scalars, which batch mappers tend to give: as Python's own."""
    kinds = set(map(type, values))
    if any(kind.__module__ == "numpy" for kind in kinds):
        return [value.item() if type(value).__module__ == "numpy" else value for value in values]
    return values


def key_array(keys: Sequence[Any]) -> "tuple[KeyKind, pa.Array[Any]]":
    """The keys as a column, and of which kind it is.

    Raises:
        InvalidValueError: what is among them cannot be a key.
    """
    import pyarrow as pa

    keys = plain(keys)
    kinds = set(map(type, keys))
    with suppress(UnicodeEncodeError, OverflowError):  # lone surrogates, or more than 64 bits: encoded
        if kinds == {str}:
            return "text", pa.array(keys, pa.string())
        if kinds == {bytes}:
            return "bytes", pa.array(keys, pa.binary())
        if kinds == {int}:
            return "int", pa.array(keys, pa.int64())
    return "encoded", pa.array([encode_key(key) for key in keys], pa.binary())


def keys_of(kind: KeyKind, array: "pa.Array[Any]") -> list[Any]:
    """The keys of a column."""
    if kind == "int":
        return array.to_numpy(zero_copy_only=False).tolist()  # type: ignore[no-any-return]
    found: list[Any] = array.to_pylist()
    return [decode_key(one) for one in found] if kind == "encoded" else found


def as_encoded(kind: KeyKind, array: "pa.Array[Any]") -> "pa.Array[Any]":
    """The same keys as a column of the kind ``encoded``."""
    import pyarrow as pa

    return array if kind == "encoded" else pa.array([encode_key(key) for key in keys_of(kind, array)], pa.binary())


def partitions_of(keys: Sequence[Any], count: int, partition_by: Callable[[Any], Any] | None) -> list[int]:
    """The partition of each key among ``count``; the same for equal keys, in every process and for ever."""
    keys = plain(keys)
    if partition_by is not None:
        keys = [partition_by(key) for key in keys]
    if set(map(type, keys)) == {str}:
        with suppress(UnicodeEncodeError):  # lone surrogates, which are found only on the way
            return [crc32(key.encode()) % count for key in keys]
    return [_hash(key) % count for key in keys]


def _hash(key: Any) -> int:
    kind = type(key)
    if kind is str:
        return crc32(key.encode("utf-8", "surrogatepass"))
    return stable_hash(key) if kind is int or kind is bytes else crc32(encode_key(key))
