"""Evaluation of any causal LM in float64, to compare two models beyond the rounding of fp32.

`model.double()` is not enough: Transformers' families compute norms, softmax and rotary angles in
fp32 whatever the weights' dtype, and keep frequencies in fp32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


class _WideningMode(TorchFunctionMode):
    """Mode that replaces fp32 by float64 wherever a function is asked for it by name."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        wide = [torch.float64 if each is torch.float32 else each for each in args]
        named = {
            name: torch.float64 if each is torch.float32 else each
            for name, each in (kwargs or {}).items()
        }
        return func(*wide, **named)


@contextmanager
def in_float64() -> Iterator[None]:
    """Context in which requests for fp32 give float64, and float64 is the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _WideningMode():
            yield
    finally:
        torch.set_default_dtype(before)


def _renew_buffers(model: Any) -> None:
    """Recompute the buffers that models compute in fp32 when they are built."""
    for module in model.modules():
        if "inv_freq" in module._buffers:
            compute = module.compute_default_rope_parameters
            if module.rope_type != "default":
                compute = ROPE_INIT_FUNCTIONS[module.rope_type]
            module.inv_freq, module.attention_scaling = compute(module.config)
            module.original_inv_freq = module.inv_freq.clone()
        if "embed_scale" in module._buffers:  # of Gemma
            module.embed_scale = torch.tensor(module.scalar_embed_scale)


@torch.no_grad()
def exact_logits(model: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Compute logits of a float64 model on the CPU, with all intermediate results in float64.

    The model's rotary frequencies stay in float64 afterwards.

    Args:
        model: Causal language model in float64.
        ids: (B, Q) int64.
        positions: (B, Q) int64.

    Returns:
        (B, Q, V) float64.
    """
    model.set_attn_implementation("eager")
    with in_float64():
        _renew_buffers(model)
        mask = torch.ones_like(ids)  # without it, positions that do not start at 0 mean packing
        return model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits
