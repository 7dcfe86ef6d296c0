"""Values to payloads and back."""

import hashlib
import random
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from djp_dagster import PayloadStore
from djp_dagster.claim_check.serializers import load_value, store_value
from djp_dagster.errors import InvalidSettingError
from tests.claim_check.kit import Place, keys

json_values = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.fixture
def store(place: Place) -> PayloadStore:
    return place.open()


@pytest.mark.parametrize(
    ("value", "media_type", "suffix"),
    [
        ({"a": [1, None]}, "application/json", ".json"),
        (7, "application/json", ".json"),
        ([], "application/json", ".json"),
        ("text ü\n", "text/plain; charset=utf-8", ".txt"),
        ("", "text/plain; charset=utf-8", ".txt"),
        (b"\x00\xff", "application/octet-stream", ".bin"),
        (b"", "application/octet-stream", ".bin"),
    ],
)
def test_plain_ones(store: PayloadStore, place: Place, value: Any, media_type: str, suffix: str) -> None:
    ref = store_value(store, "a/b", value)
    assert (ref.key, ref.media_type) == (f"a/b{suffix}", media_type)
    content = place.stored(ref.key)
    assert (ref.bytes, ref.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert load_value(store, ref) == value
    assert keys(store) == [f"a/b{suffix}"]


@given(json_values)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_json(store: PayloadStore, value: Any) -> None:
    assert load_value(store, store_value(store, "k", value)) == value


@pytest.mark.parametrize("value", [bytearray(b"abc"), memoryview(b"abc")], ids=["bytearray", "memoryview"])
def test_other_bytes(store: PayloadStore, value: Any) -> None:
    assert load_value(store, store_value(store, "k", value)) == b"abc"


def test_tables(store: PayloadStore) -> None:
    table = pa.table({"n": [1, 2, None], "when": pa.array([1, 2, 3], pa.timestamp("us", tz="UTC"))})
    for value in (table, table.to_batches()[0]):
        ref = store_value(store, "t", value)
        assert ref.key == "t.parquet"
        assert load_value(store, ref, as_arrow=True) == table
        assert load_value(store, ref)["n"].tolist()[:2] == [1, 2]


def test_a_table_of_several_parts(store: PayloadStore, seed: random.Random) -> None:
    frame = pd.DataFrame({"n": np.frombuffer(seed.randbytes(24 << 20), np.int64)})
    ref = store_value(store, "t", frame)
    assert ref.bytes > 20 << 20
    pd.testing.assert_frame_equal(load_value(store, ref), frame)


def test_data_frames(store: PayloadStore) -> None:
    frame = pd.DataFrame({"n": [1, 2], "name": ["a", None]}, index=pd.Index([10, 20], name="i"))
    loaded = load_value(store, store_value(store, "f", frame))
    pd.testing.assert_frame_equal(loaded, frame)
    pd.testing.assert_frame_equal(load_value(store, store_value(store, "e", frame.iloc[:0])), frame.iloc[:0])


@pytest.mark.parametrize("value", [object(), {"a": object()}, {(1, 2): 3}], ids=["object", "within", "key"])
def test_nothing_else_and_nothing_is_left(store: PayloadStore, value: Any) -> None:
    with pytest.raises(InvalidSettingError, match="cannot be stored"):
        store_value(store, "a/b", value)
    assert keys(store) == []
