"""The named points between the steps of the protocol, where tests stop the process. Nothing happens there otherwise."""

from collections.abc import Callable
from typing import Literal, get_args

BatchCrashPoint = Literal[
    "1.leased",
    "2.intent",
    "3.reading",
    "4.handling",
    "4.handled",
    "5.stored",
    "6.committed",
    "7.applied",
    "8.reported",
    "9.snapshot_stored",
    "9.snapshot_known",
]
"""Each is reached right after the step it names (or, for reading and handling, in its middle)."""

VersionCrashPoint = Literal["v.frozen", "v.caught_up", "v.swapped"]
"""Those of a promotion, see `djp_dagster.versions`."""

CrashPoint = BatchCrashPoint | VersionCrashPoint

CRASH_POINTS: tuple[BatchCrashPoint, ...] = get_args(BatchCrashPoint)
VERSION_CRASH_POINTS: tuple[VersionCrashPoint, ...] = get_args(VersionCrashPoint)

_hook: Callable[[CrashPoint], None] | None = None


def set_hook(hook: Callable[[CrashPoint], None] | None) -> None:
    """Call ``hook`` at every crash point of this process; None calls nothing."""
    global _hook  # noqa: PLW0603
    _hook = hook


def reach(point: CrashPoint) -> None:
    """The protocol has come to ``point``."""
    if _hook is not None:
        _hook(point)
