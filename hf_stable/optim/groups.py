"""Parameter groups, formed by what a parameter is, never by a pattern on its name.

Transformers' rule by name decays LayerScale vectors and sigma-Reparam gains.
"""

from typing import Any, Literal

from torch import nn


def _learning_rate_multiplier(model: nn.Module) -> float:
    """Simple muP's factor for matrices; 1.0 for any model that is not a StableGPT with muP."""
    config = model.config  # pyright: ignore[reportAttributeAccessIssue]
    # Not by its class: that of a model whose code came from the Hub is another one.
    return getattr(config, "learning_rate_multiplier", 1.0)


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
    2023, section 3.2.4) where the config asks for it. `torch.optim.AdamW` subtracts lr * wd * w;
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
