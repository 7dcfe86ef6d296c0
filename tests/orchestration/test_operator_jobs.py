"""What a person does from the Launchpad, and `publish_op` in a user's job."""

from datetime import datetime, timezone
from typing import Any

import dagster as dg
import pytest

import djp_dagster as djp
from djp_dagster import EventStream, SqlEventStream, consumer
from djp_dagster.orchestration import operator_jobs
from tests.orchestration.kit import COPIES, FAST, ORDERS, copied, copy, drain, orders, publish, records_of
from tests.processing.kit import at

BAD = {"n": 1}


@consumer(topic=ORDERS, emits=[COPIES], group="choosy", retry=FAST)
def choosy(batch: djp.Batch) -> None:
    for record in batch:
        if record.data["n"] in BAD.values():
            raise ValueError
        batch.emit(COPIES.event(n=record.data["n"]))


def run(
    job: dg.JobDefinition,
    instance: dg.DagsterInstance,
    resource: SqlEventStream,
    *,
    fails: bool = False,
    **config: Any,
) -> dg.ExecuteInProcessResult:
    result = job.execute_in_process(
        instance=instance,
        resources={"event_stream": resource},
        run_config={"ops": {f"{job.name}_op": {"config": config}}} if config else None,
        raise_on_error=False,
    )
    assert result.success == (not fails), result.get_step_failure_events()
    return result


def error_of(result: dg.ExecuteInProcessResult) -> str:
    (failure,) = result.get_step_failure_events()
    assert failure.step_failure_data.error is not None
    return failure.step_failure_data.error.to_string()


class TestPublish:
    """The job and the op."""

    def test_what_is_typed_is_published(self, instance: dg.DagsterInstance, resource: SqlEventStream) -> None:
        job = djp.build_publish_job(ORDERS, COPIES)
        run(job, instance, resource, topic="orders", events=[{"user": "a", "n": 1}, {"user": "b", "n": 2}])
        assert sorted(record.data["n"] for record in records_of(resource.open(), ORDERS)) == [1, 2]
        assert resource.open().log.topic("orders").partitions == 2

    def test_the_launchpad_is_filled_with_something_to_start_from(self) -> None:
        job = djp.build_publish_job(ORDERS)
        assert job.run_config == {
            "ops": {"publish_job_op": {"config": {"topic": "orders", "events": [{"user": "..."}]}}}
        }

    def test_the_launchpad_is_filled_with_the_given_example_which_can_be_published_as_it_is(
        self, instance: dg.DagsterInstance, resource: SqlEventStream
    ) -> None:
        job = djp.build_publish_job(ORDERS, COPIES, example={"user": "ada", "n": 3})
        assert job.execute_in_process(instance=instance, resources={"event_stream": resource}).success
        assert [record.data for record in records_of(resource.open(), ORDERS)] == [{"user": "ada", "n": 3}]

    @pytest.mark.parametrize(
        ("config", "words"),
        [
            ({"topic": "copies", "events": []}, "topic 'copies' is none of ['orders']"),
            ({"topic": "orders", "events": [{"n": 1}]}, "MissingKeyError"),
        ],
    )
    def test_a_mistake_is_named_and_nothing_is_published(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, config: dict[str, Any], words: str
    ) -> None:
        job = djp.build_publish_job(ORDERS)
        result = run(job, instance, resource, fails=True, **config)
        assert words in error_of(result)
        assert records_of(resource.open(), ORDERS) == []

    def test_it_needs_a_topic(self) -> None:
        for build in (djp.build_publish_job, djp.build_redrive_job, djp.build_seek_job):
            with pytest.raises(djp.errors.InvalidSettingError, match="needs"):
                build()

    @pytest.mark.parametrize("count", [3, 11])
    def test_a_retry_publishes_nothing_twice(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, monkeypatch: pytest.MonkeyPatch, count: int
    ) -> None:
        """The step fails after it has published: while its output is stored."""
        monkeypatch.setattr(operator_jobs, "_EVENTS_PER_APPEND", 4)
        tries: list[int] = []

        class Fragile(dg.IOManager):
            def handle_output(self, context: dg.OutputContext, obj: object) -> None:
                assert isinstance(obj, int)
                tries.append(obj)
                if len(tries) < 3:
                    raise RuntimeError("the disk is full")

            def load_input(self, context: dg.InputContext) -> object:
                raise AssertionError("nothing loads it")

        @dg.op(out=dg.Out(io_manager_key="memory"))
        def make() -> list[Any]:
            return [ORDERS.event(user="a", n=0), *({"user": f"user-{n}", "n": n} for n in range(1, count))]

        send = djp.publish_op(ORDERS).with_retry_policy(dg.RetryPolicy(max_retries=3))

        @dg.job(
            resource_defs={
                "event_stream": resource,
                "io_manager": dg.IOManagerDefinition.hardcoded_io_manager(Fragile()),
                "memory": dg.mem_io_manager,
            }
        )
        def theirs() -> None:
            send(make())

        assert theirs.execute_in_process(instance=instance).success
        assert tries == [count] * 3
        stream = resource.open()
        assert sorted(record.data["n"] for record in records_of(stream, ORDERS)) == list(range(count))
        theirs.execute_in_process(instance=instance)
        assert len(records_of(stream, ORDERS)) == 2 * count, "another run is another publish"

    def test_a_step_that_died_between_two_appends_goes_on(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(operator_jobs, "_EVENTS_PER_APPEND", 2)
        stream = resource.open()
        stream.create_topic(ORDERS)

        def some(limit: int) -> Any:
            for n, event in enumerate(orders(7)):
                if n == limit:
                    raise KeyboardInterrupt
                yield event

        for limit in (3, 5):
            with pytest.raises(KeyboardInterrupt):
                operator_jobs.publish_once(stream, "orders", some(limit), "run-1")
        assert operator_jobs.publish_once(stream, "orders", some(99), "run-1") == 7
        assert sorted(record.data["n"] for record in records_of(stream, ORDERS)) == list(range(7))

    def test_two_steps_of_one_run_are_two_producers(
        self, instance: dg.DagsterInstance, resource: SqlEventStream
    ) -> None:
        @dg.op
        def make() -> list[Any]:
            return [{"user": "a", "n": 1}]

        one, two = djp.publish_op(ORDERS, name="one"), djp.publish_op(ORDERS, name="two")

        @dg.job(resource_defs={"event_stream": resource})
        def theirs() -> None:
            made = make()
            one(made)
            two(made)

        assert theirs.execute_in_process(instance=instance).success
        assert len(records_of(resource.open(), ORDERS)) == 2

    def test_it_says_how_many(self, instance: dg.DagsterInstance, resource: SqlEventStream) -> None:
        @dg.op
        def make() -> list[Any]:
            return [{"user": "a", "n": n} for n in range(4)]

        send = djp.publish_op(ORDERS)

        @dg.job(resource_defs={"event_stream": resource})
        def theirs() -> None:
            send(make())

        result = theirs.execute_in_process(instance=instance)
        assert result.output_for_node("publish_orders") == 4


class TestRedrive:
    """`build_redrive_job`."""

    @pytest.fixture
    def job(self) -> dg.JobDefinition:
        return djp.build_redrive_job(choosy, copy)

    @pytest.fixture
    def letters(self, stream: EventStream, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Two dead letters of a group that has done the rest."""
        monkeypatch.setattr("tests.orchestration.test_operator_jobs.BAD", {"a": 1, "b": 4})
        publish(stream, 6)
        drain(stream, choosy)
        ids = [letter.id for letter in stream.dead_letters("choosy")]
        assert len(ids) == 2
        assert copied(stream) == [0, 2, 3, 5]
        return ids

    def test_all_of_them(
        self,
        instance: dg.DagsterInstance,
        resource: SqlEventStream,
        stream: EventStream,
        job: dg.JobDefinition,
        letters: list[int],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("tests.orchestration.test_operator_jobs.BAD", {})
        run(job, instance, resource, group="choosy")
        assert stream.dead_letters("choosy") == []
        assert {letter.status for letter in stream.dead_letters("choosy", status=None)} == {"redriven"}
        assert copied(stream) == [0, 1, 2, 3, 4, 5]
        run(job, instance, resource, group="choosy")
        assert copied(stream) == [0, 1, 2, 3, 4, 5]

    def test_those_named(
        self,
        instance: dg.DagsterInstance,
        resource: SqlEventStream,
        stream: EventStream,
        job: dg.JobDefinition,
        letters: list[int],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("tests.orchestration.test_operator_jobs.BAD", {})
        run(job, instance, resource, group="choosy", ids=letters[1:])
        assert [letter.id for letter in stream.dead_letters("choosy")] == letters[:1]

    def test_what_fails_again_stays_and_the_run_fails(
        self,
        instance: dg.DagsterInstance,
        resource: SqlEventStream,
        stream: EventStream,
        job: dg.JobDefinition,
        letters: list[int],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("tests.orchestration.test_operator_jobs.BAD", {"a": 4})
        result = run(job, instance, resource, fails=True, group="choosy")
        assert "failed again and stay pending" in error_of(result)
        (left,) = stream.dead_letters("choosy")
        assert left.redrives == 1
        (failure,) = result.get_step_failure_events()
        told = failure.step_failure_data.user_failure_data
        assert told is not None
        assert (told.metadata["redriven"].value, told.metadata["failed_again"].value) == (1, 1)
        assert copied(stream) == [0, 1, 2, 3, 5]

    @pytest.mark.parametrize(
        ("config", "words"),
        [
            ({"group": "nobody"}, "group 'nobody' is none of ['choosy', 'copy']"),
            ({"group": "choosy", "ids": [10_000]}, "has no pending dead letters [10000]"),
        ],
    )
    def test_mistakes_are_named(
        self,
        instance: dg.DagsterInstance,
        resource: SqlEventStream,
        stream: EventStream,
        job: dg.JobDefinition,
        letters: list[int],
        config: dict[str, Any],
        words: str,
    ) -> None:
        assert words in error_of(run(job, instance, resource, fails=True, **config))
        assert [letter.id for letter in stream.dead_letters("choosy")] == letters


class TestSeek:
    """`build_seek_job`."""

    @pytest.fixture
    def job(self) -> dg.JobDefinition:
        return djp.build_seek_job(copy, choosy)

    @pytest.fixture
    def done(self, stream: EventStream) -> EventStream:
        publish(stream, 10)
        drain(stream)
        return stream

    def observed(self, result: dg.ExecuteInProcessResult) -> dict[str, Any]:
        (event,) = result.get_asset_observation_events()
        observation = event.asset_observation_data.asset_observation
        assert observation.asset_key == dg.AssetKey("copy")
        table = observation.metadata["offsets"]
        assert isinstance(table, dg.TableMetadataValue)
        moves = {row.data["partition"]: row.data for row in table.records}
        return {
            "words": observation.description,
            "again": observation.metadata["handled_again"].value,
            "skipped": observation.metadata["skipped"].value,
            "new": {partition: move["new"] for partition, move in moves.items()},
            "old": {partition: move["old"] for partition, move in moves.items()},
        }

    def test_a_dry_run_changes_nothing_and_is_the_default(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, done: EventStream, job: dg.JobDefinition
    ) -> None:
        before = (done.positions("copy"), done.coordinator.tasks("copy"))
        seen = self.observed(run(job, instance, resource, group="copy", to="earliest"))
        assert (seen["words"], seen["again"], seen["skipped"]) == ("dry run: nothing was changed", 10, 0)
        assert seen["new"] == {0: 0, 1: 0}
        assert seen["old"] == {part.partition: offset for part, offset in before[0].items()}
        assert (done.positions("copy"), done.coordinator.tasks("copy")) == before

    def test_it_moves(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, done: EventStream, job: dg.JobDefinition
    ) -> None:
        seen = self.observed(run(job, instance, resource, group="copy", to="earliest", dry_run=False))
        assert (seen["words"], seen["again"]) == ("the group was moved", 10)
        assert set(done.positions("copy").values()) == {0}
        seen = self.observed(run(job, instance, resource, group="copy", to="latest", dry_run=False))
        assert (seen["again"], seen["skipped"]) == (0, 10)
        assert done.pending("copy").events == 0

    def test_to_offsets_and_times(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, done: EventStream, job: dg.JobDefinition
    ) -> None:
        ends = {part.partition: span.end for part, span in done.log.spans(["orders"]).items()}
        run(job, instance, resource, group="copy", to="orders:1=2", dry_run=False)
        assert done.positions("copy") == {at(ORDERS, 0): ends[0], at(ORDERS, 1): 2}
        run(job, instance, resource, group="copy", to="orders:0=1, orders:1=0", dry_run=False)
        assert done.positions("copy") == {at(ORDERS, 0): 1, at(ORDERS, 1): 0}
        run(job, instance, resource, group="copy", to=datetime.now(timezone.utc).isoformat(), dry_run=False)
        assert done.pending("copy").events == 0
        run(job, instance, resource, group="copy", to="2h", dry_run=False)
        assert done.pending("copy").events == 10

    @pytest.mark.parametrize("dry_run", [True, False])
    @pytest.mark.parametrize(
        ("config", "words"),
        [
            ({"group": "nobody", "to": "latest"}, "group 'nobody' is none of ['choosy', 'copy']"),
            ({"group": "choosy", "to": "latest"}, "UnknownGroupError"),
            ({"group": "copy", "to": "orders:7=0"}, "InvalidSettingError"),
            ({"group": "copy", "to": "clicks:0=0"}, "does not read topic 'clicks'"),
            ({"group": "copy", "to": "orders:0=99"}, "OffsetOutOfRangeError"),
            ({"group": "copy", "to": "orders:0=-1"}, "is no TOPIC:PARTITION=OFFSET"),
            ({"group": "copy", "to": "orders:0"}, "is no time with a zone"),
            ({"group": "copy", "to": "2026-01-01T00:00:00"}, "is no time with a zone"),
            ({"group": "copy", "to": ""}, "is no time with a zone"),
        ],
    )
    def test_mistakes_are_named_and_nothing_moves(
        self,
        instance: dg.DagsterInstance,
        resource: SqlEventStream,
        done: EventStream,
        job: dg.JobDefinition,
        config: dict[str, Any],
        words: str,
        dry_run: bool,
    ) -> None:
        before = done.positions("copy")
        assert words in error_of(run(job, instance, resource, fails=True, dry_run=dry_run, **config))
        assert done.positions("copy") == before

    def test_a_holder_is_named(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, done: EventStream, job: dg.JobDefinition
    ) -> None:
        done.coordinator.acquire("copy", [1], "worker-5", 60.0)
        result = run(job, instance, resource, fails=True, group="copy", to="earliest", dry_run=False, wait="10ms")
        assert "worker-5" in error_of(result)
        assert result.get_asset_observation_events() == []
