"""Run by torchrun: one step of the head with its kernel under DDP and under FSDP2, as JSON.

torchrun --standalone --nproc_per_node N head_worker.py
"""

import json
import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_stable.kernels.linear_cross_entropy import linear_cross_entropy
from hf_stable.model.configuration_stable_gpt import StableGPTConfig
from hf_stable.model.loss_stable_gpt import LINEAR_CROSS_ENTROPY_FUNCTIONS
from hf_stable.model.slots_stable_gpt import StableGPTHead

CAP, Z_LOSS = 5.0, 1e-2


def head_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states (T, C), weight (V, C), labels (T,) of all processes; V is odd."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(12, 16, generator=generator)
    weight = torch.randn(37, 16, generator=generator)
    labels = torch.randint(0, 37, (12,), generator=generator)
    labels[::5] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def step(sharding: str) -> dict[str, object]:
    """Loss over all processes and gradients of all hidden states and of the whole head."""
    hidden, weight, labels = head_inputs()
    rank, size = dist.get_rank(), dist.get_world_size()
    part = slice(rank * 12 // size, (rank + 1) * 12 // size)
    mine = hidden[part].detach().requires_grad_()
    config = StableGPTConfig(
        vocab_size=37,
        hidden_size=16,
        num_attention_heads=2,
        final_logit_softcapping=CAP,
        z_loss=Z_LOSS,
    )
    head = StableGPTHead(config)
    head.weight = torch.nn.Parameter(weight.detach().clone())
    module = DistributedDataParallel(head) if sharding == "ddp" else fully_shard(head)
    # Gradients are averaged over processes, losses are summed over tokens.
    loss, *_ = module(mine[None], labels[part][None], (labels >= 0).sum() / size)
    loss.backward()
    assert isinstance(mine.grad, torch.Tensor)
    parts = [torch.empty_like(mine.grad) for _ in range(size)]
    dist.all_gather(parts, mine.grad / size)
    total = loss.detach() / size
    dist.all_reduce(total)
    grad = head.weight.grad
    grad = grad.full_tensor() if sharding == "fsdp2" else grad
    return {"loss": total.item(), "hidden": torch.cat(parts).tolist(), "weight": grad.tolist()}


def main() -> None:
    dist.init_process_group("gloo")
    LINEAR_CROSS_ENTROPY_FUNCTIONS["cpu"] = linear_cross_entropy
    found = {sharding: step(sharding) for sharding in ("ddp", "fsdp2")}
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    # About one process in ten ended with SIGABRT: gloo's threads, torn down with the interpreter,
    # seem to be the cause.
    os._exit(0)


if __name__ == "__main__":
    main()
