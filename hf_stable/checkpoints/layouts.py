"""Files of a checkpoint, in two layouts.

- Whole (one process, DDP): model/, a plain Transformers folder, and optimizer.safetensors.
- Sharded (FSDP2): shards/, and model/ without weights.

Both have random.safetensors and state.json. Each can be read into any number of processes, sharded
or not.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from .directory import Files, file_names, read_json
from .sharded import METADATA, empty_tensors, read_shards, shapes_in, write_shards
from .state import State, check_names

_SHARDS = "shards"


def write_files(
    folder: Path, step: int, state: State, group: dist.ProcessGroup | None, rank: int
) -> list[str]:
    """Write this process's files of a checkpoint; collective if the state is sharded.

    Args:
        folder: Temporary folder of the checkpoint.
        step: Number of optimizer steps done.
        state: State to write.
        group: Process group of the collectives.
        rank: Rank of this process.

    Returns:
        Paths of the files, relative to `folder`.
    """
    if state.sharded:
        write_shards(folder / _SHARDS, state.tensors, group)
    if rank == 0:
        _write_shared(folder, step, state)
    elif not state.sharded:
        return []
    own, others = f"{_SHARDS}/__{rank}_", re.compile(rf"{_SHARDS}/__\d+_")
    return [
        name
        for name in file_names(folder)
        if name.startswith(own) or (rank == 0 and not others.match(name))
    ]


def _write_shared(folder: Path, step: int, state: State) -> None:
    """Write the files that one process writes for all."""
    if not state.sharded:
        write_weights(folder / "model", _part(state.tensors, "model/"))
        optimizer = _part(state.tensors, "optimizer/")
        save_file(
            {name: each.contiguous() for name, each in optimizer.items()},
            folder / "optimizer.safetensors",
        )
    state.describe(folder / "model")
    save_file(state.random, folder / "random.safetensors")
    content = {"step": step, "param_groups": state.param_groups, "scalars": state.scalars}
    # Infinities and NaN are kept: only Python reads this file, and its JSON reader accepts them.
    (folder / "state.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_weights(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write weights in the format of Transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(weights, folder, max_shard_size="50GB", metadata={"format": "pt"})


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def read_scalars(folder: Path) -> dict[str, Any]:
    """Read `step`, `param_groups` and `scalars` of a verified checkpoint."""
    content = read_json(folder / "state.json")
    if not isinstance(content["step"], int) or not isinstance(content["scalars"], dict):
        raise ValueError("state.json has no step and scalars")
    return dict(content)


def read_random(folder: Path) -> dict[str, torch.Tensor]:
    """Read the states of the generators, one row of bytes per process."""
    return load_file(folder / "random.safetensors")


def read_tensors(folder: Path, files: Files, targets: dict[str, torch.Tensor]) -> None:
    """Fill `targets` from a checkpoint of either layout.

    Args:
        folder: Folder of the checkpoint.
        files: Manifest of the checkpoint.
        targets: Whole tensors, or this process's shards of them, by name.

    Raises:
        CheckpointError: If names or shapes differ from those of the targets.
    """
    if is_sharded(files):
        names = _shard_names(files)
        check_names(folder, shapes_in(folder / _SHARDS, names), targets)
        read_shards(folder / _SHARDS, names, targets)
        return
    places = {
        folder / name: "model/" if name.startswith("model/") else "optimizer/"
        for name in files
        if re.fullmatch(r"model/[^/]*\.safetensors|optimizer\.safetensors", name)
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for place, prefix in places.items():
        with safe_open(place, framework="pt") as file:
            names = {prefix + key: key for key in file.keys()}  # noqa: SIM118 (no mapping)
            shapes |= {name: tuple(file.get_slice(key).get_shape()) for name, key in names.items()}
    check_names(folder, shapes, targets)
    for place, prefix in places.items():
        with safe_open(place, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                _fill(targets[prefix + key], file.get_tensor(key))


@torch.no_grad()
def _fill(target: torch.Tensor, whole: torch.Tensor) -> None:
    if isinstance(target, DTensor):
        whole = whole.to(device=target.device, dtype=target.dtype)
        # Without a source rank, every process takes its shard from its local copy.
        whole = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(whole)


def is_sharded(files: Files) -> bool:
    return f"{_SHARDS}/{METADATA}" in files


def _shard_names(files: Files) -> set[str]:
    return {name.removeprefix(f"{_SHARDS}/") for name in files if name.startswith(f"{_SHARDS}/")}


def read_weights(folder: Path, files: Files) -> dict[str, torch.Tensor]:
    """Read the whole model weights of a sharded checkpoint into CPU memory."""
    weights = empty_tensors(folder / _SHARDS, _shard_names(files), "model/")
    read_shards(folder / _SHARDS, _shard_names(files), weights)
    return _part(weights, "model/")
