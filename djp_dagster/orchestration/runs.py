"""Runs as a tick asks for them: is one at work, did the last ones change nothing, and what is the next one's key.

A run key names what had been done when the run was asked for, the last finished run that found the same, and a run
under way that is waited for no more; so a tick that is evaluated twice asks for one run, and a run that changed
nothing, or never came, can be followed by another.
"""

import time
from collections.abc import Mapping, Sequence

import dagster as dg

from djp_dagster.orchestration.standing import Lookout, Suspects
from djp_dagster.orchestration.tags import DIGEST_TAG, GROUP_TAG, REASON_TAG, STREAM_TAG
from djp_dagster.orchestration.ticks import Look
from djp_dagster.streams.stream import EventStream

IN_FLIGHT = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
FINISHED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]
_PAUSES_S = (0.0, 10.0, 60.0, 300.0, 900.0)
_CROWD = 200


def request_run(
    instance: dg.DagsterInstance,
    stream: EventStream,
    group: str,
    look: Look,
    suspects: Suspects,
    *,
    tags: Mapping[str, str] | None = None,
    run_config: Mapping[str, object] | None = None,
) -> dg.RunRequest | dg.SkipReason:
    """The run a due group needs, or why not now.

    Args:
        instance: where runs are.
        stream: where the group is.
        group: the consumer group.
        look: what the tick saw of it.
        suspects: runs that looked dead before.
        tags: further tags of the run.
        run_config: of the run.
    """
    assert look.reason is not None
    lookout = Lookout(instance, stream, [group], suspects)
    ignored = ""
    for record in in_flight(instance, {GROUP_TAG: group, STREAM_TAG: stream.incarnation}):
        standing = lookout.standing_of(record)
        if standing.counts:
            return dg.SkipReason(f"{look.reason}; {standing.told}")
        ignored = ignored or f":{record.dagster_run.run_id[:8]}"
    if look.holder is not None:
        return dg.SkipReason(f"{look.reason}; {look.holder} is at work")
    finished = instance.get_run_records(
        dg.RunsFilter(tags={DIGEST_TAG: look.digest}, statuses=FINISHED), limit=len(_PAUSES_S)
    )
    wait_s = left_to_wait(_PAUSES_S, finished, time.time())
    if wait_s > 0:
        return dg.SkipReason(
            f"{look.reason}; {len(finished)} runs changed nothing, see the last; trying again in {wait_s:.0f} s"
        )
    last = finished[0].dagster_run.run_id[:8] if finished else "first"
    return dg.RunRequest(
        run_key=f"{group}:{look.digest}:{last}{ignored}",
        tags={**(tags or {}), **tags_of(stream, group, look)},
        run_config=run_config,
    )


def tags_of(stream: EventStream, group: str, look: Look) -> dict[str, str]:
    """The tags of a run asked for after a look."""
    return {
        GROUP_TAG: group,
        STREAM_TAG: stream.incarnation,
        DIGEST_TAG: look.digest,
        REASON_TAG: look.reason or "",
    }


def in_flight(instance: dg.DagsterInstance, tags: Mapping[str, str]) -> list[dg.RunRecord]:
    """The runs under way that carry the tags, the newest first.

    Filtering by status alone is an index look-up; with a tag beside it, SQLite walks all runs that ever had the tag,
    and with two, all pairs of them.
    """
    records = instance.get_run_records(dg.RunsFilter(statuses=IN_FLIGHT), limit=_CROWD)
    if len(records) == _CROWD:
        first = dict([next(iter(tags.items()))])
        records = instance.get_run_records(dg.RunsFilter(tags=first, statuses=IN_FLIGHT), limit=_CROWD)
    return [record for record in records if tags.items() <= record.dagster_run.tags.items()]


def left_to_wait(pauses_s: Sequence[float], in_vain: Sequence[dg.RunRecord], now: float) -> float:
    """Seconds until runs that were in vain may be followed by another: the more there are, the longer the pause."""
    if not in_vain:
        return 0.0
    pause_s = pauses_s[min(len(in_vain), len(pauses_s) - 1)]
    return pause_s - (now - max(record.end_time or 0.0 for record in in_vain))
