"""`rollbacks.json`: all rollbacks of a run, and the data that each one leaves out.

The checkpoint of a rollback is older than the rollback and does not record it. This file is
therefore authoritative; it is written before the older state is loaded.
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
    """One rollback. Checkpoints later than `to_step` belong to the abandoned part of the run.

    Args:
        at_step: Step at which it was decided, from 1.
        to_step: Step of the checkpoint that the run returned to.
        skipped: Range [start, stop) of absolute sample positions that training leaves out.
        reason: Reason of the guard's decision.
        metrics_bytes: Size of metrics.jsonl at that time. These lines stay in the file, although
            their steps are repeated.
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
    """Return a run's rollbacks in the order they happened; an empty list if there is no file.

    Args:
        run: Folder of the run.

    Raises:
        CheckpointError: If the file is not in the format of `append_rollback`. Without it, the run
            would train on data that was found to break it.
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
    """Write one more rollback, atomically and durably; return all.

    Args:
        run: Folder of the run.
        rollback: Rollback to add.

    Raises:
        CheckpointError: If the existing file cannot be read, see `read_rollbacks`.
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
