"""DAG: an entity branches into parallel flows, and is complete when all of them are.

The branches are consumers joined by topics, not steps of a run: each entity goes its own way through them within
milliseconds or seconds, whatever others do, and where branches meet there is a `djp_dagster.join`.
`djp_dagster.EventDag` checks that they fit together; here they become assets, with the whole as a diagram, and a job
that tells where an entity is.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field

from djp_dagster.dags.event_dag import EventDag
from djp_dagster.dags.tracing import Trace, describe, trace
from djp_dagster.errors import InvalidSettingError
from djp_dagster.orchestration.assets import consumer_asset, topic_assets
from djp_dagster.orchestration.step import stream_of
from djp_dagster.orchestration.tags import STREAM_KEY, consumer_key

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from djp_dagster.orchestration.assets import AssetOptions


class TraceConfig(dg.Config):
    """Which entity to look for."""

    key: str = Field(description="The entity's key, as in its events.")
    as_number: bool = Field(default=False, description="The key is a number.")


def build_event_dag_assets(
    dag: EventDag,
    *,
    topics: bool = True,
    per_consumer: "Mapping[str, AssetOptions] | None" = None,
    **options: "Unpack[AssetOptions]",
) -> list[dg.AssetsDefinition | dg.AssetSpec]:
    """The consumers of the DAG as assets, and its topics; each consumer shows the whole as a Mermaid diagram.

    Args:
        dag: which.
        topics: its topics, too; not if `build_topic_assets` makes them with others.
        per_consumer: options of single consumers, by group, before those of all; such as
            ``{"transcode": {"pool": "gpu"}}``.
        **options: of all consumers, as of `build_stream_asset`; descriptions are theirs.

    Raises:
        InvalidSettingError: ``per_consumer`` names none of them; an option follows from the consumer.

    Example:
        >>> import djp_dagster as djp
        >>> orders, bills = djp.Topic("orders", key="order"), djp.Topic("bills", key="order")
        >>> @djp.consumer(topic=orders, emits=[bills])
        ... def bill(batch): ...
        >>> len(build_event_dag_assets(djp.EventDag([bill])))
        3
    """
    single = per_consumer or {}
    if unknown := sorted(single.keys() - {consumer.group for consumer in dag.consumers}):
        raise InvalidSettingError(
            f"per_consumer names {unknown}, which are not in {dag.name}", setting="per_consumer", value=unknown[0]
        )
    diagram = _drawn(dag)
    assets: list[dg.AssetsDefinition | dg.AssetSpec] = []
    if topics:
        assets += topic_assets(dag.consumers, group_name=options.get("group_name"))
    for consumer in dag.in_order():
        own: AssetOptions = {**options, **single.get(consumer.group, {})}
        own["metadata"] = {**(own.get("metadata") or {}), "event_dag": diagram}
        assets.append(consumer_asset(consumer, options=own))
    return assets


def build_trace_job(dag: EventDag, *, name: str = "trace_job", example: str = "...") -> dg.JobDefinition:
    """A job that tells where an entity is: for each consumer what it got, what it did, and how long that took.

    The answer is the op's metadata: a table, and the diagram; the log says it in words.

    Args:
        dag: which.
        name: the job's name.
        example: a key, which the Launchpad is filled with.
    """

    @dg.op(name=f"{name}_op", required_resource_keys={STREAM_KEY}, out=dg.Out(dict))
    def trace_entity(context: dg.OpExecutionContext, config: TraceConfig) -> dict[str, Any]:
        key = int(config.key) if config.as_number else config.key
        found = trace(stream_of(context.resources), dag, key)
        for step in found.steps:
            context.log.info("%s: %s", step.consumer, step.status)
        context.add_output_metadata(_metadata(dag, found))
        for step in found.steps:
            if step.status not in ("done", "nothing yet"):
                context.log_event(
                    dg.AssetObservation(_key_of(dag, step.consumer), description=f"{key} is here: {step.status}")
                )
        return {"key": key, "complete": found.complete, "steps": describe(found)}

    @dg.job(
        name=name,
        executor_def=dg.in_process_executor,
        description=f"Tells where an entity is in {dag.name}.",
        config={"ops": {f"{name}_op": {"config": {"key": example}}}},
    )
    def job() -> None:
        trace_entity()

    return job


def _drawn(dag: EventDag) -> dg.MarkdownMetadataValue:
    """As text, because Dagster's UI draws no Mermaid; and as Mermaid, for those that do."""
    return dg.MetadataValue.md(f"```\n{dag.outline()}\n```\n\n```mermaid\n{dag.mermaid()}\n```")


def _key_of(dag: EventDag, group: str) -> dg.AssetKey:
    return next(consumer_key(consumer) for consumer in dag.consumers if consumer.group == group)


def _metadata(dag: EventDag, found: Trace) -> dict[str, Any]:
    rows = describe(found)
    columns = [dg.TableColumn(name, "int" if name in ("read", "emitted") else "string") for name in rows[0]]
    return {
        "complete": found.complete,
        "waits_for": ", ".join(found.waits_for) or "nothing",
        "steps": dg.MetadataValue.table([dg.TableRecord(row) for row in rows], schema=dg.TableSchema(columns)),
        "event_dag": _drawn(dag),
    }
