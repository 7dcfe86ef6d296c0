"""Following, promoting and rolling back: the protocol of `djp_dagster.versions`."""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from djp_dagster.errors import (
    FencedError,
    GroupMismatchError,
    InvalidSettingError,
    LeaseBusyError,
    NotCaughtUpError,
    StreamBusyError,
    StreamUnavailableError,
    UnknownGroupError,
)
from djp_dagster.processing.consumer import Consumer, fired_up_to
from djp_dagster.processing.crash_points import reach
from djp_dagster.processing.leases import LeaseKeeper, new_owner
from djp_dagster.processing.reports import BatchReport
from djp_dagster.processing.run import run_pending
from djp_dagster.streams.model import GroupSpec, Lease
from djp_dagster.streams.stream import EventStream
from djp_dagster.streams.topics import changelog_of
from djp_dagster.units import Duration, parse_seconds

_log = logging.getLogger(__name__)
Role = Literal["next", "previous"]
ROLES: tuple[Role, ...] = ("next", "previous")
_LONGEST_NAME = 200
_PROMOTER = "promotion"
_LEASE_S = 5.0
_FREEZE_AT_MOST_S = 30.0
_BRIEF_S = 1.0
_LOOK_EVERY_S = 0.05
_TRY_EVERY_S = 0.5
_TRY_AGAIN = (FencedError, LeaseBusyError, NotCaughtUpError, StreamBusyError, StreamUnavailableError)
_Step = Callable[[], "tuple[BatchReport, ...]"]


class Versions(msgspec.Struct, frozen=True):
    """What there is of a group besides the live version.

    Attributes:
        behind: how many records ``next`` and ``previous`` have yet to follow; None if there is no such version.
        code_versions: of the code that made each version's state.
    """

    group: str
    behind: Mapping[str, int | None]
    code_versions: Mapping[str, str | None]


def versions(stream: EventStream, group: str) -> Versions:
    """Which versions of a group there are, and how far behind the live one.

    Raises:
        UnknownGroupError: there is no such group.
    """
    behind: dict[str, int | None] = {}
    codes: dict[str, str | None] = {"live": stream.coordinator.group(group).code_version}
    for role in ROLES:
        try:
            info = stream.coordinator.group(f"{group}.{role}")
            there = sum(stream.positions(info.name).values())
        except UnknownGroupError:
            behind[role] = None
            continue
        behind[role] = max(sum(stream.positions(group).values()) - there, 0)
        codes[role] = info.code_version
    return Versions(group, behind, codes)


def follow(
    stream: EventStream,
    consumer: Consumer,
    *,
    role: Role = "next",
    max_lag_events: int = 0,
    from_what_is_left: bool = False,
    resources: Mapping[str, Any] | None = None,
    state_folder: Path | None = None,
    wait: Duration = "10min",
) -> list[BatchReport]:
    """Step 1: make the follower if it is not there, and let it do what the live group has done.

    It begins where the state of the live group has begun: at its ``start`` when it was made, or where a seek has reset
    its state since.

    Args:
        stream: where the group is.
        consumer: with the code of the follower; stateful.
        role: ``"next"``, or ``"previous"`` for a way back, with the code that made it.
        max_lag_events: stop as soon as it is so little behind.
        from_what_is_left: make it, though retention has removed records of which the live state was made.
        resources: the handler's further parameters.
        state_folder: where local state lies.
        wait: how long to wait for another holder of the follower, and at most for the live group to be caught up with.

    Raises:
        InvalidSettingError: the consumer keeps no state; there is no previous version; or other code has begun it.
        GroupMismatchError: the live group reads other topics.
        StateLostError: retention has removed some of what the state was made of.
        UnknownGroupError: there is no live group; or the follower has been promoted meanwhile.
        NotCaughtUpError: the live group was quicker, for as long as ``wait``.
    """
    _require_stateful(consumer)
    if role == "previous":
        _require_previous(stream, consumer.group)
    else:
        _make(stream, consumer, from_what_is_left)
    step = _handling(stream, consumer, role, resources, state_folder, wait)
    give_up = time.monotonic() + parse_seconds(wait, name="wait")
    reports: list[BatchReport] = []
    while True:
        reports += step()
        behind = versions(stream, consumer.group).behind[role]
        if behind is None:
            stream.coordinator.group(f"{consumer.group}.{role}")  # says that it is gone
        elif behind <= max_lag_events:
            return reports
        if time.monotonic() >= give_up:
            raise NotCaughtUpError(
                f"group '{consumer.group}.{role}' is still {behind} records behind {consumer.group!r}; run more of it, "
                "or publish less for a while",
                group=f"{consumer.group}.{role}",
                records=behind,
            )


def promote(
    stream: EventStream,
    consumer: Consumer,
    *,
    resources: Mapping[str, Any] | None = None,
    state_folder: Path | None = None,
    wait: Duration = "1min",
) -> list[BatchReport]:
    """Steps 2 to 4: make ``<group>.next`` the live version, in one step, at the offset where the live one stands.

    From then on whoever runs the group should do so with this code; it is nobody's business here to stop those who
    do not.

    Args:
        stream: where the group is.
        consumer: with the code of the follower.
        resources: the handler's further parameters.
        state_folder: where local state lies.
        wait: how long to try. The live version is frozen for the last few moments of it, and goes on if it was in vain.

    Returns:
        What the follower had to do in the end.

    Raises:
        UnknownGroupError: there is no follower.
        InvalidSettingError: other code has begun it.
        LeaseBusyError: somebody else is at it.
        NotCaughtUpError: it did not catch up in time; the live version goes on.
    """
    _require_stateful(consumer)
    step = _handling(stream, consumer, "next", resources, state_folder, "5s")
    return _switch(stream, consumer.group, "next", step, wait)


def promote_followed(
    stream: EventStream, group: str, *, role: Role = "next", wait: Duration = "1min"
) -> list[BatchReport]:
    """As `promote`, without the handler: somebody else keeps the follower up to date, or it has nothing left to do.

    Raises:
        UnknownGroupError: there is no such version.
        LeaseBusyError: somebody else is at it.
        NotCaughtUpError: it is behind, and nobody works on it, or not quickly enough; the live version goes on.
    """
    follower = f"{group}.{role}"
    stream.coordinator.group(follower)
    behind = versions(stream, group).behind[role]
    at_work = any(member.live for member in stream.coordinator.members(follower))
    if not at_work and not _has_caught_up(stream, group, follower):
        raise NotCaughtUpError(
            f"group {follower!r} is {behind} records behind {group!r}, and nobody works on it; let it follow, by a "
            "worker, by a run of the rebuild job, or by djp.follow, then promote it",
            group=follower,
            records=behind,
        )
    return _switch(stream, group, role, tuple, wait)


def rollback(
    stream: EventStream,
    consumer: Consumer,
    *,
    resources: Mapping[str, Any] | None = None,
    state_folder: Path | None = None,
    wait: Duration = "1min",
) -> list[BatchReport]:
    """Make ``<group>.previous`` the live version again: the same steps the other way.

    It follows what has been done since it was live, with the code of ``consumer``, and without effect.

    Args:
        stream: where the group is.
        consumer: with the code that made the previous version.
        resources: the handler's further parameters.
        state_folder: where local state lies.
        wait: as of `promote`.

    Raises:
        InvalidSettingError: there is no previous version; or other code has made it.
        LeaseBusyError, NotCaughtUpError: as of `promote`.
    """
    _require_stateful(consumer)
    _require_previous(stream, consumer.group)
    step = _handling(stream, consumer, "previous", resources, state_folder, "5s")
    return _switch(stream, consumer.group, "previous", step, wait)


def abandon(stream: EventStream, group: str, *, role: Role = "next") -> None:
    """Delete the follower, or the previous version. Until then either holds back retention from where it stands.

    Raises:
        UnknownGroupError: there is none.
        LeaseBusyError: somebody works on it.
    """
    stream.delete_group(f"{group}.{role}")


def _switch(stream: EventStream, group: str, role: Role, step: _Step, wait: Duration) -> list[BatchReport]:
    """Steps 1 to 4, until it is done or ``wait`` is over; ``step`` does some of what the follower has to."""
    follower = f"{group}.{role}"
    wanted = stream.coordinator.view(follower).identity
    give_up = time.monotonic() + parse_seconds(wait, name="wait")
    reports: list[BatchReport] = []
    while True:
        try:
            _approach(stream, group, follower, step, give_up, reports)
            _try_to_switch(stream, group, follower, step, give_up, reports)
        except (*_TRY_AGAIN, UnknownGroupError) as error:
            if _is_live(stream, group, wanted):
                return reports  # the answer was lost, or somebody else was quicker
            if isinstance(error, UnknownGroupError) or time.monotonic() >= give_up:
                raise
            _log.info("%s is tried again: %s", _PROMOTER, error)
        else:
            return reports
        time.sleep(_TRY_EVERY_S)


def _is_live(stream: EventStream, group: str, identity: str | None) -> bool:
    try:
        return stream.coordinator.view(group).identity == identity
    except _TRY_AGAIN:
        return False


def _approach(
    stream: EventStream, group: str, follower: str, step: _Step, give_up: float, reports: list[BatchReport]
) -> None:
    """Step 1, until so little is left that the freeze will be brief."""
    while True:
        begun = time.monotonic()
        reports += step()
        now = time.monotonic()
        if now - begun < _BRIEF_S or _has_caught_up(stream, group, follower):
            return
        if now >= give_up:
            raise _not_in_time(group, follower)


def _try_to_switch(
    stream: EventStream, group: str, follower: str, step: _Step, give_up: float, reports: list[BatchReport]
) -> None:
    _require_no_other(stream, group)
    with LeaseKeeper(stream.coordinator, owner=new_owner(_PROMOTER), ttl_s=_LEASE_S) as keeper:
        live = keeper.take_over(group)
        reach("v.frozen")
        until = min(give_up, time.monotonic() + _FREEZE_AT_MOST_S)
        _catch_up(stream, keeper, live, follower, step, until, reports)
        reach("v.caught_up")
        # Whoever has helped it to catch up may hold it for ever.
        held = keeper.take_over(follower)
        stream.coordinator.swap(live, held, becomes=f"{group}.previous")
    reach("v.swapped")


def _require_no_other(stream: EventStream, group: str) -> None:
    """Two who freeze the group from under each other would both never come to an end."""
    for task in stream.coordinator.tasks(group):
        if task.owner is not None and task.owner.startswith(f"{_PROMOTER}-") and not task.worth_asking:
            raise LeaseBusyError(
                f"group {group!r} is being promoted by {task.owner!r}; wait for it", group=group, holder=task.owner
            )


def _catch_up(
    stream: EventStream,
    keeper: LeaseKeeper,
    live: Lease,
    follower: str,
    step: _Step,
    until: float,
    reports: list[BatchReport],
) -> None:
    """Step 3: everything that the frozen version has done, and no more."""
    while not _has_caught_up(stream, live.group, follower):
        if not keeper.holds(live):
            raise FencedError(f"group {live.group!r} was taken from {keeper.owner}", group=live.group)
        if time.monotonic() >= until:
            raise _not_in_time(live.group, follower)
        done = step()
        reports += done
        if not done:
            time.sleep(_LOOK_EVERY_S)


def _has_caught_up(stream: EventStream, group: str, follower: str) -> bool:
    """Whether the follower has handled every record that the live group has, and fired every deadline."""
    coordinator = stream.coordinator
    if stream.positions(follower) != stream.positions(group):
        return False
    for task in range(coordinator.group(follower).tasks):
        due = coordinator.next_deadline(follower, [task])
        if due is not None and due <= fired_up_to(stream, group, [task]):
            return False
    return True


def _not_in_time(group: str, follower: str) -> NotCaughtUpError:
    return NotCaughtUpError(
        f"group {follower!r} did not catch up with {group!r} in time, and that goes on; follow first, or wait longer",
        group=follower,
    )


def _handling(
    stream: EventStream,
    consumer: Consumer,
    role: Role,
    resources: Mapping[str, Any] | None,
    state_folder: Path | None,
    wait: Duration,
) -> _Step:
    """What does all that the follower can do now, or waits for whoever does."""
    follower = consumer.following(role)
    _require_same_code(stream, follower)

    def step() -> tuple[BatchReport, ...]:
        return run_pending(stream, follower, resources=resources, state_folder=state_folder, wait=wait).batches

    return step


def _make(stream: EventStream, consumer: Consumer, from_what_is_left: bool) -> None:
    """The follower, if it is not there."""
    live, topics = stream.coordinator.group(consumer.group), tuple(topic.name for topic in consumer.topics)
    if (live.topics, live.stateful) != (topics, True):
        raise GroupMismatchError(
            f"group {live.name!r} reads {live.topics} (stateful={live.stateful}), and another version of it must do "
            f"so too, not read {topics}; use another group name",
            group=live.name,
        )
    over = len(changelog_of(f"{consumer.group}.previous")) - _LONGEST_NAME
    if over > 0:
        raise InvalidSettingError(
            f"group {consumer.group!r} can have no versions: its name is {over} characters too long",
            setting="group",
            value=consumer.group,
        )
    for topic in consumer.emits:
        stream.create_topic(topic)
    stream.coordinator.ensure_group(
        GroupSpec(
            f"{consumer.group}.next",
            topics,
            stateful=True,
            code_version=consumer.code_version,
            version_of=consumer.group,
            from_what_is_left=from_what_is_left,
        )
    )


def _require_stateful(consumer: Consumer) -> None:
    if not consumer.stateful or consumer.follows is not None:
        raise InvalidSettingError(
            f"consumer {consumer.group!r} keeps no state of its own, so there is nothing to be rebuilt; to handle "
            "records again, seek its group, or replay it",
            setting="consumer",
            value=consumer.group,
        )


def _require_same_code(stream: EventStream, follower: Consumer) -> None:
    """What a version holds is to be of one code. One that has nothing left to follow can be of any."""
    info = stream.coordinator.group(follower.group)
    if info.code_version in (None, follower.code_version) or not _has_more_to_do(stream, follower):
        return
    remedy = "run it with that code" if follower.group.endswith(".previous") else "abandon it, and follow anew"
    raise InvalidSettingError(
        f"group {follower.group!r} was begun by code {info.code_version}, and this is {follower.code_version}: its "
        f"state would be of both; {remedy}",
        setting="code_version",
        value=follower.code_version,
    )


def _has_more_to_do(stream: EventStream, follower: Consumer) -> bool:
    assert follower.follows is not None
    return follower.group.endswith(".next") or not _has_caught_up(stream, follower.follows, follower.group)


def _require_previous(stream: EventStream, group: str) -> None:
    try:
        stream.coordinator.group(f"{group}.previous")
    except UnknownGroupError as error:
        raise InvalidSettingError(
            f"group {group!r} has no previous version; nothing has been promoted", setting="role", value="previous"
        ) from error
