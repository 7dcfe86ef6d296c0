"""What the tests of state share."""

import tempfile
from pathlib import Path

from djp_dagster import EventStream
from djp_dagster.state.store import TaskStore
from djp_dagster.streams.records import TopicPartition
from djp_dagster.streams.topics import changelog_of


def state_of(stream: EventStream, group: str, task: int = 0) -> dict[bytes, bytes]:
    """A task's state restored from its changelog alone."""
    with tempfile.TemporaryDirectory() as folder:
        store = TaskStore(Path(folder) / "s.db", stream.log, TopicPartition(changelog_of(group), task))
        try:
            store.catch_up()
            return dict(store.file.items())
        finally:
            store.close()
