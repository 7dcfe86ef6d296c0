"""`TaskStore` is a cache of its changelog; `TaskState` is a handler's view of it."""

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from djp_dagster import Batch, EventStream, Topic, consumer, run_pending
from djp_dagster.errors import InvalidValueError, StateMismatchError, StreamCorruptError
from djp_dagster.state.keys import decode_key, encode_key
from djp_dagster.state.store import TaskStore
from djp_dagster.state.task_state import TaskState
from djp_dagster.streams.records import CODEC_CHANGES, EncodedBatch, TopicPartition, encode_changes
from djp_dagster.testing import memory_stream
from tests.processing.kit import NUMBERS, fill, numbers
from tests.state.kit import state_of

CHANGELOG = TopicPartition("changes", 0)
Changes = list[tuple[bytes, bytes | None]]


@pytest.fixture
def stream() -> Iterator[EventStream]:
    with memory_stream() as opened:
        opened.create_topic(Topic(CHANGELOG.topic))
        yield opened


def write(stream: EventStream, *batches: Changes) -> None:
    """Append record batches of changes."""
    stream.log.append(
        [EncodedBatch(CHANGELOG.topic, 0, len(changes), encode_changes(changes), CODEC_CHANGES) for changes in batches]
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "state.db"


def opened(path: Path, stream: EventStream) -> TaskStore:
    return TaskStore(path, stream.log, CHANGELOG)


def contents(path: Path, stream: EventStream) -> tuple[dict[bytes, bytes], int]:
    """What the store holds once it has caught up, and up to where."""
    store = opened(path, stream)
    try:
        store.catch_up()
        return dict(store.file.items()), store.offset
    finally:
        store.close()


FIRST: Changes = [(b"a", b"1"), (b"b", b"2")]
SECOND: Changes = [(b"a", None), (b"b", b"3"), (b"c", b"4")]
AFTER_BOTH = ({b"b": b"3", b"c": b"4"}, 5)


def test_a_new_store_is_restored_from_the_beginning(stream: EventStream, path: Path) -> None:
    assert contents(path, stream) == ({}, 0)
    path.unlink()
    write(stream, FIRST, SECOND)
    assert contents(path, stream) == AFTER_BOTH


def test_one_that_is_behind_catches_up(stream: EventStream, path: Path) -> None:
    write(stream, FIRST)
    assert contents(path, stream) == ({b"a": b"1", b"b": b"2"}, 2)
    write(stream, SECOND)
    assert contents(path, stream) == AFTER_BOTH


def test_one_that_stands_inside_a_record_batch_goes_on_from_there(stream: EventStream, path: Path) -> None:
    store = opened(path, stream)
    store.apply(FIRST[:1], 0, 1)
    store.close()
    write(stream, FIRST, SECOND)
    assert contents(path, stream) == AFTER_BOTH


def test_one_that_is_ahead_is_discarded(stream: EventStream, path: Path) -> None:
    store = opened(path, stream)
    store.apply([(b"a", b"wrong"), (b"ghost", b"x")] * 5, 0, 10)
    store.close()
    write(stream, FIRST, SECOND)
    assert contents(path, stream) == AFTER_BOTH


def test_one_of_another_stream_is_discarded(stream: EventStream, path: Path) -> None:
    with memory_stream() as other:
        other.create_topic(Topic(CHANGELOG.topic))
        write(other, [(b"ghost", b"x")])
        assert contents(path, other) == ({b"ghost": b"x"}, 1)
    write(stream, FIRST, SECOND)
    assert contents(path, stream) == AFTER_BOTH


def _garbage(path: Path) -> None:
    path.write_bytes(b"this is no database, and never was one" * 100)


def _damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100:] = b"\xff" * (len(content) - 100)
    path.write_bytes(bytes(content))


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def _other_version(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("UPDATE lineage SET version = 99")
    db.commit()
    db.close()


def _other_tables(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("DROP TABLE lineage")
    db.execute("CREATE TABLE lineage (something TEXT)")
    db.commit()
    db.close()


@pytest.mark.parametrize("damage", [_garbage, _damaged, _truncated, _other_version, _other_tables])
def test_a_damaged_one_is_discarded(stream: EventStream, path: Path, damage: Callable[[Path], None]) -> None:
    write(stream, FIRST)
    contents(path, stream)
    damage(path)
    write(stream, SECOND)
    assert contents(path, stream) == AFTER_BOTH


def test_applying_elsewhere_changes_nothing(stream: EventStream, path: Path) -> None:
    store = opened(path, stream)
    store.apply(FIRST, 0, 2)
    for expected in (0, 1, 3):
        with pytest.raises(StateMismatchError, match="do not follow"):
            store.apply([(b"a", b"wrong")], expected, 9)
    assert (dict(store.file.items()), store.offset) == ({b"a": b"1", b"b": b"2"}, 2)
    store.close()


def test_a_damaged_changelog_is_named(stream: EventStream, path: Path) -> None:
    stream.log.append([EncodedBatch(CHANGELOG.topic, 0, 1, b"\x91\x01", CODEC_CHANGES)])
    store = opened(path, stream)
    with pytest.raises(StreamCorruptError):
        store.catch_up()
    store.close()


def test_many_keys_at_once(stream: EventStream, path: Path) -> None:
    store = opened(path, stream)
    store.apply([(b"%d" % n, b"v%d" % n) for n in range(1200)], 0, 1200)
    keys = [b"%d" % n for n in range(0, 2000, 2)]
    assert store.get_many(keys) == {key: b"v" + key for key in keys if int(key) < 1200}
    assert store.get_many([]) == {}
    assert store.get(b"7") == b"v7"
    assert store.get(b"no") is None
    store.close()


class TestInAGroup:
    """The store of a consumer that runs."""

    @pytest.mark.parametrize("damage", [None, Path.unlink, _garbage, _truncated, _other_version])
    def test_whatever_happens_to_the_file_the_state_is_that_of_the_commits(
        self, tmp_path: Path, damage: Callable[[Path], None] | None
    ) -> None:
        @consumer(topic=NUMBERS, stateful=True, group="g")
        def total(batch: Batch) -> None:
            for record in batch:
                batch.state.set("sum", batch.state.get("sum", 0) + record.data["n"])
                batch.state.set(record.data["n"], True)

        with memory_stream() as stream:
            fill(stream, NUMBERS, numbers(5))
            run_pending(stream, total, state_folder=tmp_path)
            (file,) = tmp_path.rglob("0.db")
            assert file.relative_to(tmp_path).parts == (stream.incarnation[:12], "g", "0.db")
            if damage is not None:
                for rest in file.parent.glob("0.db-*"):
                    rest.unlink()
                damage(file)
            stream.publish(NUMBERS, numbers(5, start=5))
            run_pending(stream, total, state_folder=tmp_path)
            found = state_of(stream, "g")
            store = TaskStore(file, stream.log, TopicPartition("__changelog.g", 0))
            assert dict(store.file.items()) == found
            store.close()
        assert msgspec.msgpack.decode(found[encode_key("sum")]) == 45
        assert len(found) == 11

    def test_the_environment_names_the_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        @consumer(topic=NUMBERS, stateful=True)
        def remember(batch: Batch) -> None:
            batch.state.set("k", 1)

        monkeypatch.setenv("DJP_STATE_FOLDER", str(tmp_path / "there"))
        with memory_stream() as stream:
            fill(stream, NUMBERS, numbers(1))
            run_pending(stream, remember)
        assert list((tmp_path / "there").rglob("0.db"))


KEYS: Any = st.sampled_from(["a", "b", 1, "1", 2, b"x", "x"])
INTEGERS = st.integers(-(2**63), 2**64 - 1)
VALUES: Any = INTEGERS | st.text(st.characters(codec="utf-8"), max_size=3) | st.lists(INTEGERS, max_size=2)


class StateAgainstDict(RuleBasedStateMachine):
    """A `TaskState` does what a dict does, takes back what it is told to, and keeps what is committed."""

    @initialize()
    def begin(self) -> None:
        self.context = memory_stream()
        stream = self.context.__enter__()
        stream.create_topic(Topic(CHANGELOG.topic))
        self.store = TaskStore(Path(stream.payloads.objects.folder) / "state.db", stream.log, CHANGELOG)  # type: ignore[attr-defined]
        self.state = TaskState(self.store.file)
        self.model: dict[Any, Any] = {}
        self.committed: dict[Any, Any] = {}
        self.marks: list[tuple[int, dict[Any, Any]]] = []

    @rule(key=KEYS, value=VALUES)
    def set(self, key: Any, value: Any) -> None:
        self.state.set(key, value)
        self.model[key] = value

    @rule(key=KEYS)
    def delete(self, key: Any) -> None:
        self.state.delete(key)
        self.model.pop(key, None)

    @rule(key=KEYS)
    def get(self, key: Any) -> None:
        assert self.state.get(key) == self.model.get(key)
        assert self.state.get(key, "none") == self.model.get(key, "none")

    @rule(keys=st.lists(KEYS))
    def get_many(self, keys: list[Any]) -> None:
        assert self.state.get_many(keys) == {key: self.model[key] for key in keys if key in self.model}

    @rule()
    def mark(self) -> None:
        self.marks.append((self.state.mark(), dict(self.model)))

    @rule()
    def undo(self) -> None:
        if self.marks:
            mark, self.model = self.marks.pop()
            self.state.undo(mark)

    @rule()
    def commit(self) -> None:
        changes = self.state.changes()
        offset = self.store.offset
        self.store.apply(changes, offset, offset + len(changes))
        self.committed = dict(self.model)
        self.state, self.marks = TaskState(self.store.file), []

    @rule()
    def abandon(self) -> None:
        self.state, self.marks, self.model = TaskState(self.store.file), [], dict(self.committed)

    @invariant()
    def the_store_holds_what_was_committed(self) -> None:
        if hasattr(self, "store"):
            stored = {decode_key(key): msgspec.msgpack.decode(value) for key, value in self.store.file.items()}
            assert stored == self.committed

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.context.__exit__(None, None, None)


TestStateAgainstDict = StateAgainstDict.TestCase
TestStateAgainstDict.settings = settings(max_examples=15, stateful_step_count=30, deadline=None)


def test_none_is_no_value_and_what_cannot_be_stored_is_named(stream: EventStream, path: Path) -> None:
    store = opened(path, stream)
    state = TaskState(store.file)
    with pytest.raises(InvalidValueError, match="delete"):
        state.set("k", None)
    with pytest.raises(InvalidValueError, match="'bad'"):
        state.set("bad", object())
    store.close()
