"""`Home`: the folder of the demonstration, used by one at a time."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from demo.errors import DemoError

REPOSITORY = Path(__file__).resolve().parents[1]


class Home(NamedTuple):
    """A folder in use: DAGSTER_HOME of everything that is started, with the stream and the logs inside.

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
    def stream_file(self) -> Path:
        """Where `SqlEventStream()` puts the stream."""
        return self.folder / "djp" / "stream.db"

    def environment(self) -> dict[str, str]:
        """The environment of what is started here: everything lies in this folder, whatever the caller has set."""
        kept = {name: value for name, value in os.environ.items() if name not in ("DJP_STREAM_URL", "DJP_STATE_FOLDER")}
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
            note = (folder / "lock").read_text().strip() or "processes that have left no note"
            raise DemoError(f"{folder} is in use by {note}; stop them, or set DEMO_HOME to another folder") from None
        shutil.copyfile(REPOSITORY / "demo" / "dagster.yaml", folder / "dagster.yaml")
        home = Home(folder, lock)
        home.logs.mkdir(exist_ok=True)
        yield home
    finally:
        os.close(lock)
