"""`LeaseKeeper`: leases held and groups joined by this process, and the thread that prolongs them.

The first heartbeat comes a third of the time to live after the lease, and a heartbeat that fails because the stream is
away is tried again at once: the lease is lost only if somebody else takes it. If this process dies, heartbeats end and
the lease runs out within one time to live.
"""

import contextlib
import logging
import os
import secrets
import socket
import threading
from collections.abc import Sequence
from types import TracebackType

from djp_dagster.errors import FencedError, TransientError, UnknownGroupError
from djp_dagster.streams.contracts import Coordinator
from djp_dagster.streams.model import Lease

_log = logging.getLogger(__name__)
DEFAULT_LEASE_S = 5.0


def new_owner(name: str | None = None) -> str:
    """A unique name for whoever holds leases: the given one, or host and process; and something random."""
    return f"{name or f'{socket.gethostname()}-{os.getpid()}'}-{secrets.token_hex(4)}"


class LeaseKeeper:
    """Acquires, prolongs and releases leases for one owner, and says in each group it joined that it is there.

    Use it as a context manager; leaving releases everything.

    Attributes:
        replaced: somebody has asked this owner to leave.

    Args:
        coordinator: where leases live.
        owner: who holds them.
        ttl_s: seconds a lease lives without a heartbeat: how long a dead process blocks its tasks.
    """

    def __init__(self, coordinator: Coordinator, *, owner: str, ttl_s: float = DEFAULT_LEASE_S) -> None:
        self._coordinator, self.owner, self.ttl_s = coordinator, owner, ttl_s
        self._held: dict[tuple[str, int], int] = {}
        self._joined: dict[str, bool] = {}
        self.replaced = False
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"djp-leases-{owner}", daemon=True)

    def __enter__(self) -> "LeaseKeeper":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        try:
            for lease in self._snapshot():
                self._coordinator.release(lease)
            for group in self._joined:
                with contextlib.suppress(UnknownGroupError):
                    self._coordinator.leave(group, self.owner)
        except TransientError as outage:
            _log.warning("what %s holds runs out by itself: %s", self.owner, outage)

    def join(self, group: str, *, paused: bool) -> int:
        """Say from now on that this owner is there; how many want a share of the group. See `Coordinator.join`."""
        joined = self._coordinator.join(group, self.owner, self.ttl_s, paused=paused)
        with self._lock:
            self._joined[group] = paused
        self.replaced |= joined.asked_to_leave
        return joined.members

    def part_from(self, group: str) -> None:
        """Say no more that this owner is there, for the group itself is not."""
        with self._lock:
            self._joined.pop(group, None)

    def acquire(self, group: str, tasks: Sequence[int] | None = None) -> Lease:
        """Lease the tasks, and keep them; raises `LeaseBusyError`."""
        return self._keep(self._coordinator.acquire(group, tasks, self.owner, self.ttl_s))

    def _keep(self, lease: Lease) -> Lease:
        with self._lock:
            self._held.update({(lease.group, task): epoch for task, epoch in lease.epochs.items()})
        return lease

    def take_over(self, group: str) -> Lease:
        """Lease all tasks, whoever holds them, and keep them."""
        return self._keep(self._coordinator.take_over(group, self.owner, self.ttl_s))

    def release(self, lease: Lease) -> None:
        """Stop keeping the lease and give it back."""
        self.forget(lease)
        self._coordinator.release(lease)

    def forget(self, lease: Lease) -> None:
        """Stop keeping a lease, e.g. because it was lost."""
        with self._lock:
            for task, epoch in lease.epochs.items():
                if self._held.get((lease.group, task)) == epoch:
                    del self._held[lease.group, task]

    def holds(self, lease: Lease) -> bool:
        """Whether it was neither given back nor found, by a heartbeat, to be taken over."""
        with self._lock:
            return all(self._held.get((lease.group, task)) == epoch for task, epoch in lease.epochs.items())

    def _snapshot(self) -> list[Lease]:
        with self._lock:
            groups: dict[str, dict[int, int]] = {}
            for (group, task), epoch in self._held.items():
                groups.setdefault(group, {})[task] = epoch
        return [Lease(group, self.owner, self.ttl_s, epochs) for group, epochs in groups.items()]

    def _beat(self) -> None:
        while not self._stop.wait(self.ttl_s / 3):
            try:
                self._coordinator.heartbeat(self._snapshot())
                self._rejoin()
            except FencedError:
                self._drop_lost()
            except Exception:  # noqa: BLE001
                # Whatever it is, ending the heartbeats would only add lost leases to it.
                _log.warning("heartbeat of %s failed and is repeated", self.owner, exc_info=True)

    def _rejoin(self) -> None:
        with self._lock:
            joined = dict(self._joined)
        for group, paused in joined.items():
            self.replaced |= self._coordinator.join(group, self.owner, self.ttl_s, paused=paused).asked_to_leave

    def _drop_lost(self) -> None:
        for lease in self._snapshot():
            for task, epoch in lease.epochs.items():
                try:
                    self._coordinator.heartbeat([lease.part([task])])
                except FencedError:
                    with self._lock:
                        if self._held.get((lease.group, task)) == epoch:
                            del self._held[lease.group, task]
                except TransientError:
                    return
