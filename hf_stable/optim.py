"""Parameter groups, AdamW and learning-rate schedules.

Groups are formed by what a parameter is, never by a pattern on its name: Transformers' rule by name
decays LayerScale vectors and sigma-Reparam gains.
"""

import math
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .model import StableGPTConfig

Schedule = Literal["cosine", "linear", "constant", "wsd"]


def _learning_rate_multiplier(model: nn.Module) -> float:
    """Simple muP's factor for matrices; 1.0 for any model that is not a StableGPT with muP."""
    config = model.config  # pyright: ignore[reportAttributeAccessIssue]
    return config.learning_rate_multiplier if isinstance(config, StableGPTConfig) else 1.0


def parameter_groups(
    model: Any,
    *,
    learning_rate: float,
    weight_decay: float,
    weight_decay_mode: Literal["coupled", "independent"] = "coupled",
    decay_embeddings: bool = True,
    decay_vectors: bool = False,
) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into matrices, embeddings and vectors.

    Vectors are all parameters of fewer than two dimensions: norm gains, LayerScale, sigma-Reparam
    gains. Matrices get simple muP's factor base_width / width on the learning rate (Wortsman et al.
    2023, section 3.2.3) where the config asks for it. `torch.optim.AdamW` subtracts lr * wd * w;
    independent decay subtracts the schedule's share of `weight_decay` whatever the peak learning
    rate is (Wortsman et al. 2023, section 3.2.2), so its wd is weight_decay / lr.

    Args:
        model: any Transformers model.
        learning_rate: peak, per step.
        weight_decay: per unit of learning rate (coupled) or per step (independent).

    Returns:
        Groups with keys name, params, lr, initial_lr and weight_decay; empty groups are left out.
    """
    embedding = model.get_input_embeddings().weight
    members: dict[str, list[nn.Parameter]] = {"matrices": [], "embeddings": [], "vectors": []}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter is embedding:
            members["embeddings"].append(parameter)
        else:
            members["vectors" if parameter.ndim < 2 else "matrices"].append(parameter)
    decayed = {"matrices": True, "embeddings": decay_embeddings, "vectors": decay_vectors}
    groups = []
    for name, parameters in members.items():
        if not parameters:
            continue
        multiplier = _learning_rate_multiplier(model) if name == "matrices" else 1.0
        rate = learning_rate * multiplier
        decay = weight_decay / rate if weight_decay_mode == "independent" else weight_decay
        groups.append(
            {
                "name": name,
                "params": parameters,
                "lr": rate,
                "initial_lr": rate,
                "weight_decay": decay if decayed[name] else 0.0,
            }
        )
    return groups


def adamw(
    groups: list[dict[str, Any]], *, beta1: float = 0.9, beta2: float = 0.95, eps: float = 1e-8
) -> torch.optim.AdamW:
    """AdamW over `groups`, fused where torch has it: plain tensors on CPU or CUDA."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    fused = all(
        parameter.device.type in ("cpu", "cuda") and not isinstance(parameter, DTensor)
        for parameter in parameters
    )
    return torch.optim.AdamW(groups, betas=(beta1, beta2), eps=eps, fused=fused)


def learning_rate_factor(
    step: int,
    *,
    name: Schedule,
    total_steps: int,
    warmup: float = 0.0,
    min_ratio: float = 0.1,
    decay_fraction: float = 0.2,
) -> float:
    """Factor on the peak learning rate at `step`, a pure function of its arguments.

    Linear warm-up ends at 1 with the step number `warmup`; the first step already moves. Then
    "constant" stays, "linear" and "cosine" fall to `min_ratio` at the last step, and "wsd" stays
    and falls linearly over the last `decay_fraction` of all steps (Hu et al. 2024, section 4).

    Args:
        step: from 0 to total_steps - 1.
        warmup: steps of warm-up, not necessarily whole.
        min_ratio: floor as a share of the peak.
    """
    if step + 1 < warmup:
        return (step + 1) / warmup
    if name == "constant":
        return 1.0
    start = total_steps * (1 - decay_fraction) if name == "wsd" else warmup
    left = max(1.0, total_steps - 1 - start)
    progress = min(1.0, max(0.0, (step - start) / left))
    if name == "cosine":
        progress = 0.5 * (1 - math.cos(math.pi * progress))
    return 1.0 - (1.0 - min_ratio) * progress


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
