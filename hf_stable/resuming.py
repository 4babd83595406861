"""Resuming a run: which settings must match, where to continue, and which data to leave out."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from . import records
from .checkpoints import abandon, list_checkpoints, load_newest
from .checkpoints.directory import read_json, step_of
from .checkpoints.together import from_main
from .data.order import Order
from .errors import CheckpointError
from .guard import Decision, Guard, Rollback, append_rollback, read_rollbacks
from .recipes import Recipe, deciding_data, from_dict, to_dict
from .recipes.schema import TrainingRecipe

# Keys of a recipe that decide the length of a run.
_LENGTH = {"training.steps", "training.tokens"}
# Keys that change no result of a run, so that a resumed run may have other values.
_FREE_KEYS = {
    "output",
    "data.cache",
    "data.num_workers",
    "training.micro_batch_size",
    "training.initial_model",  # its weights are compared instead, see `check_initial_model`
    "training.sharding",
    "training.shard_size",
    "training.reshard_after_forward",
    "training.cpu_offload",
    "training.compile",
    "training.log_every",
    "training.evaluate_every",
    "training.evaluate_blocks",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.keep_every",
    "training.asynchronous_checkpoints",
    "training.hang_timeout",
    "training.trackers",
    "training.threads",
    "telemetry.every",
    "telemetry.bounds_every",
}


@dataclass(frozen=True)
class Resumed:
    """Point from which a run continues.

    Args:
        step: Number of optimizer steps already done.
        guard: Guard with its state at that step.
        update_norm: Norm of the last update, which the guard has not seen yet.
        skipped: Ranges of absolute sample positions to leave out.
    """

    step: int
    guard: Guard
    update_norm: float | None
    skipped: list[tuple[int, int]]


def flat(recipe: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, dict):
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[prefix + key] = value
    return found


def check_recipe(folder: Path, recipe: Recipe, resume: str) -> None:
    """Refuse to resume a run that was started with another recipe.

    Args:
        folder: Folder of the run.
        recipe: Recipe to resume with.
        resume: See `training.train`.

    Raises:
        CheckpointError: If keys differ that `resume` does not allow to differ; names all of them.
    """
    if not (folder / "run.json").exists():
        return
    if resume == "never":
        raise CheckpointError(
            f"{folder} holds a run already: give another output folder, delete this one, or "
            "resume it with --resume auto."
        )
    earlier = recorded_recipe(folder)
    before, now = _deciding(earlier), _deciding(recipe)
    changes = {
        key: (before.get(key), now.get(key))
        for key in before.keys() | now.keys()
        if before.get(key) != now.get(key)
    }
    is_longer = recipe.num_steps > earlier.num_steps
    if resume == "longer":
        if recipe.num_steps < earlier.num_steps:
            raise CheckpointError(
                f"{folder} holds a run of {earlier.num_steps:,} steps, and {_length(recipe)}: "
                "--resume longer only makes a run longer; give more steps, or --resume changed"
            )
        changes = {key: both for key, both in changes.items() if key not in _LENGTH}
    hint = ""
    if is_longer and changes.keys() <= _LENGTH:
        hint = "To extend this run to the new length: --resume longer. "
    _refuse(folder, "a run of another recipe", changes, resume, hint)


def recorded_recipe(folder: Path) -> Recipe:
    """Return the recipe recorded in the folder; keys added since then have their defaults."""
    return from_dict(records.read_run(folder)["recipe"])


def _length(recipe: Recipe) -> str:
    """Describe the key that decides the length of a run, with its value."""
    settings = recipe.training
    if settings.steps is not None:
        return f"training.steps is {settings.steps:,}"
    return f"training.tokens {settings.tokens:,} is {recipe.num_steps:,} steps"


def check_length(folder: Path, recipe: Recipe, step: int) -> None:
    """Refuse to resume a run that is already beyond the end of the recipe.

    Args:
        folder: Folder of the run.
        recipe: Recipe to resume with.
        step: Step of the checkpoint that the run would resume from.

    Raises:
        CheckpointError: If the checkpoint has more steps than the recipe.
    """
    if step > recipe.num_steps:
        raise CheckpointError(
            f"{folder} holds a run that is at step {step:,}, and {_length(recipe)}: give at least "
            f"{step:,} steps, or another output folder"
        )


def finished_at(recipe: Recipe, resume: str) -> float | None:
    """Return the last validation perplexity of a finished run.

    Args:
        recipe: Recipe of the run; its output folder is examined.
        resume: See `training.train`.

    Returns:
        None if there is something left to do: steps to take, or a license to record.

    Raises:
        CheckpointError: If the run has another recipe, and `resume` does not allow it.
    """
    folder = Path(recipe.output)
    whole = all((folder / name).is_file() for name in ("run.json", "model/config.json"))
    if not whole or not (folder / "metrics.jsonl").is_file():
        return None
    check_recipe(folder, recipe, resume)
    if _stated(records.read_run(folder)["recipe"]) != _stated(to_dict(recipe)):
        return None
    rows = records.read_metrics(folder)
    turns = [row for row in rows if row["event"] in ("started", "resumed", "finished")]
    if not turns or (turns[-1]["event"], turns[-1]["step"]) != ("finished", recipe.num_steps):
        return None
    perplexities = [float(row["perplexity"]) for row in rows if row["event"] == "validation"]
    return perplexities[-1] if perplexities else None


def _stated(content: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a recipe that may not differ silently."""
    return {key: value for key, value in flat(content).items() if key not in _FREE_KEYS}


def _deciding(recipe: Recipe) -> dict[str, Any]:
    """Return the keys that decide a run's results: neither free keys nor the license of a text."""
    content = to_dict(recipe)
    content["data"] = deciding_data(content["data"])
    return _stated(content)


def check_data(folder: Path, data: dict[str, Any], resume: str) -> None:
    """Refuse to resume with another text or tokenizer than the run began with.

    Args:
        folder: Folder of the run.
        data: Description of text and tokenizer that goes into run.json.
        resume: See `training.train`.

    Raises:
        CheckpointError: If they differ, unless `resume` is "changed".
    """
    if not (folder / "run.json").exists():
        return
    before = records.read_run(folder).get("data", {})
    changes = {}
    for part in ("train", "validation"):
        old, new = (content.get(part, {}).get("fingerprint") for content in (before, data))
        if old is not None and old != new:
            changes[f"fingerprint of the {part} tokens (text and tokenizer)"] = (old, new)
    _refuse(folder, "a run on other data", changes, resume)


def check_initial_model(folder: Path, sha256: str | None, resume: str) -> dict[str, Any] | None:
    """Refuse to resume a run that began with other weights than the recipe's initial model.

    Args:
        folder: Folder of the run.
        sha256: SHA-256 of the initial model; None without one.
        resume: See `training.train`.

    Returns:
        Entry of run.json about the weights that the run began with; None for a new run.

    Raises:
        CheckpointError: If the hashes differ, unless `resume` is "changed".
    """
    if not (folder / "run.json").exists():
        return None
    record = recorded_initial_model(folder)
    before = None if record is None else record["sha256"]
    if before == sha256:
        return record
    changes = {"SHA-256 of training.initial_model": (before, sha256)}
    _refuse(folder, "a run that began with other weights", changes, resume)
    return record if list_checkpoints(folder) else None  # a checkpoint's weights take precedence


def recorded_initial_model(folder: Path) -> dict[str, Any] | None:
    """Return the entry of run.json about the weights that the run began with."""
    if not (folder / "run.json").exists():
        return None
    return records.read_run(folder).get("initial_model")


def _refuse(
    folder: Path, what: str, changes: dict[str, tuple[Any, Any]], resume: str, hint: str = ""
) -> None:
    if not changes or resume == "changed":
        return
    lines = [f"  {key}: {old!r} there, {new!r} here" for key, (old, new) in sorted(changes.items())]
    raise CheckpointError(
        f"{folder} holds {what}:\n" + "\n".join(lines) + "\n"
        f"{hint}Give another output folder, delete this one, or undo the changes; --resume "
        "changed resumes despite them."
    )


def resume_run(
    folder: Path,
    guard: Guard,
    model: Any,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    report: Callable[[str], None],
) -> Resumed:
    """Load the newest valid state into model, optimizer and guard; collective.

    Args:
        folder: Folder of the run.
        guard: Guard to fill.
        model: Wrapped model to fill.
        optimizer: Optimizer to fill.
        accelerator: Accelerator of the run.
        report: Receives one line for each damaged checkpoint.

    Returns:
        Point to continue from: step 0 if there never was a checkpoint.

    Raises:
        CheckpointError: If no checkpoint is valid, or none is left of a run that had some.
    """
    # One process reads for all: file systems of different machines may not agree at once.
    rollbacks = from_main(lambda: read_rollbacks(folder), f"{folder} cannot be resumed")
    from_main(lambda: _finish_rollback(folder, rollbacks), f"{folder} cannot be cleaned")
    scalars = load_newest(folder, model, optimizer, accelerator, report=report)
    if scalars is None:
        _check_never_saved(folder)
    return _resumed(scalars or {"step": 0}, guard, rollbacks)


def _resumed(scalars: dict[str, Any], guard: Guard, rollbacks: list[Rollback]) -> Resumed:
    if scalars.get("guard") is not None:
        guard.load_state_dict(scalars["guard"])
    guard.after_rollback(rollbacks)
    skipped = [each.skipped for each in rollbacks]
    return Resumed(scalars["step"], guard, scalars.get("update_norm"), skipped)


def warn_of_numerics(folder: Path, report: Callable[[str], None]) -> None:
    """Report settings that may keep a CPU from resuming the run bit by bit.

    Args:
        folder: Folder of the run, with its run.json.
        report: Receives one line for each such setting.
    """
    now = records.numerics()
    before = records.read_run(folder).get("numerics", {})
    changed = {name: (before.get(name), now[name]) for name in now if before.get(name) != now[name]}
    if changed:
        values = ", ".join(f"{name} was {old}, is {new}" for name, (old, new) in changed.items())
        report(f"warning: {values}: the last bits may differ from those of an uninterrupted run")
    if now["MKL_CBWR"] is None and torch.backends.mkl.is_available():
        report(
            "warning: MKL_CBWR is not set, so MKL may round differently in each process: set "
            "MKL_CBWR=AUTO before Python starts to make resuming bit-exact on every CPU"
        )


def _finish_rollback(folder: Path, rollbacks: list[Rollback]) -> None:
    """Delete the abandoned checkpoints that a killed rollback left behind."""
    if not rollbacks:
        return
    for checkpoint in reversed(list_checkpoints(folder)):
        if step_of(checkpoint) <= rollbacks[-1].to_step:
            return
        try:
            known = read_json(checkpoint / "state.json")["scalars"]["rollbacks"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged; loading quarantines it
        if known < len(rollbacks):
            abandon(folder / "checkpoints", rollbacks[-1].to_step)
        return


def _check_never_saved(folder: Path) -> None:
    """Refuse to start again silently when a run has lost all of its checkpoints."""
    if not (folder / "metrics.jsonl").is_file():
        return
    saved = records.read_metrics(folder, "checkpoint")
    if saved:
        raise CheckpointError(
            f"{folder} has no checkpoint left, and its log says that {saved[-1]['folder']} was "
            "written. Bring it back, or give training a new output folder; to begin again in this "
            "one, delete it."
        )


def roll_back(
    folder: Path,
    decision: Decision,
    order: Order,
    settings: TrainingRecipe,
    model: Any,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    guard: Guard,
) -> Resumed:
    """Return to a state before the trouble and leave out the data at fault; collective.

    A run that is killed at any point here resumes with the same result: `rollbacks.json` decides.

    Args:
        folder: Folder of the run.
        decision: The guard's decision to roll back.
        order: Order of the training samples.
        settings: Training section of the recipe.
        model: Wrapped model to fill.
        optimizer: Optimizer to fill.
        accelerator: Accelerator of the run.
        guard: New guard to fill.

    Returns:
        Point to continue from.

    Raises:
        CheckpointError: If no checkpoint from before the trouble is left.
    """
    assert decision.rollback_to is not None and decision.onset is not None
    assert decision.skip_first is not None and decision.skip_last is not None
    every, batch = settings.checkpoint_every, settings.global_batch_size
    target = from_main(lambda: _target(folder, decision, every), f"{folder} cannot be rolled back")
    # Load before deleting anything: a damaged target would leave nothing to resume from.
    scalars = load_newest(folder, model, optimizer, accelerator, at_most=target)
    assert scalars is not None  # `_target` found one, or `load_newest` raised
    target = scalars["step"]
    first = max(decision.skip_first - 1, target)  # earlier samples are already in the weights
    ends = np.array([first * batch, decision.skip_last * batch - 1])
    start, stop = (order.absolute(ends) + np.array([0, 1])).tolist()

    def record() -> list[Rollback]:
        log = folder / "metrics.jsonl"
        size = log.stat().st_size if log.exists() else 0
        rollback = Rollback(decision.step, target, (start, stop), decision.reason, size)
        found = append_rollback(folder, rollback)
        abandon(folder / "checkpoints", target)
        return found

    return _resumed(scalars, guard, from_main(record, f"{folder} cannot be rolled back"))


def _target(folder: Path, decision: Decision, every: int) -> int:
    """Return the newest checkpoint that is old enough, else the oldest from before the trouble.

    Checkpoints between the regular ones come from preemptions, which must not change the result.
    """
    assert decision.rollback_to is not None and decision.onset is not None
    there = [step_of(checkpoint) for checkpoint in list_checkpoints(folder)]
    steps = [step for step in there if step % every == 0] or there
    enough = [step for step in steps if step <= decision.rollback_to]
    before = [step for step in steps if step < decision.onset]
    if not before:
        raise CheckpointError(
            f"{folder}: {decision.reason}; no checkpoint is left from before step "
            f"{decision.onset} to go back to. Raise training.keep_checkpoints, and start again."
        )
    return enough[-1] if enough else before[0]
