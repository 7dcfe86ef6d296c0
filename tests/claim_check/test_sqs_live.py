"""Interop, live: the official SQS Extended Client sends and we read, we send and it reads; attacks on our reader."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import pytest

from djp_dagster import Claim, PayloadStore
from djp_dagster.claim_check.sqs import split_receipt_handle
from djp_dagster.errors import (
    InvalidClaimError,
    PayloadCorruptError,
    PayloadError,
    PayloadForbiddenError,
    PayloadMissingError,
)
from tests.claim_check.kit import Place, s3_place
from tests.claim_check.official_sqs_client import OfficialClient
from tests.servers.moto_server import MotoServer
from tests.servers.s3_server import S3Server

KIB = 1024
LIMIT = 256 * KIB


class Desk(NamedTuple):
    """A queue, a bucket, and both clients."""

    official: OfficialClient
    sqs: Any
    queue: str
    bucket: str
    place: Place
    s3_server: S3Server

    def send(self, body: str, attributes: dict[str, Any] | None = None, **more: Any) -> None:
        self.official("send", self.queue, self.bucket, body=body, attributes=attributes or {}, **more)

    def received_by_official(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.official("receive", self.queue, self.bucket)
        return found

    def receive(self) -> list[dict[str, Any]]:
        """As somebody with boto3 alone gets them."""
        got = self.sqs.receive_message(
            QueueUrl=self.queue, MaxNumberOfMessages=10, MessageAttributeNames=["All"], VisibilityTimeout=0
        )
        messages: list[dict[str, Any]] = got.get("Messages", [])
        return messages

    def receive_one(self) -> dict[str, Any]:
        (message,) = self.receive()
        return message

    def send_as_is(self, body: str, attributes: dict[str, Any]) -> None:
        self.sqs.send_message(QueueUrl=self.queue, MessageBody=body, MessageAttributes=attributes)

    @property
    def store(self) -> PayloadStore:
        """Where the official client puts its payloads: at the root of the bucket."""
        return self.place.at(f"s3://{self.bucket}").open()

    def objects(self, bucket: str | None = None) -> list[str]:
        found = self.s3_server.client().list_objects_v2(Bucket=bucket or self.bucket)
        return [one["Key"] for one in found.get("Contents", [])]


@pytest.fixture(scope="module", params=["moto", "seaweedfs"])
def servers(request: pytest.FixtureRequest, moto_server: MotoServer) -> Iterator[tuple[MotoServer, S3Server, Any]]:
    """SQS of the emulator; S3 of the emulator, and of a real server."""
    s3: S3Server = moto_server if request.param == "moto" else request.getfixturevalue("s3_server")
    s3.start()
    environment = s3.environment | {
        "AWS_ENDPOINT_URL_S3": s3.endpoint_url,
        "AWS_ENDPOINT_URL_SQS": moto_server.endpoint_url,
    }
    official = OfficialClient(environment)
    try:
        yield moto_server, s3, official
    finally:
        official.close()


@pytest.fixture
def desk(servers: tuple[MotoServer, S3Server, OfficialClient]) -> Iterator[Desk]:
    moto, s3, official = servers
    sqs = moto.client(service="sqs")
    queue = sqs.create_queue(QueueName=f"test-{uuid4().hex}")["QueueUrl"]
    bucket = s3.new_bucket()
    yield Desk(official, sqs, queue, bucket, s3_place(s3, f"s3://{bucket}/pre"), s3)
    s3.drop_bucket(bucket)
    sqs.delete_queue(QueueUrl=queue)


def text_of(seed: random.Random, size: int) -> str:
    """Text of so many bytes, of letters of one to four bytes; SQS takes no control characters."""
    letters = "".join(seed.choices('abc \n\t"\\/éß€日本😀', k=size // 4))
    cut = letters.encode()[:size].decode(errors="ignore")
    return cut + "x" * (size - len(cut.encode()))


def payload_of(store: PayloadStore, message: dict[str, Any]) -> bytes:
    """What a reader of ours makes of a message."""
    claim = Claim.from_sqs(message["Body"], message.get("MessageAttributes"))
    return message["Body"].encode() if claim is None else store.read(claim)


class TestTheySendAndWeRead:
    @pytest.mark.parametrize(
        ("size", "threshold", "is_pointer", "legacy"),
        [
            (LIMIT, LIMIT, False, False),
            (LIMIT + 1, LIMIT, True, False),
            (LIMIT + 1, LIMIT, True, True),
            (1500 * KIB, LIMIT, True, False),
            (1000, 1000, False, True),
            (1001, 1000, True, True),
        ],
    )
    def test_on_both_sides_of_the_threshold(
        self, desk: Desk, seed: random.Random, size: int, threshold: int, is_pointer: bool, legacy: bool
    ) -> None:
        body = text_of(seed, size)
        desk.send(body, legacy=legacy, threshold=threshold)
        message = desk.receive_one()
        claim = Claim.from_sqs(message["Body"], message.get("MessageAttributes"))
        assert (claim is not None) == is_pointer
        assert payload_of(desk.store, message) == body.encode()
        if claim is not None:
            assert claim.size == size
            assert claim.sha256 is None
            UUID(claim.uri.removeprefix(f"s3://{desk.bucket}/"))
            # Where they lie is not where our own are: a store with a prefix does not resolve it.
            with pytest.raises(PayloadForbiddenError):
                desk.place.open().read(claim)

    def test_attributes_beside_it_count_and_stay(self, desk: Desk, seed: random.Random) -> None:
        attributes = {"colour": {"DataType": "String", "StringValue": "red"}}
        weight = len("colour" + "String" + "red")
        for size, is_pointer in ((LIMIT - weight, False), (LIMIT - weight + 1, True)):
            desk.send(text_of(seed, size), attributes)
            message = desk.receive_one()
            assert (Claim.from_sqs(message["Body"], message["MessageAttributes"]) is not None) == is_pointer
            assert message["MessageAttributes"]["colour"] == attributes["colour"]
            self.acknowledge(desk, message["ReceiptHandle"])

    def acknowledge(self, desk: Desk, handle: str) -> None:
        desk.sqs.delete_message(QueueUrl=desk.queue, ReceiptHandle=split_receipt_handle(handle).original)

    def test_their_receipt_handles(self, desk: Desk, seed: random.Random) -> None:
        desk.send("small")
        desk.send(text_of(seed, LIMIT + 1))
        (key,) = desk.objects()
        found = {len(one["body"]) > 10: split_receipt_handle(one["handle"]) for one in desk.received_by_official()}
        assert found[False].claim is None
        assert found[True].claim == Claim(uri=f"s3://{desk.bucket}/{key}")
        for handle in found.values():
            # SQS knows the original, and takes no other.
            desk.sqs.change_message_visibility(QueueUrl=desk.queue, ReceiptHandle=handle.original, VisibilityTimeout=0)
            desk.sqs.delete_message(QueueUrl=desk.queue, ReceiptHandle=handle.original)
        assert desk.receive() == []
        assert desk.objects() == [key]

    def test_a_truncated_payload_is_noticed_by_its_size(self, desk: Desk, seed: random.Random) -> None:
        desk.send(text_of(seed, LIMIT + 1))
        (key,) = desk.objects()
        desk.place.at(f"s3://{desk.bucket}").replace(key, b"x" * LIMIT)
        with pytest.raises(PayloadCorruptError):
            payload_of(desk.store, desk.receive_one())


class TestWeSendAndTheyRead:
    @pytest.mark.parametrize(
        ("size", "legacy"), [(1, False), (LIMIT - 1, True), (LIMIT + 1, False), (1500 * KIB, False)]
    )
    def test_byte_exact(self, desk: Desk, seed: random.Random, size: int, legacy: bool) -> None:
        payload, store = text_of(seed, size).encode(), desk.place.open()
        claim = store.put(payload, media_type="text/plain; charset=utf-8", compress=False).claim
        pointer = claim.to_sqs(legacy=legacy)
        desk.send_as_is(pointer.body, pointer.attributes)
        (theirs,) = desk.received_by_official()
        assert theirs["body"].encode() == payload
        # Ours as well, with all that the claim says.
        desk.sqs.change_message_visibility(
            QueueUrl=desk.queue, ReceiptHandle=split_receipt_handle(theirs["handle"]).original, VisibilityTimeout=0
        )
        message = desk.receive_one()
        assert Claim.from_sqs(message["Body"], message["MessageAttributes"]) == claim
        assert payload_of(store, message) == payload
        assert split_receipt_handle(theirs["handle"]).claim == Claim(uri=claim.uri)

    def test_our_attribute_goes_with_eight_of_others(self, desk: Desk) -> None:
        pointer = desk.place.open().put(b"text", compress=False).claim.to_sqs()
        others = {f"a{number}": {"DataType": "String", "StringValue": "x"} for number in range(8)}
        desk.send_as_is(pointer.body, {**others, **pointer.attributes})
        (theirs,) = desk.received_by_official()
        assert theirs["body"] == "text"
        assert theirs["attributes"] == {**others, "DjpClaim": pointer.attributes["DjpClaim"]}

    def test_what_they_cannot_read_is_not_sent(self, desk: Desk) -> None:
        claim = desk.place.open().put(b"a line of text\n" * 10_000, media_type="text/plain").claim
        with pytest.raises(InvalidClaimError, match="compress=False"):
            claim.to_sqs()

    def test_a_payload_replaced_by_one_as_long_is_noticed_by_its_hash(self, desk: Desk) -> None:
        stored = desk.place.open().put(b"right", compress=False)
        pointer = stored.claim.to_sqs()
        desk.send_as_is(pointer.body, pointer.attributes)
        desk.place.replace(stored.ref.key, b"wrong")
        message = desk.receive_one()
        with pytest.raises(PayloadCorruptError):
            payload_of(desk.place.open(), message)
        (theirs,) = desk.received_by_official()
        assert theirs["body"] == "wrong"


@pytest.mark.parametrize("servers", ["moto"], indirect=True)
class TestAttacks:
    """As of section 5 of the format's reference: what the official client falls for, our reader does not."""

    def pointer(self, bucket: str, key: str, kind: str = "software.amazon.payloadoffloading.PayloadS3Pointer") -> Any:
        body = f'["{kind}", {{"s3BucketName": "{bucket}", "s3Key": "{key}"}}]'
        return body, {"ExtendedPayloadSize": {"DataType": "Number", "StringValue": "6"}}

    def test_another_bucket(self, desk: Desk) -> None:
        other = desk.s3_server.new_bucket()
        try:
            desk.s3_server.client().put_object(Bucket=other, Key="k", Body=b"secret")
            desk.send_as_is(*self.pointer(other, "k"))
            message = desk.receive_one()
            for store in (desk.store, desk.place.open()):
                with pytest.raises(PayloadForbiddenError, match="is not for the payload store"):
                    payload_of(store, message)
            # The same message, by the official client: read, and deleted when it is acknowledged.
            (theirs,) = desk.received_by_official()
            assert theirs["body"] == "secret"
            split = split_receipt_handle(theirs["handle"])
            assert not desk.store.holds(split.claim)  # type: ignore[arg-type]
            desk.sqs.change_message_visibility(QueueUrl=desk.queue, ReceiptHandle=split.original, VisibilityTimeout=0)
            ours = desk.receive_one()
            desk.sqs.delete_message(
                QueueUrl=desk.queue, ReceiptHandle=split_receipt_handle(ours["ReceiptHandle"]).original
            )
            assert desk.objects(other) == ["k"]
            desk.send_as_is(*self.pointer(other, "k"))
            (theirs,) = desk.received_by_official()
            desk.official("delete", desk.queue, desk.bucket, handle=theirs["handle"])
            assert desk.objects(other) == []
        finally:
            desk.s3_server.drop_bucket(other)

    def test_keys_that_climb(self, desk: Desk) -> None:
        for key in ("../../etc/k", "pre/../k", "/etc/passwd", ".hidden", "a//b"):
            desk.send_as_is(*self.pointer(desk.bucket, key))
            message = desk.receive_one()
            with pytest.raises(PayloadForbiddenError):
                payload_of(desk.store, message)
            desk.sqs.delete_message(QueueUrl=desk.queue, ReceiptHandle=message["ReceiptHandle"])

    def test_a_key_chosen_by_an_attribute(self, desk: Desk) -> None:
        desk.send("x" * (LIMIT + 1), {"S3Key": {"DataType": "String", "StringValue": "../../etc/k"}})
        assert desk.objects() == ["../../etc/k"]
        with pytest.raises(PayloadForbiddenError):
            payload_of(desk.store, desk.receive_one())

    @pytest.mark.parametrize("kind", ["java.lang.Runtime", "tests.servers.tcp_proxy", "os.system"])
    def test_a_class_name(self, desk: Desk, kind: str) -> None:
        desk.s3_server.client().put_object(Bucket=desk.bucket, Key="k", Body=b"secret")
        desk.send_as_is(*self.pointer(desk.bucket, "k", kind))
        loaded = set(sys.modules)
        with pytest.raises(InvalidClaimError) as caught:
            payload_of(desk.store, desk.receive_one())
        assert caught.value.facts["part"] == "class"
        assert set(sys.modules) == loaded

    def test_a_missing_payload_is_the_fault_of_its_message_alone(self, desk: Desk, seed: random.Random) -> None:
        bodies = {number: text_of(seed, LIMIT + 1 + number) for number in range(3)}
        for body in bodies.values():
            desk.send(body)
        found: dict[str, dict[str, Any]] = {}
        while len(found) < 3:
            found |= {message["MessageId"]: message for message in desk.receive()}
        messages = list(found.values())
        victim = Claim.from_sqs(messages[1]["Body"], messages[1]["MessageAttributes"])
        assert victim is not None
        desk.s3_server.client().delete_object(Bucket=desk.bucket, Key=victim.uri.rsplit("/", 1)[1])
        outcome: list[bytes | type[PayloadError]] = []
        for message in messages:
            try:
                outcome.append(payload_of(desk.store, message))
            except PayloadError as error:
                outcome.append(type(error))
        wanted = {LIMIT + 1 + number: body.encode() for number, body in bodies.items()}
        for message, got in zip(messages, outcome, strict=True):
            size = int(message["MessageAttributes"]["ExtendedPayloadSize"]["StringValue"])
            assert got == (PayloadMissingError if message is messages[1] else wanted[size])
        with pytest.raises(RuntimeError, match="NoSuchKey"):
            desk.received_by_official()


def test_nothing_of_theirs_is_in_this_process() -> None:
    import boto3

    assert not any(name.startswith("sqs_extended_client") for name in sys.modules)
    assert boto3.session.Session.__module__ == "boto3.session"
