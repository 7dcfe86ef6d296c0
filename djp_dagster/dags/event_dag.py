"""`EventDag`: consumers that emit what others read, validated and drawn as a whole."""

from collections.abc import Iterator, Sequence

from djp_dagster.errors import EventDagError, InvalidSettingError
from djp_dagster.joining.declaration import Join
from djp_dagster.processing.consumer import Consumer
from djp_dagster.streams.topics import Topic

_MARKS = str.maketrans(dict.fromkeys("-. ", "_"))


class EventDag:
    """A chain of consumers: an entity enters by a source topic, branches, and is complete when all branches are.

    It is no second language: the consumers say what they read and emit, this checks that it fits together, at
    definition time. Helpers of consumers (repartitions of joins) are taken in by themselves.

    Args:
        consumers: all of them, in any order.
        sources: the topics that others publish to; unless given, those that are read and emitted by none of them.
        name: of the whole.

    Raises:
        EventDagError: a cycle, with its path; a topic that is read, emitted by none, and no source; a topic with two
            owners; a consumer to which nothing leads; a join one of whose parts nothing leads to.
        InvalidSettingError: no consumer, or two of one group.

    Example:
        >>> import djp_dagster as djp
        >>> uploads, video, images = (djp.Topic(name, key="product") for name in ("uploads", "video", "images"))
        >>> products = djp.Topic("products", key="product")
        >>> @djp.consumer(topic=uploads, emits=[video])
        ... def transcode(batch): ...
        >>> @djp.consumer(topic=uploads, emits=[images])
        ... def resize(batch): ...
        >>> @djp.join(inputs={"video": video, "images": images}, key="product", emits=[products])
        ... def create(parts): ...
        >>> dag = EventDag([transcode, resize, create])
        >>> [topic.name for topic in dag.sources], [topic.name for topic in dag.results]
        (['uploads'], ['products'])
    """

    def __init__(
        self, consumers: Sequence[Consumer], *, sources: Sequence[Topic] | None = None, name: str = "event_dag"
    ) -> None:
        self.name = name
        self.consumers = tuple(_with_helpers(consumers))
        groups = [consumer.group for consumer in self.consumers]
        if not groups or len(set(groups)) != len(groups):
            raise InvalidSettingError(
                f"event DAG {name!r} needs consumers of different groups, not {groups}",
                setting="consumers",
                value=groups,
            )
        self._topics = _topics_of(name, self.consumers)
        self._owner = _owners(name, self.consumers)
        read = {topic.name for consumer in self.consumers for topic in consumer.topics}
        found = [self._topics[topic] for topic in sorted(read - set(self._owner))]
        self.sources = tuple(found if sources is None else sources)
        self._require_no_cycle()
        self._require_known(found)
        self._require_reached()

    @property
    def topics(self) -> tuple[Topic, ...]:
        """All topics, by name."""
        return tuple(self._topics[name] for name in sorted(self._topics))

    @property
    def results(self) -> tuple[Topic, ...]:
        """The topics that are emitted, and read by none of them."""
        read = {topic.name for consumer in self.consumers for topic in consumer.topics}
        return tuple(self._topics[name] for name in sorted(set(self._owner) - read))

    def readers(self, topic: str) -> list[Consumer]:
        """The consumers that read a topic."""
        return [consumer for consumer in self.consumers if any(topic == read.name for read in consumer.topics)]

    def owner(self, topic: str) -> Consumer | None:
        """The consumer that emits to a topic; None if it is a source."""
        return self._owner.get(topic)

    def in_order(self) -> list[Consumer]:
        """The consumers, those before others first."""
        ordered: list[Consumer] = []
        for consumer in self.consumers:
            self._visit(consumer, ordered)
        return ordered

    def _visit(self, consumer: Consumer, ordered: list[Consumer]) -> None:
        if consumer in ordered:
            return
        for topic in consumer.topics:
            owner = self._owner.get(topic.name)
            if owner is not None:
                self._visit(owner, ordered)
        ordered.append(consumer)

    def _require_no_cycle(self) -> None:
        done: set[str] = set()
        for consumer in self.consumers:
            path = self._cycle_from(consumer, [], done)
            if path is not None:
                raise EventDagError(
                    f"event DAG {self.name!r} has a cycle: {' -> '.join(path)}; an event would go round for ever: emit "
                    "to another topic",
                    path=path,
                )

    def _cycle_from(self, consumer: Consumer, path: list[str], done: set[str]) -> list[str] | None:
        if consumer.group in path:
            return [*path[path.index(consumer.group) :], consumer.group]
        if consumer.group in done:
            return None
        for topic in consumer.emits:
            for reader in self.readers(topic.name):
                steps = [*path, consumer.group, topic.name]
                if reader.group in steps:
                    return [*steps[steps.index(reader.group) :], reader.group]
                found = self._cycle_from(reader, steps, done)
                if found is not None:
                    return found
        done.add(consumer.group)
        return None

    def _require_known(self, found: Sequence[Topic]) -> None:
        known = {topic.name for topic in self.sources}
        for topic in found:
            if topic.name not in known:
                readers = [consumer.group for consumer in self.readers(topic.name)]
                raise EventDagError(
                    f"event DAG {self.name!r}: topic {topic.name!r}, read by {readers}, is emitted by none of its "
                    f"consumers and is none of its sources {sorted(known)}; add who emits it, or name it a source",
                    topic=topic.name,
                    readers=readers,
                )

    def _require_reached(self) -> None:
        reached = {topic.name for topic in self.sources}
        for consumer in self.in_order():
            missing = [topic.name for topic in consumer.topics if topic.name not in reached]
            if isinstance(consumer, Join) and missing:
                raise EventDagError(
                    f"event DAG {self.name!r}: nothing leads to the parts {missing} of join {consumer.group!r}, so no "
                    f"key would ever be complete; sources are {sorted(topic.name for topic in self.sources)}",
                    group=consumer.group,
                    topics=missing,
                )
            if len(missing) == len(consumer.topics):
                raise EventDagError(
                    f"event DAG {self.name!r}: nothing leads to consumer {consumer.group!r}, which reads {missing}; "
                    f"sources are {sorted(topic.name for topic in self.sources)}",
                    group=consumer.group,
                    topics=missing,
                )
            reached |= {topic.name for topic in consumer.emits}

    def mermaid(self) -> str:
        """The chain as a Mermaid flowchart: topics round, consumers square, joins as hexagons."""
        lines = ["flowchart LR"]
        lines += [f"    t_{_id(topic.name)}([{topic.name}])" for topic in self.topics]
        for consumer in self.in_order():
            shape = ("{{", "}}") if isinstance(consumer, Join) else ("[", "]")
            lines.append(f"    c_{_id(consumer.group)}{shape[0]}{consumer.group}{shape[1]}")
            lines += [f"    t_{_id(topic.name)} --> c_{_id(consumer.group)}" for topic in consumer.topics]
            lines += [f"    c_{_id(consumer.group)} --> t_{_id(topic.name)}" for topic in consumer.emits]
        return "\n".join(lines)


def _with_helpers(consumers: Sequence[Consumer]) -> Iterator[Consumer]:
    for consumer in consumers:
        yield from consumer.helpers
        yield consumer


def _topics_of(name: str, consumers: Sequence[Consumer]) -> dict[str, Topic]:
    topics: dict[str, Topic] = {}
    for consumer in consumers:
        for topic in (*consumer.topics, *consumer.emits):
            if topics.setdefault(topic.name, topic) != topic:
                raise EventDagError(
                    f"event DAG {name!r}: topic {topic.name!r} is declared twice and differently: {topics[topic.name]} "
                    f"and {topic}; share one declaration",
                    topic=topic.name,
                )
    return topics


def _owners(name: str, consumers: Sequence[Consumer]) -> dict[str, Consumer]:
    owners: dict[str, Consumer] = {}
    for consumer in consumers:
        for topic in consumer.emits:
            other = owners.setdefault(topic.name, consumer)
            if other is not consumer:
                raise EventDagError(
                    f"event DAG {name!r}: topic {topic.name!r} is emitted by {other.group!r} and {consumer.group!r}; "
                    "give each its own, so that one consumer answers for what is in it",
                    topic=topic.name,
                    owners=[other.group, consumer.group],
                )
    return owners


def _id(name: str) -> str:
    return name.translate(_MARKS)
