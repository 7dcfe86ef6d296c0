"""Snapshots: taken in the course of things, restored from, passed over when damaged, kept from collection."""

import random
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from djp_dagster import (
    Batch,
    Consumer,
    Event,
    EventStream,
    SnapshotPolicy,
    Threshold,
    Topic,
    Worker,
    consumer,
    open_stream,
    run_pending,
)
from djp_dagster.errors import (
    DjpError,
    FencedError,
    InvalidSettingError,
    PayloadMissingError,
    PayloadStoreUnavailableError,
    StateLostError,
    StreamFullError,
)
from djp_dagster.processing.crash_points import set_hook
from djp_dagster.state.snapshots import take
from djp_dagster.state.store import TaskStore
from djp_dagster.streams.model import NewSnapshot, Snapshot
from djp_dagster.streams.records import TopicPartition
from djp_dagster.streams.topics import changelog_of
from djp_dagster.testing import Clock, memory_stream
from tests.claim_check.aging import Passing
from tests.claim_check.kit import s3_place
from tests.processing.kit import at, in_thread, wait_until
from tests.servers.seaweedfs import SeaweedServer
from tests.state.kit import values_of

WORDS = Topic("words", key="word")
EAGER = SnapshotPolicy(changes=20, bytes="1GiB")
WEIGHT = "x" * 400
"""In every value: a SQLite file weighs some pages, and a snapshot is due only after changes of half its weight."""


def counting(policy: SnapshotPolicy | None = EAGER, *, group: str = "count", events: int = 10) -> Consumer:
    """Counts words, in batches of so many events."""

    @consumer(topic=WORDS, stateful=True, group=group, snapshots=policy, max_batch=Threshold(events=events))
    def count(batch: Batch) -> None:
        for record in batch:
            word = record.data["word"]
            batch.state.set(word, [batch.state.get(word, [0])[0] + 1, WEIGHT])

    return count


def words(rng: random.Random, number: int, kinds: int = 30) -> list[Event]:
    return [WORDS.event(word=f"word {rng.randrange(kinds)}") for _ in range(number)]


def counted(stream: EventStream) -> dict[object, object]:
    """What must be counted in the end."""
    found = Counter(record.data["word"] for record in stream.records(WORDS, 0))
    return {word: [number, WEIGHT] for word, number in found.items()}


def snapshots(stream: EventStream, group: str = "count") -> list[Snapshot]:
    return stream.coordinator.snapshots(group, 0)


def changelog(stream: EventStream, group: str = "count") -> tuple[int, int, int]:
    """Where it begins and ends, and how many record batches there are."""
    at = TopicPartition(changelog_of(group), 0)
    span = stream.log.spans([at.topic])[at]
    offset, rows = span.begin, 0
    while offset < span.end:
        found = stream.log.read(at, offset, end=span.end, max_bytes=1 << 20)
        offset, rows = found[-1].end_offset, rows + len(found)
    return span.begin, span.end, rows


def payload(stream: EventStream, snapshot: Snapshot) -> Path:
    return Path(stream.payloads.objects.folder) / snapshot.payload.key  # type: ignore[attr-defined]


@pytest.fixture
def stream() -> Iterator[EventStream]:
    with memory_stream() as opened:
        opened.create_topic(WORDS)
        yield opened


class TestPolicy:
    @given(
        steps=st.lists(st.tuples(st.integers(0, 500), st.integers(0, 5000), st.integers(0, 20_000)), max_size=60),
        changes=st.integers(1, 2000),
        size=st.integers(1, 20_000),
    )
    def test_snapshots_write_at_most_twice_what_the_changelog_does(
        self, steps: list[tuple[int, int, int]], changes: int, size: int
    ) -> None:
        policy = SnapshotPolicy(changes=changes, bytes=size)
        grown = grown_bytes = last = total = 0
        taken: list[int] = []
        for more, more_bytes, state in steps:
            grown, grown_bytes, total = grown + more, grown_bytes + more_bytes, total + more_bytes
            if policy.is_due(grown, grown_bytes, last):
                assert grown >= changes or grown_bytes >= size
                taken.append(state)
                grown, grown_bytes, last = 0, 0, state
            else:
                assert (grown < changes and grown_bytes < size) or grown_bytes < last // 2
        assert sum(state // 2 for state in taken[:-1]) <= total

    def test_either_limit_is_enough(self) -> None:
        policy = SnapshotPolicy(changes=10, bytes="1KiB")
        assert [policy.is_due(*grown, 0) for grown in ((9, 1023), (10, 0), (0, 1024))] == [False, True, True]
        assert [policy.is_due(10, size, 5000) for size in (2499, 2500)] == [False, True]

    @pytest.mark.parametrize(
        "wrong", [{"changes": 0}, {"changes": True}, {"keep": 1}, {"keep": 2.5}, {"bytes": 0}, {"bytes": "much"}]
    )
    def test_a_wrong_one_names_what_is_wrong(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(InvalidSettingError) as caught:
            SnapshotPolicy(**wrong)
        assert caught.value.facts["setting"] == next(iter(wrong))


class TestTaking:
    def test_runs_take_them(self, stream: EventStream, seed: random.Random, tmp_path: Path) -> None:
        count = counting()
        for _ in range(20):
            stream.publish(WORDS, words(seed, 10))
            run_pending(stream, count, state_folder=tmp_path)
        newest, before = snapshots(stream)
        assert newest.offset > before.offset >= 20
        assert changelog(stream)[0] == before.offset

    def test_a_worker_takes_them(self, stream: EventStream, seed: random.Random, tmp_path: Path) -> None:
        stop = threading.Event()
        counting().register(stream)
        stream.publish(WORDS, words(seed, 300))
        with in_thread(lambda: Worker(stream, [counting()], state_folder=tmp_path).run(stop), stop) as outcome:
            wait_until(lambda: len(snapshots(stream)) == 2 and not stream.pending("count").events, "two snapshots")
        assert outcome == [None]
        assert values_of(stream, "count") == counted(stream)

    @pytest.mark.parametrize("policy", [None, SnapshotPolicy(changes=10**6)], ids=["never", "later"])
    def test_not_before_they_are_due(
        self, policy: SnapshotPolicy | None, stream: EventStream, seed: random.Random, tmp_path: Path
    ) -> None:
        stream.publish(WORDS, words(seed, 100))
        run_pending(stream, counting(policy), state_folder=tmp_path)
        assert (snapshots(stream), changelog(stream)[0]) == ([], 0)

    def test_what_has_grown_is_counted_across_runs_and_holders(
        self, stream: EventStream, seed: random.Random, tmp_path: Path
    ) -> None:
        """Each run makes a few changes, none of them enough for a snapshot alone."""
        offsets = []
        for number in range(45):
            stream.publish(WORDS, words(seed, 3, kinds=10))
            run_pending(stream, counting(), state_folder=tmp_path / str(number % 3))
            offsets.append([snapshot.offset for snapshot in snapshots(stream)])
        assert len({newest for newest, *_ in filter(None, offsets)}) >= 2
        begin, end, _ = changelog(stream)
        assert end - offsets[-1][0] <= 60
        assert begin == offsets[-1][-1]

    def test_the_changelog_stays_bounded(self, stream: EventStream, seed: random.Random, tmp_path: Path) -> None:
        """By what changes between the snapshots that are kept, however much was ever changed."""
        policy, lengths, end = SnapshotPolicy(changes=30, keep=3), [], 0
        for _ in range(12):
            stream.publish(WORDS, words(seed, 100, kinds=10))
            run_pending(stream, counting(policy), state_folder=tmp_path)
            begin, end, rows = changelog(stream)
            lengths.append((rows, end - begin))
        assert end > 700
        assert all(rows <= 30 and changes <= 250 for rows, changes in lengths)
        assert len(snapshots(stream)) == 3
        assert values_of(stream, "count") == counted(stream)

    def test_what_one_who_died_has_left_is_removed(
        self, stream: EventStream, seed: random.Random, tmp_path: Path
    ) -> None:
        stream.publish(WORDS, words(seed, 10))
        run_pending(stream, counting(), state_folder=tmp_path)
        (file,) = tmp_path.rglob("0.db")
        left, of_another = file.with_name("0.db.snapshot-x"), file.with_name("1.db.snapshot-x")
        for folder in (left, of_another):
            folder.mkdir()
            (folder / "state.db").write_bytes(b"half")
        stream.publish(WORDS, words(seed, 50))
        run_pending(stream, counting(), state_folder=tmp_path)
        assert snapshots(stream)
        assert (left.exists(), of_another.exists()) == (False, True)
        assert {path.name for path in file.parent.iterdir()} == {"0.db", "0.db.lock", "0.db.sum", "1.db.snapshot-x"}

    @pytest.mark.parametrize("error", [PayloadStoreUnavailableError("away"), OSError(28, "No space left on device")])
    def test_an_outage_leaves_it_to_the_next_batch(
        self,
        error: Exception,
        stream: EventStream,
        seed: random.Random,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        def put(*_: object, **__: object) -> None:
            raise error

        stream.publish(WORDS, words(seed, 60))
        with monkeypatch.context() as patch:
            patch.setattr(stream.payloads, "put", put)
            report = run_pending(stream, counting(), state_folder=tmp_path)
        assert (report.events, stream.positions("count"), snapshots(stream)) == (60, {at(WORDS): 60}, [])
        assert "no snapshot of count task 0 for now" in caplog.text
        stream.publish(WORDS, words(seed, 1))
        run_pending(stream, counting(), state_folder=tmp_path)
        assert [one.offset for one in snapshots(stream)] == [changelog(stream)[1]]

    def test_so_does_an_outage_of_the_stream(
        self, stream: EventStream, seed: random.Random, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def add_snapshot(*_: object, **__: object) -> None:
            raise StreamFullError("no space")

        stream.publish(WORDS, words(seed, 60))
        with monkeypatch.context() as patch:
            patch.setattr(stream.coordinator, "add_snapshot", add_snapshot)
            run_pending(stream, counting(), state_folder=tmp_path)
        assert (stream.positions("count"), snapshots(stream)) == ({at(WORDS): 60}, [])
        stream.publish(WORDS, words(seed, 1))
        run_pending(stream, counting(), state_folder=tmp_path)
        assert snapshots(stream)

    def test_a_fenced_holder_makes_nothing_known(self, seed: random.Random, tmp_path: Path) -> None:
        """It loses its lease between storing a snapshot and making it known."""
        clock = Clock()
        with memory_stream(clock=clock) as stream:
            stream.create_topic(WORDS)
            stream.publish(WORDS, words(seed, 60))

            def hook(point: str) -> None:
                if point == "9.snapshot_stored":
                    clock.advance(60)
                    stream.coordinator.acquire("count", None, "another", 60)

            set_hook(hook)
            try:
                with pytest.raises(FencedError):
                    run_pending(stream, counting(), state_folder=tmp_path)
            finally:
                set_hook(None)
            assert (snapshots(stream), changelog(stream)[0]) == ([], 0)
            clock.advance(120)
            run_pending(stream, counting(), state_folder=tmp_path)
            assert values_of(stream, "count") == counted(stream)

    def test_a_damaged_file_is_not_copied(
        self, stream: EventStream, seed: random.Random, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The value that is wrong is one that no handler comes past."""
        stream.publish(WORDS, [WORDS.event(word="once")])
        run_pending(stream, counting(), state_folder=tmp_path)
        (file,) = tmp_path.rglob("0.db")
        Path(f"{file}.sum").unlink()  # its process was killed
        db = sqlite3.connect(file)
        db.execute("UPDATE kv SET value = zeroblob(8)")
        db.commit()
        db.close()
        stream.publish(WORDS, words(seed, 100))
        run_pending(stream, counting(), state_folder=tmp_path)
        assert "does not match its checksum" in caplog.text
        assert snapshots(stream)
        assert values_of(stream, "count") == counted(stream)
        assert stream.dead_letters("count", status=None) == []


class TestRestoring:
    """On an empty disk, with a changelog whose beginning is gone."""

    @pytest.fixture
    def trimmed(self, stream: EventStream, seed: random.Random, tmp_path: Path) -> EventStream:
        stream.publish(WORDS, words(seed, 300))
        run_pending(stream, counting(), state_folder=tmp_path / "lost")
        assert changelog(stream)[0] > 0
        assert len(snapshots(stream)) == 2
        return stream

    @staticmethod
    def go_on(stream: EventStream, seed: random.Random, folder: Path) -> None:
        stream.publish(WORDS, words(seed, 5))
        run_pending(stream, counting(), state_folder=folder)
        assert values_of(stream, "count") == counted(stream)

    def test_it_is_the_newest_snapshot_and_the_tail(
        self, trimmed: EventStream, seed: random.Random, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.go_on(trimmed, seed, tmp_path / "empty")
        assert "passed over" not in caplog.text

    @pytest.mark.parametrize(
        "damage",
        [
            lambda path: path.unlink(),
            lambda path: path.write_bytes(b""),
            lambda path: path.write_bytes(path.read_bytes()[:-4096]),
            lambda path: path.write_bytes(path.read_bytes().replace(b"word ", b"worm ", 1)),
        ],
        ids=["missing", "empty", "short", "flipped"],
    )
    def test_a_damaged_one_is_passed_over_for_the_one_before(
        self,
        trimmed: EventStream,
        damage: Callable[[Path], None],
        seed: random.Random,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        newest, before = snapshots(trimmed)
        damage(payload(trimmed, newest))
        self.go_on(trimmed, seed, tmp_path / "empty")
        assert f"snapshot {newest.number} of __changelog.count is passed over" in caplog.text
        assert f"snapshot {before.number} of" not in caplog.text

    def test_one_that_is_of_another_place_is_passed_over(
        self, trimmed: EventStream, seed: random.Random, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A payload that is whole, and not what it is said to be."""
        newest, before = snapshots(trimmed)
        lease = trimmed.coordinator.acquire("count", None, "wrong", 60)
        new = NewSnapshot(0, newest.offset, before.payload, b"")
        trimmed.coordinator.add_snapshot(lease, new, keep=3)
        trimmed.coordinator.release(lease)
        self.go_on(trimmed, seed, tmp_path / "empty")
        assert f"it is at {before.offset}, not {newest.offset}" in caplog.text

    @pytest.fixture
    def lost(self, trimmed: EventStream) -> EventStream:
        for snapshot in snapshots(trimmed):
            payload(trimmed, snapshot).unlink()
        trimmed.publish(WORDS, [WORDS.event(word="new")])
        return trimmed

    def test_if_all_are_it_is_lost_and_said_so(self, lost: EventStream, tmp_path: Path) -> None:
        for _ in range(2):
            with pytest.raises(StateLostError, match="reset_state=True") as caught:
                run_pending(lost, counting(), state_folder=tmp_path / "empty")
            assert caught.value.facts["begin"] == changelog(lost)[0]
            assert lost.positions("count") == {at(WORDS): 300}
            assert lost.dead_letters("count", status=None) == []
        with pytest.raises(StateLostError, match="reset_state=True"):
            lost.view(counting(), folder=tmp_path / "view")

    def test_the_remedy_is_one(self, lost: EventStream, tmp_path: Path) -> None:
        with pytest.raises(StateLostError):
            run_pending(lost, counting(), state_folder=tmp_path / "empty")
        lost.seek("count", "earliest", reset_state=True)
        run_pending(lost, counting(), state_folder=tmp_path / "empty")
        assert values_of(lost, "count") == counted(lost)

    def test_a_worker_pauses_and_moves_nothing(self, lost: EventStream, tmp_path: Path) -> None:
        stop, failures = threading.Event(), list[DjpError]()
        worker = Worker(
            lost, [counting()], state_folder=tmp_path / "empty", on_failure=lambda _, error: failures.append(error)
        )
        with in_thread(lambda: worker.run(stop), stop):
            wait_until(lambda: bool(failures), "a failure")
        assert isinstance(failures[0], StateLostError)
        assert (lost.positions("count"), lost.dead_letters("count", status=None)) == ({at(WORDS): 300}, [])

    def test_who_has_the_file_still_needs_none(self, lost: EventStream, seed: random.Random, tmp_path: Path) -> None:
        lost.publish(WORDS, words(seed, 100))
        run_pending(lost, counting(), state_folder=tmp_path / "lost")
        assert values_of(lost, "count") == counted(lost)  # from a snapshot that was taken meanwhile

    def test_an_outage_is_waited_for_and_passes_over_nothing(
        self, trimmed: EventStream, seed: random.Random, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        away, opened = [3], trimmed.payloads.open

        def open_payload(*arguments: Any) -> Any:
            if away[0]:
                away[0] -= 1
                raise PayloadStoreUnavailableError("away")
            return opened(*arguments)

        monkeypatch.setattr(trimmed.payloads, "open", open_payload)
        self.go_on(trimmed, seed, tmp_path / "empty")
        assert away == [0]

    def test_a_seek_and_a_deletion_forget_them(self, trimmed: EventStream, tmp_path: Path) -> None:
        trimmed.seek("count", {at(WORDS): 295}, reset_state=True)
        assert (snapshots(trimmed), values_of(trimmed, "count")) == ([], {})
        run_pending(trimmed, counting(), state_folder=tmp_path / "lost")
        assert sum(found[0] for found in values_of(trimmed, "count").values()) == 5
        trimmed.delete_group("count")
        counting().register(trimmed)
        assert (snapshots(trimmed), values_of(trimmed, "count")) == ([], {})


SHORT = Topic("short", retention="1s")


@consumer(topic=SHORT, stateful=True, group="claims", snapshots=EAGER, max_batch=Threshold(events=10))
def keep_claims(batch: Batch) -> None:
    """What it was given is in its state: in values, and in keys."""
    for record in batch:
        kind, claim = record.data["kind"], record.data["word"]
        if kind == "value":
            batch.state.set("claim", {"of": [claim]})
        elif kind == "key":
            batch.state.set(("claim", claim), True)
        else:
            batch.state.set(claim, WEIGHT)


def test_collection_keeps_snapshots_and_what_they_mention(
    stream: EventStream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, passing = stream.payloads, Passing(monkeypatch)
    claims = {kind: store.put(f"a payload as {kind}".encode()).claim for kind in ("value", "key", "record")}
    stream.create_topic(SHORT)
    # The events that bring the claims go with the topic's retention; then only state has them.
    stream.publish(
        SHORT, [SHORT.event(kind=kind, word=claim.uri) for kind, claim in claims.items() if kind != "record"]
    )
    run_pending(stream, keep_claims, state_folder=tmp_path)
    pruned: set[str] = set()
    for _ in range(12):
        stream.publish(SHORT, [SHORT.event(kind="count", word=f"{one}") for one in range(10)])
        run_pending(stream, keep_claims, state_folder=tmp_path)
        pruned |= {one.payload.key for one in snapshots(stream, "claims")}
    stream.log.trim(stream.log.now_micros() + 10_000_000)
    assert stream.log.spans([SHORT.name])[at(SHORT)].begin == 122
    assert changelog(stream, "claims")[0] > 2
    kept = snapshots(stream, "claims")
    pruned -= {one.payload.key for one in kept}
    assert pruned
    for _ in range(4):
        passing(store)
        stream.collect_payloads(dry_run=False)
    assert store.read(claims["value"]) == b"a payload as value"
    assert store.read(claims["key"]) == b"a payload as key"
    for gone in [claims["record"].uri.rsplit("/sha256/")[1], *(key.removeprefix("sha256/") for key in pruned)]:
        assert store.objects.info(f"sha256/{gone}") is None
    assert all(store.verify(one.payload) for one in kept)
    before = values_of(stream, "claims")
    assert before["claim"] == {"of": [claims["value"].uri]}
    assert before[("claim", claims["key"].uri)] is True
    stream.delete_group("claims")
    for _ in range(4):
        passing(store)
        stream.collect_payloads(dry_run=False)
    with pytest.raises(PayloadMissingError):
        store.read(claims["value"])
    assert [store.objects.info(one.payload.key) for one in kept] == [None, None]


def test_in_a_bucket(
    s3_server: SeaweedServer, s3_bucket: str, seed: random.Random, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = s3_place(s3_server, f"s3://{s3_bucket}/pre", spool_folder=str(tmp_path))
    with open_stream(tmp_path / "stream.db", payloads=place.open()) as stream:
        stream.create_topic(WORDS)
        stream.publish(WORDS, words(seed, 300))
        run_pending(stream, counting(), state_folder=tmp_path / "one")
        assert changelog(stream)[0] > 0
        stream.publish(WORDS, words(seed, 5))
        run_pending(stream, counting(), state_folder=tmp_path / "two")
        assert values_of(stream, "count") == counted(stream)
        assert "passed over" not in caplog.text
        newest, _ = snapshots(stream)
        stream.payloads.objects.delete([newest.payload.key])
        with stream.view(counting(), folder=tmp_path / "three") as view:
            assert dict(view.items()) == counted(stream)
    assert f"snapshot {newest.number} of __changelog.count is passed over" in caplog.text


def test_taking_one_is_of_one_moment(stream: EventStream, seed: random.Random, tmp_path: Path) -> None:
    """A snapshot is a file as anybody restores it: at the offset that it says, with what it mentions."""
    stream.publish(WORDS, words(seed, 30))
    run_pending(stream, counting(None), state_folder=tmp_path)
    (file,) = tmp_path.rglob("0.db")
    store = TaskStore(file, stream.log, TopicPartition("__changelog.count", 0))
    new = take(store.file, 0, stream.payloads)
    assert (new.task, new.offset, new.mentions) == (0, changelog(stream)[1], b"")
    stream.payloads.download(new.payload, tmp_path / "copy.db")
    copy = TaskStore(tmp_path / "copy.db", stream.log, TopicPartition("__changelog.count", 0))
    assert list(copy.file.items()) == list(store.file.items())
    assert copy.offset == store.offset
    copy.close()
    store.close()
