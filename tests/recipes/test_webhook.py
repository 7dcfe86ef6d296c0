"""The webhook of the page: what it acknowledges is durable, what it refuses is not there, repetitions are told."""

from __future__ import annotations

import base64
import hmac
import http.client
import json
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import djp_dagster as djp
from djp_dagster.errors import AmbiguousPublishError, ProducerFencedError
from tests.recipes.kit import PAGE, ids, load, passed_on, records, running, wait_until
from tests.servers.ports import free_port
from tests.servers.postgres import PostgresServer
from tests.servers.tcp_proxy import TcpProxy

SECRET = b"known to both"
ADA = {"user_id": "ada", "amount": 12}


class Answer(NamedTuple):
    status: int
    text: str


def signed(body: bytes, delivery: str = "d1", *, secret: bytes = SECRET) -> dict[str, str]:
    """The headers of a delivery, as the standard says."""
    sent_at = "1700000000"
    mac = base64.b64encode(hmac.digest(secret, f"{delivery}.{sent_at}.".encode() + body, "sha256")).decode()
    return {"webhook-id": delivery, "webhook-timestamp": sent_at, "webhook-signature": f"v1,AAAA v1,{mac}"}


class Sender(NamedTuple):
    """Whoever sends deliveries to a port."""

    port: int

    def post(self, body: bytes, headers: Mapping[str, str]) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("POST", "/", body, dict(headers))
            response = connection.getresponse()
            return Answer(response.status, response.read().decode())
        finally:
            connection.close()

    def deliver(self, data: Any, delivery: str = "d1") -> Answer:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        return self.post(body, signed(body, delivery))

    def raw(self, request: bytes) -> bytes:
        """All that is answered to these bytes, after which nothing more is sent."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as link:
            link.sendall(request)
            link.shutdown(socket.SHUT_WR)
            answer = b""
            while piece := link.recv(4096):
                answer += piece
        return answer


@contextmanager
def listening(stream: djp.EventStream) -> Iterator[Sender]:
    """The page's handler in a server of this process."""
    recipe = load("webhook.py")
    stream.create_topic(recipe.orders)
    recipe.Webhook.stream, recipe.Webhook.secret = stream, SECRET
    server = ThreadingHTTPServer(("127.0.0.1", 0), recipe.Webhook)
    server.daemon_threads = False  # closing waits for them, so that none outlives its stream
    thread = threading.Thread(target=server.serve_forever, args=[0.02])
    thread.start()
    try:
        yield Sender(server.server_port)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "shop.db"


@pytest.fixture
def stream(place: Path) -> Iterator[djp.EventStream]:
    with djp.open_stream(place) as stream:
        yield stream


@pytest.fixture
def sender(stream: djp.EventStream) -> Iterator[Sender]:
    with listening(stream) as sender:
        yield sender


def test_what_is_acknowledged_is_seen_by_others(sender: Sender, place: Path) -> None:
    assert sender.deliver(ADA) == (204, "")
    assert sender.deliver([ADA, {"user_id": "bob"}, {"user_id": 7}], "d2").status == 204
    assert sender.deliver([], "d3").status == 204
    with djp.open_stream(place) as other:
        assert ids(other) == ["d1.0", "d2.0", "d2.1", "d2.2"]
        assert [record.data for record in records(other, "orders") if record.id == "d1.0"] == [ADA]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "Expecting value"),
        (b'{"user_id": "ada"', "delimiter"),
        (b'{"user_id": "\xff"}', "utf-8"),
        (b"5", "data['user_id'] must be a string or an integer"),
        (b'{"amount": 5}', "topic 'orders' has no key"),
        (b'{"user_id": null}', "not NoneType"),
        (b'{"user_id": "\\ud800"}', "no valid text"),
        (b'{"user_id": "ada", "text": "\\ud800"}', "data cannot be encoded"),
        (b'{"user_id": "ada", "amount": %d}' % 2**70, "data cannot be encoded"),
        (b'{"user_id": "ada", "deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "recursion"),
        (b'{"user_id": "ada", "long": "' + b"x" * (2**20 - 45) + b'"}', "topic 'orders' takes 1048576"),
        (b'[{"user_id": "ada"}, {"user_id": "bob"}, {"amount": 5}]', "event 'd1.2' of topic 'orders' has no key"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_named_and_nothing_of_it_is_there(
    sender: Sender, stream: djp.EventStream, body: bytes, says: str
) -> None:
    answer = sender.deliver(body)
    assert answer.status == 400
    assert says in answer.text
    assert ids(stream) == []
    assert sender.deliver(ADA).status == 204


def test_strangers_are_refused(sender: Sender, stream: djp.EventStream) -> None:
    body = json.dumps(ADA).encode()
    good = signed(body)
    for headers in (
        {},
        signed(body, secret=b"guessed"),
        {**good, "webhook-id": "d2"},
        {**good, "webhook-timestamp": "1700000001"},
        {**good, "webhook-signature": ""},
        {**good, "webhook-signature": "v1,\xff"},
        signed(body, ""),
    ):
        assert sender.post(body, headers).status == 401
    assert sender.post(body + b" ", good).status == 401
    assert ids(stream) == []
    assert sender.post(body, good).status == 204


@pytest.mark.parametrize("length", [None, "", "-1", "1048577", "9" * 5000, "x"])
def test_a_length_that_is_none_is_refused_unread(sender: Sender, length: str | None) -> None:
    header = b"" if length is None else f"Content-Length: {length}\r\n".encode()
    assert sender.raw(b"POST / HTTP/1.1\r\n" + header + b"\r\n").startswith(b"HTTP/1.0 413 ")


def test_half_a_delivery_is_none(sender: Sender, stream: djp.EventStream) -> None:
    body = json.dumps(ADA).encode()
    head = "".join(f"{name}: {value}\r\n" for name, value in {**signed(body), "Content-Length": len(body)}.items())
    assert sender.raw(f"POST / HTTP/1.1\r\n{head}\r\n".encode() + body[:-3]).startswith(b"HTTP/1.0 401 ")
    assert ids(stream) == []


def test_a_delivery_that_comes_twice(sender: Sender, stream: djp.EventStream, tmp_path: Path) -> None:
    """Both are acknowledged, both are in the stream under one id, and the consumer passes on one; also later."""
    state = tmp_path / "state"
    assert [sender.deliver([ADA, ADA]).status for _ in range(2)] == [204, 204]
    assert ids(stream) == ["d1.0", "d1.0", "d1.1", "d1.1"]
    assert passed_on(stream, state) == ["d1.0", "d1.1"]
    assert [sender.deliver([ADA, ADA], delivery).status for delivery in ("d1", "d2")] == [204, 204]
    assert passed_on(stream, state) == ["d1.0", "d1.1", "d2.0", "d2.1"]


def test_ids_are_forgotten_after_a_week(tmp_path: Path) -> None:
    once = load("once.py").once
    clock = djp.testing.Clock()
    event = djp.Event(type="orders", source="/shop", id="d1", data=ADA)
    with djp.testing.memory_stream(clock=clock) as stream:
        once.register(stream)
        counts = []
        for days in (0, 6, 3, 0):  # on days 0, 6, 9 and 9
            clock.advance(days * 86_400)
            # Once without records: what is due by then is forgotten by a batch of its own.
            djp.run_pending(stream, once, state_folder=tmp_path)
            stream.publish("orders", [event])
            djp.run_pending(stream, once, state_folder=tmp_path)
            counts.append(len(records(stream, "unique_orders")))
        assert counts == [1, 1, 2, 2]
        clock.advance(9 * 86_400)
        djp.run_pending(stream, once, state_folder=tmp_path)
        with stream.view(once, folder=tmp_path / "view") as view:
            assert list(view.items()) == []


def of_the_page(pattern: str) -> str:
    """The one piece of code within the page's text that begins so."""
    (found,) = set(re.findall(f"`({pattern}[^`]*)`", PAGE.read_text()))
    return str(found)


def test_a_producer_per_delivery_appends_a_repetition_once(stream: djp.EventStream) -> None:
    stream.create_topic(load("webhook.py").orders)
    code = of_the_page(r'stream\.producer\(f"orders')
    names = {"stream": stream, "delivery": "d1", "events": [djp.Event(type="t", source="/s", id="d1.0", data=ADA)]}
    assert len(eval(code, names)) == 1
    assert eval(code, names) == []
    assert ids(stream) == ["d1.0"]


def test_of_two_that_come_at_once_one_is_fenced(stream: djp.EventStream) -> None:
    stream.create_topic(load("webhook.py").orders)
    events = [djp.Event(type="t", source="/s", id="d1.0", data=ADA)]
    first, second = stream.producer("orders.d1"), stream.producer("orders.d1")
    with pytest.raises(ProducerFencedError):
        first.publish("orders", events, sequence=1)
    assert len(second.publish("orders", events, sequence=1)) == 1
    assert stream.producer("orders.d1").publish("orders", events, sequence=1) == []
    assert ids(stream) == ["d1.0"]


def test_a_stream_that_was_replaced_acknowledges_nothing(sender: Sender, place: Path) -> None:
    assert sender.deliver(ADA).status == 204
    place.unlink()
    assert sender.deliver(ADA, "d2") == (503, "send it again")


class TestOutages:
    @pytest.fixture
    def proxy(self, postgres_server: PostgresServer, postgres_url: str) -> Iterator[TcpProxy]:
        with TcpProxy(postgres_server.port) as proxy:
            yield proxy

    @pytest.fixture
    def stream(self, proxy: TcpProxy, postgres_server: PostgresServer, postgres_url: str) -> Iterator[djp.EventStream]:
        with djp.open_stream(postgres_url.replace(f":{postgres_server.port}/", f":{proxy.port}/")) as stream:
            yield stream

    def test_a_database_that_is_away(self, proxy: TcpProxy, sender: Sender, stream: djp.EventStream) -> None:
        assert sender.deliver(ADA).status == 204
        proxy.pause()
        assert sender.deliver(ADA, "d2") == (503, "send it again")
        proxy.resume()
        assert sender.deliver(ADA, "d2").status == 204
        assert ids(stream) == ["d1.0", "d2.0"]

    def test_a_commit_whose_answer_is_lost(
        self, proxy: TcpProxy, sender: Sender, stream: djp.EventStream, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert sender.deliver(ADA, "d0").status == 204  # over a connection that the next one finds open
        cut = proxy.cut_on(b"COMMIT\0", "after")  # the statement; BEGIN says READ COMMITTED
        assert sender.deliver(ADA).status == 503
        assert cut.done.wait(5)
        (logged,) = caplog.records
        assert logged.exc_info is not None
        assert logged.exc_info[0] is AmbiguousPublishError
        assert ids(stream) == ["d0.0", "d1.0"]
        assert sender.deliver(ADA).status == 204
        assert ids(stream) == ["d0.0", "d1.0", "d1.0"]
        assert passed_on(stream, tmp_path / "state") == ["d0.0", "d1.0"]


def test_killed_while_it_is_delivered_to(place: Path, tmp_path: Path) -> None:
    """As a program, with four senders: what it has acknowledged is there, and what is sent again passes on once."""
    port = free_port()
    environment = {
        "DJP_STREAM_URL": f"sqlite:///{place}",
        "WEBHOOK_SECRET": "whsec_" + base64.b64encode(SECRET).decode(),
        "PORT": str(port),
    }
    sender, acknowledged = Sender(port), set[str]()
    deliveries = [f"d{number}" for number in range(400)]

    def deliver(delivery: str) -> None:
        with suppress(OSError, http.client.HTTPException):
            if sender.deliver(ADA, delivery).status == 204:
                acknowledged.add(f"{delivery}.0")

    def answers() -> bool:
        with suppress(OSError):
            return sender.post(b"", {}).status == 401
        return False

    with ThreadPoolExecutor(4) as senders:
        with running("webhook.py", tmp_path, environment) as webhook:
            wait_until(answers, "the webhook")
            sent = [senders.submit(deliver, delivery) for delivery in deliveries]
            wait_until(lambda: len(acknowledged) >= 50, "50 deliveries")
            webhook.kill()
            [future.result() for future in sent]
        assert 50 <= len(acknowledged) < len(deliveries)
        with djp.open_stream(place) as stream:
            assert acknowledged <= set(ids(stream))
        with running("webhook.py", tmp_path, environment):
            wait_until(answers, "the webhook")
            again = [one for one in deliveries if f"{one}.0" not in acknowledged]
            [future.result() for future in [senders.submit(deliver, delivery) for delivery in again]]
    assert len(acknowledged) == len(deliveries)
    with djp.open_stream(place) as stream:
        assert passed_on(stream, tmp_path / "state") == sorted(f"{delivery}.0" for delivery in deliveries)
