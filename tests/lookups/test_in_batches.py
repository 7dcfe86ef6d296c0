"""Look-ups within batches: nothing is lost, blamed or done twice, whatever becomes of the service or the process."""

import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from djp_dagster import (
    Batch,
    BatchReport,
    Consumer,
    EventStream,
    HttpLookup,
    Record,
    RetryPolicy,
    RunReport,
    Table,
    Threshold,
    Topic,
    TransientError,
    consumer,
    open_payload_store,
    open_stream,
    redrive,
    run_pending,
)
from djp_dagster.errors import (
    LookupForbiddenError,
    PoisonBlockedError,
    RetriesExhaustedError,
    SystemicFailureError,
)
from djp_dagster.processing import isolation
from tests.lookups import world
from tests.lookups.kit import PATIENT_S, Users, users_of, wait_until
from tests.processing.kit import NO_EVENT, all_records, append_raw, committed, values
from tests.servers.scripted_http import CUT, NEVER, Answer, Request, ScriptedHttp

ORDERS = Topic("orders")
NAMED = Topic("named")
FAST = RetryPolicy(max_attempts=2, first=0.001, longest=0.005)
REPOSITORY = Path(__file__).resolve().parents[2]
Made = Callable[..., HttpLookup]


@pytest.fixture
def made(server: ScriptedHttp, closing: Callable[[Any], Any]) -> Made:
    return lambda **settings: closing(users_of(server, **settings))


def publish(stream: EventStream, users: list[Any]) -> None:
    """An order of each of these users, numbered."""
    stream.create_topic(ORDERS)
    stream.publish(ORDERS, [ORDERS.event(user=user, n=n) for n, user in enumerate(users)])


def by_batch(**more: Any) -> Consumer:
    """Passes orders on with the names of their users; fails those nobody knows."""

    @consumer(topic=ORDERS, emits=[NAMED], group="named", retry=FAST, **more)
    def name(batch: Batch, users: HttpLookup) -> None:
        known = users.get_many(record.data["user"] for record in batch)
        for record in batch:
            user = known.get(record.data["user"])
            if user is None:
                batch.fail(record, f"no user {record.data['user']}")
            else:
                batch.emit(NAMED.event(n=record.data["n"], name=user["name"]))

    return name


def by_event(**more: Any) -> Consumer:
    """The same, event by event."""

    @consumer(topic=ORDERS, emits=[NAMED], group="named", isolate="per_event", retry=FAST, **more)
    def name(record: Record, batch: Batch, users: HttpLookup) -> None:
        user = users.get(record.data["user"])
        if user is None:
            batch.fail(record, f"no user {record.data['user']}")
        else:
            batch.emit(NAMED.event(n=record.data["n"], name=user["name"]))

    return name


KINDS: dict[str, Callable[..., Consumer]] = {
    "by batch": by_batch,
    "by event": by_event,
    "by event, at once": lambda **more: by_event(concurrency=5, **more),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def totals(report: RunReport) -> Counter[str]:
    """What all batches have counted."""
    counted: Counter[str] = Counter()
    for batch in report.batches:
        counted.update(batch.counts)
    return counted


# Calls


def test_ten_thousand_events_over_five_hundred_users_are_five_calls(
    server: ScriptedHttp, made: Made, stream: EventStream, seed: random.Random
) -> None:
    service = Users(range(500))
    server.responder = service
    wanted = [*range(500), *(seed.randrange(500) for _ in range(9_500))]
    seed.shuffle(wanted)
    publish(stream, wanted)
    report = run_pending(stream, by_batch(), resources={"users": made()})
    assert len(server.requests) == 5
    assert service.keys == [100] * 5
    (batch,) = report.batches
    assert batch.counts == {"users_keys": 10_000, "users_calls": 5, "users_fetched": 500}
    assert batch.gauges["users_keys_per_call"] == 100.0
    assert batch.gauges["users_breaker_open"] == 0.0
    assert 0 < batch.gauges["users_p50_seconds"] <= batch.gauges["users_p99_seconds"]
    assert values(stream, NAMED, "name") == [f"user {user}" for user in wanted]


def test_events_handled_at_once_share_calls(server: ScriptedHttp, made: Made, stream: EventStream) -> None:
    service = Users(range(500), delay_s=0.005)
    server.responder = service
    publish(stream, [n * 7 % 500 for n in range(1500)])
    name = by_event(concurrency=16, max_batch=Threshold(events=400))
    report = run_pending(stream, name, resources={"users": made()})
    assert values(stream, NAMED, "name") == [f"user {n * 7 % 500}" for n in range(1500)]
    counts = totals(report)
    assert counts["users_keys"] == 1500
    assert counts["users_calls"] == len(server.requests) < 1500 / 3
    assert counts["users_fetched"] == sum(service.keys) <= 1500
    assert server.most_at_once <= 2


@every_kind
def test_figures_are_those_of_the_server(
    server: ScriptedHttp, made: Made, stream: EventStream, seed: random.Random, kind: str
) -> None:
    """Batch by batch, tries and failures included."""
    service = Users(range(40))
    faults: list[Answer] = [Answer(503), CUT, Answer(429)]
    lock = threading.Lock()
    failed = 0

    def responder(request: Request) -> Answer:
        nonlocal failed
        with lock:
            fails = seed.random() < 0.2
            failed += fails
        return seed.choice(faults) if fails else service(request)

    server.responder = responder
    wanted = [seed.randrange(50) for _ in range(200)]
    publish(stream, wanted)
    users = made(bulk_size=7, attempts=50, breaker_failures=10_000)
    seen: list[tuple[int, int]] = []

    def note(report: BatchReport) -> None:
        seen.append((report.counts.get("users_calls", 0), len(server.requests)))

    name = KINDS[kind](max_batch=Threshold(events=50))
    report = run_pending(stream, name, resources={"users": users}, on_report=note)
    assert [sum(calls for calls, _ in seen[: number + 1]) for number in range(len(seen))] == [
        so_far for _, so_far in seen
    ]
    counts = totals(report)
    assert counts["users_keys"] == 200
    assert (counts["users_failures"], counts["users_retries"]) == (failed, failed)
    assert counts["users_calls"] == len(server.requests)
    assert sum(1 for user in wanted if user >= 40) == len(stream.dead_letters("named"))
    assert values(stream, NAMED) == [n for n, user in enumerate(wanted) if user < 40]


@every_kind
def test_without_a_cache_the_next_batch_sees_a_change(
    server: ScriptedHttp, made: Made, stream: EventStream, kind: str
) -> None:
    service = Users([1])
    server.responder = service
    users, name = made(), KINDS[kind]()
    for version in range(3):
        service.known["1"] = {"id": 1, "name": f"version {version}"}
        publish(stream, [1])
        counts = totals(run_pending(stream, name, resources={"users": users}))
        assert (counts["users_calls"], counts["users_cache_hits"]) == (1, 0)
    assert values(stream, NAMED, "name") == ["version 0", "version 1", "version 2"]


def test_with_a_cache_hits_are_counted(server: ScriptedHttp, made: Made, stream: EventStream) -> None:
    service = Users(range(10))
    server.responder = service
    users, name = made(cache_ttl="1h"), by_batch()
    publish(stream, list(range(5)))
    run_pending(stream, name, resources={"users": users})
    service.known["1"] = {"id": 1, "name": "changed"}
    publish(stream, list(range(10)))
    counts = totals(run_pending(stream, name, resources={"users": users}))
    assert counts == {"users_keys": 10, "users_cache_hits": 5, "users_calls": 1, "users_fetched": 5}
    assert "changed" not in values(stream, NAMED, "name")


# Not found, refused, away


@every_kind
def test_who_is_not_known_is_one_events_matter(
    server: ScriptedHttp, made: Made, stream: EventStream, kind: str
) -> None:
    """The handler decides, so no limit applies; and once the service knows them, a redrive does what is left."""
    service = Users(range(5))
    server.responder = service
    publish(stream, [n % 10 for n in range(40)])
    name = KINDS[kind](max_poison=1)
    users = made()
    report = run_pending(stream, name, resources={"users": users})
    assert values(stream, NAMED) == [n for n in range(40) if n % 10 < 5]
    letters = stream.dead_letters("named")
    assert [letter.offset for letter in letters] == [n for n in range(40) if n % 10 >= 5]
    assert {letter.error for letter in letters} == {f"no user {user}" for user in range(5, 10)}
    assert totals(report)["users_not_found"] >= 5
    service.known.update({str(user): {"id": user, "name": "late"} for user in range(5, 10)})
    redrive(stream, name, resources={"users": users})
    assert stream.dead_letters("named") == []
    assert sorted(values(stream, NAMED)) == list(range(40))


@every_kind
@pytest.mark.parametrize(
    "outage", [Answer(503), CUT, NEVER, Answer(200, {"id": 1}, cut_at=3)], ids=["503", "cut", "never", "half"]
)
def test_an_outage_moves_nothing_and_blames_nobody(
    server: ScriptedHttp, made: Made, stream: EventStream, kind: str, outage: Answer
) -> None:
    server.responder = lambda _: outage
    publish(stream, list(range(12)))
    name = KINDS[kind]()
    users = made(attempts=2, timeout="100ms", breaker_failures=3, breaker_reset="1ms")
    for _ in range(2):
        with pytest.raises(RetriesExhaustedError, match="LookupUnavailableError"):
            run_pending(stream, name, resources={"users": users})
        assert committed(stream, name) == [0]
        assert stream.dead_letters() == []
    server.responder = Users(range(12))
    report = run_pending(stream, name, resources={"users": users})
    assert values(stream, NAMED) == list(range(12))
    assert committed(stream, name) == [12]
    assert stream.dead_letters() == []
    assert totals(report)["users_calls"] > 0


@every_kind
def test_a_service_that_does_not_like_us_stops_the_group(
    server: ScriptedHttp, made: Made, stream: EventStream, kind: str
) -> None:
    server.responder = lambda _: Answer(401)
    publish(stream, list(range(30)))
    name = KINDS[kind]()
    with pytest.raises(LookupForbiddenError):
        run_pending(stream, name, resources={"users": made(attempts=4)})
    assert committed(stream, name) == [0]
    assert stream.dead_letters() == []
    # Those at the same time may have asked, too; none twice.
    assert len(server.requests) <= {"by batch": 1, "by event": 1, "by event, at once": 10}[kind]


@every_kind
def test_a_key_the_service_refuses_is_one_events_matter(
    server: ScriptedHttp, made: Made, stream: EventStream, seed: random.Random, kind: str
) -> None:
    """Also where events are handled at once, and share a call that the service refuses as a whole."""
    service = Users(range(40), delay_s=0.003)

    def responder(request: Request) -> Answer:
        ids = service._ids_of(request)
        return Answer(422) if any(not one.isdigit() for one in ids) else service(request)

    server.responder = responder
    wanted: list[Any] = list(range(40))
    bad = sorted(seed.sample(range(40), 3))
    for n in bad:
        wanted[n] = f"no-number-{n}"
    publish(stream, wanted)
    run_pending(stream, KINDS[kind](), resources={"users": made()})
    assert values(stream, NAMED) == [n for n in range(40) if n not in bad]
    letters = stream.dead_letters("named")
    assert sorted(letter.offset for letter in letters) == bad
    assert {letter.error_type for letter in letters} == {"LookupRefusedError"}


def test_the_breaker_opens_and_closes_while_batches_wait(server: ScriptedHttp, made: Made, stream: EventStream) -> None:
    server.responder = lambda _: Answer(503)
    publish(stream, list(range(20)))
    name = by_event(concurrency=4)
    users = made(attempts=2, bulk_path=None, breaker_failures=4, breaker_reset="200ms")
    with pytest.raises(RetriesExhaustedError):
        run_pending(stream, name, resources={"users": users})
    asked = len(server.requests)
    assert 4 <= asked <= 4 + 8, "those under way when it opened, and whoever tried"
    server.responder = Users(range(20))
    wait_until(lambda: _passes(stream, name, users), "the breaker to close")
    assert values(stream, NAMED) == list(range(20))


def _passes(stream: EventStream, name: Consumer, users: HttpLookup) -> bool:
    try:
        run_pending(stream, name, resources={"users": users})
    except RetriesExhaustedError:
        return False
    return True


# Events at the same time


def test_the_committed_offset_never_passes_an_unfinished_event(stream: EventStream, seed: random.Random) -> None:
    """Whatever is slow or quick, and while one of them fails; what they emit is in the order of the events."""
    delays = [seed.choice([0.0, 0.0, 0.001, 0.004]) for _ in range(150)]
    bad = set(seed.sample(range(150), 3))
    violations: list[tuple[int, int]] = []
    finished: set[int] = set()
    most, under_way = 0, 0
    lock = threading.Lock()

    @consumer(
        topic=ORDERS, emits=[NAMED], isolate="per_event", concurrency=6, max_batch=Threshold(events=20), retry=FAST
    )
    def work(record: Record, batch: Batch) -> None:
        nonlocal most, under_way
        n = record.data["n"]
        with lock:
            under_way += 1
            most = max(most, under_way)
        batch.emit(NAMED.event(n=n, part=1))
        time.sleep(delays[n])
        batch.emit(NAMED.event(n=n, part=2))
        batch.count("done")
        (offset,) = committed(stream, work)
        with lock:
            under_way -= 1
            finished.add(n)
            if offset > n or not finished.issuperset(range(offset)):
                violations.append((n, offset))
        if n in bad:
            raise ValueError(f"{n} is bad")

    publish(stream, [0] * 150)
    report = run_pending(stream, work)
    assert violations == []
    assert most == 6
    assert committed(stream, work) == [150]
    good = [n for n in range(150) if n not in bad]
    assert [(record.data["n"], record.data["part"]) for record in all_records(stream, NAMED)] == [
        (n, part) for n in good for part in (1, 2)
    ]
    assert [letter.offset for letter in stream.dead_letters("work")] == sorted(bad)
    assert totals(report)["done"] == len(good)


def test_ids_of_what_is_emitted_do_not_depend_on_who_is_quick(seed: random.Random, tmp_path: Path) -> None:
    """The same events in the same stream, one after the other, and at once: the same file, id by id."""
    ids: dict[int, list[str]] = {}
    for concurrency in (1, 8):
        path = tmp_path / f"{concurrency}.db"
        if concurrency == 1:
            with open_stream(path) as stream:
                publish(stream, list(range(50)))
        copy = tmp_path / "published.db"
        if concurrency == 1:
            copy.write_bytes(path.read_bytes())
        else:
            path.write_bytes(copy.read_bytes())

        @consumer(topic=ORDERS, emits=[NAMED], group="same", isolate="per_event", concurrency=concurrency)
        def work(record: Record, batch: Batch) -> None:
            time.sleep(seed.choice([0.0, 0.002]))
            for part in range(2):
                batch.emit(NAMED.event(n=record.data["n"], part=part))

        with open_stream(path) as stream:
            run_pending(stream, work)
            ids[concurrency] = [record.id for record in all_records(stream, NAMED)]
    assert len(set(ids[1])) == 100
    assert ids[1] == ids[8]


def test_a_transient_failure_waits_for_the_others(stream: EventStream) -> None:
    """The next attempt begins when no call of the one before is under way; nothing of it is kept."""
    failing = threading.Event()
    under_way: set[int] = set()
    overlaps: list[set[int]] = []
    attempts: Counter[int] = Counter()

    @consumer(topic=ORDERS, emits=[NAMED], isolate="per_event", concurrency=4, retry=FAST)
    def work(record: Record, batch: Batch) -> None:
        n = record.data["n"]
        attempts[n] += 1
        if batch.attempt > 1 and any(attempts[other] < batch.attempt for other in under_way):
            overlaps.append(set(under_way))
        under_way.add(n)
        try:
            batch.emit(NAMED.event(n=n))
            if n == 1 and batch.attempt == 1:
                failing.set()
                raise TransientError("away")
            # The others end after the failure.
            assert failing.wait(PATIENT_S)
        finally:
            under_way.discard(n)

    publish(stream, [0] * 30)
    report = run_pending(stream, work)
    assert overlaps == []
    assert values(stream, NAMED) == list(range(30))
    assert report.batches[0].attempt == 2
    assert stream.dead_letters() == []
    assert attempts[29] == 1


def test_what_has_not_begun_when_one_fails_is_not_begun(stream: EventStream, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: set[int] = set()
    cancelled: list[Any] = []
    all_cancelled = threading.Event()

    class Pool(ThreadPoolExecutor):
        def submit(self, *arguments: Any, **more: Any) -> Any:
            future: Any = super().submit(*arguments, **more)
            cancel = future.cancel

            def noted() -> bool:
                cancelled.append(future)
                if len(cancelled) == 3:
                    all_cancelled.set()
                return bool(cancel())

            future.cancel = noted
            return future

    @consumer(topic=ORDERS, isolate="per_event", concurrency=2, retry=RetryPolicy(max_attempts=1))
    def work(record: Record) -> None:
        begun.add(record.data["n"])
        if record.data["n"] == 0:
            wait_until(lambda: 1 in begun, "its neighbour")
            raise TransientError("away")
        all_cancelled.wait(PATIENT_S)

    monkeypatch.setattr(isolation, "ThreadPoolExecutor", Pool)
    publish(stream, [0] * 10)
    with pytest.raises(RetriesExhaustedError):
        run_pending(stream, work)
    assert all_cancelled.is_set()
    assert begun <= {0, 1, 2}, "of the four that wait for a thread or have one"


def test_no_call_is_under_way_when_a_run_has_failed(stream: EventStream) -> None:
    begun = threading.Barrier(3)
    ended: list[int] = []

    @consumer(topic=ORDERS, isolate="per_event", concurrency=3, retry=RetryPolicy(max_attempts=1))
    def work(record: Record) -> None:
        begun.wait(PATIENT_S)
        if record.data["n"] == 0:
            raise TransientError("away")
        time.sleep(0.05)  # what it stands for takes time, and would go on
        ended.append(record.data["n"])

    publish(stream, [0] * 3)
    with pytest.raises(RetriesExhaustedError):
        run_pending(stream, work)
    assert sorted(ended) == [1, 2]
    assert committed(stream, work) == [0]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("djp-work")]


@pytest.mark.parametrize("concurrency", [1, 5])
def test_more_than_max_poison_is_systemic(stream: EventStream, concurrency: int) -> None:
    """Those that raise, and those that are no events; not those that the handler fails itself."""

    @consumer(topic=ORDERS, emits=[NAMED], isolate="per_event", concurrency=concurrency, max_poison=3)
    def work(record: Record, batch: Batch) -> None:
        kind = record.data["user"]
        batch.emit(NAMED.event(n=record.data["n"])) if kind == "good" else None
        if kind == "failed":
            batch.fail(record, "not this one")
        if kind == "bad":
            raise ValueError("bad")

    def count(poison: int) -> None:
        publish(stream, ["good", "failed", "bad"] * poison + ["failed"] * 20)

    stream.create_topic(ORDERS)
    append_raw(stream, ORDERS, [NO_EVENT])
    count(2)
    run_pending(stream, work)
    assert Counter(letter.error_type for letter in stream.dead_letters("work")) == {
        "ValueError": 2,
        "Failed": 22,
        "UndecodableRecordError": 1,
    }
    (before,) = committed(stream, work)
    count(4)
    with pytest.raises(SystemicFailureError, match="ValueError: bad"):
        run_pending(stream, work)
    assert committed(stream, work) == [before]
    assert len(stream.dead_letters("work", limit=1000)) == 25


def test_block_stops_at_the_first_in_order(stream: EventStream) -> None:
    second = threading.Event()

    @consumer(topic=ORDERS, isolate="per_event", concurrency=4, on_poison="block")
    def work(record: Record) -> None:
        n = record.data["n"]
        if n == 3:
            second.set()
        if n == 2:
            assert second.wait(PATIENT_S)
        if n in (2, 3):
            raise ValueError(f"record {n}")

    publish(stream, [0] * 20)
    with pytest.raises(PoisonBlockedError, match="fails with ValueError: record 2;"):
        run_pending(stream, work)
    assert committed(stream, work) == [0]
    assert stream.dead_letters() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interruption_ends_the_run_when_calls_have_ended(stream: EventStream, error: type[BaseException]) -> None:
    ended: list[int] = []

    @consumer(topic=ORDERS, isolate="per_event", concurrency=4)
    def work(record: Record) -> None:
        if record.data["n"] == 5:
            raise error
        ended.append(record.data["n"])

    publish(stream, [0] * 20)
    with pytest.raises(error):
        run_pending(stream, work)
    assert committed(stream, work) == [0]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("djp-work")]
    ended.clear()


def test_tables_and_heavy_events_in_handlers_at_the_same_time(tmp_path: Path) -> None:
    """Replicas and payloads are read by several threads."""
    updates = Topic("updates", key="user")
    heavy = Topic("heavy", offload_above="1kB")
    emails = Table("emails", topic=updates, value="email")

    @consumer(topic=heavy, emits=[NAMED], tables=[emails], isolate="per_event", concurrency=8)
    def mail(record: Record, batch: Batch) -> None:
        n = record.data["n"]
        assert record.data["text"] == str(n) * 2000
        batch.emit(NAMED.event(n=n, email=batch.table(emails).get(n % 10)))

    with open_stream(tmp_path / "stream.db", payloads=open_payload_store(tmp_path / "payloads")) as stream:
        for topic in (updates, heavy):
            stream.create_topic(topic)
        stream.publish(updates, [updates.event(user=user, email=f"{user}@x") for user in range(10)])
        run_pending(stream, emails, state_folder=tmp_path / "state")
        stream.publish(heavy, [heavy.event(n=n, text=str(n) * 2000) for n in range(200)])
        run_pending(stream, mail, state_folder=tmp_path / "state")
        assert stream.dead_letters() == []
        assert [(record.data["n"], record.data["email"]) for record in all_records(stream, NAMED)] == [
            (n, f"{n % 10}@x") for n in range(200)
        ]


# The process is killed


def test_killed_in_the_middle_everything_is_handled_and_emitted_once(
    server: ScriptedHttp, closing: Callable[[Any], Any], tmp_path: Path, seed: random.Random
) -> None:
    service = Users(range(30))
    server.responder = service
    path = tmp_path / "stream.db"
    events = [world.ORDERS.event(user=seed.randrange(30), n=n) for n in range(100)]
    with open_stream(path) as stream:
        world.name.register(stream)
        stream.publish(world.ORDERS, events)
        for _ in range(2):
            _kill_while_it_asks(server, path, after=seed.randint(1, 15))
            done = sum(committed(stream, world.name))
            assert len(all_records(stream, world.NAMED)) == done < 100
        users = closing(world.users_at(server.url))
        run_pending(stream, world.name, resources={"users": users}, lease=world.LEASE_S)
        assert sum(committed(stream, world.name)) == 100
        assert stream.dead_letters() == []
        for partition in range(world.PARTITIONS):
            taken = list(stream.records(world.ORDERS, partition))
            emitted = list(stream.records(world.NAMED, partition))
            assert [record.data["n"] for record in emitted] == [record.data["n"] for record in taken]
            assert all(record.data["name"] == f"user {record.data['user']}" for record in emitted)


def _kill_while_it_asks(server: ScriptedHttp, path: Path, *, after: int) -> None:
    """SIGKILL while it waits for the service, some calls after it has begun."""
    begun, service = len(server.requests), server.responder
    last = threading.Event()

    def responder(request: Request) -> Answer:
        if len(server.requests) > begun + after:
            last.set()
            return NEVER
        return service(request)

    server.responder = responder
    process = subprocess.Popen([sys.executable, "-m", "tests.lookups.world", str(path), server.url], cwd=REPOSITORY)
    try:
        assert last.wait(PATIENT_S), f"it ended with {process.poll()}"
    finally:
        process.kill()
        process.wait(PATIENT_S)
        server.responder = service


def test_calls_of_failed_attempts_are_in_the_figures(stream: EventStream, server: ScriptedHttp, made: Made) -> None:
    """The service was asked, whatever became of the batch."""

    @consumer(topic=ORDERS, retry=RetryPolicy(max_attempts=5, first=0.001, longest=0.001))
    def handle(batch: Batch, users: HttpLookup) -> None:
        users.get_many(record.data["user"] for record in batch)
        if batch.attempt < 3:
            raise TransientError("try again")

    publish(stream, ["user-1"])
    (report,) = run_pending(stream, handle, resources={"users": made()}).batches
    assert report.attempt == 3
    assert report.counts["users_calls"] == len(server.requests) == 3
