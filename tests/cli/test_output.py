"""Sizes, ages and times, for people and back."""

import pytest

from djp_dagster.cli import output
from djp_dagster.errors import InvalidSettingError
from djp_dagster.streams.records import to_micros
from djp_dagster.streams.seeking import parse_time

NOW = 1_700_000_000_000_000


@pytest.mark.parametrize(
    ("number", "text"),
    [(None, "-"), (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (99_949, "99.9 kB"), (99_951, "100 kB"),
     (999_499, "999 kB"), (999_501, "1.0 MB"), (5 * 10**12, "5.0 TB"), (5 * 10**15, "5000 TB")],
)  # fmt: skip
def test_sizes(number: int | None, text: str) -> None:
    assert output.size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (-1.0, "0.0 s"), (0.04, "0.0 s"), (9.9, "9.9 s"), (9.96, "10 s"), (99.4, "99 s"), (100, "2 min"),
     (5969, "99 min"), (5971, "2 h"), (172_000, "48 h"), (200_000, "2 d")],
)  # fmt: skip
def test_spans(seconds: float | None, text: str) -> None:
    assert output.duration(seconds) == text


def test_a_time_shown_can_be_given_back() -> None:
    assert to_micros(parse_time(output.short_moment(NOW + 1999), NOW)) == NOW + 1000
    exact = output.moment(NOW + 1999)
    assert exact is not None
    assert to_micros(parse_time(exact, NOW)) == NOW + 1999


def test_nothing_printed_steers_a_terminal() -> None:
    assert output.plain("a\x1b[31mb\u202ec\x9b\n") == "a\ufffd[31mb\ufffdc\ufffd\ufffd"


def test_what_json_cannot_say_is_said_as_text() -> None:
    assert output.json_bytes({"a": b"x"}) == b'{"a":"eA=="}'
    assert output.json_bytes(object) == b"\"<class 'object'>\""


@pytest.mark.parametrize("text", ["9999999999d", "900000d"])
def test_a_duration_beyond_the_calendar_is_refused(text: str) -> None:
    with pytest.raises(InvalidSettingError, match=text):
        parse_time(text, NOW)
