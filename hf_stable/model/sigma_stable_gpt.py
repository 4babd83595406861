"""sigma-Reparam of a StableGPT: its linear layer, the power iterations, and how they begin.

Invariant: singular vectors follow optimizer steps, whoever owns the loop.
"""

# Lists of buffers are lists of tensors, and torch hides its foreach functions.
# pyright: reportArgumentType=false, reportPrivateImportUsage=false

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary
from transformers import initialization as init

from .configuration_stable_gpt import StableGPTConfig
from .functional_stable_gpt import (
    power_iteration,
    spectral_norm,
    statistics_dtype,
    top_singular_vectors,
    whole,
)
from .slots_stable_gpt import StableGPTLinear

# Bytes of weights that one batched power step copies side by side. On a GPU as many as 24 blocks of
# width 1,024 need for a few launches instead of hundreds; nothing else is alive when a forward pass
# begins. A CPU has no launches to save, and would only pay for the copy.
STACK_BYTES = {"cpu": 0, "cuda": 2**29}

# Optimizer steps taken on each weight that sigma-Reparam follows. In-place updates of a plain
# tensor also count in its `_version`, but fused optimizers and sharded tensors do not move that.
_optimizer_steps = WeakIdKeyDictionary()


def _count_optimizer_steps(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in _optimizer_steps:
                _optimizer_steps[parameter] += 1


register_optimizer_step_post_hook(_count_optimizer_steps)


class StableGPTSigmaLinear(StableGPTLinear):
    """sigma-Reparam: y = gain / sigma(W) * W x, plus an optional bias.

    Zhai et al. 2023, section 3.2. sigma(W) = u^T W v has a gradient in W. `u` and `v` are buffers
    that advance by one power step in training whenever the weight has changed, and not otherwise.
    """

    def __init__(
        self, in_features: int, out_features: int, init_scale: float = 1.0, bias: bool = False
    ) -> None:
        super().__init__(in_features, out_features, init_scale, bias)
        self.gain = nn.Parameter(torch.empty(1))
        self.u = nn.Buffer(torch.empty(out_features))
        self.v = nn.Buffer(torch.empty(in_features))
        self.seen_age: tuple[int, int] | None = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden_states, self.effective_weight(), self.bias)

    def effective_weight(self) -> torch.Tensor:
        """gain / sigma(W) * W, (out, in), in the weight's dtype; sigma in at least fp32."""
        wide = statistics_dtype(self.weight)
        with torch.autocast(self.weight.device.type, enabled=False):
            sigma = spectral_norm(self.weight.to(wide), self.u.to(wide), self.v.to(wide))
            return self.weight * (self.gain.to(wide) / sigma).to(self.weight.dtype)

    def notice_change(self) -> bool:
        """Return True if the weight changed since the last call.

        That is once an optimizer step, whoever owns the loop, by a torch optimizer or by hand;
        neither accumulation nor checkpointing repeats it. Only writes through `weight.data` cannot
        be seen: whoever updates so must call the model's `power_iterate(1)`.
        """
        _optimizer_steps.setdefault(self.weight, 0)
        age = (self.weight._version, _optimizer_steps[self.weight])
        changed, self.seen_age = age != self.seen_age, age
        return changed

    def forget_change(self) -> None:
        """Take the next forward pass in training for one after a change."""
        self.seen_age = None

    @torch.no_grad()
    def fold(self) -> nn.Linear:
        """The same map as a plain linear layer."""
        weight = self.effective_weight()
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        linear.bias = self.bias
        return linear.train(self.training)


def _side_by_side(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Tensors of one shape as one with a leading axis; a single one is not copied."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)


def _power_step(
    weight: torch.Tensor, u: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    # Whole vectors in and out of every step: a v of partial sums would make the next one gather W.
    if isinstance(weight, DTensor):
        u, v = (DTensor.from_local(each, weight.device_mesh, run_check=False) for each in (u, v))
    u, v = power_iteration(weight, u, v)
    return whole(u), whole(v)


@torch.no_grad()
def _power_iterate_alike(linears: list[StableGPTSigmaLinear], steps: int) -> None:
    """Power iterations of layers of one shape, dtype and device, side by side."""
    weight = _side_by_side([linear.weight for linear in linears])
    weight = weight.to(statistics_dtype(weight))
    u, v = (
        _side_by_side(vectors).to(weight.dtype)
        for vectors in ([linear.u for linear in linears], [linear.v for linear in linears])
    )
    with torch.autocast(weight.device.type, enabled=False):
        for _ in range(steps):
            u, v = _power_step(weight, u, v)
    torch._foreach_copy_([linear.u for linear in linears], list(u.unbind()))
    torch._foreach_copy_([linear.v for linear in linears], list(v.unbind()))


def power_iterate(linears: list[StableGPTSigmaLinear], steps: int) -> None:
    """Advance `u` and `v` of any layers by `steps` power iterations.

    Layers of one shape go together, within STACK_BYTES. Collective for sharded weights, which
    stay where they are: only vectors travel.
    """
    kinds: dict[Any, list[StableGPTSigmaLinear]] = {}
    for linear in linears:
        kind = (linear.weight.shape, linear.weight.dtype, linear.weight.device)
        kinds.setdefault(kind, []).append(linear)
    for (shape, dtype, device), alike in kinds.items():
        nbytes = shape.numel() * torch.promote_types(dtype, torch.float32).itemsize
        count = max(1, STACK_BYTES.get(device.type, STACK_BYTES["cuda"]) // nbytes)
        for start in range(0, len(alike), count):
            _power_iterate_alike(alike[start : start + count], steps)


@torch.compiler.disable(
    reason="sigma_reparam=True follows the optimizer's steps, which no graph sees: compile the "
    "blocks (`layer.compile(fullgraph=True)`), or the model without fullgraph."
)
def follow_weights(linears: list[StableGPTSigmaLinear]) -> None:
    """One power step for every layer whose weight has changed."""
    power_iterate([linear for linear in linears if linear.notice_change()], 1)


@torch.no_grad()
def init_sigma(config: StableGPTConfig, linear: StableGPTSigmaLinear) -> None:
    if linear.weight.is_meta:
        return
    u, v = top_singular_vectors(linear.weight)
    sigma = spectral_norm(linear.weight, u, v).item()
    init.copy_(linear.u, u)
    init.copy_(linear.v, v)
    init.constant_(linear.gain, sigma if config.sigma_gain_init == "spectral" else 1.0)
