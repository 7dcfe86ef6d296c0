"""What an S3 request is about, and how it is signed: for a proxy that must know the one and renew the other."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote, urlsplit

_AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=(?P<key>[^/]+)/(?P<scope>[^,]+), *SignedHeaders=(?P<signed>[^,]+), *Signature=\w+"
)

# The first parameter that occurs in the query names the operation; without one it is of the object or bucket itself.
_BY_PARAMETER = {
    "GET": {
        "uploadId": "ListParts",
        "uploads": "ListMultipartUploads",
        "tagging": "GetObjectTagging",
        "versions": "ListObjectVersions",
        "list-type": "ListObjectsV2",
        "attributes": "GetObjectAttributes",
    },
    "PUT": {"partNumber": "UploadPart", "tagging": "PutObjectTagging"},
    "POST": {
        "uploads": "CreateMultipartUpload",
        "uploadId": "CompleteMultipartUpload",
        "delete": "DeleteObjects",
    },
    "DELETE": {"uploadId": "AbortMultipartUpload", "tagging": "DeleteObjectTagging"},
}
_OBJECT = {"GET": "GetObject", "HEAD": "HeadObject", "PUT": "PutObject", "DELETE": "DeleteObject"}
_BUCKET = {"GET": "ListObjects", "HEAD": "HeadBucket", "PUT": "CreateBucket", "DELETE": "DeleteBucket"}


@dataclass(frozen=True)
class S3Request:
    """One request, path-style.

    Attributes:
        method: Of HTTP.
        kind: The operation, as AWS names it, such as ``UploadPart``; ``Other`` for those that are not told apart here.
        bucket: Empty in ListBuckets.
        key: Of the object, decoded; empty in what concerns a bucket.
        query: As it was sent, encoded.
        headers: With names in lower case.
    """

    method: str
    kind: str
    bucket: str
    key: str
    query: str
    headers: Mapping[str, str]


def parse(method: str, target: str, headers: Mapping[str, str]) -> S3Request:
    """The request that a request line and its headers make."""
    lower = {name.lower(): value for name, value in headers.items()}
    url = urlsplit(target)
    bucket, _, key = unquote(url.path).lstrip("/").partition("/")
    return S3Request(method, _kind(method, url.query, bucket, key, lower), bucket, key, url.query, lower)


def renew_signature(request: S3Request, target: str, headers: Mapping[str, str], secret_key: str) -> dict[str, str]:
    """The headers, signed again after some of them have been taken away.

    The payload's hash stays as the client has stated it. A request that is not signed in its headers (a presigned URL)
    is returned as it is.
    """
    found = _AUTHORIZATION.fullmatch(request.headers.get("authorization", ""))
    if found is None:
        return dict(headers)
    values = {name.lower(): " ".join(value.split()) for name, value in headers.items()}
    signed = [name for name in found["signed"].split(";") if name in values]
    url = urlsplit(target)
    canonical = "\n".join(
        [
            request.method,
            url.path,
            _canonical_query(url.query),
            *(f"{name}:{values[name]}" for name in signed),
            "",
            ";".join(signed),
            values["x-amz-content-sha256"],
        ]
    )
    date, region, service, end = found["scope"].split("/")
    to_sign = "\n".join(["AWS4-HMAC-SHA256", values["x-amz-date"], found["scope"], _hex(canonical)])
    key = f"AWS4{secret_key}".encode()
    for part in (date, region, service, end):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
    renewed = (
        f"AWS4-HMAC-SHA256 Credential={found['key']}/{found['scope']}, "
        f"SignedHeaders={';'.join(signed)}, Signature={signature}"
    )
    return {name: renewed if name.lower() == "authorization" else value for name, value in headers.items()}


def _kind(method: str, query: str, bucket: str, key: str, headers: Mapping[str, str]) -> str:
    parameters = dict(parse_qsl(query, keep_blank_values=True))
    for parameter, kind in _BY_PARAMETER.get(method, {}).items():
        if parameter in parameters:
            return kind
    if "x-amz-copy-source" in headers and method == "PUT":
        return "CopyObject"
    if not bucket:
        return "ListBuckets" if method == "GET" else "Other"
    return (_OBJECT if key else _BUCKET).get(method, "Other")


def _canonical_query(query: str) -> str:
    parts: Iterable[str] = filter(None, query.split("&"))
    return "&".join(sorted(part if "=" in part else f"{part}=" for part in parts))


def _hex(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
