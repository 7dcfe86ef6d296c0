"""Distributions as they are built, and Python environments that nothing but one of them is installed in."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from uv import find_uv_bin

OLDEST, NEWEST = "3.10", "3.13"
"""The Pythons that the metadata name, from and to."""
_BUILD_S = 240


class Built(NamedTuple):
    """A wheel, and the sdist that it was made of."""

    wheel: Path
    sdist: Path

    @property
    def in_wheel(self) -> set[str]:
        """The files in the wheel."""
        with zipfile.ZipFile(self.wheel) as archive:
            return set(archive.namelist())

    @property
    def in_sdist(self) -> set[str]:
        """The files in the sdist, without the folder that all of them are in."""
        with tarfile.open(self.sdist) as archive:
            return {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}

    def read(self, ending: str) -> bytes:
        """The one file of the wheel whose name ends so."""
        with zipfile.ZipFile(self.wheel) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(ending)]
            return archive.read(name)

    @property
    def metadata(self) -> Message:
        """What an index, and an installer, are told."""
        return email.message_from_bytes(self.read(".dist-info/METADATA"))

    @property
    def requirements(self) -> list[Requirement]:
        """What is installed with it, unless an extra is asked for."""
        every = [Requirement(text) for text in self.metadata.get_all("Requires-Dist", [])]
        return [one for one in every if one.marker is None or "extra" not in str(one.marker)]

    def unpack(self, folder: Path) -> Path:
        """The folder that the sdist becomes."""
        with tarfile.open(self.sdist) as archive:
            archive.extractall(folder, filter="data")
        (unpacked,) = folder.iterdir()
        return unpacked


def uv(*arguments: str | Path) -> str:
    """What uv prints; it must succeed. It takes the Pythons that are there, and its cache."""
    done = subprocess.run(
        [find_uv_bin(), *map(str, arguments)],
        env={**os.environ, "UV_PYTHON_DOWNLOADS": "never", "UV_NO_CONFIG": "1"},
        capture_output=True,
        text=True,
        timeout=_BUILD_S,
        check=False,
    )
    assert done.returncode == 0, f"uv {' '.join(map(str, arguments))}: {done.stdout}{done.stderr}"
    return done.stdout


def build(source: Path, folder: Path) -> Built:
    """Make an sdist of the source, and a wheel of that sdist, as `python -m build` does."""
    uv("build", "--quiet", "--out-dir", folder, source)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return Built(wheel, sdist)


def new_environment(folder: Path, python: Path, *wanted: str | Path, resolution: str = "highest") -> Path:
    """The Python of a new environment with what is wanted, and what that needs; all of it in the newest versions.

    Args:
        folder: where; it is made.
        python: whose environment.
        wanted: requirements, or files.
        resolution: ``"lowest-direct"`` for the lowest versions of what is wanted, and the newest of what that needs.
    """
    uv("venv", "--quiet", "--python", python, folder)
    made = folder / "bin" / "python"
    uv("pip", "install", "--quiet", "--python", made, "--resolution", resolution, *wanted)
    return made


def find_python(version: str) -> Path | None:
    """A Python of this version that runs: on the PATH, or one of pyenv's."""
    for found in _pythons(version):
        # A shim of pyenv is there, and runs nothing, unless its version is chosen.
        asked = subprocess.run(
            [found, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if asked.returncode == 0 and asked.stdout.strip() == version:
            return found
    return None


def _pythons(version: str) -> Iterator[Path]:
    yield Path(sys.executable)
    if (on_path := shutil.which(f"python{version}")) is not None:
        yield Path(on_path)
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from sorted(pyenv.glob(f"versions/{version}.*/bin/python"), reverse=True)
