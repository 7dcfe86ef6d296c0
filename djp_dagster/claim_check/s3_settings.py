"""`S3Settings`: how to reach a bucket, how to write to it; and errors of S3 as errors of this package."""

import os
import zlib
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from djp_dagster.errors import InvalidSettingError, PayloadStoreRefusedError, PayloadStoreUnavailableError
from djp_dagster.units import is_count

if TYPE_CHECKING:
    import mmap

CHECKSUM = "CRC32"
Checksums = Literal["when_supported", "when_required"]
Addressing = Literal["auto", "path", "virtual"]
_MIN_PART_BYTES = 5 << 20
_MAX_TAGS = 8  # of the ten that S3 allows; two are for expiry
# BadDigest: the bytes were damaged on their way.
# InvalidPart, NoSuchUpload: a part was lost, or somebody gave the upload up; another upload may succeed.
_TRY_AGAIN_CODES = {
    "RequestTimeout",
    "SlowDown",
    "InternalError",
    "ServiceUnavailable",
    "BadDigest",
    "InvalidPart",
    "NoSuchUpload",
}


class S3Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How to reach a bucket, and how to write to it. What is not given, boto3 finds as it always does.

    Args:
        endpoint_url: of another server than AWS.
        region, profile: as in boto3.
        access_key_id, secret_access_key, session_token: credentials, if boto3 is not to look for them.
        unsigned: send no credentials at all, to read a public bucket.
        use_ssl, verify: as in boto3.
        addressing: where the bucket's name goes: ``"path"`` for most servers other than AWS.
        checksums: ``"when_required"`` for servers that refuse the checksums boto3 sends by default. Payloads are
            verified against their own sha256 either way.
        max_attempts: of a request, the first one included.
        connect_timeout_s, read_timeout_s: of a request.
        encryption: ``"AES256"`` or ``"aws:kms"``; the bucket's default unless given.
        kms_key_id: with ``"aws:kms"``, which key; that of the account unless given.
        bucket_key: with ``"aws:kms"``, ask the key management once for many objects.
        tags: on every object, e.g. for lifecycle rules; up to 8.
        part_bytes: large payloads are sent and fetched in parts of this size, at least 5 MiB.
        threads: how many parts are under way at once; memory is bounded by ``part_bytes`` times this.
    """

    endpoint_url: str | None = None
    region: str | None = None
    profile: str | None = None
    access_key_id: str | None = None
    secret_access_key: str | None = None
    session_token: str | None = None
    unsigned: bool = False
    use_ssl: bool = True
    verify: bool | str | None = None
    addressing: Addressing = "auto"
    checksums: Checksums = "when_supported"
    max_attempts: int = 5
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 60.0
    encryption: Literal["AES256", "aws:kms"] | None = None
    kms_key_id: str | None = None
    bucket_key: bool = False
    tags: Mapping[str, str] = {}
    part_bytes: int = 8 << 20
    threads: int = 4

    def __post_init__(self) -> None:
        for setting, allowed, rule in (
            ("addressing", self.addressing in ("auto", "path", "virtual"), "'auto', 'path' or 'virtual'"),
            ("checksums", self.checksums in ("when_supported", "when_required"), "'when_supported' or 'when_required'"),
            ("encryption", self.encryption in (None, "AES256", "aws:kms"), "'AES256' or 'aws:kms'"),
            ("kms_key_id", self.kms_key_id is None or self.encryption == "aws:kms", "with encryption='aws:kms' only"),
            ("part_bytes", self.part_bytes >= _MIN_PART_BYTES, f"at least {_MIN_PART_BYTES}"),
            ("threads", is_count(self.threads) and 1 <= self.threads <= 64, "1 to 64"),
            ("max_attempts", is_count(self.max_attempts) and self.max_attempts >= 1, "1 or more"),
            ("tags", len(self.tags) <= _MAX_TAGS, f"at most {_MAX_TAGS}"),
        ):
            if not allowed:
                value = getattr(self, setting)
                raise InvalidSettingError(f"S3: {setting}={value!r} must be {rule}", setting=setting, value=value)

    def __repr__(self) -> str:
        """Without credentials."""
        return f"S3Settings(endpoint_url={self.endpoint_url!r}, region={self.region!r}, profile={self.profile!r})"

    @staticmethod
    def from_environment() -> "S3Settings":
        """``DJP_S3_ENDPOINT_URL``, ``_REGION``, ``_ACCESS_KEY_ID``, ``_SECRET_ACCESS_KEY``, ``_ADDRESSING``,
        ``_CHECKSUMS``.
        """  # noqa: D205
        names = ("endpoint_url", "region", "access_key_id", "secret_access_key", "addressing", "checksums")
        found = {name: os.environ.get(f"DJP_S3_{name.upper()}") for name in names}
        return S3Settings(**{name: value for name, value in found.items() if value})  # type: ignore[arg-type]

    def client(self, *, signature: str | None = None) -> Any:
        """A new boto3 client. Asks nobody."""
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config

        config = Config(
            retries={"mode": "standard", "total_max_attempts": self.max_attempts},
            connect_timeout=self.connect_timeout_s,
            read_timeout=self.read_timeout_s,
            max_pool_connections=max(16, 2 * self.threads),
            request_checksum_calculation=self.checksums,
            response_checksum_validation=self.checksums,
            # A body with a checksum in the signed headers needs no sha256 of its own in the signature: hashing it once
            # more costs more than sending it.
            s3={"addressing_style": self.addressing, "payload_signing_enabled": not self.sends_checksums},
            signature_version=UNSIGNED if self.unsigned else signature,
            # A fixed one: botocore makes it up twice a request, a fifth of the client's time for small objects.
            user_agent=f"djp-dagster Boto3/{boto3.__version__}",
        )
        client = boto3.session.Session(profile_name=self.profile).client(
            "s3",
            region_name=self.region,
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key_id,
            aws_secret_access_key=self.secret_access_key,
            aws_session_token=self.session_token,
            use_ssl=self.use_ssl,
            verify=self.verify,
            config=config,
        )
        client.meta.events.register("before-parse.s3", _notice_what_is_cut)
        return client

    @property
    def sends_checksums(self) -> bool:
        """Whether the server is told, and checks, a CRC-32 of every body."""
        return self.checksums == "when_supported"

    def checksum_of(self, body: "bytes | bytearray | mmap.mmap") -> dict[str, str]:
        """The checksum of a body as an argument of the request: made here, it needs no second pass in botocore."""
        if not self.sends_checksums:
            return {}
        return {"ChecksumCRC32": b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()}

    def object_arguments(self) -> dict[str, Any]:
        """What every new object is made with."""
        arguments: dict[str, Any] = {}
        if self.encryption is not None:
            arguments["ServerSideEncryption"] = self.encryption
        if self.kms_key_id is not None:
            arguments["SSEKMSKeyId"] = self.kms_key_id
        if self.bucket_key:
            arguments["BucketKeyEnabled"] = True
        return arguments


def _notice_what_is_cut(operation_model: Any, response_dict: dict[str, Any], **_: Any) -> None:
    """Have a request repeated whose answer broke off.

    botocore takes an answer that breaks off before its first byte for an empty one: a list of nothing, say, which to
    collection would mean that nothing is referred to.
    """
    told = response_dict["headers"].get("content-length")
    if operation_model.has_streaming_output or operation_model.http["method"] == "HEAD" or told is None:
        return
    if len(response_dict["body"]) < int(told):
        response_dict["status_code"], response_dict["body"] = 500, b""


def code_of(error: Any) -> tuple[str, int]:
    """S3's name of what went wrong, and the HTTP status."""
    response = error.response
    return response.get("Error", {}).get("Code", ""), response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


@contextmanager
def typed(uri: str, what: str) -> Iterator[None]:
    """Errors of botocore, after its retries, as errors of this package.

    Raises:
        PayloadStoreUnavailableError: the server is away, too busy, or broke off.
        PayloadStoreRefusedError: anything else; the message names S3's code, never a credential.
    """
    from botocore import exceptions, parsers

    try:
        yield
    except exceptions.ClientError as error:
        code, status = code_of(error)
        if (status >= 500 and status != 501) or status == 429 or code in _TRY_AGAIN_CODES:
            raise _unavailable(uri, what, f"{status} {code}") from error
        raise PayloadStoreRefusedError(
            f"{uri} refuses to {what}: {status} {code}; {_remedy(code, status)}", uri=uri, code=code
        ) from error
    except (*broken_off(), exceptions.ConnectionError, parsers.ResponseParserError) as error:
        raise _unavailable(uri, what, type(error).__name__) from error
    except exceptions.BotoCoreError as error:
        raise PayloadStoreRefusedError(
            f"{uri}: cannot {what}: {type(error).__name__}; give credentials and a region that boto3 finds, or the "
            "settings of the store",
            uri=uri,
            code=type(error).__name__,
        ) from error


def broken_off() -> tuple[type[Exception], ...]:
    """What botocore raises if the body of an answer does not arrive whole and as it was sent."""
    from botocore import exceptions

    return exceptions.HTTPClientError, exceptions.IncompleteReadError, exceptions.FlexibleChecksumError


def _unavailable(uri: str, what: str, why: str) -> PayloadStoreUnavailableError:
    return PayloadStoreUnavailableError(f"{uri} did not {what}: {why}; it was asked again, in vain", uri=uri)


def _remedy(code: str, status: int) -> str:
    if code == "NoSuchBucket":
        return "create the bucket: a payload store makes none"
    if status == 403:
        return (
            "grant s3:GetObject, s3:PutObject, s3:AbortMultipartUpload and s3:ListBucket, for collection also "
            "s3:DeleteObject and s3:ListBucketMultipartUploads, or check credentials and clock"
        )
    if status == 501 or code == "NotImplemented":
        return "the server lacks what a payload store needs, such as conditional writes"
    return "see what S3 says of this code"
