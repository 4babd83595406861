"""The GPU study's one command, rehearsed on tiny runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training import write_text

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_rehearsal_runs_everything_and_reports(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "OUTPUT": str(tmp_path / "studies"),
        "TEXT": f"[{write_text(tmp_path)}]",
        "WORKERS": "2",
        "PYTHON": sys.executable,
    }
    command = ["bash", "scripts/study_gpu.sh", "--dry"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    studies = tmp_path / "studies" / "dry"
    done = {study.name: len(list(study.glob("runs/*/result.json"))) for study in studies.iterdir()}
    assert done == {"table3_gpu_10m": 60, "table3_gpu_1024": 30, "report": 0}
    assert "table3_gpu_1024" in (studies / "report" / "report.md").read_text()
