"""Running sums and maxima of a sampled step, over its microbatches and then over all processes.

Hooks add to the `seen` tensors, and `keep` adds those to the `kept` tensors after a forward pass.
Gradient checkpointing recomputes activations in the backward pass, after `keep`. Those are seen
again and discarded by `forget` before the next forward pass.
"""

import math

import torch
import torch.distributed as dist

Reduced = dict[str, list[float]]


class Gauges:
    """Named float64 tensors on one device, which hooks update in place."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seen: dict[str, dict[str, torch.Tensor]] = {"sum": {}, "max": {}}
        self._kept: dict[str, dict[str, torch.Tensor]] = {"sum": {}, "max": {}}
        self._direct: dict[str, torch.Tensor] = {}

    def sums(self, name: str, *shape: int) -> torch.Tensor:
        """Return a tensor for sums over a forward pass."""
        return self._place("sum", name, torch.zeros(shape, dtype=torch.float64))

    def maxima(self, name: str, *shape: int) -> torch.Tensor:
        """Return a tensor for maxima over a forward pass."""
        return self._place("max", name, torch.full(shape, -math.inf, dtype=torch.float64))

    def gradient_sums(self, name: str, *shape: int) -> torch.Tensor:
        """Return a tensor for sums over a backward pass, in which nothing is recomputed."""
        place = torch.zeros(shape, dtype=torch.float64, device=self._device)
        self._direct[name] = place
        return place

    def _place(self, kind: str, name: str, start: torch.Tensor) -> torch.Tensor:
        self._kept[kind][name] = start.to(self._device)
        self._seen[kind][name] = start.to(self._device, copy=True)
        return self._seen[kind][name]

    def forget(self) -> None:
        """Discard everything seen since the last `keep`; call it before a forward pass."""
        for tensor in self._seen["sum"].values():
            tensor.zero_()
        for tensor in self._seen["max"].values():
            tensor.fill_(-math.inf)

    def keep(self) -> None:
        """Keep everything seen since `forget`; call it after a forward pass."""
        for kept, seen in zip(self._kept["sum"].values(), self._seen["sum"].values(), strict=True):
            kept.add_(seen)
        for kept, seen in zip(self._kept["max"].values(), self._seen["max"].values(), strict=True):
            torch.maximum(kept, seen, out=kept)

    def reduce(self, sums: dict[str, torch.Tensor], maxima: dict[str, torch.Tensor]) -> Reduced:
        """Reduce all kept numbers over all processes and return them by name, flattened.

        Collective. It takes two all-reduces and one device synchronization for any number of
        tensors.

        Args:
            sums: Further sums, float64 on the same device, with the same names on all processes.
            maxima: Further maxima, likewise.
        """
        return {
            **_reduce({**self._kept["sum"], **self._direct, **sums}, self._device, "sum"),
            **_reduce({**self._kept["max"], **maxima}, self._device, "max"),
        }


def _reduce(tensors: dict[str, torch.Tensor], device: torch.device, kind: str) -> Reduced:
    if not tensors:
        return {}
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors.values()]).to(device)
    if dist.is_initialized():
        dist.all_reduce(flat, dist.ReduceOp.SUM if kind == "sum" else dist.ReduceOp.MAX)
    parts = flat.cpu().split([tensor.numel() for tensor in tensors.values()])
    return {name: part.tolist() for name, part in zip(tensors, parts, strict=True)}


def world_size() -> int:
    """Return the number of processes in the group, or 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1
