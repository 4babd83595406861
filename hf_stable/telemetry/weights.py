"""Statistics of the parameters in a step: weights, gradients, updates and Adam's moments.

Every process measures the shards or copies that it holds. Copies are weighted by their number, so
sums over all processes are sums over the whole model.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hf_stable.model.sigma_stable_gpt import StableGPTSigmaLinear
from hf_stable.model.slots_stable_gpt import StableGPTNorm

from .gauges import Reduced, world_size
from .names import ADAM_RATIO_EDGES, Numbers
from .observe import squared_norm
from .sites import Sites

# Elements processed together: an intermediate result must fit in a CPU's caches.
_PIECE = 2**18
# Norms of Transformers that store gains as distances from 1; only their forward shows it.
_ZERO_CENTERED = {"GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm", "Qwen3NextRMSNorm"}


@torch.no_grad()
def _held(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return this process's part of a tensor, and the number of processes with the same part."""
    if not isinstance(tensor, DTensor):
        return tensor.detach(), world_size()
    mesh = tensor.device_mesh
    copies = [mesh.size(axis) for axis, kind in enumerate(tensor.placements) if kind.is_replicate()]
    # A mesh may cover only part of the processes; the other parts hold the same tensor.
    return tensor.to_local(), math.prod(copies) * (world_size() // mesh.size())


class Weights:
    """Parameters of a model, each in one group: a block, embed, head or other."""

    def __init__(self, sites: Sites) -> None:
        model = sites.model
        self._parameters = dict(model.named_parameters())
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        self._places = {
            place: self._names[id(module.weight)]
            for layer in sites.layers
            for place, module in layer.linears.items()
        }
        self._places["embed"] = self._names[id(sites.embedding.weight)]
        self._places["head"] = self._names[id(sites.head.weight)]
        self._groups: dict[str, list[str]] = {}
        owners = {
            self._names[id(parameter)]: f"{layer.place}.optimizer"
            for layer in sites.layers
            for parameter in layer.module.parameters()
        }
        owners[self._places["head"]] = "head.optimizer"
        owners[self._places["embed"]] = "embed.optimizer"
        for name in self._parameters:
            self._groups.setdefault(owners.get(name, "other.optimizer"), []).append(name)
        self._before: dict[str, torch.Tensor] = {}

    def look(self) -> dict[str, torch.Tensor]:
        """Return the sums of squares of weights and gradients."""
        found: dict[str, torch.Tensor] = {}
        for what in ("weight", "grad"):
            tensors = {
                name: parameter if what == "weight" else parameter.grad
                for name, parameter in self._parameters.items()
            }
            found.update(self._sums_of_squares(what, tensors))
        return found

    def look_at_used_gradients(self) -> dict[str, torch.Tensor]:
        """Return the sums of squares of the gradients that the optimizer is about to use."""
        gradients = {name: parameter.grad for name, parameter in self._parameters.items()}
        return self._sums_of_squares("stepped", gradients)

    def _sums_of_squares(
        self, what: str, tensors: dict[str, torch.Tensor | None]
    ) -> dict[str, torch.Tensor]:
        held = {name: _held(tensor) for name, tensor in tensors.items() if tensor is not None}
        return {
            f"{what} {name}": squared_norm(local) / copies for name, (local, copies) in held.items()
        }

    def remember(self) -> None:
        """Copy the weights, before the optimizer changes them."""
        self._before = {
            name: _held(parameter)[0].clone()
            for name, parameter in self._parameters.items()
            if parameter.grad is not None
        }

    def look_at_updates(self, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        """Return the sums of squares of changes since `remember`, and counts of Adam's ratios."""
        found: dict[str, torch.Tensor] = {}
        for name, before in self._before.items():
            now, copies = _held(self._parameters[name])
            found[f"update {name}"] = squared_norm(before.sub_(now)) / copies
        self._before = {}
        return {**found, **self._adam_ratios(optimizer)}

    def _adam_ratios(self, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for settings in optimizer.param_groups:
            for parameter in settings["params"]:
                state = optimizer.state.get(parameter, {})
                if id(parameter) in self._names and "exp_avg_sq" in state:
                    counts = _ratio_counts(state, settings["betas"])
                    copies = _held(parameter)[1]
                    found[f"ratio {self._names[id(parameter)]}"] = counts / copies
        return found

    def numbers(self, reduced: Reduced, eps: float | None) -> Numbers:
        """Return the named numbers of the parameters from sums over all processes."""
        found: Numbers = {}
        for place, name in self._places.items():
            weight = math.sqrt(reduced[f"weight {name}"][0])
            found[f"{place}/weight_l2"] = weight
            found[f"{place}/weight_rms"] = weight / math.sqrt(self._parameters[name].numel())
            if f"grad {name}" in reduced:
                found[f"{place}/weight_grad_l2"] = math.sqrt(reduced[f"grad {name}"][0])
            if f"update {name}" in reduced and weight > 0:
                change = math.sqrt(reduced[f"update {name}"][0])
                found[f"{place}/weight_update_ratio"] = change / weight
        everything = [name for names in self._groups.values() for name in names]
        for group, names in {**self._groups, "optimizer": everything}.items():
            found.update(self._group_numbers(group, names, reduced, eps))
        return found

    def _group_numbers(
        self, group: str, names: list[str], reduced: Reduced, eps: float | None
    ) -> Numbers:
        found: Numbers = {}
        stepped = [name for name in names if f"stepped {name}" in reduced]
        if stepped:
            count = sum(self._parameters[name].numel() for name in stepped)
            squares = sum(reduced[f"stepped {name}"][0] for name in stepped)
            rms = found[f"{group}/grad_rms"] = math.sqrt(squares / count)
            if eps is not None:
                found[f"{group}/grad_rms_over_eps"] = rms / eps
        updates = [reduced[f"update {name}"][0] for name in names if f"update {name}" in reduced]
        if updates:
            found[f"{group}/update_l2"] = math.sqrt(sum(updates))
        ratios = [reduced[f"ratio {name}"] for name in names if f"ratio {name}" in reduced]
        if ratios:
            counts = [sum(column) for column in zip(*ratios, strict=True)]
            found[f"{group}/adam_ratio"] = [each / sum(counts) for each in counts]
        return found


def _ratio_counts(state: dict[str, Any], betas: tuple[float, float]) -> torch.Tensor:
    """Return the number of elements with |m / sqrt(v)| in each bin of ADAM_RATIO_EDGES, float64."""
    mean, square = (_held(state[name])[0].flatten() for name in ("exp_avg", "exp_avg_sq"))
    step = torch.as_tensor(state["step"], dtype=torch.float64, device=mean.device)
    # Debias the edges instead of the ratio.
    scale = (1 - betas[0] ** step) / (1 - betas[1] ** step).sqrt()
    edges = (torch.tensor(ADAM_RATIO_EDGES, device=mean.device) * scale).to(mean.dtype)
    above = torch.zeros(len(edges), dtype=torch.float64, device=mean.device)
    # Sums of floats are exact up to 2^24 and, on a CPU, six times faster than sums of booleans.
    is_above = mean.new_empty(_PIECE, dtype=torch.float32)
    for m, v in zip(mean.split(_PIECE), square.split(_PIECE), strict=True):
        # An element without any gradient so far is 0 / 0, which is not above any edge.
        ratio, out = m.abs() / v.sqrt(), is_above[: len(m)]
        above += torch.stack([torch.gt(ratio, edge, out=out).sum() for edge in edges.unbind()])
    total = torch.full_like(above[:1], mean.numel())
    return torch.cat((total, above)) - torch.cat((above, above.new_zeros(1)))


def gain_sums(sites: Sites) -> dict[str, torch.Tensor]:
    """Return sigma-Reparam's gains, 0-d float64, as the share of this process."""
    found: dict[str, torch.Tensor] = {}
    for layer in sites.layers:
        for place, linear in layer.linears.items():
            if isinstance(linear, StableGPTSigmaLinear):
                held, copies = _held(linear.gain)
                found[f"{place}/gain"] = held.double().sum() / copies
    return found


def gain_maxima(sites: Sites) -> dict[str, torch.Tensor]:
    """Return the largest absolute gains of the norms of queries and keys, 0-d float64."""
    found: dict[str, torch.Tensor] = {}
    for layer in sites.layers:
        children: Any = {} if layer.attention is None else dict(layer.attention.named_children())
        for name in ("q", "k"):
            norm = children.get(f"{name}_norm")
            if norm is None or isinstance(norm, nn.Identity):
                continue
            held, _ = _held(norm.weight)
            # A process may hold no part of such a short vector.
            gains = torch.cat((held.double() + gain_origin(norm), held.new_zeros(1).double()))
            found[f"{layer.place}.attention/{name}_gain"] = gains.abs().amax()
    return found


def gain_origin(norm: nn.Module) -> float:
    """Return the offset of a norm's weight: 1 if gains are stored as distances from 1, else 0."""
    if isinstance(norm, StableGPTNorm):
        return norm.origin
    return 1.0 if type(norm).__name__ in _ZERO_CENTERED else 0.0


def adam_eps(optimizer: torch.optim.Optimizer | None) -> float | None:
    """Return Adam's eps, or None for an optimizer without one."""
    return None if optimizer is None else optimizer.param_groups[0].get("eps")
