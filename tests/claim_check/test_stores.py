"""Payload stores and what goes into them."""

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from djp_dagster import PayloadStore, open_payload_store
from djp_dagster.claim_check.claims import PayloadRef
from djp_dagster.claim_check.serializers import load_value, store_value
from djp_dagster.claim_check.writing import uploading
from djp_dagster.errors import InvalidSettingError, PayloadCorruptError, PayloadMissingError


@pytest.fixture
def store(tmp_path: Path) -> PayloadStore:
    return open_payload_store(tmp_path / "payloads")


def files(store: PayloadStore) -> list[str]:
    return sorted(
        str(path.relative_to(store.objects.folder)) for path in store.objects.folder.rglob("*") if path.is_file()
    )


json_values = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)


class TestValues:
    """There and back."""

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
    def test_plain_ones(self, store: PayloadStore, value: Any, media_type: str, suffix: str) -> None:
        ref = store_value(store, "a/b", value)
        assert (ref.key, ref.media_type) == (f"a/b{suffix}", media_type)
        content = (store.objects.folder / ref.key).read_bytes()
        assert (ref.bytes, ref.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        assert load_value(store, ref) == value
        assert files(store) == [f"a/b{suffix}"]

    @given(json_values)
    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_json(self, store: PayloadStore, value: Any) -> None:
        assert load_value(store, store_value(store, "k", value)) == value

    @pytest.mark.parametrize("value", [bytearray(b"abc"), memoryview(b"abc")], ids=["bytearray", "memoryview"])
    def test_other_bytes(self, store: PayloadStore, value: Any) -> None:
        assert load_value(store, store_value(store, "k", value)) == b"abc"

    def test_tables(self, store: PayloadStore) -> None:
        table = pa.table({"n": [1, 2, None], "when": pa.array([1, 2, 3], pa.timestamp("us", tz="UTC"))})
        for value in (table, table.to_batches()[0]):
            ref = store_value(store, "t", value)
            assert ref.key == "t.parquet"
            assert load_value(store, ref, as_arrow=True) == table
            assert load_value(store, ref)["n"].tolist()[:2] == [1, 2]

    def test_data_frames(self, store: PayloadStore) -> None:
        frame = pd.DataFrame({"n": [1, 2], "name": ["a", None]}, index=pd.Index([10, 20], name="i"))
        loaded = load_value(store, store_value(store, "f", frame))
        pd.testing.assert_frame_equal(loaded, frame)
        pd.testing.assert_frame_equal(load_value(store, store_value(store, "e", frame.iloc[:0])), frame.iloc[:0])

    @pytest.mark.parametrize("value", [object(), {"a": object()}, {(1, 2): 3}], ids=repr)
    def test_nothing_else_and_nothing_is_left(self, store: PayloadStore, value: Any) -> None:
        with pytest.raises(InvalidSettingError, match="cannot be stored"):
            store_value(store, "a/b", value)
        assert files(store) == []


class TestKeys:
    """Nothing outside the store can be named."""

    @pytest.mark.parametrize("key", ["a", "a/b/c", "A-Z_0.9=x", "date=2024-01-01/part.parquet", "x" * 900])
    def test_plain_ones(self, store: PayloadStore, key: str) -> None:
        assert store.objects.path_of(key) == store.objects.folder / key

    @pytest.mark.parametrize(
        "key",
        [
            "",
            "/",
            "/etc/passwd",
            "a/",
            "a//b",
            "..",
            ".",
            "../a",
            "a/../b",
            "a/..",
            ".hidden",
            "a/.hidden",
            "a\\b",
            "a b",
            "a\n",
            "a\0",
            "~root",
            "ü",
            "C:x",
            "s3://bucket/key",
            "x" * 901,
        ],
        ids=repr,
    )
    def test_others_are_refused(self, store: PayloadStore, key: str) -> None:
        for use in (
            lambda: store.objects.path_of(key),
            lambda: store.create(key, "x"),
            lambda: store.open(PayloadRef(key, 0, "", "x")),
        ):
            with pytest.raises(InvalidSettingError) as caught:
                use()
            assert caught.value.facts["setting"] == "key"
        assert not store.objects.folder.exists()

    @given(st.text(max_size=30))
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_what_is_accepted_stays_inside(self, store: PayloadStore, key: str) -> None:
        try:
            path = store.objects.path_of(key)
        except InvalidSettingError:
            return
        assert path.resolve().is_relative_to(store.objects.folder.resolve())
        assert path.resolve() != store.objects.folder.resolve()


class TestReading:
    """References are kept to the letter."""

    def test_missing(self, store: PayloadStore) -> None:
        ref = store_value(store, "k", b"abc")
        (store.objects.folder / ref.key).unlink()
        with pytest.raises(PayloadMissingError) as caught:
            load_value(store, ref)
        assert caught.value.facts["key"] == "k.bin"

    @pytest.mark.parametrize("content", [b"", b"ab", b"abd", b"abcd"], ids=repr)
    def test_changed(self, store: PayloadStore, content: bytes) -> None:
        ref = store_value(store, "k", b"abc")
        (store.objects.folder / ref.key).write_bytes(content)
        with pytest.raises(PayloadCorruptError) as caught:
            load_value(store, ref)
        assert caught.value.facts["key"] == "k.bin"

    @pytest.mark.parametrize("change", [{"bytes": 4}, {"sha256": "0" * 64}], ids=str)
    def test_another_reference(self, store: PayloadStore, change: dict[str, Any]) -> None:
        ref = store_value(store, "k", b"abc")
        with pytest.raises(PayloadCorruptError):
            store.open(msgspec.structs.replace(ref, **change))

    def test_larger_than_a_chunk(self, store: PayloadStore) -> None:
        content = bytes(range(256)) * 10_000
        ref = store_value(store, "k", content)
        with store.open(ref) as file:
            assert file.read(3) == content[:3]
            assert file.read() == content[3:]


class TestUploads:
    """A payload exists once it is finished, and not before."""

    def test_not_before(self, store: PayloadStore) -> None:
        with uploading(store, "a/k", "text/plain") as upload:
            upload.file.write(b"abc")
            assert not (store.objects.folder / "a/k").exists()
            ref = upload.finish()
            assert (store.objects.folder / "a/k").read_bytes() == b"abc"
        assert ref == PayloadRef("a/k", 3, hashlib.sha256(b"abc").hexdigest(), "text/plain")
        assert files(store) == ["a/k"]

    def test_abandoned_leaves_nothing(self, store: PayloadStore) -> None:
        with uploading(store, "a/k", "text/plain") as upload:
            upload.file.write(b"abc")
        assert files(store) == []
        with pytest.raises(KeyboardInterrupt):
            self.interrupted(store)
        assert files(store) == []
        upload.abandon()

    def interrupted(self, store: PayloadStore) -> None:
        with uploading(store, "a/k", "text/plain") as upload:
            upload.file.write(b"abc")
            raise KeyboardInterrupt

    def test_abandoning_what_is_finished_keeps_it(self, store: PayloadStore) -> None:
        upload = store.create("k", "x")
        upload.finish()
        upload.abandon()
        assert files(store) == ["k"]

    def test_the_same_attempt_may_write_again(self, store: PayloadStore) -> None:
        store_value(store, "k", b"first")
        assert load_value(store, store_value(store, "k", b"second")) == b"second"
        assert files(store) == ["k.bin"]
