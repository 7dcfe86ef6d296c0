"""Sensors and schedules that ask for runs of a consumer's asset."""

from collections.abc import Mapping

import dagster as dg

from djp_dagster.orchestration.jobs import consumer_job, op_name_of
from djp_dagster.orchestration.runs import request_run, tags_of
from djp_dagster.orchestration.standing import Suspects
from djp_dagster.orchestration.step import threshold_config
from djp_dagster.orchestration.ticks import look
from djp_dagster.processing.consumer import Consumer
from djp_dagster.processing.threshold import Threshold
from djp_dagster.resources.event_stream import SqlEventStream


def run_sensor(
    consumer: Consumer,
    *,
    threshold: Threshold | None,
    name: str,
    description: str,
    run_tags: Mapping[str, str] | None,
    minimum_interval_seconds: int,
    default_status: dg.DefaultSensorStatus,
) -> dg.SensorDefinition:
    """A sensor that runs the consumer's asset when something (or enough) is pending, one run at a time."""
    config = {} if threshold is None else {"ops": {op_name_of(consumer): {"config": threshold_config(threshold)}}}

    @dg.sensor(
        name=name,
        job=consumer_job(consumer),
        minimum_interval_seconds=minimum_interval_seconds,
        default_status=default_status,
        description=description,
    )
    def consumer_sensor(
        context: dg.SensorEvaluationContext, event_stream: SqlEventStream
    ) -> dg.RunRequest | dg.SkipReason:
        stream = event_stream.open()
        seen, suspects = look(stream, consumer, threshold), Suspects(context.cursor)
        found: dg.RunRequest | dg.SkipReason = dg.SkipReason(seen.why_not)
        if seen.reason is not None:
            found = request_run(
                context.instance, stream, consumer.group, seen, suspects, tags=run_tags, run_config=config
            )
        context.update_cursor(suspects.cursor)
        return found

    return consumer_sensor


def run_schedule(
    consumer: Consumer,
    *,
    cron_schedule: str,
    execution_timezone: str | None,
    name: str,
    description: str,
    run_tags: Mapping[str, str] | None,
    default_status: dg.DefaultScheduleStatus,
) -> dg.ScheduleDefinition:
    """A schedule that runs the consumer's asset, unless nothing is pending."""

    @dg.schedule(
        name=name,
        job=consumer_job(consumer),
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
        # Whoever is at work now may have been told to leave a remainder: the run waits for it, and does the rest.
        return dg.RunRequest(tags={**(run_tags or {}), **tags_of(stream, consumer.group, seen)})

    return consumer_schedule
