"""Run tags by which sensors find their runs again, and asset keys. All are hints: wiping them loses nothing."""

import dagster as dg

from djp_dagster.processing.consumer import Consumer
from djp_dagster.streams.topics import Topic

GROUP_TAG = "djp/group"
"""The consumer group a run works for."""
STREAM_TAG = "djp/stream"
"""The incarnation of the stream it works on."""
DIGEST_TAG = "djp/digest"
"""What the group had done when the run was asked for."""
REASON_TAG = "djp/reason"
"""Why the run was asked for."""
BATCH_TAG = "djp/batch_id"
"""The first batch the run began."""
WORKER_TAG = "djp/worker"
"""The workers a run belongs to: their name, the code location, and the stream they work on."""
SLOT_TAG = "djp/worker_slot"
"""Which of the workers it is: 0, 1, ..."""
PLACE_TAG = "djp/worker_place"
"""Both in one, to look runs up by: SQLite takes quadratic time for two tags that many runs share."""
CODE_TAG = "djp/code_version"
"""The code version of a worker run's consumers, as the run itself loaded them."""
ASKED_BY_TAG = "djp/asked_by_code_version"
"""The code version of the worker sensor that asked for the run."""

_TOPICS = "topics"
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
    return dg.AssetKey([_TOPICS, topic if isinstance(topic, str) else topic.name])


def topic_of(key: dg.AssetKey) -> str | None:
    """The topic whose external asset has this key; None if it is none of a topic."""
    return key.path[1] if len(key.path) == 2 and key.path[0] == _TOPICS else None


def consumer_key(consumer: Consumer) -> dg.AssetKey:
    """The key of a consumer's asset."""
    return dg.AssetKey(list(consumer.asset_key))
