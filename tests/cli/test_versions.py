"""``djp versions``: what there is, what differs; promoted without its code, if somebody has followed."""

import threading
from pathlib import Path

import pytest

from djp_dagster import Batch, Consumer, EventStream, Threshold, Topic, Worker, consumer, follow, run_pending
from tests.cli.conftest import Djp, document, documents
from tests.processing.kit import in_thread, wait_until

CLICKS = Topic("clicks", partitions=2, key="user")


def counting(step: int, code: str) -> Consumer:
    @consumer(topic=CLICKS, stateful=True, group="counts", code_version=code, max_batch=Threshold(events=5))
    def counts(batch: Batch) -> None:
        for record in batch:
            user = record.data["user"]
            if user == "bad":
                batch.fail(record, "bad")
            else:
                batch.state.set(user, batch.state.get(user, 0) + step)

    return counts


V1, V2 = counting(1, "v1"), counting(10, "v2\x1b[31m")


def publish(stream: EventStream, *users: str) -> None:
    stream.create_topic(CLICKS)
    stream.publish(CLICKS, [CLICKS.event(user=user) for user in users])


@pytest.fixture
def followed(stream: EventStream, tmp_path: Path) -> Path:
    """A live version, and one that counts otherwise; where local state lies."""
    V1.register(stream)
    publish(stream, "a", "b", "a", "bad")
    run_pending(stream, V1, state_folder=tmp_path)
    follow(stream, V2, state_folder=tmp_path)
    return tmp_path


def test_it_says_what_there_is(djp: Djp, stream: EventStream, followed: Path) -> None:
    live, following = documents(djp("versions", "status", "counts", "--json"))
    assert (live["version"], live["group"], live["code_version"], live["behind"]) == ("live", "counts", "v1", None)
    assert (following["version"], following["group"], following["behind"]) == ("next", "counts.next", 0)
    assert live["dead_letters_pending"] == following["dead_letters_pending"] == 1
    publish(stream, "a", "b")
    run_pending(stream, V1, state_folder=followed)
    assert documents(djp("versions", "status", "counts", "--json"))[1]["behind"] == 2
    shown = djp("versions", "status", "counts").stdout
    assert "counts.next" in shown
    assert "\x1b" not in shown
    djp("versions", "abandon", "counts")
    assert "counts has no other version" in djp("versions", "status", "counts").stderr
    assert "does not exist" in djp("versions", "status", "nobody", code=1).stderr


@pytest.mark.usefixtures("followed")
def test_it_says_what_differs(djp: Djp, tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    found = document(djp("versions", "compare", "counts", "--json", code=1))
    assert found.pop("examples") == [["a", 2, 20], ["b", 1, 10]]
    assert found == {
        "equal": False,
        "keys": 2,
        "other_keys": 2,
        "only_live": 0,
        "only_other": 0,
        "differing": 2,
        "records_behind": 0,
    }
    shown = djp("versions", "compare", "counts", code=1).stdout
    assert "2 keys live, 2 next: 0 only live, 0 only next, 2 differ; next is 0 records behind" in shown
    assert '"a"' in shown
    assert set(tmp_path.rglob("*")) <= before | {tmp_path / "stream.db-wal", tmp_path / "stream.db-shm"}
    assert "counts.previous" in djp("versions", "compare", "counts", "--previous", code=1).stderr


def test_the_same_is_exit_code_0(djp: Djp, stream: EventStream, tmp_path: Path) -> None:
    V1.register(stream)
    publish(stream, "a")
    run_pending(stream, V1, state_folder=tmp_path)
    follow(stream, V1, state_folder=tmp_path)
    assert document(djp("versions", "compare", "counts", "--json"))["equal"] is True


def test_there_and_back(djp: Djp, stream: EventStream, followed: Path) -> None:
    promoted = document(djp("versions", "promote", "counts", "--json"))
    assert promoted == {"group": "counts", "promoted": "next", "code_version": "v2\x1b[31m"}
    with stream.view(V2, folder=followed / "views") as view:
        assert dict(view.items()) == {"a": 20, "b": 10}
        told = djp("versions", "promote", "counts", "--previous").stdout
        assert "counts is of code v1 now; go back with: djp versions promote counts --previous" in told
        assert dict(view.refresh().items()) == {"a": 2, "b": 1}
    djp("versions", "abandon", "counts", "--previous")
    assert [info.name for info in stream.groups()] == ["counts"]
    for words in (("promote", "counts"), ("abandon", "counts"), ("promote", "counts", "--previous")):
        assert "does not exist" in djp("versions", *words, code=1).stderr


def test_one_that_is_behind_is_not_promoted(djp: Djp, stream: EventStream, followed: Path) -> None:
    publish(stream, "a", "b")
    run_pending(stream, V1, state_folder=followed)
    told = djp("versions", "promote", "counts", code=1).stderr
    assert "'counts.next' is 2 records behind 'counts', and nobody works on it; let it follow" in told
    assert [info.name for info in stream.groups()] == ["counts", "counts.next"]


def test_one_that_a_worker_keeps_up_to_date_is(djp: Djp, stream: EventStream, followed: Path) -> None:
    worker = Worker(stream, [V2.following("next")], lease="600ms", state_folder=followed)
    with in_thread(lambda: worker.run(threading.Event())) as outcome:
        wait_until(lambda: bool(stream.coordinator.members("counts.next")), "its worker")
        assert "is leased by" in djp("versions", "abandon", "counts", code=1).stderr
        publish(stream, "a", "b")
        run_pending(stream, V1, state_folder=followed)
        djp("versions", "promote", "counts")
    assert outcome == [None]
    with stream.view(V2, folder=followed / "views") as view:
        assert dict(view.items()) == {"a": 30, "b": 20}
