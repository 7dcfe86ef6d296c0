"""Records to Arrow columns."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from djp_dagster.errors import TableSchemaError
from djp_dagster.streams.records import Record

if TYPE_CHECKING:
    import pyarrow as pa


class RowCollector:
    """Collects records and turns them into tables of one schema.

    Args:
        schema: the columns; those of the first table unless given.
    """

    def __init__(self, schema: "pa.Schema | None" = None) -> None:
        self._schema = schema
        self._drops_others = schema is not None
        self._records: list[Record] = []

    def add(self, records: Sequence[Record]) -> None:
        """Take in records."""
        self._records.extend(records)

    def add_up_to(self, records: Sequence[Record], rows: int) -> Iterator["pa.Table"]:
        """Take in records; a table of at most ``rows`` whenever that many would be exceeded."""
        if self._records and len(self._records) + len(records) > rows:
            yield self.table()
        self.add(records)

    def table(self) -> "pa.Table":
        """What was collected since the last call, as a table."""
        import pyarrow as pa

        records, self._records = self._records, []
        # Of a schema that was given, nothing is made but what is in it.
        wanted = frozenset(self._schema.names) if self._drops_others and self._schema is not None else None
        columns = {**_event_columns(records, wanted), **_data_columns(records, wanted)}
        try:
            if self._schema is not None:
                self._require_known(columns)
                arrays = [columns.get(field.name, pa.nulls(len(records), field.type)) for field in self._schema]
                columns = {
                    field.name: array if array.type == field.type else array.cast(field.type)
                    for field, array in zip(self._schema, arrays, strict=True)
                }
            table = pa.table(columns)
        except pa.ArrowException as error:
            raise TableSchemaError(
                f"records do not fit the columns of the first ones: {error}; give a schema"
            ) from error
        if self._schema is None and records:
            self._schema = table.schema
        return table

    def _require_known(self, columns: Iterable[str]) -> None:
        assert self._schema is not None
        unknown = [] if self._drops_others else sorted(set(columns) - set(self._schema.names))
        if unknown:
            raise TableSchemaError(
                f"fields {unknown} appear only after the first records; give a schema with or without them",
                fields=unknown,
            )


_EVENT_VALUES: dict[str, Callable[[Record], Any]] = {
    "event_id": lambda record: record.id,
    "event_source": lambda record: record.source,
    "event_type": lambda record: record.type,
    "event_time": lambda record: record.event_time,
    "event_subject": lambda record: record.subject,
    "topic": lambda record: record.origin.topic,
    "partition": lambda record: record.origin.partition,
    "offset": lambda record: record.offset,
    "append_time": lambda record: record.origin.append_micros,
    "idempotency_key": lambda record: record.idempotency_key,
}
EVENT_COLUMNS = tuple(_EVENT_VALUES)


def _event_columns(records: Sequence[Record], wanted: frozenset[str] | None) -> dict[str, "pa.Array[Any]"]:
    import pyarrow as pa

    utc = pa.timestamp("us", tz="UTC")
    types = {"event_time": utc, "append_time": utc, "partition": pa.int32(), "offset": pa.int64()}
    return {
        name: pa.array(list(map(value_of, records)), types.get(name, pa.string()))
        for name, value_of in _EVENT_VALUES.items()
        if wanted is None or name in wanted
    }


def _data_columns(records: Sequence[Record], wanted: frozenset[str] | None) -> dict[str, "pa.Array[Any]"]:
    values = [record.data for record in records]
    if any(type(value) is not dict for value in values):
        if all(value is None for value in values):
            return {}
        return {"data": _array("data", values)} if wanted is None or "data" in wanted else {}
    names: dict[str, None] = {}
    for value in values:
        if value.keys() - names.keys():
            names.update(dict.fromkeys(value))
    columns: dict[str, pa.Array[Any]] = {}
    for name in names:
        column = f"data_{name}" if name in EVENT_COLUMNS else name
        if wanted is not None and column not in wanted:
            continue
        if column != name and column in names:
            raise TableSchemaError(
                f"fields {name!r} and {column!r} of data would both become column {column!r}; rename one, or iterate "
                "over the records",
                field=name,
            )
        columns[column] = _array(name, [value.get(name) for value in values])
    return columns


def _array(name: str, values: list[Any]) -> "pa.Array[Any]":
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError) as error:
        raise TableSchemaError(
            f"field {name!r} of data cannot become one column: {error}; iterate over the records, or publish values of "
            "one type",
            field=name,
        ) from error
