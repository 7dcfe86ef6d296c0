"""Which key goes to which partition, and topics' declarations."""

from typing import Any
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from djp_dagster import Event, Topic
from djp_dagster.errors import InvalidSettingError, MissingKeyError
from djp_dagster.partitioning import partition_of, stable_hash
from djp_dagster.streams.publishing import partitioner

text = st.text(st.characters(codec="utf-8"), max_size=20)
counts = st.integers(1, 64)


@pytest.mark.parametrize(
    ("key", "expected"),
    [("", 0), ("123456789", 0xCBF43926), (123456789, 0xCBF43926), (b"123456789", 0xCBF43926), ("ü", 0x63D969D5)],
)
def test_known_vectors(key: Any, expected: int) -> None:
    assert stable_hash(key) == expected
    assert partition_of(key, 16) == expected % 16


def test_vectors_that_must_never_change() -> None:
    assert [partition_of(f"user-{n}", 8) for n in range(12)] == [2, 4, 6, 0, 3, 5, 7, 1, 0, 6, 2, 4]
    assert [partition_of(n, 4) for n in (0, 7, -1, 2**70)] == [1, 2, 2, 3]


@given(text | st.integers() | st.binary(max_size=20), counts)
def test_it_is_crc32_of_the_key(key: Any, count: int) -> None:
    encoded = key if isinstance(key, bytes) else str(key).encode()
    assert partition_of(key, count) == crc32(encoded) % count


@given(text | st.integers(-(2**63), 2**64 - 1), counts, st.sampled_from(["key", "deep.key", "much.deeper.key", None]))
def test_the_partitioner_is_the_topics_choice(key: Any, count: int, path: str | None) -> None:
    data: Any = key
    for part in reversed((path or "key").split(".")):
        data = {part: data}
    topic = Topic("t", partitions=count, key=path)
    event = topic.event(data)
    expected = crc32(str(event.id if path is None else key).encode()) % count
    assert partitioner(topic)(event) == topic.partition_of(event) == expected
    assert topic.key_of(event) == (event.id if path is None else key)


@given(text.filter(bool) | st.integers(-(2**31), 2**31 - 1), counts, st.sampled_from(["key", "deep.key", None]))
def test_a_partition_key_wins(key: Any, count: int, path: str | None) -> None:
    topic = Topic("t", partitions=count, key=path)
    event = topic.event(key="other", deep={"key": "other"}).replace(ext={"partitionkey": key, "more": 1})
    assert partitioner(topic)(event) == topic.partition_of(event) == crc32(str(key).encode()) % count


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"key": None},
        {"key": 1.5},
        {"key": True},
        {"key": [1]},
        {"key": {}},
        {"other": 1},
        None,
        7,
        "key",
        [1],
        b"x",
    ],
    ids=repr,
)
@pytest.mark.parametrize("path", ["key", "key.inside"])
def test_an_event_without_its_key_is_named(data: Any, path: str) -> None:
    topic = Topic("t", partitions=4, key=path)
    event = Event(type="t", source="s", id="lost", data=data)
    for choose in (partitioner(topic), topic.partition_of):
        with pytest.raises(MissingKeyError, match="'lost'") as caught:
            choose(event)
        assert caught.value.facts == {"topic": "t", "key": path, "event_id": "lost"}


def test_a_path_reaches_into_nothing_but_objects() -> None:
    with pytest.raises(MissingKeyError):
        Topic("t", key="list.0").key_of(Event(type="t", source="s", data={"list": ["x"]}))


class TestTopic:
    """Declarations."""

    @pytest.mark.parametrize(
        ("settings", "setting"),
        [
            ({"name": ""}, "name"),
            ({"name": "a b"}, "name"),
            ({"name": "a/b"}, "name"),
            ({"name": "ü"}, "name"),
            ({"name": "x" * 201}, "name"),
            ({"name": None}, "name"),
            ({"partitions": 0}, "partitions"),
            ({"partitions": -1}, "partitions"),
            ({"partitions": 4097}, "partitions"),
            ({"partitions": 1.0}, "partitions"),
            ({"partitions": "4"}, "partitions"),
            ({"max_event_bytes": "big"}, "max_event_bytes"),
            ({"retention": "long"}, "retention"),
            ({"retention_cap": -1}, "retention_cap"),
            ({"retention": "7d", "retention_cap": "1d"}, "retention_cap"),
        ],
    )
    def test_a_wrong_one_is_named(self, settings: dict[str, Any], setting: str) -> None:
        with pytest.raises(InvalidSettingError, match=setting) as caught:
            Topic(**{"name": "t", **settings})
        assert caught.value.facts["setting"] == setting

    def test_limits_in_seconds(self) -> None:
        assert Topic("t").limits.age_s is None
        limits = Topic("t", retention="1h", retention_cap="1d").limits
        assert (limits.age_s, limits.cap_s) == (3600.0, 86400.0)
        Topic("x" * 200, partitions=4096)

    def test_events_of_it(self) -> None:
        topic = Topic("clicks", key="user")
        event = topic.event({"user": "u", "not a name": 1}, n=2)
        assert (event.type, event.source) == ("clicks", "/topics/clicks")
        assert event.data == {"user": "u", "not a name": 1, "n": 2}
        assert topic.event(n=1).data == {"n": 1}
