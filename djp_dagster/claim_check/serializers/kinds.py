"""What kinds of values there are, and in which form an input wants one.

Both are told by the names of modules and classes: telling a table from a dict never imports pandas, pyarrow or polars.
"""

import io
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeGuard, get_args

import msgspec

from djp_dagster.claim_check.claims import BYTES, Claim

__all__ = ["BYTES", "JSON", "PARQUET", "PICKLE", "TEXT", "Form", "FormName", "Kind", "form_of", "kind_of"]

PARQUET = "application/vnd.apache.parquet"
JSON = "application/json"
TEXT = "text/plain; charset=utf-8"
PICKLE = "application/x-python-pickle"

Kind = Literal["pandas", "arrow", "polars", "bytes", "text", "json", "file", "stream", "claim", "pickle"]
"""What was stored. A pointer says it, so that an input without annotation gets the same again; it is only compared."""

FormName = Literal[
    "as_stored", "pandas", "arrow", "batches", "polars", "lazy", "bytes", "text", "path", "stream", "claim", "json"
]

_TABLES: dict[tuple[str, str], Kind] = {
    ("pandas", "DataFrame"): "pandas",
    ("pyarrow", "Table"): "arrow",
    ("pyarrow", "RecordBatch"): "arrow",
    ("pyarrow", "RecordBatchReader"): "arrow",
    ("polars", "DataFrame"): "polars",
    ("polars", "LazyFrame"): "polars",
}
_FORMS: dict[tuple[str, str], FormName] = {
    ("pandas", "DataFrame"): "pandas",
    ("pyarrow", "Table"): "arrow",
    ("pyarrow", "RecordBatchReader"): "batches",
    ("polars", "DataFrame"): "polars",
    ("polars", "LazyFrame"): "lazy",
}
_STREAMS = (BinaryIO, io.IOBase, io.BufferedIOBase, io.BufferedReader)


def kind_of(value: object) -> Kind:
    """What a value is; ``"json"`` for whatever is nothing else.

    A subclass of a table is not that table: it would come back as something else than it was.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        return "bytes"
    if isinstance(value, str):
        return "text"
    if isinstance(value, Claim):
        return "claim"
    if isinstance(value, Path):
        return "file"
    table = _TABLES.get(_name_of(type(value)))
    if table is not None:
        return table
    return "stream" if is_stream(value) or isinstance(value, Iterator) else "json"


def is_stream(value: object) -> TypeGuard[BinaryIO]:
    """Whether the value is read, not iterated."""
    return callable(getattr(value, "read", None))


class Form(msgspec.Struct, frozen=True):
    """In which form an input wants a value.

    Attributes:
        annotation: of the input; with ``name="json"``, what JSON values are converted to.
        nullable: None will do.
    """

    name: FormName
    annotation: Any = Any
    nullable: bool = False


def form_of(annotation: Any) -> Form:
    """The form that the annotation of an input asks for."""
    inner, nullable = without_none(annotation)
    if inner in (Any, object):
        return Form("as_stored", annotation, nullable=True)
    return Form(_form_name(inner), inner, nullable)


def _form_name(annotation: Any) -> FormName:
    if annotation in _STREAMS:
        return "stream"
    if not isinstance(annotation, type):
        return "json"
    if issubclass(annotation, bytes):
        return "bytes"
    if issubclass(annotation, str):
        return "text"
    if issubclass(annotation, Path):
        return "path"
    return "claim" if annotation is Claim else _FORMS.get(_name_of(annotation), "json")


def without_none(annotation: Any) -> tuple[Any, bool]:
    """The X of ``Optional[X]``, and whether it was one."""
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return annotation, False
    given = [item for item in get_args(annotation) if item is not type(None)]
    return (given[0], True) if len(given) == 1 else (annotation, False)


def item_of(annotation: Any) -> Any:
    """The X of ``dict[str, X]``, Any for a plain ``dict``; None for anything else."""
    inner = without_none(annotation)[0]
    if inner is dict:
        return Any
    return get_args(inner)[1] if typing.get_origin(inner) is dict and len(get_args(inner)) == 2 else None


def name_of(annotation: Any) -> str:
    """An annotation as people write it, more or less."""
    return annotation.__qualname__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


def _name_of(cls: type) -> tuple[str, str]:
    return cls.__module__.partition(".")[0], cls.__name__
