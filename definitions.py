"""The shop: all nine patterns in one project. Read it top to bottom; ``make demo`` runs it with traffic.

A topic is a stream of events, split into partitions by a key. A consumer is a plain function: what to do with a batch
of them. What it emits, keeps in state, fails and returns becomes visible with the commit of its batch, once. A sensor
or a schedule says when a batch is cut. Every section adds a `Definitions` of its own, which the end merges.

Sensors and schedules are on from the start here; the library's are off until somebody turns them on.
"""

import os
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from urllib.parse import urlsplit

import dagster as dg
import pandas as pd

import djp_dagster as djp
from demo import access_logs
from demo.catalog import facts, renditions, thumbnails
from demo.mailers import compared
from demo.media import measure
from demo.outbox import Mail, deliver
from demo.prices import prices

on = dg.DefaultSensorStatus.RUNNING
running = dg.DefaultScheduleStatus.RUNNING
shop: list[dg.Definitions] = []  # each section adds its own


# 1. Streaming: react to each click, to each order.
#    A resident worker is milliseconds behind; a run for each micro-batch is seconds behind, and costs nothing between.

clicks = djp.Topic("clicks", partitions=4, key="user_id", retention="3d")  # a day is replayed after it is over
orders = djp.Topic("orders", partitions=4, key="user_id", retention="7d")
suggestions = djp.Topic("suggestions", partitions=4, key="user_id", retention="1d")
fraud_alerts = djp.Topic("fraud_alerts", key="user_id")


@djp.consumer(
    topic=clicks,
    emits=[suggestions],
    stateful=True,
    isolate="per_event",  # a click that fails becomes a dead letter, the others go on
    max_batch=djp.Threshold(events=5_000),
    max_poison=1_000,
)
def recommend(click: djp.Record, batch: djp.Batch) -> None:
    """Suggest what the user looked at before, and remember what they look at now."""
    user_id, product_id = click.data["user_id"], click.data["product_id"]
    seen = batch.state.get(user_id, {"views": 0, "clicks": [], "products": []})
    if click.id in seen["clicks"]:
        return  # the same click, published twice
    others = [product for product in seen["products"] if product != product_id]
    views = seen["views"] + 1
    batch.emit(suggestions.event(user_id=user_id, products=others[:3], click=click.id, views=views))
    batch.state.set(
        user_id, {"views": views, "clicks": [click.id, *seen["clicks"]][:30], "products": [product_id, *others][:5]}
    )


@djp.consumer(topic=orders, emits=[fraud_alerts], max_batch=djp.Threshold(events=500))
def fraud(batch: djp.Batch) -> None:
    """Raise an alert for an absurd amount, and for a user who places many of a batch's orders."""
    for user_id, placed in batch.by_key().items():
        for order in placed:
            amount = order.data.get("amount")
            if not isinstance(amount, int | float):
                batch.fail(order, "an order needs an amount")  # a dead letter, to be redriven once the cause is gone
            elif amount > 10_000:
                alert = fraud_alerts.event(user_id=user_id, order=order.id, reason=f"an amount of {amount}")
                batch.emit(alert, source=order)
        if len(placed) > 25:
            alert = fraud_alerts.event(user_id=user_id, order=placed[-1].id, reason=f"{len(placed)} orders at once")
            batch.emit(alert, source=placed[-1])


shop.append(
    dg.Definitions(
        assets=[
            *djp.build_topic_assets(recommend, fraud, group_name="streaming"),
            djp.build_stream_asset(recommend, group_name="streaming", owners=["team:recommendations"]),
            djp.build_stream_asset(fraud, group_name="streaming", owners=["team:payments"]),
        ],
        sensors=[
            djp.build_worker_sensor([recommend], name="recommend_worker", workers=2, default_status=on),
            djp.build_stream_sensor(fraud, default_status=on),
        ],
        asset_checks=[
            djp.build_stream_checks(recommend, max_lag_age="1min", worker=True, rebuilt=True),
            djp.build_stream_checks(fraud, max_lag_age="1min"),
        ],
    )
)


# 2. Batching: let orders pile up, then write them as one file. By the number, the size, the age; or by the clock.


@djp.consumer(topic=orders)
def order_files(batch: djp.Batch) -> pd.DataFrame:
    """The orders as Parquet files, one for each batch, without duplicates and without those that have no amount."""
    frame = batch.to_pandas()
    return frame.dropna(subset=["amount"]).drop_duplicates("event_id")


@dg.asset(
    group_name="batching",
    owners=["team:finance"],
    kinds={"python"},
    automation_condition=dg.AutomationCondition.eager(),
)
def revenue(order_files: djp.BatchOutputs[pd.DataFrame]) -> dg.MaterializeResult[float]:
    """The amount of the order files that are new since this was last materialized."""
    new = [output.load()["amount"].sum() for output in order_files.since(reader="revenue")]
    amount = round(float(sum(new)), 2)
    return dg.MaterializeResult(value=amount, metadata={"amount": amount, "files": len(new)})


shop.append(
    dg.Definitions(
        assets=[djp.build_stream_asset(order_files, group_name="batching", owners=["team:finance"]), revenue],
        sensors=[
            # In earnest, e.g., bytes="100MB", age="12h"
            djp.build_batch_sensor(order_files, threshold=djp.Threshold(events=2_000, age="2min"), default_status=on),
            dg.AutomationConditionSensorDefinition("revenue_automation", target="revenue", default_status=on),
        ],
        schedules=[djp.build_batch_schedule(order_files, cron_schedule="*/5 * * * *", default_status=running)],
        asset_checks=[djp.build_stream_checks(order_files, max_lag_age="5min")],
    )
)


# 3. Kappa: the clicks once more, by the day. A partition is the handler on what happened in that day; a backfill is the
#    replay. And when the rule of `recommend` changes, its state is rebuilt beside the live one, compared, and promoted.


@djp.consumer(topic=clicks)
def dashboard(batch: djp.Batch) -> pd.DataFrame:
    """How often each product was looked at."""
    views: dict[str, int] = {}
    for click in batch:
        if "product_id" in click.data:
            views[click.data["product_id"]] = views.get(click.data["product_id"], 0) + 1
    return pd.DataFrame(sorted(views.items()), columns=["product_id", "views"])


yesterday = datetime.now(timezone.utc) - timedelta(days=1)  # in earnest, a fixed date

daily_dashboard = djp.build_replay_asset(
    dashboard,
    partitions_def=dg.DailyPartitionsDefinition(f"{yesterday:%Y-%m-%d}", end_offset=1),  # until today
    group_name="kappa",
    owners=["team:recommendations"],
)

shop.append(
    dg.Definitions(
        assets=[daily_dashboard],
        schedules=[  # each day once it is over
            djp.build_replay_schedule(daily_dashboard, cron_schedule="* * * * *", default_status=running)
        ],
        sensors=[djp.build_replay_sensor(daily_dashboard, default_status=on)],  # and again if clicks of it come late
        jobs=[djp.build_rebuild_job(recommend)],
    )
)


# 4. DAG: what a seller submits goes three ways at once. Each product goes its own way, whatever others do.

submissions = djp.Topic("submissions", partitions=2, key="product_id", retention="1d")
product_facts = djp.Topic("product_facts", partitions=2, key="product_id", retention="1d")
product_videos = djp.Topic("product_videos", partitions=2, key="product_id", retention="1d")
product_images = djp.Topic("product_images", partitions=2, key="product_id", retention="1d")


@djp.consumer(topic=submissions, emits=[product_facts], isolate="per_event")
def extract_facts(submission: djp.Record, batch: djp.Batch) -> None:
    """What the text of a submission says."""
    batch.emit(product_facts.event(product_id=submission.data["product_id"], **facts(submission.data)))


@djp.consumer(topic=submissions, emits=[product_videos], isolate="per_event", max_poison=100)
def transcode_video(submission: djp.Record, batch: djp.Batch) -> None:
    """The video in the sizes that people's screens have."""
    product_id, video = submission.data["product_id"], submission.data["video"]
    batch.emit(product_videos.event(product_id=product_id, renditions=renditions(video)))


@djp.consumer(topic=submissions, emits=[product_images], isolate="per_event")
def resize_images(submission: djp.Record, batch: djp.Batch) -> None:
    """The images as thumbnails."""
    product_id, images = submission.data["product_id"], submission.data["images"]
    batch.emit(product_images.event(product_id=product_id, thumbnails=thumbnails(images)))


# 5. Event buffering: where the branches meet. A product is in the catalog when all three have come to an end.

products = djp.Topic("products", partitions=2, key="product_id")


@djp.join(
    inputs={"facts": product_facts, "video": product_videos, "images": product_images},
    key="product_id",
    deadline="1min",  # then the parts become dead letters, to be redriven together once all are there
    emits=[products],
)
def create_product(parts: djp.Joined) -> None:
    """The product's record, once all three are there."""
    parts.emit(
        products.event(
            **parts["facts"].data,
            renditions=parts["video"].data["renditions"],
            thumbnails=parts["images"].data["thumbnails"],
        )
    )


#    That is the whole DAG: validated here, drawn on the page of each of its consumers.
branches = (extract_facts, transcode_video, resize_images)
catalog = djp.EventDag([*branches, create_product], name="catalog")

shop.append(
    dg.Definitions(
        assets=[
            *djp.build_topic_assets(*branches, group_name="dag"),
            *djp.build_topic_assets(create_product, only=[products], group_name="event_buffering"),
            *djp.build_event_dag_assets(
                catalog,
                topics=False,
                group_name="dag",
                owners=["team:catalog"],
                per_consumer={"create_product": {"group_name": "event_buffering"}},
            ),
        ],
        sensors=[djp.build_worker_sensor([*catalog.consumers], name="catalog_worker", default_status=on)],
        asset_checks=[djp.build_stream_checks(create_product, max_lag_age="1min", worker=True)],
        jobs=[
            djp.build_trace_job(catalog, example="s2"),  # where a product is, and how long each step took
            djp.build_buffer_job(create_product),  # what waits for other parts
        ],
    )
)


# 6. Stateless worker: an order brings a user's id, the user service has the address: never out of date, never alone.


@djp.consumer(topic=orders)
def send_confirmations(batch: djp.Batch, users: djp.HttpLookup) -> None:
    """A confirmation for each order, into the outbox, to the address that the user service knows."""
    found = users.get_many(order.data["user_id"] for order in batch)  # each user once, a hundred in a call
    mails = [
        Mail(found[order.data["user_id"]]["email"], f"order {order.id}", "We have your order.")
        for order in batch
        if found.get(order.data["user_id"], {}).get("email")
    ]
    deliver(f"{batch.id}-confirmed", mails)
    batch.count("mails", len(mails))


user_service = os.environ.get("USER_SERVICE_URL", "http://127.0.0.1:8750")

shop.append(
    dg.Definitions(
        assets=[djp.build_stream_asset(send_confirmations, group_name="stateless_worker", owners=["team:mail"])],
        sensors=[djp.build_stream_sensor(send_confirmations, default_status=on)],
        asset_checks=[djp.build_stream_checks(send_confirmations, max_lag_age="1min")],
        resources={"users": djp.HttpLookup(base_url=user_service, path="/users/{key}", bulk_path="/users")},
    )
)


# 7. Claim check: images and videos of several megabytes go to the payload store, a folder or S3; the events carry a
#    claim, a token of a few hundred bytes. So do the values of assets: large ones in the store, small ones inline.

product_uploads = djp.Topic("product_uploads", partitions=2, retention="1h", offload_above="64KiB")
product_media = djp.Topic("product_media", partitions=2, key="product_id", retention="1d")


@djp.consumer(topic=product_uploads, emits=[product_media], isolate="per_event", max_poison=100)
def describe_media(upload: djp.Record, batch: djp.Batch) -> None:
    """Say of an uploaded image or video what it is; whoever wants to see it gets the claim, not the bytes."""
    with upload.open_data() as file:  # a stream, wherever the bytes are
        found = measure(file.read(256))
    batch.emit(
        product_media.event(
            product_id=upload.subject,
            upload=upload.id,
            media_type=upload.datacontenttype,
            claim=upload.claim,
            **{name: value for name, value in found._asdict().items() if value is not None},
        )
    )


@dg.asset(group_name="claim_check", owners=["team:finance"], kinds={"pandas"})
def price_history() -> pd.DataFrame:
    """The price of each product in each hour of the last year: 1.75 million rows, as a payload.

    Its data version is the hash of its content: the same prices again leave what is made of them fresh.
    """
    return pd.DataFrame(prices())


@dg.asset(group_name="claim_check", owners=["team:finance"], kinds={"pandas"})
def cheapest_hours(price_history: pd.DataFrame) -> pd.DataFrame:
    """The hour of the day at which each product is cheapest on average: small, so it lies beside its pointer."""
    hourly = price_history.groupby(["product_id", price_history["at"].dt.hour])["price"].mean()
    return hourly.groupby("product_id").idxmin().map(lambda found: found[1]).rename("hour").reset_index()


shop.append(
    dg.Definitions(
        assets=[
            *djp.build_topic_assets(describe_media, group_name="claim_check"),
            djp.build_stream_asset(describe_media, group_name="claim_check", owners=["team:catalog"]),
            price_history,
            cheapest_hours,
        ],
        sensors=[djp.build_stream_sensor(describe_media, default_status=on)],
        asset_checks=[djp.build_stream_checks(describe_media, max_lag_age="1min")],
        jobs=[djp.build_claim_gc_job()],  # a dry run unless told: payloads that nothing refers to any more
        resources={"io_manager": djp.ClaimCheckIOManager()},  # a folder under DAGSTER_HOME, or the bucket DJP_S3_BUCKET
    )
)


# 8. Stateful worker: the mailer needs addresses, and asks nobody for them. It has a table of its own, made of the
#    updates: a little behind, and there when the user service is not.

user_updates = djp.Topic("user_updates", partitions=4, key="user_id")  # kept: a table is made of it
user_emails = djp.Table("user_emails", topic=user_updates, value="email", sequence="version")


@djp.consumer(topic=orders, tables=[user_emails])
def send_receipts(batch: djp.Batch) -> None:
    """A receipt for each order, into the outbox, to the address that is known now."""
    emails = batch.table(user_emails)
    sound = [order for order in batch if order.data.get("amount") is not None]
    addresses = emails.get_many({order.data["user_id"] for order in sound})
    mails = [
        Mail(addresses[order.data["user_id"]], f"order {order.id}", f"You owe us {order.data['amount']}.")
        for order in sound
        if order.data["user_id"] in addresses
    ]
    deliver(batch.id, mails)  # under the batch's id, which is the same at every attempt: a mail is never there twice
    batch.count("mails", len(mails))
    batch.count("users_without_address", len(sound) - len(mails))
    batch.gauge("address_staleness_seconds", round(emails.staleness_s, 3))


@dg.asset(group_name="stateful_worker", owners=["team:mail"], kinds={"pandas"})
def users_by_provider(user_emails: pd.DataFrame) -> pd.DataFrame:
    """How many users have their mailbox where: a table is an input like any other, as it is at that moment."""
    return user_emails["value"].str.split("@").str[1].value_counts().rename_axis("provider").reset_index()


@dg.asset(
    group_name="stateful_worker", owners=["team:mail"], kinds={"python"}, deps=["send_receipts", "send_confirmations"]
)
def mailers(context: dg.AssetExecutionContext) -> dg.MaterializeResult[None]:
    """The two mailers side by side: how old their addresses are, what they cost, what fails with whom."""
    sources = {"send_receipts": "its own table", "send_confirmations": "the user service"}
    return dg.MaterializeResult(metadata={"compared": compared(context.instance, sources)})


shop.append(
    dg.Definitions(
        assets=[
            *djp.build_topic_assets(user_emails, group_name="stateful_worker"),
            djp.build_table_asset(user_emails, group_name="stateful_worker", owners=["team:mail"]),
            djp.build_stream_asset(send_receipts, group_name="stateful_worker", owners=["team:mail"]),
            users_by_provider,
            mailers,
        ],
        sensors=[
            djp.build_worker_sensor([user_emails], name="addresses_worker", default_status=on),
            djp.build_stream_sensor(send_receipts, default_status=on),
        ],
        asset_checks=[
            djp.build_stream_checks(user_emails, fresh_within="10s", worker=True),
            djp.build_stream_checks(send_receipts, max_lag_age="1min"),
        ],
    )
)


# 9. MapReduce: functions of a line, or of a record, whatever the number of files, processors or keys. Damaged lines are
#    kept aside. `DJP_LOGS` names logs of your own, such as /var/log/nginx/*.gz or s3://logs/**.

logs = djp.TextFiles(access_logs.pattern())
of_logs = {"group_name": "map_reduce", "owners": ["team:web"], "deps": ["web_logs"]}


@dg.asset(group_name="map_reduce", owners=["team:web"], kinds={"python"})
def web_logs() -> dg.MaterializeResult[None]:
    """The access logs of the last days, a compressed file for each; made up, unless DJP_LOGS names others."""
    return dg.MaterializeResult(metadata={"pattern": access_logs.pattern(), "lines a day": access_logs.make()})


@djp.map_reduce_asset(source=logs, combine=djp.Sum(), columns=("page", "views"), max_bad_fraction=0.01, asset=of_logs)
def page_views(line: str) -> Iterator[tuple[str, int]]:
    """How often each page was asked for."""
    yield access_logs.hit(line).page, 1


@djp.map_reduce_asset(
    source=logs, combine=djp.Count(), columns=("site", "visits"), max_bad_fraction=0.01, asset=of_logs
)
def referrers(line: str, task: djp.MapTask) -> Iterator[tuple[str, None]]:
    """Which other sites people come from; a counter says how many came from none."""
    site = urlsplit(access_logs.hit(line).referrer).hostname
    if site is None:
        task.count("from nowhere")
    else:
        yield site, None


def sessions(visitor: str, at: Iterator[float]) -> tuple[int, int]:
    """How often the visitor came, at least half an hour after the last time; and for how many pages."""
    count, hits, last = 0, 0, float("-inf")
    for moment in at:  # sorted, one by one: a visitor may have more than fit into memory
        count += moment - last > 1800
        hits, last = hits + 1, moment
    return count, hits


@djp.map_reduce_asset(
    source=logs,
    columns=("visitor", "sessions", "pages"),
    reduce=sessions,
    sort_values=True,
    max_bad_fraction=0.01,
    asset={**of_logs, "description": sessions.__doc__},
)
def visits(line: str) -> Iterator[tuple[str, float]]:
    """When each visitor asked for a page."""
    found = access_logs.hit(line)
    yield found.visitor, found.at


def total(product_id: str, placed: Iterator[tuple[str, float]]) -> float:
    """The amount of all orders; one that was published twice counts once."""
    return round(sum(dict(placed).values()), 2)


@djp.map_reduce_asset(
    source=djp.TopicRange(orders),  # the stream as it is now: nothing is consumed
    columns=("product_id", "amount"),
    reduce=total,
    max_bad_fraction=0.05,
    asset={"group_name": "map_reduce", "owners": ["team:finance"], "description": total.__doc__},
)
def sales(order: djp.Record) -> Iterator[tuple[str, tuple[str, float]]]:
    """An order's product, its id and its amount."""
    yield order.data["product_id"], (order.id, float(order.data["amount"]))


shop.append(dg.Definitions(assets=[web_logs, page_views, referrers, visits, sales]))


# All of it, and what everybody needs: publish an event by hand, send dead letters through their handler again, move a
# group to another position, and the checks.

everybody = (recommend, fraud, order_files, *catalog.consumers, send_confirmations, describe_media, send_receipts)
checks = [one for section in shop for one in section.asset_checks or () if isinstance(one, dg.AssetChecksDefinition)]

defs = dg.Definitions.merge(
    *shop,
    dg.Definitions(
        jobs=[
            djp.build_publish_job(
                *(orders, clicks, user_updates, submissions),
                example={"user_id": "user-1", "product_id": "p1", "quantity": 1, "amount": 50_000.0},  # raises an alert
            ),
            djp.build_redrive_job(*everybody, user_emails),
            djp.build_seek_job(*everybody, user_emails),
        ],
        sensors=[djp.build_check_sensor(*checks, minimum_interval_seconds=10, default_status=on)],
        resources={"event_stream": djp.SqlEventStream()},  # a SQLite file under DAGSTER_HOME, or DJP_STREAM_URL
        executor=dg.in_process_executor,
    ),
)
