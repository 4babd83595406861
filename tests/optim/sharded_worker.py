"""Run by torchrun: steps with everything of the optimizer's side, under DDP and FSDP2.

torchrun --nproc_per_node 2 -m tests.optim.sharded_worker FOLDER
"""

import gc
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_stable import optim
from hf_stable.qk_clip import QKClip

from .steps import batch, loud, optimizer_of

# Rules, and fields: a mesh of copies of shards has a third kind of sum.
RUNS = [("adamw", "global"), ("stable_adamw", "group")]
SHARDINGS = ("ddp", "fsdp2", "hybrid")
FIELDS: dict[str, Any] = {"layer_scale": 0.5, "num_key_value_heads": 2}


def _wrap(model: Any, sharding: str) -> Any:
    if sharding == "alone":
        return model
    if sharding == "ddp":
        return DistributedDataParallel(model)
    shape, names = ((2,), ("shard",)) if sharding == "fsdp2" else ((2, 1), ("copy", "shard"))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def run(name: str, by: Any, sharding: str, rows: slice) -> dict[str, Any]:
    """Three steps on some rows of each batch: weights, and the numbers of each step."""
    model = loud(**FIELDS)
    wrapped = _wrap(model, sharding)
    optimizer = optimizer_of(model, name, eps=1e-3)
    numbers = []
    with QKClip(wrapped, 1.5) as qk_clip:
        for step in range(3):
            inputs = {key: each[rows] for key, each in batch(seed=step).items()}
            wrapped(**inputs).loss.backward()
            norm = optim.clip_gradients(model, optimizer, 0.5, by)
            optimizer.step()
            update = optim.update_norm(optimizer)
            fractions = optim.fractions_below_eps(optimizer)
            largest = qk_clip.clip()
            optimizer.zero_grad()
            numbers.append(torch.stack([norm, update, *fractions.values(), *largest.flatten()]))
    weights = {
        key: (each.full_tensor() if isinstance(each, DTensor) else each).detach()
        for key, each in model.named_parameters()
    }
    return {"weights": weights, "numbers": torch.stack(numbers).detach()}


def main() -> None:
    gc.disable()  # see tests/distributed_worker.py: tearing down sharded models may abort
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = {
        f"{name} {sharding}": run(name, by, sharding, slice(2 * rank, 2 * rank + 2))
        for name, by in RUNS
        for sharding in SHARDINGS
    }
    torch.save(found, Path(sys.argv[1], f"{rank}.pt"))
    dist.barrier()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
