"""Definitions for `test_kills`: a group, and its sensor, for each kind of accident."""

import dagster as dg

import djp_dagster as djp
from tests.daemon.at_work import RUNNING, make_consumer

REFUSED = djp.Topic("refused_in", partitions=2, key="user")
CREATED = djp.Topic("created_in", partitions=2, key="user")
STARTING = djp.Topic("starting_in", partitions=2, key="user")
LAUNCHED = djp.Topic("launched_in", partitions=2, key="user")
KEPT = djp.Topic("kept_in", partitions=2, key="user")
WIPED = djp.Topic("wiped_in", partitions=2, key="user")
LOST = djp.Topic("lost_in", partitions=2, key="user")
TOPICS = (REFUSED, CREATED, STARTING, LAUNCHED, KEPT, WIPED, LOST)

CONSUMERS = [make_consumer(topic.name.removesuffix("_in"), topic) for topic in TOPICS]

defs = dg.Definitions(
    assets=[djp.build_stream_asset(consumer) for consumer in CONSUMERS],
    sensors=[
        djp.build_stream_sensor(consumer, minimum_interval_seconds=1, default_status=RUNNING) for consumer in CONSUMERS
    ],
    resources={"event_stream": djp.SqlEventStream()},
)
