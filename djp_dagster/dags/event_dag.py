"""`EventDag`: consumers that emit what others read, validated and drawn as a whole."""

from collections.abc import Iterable, Iterator, Sequence

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
        EventDagError: a cycle, with its path; a topic that is declared differently, or has two owners; a topic, a
            consumer, or a part of a join to which nothing leads.
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
        self._topics = _topics_of(name, self.consumers, sources or ())
        self._owner = _owners(name, self.consumers)
        read = {topic.name for consumer in self.consumers for topic in consumer.topics}
        found = [self._topics[topic] for topic in sorted(read - set(self._owner))]
        self.sources = tuple(found if sources is None else sources)
        self._require_no_cycle()
        self._require_fed()

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

    def _cycle_from(self, consumer: Consumer, before: list[tuple[str, str]], done: set[str]) -> list[str] | None:
        """The groups and topics of a cycle that ``consumer`` leads to; ``before`` it were these groups and topics."""
        groups = [group for group, _ in before]
        if consumer.group in groups:
            steps = before[groups.index(consumer.group) :]
            return [*(name for step in steps for name in step), consumer.group]
        if consumer.group not in done:
            for topic in consumer.emits:
                for reader in self.readers(topic.name):
                    found = self._cycle_from(reader, [*before, (consumer.group, topic.name)], done)
                    if found is not None:
                        return found
            done.add(consumer.group)
        return None

    def _require_fed(self) -> None:
        """What is read must be a source, or emitted by one of the consumers; which are all fed, then."""
        known = {topic.name for topic in self.sources} | set(self._owner)
        for consumer in self.in_order():
            missing = [topic.name for topic in consumer.topics if topic.name not in known]
            if not missing:
                continue
            if isinstance(consumer, Join):
                what = f"nothing leads to the parts {missing} of join {consumer.group!r}, so no key would be complete"
            elif len(missing) == len(consumer.topics):
                what = f"nothing leads to consumer {consumer.group!r}, which reads {missing}"
            else:
                what = f"nothing leads to the topics {missing}, which consumer {consumer.group!r} reads"
            sources = sorted(topic.name for topic in self.sources)
            raise EventDagError(
                f"event DAG {self.name!r}: {what}: none of its consumers emits that, and its sources are {sources}; "
                "add who emits it, or name it a source",
                group=consumer.group,
                topics=missing,
            )

    def outline(self) -> str:
        """The chain as lines of text, a consumer each: what it reads, and what it emits to."""
        sides = [
            (" + ".join(topic.name for topic in one.topics), one.group, " + ".join(topic.name for topic in one.emits))
            for one in self.in_order()
        ]
        wide, broad = (max(len(side[at]) for side in sides) for at in (0, 1))
        return "\n".join(
            f"{reads:<{wide}} -> {group:<{broad}} -> {emits}" if emits else f"{reads:<{wide}} -> {group}"
            for reads, group, emits in sides
        )

    def mermaid(self) -> str:
        """The chain as a Mermaid flowchart: topics round, consumers square, joins as hexagons."""
        nodes = _ids("t", (topic.name for topic in self.topics))
        boxes = _ids("c", (consumer.group for consumer in self.consumers))
        lines = ["flowchart LR"]
        lines += [f"    {nodes[topic.name]}([{topic.name}])" for topic in self.topics]
        for consumer in self.in_order():
            left, right = ("{{", "}}") if isinstance(consumer, Join) else ("[", "]")
            box = boxes[consumer.group]
            lines.append(f"    {box}{left}{consumer.group}{right}")
            lines += [f"    {nodes[topic.name]} --> {box}" for topic in consumer.topics]
            lines += [f"    {box} --> {nodes[topic.name]}" for topic in consumer.emits]
        return "\n".join(lines)


def _with_helpers(consumers: Sequence[Consumer]) -> Iterator[Consumer]:
    for consumer in consumers:
        yield from consumer.helpers
        yield consumer


def _topics_of(name: str, consumers: Sequence[Consumer], sources: Sequence[Topic]) -> dict[str, Topic]:
    named = [topic for consumer in consumers for topic in (*consumer.topics, *consumer.emits)]
    topics: dict[str, Topic] = {}
    for topic in (*named, *sources):
        if topics.setdefault(topic.name, topic) != topic:
            raise EventDagError(
                f"event DAG {name!r}: topic {topic.name!r} is declared twice and differently: {topics[topic.name]} "
                f"and {topic}; share one declaration",
                topic=topic.name,
            )
    return {topic.name: topic for topic in named}


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


def _ids(kind: str, names: Iterable[str]) -> dict[str, str]:
    """An identifier of Mermaid's for each name, no two alike."""
    ids: dict[str, str] = {}
    for name in names:
        wanted = found = f"{kind}_{name.translate(_MARKS)}"
        number = 1
        while found in ids.values():
            number += 1
            found = f"{wanted}_{number}"
        ids[name] = found
    return ids
