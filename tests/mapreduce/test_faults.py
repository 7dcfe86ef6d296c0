"""What fails alone is done again alone, and counts once; what cannot succeed says so."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import djp_dagster as djp
from djp_dagster.errors import (
    BadRecordsError,
    InvalidSettingError,
    InvalidValueError,
    MapReduceFailedError,
    PayloadCorruptError,
    TransientError,
    WorkerDiedError,
)
from djp_dagster.mapreduce.engines.base import Attempt, Done
from djp_dagster.mapreduce.engines.inline import Inline
from tests.faults.kit import mounting, python
from tests.mapreduce.kit import counted, killing, once, text_of, until, words

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def lines(seed: random.Random) -> list[str]:
    return text_of(seed, 4000)


@pytest.fixture
def source(tmp_path: Path, lines: list[str]) -> djp.TextFiles:
    (tmp_path / "input.txt").write_text("\n".join(lines) + "\n")
    return djp.TextFiles(tmp_path / "input.txt", split_bytes=20_000)


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    (tmp_path / "marks").mkdir()
    return tmp_path / "marks"


@pytest.fixture
def durable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small jobs are gone on with, too."""
    monkeypatch.setattr("djp_dagster.mapreduce.running._SMALL_BYTES", 0)


class TestAgain:
    @pytest.mark.parametrize("deaths", [1, 3])
    def test_a_process_that_is_killed(self, source: djp.TextFiles, lines: list[str], marks: Path, deaths: int) -> None:
        target = next(line for line in lines if line)
        mapper = killing(marks, lambda line: line == target, deaths)
        result = djp.map_reduce(mapper, source, combine=djp.Sum(), engine=djp.Processes(2))
        assert result.to_dict() == counted(lines)
        assert result.report.lost == deaths

    def test_a_process_that_always_dies(self, source: djp.TextFiles, lines: list[str], marks: Path) -> None:
        target = lines[-1]
        mapper = killing(marks, lambda line: line == target, 1000)
        with pytest.raises(WorkerDiedError, match=r"tried 3 times.*ended by SIGKILL") as caught:
            djp.map_reduce(mapper, source, combine=djp.Sum(), engine=djp.Processes(2), max_attempts=3)
        assert caught.value.transient
        assert caught.value.facts["subject"].endswith("input.txt")

    def test_one_that_stands_still(self, source: djp.TextFiles, lines: list[str], marks: Path) -> None:
        target = next(line for line in lines if line)

        def mapper(line: str) -> Any:
            if line == target and once(marks, "hang"):
                time.sleep(600)
            return [(word, 1) for word in line.split()]

        result = djp.map_reduce(mapper, source, combine=djp.Sum(), engine=djp.Processes(1), stalled_after=2)
        assert result.to_dict() == counted(lines)
        assert result.report.lost == 1

    def test_a_straggler_gets_company(self, source: djp.TextFiles, lines: list[str], marks: Path) -> None:
        """A task that takes for ever in one process: another attempt ends first, and counts."""
        target = next(line for line in lines if line)

        def mapper(line: str, task: djp.MapTask) -> Any:
            task.count("lines")
            if line == target and once(marks, "slow"):
                time.sleep(600)
            return [(word, 1) for word in line.split()]

        result = djp.map_reduce(mapper, source, combine=djp.Sum(), engine=djp.Processes(2))
        assert result.to_dict() == counted(lines)
        assert (result.report.duplicates, result.report.lost) == (1, 0)
        assert result.report.counters == {"lines": result.report.records}

    @pytest.mark.parametrize("engine", ["inline", "processes"])
    def test_an_exception_must_repeat(self, source: djp.TextFiles, lines: list[str], marks: Path, engine: str) -> None:
        def mapper(line: str) -> Any:
            if once(marks, "raise"):
                raise KeyError("only once")
            return [(word, 1) for word in line.split()]

        result = djp.map_reduce(mapper, source, combine=djp.Sum(), engine=engine)
        assert result.to_dict() == counted(lines)
        assert result.report.raised == 1

    @pytest.mark.parametrize("engine", ["inline", "processes"])
    @pytest.mark.parametrize("error", [ConnectionResetError("away"), TransientError("away")])
    def test_an_outage_is_waited_for(
        self, source: djp.TextFiles, lines: list[str], marks: Path, engine: str, error: Exception
    ) -> None:
        def mapper(line: str) -> Any:
            if any(once(marks, f"away-{number}") for number in range(3)):
                raise error
            return [(word, 1) for word in line.split()]

        result = djp.map_reduce(mapper, source, combine=djp.Sum(), engine=engine, max_bad_fraction=0.5)
        assert result.to_dict() == counted(lines)
        assert (result.report.raised, result.report.bad_records) == (3, 0)

    def test_finished_twice_counts_once(self, source: djp.TextFiles, lines: list[str]) -> None:
        """An engine that tells of each attempt twice, and has made it twice."""

        class Twice(Inline):
            def news(self, timeout_s: float) -> Any:
                told = list(super().news(timeout_s))
                done = [one for one in told if isinstance(one, Done)]
                for one in done:
                    again = Attempt(one.attempt.task, one.attempt.number)
                    self.submit(again)
                    told += super().news(timeout_s)
                return told

        def mapper(line: str, task: djp.MapTask) -> Any:
            task.count("lines")
            return [(word, 1) for word in line.split()]

        result = djp.map_reduce(mapper, source, combine=djp.Sum(), engine=Twice())
        assert result.to_dict() == counted(lines)
        assert result.report.counters == {"lines": result.report.records}


class TestForGood:
    @pytest.mark.parametrize("engine", ["inline", "processes"])
    def test_a_reducer_that_raises(self, source: djp.TextFiles, engine: str) -> None:
        def reducer(key: str, values: Iterator[int]) -> int:
            raise LookupError(f"no {len(key)}")

        with pytest.raises(
            MapReduceFailedError, match=r"reduce-0000. of 'words'.*raised LookupError each of 2"
        ) as caught:
            djp.map_reduce(words, source, reduce=reducer, engine=engine)
        assert isinstance(caught.value.__cause__, LookupError)
        assert "in reducer" in str(caught.value.__cause__.__cause__)

    @pytest.mark.parametrize("engine", ["inline", "processes"])
    def test_a_mapper_that_raises(self, source: djp.TextFiles, lines: list[str], engine: str) -> None:
        target = next(line for line in lines[2000:] if line)
        text = "\n".join(lines)

        def mapper(line: str) -> Any:
            if line == target:
                raise LookupError("this one")
            return [(word, 1) for word in line.split()]

        with pytest.raises(BadRecordsError, match="LookupError: this one; correct") as caught:
            djp.map_reduce(mapper, source, combine=djp.Sum(), engine=engine)
        position = caught.value.facts["position"]
        assert text.encode()[position:].decode().startswith(target)
        assert target not in str(caught.value)

    @pytest.mark.parametrize(
        ("gives", "message"),
        [
            (5, "'int' object is not iterable"),
            ([5], "must yield pairs"),
            ([(1, 2, 3)], "must yield pairs"),
            ([([1], 2)], "a key of a map-reduce must be"),
            ([(1.5, 1), (float("nan"), 1)], "must be None, bool"),
            ([(object(), 1)], "must be None, bool"),
            ([("a", object())], "cannot take the values|plain data|unsupported operand"),
        ],
    )
    @pytest.mark.parametrize("how", ["combine", "reduce"])
    def test_a_mapper_that_gives_something_else(self, gives: Any, message: str, how: str) -> None:
        with pytest.raises((InvalidValueError, BadRecordsError, MapReduceFailedError), match=message):
            djp.map_reduce(
                lambda item: gives,
                djp.Items([1, 2]),
                **{"combine": djp.Sum()} if how == "combine" else {"reduce": lambda key, values: list(values)},
            )

    def test_what_cannot_be_sent_is_said(self, source: djp.TextFiles) -> None:
        import threading

        lock = threading.Lock()
        with pytest.raises(InvalidSettingError, match="cannot be sent to another process"):
            djp.map_reduce(lambda line: [(str(lock), 1)], source, combine=djp.Sum(), engine="processes")

    def test_nothing_is_left_of_a_job_that_failed(self, source: djp.TextFiles, tmp_path: Path) -> None:
        def mapper(line: str) -> Any:
            raise LookupError

        temp = tmp_path / "temp"
        temp.mkdir()
        before = children()
        with pytest.raises(BadRecordsError):
            djp.map_reduce(mapper, source, combine=djp.Sum(), engine="processes", temp_folder=temp)
        assert list(temp.iterdir()) == []
        until(lambda: children() <= before)


def children() -> set[int]:
    """The worker processes of this one."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == os.getpid():
            found.add(int(status.parent.name))
    return found


CHILD = """
import sys
import djp_dagster as djp
from tests.mapreduce.test_faults import slow_after
djp.map_reduce(
    slow_after(sys.argv[2]), djp.TextFiles(sys.argv[1], split_bytes=20_000), combine=djp.Sum(),
    engine=djp.Processes(2), work=sys.argv[3] or None, temp_folder=sys.argv[4],
)
"""


def slow_after(folder: str) -> Any:
    """`words` for as many blocks as a file beside the folder says, then it waits; and says that it does."""

    def mapper(block: bytes) -> Any:
        calls = int(Path(f"{folder}-calls").read_text())
        if not any(once(Path(folder), f"call-{number}") for number in range(calls)):
            (Path(folder) / f"waiting-{os.getpid()}").touch()
            time.sleep(600)
        found: dict[str, int] = {}
        for word in block.decode().split():
            found[word] = found.get(word, 0) + 1
        return found

    return mapper


class TestKilled:
    """The process that runs a job is killed."""

    @pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
    def test_its_workers_end(self, source: djp.TextFiles, marks: Path, tmp_path: Path, how: signal.Signals) -> None:
        code = CHILD.replace("combine=djp.Sum()", "combine=djp.Sum(), batch=True")
        temp = tmp_path / "temp"
        temp.mkdir()
        Path(f"{marks}-calls").write_text("2")
        arguments = [source.paths[0], str(marks), "", str(temp)]
        process = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=REPOSITORY)
        try:
            until(lambda: len(list(marks.glob("waiting-*"))) == 2)
            workers = [int(path.name.partition("-")[2]) for path in marks.glob("waiting-*")]
            process.send_signal(how)
            process.wait(30)
            until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), within_s=10)
        finally:
            process.kill()

    def test_the_same_job_goes_on(
        self, source: djp.TextFiles, lines: list[str], marks: Path, tmp_path: Path, durable: None
    ) -> None:
        """What was committed is not mapped again; what was not, is."""
        work, temp = tmp_path / "work", tmp_path / "temp"
        temp.mkdir()
        code = ("import djp_dagster.mapreduce.running as running\nrunning._SMALL_BYTES = 0\n" + CHILD).replace(
            "combine=djp.Sum()", "combine=djp.Sum(), batch=True, reducers=2"
        )
        Path(f"{marks}-calls").write_text("5")
        arguments = [source.paths[0], str(marks), str(work), str(temp)]
        process = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=REPOSITORY)
        try:
            until(lambda: len(list(marks.glob("waiting-*"))) == 2)
            until(lambda: len(list(work.rglob("committed/map-*"))) == 5)
        finally:
            process.kill()
            process.wait(30)
        total = len(source.plan())
        for path in marks.glob("*"):
            path.unlink()
        Path(f"{marks}-calls").write_text("1000000")
        with djp.map_reduce(
            slow_after(str(marks)), source, combine=djp.Sum(), batch=True, reducers=2, engine="inline", work=work
        ) as result:
            assert result.to_dict() == counted(lines)
            assert result.report.resumed == 5
            assert len(list(marks.glob("call-*"))) == total - 5
            assert (result.report.map_tasks, result.report.reduce_tasks) == (total, 2)
        assert not [path for path in work.rglob("*") if path.is_file() and not path.name.startswith(".")]

    def test_what_is_gone_is_made_again(
        self, source: djp.TextFiles, lines: list[str], tmp_path: Path, durable: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Answers whose runs are not there any more, or whose input is another: nobody relies on them."""
        monkeypatch.setattr("djp_dagster.mapreduce.place._INLINE_BYTES", 10)
        work = tmp_path / "work"

        def run() -> djp.MapReduceResult:
            return djp.map_reduce(words, source, combine=djp.Sum(), reducers=2, engine="inline", work=work)

        first = run()
        commits = sorted(work.rglob("committed/map-*"))
        runs = sorted(work.rglob("map-*/*/*.arrow"))
        assert len(commits) == len(source.plan())
        runs[0].unlink()
        again = run()
        assert again.report.resumed == len(commits) + 2 - 1
        assert again.to_dict() == first.to_dict() == counted(lines)
        (tmp_path / "input.txt").write_text("\n".join(lines))
        assert run().report.resumed == 0

    def test_a_run_that_was_changed_is_noticed(
        self, source: djp.TextFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("djp_dagster.mapreduce.place._INLINE_BYTES", 10)
        work = tmp_path / "work"

        class Damaging(Inline):
            def submit(self, attempt: Attempt) -> None:
                if not attempt.task.is_map:
                    (path, *_) = sorted(work.rglob("map-*/*/*.arrow"))
                    raw = bytearray(path.read_bytes())
                    raw[len(raw) // 2] ^= 1
                    path.write_bytes(raw)
                super().submit(attempt)

        with pytest.raises(PayloadCorruptError, match="map-"):
            djp.map_reduce(words, source, combine=djp.Sum(), engine=Damaging(), work=work)


FULL = """
import os, subprocess, sys
import djp_dagster as djp
from djp_dagster.errors import ShuffleSpaceError
from tests.mapreduce.kit import words

folder, engine = sys.argv[1], sys.argv[3]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "djp", folder], check=True)
source = djp.TextFiles(sys.argv[2], split_bytes="2MiB")
try:
    djp.map_reduce(words, source, combine=djp.Sum(), engine=engine, temp_folder=folder, memory="1MiB")
except ShuffleSpaceError as error:
    assert folder in error.facts["folder"], error.facts
    print("full:", error, os.listdir(folder))
"""


class TestSpace:
    @pytest.mark.parametrize("engine", ["inline", "processes"])
    def test_no_space_is_named_and_nothing_is_left(self, tmp_path: Path, seed: random.Random, engine: str) -> None:
        if not mounting():
            pytest.skip("this machine lets nobody mount")
        (tmp_path / "small").mkdir()
        (tmp_path / "input").write_text("\n".join(f"{seed.randrange(10**9)}" for _ in range(400_000)))
        told = python(FULL, tmp_path / "small", tmp_path / "input", engine, prefix=mounting())
        assert told.startswith("full: no space left in")
        assert told.endswith(" []\n")
