"""Checkpoints of a run: one directory a step, complete when it has its final name.

Inside: a plain Transformers folder with the weights, the optimizer's tensors and the generators'
states as safetensors, and scalars as JSON. Nothing in it is pickled.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .errors import CheckpointError
from .parallel import full_state, load_full_state, unwrap_model
from .records import write_json

_PREFIX = "step-"


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob(f"{_PREFIX}[0-9]*"))


def _random_state(accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """States of every process's generators, one row a process; dropout draws from them."""
    states = {"cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    gathered: dict[str, Any] = {
        name: accelerator.gather(state[None].to(accelerator.device))
        for name, state in states.items()
    }
    return {name: rows.cpu() for name, rows in gathered.items()}


def save_checkpoint(
    run: Path, step: int, model: Any, optimizer: Any, accelerator: Accelerator, keep: int
) -> Path:
    """Write the state after `step` optimizer steps and drop all but the newest `keep`; collective.

    Returns:
        The checkpoint's folder, which exists under this name only when it is complete.
    """
    folder = run / "checkpoints" / f"{_PREFIX}{step:08d}"
    weights, state = full_state(model, optimizer)
    random_state = _random_state(accelerator)
    if accelerator.is_main_process and not folder.exists():
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        unwrap_model(model).save_pretrained(temporary / "model", state_dict=weights)
        tensors = {
            f"{kind}/{name}": tensor.contiguous()
            for name, kinds in state["state"].items()
            for kind, tensor in kinds.items()
        }
        save_file(tensors, temporary / "optimizer.safetensors")
        save_file(random_state, temporary / "random.safetensors")
        write_json(temporary / "state.json", {"step": step, "param_groups": state["param_groups"]})
        os.replace(temporary, folder)
        for old in list_checkpoints(run)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return folder


def load_checkpoint(folder: Path, model: Any, optimizer: Any, accelerator: Accelerator) -> int:
    """Put a checkpoint's state into model, optimizer and generators; collective.

    Returns:
        The number of optimizer steps done.

    Raises:
        CheckpointError: when a file is missing or damaged.
    """
    try:
        scalars = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        weights: dict[str, Any] = {}
        for shard in sorted((folder / "model").glob("*.safetensors")):
            weights.update(load_file(shard))
        tensors = load_file(folder / "optimizer.safetensors")
        random_state = load_file(folder / "random.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: the checkpoint cannot be read ({error}). Delete this folder to go on from "
            "the one before it, or give training a new output folder."
        ) from error
    state: dict[str, Any] = {"state": {}, "param_groups": scalars["param_groups"]}
    for key, tensor in tensors.items():
        kind, name = key.split("/", 1)
        state["state"].setdefault(name, {})[kind] = tensor
    load_full_state(model, optimizer, weights, state)
    # Another number of processes has no states of its own to go on from.
    if len(random_state["cpu"]) == accelerator.num_processes:
        torch.set_rng_state(random_state["cpu"][accelerator.process_index])
        if "cuda" in random_state and accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(random_state["cuda"][accelerator.process_index])
    return scalars["step"]
