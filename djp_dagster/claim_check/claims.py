"""`Claim`: the token that travels in a payload's place; and `PayloadRef`, what a store knows of a payload.

A claim is JSON below 1 KiB: version, URI, size, sha256, media type, encoding, expiry. It also travels as the attributes
of a CloudEvent (``dataref`` and its companions) and as an SQS Extended Client pointer. Whatever it says is only ever
compared: nothing in it is imported, executed, or followed out of the store that resolves it.

Sources of the formats: CloudEvents 1.0.2 extension "Dataref"; payload-offloading-java-common-lib (SQS).
"""

import re
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import msgspec

from djp_dagster.errors import InvalidClaimError

if TYPE_CHECKING:
    from djp_dagster.claim_check.sqs import SqsPointer

MAX_TOKEN_BYTES = 1024
_MAX_SECONDS = 253_402_300_799  # the last second of the year 9999
_FAULT = re.compile(r"at `\$\.([a-z0-9]+)|field `([a-z0-9]+)`")
_PARTS = {"v": "version", "ct": "media type", "enc": "encoding", "exp": "expiry"}
_HEX = re.compile(r"[0-9a-f]{64}")
# No two parts of it match the same text, and it is bounded: a long one must not take long.
_MEDIA_TYPE = re.compile(r"(?=.{3,255}\Z)[!-.0-:<-~]+/[!-.0-:<-~]+( *;[ -~]+)?", re.DOTALL)
_ENCODING = re.compile(r"[a-z0-9.-]{1,20}")
_URI = re.compile(r"[!-~]{1,960}")

BYTES = "application/octet-stream"
DATAREF = "dataref"
_SIZE, _SHA256, _ENCODING_OF, _EXPIRES = "datarefsize", "datarefsha256", "datarefencoding", "datarefexpires"
CLAIM_ATTRIBUTES = frozenset((DATAREF, _SIZE, _SHA256, _ENCODING_OF, _EXPIRES))
"""The extension attributes of an event that carries a claim."""

ZSTD = "zstd"


class PayloadRef(msgspec.Struct, frozen=True):
    """What a payload store keeps under ``key``, and how to tell that it is that.

    Attributes:
        key: relative to the store.
        bytes, sha256: of the payload itself, not of its encoded form; -1 and "": the pointer of another tool does not
            tell.
        encoding: how it is stored: None (as it is) or ``"zstd"``.
    """

    key: str
    bytes: int
    sha256: str
    media_type: str
    encoding: str | None = None


class Claim(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    omit_defaults=True,
    tag_field="v",
    tag=1,
    rename={"media_type": "ct", "encoding": "enc", "expires_at": "exp"},
):
    """A token for a payload: where it lies, and how to tell that it is that.

    Args:
        uri: ``s3://bucket/key`` or ``file:///folder/key``. Only a store whose own URI it begins with resolves it.
        size: bytes of the payload.
        sha256: of the payload, in lower-case hex; like the size, None where another tool's pointer does not tell.
        media_type: of the payload.
        encoding: how it is stored: None (as it is) or ``"zstd"``.
        expires_at: seconds since 1970 from which on it may be gone; None never.

    Raises:
        InvalidClaimError: naming the part, its value and what is allowed.

    Example:
        >>> claim = Claim(uri="s3://claims/sha256/ab/" + "c" * 62, size=3, sha256="ab" + "c" * 62)
        >>> Claim.from_json(claim.to_json()) == claim, len(claim.to_json()) < 1024
        (True, True)
    """

    uri: str
    size: int | None = None
    sha256: str | None = None
    media_type: str = BYTES
    encoding: str | None = None
    expires_at: int | None = None

    def __post_init__(self) -> None:
        # A constructor checks no types, and a token may say anything.
        for part, value, allowed, rule in (
            ("uri", self.uri, _is_text(_URI, self.uri), "a URI of ASCII text, of at most 960 characters"),
            ("size", self.size, self.size is None or _is_natural(self.size), "a number of bytes, 0 or more"),
            ("sha256", self.sha256, self.sha256 is None or _is_text(_HEX, self.sha256), "64 lower-case hex digits"),
            ("media type", self.media_type, _is_text(_MEDIA_TYPE, self.media_type), "one such as 'image/png'"),
            ("encoding", self.encoding, self.encoding is None or _is_text(_ENCODING, self.encoding), "a short name"),
            ("expiry", self.expires_at, _is_expiry(self.expires_at), "whole seconds since 1970, up to the year 9999"),
        ):
            _require(part, value, allowed, rule)
        if len(self.to_json()) >= MAX_TOKEN_BYTES:
            raise InvalidClaimError(
                f"a claim must stay below {MAX_TOKEN_BYTES} bytes, this one has {len(self.to_json())}; use a shorter "
                f"bucket prefix or folder than in {self.uri[:80]!r}...",
                part="uri",
            )

    @property
    def expires(self) -> datetime | None:
        """When it may be gone; None never."""
        return None if self.expires_at is None else datetime.fromtimestamp(self.expires_at, timezone.utc)

    def to_json(self) -> bytes:
        """The token."""
        return _encode(self)

    @staticmethod
    def from_json(token: bytes | str) -> "Claim":
        """The claim of a token.

        Raises:
            InvalidClaimError: it is none, or of a version this release does not know.
        """
        if len(token) > MAX_TOKEN_BYTES:
            raise InvalidClaimError(f"a claim has less than {MAX_TOKEN_BYTES} bytes, not {len(token)}", part=None)
        try:
            return _decode(token)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise _not_a_claim(error) from error

    def to_dict(self) -> dict[str, Any]:
        """The token as JSON values, e.g. for a field of an event's data."""
        made: dict[str, Any] = msgspec.to_builtins(self)
        return made

    @staticmethod
    def from_dict(document: Mapping[str, Any]) -> "Claim":
        """The claim of `to_dict`.

        Raises:
            InvalidClaimError: as `from_json`.
        """
        try:
            return msgspec.convert(document, Claim)
        except (msgspec.ValidationError, RecursionError) as error:
            raise _not_a_claim(error) from error

    def to_attributes(self) -> dict[str, str]:
        """Extension attributes of a CloudEvent whose data is the payload; its media type is ``datacontenttype``."""
        # Text, also for numbers: integers of CloudEvents have 32 bits.
        found = {
            DATAREF: self.uri,
            _SIZE: None if self.size is None else str(self.size),
            _SHA256: self.sha256,
            _ENCODING_OF: self.encoding,
            _EXPIRES: None if self.expires_at is None else str(self.expires_at),
        }
        return {name: value for name, value in found.items() if value is not None}

    @staticmethod
    def from_attributes(ext: Mapping[str, Any] | None, media_type: str | None = None) -> "Claim | None":
        """The claim in the extension attributes of a CloudEvent; None if there is no ``dataref``.

        Raises:
            InvalidClaimError: ``dataref`` stands there, but with something that is no claim.
        """
        if ext is None or DATAREF not in ext:
            return None
        return Claim(
            uri=ext[DATAREF],
            size=_number(_SIZE, ext[_SIZE]) if _SIZE in ext else None,
            sha256=ext.get(_SHA256),
            media_type=media_type or BYTES,
            encoding=ext.get(_ENCODING_OF),
            expires_at=_number(_EXPIRES, ext[_EXPIRES]) if _EXPIRES in ext else None,
        )

    def to_sqs(self, *, legacy: bool = False) -> "SqsPointer":
        """As a message of the SQS Extended Client; see `djp_dagster.claim_check.sqs.to_sqs`.

        Raises:
            InvalidClaimError: its payload is not on S3, of unknown size, or compressed.
        """
        from djp_dagster.claim_check.sqs import to_sqs

        return to_sqs(self, legacy=legacy)

    @staticmethod
    def from_sqs(body: str, attributes: Mapping[str, Any] | None) -> "Claim | None":
        """The claim of a message of the SQS Extended Client; None if it is an ordinary message.

        Raises:
            InvalidClaimError: it says that it is a pointer, and is none.
        """
        from djp_dagster.claim_check.sqs import from_sqs

        return from_sqs(body, attributes)


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Claim).decode


def is_media_type(text: str) -> bool:
    """Whether a claim may say that of its payload."""
    return _is_text(_MEDIA_TYPE, text)


def _is_text(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _is_natural(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_expiry(value: Any) -> bool:
    return value is None or (_is_natural(value) and value <= _MAX_SECONDS)


def _number(name: str, value: object) -> int:
    text = str(value)
    _require(name, value, text.isascii() and text.isdigit() and len(text) < 20, "a number")
    return int(text)


def _require(part: str, value: object, allowed: bool, rule: str) -> None:
    if not allowed:
        shown = repr(value)
        raise InvalidClaimError(f"the {part} of a claim must be {rule}, not {shown[:120]}", part=part)


def _not_a_claim(error: Exception) -> InvalidClaimError:
    found = _FAULT.search(str(error))
    name = found and (found[1] or found[2])
    part = _PARTS.get(name, name) if name else None
    hint = "; this release reads version 1, a newer one may know it" if part == "version" else ""
    return InvalidClaimError(f"not a claim: {error}{hint}", part=part)
