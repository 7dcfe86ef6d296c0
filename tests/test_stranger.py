"""A stranger's first project: fifteen lines in a folder of its own, with Dagster's and djp's command lines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = """\
import dagster as dg
import djp_dagster as djp

orders = djp.Topic("orders", partitions=2, key="user_id")

@djp.consumer(topic=orders)
def totals(batch: djp.Batch):
    return batch.to_pandas().groupby("user_id", as_index=False).amount.sum()

@dg.asset
def report(context: dg.AssetExecutionContext, totals: djp.BatchOutputs) -> None:
    for output in totals.since("report"):
        context.add_output_metadata({"sum": int(output.load().amount.sum())})

defs = dg.Definitions.merge(djp.build_defs(totals), dg.Definitions(assets=[report]))
"""


class Project:
    """A folder with the project in it, and a shell there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "home").mkdir()
        (folder / "home" / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
        (folder / "definitions.py").write_text(PROJECT)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("DAGSTER_", "DJP_"))},
            "DAGSTER_HOME": str(folder / "home"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }

    def run(self, *command: str, given: str = "") -> str:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            input=given,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout


@pytest.mark.daemon
def test_fifteen_lines_are_a_project(tmp_path: Path) -> None:
    assert len([line for line in PROJECT.splitlines() if line]) <= 15
    project = Project(tmp_path)
    project.run("dagster", "definitions", "validate", "-f", "definitions.py")
    lines = "\n".join(json.dumps({"user_id": f"u{n % 3}", "amount": n}) for n in range(10))
    publish = ("djp", "publish", "orders", "-", "--create", "--partitions", "2", "--key", "user_id")
    project.run(*publish, given=lines)
    project.run("dagster", "asset", "materialize", "--select", "totals,report", "-f", "definitions.py")
    (lag,) = [json.loads(line) for line in project.run("djp", "lag", "totals", "--json").splitlines()]
    assert "totals" in json.dumps(lag)
    look = (
        "import dagster as dg; i = dg.DagsterInstance.get();"
        "print(*[i.get_latest_materialization_event(dg.AssetKey(k)).asset_materialization.metadata[m].value"
        " for k, m in (('totals', 'events'), ('totals', 'lag_events'), ('report', 'sum'))])"
    )
    assert project.run(sys.executable, "-c", look).split() == ["10", "0", "45"]
