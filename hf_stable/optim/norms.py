"""Norms of the last step from Adam's state, computed without a host-device synchronization.

All of it is read from the moments afterwards: nothing is kept of the weights before the step.
"""

# torch hides its foreach functions.
# pyright: reportPrivateImportUsage=false

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .optimizers import StableAdamW
from .shards import batches, held, sum_over_shards, sum_pieces

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
    parameters: list[nn.Parameter] = []
    squares: list[torch.Tensor] = []
    for group in optimizer.param_groups:
        members = [parameter for parameter in group["params"] if parameter.grad is not None]
        if members:
            parameters += members
            squares += _squared_updates(optimizer, group, members)
    return torch.stack(sum_over_shards(squares, parameters)).sum().sqrt()


def _debiased(
    group: dict[str, Any], states: Sequence[Mapping[str, Any]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """1 - beta^step of both moments by state, float64, on the device where moments are."""
    steps = torch.stack([state["step"] for state in states]).double()
    # Of AdamW one by one and of StableAdamW steps are on the host: for them nobody waits there.
    steps = steps.to(held(states[0]["exp_avg"]).device, non_blocking=True)
    beta1, beta2 = group["betas"]
    return 1 - beta1**steps, 1 - beta2**steps


def _squared_updates(
    optimizer: torch.optim.AdamW, group: dict[str, Any], members: list[nn.Parameter]
) -> Sequence[torch.Tensor]:
    """Sums of squares of this process's part of parameters' last change, 0-d float64.

    The step is w' = (1 - a d) w - a u with rate a, decay d and Adam's u, so that in the weights w'
    that are left of it, w' - w = -a (u + d w') / (1 - a d).
    """
    states, decay = [optimizer.state[parameter] for parameter in members], group["weight_decay"]
    rate: Any = group["lr"]
    if isinstance(optimizer, StableAdamW):
        rate = rate / torch.stack([optimizer.rms[each] for each in members]).clamp(min=1.0)
    bias1, bias2 = _debiased(group, states)
    root = bias2.sqrt()
    # u = scale * m / (sqrt(v) + eps * root), constants taken together.
    scale = root / bias1
    small, decays = (group["eps"] * root).unbind(), (decay / scale).unbind()
    moments = ([state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states])
    owners: list[int] = []
    parts: list[torch.Tensor] = []
    for owned, (w, m, v) in batches(members, *moments):
        roots = torch._foreach_sqrt(v)
        torch._foreach_add_(roots, [small[owner] for owner in owned])
        updates = torch._foreach_div(m, roots)
        if decay:
            torch._foreach_addcmul_(updates, w, [decays[owner] for owner in owned])
        owners += owned
        parts.append(torch.stack(torch._foreach_norm(updates)).double().square())
    sums = torch.stack(sum_pieces(owners, parts, members))
    return (sums * (scale * rate / (1 - rate * decay)) ** 2).unbind()


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
        counts = sum_over_shards(_counts_below_eps(optimizer, group, stepped), stepped)
        total = sum(parameter.numel() for parameter in stepped)
        found[group["name"]] = torch.stack(counts).sum() / total
    return found


def _counts_below_eps(
    optimizer: torch.optim.AdamW, group: dict[str, Any], members: list[nn.Parameter]
) -> list[torch.Tensor]:
    states = [optimizer.state[parameter] for parameter in members]
    limits = (group["eps"] * _debiased(group, states)[1].sqrt()).unbind()
    owners: list[int] = []
    parts: list[torch.Tensor] = []
    for owned, (v,) in batches([state["exp_avg_sq"] for state in states]):
        counts = [
            (root < limits[owner]).sum(dtype=torch.float64)
            for owner, root in zip(owned, torch._foreach_sqrt(v), strict=True)
        ]
        owners += owned
        parts.append(torch.stack(counts))
    return sum_pieces(owners, parts, members)


def eps_warning(fractions: Mapping[str, float], eps: float) -> str | None:
    """Return a warning about `fractions_below_eps`, or None.

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
