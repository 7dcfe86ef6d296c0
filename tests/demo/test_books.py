"""The books balance when everything was handled once, and say so when it was not."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import djp_dagster as djp
from definitions import (
    create_product,
    describe_media,
    everybody,
    extract_facts,
    fraud,
    fraud_alerts,
    order_files,
    orders,
    product_media,
    product_uploads,
    products,
    resize_images,
    send_confirmations,
    send_receipts,
    submissions,
    suggestions,
    user_emails,
    user_updates,
)
from demo.books import Books
from demo.figures import Figures
from demo.media import medium
from demo.outbox import KEPT, Mail, deliver, files, folder, kind_of, mails_of
from demo.patterns import CONSUMERS
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
    books = Books(stream, folder())
    publish(stream, 10)
    handle(stream, tmp_path)
    assert books.check() == []
    accounts = Figures(stream, folder()).accounts()
    assert books.published() == 2005
    assert accounts["recommend"].handled > accounts["fraud"].handled > 0
    assert accounts["recommend"].dead_letters > 0
    assert accounts["fraud"].dead_letters > 0
    assert accounts["fraud"].handled + accounts["fraud"].dead_letters == accounts["order_files"].handled
    assert len(stream.outputs("order_files")) == 1
    assert books.pending() == {}


def test_they_balance_from_any_point_on(stream: djp.EventStream, tmp_path: Path) -> None:
    Books(stream, folder())
    publish(stream, 5)
    handle(stream, tmp_path)
    publish(stream, 3)
    books = Books(stream, folder())
    publish(stream, 4)
    handle(stream, tmp_path)
    assert books.check() == []


def test_what_is_not_handled_is_named(stream: djp.EventStream, tmp_path: Path) -> None:
    books = Books(stream, folder())
    publish(stream, 3)
    handle(stream, tmp_path, *(consumer for consumer in CONSUMERS if consumer is not fraud))
    events = sum(span.end for span in stream.log.spans(["orders"]).values())
    assert books.pending() == {"fraud": events}
    assert books.check() == [f"fraud has not handled {events} events"]
    handle(stream, tmp_path, fraud)
    assert books.check() == []


@pytest.mark.parametrize("topic", [suggestions, fraud_alerts], ids=lambda topic: topic.name)
def test_what_is_committed_twice_is_named(stream: djp.EventStream, tmp_path: Path, topic: djp.Topic) -> None:
    books = Books(stream, folder())
    stream.publish(orders, [orders.event(user_id="eve", amount=99_999, product_id="p1", quantity=1)])
    publish(stream, 2)
    handle(stream, tmp_path)
    (first, *_) = (record for part in range(topic.partitions) for record in stream.records(topic, part))
    stream.publish(topic, [first.event()])
    assert any(f"{first.id} was committed 2 times" in problem for problem in books.check())


def test_a_lost_suggestion_is_named(stream: djp.EventStream, tmp_path: Path) -> None:
    books = Books(stream, folder())
    publish(stream, 2)
    handle(stream, tmp_path, fraud, order_files)
    stream.seek("recommend", "latest", reset_state=True)
    assert any("click without a suggestion" in problem for problem in books.check())


def test_a_lost_file_and_a_lost_alert_are_named(stream: djp.EventStream, tmp_path: Path) -> None:
    books = Books(stream, folder())
    stream.publish(orders, [orders.event(user_id="eve", amount=99_999, product_id="p1", quantity=1)])
    stream.publish(orders, [orders.event(user_id="eve", amount=None)])
    stream.seek("order_files", "latest")
    stream.seek("fraud", "latest")
    problems = books.check()
    assert any("order in no file" in problem for problem in problems)
    assert any("absurd order without an alert" in problem for problem in problems)
    assert any("malformed order that is no dead letter" in problem for problem in problems)


def test_a_record_in_two_files_is_named(stream: djp.EventStream, tmp_path: Path) -> None:
    books = Books(stream, folder())
    publish(stream, 1)
    handle(stream, tmp_path)
    stream.seek("order_files", "earliest")
    handle(stream, tmp_path, order_files)
    assert any("is in 2 files" in problem for problem in books.check())


def test_uploads_balance(stream: djp.EventStream, tmp_path: Path) -> None:
    books = Books(stream, folder())
    publish(stream, 36)
    handle(stream, tmp_path)
    assert books.check() == []
    account = Figures(stream, folder()).accounts()["describe_media"]
    assert account.handled + account.dead_letters == 3
    uploads = [record for part in range(2) for record in stream.records(product_uploads, part)]
    assert all(upload.claim is not None and upload.claim.size > 64 << 10 for upload in uploads)
    assert sum(span.end for span in stream.log.spans(["product_media"]).values()) == account.handled


def test_an_upload_that_is_no_medium_is_a_dead_letter_and_a_lost_payload_is_named(
    stream: djp.EventStream, tmp_path: Path
) -> None:
    books = Books(stream, folder())
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
    books = Books(stream, folder())
    stream.publish(submissions, [submitted("p1"), submitted("p2", video="vhs"), submitted("p3")])
    handle(stream, tmp_path)
    assert books.check() == []
    assert sum(span.end for span in stream.log.spans(["products"]).values()) == 2
    assert [letter.error for letter in stream.dead_letters("transcode_video")] == [
        "a video of format 'vhs', which nobody can play"
    ]


@pytest.mark.parametrize("branch", [extract_facts, resize_images], ids=lambda consumer: consumer.group)
def test_a_part_that_is_lost_and_one_that_is_there_twice_are_named(
    stream: djp.EventStream, tmp_path: Path, branch: djp.Consumer
) -> None:
    books = Books(stream, folder())
    (topic,) = branch.emits
    stream.publish(submissions, [submitted("p1"), submitted("p2")])
    stream.seek(branch.group, "latest")
    handle(stream, tmp_path)
    assert f"2 times: submission without a part of {topic.name}, e.g. p1" in books.check()
    stream.seek(branch.group, "earliest")
    handle(stream, tmp_path, branch)
    assert not any(topic.name in problem for problem in books.check())
    (first, *_) = (record for part in range(topic.partitions) for record in stream.records(topic, part))
    stream.publish(topic, [first.event()])
    assert f"part of {topic.name} {first.id} was committed 2 times" in books.check()
    assert f"1 times: part of {topic.name} without a submission, e.g. {first.data['product_id']}" in books.check()


def test_a_product_that_is_lost_and_one_that_is_created_twice_are_named(
    stream: djp.EventStream, tmp_path: Path
) -> None:
    books = Books(stream, folder())
    stream.publish(submissions, [submitted("p1")])
    handle(stream, tmp_path, *(consumer for consumer in CONSUMERS if consumer is not create_product))
    stream.seek("create_product", "latest", reset_state=True)
    assert any("submission without a product, e.g. p1" in problem for problem in books.check())
    stream.publish(products, [products.event(product_id="p1"), products.event(product_id="p1")])
    assert any("product p1 was created 2 times" in problem for problem in books.check())


MAILERS = pytest.mark.parametrize("mailer", [send_receipts, send_confirmations], ids=lambda consumer: consumer.group)


def order(user_id: str, **data: object) -> djp.Event:
    return orders.event(user_id=user_id, product_id="p1", quantity=1, **data)


def books_with_an_address(stream: djp.EventStream, tmp_path: Path) -> Books:
    """Opened when the address of ada was known."""
    Books(stream, folder())
    stream.publish(user_updates, [user_updates.event(user_id="ada", email="ada@example.com", version=1)])
    handle(stream, tmp_path, user_emails)
    return Books(stream, folder())


def outbox_of(mailer: djp.Consumer) -> list[Path]:
    kind = {"send_receipts": "receipt", "send_confirmations": "confirmation"}[mailer.group]
    return [file for file in files(folder()) if kind_of(file.name) == kind]


@MAILERS
def test_a_mail_that_is_there_twice_is_named(stream: djp.EventStream, tmp_path: Path, mailer: djp.Consumer) -> None:
    books = books_with_an_address(stream, tmp_path)
    placed = order("ada", amount=3)
    stream.publish(orders, [placed, placed, order("ada", amount=None), order("eve", amount=1)])
    handle(stream, tmp_path)
    assert books.check() == []
    (file,) = outbox_of(mailer)
    assert [mail.about for mail in mails_of(file)].count(f"order {placed.id}") == 2  # as often as it was published
    file.with_name(f"again{file.name}").write_bytes(file.read_bytes())
    assert any(f"order {placed.id} has 4 " in problem for problem in books.check())


@MAILERS
def test_a_mail_that_is_lost_is_named_unless_it_was_rotated_away(
    stream: djp.EventStream, tmp_path: Path, mailer: djp.Consumer
) -> None:
    books = books_with_an_address(stream, tmp_path)
    placed = order("ada", amount=3)
    stream.publish(orders, [placed])
    handle(stream, tmp_path)
    assert books.check() == []
    for file in outbox_of(mailer):
        file.unlink()
    (problem,) = books.check()
    assert problem.startswith("1 times: order without a ")
    assert problem.endswith(f"to an address that was known, e.g. {placed.id}")
    for number in range(KEPT):
        deliver(f"later-{number}", [])
    assert books.check() == []


def test_a_receipt_for_an_order_without_an_amount_is_named(stream: djp.EventStream, tmp_path: Path) -> None:
    books = Books(stream, folder())
    malformed = order("ada", amount=None)
    stream.publish(orders, [malformed])
    handle(stream, tmp_path)
    assert books.check() == []
    deliver("wrong", [Mail("ada@example.com", f"order {malformed.id}", "You owe us None.")])
    assert books.check() == [f"1 times: receipt that was not due, e.g. {malformed.id}"]


def test_an_address_that_is_not_the_latest_is_named(stream: djp.EventStream, tmp_path: Path) -> None:
    books = Books(stream, folder())
    told = [
        user_updates.event(user_id="ada", email=f"v{version}@example.com", version=version) for version in (1, 3, 2)
    ]
    deleted = [user_updates.event(user_id="bob", email=email, version=n) for n, email in enumerate(["b@c.de", None])]
    malformed = user_updates.event(user_id="eve", email="eve@example.com")
    stream.publish(user_updates, [*told, *deleted, malformed])
    handle(stream, tmp_path)
    assert len(stream.dead_letters("user_emails")) == 1
    assert books.check() == []
    stream.publish(user_updates, [user_updates.event(user_id="ada", email="v4@example.com", version=4)])
    stream.seek("user_emails", "latest", reset_state=True)
    assert books.check() == ["1 times: address in the table that is not the latest, or missing, e.g. ada"]


def test_a_group_that_has_gone_back_is_named(stream: djp.EventStream, tmp_path: Path) -> None:
    Books(stream, folder())
    publish(stream, 2)
    handle(stream, tmp_path)
    books = Books(stream, folder())
    stream.seek("fraud", "earliest")
    assert any(problem.startswith("fraud has gone back to 0 in orders partition") for problem in books.check())


def test_every_consumer_of_the_shop_is_in_the_books() -> None:
    assert {*CONSUMERS} == {*everybody, user_emails}
    assert len(CONSUMERS) == len({*CONSUMERS})
