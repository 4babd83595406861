"""`rollbacks.json`: every time a run was set back, and which data it leaves out since.

A checkpoint that a run is set back to is older than the rollback and knows nothing of it. This file
is the truth for both; it is written before the older state is loaded.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_stable.errors import CheckpointError
from hf_stable.records import write_json

FILE = "rollbacks.json"
_FORMAT = 1


@dataclass(frozen=True)
class Rollback:
    """One rollback. Checkpoints later than `to_step` belong to what was given up.

    Args:
        at_step: the step at which it was decided, from 1. to_step: the checkpoint gone back to.
        skipped: [start, stop) absolute sample positions that training leaves out since.
        reason: of the guard's decision.
        metrics_bytes: size of metrics.jsonl then; these lines stay, though their steps come again.
    """

    at_step: int
    to_step: int
    skipped: tuple[int, int]
    reason: str
    metrics_bytes: int

    def __post_init__(self) -> None:
        if not 0 <= self.to_step < self.at_step:
            raise ValueError(f"to_step is {self.to_step}; write 0 to below at_step {self.at_step}")
        start, stop = self.skipped
        if not 0 <= start < stop:
            raise ValueError(f"skipped is [{start}, {stop}); write 0 <= start < stop")
        if self.metrics_bytes < 0:
            raise ValueError(f"metrics_bytes is {self.metrics_bytes}; write at least 0")


def read_rollbacks(run: Path) -> list[Rollback]:
    """A run's rollbacks in the order they happened; none where there is no file.

    Raises:
        CheckpointError: a file that is not as `append_rollback` writes it. Going on without it
            would train on data that were found to break the run.
    """
    file = run / FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise _damaged(file, str(error)) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise _damaged(file, f"it is not of format {_FORMAT}")
    rows = content.get("rollbacks")
    if not isinstance(rows, list):
        raise _damaged(file, "it has no list named rollbacks")
    try:
        return [_rollback(row) for row in rows]
    except (TypeError, ValueError) as error:
        raise _damaged(file, str(error)) from error


def append_rollback(run: Path, rollback: Rollback) -> list[Rollback]:
    """Write one more, atomically and onto the disk; returns all.

    Raises:
        CheckpointError: as `read_rollbacks`.
    """
    rollbacks = [*read_rollbacks(run), rollback]
    rows = [asdict(each) for each in rollbacks]
    write_json(run / FILE, {"format": _FORMAT, "rollbacks": rows})
    return rollbacks


def _rollback(row: Any) -> Rollback:
    if not isinstance(row, dict):
        raise ValueError(f"a rollback is {row!r}")
    start, stop = row.get("skipped") or (None, None)
    whole = {"at_step": row.get("at_step"), "to_step": row.get("to_step"), "skipped": start}
    whole |= {"skipped's end": stop, "metrics_bytes": row.get("metrics_bytes")}
    for name, value in whole.items():
        if type(value) is not int:
            raise ValueError(f"{name} is {value!r}, must be a whole number")
    if type(row.get("reason")) is not str:
        raise ValueError(f"reason is {row.get('reason')!r}, must be text")
    return Rollback(**{**row, "skipped": (start, stop)})


def _damaged(file: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{file}: the record of rollbacks cannot be read ({problem}). It says which data the run "
        "must leave out: bring it back from a copy, or give training a new output folder"
    )
