"""The SQS recipe of the page: killed at either side of a publish, it loses nothing; what it cannot publish stays."""

from __future__ import annotations

import http.client
import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from uuid import uuid4

import pytest

import djp_dagster as djp
from djp_dagster.errors import StreamUnavailableError
from tests.claim_check.official_sqs_client import OfficialClient
from tests.recipes.kit import ids, load, passed_on, records, running, wait_until
from tests.servers.moto_server import MotoServer
from tests.servers.postgres import PostgresServer
from tests.servers.scripted_http import CUT, Answer, Request, ScriptedHttp
from tests.servers.tcp_proxy import TcpProxy


class Queue(NamedTuple):
    """A queue, a client of it, and the handles of what was received; visibility timeouts end when a test says so."""

    sqs: Any
    url: str
    received: list[str]

    def time_out(self) -> None:
        """Let what was received, and not deleted, be received again."""
        for handle in self.received:
            with suppress(self.sqs.exceptions.ClientError):  # it was deleted
                self.sqs.change_message_visibility(QueueUrl=self.url, ReceiptHandle=handle, VisibilityTimeout=0)
        self.received.clear()

    def send(self, *bodies: Any) -> list[str]:
        """Send messages of these bodies, as JSON unless they are text; their ids."""
        texts = [body if isinstance(body, str) else json.dumps(body) for body in bodies]
        return [self.sqs.send_message(QueueUrl=self.url, MessageBody=text)["MessageId"] for text in texts]

    @property
    def messages(self) -> int:
        """How many are in it, also those that somebody has received and not deleted."""
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        found = self.sqs.get_queue_attributes(QueueUrl=self.url, AttributeNames=names)["Attributes"]
        return sum(int(found[name]) for name in names)


@pytest.fixture
def queue(moto_server: MotoServer) -> Iterator[Queue]:
    sqs = moto_server.client(service="sqs")
    url = sqs.create_queue(QueueName=f"orders-{uuid4().hex}", Attributes={"VisibilityTimeout": "600"})["QueueUrl"]
    received: list[str] = []

    def note(parsed: dict[str, Any], **_: object) -> None:
        received.extend(message["ReceiptHandle"] for message in parsed.get("Messages", []))

    sqs.meta.events.register("after-call.sqs.ReceiveMessage", note)
    yield Queue(sqs, url, received)
    sqs.delete_queue(QueueUrl=url)


@pytest.fixture
def bucket(moto_server: MotoServer) -> Iterator[str]:
    bucket = moto_server.new_bucket()
    yield bucket
    moto_server.drop_bucket(bucket)


@pytest.fixture
def payloads(bucket: str, moto_server: MotoServer, monkeypatch: pytest.MonkeyPatch) -> djp.PayloadStore:
    """Where large messages lie, opened as the page does, with what boto3 finds in the environment."""
    for name, value in moto_server.environment.items():
        monkeypatch.setenv(name, value)
    return djp.open_payload_store(f"s3://{bucket}", addressing="path")


@pytest.fixture
def recipe() -> ModuleType:
    return load("from_sqs.py")


@pytest.fixture
def stream(recipe: ModuleType, tmp_path: Path) -> Iterator[djp.EventStream]:
    with djp.open_stream(tmp_path / "shop.db") as stream:
        stream.create_topic(recipe.orders)
        yield stream


def orders(count: int) -> list[dict[str, object]]:
    return [{"user_id": f"u{n % 3}", "amount": n} for n in range(count)]


def test_from_the_queue_to_the_stream(
    recipe: ModuleType, queue: Queue, stream: djp.EventStream, payloads: djp.PayloadStore
) -> None:
    sent = queue.send(*orders(12))
    assert [recipe.pump(queue.sqs, queue.url, stream, payloads, wait_s=0) for _ in range(3)] == [10, 2, 0]
    assert queue.messages == 0
    assert ids(stream) == sorted(sent)
    amounts = {record.id: record.data["amount"] for record in records(stream, "orders")}
    assert [amounts[one] for one in sent] == list(range(12))


class Killing:
    """Stands before SQS, and kills the process that asks it for something, once.

    Args:
        received: it adds the handles of all messages that it has passed on, or was about to.
        at: of the requests.
        when: ``"before"`` SQS hears of it, or ``"after"``.
    """

    def __init__(self, moto: MotoServer, received: list[str], at: str, when: str) -> None:
        self._moto, self._received, self._at, self._when = moto, received, f"AmazonSQS.{at}", when
        self.victim: Any = None
        self.is_done = False

    def __call__(self, request: Request) -> Answer:
        if self.is_done or request.headers.get("X-Amz-Target") != self._at:
            return self._forward(request)
        if self._when == "after" and b'"Messages"' not in self._forward(request).body:
            return CUT  # nothing was received: that is not the moment
        self.is_done = True
        self.victim.kill()
        self.victim.wait()
        return CUT

    def _forward(self, request: Request) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self._moto.port, timeout=60)
        try:
            # The poll of a process that was killed would go on for 20 s.
            body = request.body.replace(b'"WaitTimeSeconds": 20', b'"WaitTimeSeconds": 1')
            headers = {name: value for name, value in request.headers.items() if name != "Content-Length"}
            connection.request(request.method, request.target, body, headers)
            response = connection.getresponse()
            answer = response.read()
            if request.headers.get("X-Amz-Target") == "AmazonSQS.ReceiveMessage":
                self._received.extend(one["ReceiptHandle"] for one in json.loads(answer).get("Messages", []))
            return Answer(response.status, answer, {"Content-Type": response.headers["Content-Type"]})
        finally:
            connection.close()


@pytest.mark.crash
@pytest.mark.parametrize(
    ("at", "when", "repeated"),
    [("ReceiveMessage", "after", 0), ("DeleteMessage", "before", 1)],
    ids=["between receive and publish", "between publish and delete"],
)
def test_killed_it_loses_nothing(
    queue: Queue, bucket: str, moto_server: MotoServer, tmp_path: Path, at: str, when: str, repeated: int
) -> None:
    """As a program: killed there, and started again."""
    sent = queue.send(*orders(5))
    killing = Killing(moto_server, queue.received, at, when)
    place = tmp_path / "shop.db"
    with ScriptedHttp(killing) as before_sqs:
        environment = {
            **moto_server.environment,
            "AWS_ENDPOINT_URL_SQS": before_sqs.url,
            "DJP_STREAM_URL": f"sqlite:///{place}",
            "QUEUE_URL": queue.url,
            "QUEUE_PAYLOADS": f"s3://{bucket}",
        }
        with running("from_sqs.py", tmp_path, environment) as killing.victim:
            wait_until(lambda: killing.is_done, "the kill")
        with djp.open_stream(place) as stream:
            assert len(ids(stream)) == repeated
            assert queue.messages == 5
        queue.time_out()
        with running("from_sqs.py", tmp_path, environment) as again:
            wait_until(lambda: queue.messages == 0, "the queue to be empty")
            assert again.poll() is None
    with djp.open_stream(place) as stream:
        assert len(ids(stream)) == 5 + repeated
        assert set(ids(stream)) == set(sent)
        assert passed_on(stream, tmp_path / "state") == sorted(sent)


def test_bad_messages_stay_and_hold_up_no_other(
    recipe: ModuleType,
    queue: Queue,
    stream: djp.EventStream,
    payloads: djp.PayloadStore,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bad = queue.send("no JSON", "5", {"amount": 1}, '{"user_id": "ada", "text": "\\ud800"}', "[" * 100_000)
    good = queue.send(*orders(3))
    assert recipe.pump(queue.sqs, queue.url, stream, payloads, wait_s=0) == 3
    assert ids(stream) == sorted(good)
    assert queue.messages == len(bad)
    told = {record.args[0]: str(record.args[1]) for record in caplog.records if isinstance(record.args, tuple)}
    assert sorted(told) == sorted(bad)
    assert "data['user_id'] must be a string or an integer" in told[bad[2]]
    assert all(record.levelno == logging.ERROR for record in caplog.records)


def test_a_stream_that_is_away(
    recipe: ModuleType, queue: Queue, payloads: djp.PayloadStore, postgres_server: PostgresServer, postgres_url: str
) -> None:
    sent = queue.send(*orders(2))
    with TcpProxy(postgres_server.port) as proxy:
        url = postgres_url.replace(f":{postgres_server.port}/", f":{proxy.port}/")
        with djp.open_stream(url, payloads=payloads) as stream:
            stream.create_topic(recipe.orders)
            proxy.pause()
            with pytest.raises(StreamUnavailableError):
                recipe.pump(queue.sqs, queue.url, stream, payloads, wait_s=0)
            proxy.resume()
            assert queue.messages == 2
            queue.time_out()
            assert recipe.pump(queue.sqs, queue.url, stream, payloads, wait_s=0) == 2
            assert ids(stream) == sorted(sent)
            assert queue.messages == 0


class TestLargeMessages:
    @pytest.fixture
    def official(self, moto_server: MotoServer) -> Iterator[OfficialClient]:
        official = OfficialClient(moto_server.environment)
        yield official
        official.close()

    def test_a_pointer_becomes_its_payload(
        self,
        recipe: ModuleType,
        queue: Queue,
        bucket: str,
        stream: djp.EventStream,
        payloads: djp.PayloadStore,
        official: OfficialClient,
    ) -> None:
        large = {"user_id": "ada", "text": "x" * 300_000}
        sent = [official("send", queue.url, bucket, body=json.dumps(data)) for data in (large, {"user_id": "ada"})]
        assert recipe.pump(queue.sqs, queue.url, stream, payloads, wait_s=0) == 2
        found = {record.id: record for record in records(stream, "orders")}
        assert [found[one].data for one in sent] == [large, {"user_id": "ada"}]
        claims = [found[one].claim for one in sent]
        assert claims[1] is None
        assert claims[0] is not None
        # Of the stream's own store: it stays when the senders' bucket is tidied.
        assert stream.payloads.holds(claims[0])
        assert not payloads.holds(claims[0])
        assert queue.messages == 0

    def test_a_pointer_elsewhere_is_not_followed(
        self,
        recipe: ModuleType,
        queue: Queue,
        bucket: str,
        stream: djp.EventStream,
        payloads: djp.PayloadStore,
        moto_server: MotoServer,
        official: OfficialClient,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        other = moto_server.new_bucket()
        try:
            official("send", queue.url, other, body=json.dumps({"user_id": "ada", "text": "x" * 300_000}))
            assert recipe.pump(queue.sqs, queue.url, stream, payloads, wait_s=0) == 0
            assert f"is not for the payload store s3://{bucket}" in caplog.text
            assert ids(stream) == []
            assert queue.messages == 1
        finally:
            moto_server.drop_bucket(other)
