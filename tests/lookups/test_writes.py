"""Writing to a service: done once where it honours the key; never repeated where it may have been done without one."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from djp_dagster import Batch, EventStream, HttpLookup, Record, RetryPolicy, Threshold, Topic, consumer, run_pending
from djp_dagster.errors import LookupRefusedError, LookupUnavailableError, RetriesExhaustedError
from tests.lookups.kit import Mails, counts_of, users_of
from tests.servers.ports import free_port
from tests.servers.scripted_http import CUT, NEVER, Answer, Request, ScriptedHttp

ORDERS = Topic("orders")
FAST = RetryPolicy(max_attempts=3, first=0.001, longest=0.01)
Responder = Callable[[Request], Answer]


@pytest.fixture
def made(server: ScriptedHttp, closing: Callable[[Any], Any]) -> Callable[..., HttpLookup]:
    return lambda **settings: closing(users_of(server, **{"timeout": "300ms", **settings}))


def lost(mails: Mails, how: Answer) -> Responder:
    """It is done, and whoever asked is not told."""

    def done(request: Request) -> Answer:
        mails.send(request)
        return how

    return done


DONE = {"mail": 1}
LOST = [CUT, NEVER, Answer(201, DONE, cut_at=3), Answer(504), Answer(500), Answer(201, DONE, piece=1, pause_s=0.1)]
IDS = ["cut", "never", "half", "gateway", "error", "slow"]


@pytest.mark.parametrize("how", LOST, ids=IDS)
def test_a_lost_answer_with_a_key(server: ScriptedHttp, made: Callable[..., HttpLookup], how: Answer) -> None:
    mails = Mails()
    server.responder = mails
    server.script(lost(mails, how), lost(mails, how))
    assert made().write("POST", "/mails", {"to": "ada"}, idempotency_key="order-1") == {"mail": 1}
    assert mails.sent == [{"to": "ada"}]
    assert len(server.requests) == 3
    assert {request.headers["Idempotency-Key"] for request in server.requests} == {"order-1"}


@pytest.mark.parametrize("how", LOST, ids=IDS)
def test_a_lost_answer_without_a_key(server: ScriptedHttp, made: Callable[..., HttpLookup], how: Answer) -> None:
    mails = Mails()
    server.responder = mails
    server.script(lost(mails, how))
    users = made()
    with pytest.raises(LookupUnavailableError):
        users.write("POST", "/mails", {"to": "ada"})
    assert mails.sent == [{"to": "ada"}]
    assert len(server.requests) == 1
    assert "Idempotency-Key" not in server.requests[0].headers
    assert counts_of(users) == {"calls": 1, "failures": 1}


def test_what_was_never_sent_is_sent_without_a_key_too(
    server: ScriptedHttp, made: Callable[..., HttpLookup], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody listens at first."""
    mails = Mails()
    users = made(base_url=f"http://127.0.0.1:{free_port()}", attempts=3)
    with pytest.raises(LookupUnavailableError, match="ConnectError"):
        users.write("POST", "/mails", {"to": "ada"})
    assert counts_of(users)["retries"] == 2
    server.responder = mails
    opened = made(breaker_failures=1, breaker_reset="50ms", attempts=9)
    server.script(Answer(503))
    with pytest.raises(LookupUnavailableError, match="503"):
        opened.write("POST", "/mails", {"to": "ada"})
    assert opened.write("POST", "/mails", {"to": "bob"}) == {"mail": 1}, "the open breaker was waited for"
    assert mails.sent == [{"to": "bob"}]


def test_a_conflict_may_be_the_first_try_still_at_work(server: ScriptedHttp, made: Callable[..., HttpLookup]) -> None:
    mails = Mails()
    server.responder = mails
    server.script(lost(mails, CUT), Answer(409), Answer(409))
    users = made(attempts=4)
    assert users.write("POST", "/mails", {"to": "ada"}, idempotency_key="k") == {"mail": 1}
    assert len(server.requests) == 4
    server.responder = lambda _: Answer(409)
    with pytest.raises(LookupRefusedError, match="409"):
        users.write("POST", "/mails", {"to": "ada"}, idempotency_key="k")
    assert len(server.requests) == 8, "in the end it is what it says: refused, and no reason to wait"
    with pytest.raises(LookupRefusedError, match="409"):
        users.write("POST", "/mails", {"to": "ada"})
    assert len(server.requests) == 9


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_methods_and_bodies(server: ScriptedHttp, made: Callable[..., HttpLookup], method: str) -> None:
    server.script(Answer(204), Answer(200, b""), Answer(202, {"at": "work"}))
    users = made()
    body = None if method == "DELETE" else {"name": "Ädä", "n": [1, None, 2.5]}
    assert [users.write(method, "/users/1", body) for _ in range(3)] == [None, None, {"at": "work"}]
    for request in server.requests:
        assert (request.method, request.path) == (method, "/users/1")
        assert request.body == b"" if body is None else request.json == body


@pytest.mark.parametrize("status", [400, 404, 410, 422])
def test_a_refused_write_is_refused(server: ScriptedHttp, made: Callable[..., HttpLookup], status: int) -> None:
    server.responder = lambda _: Answer(status)
    with pytest.raises(LookupRefusedError, match=f"answered {status} to POST /mails"):
        made().write("POST", "/mails", {}, idempotency_key="k")
    assert len(server.requests) == 1


def test_every_order_is_mailed_once_whatever_is_lost(
    server: ScriptedHttp, made: Callable[..., HttpLookup], stream: EventStream, seed: random.Random
) -> None:
    """Answers are lost so often that handlers run again; the key is that of the record, so nothing is sent twice."""
    mails = Mails()
    users = made(attempts=3, breaker_failures=10_000, bulk_path=None)

    def responder(request: Request) -> Answer:
        step = seed.random()
        if step < 0.15:
            return seed.choice([CUT, Answer(503)])
        answer = mails(request)
        return answer if step < 0.8 else seed.choice([CUT, Answer(504), Answer(201, {"mail": 1}, cut_at=4)])

    server.responder = responder

    @consumer(topic=ORDERS, isolate="per_event", concurrency=4, retry=FAST, max_batch=Threshold(events=6))
    def mail(record: Record, users: HttpLookup) -> None:
        users.write("POST", "/mails", record.data, idempotency_key=record.idempotency_key)

    stream.create_topic(ORDERS)
    stream.publish(ORDERS, [ORDERS.event(n=n) for n in range(60)])
    for _ in range(1000):
        try:
            run_pending(stream, mail, resources={"users": users})
        except RetriesExhaustedError:
            continue
        break
    assert sorted(body["n"] for body in mails.sent) == list(range(60))
    assert stream.dead_letters() == []
    assert stream.pending("mail").events == 0
    assert len(server.requests) > 70


def test_a_replayed_batch_writes_with_the_same_keys(
    server: ScriptedHttp, made: Callable[..., HttpLookup], stream: EventStream
) -> None:
    """What follows the write fails, and the whole batch is handled again."""
    mails = Mails()
    server.responder = mails
    attempts: list[int] = []

    @consumer(topic=ORDERS, retry=FAST)
    def mail(batch: Batch, users: HttpLookup) -> None:
        attempts.append(batch.attempt)
        for record in batch:
            users.write("POST", "/mails", record.data, idempotency_key=record.idempotency_key)
        if batch.attempt < 3:
            raise OSError("something else is away")

    stream.create_topic(ORDERS)
    stream.publish(ORDERS, [ORDERS.event(n=n) for n in range(5)])
    run_pending(stream, mail, resources={"users": made()})
    assert attempts == [1, 2, 3]
    assert [body["n"] for body in mails.sent] == [0, 1, 2, 3, 4]
    assert len(server.requests) == 15
    assert len({request.headers["Idempotency-Key"] for request in server.requests}) == 5
