"""Update rules: AdamW as torch has it, and StableAdamW."""

# torch hides its foreach functions.
# pyright: reportPrivateImportUsage=false

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .shards import batches, held, sum_over_shards, sum_pieces


def adamw(
    groups: list[dict[str, Any]], *, beta1: float = 0.9, beta2: float = 0.95, eps: float = 1e-8
) -> torch.optim.AdamW:
    """AdamW over `groups`, fused where torch has it: on CPU or CUDA."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    return _AdamWOfShards(groups, betas=(beta1, beta2), eps=eps, fused=fused)


class _AdamWOfShards(torch.optim.AdamW):
    """torch's AdamW, computed on what this process holds of each parameter.

    The update of an element needs no other, and operations on DTensors take the host many times as
    long as those on plain tensors. State and groups are those of `torch.optim.AdamW`.
    """

    def _init_group(self, group: dict[str, Any], *lists: list[torch.Tensor]) -> Any:  # pyright: ignore
        is_complex = super()._init_group(group, *lists)  # pyright: ignore
        for tensors in lists:
            tensors[:] = [held(tensor) for tensor in tensors]
        return is_complex


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
    likewise. The paper uses it instead of gradient clipping.

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
            (group, members)
            for group in self.param_groups
            if (members := [each for each in group["params"] if each.grad is not None])
        ]
        parameters = [parameter for _, members in moving for parameter in members]
        sums = [each for group, members in moving for each in self._advance_moments(group, members)]
        totals = sum_over_shards(sums, parameters)
        means = torch._foreach_div(totals, [float(each.numel()) for each in parameters])
        self.rms = dict(zip(parameters, torch._foreach_sqrt(means), strict=True))
        for group, members in moving:
            self._update(group, members)
        return loss

    def _begin_step(self, parameter: nn.Parameter) -> int:
        """Count a step; returns its number, from 1."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        return int(state["step"])

    def _moments(self, members: list[nn.Parameter]) -> tuple[list[Any], list[Any]]:
        states = [self.state[parameter] for parameter in members]
        return [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]

    def _advance_moments(
        self, group: dict[str, Any], members: list[nn.Parameter]
    ) -> list[torch.Tensor]:
        """Update the moments with the gradients.

        Returns:
            Sum of g^2 / max(v, eps^2) over the local shard of each parameter, 0-d float64.
        """
        beta1, beta2 = group["betas"]
        biases = [1 - beta2 ** self._begin_step(parameter) for parameter in members]
        gradients: list[Any] = [parameter.grad for parameter in members]
        owners: list[int] = []
        parts: list[torch.Tensor] = []
        for owned, (g, m, v) in batches(gradients, *self._moments(members)):
            torch._foreach_lerp_(m, g, 1 - beta1)
            torch._foreach_mul_(v, beta2)
            torch._foreach_addcmul_(v, g, g, value=1 - beta2)
            # eps^2 may be no number of the dtype, and 0 / 0 no ratio.
            tiny = torch.finfo(g[0].dtype).tiny
            least = [max(biases[owner] * group["eps"] ** 2, tiny) for owner in owned]
            ratios = torch._foreach_div(g, torch._foreach_clamp_min(v, least))
            torch._foreach_mul_(ratios, g)
            owners += owned
            parts.append(torch.stack([ratio.sum() for ratio in ratios]).double())
        return list(torch._foreach_mul(sum_pieces(owners, parts, members), biases))

    def _update(self, group: dict[str, Any], members: list[nn.Parameter]) -> None:
        beta1, beta2 = group["betas"]
        steps = [int(self.state[parameter]["step"]) for parameter in members]
        roots = [(1 - beta2**step) ** 0.5 for step in steps]
        # m / (1 - beta1^step) / (sqrt(v) / root + eps), constants taken together.
        scales = [(1 - beta1**step) / root for step, root in zip(steps, roots, strict=True)]
        # max(1, RMS), which divides the rate, stays on the device: the host need not wait for it.
        divisors = torch._foreach_clamp_min([self.rms[each] for each in members], 1.0)
        kept = torch._foreach_reciprocal(divisors)
        torch._foreach_mul_(divisors, scales)
        torch._foreach_mul_(kept, -group["lr"] * group["weight_decay"])
        torch._foreach_add_(kept, 1.0)
        for owned, (w, m, v) in batches(members, *self._moments(members)):
            denominators = torch._foreach_sqrt(v)
            torch._foreach_add_(denominators, [group["eps"] * roots[owner] for owner in owned])
            torch._foreach_mul_(denominators, [divisors[owner] for owner in owned])
            torch._foreach_mul_(w, [kept[owner] for owner in owned])
            torch._foreach_addcdiv_(w, m, denominators, value=-group["lr"])


OPTIMIZERS = {"adamw": adamw, "stable_adamw": stable_adamw}
