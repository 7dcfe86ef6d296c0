"""`djp claims`: show, get, verify, gc."""

import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from djp_dagster import EventStream, Topic, open_payload_store
from djp_dagster.claim_check.pointers import values_of
from tests.cli.conftest import Djp, document

UPLOADS = Topic("uploads", offload_above=1000)


@pytest.fixture
def content(seed: random.Random) -> bytes:
    return seed.randbytes(200_000)


@pytest.fixture
def published(stream: EventStream, content: bytes) -> EventStream:
    stream.create_topic(UPLOADS)
    heavy = UPLOADS.event().replace(data=content, datacontenttype="image/png")
    stream.publish(UPLOADS, [UPLOADS.event(x=1), heavy])
    return stream


def claim_of(stream: EventStream) -> str:
    *_, record = stream.records(UPLOADS, 0)
    assert record.claim is not None
    return record.claim.to_json().decode()


def test_show_by_record_by_token_and_by_uri(djp: Djp, published: EventStream, content: bytes) -> None:
    facts = document(djp("claims", "show", "uploads:0:1", "--json"))
    assert (facts["bytes"], facts["media type"], facts["is there"]) == (len(content), "image/png", "yes")
    assert document(djp("claims", "show", claim_of(published), "--json")) == facts
    by_uri = document(djp("claims", "show", facts["uri"], "--json"))
    assert (by_uri["stored bytes"], by_uri["is there"]) == (len(content), "yes")
    shown = djp("claims", "show", "uploads:0:1").stdout
    assert facts["sha256"] in shown
    assert "is there      yes" in shown


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ("uploads:0:0", "carries no claim"),
        ("uploads:0:7", "has no record 7"),
        ('{"v":1}', "not a claim"),
        ("s3://other/sha256/ab/x", "not for the payload store"),
        ("file:///etc/passwd", "not for the payload store"),
    ],
)
def test_what_is_no_claim_of_this_store_is_said(djp: Djp, published: EventStream, claim: str, message: str) -> None:
    assert message in djp("claims", "show", claim, code=1).stderr


def test_a_folder_has_no_urls(djp: Djp, published: EventStream) -> None:
    assert "has no presigned URLs" in djp("claims", "show", "uploads:0:1", "--url", "15min", code=1).stderr


def test_get_into_a_file_and_a_pipe(
    djp: Djp,
    published: EventStream,
    content: bytes,
    tmp_path: Path,
    start: Callable[..., "subprocess.Popen[bytes]"],
) -> None:
    djp("claims", "get", "uploads:0:1", "-o", tmp_path / "image.png")
    assert (tmp_path / "image.png").read_bytes() == content
    out, error = start("claims", "get", claim_of(published)).communicate(timeout=60)
    assert (out, error) == (content, b"")


def test_verify_names_what_is_missing_or_damaged(djp: Djp, published: EventStream, content: bytes) -> None:
    assert document(djp("claims", "verify", "--topic", "uploads", "--json")) == {
        "verified": 1,
        "bytes": len(content),
        "problems": [],
    }
    ref = published.payloads.resolve(next(r.claim for r in published.records(UPLOADS, 0) if r.claim))
    path = Path(published.payloads.objects.path_of(ref.key))  # type: ignore[attr-defined]
    path.write_bytes(content[:-1] + b"?")
    found = document(djp("claims", "verify", "--topic", "uploads", "--json", code=1))
    assert [problem["error"] for problem in found["problems"]] == ["PayloadCorruptError"]
    path.unlink()
    assert "PayloadMissingError" in djp("claims", "verify", "uploads:0:1", code=1).stdout
    assert "name claims, or a topic" in djp("claims", "verify", code=2).stderr


def test_gc_says_what_it_would_do_and_does_it_when_told(djp: Djp, published: EventStream, content: bytes) -> None:
    shown = djp("claims", "gc")
    assert "1 payloads" in shown.stdout
    assert "a dry run" in shown.stderr
    assert document(djp("claims", "gc", "--delete", "--json"))["young"] == 1
    assert "must be at least" in djp("claims", "gc", "--grace", "1s", code=1).stderr
    assert published.payloads.read(next(r.claim for r in published.records(UPLOADS, 0) if r.claim)) == content


def test_gc_of_values(djp: Djp, published: EventStream, tmp_path: Path) -> None:
    assert "nobody has announced" in djp("claims", "gc", "--assets", tmp_path / "values", code=1).stderr
    values_of(open_payload_store(tmp_path / "values")).put(b"a value")
    assert document(djp("claims", "gc", "--assets", tmp_path / "values", "--json"))["payloads"] == 1
