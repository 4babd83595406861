"""Attention in float64, with its statistics, and how kernels are compared with it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_stable.model.functional_stable_gpt import attention_forward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter computes bf16 wrongly, except in test_bf16.py; on a GPU it is what counts.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
TERMS = ("output", "grad query", "grad key", "grad value")


@dataclass
class Inputs:
    """Leaves (B, H, S, D), (B, G, S, D) twice, and the gradient of the output (B, S, H, D)."""

    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    grad: torch.Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in self.tensors]
        return Inputs((leaves[0], leaves[1], leaves[2]), self.grad.to(dtype))

    def gradients(self, output: torch.Tensor) -> list[torch.Tensor]:
        """The output and the gradients of the leaves."""
        output.backward(self.grad)
        return [output.detach(), *(tensor.grad for tensor in self.tensors)]


def draw(  # (batch, query heads, key heads, tokens, head width)
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, spread: float = 2.0, seed: int = 0
) -> Inputs:
    batch, heads, key_heads, length, width = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(DEVICE, dtype)

    leaves = [(normal(batch, count, length, width) * spread) for count in (heads, key_heads)]
    value = normal(batch, key_heads, length, width)
    return Inputs((leaves[0], leaves[1], value), normal(batch, length, heads, width)).to(dtype)


def plain(inputs: Inputs, mask: torch.Tensor | None, **score: Any) -> torch.Tensor:
    """The eager function in the dtype of the inputs."""
    return attention_forward(nn.Module(), *inputs.tensors, mask, **score)[0]


def error(found: torch.Tensor, exact: torch.Tensor, floor: float = 1.0) -> float:
    """Distance in the L2 norm, relative to the exact tensor's norm, or to `floor` if larger."""
    return ((found.double() - exact).norm() / exact.norm().clamp(min=floor)).item()


def recomputation(inputs: Inputs, scaling: float, softcap: float | None = None) -> float:
    """Return the relative error of a probability that the backward recomputes in fp32.

    It subtracts the log-sum-exp of the forward from scores that it sums in another order, so that
    they may differ by a unit of fp32 of the largest. The eager formula keeps its probabilities.
    """
    query, key = (tensor.detach().double() for tensor in inputs.tensors[:2])
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    largest = (query @ key.transpose(-1, -2)).abs().max().item() * scaling
    return torch.finfo(torch.float32).eps * min(largest, softcap or largest)


def assert_as_good_as_plain(
    found: list[torch.Tensor],
    inputs: Inputs,
    mask: torch.Tensor | None,
    recomputed: float = 0.0,
    times: float = 2.0,
    **score: Any,
) -> None:
    """The kernel's error is at most `times` that of the eager formula in the same dtype.

    Both against float64 of the same inputs, output and gradients, in the L2 norm: clip thresholds
    make gradients discontinuous, so single elements cannot be compared. Where a softmax is one-hot
    its gradient cancels, and the terms that do set the scale. Eight units of fp32 rounding, which
    the sums have, are granted where the eager formula happens to be exact, and gradients get
    `recomputed`, the relative error of probabilities that the backward computes again.
    """
    double = inputs.to(torch.float64)
    exact = double.gradients(plain(double, mask, **score))
    same = inputs.to(inputs.grad.dtype)
    eager = same.gradients(plain(same, mask, **score))
    largest = max(tensor.abs().max().item() for tensor in double.tensors)
    scale = max(1.0, largest * score["scaling"])
    floor = double.grad.norm().item() * scale
    for name, ours, theirs, truth in zip(TERMS, found, eager, exact, strict=True):
        bound = times * error(theirs, truth, floor) + 8 * torch.finfo(torch.float32).eps
        bound += 0.0 if name == "output" else recomputed / scale
        distance = error(ours, truth, floor)
        assert distance <= bound, f"{name}: {distance:.1e} > {bound:.1e}"


def dense(documents: torch.Tensor) -> torch.Tensor:
    """(B, 1, S, S) bool, the mask that a documents tensor stands for, from its first two rows."""
    key, query = documents[:, 0, 0], documents[:, 0, 1]
    place = torch.arange(key.shape[-1], device=key.device)
    causal = place[None, :] <= place[:, None]
    return (causal & (query[:, :, None] == key[:, None, :]))[:, None]


class LargestTensor(TorchDispatchMode):
    """Inside, `numel` is the most elements that any operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = result if isinstance(result, (tuple, list)) else [result]
        sizes = [tensor.numel() for tensor in tensors if isinstance(tensor, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return result
