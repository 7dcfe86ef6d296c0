"""The named jobs that sensors and schedules ask for. One per consumer, however many of them share it."""

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import dagster as dg

from djp_dagster.orchestration.tags import consumer_key
from djp_dagster.processing.consumer import Consumer

if TYPE_CHECKING:
    from djp_dagster.orchestration._compat import UnresolvedAssetJobDefinition

_jobs: "WeakKeyDictionary[Consumer, UnresolvedAssetJobDefinition]" = WeakKeyDictionary()


def consumer_job(consumer: Consumer) -> "UnresolvedAssetJobDefinition":
    """The job that materializes the consumer's asset and runs its checks.

    The same object each time: Dagster refuses two jobs of one name, even if they are equal.
    """
    job = _jobs.get(consumer)
    if job is None:
        job = _jobs[consumer] = dg.define_asset_job(
            f"{op_name_of(consumer)}_job",
            selection=dg.AssetSelection.assets(consumer_key(consumer)),
            executor_def=dg.in_process_executor,
            description=f"Processes what is pending for {consumer.group}.",
        )
    return job


def op_name_of(consumer: Consumer) -> str:
    """The name of the asset's op, under which its run config stands."""
    return consumer_key(consumer).to_python_identifier()
