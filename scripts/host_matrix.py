"""Tests under other versions of Transformers than the installed one; see host_matrix.sh.

Each version is installed into a folder of its own under `.cache/transformers`, with the packages
that it needs in another version than `.venv` has. That folder comes first on the path of the tests,
so that a version costs seconds and megabytes instead of an environment.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
OVERLAYS = ROOT / ".cache" / "transformers"
SHORT = ["tests/host/test_versions.py"]
# Without tests/host/test_parallel_plans.py: plans changed their form within the range.
FULL = [
    *SHORT,
    "tests/host/test_embeddings.py",
    "tests/host/test_generation.py",
    "tests/host/test_heads.py",
    "tests/host/test_outputs.py",
    "tests/host/test_saving.py",
    "tests/host/test_training.py",
    "tests/model/test_modeling.py",
    "tests/hub/test_export.py",
    "tests/kernels/test_interface.py",
    "tests/clients/test_generation.py",
    "tests/clients/test_loading.py",
    "tests/clients/test_trainer.py",
]
SUMMARY = re.compile(r"\b\d+ (?:passed|failed|skipped|errors?)\b")


def pip(*arguments: str) -> str:
    """Run pip and return its output.

    Raises:
        SystemExit: with pip's message, when it fails.
    """
    command = [sys.executable, "-m", "pip"]
    if find_spec("pip") is None:  # uv made .venv: the Python that it was made from has a pip
        command = [f"{sys.base_prefix}/bin/python3", "-m", "pip", "--python", sys.executable]
    command += ["--disable-pip-version-check", *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise SystemExit(f"error: pip {' '.join(arguments)} failed:\n{answer.stderr.strip()}")
    return answer.stdout


def oldest_declared() -> str:
    """Return the lowest version that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    specifier = next(
        each.specifier
        for each in map(Requirement, project["dependencies"])
        if each.name == "transformers"
    )
    bound = next(each.version for each in specifier if each.operator == ">=")
    return bound + ".0" * (2 - bound.count("."))


def pinned() -> str:
    """Return the version of scripts/constraints.txt."""
    text = (ROOT / "scripts" / "constraints.txt").read_text(encoding="utf-8")
    found = re.search(r"^transformers==(\S+)$", text, re.MULTILINE)
    assert found is not None, "scripts/constraints.txt pins transformers"
    return found[1]


def newest_released() -> str:
    """Return the newest version in the package index, whatever pyproject.toml allows."""
    options = ["--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--report", "-"]
    report = json.loads(pip("install", *options, "transformers"))
    return report["install"][0]["metadata"]["version"]


def overlay(version: str) -> Path:
    """Return the folder with a version, installed on the first call."""
    folder = OVERLAYS / version
    if not folder.is_dir():
        partial = folder.with_name(f".{version}")
        into = ["install", "--quiet", "--no-deps", "--upgrade", "--target", str(partial)]
        pip(*into, f"transformers=={version}")
        (about,) = metadata.distributions(name="transformers", path=[str(partial)])
        needed = [each for each in map(Requirement, about.requires or []) if each.marker is None]
        other = [
            str(each)
            for each in needed
            if not each.specifier.contains(metadata.version(each.name), prereleases=True)
        ]
        if other:
            pip(*into, *other)
        partial.rename(folder)
    return folder


def run_tests(version: str, tests: list[str], options: list[str]) -> bool:
    """Run tests under a version, print its line, and keep the output beside the overlay."""
    marks = "not gpu and not slow" if tests == SHORT else "not gpu and (not slow or matrix)"
    path = [str(overlay(version)), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    log = OVERLAYS / f"{version}.log"
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(
            [sys.executable, "-m", "pytest", "-n", "2", "-m", marks, *tests, *options],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    lines = log.read_text(encoding="utf-8").splitlines()
    # With -q -q pytest prints no summary; with the project's -q it is the last line that has one.
    summary = next(
        (", ".join(SUMMARY.findall(line)) for line in reversed(lines) if SUMMARY.search(line)),
        "no summary",
    )
    verdict = "ok" if code == 0 else f"FAILED (see {log.relative_to(ROOT)})"
    seconds = time.monotonic() - start
    print(f"transformers {version:<8} {verdict}: {summary} in {seconds:.0f} s", flush=True)
    return code == 0


def raise_ceiling(version: str) -> None:
    """Write a version that passed into pyproject.toml, the constraints and the exported code."""
    major, minor = version.split(".")[:2]
    changes = {
        "pyproject.toml": (
            r"(transformers(?:\[serving\])?>=[\d.]+,<)[\d.]+",
            rf"\g<1>{major}.{int(minor) + 1}",
        ),
        "scripts/constraints.txt": (r"(?m)^transformers==\S+$", f"transformers=={version}"),
        "hf_stable/model/host_stable_gpt.py": (
            r'(OLDEST_TESTED, NEWEST_TESTED = "[\d.]+", )"[\d.]+"',
            rf'\g<1>"{major}.{minor}"',
        ),
    }
    for name, (pattern, replacement) in changes.items():
        file = ROOT / name
        text, count = re.subn(pattern, replacement, file.read_text(encoding="utf-8"))
        assert count, f"{name} has no {pattern}"
        file.write_text(text, encoding="utf-8")
        print(f"{name}: transformers up to {version}")


def main(arguments: list[str]) -> int:
    """Return the exit code: 0 when all versions pass, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="*", help="default: oldest, pinned and newest")
    parser.add_argument("--short", action="store_true", help="run tests/host/test_versions.py only")
    parser.add_argument(
        "--raise",
        dest="ceiling",
        metavar="VERSION",
        help="test this version, and declare it as supported if it passes",
    )
    parsed, options = parser.parse_known_args(arguments)
    versions = parsed.versions or [oldest_declared(), pinned(), newest_released()]
    if parsed.ceiling is not None:
        versions = [parsed.ceiling]
    tests = SHORT if parsed.short else FULL
    # Each version runs, also after one that fails.
    passed = [run_tests(version, tests, options) for version in dict.fromkeys(versions)]
    if not all(passed):
        return 1
    if parsed.ceiling is not None:
        raise_ceiling(parsed.ceiling)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
