"""What the consumers of the daemon tests do: wait while a test holds them, tell what they saw, pass it on.

Imported by the definitions files, so it runs in code servers and run processes. Tests speak to it by files in
``DJP_TEST_FOLDER``: while ``hold.<group>`` is there, a handler stays in its batch, and says so by ``held.<group>``.
"""

import os
import time
from pathlib import Path

import dagster as dg

import djp_dagster as djp

RUNNING = dg.DefaultSensorStatus.RUNNING


def folder() -> Path:
    """Where the test's stream and its words to the handlers lie."""
    return Path(os.environ["DJP_TEST_FOLDER"])


def done_topic(group: str) -> djp.Topic:
    """Where a group emits to."""
    return djp.Topic(f"{group}_done", partitions=2, key="user")


def relay(batch: djp.Batch, **facts: object) -> dict[str, object]:
    """Pass every record on; return where each was, and who did it when."""
    done = done_topic(batch.group)
    seen = []
    for record in batch:
        batch.emit(done.event(user=record.data["user"], n=record.data["n"]))
        seen.append([record.topic, record.partition, record.offset])
    wait_while_held(batch.group)
    return {"batch": batch.id, "reason": batch.reason, "seen": seen, "pid": os.getpid(), "at": time.time(), **facts}


def wait_while_held(group: str) -> None:
    """Stay here, and say so, as long as the test wants."""
    order = folder() / f"hold.{group}"
    if order.exists():
        (folder() / f"held.{group}").write_text(str(os.getpid()))
        while order.exists():
            time.sleep(0.02)


def make_consumer(group: str, topic: djp.Topic, **options: object) -> djp.Consumer:
    """A consumer of that group that relays."""
    return djp.consumer(topic=topic, group=group, emits=[done_topic(group)], **options)(relay)  # type: ignore[arg-type]
