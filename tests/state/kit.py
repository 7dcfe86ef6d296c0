"""What the tests of state share."""

import tempfile
from pathlib import Path
from typing import Any

from djp_dagster import EventStream, Topic
from djp_dagster.state.keys import decode_key
from djp_dagster.state.store import TaskStore
from djp_dagster.streams.records import TopicPartition, decode_value
from djp_dagster.streams.topics import changelog_of

CHANGELOG = TopicPartition("changes", 0)


def state_of(stream: EventStream, group: str, task: int = 0) -> dict[bytes, bytes]:
    """A task's state restored, on an empty disk, from what the stream has of it."""
    with tempfile.TemporaryDirectory() as folder:
        store = TaskStore(
            Path(folder) / "s.db",
            stream.log,
            TopicPartition(changelog_of(group), task),
            snapshots=lambda: stream.coordinator.snapshots(group, task),
            payloads=stream.payloads if stream.has_payloads else None,
        )
        try:
            store.catch_up()
            return dict(store.file.items())
        finally:
            store.close()


def values_of(stream: EventStream, group: str, task: int = 0) -> dict[object, Any]:
    """The same, decoded."""
    return {decode_key(key): decode_value(raw) for key, raw in state_of(stream, group, task).items()}


def store_in(stream: EventStream) -> TaskStore:
    """A store of a changelog of its own, in the folder of an in-memory stream."""
    stream.create_topic(Topic(CHANGELOG.topic))
    return TaskStore(Path(stream.payloads.objects.folder) / "state.db", stream.log, CHANGELOG)  # type: ignore[attr-defined]
