"""A batch as Arrow and pandas."""

from datetime import datetime, timezone
from typing import Any

import pyarrow as pa
import pytest

from djp_dagster import Batch, Event, Topic, consumer
from djp_dagster.errors import InvalidSettingError, TableSchemaError
from djp_dagster.processing.tables import EVENT_COLUMNS, RowCollector
from djp_dagster.testing import Clock, run_consumer
from tests.processing.kit import NUMBERS, numbers


def look(events: list[Event], what: Any, **settings: Any) -> Any:
    """What ``what(batch)`` gives for a batch of the events."""
    found: list[Any] = []

    @consumer(topic=NUMBERS, max_poison=0, **settings)
    def handler(batch: Batch) -> None:
        try:
            found.append(what(batch))
        except TableSchemaError as error:
            found.append(error)

    run_consumer(handler, events, clock=Clock())
    (result,) = found
    if isinstance(result, TableSchemaError):
        raise result
    return result


WHEN = datetime(2024, 1, 1, tzinfo=timezone.utc)


def test_columns_of_the_event_then_of_its_data() -> None:
    events = [
        NUMBERS.event(n=1, name="a").replace(id="e1", time=WHEN, subject="s"),
        NUMBERS.event(n=2, more=True).replace(id="e2"),
    ]
    table = look(events, Batch.to_arrow)
    assert table.column_names == [*EVENT_COLUMNS, "n", "name", "more"]
    now = datetime.fromtimestamp(Clock().now_s, timezone.utc)
    rows = table.to_pylist()
    assert [(row["event_id"], row["event_time"], row["event_subject"]) for row in rows] == [
        ("e1", WHEN, "s"),
        ("e2", now, None),
    ]
    assert [(row["topic"], row["partition"], row["offset"], row["append_time"]) for row in rows] == [
        ("numbers", 0, 0, now),
        ("numbers", 0, 1, now),
    ]
    assert [row["event_type"] for row in rows] == ["numbers"] * 2
    assert [row["event_source"] for row in rows] == ["/topics/numbers"] * 2
    assert rows[0]["idempotency_key"].endswith("/handler/numbers/0/0")
    assert [(row["n"], row["name"], row["more"]) for row in rows] == [(1, "a", None), (2, None, True)]


def test_pandas_has_the_same_columns() -> None:
    frame = look(numbers(3), Batch.to_pandas)
    assert list(frame.columns) == [*EVENT_COLUMNS, "n"]
    assert frame["n"].tolist() == [0, 1, 2]
    assert str(frame["append_time"].dt.tz) == "UTC"


def test_a_field_named_like_a_column_is_renamed() -> None:
    table = look([NUMBERS.event({"topic": "mine", "n": 1, "offset": "far"})], Batch.to_arrow)
    (row,) = table.to_pylist()
    assert (row["topic"], row["data_topic"], row["offset"], row["data_offset"]) == ("numbers", "mine", 0, "far")


def test_two_fields_never_share_a_column() -> None:
    with pytest.raises(TableSchemaError, match="data_topic"):
        look([NUMBERS.event({"topic": "mine", "data_topic": "other"})], Batch.to_arrow)


@pytest.mark.parametrize("data", [7, "text", [1, 2], b"bytes", True])
def test_data_that_is_no_object_is_one_column(data: Any) -> None:
    table = look([Event(type="t", source="/s", data=data)], Batch.to_arrow)
    assert table.column_names == [*EVENT_COLUMNS, "data"]
    assert table.column("data").to_pylist() == [data]


def test_no_data_is_no_column() -> None:
    table = look([Event(type="t", source="/s")] * 2, Batch.to_arrow)
    assert table.column_names == list(EVENT_COLUMNS)
    assert table.num_rows == 2


@pytest.mark.parametrize(
    "bad", [[1, "text"], [{"a": 1}, 2], [1, [2]], [2**64, 1]], ids=["text", "object", "list", "too large"]
)
def test_values_that_share_no_column_name_their_field(bad: list[Any]) -> None:
    if bad[0] == 2**64:
        bad = [2**63 + 1, -1]
    with pytest.raises(TableSchemaError, match="'mixed'") as caught:
        look([NUMBERS.event(mixed=value) for value in bad], Batch.to_arrow)
    assert caught.value.facts["field"] == "mixed"


def test_an_empty_batch_is_an_empty_table() -> None:
    table = RowCollector().table()
    assert table.num_rows == 0
    assert table.column_names == list(EVENT_COLUMNS)


class TestArrowBatches:
    """Pieces of bounded size."""

    @pytest.mark.parametrize("rows", [1, 2, 3, 7, 100])
    def test_they_hold_at_most_that_many_rows_and_everything_in_order(self, rows: int) -> None:
        def pieces(batch: Batch) -> list[pa.RecordBatch]:
            return list(batch.arrow_batches(rows=rows))

        found = look(numbers(10), pieces)
        assert all(piece.num_rows <= rows for piece in found)
        assert [value for piece in found for value in piece.column("n").to_pylist()] == list(range(10))
        assert len({piece.schema for piece in found}) == 1

    def test_the_first_rows_make_the_schema(self) -> None:
        def pieces(batch: Batch) -> list[pa.RecordBatch]:
            return list(batch.arrow_batches(rows=2))

        events = [NUMBERS.event(a=1, b=None), NUMBERS.event(a=2, b="x"), NUMBERS.event(a=3), NUMBERS.event(b="y")]
        found = look(events, pieces)
        assert [piece.column("a").to_pylist() for piece in found] == [[1, 2], [3, None]]
        assert [piece.column("b").to_pylist() for piece in found] == [[None, "x"], [None, "y"]]

    def test_what_does_not_fit_it_is_refused(self) -> None:
        def pieces(batch: Batch) -> list[pa.RecordBatch]:
            return list(batch.arrow_batches(rows=2))

        events = [NUMBERS.event(a=1), NUMBERS.event(a=2), NUMBERS.event(a="text"), NUMBERS.event(a="more")]
        with pytest.raises(TableSchemaError, match="give a schema"):
            look(events, pieces)

    def test_a_schema_given_decides(self) -> None:
        schema = pa.schema([("offset", pa.int64()), ("a", pa.float64()), ("absent", pa.string())])

        def pieces(batch: Batch) -> list[pa.RecordBatch]:
            return list(batch.arrow_batches(rows=2, schema=schema))

        found = look([NUMBERS.event(a=1), NUMBERS.event(a=2.5), NUMBERS.event(b=3)], pieces)
        assert all(piece.schema == schema for piece in found)
        assert [row for piece in found for row in piece.to_pylist()] == [
            {"offset": 0, "a": 1.0, "absent": None},
            {"offset": 1, "a": 2.5, "absent": None},
            {"offset": 2, "a": None, "absent": None},
        ]

    def test_what_is_not_in_it_need_fit_no_column(self) -> None:
        schema = pa.schema([("offset", pa.int64()), ("a", pa.int64())])

        def pieces(batch: Batch) -> list[pa.RecordBatch]:
            return list(batch.arrow_batches(schema=schema))

        mixed = [NUMBERS.event(a=1, mixed=1, topic="x", data_topic="y"), NUMBERS.event(a=2, mixed="text")]
        assert [piece.column("a").to_pylist() for piece in look(mixed, pieces)] == [[1, 2]]
        no_objects = [Event(type="t", source="/s", data=data) for data in (1, "text")]
        assert [piece.column("offset").to_pylist() for piece in look(no_objects, pieces)] == [[0, 1]]

    def test_they_read_piece_by_piece(self) -> None:
        topic = Topic("numbers")

        def first(batch: Batch) -> int:
            pieces = batch.arrow_batches(rows=2)
            piece = next(pieces)
            pieces.close()
            return piece.num_rows

        assert look(numbers(10, topic), first) == 2


def test_a_field_that_appears_late_is_not_dropped_silently() -> None:
    topic = Topic("t")

    @consumer(topic=topic)
    def tables(batch: Batch) -> int:
        with pytest.raises(TableSchemaError, match="late"):
            list(batch.arrow_batches(rows=2))
        with pytest.raises(InvalidSettingError, match="rows=0"):
            list(batch.arrow_batches(rows=0))
        return 1

    events = [topic.event(n=n) if n < 4 else topic.event(n=n, late=True) for n in range(6)]
    assert run_consumer(tables, events).outputs == [1]
