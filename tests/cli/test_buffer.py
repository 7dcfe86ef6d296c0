"""``djp buffer``: what waits in an event buffer is what it says; what it expires, expires."""

from pathlib import Path

import pytest

from djp_dagster import EventStream, Joined, Topic, consumer, join, run_pending
from tests.cli.conftest import Djp, document, documents
from tests.processing.kit import in_thread

VIDEO, IMAGES = Topic("video", partitions=2, key="p"), Topic("images", partitions=2, key="p")


@join(inputs={"video": VIDEO, "images": IMAGES}, key="p", deadline="1h")
def create(parts: Joined) -> None: ...


@consumer(topic=VIDEO)
def other(batch: object) -> None: ...


@pytest.fixture
def waiting(stream: EventStream, tmp_path: Path) -> Path:
    """A buffer in which ``a`` and 7 wait, and ``b`` is done."""
    create.register(stream)
    stream.publish(VIDEO, [VIDEO.event(p=key, secret="\x1b[31m") for key in ("a", "b", 7)])
    stream.publish(IMAGES, [IMAGES.event(p="b")])
    run_pending(stream, create, state_folder=tmp_path / "state")
    return tmp_path / "state"


@pytest.mark.usefixtures("waiting")
def test_it_lists_what_waits_or_is_done(djp: Djp) -> None:
    found = documents(djp("buffer", "list", "create", "--json"))
    assert {(one["key"], one["status"], tuple(one["parts"].items())) for one in found} == {
        ("a", "pending", (("video", 1),)),
        (7, "pending", (("video", 1),)),
    }
    assert all(one["due"] and one["since"] is None and one["bytes"] > 50 for one in found)
    assert document(djp("buffer", "list", "create", "--status", "completed", "--json"))["key"] == "b"
    table = djp("buffer", "list", "create").stdout
    assert table.count("pending") == 2
    assert "60 min" in table
    result = djp("buffer", "list", "create", "-n", 1, "--status", "all")
    assert "2 more; -n 3 shows all" in result.stderr


@pytest.mark.usefixtures("waiting")
def test_it_shows_one_key_with_its_events(djp: Djp) -> None:
    found = document(djp("buffer", "show", "create", "a", "--json"))
    (event,) = found["events"]["video"]
    assert event["data"] == {"p": "a", "secret": "\x1b[31m"}
    assert document(djp("buffer", "show", "create", "7", "--json"))["key"] == 7
    text = djp("buffer", "show", "create", "a").stdout
    assert "\x1b" not in text
    assert "pending" in text
    assert document(djp("buffer", "show", "create", "b", "--json"))["events"] == {}
    assert "knows nothing of key 'zz'" in djp("buffer", "show", "create", "zz", code=1).stderr


def test_it_expires_keys_through_whoever_holds_the_group(djp: Djp, stream: EventStream, waiting: Path) -> None:
    asked = document(djp("buffer", "expire", "create", "7", "--json"))
    assert asked["keys"] == 1
    assert asked["done"] is None
    assert "not done within 0.1 s" in djp("buffer", "expire", "create", "7", "--wait", "0.1s", code=1).stderr
    with in_thread(lambda: run_pending(stream, create, state_folder=waiting)):
        pass
    assert [letter.error for letter in stream.dead_letters("create")] == [
        "key 7: images missing when its deadline passed"
    ]
    djp("buffer", "expire", "create", "--all")
    run_pending(stream, create, state_folder=waiting)
    assert len(stream.dead_letters("create")) == 2
    assert "no pending keys" in djp("buffer", "list", "create").stderr
    assert "none of ['a'] waits" in djp("buffer", "expire", "create", "a", code=1).stderr
    assert "--all" in djp("buffer", "expire", "create", code=2).stderr


def test_a_group_without_a_buffer_is_refused(djp: Djp, stream: EventStream) -> None:
    other.register(stream)
    assert "keeps no state, so it is no join" in djp("buffer", "list", "other", code=1).stderr
    assert "does not exist" in djp("buffer", "list", "nobody", code=1).stderr

    @consumer(topic=VIDEO, stateful=True)
    def counts(batch: object) -> None:
        batch.state.set("k", {"x": 1})  # type: ignore[attr-defined]

    counts.register(stream)
    stream.publish(VIDEO, [VIDEO.event(p="a")])
    run_pending(stream, counts)
    assert "no join" in djp("buffer", "list", "counts", code=1).stderr
