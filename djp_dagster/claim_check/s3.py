"""`S3Objects`: a bucket, or what lies below a prefix of one, as an `ObjectStore`.

Objects come into being by conditional requests (``If-None-Match: *``), also when they are sent in parts, so that of
several writers one wins and nothing is ever overwritten by accident. A server that ignores the condition does no harm
to payloads, which are named after their content; collection asks for it first (`djp_dagster.claim_check.collection`).
"""

import re
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlencode

import msgspec

from djp_dagster.claim_check.objects import Content, Document, DocumentChanged, ObjectInfo, check_key, is_key
from djp_dagster.claim_check.references import goes_at
from djp_dagster.claim_check.s3_download import open_object, read_object
from djp_dagster.claim_check.s3_settings import S3Settings, code_of, typed
from djp_dagster.claim_check.s3_upload import Conflict, upload_parts
from djp_dagster.errors import (
    InvalidSettingError,
    PayloadMissingError,
    PayloadStoreRefusedError,
    PayloadStoreUnavailableError,
)

_DELETED_AT_ONCE = 1000
_CONFLICTS = 5
_BUCKET = re.compile(r"[A-Za-z0-9._-]{3,255}")
_MAX_PRESIGNED_S = 7 * 86400
_EXPIRING = "expiring/"


class S3Client:
    """A boto3 client, made when first needed; making one takes a good part of a second."""

    def __init__(self, settings: S3Settings) -> None:
        self.settings = settings
        self._made: dict[str | None, Any] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process: it makes a client of its own."""
        return S3Client, (self.settings,)

    def get(self, *, signature: str | None = None) -> Any:
        """The client, or one that signs in another way; boto3's are safe to share between threads."""
        with self._lock:
            if signature not in self._made:
                self._made[signature] = self.settings.client(signature=signature)
            return self._made[signature]


class S3Objects:
    """See `ObjectStore`.

    Args:
        client: how to reach the bucket.
        bucket, prefix: what belongs to the store.
        spool_folder: where temporary files are made; wherever the system has them unless given.
    """

    def __init__(self, client: S3Client, bucket: str, prefix: str = "", *, spool_folder: Path | None = None) -> None:
        self._client, self._bucket, self._prefix = client, bucket, prefix
        self._spool_folder = spool_folder

    @property
    def uri(self) -> str:
        """See `ObjectStore.uri`."""
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    @property
    def spool_folder(self) -> Path | None:
        """See `ObjectStore.spool_folder`."""
        return self._spool_folder

    def within(self, prefix: str) -> "S3Objects":
        """See `ObjectStore.within`."""
        return S3Objects(self._client, self._bucket, self._key(prefix), spool_folder=self._spool_folder)

    def _key(self, key: str) -> str:
        check_key(key)
        return f"{self._prefix}/{key}" if self._prefix else key

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._key(key)}

    def put(self, key: str, content: Content, *, media_type: str, replace: bool = False) -> bool:
        """See `ObjectStore.put`."""
        arguments = {
            **self._at(key),
            "ContentType": media_type,
            **self._client.settings.object_arguments(),
            **self._tagging(key),
        }
        condition = {} if replace else {"IfNoneMatch": "*"}
        for attempt in range(1, _CONFLICTS + 1):
            try:
                with typed(self.uri, f"store {key!r}"):
                    return self._put(content, arguments, condition)
            except Conflict:  # somebody else is writing the same key right now
                time.sleep(0.05 * 2**attempt)
        raise PayloadStoreUnavailableError(f"{self.uri} did not store {key!r}: too many conflicts", uri=self.uri)

    def _put(self, content: Content, arguments: dict[str, Any], condition: dict[str, str]) -> bool:
        from botocore.exceptions import ClientError

        client, settings = self._client.get(), self._client.settings
        try:
            if content.size <= settings.part_bytes:
                body = bytearray(content.size)
                content.read_into(memoryview(body), 0)
                client.put_object(**arguments, **condition, Body=body, **settings.checksum_of(body))
            else:
                upload_parts(client, content, arguments, condition, settings)
        except ClientError as error:
            code, status = code_of(error)
            if status == 412 or code == "PreconditionFailed":
                return False
            if status == 409:
                raise Conflict from error
            raise
        return True

    def _tagging(self, key: str) -> dict[str, str]:
        tags = dict(self._client.settings.tags)
        if key.startswith(_EXPIRING):
            tags["djp-expires"] = key.removeprefix(_EXPIRING).partition("/")[0]
        return {"Tagging": urlencode(tags)} if tags else {}

    def info(self, key: str) -> ObjectInfo | None:
        """See `ObjectStore.info`."""
        from botocore.exceptions import ClientError

        with typed(self.uri, f"look at {key!r}"):
            try:
                found = self._client.get().head_object(**self._at(key))
            except ClientError as error:
                if code_of(error)[1] == 404 and code_of(error)[0] != "NoSuchBucket":
                    return None
                raise
        return ObjectInfo(key, found["ContentLength"], found["LastModified"].timestamp(), found["ETag"])

    def open(self, key: str, *, expected_bytes: int | None = None) -> BinaryIO:
        """See `ObjectStore.open`."""
        return open_object(
            self._client.get(), self._at(key), key, self.uri, self._client.settings, expected_bytes=expected_bytes
        )

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See `ObjectStore.list`."""
        top = f"{self._prefix}/" if self._prefix else ""
        pages = self._client.get().get_paginator("list_objects_v2")
        with typed(self.uri, "list objects"):
            for page in pages.paginate(Bucket=self._bucket, Prefix=top + prefix):
                for found in page.get("Contents", ()):
                    yield ObjectInfo(
                        found["Key"].removeprefix(top),
                        found["Size"],
                        found["LastModified"].timestamp(),
                        found["ETag"],
                    )

    def delete(self, keys: Sequence[str]) -> None:
        """See `ObjectStore.delete`."""
        for start in range(0, len(keys), _DELETED_AT_ONCE):
            named = [{"Key": self._key(key)} for key in keys[start : start + _DELETED_AT_ONCE]]
            with typed(self.uri, f"delete {len(named)} objects"):
                answer = self._client.get().delete_objects(
                    Bucket=self._bucket, Delete={"Objects": named, "Quiet": True}
                )
            if errors := answer.get("Errors"):
                raise PayloadStoreRefusedError(
                    f"{self.uri} refuses to delete {len(errors)} objects, the first, {errors[0]['Key']!r}, with "
                    f"{errors[0]['Code']}; grant s3:DeleteObject",
                    uri=self.uri,
                    code=errors[0]["Code"],
                )

    def read_document(self, key: str) -> Document | None:
        """See `ObjectStore.read_document`."""
        try:
            return Document(*read_object(self._client.get(), self._at(key), key, self.uri, self._client.settings))
        except PayloadMissingError:
            return None

    def write_document(self, key: str, body: bytes, *, expected: str | None) -> str:
        """See `ObjectStore.write_document`."""
        from botocore.exceptions import ClientError

        condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected}
        with typed(self.uri, f"write {key!r}"):
            try:
                return self._put_document(key, body, condition)
            except ClientError as error:
                code, status = code_of(error)
                if status in (409, 412) or (code == "NoSuchKey" and expected is not None):
                    raise DocumentChanged(key) from error
                raise

    def _put_document(self, key: str, body: bytes, condition: dict[str, str]) -> str:
        arguments = {**self._at(key), **self._client.settings.object_arguments(), **self._tagging(key), **condition}
        etag: str = self._client.get().put_object(**arguments, Body=body)["ETag"]
        return etag

    def replace_document(self, key: str, body: bytes) -> None:
        """See `ObjectStore.replace_document`."""
        with typed(self.uri, f"write {key!r}"):
            self._put_document(key, body, {})

    def abandoned_uploads(self, older_than_s: float, *, remove: bool) -> int:
        """See `ObjectStore.abandoned_uploads`."""
        oldest, count = self.now() - older_than_s, 0
        client = self._client.get()
        top = f"{self._prefix}/" if self._prefix else ""
        with typed(self.uri, "list unfinished uploads"):
            for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=self._bucket, Prefix=top):
                for upload in page.get("Uploads", ()):
                    if (
                        upload["Initiated"].timestamp() < oldest
                        and goes_at(upload["Key"].removeprefix(top)) is not None
                    ):
                        count += 1
                        if remove:
                            self._abort(upload)
        return count

    def _abort(self, upload: dict[str, Any]) -> None:
        from botocore.exceptions import ClientError

        try:
            self._client.get().abort_multipart_upload(
                Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"]
            )
        except ClientError as error:
            if code_of(error)[0] != "NoSuchUpload":  # it was finished, or removed, meanwhile
                raise

    def presign(self, key: str, *, expires_s: int) -> str:
        """See `ObjectStore.presign`."""
        if expires_s > _MAX_PRESIGNED_S:
            raise InvalidSettingError(
                f"{self.uri} signs URLs for at most 7 days, not for {expires_s} s",
                setting="expires_in",
                value=expires_s,
            )
        # boto3 would sign in a way that newer regions, and objects encrypted by the key management, do not take.
        at, client = self._at(key), self._client.get(signature="s3v4")
        with typed(self.uri, f"sign a URL of {key!r}"):
            url: str = client.generate_presigned_url("get_object", Params=at, ExpiresIn=expires_s)
        return url

    def is_away(self) -> bool:
        """See `ObjectStore.is_away`: a server that does not answer says so at every request."""
        return False

    def now(self) -> float:
        """See `ObjectStore.now`: what the server says in its answer to a request."""
        with typed(self.uri, "tell the time"):
            answer = self._client.get().list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)
        told = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        moment: datetime | None = parsedate_to_datetime(told) if told else None
        return moment.timestamp() if moment is not None else time.time()


def open_bucket(bucket: str, prefix: str, settings: dict[str, Any]) -> "tuple[S3Objects, dict[str, Any]]":
    """The bucket with the settings that are for S3, and the other settings. What is not given, the environment may."""
    # The value itself is not repeated: people write credentials into URLs.
    for setting, allowed, rule in (
        ("bucket", _BUCKET.fullmatch(bucket), "3 to 255 of A-Z a-z 0-9 . _ -, without credentials"),
        (
            "prefix",
            not prefix or is_key(prefix),
            "segments of A-Z a-z 0-9 _ . - = joined by '/', none beginning with a dot",
        ),
    ):
        if not allowed:
            raise InvalidSettingError(f"the {setting} in the URL of a payload store must be {rule}", setting=setting)
    known = {name: settings.pop(name) for name in tuple(settings) if name in S3Settings.__struct_fields__}
    spool_folder = settings.pop("spool_folder", None)
    how = msgspec.structs.replace(S3Settings.from_environment(), **known)
    folder = Path(spool_folder) if spool_folder is not None else None
    return S3Objects(S3Client(how), bucket, prefix, spool_folder=folder), settings
