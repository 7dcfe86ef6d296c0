"""Definitions for `test_runs`: run mode, asked for by sensors, schedules and people."""

import dagster as dg

import djp_dagster as djp
from tests.daemon.at_work import RUNNING, make_consumer

STREAMED = djp.Topic("streamed_in", partitions=2, key="user")
PILED = djp.Topic("piled_in", partitions=2, key="user")
MET = djp.Topic("met_in", partitions=2, key="user")
NIGHTLY = djp.Topic("nightly_in", partitions=2, key="user")
QUIET = djp.Topic("quiet_in")

streamed = make_consumer("streamed", STREAMED)
piled = make_consumer("piled", PILED)
aged = make_consumer("aged", PILED)
met = make_consumer("met", MET)
nightly = make_consumer("nightly", NIGHTLY)
quiet = make_consumer("quiet", QUIET)

EVERY_MINUTE = {"cron_schedule": "* * * * *", "default_status": dg.DefaultScheduleStatus.RUNNING}

defs = dg.Definitions(
    assets=[djp.build_stream_asset(consumer) for consumer in (streamed, piled, aged, met, nightly, quiet)],
    sensors=[
        djp.build_stream_sensor(streamed, default_status=RUNNING),
        djp.build_stream_sensor(met, default_status=RUNNING),
        djp.build_batch_sensor(
            piled, threshold=djp.Threshold(events=20), minimum_interval_seconds=1, default_status=RUNNING
        ),
        djp.build_batch_sensor(
            aged, threshold=djp.Threshold(events=20, age="3s"), minimum_interval_seconds=1, default_status=RUNNING
        ),
    ],
    schedules=[
        djp.build_batch_schedule(nightly, **EVERY_MINUTE),  # type: ignore[arg-type]
        djp.build_batch_schedule(quiet, **EVERY_MINUTE),  # type: ignore[arg-type]
    ],
    resources={"event_stream": djp.SqlEventStream()},
)
