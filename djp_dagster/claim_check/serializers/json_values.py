"""JSON values that come back as they were.

JSON has no tuples, sets, times, bytes, NaN, nor keys other than text. What would come back as something else is refused
when it is stored, unless a type says how to make it whole again: that of a dataclass, a msgspec Struct or a pydantic
model, or the annotation of the output.
"""

import dataclasses
from typing import Any

import msgspec

from djp_dagster.claim_check.serializers.kinds import name_of
from djp_dagster.errors import InvalidSettingError

CANNOT = (msgspec.MsgspecError, TypeError, ValueError, RecursionError, NotImplementedError)
"""What comes of values that are no JSON, and of JSON that is of another type."""
_MAX_SHOWN = 80


def encode_json(value: Any, declared: Any = Any) -> bytes:
    """The value as JSON.

    Args:
        value: JSON values, numbers of numpy, or an object of a dataclass, Struct or pydantic model.
        declared: what the output is annotated with, if it is; inputs annotated alike get the value back.

    Raises:
        InvalidSettingError: it is none, or would come back as another value.
    """
    try:
        encoded = msgspec.json.encode(value, enc_hook=_to_builtin)
    except CANNOT as error:
        raise _not_json(value, str(error) or "it is of no such type") from error
    own_type = type(value) if _is_object(value) else declared
    if own_type is not Any:
        try:
            restored = decode_json(encoded, own_type)
        except CANNOT as error:
            if _is_object(value):
                raise _not_json(value, f"it does not come back as one: {error}") from error
        else:
            # Not every class compares by value.
            if _is_object(value) or _equal(restored, value):
                return encoded
    back = msgspec.json.decode(encoded)
    if not _equal(back, value):
        raise _not_json(value, _difference(value, back, "$"))
    return encoded


def decode_json(content: bytes, wanted: Any = Any) -> Any:
    """JSON as values, or as what is wanted.

    Raises:
        one of `CANNOT`: it is no JSON, or not of that type.
    """
    return msgspec.json.decode(content, type=wanted, dec_hook=_to_object)


def _is_object(value: object) -> bool:
    return dataclasses.is_dataclass(value) or isinstance(value, msgspec.Struct) or hasattr(value, "model_dump")


def _to_builtin(value: Any) -> Any:
    if hasattr(value, "model_dump"):  # pydantic
        return value.model_dump(mode="json")
    if type(value).__module__ == "numpy" and hasattr(value, "dtype") and not getattr(value, "shape", True):
        return value.item()
    raise NotImplementedError(f"it holds an object of type {name_of(type(value))}")


def _to_object(wanted: Any, value: Any) -> Any:
    if hasattr(wanted, "model_validate"):
        return wanted.model_validate(value)
    raise NotImplementedError(f"{name_of(wanted)} cannot be made of JSON")


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except Exception:  # noqa: BLE001 - of classes of other people
        return False


def _difference(value: Any, back: Any, path: str) -> str:
    """Where the two begin to differ, for people."""
    if type(value) is type(back) is dict:
        for key, item in value.items():
            if key not in back:
                return f"its key {str(key)[:_MAX_SHOWN]!r} at {path} is a {type(key).__name__}, and would become text"
            if not _equal(item, back[key]):
                return _difference(item, back[key], f"{path}.{key}"[:_MAX_SHOWN])
    if type(value) is type(back) is list:
        for number, (item, there) in enumerate(zip(value, back, strict=True)):
            if not _equal(item, there):
                return _difference(item, there, f"{path}[{number}]")
    if isinstance(value, float):
        return f"JSON has no {float(value)} (at {path})"
    return f"the {type(value).__name__} at {path} would come back as {type(back).__name__}"


def _not_json(value: object, why: str) -> InvalidSettingError:
    name = name_of(type(value))
    return InvalidSettingError(
        f"a value of type {name} cannot be stored as JSON: {why}. Return a table, bytes, text, a file or JSON "
        "values; or a dataclass, and annotate the inputs with it; or set allow_pickle=True",
        setting="output",
        value=name,
    )
