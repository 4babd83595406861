"""Gradient clipping, of all gradients together or of each parameter group by itself."""

from typing import Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

ClipBy = Literal["global", "group"]


def clip_gradients(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    max_norm: float | None,
    by: ClipBy = "global",
) -> torch.Tensor:
    """Scale gradients so that the L2 norm of all, or of each group's, is at most `max_norm`.

    Clipping by group keeps a spike in one group, such as the embedding, from shrinking the steps of
    the others. Collective for sharded gradients.

    Args:
        optimizer: its parameter groups are the groups of `by`="group".
        max_norm: None scales nothing.

    Returns:
        The norm before clipping, over all parameters and processes, 0-d.
    """
    groups = [group["params"] for group in optimizer.param_groups]
    norms = [
        _clip([parameter for parameter in members if parameter.grad is not None], max_norm)
        for members in (groups if by == "group" else [list(model.parameters())])
    ]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def _clip(parameters: list[nn.Parameter], max_norm: float | None) -> torch.Tensor:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
