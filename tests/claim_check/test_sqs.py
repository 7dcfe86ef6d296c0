"""Pointers of the SQS Extended Client: written letter by letter as theirs, read in every mixture, never trusted."""

import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from djp_dagster import Claim, open_payload_store
from djp_dagster.claim_check.sqs import CLASS, LEGACY_CLASS, SqsPointer, from_sqs, split_receipt_handle, to_sqs
from djp_dagster.errors import InvalidClaimError, PayloadForbiddenError

HASH = "0123456789abcdef" * 4
KEY = "e872a051-bf19-4cad-ae50-467e7c11a1c6"
SIZE = {"ExtendedPayloadSize": {"DataType": "Number", "StringValue": "300000"}}

buckets = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{2,60}", fullmatch=True)
keys = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=500)
claims = st.builds(
    lambda bucket, key, **parts: Claim(uri=f"s3://{bucket}/{key}", **parts),
    buckets,
    keys,
    size=st.integers(0, 2**63 - 1),
    sha256=st.none() | st.text("0123456789abcdef", min_size=64, max_size=64),
    media_type=st.sampled_from(["application/octet-stream", "text/plain; charset=utf-8", 'a/b; c="d e"']),
    expires_at=st.none() | st.integers(0, 253402300799),
)


def body_of(kind: object = CLASS, bucket: object = "my-bucket", key: object = KEY) -> str:
    return json.dumps([kind, {"s3BucketName": bucket, "s3Key": key}])


def text(value: str, kind: str = "String") -> dict[str, str]:
    return {"DataType": kind, "StringValue": value}


class TestSamples:
    """What others wrote down of the format."""

    @pytest.mark.parametrize(("name", "legacy"), [("sqs_extended_new", False), ("sqs_extended_legacy", True)])
    def test_there_and_back(self, shared_data: Path, name: str, legacy: bool) -> None:
        sample = json.loads((shared_data / "interop" / "samples.json").read_bytes())[name]
        attributes = sample["MessageAttributes"]
        claim = Claim.from_sqs(sample["body"], attributes)
        assert claim == Claim(uri=f"s3://my-bucket/{KEY}", size=300_000)
        made = claim.to_sqs(legacy=legacy)
        assert made.body == sample["body"]
        assert {name: made.attributes[name] for name in attributes} == attributes
        assert made.attributes.keys() - attributes.keys() == {"DjpClaim"}


class TestThereAndBack:
    @given(claims, st.booleans())
    def test_nothing_is_lost(self, claim: Claim, legacy: bool) -> None:
        pointer = claim.to_sqs(legacy=legacy)
        assert Claim.from_sqs(pointer.body, pointer.attributes) == claim
        assert len(pointer.attributes) == 2
        for value in (pointer.body, *(one["StringValue"] for one in pointer.attributes.values())):
            # Of what SQS takes as text.
            assert value.isascii()
            assert value.isprintable()
        # Another client sees no more than this.
        del pointer.attributes["DjpClaim"]
        assert from_sqs(*pointer) == Claim(uri=claim.uri, size=claim.size)

    @pytest.mark.parametrize("kind", [CLASS, LEGACY_CLASS])
    @pytest.mark.parametrize("name", ["ExtendedPayloadSize", "SQSLargePayloadSize"])
    def test_names_in_any_mixture(self, kind: str, name: str) -> None:
        # The Java client of version 2 sends the current class with the legacy attribute.
        assert from_sqs(body_of(kind), {name: text("5", "Number")}) == Claim(uri=f"s3://my-bucket/{KEY}", size=5)

    def test_both_attributes_that_agree(self) -> None:
        attributes = {"ExtendedPayloadSize": text("5"), "SQSLargePayloadSize": text("05")}
        claim = from_sqs(body_of(), attributes)
        assert claim is not None
        assert claim.size == 5

    @pytest.mark.parametrize("body", ['["CLASS",{"s3BucketName":"my-bucket","s3Key":"KEY"}]',
                                      ' [ "CLASS" , { "s3Key" : "KEY" , "s3BucketName" : "my-bucket" } ]\n',
                                      '["CLASS",{"s3BucketName":"my-bucket","s3Key":"KEY","newer":[1]}]'])  # fmt: skip
    def test_as_others_write_json(self, body: str) -> None:
        body = body.replace("CLASS", CLASS).replace("KEY", KEY)
        assert from_sqs(body, SIZE) == Claim(uri=f"s3://my-bucket/{KEY}", size=300_000)

    @pytest.mark.parametrize("spelling", ["StringValue", "stringValue", "Value"])
    def test_attributes_as_boto3_lambda_and_sns_have_them(self, spelling: str) -> None:
        pointer = Claim(uri="s3://claims/a", size=7, sha256=HASH, media_type="image/png").to_sqs()
        attributes = {name: {spelling: one["StringValue"], "x": []} for name, one in pointer.attributes.items()}
        assert from_sqs(pointer.body, attributes) == Claim.from_sqs(*pointer)

    def test_dictionaries_of_the_caller_stay_as_they_are(self) -> None:
        claim = Claim(uri="s3://claims/a", size=7, sha256=HASH)
        mine = {"colour": text("red"), **claim.to_sqs().attributes}
        before = copy.deepcopy(mine)
        for _ in range(2):
            assert from_sqs(claim.to_sqs().body, mine) == claim
            assert mine == before
        first, second = claim.to_sqs(), claim.to_sqs()
        first.attributes["ExtendedPayloadSize"]["StringValue"] = "8"
        first.attributes.clear()
        assert second == claim.to_sqs()

    def test_is_what_boto3_takes(self) -> None:
        pointer = to_sqs(Claim(uri="s3://claims/a", size=7))
        assert isinstance(pointer, SqsPointer)
        assert pointer == (pointer.body, pointer.attributes)


class TestOrdinaryMessages:
    """Without the attribute nothing is a pointer, whatever it looks like."""

    @pytest.mark.parametrize("attributes", [None, {}, {"colour": text("red")}, {"extendedpayloadsize": text("5")}])
    @pytest.mark.parametrize("body", ["hello", "", body_of(), "s3://claims/a", "[" * 100_000])
    def test_are_left_alone(self, body: str, attributes: dict[str, Any] | None) -> None:
        assert Claim.from_sqs(body, attributes) is None

    def test_even_with_our_attribute(self) -> None:
        pointer = Claim(uri="s3://claims/a", size=7).to_sqs()
        assert from_sqs(pointer.body, {"DjpClaim": pointer.attributes["DjpClaim"]}) is None


class TestWhatCannotBeSent:
    @pytest.mark.parametrize(
        ("claim", "part", "remedy"),
        [
            (Claim(uri="file:///payloads/sha256/ab/cd", size=3), "uri", "on S3"),
            (Claim(uri="https://host/a", size=3), "uri", "on S3"),
            (Claim(uri="S3://claims/a", size=3), "uri", "on S3"),
            (Claim(uri="s3://claims", size=3), "uri", "on S3"),
            (Claim(uri="s3://claims/", size=3), "uri", "on S3"),
            (Claim(uri="s3:///a", size=3), "uri", "on S3"),
            (Claim(uri="s3://key:secret@claims/a", size=3), "uri", "on S3"),
            (Claim(uri="s3://claims/a", size=3, encoding="zstd"), "encoding", "compress=False"),
            (Claim(uri="s3://claims/a"), "size", "info"),
        ],
        ids=lambda value: value.uri if isinstance(value, Claim) else "",
    )
    def test_is_refused_by_name(self, claim: Claim, part: str, remedy: str) -> None:
        with pytest.raises(InvalidClaimError, match=remedy) as caught:
            claim.to_sqs()
        assert caught.value.facts["part"] == part


NESTED: Any = "[" * 5000 + "]" * 5000
WRONG_BODIES: list[tuple[str, Any, str]] = [
    *(("body", body, "") for body in ("", "hello", "null", "7", '"x"', "[]", "{}", "[1,2]", "[", NESTED, None, 7)),
    ("body", json.dumps([CLASS]), "one element"),
    ("body", json.dumps([CLASS, {"s3BucketName": "my-bucket", "s3Key": KEY}, 1]), "three elements"),
    ("body", json.dumps([CLASS, json.dumps({"s3BucketName": "my-bucket", "s3Key": KEY})]), "text in place of it"),
    ("body", json.dumps([CLASS, {"s3BucketName": "my-bucket"}]), "no key"),
    ("body", json.dumps([CLASS, {"s3Key": KEY}]), "no bucket"),
    ("body", body_of(bucket=7), "bucket 7"),
    ("body", body_of(key=None), "key null"),
    ("body", body_of(kind=None), "class null"),
    ("body", body_of(kind=[CLASS]), "class in a list"),
    ("body", body_of(key="k" * 20_000), "long"),
    ("body", '["\\ud800",{"s3BucketName":"my-bucket","s3Key":"a"}]', "surrogate"),
    *(
        ("class", body_of(kind), str(kind))
        for kind in ("", CLASS + " ", CLASS.lower(), "java.lang.Runtime", "x" * 9000)
    ),
    ("class", body_of("tests.claim_check.never_imported"), "a module"),
    *(
        ("bucket", body_of(bucket=bucket), repr(bucket))
        for bucket in (
            "",
            "a",
            "my-bucket/pre",
            "../x",
            "..",
            "-my-bucket",
            "my bucket",
            "ключ",
            "a@b.c",
            "a:b",
            "a" * 256,
        )
    ),
    ("bucket", body_of(bucket="my-bucket\n"), "newline"),
    ("key", body_of(key=""), "empty key"),
    *(("uri", body_of(key=key), repr(key[:9])) for key in ("a b", "ключ", "a\0b", "a\nb", "\u202e", "k" * 960)),
]
NO_NUMBERS: list[Any] = [
    *map(text, ("", "-1", "1.0", "1e3", " 1", "٣", "0x10", "1" * 20, "many")),
    *(None, "300000", 7, [], {}, {"StringValue": 7}, {"BinaryValue": b"7"}),
]


class TestHostileMessages:
    """What says that it is a pointer and is none is refused, by name, at once."""

    @pytest.mark.parametrize(
        ("part", "body"),
        [(part, body) for part, body, _ in WRONG_BODIES],
        ids=[n or str(b)[:9] for _, b, n in WRONG_BODIES],
    )
    def test_a_wrong_body(self, part: str, body: Any) -> None:
        started = time.process_time()
        with pytest.raises(InvalidClaimError) as caught:
            from_sqs(body, SIZE)
        assert caught.value.facts["part"] == part
        assert len(str(caught.value)) < 700
        assert time.process_time() - started < 0.5

    @pytest.mark.parametrize("name", ["ExtendedPayloadSize", "SQSLargePayloadSize"])
    @pytest.mark.parametrize("attribute", NO_NUMBERS, ids=str)
    def test_a_wrong_size(self, name: str, attribute: Any) -> None:
        with pytest.raises(InvalidClaimError) as caught:
            from_sqs(body_of(), {name: attribute})
        assert caught.value.facts["part"] == name

    def test_a_size_beyond_all(self) -> None:
        with pytest.raises(InvalidClaimError) as caught:
            from_sqs(body_of(), {"ExtendedPayloadSize": text("9" * 19)})
        assert caught.value.facts["part"] == "size"

    def test_two_sizes(self) -> None:
        with pytest.raises(InvalidClaimError, match="two sizes"):
            from_sqs(body_of(), {**SIZE, "SQSLargePayloadSize": text("3")})

    @pytest.mark.parametrize(
        "other",
        [
            Claim(uri="s3://claims/b", size=7, sha256=HASH),
            Claim(uri="s3://claims2/a", size=7, sha256=HASH),
            Claim(uri="file:///claims/a", size=7, sha256=HASH),
            Claim(uri="s3://claims/a", size=8, sha256=HASH),
            Claim(uri="s3://claims/a", sha256=HASH),
            Claim(uri="s3://claims/a", size=7, sha256=HASH, encoding="zstd"),
        ],
        ids=str,
    )
    def test_a_claim_beside_a_pointer_to_something_else(self, other: Claim) -> None:
        body, attributes = Claim(uri="s3://claims/a", size=7, sha256=HASH).to_sqs()
        with pytest.raises(InvalidClaimError) as caught:
            from_sqs(body, {**attributes, "DjpClaim": text(other.to_json().decode())})
        assert caught.value.facts["part"] == "DjpClaim"

    @pytest.mark.parametrize("token", ["", "{}", "null", "[" * 9000, '{"v":2,"uri":"s3://claims/a"}', "x" * 300_000])
    def test_a_broken_claim_beside_a_pointer(self, token: str) -> None:
        body, attributes = Claim(uri="s3://claims/a", size=7).to_sqs()
        with pytest.raises(InvalidClaimError):
            from_sqs(body, {**attributes, "DjpClaim": text(token)})

    def test_the_class_is_only_compared(self) -> None:
        before = set(sys.modules)
        with pytest.raises(InvalidClaimError):
            from_sqs(body_of("tests.servers.guard"), SIZE)
        assert set(sys.modules) == before

    @given(st.text(max_size=80) | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    ).map(json.dumps))  # fmt: skip
    def test_anything(self, body: str) -> None:
        with pytest.raises(InvalidClaimError):
            from_sqs(body, SIZE)

    @pytest.mark.parametrize(
        ("bucket", "key"),
        [
            ("other-bucket", "sha256/ab/cd"),
            ("my-bucket", "../../etc/k"),
            ("my-bucket", "pre/../other/k"),
            ("my-bucket", "pre/../../k"),
            ("my-bucket", "/etc/passwd"),
            ("my-bucket", "pre//k"),
            ("my-bucket", "pre/.hidden"),
            ("my-bucket", "other/k"),
            ("my-bucket", "pre"),
            ("my-bucket", "prefix/k"),
            ("my-bucket", "pre/%2e%2e/k"),
            ("my-bucket", "pre/k?versionId=1"),
            ("my-bucket.evil", "pre/k"),
        ],
    )
    def test_what_leaves_the_store_is_for_the_store_to_refuse(self, bucket: str, key: str) -> None:
        claim = from_sqs(body_of(bucket=bucket, key=key), SIZE)
        assert claim is not None
        # No server is there: it is refused before anybody is asked.
        store = open_payload_store("s3://my-bucket/pre", endpoint_url="http://127.0.0.1:9", region="us-east-1")
        for use in (store.read, store.open, store.info, store.verify, store.presign):
            with pytest.raises(PayloadForbiddenError):
                use(claim)
        assert not store.holds(claim)


def handle_of(bucket: str, key: str, original: str) -> str:
    return f"-..s3BucketName..-{bucket}-..s3BucketName..--..s3Key..-{key}-..s3Key..-{original}"


originals = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=200)


class TestReceiptHandles:
    """Parsed by their marks, not by dashes."""

    @given(buckets, keys.filter(lambda key: "-..s3Key..-" not in f"{key}-"), originals)
    @example("my-bucket", KEY, "AQEBwJnKyrHigUMZj6rYigCgxlaS3SLy0a-with-dashes-==")
    @example("my-bucket", "-", "-")
    @example("my-bucket", "-..s3BucketName..-", "-..s3Key..-")
    @example("my-bucket", KEY, "AQEB-..s3Key..-x")
    @example("my-bucket", "pre/--..s3Key", "-..s3BucketName..-x")
    def test_any(self, bucket: str, key: str, original: str) -> None:
        assert split_receipt_handle(handle_of(bucket, key, original)) == (Claim(uri=f"s3://{bucket}/{key}"), original)

    @given(originals.filter(lambda handle: not handle.startswith("-..s3BucketName..-")))
    @example("AQEB-" + handle_of("my-bucket", KEY, "x"))
    @example("-..s3Key..-k-..s3Key..-AQEB")
    @example("")
    def test_of_an_ordinary_message(self, handle: str) -> None:
        assert split_receipt_handle(handle) == (None, handle)

    @pytest.mark.parametrize(
        "handle",
        [
            "-..s3BucketName..-",
            "-..s3BucketName..-my-bucket",
            "-..s3BucketName..-my-bucket-..s3BucketName..-AQEB",
            "-..s3BucketName..-my-bucket-..s3BucketName..--..s3Key..-k",
            handle_of("my-bucket", KEY, ""),
            handle_of("my-bucket", "", "AQEB"),
            handle_of("", KEY, "AQEB"),
            handle_of("a/b", KEY, "AQEB"),
            handle_of("my-bucket", "a b", "AQEB"),
            handle_of("my-bucket", KEY, "AQEB").replace("--..s3Key", "-x-..s3Key"),
            "-..s3BucketName..--..s3Key..-k-..s3Key..-b",
            handle_of("-..s3BucketName..-" * 20_000, KEY, "AQEB"),
            "-..s3BucketName..-b" + "-..s3Key..-" * 100_000,
        ],
        ids=lambda handle: handle[:60],
    )
    def test_a_broken_one(self, handle: str) -> None:
        started = time.process_time()
        with pytest.raises(InvalidClaimError) as caught:
            split_receipt_handle(handle)
        assert len(str(caught.value)) < 700
        assert time.process_time() - started < 0.5
