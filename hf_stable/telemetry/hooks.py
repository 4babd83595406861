"""Hooks of a sampled step, which pass a module's tensors to the operators of `observe`.

The tensors that an operator updates are plain attributes of the module, and all modules of a kind
share one hook function. A closure per module would give every block a separate graph under
`torch.compile`. Modules in eval mode, such as during validation, are not measured.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .attention import ROWS
from .gauges import Gauges
from .observe import (
    ObserveGradient,
    keep_first,
    observe,
    observe_heads,
    observe_parts,
    observe_spread,
)
from .sites import Layer

Undo = Callable[[], None]


def give_attributes(module: nn.Module, **values: Any) -> Undo:
    """Set attributes of a module until undone. Tensors among them are neither saved nor moved."""
    vars(module).update(values)

    def undo() -> None:
        for name in values:
            del vars(module)[name]

    return undo


def _observe_input(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    if not module.training:
        return None
    observe(args[0], module.watched_input)
    if not args[0].requires_grad:
        return None
    return ObserveGradient.apply(args[0], module.watched_input_grad), *args[1:]


def _observe_output(module: Any, args: Any, output: torch.Tensor) -> None:
    if module.training:
        observe(output, module.watched_output)


def _observe_stream(module: Any, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
    if not module.training:
        return
    stream = args[0] if args else kwargs["hidden_states"]
    observe_spread(stream, module.watched_stream)
    if module.watched_prefix is not None:
        keep_first(stream, module.watched_prefix)


def _observe_parts(module: Any, args: Any, output: torch.Tensor) -> None:
    """Measure queries and keys before their norms, in the output of one fused projection.

    The operator takes the whole output: slices would change the memory layout that a compiler
    chooses for later operations.
    """
    if module.training:
        observe_parts(output, *module.watched_parts)


def _observe_before_norm(module: Any, args: tuple[torch.Tensor, ...]) -> None:
    if module.training:
        observe_heads(args[0], module.watched_heads)


def hook_linear(module: nn.Module, place: str, gauges: Gauges) -> list[Undo]:
    """Measure the input, its gradient and the output of a linear map."""
    undo = give_attributes(
        module,
        watched_input=gauges.sums(f"{place}/input", 2),
        watched_input_grad=gauges.gradient_sums(f"{place}/input_grad", 2),
    )
    hook = module.register_forward_pre_hook(_observe_input)
    return [undo, hook.remove, *hook_output(module, place, gauges)]


def hook_output(module: nn.Module, place: str, gauges: Gauges) -> list[Undo]:
    """Measure the output of a module."""
    undo = give_attributes(module, watched_output=gauges.sums(f"{place}/output", 2))
    return [undo, module.register_forward_hook(_observe_output).remove]


def hook_stream(module: nn.Module, place: str, gauges: Gauges) -> list[Undo]:
    """Measure the residual stream that enters a module, and copy its first tokens if requested."""
    undo = give_attributes(module, watched_stream=gauges.sums(place, 3), watched_prefix=None)
    hook = module.register_forward_pre_hook(_observe_stream, with_kwargs=True)
    return [undo, hook.remove]


def hook_attention(layer: Layer, heads: int, key_heads: int, gauges: Gauges) -> list[Undo]:
    """Measure an attention function (see `attention.watched_attention`) and q and k norms."""
    module, place = layer.attention, f"{layer.place}.attention"
    if module is None:
        return []
    undos = [
        give_attributes(
            module,
            watched_queries=gauges.sums(f"{place}/q", 2, heads),
            watched_keys=gauges.sums(f"{place}/k", 2, key_heads),
            watched_largest=gauges.maxima(f"{place}/largest", heads),
            watched_rows=gauges.sums(f"{place}/rows", ROWS + 1, heads),
        )
    ]
    if "attention_statistics" not in vars(module):  # kernels store their statistics here
        undos.append(give_attributes(module, attention_statistics=None))
    children: dict[str, Any] = dict(module.named_children())
    before = {
        name: gauges.sums(f"{place}/{name}_before_norm", 2, count)
        for name, count in (("q", heads), ("k", key_heads))
        if not isinstance(children.get(f"{name}_norm", nn.Identity()), nn.Identity)
    }
    if before and "qkv_proj" in children:
        projection = children["qkv_proj"]
        undos.append(give_attributes(projection, watched_parts=tuple(before.values())))
        undos.append(projection.register_forward_hook(_observe_parts).remove)
    else:
        for name, sums in before.items():
            norm = children[f"{name}_norm"]
            undos.append(give_attributes(norm, watched_heads=sums))
            undos.append(norm.register_forward_pre_hook(_observe_before_norm).remove)
    return undos
