"""Where payloads lie: stores by their URL."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from djp_dagster.claim_check.local import LocalObjects
from djp_dagster.claim_check.stores import PayloadStore
from djp_dagster.errors import InvalidSettingError

if TYPE_CHECKING:
    from djp_dagster.claim_check.objects import ObjectStore


def open_payload_store(target: str | Path, *, room: str | None = None, **settings: Any) -> PayloadStore:
    """Open a payload store: a folder, or a bucket on S3.

    Nothing is made or asked before the first use.

    Args:
        target: a folder, ``file:///folder``, or ``s3://bucket/prefix``.
        room: who keeps references to what is stored through this; garbage collection needs to know.
        **settings: of `PayloadStore`, such as ``max_read_bytes``; for S3 also of `S3Settings`, such as
            ``endpoint_url``.

    Raises:
        InvalidSettingError: the URL is of another kind.
    """
    objects, rest = _objects(str(target), settings)
    return PayloadStore(objects, room=room, **rest)


def bucket_of_environment() -> PayloadStore | None:
    """The store that ``$DJP_S3_BUCKET`` and ``$DJP_S3_PREFIX`` name; None if they name none."""
    bucket = os.environ.get("DJP_S3_BUCKET")
    return open_payload_store(f"s3://{bucket}/{os.environ.get('DJP_S3_PREFIX', '')}") if bucket else None


def _objects(target: str, settings: dict[str, Any]) -> "tuple[ObjectStore, dict[str, Any]]":
    scheme = target.partition("://")[0] if "://" in target else ""
    if scheme == "":
        return LocalObjects(target), settings
    parts = urlsplit(target)
    if parts.query or parts.fragment:
        raise InvalidSettingError(
            f"payload store {target.partition('?')[0]!r} must be named without a query or a fragment; give settings as "
            "arguments",
            setting="target",
            value=None,
        )
    if scheme == "file" and not parts.netloc:
        return LocalObjects(unquote(parts.path)), settings
    if scheme == "s3" and parts.netloc:
        from djp_dagster.claim_check.s3 import open_bucket

        return open_bucket(parts.netloc, parts.path.strip("/"), settings)
    raise InvalidSettingError(
        f"payload store {target!r} must be a folder, file:///folder, or s3://bucket/prefix",
        setting="target",
        value=target,
    )
