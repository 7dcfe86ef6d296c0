"""Faults of the place where a stream file lies, each made for real."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from djp_dagster.errors import (
    DjpError,
    StreamCorruptError,
    StreamFormatError,
    StreamNotWritableError,
    StreamReplacedError,
)
from djp_dagster.processing.batch import Batch
from djp_dagster.processing.consumer import consumer
from djp_dagster.processing.run import run_pending
from djp_dagster.streams.sql.schema import FORMAT_VERSION
from djp_dagster.streams.stream import EventStream, open_stream
from djp_dagster.streams.topics import Topic
from djp_dagster.testing import crash_at
from tests.faults.kit import ids, mounting, numbered, python, sources

NUMBERS = Topic("numbers")
COPIES = Topic("copies")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "stream.db"


def filled(path: Path, count: int = 10) -> EventStream:
    stream = open_stream(path)
    stream.create_topic(NUMBERS)
    stream.publish(NUMBERS, numbered(range(count)))
    return stream


@consumer(topic=NUMBERS, emits=[COPIES], stateful=True)
def counter(batch: Batch) -> None:
    for record in batch:
        total = batch.state.get("total", 0) + 1
        batch.state.set("total", total)
        batch.emit(COPIES.event(n=record.data["n"], total=total))


# No place to write


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StreamNotWritableError, match=r"'.*/missing' does not exist"):
        open_stream(tmp_path / "missing" / "stream.db")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_place_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(StreamNotWritableError, match="no regular file"):
        open_stream(tmp_path)


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StreamNotWritableError):
        open_stream(tmp_path / "file" / "stream.db")


@pytest.fixture
def common(seed: random.Random) -> Iterator[Path]:
    """A folder that others may enter, unlike pytest's."""
    folder = Path(tempfile.mkdtemp(prefix="djp-faults-"))
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


UNPRIVILEGED = """
import os, sys
from djp_dagster.errors import StreamNotWritableError
from djp_dagster.events import Event
from djp_dagster.streams.stream import open_stream
from djp_dagster.testing import memory_stream
from djp_dagster.streams.topics import Topic

with memory_stream() as warm:  # imports everything before this process may no longer read it
    warm.create_topic(Topic("numbers"))
    warm.publish("numbers", [Event(type="t", source="/t")])
if os.geteuid() == 0:
    import pwd
    nobody = pwd.getpwnam("nobody")
    os.setgroups([])
    os.setgid(nobody.pw_gid)
    os.setuid(nobody.pw_uid)
try:
    with open_stream(sys.argv[1]) as stream:
        stream.publish("numbers", [Event(type="t", source="/t")])
except StreamNotWritableError as error:
    print("refused:", error)
else:
    print("published")
"""


def test_a_folder_that_may_not_be_written(common: Path) -> None:
    common.chmod(0o555)
    said = python(UNPRIVILEGED, common / "stream.db")
    assert said.startswith("refused:")
    assert "writable for this user" in said


@pytest.mark.parametrize("folder_mode", [0o555, 0o777])
def test_a_file_that_may_not_be_written(common: Path, folder_mode: int) -> None:
    path = common / "stream.db"
    filled(path).close()
    path.chmod(0o444)
    common.chmod(folder_mode)
    said = python(UNPRIVILEGED, path)
    assert said.startswith("refused:")
    path.chmod(0o644)
    with open_stream(path) as stream:
        assert len(ids(stream, "numbers")) == 10


# Mounts


READ_ONLY = """
import subprocess, sys
from djp_dagster.errors import StreamNotWritableError
from djp_dagster.streams.stream import open_stream
from djp_dagster.streams.topics import Topic
from tests.faults.kit import numbered

folder = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "djp", folder], check=True)
with open_stream(folder + "/stream.db") as stream:
    stream.create_topic(Topic("numbers"))
    stream.publish("numbers", numbered(range(3)))
subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
try:
    with open_stream(folder + "/stream.db") as stream:
        stream.publish("numbers", numbered(range(3, 6)))
except StreamNotWritableError as error:
    print("refused:", error)
"""


def test_a_read_only_file_system(tmp_path: Path) -> None:
    if not mounting():
        pytest.skip("this machine lets nobody mount")
    assert python(READ_ONLY, tmp_path, prefix=mounting()).startswith("refused:")


DISK_FULL = """
# A full disk: a tmpfs of two megabytes, or (where nothing can be mounted) SQLite's own bound on the file's pages.
import contextlib, os, sqlite3, subprocess, sys, threading
import sqlalchemy as sa
from djp_dagster.claim_check.location import open_payload_store
from djp_dagster.errors import StreamFullError
from djp_dagster.processing.consumer import consumer
from djp_dagster.processing.run import run_pending
from djp_dagster.streams.stream import open_stream
from djp_dagster.streams.topics import Topic
from tests.faults.kit import eventually, ids, numbered, sources

folder, elsewhere, mounted = sys.argv[1], sys.argv[2], sys.argv[3] == "mounted"
if mounted:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "djp", folder], check=True)
else:
    limited, pages = [], [300]
    @sa.event.listens_for(sa.engine.Engine, "connect")
    def limit(connection, *_):
        limited.append(connection)
        connection.execute("PRAGMA max_page_count=%d" % pages[0])

numbers, copies = Topic("numbers"), Topic("copies")
stream = open_stream(folder + "/stream.db", payloads=open_payload_store(elsewhere + "/payloads"))
stream.create_topic(numbers)
filler = folder + "/filler"
if mounted:
    with open(filler, "wb") as file:
        file.write(b"x" * 900_000)

full = []
def fill(size):
    global acknowledged
    while True:
        try:
            stream.publish(numbers, numbered(range(acknowledged, acknowledged + 5), pad="x" * size))
        except StreamFullError as error:
            full.append(str(error))
            return
        acknowledged += 5

acknowledged = 0
for size in (2000, 200, 1):  # until not even the smallest fits
    fill(size)
assert acknowledged > 50 and "no space left" in full[0], (acknowledged, full)
assert sources(stream, "numbers") == list(range(acknowledged)), "an acknowledged event is missing"
with open_stream(folder + "/stream.db") as again:
    assert sources(again, "numbers") == list(range(acknowledged))

@consumer(topic=numbers, emits=[copies], stateful=True)
def copier(batch):
    for record in batch:
        batch.emit(copies.event(n=record.data["n"]))
        batch.state.set("seen", batch.state.get("seen", 0) + 1)
    return len(batch)

class Waits:  # told by the log that the run waits for space
    seen = threading.Event()
import logging
class Handler(logging.Handler):
    def emit(self, entry):
        if "no space left" in entry.getMessage():
            Waits.seen.set()
logging.getLogger("djp_dagster").addHandler(Handler())

def free():
    if mounted:
        os.unlink(filler)
    else:
        pages[0] = 100_000
        for connection in limited:
            with contextlib.suppress(sqlite3.ProgrammingError):  # closed meanwhile
                connection.execute("PRAGMA max_page_count=%d" % pages[0])

raised = []
def run():
    # A run that cannot even write down its group or its batch fails, saying so; one that has begun waits.
    from pathlib import Path
    while True:
        try:
            return run_pending(stream, copier, state_folder=Path(elsewhere) / "state")
        except StreamFullError:
            Waits.seen.set()
            gone.wait(0.05)
gone = threading.Event()
thread = threading.Thread(target=run)
thread.start()
assert Waits.seen.wait(30), "nobody noticed that the disk is full"
free()
gone.set()
thread.join(60)
assert not thread.is_alive()
assert sources(stream, "copies") == list(range(acknowledged)), "effects are not there exactly once"
assert sum(1 for _ in stream.outputs("copier")) == 1
stream.publish(numbers, numbered(range(acknowledged, acknowledged + 5)))
assert sources(stream, "numbers") == list(range(acknowledged + 5))
stream.close()
print("survived", acknowledged)
"""


def test_a_full_disk_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    full, elsewhere = tmp_path / "full", tmp_path / "elsewhere"
    full.mkdir()
    elsewhere.mkdir()
    mode = "mounted" if mounting() else "pages"
    assert "survived" in python(DISK_FULL, full, elsewhere, mode, prefix=mounting())


def test_a_full_database_file_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """The same on SQLite's own bound, which is what stands in for a small disk where nothing can be mounted."""
    (tmp_path / "full").mkdir()
    (tmp_path / "elsewhere").mkdir()
    assert "survived" in python(DISK_FULL, tmp_path / "full", tmp_path / "elsewhere", "pages")


# Another file, or half of one


def use_everything(path: Path) -> list[str]:
    """Open, read, publish, consume: what is there, or a typed error."""
    with open_stream(path) as stream:
        found = ids(stream, "numbers")
        stream.publish(NUMBERS, numbered([999]))
        run_pending(stream, counter, state_folder=path.parent / "state")
        return found


def test_a_truncated_file_is_an_error_never_a_shorter_stream(tmp_path: Path, seed: random.Random) -> None:
    path = tmp_path / "stream.db"
    with filled(path, 2000) as stream:
        for number in range(2000, 6000, 500):
            stream.publish(NUMBERS, numbered(range(number, number + 500)))
    size = path.stat().st_size
    whole = path.read_bytes()
    assert not Path(f"{path}-wal").exists()
    cuts = [1, 15, 16, 99, 100, 4095, 4096, size // 2, size - 4096, size - 1]
    for cut in [*cuts, *(seed.randrange(1, size) for _ in range(10))]:
        victim = tmp_path / f"{cut}.db"
        victim.write_bytes(whole[:cut])
        with pytest.raises((StreamCorruptError, StreamFormatError)) as caught:
            use_everything(victim)
        assert caught.value.facts["stream"], cut


def test_a_file_truncated_while_open(path: Path, seed: random.Random) -> None:
    with filled(path, 2000) as stream:
        for number in range(2000, 6000, 500):
            stream.publish(NUMBERS, numbered(range(number, number + 500)))
        with sqlite3.connect(path) as raw:
            raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        raw.close()
        os.truncate(path, path.stat().st_size // 3)
        with open_stream_or_error(path) as caught:
            stream.log.database.close()  # type: ignore[attr-defined]  # as a process that connects anew
            list(stream.records("numbers", 0))
        assert isinstance(caught[0], StreamCorruptError)


class open_stream_or_error:  # noqa: N801
    """Collects the typed error of the block; any other escapes."""

    def __init__(self, path: Path) -> None:
        self._caught: list[DjpError] = []

    def __enter__(self) -> list[DjpError]:
        return self._caught

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        assert error is not None, "no error at all"
        if isinstance(error, DjpError):
            self._caught.append(error)
        return isinstance(error, DjpError)


def test_an_emptied_file_is_another_stream_and_knows_no_topic(path: Path) -> None:
    with filled(path) as stream:
        before = stream.incarnation
    path.write_bytes(b"")
    with open_stream(path) as stream:
        assert stream.incarnation != before
        assert stream.topics() == []


@pytest.mark.parametrize("how", ["replaced", "removed"])
def test_a_file_swapped_while_open_is_not_written_to(tmp_path: Path, path: Path, how: str) -> None:
    with filled(path) as stream, filled(tmp_path / "other.db", 3) as other:
        run_pending(stream, counter, state_folder=tmp_path / "state")
        lease = stream.coordinator.acquire("counter", None, "me", 60)
        producer = stream.producer("p")
        other.close()
        if how == "replaced":
            (tmp_path / "other.db").rename(path)
            for suffix in ("-wal", "-shm"):
                Path(f"{path}{suffix}").unlink(missing_ok=True)
        else:
            path.unlink()
        for write in (
            lambda: stream.publish(NUMBERS, numbered([77])),
            lambda: producer.publish("numbers", numbered([77])),
            lambda: stream.coordinator.heartbeat([lease]),
            lambda: run_pending(stream, counter, state_folder=tmp_path / "state"),
        ):
            with pytest.raises(StreamReplacedError, match="restart the process") as caught:
                write()
            assert caught.value.facts["path"] == str(path)
    if how == "replaced":
        with open_stream(path) as new:
            assert len(ids(new, "numbers")) == 3


def test_a_file_swapped_in_the_middle_of_a_batch(tmp_path: Path, path: Path) -> None:
    filled(tmp_path / "other.db", 3).close()

    @consumer(topic=NUMBERS, emits=[COPIES])
    def swapper(batch: Batch) -> None:
        for record in batch:
            batch.emit(COPIES.event(n=record.data["n"]))
        (tmp_path / "other.db").replace(path)

    with filled(path) as stream, pytest.raises(StreamReplacedError):
        run_pending(stream, swapper)
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    with open_stream(path) as new:
        assert [info.name for info in new.topics()] == ["numbers"]


# Local state that is not of this stream


def state_file(stream: EventStream, folder: Path) -> Path:
    return folder / stream.incarnation[:12] / "counter" / "0.db"


def totals(stream: EventStream) -> list[int]:
    return [record.data["total"] for record in stream.records("copies", 0)]


def test_local_state_of_another_stream_is_discarded_and_restored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "state"
    with filled(tmp_path / "a.db", 50) as a, filled(tmp_path / "b.db", 7) as b:
        for stream in (a, b):
            run_pending(stream, counter, state_folder=folder)
        shutil.copyfile(state_file(a, folder), state_file(b, folder))
        b.publish(NUMBERS, numbered(range(7, 10)))
        run_pending(b, counter, state_folder=folder)
        assert "discarded and restored" in caplog.text
        assert totals(b) == list(range(1, 11))


@pytest.mark.parametrize("damage", ["lost", "behind", "ahead", "garbage", "truncated"])
def test_local_state_is_only_a_cache(tmp_path: Path, path: Path, damage: str) -> None:
    folder = tmp_path / "state"
    with filled(path) as stream:
        run_pending(stream, counter, state_folder=folder)
        local = state_file(stream, folder)
        behind = local.read_bytes()
        stream.publish(NUMBERS, numbered(range(10, 15)))
        run_pending(stream, counter, state_folder=folder)
        if damage == "lost":
            shutil.rmtree(folder)
        elif damage == "behind":
            local.write_bytes(behind)
        elif damage == "ahead":
            with sqlite3.connect(local) as raw:
                raw.execute("UPDATE lineage SET changelog_offset = 1000")
                raw.execute("DELETE FROM kv")
            raw.close()
        elif damage == "garbage":
            local.write_bytes(os.urandom(8192))
        else:
            os.truncate(local, local.stat().st_size // 2)
        stream.publish(NUMBERS, numbered(range(15, 20)))
        run_pending(stream, counter, state_folder=folder)
        assert totals(stream) == list(range(1, 21))


def test_a_state_that_was_not_applied_catches_up(tmp_path: Path, path: Path) -> None:
    folder = tmp_path / "state"
    with filled(path) as stream:
        with crash_at("6.committed", KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
            run_pending(stream, counter, state_folder=folder)
        stream.publish(NUMBERS, numbered(range(10, 15)))
        run_pending(stream, counter, state_folder=folder)
        assert totals(stream) == list(range(1, 16))
        assert sources(stream, "copies") == list(range(15))


# Opened twice


def test_what_is_published_after_the_stream_was_opened_twice_is_there_for_other_processes(path: Path) -> None:
    """Closing a file drops the locks that the process has on it; unlocked, its log would go with who closes next."""
    look = (
        "import sys; from djp_dagster import open_stream\n"
        "with open_stream(sys.argv[1]) as stream: print(*(span.end for span in stream.log.spans(['numbers']).values()))"
    )
    with filled(path, 10) as stream:
        open_stream(path).close()
        for published in (10, 20):
            assert python(look, path).split() == [str(published)]
            stream.publish(NUMBERS, numbered(range(published, published + 10)))


# Not a stream


@pytest.mark.parametrize("content", [b"hello\n", b"\0" * 5000, b"SQLite format 2\0" + b"x" * 5000])
def test_a_file_of_something_else_is_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(StreamFormatError, match="not a stream file"):
        open_stream(path)
    assert path.read_bytes() == content


def test_a_database_of_something_else_is_left_alone(path: Path) -> None:
    with sqlite3.connect(path) as raw:
        raw.execute("CREATE TABLE customers (name TEXT)")
    raw.close()
    with pytest.raises(StreamFormatError, match="customers"):
        open_stream(path)
    with sqlite3.connect(path) as raw:
        assert raw.execute("SELECT name FROM sqlite_master").fetchall() == [("customers",)]
    raw.close()


@pytest.mark.parametrize(
    ("version", "remedy"),
    [(str(FORMAT_VERSION + 1), "upgrade djp-dagster"), ("0", "the release that wrote it"), ("x", "that wrote it")],
)
def test_another_format_version_is_left_alone(path: Path, version: str, remedy: str) -> None:
    filled(path).close()
    with sqlite3.connect(path) as raw:
        raw.execute("UPDATE djp_meta SET value = ? WHERE key = 'format_version'", (version,))
    raw.close()
    with pytest.raises(StreamFormatError, match=remedy) as caught:
        open_stream(path)
    assert (caught.value.facts["found"], caught.value.facts["supported"]) == (version, FORMAT_VERSION)
