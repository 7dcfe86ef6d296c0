"""Definitions for `test_workers`: one worker by itself with two consumers, and two that share the work of a third."""

import dagster as dg

import djp_dagster as djp
from tests.daemon.at_work import RUNNING, make_consumer

ALONE = djp.Topic("alone_in", partitions=2, key="user")
BESIDE = djp.Topic("beside_in", partitions=2, key="user")
SHARED = djp.Topic("shared_in", partitions=4, key="user")

alone = make_consumer("alone", ALONE)
beside = make_consumer("beside", BESIDE)
shared = make_consumer("shared", SHARED)

defs = dg.Definitions(
    assets=[djp.build_stream_asset(consumer) for consumer in (alone, beside, shared)],
    sensors=[
        djp.build_worker_sensor(
            [alone, beside], name="solo", report_every="1s", minimum_interval_seconds=1, default_status=RUNNING
        ),
        djp.build_worker_sensor([shared], name="pair", workers=2, minimum_interval_seconds=1, default_status=RUNNING),
    ],
    resources={"event_stream": djp.SqlEventStream()},
)
