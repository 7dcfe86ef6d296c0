"""Event buffering: each submission is a product, once; or a part of it failed, so that the others wait, then expire."""

import tempfile
from collections import Counter
from pathlib import Path

from definitions import create_product, products, submissions
from demo.books.dag import BRANCHES
from demo.books.period import Period, difference, repeated
from djp_dagster.joining.inspection import EventBuffer


def check(period: Period) -> list[str]:
    """What is wrong."""
    made = period.made(products)
    counts = Counter(product.data["product_id"] for product in made)
    submitted: set[str] = set()
    incomplete: set[str] = set()
    for branch in BRANCHES:
        for one in period.handled(branch, submissions):
            submitted.add(one.data["product_id"])
            if period.has_failed(branch, one):
                incomplete.add(one.data["product_id"])
    with (
        tempfile.TemporaryDirectory() as folder,
        EventBuffer(period.stream, create_product.group, folder=Path(folder)) as buffer,
    ):
        known = {str(one.key): one.status for one in buffer}
    expired = {product for product, status in known.items() if status in ("expired", "failed")}
    return (
        repeated("product", made)
        + [f"product {product} was created {n} times" for product, n in counts.items() if n > 1][:5]
        + difference("submission without a product", submitted - incomplete - set(counts) - expired)
        + difference("product of which a part failed", incomplete & set(counts))
        + difference("submission that the buffer knows nothing of", incomplete - set(known))
    )
