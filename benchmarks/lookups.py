"""10,000 events over 500 users, whose names a service has: asked for one by one, all at once, and as look-ups do it.

The service is a process of its own, asyncio on a socket; it answers each request, of one user or of many, after 2 ms.
It counts them. The peers have the events in a list, and do nothing but ask: ``httpx.Client`` in a loop, timed over a
fifth of the events; and ``asyncio.gather`` of all of them on an ``httpx.AsyncClient`` with its usual hundred
connections, behind a semaphore (with more requests than connections its pool looks at all of them for each, which is
quadratic). Ours are whole runs of `run_pending`, which read the events from a stream and emit each with its user's
name: ``users.get_many`` of a batch, and ``users.get`` of each event, sixteen of them handled at the same time. Whatever
was found is looked at afterwards, and so is what the service has counted.

``python -m benchmarks.lookups PORT`` is the service.
"""

import asyncio
import json
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count as counter
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx

from benchmarks.harness import BATCH, Row, Settings, against, alternate, seconds
from djp_dagster import Batch, Consumer, EventStream, HttpLookup, Record, Topic, consumer, open_stream, run_pending
from tests.servers.ports import free_port

EVENTS = 10_000
USERS = 500
LATENCY_S = 0.002
AT_ONCE = 16
ORDERS = Topic("orders")
NAMED = Topic("named")
_FEWER = 5
_CONNECTIONS = 100
_PATIENCE_S = 30.0
_numbers = counter()


def name_of(user: int) -> str:
    """What the service says."""
    return f"User Number {user}"


# The service


class _Service(asyncio.Protocol):
    requests = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self._received = transport, b""
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        self._received += data
        while b"\r\n\r\n" in self._received:
            head, self._received = self._received.split(b"\r\n\r\n", 1)
            target = head.split(b" ", 2)[1].decode()
            if target == "/requests":
                self._answer(_Service.requests)
                _Service.requests = 0
            else:
                _Service.requests += 1
                asyncio.get_running_loop().call_later(LATENCY_S, self._answer, _found(target))

    def _answer(self, value: object) -> None:
        body = json.dumps(value).encode()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        self._transport.write(head + body)


def _found(target: str) -> object:
    url = urlsplit(target)
    if url.query:
        return [_user(int(one)) for one in parse_qs(url.query)["ids"][0].split(",")]
    return _user(int(url.path.rpartition("/")[2]))


def _user(number: int) -> dict[str, object]:
    return {"id": number, "name": name_of(number), "email": f"user-{number}@example.org"}


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(_Service, "127.0.0.1", port, backlog=512)
    await server.serve_forever()


@contextmanager
def _service() -> Iterator[str]:
    """The service in a process; where it is."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.lookups", str(port)])
    try:
        url, give_up = f"http://127.0.0.1:{port}", time.monotonic() + _PATIENCE_S
        while not _listens(port):
            assert process.poll() is None, "the service ended"
            assert time.monotonic() < give_up, "the service did not begin"
            time.sleep(0.02)
        yield url
    finally:
        process.kill()
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# The peers


def _one_by_one(url: str, users: Sequence[int]) -> list[str]:
    with httpx.Client(base_url=url) as client:
        return [client.get(f"/users/{user}").raise_for_status().json()["name"] for user in users]


def _gathered(url: str, users: Sequence[int]) -> list[str]:
    async def ask(client: httpx.AsyncClient, places: asyncio.Semaphore, user: int) -> str:
        async with places:
            return str((await client.get(f"/users/{user}")).raise_for_status().json()["name"])

    async def gather() -> list[str]:
        places = asyncio.Semaphore(_CONNECTIONS)
        async with httpx.AsyncClient(base_url=url) as client:
            return await asyncio.gather(*(ask(client, places, user) for user in users))

    return asyncio.run(gather())


# Ours


@consumer(topic=ORDERS, emits=[NAMED])
def by_batch(batch: Batch, users: HttpLookup) -> None:
    known = users.get_many(record.data["user"] for record in batch)
    for record in batch:
        batch.emit(NAMED.event(name=known[record.data["user"]]["name"]))


@consumer(topic=ORDERS, emits=[NAMED], isolate="per_event", concurrency=AT_ONCE)
def by_event(record: Record, batch: Batch, users: HttpLookup) -> None:
    batch.emit(NAMED.event(name=users.get(record.data["user"])["name"]))


def _published(folder: Path, users: Sequence[int]) -> EventStream:
    stream = open_stream(folder / f"lookups-{next(_numbers)}.db")
    stream.create_topic(ORDERS)
    for start in range(0, len(users), BATCH):
        stream.publish(ORDERS, [ORDERS.event(user=user) for user in users[start : start + BATCH]])
    return stream


def _processed(folder: Path, url: str, users: Sequence[int], what: Consumer) -> float:
    lookup = HttpLookup(base_url=url, path="/users/{key}", bulk_path="/users")
    with _published(folder, users) as stream:
        took = seconds(lambda: run_pending(stream, what, resources={"users": lookup}))
        found = [record.data["name"] for record in stream.records(NAMED, 0)]
    lookup.close()
    _require_right(found, users)
    return took


def _asked(users: Sequence[int], ask: Callable[[], list[str]]) -> float:
    found: list[str] = []
    took = seconds(lambda: found.extend(ask()))
    _require_right(found, users)
    return took


def _require_right(found: Sequence[str], users: Sequence[int]) -> None:
    assert list(found) == [name_of(user) for user in users], "somebody got another's name"


# The comparison


def run(settings: Settings) -> list[Row]:
    """All four, in turn."""
    events = settings.events(EVENTS)
    chance = random.Random(7)
    users = [*range(min(USERS, events)), *(chance.randrange(USERS) for _ in range(events - min(USERS, events)))]
    chance.shuffle(users)
    few = users[: events // _FEWER]
    with _service() as url:
        loops: dict[str, Callable[[], float]] = {
            "loop": lambda: _asked(few, partial(_one_by_one, url, few)) * _FEWER,
            "gather": lambda: _asked(users, partial(_gathered, url, users)),
            "get_many": lambda: _processed(settings.folder, url, users, by_batch),
            "get": lambda: _processed(settings.folder, url, users, by_event),
        }
        calls: dict[str, list[int]] = {name: [] for name in loops}
        took = alternate(settings.rounds, {name: partial(_counted, url, loops[name], calls[name]) for name in loops})
    assert set(calls["loop"]) == {len(few)}
    assert set(calls["gather"]) == {events}
    assert set(calls["get_many"]) == {-(-len(set(users)) // 100)}, "as few as there can be"
    return _rows(events, took, {name: statistics.median(found) for name, found in calls.items()})


def _counted(url: str, loop: Callable[[], float], calls: list[int]) -> float:
    """How long it takes; what the service has counted meanwhile is noted."""
    took = loop()
    calls.append(int(httpx.get(f"{url}/requests").json()))
    return took


def _rows(events: int, took: dict[str, list[float]], calls: dict[str, float]) -> list[Row]:
    peers = {"loop": "httpx, a loop", "gather": "asyncio.gather, httpx"}
    ours = {"get_many": "look-ups, get_many of a batch", "get": f"look-ups, get of each event, {AT_ONCE} at once"}
    rows = []
    for name, what in ours.items():
        rows += [_against(f"{what} / {peers[peer]}", events, took[name], took[peer]) for peer in peers]
        rows.append(Row("  calls", f"{calls[name]:,.0f}", f"{events:,}", f"{events / calls[name]:,.1f}x fewer"))
    return rows


def _against(what: str, events: int, ours: Sequence[float], peer: Sequence[float]) -> Row:
    """As `against`, for rates that are below a thousand a second."""
    rates = [f"{events / statistics.median(figures):,.0f}/s" for figures in (ours, peer)]
    return replace(against(what, events, ours, peer), ours=rates[0], peer=rates[1])


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1])))
