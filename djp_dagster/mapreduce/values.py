"""Values of the shuffle as Arrow columns, exactly: typed where all are of one plain type, pickled where not.

What is pickled is data and nothing else: numbers, text, bytes, containers, and a fixed list of classes of the standard
library. Nothing is imported or called for anything else, whoever wrote the bytes. Tuples stay tuples, sets sets.

A column is a struct of ``kind`` (in the field's metadata) and Arrow's own types:

===========  =========================================================================================
``int``      int64; larger numbers are pickled
``float``    float64, NaN included
``text``     string
``bytes``    binary
``bool``     bool
``tuple``    a struct of the columns of the items, if all tuples are of one length and their columns typed
``pickle``   binary
===========  =========================================================================================
"""

import datetime as dt
import decimal
import fractions
import io
import pickle
import uuid
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from djp_dagster.errors import InvalidValueError, PayloadForbiddenError
from djp_dagster.mapreduce.keys import plain

if TYPE_CHECKING:
    import pyarrow as pa

_CLASSES: tuple[type, ...] = (
    dt.date,
    dt.datetime,
    dt.time,
    dt.timedelta,
    dt.timezone,
    decimal.Decimal,
    fractions.Fraction,
    uuid.UUID,
    Counter,
    OrderedDict,
    deque,
    complex,
    bytearray,
    set,
    frozenset,
)
_KNOWN = {(one.__module__, one.__qualname__): one for one in _CLASSES}
_SAFE = frozenset(_CLASSES)
_KIND = b"djp.kind"
_MOST_ITEMS = 16


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        """Called for what is not built in: classes it may name, and objects of them."""
        if obj in _SAFE if isinstance(obj, type) else type(obj) in _SAFE:
            return NotImplemented
        kind = obj.__name__ if isinstance(obj, type) else type(obj).__name__
        raise InvalidValueError(
            f"a value of a map-reduce must be of plain data: None, numbers, str, bytes, dates, and tuples, lists, sets "
            f"and dicts of these, not {'the class or function' if isinstance(obj, type) else 'a'} {kind}; make it a "
            "tuple or a dict",
            type=kind,
        )


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """One of the known classes."""
        known = _KNOWN.get((module, name))
        if known is None:
            raise PayloadForbiddenError(f"a value of a map-reduce names {module}.{name}: it was not written by one")
        return known


def pack(value: Any) -> bytes:
    """A value as bytes.

    Raises:
        InvalidValueError: it is more than data.
    """
    file = io.BytesIO()
    _Pickler(file, 5).dump(value)
    return file.getvalue()


def unpack(packed: bytes) -> Any:
    """The value that `pack` packed.

    Raises:
        PayloadForbiddenError: something else wrote these bytes.
    """
    return _Unpickler(io.BytesIO(packed)).load()


def value_array(values: Sequence[Any], name: str = "value") -> "tuple[pa.Field[Any], pa.Array[Any]]":
    """The values as a column.

    Raises:
        InvalidValueError: what is among them is more than data.
    """
    import pyarrow as pa

    values = plain(values)
    kinds = set(map(type, values))
    if len(kinds) == 1:
        (kind,) = kinds
        with suppress(OverflowError, UnicodeEncodeError):
            if kind in _TYPED:
                label, make = _TYPED[kind]
                return pa.field(name, make(), metadata={_KIND: label}), pa.array(values, make())
        if kind is tuple and (found := _tuples(values, name)) is not None:
            return found
    return pa.field(name, pa.binary(), metadata={_KIND: b"pickle"}), _pickled(values)


def _tuples(values: Sequence[tuple[Any, ...]], name: str) -> "tuple[pa.Field[Any], pa.Array[Any]] | None":
    import pyarrow as pa

    lengths = set(map(len, values))
    if len(lengths) != 1 or not 1 <= next(iter(lengths)) <= _MOST_ITEMS:
        return None
    columns = []
    for number, items in enumerate(zip(*values, strict=True)):
        kinds = set(map(type, items))
        if len(kinds) != 1 or next(iter(kinds)) not in _TYPED:
            return None
        field, column = value_array(items, str(number))
        if kind_of(field) == "pickle":
            return None
        columns.append((field, column))
    fields = [field for field, _ in columns]
    array = pa.StructArray.from_arrays([column for _, column in columns], fields=fields)
    return pa.field(name, array.type, metadata={_KIND: b"tuple"}), array


def _pickled(values: Sequence[Any]) -> "pa.Array[Any]":
    import pyarrow as pa

    file = io.BytesIO()
    pickler = _Pickler(file, 5)
    ends = [0]
    for value in values:
        pickler.dump(value)
        pickler.clear_memo()
        ends.append(file.tell())
    offsets = pa.array(ends, pa.int32()).buffers()[1]
    return pa.Array.from_buffers(pa.binary(), len(values), [None, offsets, pa.py_buffer(file.getvalue())])


def kind_of(field: "pa.Field[Any]") -> str:
    """Of which kind the column of a field is."""
    return str((field.metadata or {}).get(_KIND, b"").decode())


def values_of(field: "pa.Field[Any]", array: "pa.Array[Any]") -> list[Any]:
    """The values of a column.

    Raises:
        PayloadForbiddenError: something else wrote these bytes.
    """
    kind = kind_of(field)
    if kind in ("int", "float"):
        return array.to_numpy(zero_copy_only=False).tolist()  # type: ignore[no-any-return]
    if kind == "tuple":
        columns = [values_of(inner, column) for inner, column in zip(field.type, array.flatten(), strict=True)]
        return list(zip(*columns, strict=True))
    found: list[Any] = array.to_pylist()
    return [_Unpickler(io.BytesIO(one)).load() for one in found] if kind == "pickle" else found


def as_pickled(field: "pa.Field[Any]", array: "pa.Array[Any]") -> "tuple[pa.Field[Any], pa.Array[Any]]":
    """The same values as a column of the kind ``pickle``."""
    import pyarrow as pa

    if kind_of(field) == "pickle":
        return field, array
    return pa.field(field.name, pa.binary(), metadata={_KIND: b"pickle"}), _pickled(values_of(field, array))


def _arrow(name: str) -> Any:
    def make() -> Any:
        import pyarrow as pa

        return getattr(pa, name)()

    return make


_TYPED: dict[type, tuple[bytes, Any]] = {
    int: (b"int", _arrow("int64")),
    float: (b"float", _arrow("float64")),
    str: (b"text", _arrow("string")),
    bytes: (b"bytes", _arrow("binary")),
    bool: (b"bool", _arrow("bool_")),
}
