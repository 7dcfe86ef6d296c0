"""`Consumer`: what to do with a batch; and `consumer`, the decorator that makes one of a function."""

import copy
import hashlib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

from djp_dagster.errors import InvalidSettingError
from djp_dagster.processing.failures import RetryPolicy
from djp_dagster.processing.threshold import Threshold
from djp_dagster.state.snapshots import SnapshotPolicy
from djp_dagster.streams.model import GroupInfo, GroupSpec
from djp_dagster.streams.records import TopicPartition
from djp_dagster.streams.stream import EventStream, StartPosition, parse_start
from djp_dagster.streams.topics import Topic, check_name
from djp_dagster.units import Size, is_count, parse_bytes

if TYPE_CHECKING:
    from djp_dagster.processing.batch import Batch

Isolation = Literal["batch", "per_event"]
OnPoison = Literal["dead_letter", "block"]
Handler = Callable[..., Any]

DEFAULT_MAX_BATCH = Threshold(events=100_000, bytes="64MiB")
DEFAULT_RETRY = RetryPolicy()
DEFAULT_SNAPSHOTS = SnapshotPolicy()


class Consumer:
    """A handler and how to run it. Made by `consumer`; calling it calls the function.

    Attributes:
        handler: the function.
        group: the consumer group's name.
        topics: the topics it reads, in order.
        emits: the topics it may emit to.
        wants_batch: whether a per-event handler asks for its batch too.
        resource_names: the resources the handler asks for.
        asset_key: the path of its asset in Dagster.
        aligned: whether a batch holds, of all inputs, what was appended up to one moment.
        keyed_by_topic: whether keys of its state are keys of its events, and so in their task.
        follows: the live group, if this is another version of it, which must have no effect but on its state.
        tables: whose current state the handler reads.
        helpers: consumers that must run for this one to get anything.
    """

    aligned = False
    keyed_by_topic = False
    follows: str | None = None
    helpers: "tuple[Consumer, ...]" = ()

    def __init__(
        self,
        handler: Handler,
        *,
        topics: Sequence[Topic],
        emits: Sequence[Topic],
        group: str,
        max_batch: Threshold,
        stateful: bool,
        isolate: Isolation,
        on_poison: OnPoison,
        max_poison: int,
        retry: RetryPolicy,
        start: StartPosition,
        max_emit_bytes: int,
        code_version: str | None,
        asset_key: str | Sequence[str] | None = None,
        snapshots: SnapshotPolicy | None = DEFAULT_SNAPSHOTS,
        tables: "Sequence[Consumer]" = (),
        concurrency: int = 1,
    ) -> None:
        _require_plain(handler)
        self.handler = handler
        self.topics, self.emits = tuple(topics), tuple(emits)
        self.group = check_name("group", group)
        self.max_batch, self.stateful = max_batch, stateful
        self.isolate, self.on_poison, self.max_poison = isolate, on_poison, max_poison
        self.retry, self.start, self.max_emit_bytes = retry, start, max_emit_bytes
        self.snapshots, self.tables, self.concurrency = snapshots, tuple(tables), concurrency
        self._code_version = code_version
        key = self.group if asset_key is None else asset_key
        self.asset_key: tuple[str, ...] = (key,) if isinstance(key, str) else tuple(key)
        named = _resource_names(handler)
        self.wants_batch = isolate == "per_event" and "batch" in named
        self.resource_names = tuple(name for name in named if not (self.wants_batch and name == "batch"))
        self.__name__ = getattr(handler, "__name__", group)
        self.__doc__ = handler.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the handler."""
        return self.handler(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Consumer({self.group!r}, topics={[topic.name for topic in self.topics]})"

    def handle(self, batch: "Batch", resources: Mapping[str, Any]) -> Any:
        """What is done with a batch, unless it is isolated per event."""
        return self.handler(batch, **resources)

    def ends(self, stream: EventStream) -> dict[TopicPartition, int]:
        """Up to where there is something to do: the ends of its topics; of a follower, what the live group has done."""
        if self.follows is not None:
            return stream.positions(self.follows)
        spans = stream.log.spans([topic.name for topic in self.topics])
        return {at: span.end for at, span in spans.items()}

    def present(self, stream: EventStream, tasks: Collection[int], now: int) -> int:
        """Up to when deadlines may fire: now; of a follower, the moment up to which the live group has fired its own.

        So it fires, without effect, what the live group has fired with effect, whatever the clock says, and leaves the
        rest to whichever of them is live then.
        """
        return now if self.follows is None else min(now, fired_up_to(stream, self.follows, tasks))

    def following(self, suffix: str) -> "Consumer":
        """The same consumer as a group of its own, which follows the live one and has no effect but on its state."""
        follower = copy.copy(self)
        follower.group, follower.follows = f"{self.group}.{suffix}", self.group
        return follower

    def visible(self, value: Any) -> Any:
        """What a reader of the state sees of a value; None is nothing."""
        return value

    @property
    def code_version(self) -> str:
        """What was given, else a hash of the source of the handler's module; it changes when the code does."""
        if self._code_version is None:
            module = inspect.getmodule(self.handler)
            try:
                source = inspect.getsource(module if module is not None else self.handler)
            except (OSError, TypeError):
                source = bytecode(self.handler)
            self._code_version = hashlib.sha256(source.encode()).hexdigest()[:12]
        return self._code_version

    def register(self, stream: EventStream) -> GroupInfo:
        """Make the consumer's topics and group exist in the stream; changes nothing if they do.

        Another version of a group is not made by the way: it may have been promoted, and must not come back as an
        empty one. `djp_dagster.versions.follow` makes it.

        Raises:
            TopicMismatchError, GroupMismatchError: they exist otherwise than declared.
            UnknownGroupError: there is no such other version.
        """
        if self.follows is not None:
            return stream.coordinator.group(self.group)
        for topic in (*self.topics, *self.emits):
            stream.create_topic(topic)
        return stream.coordinator.ensure_group(
            GroupSpec(
                name=self.group,
                topics=tuple(topic.name for topic in self.topics),
                start=parse_start(self.start),
                stateful=self.stateful,
                code_version=self.code_version if self.stateful else None,
            )
        )

    def resources_from(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The handler's resources, by parameter name.

        Raises:
            InvalidSettingError: naming those that are missing.
        """
        missing = [name for name in self.resource_names if name not in given]
        if missing:
            raise InvalidSettingError(
                f"consumer {self.group!r} asks for the resources {missing}, which nobody gave; pass resources="
                "{name: object}, or give the handler's parameter a default",
                setting="resources",
                value=missing,
            )
        return {name: given[name] for name in self.resource_names}


def fired_up_to(stream: EventStream, group: str, tasks: Collection[int]) -> int:
    """The moment up to which the group has fired what was due; 0 before its first batch."""
    fired = min(info.fired_micros for info in stream.coordinator.tasks(group) if info.task in tasks)
    left = stream.coordinator.next_deadline(group, sorted(tasks))
    return fired if left is None else min(fired, left - 1)


def bytecode(handler: Handler) -> str:
    """What a handler without source does, in a form that is the same in every process."""
    code = getattr(handler, "__code__", None)
    if code is None:
        return f"{getattr(handler, '__module__', '')}.{getattr(handler, '__qualname__', type(handler).__qualname__)}"
    constants = [_constant(one) for one in code.co_consts]
    return repr((code.co_code, code.co_names, code.co_varnames, constants))


def _constant(value: object) -> str:
    inner = getattr(value, "co_consts", None)
    if inner is None:
        return repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value)
    return repr((value.co_code, value.co_names, [_constant(one) for one in inner]))  # type: ignore[attr-defined]


def _require_plain(handler: Handler) -> None:
    """Calling a coroutine function or a generator function runs nothing of it: events would pass unhandled."""
    kinds = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    if any(is_kind(handler) for is_kind in kinds):
        raise InvalidSettingError(
            f"handler {handler!r} is async or has a yield, so calling it would do nothing; make it a plain function "
            "(asyncio.run inside it; batch.emit instead of yield)",
            setting="handler",
            value=repr(handler),
        )


def _resource_names(handler: Handler) -> tuple[str, ...]:
    parameters = list(inspect.signature(handler).parameters.values())
    if not parameters or parameters[0].kind not in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    ):
        raise InvalidSettingError(
            f"handler {handler!r} must take the batch (or, isolated per event, the record) as its first parameter",
            setting="handler",
            value=repr(handler),
        )
    return tuple(
        parameter.name
        for parameter in parameters[1:]
        if parameter.default is inspect.Parameter.empty
        and parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    )


def consumer(
    *,
    topic: Topic | None = None,
    topics: Sequence[Topic] = (),
    emits: Sequence[Topic] = (),
    group: str | None = None,
    max_batch: Threshold = DEFAULT_MAX_BATCH,
    stateful: bool = False,
    isolate: Isolation = "batch",
    on_poison: OnPoison = "dead_letter",
    max_poison: int = 10,
    retry: RetryPolicy = DEFAULT_RETRY,
    start: StartPosition = "earliest",
    max_emit_bytes: Size = "64MiB",
    code_version: str | None = None,
    asset_key: str | Sequence[str] | None = None,
    snapshots: SnapshotPolicy | None = DEFAULT_SNAPSHOTS,
    tables: Sequence[Consumer] = (),
    concurrency: int = 1,
) -> Callable[[Handler], Consumer]:
    """Make a consumer of a function: it says what to do with a batch, others say when a batch is cut.

    The function takes a `Batch`; what it emits, changes in state, fails, and returns becomes visible with the batch's
    commit, once. What it does to the outside world may happen again: ``batch.id``, ``record.idempotency_key`` and
    ``batch.fencing_token`` are there to make that harmless. Further parameters are resources, given by name.

    Args:
        topic: what it reads.
        topics: what it reads, if several; task *i* handles partition *i* of each.
        emits: the topics it may emit to.
        group: the consumer group; the function's name unless given.
        max_batch: bounds every batch in events and bytes; one record at least.
        stateful: the handler uses ``batch.state``; its batches then hold one task each.
        isolate: ``"batch"``, or ``"per_event"`` for a function that takes one `Record` (and, if it has a parameter
            ``batch``, the batch): a failing record is dead-lettered alone, without a search. What it returns is not
            kept.
        on_poison: ``"dead_letter"`` goes on without poison records; ``"block"`` stops at the first, keeping order.
        max_poison: more poison records than this in one batch are a failure of the code, not of the data.
        retry: patience with transient failures.
        start: where a new group begins: ``"earliest"``, ``"latest"``, or a time.
        max_emit_bytes: how much one commit may emit.
        code_version: changes when the handler does; a hash of its module unless given.
        asset_key: the key of its asset in Dagster, if it is not the group's name: a name or a path.
        snapshots: when the state of a stateful consumer is copied to the payload store; None for never.
        tables: which tables (or other stateful consumers) the handler reads, by ``batch.table(...)``.
        concurrency: with ``isolate="per_event"``, how many events are handled at the same time, in threads; for
            handlers that wait for others. Emits keep the order of their events; what handlers do outside does not.

    Raises:
        InvalidSettingError: naming the argument, its value and what is allowed.

    Example:
        >>> from djp_dagster import Topic, testing
        >>> orders = Topic("orders")
        >>> @consumer(topic=orders)
        ... def totals(batch):
        ...     return {"sum": sum(record.data["amount"] for record in batch)}
        >>> testing.run_consumer(totals, [orders.event(amount=2), orders.event(amount=3)]).outputs
        [{'sum': 5}]
    """
    reads = (*(() if topic is None else (topic,)), *topics)
    _require(bool(reads), "topic", None, "name at least one topic to read")
    for name, topics_given in (("topic", reads), ("emits", emits)):
        _require(
            not isinstance(topics_given, str | Topic) and all(isinstance(one, Topic) for one in topics_given),
            name,
            topics_given,
            "give Topic objects, emits as a list of them",
        )
    _require(isinstance(max_batch, Threshold), "max_batch", max_batch, "give a Threshold(events=..., bytes=...)")
    _require(isinstance(retry, RetryPolicy), "retry", retry, "give a RetryPolicy(max_attempts=...)")
    _require(is_count(max_poison), "max_poison", max_poison, "give a whole number")
    _require(isolate in ("batch", "per_event"), "isolate", isolate, "use 'batch' or 'per_event'")
    _require(on_poison in ("dead_letter", "block"), "on_poison", on_poison, "use 'dead_letter' or 'block'")
    _require(max_poison >= 0, "max_poison", max_poison, "use 0 or more")
    _require(
        max_batch.max_events is not None or max_batch.max_bytes is not None,
        "max_batch",
        max_batch,
        "bound it by events or bytes",
    )
    _require(
        start in ("earliest", "latest") or isinstance(start, datetime),
        "start",
        start,
        "use 'earliest', 'latest', or a datetime with a time zone",
    )

    _require(is_count(concurrency) and concurrency >= 1, "concurrency", concurrency, "use 1 or more")
    _require(
        concurrency == 1 or (isolate == "per_event" and not stateful),
        "concurrency",
        concurrency,
        "only events that are isolated, and share no state, can be handled at the same time",
    )

    def decorate(handler: Handler) -> Consumer:
        return Consumer(
            handler,
            topics=reads,
            emits=emits,
            group=group if group is not None else getattr(handler, "__name__", ""),
            max_batch=max_batch,
            stateful=stateful,
            isolate=isolate,
            on_poison=on_poison,
            max_poison=max_poison,
            retry=retry,
            start=start,
            max_emit_bytes=parse_bytes(max_emit_bytes, name="max_emit_bytes"),
            code_version=code_version,
            asset_key=asset_key,
            snapshots=snapshots,
            tables=tables,
            concurrency=concurrency,
        )

    return decorate


def _require(holds: bool, setting: str, value: object, remedy: str) -> None:
    if not holds:
        raise InvalidSettingError(f"@consumer({setting}={value!r}): {remedy}", setting=setting, value=value)
