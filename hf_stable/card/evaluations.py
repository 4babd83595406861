"""Measured perplexities, from the files that evaluation and studies write."""

import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_stable.checksums import weights_of
from hf_stable.errors import UserError

# Metric of the Hub's model-index, and its name for readers.
_SCORES = {
    "per_token": ("perplexity", "perplexity per token"),
    "per_word": ("word_perplexity", "perplexity per word"),
    "bits_per_byte": ("bits_per_byte", "bits per byte"),
}
# Same values as in `hf_stable.evaluation.perplexity`.
_CONFIDENCE, _SAMPLES, _SEED = 0.95, 2000, 0


@dataclass(frozen=True)
class Score:
    """A number with its bootstrap interval over documents; both ends are None without one."""

    metric: str
    name: str
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Evaluation:
    """Scores on one text.

    Args:
        text: Names of the text; None is the run's validation text.
        scores: Measured numbers.
        documents: Number of documents.
        tokens: Number of scored tokens.
        confidence: Coverage of the intervals.
        note: Reason why there are no intervals, or None.
        windows: (max_length, stride) in tokens, if the file has them.
    """

    text: tuple[str, ...] | None
    scores: tuple[Score, ...]
    documents: int
    tokens: int
    confidence: float
    note: str | None
    windows: tuple[int, int] | None


def find_evaluations(run: Path) -> list[Path]:
    """Return the run's evaluation files, by name; `hf-stable evaluate RUN` writes the first."""
    return sorted(run.glob("evaluation*.json"))


def read_evaluation(file: Path, run: Path) -> Evaluation:
    """Read a result of `hf-stable evaluate --output` or of a study for this run.

    Args:
        file: JSON file of the result.
        run: Folder of the run.

    Raises:
        UserError: If the file is damaged, lacks a number, or belongs to another run; names it.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if "documents" in content and isinstance(content["documents"], list):
            _check_run(file, str(content["id"]), run)
            return _of_study(np.array(content["documents"], dtype=np.float64))
        model = Path(str(content["model"])).resolve()
        _check_run(file, model.parent.name if model.name == "model" else model.name, run)
        _check_weights(file, content.get("weights"), run)
        return _of_command(content)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{file} is no evaluation ({type(error).__name__}: {error}): repeat it with "
            f"{_command(file, run)}"
        ) from error


def _check_run(file: Path, found: str, run: Path) -> None:
    """Refuse numbers of another model, which readers would believe."""
    if found != run.resolve().name:
        raise UserError(
            f"{file} is of {found!r}, not of {run.resolve().name!r}: write it again with "
            f"{_command(file, run)}"
        )


def _check_weights(file: Path, measured: dict[str, str] | None, run: Path) -> None:
    """Refuse numbers that were measured before the run was trained further."""
    there = weights_of(run / "model")
    if measured and there and measured != there:
        raise UserError(
            f"{file} was measured on other weights than those in {run / 'model'}: evaluate "
            f"again: {_command(file, run)}"
        )


def _command(file: Path, run: Path) -> str:
    """Return the command that writes an evaluation of a run."""
    return f"hf-stable evaluate {shlex.quote(str(run))} --output {shlex.quote(str(file))}"


def _of_command(content: dict[str, Any]) -> Evaluation:
    data = content["data"]
    return Evaluation(
        text=None if data is None else tuple(map(str, data)),
        scores=tuple(
            _score(key, *(content[key][part] for part in ("value", "low", "high")))
            for key in _SCORES
        ),
        documents=int(content["documents"]),
        tokens=int(content["tokens"]),
        confidence=float(content["confidence"]),
        note=content.get("interval_note"),
        windows=(int(content["max_length"]), int(content["stride"])),
    )


def _of_study(sums: np.ndarray) -> Evaluation:
    """Build from (documents, 4) float64 sums: NLL in nats, tokens, words, bytes."""
    if sums.ndim != 2 or sums.shape[1] != 4 or not np.isfinite(sums).all() or not len(sums):
        raise ValueError(f"document sums are {sums.shape}, not rows of four finite numbers")
    from hf_stable.evaluation.result import estimates  # noqa: PLC0415  # its package has torch

    rng = np.random.default_rng(_SEED)
    found, note = estimates(sums, confidence=_CONFIDENCE, samples=_SAMPLES, rng=rng)
    return Evaluation(
        text=None,
        scores=tuple(
            _score(key, each.value, each.low, each.high)
            for key, each in zip(_SCORES, found, strict=True)
        ),
        documents=len(sums),
        tokens=int(sums[:, 1].sum()),
        confidence=_CONFIDENCE,
        note=note,
        windows=None,
    )


def _score(key: str, value: Any, low: Any, high: Any) -> Score:
    """Build a score; an interval that is not finite counts as none."""
    ends = [None if end is None else float(end) for end in (low, high)]
    if any(end is None or not math.isfinite(end) for end in ends):
        ends = [None, None]
    return Score(*_SCORES[key], float(value), *ends)
