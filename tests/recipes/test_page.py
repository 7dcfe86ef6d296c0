"""What the page types into a shell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from djp_dagster import open_stream
from tests.pages import blocks
from tests.recipes.kit import PAGE, ids


def test_the_commands_of_the_page(tmp_path: Path) -> None:
    (commands,) = [one.code for one in blocks(PAGE) if one.language == "sh"]
    place = tmp_path / "stream.db"
    environment = {
        **os.environ,
        "DJP_STREAM_URL": f"sqlite:///{place}",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", "-e"],
        input=commands,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [line.split(" in ")[0] for line in done.stdout.splitlines()] == [
        "published 1 events to orders",
        "published 1 events to orders",
        "published 0 events to orders",
    ]
    with open_stream(place) as stream:
        assert len(ids(stream)) == 2
