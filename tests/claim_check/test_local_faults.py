"""Faults of the place where a folder's payloads, or temporary files, lie; each made for real but one."""

import errno
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from djp_dagster import open_payload_store
from djp_dagster.claim_check.local import LocalObjects
from djp_dagster.errors import PayloadStoreRefusedError, PayloadStoreUnavailableError
from tests.claim_check.kit import Place, at_once, content, finish, start

FULL = """
import resource
store = place.open()
good = store.put(b"good").claim
resource.setrlimit(resource.RLIMIT_FSIZE, (5 * MIB, 5 * MIB))  # a full disk, for this process
said = []
def attempt(use):
    try:
        use()
    except DjpError as error:
        said.append([type(error).__name__, str(error)])
    else:
        said.append(None)
def write():
    with store.writer() as writing:
        for _ in range(9):
            writing.file.write(bytes(MIB))
Path(args[0]).write_bytes(bytes(4 * MIB))
attempt(lambda: store.put(LongStream(9 * MIB, 1)))
attempt(write)
attempt(lambda: store.put(bytes(7 * MIB), compress=False))
attempt(lambda: store.put(Path(args[0])))
assert store.read(good) == b"good"
print(json.dumps([said, keys(store), store.objects.abandoned_uploads(-10, remove=False)]))
"""


def test_a_full_disk(place: Place, tmp_path: Path) -> None:
    said, there, unfinished = json.loads(finish(start(FULL, place, tmp_path / "source")))
    for number in (0, 1, 2) if place.is_folder else (0, 1):
        kind, message = said[number]
        assert kind == "PayloadStoreUnavailableError"
        assert "make room" in message
    assert said[3] is None
    assert len(there) == (2 if place.is_folder else 3)
    assert unfinished == 0
    assert [path for path in tmp_path.rglob(".*") if path.is_file() and path.name != ".lock"] == []


@pytest.fixture
def common() -> Iterator[Path]:
    """A folder that others may enter, unlike pytest's."""
    folder = Path(tempfile.mkdtemp(prefix="djp-claims-"))
    folder.chmod(0o777)
    yield folder
    for path in folder.rglob("*"):
        if path.is_dir():
            path.chmod(0o700)
    shutil.rmtree(folder)


UNPRIVILEGED = """
import os, pwd
warm = Place(args[0]).open(); warm.verify(warm.put(b"warm").claim); warm.rooms()
if os.geteuid() == 0:
    nobody = pwd.getpwnam("nobody")
    os.setgroups([]); os.setgid(nobody.pw_gid); os.setuid(nobody.pw_uid)
store, claim = place.open(), Claim.from_json(args[1])
for use in (lambda: store.put(b"x"), lambda: store.read(claim), lambda: keys(store), lambda: keys(store, "sha256/"),
            lambda: store.objects.read_document("rooms/a"), lambda: store.objects.replace_document("rooms/a", b""),
            store.rooms, lambda: store.objects.info(store.resolve(claim).key),
            lambda: store.objects.delete([store.resolve(claim).key])):
    try:
        use()
        print("done")
    except DjpError as error:
        print(type(error).__name__, error.facts)
"""


def test_no_permission(common: Path, tmp_path: Path) -> None:
    place = Place(str(common / "payloads"))
    claim = place.open(room="a").put(b"payload").claim
    for path in [common / "payloads", *(common / "payloads").rglob("*")]:
        if path.is_dir():
            path.chmod(0o000)
    said = finish(start(UNPRIVILEGED, place, tmp_path / "warm", claim.to_json().decode())).splitlines()
    # Not even an empty list: collection would take it for a store nobody refers to.
    assert [line.split()[0] for line in said] == ["PayloadStoreRefusedError"] * 9


def test_a_store_that_may_only_be_read(common: Path, tmp_path: Path) -> None:
    place = Place(str(common / "payloads"))
    claim = place.open(room="a").put(b"payload").claim
    for path in (common / "payloads").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (common / "payloads").chmod(0o755)
    said = finish(start(UNPRIVILEGED, place, tmp_path / "warm", claim.to_json().decode())).splitlines()
    refused = [number for number, line in enumerate(said) if line.startswith("PayloadStoreRefusedError")]
    assert refused == [0, 5, 8]
    assert said.count("done") == 6


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    store = open_payload_store(tmp_path / "file" / "payloads")
    with pytest.raises(PayloadStoreRefusedError):
        store.put(b"x")
    (tmp_path / "payloads").write_text("x")
    with pytest.raises(PayloadStoreRefusedError):
        open_payload_store(tmp_path / "payloads").put(b"x")


def test_a_folder_that_disappears(tmp_path: Path) -> None:
    store = open_payload_store(tmp_path / "payloads")
    claim = store.put(b"x").claim
    shutil.rmtree(tmp_path / "payloads")
    # An unmounted file system has not lost anything.
    with pytest.raises(PayloadStoreUnavailableError, match="restore it"):
        store.read(claim)
    assert store.read(store.put(b"x").claim) == b"x"


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: random.Random) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    objects = LocalObjects(tmp_path / "o")
    contents = [seed.randbytes(1000) for _ in range(16)]

    def put(data: bytes) -> bool:
        with content(data) as spool:
            return objects.put("a/k", spool, media_type="a/b")

    won = at_once([lambda data=data: put(data) for data in contents])
    assert sorted(won) == [False] * 15 + [True]
    with objects.open("a/k") as file:
        assert file.read() == contents[won.index(True)]
    assert not list((tmp_path / "o").glob(".upload-*"))
