"""Credentials are in no log, error, traceback or representation, whatever goes wrong."""

import io
import logging
import pickle
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from rich.console import Console
from rich.pretty import pprint

from djp_dagster import Batch, EventStream, HttpLookup, Topic, consumer, run_pending
from djp_dagster.errors import DjpError, InvalidSettingError
from djp_dagster.lookups.http import HttpService, HttpSettings
from tests.lookups.kit import Users, users_of
from tests.servers.ports import free_port
from tests.servers.scripted_http import CUT, NEVER, Answer, ScriptedHttp

Closing = Callable[[Any], Any]
SECRETS = {
    "token": "t0ken-9f3a",
    "password": "passw0rd-77c1",
    "header": "h3ader-4be2",
    "query": "qu3ry-d05c",
    "body": "b0dy-1aa8",
    "cookie": "c00kie-5e6f",
}
MAILS = Topic("mails")
ANSWERS = [
    Answer(body=b'{"id": 1, "mail": "ok"}', headers={"Set-Cookie": f"session={SECRETS['cookie']}"}),
    Answer(404),
    Answer(204),
    CUT,
    Answer(body={"id": 1}, cut_at=2),
    NEVER,
    Answer(500, body=SECRETS["body"].encode()),
    Answer(429, headers={"Retry-After": "0.001"}),
    Answer(400, body=SECRETS["body"].encode()),
    Answer(401, body=SECRETS["body"].encode()),
    Answer(302, headers={"Location": f"/login?next={SECRETS['query']}"}),
    Answer(body=SECRETS["body"].encode()),
    Answer(body=b"{}", headers={"Content-Encoding": "gzip"}),
    Answer(body=b"x" * 2000),
    Answer(body=[SECRETS["body"]]),
]


class Heard:
    """All that is logged, by anybody, at any level, with tracebacks."""

    def __init__(self) -> None:
        self.text = io.StringIO()
        self._handler = logging.StreamHandler(self.text)
        self._handler.setFormatter(logging.Formatter("%(name)s %(levelname)s %(message)s"))

    def __enter__(self) -> "Heard":
        root = logging.getLogger()
        self._level = root.level
        root.addHandler(self._handler)
        root.setLevel(logging.DEBUG)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self._handler)
        logging.getLogger().setLevel(self._level)


@pytest.fixture
def heard() -> Iterator[Heard]:
    with Heard() as listening:
        yield listening


def require_secret(*texts: str) -> None:
    for text in texts:
        for name, secret in SECRETS.items():
            assert secret not in text, f"the {name} is told: {text}"


def all_of(error: BaseException) -> str:
    """All that anybody can print of an error, with what has led to it."""
    console = Console(file=io.StringIO(), width=1000)
    chain: list[BaseException | None] = [error]
    while chain[-1] is not None:
        chain.append(chain[-1].__cause__ or chain[-1].__context__)
    for one in chain[:-1]:
        assert one is not None
        console.print(repr(one), str(one), repr(vars(one)), repr(one.args), repr(getattr(one, "request", None)))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue() + "".join(traceback.format_exception(error))


def with_secrets(server: ScriptedHttp, *, user: bool, **more: Any) -> HttpLookup:
    host = server.url.removeprefix("http://")
    return users_of(
        server,
        **{
            "base_url": f"http://ada:{SECRETS['password']}@{host}" if user else server.url,
            "token": None if user else SECRETS["token"],
            "headers": {"X-Key": SECRETS["header"]},
            "path": f"/users/{{key}}?key={SECRETS['query']}",
            "bulk_path": f"/users?key={SECRETS['query']}",
            "timeout": "100ms",
            "max_bytes": "1kB",
            "attempts": 2,
            **more,
        },
    )


@pytest.mark.parametrize("user", [False, True], ids=["token", "user"])
@pytest.mark.parametrize("answer", ANSWERS, ids=[f"{number}" for number in range(len(ANSWERS))])
def test_whatever_the_service_answers(
    server: ScriptedHttp, closing: Closing, heard: Heard, answer: Answer, user: bool
) -> None:
    server.responder = lambda _: answer
    users = closing(with_secrets(server, user=user))
    mails = f"/mails?key={SECRETS['query']}"
    asks: list[Callable[[], Any]] = [
        lambda: users.get("key"),
        lambda: users.get_many(["one", "two"]),
        lambda: users.write("POST", mails, {"to": SECRETS["body"]}, idempotency_key="k"),
    ]
    told = []
    for ask in asks:
        try:
            ask()
        except DjpError as error:
            told.append(all_of(error) + all_of(pickle.loads(pickle.dumps(error))))
    require_secret(heard.text.getvalue(), *told)
    for request in server.requests:
        assert request.headers["X-Key"] == SECRETS["header"], "it was sent"
        assert request.query["key"] == SECRETS["query"]
        assert request.headers["Authorization"] != ""


def test_nobody_listens(server: ScriptedHttp, closing: Closing, heard: Heard) -> None:
    users = closing(with_secrets(server, user=False, base_url=f"http://127.0.0.1:{free_port()}"))
    with pytest.raises(DjpError) as caught:
        users.get("key")
    require_secret(all_of(caught.value), heard.text.getvalue())


def test_the_logs_of_others_are_not_hushed(server: ScriptedHttp, closing: Closing, heard: Heard) -> None:
    import httpx

    server.responder = Users([1])
    users = closing(users_of(server))
    assert users.get(1) is not None
    assert "HTTP Request" not in heard.text.getvalue()
    with httpx.Client() as client:
        client.get(f"{server.url}/users/1")
    assert f"httpx INFO HTTP Request: GET {server.url}/users/1" in heard.text.getvalue()


def test_representations(server: ScriptedHttp, closing: Closing) -> None:
    # Paths are shown, and a secret in them with them: they are settings like any other.
    paths = {"path": "/users/{key}", "bulk_path": "/users"}
    for user in (False, True):
        users = closing(with_secrets(server, user=user, **paths))
        things: list[Any] = [users, users.lookup, users.lookup.policy, users.service, users._settings()]
        shown = io.StringIO()
        pprint(things, console=Console(file=shown), expand_all=True)
        require_secret(shown.getvalue(), *map(repr, things), *map(str, things), repr(users.service._client))


@pytest.mark.parametrize(
    "settings",
    [
        {"token": SECRETS["token"] + "\n"},
        {"token": "ä" + SECRETS["token"]},
        {"headers": {"X-Key": SECRETS["header"] + "\r\n"}},
        {"headers": {SECRETS["header"] + ":\n": "x"}},
        {"base_url": f"ftp://ada:{SECRETS['password']}@host"},
        {"base_url": f"http://ada:{SECRETS['password']}@host:port"},
        {"base_url": f"http://ada:{SECRETS['password']}@[host"},
        {"base_url": f"http://ada:{SECRETS['password']}@host", "token": SECRETS["token"]},
        {"base_url": f"http://host?key={SECRETS['query']}"},
        {"path": f"/users?key={SECRETS['query']}"},
    ],
)
def test_wrong_settings_are_not_shown(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidSettingError) as caught:
        HttpService("users", HttpSettings(**{"base_url": "http://host", **settings}))
    require_secret(all_of(caught.value))


def test_in_a_batch_that_fails(server: ScriptedHttp, closing: Closing, heard: Heard, stream: EventStream) -> None:
    """Neither in the log, nor in the dead letters."""
    users = closing(with_secrets(server, user=False))
    server.responder = lambda _: Answer(400, body=SECRETS["body"].encode())

    @consumer(topic=MAILS)
    def mail(batch: Batch, users: HttpLookup) -> None:
        users.get_many(record.data["user"] for record in batch)

    stream.create_topic(MAILS)
    stream.publish(MAILS, [MAILS.event(user=f"user-{number}") for number in range(3)])
    run_pending(stream, mail, resources={"users": users})
    letters = stream.dead_letters("mail")
    assert {letter.error_type for letter in letters} == {"LookupRefusedError"}
    assert "answered 400 to GET /users" in str(letters[0].error)
    assert "handler mail failed on batch" in heard.text.getvalue()
    require_secret(heard.text.getvalue(), repr(letters))
