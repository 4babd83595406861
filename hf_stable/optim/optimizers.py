"""Update rules: AdamW as torch has it, and StableAdamW."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .shards import pieces, sum_over_shards


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


def stable_adamw(
    groups: list[dict[str, Any]], *, beta1: float = 0.9, beta2: float = 0.95, eps: float = 1e-8
) -> "StableAdamW":
    """StableAdamW over `groups`."""
    return StableAdamW(groups, betas=(beta1, beta2), eps=eps)


class StableAdamW(torch.optim.AdamW):
    """AdamW whose learning rate, in each tensor, is divided by max(1, RMS).

    RMS^2 is the mean over the tensor of g^2 / max(v, eps^2), with the debiased v that has g in it
    already: it leaves 1 behind when gradients outgrow their average (Wortsman et al. 2023, "Stable
    and low-precision training", algorithm 2; AdaFactor's update clipping). Weight decay is divided
    likewise. The paper puts it in the place of gradient clipping.

    State and groups are those of `torch.optim.AdamW`, so that a run may change from one to the
    other. Sharded tensors have the RMS of the whole tensor: one collective a step.

    Attributes:
        rms: of the last step by parameter, 0-d float64; parameters without a gradient are absent.
    """

    def __init__(self, groups: Any, *, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, betas=betas, eps=eps)
        self.rms: dict[nn.Parameter, torch.Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore
        """Take one step.

        Args:
            closure: evaluates the loss again, as every torch optimizer allows; its result is
                returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [
            (group, parameter)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        parameters = [parameter for _, parameter in moving]
        sums = [self._advance_moments(group, parameter) for group, parameter in moving]
        self.rms = {
            parameter: (total / parameter.numel()).sqrt()
            for parameter, total in zip(parameters, sum_over_shards(sums, parameters), strict=True)
        }
        for group, parameter in moving:
            self._update(group, parameter)
        return loss

    def _advance_moments(self, group: dict[str, Any], parameter: nn.Parameter) -> torch.Tensor:
        """Take the gradient into the moments; the sum of g^2 / max(v, eps^2), 0-d float64."""
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        bias = 1 - beta2 ** state["step"].item()
        # eps^2 may be no number of the dtype, and 0 / 0 no ratio.
        least = max(bias * group["eps"] ** 2, torch.finfo(parameter.dtype).tiny)
        total = torch.zeros((), dtype=torch.float64, device=parameter.device)
        gradient: Any = parameter.grad
        for g, m, v in pieces(gradient, state["exp_avg"], state["exp_avg_sq"]):
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            total += (g / v.clamp(min=least)).mul_(g).sum()
        return total * bias

    def _update(self, group: dict[str, Any], parameter: nn.Parameter) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        step = state["step"].item()
        root = (1 - beta2**step) ** 0.5
        rate = group["lr"] / self.rms[parameter].clamp(min=1.0)
        kept = 1 - rate * group["weight_decay"]
        # rate * m / (1 - beta1^step) / (sqrt(v) / root + eps), constants taken together.
        scale = (1 - beta1**step) / root / rate
        for w, m, v in pieces(parameter, state["exp_avg"], state["exp_avg_sq"]):
            denominator = v.sqrt().add_(group["eps"] * root).mul_(scale)
            w.mul_(kept).addcdiv_(m, denominator, value=-1)


OPTIMIZERS = {"adamw": adamw, "stable_adamw": stable_adamw}
