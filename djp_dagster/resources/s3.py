"""`S3PayloadStore`: payloads in a bucket, reached through dagster-aws' `S3Resource`."""

from typing import Any

from dagster_aws.s3 import S3Resource
from pydantic import Field

from djp_dagster.claim_check.location import open_payload_store
from djp_dagster.claim_check.stores import PayloadStore
from djp_dagster.errors import InvalidSettingError
from djp_dagster.resources.payload_stores import PayloadStoreResource
from djp_dagster.units import parse_bytes


class S3PayloadStore(PayloadStoreResource):
    """Payloads in an S3 bucket, or below a prefix of one. The bucket must exist.

    Of ``s3`` the settings are used: endpoint, region, profile, credentials. The client is this package's own, because
    `S3Resource` has no settings for addressing, checksums, parts and connections.

    Example:
        >>> S3PayloadStore(bucket="claims", prefix="shop").open().uri
        's3://claims/shop'
    """

    bucket: str = Field(description="The bucket, which must exist.")
    prefix: str = Field(default="", description="Everything lies below this.")
    # Not S3Resource(): Dagster drops such a default of a nested resource.
    s3: S3Resource | None = Field(
        default=None, description="Endpoint, region, profile and credentials; what boto3 finds unless given."
    )
    addressing: str = Field(
        default="auto",
        description="Where the bucket's name goes: 'auto', 'virtual', or 'path' for most servers other than AWS.",
    )
    checksums: str = Field(
        default="when_supported", description="'when_required' for servers that refuse what boto3 sends by default."
    )
    encryption: str | None = Field(
        default=None, description="Of new objects: 'AES256' or 'aws:kms'; the bucket's default unless given."
    )
    kms_key_id: str | None = Field(default=None, description="With encryption='aws:kms', which key.")
    bucket_key: bool = Field(default=False, description="With encryption='aws:kms', ask KMS once for many objects.")
    tags: dict[str, str] = Field(default={}, description="On every object, e.g. for lifecycle rules; at most 8.")
    part_bytes: str = Field(default="8MiB", description="Large payloads are sent and fetched in parts of this size.")
    threads: int = Field(default=4, description="Parts under way at once; memory is bounded by part_bytes times this.")
    spool_folder: str | None = Field(
        default=None, description="Where temporary files go; wherever the system has them unless given."
    )

    def _open(self) -> PayloadStore:
        names = ("addressing", "checksums", "encryption", "kms_key_id", "bucket_key", "tags", "threads", "spool_folder")
        return open_payload_store(
            f"s3://{self.bucket}/{self.prefix}",
            **_reach(self.s3),
            **{name: getattr(self, name) for name in names},
            part_bytes=parse_bytes(self.part_bytes, name="part_bytes"),
            **self._limits(),
        )


def _reach(s3: S3Resource | None) -> dict[str, Any]:
    """The settings of an `S3Resource`, as `S3Settings` calls them."""
    if s3 is None:
        return {}
    if type(s3).get_client is not S3Resource.get_client:
        raise InvalidSettingError(
            f"S3PayloadStore uses the settings of an S3Resource, not the client that {type(s3).__name__} makes; give "
            "an S3Resource with these settings",
            setting="s3",
            value=type(s3).__name__,
        )
    return {
        "endpoint_url": s3.endpoint_url,
        "region": s3.region_name,
        "profile": s3.profile_name,
        "access_key_id": s3.aws_access_key_id,
        "secret_access_key": s3.aws_secret_access_key,
        "session_token": s3.aws_session_token,
        "unsigned": s3.use_unsigned_session,
        "use_ssl": s3.use_ssl,
        "verify": s3.verify,
        "max_attempts": s3.max_attempts,
    }
