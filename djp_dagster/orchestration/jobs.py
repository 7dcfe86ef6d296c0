"""The named jobs that sensors and schedules ask for. One per asset, however many of them share it."""

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import dagster as dg

from djp_dagster.orchestration.tags import consumer_key
from djp_dagster.processing.consumer import Consumer

if TYPE_CHECKING:
    from dagster._core.definitions.events import CoercibleToAssetKey
    from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

_jobs: "WeakKeyDictionary[Consumer, dict[dg.AssetKey, UnresolvedAssetJobDefinition]]" = WeakKeyDictionary()


def consumer_job(consumer: Consumer, asset: "CoercibleToAssetKey | None") -> "UnresolvedAssetJobDefinition":
    """The job that materializes the consumer's asset and runs its checks.

    The same object each time: Dagster refuses two jobs of one name, even if they are equal.
    """
    key = consumer_key(consumer) if asset is None else dg.AssetKey.from_coercible(asset)
    jobs = _jobs.setdefault(consumer, {})
    if key not in jobs:
        jobs[key] = dg.define_asset_job(
            f"{key.to_python_identifier()}_job",
            selection=dg.AssetSelection.assets(key),
            executor_def=dg.in_process_executor,
            description=f"Processes what is pending for {consumer.group}.",
        )
    return jobs[key]


def op_name_of(consumer: Consumer, asset: "CoercibleToAssetKey | None") -> str:
    """The name of the asset's op, under which its run config stands."""
    key = consumer_key(consumer) if asset is None else dg.AssetKey.from_coercible(asset)
    return key.to_python_identifier()
