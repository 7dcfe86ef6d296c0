"""Following, promoting and rolling back: the protocol of `djp_dagster.versions`."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from djp_dagster.errors import (
    InvalidSettingError,
    LeaseBusyError,
    NotCaughtUpError,
    UnknownGroupError,
)
from djp_dagster.processing.consumer import Consumer
from djp_dagster.processing.leases import LeaseKeeper, new_owner
from djp_dagster.processing.reports import BatchReport
from djp_dagster.processing.run import run_pending
from djp_dagster.streams.model import Lease
from djp_dagster.streams.stream import EventStream
from djp_dagster.units import Duration, parse_seconds

Role = Literal["next", "previous"]
_FREEZE_S = 5.0
_LOOK_EVERY_S = 0.05


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
    live = stream.coordinator.group(group)
    here = sum(stream.positions(group).values())
    behind: dict[str, int | None] = {}
    codes: dict[str, str | None] = {"live": live.code_version}
    for role in ("next", "previous"):
        try:
            info = stream.coordinator.group(f"{group}.{role}")
        except UnknownGroupError:
            behind[role] = None
            continue
        behind[role] = here - sum(stream.positions(info.name).values())
        codes[role] = info.code_version
    return Versions(group, behind, codes)


def follow(
    stream: EventStream,
    consumer: Consumer,
    *,
    role: Role = "next",
    max_lag_events: int = 0,
    resources: Mapping[str, Any] | None = None,
    state_folder: Path | None = None,
    wait: Duration = "10min",
) -> list[BatchReport]:
    """Step 1: make the follower if it is not there, and let it do what the live group has done.

    Args:
        stream: where the group is.
        consumer: with the code of the follower; stateful.
        role: ``"next"``, or ``"previous"`` for a way back, with the code that made it.
        max_lag_events: stop as soon as it is so little behind.
        resources: the handler's further parameters.
        state_folder: where local state lies.
        wait: how long to wait for another holder of the follower, and at most for the live group to be caught up with.

    Raises:
        InvalidSettingError: the consumer keeps no state; or there is no previous version.
        NotCaughtUpError: the live group was quicker, for as long as ``wait``.
    """
    _require_stateful(consumer)
    follower = consumer.following(role)
    if role == "previous":
        _require_previous(stream, consumer.group)
    stream.coordinator.group(consumer.group)
    follower.register(stream)
    give_up = time.monotonic() + parse_seconds(wait, name="wait")
    reports: list[BatchReport] = []
    while True:
        done = run_pending(stream, follower, resources=resources, state_folder=state_folder, wait=wait)
        reports.extend(done.batches)
        behind = versions(stream, consumer.group).behind[role]
        assert behind is not None
        if behind <= max_lag_events:
            return reports
        if time.monotonic() >= give_up:
            raise NotCaughtUpError(
                f"group {follower.group!r} is still {behind} records behind {consumer.group!r}; run more of it, or "
                "publish less for a while",
                group=follower.group,
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

    Args:
        stream: where the group is.
        consumer: with the code of the follower.
        resources: the handler's further parameters.
        state_folder: where local state lies.
        wait: for how long the live version may be frozen; if the follower does not catch up in time, it goes on.

    Returns:
        What the follower had to do in the end.

    Raises:
        UnknownGroupError: there is no follower.
        NotCaughtUpError: it did not catch up in time; the live version goes on.
    """
    return _switch(stream, consumer, "next", resources, state_folder, wait)


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
        InvalidSettingError: there is no previous version.
        NotCaughtUpError: as of `promote`.
    """
    _require_previous(stream, consumer.group)
    follow(stream, consumer, role="previous", resources=resources, state_folder=state_folder, wait=wait)
    return _switch(stream, consumer, "previous", resources, state_folder, wait)


def abandon(stream: EventStream, group: str, *, role: Role = "next") -> None:
    """Delete the follower, or the previous version.

    Raises:
        UnknownGroupError: there is none.
        LeaseBusyError: somebody works on it.
    """
    stream.delete_group(f"{group}.{role}")


def _switch(
    stream: EventStream,
    consumer: Consumer,
    role: Role,
    resources: Mapping[str, Any] | None,
    state_folder: Path | None,
    wait: Duration,
) -> list[BatchReport]:
    _require_stateful(consumer)
    follower = consumer.following(role)
    stream.coordinator.group(follower.group)
    give_up = time.monotonic() + parse_seconds(wait, name="wait")
    reports: list[BatchReport] = []
    while True:
        with LeaseKeeper(stream.coordinator, owner=new_owner("promotion"), ttl_s=_FREEZE_S) as keeper:
            live = keeper.take_over(consumer.group)
            if _is_quiet(stream, live):
                _catch_up(stream, follower, live, resources, state_folder, give_up, reports)
                held = _lease(keeper, follower.group, give_up)
                if held is not None:
                    stream.coordinator.swap(live, held, becomes=f"{consumer.group}.previous")
                    keeper.forget(live)
                    keeper.forget(held)
                    return reports
        if time.monotonic() >= give_up:
            raise NotCaughtUpError(
                f"group {follower.group!r} did not catch up with {consumer.group!r} within {wait}; that goes on",
                group=follower.group,
            )
        time.sleep(_LOOK_EVERY_S)


def _is_quiet(stream: EventStream, live: Lease) -> bool:
    """Whether the frozen version has fired all its deadlines: else the follower could not tell which it has."""
    due = stream.coordinator.next_deadline(live.group, sorted(live.epochs))
    return due is None or due > stream.log.now_micros()


def _catch_up(
    stream: EventStream,
    follower: Consumer,
    live: Lease,
    resources: Mapping[str, Any] | None,
    state_folder: Path | None,
    give_up: float,
    reports: list[BatchReport],
) -> None:
    """Step 3: everything that the frozen version has done, and every deadline that is due."""
    while time.monotonic() < give_up:
        try:
            done = run_pending(stream, follower, resources=resources, state_folder=state_folder, wait="5s")
            reports.extend(done.batches)
        except LeaseBusyError:
            continue
        due = stream.coordinator.next_deadline(follower.group, sorted(live.epochs))
        caught_up = stream.positions(follower.group) == stream.positions(live.group)
        if caught_up and (due is None or due > stream.log.now_micros()):
            return
        time.sleep(_LOOK_EVERY_S)


def _lease(keeper: LeaseKeeper, group: str, give_up: float) -> Lease | None:
    """The follower's lease, once whoever helped it to catch up gives it back."""
    while time.monotonic() < give_up:
        try:
            return keeper.acquire(group)
        except LeaseBusyError:
            time.sleep(_LOOK_EVERY_S)
    return None


def _require_stateful(consumer: Consumer) -> None:
    if not consumer.stateful or consumer.follows is not None:
        raise InvalidSettingError(
            f"consumer {consumer.group!r} keeps no state of its own, so there is nothing to be rebuilt; to handle "
            "records again, seek its group, or replay it",
            setting="consumer",
            value=consumer.group,
        )


def _require_previous(stream: EventStream, group: str) -> None:
    try:
        stream.coordinator.group(f"{group}.previous")
    except UnknownGroupError as error:
        raise InvalidSettingError(
            f"group {group!r} has no previous version; nothing has been promoted", setting="role", value="previous"
        ) from error
