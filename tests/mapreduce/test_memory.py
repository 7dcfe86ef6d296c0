"""Each process stays within its memory, whatever the number of keys and the size of the input.

A tenth of what `make soak` does: 20 million distinct keys, and 2 GiB of input, within 256 MiB.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
MIB = 1 << 20

JOB = """
import json, re, resource, sys
import djp_dagster as djp

def mapper(line):
    for word in line.split():
        yield word, 1

def blocks(block):
    return {"bytes": len(block), "lines": block.count(b"\\n")}

def total(key, values):
    return sum(values)

if __name__ == "__main__":
    path, kind, memory, workers, temp = sys.argv[1:]
    how = {
        "combine": dict(combine=djp.Sum()),
        "reduce": dict(reduce=total, sort_values=True),
        "blocks": dict(combine=djp.Sum(), batch=True),
    }[kind]
    engine = djp.Processes(int(workers)) if int(workers) else "inline"
    source = djp.TextFiles(path, split_bytes="16MiB")
    with djp.map_reduce(
        blocks if kind == "blocks" else mapper, source, engine=engine, memory=memory, temp_folder=temp, **how
    ) as result:
        keys = count = 0
        for key, value in result:
            keys, count = keys + 1, count + value
        print(json.dumps({
            "keys": keys,
            "count": count,
            "spilled": result.report.spilled_bytes,
            "here": int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024,
            "workers": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        }))
"""


def run(path: Path, kind: str, memory: str, workers: int, temp: Path) -> dict[str, int]:
    command = [sys.executable, "-c", JOB, str(path), kind, memory, str(workers), str(temp)]
    done = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    found: dict[str, int] = json.loads(done.stdout)
    assert list(temp.iterdir()) == []
    return found


def write_keys(path: Path, seed: random.Random, distinct: int, repeats: int) -> None:
    """Each of so many keys so often, in two orders."""
    order = list(range(distinct))
    with path.open("w") as file:
        for _ in range(repeats):
            seed.shuffle(order)
            for start in range(0, distinct, 20):
                file.write(" ".join(f"user-{number:08}" for number in order[start : start + 20]) + "\n")


@pytest.fixture
def temp(tmp_path: Path) -> Path:
    (tmp_path / "temp").mkdir()
    return tmp_path / "temp"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["combine", "reduce"])
def test_many_keys(tmp_path: Path, temp: Path, seed: random.Random, kind: str, workers: int) -> None:
    write_keys(tmp_path / "keys", seed, 1_000_000, 2)
    found = run(tmp_path / "keys", kind, "192MiB", workers, temp)
    assert (found["keys"], found["count"]) == (1_000_000, 2_000_000)
    assert found["spilled"] > 10 * MIB
    assert found["workers" if workers else "here"] <= 192 * MIB


@pytest.mark.soak
@pytest.mark.parametrize("workers", [0, 2])
def test_twenty_million_keys(tmp_path: Path, temp: Path, seed: random.Random, workers: int) -> None:
    write_keys(tmp_path / "keys", seed, 20_000_000, 1)
    found = run(tmp_path / "keys", "combine", "256MiB", workers, temp)
    assert (found["keys"], found["count"]) == (20_000_000, 20_000_000)
    assert found["workers" if workers else "here"] <= 256 * MIB


@pytest.mark.soak
@pytest.mark.parametrize("workers", [0, 2])
def test_two_gigabytes(tmp_path: Path, temp: Path, seed: random.Random, workers: int) -> None:
    line = " ".join(f"word-{number}" for number in range(100)) + "\n"
    lines = (2 << 30) // len(line) + 1
    with (tmp_path / "input").open("w") as file:
        for start in range(0, lines, 10_000):
            file.write(line * min(10_000, lines - start))
    found = run(tmp_path / "input", "blocks", "256MiB", workers, temp)
    assert found["count"] == lines * (len(line) + 1)
    assert found["workers" if workers else "here"] <= 256 * MIB
