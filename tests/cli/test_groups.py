"""``djp groups``, ``djp lag``, ``djp seek`` and ``djp dead-letters``: what stands in the stream is what they say."""

import threading
from pathlib import Path
from typing import Any

import pytest

from djp_dagster import Batch, EventStream, Topic, consumer, open_stream, redrive, run_pending
from djp_dagster.streams.model import Range
from djp_dagster.streams.records import TopicPartition
from djp_dagster.testing import Clock
from tests.cli.conftest import Djp, document, documents
from tests.processing.kit import FAST, NO_EVENT, append_raw, at, begin, in_thread, numbers

ORDERS = Topic("orders", partitions=3, key="n")
ONE = Topic("one")
RUN = "run-01234567-89ab-cdef-0123-456789abcdef-00ff00ff"


@consumer(topic=ORDERS)
def mails(batch: Batch) -> int:
    return len(list(batch))


@consumer(topic=ORDERS, stateful=True)
def counts(batch: Batch) -> None:
    for record in batch:
        batch.state.set(record.data["n"], 1)


FAIL = {"on": True}


@consumer(topic=ONE, isolate="per_event", retry=FAST)
def picky(record: Any) -> None:
    if FAIL["on"] and record.data["n"] % 3 == 0:
        raise ValueError(f"three \x1b[31m divides {record.data['n']}\nand a second line")


@pytest.fixture
def some(stream: EventStream) -> EventStream:
    """100 orders, 40 of them done by `mails`, none by `counts`; `picky` has left 4 dead letters."""
    stream.create_topic(ORDERS)
    stream.create_topic(ONE)
    FAIL["on"] = True
    mails.register(stream)
    counts.register(stream)
    stream.publish(ORDERS, numbers(40, ORDERS))
    run_pending(stream, mails)
    stream.publish(ORDERS, numbers(60, ORDERS, start=40))
    stream.publish(ONE, numbers(10, ONE))
    run_pending(stream, picky)
    return stream


def test_no_groups(djp: Djp, stream: EventStream) -> None:
    assert "no groups" in djp("groups").stderr
    assert "no groups" in djp("lag").stdout
    assert djp("groups", "--json").stdout == djp("lag", "--json").stdout == ""
    assert "no pending dead letters" in djp("dead-letters", "list").stderr
    assert djp("dead-letters", "list", "--json").stdout == ""


GROUP_COMMANDS = [
    ("groups", "show", "g"),
    ("groups", "delete", "g", "--yes"),
    ("lag", "g"),
    ("seek", "g", "--to", "earliest"),
    ("dead-letters", "list", "g"),
    ("dead-letters", "show", "g", 1),
    ("dead-letters", "redrive", "g", "--all"),
    ("dead-letters", "redrive", "g", 1),
    ("dead-letters", "discard", "g", "--all", "--yes"),
    ("dead-letters", "discard", "g", 1, "--yes"),
]


@pytest.mark.parametrize("command", GROUP_COMMANDS, ids=str)
def test_a_group_that_is_not_there(djp: Djp, stream: EventStream, command: tuple[object, ...]) -> None:
    assert "consumer group 'g' does not exist" in djp(*command, code=1).stderr


def test_the_list(djp: Djp, some: EventStream) -> None:
    listed = {facts["group"]: facts for facts in documents(djp("groups", "--json"))}
    assert list(listed) == ["counts", "mails", "picky"]
    assert [one["pending_events"] for one in listed.values()] == [100, 60, 0]
    assert [one["dead_letters_pending"] for one in listed.values()] == [0, 0, 4]
    assert listed["counts"]["stateful"] is True
    assert listed["mails"]["holders"] == {}
    lines = djp("groups").stdout.splitlines()
    assert lines[2].split() == ["counts", "orders", "3", "yes", "100", "0", "nobody"]


def test_one_group_whole(djp: Djp, some: EventStream) -> None:
    some.coordinator.acquire("mails", [0, 1], RUN, 500.0)
    some.coordinator.acquire("mails", [2], "someone", 0.001)
    number = some.coordinator.request("mails", "pause", {"why": "test"})
    facts = document(djp("groups", "show", "mails", "--json"))
    assert facts["holders"] == {RUN: [0, 1]}
    assert [task["holder"] for task in facts["task_list"]] == [RUN, RUN, None]
    assert facts["task_list"][2]["vanished_holder"] == "someone"
    assert 400 < facts["task_list"][0]["lease_left_s"] <= 500
    positions = some.positions("mails")
    for place in facts["positions"]:
        assert place["committed"] == positions[TopicPartition("orders", place["partition"])]
        assert place["lag"] == place["end"] - place["committed"]
    assert sum(place["lag"] for place in facts["positions"]) == 60
    assert facts["outputs"] == 1
    assert facts["open_requests"][0]["id"] == number
    shown = djp("groups", "show", "mails").stdout
    assert "run-01234567 " in shown
    assert "nobody (someone vanished)" in shown
    assert f"request {number} (pause): open for" in shown
    assert "1 outputs" in shown


def test_open_batches_and_deadlines(djp: Djp, some: EventStream) -> None:
    from datetime import datetime, timezone

    @consumer(topic=ONE, group="waits")
    def waits(batch: Batch) -> None:
        batch.set_deadline("k", datetime(2100, 1, 1, tzinfo=timezone.utc))

    run_pending(some, waits)
    some.publish(ONE, numbers(5, ONE))
    begin(some, waits, [Range("one", 0, 10, 15)], batch_id="b" * 32, failures=2, deaths=1)
    facts = document(djp("groups", "show", "waits", "--json"))
    (batch,) = facts["open_batches"]
    assert (batch["batch_id"], batch["tasks"], batch["events"]) == ("b" * 32, [0], 5)
    assert (batch["attempt"], batch["failures"], batch["deaths"], batch["reason"]) == (1, 2, 1, "test")
    assert facts["next_deadline"] == "2100-01-01T00:00:00.000000Z"
    shown = djp("groups", "show", "waits").stdout
    assert "bbbbbbbbbbbb  0      test         5        1         2       1" in shown
    assert "next deadline: 2100-01-01T00:00:00.000000Z" in shown
    assert "bbbbbbbb 5 events" in djp("lag", "waits").stdout
    assert "3 failed" in djp("lag", "waits").stdout


def test_delete_says_what_goes_and_wants_a_yes(djp: Djp, some: EventStream) -> None:
    error = djp("groups", "delete", "picky", code=2).stderr
    assert "4 pending dead letters" in error
    assert "--yes" in error
    lease = some.coordinator.acquire("picky", None, "worker-7", 60.0)
    assert "leased by 'worker-7'" in djp("groups", "delete", "picky", "--yes", code=1).stderr
    some.coordinator.release(lease)
    assert djp("groups", "delete", "picky", "--yes").stdout.startswith("deleted group picky")
    assert document(djp("groups", "delete", "counts", "--yes", "--json"))["deleted"]["group"] == "counts"
    assert [info.name for info in some.groups()] == ["mails"]


def test_lag(djp: Djp, some: EventStream) -> None:
    some.coordinator.acquire("counts", [0, 2], RUN, 60.0)
    found = {facts["group"]: facts for facts in documents(djp("lag", "--json"))}
    assert [one["events"] for one in found.values()] == [100, 60, 0]
    assert found["counts"]["bytes"] == some.pending("counts").bytes
    assert found["counts"]["bytes_estimated"] is False
    assert found["counts"]["holders"] == {RUN: [0, 2]}
    assert found["counts"]["age_s"] >= found["counts"]["idle_s"] >= 0
    assert found["picky"]["age_s"] is None
    assert found["picky"]["dead_letters_pending"] == 4
    assert [facts["group"] for facts in documents(djp("lag", "picky", "mails", "--json"))] == ["picky", "mails"]
    lines = {line.split()[0]: line.split() for line in djp("lag").stdout.splitlines()[2:]}
    assert lines["counts"][1] == "100"
    assert lines["counts"][-3:] == ["run-01234567", "(0,2)", "-"]
    some.seek("mails", {at(ORDERS): 1})
    assert found["mails"]["bytes_estimated"] is False
    assert document(djp("lag", "mails", "--json"))["bytes_estimated"] is True
    assert "~" in djp("lag", "mails").stdout


def test_watch_needs_a_terminal_or_json(djp: Djp, some: EventStream) -> None:
    assert "add --json" in djp("lag", "--watch", code=2).stderr
    assert "a duration such as" in djp("lag", "--watch", "--json", "--every", "soon", code=2).stderr


@pytest.mark.parametrize("width", [80, 120])
def test_every_table_fits_the_terminal(
    djp: Djp, some: EventStream, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for task, owner in enumerate([RUN, RUN.replace("0", "a"), "some-host.example.org-1234-0011aabb"]):
        some.coordinator.acquire("counts", [task], owner, 60.0)
    monkeypatch.setenv("COLUMNS", str(width))
    tables = (
        ("groups",),
        ("lag",),
        ("groups", "show", "counts"),
        ("seek", "mails", "--to", "earliest"),
        ("dead-letters", "list"),
    )
    for command in tables:
        assert max(map(len, djp(*command).stdout.splitlines())) <= width, command


def test_seek_shows_and_changes_nothing(djp: Djp, some: EventStream) -> None:
    before = some.positions("mails")
    facts = document(djp("seek", "mails", "--to", "earliest", "--json"))
    assert (facts["executed"], facts["again"], facts["skipped"]) == (False, 40, 0)
    facts = document(djp("seek", "mails", "--to", "latest", "--json"))
    assert (facts["again"], facts["skipped"]) == (0, 60)
    facts = document(djp("seek", "mails", "--to", "orders:0=0,orders:1=3", "--json"))
    rows = {row["partition"]: row for row in facts["partitions"]}
    assert (rows[0]["old"], rows[0]["new"]) == (before[at(ORDERS)], 0)
    assert rows[1]["new"] == 3
    assert rows[2]["new"] == rows[2]["old"]
    result = djp("seek", "mails", "--to", "earliest")
    assert "40 records would be handled again, 0 would be skipped" in result.stdout
    assert "nothing was changed" in result.stderr
    assert some.positions("mails") == before


@pytest.mark.parametrize("to", ["earliest", "latest", "orders:0=0,orders:2=5", "1h", "2000-01-01T00:00:00Z"])
def test_seek_does_what_it_showed(djp: Djp, some: EventStream, to: str) -> None:
    shown = document(djp("seek", "mails", "--to", to, "--json"))
    done = document(djp("seek", "mails", "--to", to, "--json", "--execute"))
    assert done["executed"] is True
    assert done["partitions"] == shown["partitions"]
    after = some.positions("mails")
    assert {row["partition"]: row["new"] for row in done["partitions"]} == {at.partition: o for at, o in after.items()}


def test_seek_to_a_time(djp: Djp, place: Path) -> None:
    clock = Clock()
    with open_stream(place, clock=clock) as stream:
        stream.create_topic(ONE)
        for n in range(10):
            stream.publish(ONE, [ONE.event(n=n)])
            clock.advance(3600)
        picky.register(stream)
        facts = document(djp("seek", "picky", "--to", "2023-11-15T00:13:20+02:00", "--json", "--execute"))
        assert [row["new"] for row in facts["partitions"]] == [0]
        assert "no time with a zone" in djp("seek", "picky", "--to", "2023-11-15T00:13:20", code=1).stderr
        djp("seek", "picky", "--to", "2023-11-15T02:13:19.5Z", "--execute")
        assert stream.positions("picky") == {at(ONE): 4}


@pytest.mark.parametrize(
    ("to", "said"),
    [
        ("orders:0=999", "cannot seek 'orders' partition 0 to 999: it holds 0 to"),
        ("orders:9=0", "does not read topic 'orders' partition 9"),
        ("other:0=0", "does not read topic 'other'"),
        ("orders=0", "TOPIC:PARTITION=OFFSET"),
        ("orders:0=-1", "TOPIC:PARTITION=OFFSET"),
        ("soon", "is no time"),
    ],
)
def test_seek_refuses_what_cannot_be(djp: Djp, some: EventStream, to: str, said: str) -> None:
    for execute in ((), ("--execute",)):
        assert said in djp("seek", "mails", "--to", to, *execute, code=1).stderr
    assert "--to" in djp("seek", "mails", code=2).stderr


def test_seek_and_state(djp: Djp, some: EventStream) -> None:
    run_pending(some, counts)
    assert "add --reset-state" in djp("seek", "counts", "--to", "earliest").stderr
    assert document(djp("seek", "counts", "--to", "earliest", "--json"))["needs_reset_state"] is True
    assert "reset_state=True" in djp("seek", "counts", "--to", "earliest", "--execute", code=1).stderr
    djp("seek", "counts", "--to", "earliest", "--execute", "--reset-state")
    assert set(some.positions("counts").values()) == {0}
    assert "leave --reset-state out" in djp("seek", "mails", "--to", "earliest", "--reset-state").stderr


def test_seek_waits_for_the_holder_and_voids_open_batches(djp: Djp, some: EventStream) -> None:
    begin(some, mails, [Range("orders", 0, some.positions("mails")[at(ORDERS)], 20)], batch_id="v" * 32)
    assert "would be void: " + "v" * 32 in djp("seek", "mails", "--to", "earliest").stderr
    lease = some.coordinator.acquire("mails", None, "worker-7", 60.0)
    busy = djp("seek", "mails", "--to", "earliest", "--execute", "--wait", "0s", code=1).stderr
    assert "leased by 'worker-7'" in busy
    some.coordinator.release(lease)
    facts = document(djp("seek", "mails", "--to", "earliest", "--execute", "--json"))
    assert facts["open_batches_voided"] == ["v" * 32]
    assert document(djp("groups", "show", "mails", "--json"))["open_batches"] == []


def test_dead_letters_are_listed(djp: Djp, some: EventStream) -> None:
    found = documents(djp("dead-letters", "list", "--json"))
    assert [(one["group"], one["topic"], one["offset"]) for one in found] == [("picky", "one", n) for n in (0, 3, 6, 9)]
    assert {one["error_type"] for one in found} == {"ValueError"}
    assert "record" not in found[0], "a list shows no payload"
    result = djp("dead-letters", "list", "picky")
    assert "one:0=3" in result.stdout
    assert "\x1b" not in result.stdout
    assert len(result.stdout.splitlines()) == 2 + 4
    assert len(documents(djp("dead-letters", "list", "--json", "-n", 3))) == 3
    short = djp("dead-letters", "list", "-n", 3)
    assert len(short.stdout.splitlines()) == 2 + 3
    assert "more than 3" in short.stderr
    assert documents(djp("dead-letters", "list", "mails", "--json")) == []
    assert "no redriven dead letters" in djp("dead-letters", "list", "--status", "redriven").stderr


def test_long_lists_are_read_page_by_page(djp: Djp, some: EventStream) -> None:
    many = consumer(topic=ONE, group="many", isolate="per_event", max_poison=1000, retry=FAST)(picky.handler)
    some.publish(ONE, [ONE.event(n=3 * n) for n in range(250)])
    run_pending(some, many)
    assert len(documents(djp("dead-letters", "list", "many", "--json"))) == 254
    assert "more than 50" in djp("dead-letters", "list").stderr
    assert document(djp("dead-letters", "discard", "many", "--all", "--yes", "--json"))["discarded"] == 254


def test_one_dead_letter_whole(djp: Djp, some: EventStream) -> None:
    letter = some.dead_letters("picky")[1]
    facts = document(djp("dead-letters", "show", "picky", letter.id, "--json"))
    assert (facts["partition"], facts["offset"], facts["batch_id"]) == (0, 3, letter.batch_id)
    assert facts["record"]["data"] == {"n": 3}
    assert facts["error"] == letter.error
    shown = djp("dead-letters", "show", "picky", letter.id).stdout
    assert '"data":{"n":3}' in shown
    assert "and a second line" in shown
    assert "\x1b" not in shown
    for group in ("picky", "mails"):
        assert "no dead letter 999" in djp("dead-letters", "show", group, 999, code=1).stderr
    assert "no dead letter" in djp("dead-letters", "show", "mails", letter.id, code=1).stderr


def test_a_dead_letter_that_is_no_event(djp: Djp, some: EventStream) -> None:
    append_raw(some, ONE, [NO_EVENT])
    run_pending(some, picky)
    letter = some.dead_letters("picky")[-1]
    facts = document(djp("dead-letters", "show", "picky", letter.id, "--json"))
    assert (facts["record"], facts["raw_base64"]) == (None, "AQ==")
    assert "AQ==" in djp("dead-letters", "show", "picky", letter.id).stdout


def test_redrive_only_asks(djp: Djp, some: EventStream) -> None:
    result = djp("dead-letters", "redrive", "picky", 1, 2)
    assert "asked for the redrive of 2 dead letters of picky" in result.stdout
    assert "its worker or its next run does it" in result.stdout
    assert len(some.coordinator.requests("picky")) == 1
    facts = document(djp("dead-letters", "redrive", "picky", "--all", "--json"))
    assert facts["dead_letters"] == [1, 2, 3, 4]
    assert all(some.coordinator.request_status(number) == "open" for number in facts["requests"])
    assert "no pending dead letters" in djp("dead-letters", "redrive", "mails", "--all").stdout
    assert "[99]" in djp("dead-letters", "redrive", "picky", 99, code=1).stderr
    assert "--all" in djp("dead-letters", "redrive", "picky", code=2).stderr
    assert "--all" in djp("dead-letters", "redrive", "picky", 1, "--all", code=2).stderr


def test_redrive_waits_for_whoever_does_it(djp: Djp, some: EventStream) -> None:
    undone = djp("dead-letters", "redrive", "picky", 4, "--wait", "50ms", code=1)
    assert "not done within" in undone.stderr
    stop = threading.Event()

    def work() -> None:
        with open_stream(some.label) as stream:
            while not stop.wait(0.01):
                run_pending(stream, picky, only_requests=True)

    FAIL["on"] = False
    with in_thread(work, stop) as outcome:
        done = document(djp("dead-letters", "redrive", "picky", 1, "--wait", "30s", "--json"))
    assert outcome == [None]
    assert (done["done"], done["redriven"], done["pending"]) == (True, [1], [])
    stop.clear()
    FAIL["on"] = True
    with in_thread(work, stop) as outcome:
        again = djp("dead-letters", "redrive", "picky", 2, 3, "--wait", "30s", code=1)
    assert outcome == [None]
    assert "2 failed again" in again.stderr
    assert [one["id"] for one in documents(djp("dead-letters", "list", "--status", "redriven", "--json"))] == [1, 4]
    assert [letter.redrives for letter in some.dead_letters("picky")] == [1, 1]


def test_discard_wants_a_yes_and_pending_ones(djp: Djp, some: EventStream) -> None:
    assert (
        "discard 4 dead letters of picky; say --yes" in djp("dead-letters", "discard", "picky", "--all", code=2).stderr
    )
    assert djp("dead-letters", "discard", "picky", 2, "--yes").stdout == "discarded 1 dead letters of picky\n"
    error = djp("dead-letters", "discard", "picky", 1, 2, 77, "--yes", code=1).stderr
    assert "has no pending dead letters 2, 77" in error
    assert len(some.dead_letters("picky")) == 3, "nothing was discarded"
    assert document(djp("dead-letters", "discard", "picky", "--all", "--yes", "--json")) == {
        "group": "picky",
        "discarded": 3,
    }
    FAIL["on"] = False
    assert redrive(some, picky) == []
    assert len(documents(djp("dead-letters", "list", "--status", "all", "--json"))) == 4
