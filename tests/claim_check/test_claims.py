"""`Claim`: there and back in every form; and whatever else arrives is refused by name."""

import json
import pickle
import random
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from hypothesis import given
from hypothesis import strategies as st

from djp_dagster import Claim, Event, PayloadStore, open_payload_store
from djp_dagster.claim_check.claims import CLAIM_ATTRIBUTES, MAX_TOKEN_BYTES
from djp_dagster.errors import InvalidClaimError, PayloadForbiddenError

SDK = JSONFormat()
HASH = "0123456789abcdef" * 4
URI = f"s3://claims/pre/sha256/{HASH[:2]}/{HASH[2:]}"

uris = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=700)
tokens = st.text("abcdefghijklmnopqrstuvwxyzABCXYZ0123456789!#$&-^_.+", min_size=1, max_size=60)
media_types = st.builds("{}/{}{}".format, tokens, tokens, st.sampled_from(["", ";charset=utf-8", '; a="b c"']))
claims = st.builds(
    Claim,
    uri=uris,
    size=st.none() | st.integers(0, 2**63 - 1),
    sha256=st.none() | st.text("0123456789abcdef", min_size=64, max_size=64),
    media_type=media_types,
    encoding=st.none() | st.sampled_from(["zstd", "gzip", "x-1.0"]),
    expires_at=st.none() | st.integers(0, 253402300799),
)


class TestThereAndBack:
    """Whatever a claim says, it says again."""

    @given(claims)
    def test_json(self, claim: Claim) -> None:
        token = claim.to_json()
        assert len(token) < MAX_TOKEN_BYTES == 1024
        assert Claim.from_json(token) == claim
        assert Claim.from_json(token.decode()) == claim
        # Any JSON tool may have passed it on.
        assert Claim.from_json(json.dumps(json.loads(token), separators=(",", ":"))) == claim
        assert json.loads(token)["v"] == 1

    @given(claims)
    def test_dict(self, claim: Claim) -> None:
        document = claim.to_dict()
        assert document == json.loads(claim.to_json())
        assert Claim.from_dict(document) == claim
        assert pickle.loads(pickle.dumps(claim)) == claim

    @given(claims)
    def test_attributes_of_an_event(self, claim: Claim) -> None:
        event = Event(
            type="t", source="/s", id="1", datacontenttype=claim.media_type, ext={**claim.to_attributes(), "other": 7}
        )
        read = Event.from_json(event.to_json())
        assert Claim.from_attributes(read.ext, read.datacontenttype) == claim
        assert claim.to_attributes().keys() <= CLAIM_ATTRIBUTES

    @given(claims)
    def test_through_the_official_sdk(self, claim: Claim) -> None:
        event = Event(type="t", source="/s", id="1", datacontenttype=claim.media_type, ext=claim.to_attributes())
        theirs = SDK.read(CloudEvent, event.to_json())
        assert theirs.get_extension("dataref") == claim.uri
        read = Event.from_json(SDK.write(theirs))
        assert Claim.from_attributes(read.ext, read.datacontenttype) == claim

    def test_no_claim_in_an_event(self) -> None:
        assert Claim.from_attributes(None) is None
        assert Claim.from_attributes({"datarefsize": "1", "other": "x"}, "text/plain") is None

    def test_numbers_of_other_producers(self) -> None:
        assert Claim.from_attributes({"dataref": URI, "datarefsize": 7}) == Claim(uri=URI, size=7)

    def test_expires(self) -> None:
        assert Claim(uri=URI).expires is None
        assert Claim(uri=URI, expires_at=0).expires == datetime(1970, 1, 1, tzinfo=timezone.utc)
        assert Claim(uri=URI, expires_at=253402300799).expires == datetime(9999, 12, 31, 23, 59, 59, 0, timezone.utc)

    def test_what_a_newer_minor_release_may_add_is_passed_over(self) -> None:
        claim = Claim(uri=URI, size=7)
        assert Claim.from_dict({**claim.to_dict(), "note": {"a": [1]}}) == claim

    def test_is_below_1_kib_or_refused(self, seed: random.Random) -> None:
        accepted = refused = 0
        for _ in range(200):
            uri = "s3://b/" + "k" * seed.randrange(700, 960 - 7)
            try:
                claim = Claim(uri=uri, size=2**62, sha256=HASH, media_type="a/" + "b" * seed.randrange(1, 250))
            except InvalidClaimError as error:
                refused += 1
                assert error.facts["part"] == "uri"
            else:
                accepted += 1
                assert len(claim.to_json()) < 1024
        assert accepted
        assert refused


GOOD: dict[str, Any] = {"v": 1, "uri": URI, "size": 3, "sha256": HASH, "ct": "a/b", "enc": "zstd", "exp": 1_700_000_000}

WRONG: dict[str, tuple[str, list[Any]]] = {
    "v": ("version", [0, 2, -1, "1", 1.5, True, None, [1]]),
    "uri": ("uri", [None, 7, "", " ", "s3://b/a b", "s3://b/\n", "s3://b/\0", "s3://b/ü", "x" * 961, ["s3://b/k"], {}]),
    "size": ("size", [-1, "3", 1.5, True, 2**63, 2**70, [3], {}]),
    "sha256": ("sha256", ["", HASH[:-1], HASH + "0", HASH.upper(), "g" * 64, HASH + "\n", 7, [HASH], "é" * 64]),
    "ct": ("media type", ["", "a", "/", "a/", "/b", "a/b\n", "a/ü", "a b/c", "a/b/c", "a/" + "b" * 300, 7, None, []]),
    "enc": ("encoding", ["", "ZSTD", "z" * 21, "zstd,gzip", "zstd\n", 7, []]),
    "exp": ("expiry", [-1, "soon", 1.5, True, 253402300800, 2**62, 2**64, [1]]),
}
CASES = [(name, part, value) for name, (part, values) in WRONG.items() for value in values]


class TestWhatIsNoClaim:
    """Each is an `InvalidClaimError` that names the part, whichever way it came."""

    def test_the_good_one(self) -> None:
        assert Claim.from_json(json.dumps(GOOD)).to_dict() == GOOD

    @pytest.mark.parametrize(("name", "part", "value"), CASES, ids=[f"{name}={str(v)[:20]!r}" for name, _, v in CASES])
    def test_a_wrong_part(self, name: str, part: str, value: Any) -> None:
        document = {"v": 1, "uri": URI, name: value}
        for read in (lambda: Claim.from_json(json.dumps(document)), lambda: Claim.from_dict(document)):
            with pytest.raises(InvalidClaimError) as caught:
                read()
            assert caught.value.facts["part"] == part

    def test_no_uri(self) -> None:
        with pytest.raises(InvalidClaimError) as caught:
            Claim.from_json(b'{"v":1}')
        assert caught.value.facts["part"] == "uri"

    def test_an_unknown_version_says_so(self) -> None:
        with pytest.raises(InvalidClaimError, match="reads version 1"):
            Claim.from_json(b'{"v":2,"uri":"s3://b/k"}')

    @pytest.mark.parametrize(
        "token",
        [
            b"",
            b" ",
            b"null",
            b"7",
            b'"s3://b/k"',
            b"[]",
            b"{",
            b"{}",
            b'{"v":1,"uri":"s3://b/k"',
            b'{"v":1,"uri":"s3://b/k"}x',
            b'{"v":1,"uri":"\xff"}',
            b"\xff\xfe",
            b"\0" * 100,
            '{"v":1,"uri":"\ud800"}',
            "ü",
            b"[" * 1024,
            b'{"uri":' * 140,
            b"[" * 1_000_000,
            b'{"uri":' * 300_000,
            '{"v":1,"uri":"s3://b/k","ct":"' + "a" * (2 << 20) + '"}',
            b" " * (2 << 20),
            b'{"v":1,"uri":"s3://b/k","size":' + b"9" * 900 + b"}",
            b'{"v":1,"uri":"s3://b/k","size":1e999}',
            b'{"v":1,"uri":"s3://b/k","size":NaN}',
        ],
        ids=lambda token: repr(token[:30]),
    )
    def test_a_wrong_token(self, token: bytes | str) -> None:
        started = time.process_time()
        with pytest.raises(InvalidClaimError) as caught:
            Claim.from_json(token)
        assert time.process_time() - started < 0.5
        assert len(str(caught.value)) < 500

    def test_a_long_token_is_none_even_if_most_of_it_is_nothing(self) -> None:
        token = json.dumps(GOOD).encode()
        assert Claim.from_json(token.ljust(1024)).to_dict() == GOOD
        with pytest.raises(InvalidClaimError, match="less than 1024 bytes, not 1025"):
            Claim.from_json(token.ljust(1025))

    def test_wrong_documents(self) -> None:
        nested: Any = {}
        for _ in range(100_000):
            nested = {"v": 1, "uri": nested}
        for document in (
            None,
            7,
            "s3://b/k",
            [],
            [GOOD],
            {1: 2},
            {**GOOD, 1: 2},
            nested,
            {**GOOD, "sha256": "x" * 10**7},
        ):
            with pytest.raises(InvalidClaimError) as caught:
                Claim.from_dict(document)  # type: ignore[arg-type]
            assert len(str(caught.value)) < 500
        while nested:  # or its end would be a recursion
            nested = nested.pop("uri", None)

    @given(st.binary(max_size=1100) | st.text(max_size=1100))
    def test_anything(self, token: bytes | str) -> None:
        with pytest.raises(InvalidClaimError):
            Claim.from_json(token)

    @given(st.data())
    def test_a_token_with_a_byte_changed(self, data: st.DataObject) -> None:
        token = bytearray(data.draw(claims).to_json())
        token[data.draw(st.integers(0, len(token) - 1))] = data.draw(st.integers(0, 255))
        try:
            claim = Claim.from_json(bytes(token))
        except InvalidClaimError:
            return
        assert Claim.from_json(claim.to_json()) == claim

    @pytest.mark.parametrize(
        ("attribute", "part"),
        [
            ({"dataref": ""}, "uri"),
            ({"dataref": 7}, "uri"),
            ({"dataref": True}, "uri"),
            ({"dataref": "s3://b/ü"}, "uri"),
            ({"datarefsize": "-1"}, "datarefsize"),
            ({"datarefsize": "٣"}, "datarefsize"),
            ({"datarefsize": "1" * 20}, "datarefsize"),
            ({"datarefsize": True}, "datarefsize"),
            ({"datarefsize": -7}, "datarefsize"),
            ({"datarefsize": "9" * 19}, "size"),
            ({"datarefsha256": "x"}, "sha256"),
            ({"datarefsha256": 7}, "sha256"),
            ({"datarefencoding": "ZSTD"}, "encoding"),
            ({"datarefencoding": False}, "encoding"),
            ({"datarefexpires": "tomorrow"}, "datarefexpires"),
            ({"datarefexpires": "9" * 19}, "expiry"),
        ],
        ids=str,
    )
    def test_wrong_attributes_of_an_event(self, attribute: dict[str, Any], part: str) -> None:
        ext = Event(type="t", source="/s", ext={"dataref": URI, **attribute}).ext
        with pytest.raises(InvalidClaimError) as caught:
            Claim.from_attributes(ext, "text/plain")
        assert caught.value.facts["part"] == part

    @pytest.mark.parametrize("unit", ["/;", "/; ", "a/", "/", ";", "; ", "a/b;"])
    def test_a_media_type_that_takes_long(self, unit: str) -> None:
        for end in ("", "\n"):
            started = time.process_time()
            with pytest.raises(InvalidClaimError) as caught:
                Claim.from_attributes({"dataref": URI}, "a/b;" + unit * 200_000 + end)
            assert caught.value.facts["part"] == "media type"
            assert time.process_time() - started < 0.5

    @given(st.lists(st.text(max_size=10), min_size=1, max_size=3).map("/".join))
    def test_media_types(self, text: str) -> None:
        try:
            claim = Claim(uri=URI, media_type=text)
        except InvalidClaimError as error:
            assert error.facts["part"] == "media type"
        else:
            assert claim.media_type.isascii()
            assert claim.media_type.isprintable()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PayloadStore]:
    store = open_payload_store(tmp_path / "payloads")
    store.put(b"of this store")
    yield store
    assert len(list(store.objects.list())) == 1


@pytest.mark.parametrize("name", ["cloudevents_dataref", "cloudevents_data_and_dataref"])
def test_samples_of_the_specification(store: PayloadStore, shared_data: Path, name: str) -> None:
    sample = json.loads((shared_data / "interop" / "samples.json").read_bytes())[name]
    event = Event.from_dict(sample)
    claim = Claim.from_attributes(event.ext, event.datacontenttype)
    assert claim == Claim(uri=sample["dataref"], media_type="text/xml")
    assert event.data == sample.get("data")
    assert Event.from_dict({**sample, **claim.to_attributes()}) == event
    uses: list[Callable[[], object]] = [
        lambda: store.read(claim),
        lambda: store.open(claim),
        lambda: store.info(claim),
        lambda: store.verify(claim),
        lambda: store.presign(claim),
    ]
    for use in uses:
        with pytest.raises(PayloadForbiddenError, match="is not for the payload store"):
            use()
    assert not store.holds(claim)
