"""The moto server for tests: an emulation of AWS in memory, for what SeaweedFS has not (SQS, Kinesis).

It believes every secret, every checksum and every expired URL, and forgets all when it ends: nothing about
authentication, integrity or restarts can be learned from it.
"""

from __future__ import annotations

import http.client
import importlib.util
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from tests.servers.ports import free_port
from tests.servers.s3_server import S3Server


def has_moto() -> bool:
    """Whether moto and what its server needs are installed."""
    return all(importlib.util.find_spec(package) is not None for package in ("moto", "flask", "flask_cors"))


class MotoServer(S3Server):
    """One moto server."""

    name = "the moto server"

    def client(self, endpoint_url: str | None = None, *, service: str = "s3", **config: Any) -> Any:
        """A boto3 client of any service; for S3, with path-style addressing."""
        return self._client(service, endpoint_url, config)

    def drop_bucket(self, name: str) -> None:
        """Remove a bucket and all that is in it, unfinished uploads included."""
        s3 = self.client()
        for page in s3.get_paginator("list_object_versions").paginate(Bucket=name):
            for version in [*page.get("Versions", []), *page.get("DeleteMarkers", [])]:
                s3.delete_object(Bucket=name, Key=version["Key"], VersionId=version["VersionId"])
        for upload in s3.list_multipart_uploads(Bucket=name).get("Uploads", []):
            s3.abort_multipart_upload(Bucket=name, Key=upload["Key"], UploadId=upload["UploadId"])
        with suppress(s3.exceptions.NoSuchBucket):
            s3.delete_bucket(Bucket=name)

    def reset(self) -> None:
        """Forget everything, of every service."""
        if self._ask("POST", "/moto-api/reset") != 200:
            raise RuntimeError("the moto server does not reset")

    def _choose_ports(self) -> None:
        self.port = free_port()

    def _command(self) -> Sequence[str]:
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]

    def _is_ready(self, log: str) -> bool:
        return self._ask("GET", "/moto-api/data.json") == 200

    def _ask(self, method: str, path: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path)
            return connection.getresponse().status
        finally:
            connection.close()
