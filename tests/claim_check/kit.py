"""Building blocks of the claim check's tests: where payloads lie, and how another process finds them there."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from djp_dagster import PayloadStore, open_payload_store
from djp_dagster.claim_check.objects import ObjectStore
from djp_dagster.claim_check.s3 import S3Client, S3Objects
from djp_dagster.claim_check.s3_settings import S3Settings
from djp_dagster.claim_check.spool import Spool
from tests.servers.s3_server import REGION, S3Server

REPOSITORY = Path(__file__).resolve().parents[2]
MIB = 1 << 20

_clients: dict[str, S3Client] = {}


class Place(msgspec.Struct):
    """Where a store lies, in words that another process understands.

    Attributes:
        seen_from: the folder, or the server, to look behind the store's back.
    """

    target: str
    settings: dict[str, Any] = {}
    server: Any = None

    @property
    def is_folder(self) -> bool:
        return self.server is None

    @property
    def can_presign(self) -> bool:
        return not self.is_folder

    def open(self, **settings: Any) -> PayloadStore:
        """A store of this place, as a new process would have it, but for the client, which takes a second to make."""
        store = open_payload_store(self.target, **{**self.settings, **settings})
        if isinstance(store.objects, S3Objects):
            made = store.objects._client
            store.objects._client = _clients.setdefault(repr(msgspec.structs.asdict(made.settings)), made)
        return store

    def objects(self, **settings: Any) -> ObjectStore:
        return self.open(**settings).objects

    def at(self, target: str, **settings: Any) -> Place:
        """Another place of the same server."""
        return Place(target, {**self.settings, **settings}, self.server)

    # Behind the store's back

    @property
    def bucket(self) -> str:
        return self.target.split("/")[2]

    def _key(self, key: str) -> str:
        prefix = "/".join(self.target.split("/")[3:])
        return f"{prefix}/{key}" if prefix else key

    def replace(self, key: str, content: bytes) -> None:
        """Change the stored bytes, as an attacker or a broken disk would."""
        if self.is_folder:
            path = Path(self.target) / key
            path.unlink(missing_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        else:
            self.server.client().put_object(Bucket=self.bucket, Key=self._key(key), Body=content)

    def stored(self, key: str) -> bytes:
        if self.is_folder:
            return (Path(self.target) / key).read_bytes()
        body: bytes = self.server.client().get_object(Bucket=self.bucket, Key=self._key(key))["Body"].read()
        return body


def s3_settings(server: S3Server, endpoint_url: str | None = None, **more: Any) -> dict[str, Any]:
    """Settings of a store on the server, quick to give up."""
    return {
        "endpoint_url": endpoint_url or server.endpoint_url,
        "region": REGION,
        "access_key_id": server.access_key,
        "secret_access_key": server.secret_key,
        "addressing": "path",
        "max_attempts": 3,
        **more,
    }


def s3_place(server: S3Server, target: str, endpoint_url: str | None = None, **more: Any) -> Place:
    return Place(target, s3_settings(server, endpoint_url, **more), server)


def settings_of(place: Place) -> S3Settings:
    return S3Settings(**{k: v for k, v in place.settings.items() if k in S3Settings.__struct_fields__})


def content(data: bytes) -> Spool:
    spool = Spool()
    spool.write(data)
    return spool


def key_of(data: bytes) -> str:
    digest = hashlib.sha256(data).hexdigest()
    return f"sha256/{digest[:2]}/{digest[2:]}"


def text_of(seed: random.Random, lines: int) -> bytes:
    return b"".join(b"%d;%d;a line of text\n" % (n, seed.randrange(1000)) for n in range(lines))


def piped(data: bytes) -> io.BufferedReader:
    """A file that can be read once and in order, and has no size."""
    reading, writing = os.pipe()

    def write() -> None:
        with suppress(BrokenPipeError), os.fdopen(writing, "wb") as file:
            file.write(data)

    threading.Thread(target=write, daemon=True).start()
    return os.fdopen(reading, "rb")


def left_behind(store: PayloadStore, tmp_path: Path) -> list[str]:
    """Temporary files and unfinished uploads."""
    files = [str(path) for path in tmp_path.rglob(".*") if path.is_file() and path.name != ".lock"]
    return files + ["upload"] * store.objects.abandoned_uploads(-10, remove=False)


def keys(objects: ObjectStore | PayloadStore, prefix: str = "") -> list[str]:
    """All keys, but the documents of collection."""
    here = objects.objects if isinstance(objects, PayloadStore) else objects
    return sorted(found.key for found in here.list(prefix) if not found.key.startswith("gc/"))


def at_once(works: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each returns, or the exception it raises; all start at the same moment."""
    results: list[Any] = [None] * len(works)
    gate = threading.Barrier(len(works))

    def run(number: int) -> None:
        gate.wait(30)
        try:
            results[number] = works[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=[number], name=f"at-once-{number}") for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    return results


def eventually(condition: Callable[[], bool], *, within_s: float = 60.0, every_s: float = 0.02) -> None:
    """Wait until the condition holds; fail if it never does."""
    give_up = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < give_up, f"still not so after {within_s} s"
        time.sleep(every_s)


def own_threads() -> list[str]:
    """The threads of uploads and downloads that are alive."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("djp-")]


def start(code: str, place: Place, *arguments: object) -> subprocess.Popen[str]:
    """Run the code in a process of its own, with ``place`` and ``args`` defined."""
    head = (
        "import json, sys\n"
        "from djp_dagster import Claim, DjpError\n"
        "from tests.claim_check.kit import *\n"
        "place = Place(sys.argv[1], json.loads(sys.argv[2]))\n"
        "args = sys.argv[3:]\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", head + code, place.target, json.dumps(place.settings), *map(str, arguments)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], *, timeout_s: float = 120.0) -> str:
    """What the process printed; fails if it failed."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    assert process.returncode == 0, f"{out}\n{err}"
    return out


class LongStream:
    """Bytes that no two pieces of are the same, to be read once and in order, that nobody ever holds as a whole."""

    def __init__(self, size: int, seed: int) -> None:
        self._block, self._number, self._left = random.Random(seed).randbytes(MIB - 8), 0, size

    def read(self, size: int = -1) -> bytes:
        size = min(self._left, MIB if size < 0 else size)
        self._left -= size
        self._number += 1
        return (self._number.to_bytes(8, "big") + self._block)[:size]


class Memory:
    """How much the resident memory of this process rises above what it is now."""

    def __init__(self) -> None:
        self._idle = self._told("VmRSS")
        self.risen: dict[str, int] = {}

    @contextmanager
    def peak(self, name: str) -> Iterator[None]:
        """Note the highest rise within the block, in bytes."""
        Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here
        yield
        self.note(name)

    def note(self, name: str) -> None:
        """As at the end of the block, which was left by an exception."""
        self.risen[name] = self._told("VmHWM") - self._idle

    def _told(self, name: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
        raise AssertionError(name)
