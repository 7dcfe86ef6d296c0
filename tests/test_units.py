"""Sizes and durations as people write them."""

import contextlib
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from djp_dagster.errors import InvalidSettingError
from djp_dagster.units import parse_bytes, parse_seconds


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, 0),
        (512, 512),
        (1.5, 2),
        ("7", 7),
        ("7b", 7),
        ("1kB", 1000),
        ("1 KiB", 1024),
        ("100MB", 10**8),
        ("64MiB", 64 << 20),
        (" 1.5 gb ", 15 * 10**8),
        ("2GiB", 2 << 30),
        ("1TB", 10**12),
        ("1tib", 1 << 40),
    ],
)
def test_bytes(value: Any, expected: int) -> None:
    found = parse_bytes(value)
    assert found == expected
    assert type(found) is int


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, 0.0),
        (3, 3.0),
        (0.25, 0.25),
        ("30", 30.0),
        ("250ms", 0.25),
        ("5 us", 5e-6),
        ("90s", 90.0),
        ("15m", 900.0),
        ("15min", 900.0),
        ("1.5h", 5400.0),
        ("12H", 43200.0),
        ("7d", 604800.0),
        ("2w", 1209600.0),
        (timedelta(minutes=1, milliseconds=500), 60.5),
    ],
)
def test_seconds(value: Any, expected: float) -> None:
    assert parse_seconds(value) == pytest.approx(expected)


WRONG = [
    -1,
    -0.5,
    float("nan"),
    float("inf"),
    True,
    None,
    [],
    b"1",
    "",
    "MB",
    "1 apple",
    "-1",
    "1e3",
    "1,5",
    "1 2",
    "0x10",
]


@pytest.mark.parametrize("value", [*WRONG, "5h"], ids=repr)
def test_what_is_no_size_names_its_setting(value: Any) -> None:
    with pytest.raises(InvalidSettingError, match="max_event_bytes=") as caught:
        parse_bytes(value, name="max_event_bytes")
    assert caught.value.facts["setting"] == "max_event_bytes"


@pytest.mark.parametrize("value", [*WRONG, "5MB", timedelta(seconds=-1)], ids=repr)
def test_what_is_no_duration_names_its_setting(value: Any) -> None:
    with pytest.raises(InvalidSettingError, match="wait=") as caught:
        parse_seconds(value, name="wait")
    assert caught.value.facts["setting"] == "wait"


@given(st.integers(0, 10**15))
def test_plain_numbers_stay(number: int) -> None:
    assert parse_bytes(number) == parse_bytes(str(number)) == number
    assert parse_seconds(number) == float(number)


@given(st.text(max_size=12))
def test_nothing_else_is_raised(value: str) -> None:
    for parse in (parse_bytes, parse_seconds):
        with contextlib.suppress(InvalidSettingError):
            assert parse(value) >= 0
