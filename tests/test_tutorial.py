"""The first hour, typed as the page says, in a shell: every block, with what the page says it prints."""

import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest

from demo.processes import group_members, wait_until
from tests.pages import DOCS, Block, blocks

TUTORIAL = DOCS / "tutorial.md"
_NUMBER = re.compile(r"\d[\d,]*(\.\d+)?")
_UNIT = re.compile(r"\b0 (s|min|h)\b")
_MARK = "=== line "


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def script_of(page: list[Block], port: int) -> str:
    """The page as one shell script, which says before each block where that stands."""
    lines = ["set -euo pipefail"]
    for block in page:
        if block.title is not None:
            lines += [f"cat > {block.title} <<'THE_END_OF_THE_FILE'", block.code.rstrip("\n"), "THE_END_OF_THE_FILE"]
        elif block.language == "sh":
            code = block.code.rstrip("\n")
            if code.startswith("dagster dev"):  # it stays; whoever reads the page has another shell for it
                code = f"{code} --port {port} > dev.log &"
            lines += [f"echo '{_MARK}{block.line}'", code]
    return "\n".join(lines) + "\n"


def expectations(page: list[Block]) -> dict[int, str]:
    """What the page says that a block prints, by the block's line."""
    return {one.line: then.code for one, then in pairwise(page) if (one.language, then.language) == ("sh", "text")}


def alike(text: str) -> str:
    """A line without what differs between two runs: numbers, units of time, widths of columns."""
    return " ".join(_UNIT.sub("0 s", _NUMBER.sub("0", text)).split())


def missing(expected: str, printed: str) -> list[str]:
    """The lines of the page that were not printed, in that order; ``…`` stands for anything."""
    there = [alike(line) for line in printed.splitlines()]
    lines = [line for line in expected.splitlines() if line.strip()]
    found, lost = 0, []
    for line in lines:
        pattern = ".*".join(re.escape(alike(part)) for part in line.split("…"))
        place = next((n for n, other in enumerate(there[found:], found) if re.fullmatch(pattern, other)), None)
        if place is None:
            lost.append(line)
        else:
            found = place + 1
    return lost


def end_group(leader: int) -> None:
    """End the processes of the group that ``leader`` is, or was, the first of: politely, then not."""
    for sign, patience_s in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 10.0)):
        with suppress(ProcessLookupError):
            os.killpg(leader, sign)
        if wait_until(lambda: not group_members(leader), patience_s):
            return
    raise AssertionError(f"outlive SIGKILL: {group_members(leader)}")


@pytest.mark.daemon
@pytest.mark.timeout(700)  # a dozen processes that import Dagster, and a daemon that looks every 5 s
def test_the_first_hour(tmp_path: Path) -> None:
    page = blocks(TUTORIAL)
    shop, script, output = tmp_path / "shop", tmp_path / "script.sh", tmp_path / "printed.txt"
    shop.mkdir()
    script.write_text(script_of(page, free_port()))
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("DAGSTER_", "DJP_", "COV"))
    }
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    with output.open("w") as file:
        process = subprocess.Popen(
            ["bash", str(script)],
            cwd=shop,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        status = process.wait(timeout=600)
    finally:
        end_group(process.pid)
        process.wait()
    printed = output.read_text()
    assert status == 0, printed[-4000:]
    parts = {int(part.partition("\n")[0]): part.partition("\n")[2] for part in printed.split(_MARK)[1:]}
    expected = expectations(page)
    assert len(expected) >= 10
    assert set(expected) <= set(parts)
    assert {line: lost for line, text in expected.items() if (lost := missing(text, parts[line]))} == {}


def test_what_was_not_printed_is_found() -> None:
    printed = "noise\nevents     3,000  1.2 s\nid 9f: done\n"
    assert missing("events 12 0.3 s\nid …: done\n", printed) == []
    assert missing("events 12 pending\nid …: failed\n", printed) == ["events 12 pending", "id …: failed"]
    assert missing("id …: done\nevents 3 1 s\n", printed) == ["events 3 1 s"], "the order counts"


def test_a_command_that_fails_ends_the_script(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text('```yaml title="a.yaml"\nx: 1\n```\n\n```sh\ncat a.yaml\n```\n\n```sh\nfalse\necho after\n```\n')
    script = script_of(blocks(page), 1)
    done = subprocess.run(["bash"], cwd=tmp_path, input=script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "=== line 6\nx: 1\n=== line 10\n")
