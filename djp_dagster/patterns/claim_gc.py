"""Collection of payloads nothing refers to any more, as op, job, asset and schedule: a dry run unless told."""

from collections.abc import Mapping
from typing import Any

import dagster as dg
from pydantic import Field

from djp_dagster.claim_check.collection import CollectionReport
from djp_dagster.claim_check.pointers import collect_values
from djp_dagster.orchestration.step import stream_of
from djp_dagster.orchestration.tags import STREAM_KEY
from djp_dagster.resources.payload_stores import PayloadStoreResource, default_payload_store
from djp_dagster.streams.stream import EventStream

_ROWS = 100
_FATES = ("condemned", "waiting", "deleted", "expired", "later")


class ClaimGcConfig(dg.Config):
    """What a collection may do, for a person in the Launchpad."""

    dry_run: bool = Field(default=True, description="Change nothing, only show what would be done.")
    grace: str = Field(
        default="1d",
        description="The longest time between storing a payload and making its claim visible; at least 10min.",
    )


def collect_claims(
    stream: EventStream | None, values: PayloadStoreResource | None, *, with_values: bool, config: ClaimGcConfig
) -> dict[str, Any]:
    """Collect garbage of the stream and of the values of assets; metadata that says what was found and done."""
    reports: dict[str, CollectionReport] = {}
    if stream is not None and stream.has_payloads:
        reports["events"] = stream.collect_payloads(grace=config.grace, dry_run=config.dry_run)
    if with_values:
        store = values.open() if values is not None else default_payload_store()
        reports["values"] = collect_values(store, grace=config.grace, dry_run=config.dry_run)
    return _metadata(reports, dry_run=config.dry_run)


def _metadata(reports: Mapping[str, CollectionReport], *, dry_run: bool) -> dict[str, Any]:
    found = [(where, one) for where, report in reports.items() for one in report.garbage]
    found.sort(key=lambda one: -one[1].bytes)
    rows = [
        dg.TableRecord(
            {
                "where": where,
                "payload": one.key,
                "bytes": one.bytes,
                "stored": one.stored_at.isoformat(timespec="seconds"),
                "fate": one.fate,
            }
        )
        for where, one in found[:_ROWS]
    ]
    columns = [
        dg.TableColumn(name, "int" if name == "bytes" else "string")
        for name in ("where", "payload", "bytes", "stored", "fate")
    ]
    shown: dict[str, Any] = {
        "dry run": dry_run,
        "payloads": sum(report.payloads for report in reports.values()),
        "bytes": sum(report.payload_bytes for report in reports.values()),
        "in use": sum(report.in_use for report in reports.values()),
        "garbage": dg.MetadataValue.table(rows, schema=dg.TableSchema(columns)),
    }
    for fate in _FATES:
        counts = [report.count(fate) for report in reports.values()]
        shown[fate] = sum(number for number, _ in counts)
        shown[f"{fate} bytes"] = sum(size for _, size in counts)
    return shown


def claim_gc_op(
    *, name: str = "claim_gc", values: PayloadStoreResource | None = None, with_values: bool = True
) -> dg.OpDefinition:
    """An op that collects garbage: payloads of events and outputs, and values of assets that nothing refers to.

    What one run condemns, a later one deletes. A dry run unless its config says otherwise.

    Args:
        name: the op's name.
        values: the ``store`` of the `ClaimCheckIOManager`; where that keeps values without one, unless given.
        with_values: whether there is such an IO manager.
    """

    @dg.op(
        name=name,
        required_resource_keys={STREAM_KEY},
        out=dg.Out(dg.Nothing),
        description="Collects payloads that nothing refers to any more.",
    )
    def collect(context: dg.OpExecutionContext, config: ClaimGcConfig) -> None:
        context.add_output_metadata(
            collect_claims(stream_of(context.resources), values, with_values=with_values, config=config)
        )

    return collect


def build_claim_gc_job(
    *, name: str = "claim_gc_job", values: PayloadStoreResource | None = None, with_values: bool = True
) -> dg.JobDefinition:
    """A job of `claim_gc_op`, for the Launchpad and for `build_claim_gc_schedule`.

    Args:
        name: the job's name.
        values: as for the op.
        with_values: as for the op.
    """
    collect = claim_gc_op(name=f"{name}_op", values=values, with_values=with_values)

    @dg.job(
        name=name,
        executor_def=dg.in_process_executor,
        description="Collects payloads nothing refers to; a dry run unless told otherwise.",
        # Without it, Dagster fills the Launchpad with the settings of resources, too.
        config={"ops": {f"{name}_op": {"config": ClaimGcConfig().model_dump()}}},
    )
    def claim_gc() -> None:
        collect()

    return claim_gc


def build_claim_gc_asset(
    *,
    key: str = "claim_gc",
    values: PayloadStoreResource | None = None,
    with_values: bool = True,
    group_name: str | None = None,
) -> dg.AssetsDefinition:
    """The same as an asset, whose plots show how much is in use and how much is garbage.

    Args:
        key: of the asset.
        values: as for the op.
        with_values: as for the op.
        group_name: of the asset.
    """

    @dg.asset(name=key, group_name=group_name, required_resource_keys={STREAM_KEY}, kinds={"claims"})
    def claim_gc(context: dg.AssetExecutionContext, config: ClaimGcConfig) -> dg.MaterializeResult[None]:
        """Payloads that nothing refers to any more, condemned and, in time, deleted."""
        shown = collect_claims(stream_of(context.resources), values, with_values=with_values, config=config)
        return dg.MaterializeResult(metadata=shown)

    return claim_gc


def build_claim_gc_schedule(
    job: dg.JobDefinition | None = None,
    *,
    cron_schedule: str = "30 4 * * *",
    dry_run: bool = False,
    grace: str = "1d",
    default_status: dg.DefaultScheduleStatus = dg.DefaultScheduleStatus.STOPPED,
) -> dg.ScheduleDefinition:
    """A schedule that collects garbage, daily unless told. It deletes, once somebody turns it on.

    Args:
        job: of `build_claim_gc_job`; a new one unless given.
        cron_schedule: when.
        dry_run: only report.
        grace: see `ClaimGcConfig`.
        default_status: off until somebody turns it on, unless told.
    """
    target = job if job is not None else build_claim_gc_job()
    config = {"ops": {f"{target.name}_op": {"config": {"dry_run": dry_run, "grace": grace}}}}
    return dg.ScheduleDefinition(
        name=f"{target.name}_schedule",
        job=target,
        cron_schedule=cron_schedule,
        run_config=config,
        default_status=default_status,
    )
