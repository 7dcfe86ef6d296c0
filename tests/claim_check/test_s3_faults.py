"""What networks, servers and people do to uploads and downloads."""

import json
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from djp_dagster import PayloadStore
from djp_dagster.claim_check.local import LocalObjects
from djp_dagster.claim_check.objects import DocumentChanged
from djp_dagster.claim_check.spool import FileContent
from djp_dagster.errors import (
    DjpError,
    PayloadCorruptError,
    PayloadStoreUnavailableError,
)
from tests.claim_check.kit import MIB, Place, content, eventually, finish, keys, own_threads, start
from tests.servers.faulty_s3 import FaultyS3
from tests.servers.s3_faults import (
    CutRequest,
    CutResponse,
    DropWrite,
    Fault,
    HoldRequest,
    HoldResponse,
    LoseResponse,
    Refuse,
    SlowResponse,
    StripHeaders,
)
from tests.servers.seaweedfs import SeaweedServer

PART = 5 * MIB
SMALL, LARGE = 5000, 2 * PART + 5
ATTEMPTS = 3


@pytest.fixture(autouse=True)
def no_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """botocore waits up to 20 s between attempts."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda self, context: 0.01)
    monkeypatch.setattr("djp_dagster.claim_check.s3_download._PAUSE_S", 0.005)
    # One client makes all the mistakes of these tests, and would have enough of it.
    monkeypatch.setattr("botocore.retries.quota.RetryQuota.acquire", lambda self, amount: True)


@pytest.fixture
def store(faulty: Place) -> PayloadStore:
    return faulty.open(max_attempts=ATTEMPTS, part_bytes=PART)


@pytest.fixture
def background() -> Iterator[Callable[..., "Future[Any]"]]:
    with ThreadPoolExecutor(2) as pool:
        yield pool.submit


def nothing_visible(store: PayloadStore, *, uploads: int = 0) -> None:
    assert keys(store) == []
    assert store.objects.abandoned_uploads(-10, remove=True) == uploads
    assert store.objects.abandoned_uploads(-10, remove=True) == 0


def all_right(store: PayloadStore, data: bytes, *, uploads: int = 0) -> None:
    claim = store.put(data).claim
    assert store.read(claim) == data
    assert len(keys(store)) == 1
    assert store.objects.abandoned_uploads(-10, remove=True) == uploads


WRITES = [
    (SMALL, "PutObject"),
    (LARGE, "CreateMultipartUpload"),
    (LARGE, "UploadPart"),
    (LARGE, "CompleteMultipartUpload"),
]


FAULTS = [Refuse(503, "SlowDown"), CutRequest(4000), LoseResponse()]
REFUSED = [
    Refuse(503, "SlowDown"),
    Refuse(429, "TooManyRequests"),
    Refuse(400, "BadDigest"),
    Refuse(409, "ConditionalRequestConflict"),
]


class TestUploads:
    """Done after all, or not at all."""

    @pytest.mark.parametrize(
        ("size", "kind", "fault"),
        [(*WRITES[0], fault) for fault in (*FAULTS, CutResponse(), Refuse(500, "InternalError"))]
        + [(*write, fault) for write in WRITES[1:] for fault in FAULTS],
        ids=str,
    )
    def test_again(
        self, store: PayloadStore, faulty_s3: FaultyS3, seed: random.Random, size: int, kind: str, fault: Fault
    ) -> None:
        data = seed.randbytes(size)
        faulty_s3.on(fault, kind=kind, times=ATTEMPTS - 1)
        claim = store.put(data).claim
        assert store.read(claim) == data
        assert keys(store) == [store.resolve(claim).key]
        # Nobody knows of an upload whose beginning was not answered, but collection.
        lost = 0 if kind != "CreateMultipartUpload" or isinstance(fault, Refuse) else ATTEMPTS - 1
        assert store.objects.abandoned_uploads(-10, remove=True) == lost

    @pytest.mark.parametrize(
        ("size", "kind", "fault"),
        [(*WRITES[0], fault) for fault in (*REFUSED, CutRequest(4000))]
        + [
            (*WRITES[1], REFUSED[0]),
            (*WRITES[2], CutRequest(4000)),
            (*WRITES[3], REFUSED[0]),
            (*WRITES[3], REFUSED[3]),
        ],
        ids=str,
    )
    def test_in_vain(
        self, store: PayloadStore, faulty_s3: FaultyS3, seed: random.Random, size: int, kind: str, fault: Fault
    ) -> None:
        data = seed.randbytes(size)
        faulty_s3.on(fault, kind=kind, times=None)
        with pytest.raises(PayloadStoreUnavailableError) as caught:
            store.put(data)
        assert caught.value.facts["uri"] == store.uri
        assert caught.value.transient
        faulty_s3.clear()
        nothing_visible(store)
        all_right(store, data)

    @pytest.mark.parametrize(("size", "kind"), [WRITES[0], WRITES[3]])
    def test_conflicts(
        self, store: PayloadStore, faulty_s3: FaultyS3, seed: random.Random, size: int, kind: str
    ) -> None:
        faulty_s3.on(Refuse(409, "ConditionalRequestConflict"), kind=kind, times=2)
        all_right(store, seed.randbytes(size))

    @pytest.mark.parametrize(("size", "kind"), [WRITES[0], WRITES[3]])
    def test_somebody_was_quicker_and_has_gone(
        self, store: PayloadStore, faulty_s3: FaultyS3, seed: random.Random, size: int, kind: str
    ) -> None:
        data = seed.randbytes(size)
        faulty_s3.on(Refuse(412, "PreconditionFailed"), kind=kind)
        all_right(store, data)
        store.objects.delete(keys(store))
        faulty_s3.on(Refuse(412, "PreconditionFailed"), kind=kind, times=None)
        with pytest.raises(PayloadStoreUnavailableError):  # no claim of what is not there
            store.put(data)

    @pytest.mark.parametrize("code", ["InternalError", "PreconditionFailed", "SlowDown"])
    def test_errors_within_an_answer_of_success(
        self, store: PayloadStore, faulty_s3: FaultyS3, seed: random.Random, code: str
    ) -> None:
        faulty_s3.on(Refuse(200, code), kind="CompleteMultipartUpload")
        all_right(store, seed.randbytes(LARGE))

    @pytest.mark.parametrize("part", [1, 2, 3])
    def test_a_lost_part(self, store: PayloadStore, faulty_s3: FaultyS3, seed: random.Random, part: int) -> None:
        data = seed.randbytes(LARGE)
        faulty_s3.on(DropWrite(), kind="UploadPart", query=f"partNumber={part}")
        with pytest.raises(PayloadStoreUnavailableError, match="InvalidPart"):
            store.put(data)
        nothing_visible(store)
        all_right(store, data)

    def test_a_lost_object_is_missed(self, store: PayloadStore, faulty_s3: FaultyS3, seed: random.Random) -> None:
        faulty_s3.on(DropWrite(), kind="PutObject")
        claim = store.put(seed.randbytes(SMALL)).claim
        with pytest.raises(DjpError, match="is not in"):
            store.read(claim)

    def test_an_upload_that_was_given_up_by_another(
        self, store: PayloadStore, faulty: Place, faulty_s3: FaultyS3, seed: random.Random, background: Any
    ) -> None:
        data = seed.randbytes(LARGE)
        held = faulty_s3.on(HoldRequest(), kind="CompleteMultipartUpload")
        put = background(store.put, data)
        assert held.reached.wait(30)
        assert store.objects.abandoned_uploads(-10, remove=True) == 1
        held.release()
        with pytest.raises(PayloadStoreUnavailableError, match="NoSuchUpload"):
            put.result(60)
        nothing_visible(store)
        all_right(store, data)

    def test_it_cannot_be_given_up(self, store: PayloadStore, faulty_s3: FaultyS3, seed: random.Random) -> None:
        faulty_s3.on(Refuse(503, "SlowDown"), kind="UploadPart", times=None)
        faulty_s3.on(Refuse(503, "SlowDown"), kind="AbortMultipartUpload", times=None)
        with pytest.raises(PayloadStoreUnavailableError, match="SlowDown"):
            store.put(seed.randbytes(LARGE))
        faulty_s3.clear()
        nothing_visible(store, uploads=1)

    def test_a_server_that_ignores_conditions_does_no_harm(
        self, store: PayloadStore, faulty_s3: FaultyS3, seed: random.Random
    ) -> None:
        faulty_s3.on(StripHeaders(), times=None)
        for size in (SMALL, LARGE):
            data = seed.randbytes(size)
            claims = {store.put(data).claim for _ in range(2)}
            assert len(claims) == 1
            assert store.read(claims.pop()) == data
        assert len(keys(store)) == 2

    def test_documents(self, store: PayloadStore, faulty_s3: FaultyS3) -> None:
        objects = store.objects
        for fault in (Refuse(503, "SlowDown"), CutResponse(3), CutResponse(), CutRequest()):
            objects.replace_document("d", b"document")
            faulty_s3.on(fault, kind="GetObject", times=ATTEMPTS - 1)
            document = objects.read_document("d")
            assert document is not None
            assert document.body == b"document"
            if not isinstance(fault, CutResponse):
                faulty_s3.on(fault, kind="PutObject", times=ATTEMPTS - 1)
                objects.write_document("d", b"other", expected=document.version)
            faulty_s3.clear()
            faulty_s3.on(fault, kind="GetObject", times=None)
            with pytest.raises(PayloadStoreUnavailableError):
                objects.read_document("d")
            faulty_s3.clear()
        faulty_s3.on(Refuse(409, "ConditionalRequestConflict"), kind="PutObject")
        with pytest.raises(DocumentChanged):
            objects.write_document("d", b"x", expected=None)

    @pytest.mark.parametrize("kind", ["ListObjectsV2", "HeadObject", "DeleteObjects", "ListMultipartUploads"])
    @pytest.mark.parametrize("fault", [Refuse(503, "SlowDown"), CutResponse(), CutResponse(100), CutRequest()], ids=str)
    def test_looking_around(self, store: PayloadStore, faulty_s3: FaultyS3, kind: str, fault: Fault) -> None:
        with content(b"x") as spool:
            store.objects.put("k", spool, media_type="a/b")
        use: Callable[[], Any] = {
            "ListObjectsV2": lambda: keys(store),
            "HeadObject": lambda: store.objects.info("k"),
            "DeleteObjects": lambda: store.objects.delete(["k"]),
            "ListMultipartUploads": lambda: store.objects.abandoned_uploads(0, remove=False),
        }[kind]
        if kind == "HeadObject" and isinstance(fault, CutResponse):
            return  # an answer without a body
        faulty_s3.on(fault, kind=kind, times=ATTEMPTS - 1)
        use()
        faulty_s3.on(fault, kind=kind, times=None)
        with pytest.raises(PayloadStoreUnavailableError):
            use()


class TestDownloads:
    """All of it after all, or an error that says what to do."""

    @pytest.mark.parametrize("size", [SMALL, LARGE])
    @pytest.mark.parametrize(
        "fault", [Refuse(503, "SlowDown"), CutResponse(), CutResponse(1000), CutRequest(), LoseResponse()], ids=str
    )
    def test_again(
        self, store: PayloadStore, faulty_s3: FaultyS3, seed: random.Random, size: int, fault: Fault
    ) -> None:
        data = seed.randbytes(size)
        claim = store.put(data).claim
        faulty_s3.on(fault, kind="GetObject", times=ATTEMPTS - 1)
        assert store.read(claim) == data
        faulty_s3.on(fault, kind="GetObject", times=None)
        with pytest.raises(PayloadStoreUnavailableError) as caught:
            store.read(claim)
        assert caught.value.facts["uri"] == store.uri
        faulty_s3.clear()
        assert store.verify(claim) == size

    def test_in_the_middle(self, faulty: Place, faulty_s3: FaultyS3, seed: random.Random, tmp_path: Path) -> None:
        store, data = faulty.open(threads=1, part_bytes=PART), seed.randbytes(4 * PART)
        claim = store.put(data).claim
        with store.open(claim) as file:
            assert file.read(100) == data[:100]
            faulty_s3.on(CutResponse(300_000), kind="GetObject", times=None)
            for _ in range(2):  # who tries again must not get something else
                with pytest.raises(PayloadStoreUnavailableError):
                    file.read()
        for use in (lambda: store.download(claim, tmp_path / "out"), lambda: store.fetch(claim).__enter__()):
            with pytest.raises(PayloadStoreUnavailableError):
                use()
        assert not (tmp_path / "out").exists()

    def test_compressed_ones(self, faulty: Place, faulty_s3: FaultyS3, seed: random.Random) -> None:
        store, data = faulty.open(threads=1, part_bytes=PART), seed.randbytes(16 * MIB).hex().encode()
        claim = store.put(data, media_type="text/plain").claim
        assert claim.encoding == "zstd"
        faulty_s3.on(CutResponse(300_000), kind="GetObject", times=ATTEMPTS - 1)
        assert store.read(claim) == data
        with store.open(claim) as file:
            assert file.read(100) == data[:100]
            faulty_s3.on(CutResponse(300_000), kind="GetObject", times=None)
            with pytest.raises(PayloadStoreUnavailableError):
                file.read()

    def test_slow_ones(self, faulty: Place, faulty_s3: FaultyS3, seed: random.Random) -> None:
        store, data = faulty.open(read_timeout_s=1.0), seed.randbytes(9 * MIB)
        claim = store.put(data).claim
        faulty_s3.on(SlowResponse(0.01, chunk=100_000), kind="GetObject", times=None)
        assert store.read(claim) == data

    def test_a_server_that_falls_silent(self, faulty: Place, faulty_s3: FaultyS3, seed: random.Random) -> None:
        claim = faulty.open().put(seed.randbytes(LARGE)).claim
        store = faulty.open(read_timeout_s=0.5, max_attempts=2)
        faulty_s3.on(HoldResponse(300_000), kind="GetObject")
        assert store.verify(claim) == LARGE
        for fault in (HoldResponse(), HoldResponse(300_000), HoldRequest()):
            faulty_s3.clear()
            faulty_s3.on(fault, kind="GetObject", times=None)
            with pytest.raises(PayloadStoreUnavailableError):
                store.read(claim)
            # No attempt is repeated by two parties: each may take a minute.
            assert faulty_s3.counts["GET", "GetObject"] == 2


def patient(faulty: Place, monkeypatch: pytest.MonkeyPatch) -> PayloadStore:
    """A store that waits for the server to be there again."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda self, context: 0.3)
    monkeypatch.setattr("djp_dagster.claim_check.s3_download._PAUSE_S", 0.1)
    return faulty.open(max_attempts=30, part_bytes=PART, read_timeout_s=2.0)


class TestKilledServer:
    """SIGKILL in the middle, with and without a server that comes back in time."""

    @pytest.mark.parametrize(
        ("kind", "comes_back"), [("UploadPart", True), ("UploadPart", False), ("CompleteMultipartUpload", False)]
    )
    def test_upload(
        self,
        store: PayloadStore,
        faulty_s3: FaultyS3,
        s3_server: SeaweedServer,
        seed: random.Random,
        background: Any,
        kind: str,
        comes_back: bool,
        faulty: Place,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        data = seed.randbytes(LARGE)
        if comes_back:
            store = patient(faulty, monkeypatch)
        held = faulty_s3.on(HoldRequest(), kind=kind, query="partNumber=3" if kind == "UploadPart" else None)
        put = background(store.put, data)
        assert held.reached.wait(30)
        s3_server.kill()
        if comes_back:
            s3_server.start()
        held.release()
        try:
            claim = put.result(120).claim
        except PayloadStoreUnavailableError:
            assert not comes_back
            s3_server.start()
            nothing_visible(store, uploads=1)
            claim = store.put(data).claim
        else:
            assert comes_back
        assert store.read(claim) == data
        assert store.objects.abandoned_uploads(-10, remove=True) == 0

    @pytest.mark.parametrize("comes_back", [True, False])
    def test_download(
        self,
        store: PayloadStore,
        faulty_s3: FaultyS3,
        s3_server: SeaweedServer,
        seed: random.Random,
        background: Any,
        comes_back: bool,
        faulty: Place,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        data = seed.randbytes(LARGE)
        claim = store.put(data).claim
        store = patient(faulty, monkeypatch) if comes_back else faulty.open(part_bytes=PART, read_timeout_s=2.0)
        held = faulty_s3.on(HoldResponse(MIB), kind="GetObject", times=None)
        got = background(store.read, claim)
        assert held.reached.wait(30)
        s3_server.kill()
        if comes_back:
            s3_server.start()
        held.release()
        if comes_back:
            assert got.result(120) == data
        else:
            with pytest.raises(PayloadStoreUnavailableError):
                got.result(120)
            s3_server.start()
        faulty_s3.clear()
        assert store.read(claim) == data


class TestChangingFiles:
    """What is stored is what was hashed, or nothing."""

    @pytest.mark.parametrize("how", ["overwritten", "truncated", "emptied"])
    def test_while_it_is_sent(
        self, faulty: Place, faulty_s3: FaultyS3, seed: random.Random, tmp_path: Path, background: Any, how: str
    ) -> None:
        store, path = faulty.open(threads=1, part_bytes=PART), tmp_path / "source"
        path.write_bytes(seed.randbytes(LARGE))
        held = faulty_s3.on(HoldRequest(), kind="UploadPart", query="partNumber=1")
        put = background(store.put, path)
        assert held.reached.wait(30)
        change(path, how)
        held.release()
        with pytest.raises(PayloadCorruptError, match="changed while it was being stored"):
            put.result(60)
        nothing_visible(store)
        all_right(store, path.read_bytes())

    def test_what_was_appended_meanwhile_is_left_out(
        self, faulty: Place, faulty_s3: FaultyS3, seed: random.Random, tmp_path: Path, background: Any
    ) -> None:
        store, path, data = faulty.open(threads=1, part_bytes=PART), tmp_path / "source", seed.randbytes(LARGE)
        path.write_bytes(data)
        held = faulty_s3.on(HoldRequest(), kind="UploadPart", query="partNumber=1")
        put = background(store.put, path)
        assert held.reached.wait(30)
        change(path, "appended")
        held.release()
        assert store.read(put.result(60).claim) == data

    @pytest.mark.parametrize("how", ["overwritten", "truncated", "emptied"])
    def test_into_a_folder(self, seed: random.Random, tmp_path: Path, how: str) -> None:
        path, objects = tmp_path / "source", LocalObjects(tmp_path / "o")
        path.write_bytes(seed.randbytes(LARGE))
        with path.open("rb") as file:
            hashed = FileContent(file)
            change(path, how)
            with pytest.raises(PayloadCorruptError, match="changed while it was being stored"):
                objects.put("k", hashed, media_type="a/b")
        assert [found for found in (tmp_path / "o").rglob("*") if found.is_file()] == []


def change(path: Path, how: str) -> None:
    with path.open("r+b") as file:
        if how == "overwritten":
            file.seek(-3, os.SEEK_END)
            file.write(b"\0\1\2")
        elif how == "truncated":
            file.truncate(LARGE - 1)
        elif how == "emptied":
            file.truncate(0)
        else:
            file.seek(0, os.SEEK_END)
            file.write(b"more" * MIB)


INTERRUPTED = """
import signal, threading
store = place.open()
data = Path(args[1]).read_bytes()
warm = store.put(b"x")

def interrupt(number, frame):
    print("interrupted", flush=True)
    raise KeyboardInterrupt

signal.signal(signal.SIGINT, interrupt)
claim = Claim.from_json(args[2]) if len(args) > 2 else None
print("ready", flush=True)
try:
    if args[0] == "put":
        store.put(Path(args[1]))
    elif args[0] == "writer":
        with store.writer() as writing:
            writing.file.write(data)
    else:
        store.read(claim)
except KeyboardInterrupt:
    left = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    print(json.dumps([left, keys(store), store.objects.abandoned_uploads(-10, remove=False)]))
"""


class TestInterrupted:
    """Ctrl-C leaves no thread, no upload and no temporary file."""

    @pytest.mark.parametrize("what", ["put", "writer", "read"])
    def test_it(self, faulty: Place, faulty_s3: FaultyS3, seed: random.Random, tmp_path: Path, what: str) -> None:
        (tmp_path / "source").write_bytes(seed.randbytes(LARGE))
        arguments: list[object] = [what, tmp_path / "source"]
        if what == "read":
            arguments.append(faulty.open().put(tmp_path / "source").claim.to_json().decode())
        process = start(INTERRUPTED, faulty, *arguments)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            held = (
                faulty_s3.on(HoldResponse(MIB), kind="GetObject", times=None)
                if what == "read"
                else faulty_s3.on(HoldRequest(), kind="UploadPart", query="partNumber=2")
            )
            assert held.reached.wait(30)
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "interrupted\n"
            held.release()
        except BaseException:
            process.kill()
            raise
        left, there, uploads = json.loads(finish(process))
        assert left == []
        assert uploads == 0
        assert len(there) == (2 if what == "read" else 1)
        assert list((tmp_path / "spool").glob("*")) == []


def test_parts_end_with_their_reader(faulty: Place, faulty_s3: FaultyS3, seed: random.Random) -> None:
    """Closing a download does not wait for what nobody wants."""
    store = faulty.open(threads=2, part_bytes=PART)
    claim = store.put(seed.randbytes(6 * PART)).claim
    file = store.open(claim)
    file.read(10)
    eventually(lambda: faulty_s3.counts["GET", "GetObject"] >= 3)
    before = threading.active_count()
    assert own_threads()
    file.close()
    assert own_threads() == []
    assert threading.active_count() <= before
    asked = faulty_s3.counts["GET", "GetObject"]
    del file
    assert faulty_s3.counts["GET", "GetObject"] == asked <= 5
