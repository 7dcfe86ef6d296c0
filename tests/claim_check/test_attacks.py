"""Claims made to read, write or overload what they must not; and payloads exchanged behind the store's back."""

import hashlib
import json
import random
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import pytest

from djp_dagster import Claim, PayloadStore
from djp_dagster.claim_check.claims import PayloadRef
from djp_dagster.claim_check.writing import uploading
from djp_dagster.errors import (
    InvalidClaimError,
    InvalidSettingError,
    PayloadCorruptError,
    PayloadExpiredError,
    PayloadForbiddenError,
    PayloadMissingError,
    PayloadTooLargeError,
)
from tests.claim_check.kit import MIB, Place, finish, s3_place, start
from tests.servers.faulty_s3 import FaultyS3

_watching: list[tuple[str, str]] | None = None


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _watching is not None and event in ("open", "socket.connect", "socket.getaddrinfo", "subprocess.Popen"):
        _watching.append((event, str(args)))


sys.addaudithook(_hook)


@contextmanager
def watched() -> Iterator[list[tuple[str, str]]]:
    """Every file that is opened in this process, every connection that is made, every name that is looked up."""
    global _watching  # noqa: PLW0603
    seen: list[tuple[str, str]] = []
    _watching = seen
    try:
        yield seen
    finally:
        _watching = None


@pytest.fixture
def decoy() -> Iterator[str]:
    """The URL of a server that would hand out the payload, and must not be asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"payload")

        do_HEAD = do_PUT = do_GET  # noqa: N815

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=[0.02])
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()
    assert asked == []


def every_use(store: PayloadStore, payload: Claim | PayloadRef, tmp_path: Path) -> list[Callable[[], Any]]:
    return [
        lambda: store.read(payload),
        lambda: store.open(payload),
        lambda: store.fetch(payload).__enter__(),
        lambda: store.download(payload, tmp_path / "out"),
        lambda: store.verify(payload),
        lambda: store.info(payload),
        lambda: store.presign(payload),
        lambda: store.resolve(payload),
    ]


DIGEST = hashlib.sha256(b"payload").hexdigest()
KEY = f"sha256/{DIGEST[:2]}/{DIGEST[2:]}"


def elsewhere(store: PayloadStore, decoy: str, secret: Path, other: str) -> list[str]:
    """URIs of the same payload, in places that are not the store."""
    uri, host = store.uri, decoy.removeprefix("http://")
    parent, _, last = uri.rpartition("/")
    scheme, _, place = uri.partition("://")
    return [
        # another bucket, another prefix, a prefix that begins like this one
        f"{other}/{KEY}",
        f"s3://other/{KEY}",
        f"s3://other/{last}/{KEY}",
        f"{parent}/{KEY}",
        f"{parent}/other/{KEY}",
        f"{uri}2/{KEY}",
        f"{uri}{KEY}",
        f"{uri}-/{KEY}",
        f"{parent}/{last[:-1]}/{KEY}",
        f"{parent}/{last.upper()}/{KEY}",
        # another scheme, another host
        f"{decoy}/{KEY}",
        f"{decoy}/{last}/{KEY}",
        f"{decoy.replace('http', 'https')}/{KEY}",
        f"http://localhost/{KEY}",
        f"http://[::1]:80/{KEY}",
        "http://169.254.169.254/latest/meta-data/iam/security-credentials/",
        f"//{host}/{KEY}",
        f"s3://{host}/{KEY}",
        f"{scheme}://{host}/{place}/{KEY}",
        f"{scheme}://x@{place}/{KEY}",
        f"{scheme}://{place}@{host}/{KEY}",
        f"{scheme.upper()}://{place}/{KEY}",
        f"{scheme}a://{place}/{KEY}",
        f"{scheme}:/{place}/{KEY}",
        f"{scheme}:///{place}/{KEY}",
        f"{scheme}://{place}:443/{KEY}",
        f"ftp://{host}/{KEY}",
        f"data:,{KEY}",
        # a file
        str(secret),
        secret.as_uri(),
        f"file://localhost{secret}",
        f"file:{secret}",
        "file:///etc/passwd",
        "/etc/passwd",
        "../secret",
        KEY,
        # out of the store, and in by another door
        f"{uri}/../secret",
        f"{uri}/../{last}/{KEY}",
        f"{uri}/sha256/../../secret",
        f"{uri}/sha256/../{KEY}",
        f"{uri}/./{KEY}",
        f"{uri}//{KEY}",
        f"{uri}/{KEY}/",
        f"{uri}//etc/passwd",
        f"{uri}/..",
        f"{uri}/.",
        f"{uri}/",
        uri,
        f"{uri}/%2e%2e/secret",
        f"{uri}/%2E%2E/secret",
        f"{uri}/%2e%2e%2fsecret",
        f"{uri}/sha256/%2e%2e/%2e%2e/secret",
        f"{uri}/%252e%252e/secret",
        f"{uri}/..%2fsecret",
        f"{uri}/..%5csecret",
        f"{uri}/..\\secret",
        f"{uri}/{KEY.replace('/', '%2f')}",
        f"{uri}/{KEY}%00",
        # with something behind it
        f"{uri}/{KEY}?versionId=null",
        f"{uri}/{KEY}?response-content-type=text/html",
        f"{uri}?prefix=/{KEY}",
        f"{uri}/{KEY}#x",
        f"{uri}/{KEY};x",
        f"{uri}/{KEY}&x",
        f"{uri}/*",
        f"{uri}/{KEY[:-1]}?",
        f"{uri}/~root/{KEY}",
        f"{uri}/$HOME/{KEY}",
        f"{uri}/.lock",
        f"{uri}/.upload-x",
        f"{uri}/" + "x" * 901,
    ]


class TestElsewhere:
    """A claim of anything but the store's own payloads is forbidden, and nothing at all is asked or opened."""

    def check(self, store: PayloadStore, decoy: str, tmp_path: Path, other: str) -> None:
        secret = tmp_path / "secret"
        secret.write_bytes(b"payload")
        stored = store.put(b"payload")
        assert stored.ref.key == KEY
        assert store.read(stored.claim) == b"payload"
        for uri in elsewhere(store, decoy, secret, other):
            try:
                claim = msgspec.structs.replace(stored.claim, uri=uri)
            except InvalidClaimError:
                assert len(uri) > 900
                continue
            with watched() as seen:
                for number, use in enumerate(every_use(store, claim, tmp_path)):
                    with pytest.raises(PayloadForbiddenError, match="is not for the payload store") as caught:
                        use()
                    assert caught.value.facts["uri"] == uri, number
                assert not store.holds(claim)
            assert seen == [], uri
        assert not (tmp_path / "out").exists()
        assert store.read(stored.claim) == b"payload"

    def test_from_a_folder(self, decoy: str, tmp_path: Path) -> None:
        other = Place(str(tmp_path / "stores" / "other")).open()
        other.put(b"payload")
        Place(str(tmp_path / "stores" / "prefix2")).open().put(b"payload")
        self.check(Place(str(tmp_path / "stores" / "prefix")).open(), decoy, tmp_path, other.uri)

    def test_from_s3(self, s3: Place, decoy: str, faulty_s3: FaultyS3, tmp_path: Path) -> None:
        bucket = faulty_s3.server.new_bucket()
        for target in (f"s3://{bucket}/pre", f"s3://{s3.bucket}/pre2", f"s3://{s3.bucket}", f"s3://{s3.bucket}/other"):
            s3.at(target).open().put(b"payload")
        store = s3_place(faulty_s3.server, s3.target, faulty_s3.endpoint_url).open()
        self.check(store, decoy, tmp_path, f"s3://{bucket}/pre")
        assert {request.bucket for request in faulty_s3.requests} == {s3.bucket}
        assert {request.key.partition("/")[0] for request in faulty_s3.requests} <= {"pre", ""}
        faulty_s3.server.drop_bucket(bucket)

    def test_an_event_that_names_itself_a_claim(self, place: Place, decoy: str, tmp_path: Path) -> None:
        store = place.open()
        for uri in elsewhere(store, decoy, tmp_path / "secret", "s3://other/pre"):
            if len(uri) <= 960:
                claim = Claim.from_attributes({"dataref": uri, "datarefsize": "7"}, "text/plain")
                assert claim is not None
                with pytest.raises(PayloadForbiddenError):
                    store.read(claim)

    def test_no_other_type_is_taken_for_a_claim(self, place: Place, tmp_path: Path) -> None:
        store = place.open()
        claim = store.put(b"payload").claim
        for payload in (claim.uri, KEY, claim.to_json(), claim.to_dict(), None, 7, Path(KEY), (KEY, 7, "", "a/b")):
            for use in every_use(store, payload, tmp_path):  # type: ignore[arg-type]
                with pytest.raises(InvalidClaimError, match=type(payload).__name__):
                    use()

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
            "%2e%2e/a",
            "x" * 901,
        ],
        ids=lambda key: repr(key[:20]),
    )
    def test_references_and_paths(self, tmp_path: Path, key: str) -> None:
        store = Place(str(tmp_path / "store")).open()
        ref = PayloadRef(key, 0, "", "a/b")
        for use in (*every_use(store, ref, tmp_path), lambda: store.create(key, "a/b"), lambda: store.within(key)):
            with watched() as seen, pytest.raises(InvalidSettingError) as caught:
                use()
            assert caught.value.facts["setting"] == "key"
            assert seen == []
        assert not (tmp_path / "store").exists()


class TestExchanged:
    """What is not the payload of the claim is never taken for it, whatever its size."""

    @pytest.mark.parametrize(
        ("size", "how"),
        [(7, how) for how in ("last bit", "first bit", "truncated", "longer", "empty", "all")]
        + [(8 * MIB, how) for how in ("last bit", "longer")]
        + [(17 * MIB, how) for how in ("last bit", "truncated", "longer")],
    )
    def test_stored_bytes(self, place: Place, seed: random.Random, tmp_path: Path, size: int, how: str) -> None:
        store, data = place.open(), seed.randbytes(size)
        stored = store.put(data)
        place.replace(
            stored.ref.key,
            {
                "last bit": data[:-1] + bytes([data[-1] ^ 1]),
                "first bit": bytes([data[0] ^ 128]) + data[1:],
                "truncated": data[:-1],
                "longer": data + b"\0",
                "empty": b"",
                "all": seed.randbytes(size),
            }[how],
        )
        self.refused(store, stored.claim, tmp_path, every_way=True)
        self.refused(store, stored.ref, tmp_path)
        # A pointer of another tool: the key itself tells the hash.
        self.refused(store, Claim(uri=stored.claim.uri), tmp_path)

    @pytest.mark.parametrize("size", [7, 9 * MIB])
    def test_another_claim(self, place: Place, seed: random.Random, tmp_path: Path, size: int) -> None:
        store, data = place.open(), seed.randbytes(size)
        claim = store.put(data).claim
        store.put(b"other")
        for change in (
            {"size": size - 1},
            {"size": size + 1},
            {"size": 0},
            {"size": 200 * MIB},
            {"sha256": hashlib.sha256(b"other").hexdigest()},
            {"sha256": "0" * 64},
            {"encoding": "zstd"},
        ):
            self.refused(store, msgspec.structs.replace(claim, **change), tmp_path)
        assert store.verify(claim) == size

    def test_compressed(self, place: Place, tmp_path: Path) -> None:
        store, data = place.open(), b"a line of text\n" * 600_000
        stored = store.put(data, media_type="text/plain")
        assert stored.claim.encoding == "zstd"
        for change in ({"encoding": None}, {"size": 100}, {"size": len(data) + 1}, {"sha256": "0" * 64}):
            self.refused(store, msgspec.structs.replace(stored.claim, **change), tmp_path, every_way=True)
        good = place.stored(stored.ref.key)
        middle = len(good) // 2
        for bad in (
            good[:-1],
            good[:middle],
            good[:3],
            b"",
            good + b"\0",
            good + good,
            good[:middle] + bytes([good[middle] ^ 255]) + good[middle + 1 :],
            b"\0" * len(good),
            data,
        ):
            place.replace(stored.ref.key, bad)
            self.refused(store, stored.claim, tmp_path)
            self.refused(store, Claim(uri=stored.claim.uri, encoding="zstd"), tmp_path)

    def refused(
        self, store: PayloadStore, payload: Claim | PayloadRef, tmp_path: Path, *, every_way: bool = False
    ) -> None:
        read, opened, fetched, downloaded, verified = every_use(store, payload, tmp_path)[:5]
        for use in (read, fetched, downloaded, verified) if every_way else (read,):
            with pytest.raises(PayloadCorruptError) as caught:
                use()
            assert caught.value.facts["key"] == store.resolve(payload).key
        with pytest.raises(PayloadCorruptError):
            self.read_through(opened, payload)
        assert not (tmp_path / "out").exists()

    def read_through(self, opened: Callable[[], BinaryIO], payload: Claim | PayloadRef) -> None:
        size = payload.bytes if isinstance(payload, PayloadRef) else payload.size
        with opened() as file:
            assert size is None or size > 8 * MIB, "handed out before it was verified"
            while file.read(MIB):
                pass

    def test_an_unknown_encoding(self, place: Place, tmp_path: Path) -> None:
        store = place.open()
        claim = store.put(b"payload").claim
        for encoding in ("gzip", "br", "zstd2", "pickle"):
            for use in every_use(store, msgspec.structs.replace(claim, encoding=encoding), tmp_path)[:5]:
                with pytest.raises(PayloadForbiddenError, match=f"encoded as '{encoding}'"):
                    use()

    def test_a_payload_by_path_without_size_and_hash(self, place: Place) -> None:
        store = place.open()
        with uploading(store, "attempts/1/k", "a/b") as upload:
            upload.file.write(b"payload")
            ref = upload.finish()
        claim = Claim(uri=f"{store.uri}/attempts/1/k")
        assert store.resolve(claim) == PayloadRef("attempts/1/k", -1, "", "application/octet-stream")
        assert store.read(claim) == b"payload"
        place.replace("attempts/1/k", b"another")  # nobody can tell ...
        assert store.read(claim) == b"another"
        with pytest.raises(PayloadCorruptError):  # ... but who knows the hash
            store.read(store.claim(ref))
        with pytest.raises(PayloadTooLargeError):
            place.open(max_read_bytes=6).read(claim)

    def test_folders_of_the_store_are_no_payloads(self, place: Place, tmp_path: Path) -> None:
        store = place.open()
        claim = store.put(b"payload").claim
        for key in ("sha256", KEY.rpartition("/")[0], f"{KEY}/x", f"{KEY}.zst", "x" * 300):
            for use in every_use(store, msgspec.structs.replace(claim, uri=f"{store.uri}/{key}"), tmp_path)[:6]:
                with pytest.raises(PayloadMissingError):
                    use()

    def test_expired(self, place: Place, tmp_path: Path) -> None:
        store = place.open()
        claim = msgspec.structs.replace(store.put(b"payload").claim, expires_at=1)
        for use in every_use(store, claim, tmp_path):
            with watched() as seen, pytest.raises(PayloadExpiredError):
                use()
            assert seen == []


def bomb(size: int, *, window_log: int = 17) -> bytes:
    """A zstd frame of that many zeros: each 128 KiB are a block of 4 bytes."""
    blocks, rest = divmod(size, 128 << 10)
    lengths = [128 << 10] * blocks + [rest] * bool(rest)
    body = b"".join(
        struct.pack("<I", length << 3 | 1 << 1 | (number == len(lengths) - 1))[:3] + b"\0"
        for number, length in enumerate(lengths)
    )
    return b"\x28\xb5\x2f\xfd\x00" + bytes([(window_log - 10) << 3]) + body


GIB = 1 << 30
BOMBS = """
GIB, right, out = 1 << 30, args[0], Path(args[1])
store = place.open(max_read_bytes=8 * MIB, max_payload_bytes=GIB)
careful = place.open(max_payload_bytes=40 * MIB)
store.read(store.put(b"a line of text" * 1000, media_type="text/plain").claim)
memory = Memory()

def attempt(expected, use, **claim):
    what = f"{len(memory.risen)} {expected} {claim}"
    try:
        with memory.peak(what):
            seen = use(Claim(**{"uri": f"{store.uri}/attempts/bomb", "encoding": "zstd", **claim}))
    except DjpError as error:
        memory.note(what)
        seen = type(error).__name__
    assert seen == expected, (what, seen)
    assert not out.exists()

download = lambda claim: store.download(claim, out)
for use in (store.read, store.verify, download):
    attempt("PayloadCorruptError", use, size=10)
    attempt("PayloadCorruptError", use, size=7 * MIB, sha256="0" * 64)
    attempt("PayloadCorruptError", use, size=10, uri=f"{store.uri}/attempts/large", encoding=None)
    attempt("PayloadCorruptError", use, uri=f"{store.uri}/attempts/window")
attempt("PayloadTooLargeError", store.read, size=GIB, sha256="0" * 64)
attempt("PayloadTooLargeError", store.read)
attempt("PayloadTooLargeError", store.read, uri=f"{store.uri}/attempts/large", encoding=None)
attempt("PayloadTooLargeError", store.verify, size=GIB + 1)
attempt("PayloadCorruptError", careful.verify)
attempt(64 * MIB, store.verify, uri=f"{store.uri}/attempts/right", size=64 * MIB, sha256=right)
attempt(None, lambda claim: store.open(claim).close(), size=GIB)
print(json.dumps(memory.risen))
"""


class TestBombs:
    """No claim makes a reader take more memory or disk than the store allows."""

    def test_the_frame_is_right(self, place: Place) -> None:
        data = b"\0" * 300_000
        digest = hashlib.sha256(data).hexdigest()
        key = f"sha256/{digest[:2]}/{digest[2:]}.zst"
        place.replace(key, bomb(300_000))
        store = place.open()
        assert store.read(Claim(uri=f"{store.uri}/{key}", encoding="zstd")) == data

    def test_them(self, place: Place, seed: random.Random, tmp_path: Path) -> None:
        place.replace("attempts/large", seed.randbytes(40 * MIB))
        place.replace("attempts/bomb", bomb(GIB))
        place.replace("attempts/right", bomb(64 * MIB))
        place.replace("attempts/window", bomb(GIB, window_log=31))
        right = hashlib.sha256(bytes(64 * MIB)).hexdigest()
        risen = json.loads(finish(start(BOMBS, place, right, tmp_path / "out"), timeout_s=200))
        print({name: f"{rise / MIB:.1f} MiB" for name, rise in risen.items()})
        assert len(risen) == 19
        assert {name: rise for name, rise in risen.items() if rise > 64 * MIB} == {}
        assert not list(tmp_path.rglob(".download*"))
