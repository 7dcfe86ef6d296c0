"""Values to payloads and back, by media type: tables as Parquet, text, bytes and JSON. Never pickle."""

from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from djp_dagster.claim_check.claims import PayloadRef
from djp_dagster.claim_check.stores import PayloadStore
from djp_dagster.claim_check.writing import uploading
from djp_dagster.errors import InvalidSettingError

if TYPE_CHECKING:
    import pyarrow as pa

PARQUET = "application/vnd.apache.parquet"
JSON = "application/json"
TEXT = "text/plain; charset=utf-8"
BYTES = "application/octet-stream"
_SUFFIX = {PARQUET: ".parquet", JSON: ".json", TEXT: ".txt", BYTES: ".bin"}


def store_value(store: PayloadStore, key: str, value: Any) -> PayloadRef:
    """Store ``value`` under ``key`` plus the suffix of its media type.

    pandas and Arrow tables become Parquet, ``str`` UTF-8 text, ``bytes`` themselves, anything else JSON.

    Raises:
        InvalidSettingError: the value is none of these.
    """
    media_type = _media_type(value)
    with uploading(store, key + _SUFFIX[media_type], media_type) as upload:
        _write(value, media_type, upload.file)
        return upload.finish()


def load_value(store: PayloadStore, ref: PayloadRef, *, as_arrow: bool = False) -> Any:
    """The value of a payload `store_value` wrote: a DataFrame (or Arrow table), text, bytes, or JSON values.

    Raises:
        PayloadMissingError, PayloadCorruptError: as `PayloadStore.open`.
    """
    with store.open(ref) as file:
        if ref.media_type == PARQUET:
            import pyarrow.parquet as pq

            table = pq.read_table(file)
            return table if as_arrow else table.to_pandas()
        content = file.read()
    if ref.media_type == JSON:
        return msgspec.json.decode(content)
    return content.decode() if ref.media_type == TEXT else content


def _media_type(value: Any) -> str:
    if isinstance(value, bytes | bytearray | memoryview):
        return BYTES
    if isinstance(value, str):
        return TEXT
    # By module name, so that telling a table from a dict never imports pandas or pyarrow.
    package = type(value).__module__.partition(".")[0]
    if (package, type(value).__name__) in {("pandas", "DataFrame"), ("pyarrow", "Table"), ("pyarrow", "RecordBatch")}:
        return PARQUET
    return JSON


def _write(value: Any, media_type: str, file: BinaryIO) -> None:
    if media_type == PARQUET:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            pq.write_table(_as_arrow(value), file)
        except pa.ArrowException as error:
            raise InvalidSettingError(
                f"an output table cannot be written as Parquet: {error}; give its columns one type each",
                setting="output",
                value=type(value).__name__,
            ) from error
    elif media_type == TEXT:
        file.write(value.encode())
    elif media_type == BYTES:
        file.write(value)
    else:
        try:
            file.write(msgspec.json.encode(value))
        except (TypeError, ValueError) as error:
            raise InvalidSettingError(
                f"an output of type {type(value).__name__} cannot be stored ({error}); return a DataFrame, an Arrow "
                "table, bytes, text or JSON values",
                setting="output",
                value=type(value).__name__,
            ) from error


def _as_arrow(value: Any) -> "pa.Table":
    import pyarrow as pa

    if isinstance(value, pa.Table):
        return value
    if isinstance(value, pa.RecordBatch):
        return pa.Table.from_batches([value])
    return pa.Table.from_pandas(value, preserve_index=None)
