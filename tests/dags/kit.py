"""What the tests of event DAGs share: consumers made in one line."""

from collections.abc import Mapping, Sequence
from typing import Any

from djp_dagster import Batch, Consumer, Join, Joined, Topic, consumer, join


def topic(name: str, **settings: Any) -> Topic:
    return Topic(name, **{"key": "k", **settings})


def passing(group: str, reads: Sequence[Topic], emits: Sequence[Topic] = (), **settings: Any) -> Consumer:
    """A consumer that passes on what it reads, to all it emits to; what says so fails."""

    def handle(batch: Batch) -> None:
        for record in batch:
            if record.data.get("bad") == group:
                batch.fail(record, "bad")
                continue
            for target in emits:
                batch.emit(target.event(k=record.data["k"], n=record.data.get("n", 0)), topic=target, source=record)

    return consumer(topics=reads, emits=emits, group=group, **settings)(handle)


def meeting(group: str, inputs: Mapping[str, Any], emits: Sequence[Topic] = (), **settings: Any) -> Join:
    """A join that says that it is done."""

    def handle(parts: Joined) -> None:
        if parts.key == "broken":
            raise ValueError("broken")
        for target in emits:
            parts.emit(target.event(k=parts.key), topic=target)

    return join(inputs=inputs, key="k", emits=emits, group=group, **settings)(handle)
