"""How a bucket is reached and written to."""

import random
from typing import Any

import msgspec
import pytest

from djp_dagster import Claim, open_payload_store
from djp_dagster.claim_check.s3_settings import S3Settings
from djp_dagster.errors import InvalidSettingError, PayloadStoreRefusedError
from tests.claim_check.kit import MIB, Place

SIZES = [0, 1000, 9 * MIB]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("addressing", "dns"),
        ("checksums", "always"),
        ("encryption", "aes"),
        ("kms_key_id", "key"),
        ("part_bytes", 5 * MIB - 1),
        ("threads", 0),
        ("threads", 65),
        ("threads", True),
        ("threads", 1.5),
        ("max_attempts", 0),
        ("tags", {f"t{n}": "" for n in range(9)}),
    ],
)
def test_wrong_ones(setting: str, value: Any) -> None:
    with pytest.raises(InvalidSettingError) as caught:
        open_payload_store("s3://bucket/pre", **{setting: value})
    assert caught.value.facts["setting"] == setting


@pytest.mark.parametrize(
    "target",
    [
        *("s3://", "s3:///key", "s3://b", "s3://key:a-secret@bucket/pre", "s3://bucket/../pre", "s3://bucket/a//b"),
        *("s3://bucket/ü", "s3://bucket/a b", "s3://bucket/.a", "s3://bucket/pre?a-secret=x", "s3://bucket/pre#x"),
        *("http://bucket/pre", "file://host/folder", "gs://bucket", "S3://bucket", "s3a://bucket"),
    ],
)
def test_wrong_targets(target: str) -> None:
    with pytest.raises(InvalidSettingError) as caught:
        open_payload_store(target)
    assert "a-secret" not in str(caught.value) + repr(caught.value.facts)


@pytest.mark.parametrize(
    ("target", "uri"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("s3://My_old.bucket/a", "s3://My_old.bucket/a"),
    ],
)
def test_targets(target: str, uri: str) -> None:
    assert open_payload_store(target).uri == uri


def test_from_the_environment(s3: Place, seed: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("endpoint_url", "region", "access_key_id", "secret_access_key", "addressing"):
        monkeypatch.setenv(f"DJP_S3_{name.upper()}", s3.settings[name])
    store = open_payload_store(s3.target)
    assert store.read(store.put(seed.randbytes(1000)).claim)
    monkeypatch.setenv("DJP_S3_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(PayloadStoreRefusedError):
        open_payload_store(s3.target).put(b"x")
    assert open_payload_store(s3.target, secret_access_key=s3.settings["secret_access_key"]).put(b"x")


def test_nothing_is_asked_before_the_first_use() -> None:
    store = open_payload_store("s3://bucket/pre", endpoint_url="http://127.0.0.1:1")
    assert store.within("a").uri == "s3://bucket/pre/a"
    assert store.holds(Claim(uri="s3://bucket/pre/k"))
    assert not store.holds(Claim(uri="s3://bucket/prek"))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "how",
    [{"checksums": "when_required"}, {"encryption": "AES256"}, {"tags": {"a": "b"}, "threads": 1, "max_attempts": 1}],
    ids=str,
)
def test_ways_to_write(s3: Place, seed: random.Random, size: int, how: dict[str, Any]) -> None:
    place, data = s3.at(s3.target, **how), seed.randbytes(size)
    store = place.open()
    stored = store.put(data, media_type="image/png")
    assert store.read(stored.claim) == data
    head = s3.server.client().head_object(Bucket=s3.bucket, Key=f"pre/{stored.ref.key}")
    assert head["ContentType"] == "image/png"
    assert head.get("ServerSideEncryption") == how.get("encryption")
    assert head.get("TagCount", 0) == len(how.get("tags", ()))
    store.objects.replace_document("d", b"document")
    assert (store.objects.read_document("d") or store).body == b"document"


def test_without_credentials(s3: Place) -> None:
    with pytest.raises(PayloadStoreRefusedError, match="AccessDenied"):
        s3.at(s3.target, unsigned=True).open().put(b"x")


def test_no_secret_in_its_text() -> None:
    settings = S3Settings(access_key_id="an-id", secret_access_key="a-secret", session_token="a-token")
    for text in (repr(settings), str(settings), f"{settings!r}{[settings]}"):
        assert not any(secret in text for secret in ("an-id", "a-secret", "a-token"))
    assert msgspec.structs.replace(settings, threads=2).secret_access_key == "a-secret"
