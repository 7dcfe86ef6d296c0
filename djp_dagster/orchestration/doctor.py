"""The part of ``djp doctor`` about Dagster: its daemon, queue, runs and settings, and the definitions. Looks only."""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import dagster as dg

from djp_dagster.doctor import Finding, is_held
from djp_dagster.errors import DjpError
from djp_dagster.orchestration import _compat
from djp_dagster.orchestration.assets import BY_EVENT_ID
from djp_dagster.orchestration.tags import GROUP_TAG, STREAM_KEY, WORKER_TAG, run_id_of, topic_of
from djp_dagster.streams.stream import EventStream

DAEMON_SILENT_S = 120.0
"""Daemons write a heartbeat every 30 s; one silent for longer than this is gone."""
LONG_QUEUED_S = 300.0
UNLEASED_S = 120.0
"""By then a run that works for a group holds a lease, or waits for one."""
MANY_ON_SQLITE = 3
_MOST_RUNS = 1000
_WAITING = [dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.QUEUED]
_TAKING_SLOTS = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]
_ASSET_JOB = "__ASSET_JOB"


def examine(
    stream: EventStream | None, *, home: str | None, file: Path | None = None, module: str | None = None
) -> Iterator[Finding]:
    """Findings about the instance of DAGSTER_HOME, if ``home`` is set, and about definitions, if any are named."""
    with contextlib.ExitStack() as stack:
        instance: dg.DagsterInstance | None = None
        if home:
            try:
                instance = stack.enter_context(dg.DagsterInstance.get())
            except Exception as error:  # noqa: BLE001 - whatever its settings raise is the finding
                what = f"the instance does not load: {error}"
                yield Finding("problem", "instance", home, what, "mend DAGSTER_HOME, or its dagster.yaml")
            else:
                yield Finding("ok", "instance", home, "the Dagster instance loads")
        if instance is not None:
            yield from examine_instance(instance, stream)
        if file is not None or module is not None:
            yield from examine_definitions(instance, stream, file=file, module=module)


def examine_instance(instance: dg.DagsterInstance, stream: EventStream | None) -> Iterator[Finding]:
    """Findings about daemon, monitoring, queue, runs and settings."""
    yield from _daemons(instance)
    yield from _monitoring(instance)
    running = instance.get_run_records(dg.RunsFilter(statuses=_TAKING_SLOTS), limit=_MOST_RUNS)
    yield from _slots(instance, running)
    yield from _waiting(instance)
    if stream is not None:
        yield from _stuck(stream, running)
    yield from _settings(instance, running)


def _daemons(instance: dg.DagsterInstance) -> Iterator[Finding]:
    beats = instance.get_daemon_heartbeats()
    missing = []
    oldest_s = 0.0
    for kind in instance.get_required_daemon_types():
        beat = beats.get(kind)
        if beat is None or time.time() - beat.timestamp > DAEMON_SILENT_S:
            missing.append(f"{kind} ({'never' if beat is None else f'{time.time() - beat.timestamp:.0f} s ago'})")
            continue
        oldest_s = max(oldest_s, time.time() - beat.timestamp)
        if beat.errors:
            what = (beat.errors[0].message or "").strip().splitlines() or ["no message"]
            yield Finding("warning", "daemon", f"daemon {kind}", f"its last error: {what[0][:300]}", "see its log")
    if missing:
        yield Finding(
            "problem",
            "daemon",
            "dagster-daemon",
            f"no heartbeat of {', '.join(missing)}: sensors, schedules and queued runs stand still",
            "start dagster-daemon run, or dagster dev, with this DAGSTER_HOME and -f, -m or -w as for the webserver",
        )
    else:
        yield Finding("ok", "daemon", "dagster-daemon", f"all its daemons were alive {oldest_s:.0f} s ago")


def _monitoring(instance: dg.DagsterInstance) -> Iterator[Finding]:
    if instance.run_monitoring_enabled:
        yield Finding("ok", "run-monitoring", "run_monitoring", "is on")
        return
    yield Finding(
        "warning",
        "run-monitoring",
        "run_monitoring",
        "is off: a run whose process died stays STARTED, and keeps its slot, until the group's sensor finds that its "
        "lease ran out; a run that could not be started stays NOT_STARTED",
        "dagster.yaml: run_monitoring: {enabled: true}",
    )


def _slots(instance: dg.DagsterInstance, running: Sequence[dg.RunRecord]) -> Iterator[Finding]:
    queue = instance.get_concurrency_config().run_queue_config
    workers = sum(WORKER_TAG in record.dagster_run.tags for record in running)
    if queue is None or queue.max_concurrent_runs < 0:
        yield Finding("ok", "slots", "run queue", f"no limit on concurrent runs; {workers} are workers")
        return
    slots = queue.max_concurrent_runs
    what = f"{workers} of {slots} slots are taken by workers, {len(running) - workers} by other runs"
    remedy = "dagster.yaml: concurrency: {runs: {max_concurrent_runs: N}}; a worker keeps its slot as long as it lives"
    if len(running) >= slots and workers:
        yield Finding(
            "problem" if workers >= slots else "warning", "slots", "run queue", f"{what}: none is free", remedy
        )
    elif workers * 2 > slots:
        yield Finding("warning", "slots", "run queue", what, remedy)
    else:
        yield Finding("ok", "slots", "run queue", what)


def _waiting(instance: dg.DagsterInstance) -> Iterator[Finding]:
    now = time.time()
    for record in instance.get_run_records(dg.RunsFilter(statuses=_WAITING), limit=_MOST_RUNS):
        run, age_s = record.dagster_run, now - record.create_timestamp.timestamp()
        if age_s > LONG_QUEUED_S and (GROUP_TAG in run.tags or WORKER_TAG in run.tags):
            yield Finding(
                "warning",
                "waiting-run",
                f"run {run.run_id[:8]} ({run.job_name})",
                f"is {run.status.value} for {age_s / 60:.0f} min",
                "is the daemon alive, and a slot free?"
                if run.status is dg.DagsterRunStatus.QUEUED
                else "its launch failed: delete it, or turn run_monitoring on; the sensor asks again",
            )


def _stuck(stream: EventStream, running: Sequence[dg.RunRecord]) -> Iterator[Finding]:
    """Runs that should hold leases and do not."""
    try:
        holders, alive = _at_work(stream)
    except DjpError:
        return  # said of the stream already
    for record in running:
        run, age_s = record.dagster_run, time.time() - (record.start_time or time.time())
        if run.status is not dg.DagsterRunStatus.STARTED or age_s < UNLEASED_S or run.run_id in alive:
            continue
        group, worker = run.tags.get(GROUP_TAG), run.tags.get(WORKER_TAG)
        if group is None and worker is None:
            continue
        waits = worker is None and group in holders
        yield Finding(
            "warning" if waits else "problem",
            "stuck-run",
            f"run {run.run_id[:8]} ({run.job_name})",
            f"is STARTED for {age_s / 60:.0f} min and holds no lease: "
            + ("it waits for whoever does, or its process is gone" if waits else "its process is gone or hangs"),
            f"see its log; if it is gone: dagster run cancel {run.run_id}, or mark it as failed in the UI",
        )


def _at_work(stream: EventStream) -> tuple[set[str], set[str]]:
    """The groups that somebody holds tasks of; and the runs that hold leases, or say that they are there."""
    now = stream.log.now_micros()
    held: set[str] = set()
    owners: set[str] = set()
    for info in stream.groups():
        holding = {one.owner for one in stream.coordinator.tasks(info.name) if one.owner and is_held(one, now)}
        if holding:
            held.add(info.name)
        owners |= holding | {one.owner for one in stream.coordinator.members(info.name) if one.live}
    return held, {run_id for owner in owners if (run_id := run_id_of(owner)) is not None}


def _settings(instance: dg.DagsterInstance, running: Sequence[dg.RunRecord]) -> Iterator[Finding]:
    if not instance.get_sensor_settings().get("use_threads"):
        yield Finding(
            "warning",
            "sensor-threads",
            "sensors",
            "are looked at one after the other: one slow sensor delays all others",
            "dagster.yaml: sensors: {use_threads: true, num_workers: 4}",
        )
    kept = _compat.sensor_tick_retention_days(instance)
    for_ever = [status for status in ("SUCCESS", "FAILURE") if kept.get(status, -1) < 0]
    if for_ever:
        yield Finding(
            "warning",
            "tick-retention",
            "sensor ticks",
            f"{' and '.join(for_ever)} ticks are kept for ever; a 5 s sensor can make 17,000 a day",
            "dagster.yaml: retention: {sensor: {purge_after_days: {skipped: 1, success: 7, failure: 30}}}",
        )
    if _compat.keeps_runs_in_sqlite(instance) and len(running) > MANY_ON_SQLITE:
        yield Finding(
            "warning",
            "sqlite-storage",
            "Dagster's storage",
            f"is SQLite, with {len(running)} runs at once: writers wait for each other, or find it locked",
            "dagster.yaml: storage: {postgres: ...}",
        )


def examine_definitions(
    instance: dg.DagsterInstance | None,
    stream: EventStream | None = None,
    *,
    file: Path | None = None,
    module: str | None = None,
) -> Iterator[Finding]:
    """Findings about the definitions of a file or module: what is off, in subprocesses, or unlike the stream."""
    subject = str(file or module)
    try:
        # What the code prints while it is imported is not what the doctor says.
        with contextlib.redirect_stdout(sys.stderr):
            repository = _compat.load_repository(file=file, module=module)
            jobs = {job.name: job for job in repository.get_all_jobs() if STREAM_KEY in job.required_resource_keys}
    except Exception as error:  # noqa: BLE001 - whatever the code raises is the finding
        what = " ".join(f"{type(error).__name__}: {error}".split())
        yield Finding("problem", "definitions", subject, f"the definitions do not load: {what[:500]}", "mend the code")
        return
    yield Finding("ok", "definitions", subject, f"the definitions load; {len(jobs)} jobs use the stream")
    for job in jobs.values():
        if not _compat.runs_in_process(job):
            yield _subprocesses(job)
    if stream is not None:
        yield from _what_differs(stream, repository)
    if instance is not None:
        where = f"-f {file}" if file is not None else f"-m {module}"
        yield from _what_is_off(instance, repository, set(jobs), where)


def _what_differs(stream: EventStream, repository: dg.RepositoryDefinition) -> Iterator[Finding]:
    """Topics that the definitions declare, and the stream has otherwise: whoever registers them is refused."""
    try:
        known = {info.name: info for info in stream.topics()}
    except DjpError:
        return  # said of the stream already
    for node in repository.asset_graph.asset_nodes:
        name = topic_of(node.key)
        info = known.get(name) if name is not None else None
        if info is None or not {"partitions", "key"} <= node.metadata.keys():
            continue  # an asset of that key need not be one of ours
        declared = node.metadata["partitions"], node.metadata["key"]
        there = info.partitions, info.key or BY_EVENT_ID
        if declared != there:
            yield Finding(
                "problem",
                "topic-differs",
                f"topic {name}",
                f"is declared with {_spread(*declared)}, and the stream has it with {_spread(*there)}",
                "declare it as it is; or, if its events may be lost, stream.delete_topic(...), and publish anew",
            )


def _spread(partitions: object, key: object) -> str:
    return f"partitions={partitions}, key={key}"


def _subprocesses(job: dg.JobDefinition) -> Finding:
    name = "Materialize (the job of all assets)" if job.name == _ASSET_JOB else f"job {job.name}"
    return Finding(
        "warning",
        "executor",
        name,
        f"uses {job.executor_def.name}, which starts a process per step: seconds before the first event",
        "dg.Definitions(executor=dg.in_process_executor)"
        if job.name == _ASSET_JOB
        else "give it executor_def=dg.in_process_executor",
    )


def _what_is_off(
    instance: dg.DagsterInstance, repository: dg.RepositoryDefinition, jobs: set[str], where: str
) -> Iterator[Finding]:
    states = _compat.states_by_name(instance)
    for sensor in repository.sensor_defs:
        ours = STREAM_KEY in sensor.required_resource_keys or any(target.job_name in jobs for target in sensor.targets)
        declared = sensor.default_status is dg.DefaultSensorStatus.RUNNING
        if ours and not _is_on(states.get(sensor.name), declared):
            yield _off("sensor", sensor.name, where)
    for schedule in repository.schedule_defs:
        declared = schedule.default_status is dg.DefaultScheduleStatus.RUNNING
        ours = STREAM_KEY in schedule.required_resource_keys or schedule.job_name in jobs
        if ours and not _is_on(states.get(schedule.name), declared):
            yield _off("schedule", schedule.name, where)


def _is_on(set_to: set[str] | None, declared: bool) -> bool:
    """Sensors of the same name in several code locations count as on if one of them is."""
    return declared if not set_to else "RUNNING" in set_to or (declared and "DECLARED_IN_CODE" in set_to)


def _off(kind: str, name: str, where: str) -> Finding:
    remedy = f"turn it on in the UI, or: dagster {kind} start {name} {where}"
    return Finding("warning", f"{kind}-off", f"{kind} {name}", "is off", remedy)
