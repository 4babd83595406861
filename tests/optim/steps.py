"""Models, gradients and steps that laws of optimizers are checked on."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hf_stable import optim

from ..techniques import build, tokens

RATE = 0.01


def gradients(model: nn.Module, steps: int, growth: float = 1.0) -> Iterator[int]:
    """Give the model random gradients, each step's `growth` times as large; yields the step."""
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = (drawn * growth**step).to(parameter.dtype)
        yield step


def optimizer_of(model: Any, name: str = "adamw", **options: Any) -> Any:
    groups = optim.parameter_groups(
        model, learning_rate=RATE, weight_decay=0.1, decay_embeddings=False
    )
    return optim.OPTIMIZERS[name](groups, **options)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def loud(**fields: Any) -> Any:
    """A float64 model in training, some of whose heads have logits above 1, and some below."""
    model = build(initializer_range=0.3, **fields).train()
    config = model.config
    with torch.no_grad():
        for layer in model.model.layers:
            rows = layer.self_attn.qkv_proj.weight.unflatten(0, (-1, config.head_dim))
            rows[0].mul_(0.05)
            if layer.self_attn.qkv_proj.bias is not None:
                layer.self_attn.qkv_proj.bias[2 * config.head_dim :].normal_(std=0.2)
    return model


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    ids = tokens(4, 13, seed)
    return {"input_ids": ids, "labels": ids}
