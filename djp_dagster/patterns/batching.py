"""Batching: let events pile up, to 100 MB, a million events or 12 hours, and process them at once.

The consumer and its asset are the same as for Streaming (`djp_dagster.patterns.streaming`); only when a batch is cut
differs. Age counts from when the oldest pending event was appended, by the stream's clock: restarts, wiped cursors and
a sensor that was off for a day change nothing about it.
"""

from collections.abc import Mapping

import dagster as dg

from djp_dagster.orchestration.sensors import run_schedule, run_sensor
from djp_dagster.orchestration.tags import identifier
from djp_dagster.orchestration.ticks import describe_threshold
from djp_dagster.processing.consumer import Consumer
from djp_dagster.processing.threshold import Threshold


def build_batch_sensor(
    consumer: Consumer,
    *,
    threshold: Threshold,
    name: str | None = None,
    run_tags: Mapping[str, str] | None = None,
    minimum_interval_seconds: int = 30,
    default_status: dg.DefaultSensorStatus = dg.DefaultSensorStatus.STOPPED,
) -> dg.SensorDefinition:
    """A sensor that runs the consumer's asset once enough is pending, in batches of the threshold's size.

    ``bytes`` and ``events`` are trigger and bound: 250 MB pending at a threshold of 100 MB make two batches, and 50 MB
    stay pending until the threshold, its age or its idle time is reached. The consumer's ``max_batch`` does not apply
    then.

    Args:
        consumer: whose asset to run.
        threshold: how much must pile up, or for how long.
        name: the sensor's name; ``<group>_batch_sensor`` unless given.
        run_tags: tags of the runs, such as a priority or what a launcher wants to know.
        minimum_interval_seconds: how often to look.
        default_status: off until somebody turns it on, unless told.

    Example:
        >>> import djp_dagster as djp
        >>> @djp.consumer(topic=djp.Topic("orders"))
        ... def order_files(batch):
        ...     return batch.to_pandas()
        >>> build_batch_sensor(order_files, threshold=Threshold(bytes="100MB", age="12h")).name
        'order_files_batch_sensor'
    """
    return run_sensor(
        consumer,
        run_tags=run_tags,
        threshold=threshold,
        name=name or f"{identifier(consumer.group)}_batch_sensor",
        description=f"Runs {consumer.group} when {describe_threshold(threshold)} is reached.",
        minimum_interval_seconds=minimum_interval_seconds,
        default_status=default_status,
    )


def build_batch_schedule(
    consumer: Consumer,
    *,
    cron_schedule: str,
    execution_timezone: str | None = None,
    name: str | None = None,
    run_tags: Mapping[str, str] | None = None,
    default_status: dg.DefaultScheduleStatus = dg.DefaultScheduleStatus.STOPPED,
) -> dg.ScheduleDefinition:
    """A schedule that runs the consumer's asset: everything up to the ends at the run's start, however little it is.

    It skips if nothing is pending. Its run waits for whoever is at work, and does what is left then.

    Args:
        consumer: whose asset to run.
        cron_schedule: when, e.g. ``"0 3 * * *"``.
        execution_timezone: an IANA name; UTC unless given.
        name: the schedule's name; ``<group>_schedule`` unless given.
        run_tags: tags of the runs, such as a priority or what a launcher wants to know.
        default_status: off until somebody turns it on, unless told.
    """
    return run_schedule(
        consumer,
        cron_schedule=cron_schedule,
        execution_timezone=execution_timezone,
        run_tags=run_tags,
        name=name or f"{identifier(consumer.group)}_schedule",
        description=f"Runs {consumer.group} with everything pending, by the clock.",
        default_status=default_status,
    )
