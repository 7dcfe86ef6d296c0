"""Values to payloads and back, by media type: tables as Parquet, text, bytes, files, JSON; a pickle only if asked for.

`store_value` and `load_value` are for outputs of batches. `djp_dagster.claim_check.values` is for everything else.
"""

from typing import Any

import msgspec

from djp_dagster.claim_check.claims import PayloadRef
from djp_dagster.claim_check.serializers.json_values import CANNOT
from djp_dagster.claim_check.serializers.kinds import BYTES, JSON, PARQUET, TEXT, Kind, kind_of
from djp_dagster.claim_check.serializers.tables import read_arrow, read_pandas, write_table
from djp_dagster.claim_check.stores import PayloadStore
from djp_dagster.claim_check.writing import uploading
from djp_dagster.errors import InvalidSettingError

_SUFFIX = {PARQUET: ".parquet", JSON: ".json", TEXT: ".txt", BYTES: ".bin"}
_MEDIA_TYPE: dict[Kind, str] = {"bytes": BYTES, "text": TEXT, "pandas": PARQUET, "arrow": PARQUET, "polars": PARQUET}


def store_value(store: PayloadStore, key: str, value: Any) -> PayloadRef:
    """Store ``value`` under ``key`` plus the suffix of its media type.

    Tables of pandas, Arrow and polars become Parquet, ``str`` UTF-8 text, ``bytes`` themselves, anything else JSON.

    Raises:
        InvalidSettingError: the value is none of these.
    """
    media_type = _MEDIA_TYPE.get(kind_of(value), JSON)
    with uploading(store, key + _SUFFIX[media_type], media_type) as upload:
        if media_type == PARQUET:
            write_table(value, upload.file)
        else:
            upload.file.write(_encoded(value, media_type))
        return upload.finish()


def load_value(store: PayloadStore, ref: PayloadRef, *, as_arrow: bool = False) -> Any:
    """The value of a payload `store_value` wrote: a DataFrame (or Arrow table), text, bytes, or JSON values.

    Raises:
        PayloadMissingError, PayloadCorruptError: as `PayloadStore.open`.
    """
    if ref.media_type == PARQUET:
        with store.fetch(ref) as file:
            return read_arrow(file) if as_arrow else read_pandas(file)
    with store.open(ref) as file:
        content = file.read()
    if ref.media_type == JSON:
        return msgspec.json.decode(content)
    return content.decode() if ref.media_type == TEXT else content


def _encoded(value: Any, media_type: str) -> bytes:
    if media_type == BYTES:
        return bytes(value)
    try:
        return str(value).encode() if media_type == TEXT else msgspec.json.encode(value)
    except CANNOT as error:
        raise InvalidSettingError(
            f"an output of type {type(value).__name__} cannot be stored ({error}); return a DataFrame, an Arrow "
            "table, bytes, text or JSON values",
            setting="output",
            value=type(value).__name__,
        ) from error
