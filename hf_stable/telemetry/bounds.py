"""Bounds on the gradient's growth through a block (Takase et al. 2023, "Spike No More").

The norm of a branch's Jacobian is at most that of its maps over the standard deviation of the
stream that its norm divides by. Written for Pre-LN with the identity as activation, as in the
paper; gains of the norm and LayerScale vectors, which the paper has at 1, enter by their largest
entries. A branch that is not Pre-LN has no such bound and gets no number, nor has an MLP that is
gated, which is no chain of two maps, or parallel, which does not read x'.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_stable.model.blocks_stable_gpt import StableGPTDecoderLayer, StableGPTGatedMLP
from hf_stable.model.functional_stable_gpt import attention_forward, spectral_norm, statistics_dtype
from hf_stable.model.sigma_stable_gpt import StableGPTSigmaLinear

from .gauges import Reduced, world_size
from .names import Numbers
from .numbers import stream_std
from .sites import Layer, Sites
from .weights import gain_origin

# Tokens of the one sequence whose attention is linearized.
PREFIX = 256
_STEPS = 24

_Map = Callable[[torch.Tensor], torch.Tensor]


def operator_norm(apply: Any, transpose: Any, start: torch.Tensor) -> torch.Tensor:
    """Largest singular value of a linear map A, 0-d; NaN where the map is not finite.

    Power iteration with A^T A that keeps its iterates (Lanczos 1950, fully reorthogonalised): the
    last iterate of plain power iteration would be a percent short after as many products, since a
    random matrix has hardly a gap below its largest singular value.

    Args:
        apply, transpose: v to A v, and u to A^T u. start: a random v, any shape.
    """
    basis = [start.flatten() / start.norm()]
    diagonal: list[torch.Tensor] = []
    beside: list[torch.Tensor] = []
    for _ in range(_STEPS):
        image = transpose(apply(basis[-1].view_as(start))).flatten()
        diagonal.append(image @ basis[-1])
        known = torch.stack(basis)
        for _ in range(2):  # once leaves rounding behind
            image = image - known.T @ (known @ image)
        rest = image.norm()
        # Of a map of low rank nothing is left but rounding, which must not become a direction.
        noise = 1e3 * torch.finfo(image.dtype).eps * torch.stack(diagonal).abs().amax()
        beside.append(torch.where(rest <= noise, 0.0, rest))
        basis.append(torch.where(rest <= noise, 0.0, image / rest))
    small, side = torch.stack(diagonal).diag(), torch.stack(beside[:-1])
    small = small + side.diag(1) + side.diag(-1)
    finite = small.isfinite().all()
    # Solvers of eigenvalue problems raise for what is not finite; a diverging run must go on.
    largest = torch.linalg.eigvalsh(torch.where(finite, small, 0.0))[-1].clamp(min=0).sqrt()
    return torch.where(finite, largest, torch.nan)


def _random_like(tensor: torch.Tensor) -> torch.Tensor:
    """Standard normal numbers that are the same in every sample and process."""
    generator = torch.Generator(device=tensor.device).manual_seed(0)
    return torch.randn(tensor.shape, generator=generator, device=tensor.device, dtype=tensor.dtype)


def _full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor in at least fp32; collective for a sharded one."""
    tensor = tensor.detach()
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.to(statistics_dtype(whole))


def _full_parameters(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: _full(parameter) for name, parameter in module.named_parameters()}


def _largest(module: nn.Module) -> torch.Tensor | float:
    """Largest absolute gain of a norm or LayerScale; 1 for an empty slot."""
    if isinstance(module, nn.Identity):
        return 1.0
    return (_full(module.weight) + gain_origin(module)).abs().amax()  # pyright: ignore


@contextlib.contextmanager
def _eager(name: str) -> Iterator[None]:
    """The one attention function that can be differentiated forward, for a moment."""
    own = ALL_ATTENTION_FUNCTIONS._local_mapping.get(name)
    ALL_ATTENTION_FUNCTIONS[name] = attention_forward
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
        if own is not None:
            ALL_ATTENTION_FUNCTIONS[name] = own


def attention_jacobian_norm(layer: Any, rotary: Any, stream: torch.Tensor) -> torch.Tensor:
    """Spectral norm of J^Z: from the normed stream to all heads' outputs, before Proj.

    Causal attention of one document; by power iteration with products of J and its transpose.

    Args:
        layer: a `StableGPTDecoderLayer`. rotary: the model's rotary embedding.
        stream: (1, n, C), what enters the block.
    """
    attention = layer.self_attn
    parameters = _full_parameters(attention)
    normed = functional_call(
        layer.input_layernorm, _full_parameters(layer.input_layernorm), (stream,)
    ).detach()
    places = torch.arange(stream.shape[1], device=stream.device)[None]
    angles = rotary(normed, places)

    def heads(hidden: torch.Tensor) -> torch.Tensor:
        seen = []
        handle = attention.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            functional_call(attention, parameters, (hidden,), {"position_embeddings": angles})
        finally:
            handle.remove()
        return seen[0]

    modes = {module: module.training for module in attention.modules()}
    attention.eval()
    try:
        with _eager(attention.config._attn_implementation), torch.enable_grad():
            return operator_norm(*_linearized(heads, normed), _random_like(normed))
    finally:
        for module, training in modes.items():
            module.training = training


def _linearized(
    function: Callable[[torch.Tensor], torch.Tensor], place: torch.Tensor
) -> tuple[_Map, _Map]:
    """Products with the Jacobian J of a function at `place`, v to J v, and with its transpose.

    J^T u is linear in u, so that its own backward is J. Both products replay one recorded graph;
    forward differentiation would run the function for every vector.
    """
    place = place.detach().requires_grad_()
    value = function(place)
    cotangent = torch.zeros_like(value, requires_grad=True)
    (pulled,) = torch.autograd.grad(value, place, cotangent, create_graph=True)

    def apply(vector: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(pulled, cotangent, vector, retain_graph=True)[0]

    def transpose(vector: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(value, place, vector, retain_graph=True)[0]

    return apply, transpose


class Bounds:
    """Spectral norms and bounds of the blocks of a StableGPT; nothing for other families."""

    def __init__(self, sites: Sites) -> None:
        self._model = sites.model
        self.layers = [
            layer for layer in sites.layers if isinstance(layer.module, StableGPTDecoderLayer)
        ]

    @torch.no_grad()
    def look(self, prefixes: dict[int, torch.Tensor]) -> dict[str, torch.Tensor]:
        """0-d float64 numbers of this process, by name; collective for sharded weights.

        `.../attention_factor` and `.../mlp_factor` are what the bounds divide by sigma.

        Args:
            prefixes: by layer, (1, n, C) of the stream that entered it.
        """
        found: dict[str, torch.Tensor] = {}
        for layer in self.layers:
            with torch.autocast(prefixes[layer.index].device.type, enabled=False):
                found.update(self._look_at_layer(layer, prefixes[layer.index]))
        return {name: value.double() for name, value in found.items()}

    def _look_at_layer(self, layer: Layer, prefix: torch.Tensor) -> dict[str, torch.Tensor]:
        block: Any = layer.module
        gated = isinstance(block.mlp, StableGPTGatedMLP)
        words = ("proj", "gate", "fc1", "fc2") if gated else ("proj", "fc1", "fc2")
        norms = {name: _spectral(layer, name) for name in words}
        found = {f"{layer.place}.{name}/weight_spectral": norm for name, norm in norms.items()}
        if _is_pre_norm(block.input_layernorm, block.post_attention_layernorm):
            rotary = self._model.base_model.rotary_emb
            jacobian = attention_jacobian_norm(block, rotary, prefix)
            gains = _largest(block.input_layernorm) * _largest(block.attention_scale)
            found[f"{layer.place}/attention_factor"] = norms["proj"] * jacobian * gains
        chain = not gated and not block.parallel_residual
        if chain and _is_pre_norm(
            block.pre_feedforward_layernorm, block.post_feedforward_layernorm
        ):
            gains = _largest(block.pre_feedforward_layernorm) * _largest(block.mlp_scale)
            found[f"{layer.place}/mlp_factor"] = norms["fc1"] * norms["fc2"] * gains
        return found


def _spectral(layer: Layer, name: str) -> torch.Tensor:
    """Largest singular value of the map that a linear layer applies, 0-d."""
    linear: Any = layer.linears[f"{layer.place}.{name}"]
    weight = _full(linear.weight)
    norm = operator_norm(
        lambda vector: weight @ vector, lambda vector: vector @ weight, _random_like(weight[0])
    )
    if isinstance(linear, StableGPTSigmaLinear):
        norm = norm * (_full(linear.gain) / spectral_norm(weight, linear.u, linear.v)).abs()[0]
    return norm


def _is_pre_norm(before: nn.Module, after: nn.Module) -> bool:
    """Return True if a branch is normalized at its input and not at its output."""
    return isinstance(after, nn.Identity) and not isinstance(before, nn.Identity)


def bound_numbers(reduced: Reduced, layers: list[Layer]) -> Numbers:
    """The vocabulary's numbers from sums over all processes; means, where they differ."""
    found: Numbers = {
        name: values[0] / world_size()
        for name, values in reduced.items()
        if name.endswith("/weight_spectral")
    }
    for layer in layers:
        for branch in ("attention", "mlp"):
            factor = reduced.get(f"{layer.place}/{branch}_factor")
            spread = stream_std(reduced[f"{layer.place}.stream/{branch}"])
            if factor is not None and spread:
                bound = 1 + factor[0] / world_size() / spread
                found[f"{layer.place}.stream/{branch}_bound"] = bound
    return found
