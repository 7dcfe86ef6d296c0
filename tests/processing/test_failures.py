"""What errors mean, and how often and how patiently a batch is tried again."""

from typing import Any

import pytest

from djp_dagster import Batch, EventStream, RetryPolicy, TerminalError, TransientError, consumer, errors, run_pending
from djp_dagster.errors import InvalidSettingError, RetriesExhaustedError, StreamUnavailableError
from djp_dagster.processing.failures import FATAL, OUTAGES, describe
from tests.processing.kit import FAST, NUMBERS, OUT, Impatient, committed, fill, numbers, open_intents, values


class FlakyError(Exception):
    """Something a user's library raises."""


class TestJudge:
    """`RetryPolicy.judge`."""

    @pytest.mark.parametrize(
        ("error", "verdict"),
        [
            *((kind("x"), "outage") for kind in OUTAGES),
            *((kind("x"), "fatal") for kind in FATAL),
            (TransientError("x"), "transient"),
            (errors.LeaseBusyError("x"), "transient"),
            (TerminalError("x"), "terminal"),
            (errors.MissingKeyError("x"), "terminal"),
            (ConnectionResetError(), "transient"),
            (TimeoutError(), "transient"),
            (OSError(), "transient"),
            (ValueError(), "terminal"),
            (MemoryError(), "terminal"),
            (FlakyError(), "terminal"),
        ],
        ids=lambda value: value if isinstance(value, str) else type(value).__name__,
    )
    def test_of_each_kind(self, error: Exception, verdict: str) -> None:
        assert RetryPolicy().judge(error) == verdict

    def test_further_types_may_be_transient(self) -> None:
        assert RetryPolicy(transient=(FlakyError,)).judge(FlakyError()) == "transient"


class TestPolicy:
    """`RetryPolicy`."""

    def test_pauses_double_up_to_the_longest_with_jitter(self) -> None:
        policy = RetryPolicy(first="100ms", longest="1s")
        for failures, longest in enumerate([0.1, 0.2, 0.4, 0.8, 1.0, 1.0], 1):
            pauses = [policy.pause_s(failures) for _ in range(50)]
            assert all(longest / 2 <= pause <= longest for pause in pauses)
            assert len(set(pauses)) > 1
        assert policy.pause_s(10_000) <= 1.0

    @pytest.mark.parametrize("wrong", [{"max_attempts": 0}, {"first": "soon"}, {"longest": -1}])
    def test_wrong_settings_are_named(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(InvalidSettingError, match=next(iter(wrong))):
            RetryPolicy(**wrong)

    def test_describe_is_short(self) -> None:
        assert describe(ValueError("x")) == ("ValueError", "x")
        assert describe(FlakyError("x" * 50), limit=10) == ("FlakyError", "x" * 7 + "...")


class TestTransient:
    """A failing attempt, its budget and its pauses."""

    def test_the_same_batch_is_tried_again_as_another_attempt(self, stream: EventStream) -> None:
        tried: list[tuple[str, int, int]] = []

        @consumer(topic=NUMBERS, emits=[OUT], retry=FAST)
        def handle(batch: Batch) -> dict[str, int]:
            tried.append((batch.id, batch.attempt, len(batch)))
            for record in batch:
                batch.emit(OUT.event(n=record.data["n"]))
            if batch.attempt < 3:
                raise ConnectionError("away")
            return {"attempt": batch.attempt}

        fill(stream, NUMBERS, numbers(4))
        report = run_pending(stream, handle)
        assert len({batch_id for batch_id, _, _ in tried}) == 1
        assert [(attempt, size) for _, attempt, size in tried] == [(1, 4), (2, 4), (3, 4)]
        assert report.batches[0].attempt == 3
        assert values(stream, OUT) == [0, 1, 2, 3]
        (output,) = stream.outputs("handle")
        assert output.attempt == 3
        assert "/3/" in output.payload.key

    def test_a_spent_budget_leaves_the_offsets_and_the_next_run_has_a_new_one(self, stream: EventStream) -> None:
        attempts: list[int] = []
        heal = False

        @consumer(topic=NUMBERS, emits=[OUT], retry=FAST)
        def handle(batch: Batch) -> None:
            attempts.append(batch.attempt)
            for record in batch:
                batch.emit(OUT.event(n=record.data["n"]))
            if not heal:
                raise TransientError("away")

        fill(stream, NUMBERS, numbers(2))
        for run in (1, 2):
            with pytest.raises(RetriesExhaustedError, match="3 times in a row") as caught:
                run_pending(stream, handle)
            assert caught.value.facts["failures"] == 3
            assert isinstance(caught.value.__cause__, TransientError)
            assert committed(stream, handle) == [0]
            assert stream.dead_letters() == []
            assert len(attempts) == 3 * run
        heal = True
        stream.publish(NUMBERS, numbers(1, start=2))
        report = run_pending(stream, handle)
        assert attempts == [1, 2, 3, 4, 5, 6, 7, 1]
        assert [batch.events for batch in report.batches] == [2, 1], (
            "the open batch is finished unchanged, then the rest"
        )
        assert values(stream, OUT) == [0, 1, 2]

    def test_what_was_committed_before_the_failure_is_reported(self, stream: EventStream) -> None:
        from djp_dagster import BatchReport, Threshold

        reports: list[BatchReport] = []

        @consumer(topic=NUMBERS, max_batch=Threshold(events=1), retry=FAST)
        def handle(batch: Batch) -> None:
            for record in batch:
                if record.data["n"] == 2:
                    raise TransientError("away")

        fill(stream, NUMBERS, numbers(4))
        with pytest.raises(RetriesExhaustedError):
            run_pending(stream, handle, on_report=reports.append)
        assert [report.events for report in reports] == [1, 1]
        assert committed(stream, handle) == [2]

    def test_an_outage_is_waited_for_and_counted_nowhere(self, stream: EventStream) -> None:
        attempts: list[int] = []

        @consumer(topic=NUMBERS, retry=RetryPolicy(max_attempts=1))
        def handle(batch: Batch) -> None:
            attempts.append(batch.attempt)
            if batch.attempt <= 3:
                raise StreamUnavailableError("away")

        fill(stream, NUMBERS, numbers(1))
        run_pending(stream, handle, stop=Impatient())
        assert attempts == [1, 2, 3, 4]

    def test_an_outage_that_outlasts_patience_is_raised(self, stream: EventStream) -> None:
        from djp_dagster.processing.processor import Processor

        @consumer(topic=NUMBERS)
        def handle(batch: Batch) -> None:
            raise StreamUnavailableError("away")

        fill(stream, NUMBERS, numbers(1))
        handle.register(stream)
        lease = stream.coordinator.acquire("handle", None, "me", 5.0)
        from djp_dagster.streams.model import Range
        from tests.processing.kit import intent_for

        intent = intent_for(handle, [Range("numbers", 0, 0, 1)])
        stream.coordinator.begin(lease, intent)
        processor = Processor(stream, handle, patience=0)
        with pytest.raises(StreamUnavailableError):
            processor.process(lease, intent, resumed=False)
        stream.coordinator.release(lease)
        (left,) = open_intents(stream, handle)
        assert (left.running, left.failures, left.deaths) == (False, 0, 0)


class TestStopped:
    """Told to stop, not killed."""

    @pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
    def test_a_stop_in_the_handler_is_no_death(self, stream: EventStream, kind: type[BaseException]) -> None:
        stopping = True

        @consumer(topic=NUMBERS, retry=FAST)
        def handle(batch: Batch) -> None:
            if stopping:
                raise kind

        fill(stream, NUMBERS, numbers(1))
        for _ in range(5):
            with pytest.raises(kind):
                run_pending(stream, handle)
            (left,) = open_intents(stream, handle)
            assert (left.running, left.deaths, left.failures) == (False, 0, 0)
        stopping = False
        report = run_pending(stream, handle)
        assert (report.events, report.batches[0].dead_letters) == (1, 0)

    @pytest.mark.parametrize("kind", FATAL)
    def test_an_error_that_is_nobodys_fault_stops_and_dead_letters_nothing(
        self, stream: EventStream, kind: type[errors.DjpError]
    ) -> None:
        calls: list[int] = []

        @consumer(topic=NUMBERS, retry=FAST)
        def handle(batch: Batch) -> None:
            calls.append(1)
            raise kind("no")

        fill(stream, NUMBERS, numbers(1))
        with pytest.raises(kind):
            run_pending(stream, handle)
        assert calls == [1]
        assert committed(stream, handle) == [0]
        assert stream.dead_letters() == []
