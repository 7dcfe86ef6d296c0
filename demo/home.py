"""`Home`: the folder of the demonstration, used by one at a time."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from demo import outbox
from demo.errors import DemoError
from djp_dagster import EventStream, open_payload_store, open_stream

REPOSITORY = Path(__file__).resolve().parents[1]


class Home(NamedTuple):
    """A folder in use: DAGSTER_HOME of everything that is started, with the logs and all else inside.

    ``DJP_STREAM_URL`` puts the stream elsewhere, ``DJP_S3_BUCKET`` and its companions the payloads, for us as for all
    that is started.

    Attributes:
        lock: an open file that whoever runs here keeps open; started processes inherit it, so that the folder is in use
            for as long as one of them lives.
    """

    folder: Path
    lock: int

    @property
    def logs(self) -> Path:
        """The folder of the logs. Not ``logs``: what lies there, Dagster takes for its telemetry, and sends off."""
        return self.folder / "process-logs"

    @property
    def outbox(self) -> Path:
        """The folder of the mails."""
        return outbox.folder(self.environment())

    def open_stream(self) -> EventStream:
        """The stream of the shop, as `SqlEventStream()` opens it in what is started here."""
        return open_stream(
            os.environ.get("DJP_STREAM_URL") or self.folder / "djp" / "stream.db",
            default_payloads=open_payload_store(self.folder / "djp" / "payloads"),
        )

    def environment(self) -> dict[str, str]:
        """The environment of what is started here."""
        kept = {name: value for name, value in os.environ.items() if name != "DJP_STATE_FOLDER"}
        # The uploader of telemetry looks at this variable, not at dagster.yaml.
        return {**kept, "DAGSTER_HOME": str(self.folder), "DAGSTER_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"}

    def make_instance(self) -> None:
        """Make Dagster's databases, which the first two processes of a new instance could not make at the same time."""
        import dagster as dg  # noqa: TID251

        with dg.DagsterInstance.from_config(str(self.folder)) as instance:
            instance.get_run_records(limit=1)
            instance.get_ticks("none", "none", limit=1)

    def tell_users(self, text: str) -> None:
        """Leave a note for whoever finds the folder in use."""
        os.truncate(self.lock, 0)
        os.pwrite(self.lock, text.encode(), 0)


def default_folder() -> Path:
    """``$DEMO_HOME``, else ``.demo`` in the repository."""
    return Path(os.environ.get("DEMO_HOME") or REPOSITORY / ".demo").resolve()


@contextmanager
def claim(folder: Path) -> Iterator[Home]:
    """Make the folder, or go on with it, and keep others out.

    Raises:
        DemoError: somebody uses it, or it cannot be made.
    """
    try:
        (folder / "djp").mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise DemoError(f"{folder} cannot be used: {error}; set DEMO_HOME to a folder you may write to") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note = (folder / "lock").read_text().strip() or "processes that have left no note: stop them"
            raise DemoError(f"{folder} is in use by {note}; or set DEMO_HOME to another folder") from None
        shutil.copyfile(REPOSITORY / "demo" / "dagster.yaml", folder / "dagster.yaml")
        home = Home(folder, lock)
        home.logs.mkdir(exist_ok=True)
        home.tell_users(f"process {os.getpid()}, which starts the demonstration: wait for it, or stop it with Ctrl-C")
        yield home
    finally:
        os.close(lock)
