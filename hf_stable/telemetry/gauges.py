"""Running sums and maxima of a sampled step, over its microbatches and then over all processes.

Hooks add to what is `seen`; only `keep` makes it count. What gradient checkpointing computes again
in the backward pass is seen after that, and forgotten before the next forward pass.
"""

import math

import torch
import torch.distributed as dist

Reduced = dict[str, list[float]]


class Gauges:
    """Named float64 tensors on one device, which hooks add to in place."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seen: dict[str, dict[str, torch.Tensor]] = {"sum": {}, "max": {}}
        self._kept: dict[str, dict[str, torch.Tensor]] = {"sum": {}, "max": {}}
        self._direct: dict[str, torch.Tensor] = {}

    def sums(self, name: str, *shape: int) -> torch.Tensor:
        """What a forward pass adds up."""
        return self._place("sum", name, torch.zeros(shape, dtype=torch.float64))

    def maxima(self, name: str, *shape: int) -> torch.Tensor:
        """What a forward pass takes the largest of."""
        return self._place("max", name, torch.full(shape, -math.inf, dtype=torch.float64))

    def gradient_sums(self, name: str, *shape: int) -> torch.Tensor:
        """What a backward pass adds up, where nothing is computed twice."""
        place = torch.zeros(shape, dtype=torch.float64, device=self._device)
        self._direct[name] = place
        return place

    def _place(self, kind: str, name: str, start: torch.Tensor) -> torch.Tensor:
        self._kept[kind][name] = start.to(self._device)
        self._seen[kind][name] = start.to(self._device, copy=True)
        return self._seen[kind][name]

    def forget(self) -> None:
        """Before a forward pass: what was seen since the last `keep` does not count."""
        for tensor in self._seen["sum"].values():
            tensor.zero_()
        for tensor in self._seen["max"].values():
            tensor.fill_(-math.inf)

    def keep(self) -> None:
        """After a forward pass."""
        for kept, seen in zip(self._kept["sum"].values(), self._seen["sum"].values(), strict=True):
            kept.add_(seen)
        for kept, seen in zip(self._kept["max"].values(), self._seen["max"].values(), strict=True):
            torch.maximum(kept, seen, out=kept)

    def reduce(self, sums: dict[str, torch.Tensor], maxima: dict[str, torch.Tensor]) -> Reduced:
        """All kept numbers over all processes, flattened, by name.

        Collective: two reductions and one wait for the device, however many numbers there are.

        Args:
            sums: further ones, float64 on the same device, the same names on all processes.
            maxima: likewise.
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
    """Processes that share the work."""
    return dist.get_world_size() if dist.is_initialized() else 1
