"""Where the stream lies unless told."""

import logging
import os
from pathlib import Path
from tempfile import gettempdir

from djp_dagster.errors import InvalidSettingError

_log = logging.getLogger(__name__)
URL_VARIABLE = "DJP_STREAM_URL"
_TEMPORARY_HOME = ".tmp_dagster_home_"


def default_folder() -> Path:
    """``djp/`` under DAGSTER_HOME; ``./.djp`` without one, or with one that Dagster removes when it ends."""
    home = os.environ.get("DAGSTER_HOME")
    if home and not _is_temporary(Path(home).resolve()):
        return Path(home) / "djp"
    return Path(".djp")


def default_url() -> str:
    """``$DJP_STREAM_URL``, else a SQLite file in `default_folder`."""
    return os.environ.get(URL_VARIABLE) or f"sqlite:///{default_folder() / 'stream.db'}"


def prepared_default_url() -> str:
    """The same, and its folder is made; says so where that is no lasting one of Dagster's.

    Raises:
        InvalidSettingError: DAGSTER_HOME names no folder: a misspelt one would be a stream that nobody else finds.
    """
    if not os.environ.get(URL_VARIABLE):
        folder = default_folder()
        if folder.is_absolute() and not folder.parent.is_dir():
            raise InvalidSettingError(
                f"DAGSTER_HOME={str(folder.parent)!r} names no folder; correct it, or make the folder",
                setting="DAGSTER_HOME",
                value=str(folder.parent),
            )
        folder.mkdir(exist_ok=True)
        if not folder.is_absolute():
            _log.warning("DAGSTER_HOME names no lasting folder: the stream lies in %s", folder.resolve())
    return default_url()


def _is_temporary(home: Path) -> bool:
    made_for_one_process = any(part.startswith(_TEMPORARY_HOME) for part in home.parts)
    return made_for_one_process or home.is_relative_to(Path(gettempdir()).resolve() / "dagster")
