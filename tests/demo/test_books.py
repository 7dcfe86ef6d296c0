"""The books balance when everything was handled once, and say so when it was not."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import djp_dagster as djp
from definitions import (
    create_product,
    describe_media,
    fraud,
    fraud_alerts,
    order_files,
    orders,
    product_media,
    product_uploads,
    products,
    submissions,
    suggestions,
)
from demo.books import CONSUMERS, Books
from demo.media import medium
from demo.show import Show
from demo.traffic import Publisher, Settings, Traffic

TRAFFIC = Traffic(Settings(rate=800, duplicates=0.05, poison=0.02))


@pytest.fixture
def stream(tmp_path: Path) -> Iterator[djp.EventStream]:
    with djp.open_stream(tmp_path / "stream.db") as stream:
        yield stream


class Users(djp.LookupResource):
    """Everybody has an address."""

    def fetch_many(self, keys: Sequence[Any]) -> dict[Any, Any]:
        return {key: {"id": key, "email": f"{key}@example.com"} for key in keys}


def publish(stream: djp.EventStream, chunks: int) -> None:
    publisher = Publisher(stream, TRAFFIC)
    for _ in range(chunks):
        publisher.publish_next()


def handle(stream: djp.EventStream, tmp_path: Path, *consumers: djp.Consumer) -> None:
    for consumer in consumers or CONSUMERS:
        resources = {"users": Users()} if consumer.resource_names else {}
        djp.run_pending(stream, consumer, resources=resources, state_folder=tmp_path / "state")


def test_they_balance(stream: djp.EventStream, tmp_path: Path) -> None:
    books = Books(stream)
    publish(stream, 10)
    handle(stream, tmp_path)
    assert books.check() == []
    accounts = books.accounts()
    assert books.published() == 2005
    assert accounts["recommend"].handled > accounts["fraud"].handled > 0
    assert accounts["recommend"].dead_letters > 0
    assert accounts["fraud"].dead_letters > 0
    assert accounts["fraud"].handled + accounts["fraud"].dead_letters == accounts["order_files"].handled
    assert accounts["order_files"].made == "1 files"
    assert books.pending() == {}


def test_they_balance_from_any_point_on(stream: djp.EventStream, tmp_path: Path) -> None:
    Books(stream)
    publish(stream, 5)
    handle(stream, tmp_path)
    publish(stream, 3)
    books = Books(stream)
    publish(stream, 4)
    handle(stream, tmp_path)
    assert books.check() == []


def test_what_is_not_handled_is_named(stream: djp.EventStream, tmp_path: Path) -> None:
    books = Books(stream)
    publish(stream, 3)
    handle(stream, tmp_path, *(consumer for consumer in CONSUMERS if consumer is not fraud))
    events = sum(span.end for span in stream.log.spans(["orders"]).values())
    assert books.pending() == {"fraud": events}
    assert books.check() == [f"fraud has not handled {events} events"]
    handle(stream, tmp_path, fraud)
    assert books.check() == []


@pytest.mark.parametrize("topic", [suggestions, fraud_alerts], ids=lambda topic: topic.name)
def test_what_is_committed_twice_is_named(stream: djp.EventStream, tmp_path: Path, topic: djp.Topic) -> None:
    books = Books(stream)
    stream.publish(orders, [orders.event(user_id="eve", amount=99_999, product_id="p1", quantity=1)])
    publish(stream, 2)
    handle(stream, tmp_path)
    (first, *_) = (record for part in range(topic.partitions) for record in stream.records(topic, part))
    stream.publish(topic, [first.event()])
    assert any(f"{first.id} was committed 2 times" in problem for problem in books.check())


def test_a_lost_suggestion_is_named(stream: djp.EventStream, tmp_path: Path) -> None:
    books = Books(stream)
    publish(stream, 2)
    handle(stream, tmp_path, fraud, order_files)
    stream.seek("recommend", "latest", reset_state=True)
    assert any("click without a suggestion" in problem for problem in books.check())


def test_a_lost_file_and_a_lost_alert_are_named(stream: djp.EventStream, tmp_path: Path) -> None:
    books = Books(stream)
    stream.publish(orders, [orders.event(user_id="eve", amount=99_999, product_id="p1", quantity=1)])
    stream.publish(orders, [orders.event(user_id="eve", amount=None)])
    stream.seek("order_files", "latest")
    stream.seek("fraud", "latest")
    problems = books.check()
    assert any("order in no file" in problem for problem in problems)
    assert any("absurd order without an alert" in problem for problem in problems)
    assert any("malformed order that is no dead letter" in problem for problem in problems)


def test_a_record_in_two_files_is_named(stream: djp.EventStream, tmp_path: Path) -> None:
    books = Books(stream)
    publish(stream, 1)
    handle(stream, tmp_path)
    stream.seek("order_files", "earliest")
    handle(stream, tmp_path, order_files)
    assert any("is in 2 files" in problem for problem in books.check())


def test_the_summary_is_one_line_without_a_terminal(
    stream: djp.EventStream, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    books = Books(stream)
    publish(stream, 2)
    handle(stream, tmp_path, fraud)
    with Show(books) as show:
        show.refresh()
        show.refresh()
    (line,) = capsys.readouterr().out.splitlines()
    assert "published 401 " in line
    assert "recommend: 0 handled" in line


def test_uploads_balance(stream: djp.EventStream, tmp_path: Path) -> None:
    books = Books(stream)
    publish(stream, 36)
    handle(stream, tmp_path)
    assert books.check() == []
    account = books.accounts()["describe_media"]
    assert account.handled + account.dead_letters == 3
    uploads = [record for part in range(2) for record in stream.records(product_uploads, part)]
    assert all(upload.claim is not None and upload.claim.size > 64 << 10 for upload in uploads)
    assert sum(span.end for span in stream.log.spans(["product_media"]).values()) == account.handled


def test_an_upload_that_is_no_medium_is_a_dead_letter_and_a_lost_payload_is_named(
    stream: djp.EventStream, tmp_path: Path
) -> None:
    books = Books(stream)
    content = medium(0, 1).content
    for number, data in enumerate((content, b"no image" * 20_000)):
        upload = djp.Event(type="product_uploads", source="/s", id=str(number), subject="p1", data=data)
        stream.publish(product_uploads, [upload.replace(ext={"partitionkey": "p1"})])
    handle(stream, tmp_path, describe_media)
    (letter,) = stream.dead_letters("describe_media")
    assert "neither a PNG image nor an MP4 video" in letter.error
    handle(stream, tmp_path)
    assert books.check() == []
    (found,) = (record for part in range(2) for record in stream.records(product_media, part))
    claim = djp.Claim.from_dict(found.data["claim"])
    assert stream.payloads.read(claim) == content
    stream.payloads.objects.delete([stream.payloads.resolve(claim).key])
    assert any("payload that is lost or damaged" in problem for problem in books.check())


def submitted(product_id: str, *, video: str = "mp4") -> djp.Event:
    data = {"product_id": product_id, "seller": "s", "title": "red lamp", "price": 9, "images": ["a.png"]}
    return submissions.event(data, video={"format": video, "height": 480})


def test_a_product_whose_video_nobody_can_play_waits_and_is_no_problem(stream: djp.EventStream, tmp_path: Path) -> None:
    books = Books(stream)
    stream.publish(submissions, [submitted("p1"), submitted("p2", video="vhs"), submitted("p3")])
    handle(stream, tmp_path)
    assert books.check() == []
    assert books.accounts()["create_product"].made == "2 products"
    assert [letter.error for letter in stream.dead_letters("transcode_video")] == [
        "a video of format 'vhs', which nobody can play"
    ]


def test_a_product_that_is_lost_and_one_that_is_created_twice_are_named(
    stream: djp.EventStream, tmp_path: Path
) -> None:
    books = Books(stream)
    stream.publish(submissions, [submitted("p1")])
    handle(stream, tmp_path, *(consumer for consumer in CONSUMERS if consumer is not create_product))
    stream.seek("create_product", "latest", reset_state=True)
    assert any("submission without a product, e.g. p1" in problem for problem in books.check())
    stream.publish(products, [products.event(product_id="p1"), products.event(product_id="p1")])
    assert any("product p1 was created 2 times" in problem for problem in books.check())
