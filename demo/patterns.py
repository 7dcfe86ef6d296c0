"""`PATTERNS`: the nine of the shop in the README's order: who works for each, and what to click to see it."""

from typing import NamedTuple

from definitions import (
    create_product,
    describe_media,
    extract_facts,
    fraud,
    order_files,
    recommend,
    resize_images,
    send_confirmations,
    send_receipts,
    transcode_video,
    user_emails,
)
from djp_dagster import Consumer


class Pattern(NamedTuple):
    """One of the nine.

    Attributes:
        name: as in the README.
        path: of the page of the user interface to begin with.
        click: what to do there, and what is seen then; ``{url}`` stands for the user interface.
        consumers: whose events are counted for it; none if it consumes nothing and works when told.
    """

    name: str
    path: str
    click: str
    consumers: tuple[Consumer, ...] = ()


STREAMING, BATCHING, KAPPA, DAG, EVENT_BUFFERING, STATELESS_WORKER, CLAIM_CHECK, STATEFUL_WORKER, MAP_REDUCE = (
    "Streaming",
    "Batching",
    "Kappa",
    "DAG",
    "Event buffering",
    "Stateless worker",
    "Claim check",
    "Stateful worker",
    "MapReduce",
)

PATTERNS = (
    Pattern(
        STREAMING,
        "/assets/fraud",
        "Plots of each run. A check is red: orders without an amount are dead letters.\n"
        "{url}/assets/recommend: workers. Terminate one at {url}/runs; another takes its place.",
        (recommend, fraud),
    ),
    Pattern(
        BATCHING,
        "/assets/order_files",
        "A file per 2,000 orders, or per 2 minutes; Materialize handles what has piled up at once.\n"
        "{url}/automation switches any sensor off and on: the lag below grows, and is gone.",
        (order_files,),
    ),
    Pattern(
        KAPPA,
        "/assets/dashboard_replay",
        "Materialize today's partition: it replays the clicks of the day.\n"
        "{url}/locations/shop/jobs/rebuild_job rebuilds recommend's state beside the live one.",
    ),
    Pattern(
        DAG,
        "/locations/shop/jobs/trace_job/playground",
        "Launch it for product s2, s4, ...: how far it has come on each branch, and when.\n"
        "{url}/assets/transcode_video draws the DAG; one video in twenty cannot be played.",
        (extract_facts, transcode_video, resize_images),
    ),
    Pattern(
        EVENT_BUFFERING,
        "/assets/create_product",
        "A product when all three parts are there; pending, completed, expired.\n"
        "{url}/locations/shop/jobs/buffer_job/playground lists what waits.",
        (create_product,),
    ),
    Pattern(
        STATELESS_WORKER,
        "/assets/send_confirmations",
        "Mails to addresses that a service is asked for: calls, retries and failures of each run.",
        (send_confirmations,),
    ),
    Pattern(
        CLAIM_CHECK,
        "/assets/price_history",
        "Materialize it: 1.75 million rows go to the payload store. Again: the same data version.\n"
        "{url}/assets/describe_media: uploads of megabytes, of which the events carry a claim.",
        (describe_media,),
    ),
    Pattern(
        STATEFUL_WORKER,
        "/assets/user_emails",
        "A table of addresses, built from the stream; send_receipts asks it, and nobody else.\n"
        "{url}/assets/mailers: Materialize it to compare both mailers.",
        (user_emails, send_receipts),
    ),
    Pattern(
        MAP_REDUCE,
        "/assets/page_views",
        "Materialize web_logs, then this: pages counted, damaged lines kept aside.\n"
        "{url}/assets/sales adds up the orders that are in the stream.",
    ),
)

CONSUMERS = tuple(consumer for pattern in PATTERNS for consumer in pattern.consumers)


def tour(url: str) -> str:
    """What to click, by pattern."""
    lines = [
        f"  {url}/asset-groups",
        "     All of it: topics, the consumers between them, what is downstream; a group for each pattern.",
        f"  {url}/locations/shop/jobs/publish_job/playground",
        "     Publish an order by hand; one with an amount of 50000 makes fraud raise an alert.",
    ]
    for number, pattern in enumerate(PATTERNS, 1):
        lines.append(f"  {number}. {pattern.name}: {url}{pattern.path}")
        lines.extend(f"     {line}" for line in pattern.click.format(url=url).splitlines())
    return "\n".join(lines)
