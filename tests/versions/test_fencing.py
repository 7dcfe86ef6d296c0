"""Who works for a version that is no more, or promotes while somebody else does, changes nothing."""

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

import djp_dagster as djp
from djp_dagster.processing import crash_points
from djp_dagster.testing import memory_stream
from djp_dagster.versions import promotion
from djp_dagster.versions.promotion import promote_followed, versions
from tests.processing.kit import in_thread
from tests.versions.kit import (
    CLICKS,
    SEEN,
    V1,
    V2,
    causes,
    clicks,
    effects,
    folded,
    names,
    publish,
    published,
    state_of,
    wait_until,
)

Hooks = Callable[[str, Callable[[], None]], None]


@pytest.fixture
def stream(tmp_path: Path) -> Iterator[djp.EventStream]:
    """A file: in memory all would wait for a handler that waits."""
    with djp.open_stream(tmp_path / "stream.db") as opened:
        yield opened


@pytest.fixture
def at_point() -> Iterator[Hooks]:
    """Have something happen at a point of the protocol, the first time it is reached by a promotion."""

    def arrange(point: str, event: Callable[[], None]) -> None:
        def hook(reached: str) -> None:
            if reached == point:
                crash_points.set_hook(None)
                event()

        crash_points.set_hook(hook)

    yield arrange
    crash_points.set_hook(None)


@pytest.fixture
def rebuilt(stream: djp.EventStream, tmp_path: Path) -> Path:
    """A live version, and a follower that has caught up; where local state lies."""
    V1.register(stream)
    publish(stream, clicks(random.Random(1), 30))
    djp.run_pending(stream, V1, state_folder=tmp_path)
    djp.follow(stream, V2, state_folder=tmp_path)
    return tmp_path


class Stuck:
    """A consumer whose handler waits in the middle of a batch; and what its batches were given for tokens."""

    def __init__(self, code: str) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.tokens: list[int] = []

        @djp.consumer(topic=CLICKS, emits=[SEEN], stateful=True, group="counts", code_version=code)
        def counts(batch: djp.Batch) -> None:
            for record in batch:
                batch.emit(SEEN.event(user="old", n=record.data["n"], code="stuck"))
                batch.state.set("stuck", 1)
                batch.set_deadline("stuck", record.append_time)
            self.tokens.append(batch.fencing_token)
            self.reached.set()
            assert self.go_on.wait(30)

        self.consumer = counts

    @contextmanager
    def at_work(self, stream: djp.EventStream, folder: Path) -> Iterator[list[object]]:
        with in_thread(lambda: djp.run_pending(stream, self.consumer, state_folder=folder / "stuck")) as outcome:
            try:
                assert self.reached.wait(30)
                yield outcome
            finally:
                self.go_on.set()


def test_the_old_holder_commits_nothing_after_the_switch(stream: djp.EventStream, rebuilt: Path) -> None:
    publish(stream, clicks(random.Random(2), 10, 30))
    before, stuck = effects(stream), Stuck("v1")
    with stuck.at_work(stream, rebuilt) as outcome:
        djp.promote(stream, V2, state_folder=rebuilt)
        tasks = stream.coordinator.tasks("counts")
        stuck.go_on.set()
    assert isinstance(outcome[0], djp.errors.FencedError)
    assert effects(stream) == before
    assert stream.coordinator.tasks("counts") == tasks
    assert stream.coordinator.next_deadline("counts", [0, 1, 2]) is None
    assert stream.coordinator.intents("counts") == stream.coordinator.intents("counts.previous") == []
    djp.run_pending(stream, V2, state_folder=rebuilt)
    assert causes(stream) == published(stream)
    assert state_of(stream, V2, rebuilt) == folded(stream, 10)


def test_nor_does_whoever_worked_for_the_follower(stream: djp.EventStream, rebuilt: Path) -> None:
    publish(stream, clicks(random.Random(2), 10, 30))
    djp.run_pending(stream, V1, state_folder=rebuilt)
    stuck = Stuck("v2")
    with in_thread(
        lambda: djp.run_pending(stream, stuck.consumer.following("next"), state_folder=rebuilt / "stuck")
    ) as outcome:
        assert stuck.reached.wait(30)
        stream.coordinator.take_over("counts.next", "somebody", 0.001)  # as if its lease had run out
        djp.promote(stream, V2, state_folder=rebuilt)
        stuck.go_on.set()
    assert isinstance(outcome[0], djp.errors.FencedError)
    assert state_of(stream, V2, rebuilt) == folded(stream, 10)
    assert names(stream) == ["counts", "counts.previous"]


def test_fencing_tokens_only_grow(stream: djp.EventStream, rebuilt: Path) -> None:
    """Whoever has fenced another system by the token of the old version is not fenced out with the new one."""
    for _ in range(5):
        stream.coordinator.take_over("counts", "somebody", 0.001)
    publish(stream, clicks(random.Random(2), 10, 30))
    one, two = Stuck("v1"), Stuck("v2")
    one.go_on.set()
    two.go_on.set()
    with one.at_work(stream, rebuilt):
        pass
    djp.promote(stream, V2, state_folder=rebuilt)
    publish(stream, clicks(random.Random(3), 10, 40))
    with two.at_work(stream, rebuilt):
        pass
    assert min(two.tokens) > max(one.tokens)


@pytest.mark.parametrize("point", ["v.frozen", "v.caught_up"])
def test_who_loses_the_freeze_tries_again(stream: djp.EventStream, rebuilt: Path, at_point: Hooks, point: str) -> None:
    """The promoter was slower than its lease: the live version has gone on meanwhile."""

    def thaw() -> None:
        stream.coordinator.take_over("counts", "somebody", 0.001)
        publish(stream, clicks(random.Random(2), 10, 30))
        djp.run_pending(stream, V1, state_folder=rebuilt)

    at_point(point, thaw)
    djp.promote(stream, V2, state_folder=rebuilt)
    assert versions(stream, "counts").code_versions == {"live": "v2", "previous": "v1"}
    assert causes(stream) == published(stream)
    assert state_of(stream, V2, rebuilt) == folded(stream, 10)


def test_the_answer_is_lost(stream: djp.EventStream, rebuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swap = stream.coordinator.swap

    def swap_and_fail(*args: object, **kwargs: object) -> None:
        swap(*args, **kwargs)  # type: ignore[arg-type]
        raise djp.errors.StreamUnavailableError("the connection broke during COMMIT", ambiguous=True)

    monkeypatch.setattr(stream.coordinator, "swap", swap_and_fail)
    assert djp.promote(stream, V2, state_folder=rebuilt) == []
    assert versions(stream, "counts").code_versions == {"live": "v2", "previous": "v1"}
    monkeypatch.undo()
    djp.rollback(stream, V1, state_folder=rebuilt)
    assert state_of(stream, V1, rebuilt) == folded(stream)


def test_in_vain_it_changes_nothing_and_counts_no_death(
    stream: djp.EventStream, rebuilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promotion, "_FREEZE_AT_MOST_S", 0.2)
    publish(stream, clicks(random.Random(2), 10, 30))
    stuck = Stuck("v1")
    with stuck.at_work(stream, rebuilt):
        (intent, *_) = stream.coordinator.intents("counts")
        stream.coordinator.take_over("counts", "somebody", 0.001)
    stream.coordinator.resume(stream.coordinator.take_over("counts", "another", 0.001), intent.batch_id)
    assert [one.deaths for one in stream.coordinator.intents("counts")] == [0]
    # A follower that somebody else is to keep up to date, and does not.
    stream.coordinator.join("counts.next", "sleeper", 60.0)
    djp.run_pending(stream, V1, state_folder=rebuilt)
    with pytest.raises(djp.errors.NotCaughtUpError, match="did not catch up with 'counts' in time"):
        promote_followed(stream, "counts", wait="0.3s")
    assert versions(stream, "counts").code_versions == {"live": "v1", "next": "v2"}
    publish(stream, clicks(random.Random(3), 10, 40))
    djp.run_pending(stream, V1, state_folder=rebuilt)
    assert state_of(stream, V1, rebuilt) == folded(stream)
    assert causes(stream) == published(stream)


def test_a_handler_that_fails_ends_the_freeze_at_once(stream: djp.EventStream, rebuilt: Path, at_point: Hooks) -> None:
    @djp.consumer(
        topic=CLICKS, emits=[SEEN], stateful=True, group="counts", code_version="v2", max_poison=0, on_poison="block"
    )
    def failing(batch: djp.Batch) -> None:
        for _ in batch:
            raise ValueError("a mistake")

    def thaw() -> None:
        stream.coordinator.take_over("counts", "somebody", 0.001)
        publish(stream, clicks(random.Random(2), 10, 30))
        djp.run_pending(stream, V1, state_folder=rebuilt)

    at_point("v.frozen", thaw)
    with pytest.raises(djp.errors.DjpError, match="a mistake"):
        djp.promote(stream, failing, state_folder=rebuilt)
    assert all(task.owner is None for task in stream.coordinator.tasks("counts"))
    assert versions(stream, "counts").code_versions == {"live": "v1", "next": "v2"}


def test_who_comes_while_another_is_at_it_waits_for_it(stream: djp.EventStream, rebuilt: Path, at_point: Hooks) -> None:
    outcomes: list[BaseException] = []

    def come_second() -> None:
        try:
            promote_followed(stream, "counts", wait="0.1s")
        except djp.errors.LeaseBusyError as error:
            outcomes.append(error)

    at_point("v.frozen", come_second)
    djp.promote(stream, V2, state_folder=rebuilt)
    assert "is being promoted by 'promotion-" in str(outcomes[0])
    assert versions(stream, "counts").code_versions == {"live": "v2", "previous": "v1"}


def test_a_reader_sees_one_version_at_a_time(stream: djp.EventStream, rebuilt: Path) -> None:
    """While a promoter goes to and fro, every look is at the whole of one of them."""
    stop, looks = threading.Event(), list[str]()
    wanted = {"v1": folded(stream), "v2": folded(stream, 10)}

    def look() -> None:
        with djp.open_stream(rebuilt / "stream.db") as there, there.view(V1, folder=rebuilt / "seen") as view:
            while not stop.is_set():
                found = dict(view.refresh().items())
                looks.append(next((code for code, state in wanted.items() if state == found), "a mixture"))

    with in_thread(look, stop):
        wait_until(lambda: bool(looks), "the reader")
        for consumer, switch in ((V2, djp.promote), (V1, djp.rollback), (V2, djp.rollback), (V1, djp.rollback)):
            seen = len(looks)
            switch(stream, consumer, state_folder=rebuilt)
            code = consumer.code_version
            wait_until(partial(_has_seen, looks, code, seen + 3), f"the reader to see {code}")
    changes = [code for i, code in enumerate(looks) if i == 0 or looks[i - 1] != code]
    assert changes == ["v1", "v2", "v1", "v2", "v1"]


def _has_seen(looks: list[str], code: str, least: int) -> bool:
    return looks[-1:] == [code] and len(looks) >= least


def test_a_stream_in_memory(tmp_path: Path) -> None:
    with memory_stream() as stream:
        V1.register(stream)
        publish(stream, clicks(random.Random(1), 30))
        djp.run_pending(stream, V1, state_folder=tmp_path)
        djp.follow(stream, V2, state_folder=tmp_path)
        djp.promote(stream, V2, state_folder=tmp_path)
        assert state_of(stream, V2, tmp_path) == folded(stream, 10)
