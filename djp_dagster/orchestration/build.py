"""`build_defs`: everything for some consumers at once, for the first hour."""

from collections.abc import Sequence
from typing import Literal

import dagster as dg

from djp_dagster.errors import InvalidSettingError
from djp_dagster.orchestration.checks import build_check_sensor, build_stream_checks
from djp_dagster.orchestration.operator_jobs import build_publish_job, build_redrive_job, build_seek_job
from djp_dagster.orchestration.tags import STREAM_KEY
from djp_dagster.patterns.streaming import (
    build_stream_asset,
    build_stream_sensor,
    build_topic_assets,
    build_worker_sensor,
    with_helpers,
)
from djp_dagster.processing.consumer import Consumer
from djp_dagster.resources.event_stream import SqlEventStream
from djp_dagster.streams.topics import Topic
from djp_dagster.units import Duration

Mode = Literal["runs", "worker"]


def build_defs(
    *consumers: Consumer,
    stream: SqlEventStream | None = None,
    mode: Mode = "runs",
    workers: int = 1,
    max_lag_age: Duration | None = "15min",
    resources: dict[str, object] | None = None,
    executor: dg.ExecutorDefinition | None = dg.in_process_executor,
    default_status: dg.DefaultSensorStatus = dg.DefaultSensorStatus.STOPPED,
) -> dg.Definitions:
    """Definitions for some consumers: assets, topics, checks, sensors, and the jobs to publish, redrive and seek.

    Add to it with ``dg.Definitions.merge``; when it no longer fits, use the builders it uses.

    Args:
        *consumers: what to do.
        stream: where the stream lies; under DAGSTER_HOME unless given.
        mode: ``"runs"``, a sensor and a run per micro-batch for each; or ``"worker"``, resident runs for all of them.
        workers: how many resident runs, in worker mode.
        max_lag_age: the check ``lag_below`` fails if the oldest pending event is older; None for no such check.
        resources: what handlers ask for beside the batch.
        executor: of jobs that name none; None if what it is merged with has one. A process per step takes seconds to
            start.
        default_status: of the sensors; off until somebody turns them on, unless told.

    Raises:
        InvalidSettingError: no consumer, or another mode.

    Example:
        >>> import djp_dagster as djp
        >>> @djp.consumer(topic=djp.Topic("clicks"))
        ... def count(batch):
        ...     batch.log.info("%d clicks", len(batch))
        >>> sorted(sensor.name for sensor in build_defs(count).sensors)
        ['count_sensor', 'stream_checks_sensor']
    """
    if not consumers:
        raise InvalidSettingError("build_defs() needs a consumer", setting="consumers", value=None)
    if mode not in ("runs", "worker"):
        raise InvalidSettingError(f"mode={mode!r} must be 'runs' or 'worker'", setting="mode", value=mode)
    consumers = tuple(with_helpers(consumers))
    checks = [build_stream_checks(consumer, max_lag_age=max_lag_age, worker=mode == "worker") for consumer in consumers]
    return dg.Definitions(
        assets=[*build_topic_assets(*consumers), *(build_stream_asset(consumer) for consumer in consumers)],
        asset_checks=checks,
        sensors=[
            *_sensors(consumers, mode, workers, default_status),
            build_check_sensor(*checks, default_status=default_status),
        ],
        jobs=[build_publish_job(*_topics(consumers)), build_redrive_job(*consumers), build_seek_job(*consumers)],
        resources={STREAM_KEY: stream if stream is not None else SqlEventStream(), **(resources or {})},
        executor=executor,
    )


def _sensors(
    consumers: Sequence[Consumer], mode: Mode, workers: int, status: dg.DefaultSensorStatus
) -> list[dg.SensorDefinition]:
    if mode == "worker":
        return [build_worker_sensor(consumers, workers=workers, default_status=status)]
    return [build_stream_sensor(consumer, default_status=status) for consumer in consumers]


def _topics(consumers: Sequence[Consumer]) -> list[Topic]:
    topics = {topic.name: topic for consumer in consumers for topic in (*consumer.topics, *consumer.emits)}
    return [topics[name] for name in sorted(topics)]
