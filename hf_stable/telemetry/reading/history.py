"""Read a run's records as arrays; every view uses this reader.

It needs no torch, because reports are made on laptops.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hf_stable import records
from hf_stable.errors import UserError
from hf_stable.telemetry.names import unpack


@dataclass(frozen=True)
class History:
    """Records of one run. Step n is the state after n optimizer steps.

    Args:
        folder: Folder of the run.
        run: Content of run.json.
        train: Columns of the log lines by name ("step", "loss", "learning_rate", "grad_norm", ...),
            each (T,) float64.
        steps: Sampled steps, (S,) int64.
        telemetry: Packed columns by name, (S,), (S, L) or (S, L, H) float64, with L layers and H
            heads; NaN for a missing number.
        events: All other rows, in order.
        non_finite: (step, name) of every number that is not finite, in order. Names are those of
            `unpack`, "loss" and "grad_norm". It is needed because NaN in an array can also mean
            that the number is missing.
    """

    folder: Path
    run: dict[str, Any]
    train: dict[str, np.ndarray]
    steps: np.ndarray
    telemetry: dict[str, np.ndarray]
    events: list[dict[str, Any]]
    non_finite: list[tuple[int, str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the recipe, or of the folder."""
        return self.run.get("recipe", {}).get("name") or self.folder.name

    @property
    def num_layers(self) -> int:
        """Number of blocks in the telemetry; 0 without telemetry."""
        widths = [column.shape[1] for key, column in self.telemetry.items() if "*" in key]
        return max(widths, default=0)

    def series(self, name: str) -> np.ndarray:
        """Return (S,) or (S, H) values of a name such as `layers.1.qkv/output_l2`.

        Raises:
            KeyError: If the name was not recorded.
        """
        if name in self.telemetry:
            return self.telemetry[name]
        _, index, rest = name.split(".", 2)
        return self.telemetry[f"layers.*.{rest}"][:, int(index)]


def read_history(folder: Path) -> History:
    """Read a run's records, also while it is running.

    Raises:
        UserError: If the folder holds no run, or its records are damaged.
    """
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder} holds no run: there is no metrics.jsonl in it")
    run = records.read_run(folder) if (folder / "run.json").is_file() else {}
    kinds: dict[str, list[dict[str, Any]]] = {"train": [], "telemetry": [], "other": []}
    try:
        rows = _in_force(records.read_metrics(folder))
    except ValueError as error:
        raise UserError(f"{error}; the file is damaged: restore it, or remove the line") from error
    for row in rows:
        kinds[row["event"] if row["event"] in kinds else "other"].append(row)
    telemetry = kinds["telemetry"]
    names = {name for row in telemetry for name in row if name not in ("event", "step")}
    return History(
        folder=folder,
        run=run,
        train=_columns(kinds["train"]),
        steps=np.array([row["step"] for row in telemetry], dtype=np.int64),
        telemetry={name: _column([row.get(name) for row in telemetry]) for name in sorted(names)},
        events=kinds["other"],
        non_finite=[place for row in rows for place in _non_finite(row)],
    )


def _in_force(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop the rows that a resumed or rolled back run discarded and wrote again."""
    kept: list[dict[str, Any]] = []
    for row in rows:
        if row["event"] in ("resumed", "rolled_back"):
            kept = [
                other
                for other in kept
                if other["step"] <= row["step"] or other["event"] == "rolled_back"
            ]
        kept.append(row)
    return kept


def _non_finite(row: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """Yield the numbers of a row that are not finite; records write them as strings."""
    if row["event"] == "telemetry":
        packed = {name: value for name, value in row.items() if name != "event" and _spelt(value)}
        yield from ((row["step"], name) for name, value in unpack(packed).items() if _spelt(value))
    elif row["event"] in ("train", "non_finite"):
        yield from ((row["step"], name) for name in ("loss", "grad_norm") if _spelt(row.get(name)))


def _spelt(value: Any) -> bool:
    return any(map(_spelt, value)) if isinstance(value, list) else isinstance(value, str)


def _columns(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    names = {name for row in rows for name in row if name != "event"}
    return {name: _column([row.get(name) for row in rows]) for name in sorted(names)}


def _column(values: list[Any]) -> np.ndarray:
    """Convert ragged lists of numbers, strings and None to one array padded with NaN."""
    shape: list[int] = []
    _measure(values, 0, shape)
    column = np.full(shape, np.nan)
    _fill(column, values)
    return column


def _measure(values: Any, axis: int, shape: list[int]) -> None:
    if isinstance(values, list):
        if len(shape) == axis:
            shape.append(0)
        shape[axis] = max(shape[axis], len(values))
        for value in values:
            _measure(value, axis + 1, shape)


def _fill(column: np.ndarray, values: list[Any]) -> None:
    for index, value in enumerate(values):
        if isinstance(value, list):
            _fill(column[index], value)
        elif value is not None:
            column[index] = float(value)
