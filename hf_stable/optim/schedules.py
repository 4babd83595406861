"""Schedules of the learning rate and of the norm that gradients are clipped to."""

import math
from typing import Literal

import torch

Schedule = Literal["cosine", "linear", "constant", "wsd"]


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


def max_grad_norm_at(
    step: int, max_norm: float | None, late_max_norm: float | None, late_step: int | None
) -> float | None:
    """The norm to clip gradients to at `step`, a pure function of its arguments.

    Zhang et al. 2022 (OPT), section 2.5: a lower norm, 0.3 after 1.0, helped against divergence.
    What they did by hand is planned here.

    Args:
        step: from 0.
        max_norm: None does not clip.
        late_max_norm: the norm from `late_step` on.
        late_step: None keeps `max_norm`.
    """
    return max_norm if late_step is None or step < late_step else late_max_norm
