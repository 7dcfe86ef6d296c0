"""Whatever is shuffled arrives as it was, and in order."""

from __future__ import annotations

import datetime as dt
import decimal
import pickle
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from djp_dagster.errors import InvalidValueError, PayloadForbiddenError
from djp_dagster.mapreduce.keys import decode_key, encode_key, key_array, keys_of, partitions_of
from djp_dagster.mapreduce.values import as_pickled, kind_of, pack, unpack, value_array, values_of
from djp_dagster.partitioning import partition_of

SIMPLE = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**200), 2**200)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.dates()
)
KEYS = st.recursive(SIMPLE, lambda inner: st.lists(inner, max_size=4).map(tuple), max_leaves=8)
DATA = st.recursive(
    SIMPLE | st.datetimes() | st.decimals(allow_nan=False) | st.complex_numbers(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
        | st.sets(st.integers() | st.text(max_size=2), max_size=3)
    ),
    max_leaves=8,
)
ONE_KIND = st.one_of(
    st.lists(st.text()),
    st.lists(st.integers()),
    st.lists(st.integers(-(2**63), 2**63 - 1)),
    st.lists(st.binary()),
    st.lists(st.floats(allow_nan=False)),
    st.lists(st.tuples(st.text(), st.integers())),
)


def same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other


class TestKeys:
    @given(KEYS)
    def test_come_back_as_they_were(self, key: Any) -> None:
        assert same(decode_key(encode_key(key)), key)

    @given(ONE_KIND)
    def test_their_bytes_sort_as_they_do(self, keys: list[Any]) -> None:
        assert [decode_key(one) for one in sorted(map(encode_key, keys))] == sorted(keys)

    @given(st.lists(KEYS, min_size=2, max_size=2))
    def test_different_ones_have_different_bytes(self, keys: list[Any]) -> None:
        one, other = keys
        if encode_key(one) == encode_key(other):
            assert one == other

    @given(ONE_KIND | st.lists(KEYS))
    def test_as_a_column(self, keys: list[Any]) -> None:
        kind, column = key_array(keys)
        found = keys_of(kind, column)
        assert len(found) == len(keys)
        assert all(map(same, found, keys))

    @pytest.mark.parametrize(
        "key",
        [float("nan"), [1], {"a": 1}, object(), dt.datetime(2026, 1, 1, tzinfo=dt.timezone.utc), ("a", [1]), 2**4000],
    )
    def test_what_can_be_none(self, key: Any) -> None:
        with pytest.raises(InvalidValueError, match="must be None, bool, int"):
            key_array([key])

    @given(st.lists(KEYS, min_size=1), st.integers(1, 20))
    def test_a_key_is_always_in_the_same_partition(self, keys: list[Any], count: int) -> None:
        together = partitions_of(keys, count, None)
        assert [partitions_of([key], count, None)[0] for key in keys] == together
        assert all(0 <= one < count for one in together)

    @given(st.text() | st.integers() | st.binary(), st.integers(1, 20))
    def test_plain_keys_go_where_events_of_that_key_go(self, key: Any, count: int) -> None:
        if isinstance(key, str) and any("\ud800" <= letter <= "\udfff" for letter in key):
            return
        assert partitions_of([key], count, None) == [partition_of(key, count)]

    def test_partitions_do_not_depend_on_the_process(self) -> None:
        keys = ["a", "ä", 7, b"x", ("a", 1), None, 2.5, True]
        code = f"from djp_dagster.mapreduce.keys import partitions_of; print(partitions_of({keys!r}, 13, None))"
        found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        assert found.strip() == str(partitions_of(keys, 13, None))

    def test_by_a_part_of_the_key(self) -> None:
        keys = [(host, path) for host in "abc" for path in "123"]
        found = partitions_of(keys, 5, lambda key: key[0])
        assert [found[number] for number in (0, 3, 6)] == [partition_of(host, 5) for host in "abc"]
        assert found[0] == found[1] == found[2]


class TestValues:
    @given(st.lists(DATA) | ONE_KIND)
    def test_as_a_column(self, values: list[Any]) -> None:
        for field, column in (made := value_array(values), as_pickled(*made)):
            found = values_of(field, column)
            assert len(found) == len(values)
            assert all(map(same, found, values))

    @given(DATA)
    def test_by_themselves(self, value: Any) -> None:
        assert same(unpack(pack(value)), value)

    @pytest.mark.parametrize(
        ("values", "kind"),
        [
            ([1, 2], "int"),
            ([1.0], "float"),
            (["a"], "text"),
            ([b"a"], "bytes"),
            ([True], "bool"),
            ([(1, "a"), (2, "b")], "tuple"),
            ([1, 2.0], "pickle"),
            ([2**63], "pickle"),
            ([(1, "a"), (2,)], "pickle"),
            ([None], "pickle"),
            ([Counter("ab")], "pickle"),
        ],
    )
    def test_of_one_type_are_typed(self, values: list[Any], kind: str) -> None:
        field, column = value_array(values)
        assert kind_of(field) == kind
        assert values_of(field, column) == values

    def test_numpys_scalars_become_pythons(self) -> None:
        field, column = value_array([np.int64(3), np.int64(4)])
        assert all(map(same, values_of(field, column), [3, 4]))
        assert kind_of(field) == "int"

    @pytest.mark.parametrize("value", [object(), print, int, lambda: 1, [object()], {"a": print}])
    def test_more_than_data_is_refused(self, value: Any) -> None:
        with pytest.raises(InvalidValueError, match="must be of plain data"):
            value_array([value])

    @pytest.mark.parametrize("value", [subprocess.Popen, print, decimal.getcontext(), np.int64(1)])
    def test_nothing_is_called_for_bytes_of_somebody_else(self, value: Any) -> None:
        with pytest.raises(PayloadForbiddenError, match="was not written by one"):
            unpack(pickle.dumps(value))

    def test_no_command_is_run(self) -> None:
        class Attack:
            def __reduce__(self) -> Any:
                import os

                return os.system, ("touch /tmp/djp-was-attacked",)

        with pytest.raises(PayloadForbiddenError, match="system"):
            unpack(pickle.dumps(Attack()))
