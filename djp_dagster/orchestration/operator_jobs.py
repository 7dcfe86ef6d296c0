"""What a person does from the Launchpad: publish events, redrive dead letters, seek a group."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import dagster as dg
from pydantic import Field

from djp_dagster.errors import InvalidSettingError
from djp_dagster.events import Event
from djp_dagster.orchestration.step import stream_of
from djp_dagster.orchestration.tags import STREAM_KEY, consumer_key, identifier
from djp_dagster.processing.consumer import Consumer
from djp_dagster.processing.redrive import redrive
from djp_dagster.resources.event_stream import SqlEventStream
from djp_dagster.streams.seeking import Move, parse_target, plan_seek
from djp_dagster.streams.stream import EventStream
from djp_dagster.streams.topics import Topic

_EVENTS_PER_APPEND = 5_000


class PublishConfig(dg.Config):
    """What to publish, for a person in the Launchpad."""

    topic: str = Field(description="The topic's name.")
    events: list[dict[str, Any]] = Field(description="The data of each event.")


class RedriveConfig(dg.Config):
    """Which dead letters go through their handler again."""

    group: str = Field(description="The consumer group.")
    ids: list[int] = Field(default=[], description="Which; all pending ones if empty.")
    wait: str = Field(default="10min", description="How long to wait for a worker that holds the group.")


class SeekConfig(dg.Config):
    """Where a group goes on."""

    group: str = Field(description="The consumer group.")
    to: str = Field(
        description='"earliest", "latest", a time such as "2026-11-01T00:00:00+00:00", so long ago such as "2h", or '
        'offsets such as "orders:0=1200,orders:1=1350" (partitions not named stay).'
    )
    reset_state: bool = Field(default=False, description="For a group with state, which then begins empty.")
    dry_run: bool = Field(default=True, description="Only show what would change.")
    wait: str = Field(default="1min", description="How long to wait until nobody works on the group.")


def publish_once(stream: EventStream, topic: str, events: Iterable[Event], name: str) -> int:
    """Publish ``events`` as the producer ``name``, once: what an earlier try appended is passed over; how many.

    The events must be the same at each try, and in the same order.
    """
    producer = stream.producer(name)
    count = 0
    for sequence, chunk in enumerate(_chunks(events), start=1):
        count += len(chunk)
        if sequence > producer.last_sequence:
            producer.publish(topic, chunk, sequence=sequence)
    return count


def _chunks(events: Iterable[Event]) -> Iterable[list[Event]]:
    chunk: list[Event] = []
    for event in events:
        chunk.append(event)
        if len(chunk) == _EVENTS_PER_APPEND:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _producer_of(context: dg.OpExecutionContext) -> str:
    """One producer per run and step, the same at every retry of the step."""
    step = hashlib.sha256(str(context.op_handle).encode()).hexdigest()[:12]
    return f"run-{context.run.run_id}-{step}"


def publish_op(topic: Topic, *, name: str | None = None) -> dg.OpDefinition:
    """An op that publishes its input, events or the data of events, to a topic; and returns how many.

    A retry of the step publishes nothing twice, if its input is the same and in the same order.

    Args:
        topic: where to; made when missing.
        name: the op's name; ``publish_<topic>`` unless given.
    """

    @dg.op(
        name=name or f"publish_{identifier(topic.name)}",
        required_resource_keys={STREAM_KEY},
        description=f"Publishes events to {topic.name}.",
        out=dg.Out(int, description="How many events were published."),
    )
    def publish(context: dg.OpExecutionContext, events: list[Any]) -> int:
        stream = stream_of(context.resources)
        stream.create_topic(topic)
        given = (event if isinstance(event, Event) else topic.event(event) for event in events)
        count = publish_once(stream, topic.name, given, _producer_of(context))
        context.add_output_metadata({"events": count, "topic": topic.name})
        return count

    return publish


def build_publish_job(
    *topics: Topic, name: str = "publish_job", example: Mapping[str, object] | None = None
) -> dg.JobDefinition:
    """A job that publishes what a person types into the Launchpad: ``topic``, and the data of each of ``events``.

    Args:
        *topics: where it may publish to; made when missing.
        name: the job's name.
        example: the data of an event of the first topic, which the Launchpad is filled with; its key unless given.
    """
    _require(topics, "topics", name)
    declared = {topic.name: topic for topic in topics}

    @dg.op(name=f"{name}_op", required_resource_keys={STREAM_KEY})
    def publish_typed(context: dg.OpExecutionContext, config: PublishConfig) -> None:
        topic = declared.get(config.topic)
        if topic is None:
            raise InvalidSettingError(
                f"topic {config.topic!r} is none of {sorted(declared)}", setting="topic", value=config.topic
            )
        stream = stream_of(context.resources)
        stream.create_topic(topic)
        count = publish_once(stream, topic.name, map(topic.event, config.events), _producer_of(context))
        context.log.info("published %d events to %s", count, topic.name)

    @dg.job(
        name=name,
        executor_def=dg.in_process_executor,
        description=f"Publishes events to one of {', '.join(sorted(declared))}.",
        config=_preset(name, {"topic": topics[0].name, "events": [dict(example or _example(topics[0]))]}),
    )
    def job() -> None:
        publish_typed()

    return job


def build_redrive_job(*consumers: Consumer, name: str = "redrive_job") -> dg.JobDefinition:
    """A job that sends dead letters of a group through its handler again: ``group``, and ``ids`` (all if empty).

    Effects and status of each become visible in one commit. The run fails if any failed again; they stay pending.

    Args:
        *consumers: whose dead letters.
        name: the job's name.
    """
    _require(consumers, "consumers", name)
    by_group = {consumer.group: consumer for consumer in consumers}
    resources = {key for consumer in consumers for key in consumer.resource_names}

    @dg.op(name=f"{name}_op", required_resource_keys={STREAM_KEY, *resources})
    def redrive_letters(context: dg.OpExecutionContext, config: RedriveConfig) -> None:
        consumer = _one_of(by_group, config.group)
        resource: SqlEventStream = getattr(context.resources, STREAM_KEY)
        letters = redrive(
            resource.open(),
            consumer,
            config.ids or None,
            resources={key: getattr(context.resources, key) for key in consumer.resource_names},
            state_folder=resource.state_path(),
            wait=config.wait,
        )
        failed = [letter.id for letter in letters if letter.status == "pending"]
        context.log.info("redriven %d dead letters, %d failed again", len(letters) - len(failed), len(failed))
        if failed:
            raise dg.Failure(
                f"dead letters {failed[:20]} of group {config.group!r} failed again and stay pending",
                metadata={"redriven": len(letters) - len(failed), "failed_again": len(failed)},
                allow_retries=False,
            )

    @dg.job(
        name=name,
        executor_def=dg.in_process_executor,
        description="Sends dead letters through their handler again, with effects and status in one commit each.",
        config=_preset(name, {"group": consumers[0].group, "ids": []}),
    )
    def job() -> None:
        redrive_letters()

    return job


def build_seek_job(*consumers: Consumer, name: str = "seek_job") -> dg.JobDefinition:
    """A job that moves the committed offsets of a group: ``group``, ``to``, and ``dry_run``, on unless turned off.

    What would change, or did, is an observation of the group's asset: offsets, records handled again, records skipped.

    Args:
        *consumers: whose groups.
        name: the job's name.
    """
    _require(consumers, "consumers", name)
    by_group = {consumer.group: consumer for consumer in consumers}
    keys = {consumer.group: consumer_key(consumer) for consumer in consumers}

    @dg.op(name=f"{name}_op", required_resource_keys={STREAM_KEY})
    def seek_group(context: dg.OpExecutionContext, config: SeekConfig) -> None:
        group = _one_of(by_group, config.group).group
        stream = stream_of(context.resources)
        target = parse_target(config.to, stream.log.now_micros())
        moves = plan_seek(stream, group, target)
        if not config.dry_run:
            stream.seek(group, target, reset_state=config.reset_state, wait=config.wait)
        again, skipped = sum(move.again for move in moves), sum(move.skipped for move in moves)
        context.log.info(
            "%s: %d records handled again, %d skipped", "dry run" if config.dry_run else "moved", again, skipped
        )
        context.log_event(
            dg.AssetObservation(
                keys[group],
                description="dry run: nothing was changed" if config.dry_run else "the group was moved",
                metadata={"offsets": _moves_table(moves), "handled_again": again, "skipped": skipped},
            )
        )

    @dg.job(
        name=name,
        executor_def=dg.in_process_executor,
        description="Moves the committed offsets of a group; a dry run unless told otherwise.",
        config=_preset(name, {"group": consumers[0].group, "to": "earliest", "dry_run": True}),
    )
    def job() -> None:
        seek_group()

    return job


def _preset(job: str, config: Mapping[str, object]) -> dict[str, object]:
    """What the Launchpad is filled with, to be changed there."""
    return {"ops": {f"{job}_op": {"config": dict(config)}}}


def _example(topic: Topic) -> dict[str, object]:
    return {topic.key: "..."} if topic.key is not None and "." not in topic.key else {}


def _require(things: Sequence[object], what: str, job: str) -> None:
    if not things:
        raise InvalidSettingError(f"job {job!r} needs {what}", setting=what, value=None)


def _one_of(by_group: Mapping[str, Consumer], group: str) -> Consumer:
    if group not in by_group:
        raise InvalidSettingError(f"group {group!r} is none of {sorted(by_group)}", setting="group", value=group)
    return by_group[group]


def _moves_table(moves: Sequence[Move]) -> dg.TableMetadataValue:
    columns = {"topic": "string", "partition": "int", "old": "int", "new": "int", "again": "int", "skipped": "int"}
    rows = [
        dg.TableRecord(
            {
                "topic": move.at.topic,
                "partition": move.at.partition,
                **{name: getattr(move, name) for name in ("old", "new", "again", "skipped")},
            }
        )
        for move in moves[:200]
    ]
    return dg.MetadataValue.table(rows, schema=dg.TableSchema([dg.TableColumn(*column) for column in columns.items()]))
