"""A damaged state file is noticed, whichever byte is wrong: state is never read wrongly, and no record is blamed."""

import contextlib
import random
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from djp_dagster import Batch, Consumer, Event, EventStream, Topic, consumer, run_pending
from djp_dagster.errors import StateMismatchError, StreamBusyError
from djp_dagster.state.file import StateFile, remove
from djp_dagster.state.store import TaskStore
from djp_dagster.streams.records import TopicPartition
from djp_dagster.streams.topics import changelog_of
from djp_dagster.testing import memory_stream
from tests.processing.kit import at
from tests.state.kit import CHANGELOG, store_in, values_of
from tests.state.test_store import write

VISITS = Topic("visits", key="user")
ROWS = [(b"key %06d" % number, b"value %d " % number * 3) for number in range(3000)]


def visits(rng: random.Random, count: int, users: int) -> list[Event]:
    return [VISITS.event(user=rng.randrange(users)) for _ in range(count)]


@consumer(topic=VISITS, stateful=True, group="by_batch", snapshots=None)
def by_batch(batch: Batch) -> None:
    """Reads one by one, and whole ranges."""
    for record in batch:
        _visit(batch, record.data["user"])
    batch.state.set("users", sum(1 for _ in batch.state.items(prefix=("visits",))))
    batch.state.set("small", [value for _, value in batch.state.items(start=("visits", 3), stop=("visits", 9))])


@consumer(topic=VISITS, stateful=True, group="by_event", isolate="per_event", snapshots=None)
def by_event(record: Event, batch: Batch) -> None:
    """Whatever it raises is blamed on the record."""
    _visit(batch, record.data["user"])


def _visit(batch: Batch, user: int) -> None:
    key = ("visits", user)
    if user % 7 == 0 and batch.state.get(key, 0) == 3:
        batch.state.delete(key)
    else:
        batch.state.set(key, batch.state.get(key, 0) + 1)


def flip(path: Path, rng: random.Random, *, within: int | None = None) -> None:
    """Change one byte of a file, anywhere (or within its first bytes)."""
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content) if within is None else min(within, len(content)))
    content[place] ^= rng.randrange(1, 256)
    path.write_bytes(content)


@pytest.mark.parametrize(("users", "within"), [(600, None), (20, None), (60, 4096)], ids=["large", "small", "header"])
@pytest.mark.parametrize("handler", [by_batch, by_event], ids=["batch", "event"])
@pytest.mark.parametrize("closed", [True, False], ids=["closed", "killed"])
def test_whichever_bytes_are_damaged_the_state_is_that_of_an_undamaged_run(
    closed: bool, handler: Consumer, users: int, within: int | None, seed: random.Random, tmp_path: Path
) -> None:
    """Any number of bytes of a file that was closed; one of a file whose process was killed, and could not seal it."""
    with memory_stream() as stream, memory_stream() as golden:
        for one in (stream, golden):
            handler.register(one)
        for number in range(20):
            events = visits(seed, 1500 if number == 0 else 15, users)
            for one, folder in ((stream, "damaged"), (golden, "golden")):
                one.publish(VISITS, events)
                run_pending(one, handler, state_folder=tmp_path / folder)
            assert values_of(stream, handler.group) == values_of(golden, handler.group), number
            (file,) = (tmp_path / "damaged").rglob("0.db")
            if closed:
                for _ in range(seed.randrange(1, 4)):
                    flip(file, seed, within=within)
            else:
                restored(stream, handler, file)
                flip(file, seed, within=within)
        assert stream.dead_letters(handler.group, status=None) == []


def restored(stream: EventStream, handler: Consumer, file: Path) -> None:
    """A new file, without the damage that nobody has come past; its process is killed."""
    remove(file)
    store = TaskStore(file, stream.log, TopicPartition(changelog_of(handler.group), 0))
    store.catch_up()
    store.file.close()
    assert not Path(f"{file}.sum").exists()


def _is_of_a_format_that_can_only_be_read(content: bytearray) -> None:
    content[18] = 9


@pytest.mark.parametrize("damage", [_is_of_a_format_that_can_only_be_read, bytearray.reverse, bytearray.clear])
def test_a_file_that_cannot_be_opened_is_restored(damage: Callable[[bytearray], None], tmp_path: Path) -> None:
    with memory_stream() as stream:
        by_batch.register(stream)
        for expected in (1, 2):
            stream.publish(VISITS, [VISITS.event(user=1)])
            run_pending(stream, by_batch, state_folder=tmp_path)
            assert values_of(stream, "by_batch")["visits", 1] == expected
            (file,) = tmp_path.rglob("0.db")
            content = bytearray(file.read_bytes())
            damage(content)
            file.write_bytes(content)


class TestWhatIsRead:
    """Of a closed file of some pages: right, or `StateMismatchError`."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "state.db"
        with contextlib.closing(StateFile(path, "lineage", "a changelog")) as file:
            file.apply(ROWS, 0, len(ROWS))
            file.apply([(key, None) for key, _ in ROWS[::10]], len(ROWS), 4000)
        return path

    @staticmethod
    def read(path: Path, rng: random.Random, read: Callable[[StateFile, random.Random], object]) -> object:
        with contextlib.closing(StateFile(path, "lineage", "a changelog")) as file:
            return file.standing(), read(file, rng)

    @staticmethod
    def _one_by_one(file: StateFile, rng: random.Random) -> object:
        return [file.get(key) for key, _ in rng.sample(ROWS, 400)]

    @staticmethod
    def _at_once(file: StateFile, rng: random.Random) -> object:
        return file.get_many([key for key, _ in rng.sample(ROWS, 1200)])

    @staticmethod
    def _a_range(file: StateFile, rng: random.Random) -> object:
        low, high = sorted(key for key, _ in rng.sample(ROWS, 2))
        return list(file.items(low, high))

    @staticmethod
    def _all(file: StateFile, rng: random.Random) -> object:
        return list(file.items())

    @pytest.mark.parametrize("name", ["_one_by_one", "_at_once", "_a_range", "_all"])
    def test_is_right_or_noticed(self, path: Path, name: str, seed: random.Random) -> None:
        whole, noticed = path.read_bytes(), 0
        for _ in range(60):
            choice = seed.random()
            expected = self.read(path, random.Random(choice), getattr(self, name))
            flip(path, seed)
            try:
                assert self.read(path, random.Random(choice), getattr(self, name)) == expected
            except StateMismatchError as error:
                assert error.transient
                noticed += 1
            remove(path)
            path.write_bytes(whole)
        assert noticed > 10 or name != "_all"  # the other looks may well come past nothing that is damaged

    def test_a_key_that_lost_its_value_is_noticed(self, path: Path) -> None:
        db = sqlite3.connect(path)
        db.execute("PRAGMA writable_schema = ON")
        root = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'kv_keys'").fetchone()[0]
        # The index becomes somebody else's; what is deleted now stays in it.
        db.execute(
            "UPDATE sqlite_master SET sql = 'CREATE TABLE other (key BLOB PRIMARY KEY) WITHOUT ROWID', "
            "type = 'table', name = 'other', tbl_name = 'other' WHERE name = 'kv_keys'"
        )
        db.commit()
        db.close()
        db = sqlite3.connect(path)
        db.execute("DELETE FROM kv WHERE key = ?", (ROWS[1001][0],))
        db.execute("PRAGMA writable_schema = ON")
        db.execute(
            "UPDATE sqlite_master SET sql = 'CREATE INDEX kv_keys ON kv (key)', type = 'index', "
            "name = 'kv_keys', tbl_name = 'kv' WHERE rootpage = ?",
            (root,),
        )
        db.commit()
        db.close()
        with contextlib.closing(StateFile(path, "lineage", "a changelog")) as file:
            looks: list[Callable[[], Any]] = [
                lambda: file.get(ROWS[1001][0]),
                lambda: file.get_many([key for key, _ in ROWS]),
                lambda: list(file.items(ROWS[1000][0], ROWS[1003][0])),
                lambda: list(file.items()),
            ]
            for look in looks:
                with pytest.raises(StateMismatchError):
                    look()
            assert file.get(ROWS[1002][0]) == ROWS[1002][1]
            assert list(file.items(ROWS[1002][0], ROWS[1003][0])) == [ROWS[1002]]


def test_what_one_process_writes_between_two_looks_of_another_is_no_damage(tmp_path: Path) -> None:
    """The index is asked after the values; a key that came between them must not be taken for a lost one."""
    path, stop = tmp_path / "state.db", threading.Event()
    writer = StateFile(path, "lineage", "a changelog")
    reader = StateFile(path, "lineage", "a changelog")

    def write() -> None:
        offset = 0
        while not stop.is_set():
            for value in (b"v", None):
                writer.apply([(key, value) for key, _ in ROWS[:50]], offset, offset + 50)
                offset += 50

    thread = threading.Thread(target=write)
    thread.start()
    try:
        while reader.offset < 5_000:
            assert set(reader.get_many([key for key, _ in ROWS[:50]]).values()) <= {b"v"}
            assert reader.get(ROWS[7][0]) in (b"v", None)
            assert len(list(reader.items())) in (0, 50)
    finally:
        stop.set()
        thread.join()
        writer.close()
        reader.close()


class TestSeals:
    """A checksum of the whole file, for as long as nobody has it open."""

    @pytest.fixture
    def stream(self) -> Iterator[EventStream]:
        with memory_stream() as opened:
            yield opened

    @staticmethod
    def is_sealed(store: TaskStore) -> bool:
        return Path(f"{store.file.path}.sum").exists()

    def test_the_last_who_closes_leaves_one_and_the_first_who_opens_takes_it(self, stream: EventStream) -> None:
        one, other = store_in(stream), store_in(stream)
        one.apply(ROWS, 0, len(ROWS))
        one.close()
        assert not self.is_sealed(other)
        other.close()
        other.close()
        assert self.is_sealed(other)
        again = store_in(stream)
        assert (self.is_sealed(again), again.offset) == (False, len(ROWS))
        again.close()

    def test_without_one_a_file_is_used_as_it_is(self, stream: EventStream, caplog: pytest.LogCaptureFixture) -> None:
        store = store_in(stream)
        store.apply(ROWS, 0, len(ROWS))
        store.file.close()  # as the end of its process does
        again = store_in(stream)
        assert (again.offset, caplog.text) == (len(ROWS), "")
        again.close()

    @pytest.mark.parametrize("content", [b"", b"00000000 0", b"\xff"])
    def test_one_that_is_wrong_itself_costs_a_restore(self, content: bytes, stream: EventStream) -> None:
        store = store_in(stream)
        store.apply(ROWS, 0, len(ROWS))
        store.close()
        Path(f"{store.file.path}.sum").write_bytes(content)
        again = store_in(stream)
        assert again.offset == 0
        again.close()

    def test_a_folder_that_is_gone_is_not_made_for_it(self, tmp_path: Path, stream: EventStream) -> None:
        stream.create_topic(Topic(CHANGELOG.topic))
        store = TaskStore(tmp_path / "deep" / "state.db", stream.log, CHANGELOG)
        shutil.rmtree(tmp_path / "deep")
        store.close()
        assert not (tmp_path / "deep").exists()


def test_a_place_that_cannot_be_used_is_an_outage_and_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with contextlib.closing(StateFile(path, "lineage", "a changelog")) as file:
        file.apply(ROWS, 0, len(ROWS))
    path.rename(tmp_path / "aside")
    path.mkdir()
    with pytest.raises(StreamBusyError, match="unable to open"):
        StateFile(path, "lineage", "a changelog")


class TestDamageWhileItIsOpen:
    """Under a task's store: found by whatever step comes past it, and cured by that step or the next."""

    @pytest.fixture
    def stream(self) -> Iterator[EventStream]:
        with memory_stream() as opened:
            yield opened

    @staticmethod
    def _spoil(store: TaskStore, statement: str) -> None:
        db = sqlite3.connect(store.file.path)
        db.execute(statement)
        db.commit()
        db.close()

    @pytest.mark.parametrize(
        "statement",
        [
            "DROP TABLE kv",
            "UPDATE lineage SET changelog_offset = 2",
            "UPDATE lineage SET changelog_offset = NULL",
            "UPDATE lineage SET as_of = '[]'",
            "DELETE FROM lineage",
            "UPDATE lineage SET identity = 'other'",
        ],
    )
    def test_catching_up_notices_and_restores(self, stream: EventStream, statement: str) -> None:
        store = store_in(stream)
        write(stream, [(b"a", b"1"), (b"b", b"2")], [(b"a", b"3"), (b"c", b"4")])
        store.catch_up()
        self._spoil(store, statement)
        write(stream, [(b"b", None)])
        assert store.catch_up() == stream.log.spans([CHANGELOG.topic])[CHANGELOG].end
        assert dict(store.file.items()) == {b"a": b"3", b"c": b"4"}
        store.close()

    def test_who_finds_that_another_was_quicker_goes_on_from_there(
        self, stream: EventStream, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        one, other = store_in(stream), store_in(stream)
        write(stream, [(b"a", b"1")], [(b"b", b"2")])
        read = stream.log.read

        def late(*arguments: Any, **more: Any) -> Any:
            found = read(*arguments, **more)
            monkeypatch.setattr(stream.log, "read", read)
            other.catch_up(1)
            return found

        monkeypatch.setattr(stream.log, "read", late)
        assert one.catch_up() == 2
        assert dict(one.file.items()) == dict(other.file.items()) == {b"a": b"1", b"b": b"2"}
        assert caplog.text == ""
        one.close()
        other.close()

    def test_a_handler_that_comes_past_it_is_called_again(self, stream: EventStream, tmp_path: Path) -> None:
        @consumer(topic=VISITS, stateful=True, group="g")
        def count(batch: Batch) -> None:
            if batch.attempt == 1 and batch.ranges[0].start:
                (file,) = tmp_path.rglob("0.db")
                db = sqlite3.connect(file)
                db.execute("UPDATE kv SET value = zeroblob(9)")
                db.commit()
                db.close()
            for record in batch:
                _visit(batch, record.data["user"])

        count.register(stream)
        for expected in (1, 2, 3):
            stream.publish(VISITS, [VISITS.event(user=1)])
            run_pending(stream, count, state_folder=tmp_path)
            assert values_of(stream, "g") == {("visits", 1): expected}
        assert stream.positions("g") == {at(VISITS): 3}
        assert stream.dead_letters("g", status=None) == []
