"""Run by torchrun: watched steps under DDP and FSDP2, whose numbers each process writes down.

torchrun --nproc_per_node 2 -m tests.telemetry.sharded_worker FOLDER
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_stable.parallel import gradient_sync
from hf_stable.telemetry import watch

from .reference import Adam, Batch
from .steps import draw, tiny

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "baseline": ("z_loss", {"z_loss": 0.01, "tie_word_embeddings": True}),
    "techniques": ("sigma_reparam", {"qk_norm": "head", "attn_logit_softcapping": 2.0}),
    "checkpointed": ("soft_clip", {"attention_clip_gamma": -0.15, "layer_scale": 0.1}),
}
SHARDINGS = ("ddp", "fsdp2")


def steps() -> list[list[Batch]]:
    """Two steps of two microbatches of four sequences; targets are not spread evenly."""
    return draw(batch_size=4)


def part(batch: Batch, rank: int) -> Batch:
    """What one of two processes gets; its loss is over the mean number of targets."""
    rows = slice(2 * rank, 2 * rank + 2)
    return {
        "input_ids": batch["input_ids"][rows],
        "labels": batch["labels"][rows],
        "num_items_in_batch": batch["num_items_in_batch"] / 2,
    }


def _sharded(model: Any, sharding: str) -> Any:
    if sharding == "ddp":
        return DistributedDataParallel(model)
    options = {"mesh": init_device_mesh("cpu", (2,))}
    for layer in model.model.layers:
        fully_shard(layer, **options)
    if not model.config.tie_word_embeddings:
        fully_shard(model.lm_head, **options)
    return fully_shard(model, **options)


def watched_steps(name: str, sharding: str, rank: int) -> list[dict[str, Any]]:
    """Numbers of each step, as this process has them."""
    preset, fields = MODELS[name]
    model = tiny(preset, **fields)
    if name == "checkpointed":
        model.gradient_checkpointing_enable()
    wrapped = _sharded(model, sharding)
    optimizer = Adam().build(model)
    if name == "techniques":  # after which FSDP2 leaves the root's weights gathered
        with torch.no_grad():
            wrapped.eval()(steps()[0][0]["input_ids"])
            wrapped.train()
    found = []
    with watch(wrapped, optimizer, every=1, bounds_every=3) as watcher:
        for batches in steps():
            for index, batch in enumerate(batches):
                with gradient_sync(wrapped, index == len(batches) - 1):
                    wrapped(use_cache=False, **part(batch, rank)).loss.backward()
            watcher.gradients()
            optimizer.step()
            optimizer.zero_grad()
            found.append(watcher.end_step())
    return found


def main() -> None:
    gc.disable()  # see tests/distributed_worker.py: tearing down sharded models may abort
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = {
        f"{name} {sharding}": watched_steps(name, sharding, rank)
        for name in MODELS
        for sharding in SHARDINGS
    }
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
