"""Keys of state as bytes, in an order that means something.

Encoded keys compare as the keys do: integers by value, then strings by code point, then bytes, then tuples, part by
part. So a range of keys is a range of bytes, in the local store and in the changelog. The tuple encoding follows the
tuple layer of FoundationDB: zero bytes inside a part are escaped, and a zero byte ends it.
"""

from djp_dagster.errors import InvalidValueError

StateKey = str | int | bytes | tuple[str | int | bytes, ...]
"""What a key of state may be: a string, an integer of 64 bits, bytes, or a tuple of these."""

_INT, _STR, _BYTES, _TUPLE = b"\x10", b"\x20", b"\x30", b"\x40"
_BIAS, _INT_BYTES = 1 << 63, 9
_END, _ZERO = b"\x00", b"\x00\xff"


def encode_key(key: StateKey) -> bytes:
    """The key as bytes.

    Raises:
        InvalidValueError: it is none of the types a key may have.

    Example:
        >>> sorted([("u2", 1), "b", ("u1", 10), 7, ("u1", 9)], key=encode_key)
        [7, 'b', ('u1', 9), ('u1', 10), ('u2', 1)]
    """
    kind = type(key)
    try:
        if kind is str:
            return _STR + key.encode()  # type: ignore[union-attr]
        if kind is int:
            return _INT + (key + _BIAS).to_bytes(_INT_BYTES, "big")  # type: ignore[operator]
        if kind is bytes:
            return _BYTES + key  # type: ignore[operator]
        if kind is tuple:
            return _TUPLE + b"".join(map(_encode_part, key))  # type: ignore[arg-type]
    except (OverflowError, UnicodeEncodeError) as error:
        raise InvalidValueError(f"state key {key!r} cannot be stored: {error}", key=key) from error
    raise InvalidValueError(
        f"state key {key!r} is a {kind.__name__}; use a string, an integer, bytes, or a tuple of these", key=key
    )


def _encode_part(part: str | int | bytes) -> bytes:
    kind = type(part)
    if kind is int:
        return _INT + (part + _BIAS).to_bytes(_INT_BYTES, "big")  # type: ignore[operator]
    if kind is str:
        return _STR + part.encode().replace(_END, _ZERO) + _END  # type: ignore[union-attr]
    if kind is bytes:
        return _BYTES + part.replace(_END, _ZERO) + _END  # type: ignore[union-attr, operator, arg-type]
    raise InvalidValueError(
        f"a part {part!r} of a state key is a {kind.__name__}; use strings, integers or bytes", key=part
    )


def decode_key(encoded: bytes) -> StateKey:
    """The key of `encode_key`."""
    kind, rest = encoded[:1], encoded[1:]
    if kind == _STR:
        return rest.decode()
    if kind == _INT:
        return int.from_bytes(rest, "big") - _BIAS
    return rest if kind == _BYTES else _decode_parts(rest)


def _decode_parts(rest: bytes) -> tuple[str | int | bytes, ...]:
    parts: list[str | int | bytes] = []
    at = 0
    while at < len(rest):
        kind, at = rest[at : at + 1], at + 1
        if kind == _INT:
            parts.append(int.from_bytes(rest[at : at + _INT_BYTES], "big") - _BIAS)
            at += _INT_BYTES
            continue
        end = _end_of_part(rest, at)
        raw = rest[at:end].replace(_ZERO, _END)
        parts.append(raw.decode() if kind == _STR else raw)
        at = end + 1
    return tuple(parts)


def _end_of_part(rest: bytes, at: int) -> int:
    while True:
        at = rest.index(_END, at)
        if rest[at : at + 2] != _ZERO:
            return at
        at += 2


def key_range(
    prefix: StateKey | None = None, start: StateKey | None = None, stop: StateKey | None = None
) -> tuple[bytes, bytes | None]:
    """The bytes from and to which keys lie that begin with ``prefix`` and are ``start <= key < stop``; None is no end.

    A prefix is a string, bytes, or the first parts of a tuple.

    Raises:
        InvalidValueError: as `encode_key`; integers have no prefix.
    """
    low, high = b"", None
    if prefix is not None:
        if type(prefix) is int:
            raise InvalidValueError(f"prefix={prefix!r}: integers have none; use start and stop", key=prefix)
        low = encode_key(prefix)
        # In a tuple, what follows a part is the kind of the next; 0xff there would be an escaped zero inside the part.
        high = low + b"\xff" if type(prefix) is tuple else _after_prefix(low)
    if start is not None:
        low = max(low, encode_key(start))
    if stop is not None:
        end = encode_key(stop)
        high = end if high is None else min(high, end)
    return low, high


def _after_prefix(prefix: bytes) -> bytes:
    """The first bytes that do not begin with ``prefix``; its own first byte is far from the last."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes([stem[-1] + 1])
