"""The patterns of distributed jobs, as a Dagster package: event streams and their consumers, exactly accounted for.

The names below are the public API, together with `djp_dagster.testing`. They load on first use, so that importing the
package costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from djp_dagster._version import __version__

if TYPE_CHECKING:
    from djp_dagster.claim_check.claims import Claim
    from djp_dagster.claim_check.location import open_payload_store
    from djp_dagster.claim_check.stores import PayloadStore
    from djp_dagster.errors import DjpError, TerminalError, TransientError
    from djp_dagster.events import Event
    from djp_dagster.orchestration.build import build_defs
    from djp_dagster.orchestration.checks import build_check_sensor, build_stream_checks
    from djp_dagster.orchestration.operator_jobs import build_publish_job, build_redrive_job, build_seek_job, publish_op
    from djp_dagster.patterns.batching import build_batch_schedule, build_batch_sensor
    from djp_dagster.patterns.claim_check import ClaimCheckIOManager
    from djp_dagster.patterns.claim_gc import (
        build_claim_gc_asset,
        build_claim_gc_job,
        build_claim_gc_schedule,
        claim_gc_op,
    )
    from djp_dagster.patterns.streaming import (
        build_stream_asset,
        build_stream_sensor,
        build_topic_assets,
        build_worker_sensor,
        process_batch_op,
    )
    from djp_dagster.processing.batch import Batch
    from djp_dagster.processing.consumer import Consumer, consumer
    from djp_dagster.processing.failures import RetryPolicy
    from djp_dagster.processing.outputs import BatchOutput, BatchOutputs
    from djp_dagster.processing.redrive import redrive, request_redrive
    from djp_dagster.processing.reports import BatchReport
    from djp_dagster.processing.run import RunReport, run_pending
    from djp_dagster.processing.threshold import Threshold
    from djp_dagster.processing.worker import Worker
    from djp_dagster.resources.event_stream import SqlEventStream
    from djp_dagster.resources.payload_stores import LocalPayloadStore
    from djp_dagster.resources.s3 import S3PayloadStore
    from djp_dagster.streams.publishing import Producer
    from djp_dagster.streams.records import Record, TopicPartition
    from djp_dagster.streams.stream import EventStream, open_stream
    from djp_dagster.streams.topics import Topic

_HOMES = {
    "Batch": "processing.batch",
    "BatchOutput": "processing.outputs",
    "BatchOutputs": "processing.outputs",
    "BatchReport": "processing.reports",
    "Claim": "claim_check.claims",
    "ClaimCheckIOManager": "patterns.claim_check",
    "Consumer": "processing.consumer",
    "DjpError": "errors",
    "Event": "events",
    "EventStream": "streams.stream",
    "LocalPayloadStore": "resources.payload_stores",
    "PayloadStore": "claim_check.stores",
    "Producer": "streams.publishing",
    "Record": "streams.records",
    "RetryPolicy": "processing.failures",
    "RunReport": "processing.run",
    "S3PayloadStore": "resources.s3",
    "SqlEventStream": "resources.event_stream",
    "TerminalError": "errors",
    "Threshold": "processing.threshold",
    "Topic": "streams.topics",
    "TopicPartition": "streams.records",
    "TransientError": "errors",
    "Worker": "processing.worker",
    "build_batch_schedule": "patterns.batching",
    "build_batch_sensor": "patterns.batching",
    "build_check_sensor": "orchestration.checks",
    "build_claim_gc_asset": "patterns.claim_gc",
    "build_claim_gc_job": "patterns.claim_gc",
    "build_claim_gc_schedule": "patterns.claim_gc",
    "build_defs": "orchestration.build",
    "build_publish_job": "orchestration.operator_jobs",
    "build_redrive_job": "orchestration.operator_jobs",
    "build_seek_job": "orchestration.operator_jobs",
    "build_stream_asset": "patterns.streaming",
    "build_stream_checks": "orchestration.checks",
    "build_stream_sensor": "patterns.streaming",
    "build_topic_assets": "patterns.streaming",
    "build_worker_sensor": "patterns.streaming",
    "claim_gc_op": "patterns.claim_gc",
    "consumer": "processing.consumer",
    "errors": "",
    "open_payload_store": "claim_check.location",
    "open_stream": "streams.stream",
    "process_batch_op": "patterns.streaming",
    "publish_op": "orchestration.operator_jobs",
    "redrive": "processing.redrive",
    "request_redrive": "processing.redrive",
    "run_pending": "processing.run",
    "testing": "",
}

__all__ = [
    "Batch",
    "BatchOutput",
    "BatchOutputs",
    "BatchReport",
    "Claim",
    "ClaimCheckIOManager",
    "Consumer",
    "DjpError",
    "Event",
    "EventStream",
    "LocalPayloadStore",
    "PayloadStore",
    "Producer",
    "Record",
    "RetryPolicy",
    "RunReport",
    "S3PayloadStore",
    "SqlEventStream",
    "TerminalError",
    "Threshold",
    "Topic",
    "TopicPartition",
    "TransientError",
    "Worker",
    "__version__",
    "build_batch_schedule",
    "build_batch_sensor",
    "build_check_sensor",
    "build_claim_gc_asset",
    "build_claim_gc_job",
    "build_claim_gc_schedule",
    "build_defs",
    "build_publish_job",
    "build_redrive_job",
    "build_seek_job",
    "build_stream_asset",
    "build_stream_checks",
    "build_stream_sensor",
    "build_topic_assets",
    "build_worker_sensor",
    "claim_gc_op",
    "consumer",
    "open_payload_store",
    "open_stream",
    "process_batch_op",
    "publish_op",
    "redrive",
    "request_redrive",
    "run_pending",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{home}" if home else f"{__name__}.{name}")
    value = globals()[name] = getattr(module, name) if home else module
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
