"""Terminal failures: the search for the records at fault, and deaths of the process."""

import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from djp_dagster import Batch, EventStream, Topic, consumer, run_pending
from djp_dagster.errors import PoisonBlockedError, RetriesExhaustedError, SystemicFailureError
from djp_dagster.streams.model import Probe, Range
from djp_dagster.testing import Clock, memory_stream
from tests.processing.kit import (
    FAST,
    NUMBERS,
    OUT,
    Mortal,
    all_records,
    begin,
    committed,
    die_again,
    fill,
    numbers,
    open_intents,
    values,
)


@settings(max_examples=25, deadline=None)
@given(number=st.integers(0, 2**32), size=st.integers(1, 120), partitions=st.integers(1, 3), poison=st.integers(0, 8))
def test_every_poison_record_is_found_and_the_rest_handled(
    number: int, size: int, partitions: int, poison: int
) -> None:
    chance = random.Random(number)
    topic, out = Topic("in", partitions=partitions, key="k"), Topic("out")
    bad = set(chance.sample(range(size), min(poison, size)))
    calls: list[int] = []

    @consumer(topic=topic, emits=[out], retry=FAST, max_poison=8)
    def handle(batch: Batch) -> None:
        calls.append(len(batch))
        for record in batch:
            batch.emit(out.event(n=record.data["n"], partition=record.partition))
            if record.data["n"] in bad:
                raise ValueError(f"poison {record.data['n']}")

    with memory_stream(clock=Clock()) as stream:
        fill(stream, topic, [topic.event(n=n, k=str(chance.randrange(10))) for n in range(size)])
        report = run_pending(stream, handle)
        letters = stream.dead_letters()
        emitted = all_records(stream, out)
        assert stream.pending("handle").events == 0
    (batch,) = report.batches
    assert {letter.error for letter in letters} == {f"poison {n}" for n in bad}
    assert all(letter.error_type == "ValueError" for letter in letters)
    assert len(letters) == batch.dead_letters == len(bad)
    assert {letter.batch_id for letter in letters} <= {batch.batch_id}
    assert batch.events == len(emitted) == size - len(bad)
    for partition in range(partitions):
        order = [record.data["n"] for record in emitted if record.data["partition"] == partition]
        assert order == sorted(order)
    assert sorted(record.data["n"] for record in emitted) == sorted(set(range(size)) - bad)
    assert len({record.id for record in emitted}) == len(emitted)
    # Each poison record: log2(size) probes, one that confirms it, and the run of the rest.
    assert len(calls) <= 1 + len(bad) * (2 + math.ceil(math.log2(size)))


def test_what_fails_once_and_never_again_costs_no_record(stream: EventStream) -> None:
    calls = []

    @consumer(topic=NUMBERS, emits=[OUT], retry=FAST)
    def moody(batch: Batch) -> None:
        calls.append(len(batch))
        if len(calls) == 1:
            raise ValueError("a bad day")
        for record in batch:
            batch.emit(OUT.event(n=record.data["n"]))

    fill(stream, NUMBERS, [NUMBERS.event(n=n) for n in range(9)])
    report = run_pending(stream, moody)
    assert stream.dead_letters(status=None) == []
    assert [batch.events for batch in report.batches] == [9]
    assert [record.data["n"] for record in all_records(stream, OUT)] == list(range(9))


def test_effects_of_probes_are_discarded(stream: EventStream, tmp_path: Any) -> None:
    @consumer(topic=NUMBERS, emits=[OUT], stateful=True, retry=FAST)
    def handle(batch: Batch) -> dict[str, int]:
        for record in batch:
            batch.emit(OUT.event(n=record.data["n"]))
            batch.state.set("count", batch.state.get("count", 0) + 1)
            if record.data["n"] == 5:
                raise ValueError
        return {"count": batch.state.get("count")}

    fill(stream, NUMBERS, numbers(16))
    report = run_pending(stream, handle, state_folder=tmp_path)
    assert values(stream, OUT) == [n for n in range(16) if n != 5]
    assert len(stream.outputs("handle")) == 1
    assert report.batches[0].state_changes == 1
    from djp_dagster.claim_check.serializers import load_value

    assert load_value(stream.payloads, stream.outputs("handle")[0].payload) == {"count": 15}


def test_the_batch_keeps_its_id_through_the_search(stream: EventStream) -> None:
    ids: set[tuple[str, int]] = set()

    @consumer(topic=NUMBERS, retry=FAST)
    def handle(batch: Batch) -> None:
        ids.add((batch.id, batch.attempt))
        for record in batch:
            if record.data["n"] in (3, 7):
                raise ValueError

    fill(stream, NUMBERS, numbers(10))
    report = run_pending(stream, handle)
    assert ids == {(report.batches[0].batch_id, 1)}


def test_a_handler_that_fails_without_any_record_at_fault_is_systemic(stream: EventStream) -> None:
    broken = True

    @consumer(topic=NUMBERS, emits=[OUT], retry=FAST)
    def handle(batch: Batch) -> None:
        for record in batch:
            batch.emit(OUT.event(n=record.data["n"]))
        if broken:
            raise KeyError("always")

    fill(stream, NUMBERS, numbers(3))
    for _ in range(2):
        with pytest.raises(SystemicFailureError, match="max_poison") as caught:
            run_pending(stream, handle)
        assert caught.value.facts["error_type"] == "KeyError"
        assert stream.dead_letters() == []
        assert committed(stream, handle) == [0]
        (left,) = open_intents(stream, handle)
        assert (left.poison, left.probe, left.running) == ((), None, False)
    broken = False
    assert run_pending(stream, handle).events == 3
    assert values(stream, OUT) == [0, 1, 2]


def test_more_than_max_poison_dead_letters_nothing_and_a_fix_handles_all(stream: EventStream) -> None:
    bad = {1, 4, 6}

    @consumer(topic=NUMBERS, emits=[OUT], retry=FAST, max_poison=2)
    def handle(batch: Batch) -> None:
        for record in batch:
            if record.data["n"] in bad:
                raise ValueError(record.data["n"])
            batch.emit(OUT.event(n=record.data["n"]))

    fill(stream, NUMBERS, numbers(9))
    with pytest.raises(SystemicFailureError) as caught:
        run_pending(stream, handle)
    assert isinstance(caught.value.__cause__, ValueError | type(None))
    assert stream.dead_letters() == []
    assert values(stream, OUT) == []
    (left,) = open_intents(stream, handle)
    assert left.poison == ()
    bad.clear()
    report = run_pending(stream, handle)
    assert (report.events, report.batches[0].dead_letters) == (9, 0)
    assert report.batches[0].batch_id == left.batch_id


@pytest.mark.parametrize("max_poison", [0, 3])
def test_exactly_max_poison_is_tolerated(stream: EventStream, max_poison: int) -> None:
    @consumer(topic=NUMBERS, retry=FAST, max_poison=max_poison)
    def handle(batch: Batch) -> None:
        for record in batch:
            if record.data["n"] < max_poison:
                raise ValueError

    fill(stream, NUMBERS, numbers(max_poison + 1))
    run_pending(stream, handle)
    assert len(stream.dead_letters()) == max_poison


def test_all_records_poison(stream: EventStream) -> None:
    @consumer(topic=NUMBERS, retry=FAST)
    def handle(batch: Batch) -> None:
        for _ in batch:
            raise ValueError

    fill(stream, NUMBERS, numbers(4))
    report = run_pending(stream, handle)
    assert [letter.offset for letter in stream.dead_letters()] == [0, 1, 2, 3]
    assert report.events == 0
    assert stream.pending("handle").events == 0


def test_block_stops_at_the_first_and_keeps_order(stream: EventStream) -> None:
    bad = {5, 7}

    @consumer(topic=NUMBERS, emits=[OUT], retry=FAST, on_poison="block")
    def handle(batch: Batch) -> None:
        for record in batch:
            if record.data["n"] in bad:
                raise ValueError("stop")
            batch.emit(OUT.event(n=record.data["n"]))

    fill(stream, NUMBERS, numbers(10))
    for _ in range(2):
        with pytest.raises(PoisonBlockedError, match=r"record 5 .* ValueError: stop") as caught:
            run_pending(stream, handle)
        assert caught.value.facts["position"] == ("numbers", 0, 5)
    assert stream.dead_letters() == []
    assert committed(stream, handle) == [0]
    bad.clear()
    run_pending(stream, handle)
    assert values(stream, OUT) == list(range(10))


def test_a_transient_failure_in_a_probe_is_retried_and_the_search_goes_on(stream: EventStream) -> None:
    calls = 0

    @consumer(topic=NUMBERS, emits=[OUT], retry=FAST)
    def handle(batch: Batch) -> None:
        nonlocal calls
        calls += 1
        if calls in (3, 5):
            raise ConnectionError
        for record in batch:
            if record.data["n"] == 6:
                raise ValueError
            batch.emit(OUT.event(n=record.data["n"]))

    fill(stream, NUMBERS, numbers(16))
    run_pending(stream, handle)
    assert values(stream, OUT) == [n for n in range(16) if n != 6]
    assert [letter.offset for letter in stream.dead_letters()] == [6]


def test_a_transient_failure_in_probes_can_spend_the_budget(stream: EventStream) -> None:
    away = True

    @consumer(topic=NUMBERS, emits=[OUT], retry=FAST)
    def handle(batch: Batch) -> None:
        if away and len(batch) < 8:
            raise ConnectionError
        for record in batch:
            if record.data["n"] == 6:
                raise ValueError
            batch.emit(OUT.event(n=record.data["n"]))

    fill(stream, NUMBERS, numbers(8))
    with pytest.raises(RetriesExhaustedError):
        run_pending(stream, handle)
    assert stream.dead_letters() == []
    away = False
    run_pending(stream, handle)
    assert [letter.offset for letter in stream.dead_letters()] == [6]
    assert values(stream, OUT) == [0, 1, 2, 3, 4, 5, 7]


class TestDeaths:
    """Processes that vanish while handling."""

    def test_they_are_counted_and_one_below_the_budget_is_just_tried_again(self, stream: EventStream) -> None:
        @consumer(topic=NUMBERS, emits=[OUT], retry=FAST)
        def handle(batch: Batch) -> None:
            for record in batch:
                batch.emit(OUT.event(n=record.data["n"], attempt=batch.attempt))

        fill(stream, NUMBERS, numbers(3))
        begin(stream, handle, [Range("numbers", 0, 0, 3)])
        die_again(stream, handle)
        (left,) = open_intents(stream, handle)
        assert (left.attempt, left.deaths, left.running) == (2, 1, True)
        report = run_pending(stream, handle)
        assert values(stream, OUT, "attempt") == [3, 3, 3]
        assert (report.batches[0].attempt, report.batches[0].batch_id) == (3, "b1")

    @pytest.mark.parametrize("killer", [0, 3, 7])
    def test_a_record_that_kills_the_process_is_found(
        self, stream: EventStream, monkeypatch: pytest.MonkeyPatch, killer: int
    ) -> None:
        mortal = Mortal(stream, monkeypatch)

        @consumer(topic=NUMBERS, emits=[OUT], retry=FAST)
        def handle(batch: Batch) -> None:
            for record in batch:
                if record.data["n"] == killer:
                    mortal.die()
                batch.emit(OUT.event(n=record.data["n"]))

        fill(stream, NUMBERS, numbers(8))
        mortal.run(lambda: run_pending(stream, handle), limit=2 * FAST.max_attempts + 3)
        (letter,) = stream.dead_letters()
        assert (letter.offset, letter.error_type) == (killer, "ProcessDied")
        assert values(stream, OUT) == [n for n in range(8) if n != killer]

    def test_two_killers_and_one_poison(self, stream: EventStream, monkeypatch: pytest.MonkeyPatch) -> None:
        mortal = Mortal(stream, monkeypatch)

        @consumer(topic=NUMBERS, emits=[OUT], retry=FAST)
        def handle(batch: Batch) -> None:
            for record in batch:
                if record.data["n"] in (2, 9):
                    mortal.die()
                if record.data["n"] == 5:
                    raise ValueError
                batch.emit(OUT.event(n=record.data["n"]))

        fill(stream, NUMBERS, numbers(12))
        mortal.run(lambda: run_pending(stream, handle), limit=2 * (2 * FAST.max_attempts + 4))
        assert sorted((letter.offset, letter.error_type) for letter in stream.dead_letters()) == [
            (2, "ProcessDied"),
            (5, "ValueError"),
            (9, "ProcessDied"),
        ]
        assert values(stream, OUT) == [n for n in range(12) if n not in (2, 5, 9)]

    def test_a_killer_in_a_group_that_blocks_is_named_and_a_fix_gets_past_it(
        self, stream: EventStream, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mortal = Mortal(stream, monkeypatch)
        fixed = False

        @consumer(topic=NUMBERS, emits=[OUT], retry=FAST, on_poison="block")
        def handle(batch: Batch) -> None:
            for record in batch:
                if record.data["n"] == 2 and not fixed:
                    mortal.die()
                batch.emit(OUT.event(n=record.data["n"]))

        fill(stream, NUMBERS, numbers(8))
        with pytest.raises(PoisonBlockedError, match=r"record 2 .* ProcessDied"):
            mortal.run(lambda: run_pending(stream, handle), limit=2 * FAST.max_attempts + 3)
        fixed = True
        run_pending(stream, handle)
        assert values(stream, OUT) == list(range(8))

    def test_more_killers_than_max_poison_and_a_fix(self, stream: EventStream, monkeypatch: pytest.MonkeyPatch) -> None:
        mortal = Mortal(stream, monkeypatch)
        fixed = False

        @consumer(topic=NUMBERS, emits=[OUT], retry=FAST, max_poison=0)
        def handle(batch: Batch) -> None:
            for record in batch:
                if record.data["n"] == 2 and not fixed:
                    mortal.die()
                batch.emit(OUT.event(n=record.data["n"]))

        fill(stream, NUMBERS, numbers(8))
        with pytest.raises(SystemicFailureError):
            mortal.run(lambda: run_pending(stream, handle), limit=2 * FAST.max_attempts + 3)
        assert stream.dead_letters() == []
        fixed = True
        run_pending(stream, handle)
        assert stream.dead_letters() == []
        assert values(stream, OUT) == list(range(8))

    def test_a_probe_found_open_goes_on_where_it_was(self, stream: EventStream) -> None:
        sizes: list[int] = []

        @consumer(topic=NUMBERS, retry=FAST)
        def handle(batch: Batch) -> None:
            sizes.append(len(batch))
            for record in batch:
                if record.data["n"] == 4:
                    raise ValueError

        fill(stream, NUMBERS, numbers(100))
        begin(stream, handle, [Range("numbers", 0, 0, 100)], probe=Probe(3, 7, 5, "ValueError", "x"), deaths=1)
        run_pending(stream, handle)
        assert sizes == [4, 5, 99], "5 died, so it is suspected; 4 passes; 5 is tried again; then all but the poison"
        assert [(letter.offset, letter.error_type) for letter in stream.dead_letters()] == [(4, "ValueError")]

    def test_a_released_probe_is_tried_again(self, stream: EventStream) -> None:
        sizes: list[int] = []

        @consumer(topic=NUMBERS, retry=FAST)
        def handle(batch: Batch) -> None:
            sizes.append(len(batch))
            for record in batch:
                if record.data["n"] == 5:
                    raise ValueError

        fill(stream, NUMBERS, numbers(100))
        begin(stream, handle, [Range("numbers", 0, 0, 100)], probe=Probe(3, 7, None, "ValueError", "x"), running=False)
        run_pending(stream, handle)
        assert sizes == [5, 6, 99]
        assert [letter.offset for letter in stream.dead_letters()] == [5]

    @pytest.mark.parametrize("deaths", [FAST.max_attempts - 1, FAST.max_attempts, 20])
    def test_deaths_for_reasons_of_their_own_cost_no_record(self, stream: EventStream, deaths: int) -> None:
        @consumer(topic=NUMBERS, emits=[OUT], retry=FAST)
        def handle(batch: Batch) -> None:
            for record in batch:
                batch.emit(OUT.event(n=record.data["n"]))

        fill(stream, NUMBERS, numbers(20))
        begin(stream, handle, [Range("numbers", 0, 0, 20)])
        die_again(stream, handle, times=deaths)
        run_pending(stream, handle)
        assert stream.dead_letters() == []
        assert values(stream, OUT) == list(range(20))

    @pytest.mark.parametrize("trying", [1, 10, 19, 20])
    def test_a_probe_that_was_killed_is_a_false_trail(self, stream: EventStream, trying: int) -> None:
        @consumer(topic=NUMBERS, emits=[OUT], retry=FAST)
        def handle(batch: Batch) -> None:
            for record in batch:
                if record.data["n"] == 12:
                    raise ValueError
                batch.emit(OUT.event(n=record.data["n"]))

        fill(stream, NUMBERS, numbers(20))
        probe = Probe(0, 20, trying, "ProcessDied", "x")
        begin(stream, handle, [Range("numbers", 0, 0, 20)], probe=probe, deaths=3)
        run_pending(stream, handle)
        assert [(letter.offset, letter.error_type) for letter in stream.dead_letters()] == [(12, "ValueError")]
        assert values(stream, OUT) == [n for n in range(20) if n != 12]
