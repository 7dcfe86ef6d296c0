"""A worker run while Dagster's event log is away: the work goes on, and Dagster is told afterwards."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg
import pytest
from dagster._core.events.log import EventLogEntry
from dagster._core.utils import make_new_run_id

import djp_dagster as djp
from djp_dagster import Consumer, EventStream, SqlEventStream, consumer
from djp_dagster.orchestration.tags import owner_of
from tests.orchestration.kit import FAST, ORDERS, copied, copy, publish
from tests.processing.kit import PATIENT_S, in_thread, wait_until


class Outages:
    """Dagster's event log, which refuses what it is given next, so many times; and what it was given."""

    def __init__(self, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = 0
        self.refused: list[str] = []
        self.stored: list[str] = []
        self._store = instance.event_log_storage.store_event
        monkeypatch.setattr(instance.event_log_storage, "store_event", self._store_unless_away)

    def _store_unless_away(self, event: EventLogEntry) -> None:
        if self.left > 0:
            self.left -= 1
            self.refused.append(event.user_message)
            raise ConnectionError("the event log is away")
        self._store(event)
        self.stored.append(event.user_message)


def told(words: str, messages: list[str]) -> int:
    """How many of the messages have these words."""
    return sum(words in message for message in messages)


@pytest.fixture
def outages(lasting: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> Outages:
    return Outages(lasting, monkeypatch)


@contextmanager
def working(
    instance: dg.DagsterInstance, resource: SqlEventStream, *consumers: Consumer, stuck_after: str = "10min"
) -> Iterator[None]:
    """A worker run, which is at work at the end of the block; then it is asked to leave, and ends in order."""
    job = djp.build_worker_sensor(consumers, name="shop").job
    assert isinstance(job, dg.JobDefinition)
    run_id = make_new_run_id()

    def work() -> bool:
        return job.execute_in_process(
            run_config={"ops": {"shop": {"config": {"lease": "2s", "stuck_after": stuck_after}}}},
            instance=instance,
            resources={"event_stream": resource},
            run_id=run_id,
        ).success

    with in_thread(work) as outcome:
        try:
            yield
            assert outcome == [], "it should stay"
        finally:
            for one in consumers:
                resource.open().coordinator.ask_to_leave(one.group, owner_of(run_id))
    assert outcome == [True]


def test_a_batch_that_takes_too_long_is_told_once_dagster_listens_again(
    lasting: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream, outages: Outages
) -> None:
    go_on = threading.Event()

    @consumer(topic=ORDERS, group="slow")
    def slow(batch: djp.Batch) -> None:
        outages.left = 6  # three messages: Dagster gives up a message when it cannot store that it cannot store it
        assert go_on.wait(3 * PATIENT_S)

    publish(stream, 1)
    words = "of group slow has been under way for"
    with working(lasting, resource, slow, stuck_after="100ms"):
        try:
            wait_until(lambda: told(words, outages.stored) > 0, "it to tell")
        finally:
            outages.left = 0
            go_on.set()
        wait_until(lambda: stream.pending("slow").events == 0, "the work")
    assert told(words, outages.refused) == 3
    assert told(words, outages.stored) == 1


def test_a_consumer_that_pauses_untold_does_not_end_the_others(
    lasting: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream, outages: Outages
) -> None:
    @consumer(topic=ORDERS, group="broken", retry=FAST)
    def broken(batch: djp.Batch) -> None:
        if not outages.refused:
            outages.left = 1 << 30
        raise djp.TransientError("the service is away")

    publish(stream, 3)
    with working(lasting, resource, broken, copy):
        try:
            wait_until(lambda: told("consumer broken pauses", outages.refused) > 0, "it to pause")
            publish(stream, 3, start=3)
            wait_until(lambda: copied(stream) == list(range(6)), "the other to go on")
        finally:
            outages.left = 0
    (run,) = lasting.get_runs()
    records = lasting.all_logs(run.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION)
    told_of = [int(str(one.metadata["events"].value)) for record in records if (one := record.asset_materialization)]
    assert sum(told_of) == 6, "what was done meanwhile is told in the end"
