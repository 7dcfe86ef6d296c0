"""Rebuild and promote: the rebuilt state is the live one, effects are neither repeated nor missing, readers switch."""

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import djp_dagster as djp
from djp_dagster.processing.outputs import BatchOutputs
from djp_dagster.streams.model import DeadLetter
from djp_dagster.streams.records import TopicPartition
from djp_dagster.testing import Clock, memory_stream
from djp_dagster.versions.comparison import compare
from djp_dagster.versions.promotion import abandon, promote_followed, versions
from tests.processing.kit import in_thread
from tests.versions.kit import (
    CLICKS,
    LEASE,
    PARTITIONS,
    SEEN,
    V1,
    V2,
    causes,
    clicks,
    counting,
    effects,
    emitted,
    folded,
    names,
    publish,
    published,
    state_of,
    wait_until,
)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stream(tmp_path: Path) -> Iterator[djp.EventStream]:
    with djp.open_stream(tmp_path / "stream.db", payloads=djp.open_payload_store(tmp_path / "payloads")) as opened:
        yield opened


@contextmanager
def other_process(tmp_path: Path) -> Iterator[djp.EventStream]:
    """The same stream, with caches of its own."""
    with djp.open_stream(tmp_path / "stream.db", payloads=djp.open_payload_store(tmp_path / "payloads")) as opened:
        yield opened


def handle(stream: djp.EventStream, consumer: djp.Consumer, folder: Path) -> None:
    djp.run_pending(stream, consumer, state_folder=folder / "state")


def rebuild(stream: djp.EventStream, consumer: djp.Consumer, folder: Path) -> None:
    djp.follow(stream, consumer, state_folder=folder / "next")


@contextmanager
def working(stream: djp.EventStream, consumer: djp.Consumer, folder: Path) -> Iterator[djp.Worker]:
    stop = threading.Event()
    worker = djp.Worker(stream, [consumer], lease=LEASE, state_folder=folder)
    with in_thread(lambda: worker.run(stop), stop) as outcome:
        yield worker
    assert outcome == [None]


class TestSameState:
    """Live equals replay equals rebuild."""

    @pytest.mark.parametrize("most", [1, 7, 1000])
    def test_of_unchanged_code(self, stream: djp.EventStream, tmp_path: Path, seed: random.Random, most: int) -> None:
        V1.register(stream)
        follower = counting(1, "v1", most=most)
        for start in range(0, 160, 40):
            publish(stream, clicks(seed, 40, start))
            handle(stream, V1, tmp_path)
            if seed.random() < 0.5:
                rebuild(stream, follower, tmp_path)
        before = effects(stream)
        rebuild(stream, follower, tmp_path)
        live = state_of(stream, V1, tmp_path)
        assert live == folded(stream)
        assert any(state["late"] for state in live.values())
        assert state_of(stream, follower.following("next"), tmp_path) == live
        assert compare(stream, follower, folder=tmp_path).equal
        djp.promote(stream, follower, state_folder=tmp_path / "next")
        assert state_of(stream, V1, tmp_path) == live
        assert effects(stream) == before

    def test_of_a_table(self, stream: djp.EventStream, tmp_path: Path, seed: random.Random) -> None:
        nets = djp.Table("table", topic=CLICKS, key="user", value="n")
        hours = djp.Table("table", topic=CLICKS, key="user", value="at")
        nets.register(stream)
        publish(stream, clicks(seed, 120))
        handle(stream, nets, tmp_path)
        rebuild(stream, hours, tmp_path)
        djp.promote(stream, hours, state_folder=tmp_path / "next")
        latest = {record.data["user"]: record.data["at"] for record in emitted(stream, CLICKS)}
        assert state_of(stream, hours, tmp_path) == latest
        publish(stream, clicks(seed, 30, 120))
        handle(stream, hours, tmp_path)
        latest = {record.data["user"]: record.data["at"] for record in emitted(stream, CLICKS)}
        assert state_of(stream, hours, tmp_path) == latest

    def test_it_has_no_effect_and_says_that_it_is_a_replay(self, stream: djp.EventStream, tmp_path: Path) -> None:
        seen: list[tuple[str, bool, str]] = []

        @djp.consumer(topic=CLICKS, emits=[SEEN], stateful=True, group="counts")
        def counts(batch: djp.Batch) -> dict[str, int]:
            for record in batch:
                seen.append((batch.group, batch.is_replay, record.idempotency_key))
                batch.emit(SEEN.event(user="x", n=1))
            batch.state.set("k", 1)
            return {"n": len(seen)}

        counts.register(stream)
        publish(stream, clicks(random.Random(1), 3))
        handle(stream, counts, tmp_path)
        before = (effects(stream), stream.outputs("counts"))
        rebuild(stream, counts, tmp_path)
        assert (effects(stream), stream.outputs("counts")) == before
        assert stream.outputs("counts.next") == []
        live = {key for group, replayed, key in seen if (group, replayed) == ("counts", False)}
        again = {key for group, replayed, key in seen if (group, replayed) == ("counts.next", True)}
        assert live == again, "a service that honours idempotency keys does nothing again"
        assert len(seen) == 2 * len(live)

    def test_it_never_gets_ahead(self, stream: djp.EventStream, tmp_path: Path, seed: random.Random) -> None:
        V1.register(stream)
        publish(stream, clicks(seed, 60))
        rebuild(stream, V2, tmp_path)
        assert set(stream.positions("counts.next").values()) == {0}
        handle(stream, V1, tmp_path)
        publish(stream, clicks(seed, 60, 60))
        rebuild(stream, V2, tmp_path)
        assert stream.positions("counts.next") == stream.positions("counts")
        assert stream.pending("counts.next").events >= 60


class TestUnderLoad:
    """Somebody publishes, somebody works, and the versions change."""

    def test_every_event_is_emitted_once(self, stream: djp.EventStream, tmp_path: Path, seed: random.Random) -> None:
        V1.register(stream)
        done = threading.Event()

        def load() -> None:
            number = 0
            while not done.is_set():
                publish(stream, clicks(seed, 15, number))
                number += 15
                done.wait(0.01)

        with in_thread(load, done), working(stream, V1, tmp_path / "w"):
            wait_until(lambda: len(causes(stream)) > 100, "the live version to be under way")
            rebuild_under_load = djp.follow(stream, V1, state_folder=tmp_path / "next", max_lag_events=200)
            assert sum(report.events for report in rebuild_under_load) > 0
            djp.promote(stream, V1, state_folder=tmp_path / "next")
            so_far = len(causes(stream))
            wait_until(lambda: len(causes(stream)) > so_far + 100, "the new version to go on")
            djp.rollback(stream, V1, state_folder=tmp_path / "next")
            done.set()
            wait_until(lambda: not stream.pending("counts").events, "everything to be done")
        assert causes(stream) == published(stream)
        assert len({record.id for record in emitted(stream)}) == len(published(stream))
        assert state_of(stream, V1, tmp_path) == folded(stream)

    def test_the_new_code_emits_from_where_the_old_one_stopped(
        self, stream: djp.EventStream, tmp_path: Path, seed: random.Random
    ) -> None:
        V1.register(stream)
        publish(stream, clicks(seed, 90))
        handle(stream, V1, tmp_path)
        first = len(published(stream))
        rebuild(stream, V2, tmp_path)
        publish(stream, clicks(seed, 30, 90))
        djp.promote(stream, V2, state_folder=tmp_path / "next")
        handle(stream, V2, tmp_path)
        assert Counter(record.data["code"] for record in emitted(stream)) == {
            "v1": first,
            "v2": len(published(stream)) - first,
        }
        assert causes(stream) == published(stream)
        assert state_of(stream, V2, tmp_path) == folded(stream, 10)

    def test_rollback_follows_what_was_done_since(
        self, stream: djp.EventStream, tmp_path: Path, seed: random.Random
    ) -> None:
        V1.register(stream)
        publish(stream, clicks(seed, 50))
        handle(stream, V1, tmp_path)
        rebuild(stream, V2, tmp_path)
        djp.promote(stream, V2, state_folder=tmp_path / "next")
        publish(stream, clicks(seed, 50, 50))
        handle(stream, V2, tmp_path)
        before = effects(stream)
        reports = djp.rollback(stream, V1, state_folder=tmp_path / "back")
        since = sum(data["code"] == "v2" for _, data in before)
        assert sum(report.events for report in reports) == since > 0
        assert state_of(stream, V1, tmp_path) == folded(stream)
        assert effects(stream) == before
        assert versions(stream, "counts").code_versions == {"live": "v1", "previous": "v2"}
        djp.rollback(stream, V2, state_folder=tmp_path / "back")
        assert state_of(stream, V2, tmp_path) == folded(stream, 10)
        publish(stream, clicks(seed, 10, 100))
        handle(stream, V2, tmp_path)
        assert causes(stream) == published(stream)

    def test_a_follower_with_a_worker_of_its_own(
        self, stream: djp.EventStream, tmp_path: Path, seed: random.Random
    ) -> None:
        """It ends when it has been promoted, and does not make another one."""
        V1.register(stream)
        publish(stream, clicks(seed, 60))
        with working(stream, V1, tmp_path / "w"):
            djp.follow(stream, V1, state_folder=tmp_path / "next", max_lag_events=10_000)
            follower = djp.Worker(stream, [V1.following("next")], lease=LEASE, state_folder=tmp_path / "f")
            with in_thread(lambda: follower.run(threading.Event())) as outcome:
                wait_until(lambda: bool(stream.coordinator.members("counts.next")), "its worker")
                publish(stream, clicks(seed, 60, 60))
                promote_followed(stream, "counts")
                wait_until(lambda: outcome == [None], "the worker of the follower to end by itself")
            publish(stream, clicks(seed, 60, 120))
            wait_until(lambda: not stream.pending("counts").events, "everything to be done")
        assert names(stream) == ["counts", "counts.previous"]
        assert causes(stream) == published(stream)
        assert state_of(stream, V1, tmp_path) == folded(stream)

    def test_a_worker_goes_on_with_its_other_consumers(self, stream: djp.EventStream, tmp_path: Path) -> None:
        other = counting(1, "o", group="other")
        V1.register(stream)
        other.register(stream)
        publish(stream, clicks(random.Random(1), 20))
        handle(stream, V1, tmp_path)
        rebuild(stream, V1, tmp_path)
        stop = threading.Event()
        worker = djp.Worker(stream, [V1.following("next"), other], lease=LEASE, state_folder=tmp_path / "f")
        with in_thread(lambda: worker.run(stop), stop) as outcome:
            wait_until(lambda: any(task.owner for task in stream.coordinator.tasks("counts.next")), "it to hold them")
            promote_followed(stream, "counts")
            publish(stream, clicks(random.Random(2), 20, 20))
            wait_until(lambda: not stream.pending("other").events, "it to go on")
        assert outcome == [None]
        assert names(stream) == ["counts", "counts.previous", "other"]


def at(partition: int) -> TopicPartition:
    return TopicPartition("clicks", partition)


SHORT = djp.Topic("clicks", partitions=PARTITIONS, key="user", retention="1min")
FORGETTING = counting(1, "v1", topic=SHORT)


class TestBeginning:
    """The follower begins where the live state has begun."""

    def test_at_the_end_where_the_live_one_began(
        self, stream: djp.EventStream, tmp_path: Path, seed: random.Random
    ) -> None:
        publish(stream, clicks(seed, 40))
        late = counting(1, "v1", start="latest")
        late.register(stream)
        began = stream.positions("counts")
        publish(stream, clicks(seed, 40, 40))
        handle(stream, late, tmp_path)
        rebuild(stream, late, tmp_path)
        assert compare(stream, late, folder=tmp_path).equal
        djp.promote(stream, late, state_folder=tmp_path / "next")
        rebuild(stream, late, tmp_path)
        assert compare(stream, late, folder=tmp_path).equal, "the promoted one began there, too"
        assert min(began.values()) > 0

    def test_where_a_seek_has_reset_it(self, stream: djp.EventStream, tmp_path: Path, seed: random.Random) -> None:
        V1.register(stream)
        publish(stream, clicks(seed, 40))
        handle(stream, V1, tmp_path)
        stream.seek("counts", {at(0): 3}, reset_state=True)
        publish(stream, clicks(seed, 40, 40))
        handle(stream, V1, tmp_path)
        rebuild(stream, V1, tmp_path)
        assert compare(stream, V1, folder=tmp_path).equal

    def test_what_retention_has_removed_is_not_made_up(self, tmp_path: Path, clock: Clock, seed: random.Random) -> None:
        with memory_stream(clock=clock) as stream:
            FORGETTING.register(stream)
            for start in (0, 40):
                stream.publish("clicks", clicks(seed, 40, start))
                handle(stream, FORGETTING, tmp_path)
                clock.advance(40)
            assert stream.apply_retention()
            begin = {at: span.begin for at, span in stream.log.spans(["clicks"]).items()}
            with pytest.raises(djp.errors.StateLostError, match="from_what_is_left=True"):
                rebuild(stream, FORGETTING, tmp_path)
            assert names(stream) == ["counts"]
            djp.follow(stream, FORGETTING, state_folder=tmp_path / "next", from_what_is_left=True)
            assert not compare(stream, FORGETTING, folder=tmp_path).equal
            djp.promote(stream, FORGETTING, state_folder=tmp_path / "next")
            assert min(begin.values()) > 0
            rebuild(stream, FORGETTING, tmp_path)  # the live state is of no more than that now
            assert compare(stream, FORGETTING, folder=tmp_path).equal

    def test_a_group_that_began_on_what_was_left_can_be_rebuilt(self, tmp_path: Path, clock: Clock) -> None:
        with memory_stream(clock=clock) as stream:
            stream.create_topic(SHORT)
            stream.publish("clicks", clicks(random.Random(1), 40))
            clock.advance(80)
            assert stream.apply_retention()
            FORGETTING.register(stream)
            stream.publish("clicks", clicks(random.Random(1), 40))
            handle(stream, FORGETTING, tmp_path)
            rebuild(stream, FORGETTING, tmp_path)
            assert compare(stream, FORGETTING, folder=tmp_path).equal


class TestRefusals:
    """What cannot come out right does not begin."""

    def test_another_code_than_has_begun_it(self, stream: djp.EventStream, tmp_path: Path) -> None:
        V1.register(stream)
        publish(stream, clicks(random.Random(1), 10))
        handle(stream, V1, tmp_path)
        rebuild(stream, V2, tmp_path)
        for use in (djp.follow, djp.promote):
            with pytest.raises(djp.errors.InvalidSettingError, match=r"begun by code v2, and this is v3.*abandon it"):
                use(stream, counting(10, "v3"), state_folder=tmp_path)
        djp.promote(stream, V2, state_folder=tmp_path)
        publish(stream, clicks(random.Random(1), 10, 10))
        handle(stream, V2, tmp_path)
        with pytest.raises(djp.errors.InvalidSettingError, match=r"begun by code v1, and this is v2.*run it with that"):
            djp.rollback(stream, V2, state_folder=tmp_path)

    def test_what_keeps_no_state(self, stream: djp.EventStream, tmp_path: Path) -> None:
        @djp.consumer(topic=CLICKS)
        def plain(batch: djp.Batch) -> None: ...

        for use in (djp.follow, djp.promote, djp.rollback):
            for consumer in (plain, V1.following("next")):
                with pytest.raises(djp.errors.InvalidSettingError, match="keeps no state of its own"):
                    use(stream, consumer, state_folder=tmp_path)

    def test_what_is_not_there(self, stream: djp.EventStream, tmp_path: Path) -> None:
        with pytest.raises(djp.errors.UnknownGroupError, match="'counts'"):
            rebuild(stream, V1, tmp_path)
        V1.register(stream)
        follower = V1.following("next")
        for use in (
            lambda: djp.promote(stream, V1, state_folder=tmp_path),
            lambda: promote_followed(stream, "counts"),
            lambda: abandon(stream, "counts"),
            lambda: djp.run_pending(stream, follower, state_folder=tmp_path),
            lambda: djp.Worker(stream, [follower], state_folder=tmp_path).run(threading.Event()),
        ):
            with pytest.raises(djp.errors.UnknownGroupError, match=r"counts\.next"):
                use()
        with pytest.raises(djp.errors.InvalidSettingError, match="nothing has been promoted"):
            djp.rollback(stream, V1, state_folder=tmp_path)
        assert names(stream) == ["counts"]
        assert not [info.name for info in stream.topics(internal=True) if info.name.endswith((".next", ".previous"))]

    def test_other_topics(self, stream: djp.EventStream, tmp_path: Path) -> None:
        V1.register(stream)

        @djp.consumer(topics=[SEEN], stateful=True, group="counts")
        def counts(batch: djp.Batch) -> None: ...

        with pytest.raises(djp.errors.GroupMismatchError, match="reads \\('clicks',\\)"):
            rebuild(stream, counts, tmp_path)

    @pytest.mark.parametrize("length", [179, 180])
    def test_a_name_that_leaves_no_room(self, stream: djp.EventStream, tmp_path: Path, length: int) -> None:
        long = counting(1, "v1", group="a.b-" + "c" * (length - 4))
        long.register(stream)
        if length == 180:
            with pytest.raises(djp.errors.InvalidSettingError, match="1 characters too long"):
                rebuild(stream, long, tmp_path)
            return
        publish(stream, clicks(random.Random(1), 10))
        handle(stream, long, tmp_path)
        rebuild(stream, long, tmp_path)
        djp.promote(stream, long, state_folder=tmp_path)
        djp.rollback(stream, long, state_folder=tmp_path)
        assert state_of(stream, long, tmp_path) == folded(stream)

    def test_without_a_worker_that_follows_the_live_one_is_not_even_frozen(
        self, stream: djp.EventStream, tmp_path: Path
    ) -> None:
        V1.register(stream)
        rebuild(stream, V2, tmp_path)
        publish(stream, clicks(random.Random(1), 10))
        handle(stream, V1, tmp_path)
        epochs = [task.epoch for task in stream.coordinator.tasks("counts")]
        with pytest.raises(djp.errors.NotCaughtUpError, match=r"\d+ records behind 'counts', and nobody works on it"):
            promote_followed(stream, "counts")
        assert [task.epoch for task in stream.coordinator.tasks("counts")] == epochs


class TestOthers:
    """Whoever else knows the group: readers of outputs, long-lived processes, dead letters, promoters."""

    def test_readers_of_outputs_go_on(self, stream: djp.EventStream, tmp_path: Path) -> None:
        @djp.consumer(topic=CLICKS, stateful=True, group="counts", max_batch=djp.Threshold(events=5))
        def counts(batch: djp.Batch) -> dict[str, list[int]]:
            batch.state.set("n", 1)
            return {"n": [record.data["n"] for record in batch]}

        counts.register(stream)
        with other_process(tmp_path) as there:
            outputs = BatchOutputs[dict[str, list[int]]](there, "counts")
            publish(stream, clicks(random.Random(1), 30))
            handle(stream, counts, tmp_path)
            given = outputs.since("me")
            assert given
            outputs.advance("me", given[-1])
            rebuild(stream, counts, tmp_path)
            assert outputs.since("me") == []  # and the other process knows the group's number
            djp.promote(stream, counts, state_folder=tmp_path / "next")
            assert outputs.since("me") == []
            assert outputs.latest() == given[-1]
            publish(stream, clicks(random.Random(2), 30, 30))
            handle(stream, counts, tmp_path)
            given += outputs.since("me")
        handled = [n for output in given for n in output.load()["n"]]
        assert sorted(handled) == published(stream)

    def test_a_process_that_knew_them_before(self, stream: djp.EventStream, tmp_path: Path) -> None:
        """What it has looked up under these names is another thing now."""
        V1.register(stream)
        publish(stream, clicks(random.Random(1), 30))
        with other_process(tmp_path) as there, there.view(V1, folder=tmp_path / "seen") as view:
            handle(there, V1, tmp_path)
            rebuild(there, V2, tmp_path)
            there.log.topic("__changelog.counts.next")
            there.log.topic("__changelog.counts")
            djp.promote(stream, V2, state_folder=tmp_path / "next")
            assert dict(view.refresh().items()) == folded(stream, 10)
            publish(stream, clicks(random.Random(2), 30, 30))
            handle(there, V2, tmp_path)
            assert dict(view.refresh().items()) == folded(stream, 10)
            rebuild(there, V1, tmp_path)
            assert compare(there, V2, folder=tmp_path).differing == 12
            djp.promote(there, V1, state_folder=tmp_path / "next")
            assert dict(view.refresh().items()) == folded(stream)
            assert causes(stream) == published(stream)

    def test_dead_letters_go_with_the_state_that_lacks_them(self, stream: djp.EventStream, tmp_path: Path) -> None:
        def refusing(code: str, *bad: int) -> djp.Consumer:
            @djp.consumer(topic=CLICKS, stateful=True, group="counts", code_version=code)
            def counts(batch: djp.Batch) -> None:
                for record in batch:
                    if record.data["n"] in bad:
                        batch.fail(record, "bad")
                    else:
                        batch.state.set(record.data["n"], True)

            return counts

        def pending(group: str = "counts") -> list[int]:
            return sorted(_number(stream, letter) for letter in stream.dead_letters(group))

        old, new = refusing("v1", 1, 2, 3), refusing("v2", 3, 4, 5)
        old.register(stream)
        publish(stream, [CLICKS.event(user=f"u{n}", n=n, at="") for n in range(8)])
        handle(stream, old, tmp_path)
        assert pending() == [1, 2, 3]
        three = [one.id for one in stream.dead_letters("counts") if _number(stream, one) == 3]
        stream.discard_dead_letters("counts", three)
        rebuild(stream, new, tmp_path)
        assert (pending(), pending("counts.next")) == ([1, 2], [3, 4, 5])
        djp.promote(stream, new, state_folder=tmp_path / "next")
        assert pending() == [4, 5], "3 is what somebody has decided to do without"
        assert pending("counts.previous") == [1, 2]
        djp.redrive(stream, refusing("v2"), state_folder=tmp_path / "state")
        assert sorted(state_of(stream, new, tmp_path)) == [0, 1, 2, 4, 5, 6, 7]
        assert pending() == []
        djp.redrive(stream, refusing("v1").following("previous"), state_folder=tmp_path / "state")
        djp.rollback(stream, old, state_folder=tmp_path / "state")
        assert sorted(state_of(stream, old, tmp_path)) == [0, 1, 2, 4, 5, 6, 7]

    def test_two_promoters_at_once(self, stream: djp.EventStream, tmp_path: Path) -> None:
        V1.register(stream)
        publish(stream, clicks(random.Random(1), 60))
        handle(stream, V1, tmp_path)
        rebuild(stream, V2, tmp_path)
        with other_process(tmp_path) as there:
            starts = threading.Barrier(2)

            def one(on: djp.EventStream, name: str) -> Callable[[], object]:
                def run() -> object:
                    starts.wait()
                    return djp.promote(on, V2, state_folder=tmp_path / name)

                return run

            with in_thread(one(stream, "a")) as here, in_thread(one(there, "b")) as other:
                pass
        assert [] in (here[0], other[0])
        for outcome in (here[0], other[0]):
            assert outcome == [] or isinstance(outcome, djp.errors.UnknownGroupError), outcome
        assert names(stream) == ["counts", "counts.previous"]
        assert versions(stream, "counts").code_versions == {"live": "v2", "previous": "v1"}
        assert state_of(stream, V2, tmp_path) == folded(stream, 10)

    def test_the_second_promotion_drops_the_first_version(self, stream: djp.EventStream, tmp_path: Path) -> None:
        V1.register(stream)
        publish(stream, clicks(random.Random(1), 20))
        handle(stream, V1, tmp_path)
        for consumer in (V2, counting(100, "v3")):
            rebuild(stream, consumer, tmp_path)
            djp.promote(stream, consumer, state_folder=tmp_path / "next")
        assert versions(stream, "counts").code_versions == {"live": "v3", "previous": "v2"}
        internal = [info.name for info in stream.topics(internal=True) if info.name.startswith("__")]
        assert sorted(internal) == ["__changelog.counts", "__changelog.counts.previous"]
        abandon(stream, "counts", role="previous")
        assert names(stream) == ["counts"]
        assert state_of(stream, V1, tmp_path) == folded(stream, 100)

    def test_an_abandoned_follower_is_begun_anew(self, stream: djp.EventStream, tmp_path: Path) -> None:
        V1.register(stream)
        publish(stream, clicks(random.Random(1), 20))
        handle(stream, V1, tmp_path)
        rebuild(stream, V2, tmp_path)
        abandon(stream, "counts")
        rebuild(stream, counting(100, "v3"), tmp_path)
        assert versions(stream, "counts").behind == {"next": 0, "previous": None}
        assert state_of(stream, V1.following("next"), tmp_path) == folded(stream, 100)


def _number(stream: djp.EventStream, letter: DeadLetter) -> int:
    (record,) = stream.records(CLICKS, letter.partition, letter.offset, letter.offset + 1)
    return int(record.data["n"])
