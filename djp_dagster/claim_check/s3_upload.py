"""Sending an object in parts: several at once, created only if the key is free, aborted if anything fails."""

import contextlib
import re
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

from djp_dagster.claim_check.objects import Content, memory
from djp_dagster.claim_check.s3_settings import CHECKSUM, S3Settings, code_of

_MAX_PARTS = 10_000
_CHECKSUM = re.compile(r"Checksum(?!Type).+")


class Conflict(Exception):  # noqa: N818
    """Somebody else writes the same key at the same time: begin again; never leaves `djp_dagster.claim_check`."""


def part_size(size: int, wanted: int) -> int:
    """The size of a part: as wanted, or as many times that as 10,000 parts take."""
    return wanted * -(-size // (wanted * _MAX_PARTS)) if size else wanted


def upload_parts(
    client: Any, content: Content, arguments: dict[str, Any], condition: dict[str, str], settings: S3Settings
) -> None:
    """Send the content as a multipart upload. Memory is bounded by threads times the size of a part.

    Raises:
        ClientError: among others 412, the key exists; nothing is left behind then.
    """
    at = {"Bucket": arguments["Bucket"], "Key": arguments["Key"]}
    checksum = {"ChecksumAlgorithm": CHECKSUM} if settings.sends_checksums else {}
    upload = {**at, "UploadId": client.create_multipart_upload(**arguments, **checksum)["UploadId"]}
    try:
        parts = _send_all(client, content, upload, settings)
        _complete(client, upload, parts, condition, content.size)
    except BaseException:
        # The first error counts. What cannot be aborted now is removed by collection.
        with contextlib.suppress(Exception):
            client.abort_multipart_upload(**upload)
        raise


def _send_all(client: Any, content: Content, upload: dict[str, str], settings: S3Settings) -> list[dict[str, Any]]:
    size = part_size(content.size, settings.part_bytes)
    failed = threading.Event()

    def send(number: int) -> dict[str, Any]:
        if failed.is_set():
            return {}
        try:
            offset = (number - 1) * size
            body = memory(min(size, content.size - offset))
            content.read_into(memoryview(body), offset)
            sent = client.upload_part(**upload, PartNumber=number, Body=body, **settings.checksum_of(body))
        except BaseException:
            failed.set()
            raise
        checksums = {name: value for name, value in sent.items() if _CHECKSUM.fullmatch(name)}
        return {"PartNumber": number, "ETag": sent["ETag"], **checksums}

    with ThreadPoolExecutor(settings.threads, thread_name_prefix="djp-upload") as pool:
        sending = [pool.submit(send, number) for number in range(1, -(-content.size // size) + 1)]
        try:
            wait(sending, return_when=FIRST_EXCEPTION)
        except BaseException:
            failed.set()
            raise
    return [part.result() for part in sending]


def _complete(
    client: Any, upload: dict[str, str], parts: list[dict[str, Any]], condition: dict[str, str], size: int
) -> None:
    from botocore.exceptions import ClientError

    try:
        client.complete_multipart_upload(**upload, **condition, MultipartUpload={"Parts": parts})
    except ClientError as error:
        if code_of(error)[0] != "NoSuchUpload":
            raise
        # The answer to the first request was lost, and the repeated one finds the upload done: or somebody aborted it.
        try:
            found = client.head_object(Bucket=upload["Bucket"], Key=upload["Key"])
        except ClientError as missing:
            raise error from missing
        if found["ContentLength"] != size:
            raise
