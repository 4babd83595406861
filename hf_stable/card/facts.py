"""Named access to the records of one run; missing content is None or empty."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_stable.telemetry.reading.history import History


@dataclass(frozen=True)
class Facts:
    """Cleaned records.

    Args:
        run: Content of run.json, or only "model_config" from config.json.
        history: Content of metrics.jsonl, or None.
    """

    run: dict[str, Any]
    history: History | None

    @property
    def recipe(self) -> dict[str, Any]:
        """Resolved recipe."""
        return self.run.get("recipe") or {}

    @property
    def config(self) -> dict[str, Any]:
        """Whole config of the model."""
        return self.run.get("model_config") or {}

    @property
    def parts(self) -> dict[str, dict[str, Any]]:
        """Descriptions of token files by "train" and "validation"."""
        data = self.run.get("data") or {}
        return {part: data[part] for part in ("train", "validation") if data.get(part)}

    def sources(self, part: str) -> list[dict[str, Any]]:
        """Return the recorded files and datasets of a part, over all parts of a mixture."""
        about = self.parts.get(part) or {}
        files = about.get("mixture") or [about]
        return [source for file in files for source in file.get("sources") or []]

    def of(self, place: str) -> Any:
        """Return the recipe's value at dotted keys, or None."""
        found: Any = self.recipe
        for key in place.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        return found

    @property
    def tokens_per_step(self) -> int | None:
        """Tokens of one optimizer step over all processes."""
        batch, length = self.of("training.global_batch_size"), self.of("data.sequence_length")
        return batch * length if batch and length else None

    @property
    def planned_steps(self) -> int | None:
        """Optimizer steps of the whole recipe."""
        steps, tokens = self.of("training.steps"), self.of("training.tokens")
        each = self.tokens_per_step
        return steps or (tokens // each if tokens and each else None)

    @property
    def steps(self) -> int | None:
        """Number of optimizer steps in the log."""
        logged = self._logged("step")
        return int(logged[-1]) if logged.size else None

    @property
    def events(self) -> list[dict[str, Any]]:
        """All rows except those of training and telemetry."""
        return [] if self.history is None else self.history.events

    def last(self, event: str) -> dict[str, Any] | None:
        """Return the last row of a kind, or None."""
        rows = [row for row in self.events if row["event"] == event]
        return rows[-1] if rows else None

    @property
    def seconds(self) -> float | None:
        """Duration of the training steps in seconds, from the logged tokens per second.

        It excludes validations, checkpoints and everything before the first step.
        """
        steps, rates = self._logged("step"), self._logged("tokens_per_second")
        each = self.tokens_per_step
        if each is None or not steps.size or len(rates) != len(steps) or not (rates > 0).all():
            return None
        return float((np.diff(steps, prepend=0) * each / rates).sum())

    def _logged(self, name: str) -> np.ndarray:
        none = np.empty(0)
        return none if self.history is None else self.history.train.get(name, none)


def finite(value: Any) -> bool:
    """Return True for a finite number; records spell out the others."""
    return isinstance(value, (int, float)) and math.isfinite(value)
