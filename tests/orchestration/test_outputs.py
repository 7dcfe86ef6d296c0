"""`BatchOutputs` as an input: which outputs a reader is given, in which form, and when it moves on."""

from collections.abc import Callable
from typing import Any

import dagster as dg
import pandas as pd
import pyarrow as pa
import pytest

import djp_dagster as djp
from djp_dagster import BatchOutputs, EventStream, SqlEventStream, Threshold, consumer
from tests.orchestration.kit import ORDERS, drain, orders, publish


@consumer(topic=ORDERS, group="files", max_batch=Threshold(events=4))
def files(batch: djp.Batch) -> pd.DataFrame:
    return batch.to_pandas()


@consumer(topic=ORDERS, group="sizes", max_batch=Threshold(events=4))
def sizes(batch: djp.Batch) -> int:
    return len(batch)


def read(
    asset: dg.AssetsDefinition,
    instance: dg.DagsterInstance,
    resource: SqlEventStream,
    *,
    source: djp.Consumer = sizes,
    fails: bool = False,
) -> dg.ExecuteInProcessResult:
    """Materialize a reader alone, as its own run."""
    result = dg.materialize(
        [djp.build_stream_asset(source), asset],
        selection=[asset],
        instance=instance,
        resources={"event_stream": resource},
        raise_on_error=not fails,
    )
    assert result.success == (not fails)
    return result


def reader_of(
    seen: list[list[int]], name: str = "report", *, fails: Callable[[], bool] = lambda: False, retries: int = 0
) -> dg.AssetsDefinition:
    """An asset that notes the sequences it was given since its last success."""

    @dg.asset(name=name, retry_policy=dg.RetryPolicy(max_retries=retries) if retries else None)
    def report(sizes: BatchOutputs) -> None:  # type: ignore[type-arg]
        seen.append([output.sequence for output in sizes.since(name)])
        if fails():
            raise RuntimeError("the reader failed")

    return report


class TestSelection:
    """All, the latest, and what is new."""

    def test_all_and_latest(self, instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream) -> None:
        given: dict[str, Any] = {}

        @dg.asset
        def report(sizes: BatchOutputs) -> None:  # type: ignore[type-arg]
            given["all"] = [output.load() for output in sizes]
            latest = sizes.latest()
            given["latest"] = latest.load() if latest is not None else None
            given["reasons"] = sizes.group

        publish(stream, 10)
        drain(stream, sizes)
        read(report, instance, resource)
        assert given == {"all": [4, 4, 2], "latest": 2, "reasons": "sizes"}
        publish(stream, 3)
        drain(stream, sizes)
        read(report, instance, resource)
        assert given["all"] == [4, 4, 2, 3]
        assert given["latest"] == 3

    def test_a_group_that_does_not_exist_is_empty(self, instance: dg.DagsterInstance, resource: SqlEventStream) -> None:
        given: list[Any] = []

        @dg.asset
        def report(sizes: BatchOutputs) -> None:  # type: ignore[type-arg]
            given.extend([list(sizes), sizes.latest(), sizes.since("me")])

        read(report, instance, resource)
        assert given == [[], None, []]

    def test_after_the_consumer_in_one_run(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
    ) -> None:
        seen: list[list[int]] = []
        publish(stream, 10)
        result = dg.materialize(
            [djp.build_stream_asset(sizes), reader_of(seen)],
            instance=instance,
            resources={"event_stream": resource},
        )
        assert result.success
        assert [len(given) for given in seen] == [3]

    def test_each_output_says_where_it_is_from(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
    ) -> None:
        given: list[Any] = []

        @dg.asset
        def report(sizes: BatchOutputs) -> None:  # type: ignore[type-arg]
            given.extend(sizes)

        publish(stream, 4)
        before = stream.log.now_micros()
        done = djp.run_pending(stream, sizes)
        read(report, instance, resource)
        (output,) = given
        assert (output.group, output.batch_id, output.attempt) == ("sizes", done.batches[0].batch_id, 1)
        assert output.bytes == 1
        assert before <= output.committed_at.timestamp() * 1e6 <= stream.log.now_micros()


class TestReaders:
    """A named reader moves on once its step is known to have succeeded."""

    def test_each_output_once_while_all_goes_well(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
    ) -> None:
        seen: list[list[int]] = []
        report = reader_of(seen)
        for _ in range(3):
            publish(stream, 6)
            drain(stream, sizes)
            read(report, instance, resource)
        read(report, instance, resource)
        everything = [output.sequence for output in stream.outputs("sizes")]
        assert [len(given) for given in seen] == [2, 2, 2, 0]
        assert [sequence for given in seen for sequence in given] == everything

    def test_a_failed_step_is_given_the_same_and_what_came_since(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
    ) -> None:
        seen: list[list[int]] = []
        publish(stream, 4)
        drain(stream, sizes)
        for _ in range(2):
            read(reader_of(seen, fails=lambda: True), instance, resource, fails=True)
        publish(stream, 4)
        drain(stream, sizes)
        read(reader_of(seen), instance, resource)
        read(reader_of(seen), instance, resource)
        assert [len(given) for given in seen] == [1, 1, 2, 0]
        assert seen[0] == seen[1] == seen[2][:1]

    def test_a_retry_of_the_step_is_given_the_same(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
    ) -> None:
        seen: list[list[int]] = []
        publish(stream, 4)
        drain(stream, sizes)

        def first_time() -> bool:
            publish(stream, 4)
            drain(stream, sizes)
            return len(seen) == 1

        read(reader_of(seen, fails=first_time, retries=1), instance, resource)
        assert [len(given) for given in seen] == [1, 2]
        assert seen[1][:1] == seen[0]
        read(reader_of(seen), instance, resource)
        assert [len(given) for given in seen[2:]] == [1], "what was committed after the retry had asked"

    def test_a_deleted_run_is_as_good_as_a_failed_one(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
    ) -> None:
        seen: list[list[int]] = []
        publish(stream, 4)
        drain(stream, sizes)
        first = read(reader_of(seen), instance, resource)
        instance.delete_run(first.run_id)
        read(reader_of(seen), instance, resource)
        assert seen[0] == seen[1] != []
        read(reader_of(seen), instance, resource)
        assert seen[2] == []

    def test_deleting_runs_behind_the_last_one_repeats_nothing(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
    ) -> None:
        seen: list[list[int]] = []
        runs = []
        for _ in range(3):
            publish(stream, 4)
            drain(stream, sizes)
            runs.append(read(reader_of(seen), instance, resource).run_id)
        for run_id in runs[:2]:
            instance.delete_run(run_id)
        read(reader_of(seen), instance, resource)
        assert [len(given) for given in seen] == [1, 1, 1, 0]

    def test_two_readers_are_independent(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
    ) -> None:
        one: list[list[int]] = []
        two: list[list[int]] = []
        publish(stream, 4)
        drain(stream, sizes)
        read(reader_of(one, "one"), instance, resource)
        read(reader_of(two, "two", fails=lambda: True), instance, resource, fails=True)
        publish(stream, 4)
        drain(stream, sizes)
        read(reader_of(one, "one"), instance, resource)
        read(reader_of(two, "two"), instance, resource)
        assert [len(given) for given in one] == [1, 1]
        assert [len(given) for given in two] == [1, 2]

    def test_a_reader_that_asks_twice_in_a_step_is_given_the_same(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
    ) -> None:
        given: list[int] = []

        @dg.asset
        def report(sizes: BatchOutputs) -> None:  # type: ignore[type-arg]
            given.extend(len(sizes.since("me")) for _ in range(2))

        publish(stream, 4)
        drain(stream, sizes)
        read(report, instance, resource)
        read(report, instance, resource)
        assert given == [1, 1, 0, 0]

    def test_without_dagster_a_reader_is_moved_by_hand(self, stream: EventStream) -> None:
        publish(stream, 10)
        drain(stream, sizes)
        outputs = BatchOutputs[int](stream, "sizes")
        assert [output.load() for output in outputs.since("me")] == [4, 4, 2]
        assert len(outputs.since("me")) == 3
        outputs.advance("me", outputs.since("me")[1])
        assert [output.load() for output in outputs.since("me")] == [2]


class TestForms:
    """In which form outputs are loaded."""

    @pytest.mark.parametrize(
        ("annotation", "kind"),
        [(BatchOutputs, pd.DataFrame), (BatchOutputs[pd.DataFrame], pd.DataFrame), (BatchOutputs[pa.Table], pa.Table)],
        ids=["plain", "pandas", "arrow"],
    )
    def test_tables(
        self,
        instance: dg.DagsterInstance,
        resource: SqlEventStream,
        stream: EventStream,
        annotation: object,
        kind: type[Any],
    ) -> None:
        given: list[Any] = []

        def report(files: Any) -> None:
            given.extend(output.load() for output in files)

        report.__annotations__["files"] = annotation
        publish(stream, 6)
        drain(stream, files)
        read(dg.asset(report), instance, resource, source=files)
        assert [type(table) for table in given] == [kind, kind]
        assert [len(table) for table in given] == [4, 2]
        numbers = [
            n for table in given for n in (table["n"].tolist() if kind is pd.DataFrame else table["n"].to_pylist())
        ]
        assert sorted(numbers) == [event.data["n"] for event in orders(6)]

    def test_without_an_annotation_too(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
    ) -> None:
        given: list[Any] = []

        @dg.asset
        def report(sizes) -> None:  # type: ignore[no-untyped-def]
            given.append(type(sizes))

        publish(stream, 1)
        drain(stream, sizes)
        read(report, instance, resource)
        assert issubclass(given[0], BatchOutputs)

    @pytest.mark.parametrize("annotation", [pd.DataFrame, int, list[int], dict])
    def test_another_annotation_fails_and_says_what_to_do(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream, annotation: object
    ) -> None:
        def report(sizes: Any) -> None:
            raise AssertionError("never called")

        report.__annotations__["sizes"] = annotation
        publish(stream, 1)
        drain(stream, sizes)
        result = read(dg.asset(report), instance, resource, fails=True)
        (failure,) = result.get_step_failure_events()
        error = failure.step_failure_data.error
        assert error is not None
        text = error.to_string()
        assert "InvalidSettingError" in text
        assert "annotate it BatchOutputs, and choose: .latest(), .since(reader)" in text
        assert "'sizes'" in text
