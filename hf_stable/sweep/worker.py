"""Worker process of a study: it claims free runs, trains them and writes their results.

The result is the last file written for a run, so a run without a result is unfinished. The process
that holds the lock of a run trains it. The system releases the lock when that process dies.
"""

import contextlib
import hashlib
import json
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from hf_stable.checkpoints import list_checkpoints
from hf_stable.corpus import sources_of
from hf_stable.data import ReadReport, expand, read_documents
from hf_stable.errors import DivergedError
from hf_stable.evaluation import load_model, perplexity
from hf_stable.preemption import EXIT_PREEMPTED
from hf_stable.recipes import Recipe, deciding_data, to_dict
from hf_stable.records import write_json
from hf_stable.telemetry.reading.history import History, read_history
from hf_stable.training import train

from .plan import Planned, planned_runs, read_plan
from .rule import Thresholds, is_hopeless, judge

# A run that fails is tried once more. A run that failed twice is expected to fail again.
ATTEMPTS = 2


def recipe_digest(recipe: Recipe) -> str:
    """Return a hash of the recipe that a finished run must match; paths do not count."""
    chosen = to_dict(recipe, defaults=False)  # defaults of future keys must not change the digest
    content = {key: value for key, value in chosen.items() if key != "output"}
    content["data"] = deciding_data(content["data"])
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def work(study: Path, ended_by: tuple[type[Exception], ...] = ()) -> None:
    """Train runs of a study until every run is finished or claimed by another worker.

    Args:
        study: Folder of the study.
        ended_by: Errors that end this worker. Any other error marks the run as failed.
    """
    plan, thresholds = read_plan(study)
    for planned in planned_runs(plan):
        with _taken(study, planned) as mine:
            if mine:
                attempt = partial(_train, study, planned, thresholds, plan.perplexity_documents)
                result = _attempts(study, planned, thresholds, attempt, ended_by)
                write_json(_result_file(planned), result)
                if not plan.keep_models:
                    _drop_weights(Path(planned.recipe.output))


def _result_file(planned: Planned) -> Path:
    return Path(planned.recipe.output) / "result.json"


@contextlib.contextmanager
def _taken(study: Path, planned: Planned) -> Iterator[bool]:
    """Yield True if this process holds the lock of the run, and the run has no result yet."""
    locks = study / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(locks / f"{planned.id}.lock", timeout=0):
            yield not _result_file(planned).is_file()
    except Timeout:
        yield False


def _attempts(
    study: Path,
    planned: Planned,
    thresholds: Thresholds,
    attempt: Callable[[], dict[str, Any]],
    ended_by: tuple[type[Exception], ...],
) -> dict[str, Any]:
    """Return the result of a run, with a second attempt if the first failed."""
    failures = study / "failures" / f"{planned.id}.json"
    failed = json.loads(failures.read_text("utf-8"))["attempts"] if failures.is_file() else 0
    common = {
        "id": planned.id,
        "method": planned.method,
        "variant": planned.variant,
        "learning_rate": planned.learning_rate,
        "seed": planned.seed,
        "recipe": recipe_digest(planned.recipe),
        "thresholds": thresholds.to_dict(),
    }
    while True:
        print(f"{planned.id}: attempt {failed + 1}", file=sys.stderr, flush=True)
        try:
            return {**common, **attempt(), "error": None, "attempts": failed + 1}
        except ended_by:
            raise
        except Exception as error:  # no error of a run may end the study
            traceback.print_exc()
            failed += 1
            text = f"{type(error).__name__}: {error}"
            write_json(failures, {"attempts": failed, "error": text})
            if failed >= ATTEMPTS:
                return {**common, "status": "failed", "error": text, "attempts": failed}


def _train(study: Path, planned: Planned, thresholds: Thresholds, documents: int) -> dict[str, Any]:
    folder, start = Path(planned.recipe.output), time.monotonic()
    if folder.exists() and not list_checkpoints(folder):
        shutil.rmtree(folder)  # records of an interrupted attempt would be duplicated
    stop = _Stop(planned.recipe, folder, thresholds)
    status = "finished"
    try:
        result = train(planned.recipe, stop=stop)
        if result.preempted:
            raise SystemExit(EXIT_PREEMPTED)
        if result.stopped is not None:
            status = "stopped"
    except DivergedError:
        status = "stopped"
    found = _numbers(planned, thresholds, stopped=status == "stopped")
    if documents and status == "finished":
        _score(study, planned, documents)
    return {"status": status, **found, "seconds": time.monotonic() - start}


class _Stop:
    """Callback that applies the declared rule after every step."""

    def __init__(self, recipe: Recipe, folder: Path, thresholds: Thresholds) -> None:
        self._folder, self._total, self._thresholds = folder, recipe.num_steps, thresholds
        self._losses: list[float] = []
        self._unigram = 0.0

    def __call__(self, step: int, loss: float, grad_norm: float) -> str | None:
        if not self._losses:
            self._begin(step)
        self._losses.append(loss)
        losses = np.array(self._losses)
        if is_hopeless(losses, step, self._total, self._unigram, self._thresholds):
            return "hopeless by the declared rule"
        return None

    def _begin(self, step: int) -> None:
        history = read_history(self._folder)
        self._unigram = history.run["data"]["unigram_nats_per_token"]
        if step > 1:  # resumed
            self._losses.extend(history.train["loss"][history.train["step"] < step].tolist())


def _numbers(planned: Planned, thresholds: Thresholds, stopped: bool) -> dict[str, Any]:
    """Return the numbers of an ended run from its records."""
    history = read_history(Path(planned.recipe.output))
    run, losses = history.run, history.train["loss"]
    data, steps = run["data"], int(history.train["step"][-1])
    validation = _last_validation(history)
    unigram, bigram = data["unigram_nats_per_token"], data["bigram_nats_per_token"]
    warmup = planned.recipe.warmup_steps
    verdict = judge(history.train, validation, unigram, bigram, warmup, thresholds, stopped=stopped)
    tokens = steps * planned.recipe.tokens_per_step
    return {
        "steps": steps,
        "parameters": run["parameters"],
        "flops": run["flops_per_token"] * tokens,
        "initial_loss": float(losses[0]),
        "validation_loss": validation,
        "unigram": unigram,
        "bigram": bigram,
        "warmup_steps": warmup,
        "verdict": verdict.to_dict(),
    }


def _score(study: Path, planned: Planned, limit: int) -> None:
    """Write the sums of the trained model for each document: (nats, tokens, words, bytes)."""
    sources = expand(sources_of(planned.recipe)[1])
    documents = (text for source in sources for text in read_documents(source, ReadReport()))
    model, tokenizer = load_model(str(Path(planned.recipe.output) / "model"))
    result = perplexity(model, tokenizer, islice(documents, limit))
    content = {"id": planned.id, "documents": result.document_sums.tolist()}
    write_json(study / "perplexity" / f"{planned.id}.json", content)


def _last_validation(history: History) -> float:
    """Return the final validation loss; infinite for a run that ended on non-finite steps."""
    if any(row["event"] == "diverged" for row in history.events):
        return float("inf")
    rows = [row for row in history.events if row["event"] == "validation"]
    return float(rows[-1]["loss"])


def _drop_weights(folder: Path) -> None:
    for name in ("model", "checkpoints"):
        shutil.rmtree(folder / name, ignore_errors=True)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
