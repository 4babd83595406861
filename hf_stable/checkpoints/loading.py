"""Loading of the newest valid checkpoint into any number of processes, and model export."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from hf_stable.errors import CheckpointError

from .directory import (
    Report,
    checkpoints_in,
    folder_of,
    newest_good,
    quarantine,
    read_manifest,
    remove_litter,
    step_of,
    verify,
)
from .layouts import (
    is_sharded,
    read_random,
    read_scalars,
    read_tensors,
    read_weights,
    write_weights,
)
from .state import put_random_states, put_tensors, tensors_of
from .together import count_of, from_main, rank_of, together


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first, without verifying them."""
    return checkpoints_in(run / "checkpoints")


def load_newest(
    run: Path,
    model: Any,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    at_most: int | None = None,
    report: Report = warnings.warn,
) -> dict[str, Any] | None:
    """Load the newest valid checkpoint into model, optimizer and generators; collective.

    Damaged checkpoints found on the way are quarantined. Remains of an interrupted save are
    removed, so the caller must hold the run lock.

    Args:
        run: Folder of the run.
        model: Wrapped model to fill.
        optimizer: Optimizer to fill.
        accelerator: Accelerator of the run.
        at_most: Ignore checkpoints of later steps.
        report: Receives one line for each damaged checkpoint, on every process.

    Returns:
        The scalars saved with the checkpoint, and its "step"; None if there never was a checkpoint.

    Raises:
        CheckpointError: If there are checkpoints but none is valid, or the newest valid one belongs
            to another model or optimizer.
    """
    parent = run / "checkpoints"
    from_main(lambda: remove_litter(parent), f"{parent} cannot be cleaned")
    # One process lists for all: file systems of different machines may not agree at once.
    folders = from_main(
        lambda: [*checkpoints_in(parent), *checkpoints_in(parent, "bad-")],
        f"{parent} cannot be read",
    )
    folder = newest_good(
        parent,
        report,
        at_most=at_most,
        candidates=folders,
        check=_verify_together,
        reject=lambda bad, why: from_main(
            lambda: quarantine(bad, why), f"{bad} is damaged ({why}) and cannot be renamed"
        ),
    )
    return None if folder is None else _load(folder, model, optimizer, accelerator)


def load_checkpoint(
    folder: Path, model: Any, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> dict[str, Any]:
    """Load one checkpoint into model, optimizer and generators; collective.

    Args:
        folder: Folder of the checkpoint.
        model: Wrapped model to fill.
        optimizer: Optimizer to fill.
        accelerator: Accelerator of the run.

    Returns:
        The scalars saved with the checkpoint, and its "step".

    Raises:
        CheckpointError: If it is damaged, or belongs to another model or optimizer.
    """
    problem = _verify_together(folder)
    if problem is not None:
        raise CheckpointError(
            f"{folder}: the checkpoint cannot be read ({problem}). Delete this folder to resume "
            "from the previous one, or give training a new output folder."
        )
    return _load(folder, model, optimizer, accelerator)


def _verify_together(folder: Path) -> str | None:
    """Verify a checkpoint together: each process reads its share of the files."""
    share = (rank_of(), count_of())
    problems = together(lambda: verify(folder, share), f"{folder} cannot be read")
    return next((problem for problem in problems if problem is not None), None)


def _load(
    folder: Path, model: Any, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> dict[str, Any]:
    what = f"{folder.name} cannot be loaded"
    targets, _ = tensors_of(model, optimizer)

    def read() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        files = read_manifest(folder)
        content, random = read_scalars(folder), read_random(folder)
        read_tensors(folder, files, targets)
        return content, random

    # Each process reads for itself; all stop if one of them fails.
    answer: list[Any] = []
    together(lambda: answer.extend(read()), what)
    content, random = answer
    put_tensors(model, optimizer, targets, content["param_groups"])
    put_random_states(random, accelerator)
    return {**content["scalars"], "step": content["step"]}


def find_checkpoint(run: Path, step: int) -> Path:
    """Return the valid checkpoint of a step.

    Args:
        run: Folder of the run.
        step: Number of optimizer steps.

    Raises:
        CheckpointError: If there is none; names the existing ones.
    """
    folder = folder_of(run / "checkpoints", step)
    if not folder.exists():
        steps = ", ".join(str(step_of(path)) for path in list_checkpoints(run)) or "none"
        raise CheckpointError(f"{run} has no checkpoint of step {step}; there are: {steps}.")
    problem = verify(folder)
    if problem is not None:
        raise CheckpointError(f"{folder} is damaged: {problem}. Take another step's checkpoint.")
    return folder


def export_model(checkpoint: Path, target: Path) -> Path:
    """Write a checkpoint's model as a plain Transformers folder, from either layout.

    Runs in one process without a process group; the weights must fit into its memory.

    Args:
        checkpoint: Folder of the checkpoint.
        target: Folder to write.

    Returns:
        `target`.

    Raises:
        CheckpointError: If the checkpoint is damaged.
    """
    problem = verify(checkpoint)
    if problem is not None:
        raise CheckpointError(f"{checkpoint} is damaged: {problem}.")
    files = read_manifest(checkpoint)
    for name in files:
        if name.startswith("model/"):
            place = target / name.removeprefix("model/")
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint / name, place)
    if is_sharded(files):
        write_weights(target, read_weights(checkpoint, files))
    return target
