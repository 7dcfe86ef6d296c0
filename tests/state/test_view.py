"""Views: what was committed, as of one moment, read by anybody from replicas that processes share and repair."""

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from djp_dagster import (
    Batch,
    EventStream,
    Record,
    SnapshotPolicy,
    StateView,
    Table,
    Threshold,
    Topic,
    consumer,
    open_stream,
    run_pending,
)
from djp_dagster.errors import (
    InvalidSettingError,
    InvalidValueError,
    StaleReadError,
    StateLostError,
    StateMismatchError,
)
from djp_dagster.state.file import remove
from djp_dagster.streams.records import TopicPartition
from djp_dagster.streams.topics import changelog_of
from djp_dagster.testing import Clock, kept_up_to_date, memory_stream, run_consumer
from tests.processing.kit import NUMBERS, at, fill, numbers, wait_until
from tests.state.accounts import ACCOUNTS, BANKS, TRANSFERS, accounts
from tests.state.test_file import flip

REPOSITORY = Path(__file__).resolve().parents[2]
VISITS = Topic("visits", partitions=4, key="user")
Users = dict[Any, Any]


@consumer(topic=VISITS, stateful=True, group="visits")
def count_visits(batch: Batch) -> None:
    """Keys of events, and others: tuples, bytes, and one that every task has."""
    for record in batch:
        user = record.data["user"]
        for key in (user, ("page", user), b"seen", "visits"):
            batch.state.set(key, batch.state.get(key, 0) + 1)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stream(clock: Clock) -> Iterator[EventStream]:
    with memory_stream(clock=clock) as opened:
        opened.create_topic(VISITS)
        yield opened


@pytest.fixture
def visit(stream: EventStream, tmp_path: Path) -> Callable[..., None]:
    def visited(*users: str | int) -> None:
        """Publish a visit of each, and have them counted."""
        stream.publish(VISITS, [VISITS.event(user=user) for user in users])
        run_pending(stream, count_visits, state_folder=tmp_path / "run")

    return visited


@pytest.fixture
def view(stream: EventStream, tmp_path: Path) -> Iterator[StateView]:
    with stream.view(count_visits, folder=tmp_path) as opened:
        yield opened


Visit = Callable[..., None]


class TestReading:
    def test_keys_are_found_in_their_tasks(self, view: StateView, visit: Visit) -> None:
        users = [*range(20), *(f"user {number}" for number in range(20)), "7"]
        visit(*users)
        view.refresh()
        assert view.get_many([*users, "nobody", 99]) == dict.fromkeys(users, 1)
        assert [view.get(user) for user in users] == [1] * 41
        assert {("page", user): 1 for user in users} == view.get_many(("page", user) for user in users)
        assert (view.get("nobody"), view.get("nobody", "none"), "nobody" in view, 7 in view) == (
            None,
            "none",
            False,
            True,
        )
        # Every task has these, so any will do.
        assert 0 < view.get(b"seen") <= 41
        assert 0 < view.get("visits") <= 41
        assert view.get_many([]) == {}
        with pytest.raises(InvalidValueError):
            view.get(True)
        with pytest.raises(InvalidValueError):
            view.get("\ud800")

    def test_all_of_it(self, view: StateView, visit: Visit) -> None:
        users = list(range(30))
        visit(*users)
        view.refresh()
        found = list(view.items())
        assert len(found) == len(view) == len(list(view)) == 60 + 2 * view.tasks
        assert sorted(value for key, value in found if key == "visits") == sorted(
            value for key, value in found if key == b"seen"
        )
        assert sorted(key for key, _ in view.items(start=0, stop=10)) == list(range(10))
        assert {key for key, _ in view.items(prefix=("page",))} == {("page", user) for user in users}
        assert [list(view.items_of(task)) for task in range(4)] == [found[start:end] for start, end in _tasks_of(found)]

    def test_a_view_changes_when_it_is_refreshed(self, view: StateView, visit: Visit) -> None:
        visit(1)
        assert (view.get(1), dict(view.as_of)) == (None, {at(VISITS, part): 0 for part in range(4)})
        view.refresh()
        assert (view.get(1), sum(view.as_of.values())) == (1, 1)

    def test_how_far_it_is_behind(self, stream: EventStream, view: StateView, visit: Visit, clock: Clock) -> None:
        visit(1)
        assert view.refresh().staleness_s == 0
        stream.publish(VISITS, [VISITS.event(user=1)])
        clock.advance(7)
        stream.publish(VISITS, [VISITS.event(user=2)])
        clock.advance(5)
        view.refresh()
        assert (view.staleness_s, view.get(1), sum(view.as_of.values())) == (12.0, 1, 1)
        visit()
        assert (view.refresh().staleness_s, view.get(1), sum(view.as_of.values())) == (0, 2, 3)

    def test_a_consumer_without_state_has_none(self, stream: EventStream, tmp_path: Path) -> None:
        @consumer(topic=VISITS)
        def plain(batch: Batch) -> None:
            """Nothing."""

        with pytest.raises(InvalidSettingError, match="stateful=True"):
            stream.view(plain, folder=tmp_path)

    def test_the_environment_names_the_folder(
        self, stream: EventStream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DJP_STATE_FOLDER", str(tmp_path / "there"))
        stream.view(count_visits).close()
        assert len(list((tmp_path / "there").rglob("replica-*.db"))) == 4


def _tasks_of(found: list[tuple[Any, Any]]) -> list[tuple[int, int]]:
    """Where the items of each task lie: its own count of visits comes before its bytes and tuples."""
    from itertools import accumulate

    sizes = [2 * value + 2 for key, value in found if key == "visits"]
    ends = list(accumulate(sizes))
    return list(zip([0, *ends], ends, strict=False))


class TestRefreshing:
    def test_it_waits_for_what_it_is_asked_for(self, tmp_path: Path) -> None:
        with memory_stream() as stream:
            count_visits.register(stream)
            with kept_up_to_date(stream, count_visits), stream.view(count_visits, folder=tmp_path) as view:
                for number in range(1, 6):
                    [went] = stream.publish(VISITS, [VISITS.event(user=1)])
                    wanted = {at(VISITS, went.partition): went.base_offset + 1}
                    assert view.refresh(at_least=wanted, wait="30s").get(1) == number

    def test_for_so_long(self, stream: EventStream, view: StateView, visit: Visit) -> None:
        visit(1)
        [(place, _)] = [(place, offset) for place, offset in stream.positions("visits").items() if offset]
        assert view.refresh(at_least={place: 1}, wait=0).get(1) == 1
        with pytest.raises(StaleReadError, match="has come to 1") as caught:
            view.refresh(at_least={place: 2}, wait=0)
        assert (caught.value.facts["position"], caught.value.facts["wanted"]) == (1, 2)
        assert caught.value.transient

    def test_what_can_never_come_is_refused(self, view: StateView) -> None:
        with pytest.raises(InvalidSettingError, match="does not read 'visits' partition 4"):
            view.refresh(at_least={TopicPartition("visits", 4): 1})

    def test_a_replica_goes_on_where_it_was(
        self, stream: EventStream, visit: Visit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        visit(*range(50))
        stream.view(count_visits, folder=tmp_path).close()
        visit(50)
        starts: list[int] = []
        read = stream.log.read

        def noted(at: TopicPartition, offset: int, **more: Any) -> Any:
            starts.append(offset)
            return read(at, offset, **more)

        monkeypatch.setattr(stream.log, "read", noted)
        with stream.view(count_visits, folder=tmp_path) as view:
            assert view.get(50) == 1
        assert len(starts) == 1
        assert starts[0] > 0

    def test_what_others_bring_up_to_date_is_there(
        self, stream: EventStream, view: StateView, visit: Visit, tmp_path: Path
    ) -> None:
        visit(1)
        with stream.view(count_visits, folder=tmp_path):
            # `as_of` is not ahead of what is read, nor is it forgotten who has taken it further.
            assert (view.get(1), sum(view.as_of.values())) == (1, 0)
        assert sum(view.refresh().as_of.values()) == 1

    def test_a_seek_empties_it(self, stream: EventStream, view: StateView, visit: Visit) -> None:
        visit(1, 2, 3)
        assert len(view.refresh()) > 0
        stream.seek("visits", "latest", reset_state=True)
        assert (dict(view.refresh().items()), sum(view.as_of.values())) == ({}, 3)
        visit(2)
        assert (view.refresh().get_many([1, 2, 3]), sum(view.as_of.values())) == ({2: 1}, 4)

    @pytest.mark.parametrize("then", ["less", "as much", "more"])
    def test_so_does_one_of_another_process(self, then: str, tmp_path: Path) -> None:
        """However far the new changelog has got since, compared with the one that the replica is of."""
        with open_stream(tmp_path / "s.db") as one, open_stream(tmp_path / "s.db") as other:
            one.create_topic(VISITS)
            one.publish(VISITS, [VISITS.event(user=1) for _ in range(3)])
            run_pending(one, count_visits, state_folder=tmp_path / "run")
            with one.view(count_visits, folder=tmp_path) as view:
                other.seek("visits", "latest", reset_state=True)
                more = {"less": 0, "as much": 1, "more": 5}[then]
                for _ in range(more):
                    other.publish(VISITS, [VISITS.event(user=1)])
                    run_pending(other, count_visits, state_folder=tmp_path / "other")
                assert view.refresh().get(1, 0) == more
                one.publish(VISITS, [VISITS.event(user=1)])
                run_pending(one, count_visits, state_folder=tmp_path / "run")
                assert view.refresh().get(1) == more + 1

    def test_a_replica_that_lies_behind_takes_a_snapshot(self, tmp_path: Path) -> None:
        with memory_stream() as stream:
            accounts.register(stream)
            with stream.view(accounts, folder=tmp_path) as view:
                publish_transfers(stream, random.Random(1), 100)
                run_pending(stream, accounts, state_folder=tmp_path / "run")
                view.refresh()
                before = view.get((BANKS[0], "transfers"))
                publish_transfers(stream, random.Random(2), 600)
                run_pending(stream, accounts, state_folder=tmp_path / "run")
                spans = stream.log.spans([changelog_of("accounts")])
                assert spans[TopicPartition(changelog_of("accounts"), 0)].begin > 2 * before + ACCOUNTS
                assert view.refresh().get((BANKS[0], "transfers")) == stream.positions("accounts")[at(TRANSFERS)]
            for file in (Path(stream.payloads.objects.folder)).rglob("sha256/*/*"):  # type: ignore[attr-defined]
                file.unlink()
            with pytest.raises(StateLostError):
                stream.view(accounts, folder=tmp_path / "empty")
            with stream.view(accounts, folder=tmp_path) as view:  # who has it all needs no snapshot
                assert view.get((BANKS[0], "transfers")) > before


class TestPinned:
    def test_it_is_of_one_moment_whatever_others_do(
        self, stream: EventStream, view: StateView, visit: Visit, tmp_path: Path
    ) -> None:
        visit(*range(10))
        view.refresh()
        with view.pinned():
            before = list(view.items())
            visit(*range(20))
            with stream.view(count_visits, folder=tmp_path) as another:
                assert another.get(15) == 1
            assert (list(view.items()), view.get(15), len(view)) == (before, None, len(before))
            with view.pinned():
                assert view.get_many(range(20)) == dict.fromkeys(range(10), 1)
            assert view.to_pandas()["key"].tolist() == [key for key, _ in before]
            with pytest.raises(InvalidSettingError, match="pinned"):
                view.refresh()
            assert view.get(15) is None
        assert view.refresh().get(15) == 1

    def test_damage_found_in_it_is_told_and_healed_after_it(
        self, view: StateView, visit: Visit, tmp_path: Path
    ) -> None:
        visit(*range(40))
        expected = dict(view.refresh().items())
        spoil(tmp_path)
        with pytest.raises(StateMismatchError), view.pinned():
            dict(view.items())
        assert dict(view.items()) == expected


def spoil(folder: Path) -> None:
    """Every replica gets a wrong value for every key."""
    import sqlite3

    for file in folder.rglob("replica-*.db"):
        db = sqlite3.connect(file)
        db.execute("UPDATE kv SET value = zeroblob(7)")
        db.commit()
        db.close()


class TestHealing:
    @pytest.mark.parametrize(
        "look",
        [
            lambda view: view.get(7) == 1,
            lambda view: view.get_many(range(40)) == dict.fromkeys(range(40), 1),
            lambda view: [key for key, _ in view.items(prefix=("page", 7))] == [("page", 7)],
            lambda view: len(view) == 88,
            lambda view: ("page", 7) in view,
            lambda view: len(view.to_pandas()) == 88,
        ],
        ids=["get", "get_many", "items", "len", "contains", "to_pandas"],
    )
    def test_a_damaged_replica_is_restored(
        self, look: Callable[[StateView], bool], view: StateView, visit: Visit, tmp_path: Path
    ) -> None:
        visit(*range(40))
        assert look(view.refresh())
        spoil(tmp_path)
        assert look(view)

    def test_a_look_that_breaks_off_is_not_repeated_from_the_beginning(
        self, view: StateView, visit: Visit, tmp_path: Path
    ) -> None:
        users = [f"user {number:06}" for number in range(9000)]
        visit(*users)
        items = view.refresh().items(prefix="user")
        found = [next(items) for _ in range(1500)]
        spoil(tmp_path)
        found += items
        assert sorted(found) == [(user, 1) for user in users]

    @pytest.mark.parametrize("closed", [True, False], ids=["closed", "killed"])
    def test_whatever_byte_of_it_is_damaged(
        self, closed: bool, stream: EventStream, visit: Visit, seed: random.Random, tmp_path: Path
    ) -> None:
        visit(*range(200))
        for number in range(20):
            visit(seed.randrange(200))
            with stream.view(count_visits, folder=tmp_path) as view:
                assert sum(view.get_many(range(200)).values()) == 201 + number
                assert sum(value for _, value in view.items(prefix=("page",))) == 201 + number
            for file in tmp_path.rglob("replica-*.db"):
                if not closed:  # one byte of a new file, which nobody has sealed
                    remove(file)
            if not closed:
                stream.view(count_visits, folder=tmp_path).close()
            for file in tmp_path.rglob("replica-*.db"):
                flip(file, seed)
                if not closed:
                    Path(f"{file}.sum").unlink()

    def test_while_the_stream_is_away_nothing_is_read_of_an_emptied_one(
        self, stream: EventStream, view: StateView, visit: Visit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        visit(1)
        view.refresh()
        spoil(tmp_path)

        def away(*_: object) -> None:
            raise StaleReadError("the stream is away")

        with monkeypatch.context() as patch:
            patch.setattr(stream.log, "spans", away)
            for _ in range(2):
                with pytest.raises(StaleReadError):
                    view.get(1)
        assert view.get(1) == 1


class TestFrames:
    def made(self, stream: EventStream, folder: Path, value: str | list[str] | None, *data: dict[str, Any]) -> Any:
        topic = Topic("updates", key="id")
        table = Table("table", topic=topic, value=value)
        table.register(stream)
        stream.publish(topic, [topic.event(one) for one in data])
        run_pending(stream, table, state_folder=folder / "run")
        with stream.view(table, folder=folder) as view:
            return view.to_pandas()

    def test_values(self, stream: EventStream, tmp_path: Path) -> None:
        frame = self.made(stream, tmp_path, "n", {"id": 1, "n": 5}, {"id": "a", "n": [1]}, {"id": 2, "n": {"x": 1}})
        assert frame.to_dict("list") == {"key": [1, 2, "a"], "value": [5, {"x": 1}, [1]]}

    def test_objects(self, stream: EventStream, tmp_path: Path) -> None:
        frame = self.made(stream, tmp_path, ["n", "key"], {"id": 1, "n": 5, "key": "k"}, {"id": 2, "n": 6, "key": "l"})
        assert frame.to_dict("list") == {"key": [1, 2], "n": [5, 6], "value_key": ["k", "l"]}

    def test_nothing(self, stream: EventStream, tmp_path: Path) -> None:
        frame = self.made(stream, tmp_path, "n")
        assert (list(frame.columns), len(frame)) == (["key", "value"], 0)


PRICES = Topic("prices", key="item")
ORDERS = Topic("orders", key="item")
OUT = Topic("priced")
TABLE = Table("current_prices", topic=PRICES, value="price")


class TestInHandlers:
    @staticmethod
    @consumer(topic=ORDERS, emits=[OUT], tables=[TABLE], max_batch=Threshold(events=2))
    def price(batch: Batch) -> None:
        """Each order with the price that is current."""
        prices = batch.table(TABLE)
        assert batch.table(TABLE) is prices
        for record in batch:
            batch.emit(OUT.event(item=record.data["item"], price=prices.get(record.data["item"])))

    def test_a_table_is_read_as_it_is_now(self, stream: EventStream, tmp_path: Path) -> None:
        found = []
        for price in (5, 6):
            fill(stream, PRICES, [PRICES.event(item="a", price=price)])
            run_pending(stream, TABLE, state_folder=tmp_path)
            fill(stream, ORDERS, [ORDERS.event(item=item) for item in "aba"])
            run_pending(stream, self.price, state_folder=tmp_path)
            found.append([record.data["price"] for record in stream.records(OUT, 0)][-3:])
        assert found == [[5, None, 5], [6, None, 6]]

    def test_each_batch_sees_it_anew(self, stream: EventStream, tmp_path: Path) -> None:
        seen = []

        @consumer(topic=NUMBERS, tables=[TABLE], max_batch=Threshold(events=1))
        def change_and_look(batch: Batch) -> None:
            [record] = batch
            seen.append(batch.table(TABLE).get("a"))
            stream.publish(PRICES, [PRICES.event(item="a", price=record.data["n"])])
            run_pending(stream, TABLE, state_folder=tmp_path)
            seen.append(batch.table(TABLE).get("a"))  # within a batch it stays as it was

        TABLE.register(stream)
        fill(stream, NUMBERS, numbers(3))
        run_pending(stream, change_and_look, state_folder=tmp_path)
        assert seen == [None, None, 0, 0, 1, 1]

    @pytest.mark.parametrize("tables", [[], [Table("another", topic=PRICES)]])
    def test_one_that_is_not_declared_is_refused(
        self, tables: list[Table], stream: EventStream, tmp_path: Path
    ) -> None:
        @consumer(topic=NUMBERS, tables=tables)
        def look(batch: Batch) -> None:
            batch.table(TABLE)

        fill(stream, NUMBERS, numbers(1))
        with pytest.raises(InvalidSettingError, match="tables=") as caught:
            run_pending(stream, look, state_folder=tmp_path)
        assert caught.value.facts["value"] == "current_prices"
        assert (stream.positions("look"), stream.dead_letters("look")) == ({at(NUMBERS): 0}, [])

    def test_handlers_that_run_concurrently_share_it(self, stream: EventStream, tmp_path: Path) -> None:
        """Whole scans, single looks and moments pinned by many threads: all right, and nothing taken for damage."""
        prices = {f"item-{n}": n for n in range(3000)}
        fill(stream, PRICES, [PRICES.event(item=item, price=price) for item, price in prices.items()])
        run_pending(stream, TABLE, state_folder=tmp_path)
        wrong: list[int] = []

        @consumer(topic=NUMBERS, tables=[TABLE], isolate="per_event", concurrency=8)
        def look(record: Record, batch: Batch) -> None:
            view = batch.table(TABLE)
            with view.pinned():
                right = dict(view.items()) == prices
            right &= view.get_many(list(prices)[::7]) == dict(list(prices.items())[::7])
            if not right or dict(view.items()) != prices:
                wrong.append(record.data["n"])

        fill(stream, NUMBERS, numbers(60))
        (report,) = run_pending(stream, look, state_folder=tmp_path).batches
        assert (report.attempt, report.dead_letters, wrong) == (1, 0, [])

    def test_in_the_test_kit(self) -> None:
        updates = [PRICES.event(item="a", price=1), PRICES.event(item="b", price=2), PRICES.event(item="a", price=3)]
        run = run_consumer(self.price, [ORDERS.event(item=item) for item in "abc"], tables={TABLE: updates})
        assert [record.data["price"] for record in run.emitted["priced"]] == [3, 2, None]


def publish_transfers(stream: EventStream, rng: random.Random, count: int) -> None:
    events = []
    for _ in range(count):
        one, other = rng.sample(range(ACCOUNTS), 2)
        bank = rng.choice(list(BANKS.values()))
        events.append(TRANSFERS.event(bank=bank, amount=rng.randrange(100), **{"from": one, "to": other}))
    stream.publish(TRANSFERS, events)


class TestProcesses:
    """Of one host, which share the replicas; the one that writes has state of its own."""

    @staticmethod
    def start(*arguments: object) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "tests.state.accounts", *map(str, arguments)],
            cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def test_never_see_half_of_a_commit(self, seed: random.Random, tmp_path: Path) -> None:
        """While one of them is killed, another begins, and the changelog is trimmed behind them."""
        total = 900
        with open_stream(tmp_path / "stream.db") as stream:
            accounts.register(stream)
            publish_transfers(stream, seed, total)
            replicas = tmp_path / "replicas"
            readers = [self.start("read", tmp_path, replicas, total) for _ in range(2)]
            for reader in readers:
                assert reader.stdout is not None
                assert reader.stdout.readline() == "ready\n"
            writer = self.start("write", tmp_path)
            wait_until(lambda: stream.pending("accounts").events < total * 2 // 3, "a third of the transfers")
            os.kill(readers[0].pid, signal.SIGKILL)
            readers[0].communicate()
            readers[0] = self.start("read", tmp_path, replicas, total)
            ended = [(*process.communicate(timeout=100), process.returncode) for process in (*readers, writer)]
            spans = stream.log.spans([changelog_of("accounts")])
        assert all(status == 0 for *_, status in ended), ended
        assert max(int(out.split()[-1]) for out, *_ in ended[:2]) > 1
        assert all(span.begin > 0 for span in spans.values())

    def test_who_restore_at_the_same_time_share_what_the_first_has_restored(
        self, seed: random.Random, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with open_stream(tmp_path / "stream.db") as stream:
            accounts.register(stream)
            publish_transfers(stream, seed, 400)
            run_pending(stream, accounts, state_folder=tmp_path / "worker")
            assert all(span.begin > 0 for span in stream.log.spans([changelog_of("accounts")]).values())
        barrier = threading.Barrier(4)

        def look(_: int) -> Users:
            with open_stream(tmp_path / "stream.db") as own:
                barrier.wait()
                with own.view(accounts, folder=tmp_path / "replicas") as view:
                    return dict(view.items())

        with ThreadPoolExecutor(4) as pool:
            first, *others = pool.map(look, range(4))
        assert first[BANKS[0], "transfers"] + first[BANKS[1], "transfers"] == 400
        assert others == [first] * 3
        assert "passed over" not in caplog.text


def test_a_snapshot_policy_of_a_table_is_its_own() -> None:
    assert Table("t", topic=PRICES, snapshots=SnapshotPolicy(keep=5)).snapshots == SnapshotPolicy(keep=5)
