"""A service that is asked by HTTP: what its answers mean, and what becomes of those that are late, broken, or none."""

import gzip
import json
import random
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from typing import Any

import pytest

from djp_dagster import HttpLookup
from djp_dagster.errors import (
    DjpError,
    InvalidSettingError,
    LookupForbiddenError,
    LookupRefusedError,
    LookupUnavailableError,
)
from djp_dagster.lookups.http import HttpService, HttpSettings, _retry_after_s
from tests.lookups.kit import Users, counts_of, users_of
from tests.servers.ports import free_port
from tests.servers.scripted_http import CUT, NEVER, Answer, ScriptedHttp

Closing = Callable[[Any], Any]


@pytest.fixture
def made(server: ScriptedHttp, closing: Closing) -> Callable[..., HttpLookup]:
    """Makes a look-up of the server, which is closed after the test."""
    return lambda **settings: closing(users_of(server, **settings))


def targets(server: ScriptedHttp) -> list[str]:
    return [request.target for request in server.requests]


# What is asked, and how


def test_one_key_by_its_path_and_many_in_bulk(server: ScriptedHttp, made: Callable[..., HttpLookup]) -> None:
    server.responder = Users([1, 2, 3])
    users = made(token="secret", headers={"X-Team": "mail"})
    assert users.get(2) == {"id": 2, "name": "user 2"}
    assert users.get(9) is None
    assert users.get_many([3, 1, 9]) == {3: {"id": 3, "name": "user 3"}, 1: {"id": 1, "name": "user 1"}}
    assert targets(server) == ["/users/2", "/users/9", "/users?ids=3,1,9"]
    for request in server.requests:
        assert request.headers["Authorization"] == "Bearer secret"
        assert request.headers["X-Team"] == "mail"
        assert request.headers["Accept"] == "application/json"
    assert server.connections == 1, "also after a 404"


def test_without_a_path_one_key_is_asked_for_in_bulk_too(server: ScriptedHttp, made: Callable[..., HttpLookup]) -> None:
    server.responder = Users([1])
    users = made(path=None)
    assert users.get(1) == {"id": 1, "name": "user 1"}
    assert users.get(2, "nobody") == "nobody"
    assert targets(server) == ["/users?ids=1", "/users?ids=2"]


def test_without_bulk_each_key_is_a_call(server: ScriptedHttp, made: Callable[..., HttpLookup]) -> None:
    server.responder = Users(range(20))
    users = made(bulk_path=None)
    assert list(users.get_many(range(25))) == list(range(20))
    assert sorted(targets(server)) == sorted(f"/users/{number}" for number in range(25))
    assert counts_of(users) == {"keys": 25, "calls": 25, "fetched": 25, "not_found": 5}
    bare = made(path=None, bulk_path=None, base_url=f"{server.url}/users/")
    assert bare.get(3) == {"id": 3, "name": "user 3"}


@pytest.mark.parametrize(("shape", "items"), [("list", None), ("object", None), ("items", "users")])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_bulk_answers_in_every_shape(
    server: ScriptedHttp, made: Callable[..., HttpLookup], shape: str, items: str | None, method: str
) -> None:
    server.responder = Users(range(250), shape=shape)
    users = made(bulk_path="/users/search" if method == "POST" else "/users", bulk_method=method, items=items)
    found = users.get_many(range(300))
    assert found == {number: {"id": number, "name": f"user {number}"} for number in range(250)}
    assert len(server.requests) == 3
    assert {request.method for request in server.requests} == {method}
    assert users.get_many([250, 260]) == {}


def test_numbers_texts_and_nothing_in_one_batch(server: ScriptedHttp, made: Callable[..., HttpLookup]) -> None:
    service = Users([1, 2])
    server.responder = service
    users = made()
    assert users.get_many([1, "1", 2, "3"]) == {1: service.known["1"], "1": service.known["1"], 2: service.known["2"]}
    server.responder = lambda _: Answer(body={"1": None, "2": {"id": 2}})
    assert users.get_many([1, 2]) == {2: {"id": 2}}
    server.responder = lambda _: Answer(body=b"null")
    assert users.get(1, "nobody") == "nobody"
    server.responder = lambda _: Answer(204)
    assert users.get(1, "nobody") == "nobody"
    assert users.get_many([1, 2]) == {}


@pytest.mark.parametrize("key", ["a/b", "a?b=c#d", "ü ☃", "%2e%2e", "a b", "a&b", "..a", "a'\"\\", "x" * 3000])
def test_any_key_comes_as_it_is(server: ScriptedHttp, made: Callable[..., HttpLookup], key: str) -> None:
    service = Users([key, "other"])
    server.responder = service
    users = made()
    assert users.get(key) == service.known[key]
    assert users.get_many([key, "other"]) == service.known
    assert service.asked == {key: 2, "other": 1}


@pytest.mark.parametrize("key", ["", ".", ".."])
def test_a_key_that_would_name_another_path_is_refused(
    server: ScriptedHttp, made: Callable[..., HttpLookup], key: str
) -> None:
    server.responder = lambda _: Answer(body={"secrets": "of the service"})
    users = made(bulk_path=None)
    for ask in (users.get, lambda one: users.get_many([one])):
        with pytest.raises(LookupRefusedError, match="it would name another path") as caught:
            ask(key)
        assert caught.value.facts["key"] == key
    assert server.requests == []
    in_a_name = made(bulk_path=None, path="/users/{key}.json")
    assert in_a_name.get(key) == {"secrets": "of the service"}


def test_keys_with_commas_go_alone(server: ScriptedHttp, made: Callable[..., HttpLookup]) -> None:
    service = Users(["a", "b", "a,b", "c"])
    server.responder = service
    assert made().get_many(["a", "a,b", "b", "c"]) == service.known
    assert sorted(targets(server)) == ["/users/a", "/users/a%2Cb", "/users?ids=b,c"]
    with pytest.raises(LookupRefusedError, match="joined by commas"):
        made(path=None).get_many(["a", "a,b"])
    posting = made(path=None, bulk_method="POST", bulk_path="/users/search")
    assert posting.get_many(["a", "a,b", "b", "c"]) == service.known


def test_no_url_is_too_long(server: ScriptedHttp, made: Callable[..., HttpLookup], seed: random.Random) -> None:
    wanted = ["ü" * seed.randint(1, 200) + str(number) for number in range(100)]
    service = Users(wanted)
    server.responder = service
    assert made().get_many(wanted) == service.known
    assert max(map(len, targets(server))) < 4000
    assert len(server.requests) < 50
    service.asked.clear()
    server.requests.clear()
    uuids = [f"{number:036d}" for number in range(100)]
    assert made().get_many(uuids) == {}
    assert len(server.requests) == 1, "a hundred keys of 36 letters are one call"


def test_paths_keep_their_query_and_stay_below_the_base(server: ScriptedHttp, made: Callable[..., HttpLookup]) -> None:
    server.responder = lambda _: Answer(404)
    users = made(base_url=f"{server.url}/v1/", path="users/{key}?fields=name", bulk_path="/users?fields=name")
    users.get(1)
    with pytest.raises(LookupRefusedError):
        users.get_many([1, 2])
    for path in ("https://elsewhere.org/x", "//elsewhere.org/x", "x"):
        with pytest.raises(LookupRefusedError, match="answered 404 to POST"):
            users.write("POST", path, {})
    for path in ("/../../x", "/x/./y", ".."):
        with pytest.raises(LookupRefusedError, match="it would name another path"):
            users.write("POST", path, {})
    assert targets(server) == [
        "/v1/users/1?fields=name",
        "/v1/users?fields=name&ids=1,2",
        "/v1/https://elsewhere.org/x",
        "/v1/elsewhere.org/x",
        "/v1/x",
    ]


# Answers that pass


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 507, 520, 522, 529, 599])
def test_what_may_pass_is_asked_again(server: ScriptedHttp, made: Callable[..., HttpLookup], status: int) -> None:
    server.script(*[Answer(status)] * 2)
    server.responder = Users([1])
    users = made()
    assert users.get(1) == {"id": 1, "name": "user 1"}
    assert len(server.requests) == 3
    assert counts_of(users) == {"keys": 1, "calls": 3, "fetched": 3, "failures": 2, "retries": 2}


@pytest.mark.parametrize(
    "broken",
    [
        CUT,
        Answer(body={"id": 1}, cut_at=0),
        Answer(body={"id": 1}, cut_at=3),
        Answer(body={"id": 1}, cut_at=3, chunked=True),
        Answer(503, body=b"x" * 1000, cut_at=10),
    ],
    ids=["no answer", "headers", "half a body", "half a chunked body", "half an error"],
)
def test_half_an_answer_is_none(server: ScriptedHttp, made: Callable[..., HttpLookup], broken: Answer) -> None:
    server.script(broken, broken)
    server.responder = Users([1])
    assert made().get(1) == {"id": 1, "name": "user 1"}
    assert len(server.requests) == 3


def test_nobody_listens(server: ScriptedHttp, made: Callable[..., HttpLookup]) -> None:
    users = made(base_url=f"http://127.0.0.1:{free_port()}")
    with pytest.raises(LookupUnavailableError, match=r"127\.0\.0\.1:\d+ did not answer GET /users/1: ConnectError"):
        users.get(1)
    assert counts_of(users)["retries"] == 3


def test_a_connection_that_was_closed_meanwhile(server: ScriptedHttp, made: Callable[..., HttpLookup]) -> None:
    server.responder = Users([1])
    users = made(attempts=2)
    for _ in range(5):
        assert users.get(1) is not None
        server._listener.cut_all()
    assert server.connections == 5


@pytest.mark.parametrize(
    "late",
    [
        NEVER,
        Answer(body={"id": 1}, delay_s=20),
        Answer(body={"id": 1, "text": "x" * 100}, piece=1, pause_s=0.05),
        Answer(body={"id": 1, "text": "x" * 100}, piece=1, pause_s=0.05, chunked=True),
        Answer(503, body=b"x" * 100, piece=1, pause_s=0.05),
    ],
    ids=["never", "late", "slow body", "slow chunked body", "slow error"],
)
def test_a_call_has_only_so_long(server: ScriptedHttp, made: Callable[..., HttpLookup], late: Answer) -> None:
    """As a whole: pieces that come in time do not prolong it."""
    server.script(late)
    server.responder = Users([1])
    users = made(timeout="300ms", attempts=1)
    started = time.monotonic()
    with pytest.raises(LookupUnavailableError):
        users.get(1)
    assert 0.25 < time.monotonic() - started < 2.0
    assert users.get(1) == {"id": 1, "name": "user 1"}


def test_a_body_in_pieces_is_whole_if_it_comes_in_time(server: ScriptedHttp, made: Callable[..., HttpLookup]) -> None:
    body = {"id": 1, "text": "x" * 1000}
    server.script(*[Answer(body=body, piece=100, pause_s=0.001, chunked=chunked) for chunked in (True, False)])
    users = made()
    assert users.get(1) == body
    assert users.get(1) == body
    server.script(Answer(body=gzip.compress(json.dumps(body).encode()), headers={"Content-Encoding": "gzip"}))
    assert users.get(1) == body


# Retry-After


@pytest.mark.parametrize("status", [429, 503])
def test_the_service_says_when_to_come_again(
    server: ScriptedHttp, made: Callable[..., HttpLookup], status: int
) -> None:
    server.script(Answer(status, headers={"Retry-After": "0.3"}))
    server.responder = Users([1])
    assert made().get(1) is not None
    first, second = server.requests
    assert 0.3 <= second.at - first.at < 5


def test_a_date_is_as_good(server: ScriptedHttp, made: Callable[..., HttpLookup]) -> None:
    due = datetime.now(timezone.utc) + timedelta(seconds=2)
    server.script(Answer(503, headers={"Retry-After": format_datetime(due, usegmt=True)}))
    server.responder = Users([1])
    assert made().get(1) is not None
    whole = due.replace(microsecond=0)
    assert datetime.now(timezone.utc) >= whole
    first, second = server.requests
    assert second.at - first.at > 0.5


def test_more_than_there_is_time_for_is_told_at_once(server: ScriptedHttp, made: Callable[..., HttpLookup]) -> None:
    """And until then nobody calls, whoever asks."""
    server.script(Answer(429, headers={"Retry-After": "86400"}))
    users = made()
    started = time.monotonic()
    for key in range(5):
        with pytest.raises(LookupUnavailableError) as caught:
            users.get(key)
        assert caught.value.facts["retry_after_s"] == pytest.approx(3600, abs=10)
    assert time.monotonic() - started < 10
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, 0.0),
        ("7", 7.0),
        (" 7 ", 7.0),
        ("0.5", 0.5),
        ("-3", 0.0),
        ("nan", 0.0),
        ("inf", 3600.0),
        ("1e99", 3600.0),
        ("86400", 3600.0),
        ("", 0.0),
        ("soon", 0.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 3600.0),
        ("Fri, 31 Dec 99999 23:59:59 GMT", 0.0),
        ("Fri, 99 Dec 2030 23:59:59 GMT", 0.0),
        ("1, 2", 0.0),
    ],
)
def test_retry_after_of_all_kinds(header: str | None, seconds: float) -> None:
    assert _retry_after_s(header) == seconds


# Answers that do not pass


@pytest.mark.parametrize("status", [400, 405, 409, 413, 414, 422, 431, 451, 501, 505])
def test_a_refusal_is_final(server: ScriptedHttp, made: Callable[..., HttpLookup], status: int) -> None:
    server.responder = lambda _: Answer(status)
    users = made()
    with pytest.raises(LookupRefusedError, match=f"answered {status} to GET /users/1: ") as caught:
        users.get(1)
    assert caught.value.facts["status"] == status
    assert len(server.requests) == 1
    assert "failures" not in counts_of(users)


@pytest.mark.parametrize("status", [401, 403, 407])
def test_a_service_that_does_not_like_us_is_fatal(
    server: ScriptedHttp, made: Callable[..., HttpLookup], status: int
) -> None:
    server.responder = lambda _: Answer(status, headers={"WWW-Authenticate": "Bearer"})
    with pytest.raises(LookupForbiddenError, match="check the token"):
        made(token="wrong").get(1)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308, 304])
def test_redirects_are_not_followed(server: ScriptedHttp, made: Callable[..., HttpLookup], status: int) -> None:
    """The token would go wherever they lead."""
    with ScriptedHttp(Users([1])) as elsewhere:
        server.responder = lambda request: Answer(status, headers={"Location": elsewhere.url + request.target})
        with pytest.raises(LookupRefusedError, match="redirects are not followed"):
            made(token="secret").get(1)
        assert elsewhere.requests == []


def test_an_answer_that_is_too_large_is_not_read_to_its_end(
    server: ScriptedHttp, made: Callable[..., HttpLookup]
) -> None:
    server.responder = lambda _: Answer(body=b"x" * 1_000_000, piece=100_000, pause_s=0.001, chunked=True)
    users = made(max_bytes="200kB")
    with pytest.raises(LookupRefusedError, match="more than max_bytes=200000"):
        users.get(1)
    server.responder = lambda _: Answer(
        body=gzip.compress(b"0" * 50_000_000), headers={"Content-Encoding": "gzip"}, piece=10_000
    )
    with pytest.raises(LookupRefusedError, match="more than max_bytes=200000"):
        users.get(1)
    server.responder = lambda _: Answer(503, body=b"x" * 1_000_000)
    with pytest.raises(LookupUnavailableError):
        users.get(1)
    server.responder = Users([1])
    assert users.get(1) is not None


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>down for maintenance</html>", b'{"id": 1', b"\xff\xfe", b"nul"],
    ids=["nothing", "html", "half", "bytes", "word"],
)
def test_what_is_no_json_is_refused(server: ScriptedHttp, made: Callable[..., HttpLookup], body: bytes) -> None:
    server.responder = lambda _: Answer(body=body)
    for ask in (lambda: made().get(1), lambda: made().get_many([1, 2])):
        with pytest.raises(LookupRefusedError, match="is no JSON"):
            ask()


def test_a_broken_encoding_is_refused(server: ScriptedHttp, made: Callable[..., HttpLookup]) -> None:
    server.responder = lambda _: Answer(body=b"{}", headers={"Content-Encoding": "gzip"})
    with pytest.raises(LookupRefusedError, match="DecodingError"):
        made().get(1)


@pytest.mark.parametrize(
    "body",
    [
        "text",
        7,
        [1, 2],
        [{"name": "no id"}],
        [{"id": 1}, {"id": 99}],
        [{"id": 99}],
        {"data": [{"id": 1}]},
        {"error": "not today"},
    ],
)
def test_a_bulk_answer_that_is_not_as_agreed_is_refused(
    server: ScriptedHttp, made: Callable[..., HttpLookup], body: Any
) -> None:
    """Silence about a key must mean that the service does not know it."""
    server.responder = lambda _: Answer(body=body)
    with pytest.raises(LookupRefusedError, match="see bulk_key and items"):
        made().get_many([1, 2])


@pytest.mark.parametrize("body", [[{"id": 1}], {"1": {"id": 1}}, {"other": [{"id": 1}]}])
def test_an_answer_without_the_field_that_holds_the_objects(
    server: ScriptedHttp, made: Callable[..., HttpLookup], body: Any
) -> None:
    server.responder = lambda _: Answer(body=body)
    users = made(items="users")
    if isinstance(body, list):
        assert users.get_many([1, 2]) == {1: {"id": 1}}
    else:
        with pytest.raises(LookupRefusedError):
            users.get_many([1, 2])


def test_no_bulk_service_there_is_not_nobody_known(server: ScriptedHttp, made: Callable[..., HttpLookup]) -> None:
    server.responder = lambda _: Answer(404)
    with pytest.raises(LookupRefusedError, match="answered 404 to GET /users: "):
        made().get_many([1, 2])


# Settings


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("base_url", "ftp://users"),
        ("base_url", "users.internal"),
        ("base_url", "https://"),
        ("base_url", "http://[::1"),
        ("base_url", "http://host:port"),
        ("base_url", "http://host?key=value"),
        ("base_url", "http://host#part"),
        ("path", "/users"),
        ("bulk_method", "PUT"),
        ("timeout", 0),
        ("timeout", "soon"),
        ("max_bytes", "much"),
        ("token", ""),
        ("token", "abc\n"),
        ("token", "ä"),
        ("headers", {"X": ""}),
        ("headers", {"": "x"}),
        ("headers", {"X": "a\r\nY: b"}),
    ],
)
def test_wrong_settings_are_refused(setting: str, value: Any) -> None:
    """Before any event is handled, with a fatal error: no record is at fault."""
    settings: dict[str, Any] = {"base_url": "http://users", setting: value}
    with pytest.raises(InvalidSettingError, match=setting) as caught:
        HttpSettings(**settings)
    assert caught.value.facts["setting"] == setting
    settings[setting] = str(value) if setting == "timeout" else value
    resource = HttpLookup(**settings)
    with pytest.raises(InvalidSettingError, match=setting):
        resource.get(1)


def test_a_user_and_a_password_go_into_the_header(server: ScriptedHttp, made: Callable[..., HttpLookup]) -> None:
    server.responder = Users([1])
    users = made(base_url=server.url.replace("http://", "http://us%40er:p%2Fw@"))
    assert users.get(1) is not None
    assert server.requests[0].headers["Authorization"] == "Basic dXNAZXI6cC93"
    with pytest.raises(InvalidSettingError, match="token"):
        HttpSettings(base_url="http://user:password@users", token="abc")


def test_a_copy_has_settings_and_connections_of_its_own(
    server: ScriptedHttp, made: Callable[..., HttpLookup], closing: Closing
) -> None:
    server.responder = Users(range(100))
    users = made()
    users.get_many(range(100))
    fewer = closing(users.model_copy(update={"bulk_size": 25}))
    assert len(fewer.get_many(range(100))) == 100
    assert len(server.requests) == 5
    assert fewer.lookup is not users.lookup
    fewer.close()
    assert users.get(1) is not None


def test_closed_it_opens_again(server: ScriptedHttp, made: Callable[..., HttpLookup]) -> None:
    server.responder = Users([1])
    users = made()
    assert users.get(1) is not None
    users.close()
    users.close()
    assert users.get(1) is not None
    assert server.connections == 2


def test_a_service_without_a_lookup(server: ScriptedHttp, closing: Closing) -> None:
    """One try, no more: the rings are the look-up's."""
    server.script(Answer(503))
    server.responder = Users([1, 2])
    service = closing(HttpService("users", HttpSettings(base_url=server.url, path="/users/{key}", bulk_path="/users")))
    with pytest.raises(DjpError):
        service.fetch([1])
    assert service.fetch([1]) == {1: {"id": 1, "name": "user 1"}}
    assert service.fetch([]) == {}
    assert list(service.fetch([1, 2, 3])) == [1, 2]
    assert len(server.requests) == 3
