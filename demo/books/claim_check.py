"""Claim check: a description of each upload, once; and the payload it speaks of is there, and unchanged."""

from definitions import describe_media, product_media, product_uploads
from demo.books.period import Period, difference, repeated
from djp_dagster import Claim
from djp_dagster.errors import PayloadError


def check(period: Period) -> list[str]:
    """What is wrong."""
    made = period.made(product_media)
    wanted = {upload.id for upload in period.sound(describe_media, product_uploads)}
    described = {medium.data["upload"] for medium in made}
    lost = set()
    for token in {medium.data["claim"]["uri"]: medium.data["claim"] for medium in made}.values():
        try:
            period.stream.payloads.verify(Claim.from_dict(token))
        except PayloadError:
            lost.add(token["uri"])
    return (
        repeated("description", made)
        + difference("upload without a description", wanted - described)
        + difference("payload that is lost or damaged", lost)
    )
