"""Run tags by which sensors find their runs again, and asset keys. All are hints: wiping them loses nothing."""

import dagster as dg

from djp_dagster.processing.consumer import Consumer
from djp_dagster.streams.topics import Topic

GROUP_TAG = "djp/group"
"""The consumer group a run works for."""
DIGEST_TAG = "djp/digest"
"""What the group had done when the run was asked for."""
REASON_TAG = "djp/reason"
"""Why the run was asked for."""
BATCH_TAG = "djp/batch_id"
"""The first batch the run began."""
WORKER_TAG = "djp/worker"
"""The name of the worker sensor that asked for the run, and which of its runs it is: ``shop:0``, ``shop:1``, ..."""
CODE_TAG = "djp/code_version"
"""The code version of a worker run's consumers."""

STREAM_KEY = "event_stream"
"""The resource key of the stream."""


def owner_of(run_id: str) -> str:
    """The name under which a run holds leases; something random follows it."""
    return f"run-{run_id}"


def run_id_of(owner: str) -> str | None:
    """The run that holds a lease under this name; None if it is no run."""
    return owner[4:40] if owner.startswith("run-") and len(owner) >= 40 else None


def identifier(name: str) -> str:
    """A group's or worker's name as Dagster wants names of ops, jobs and sensors."""
    return dg.AssetKey(name).to_python_identifier()


def topic_key(topic: Topic | str) -> dg.AssetKey:
    """The key of a topic's external asset."""
    return dg.AssetKey(["topics", topic if isinstance(topic, str) else topic.name])


def consumer_key(consumer: Consumer) -> dg.AssetKey:
    """The key of a consumer's asset, unless the builder was given another."""
    return dg.AssetKey(consumer.group)
