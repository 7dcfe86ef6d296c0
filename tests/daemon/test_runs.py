"""Run mode under the real daemon: sensors, a schedule, and Materialize while a sensor's run is under way.

The tests share one daemon; each has its own groups.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.harness import QUEUED, Daemon
from tests.daemon.runs_defs import MET, NIGHTLY, PILED, QUIET, STREAMED

pytestmark = [pytest.mark.daemon, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path_factory.mktemp("runs"), Path(__file__).with_name("runs_defs.py"), QUEUED)
    try:
        for topic in (STREAMED, PILED, MET, NIGHTLY, QUIET):
            daemon.stream.create_topic(topic)
        # What takes time happens while the tests are busy with others; the schedule fires at the next full minute.
        daemon.hold("met")
        for topic, count in ((STREAMED, 25), (PILED, 5), (MET, 10), (NIGHTLY, 30)):
            daemon.publish(topic, count)
        yield daemon.start()
    finally:
        daemon.close()


def test_a_sensor_ticks_and_its_run_commits(daemon: Daemon) -> None:
    for count, runs in ((25, 1), (17, 2)):
        if runs == 2:
            daemon.publish(STREAMED, count)
        daemon.wait_done("streamed")
        run = daemon.runs("streamed_job")[-1].dagster_run
        daemon.wait(lambda run=run: daemon.status(run.run_id) == "SUCCESS", "the run to end")  # type: ignore[misc]
        assert len(daemon.runs("streamed_job")) == runs
        assert run.tags["djp/reason"] == ("first events" if runs == 1 else "17 events pending")
        (output,) = daemon.outputs("streamed")[runs - 1 :]
        assert run.tags["djp/batch_id"] == output["batch"]
        assert output["pid"] == daemon.pid_of(run.run_id)
        found = daemon.materializations("streamed")
        assert [record["events"] for record in found] == [17, 25][-runs:]
        assert found[0]["run_id"] == run.run_id
        assert found[0]["last_batch_id"] == output["batch"]
        assert (found[0]["batches"], found[0]["emitted"], found[0]["attempt"]) == (1, count, 1)
        assert (found[0]["dead_letters"], found[0]["lag_events"]) == (0, 0)
        assert found[0]["events_per_second"] > 0
    daemon.wait_tick("streamed_sensor", "nothing is pending")
    assert len(daemon.runs("streamed_job")) == 2
    daemon.check_once("streamed", STREAMED)


def test_a_batch_sensor_waits_for_its_threshold_and_cuts_by_it(daemon: Daemon) -> None:
    daemon.wait_tick("piled_batch_sensor", "pending; waiting for events 20", after=daemon.started_at)
    assert daemon.runs("piled_job") == []
    daemon.wait_done("aged")
    (by_age,) = daemon.outputs("aged")
    assert by_age["reason"] == "age"
    oldest = daemon.books.db.execute(
        "SELECT min(append_micros) FROM djp_record_batches JOIN djp_topics USING (topic_id) WHERE name = ?",
        (PILED.name,),
    ).fetchone()[0]
    assert by_age["at"] - oldest / 1e6 >= 3

    daemon.publish(PILED, 40)
    daemon.wait(lambda: daemon.pending("piled") == 5, "what reaches the threshold to be done")
    assert [len(output["seen"]) for output in daemon.outputs("piled")] == [20, 20]
    assert {output["reason"] for output in daemon.outputs("piled")} == {"events"}
    run = daemon.runs("piled_job")[-1].dagster_run
    daemon.wait(lambda: daemon.status(run.run_id) == "SUCCESS", "the run to end")
    (materialized,) = daemon.materializations("piled")
    assert (materialized["events"], materialized["batches"], materialized["lag_events"]) == (40, 2, 5)

    daemon.wait_done("aged")
    assert [len(output["seen"]) for output in daemon.outputs("aged")] == [5, 20, 20]
    daemon.check_once("aged", PILED)
    daemon.wait_tick("piled_batch_sensor", "pending; waiting for events 20")
    assert len(daemon.runs("piled_job")) == 1


def test_materialize_while_the_run_of_the_sensor_is_under_way(daemon: Daemon) -> None:
    daemon.wait(lambda: daemon.held("met"), "the sensor's run to handle")
    (first,) = daemon.run_ids("met_job")
    daemon.publish(MET, 15)

    launched = daemon.spawn("dagster", "job", "launch", "-f", str(daemon.definitions), "-j", "met_job")
    assert launched.wait(120) == 0, (daemon.folder / "dagster.log").read_text()
    (by_hand,) = set(daemon.run_ids("met_job")) - {first}
    daemon.wait(lambda: daemon.has_begun(by_hand), "the second run to begin")
    assert daemon.status(first) == "STARTED"
    assert daemon.outputs("met") == []
    daemon.let_go("met")

    daemon.wait_done("met")
    for run_id in (first, by_hand):
        daemon.wait(lambda run_id=run_id: daemon.status(run_id) == "SUCCESS", "both runs to end")  # type: ignore[misc]
    assert [output["pid"] for output in daemon.outputs("met")] == [daemon.pid_of(first), daemon.pid_of(by_hand)]
    assert [len(output["seen"]) for output in daemon.outputs("met")] == [10, 15]
    assert [record["events"] for record in daemon.materializations("met")] == [15, 10]
    daemon.check_once("met", MET)


def test_a_schedule_fires_and_skips(daemon: Daemon) -> None:
    daemon.wait_done("nightly")
    daemon.wait_tick("quiet_schedule", "nothing is pending", after=daemon.started_at - 60)
    assert len(daemon.runs("nightly_job")) == 1
    (run,) = (record.dagster_run for record in daemon.runs("nightly_job"))
    assert run.tags["dagster/schedule_name"] == "nightly_schedule"
    daemon.wait(lambda: daemon.status(run.run_id) == "SUCCESS", "the run to end")
    assert [record["events"] for record in daemon.materializations("nightly")] == [30]
    daemon.check_once("nightly", NIGHTLY)
    assert daemon.runs("quiet_job") == []
