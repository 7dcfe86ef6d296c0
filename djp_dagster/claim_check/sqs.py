"""Claims as pointers of the SQS Extended Client, in messages of SQS and SNS; boto3 is not needed for it.

A message whose payload lies on S3 has the body ``["<class>", {"s3BucketName": "...", "s3Key": "..."}]``, and says so by
a message attribute with the payload's size. Readers take both names of the class and of the attribute, in any mixture:

=======  ================================================================  =======================
         class                                                             attribute
=======  ================================================================  =======================
current  ``software.amazon.payloadoffloading.PayloadS3Pointer``            ``ExtendedPayloadSize``
legacy   ``com.amazon.sqs.javamessaging.MessageS3Pointer``                 ``SQSLargePayloadSize``
=======  ================================================================  =======================

The class is a word to compare, nothing to load. Without the attribute a message is an ordinary one, whatever its body
looks like. What is sent from here has one more attribute, ``DjpClaim``: the claim's token, so that a reader of this
package gets the hash to verify, the media type and the expiry; other clients pass over it. A pointer of another client
tells the size alone. A message has 10 attributes at most, which leaves 8.

The official clients read a payload as UTF-8 text, and as it is stored: compressed ones are refused here.

Sources of the format: awslabs/payload-offloading-java-common-lib, ``PayloadS3Pointer.java``;
awslabs/amazon-sqs-java-extended-client-lib, ``AmazonSQSExtendedClientUtil.java``; amazon-sqs-extended-client 1.0.1.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from djp_dagster.claim_check.claims import Claim
from djp_dagster.errors import InvalidClaimError

CLASS = "software.amazon.payloadoffloading.PayloadS3Pointer"
LEGACY_CLASS = "com.amazon.sqs.javamessaging.MessageS3Pointer"
SIZE_ATTRIBUTE, LEGACY_SIZE_ATTRIBUTE = "ExtendedPayloadSize", "SQSLargePayloadSize"
_SIZE_ATTRIBUTES = (SIZE_ATTRIBUTE, LEGACY_SIZE_ATTRIBUTE)
CLAIM_ATTRIBUTE = "DjpClaim"
"""The message attribute of our own: the claim's token."""

_MAX_POINTER = 16 << 10  # a key of 1 KiB with every character escaped, and room
_SPELLINGS = ("StringValue", "stringValue", "Value")  # of boto3, Lambda and SNS
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{2,254}")
_S3 = "s3://"
_BUCKET_MARKER, _KEY_MARKER = "-..s3BucketName..-", "-..s3Key..-"
_HANDLE = re.compile(
    "{0}(?P<bucket>.*?){0}{1}(?P<key>.*?){1}(?P<original>.+)".format(re.escape(_BUCKET_MARKER), re.escape(_KEY_MARKER)),
    re.DOTALL,
)


class _Place(msgspec.Struct, frozen=True):
    s3BucketName: str  # noqa: N815
    s3Key: str  # noqa: N815


_decode = msgspec.json.Decoder(tuple[str, _Place]).decode


class SqsPointer(NamedTuple):
    """A message in a payload's place: ``MessageBody``, and what belongs into ``MessageAttributes`` beside your own."""

    body: str
    attributes: dict[str, dict[str, str]]


def to_sqs(claim: Claim, *, legacy: bool = False) -> SqsPointer:
    """The message that stands for the claim's payload; new dictionaries each time.

    Args:
        claim: of a payload on S3, of known size, stored as it is.
        legacy: use the legacy names, for receivers that know no others.

    Raises:
        InvalidClaimError: the claim is another one; ``facts["part"]`` says in which way.

    Example:
        >>> claim = Claim(uri="s3://claims/sha256/ab/cd", size=300_000)
        >>> to_sqs(claim).body
        '["software.amazon.payloadoffloading.PayloadS3Pointer", {"s3BucketName": "claims", "s3Key": "sha256/ab/cd"}]'
        >>> from_sqs(*to_sqs(claim)) == claim
        True
    """
    bucket, _, key = claim.uri.removeprefix(_S3).partition("/")
    if not claim.uri.startswith(_S3) or not _BUCKET.fullmatch(bucket) or not key:
        raise InvalidClaimError(
            f"an SQS pointer names a bucket and a key, and claim {claim.uri[:200]!r} names no s3://bucket/key; send "
            "claims of a payload store on S3",
            part="uri",
        )
    if claim.encoding is not None:
        raise InvalidClaimError(
            f"the payload of claim {claim.uri[:200]!r} is stored as {claim.encoding!r}, which the SQS Extended Client "
            "cannot read; store it with put(..., compress=False)",
            part="encoding",
        )
    if claim.size is None:
        raise InvalidClaimError(
            f"an SQS pointer says how large the payload is, and claim {claim.uri[:200]!r} does not; ask the store: "
            "store.info(claim).bytes",
            part="size",
        )
    # With json, not msgspec: letter by letter as the official Python client writes it.
    body = json.dumps([LEGACY_CLASS if legacy else CLASS, {"s3BucketName": bucket, "s3Key": key}])
    attributes = {
        LEGACY_SIZE_ATTRIBUTE if legacy else SIZE_ATTRIBUTE: {"DataType": "Number", "StringValue": str(claim.size)},
        CLAIM_ATTRIBUTE: {"DataType": "String", "StringValue": claim.to_json().decode()},
    }
    return SqsPointer(body, attributes)


def from_sqs(body: str, attributes: Mapping[str, Any] | None) -> Claim | None:
    """The claim of a message; None if it is an ordinary one, whose body is its payload.

    Nothing is asked or read: whether the claim may be followed is up to the payload store that resolves it. Receive
    with ``MessageAttributeNames=["All"]``: SQS gives out no attribute that was not asked for, and without it a pointer
    cannot be told from text.

    Args:
        body: of the message.
        attributes: its message attributes as boto3, an event of Lambda, or an envelope of SNS has them; they are not
            changed.

    Raises:
        InvalidClaimError: the message says that it is a pointer, and is none, or contradicts itself.
    """
    given = attributes or {}
    sizes = {_size(name, _text_of(name, given[name])) for name in _SIZE_ATTRIBUTES if name in given}
    if not sizes:
        return None
    if len(sizes) > 1:
        raise InvalidClaimError(f"an SQS message says two sizes of its payload: {sorted(sizes)}", part="size")
    claim = _claim_at(_place_in(body), sizes.pop())
    if CLAIM_ATTRIBUTE not in given:
        return claim
    ours = Claim.from_json(_text_of(CLAIM_ATTRIBUTE, given[CLAIM_ATTRIBUTE]))
    if (ours.uri, ours.size, ours.encoding) != (claim.uri, claim.size, None):
        raise InvalidClaimError(
            f"attribute {CLAIM_ATTRIBUTE!r} of an SQS message is the claim of {ours.uri[:200]!r} ({ours.size} bytes, "
            f"encoding {ours.encoding}), its body points to {claim.uri[:200]!r} ({claim.size} bytes)",
            part=CLAIM_ATTRIBUTE,
        )
    return ours


class SplitHandle(NamedTuple):
    """A receipt handle, taken apart: the claim it names, if any, and the handle that SQS knows."""

    claim: Claim | None
    original: str


def split_receipt_handle(handle: str) -> SplitHandle:
    """Take apart a receipt handle that an official client gave out: it puts bucket and key before the handle of SQS.

    A message is deleted, or its visibility changed, by the original handle. The claim is for those who look: it has no
    hash, and whoever could send the message chose what it names, so nothing must be deleted for it.

    Raises:
        InvalidClaimError: the handle begins as one with bucket and key does, and is none.

    Example:
        >>> handle = "-..s3BucketName..-claims-..s3BucketName..--..s3Key..-a/b-..s3Key..-AQEB-cd-ef"
        >>> split_receipt_handle(handle).original
        'AQEB-cd-ef'
        >>> split_receipt_handle("AQEB-cd-ef")
        SplitHandle(claim=None, original='AQEB-cd-ef')
    """
    if not handle.startswith(_BUCKET_MARKER):
        return SplitHandle(None, handle)
    found = _HANDLE.fullmatch(handle)
    if found is None:
        raise InvalidClaimError(
            f"a receipt handle begins with {_BUCKET_MARKER!r}, and has no bucket, key and handle between such marks: "
            f"{handle[:200]!r}",
            part="receipt handle",
        )
    return SplitHandle(_claim_at(_Place(found["bucket"], found["key"]), None), found["original"])


def _place_in(body: object) -> _Place:
    shown = repr(body[:200] if isinstance(body, str) else body)[:220]
    if not isinstance(body, str) or len(body) > _MAX_POINTER:
        raise InvalidClaimError(f"the body of an SQS pointer is a text below 16 KiB, not {shown}", part="body")
    try:
        kind, place = _decode(body)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise InvalidClaimError(
            f'the body of an SQS pointer is ["class", {{"s3BucketName": "...", "s3Key": "..."}}], not {shown}: {error}',
            part="body",
        ) from error
    if kind not in (CLASS, LEGACY_CLASS):
        raise InvalidClaimError(
            f"the class in an SQS pointer is {CLASS!r} or {LEGACY_CLASS!r}, not {kind[:120]!r}", part="class"
        )
    return place


def _claim_at(place: _Place, size: int | None) -> Claim:
    # A slash in it would move the border between bucket and key.
    if not _BUCKET.fullmatch(place.s3BucketName):
        raise InvalidClaimError(
            f"the bucket of an SQS pointer is 3 to 255 of A-Z a-z 0-9 . _ -, not {place.s3BucketName[:120]!r}",
            part="bucket",
        )
    if not place.s3Key:
        raise InvalidClaimError("the key of an SQS pointer is empty", part="key")
    return Claim(uri=f"{_S3}{place.s3BucketName}/{place.s3Key}", size=size)


def _text_of(name: str, attribute: object) -> str:
    if isinstance(attribute, Mapping):
        for spelling in _SPELLINGS:
            if isinstance(text := attribute.get(spelling), str):
                return text
    raise InvalidClaimError(
        f"attribute {name!r} of an SQS message must have a StringValue: {repr(attribute)[:120]}",
        part=name,
    )


def _size(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise InvalidClaimError(f"attribute {name!r} of an SQS message must be a number, not {text[:40]!r}", part=name)
    return int(text)
