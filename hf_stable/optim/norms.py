"""What Adam's state tells of the step that was just taken, without a look of the host at a device.

All of it is read from the moments afterwards: nothing is kept of the weights before the step.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .optimizers import StableAdamW
from .shards import pieces, sum_over_shards

# Where sqrt(v) is eps an update is half of what Adam means it to be: then most of a group's are.
EPS_FRACTION = 0.5


@torch.no_grad()
def update_norm(optimizer: torch.optim.AdamW) -> torch.Tensor:
    """Global L2 norm of what the last step did to the weights, weight decay included.

    Call it after `optimizer.step()` and before gradients are set to None, learning rates are
    changed, or anything else touches weights or moments (QK-clip): then it is the norm of the
    difference of the weights, to rounding. Decay is in it because it is in that difference. Sharded
    parameters cost one collective.

    Returns:
        0-d float64 on the parameters' device, the same on all processes.
    """
    moved = [
        (group, parameter)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    squares = [_squared_update(optimizer, group, parameter) for group, parameter in moved]
    whole = sum_over_shards(squares, [parameter for _, parameter in moved])
    return torch.stack(whole).sum().sqrt()


def _debiased(group: dict[str, Any], state: Mapping[str, Any]) -> tuple[Any, Any]:
    """1 - beta^step of both moments, 0-d float64, on the device where `step` is."""
    step = state["step"].double()
    beta1, beta2 = group["betas"]
    return 1 - beta1**step, 1 - beta2**step


def _squared_update(
    optimizer: torch.optim.AdamW, group: dict[str, Any], parameter: nn.Parameter
) -> torch.Tensor:
    """Sum of squares of this process's part of a parameter's last change, 0-d float64.

    The step is w' = (1 - a d) w - a u with rate a, decay d and Adam's u, so that in the weights w'
    that are left of it, w' - w = -a (u + d w') / (1 - a d).
    """
    state, decay = optimizer.state[parameter], group["weight_decay"]
    rate: Any = group["lr"]
    if isinstance(optimizer, StableAdamW):
        rate = rate / optimizer.rms[parameter].clamp(min=1.0)
    bias1, bias2 = _debiased(group, state)
    root, total = bias2.sqrt(), torch.zeros((), dtype=torch.float64, device=parameter.device)
    # u = scale * m / (sqrt(v) + eps * root), constants taken together.
    scale = root / bias1
    for w, m, v in pieces(parameter, state["exp_avg"], state["exp_avg_sq"]):
        update = torch.div(m, v.sqrt().add_(group["eps"] * root))
        if decay:
            update.add_(w * (decay / scale))
        total += torch.linalg.vector_norm(update).double().square()
    return total * (scale * rate / (1 - rate * decay)) ** 2


@torch.no_grad()
def fractions_below_eps(optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """Share of each group's elements whose sqrt(v), debiased, is below eps; 0-d float64.

    Gradients shrink as models grow, until eps and no longer their size decides how far weights
    move: at 4.8B parameters a smaller eps trained better and a larger one diverged (Wortsman et al.
    2023, "Small-scale proxies", section 3.4). Of embeddings, rows of rare tokens are below it in
    any healthy run. Collective for sharded parameters.

    Returns:
        By the groups' names; groups that took no step yet are absent.
    """
    found: dict[str, torch.Tensor] = {}
    for group in optimizer.param_groups:
        stepped = [parameter for parameter in group["params"] if optimizer.state.get(parameter)]
        if not stepped:
            continue
        counts = sum_over_shards(
            [_count_below_eps(group, optimizer.state[parameter]) for parameter in stepped], stepped
        )
        total = sum(parameter.numel() for parameter in stepped)
        found[group["name"]] = torch.stack(counts).sum() / total
    return found


def _count_below_eps(group: dict[str, Any], state: Mapping[str, Any]) -> torch.Tensor:
    root = _debiased(group, state)[1].sqrt()
    found = [
        (v.sqrt() < group["eps"] * root).sum(dtype=torch.float64)
        for (v,) in pieces(state["exp_avg_sq"])
    ]
    return torch.stack(found).sum()


def eps_warning(fractions: Mapping[str, float], eps: float) -> str | None:
    """What to say of `fractions_below_eps`, or None when it is nothing.

    Args:
        fractions: by group; embeddings are left out, as rare tokens say nothing about eps.
    """
    swallowed = [
        f"{fraction:.0%} of the {name}"
        for name, fraction in fractions.items()
        if name != "embeddings" and fraction > EPS_FRACTION
    ]
    if not swallowed:
        return None
    return (
        f"optimizer.eps {eps:g} is above the gradients' root mean square in "
        f"{' and '.join(swallowed)}: eps decides their updates; lower optimizer.eps"
    )
