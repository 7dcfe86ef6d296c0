"""The job by which a person rebuilds a stateful consumer beside the live one, compares, promotes, and rolls back."""

from typing import Any

import dagster as dg
from pydantic import Field

from djp_dagster.errors import InvalidSettingError
from djp_dagster.orchestration.tags import STREAM_KEY, consumer_key
from djp_dagster.processing.consumer import Consumer
from djp_dagster.resources.event_stream import SqlEventStream
from djp_dagster.versions.comparison import Comparison, compare
from djp_dagster.versions.promotion import abandon, follow, promote, rollback, versions

ACTIONS = ("follow", "compare", "promote", "rollback", "abandon", "abandon_previous", "status")


class RebuildConfig(dg.Config):
    """What to do with the versions of a group."""

    group: str = Field(description="The consumer group.")
    action: str = Field(
        default="status",
        description="follow: rebuild the next version, beside the live one, until it has caught up. compare: what "
        "differs. promote: make it live. rollback: make the previous version live again. abandon: delete the next one; "
        "abandon_previous: delete the previous one, which holds back retention.",
    )
    max_lag_events: int = Field(default=0, description="follow: stop when it is so little behind.")
    from_what_is_left: bool = Field(
        default=False, description="follow: begin though retention has removed some of what the state was made of."
    )
    wait: str = Field(default="10min", description="How long to try.")


def build_rebuild_job(*consumers: Consumer, name: str = "rebuild_job") -> dg.JobDefinition:
    """A job that rebuilds state with the code as it is now, beside the live version, and promotes it in one step.

    A run ``follow`` makes the next version from where the state began, without effect but on its own; ``compare`` says
    what differs; ``promote`` switches, at a fenced offset; ``rollback`` switches back. How it went is an observation of
    the consumer's asset. See `djp_dagster.versions` for what a crash leaves behind.

    Args:
        *consumers: stateful ones.
        name: the job's name.

    Raises:
        InvalidSettingError: no consumer, or one without state.
    """
    by_group = {consumer.group: consumer for consumer in consumers}
    stateless = sorted(consumer.group for consumer in consumers if not consumer.stateful)
    if not consumers or stateless:
        raise InvalidSettingError(
            f"job {name!r} needs stateful consumers, not {stateless}", setting="consumers", value=stateless
        )
    resources = {key for consumer in consumers for key in consumer.resource_names}

    @dg.op(name=f"{name}_op", required_resource_keys={STREAM_KEY, *resources})
    def rebuild_group(context: dg.OpExecutionContext, config: RebuildConfig) -> None:
        consumer = by_group.get(config.group)
        if consumer is None or config.action not in ACTIONS:
            raise InvalidSettingError(
                f"group={config.group!r}, action={config.action!r}: use {sorted(by_group)} and {list(ACTIONS)}",
                setting="action" if consumer else "group",
                value=config.action if consumer else config.group,
            )
        told = _do(context, consumer, config)
        context.log_event(dg.AssetObservation(consumer_key(consumer), description=config.action, metadata=told))

    @dg.job(
        name=name,
        executor_def=dg.in_process_executor,
        description="Rebuilds state beside the live version, compares, promotes, and rolls back.",
        config={"ops": {f"{name}_op": {"config": {"group": consumers[0].group, "action": "status"}}}},
    )
    def job() -> None:
        rebuild_group()

    return job


def _do(context: dg.OpExecutionContext, consumer: Consumer, config: RebuildConfig) -> dict[str, Any]:
    resource: SqlEventStream = getattr(context.resources, STREAM_KEY)
    stream, folder = resource.open(), resource.state_path()
    given: dict[str, Any] = {
        "resources": {key: getattr(context.resources, key) for key in consumer.resource_names},
        "state_folder": folder,
        "wait": config.wait,
    }
    told: dict[str, Any] = {}
    if config.action == "follow":
        given.update(max_lag_events=config.max_lag_events, from_what_is_left=config.from_what_is_left)
        reports = follow(stream, consumer, **given)
        told["events"] = sum(report.events for report in reports)
    elif config.action == "compare":
        told = _differences(compare(stream, consumer, folder=folder))
    elif config.action in ("promote", "rollback"):
        switch = promote if config.action == "promote" else rollback
        told["events"] = sum(report.events for report in switch(stream, consumer, **given))
    elif config.action.startswith("abandon"):
        abandon(stream, consumer.group, role="next" if config.action == "abandon" else "previous")
    found = versions(stream, consumer.group)
    for role, behind in found.behind.items():
        if behind is not None:
            told[f"{role}_behind"] = behind
    told.update({f"{role}_code_version": code or "unknown" for role, code in found.code_versions.items()})
    context.log.info("%s of %s: %s", config.action, consumer.group, told)
    return told


def _differences(found: Comparison) -> dict[str, Any]:
    columns = ("key", "live", "next")
    rows = [dg.TableRecord(dict(zip(columns, map(repr, one), strict=True))) for one in found.examples]
    schema = dg.TableSchema([dg.TableColumn(column, "string") for column in columns])
    return {
        "equal": found.equal,
        "live_keys": found.keys,
        "next_keys": found.other_keys,
        "only_live": found.only_here,
        "only_next": found.only_there,
        "differing": found.differing,
        "records_behind": found.behind,
        "examples": dg.MetadataValue.table(rows, schema=schema),
    }
