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
    from djp_dagster.dags.event_dag import EventDag
    from djp_dagster.dags.tracing import trace
    from djp_dagster.errors import DjpError, TerminalError, TransientError
    from djp_dagster.events import Event
    from djp_dagster.joining.declaration import Join, join
    from djp_dagster.joining.joined import Joined
    from djp_dagster.lookups.lookup import Lookup
    from djp_dagster.mapreduce.combining import Collect, CombineFn, Count, Distinct, Max, Mean, Min, Sum, TopK
    from djp_dagster.mapreduce.engines.dask import Dask
    from djp_dagster.mapreduce.engines.processes import Processes
    from djp_dagster.mapreduce.job import MapReduce
    from djp_dagster.mapreduce.results import MapReduceResult
    from djp_dagster.mapreduce.running import map_reduce
    from djp_dagster.mapreduce.sources.parquet import ParquetFiles
    from djp_dagster.mapreduce.sources.structured import CsvFiles, JsonLines
    from djp_dagster.mapreduce.sources.text import TextFiles
    from djp_dagster.mapreduce.sources.topics import Items, TopicRange
    from djp_dagster.mapreduce.tasks import MapTask
    from djp_dagster.orchestration.build import build_defs
    from djp_dagster.orchestration.checks import build_check_sensor, build_stream_checks
    from djp_dagster.orchestration.operator_jobs import build_publish_job, build_redrive_job, build_seek_job, publish_op
    from djp_dagster.orchestration.rebuild_job import build_rebuild_job
    from djp_dagster.patterns.batching import build_batch_schedule, build_batch_sensor
    from djp_dagster.patterns.claim_check import ClaimCheckIOManager
    from djp_dagster.patterns.claim_gc import (
        build_claim_gc_asset,
        build_claim_gc_job,
        build_claim_gc_schedule,
        claim_gc_op,
    )
    from djp_dagster.patterns.dag import build_event_dag_assets, build_trace_job
    from djp_dagster.patterns.event_buffering import build_buffer_job, build_join_assets
    from djp_dagster.patterns.kappa import build_replay_asset, build_replay_schedule, build_replay_sensor, replay_op
    from djp_dagster.patterns.map_reduce import build_merged_asset, map_reduce_asset, map_reduce_op
    from djp_dagster.patterns.stateful_worker import build_table_asset
    from djp_dagster.patterns.stateless_worker import HttpLookup, LookupResource
    from djp_dagster.patterns.streaming import (
        build_stream_asset,
        build_stream_sensor,
        build_topic_assets,
        build_worker_sensor,
        process_batch_op,
    )
    from djp_dagster.processing.batch import Batch
    from djp_dagster.processing.commands import rebuild
    from djp_dagster.processing.consumer import Consumer, consumer
    from djp_dagster.processing.failures import RetryPolicy
    from djp_dagster.processing.outputs import BatchOutput, BatchOutputs
    from djp_dagster.processing.redrive import redrive, request_redrive
    from djp_dagster.processing.reports import BatchReport
    from djp_dagster.processing.run import RunReport, run_pending
    from djp_dagster.processing.threshold import Threshold
    from djp_dagster.processing.worker import Worker
    from djp_dagster.replaying.plan import plan_ranges, plan_window
    from djp_dagster.replaying.replay import replay
    from djp_dagster.resources.event_stream import SqlEventStream
    from djp_dagster.resources.payload_stores import LocalPayloadStore
    from djp_dagster.resources.s3 import S3PayloadStore
    from djp_dagster.state.snapshots import SnapshotPolicy
    from djp_dagster.state.table import Table
    from djp_dagster.state.view import StateView
    from djp_dagster.streams.publishing import Producer
    from djp_dagster.streams.records import Record, TopicPartition
    from djp_dagster.streams.stream import EventStream, open_stream
    from djp_dagster.streams.topics import Topic
    from djp_dagster.versions.promotion import abandon, follow, promote, rollback

_HOMES = {
    "Batch": "processing.batch",
    "BatchOutput": "processing.outputs",
    "BatchOutputs": "processing.outputs",
    "BatchReport": "processing.reports",
    "Claim": "claim_check.claims",
    "ClaimCheckIOManager": "patterns.claim_check",
    "Collect": "mapreduce.combining",
    "CombineFn": "mapreduce.combining",
    "Consumer": "processing.consumer",
    "Count": "mapreduce.combining",
    "CsvFiles": "mapreduce.sources.structured",
    "Dask": "mapreduce.engines.dask",
    "Distinct": "mapreduce.combining",
    "DjpError": "errors",
    "Event": "events",
    "EventDag": "dags.event_dag",
    "EventStream": "streams.stream",
    "HttpLookup": "patterns.stateless_worker",
    "Items": "mapreduce.sources.topics",
    "Join": "joining.declaration",
    "Joined": "joining.joined",
    "JsonLines": "mapreduce.sources.structured",
    "LocalPayloadStore": "resources.payload_stores",
    "Lookup": "lookups.lookup",
    "LookupResource": "patterns.stateless_worker",
    "MapReduce": "mapreduce.job",
    "MapReduceResult": "mapreduce.results",
    "MapTask": "mapreduce.tasks",
    "Max": "mapreduce.combining",
    "Mean": "mapreduce.combining",
    "Min": "mapreduce.combining",
    "ParquetFiles": "mapreduce.sources.parquet",
    "PayloadStore": "claim_check.stores",
    "Processes": "mapreduce.engines.processes",
    "Producer": "streams.publishing",
    "Record": "streams.records",
    "RetryPolicy": "processing.failures",
    "RunReport": "processing.run",
    "S3PayloadStore": "resources.s3",
    "SnapshotPolicy": "state.snapshots",
    "SqlEventStream": "resources.event_stream",
    "StateView": "state.view",
    "Sum": "mapreduce.combining",
    "Table": "state.table",
    "TerminalError": "errors",
    "TextFiles": "mapreduce.sources.text",
    "Threshold": "processing.threshold",
    "TopK": "mapreduce.combining",
    "Topic": "streams.topics",
    "TopicPartition": "streams.records",
    "TopicRange": "mapreduce.sources.topics",
    "TransientError": "errors",
    "Worker": "processing.worker",
    "abandon": "versions.promotion",
    "build_batch_schedule": "patterns.batching",
    "build_batch_sensor": "patterns.batching",
    "build_buffer_job": "patterns.event_buffering",
    "build_check_sensor": "orchestration.checks",
    "build_claim_gc_asset": "patterns.claim_gc",
    "build_claim_gc_job": "patterns.claim_gc",
    "build_claim_gc_schedule": "patterns.claim_gc",
    "build_defs": "orchestration.build",
    "build_event_dag_assets": "patterns.dag",
    "build_join_assets": "patterns.event_buffering",
    "build_merged_asset": "patterns.map_reduce",
    "build_publish_job": "orchestration.operator_jobs",
    "build_rebuild_job": "orchestration.rebuild_job",
    "build_redrive_job": "orchestration.operator_jobs",
    "build_replay_asset": "patterns.kappa",
    "build_replay_schedule": "patterns.kappa",
    "build_replay_sensor": "patterns.kappa",
    "build_seek_job": "orchestration.operator_jobs",
    "build_stream_asset": "patterns.streaming",
    "build_stream_checks": "orchestration.checks",
    "build_stream_sensor": "patterns.streaming",
    "build_table_asset": "patterns.stateful_worker",
    "build_topic_assets": "patterns.streaming",
    "build_trace_job": "patterns.dag",
    "build_worker_sensor": "patterns.streaming",
    "claim_gc_op": "patterns.claim_gc",
    "consumer": "processing.consumer",
    "errors": "",
    "follow": "versions.promotion",
    "join": "joining.declaration",
    "map_reduce": "mapreduce.running",
    "map_reduce_asset": "patterns.map_reduce",
    "map_reduce_op": "patterns.map_reduce",
    "open_payload_store": "claim_check.location",
    "open_stream": "streams.stream",
    "plan_ranges": "replaying.plan",
    "plan_window": "replaying.plan",
    "process_batch_op": "patterns.streaming",
    "promote": "versions.promotion",
    "publish_op": "orchestration.operator_jobs",
    "rebuild": "processing.commands",
    "redrive": "processing.redrive",
    "replay": "replaying.replay",
    "replay_op": "patterns.kappa",
    "request_redrive": "processing.redrive",
    "rollback": "versions.promotion",
    "run_pending": "processing.run",
    "testing": "",
    "trace": "dags.tracing",
}

__all__ = [
    "Batch",
    "BatchOutput",
    "BatchOutputs",
    "BatchReport",
    "Claim",
    "ClaimCheckIOManager",
    "Collect",
    "CombineFn",
    "Consumer",
    "Count",
    "CsvFiles",
    "Dask",
    "Distinct",
    "DjpError",
    "Event",
    "EventDag",
    "EventStream",
    "HttpLookup",
    "Items",
    "Join",
    "Joined",
    "JsonLines",
    "LocalPayloadStore",
    "Lookup",
    "LookupResource",
    "MapReduce",
    "MapReduceResult",
    "MapTask",
    "Max",
    "Mean",
    "Min",
    "ParquetFiles",
    "PayloadStore",
    "Processes",
    "Producer",
    "Record",
    "RetryPolicy",
    "RunReport",
    "S3PayloadStore",
    "SnapshotPolicy",
    "SqlEventStream",
    "StateView",
    "Sum",
    "Table",
    "TerminalError",
    "TextFiles",
    "Threshold",
    "TopK",
    "Topic",
    "TopicPartition",
    "TopicRange",
    "TransientError",
    "Worker",
    "__version__",
    "abandon",
    "build_batch_schedule",
    "build_batch_sensor",
    "build_buffer_job",
    "build_check_sensor",
    "build_claim_gc_asset",
    "build_claim_gc_job",
    "build_claim_gc_schedule",
    "build_defs",
    "build_event_dag_assets",
    "build_join_assets",
    "build_merged_asset",
    "build_publish_job",
    "build_rebuild_job",
    "build_redrive_job",
    "build_replay_asset",
    "build_replay_schedule",
    "build_replay_sensor",
    "build_seek_job",
    "build_stream_asset",
    "build_stream_checks",
    "build_stream_sensor",
    "build_table_asset",
    "build_topic_assets",
    "build_trace_job",
    "build_worker_sensor",
    "claim_gc_op",
    "consumer",
    "follow",
    "join",
    "map_reduce",
    "map_reduce_asset",
    "map_reduce_op",
    "open_payload_store",
    "open_stream",
    "plan_ranges",
    "plan_window",
    "process_batch_op",
    "promote",
    "publish_op",
    "rebuild",
    "redrive",
    "replay",
    "replay_op",
    "request_redrive",
    "rollback",
    "run_pending",
    "trace",
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
