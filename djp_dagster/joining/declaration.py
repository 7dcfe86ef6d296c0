"""`Join`: a consumer that waits for all parts of a key; and `join`, the decorator that makes one of a function."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from djp_dagster.errors import InvalidSettingError
from djp_dagster.joining.buffer import BufferRun
from djp_dagster.joining.copartitioning import co_partitioned
from djp_dagster.joining.joined import Joined
from djp_dagster.joining.parts import Input, PartSpec, part_specs
from djp_dagster.joining.rules import Duplicates, JoinRules, OnDeadline
from djp_dagster.processing.batch import Batch
from djp_dagster.processing.consumer import (
    DEFAULT_MAX_BATCH,
    DEFAULT_RETRY,
    DEFAULT_SNAPSHOTS,
    Consumer,
    Handler,
)
from djp_dagster.processing.failures import RetryPolicy
from djp_dagster.processing.threshold import Threshold
from djp_dagster.state.snapshots import SnapshotPolicy
from djp_dagster.streams.model import GroupInfo
from djp_dagster.streams.stream import EventStream
from djp_dagster.streams.topics import Topic
from djp_dagster.units import Duration, Size, parse_bytes, parse_seconds

Late = Literal["drop", "dead_letter"] | Topic
Clock = Literal["append_time", "event_time"]


class Join(Consumer):
    """A consumer whose handler gets all parts of a key together, once. Made by `join`.

    Attributes:
        rules: what it waits for, and for how long.
        helpers: the consumers that repartition its inputs, if they are not partitioned by its key.
    """

    aligned = True
    keyed_by_topic = True

    def __init__(self, handler: Handler, *, rules: JoinRules, helpers: tuple[Consumer, ...], **settings: Any) -> None:
        super().__init__(handler, stateful=True, isolate="batch", **settings)
        self.rules, self.helpers = rules, helpers

    def handle(self, batch: Batch, resources: Mapping[str, Any]) -> None:
        """See `djp_dagster.joining`."""

        def call(parts: Joined) -> Any:
            return self.handler(parts, **resources)

        BufferRun(self.rules, batch, call, self.retry.judge).run()

    def visible(self, value: Any) -> Any:
        """A reader of the state sees marks and the names of parts, no payloads; nothing of the indexes."""
        if not isinstance(value, list):
            return None
        if isinstance(value[0], str):
            return {"status": value[0], "since_micros": value[1]}
        return {"status": "pending", "due_micros": value[0], "bytes": value[1], "parts": sorted(value[2])}

    def register(self, stream: EventStream) -> GroupInfo:
        """See `Consumer.register`; the groups of its helpers are made, too, so that nothing passes them by."""
        for helper in self.helpers:
            helper.register(stream)
        return super().register(stream)


def join(
    *,
    inputs: Mapping[str, Input],
    key: str,
    deadline: Duration | None = None,
    on_deadline: OnDeadline = "dead_letter",
    clock: Clock = "append_time",
    idle_after: Duration = "1min",
    optional: Sequence[str] = (),
    count: Mapping[str, int | str] | None = None,
    duplicates: Duplicates = "first",
    late: Late | None = None,
    remember: Duration | None = None,
    max_buffer_bytes: Size = "256MiB",
    repartition: bool = False,
    emits: Sequence[Topic] = (),
    group: str | None = None,
    max_batch: Threshold = DEFAULT_MAX_BATCH,
    max_poison: int = 10,
    retry: RetryPolicy = DEFAULT_RETRY,
    snapshots: SnapshotPolicy | None = DEFAULT_SNAPSHOTS,
    tables: Sequence[Consumer] = (),
    max_emit_bytes: Size = "64MiB",
    code_version: str | None = None,
    asset_key: str | Sequence[str] | None = None,
) -> Callable[[Handler], Join]:
    """Make a join of a function: it is called with all parts of a key, as soon as they are there, once.

    The parts may come in any order, from any number of topics, over any time; they wait in the group's state. For a key
    whose deadline passes first, ``on_deadline`` says what happens. Deadlines fire also on idle inputs, and right after
    any downtime; what was appended before them counts. What the handler emits becomes visible with the commit, once;
    the handler itself, and what it does to the outside world, is run at least once. One completion per key, ever.

    Args:
        inputs: the parts by name: each a topic, or (topic, event type) for the events of one type.
        key: the field of ``data`` that parts have in common; the inputs must be partitioned by it, alike.
        deadline: how long to wait from the first part on, e.g. ``"1h"``; for ever unless given.
        on_deadline: ``"dead_letter"`` sends the parts that are there to the dead letters, to be redriven when the
            others have come; ``"partial"`` calls the handler without those that are missing.
        clock: the deadline in ``"append_time"``; or in ``"event_time"``, from the earliest part on, when all inputs
            have come past it.
        idle_after: with ``"event_time"``, inputs silent for longer are not waited for; if all are, time goes on by
            itself.
        optional: parts without which the handler is called, too, once the deadline has passed.
        count: how many different events a part takes, by name: a number, or the field of the data of the first of
            them that says it.
        duplicates: of a part that is there already: keep the ``"first"``, the ``"last"``, or ``"all"`` as a list. The
            same event published twice counts once.
        late: what becomes of a part that comes after its key was completed or has expired: ``"drop"``,
            ``"dead_letter"``, or a topic. Unless given, it is dropped if its key was completed, and becomes a dead
            letter if the other parts have.
        remember: how long it is remembered that a key is done. For ever unless given, at some 50 bytes a key; after it,
            a late part begins the key anew.
        max_buffer_bytes: of the parts that wait, in each task; what exceeds it becomes a dead letter. A part whose data
            is in the payload store counts, and is kept, as its claim.
        repartition: copy inputs that are keyed otherwise, or into another number of partitions, to a topic of the
            join's own; it is shown as a consumer and a topic. Append times are those of the copies.
        emits: the topics the handler may emit to.
        max_poison: more keys than this that fail in one batch are a failure of the code, not of the data.
        group: as of `consumer`.
        max_batch: as of `consumer`.
        retry: as of `consumer`.
        snapshots: as of `consumer`.
        tables: as of `consumer`; read them by ``parts.table(...)``.
        max_emit_bytes: as of `consumer`.
        code_version: as of `consumer`.
        asset_key: as of `consumer`.

    Raises:
        InvalidSettingError: naming the argument, its value and what is allowed.
        CoPartitionError: inputs are not partitioned by the key alike, and must not be copied.

    Example:
        >>> import djp_dagster as djp
        >>> video, images = djp.Topic("video", key="product"), djp.Topic("images", key="product")
        >>> products = djp.Topic("products", key="product")
        >>> @djp.join(inputs={"video": video, "images": images}, key="product", deadline="1h", emits=[products])
        ... def create(parts):
        ...     parts.emit(products.event(product=parts.key, length=parts["video"].data["length"]))
        >>> events = {images: [images.event(product="p1")], video: [video.event(product="p1", length=30)]}
        >>> [record.data for record in djp.testing.run_consumer(create, events).emitted["products"]]
        [{'product': 'p1', 'length': 30}]
    """
    specs = part_specs(inputs, optional, count or {})
    for setting, value, allowed in (
        ("on_deadline", on_deadline, ("dead_letter", "partial")),
        ("clock", clock, ("append_time", "event_time")),
        ("duplicates", duplicates, ("first", "last", "all")),
    ):
        if value not in allowed:
            raise _invalid(setting, value, f"use one of {list(allowed)}")
    if not (late in (None, "drop", "dead_letter") or isinstance(late, Topic)):
        raise _invalid("late", late, "use 'drop', 'dead_letter', or a Topic")
    if optional and deadline is None:
        raise _invalid("optional", optional, "give a deadline, or they are waited for as long as the others")
    late_topics = [late] if isinstance(late, Topic) and late not in emits else []

    def decorate(handler: Handler) -> Join:
        name = group if group is not None else getattr(handler, "__name__", "")
        placed, helpers = co_partitioned(name, key, specs, repartition=repartition)
        rules = JoinRules(
            key=key,
            parts=placed,
            deadline_micros=_micros(deadline, "deadline"),
            by_event_time=clock == "event_time",
            idle_micros=_micros(idle_after, "idle_after") or 0,
            on_deadline=on_deadline,
            duplicates=duplicates,
            late="topic" if isinstance(late, Topic) else late or "with_key",
            late_topic=late.name if isinstance(late, Topic) else None,
            remember_micros=_micros(remember, "remember"),
            max_buffer_bytes=parse_bytes(max_buffer_bytes, name="max_buffer_bytes"),
        )
        return Join(
            handler,
            rules=rules,
            helpers=helpers,
            topics=_distinct(placed),
            emits=[*emits, *late_topics],
            group=name,
            max_batch=max_batch,
            on_poison="dead_letter",
            max_poison=max_poison,
            retry=retry,
            start="earliest",
            max_emit_bytes=parse_bytes(max_emit_bytes, name="max_emit_bytes"),
            code_version=code_version,
            asset_key=asset_key,
            snapshots=snapshots,
            tables=tables,
        )

    return decorate


def _distinct(parts: Sequence[PartSpec]) -> list[Topic]:
    return list({spec.topic.name: spec.topic for spec in parts}.values())


def _micros(duration: Duration | None, name: str) -> int | None:
    if duration is None:
        return None
    seconds = parse_seconds(duration, name=name)
    if seconds <= 0:
        raise _invalid(name, duration, "it must be above 0")
    return round(seconds * 1e6)


def _invalid(setting: str, value: object, remedy: str) -> InvalidSettingError:
    return InvalidSettingError(f"@join({setting}={value!r}): {remedy}", setting=setting, value=value)
