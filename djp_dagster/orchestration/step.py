"""Run mode inside a run: one step that does what is pending for a consumer, and tells Dagster what it did."""

import contextlib
from collections.abc import Iterator, Mapping

import dagster as dg
from pydantic import Field

from djp_dagster.errors import TerminalError, TransientError
from djp_dagster.orchestration.metadata import Tally
from djp_dagster.orchestration.tags import BATCH_TAG, GROUP_TAG, REASON_TAG, STREAM_KEY, STREAM_TAG, owner_of
from djp_dagster.processing.commands import rebuild
from djp_dagster.processing.consumer import Consumer
from djp_dagster.processing.run import RunReport, run_pending
from djp_dagster.processing.threshold import Threshold
from djp_dagster.resources.event_stream import SqlEventStream
from djp_dagster.state.table import Table
from djp_dagster.streams.model import Backlog, Intent
from djp_dagster.streams.stream import EventStream

_AUTOMATIC_TAGS = ("dagster/sensor_name", "dagster/schedule_name", "dagster/from_automation_condition")


class ThresholdConfig(dg.Config):
    """What must have piled up before a batch is cut, and how much makes a batch."""

    bytes: str | None = Field(default=None, description='Encoded size, e.g. "100MB".')
    events: int | None = Field(default=None, description="How many events.")
    age: str | None = Field(default=None, description='Since the oldest was appended, e.g. "12h".')
    idle: str | None = Field(default=None, description='Since the newest was appended, e.g. "5min".')

    def threshold(self) -> Threshold:
        """The same for the core."""
        return Threshold(bytes=self.bytes, events=self.events, age=self.age, idle=self.idle)


class ProcessConfig(dg.Config):
    """How a run cuts its batches. By default it does everything pending, up to the ends it sees at its start."""

    threshold: ThresholdConfig | None = Field(
        default=None, description="Only what reaches this, in batches of that size; a remainder stays pending."
    )
    wait: str = Field(default="10min", description="How long to wait for another run or worker that holds the group.")


def threshold_config(threshold: Threshold) -> dict[str, object]:
    """The run config that makes a step use this threshold."""
    given = {
        "bytes": None if threshold.bytes is None else str(threshold.bytes),
        "events": threshold.max_events,
        "age": None if threshold.age is None else str(threshold.age),
        "idle": None if threshold.idle is None else str(threshold.idle),
    }
    return {"threshold": {name: value for name, value in given.items() if value is not None}}


def backlog_of(stream: EventStream, group: str) -> Backlog | None:
    """What is pending now; None if the stream is away, which must not hide what was committed."""
    try:
        return stream.pending(group)
    except TransientError:
        return None


def stream_of(resources: object) -> EventStream:
    """The open stream of a step's or a tick's resources."""
    resource: SqlEventStream = getattr(resources, STREAM_KEY)
    return resource.open()


@contextlib.contextmanager
def processed(
    context: dg.OpExecutionContext | dg.AssetExecutionContext, consumer: Consumer, config: ProcessConfig
) -> Iterator[Tally]:
    """Do what is pending; the block then gets what was committed, even if a later batch failed and will raise."""
    tally = Tally()
    try:
        outcome = _process(context, consumer, config, tally)
    except BaseException:
        if tally.batches:
            context.log.warning("committed %d batches before the failure", tally.batches)
            yield tally
        raise
    if outcome.waited_for is not None:
        context.log.info("%s did the work meanwhile", outcome.waited_for)
    yield tally


def asked_by_hand(tags: Mapping[str, str]) -> bool:
    """Whether a person asked for the run, not a sensor or a schedule."""
    return REASON_TAG not in tags and not any(tag in tags for tag in _AUTOMATIC_TAGS)


def rebuild_table(context: dg.AssetExecutionContext, table: Table, config: ProcessConfig, tally: Tally) -> None:
    """Make the table anew from its topic, and correct what differs; not from a topic that is no longer whole."""
    resource: SqlEventStream = getattr(context.resources, STREAM_KEY)
    try:
        reports = rebuild(resource.open(), table, state_folder=resource.state_path(), wait=config.wait)
    except TerminalError as error:
        context.log.warning("the table was not made anew: %s", error)
        return
    for report in reports:
        tally.add(report)
    corrected = sum(report.counts.get("corrected_keys", 0) for report in reports)
    context.log.info("made anew from its topic: %d keys were corrected", corrected)


def _process(
    context: dg.OpExecutionContext | dg.AssetExecutionContext, consumer: Consumer, config: ProcessConfig, tally: Tally
) -> RunReport:
    resource: SqlEventStream = getattr(context.resources, STREAM_KEY)
    stream = resource.open()
    tags = {GROUP_TAG: consumer.group, STREAM_TAG: stream.incarnation}
    tagged = False

    def tag(intent: Intent) -> None:
        nonlocal tagged
        if not tagged:
            tagged = True
            context.instance.add_run_tags(context.run.run_id, {**tags, BATCH_TAG: intent.batch_id})

    return run_pending(
        stream,
        consumer,
        threshold=None if config.threshold is None else config.threshold.threshold(),
        resources={name: getattr(context.resources, name) for name in consumer.resource_names},
        state_folder=resource.state_path(),
        wait=config.wait,
        on_report=tally.add,
        on_begin=tag,
        owner=owner_of(context.run.run_id),
    )
