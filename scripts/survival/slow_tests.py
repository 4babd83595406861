"""Run the tests that are too long for CI, and keep what came of them.

    python scripts/survival/slow_tests.py --output scripts/survival/slow_tests.json

They are those of the marker `slow`; the fuzz tries as many recipes as HF_STABLE_FUZZ says, here
10,000. Needs the extra hf_stable[test].
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from hf_stable import records
from hf_stable.reporting import describe_device

ROOT = Path(__file__).parents[2]
RECIPES = "10000"


def outcomes(report: Path) -> list[dict[str, Any]]:
    """Name, outcome and seconds of each test in a JUnit report."""
    found = []
    for case in ElementTree.parse(report).iter("testcase"):
        problem = next((part.tag for part in case if part.tag in ("failure", "error")), None)
        skipped = case.find("skipped")
        found.append(
            {
                "test": f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}",
                "outcome": problem or ("passed" if skipped is None else "skipped"),
                "seconds": round(float(case.get("time", "nan"))),
            }
        )
    return found


def main() -> int:
    """Run them; the exit code is pytest's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    variables = {"HF_STABLE_FUZZ": RECIPES, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    revision, start = records.git_revision(), time.time()
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-n", "2", "-m", "slow"]
        command += ["--timeout=0", f"--junitxml={report}"]
        status = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, check=False)
        content = {
            "git_revision": revision,
            "device": describe_device(torch.device("cpu")),
            "versions": records.versions(),
            "fuzzed_recipes": int(RECIPES),
            "seconds": round(time.time() - start),
            "tests": outcomes(report),
        }
    records.write_json(arguments.output, content)
    return status.returncode


if __name__ == "__main__":
    sys.exit(main())
