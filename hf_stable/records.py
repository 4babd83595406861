"""Records of a run: `run.json` (its setup) and `metrics.jsonl` (its events).

Reports, figures and model cards are made from these files alone, on a machine without torch.
Standard library only.
"""

import json
import math
import os
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from . import durable

SCHEMA_VERSION = 1
# File that `hf-stable convert` writes beside the model.
CONVERSION = "conversion.json"
PACKAGES = ("hf_stable", "torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy")


def _finite(value: Any) -> Any:
    """Replace non-finite floats by their names: JSON lacks them, and a diverged run is a result."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically: even after a crash, a reader finds the old file or the new one."""
    text = json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False)
    durable.write_file(path, f"{text}\n".encode())


class RunRecord:
    """Writer of one run's folder. Only the main process of a run holds one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(folder / "metrics.jsonl")
        self._metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")

    def write_run(self, content: dict[str, Any]) -> None:
        """Write `run.json`: resolved recipe, versions, git revision, data fingerprint, device."""
        write_json(self.folder / "run.json", {"schema": SCHEMA_VERSION, **content})

    def append(self, event: str, step: int, **fields: Any) -> None:
        """Append one line to `metrics.jsonl`, readable for other processes on return."""
        line = json.dumps(_finite({"event": event, "step": step, **fields}), allow_nan=False)
        self._metrics.write(line + "\n")
        self._metrics.flush()

    def sync(self) -> None:
        """Flush all lines to disk, before a checkpoint that relies on them."""
        os.fsync(self._metrics.fileno())

    def close(self) -> None:
        self._metrics.close()


def _cut_torn_line(file: Path) -> None:
    """Remove an incomplete last line of a killed writer, which the next line would extend."""
    if file.is_file():
        content = file.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(file, whole)


def read_run(folder: Path) -> dict[str, Any]:
    """Read `run.json` of a run's folder; FileNotFoundError when the folder holds no run."""
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def read_metrics(folder: Path, event: str | None = None) -> list[dict[str, Any]]:
    """Read `metrics.jsonl`, all events or one kind. A last line cut off by a crash is left out."""
    rows = []
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{folder / 'metrics.jsonl'}:{number} is not JSON: {error}") from error
    return [row for row in rows if event is None or row["event"] == event]


def versions() -> dict[str, str | None]:
    """Return the versions of the packages that affect results; None if one is not installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def numerics() -> dict[str, str | None]:
    """Return the environment variables that affect the last bits on a CPU; None if unset."""
    return {name: os.environ.get(name) or None for name in ("MKL_CBWR", "ATEN_CPU_CAPABILITY")}


def git_revision() -> str | None:
    """Return the revision of this package's checkout, with `-dirty`; None outside a checkout."""
    package = Path(__file__).parent
    return _git(package, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def last_change(file: Path) -> str | None:
    """Return the commit that last changed a file, with `-dirty` for uncommitted changes.

    The result is None outside a checkout, and for a file that git does not track.
    """
    revision = _git(file.parent, "log", "-1", "--format=%H", "--", file.name)
    if not revision:
        return None
    changes = _git(file.parent, "status", "--porcelain", "--", file.name)
    return f"{revision}-dirty" if changes else revision


def _git(folder: Path, *arguments: str) -> str | None:
    """Return the output of a git command in a folder; None if it fails."""
    try:
        answer = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
