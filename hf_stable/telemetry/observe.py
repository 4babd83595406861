"""Operators that add up statistics of tensors.

Each operator is opaque to `torch.compile`, so a compiled block uses the same kernels with and
without them.

Invariant: nothing here changes a value or a gradient.
"""

from typing import Any

import torch

from hf_stable.model.functional_stable_gpt import statistics_dtype


def squared_norm(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares, 0-d float64; it is summed in at least fp32."""
    return torch.linalg.vector_norm(tensor, dtype=statistics_dtype(tensor)).double().square()


@torch.library.custom_op("hf_stable::observe", mutates_args={"sums"})
def observe(tensor: torch.Tensor, sums: torch.Tensor) -> None:
    """Add to `sums`, (2,) float64: the sum of squares and the number of elements."""
    sums[0] += squared_norm(tensor.detach())
    sums[1] += tensor.numel()


@torch.library.custom_op("hf_stable::observe_spread", mutates_args={"sums"})
def observe_spread(tensor: torch.Tensor, sums: torch.Tensor) -> None:
    """Add to `sums`, (3,) float64: sum of squares, number of elements, and sum."""
    tensor = tensor.detach()
    sums[0] += squared_norm(tensor)
    sums[1] += tensor.numel()
    sums[2] += tensor.sum(dtype=statistics_dtype(tensor))


@torch.library.custom_op("hf_stable::observe_heads", mutates_args={"sums"})
def observe_heads(heads: torch.Tensor, sums: torch.Tensor) -> None:
    """Add to `sums`, (2, H) float64: each head's sum of squares, and the number of tokens.

    Views are created inside the operator: outside, they would change the memory layout that a
    compiler chooses for fused operations.

    Args:
        heads: (B, S, H * D), (B, S, H, D) or (B, H, S, D).
        sums: (2, H) float64, updated in place.
    """
    heads, count = heads.detach(), sums.shape[1]
    if heads.ndim == 3:
        heads = heads.unflatten(-1, (count, -1))
    # The memory layout is (B, S, H, D) even if a view moved the axis of heads.
    if heads.shape[1] != count or (heads.shape[2] == count and heads.stride(1) > heads.stride(2)):
        heads = heads.transpose(1, 2)
    norms = torch.linalg.vector_norm(heads, dim=(0, 2, 3), dtype=statistics_dtype(heads))
    sums[0] += norms.double().square()
    sums[1] += heads.shape[0] * heads.shape[2]


@torch.library.custom_op("hf_stable::observe_parts", mutates_args={"queries", "keys"})
def observe_parts(projected: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> None:
    """Apply `observe_heads` to the queries and keys of one fused projection.

    Args:
        projected: (B, S, (H + 2 G) * D): all query heads, then all key heads, then all value heads.
        queries: (2, H) float64 sums, updated in place.
        keys: (2, G) float64 sums, updated in place.
    """
    heads, key_heads = queries.shape[1], keys.shape[1]
    parts = projected.detach().unflatten(-1, (heads + 2 * key_heads, -1)).transpose(1, 2)
    for part, sums in ((parts[:, :heads], queries), (parts[:, heads : heads + key_heads], keys)):
        norms = torch.linalg.vector_norm(part, dim=(0, 2, 3), dtype=statistics_dtype(part))
        sums[0] += norms.double().square()
        sums[1] += part.shape[0] * part.shape[2]


@torch.library.custom_op("hf_stable::keep_first", mutates_args={"place"})
def keep_first(tensor: torch.Tensor, place: torch.Tensor) -> None:
    """Copy the first tokens of the first sequence of (B, S, C) into `place`, (1, n, C)."""
    place.copy_(tensor.detach()[:1, : place.shape[1]])


for _operator in (observe, observe_spread, observe_heads, keep_first):
    _operator.register_fake(lambda tensor, place: None)
observe_parts.register_fake(lambda projected, queries, keys: None)


class ObserveGradient(torch.autograd.Function):
    """Identity whose backward pass measures the gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
        ctx.sums = sums
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        observe(grad, ctx.sums)
        return grad, None
