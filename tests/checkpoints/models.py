"""A model, an optimizer and steps of both, small enough for a hundred checkpoints a minute."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from hf_stable import StableGPTConfig
from hf_stable.checkpoints.state import tensors_of

from ..techniques import GEOMETRY, from_config
from ..tiny import byte_tokenizer


def make_model(seed: int = 0, **fields: Any) -> Any:
    """Tied, with dropout, and with buffers that training changes."""
    torch.manual_seed(seed)
    fields = {**GEOMETRY, "vocab_size": len(byte_tokenizer()), "attention_dropout": 0.1, **fields}
    config = StableGPTConfig.from_preset("sigma_reparam", tie_word_embeddings=True, **fields)
    return from_config(config).float().train()


def make_optimizer(model: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))


def train(model: Any, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """Steps whose data is a function of their number."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 200, (2, 16), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def whole_state(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Copies of all tensors, unsharded; collective."""
    tensors, _ = tensors_of(model, optimizer)
    return {
        name: (each.full_tensor() if isinstance(each, DTensor) else each).detach().clone()
        for name, each in tensors.items()
    }


def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not bit-equal."""
    return sorted(
        name
        for name in one.keys() | other.keys()
        if name not in one or name not in other or not torch.equal(one[name], other[name])
    )
