"""Consumers and topics as assets: a consumer is materialized by processing what is pending; a topic is external."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, TypedDict

import dagster as dg

from djp_dagster.errors import InvalidSettingError
from djp_dagster.joining.declaration import Join
from djp_dagster.orchestration.code_links import code_link
from djp_dagster.orchestration.outputs import io_manager_of, table_io_manager_of
from djp_dagster.orchestration.step import (
    ProcessConfig,
    asked_by_hand,
    backlog_of,
    processed,
    rebuild_table,
    stream_of,
)
from djp_dagster.orchestration.tags import STREAM_KEY, consumer_key, topic_key
from djp_dagster.processing.consumer import Consumer
from djp_dagster.state.table import Table
from djp_dagster.streams.topics import Topic

BY_EVENT_ID = "(event id)"
"""What is said of the key of a topic without one."""


class AssetOptions(TypedDict, total=False):
    """What a stream asset takes of what ``dg.asset`` takes."""

    deps: Iterable[Any]
    description: str
    group_name: str
    owners: Sequence[str]
    tags: Mapping[str, str]
    kinds: AbstractSet[str]
    metadata: Mapping[str, Any]
    pool: str
    automation_condition: dg.AutomationCondition[Any]
    freshness_policy: dg.FreshnessPolicy
    backfill_policy: dg.BackfillPolicy
    hooks: AbstractSet[dg.HookDefinition]
    op_tags: Mapping[str, Any]
    resource_defs: Mapping[str, object]


def consumer_asset(consumer: Consumer, *, options: AssetOptions) -> dg.AssetsDefinition:
    """The consumer as an asset whose materialization processes what is pending."""
    refused = sorted(set(options) - set(AssetOptions.__annotations__))
    if refused:
        raise InvalidSettingError(
            f"the asset of consumer {consumer.group!r} does not take {refused}: use "
            f"{sorted(AssetOptions.__annotations__)}; keys and retries are the consumer's (asset_key=, retry=), checks "
            "come from build_stream_checks or dg.asset_check",
            setting=refused[0],
            value=str(refused),
        )
    deps = [
        *(topic_key(topic) for topic in consumer.topics),
        *(consumer_key(table) for table in consumer.tables),
        *options.get("deps", ()),
    ]
    link = {} if isinstance(consumer, Table) else code_link(consumer.handler)
    given: dict[str, Any] = {"description": consumer.__doc__, "kinds": _kinds_of(consumer), **options, "deps": deps}
    given["metadata"] = {**link, **(options.get("metadata") or {})}

    def process(context: dg.AssetExecutionContext, config: ProcessConfig) -> Iterator[dg.MaterializeResult[Any]]:
        with processed(context, consumer, config) as done:
            if isinstance(consumer, Table) and asked_by_hand(context.run.tags):
                rebuild_table(context, consumer, config, done)
            if done.batches:
                backlog = backlog_of(stream_of(context.resources), consumer.group)
                yield dg.MaterializeResult(metadata=done.metadata(backlog))

    with warnings.catch_warnings():
        # An IO manager of its own is what makes a stream asset readable without any set-up; nobody can act on the word.
        warnings.simplefilter("ignore", dg.BetaWarning)
        decorated: dg.AssetsDefinition = dg.asset(
            key=consumer_key(consumer),
            code_version=consumer.code_version,
            required_resource_keys={STREAM_KEY, *consumer.resource_names},
            output_required=False,
            io_manager_def=table_io_manager_of(consumer)
            if isinstance(consumer, Table)
            else io_manager_of(consumer.group),
            **given,
        )(process)
    return decorated


def topic_assets(
    things: Iterable[Consumer | Topic], *, only: Iterable[Topic] | None = None, group_name: str | None
) -> list[dg.AssetSpec]:
    """One external asset per topic that is named, read or emitted to; upstream of it is who writes it."""
    topics: dict[str, Topic] = {}
    writers: dict[str, list[Consumer]] = {}
    for thing in _with_helpers(things):
        for topic in (thing,) if isinstance(thing, Topic) else (*thing.topics, *thing.emits):
            _require_same(topics.setdefault(topic.name, topic), topic)
            writers.setdefault(topic.name, [])
        if isinstance(thing, Consumer):
            for topic in thing.emits:
                writers[topic.name].append(thing)
    wanted = topics.keys() if only is None else {topic.name for topic in only}
    if unknown := sorted(wanted - topics.keys()):
        raise InvalidSettingError(
            f"only={unknown} names topics that are not of these consumers: {sorted(topics)}",
            setting="only",
            value=unknown[0],
        )
    return [_topic_asset(topics[name], writers[name], group_name) for name in sorted(wanted)]


def _with_helpers(things: Iterable[Consumer | Topic]) -> Iterator[Consumer | Topic]:
    for thing in things:
        if isinstance(thing, Consumer):
            yield from thing.helpers
        yield thing


def _kinds_of(consumer: Consumer) -> set[str]:
    if isinstance(consumer, Table):
        return {"python", "table"}
    return {"python", "join"} if isinstance(consumer, Join) else {"python"}


def _require_same(known: Topic, topic: Topic) -> None:
    if known != topic:
        raise InvalidSettingError(
            f"topic {topic.name!r} is declared twice and differently: {known} and {topic}; share one declaration",
            setting="topic",
            value=topic.name,
        )


def _topic_asset(topic: Topic, writers: Sequence[Consumer], group_name: str | None) -> dg.AssetSpec:
    spread = f"by {topic.key}" if topic.key is not None else "by event id"
    parts = "1 partition" if topic.partitions == 1 else f"{topic.partitions} partitions {spread}"
    metadata = {"partitions": topic.partitions, "key": topic.key or BY_EVENT_ID}
    if topic.retention is not None:
        metadata["retention"] = str(topic.retention)
    return dg.AssetSpec(
        topic_key(topic),
        deps=[consumer_key(writer) for writer in writers],
        description=f"The topic {topic.name}: {parts}.",
        group_name=group_name,
        metadata=metadata,
        kinds={"stream"},
    )
