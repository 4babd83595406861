"""Read the records of a study: every run by method, variant, learning rate and seed.

It reads only records and needs no torch. An unfinished study can be read too; missing runs are
listed.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from hf_stable.errors import UserError
from hf_stable.telemetry.reading.history import History, read_history

from .rule import Verdict

BASELINE = "baseline"
STATUSES = ("finished", "stopped", "failed")
_NUMBERS = ("seconds", "initial_loss", "validation_loss", "unigram", "bigram", "warmup_steps")


@dataclass(frozen=True)
class Place:
    """Cell and seed of a run in the grid of a study; `learning_rate` is the peak."""

    method: str
    variant: str
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class Result:
    """One run that has ended. Losses are in nats per token; NaN if missing.

    Args:
        id: Id of the run.
        place: Cell and seed of the run.
        status: "finished"; "stopped" by the rule, which is unstable; or "failed", which is neither
            stable nor unstable.
        error: Last error of a failed run.
        attempts: Number of attempts.
        seconds: Time of the run.
        steps: Number of optimizer steps taken.
        parameters: Number of parameters of the model.
        flops: FLOPs of the whole training; None if unknown.
        initial_loss: Loss of the first batch, before any update.
        validation_loss: Loss of the final weights.
        unigram: Cross-entropy of a unigram table on the validation text.
        bigram: Cross-entropy of a bigram table on the validation text.
        warmup_steps: Number of warm-up steps.
        thresholds: Thresholds of the recorded verdict.
        verdict: Recorded verdict.
        history: Records of the run; None if they are missing or damaged.
    """

    id: str
    place: Place
    status: str
    error: str | None
    attempts: int
    seconds: float
    steps: int
    parameters: int | None
    flops: float | None
    initial_loss: float
    validation_loss: float
    unigram: float
    bigram: float
    warmup_steps: float
    thresholds: dict[str, Any]
    verdict: Verdict
    history: History | None

    @property
    def diverged(self) -> bool:
        """True if a number was not finite or the loss rose and stayed high, by its record."""
        return self.status != "failed" and self.verdict.diverged

    @property
    def collapsed(self) -> bool:
        """True if it learned little without having diverged, by its record."""
        if self.status == "failed" or self.diverged:
            return False
        return self.status == "stopped" or self.verdict.collapsed

    @property
    def unstable(self) -> bool:
        """True if it diverged or collapsed."""
        return self.diverged or self.collapsed

    @property
    def capped_loss(self) -> float:
        """Validation loss in nats, capped at the initial loss; NaN for a failed run."""
        if self.status == "failed":
            return math.nan
        loss, start = self.validation_loss, self.initial_loss
        return min(loss, start) if math.isfinite(loss) else start

    @property
    def has_marks(self) -> bool:
        """True if the bigram's cross-entropy is below the unigram's, which the rule needs."""
        return self.bigram < self.unigram

    @property
    def model_config(self) -> Mapping[str, Any]:
        """Resolved config of the model; empty if it is not recorded."""
        return {} if self.history is None else self.history.run.get("model_config", {})

    @property
    def stable(self) -> bool:
        """True if it was trained to its end and neither diverged nor collapsed."""
        return self.status == "finished" and not self.unstable


@dataclass(frozen=True)
class Study:
    """A study's records.

    Args:
        folder: Folder of the study.
        name: Name of the study.
        methods: Methods in the order of the plan.
        variants: Variants in the order of the plan.
        rates: Learning rates, ascending.
        seeds: Seeds in the order of the plan.
        thresholds: Planned thresholds of the rule.
        reproduces: Tables of the paper that the study reproduces.
        claims_revision: Commit of the claims when the study began; None if not recorded.
        results: Results of the ended runs, in the order of the plan.
        unfinished: Ids of planned runs without a result, in the order of the plan.
        awaited: Places of the unfinished runs whose id could be parsed.
        perplexities: (documents, 4) float64 sums by run id: NLL in nats, tokens, words, bytes.
        notes: Files that could not be read, with the reasons.
    """

    folder: Path
    name: str
    methods: list[str]
    variants: list[str]
    rates: list[float]
    seeds: list[int]
    thresholds: dict[str, Any]
    reproduces: list[str]
    claims_revision: str | None
    results: list[Result]
    unfinished: list[str]
    awaited: list[Place]
    perplexities: dict[str, np.ndarray]
    notes: list[str]

    def cell(self, method: str, variant: str, rate: float) -> list[Result]:
        """Return the results of one cell of the grid, by seed."""
        found = [each for each in self.results if _cell(each.place) == (method, variant, rate)]
        return sorted(found, key=lambda each: each.place.seed)

    def missing(self, method: str, variant: str, rate: float) -> int:
        """Return the number of planned runs of one cell that have not ended."""
        return sum(_cell(place) == (method, variant, rate) for place in self.awaited)

    def rates_of(self, variant: str) -> list[float]:
        """Return the learning rates of a variant's ended and planned runs, ascending."""
        places = [*(each.place for each in self.results), *self.awaited]
        return sorted({each.learning_rate for each in places if each.variant == variant})

    def numbers(self, method: str, variant: str, number: Callable[[Result], float]) -> np.ndarray:
        """Return (S, R) of a number of each run: seeds by the rates of the variant.

        It is NaN for a run without a result.
        """
        rates = self.rates_of(variant)
        out = np.full((len(self.seeds), len(rates)), np.nan)
        for each in self.results:
            place = each.place
            if (place.method, place.variant) == (method, variant):
                out[self.seeds.index(place.seed), rates.index(place.learning_rate)] = number(each)
        return out


def _cell(place: Place) -> tuple[str, str, float]:
    return place.method, place.variant, place.learning_rate


def read_study(folder: Path) -> Study:
    """Read a study's records, also while it is running.

    Raises:
        UserError: If the folder holds no study, or a plan or result cannot be read.
    """
    if not (folder / "plan.json").is_file():
        raise UserError(
            f"{folder} holds no study: there is no plan.json in it; pass the folder that "
            "`hf-stable sweep` wrote"
        )
    plan = _read(folder / "plan.json")
    notes: list[str] = []
    try:
        ids, seeds = [str(each) for each in plan["runs"]], [int(each) for each in plan["seeds"]]
        ended = [each for each in ids if (folder / "runs" / each / "result.json").is_file()]
        results = [_result(folder / "runs" / each, notes) for each in ended]
        methods, variants = list(plan["methods"]), list(plan["variants"])
        unfinished = [each for each in ids if each not in set(ended)]
        places = _places(plan)
        study = Study(
            folder=folder,
            name=str(plan["name"]),
            methods=methods,
            variants=variants,
            rates=sorted(float(each) for each in plan["learning_rates"]),
            seeds=seeds,
            thresholds=dict(plan.get("thresholds") or {}),
            reproduces=[str(each) for each in plan.get("reproduces") or ()],
            claims_revision=plan.get("claims_revision"),
            results=results,
            unfinished=unfinished,
            awaited=[places[each] for each in unfinished if each in places],
            perplexities=_perplexities(folder / "perplexity", notes),
            notes=notes,
        )
    except KeyError as error:
        raise UserError(f"{folder / 'plan.json'} has no {error}; run the sweep again") from error
    _check_places(study)
    return study


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file} is not JSON: {error}; restore it, or delete it and run the sweep again"
        ) from error


def _number(value: Any) -> float:
    """Convert a recorded number: a string is not finite, and null is unknown."""
    return float("nan") if value is None else float(value)


def _result(folder: Path, notes: list[str]) -> Result:
    file = folder / "result.json"
    content = _read(file)
    try:
        place = Place(
            method=str(content["method"]),
            variant=str(content["variant"]),
            learning_rate=float(content["learning_rate"]),
            seed=int(content["seed"]),
        )
        result = Result(
            id=str(content["id"]),
            place=place,
            status=str(content["status"]),
            error=content.get("error"),
            attempts=int(content.get("attempts", 1)),
            steps=int(content.get("steps") or 0),
            parameters=content.get("parameters"),
            flops=content.get("flops"),
            **{key: _number(content.get(key)) for key in _NUMBERS},
            thresholds=dict(content.get("thresholds") or {}),
            verdict=Verdict.from_dict(content.get("verdict") or {}),
            history=_history(folder, notes if content["status"] != "failed" else []),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file}: {type(error).__name__} {error}; delete the file and run the sweep again"
        ) from error
    if result.status not in STATUSES:
        raise UserError(f"{file}: status is {result.status!r}; known are {', '.join(STATUSES)}")
    return result


def _history(folder: Path, notes: list[str]) -> History | None:
    try:
        return read_history(folder)
    except (UserError, ValueError) as error:
        notes.append(f"{folder.name}: {error}".replace(str(folder), folder.name))
        return None


def _places(plan: dict[str, Any]) -> dict[str, Place]:
    """Return the places of planned runs by id, for runs without a result."""
    axes = [plan[key] for key in ("methods", "variants", "learning_rates", "seeds")]
    places = {}
    for method, variant, rate, seed in product(*axes):
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", variant)
        parts = [method, *([slug] if slug else []), f"lr-{rate:g}", f"seed-{seed}"]
        places["_".join(parts)] = Place(method, variant, float(rate), int(seed))
    return places


def _perplexities(folder: Path, notes: list[str]) -> dict[str, np.ndarray]:
    sums: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.json")):
        content = _read(file)
        try:
            documents = np.array(content["documents"], dtype=np.float64)
            identity = str(content["id"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file}: {type(error).__name__} {error}; evaluate again") from error
        if documents.ndim != 2 or documents.shape[1] != 4 or not np.isfinite(documents).all():
            notes.append(f"perplexity/{file.name}: not rows of four finite numbers, left out")
        else:
            sums[identity] = documents
    return sums


def _check_places(study: Study) -> None:
    """Raise an error for a run outside of the plan's grid, which no table would show."""
    for each in study.results:
        place = each.place
        for what, value, known in (
            ("method", place.method, study.methods),
            ("variant", place.variant, study.variants),
            ("seed", place.seed, study.seeds),
        ):
            if value not in known:
                raise UserError(
                    f"{study.folder / 'runs' / each.id / 'result.json'}: {what} {value!r} is not "
                    f"in plan.json, which has {known}; correct one of the files"
                )
