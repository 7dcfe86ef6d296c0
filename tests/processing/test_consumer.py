"""`@consumer`: declarations."""

from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from djp_dagster import Batch, EventStream, RetryPolicy, Threshold, Topic, consumer, run_pending
from djp_dagster.errors import GroupMismatchError, InvalidSettingError, TopicMismatchError
from djp_dagster.testing import Clock
from tests.processing.kit import NUMBERS, OUT, fill, numbers


def handler(batch: Batch) -> str:
    """What it does."""
    return f"called with {batch}"


def test_it_stays_a_plain_function() -> None:
    made = consumer(topic=NUMBERS, emits=[OUT])(handler)
    assert made("x") == "called with x"  # type: ignore[arg-type]
    assert (made.__name__, made.__doc__, made.group) == ("handler", "What it does.", "handler")
    assert made.topics == (NUMBERS,)
    assert made.emits == (OUT,)
    assert "handler" in repr(made)


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({}, "topic"),
        ({"topic": NUMBERS, "isolate": "row"}, "isolate"),
        ({"topic": NUMBERS, "on_poison": "ignore"}, "on_poison"),
        ({"topic": NUMBERS, "max_poison": -1}, "max_poison"),
        ({"topic": NUMBERS, "max_batch": Threshold(age=1)}, "max_batch"),
        ({"topic": NUMBERS, "start": "yesterday"}, "start"),
        ({"topic": NUMBERS, "group": "a b"}, "name"),
        ({"topic": NUMBERS, "group": ""}, "name"),
        ({"topic": NUMBERS, "max_emit_bytes": "much"}, "max_emit_bytes"),
    ],
)
def test_a_wrong_declaration_is_named(settings: dict[str, Any], setting: str) -> None:
    with pytest.raises(InvalidSettingError) as caught:
        consumer(**settings)(handler)
    assert caught.value.facts["setting"] == setting


def test_the_code_version_follows_the_source() -> None:
    assert consumer(topic=NUMBERS, code_version="v7")(handler).code_version == "v7"
    first = consumer(topic=NUMBERS)(handler).code_version
    assert first == consumer(topic=NUMBERS)(handler).code_version
    namespace: dict[str, Any] = {}
    exec("def made(batch): return 1", namespace)  # no source to read
    assert consumer(topic=NUMBERS)(namespace["made"]).code_version != first


class TestStart:
    """Where a new group begins."""

    @pytest.mark.parametrize(
        ("start", "expected"),
        [
            (lambda clock: "earliest", 3),
            (lambda clock: "latest", 0),
            (lambda clock: datetime.fromtimestamp(clock.now_s, timezone.utc), 1),
            (lambda clock: datetime.fromtimestamp(clock.now_s, timezone.utc) - timedelta(seconds=15), 2),
        ],
    )
    def test_positions(self, stream: EventStream, clock: Clock, start: Callable[[Clock], Any], expected: int) -> None:
        fill(stream, NUMBERS, [])
        for n in range(3):
            clock.advance(10)
            stream.publish(NUMBERS, numbers(1, start=n))
        made = consumer(topic=NUMBERS, start=start(clock))(lambda_named())
        made.register(stream)
        assert stream.pending(made.group).events == expected

    def test_a_time_without_a_zone_is_refused(self, stream: EventStream) -> None:
        with pytest.raises(InvalidSettingError, match="time zone"):
            consumer(topic=NUMBERS, start=datetime(2024, 1, 1))(handler).register(stream)  # noqa: DTZ001


def lambda_named() -> Callable[[Batch], None]:
    def started(batch: Batch) -> None: ...

    return started


def test_registering_again_changes_nothing_and_differing_is_refused(stream: EventStream) -> None:
    made = consumer(topic=NUMBERS, emits=[OUT], group="g")(handler)
    assert made.register(stream) == made.register(stream)
    with pytest.raises(GroupMismatchError):
        consumer(topic=OUT, group="g")(handler).register(stream)
    with pytest.raises(GroupMismatchError):
        consumer(topic=NUMBERS, group="g", stateful=True)(handler).register(stream)
    with pytest.raises(TopicMismatchError):
        consumer(topic=Topic("numbers", partitions=2), group="h")(handler).register(stream)


def test_a_run_makes_what_is_missing(stream: EventStream) -> None:
    run_pending(stream, consumer(topic=NUMBERS, emits=[OUT])(handler))
    assert [info.name for info in stream.topics()] == ["numbers", "out"]
    assert [info.name for info in stream.groups()] == ["handler"]


async def _coroutine(batch: object) -> None:
    raise AssertionError


def _generator(batch: object) -> object:
    yield batch


async def _async_generator(batch: object) -> object:
    yield batch


@pytest.mark.parametrize("handler", [_coroutine, _generator, _async_generator])
@pytest.mark.parametrize("isolate", ["batch", "per_event"])
def test_handlers_that_a_call_would_not_run_are_refused(handler: object, isolate: str) -> None:
    with pytest.raises(InvalidSettingError, match="async or has a yield"):
        consumer(topic=Topic("t"), isolate=isolate)(handler)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("retry", 3),
        ("max_batch", 100),
        ("max_poison", "1"),
        ("emits", ["alerts"]),
        ("emits", Topic("alerts")),
        ("topic", "readings"),
        ("start", "yesterday"),
    ],
)
def test_wrong_types_are_named_at_once(name: str, value: object) -> None:
    given = {"topic": Topic("t"), name: value}
    with pytest.raises(InvalidSettingError, match=rf"@consumer\({name}="):
        consumer(**given)  # type: ignore[arg-type]


def test_a_retry_policy_takes_one_exception_type_or_several() -> None:
    assert RetryPolicy(transient=ValueError).transient == (ValueError,)  # type: ignore[arg-type]
    assert RetryPolicy(transient=[ValueError, KeyError]).transient == (ValueError, KeyError)  # type: ignore[arg-type]
    with pytest.raises(InvalidSettingError, match="exception types"):
        RetryPolicy(transient=("ValueError",))  # type: ignore[arg-type]
