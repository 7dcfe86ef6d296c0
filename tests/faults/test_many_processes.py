"""Eight processes append while four consume the same file; looked at from outside, every effect is there once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from djp_dagster.streams.stream import open_stream
from tests.faults.kit import REPOSITORY, eventually
from tests.faults.many import INPUT, OUTPUT, follow

WRITERS, WORKERS = 8, 4


@contextmanager
def family(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """The script of `tests.faults.many` in a process group of its own, which does not outlive the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.many", *map(str, arguments)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("seconds", [4, pytest.param(120, marks=[pytest.mark.soak, pytest.mark.timeout(600)])])
def test_eight_append_while_four_consume(tmp_path: Path, seed: random.Random, seconds: float) -> None:
    with open_stream(tmp_path / "stream.db") as stream:
        follow.register(stream)
        with family(tmp_path, WRITERS, WORKERS, seed.randrange(1 << 30), seconds) as process:
            assert process.stdout is not None
            working = json.loads(process.stdout.readline())
            written = [tmp_path / f"writer-{number}.json" for number in range(WRITERS)]
            eventually(
                lambda: all(file.exists() for file in written) or process.poll() is not None, within_s=seconds + 120
            )
            eventually(
                lambda: stream.pending("follow").events == 0 or process.poll() is not None, within_s=seconds + 120
            )
            if process.poll() is None:
                for pid in working:
                    os.kill(pid, signal.SIGTERM)
            _, complaints = process.communicate(timeout=60)
            assert process.returncode == 0, complaints
        counts: dict[str, int] = {}
        for file in written:
            counts.update(json.loads(file.read_text()))
        total = sum(counts.values())
        assert total > 100
        assert sum(json.loads((tmp_path / f"worker-{n}.json").read_text()) for n in range(WORKERS)) == total
        assert stream.dead_letters("follow") == []
        for topic in (INPUT, OUTPUT):
            seen: dict[str, list[int]] = {}
            ids = set()
            for partition in range(topic.partitions):
                for record in stream.records(topic, partition):
                    seen.setdefault(record.data["key"], []).append(record.data["count"])
                    ids.add(record.id)
            assert seen == {key: list(range(1, count + 1)) for key, count in counts.items()}, topic.name
            assert len(ids) == total
        assert stream.positions("follow") == {at: span.end for at, span in stream.log.spans(["input"]).items()}
        assert stream.coordinator.acquire("follow", None, "looking", 60).intents == ()
