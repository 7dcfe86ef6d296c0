"""Consumers as assets: what a run processes, what it tells Dagster, and what it never tells."""

import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

import djp_dagster as djp
from djp_dagster import Consumer, EventStream, SqlEventStream, Threshold, consumer
from djp_dagster.errors import InvalidSettingError
from djp_dagster.orchestration.tags import BATCH_TAG, GROUP_TAG, run_id_of
from tests.orchestration.kit import (
    COPIES,
    FAST,
    ORDERS,
    copied,
    copy,
    found,
    metadata_of,
    orders,
    publish,
)
from tests.processing.kit import in_thread, wait_until

SECRET = "swordfish-7f3a"


def materialize(
    which: Consumer | dg.AssetsDefinition,
    instance: dg.DagsterInstance,
    resource: SqlEventStream,
    *,
    fails: bool = False,
    resources: dict[str, object] | None = None,
    **config: Any,
) -> dg.ExecuteInProcessResult:
    """Press Materialize; ``config`` is the run config of the asset's op."""
    asset = djp.build_stream_asset(which) if isinstance(which, Consumer) else which
    result = dg.materialize(
        [asset],
        instance=instance,
        resources={"event_stream": resource, **(resources or {})},
        run_config={"ops": {asset.op.name: {"config": config}}} if config else None,
        raise_on_error=not fails,
    )
    assert result.success == (not fails)
    return result


def test_nothing_pending_materializes_nothing(
    instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
) -> None:
    assert metadata_of(materialize(copy, instance, resource)) == [], "not even a topic was there"
    publish(stream, 2)
    assert len(metadata_of(materialize(copy, instance, resource))) == 1
    again = materialize(copy, instance, resource)
    assert metadata_of(again) == []
    assert GROUP_TAG not in found(instance, again.run_id).tags
    assert instance.get_latest_materialization_event(dg.AssetKey("copy")) is not None


class TestFigures:
    """What is materialized, against what was published."""

    def test_every_figure_and_its_kind(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
    ) -> None:
        @consumer(topic=ORDERS, emits=[COPIES], max_batch=Threshold(events=8), stateful=True)
        def tally(batch: djp.Batch) -> None:
            for record in batch:
                if record.data["n"] == 4:
                    batch.fail(record, "four")
                    continue
                batch.emit(COPIES.event(n=record.data["n"]))
                batch.emit(COPIES.event(n=record.data["n"]))
            batch.state.set("batches", batch.state.get("batches", 0) + 1)

        publish(stream, 20)
        spans = stream.log.spans(["orders"])
        size = stream.log.backlog({part: span.begin for part, span in spans.items()}).bytes
        result = materialize(tally, instance, resource)
        (figures,) = metadata_of(result)
        ints = {name: value.value for name, value in figures.items() if isinstance(value, dg.IntMetadataValue)}
        assert ints == {
            "events": 20,
            "bytes": size,
            "batches": len(rows(figures["last_batches"])),
            "emitted": 38,
            "dead_letters": 1,
            "state_changes": ints["state_changes"],
            "attempt": 1,
            "lag_events": 0,
        }
        assert ints["state_changes"] == ints["batches"], "each batch is of one task, and changes one key"
        floats = {name: value.value for name, value in figures.items() if isinstance(value, dg.FloatMetadataValue)}
        assert set(floats) == {"seconds", "handler_seconds", "commit_seconds", "events_per_second", "lag_age_seconds"}
        assert 0 < (floats["handler_seconds"] or 0) <= (floats["seconds"] or 0)
        assert 0 < (floats["commit_seconds"] or 0) <= (floats["seconds"] or 0)
        assert floats["events_per_second"] == pytest.approx(20 / (floats["seconds"] or 0), rel=0.01)
        assert floats["lag_age_seconds"] == 0.0
        assert figures["reason"].value == "pending"
        tags = found(instance, result.run_id).tags
        batches = rows(figures["last_batches"])
        assert figures["last_batch_id"].value == batches[-1]["batch_id"]
        assert tags[BATCH_TAG] == batches[0]["batch_id"] != batches[-1]["batch_id"]
        assert tags[GROUP_TAG] == "tally"
        assert {(row["reason"], row["attempt"]) for row in batches} == {("pending", 1)}
        assert sum(row["events"] for row in batches) == 20
        assert max(row["events"] for row in batches) <= 8
        assert sum(row["emitted"] for row in batches) == 38
        assert sum(row["dead_letters"] for row in batches) == 1
        assert rows(figures["offsets"]) == [
            {"topic": "orders", "partition": part.partition, "from": 0, "to": span.end}
            for part, span in sorted(spans.items())
        ]
        assert {name for name in figures if not name.startswith("dagster/")} == {
            *ints,
            *floats,
            "reason",
            "last_batch_id",
            "offsets",
            "last_batches",
        }

    def test_what_is_still_pending_is_lag(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
    ) -> None:
        @consumer(topic=ORDERS, group="late")
        def late(batch: djp.Batch) -> None:
            stream.publish(ORDERS, orders(3, start=100))

        publish(stream, 1)
        (figures,) = metadata_of(materialize(late, instance, resource))
        assert figures["lag_events"].value == 3
        assert float(str(figures["lag_age_seconds"].value)) > 0

    def test_the_next_run_goes_on_where_the_last_ended(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
    ) -> None:
        ends: dict[int, int] = {0: 0, 1: 0}
        for start in (0, 10, 17):
            publish(stream, 7, start=start)
            (figures,) = metadata_of(materialize(copy, instance, resource))
            for row in rows(figures["offsets"]):
                assert row["from"] == ends[row["partition"]]
                ends[row["partition"]] = row["to"]
        assert ends == {part.partition: span.end for part, span in stream.log.spans(["orders"]).items()}

    def test_many_batches_leave_few_rows(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
    ) -> None:
        @consumer(topic=ORDERS, group="tiny", max_batch=Threshold(events=1))
        def tiny(batch: djp.Batch) -> None: ...

        publish(stream, 70)
        (figures,) = metadata_of(materialize(tiny, instance, resource))
        assert figures["batches"].value == 70
        assert len(rows(figures["last_batches"])) == 50


def rows(value: dg.MetadataValue[Any]) -> list[dict[str, Any]]:
    assert isinstance(value, dg.TableMetadataValue)
    columns = {column.name for column in value.schema.columns}
    assert all(set(row.data) == columns for row in value.records)
    return [dict(row.data) for row in value.records]


class TestPayloads:
    """They are nobody's business but the handler's."""

    def test_none_is_in_anything_dagster_keeps(
        self, lasting: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream, tmp_path: Path
    ) -> None:
        @consumer(topic=ORDERS, emits=[COPIES], retry=FAST, max_poison=2)
        def careful(batch: djp.Batch) -> dict[str, list[str]]:
            for record in batch:
                batch.emit(COPIES.event(secret=record.data["secret"]))
                if record.data["n"] == 3:
                    batch.fail(record, "not wanted")
            return {"secrets": [record.data["secret"] for record in batch]}

        @consumer(topic=ORDERS, retry=FAST, max_poison=2)
        def poisoned(batch: djp.Batch) -> None:
            for record in batch:
                assert record.data["n"] < 5

        @dg.asset
        def reader(careful: djp.BatchOutputs[Any]) -> None:
            assert SECRET in str([output.load() for output in careful.since("reader")])

        publish(stream, 10, secret=SECRET)
        given = {"event_stream": resource}
        assets = [djp.build_stream_asset(careful), reader]
        checks = djp.build_stream_checks(careful, max_lag_events=1)
        defs = dg.Definitions(assets=assets, asset_checks=[checks], resources=given, executor=dg.in_process_executor)
        assert defs.resolve_implicit_global_asset_job_def().execute_in_process(instance=lasting).success
        materialize(djp.build_stream_asset(poisoned), lasting, resource, fails=True)
        (letter,) = stream.dead_letters("careful")
        assert SECRET.encode() in letter.raw, "the marker is where it belongs"
        home = tmp_path / "home"
        found_in = [file for file in home.rglob("*") if file.is_file() and SECRET.encode() in file.read_bytes()]
        assert found_in == []
        kept = [dump(file) for file in home.rglob("*.db")]
        assert any("dead_letters" in text for text in kept), "the event log was looked into"
        assert not any(SECRET in text for text in kept)


def dump(database: Path) -> str:
    """Everything in a SQLite file as text."""
    connection = sqlite3.connect(database)
    try:
        return "\n".join(connection.iterdump())
    finally:
        connection.close()


class TestFailure:
    """A run that fails."""

    def test_it_reports_what_it_had_committed_and_fails(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
    ) -> None:
        batches: list[str] = []

        @consumer(topic=ORDERS, group="third", max_batch=Threshold(events=4), retry=FAST)
        def third(batch: djp.Batch) -> None:
            if batch.id not in batches:
                batches.append(batch.id)
            if len(batches) == 3:
                raise djp.TransientError("away")

        publish(stream, 20)
        result = materialize(third, instance, resource, fails=True)
        (figures,) = metadata_of(result)
        assert (figures["events"].value, figures["batches"].value, figures["lag_events"].value) == (8, 2, 12)
        assert rows(figures["last_batches"])[-1]["batch_id"] == batches[1]
        kinds = [event.event_type_value for event in result.all_events]
        assert kinds.index("ASSET_MATERIALIZATION") < kinds.index("STEP_FAILURE")
        assert "RetriesExhaustedError" in str(result.get_step_failure_events()[0].step_failure_data.error)
        assert found(instance, result.run_id).tags[BATCH_TAG] == batches[0]

    def test_a_first_batch_that_fails_materializes_nothing(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
    ) -> None:
        @consumer(topic=ORDERS, group="broken", retry=FAST)
        def broken(batch: djp.Batch) -> None:
            raise djp.TransientError("away")

        publish(stream, 3)
        result = materialize(broken, instance, resource, fails=True)
        assert metadata_of(result) == []
        assert stream.pending("broken").events == 3
        assert [task.owner for task in stream.coordinator.tasks("broken")] == [None, None]
        assert found(instance, result.run_id).tags[BATCH_TAG] == stream.coordinator.intents("broken")[0].batch_id

    def test_the_next_run_finishes_the_open_batch(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
    ) -> None:
        away = [True]

        @consumer(topic=ORDERS, group="flaky", retry=FAST, emits=[COPIES])
        def flaky(batch: djp.Batch) -> None:
            if away[0]:
                raise djp.TransientError("away")
            for record in batch:
                batch.emit(COPIES.event(n=record.data["n"]))

        publish(stream, 3)
        first = materialize(flaky, instance, resource, fails=True)
        publish(stream, 2, start=3)
        away[0] = False
        (figures,) = metadata_of(second := materialize(flaky, instance, resource))
        assert figures["events"].value == 5
        assert int(str(figures["attempt"].value)) > 1
        assert [row["events"] for row in rows(figures["last_batches"])] == [3, 2]
        assert found(instance, first.run_id).tags[BATCH_TAG] == found(instance, second.run_id).tags[BATCH_TAG]
        assert copied(stream) == [0, 1, 2, 3, 4]


class TestConfig:
    """What a person may set in the Launchpad."""

    def test_a_threshold_leaves_the_remainder(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
    ) -> None:
        publish(stream, 10)
        (figures,) = metadata_of(materialize(copy, instance, resource, threshold={"events": 4}))
        assert (figures["events"].value, figures["batches"].value, figures["lag_events"].value) == (8, 2, 2)
        assert figures["reason"].value == "events"
        assert metadata_of(materialize(copy, instance, resource, threshold={"events": 4})) == []
        (figures,) = metadata_of(materialize(copy, instance, resource))
        assert (figures["events"].value, figures["reason"].value) == (2, "pending")

    @pytest.mark.parametrize("threshold", [{}, {"events": 0}, {"bytes": "many"}, {"age": "-1h"}])
    def test_a_wrong_threshold_fails_and_moves_nothing(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream, threshold: dict[str, object]
    ) -> None:
        publish(stream, 3)
        result = materialize(copy, instance, resource, fails=True, threshold=threshold)
        assert "InvalidSettingError" in str(result.get_step_failure_events()[0].step_failure_data.error)
        assert copied(stream) == []

    def test_a_holder_is_not_waited_for_for_ever(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
    ) -> None:
        publish(stream, 3)
        copy.register(stream)
        stream.coordinator.acquire("copy", None, "somebody", 60.0)
        result = materialize(copy, instance, resource, fails=True, wait="10ms")
        error = str(result.get_step_failure_events()[0].step_failure_data.error)
        assert "LeaseBusyError" in error
        assert "somebody" in error


class TestMeeting:
    """Two runs of one consumer at once."""

    def test_the_second_waits_and_succeeds_if_the_first_did_the_work(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
    ) -> None:
        entered, go_on = threading.Event(), threading.Event()

        @consumer(topic=ORDERS, group="slow", emits=[COPIES])
        def slow(batch: djp.Batch) -> None:
            entered.set()
            assert go_on.wait(30)
            for record in batch:
                batch.emit(COPIES.event(n=record.data["n"]))

        publish(stream, 5)
        with in_thread(lambda: djp.run_pending(stream, slow, owner="first"), go_on) as first:
            assert entered.wait(30)
            with dg.instance_for_test() as other:  # in a file: two threads use it
                with in_thread(lambda: materialize(slow, other, resource)) as second:
                    wait_until(lambda: other.get_runs_count() == 1, "the second to begin")
                    assert copied(stream) == []
                    go_on.set()
                assert isinstance(second[0], dg.ExecuteInProcessResult), second
                assert metadata_of(second[0]) == []
        assert first[0].events == 5
        assert copied(stream) == [0, 1, 2, 3, 4]

    def test_its_lease_carries_the_name_of_its_run(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
    ) -> None:
        owners: set[str | None] = set()

        @consumer(topic=ORDERS, group="held")
        def held(batch: djp.Batch) -> None:
            owners.update(task.owner for task in stream.coordinator.tasks("held"))

        publish(stream, 3)
        result = materialize(held, instance, resource)
        assert [run_id_of(owner or "") for owner in owners] == [result.run_id]


class TestOptions:
    """What `dg.asset` takes, passed through."""

    def test_they_arrive(self, resource: SqlEventStream) -> None:
        condition = dg.AutomationCondition.eager()
        asset = djp.build_stream_asset(
            copy,
            deps=["elsewhere"],
            description="Copies.",
            group_name="shop",
            owners=["team:shop"],
            tags={"tier": "1"},
            kinds={"python", "sql"},
            metadata={"why": "because"},
            pool="small",
            automation_condition=condition,
            op_tags={"cpu": "1"},
        )
        (spec,) = asset.specs
        assert spec.key == dg.AssetKey("copy")
        assert {dep.asset_key for dep in spec.deps} == {dg.AssetKey(["topics", "orders"]), dg.AssetKey("elsewhere")}
        assert (spec.description, spec.group_name, spec.owners) == ("Copies.", "shop", ["team:shop"])
        assert spec.tags["tier"] == "1"
        assert spec.kinds == {"python", "sql"}
        assert spec.metadata["why"] == "because"
        assert spec.automation_condition == condition
        assert spec.code_version == copy.code_version
        assert asset.op.pool == "small"
        assert asset.op.tags["cpu"] == "1"

    def test_the_docstring_is_the_description_unless_given(self) -> None:
        assert next(iter(djp.build_stream_asset(copy).specs)).description == "Copy each order."

    @pytest.mark.parametrize(
        "refused",
        [
            "key",
            "partitions_def",
            "io_manager_key",
            "config_schema",
            "code_version",
            "ins",
            "output_required",
            "retry_policy",
            "check_specs",
        ],
    )
    def test_what_follows_from_the_consumer_is_refused(self, refused: str) -> None:
        with pytest.raises(InvalidSettingError, match=refused) as caught:
            djp.build_stream_asset(copy, **{refused: None})  # type: ignore[arg-type]
        assert caught.value.facts["setting"] == refused

    def test_resource_defs_and_hooks(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
    ) -> None:
        used: list[object] = []

        @consumer(topic=ORDERS, group="served")
        def served(batch: djp.Batch, service: str) -> None:
            used.append(service)

        @dg.success_hook
        def cheer(context: dg.HookContext) -> None:
            used.append("cheered")

        asset = djp.build_stream_asset(
            served, resource_defs={"service": dg.ResourceDefinition.hardcoded_resource("found")}, hooks={cheer}
        )
        publish(stream, 1)
        materialize(asset, instance, resource)
        assert used == ["found", "cheered"]


class TestOp:
    """`process_batch_op` in a user's own job."""

    def test_it_returns_how_many_and_tells_the_figures(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
    ) -> None:
        process = djp.process_batch_op(copy)
        counted: list[int] = []

        @dg.op
        def after(count: int) -> None:
            counted.append(count)

        @dg.job(resource_defs={"event_stream": resource})
        def theirs() -> None:
            after(process())

        def figures(result: dg.ExecuteInProcessResult) -> Sequence[object]:
            outputs = [event for event in result.events_for_node("process_copy") if event.is_successful_output]
            return [event.step_output_data.metadata["events"].value for event in outputs]

        publish(stream, 5)
        result = theirs.execute_in_process(instance=instance)
        assert figures(result) == [5]
        assert found(instance, result.run_id).tags[GROUP_TAG] == "copy"
        assert figures(theirs.execute_in_process(instance=instance)) == [0]
        assert counted == [5, 0]
        assert copied(stream) == [0, 1, 2, 3, 4]

    def test_two_in_one_job(self, instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream) -> None:
        @consumer(topic=COPIES, group="onward")
        def onward(batch: djp.Batch) -> int:
            return len(batch)

        first, second = djp.process_batch_op(copy, name="one"), djp.process_batch_op(onward)

        @dg.op(ins={"start": dg.In(dg.Nothing)})
        def nothing() -> None: ...

        @dg.job(resource_defs={"event_stream": resource})
        def theirs() -> None:
            nothing(first())
            second()

        publish(stream, 4)
        stream.create_topic(COPIES)
        assert theirs.execute_in_process(instance=instance).success
        theirs.execute_in_process(instance=instance)
        assert sum(output.load() for output in djp.BatchOutputs[int](stream, "onward")) == 4
