"""Sensors and schedules that ask for runs of a consumer's asset."""

from typing import TYPE_CHECKING

import dagster as dg

from djp_dagster.orchestration.jobs import consumer_job, op_name_of
from djp_dagster.orchestration.runs import request_run
from djp_dagster.orchestration.step import threshold_config
from djp_dagster.orchestration.ticks import look
from djp_dagster.processing.consumer import Consumer
from djp_dagster.processing.threshold import Threshold
from djp_dagster.resources import SqlEventStream

if TYPE_CHECKING:
    from dagster._core.definitions.events import CoercibleToAssetKey


def run_sensor(
    consumer: Consumer,
    *,
    asset: "CoercibleToAssetKey | None",
    threshold: Threshold | None,
    name: str,
    description: str,
    minimum_interval_seconds: int,
    default_status: dg.DefaultSensorStatus,
) -> dg.SensorDefinition:
    """A sensor that runs the consumer's asset when something (or enough) is pending, one run at a time."""
    config = {} if threshold is None else _run_config(consumer, asset, threshold)

    @dg.sensor(
        name=name,
        job=consumer_job(consumer, asset),
        minimum_interval_seconds=minimum_interval_seconds,
        default_status=default_status,
        description=description,
    )
    def consumer_sensor(
        context: dg.SensorEvaluationContext, event_stream: SqlEventStream
    ) -> dg.RunRequest | dg.SkipReason:
        stream = event_stream.open()
        seen = look(stream, consumer, threshold)
        if seen.reason is None:
            return dg.SkipReason(seen.why_not)
        return request_run(context.instance, stream, consumer.group, seen, run_config=config)

    return consumer_sensor


def run_schedule(
    consumer: Consumer,
    *,
    cron_schedule: str,
    execution_timezone: str | None,
    asset: "CoercibleToAssetKey | None",
    name: str,
    description: str,
    default_status: dg.DefaultScheduleStatus,
) -> dg.ScheduleDefinition:
    """A schedule that runs the consumer's asset, unless nothing is pending or a run is under way."""

    @dg.schedule(
        name=name,
        job=consumer_job(consumer, asset),
        cron_schedule=cron_schedule,
        execution_timezone=execution_timezone,
        default_status=default_status,
        description=description,
    )
    def consumer_schedule(
        context: dg.ScheduleEvaluationContext, event_stream: SqlEventStream
    ) -> dg.RunRequest | dg.SkipReason:
        stream = event_stream.open()
        seen = look(stream, consumer)
        if seen.reason is None:
            return dg.SkipReason(seen.why_not)
        # A holder is waited for by the run: what piled up until now is to be done now, whoever does it.
        return request_run(context.instance, stream, consumer.group, seen._replace(holder=None))

    return consumer_schedule


def _run_config(
    consumer: Consumer, asset: "CoercibleToAssetKey | None", threshold: Threshold
) -> dict[str, dict[str, object]]:
    return {"ops": {op_name_of(consumer, asset): {"config": threshold_config(threshold)}}}
