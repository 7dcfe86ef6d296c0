"""Asset checks of a consumer: is its lag small, are there dead letters, does its worker live; and who evaluates them.

In a run they are a step after the asset. Between runs `build_check_sensor` evaluates them, and tells Dagster what has
changed.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import dagster as dg
import msgspec

from djp_dagster.errors import UnknownGroupError
from djp_dagster.orchestration.metadata import lag_metadata
from djp_dagster.orchestration.step import stream_of
from djp_dagster.orchestration.tags import STREAM_KEY, consumer_key
from djp_dagster.processing.consumer import Consumer
from djp_dagster.resources.event_stream import SqlEventStream
from djp_dagster.streams.stream import EventStream
from djp_dagster.units import Duration, parse_seconds

LAG, DEAD_LETTERS, WORKER, FRESH = "lag_below", "no_pending_dead_letters", "worker_alive", "fresh"
REBUILT = "made_by_this_code"
_REPEAT_S = 600.0


class Verdict(NamedTuple):
    """What a check says now."""

    passed: bool
    description: str
    metadata: Mapping[str, Any] = {}


def build_stream_checks(
    consumer: Consumer,
    *,
    max_lag_events: int | None = None,
    max_lag_age: Duration | None = None,
    worker: bool = False,
    fresh_within: Duration | None = None,
    rebuilt: bool = False,
    stuck_after: Duration = "10min",
    blocking: bool = False,
) -> dg.AssetChecksDefinition:
    """Checks of a consumer's asset: ``no_pending_dead_letters``; if asked for, ``lag_below, worker_alive, fresh``.

    They run after the asset in its own runs, if it was materialized, and from the asset's page; `build_check_sensor`
    keeps them up to date otherwise.

    Args:
        consumer: whose group to look at.
        max_lag_events: ``lag_below`` fails if more events than this are pending.
        max_lag_age: ``lag_below`` fails if the oldest pending event is older, e.g. ``"5min"``.
        worker: ``worker_alive`` fails if no worker is at work, or one batch takes longer than ``stuck_after``.
        fresh_within: ``fresh`` fails if a table (or other state) lacks an event that is older; for what others read.
        rebuilt: ``made_by_this_code`` warns if the state was begun by another version of the code: rebuild it, see
            `build_rebuild_job`.
        stuck_after: how long a batch may take.
        blocking: whether a failed check holds back what is downstream in the same run.
    """
    key = consumer_key(consumer)
    limits: dict[str, dict[str, Any]] = {DEAD_LETTERS: {}}
    if max_lag_events is not None or max_lag_age is not None:
        age_s = None if max_lag_age is None else parse_seconds(max_lag_age, name="max_lag_age")
        limits[LAG] = {"max_lag_events": max_lag_events, "max_lag_age_seconds": age_s}
    if rebuilt:
        limits[REBUILT] = {"code_version": consumer.code_version}
    if fresh_within is not None:
        limits[FRESH] = {"fresh_within_seconds": parse_seconds(fresh_within, name="fresh_within")}
    if worker:
        limits[WORKER] = {"stuck_after_seconds": parse_seconds(stuck_after, name="stuck_after")}
    specs = [
        dg.AssetCheckSpec(
            name,
            asset=key,
            blocking=blocking,
            description=_DESCRIPTIONS[name],
            metadata={"group": consumer.group} | {limit: value for limit, value in given.items() if value is not None},
        )
        for name, given in limits.items()
    ]

    @dg.multi_asset_check(name=f"{key.to_python_identifier()}_checks", specs=specs, required_resource_keys={STREAM_KEY})
    def stream_checks(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        stream = stream_of(context.resources)
        for spec in specs:
            verdict = evaluate(stream, spec)
            yield dg.AssetCheckResult(
                passed=verdict.passed,
                check_name=spec.name,
                asset_key=spec.asset_key,
                description=verdict.description,
                metadata=verdict.metadata,
                severity=_severity_of(spec),
            )

    return stream_checks


def build_check_sensor(
    *checks: dg.AssetChecksDefinition,
    name: str = "stream_checks_sensor",
    minimum_interval_seconds: int = 30,
    default_status: dg.DefaultSensorStatus = dg.DefaultSensorStatus.STOPPED,
) -> dg.SensorDefinition:
    """A sensor that evaluates checks of `build_stream_checks` and reports what is new, without any run.

    A tick looks a few rows up for each consumer. What it reports is a check evaluation in Dagster's event log, 10 to 20
    ms each: at a change, after a materialization, and every ten minutes.

    Args:
        checks: what `build_stream_checks` made.
        name: the sensor's name.
        minimum_interval_seconds: how often to look.
        default_status: off until somebody turns it on, unless told.
    """
    specs = [spec for definition in checks for spec in definition.check_specs]

    @dg.sensor(
        name=name,
        minimum_interval_seconds=minimum_interval_seconds,
        default_status=default_status,
        description="Evaluates the checks of the consumers between their runs.",
    )
    def check_sensor(
        context: dg.SensorEvaluationContext, event_stream: SqlEventStream
    ) -> dg.SensorResult | dg.SkipReason:
        stream = event_stream.open()
        said, now = _said(context.cursor), time.time()
        latest = _latest_materializations(context.instance, specs)
        changed: dict[str, dg.AssetCheckEvaluation] = {}
        for spec in specs:
            check, verdict = _id_of(spec), evaluate(stream, spec)
            before, since = said.get(check), latest.get(spec.asset_key)
            # Dagster shows a check that is older than its asset's latest materialization as not executed.
            if before is None or before[::2] != (verdict.passed, since) or now - before[1] > _REPEAT_S:
                said[check] = (verdict.passed, now, since)
                changed[check] = _evaluation(spec, verdict)
        if not changed:
            return dg.SkipReason("no check has changed")
        told = ", ".join(f"{check} {'passes' if one.passed else 'fails'}" for check, one in changed.items())
        return dg.SensorResult(
            asset_events=list(changed.values()),
            cursor=msgspec.json.encode(said).decode(),
            skip_reason=f"reported: {told}",
        )

    return check_sensor


def evaluate(stream: EventStream, spec: dg.AssetCheckSpec) -> Verdict:
    """What the check says now. An outage of the stream raises."""
    group = str(spec.metadata["group"])
    try:
        if spec.name == LAG:
            return _lag(stream, group, spec.metadata)
        if spec.name == REBUILT:
            return _rebuilt(stream, group, str(spec.metadata["code_version"]))
        if spec.name == FRESH:
            return _fresh(stream, group, float(str(spec.metadata["fresh_within_seconds"])))
        if spec.name == DEAD_LETTERS:
            count = stream.coordinator.count_dead_letters(group, "pending")
            return Verdict(count == 0, f"{count} dead letters are pending", {"pending_dead_letters": count})
        return _worker(stream, group, float(str(spec.metadata["stuck_after_seconds"])))
    except UnknownGroupError:
        return Verdict(spec.name != WORKER, f"group {group!r} does not exist yet: nothing has run")


def _lag(stream: EventStream, group: str, limits: Mapping[str, Any]) -> Verdict:
    pending = stream.pending(group)
    most, oldest = limits.get("max_lag_events"), limits.get("max_lag_age_seconds")
    passed = (most is None or pending.events <= most) and (oldest is None or pending.age_s <= oldest)
    return Verdict(passed, f"{pending.events} pending, the oldest {pending.age_s:.0f} s old", lag_metadata(pending))


def _rebuilt(stream: EventStream, group: str, code_version: str) -> Verdict:
    made_by = stream.coordinator.group(group).code_version
    if made_by in (None, code_version):
        return Verdict(True, "its state was made by the code as it is")
    return Verdict(
        False,
        f"its state was begun by code {made_by}, and the code is {code_version} now: what it holds may be of either. "
        "Rebuild it beside the live version, compare, and promote: rebuild_job",
        {"made_by": made_by, "code_version": code_version},
    )


def _fresh(stream: EventStream, group: str, within_s: float) -> Verdict:
    pending = stream.pending(group)
    told = "it has everything" if not pending.events else f"it lacks events up to {pending.age_s:.0f} s old"
    return Verdict(pending.age_s <= within_s, told, {"staleness_seconds": round(pending.age_s, 3)})


def _worker(stream: EventStream, group: str, stuck_after_s: float) -> Verdict:
    members = [member for member in stream.coordinator.members(group) if member.live]
    working = [member for member in members if not member.paused]
    now = stream.log.now_micros()
    longest_s = max(((now - intent.now_micros) / 1e6 for intent in stream.coordinator.intents(group)), default=0.0)
    figures = {
        "workers": len(working),
        "paused_workers": len(members) - len(working),
        "longest_batch_seconds": longest_s,
    }
    if not working:
        why = "every worker is paused after a failure" if members else "no worker is there"
        return Verdict(False, why, figures)
    if longest_s > stuck_after_s:
        return Verdict(False, f"a batch has been under way for {longest_s:.0f} s", figures)
    return Verdict(True, f"{len(working)} workers are there", figures)


def _evaluation(spec: dg.AssetCheckSpec, verdict: Verdict) -> dg.AssetCheckEvaluation:
    return dg.AssetCheckEvaluation(
        asset_key=spec.asset_key,
        check_name=spec.name,
        passed=verdict.passed,
        description=verdict.description,
        metadata=dict(verdict.metadata),
        severity=_severity_of(spec),
    )


def _severity_of(spec: dg.AssetCheckSpec) -> dg.AssetCheckSeverity:
    return dg.AssetCheckSeverity.WARN if spec.name == REBUILT else dg.AssetCheckSeverity.ERROR


def _id_of(spec: dg.AssetCheckSpec) -> str:
    return f"{spec.asset_key.to_user_string()}:{spec.name}"


Said = tuple[bool, float, int | None]
"""What was said of a check, when, and which materialization of its asset was the latest then."""


def _said(cursor: str | None) -> dict[str, Said]:
    """What was said last. A cursor is a hint: one that cannot be read only makes everything be said again."""
    try:
        return msgspec.json.decode(cursor or "{}", type=dict[str, Said])
    except msgspec.MsgspecError:
        return {}


def _latest_materializations(
    instance: dg.DagsterInstance, specs: Sequence[dg.AssetCheckSpec]
) -> dict[dg.AssetKey, int | None]:
    records = instance.get_asset_records(list({spec.asset_key for spec in specs}))
    return {record.asset_entry.asset_key: record.asset_entry.last_materialization_storage_id for record in records}


_DESCRIPTIONS = {
    LAG: "What is pending is little, and young.",
    DEAD_LETTERS: "No record waits to be redriven or discarded.",
    REBUILT: "The state was made by the code as it is.",
    FRESH: "What others read of it is not older than agreed.",
    WORKER: "A worker is at work, and no batch takes too long.",
}
