"""The processes of `test_many_processes`: run as a script, it forks writers and workers and waits for them.

They are forked from one process that has everything imported, because importing it twelve times would be half of the
test's time. Each opens the stream for itself.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from djp_dagster.events import Event
from djp_dagster.processing.batch import Batch
from djp_dagster.processing.consumer import consumer
from djp_dagster.processing.reports import BatchReport
from djp_dagster.processing.threshold import Threshold
from djp_dagster.processing.worker import Worker
from djp_dagster.streams.stream import open_stream
from djp_dagster.streams.topics import Topic

KEYS = 5
INPUT = Topic("input", partitions=8, key="key")
OUTPUT = Topic("output", partitions=8, key="key")


@consumer(topic=INPUT, emits=[OUTPUT], stateful=True, max_batch=Threshold(events=1000), code_version="1")
def follow(batch: Batch) -> None:
    """Emit every event, and fail if it does not follow what the state says of its key."""
    for record in batch:
        key, count = record.data["key"], record.data["count"]
        before = batch.state.get(key, 0)
        if before != count - 1:
            raise RuntimeError(f"{key}: {count} follows {before}")
        batch.state.set(key, count)
        batch.emit(OUTPUT.event(key=key, count=count))


def write(folder: Path, writer: int, seed: int, seconds: float) -> dict[str, int]:
    """Publish for some seconds; how many events of each key were acknowledged."""
    chance = random.Random(seed)
    counts: dict[str, int] = {}
    with open_stream(folder / "stream.db") as stream:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            events = []
            for _ in range(chance.randint(1, 40)):
                key = f"w{writer}-k{chance.randrange(KEYS)}"
                counts[key] = counts.get(key, 0) + 1
                events.append(Event(type="t", source="/t", data={"key": key, "count": counts[key]}))
            stream.publish(INPUT, events)
            time.sleep(chance.uniform(0, 0.03))
    return counts


def work(folder: Path) -> int:
    """Work until SIGTERM; how many events were in the batches reported."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    reports: list[BatchReport] = []
    with open_stream(folder / "stream.db") as stream:
        Worker(stream, [follow], state_folder=folder / "state", lease=2.0, on_report=reports.append).run(stop)
    return sum(report.events for report in reports)


def fork(result: Path, job: Callable[[], object]) -> int:
    """The id of a child that does the job and leaves its result in the file, whole or not at all."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        half = result.with_suffix(".half")
        half.write_text(json.dumps(job()))
        half.rename(result)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main(folder: Path, writers: int, workers: int, seed: int, seconds: float) -> int:
    """Start all of them, say who works, and wait; 1 if any failed."""
    working = [fork(folder / f"worker-{n}.json", lambda: work(folder)) for n in range(workers)]
    writing = [
        fork(folder / f"writer-{n}.json", lambda n=n: write(folder, n, seed + n, seconds))  # type: ignore[misc]
        for n in range(writers)
    ]
    print(json.dumps(working), flush=True)
    return max(int(os.waitpid(pid, 0)[1] != 0) for pid in (*writing, *working))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])))
