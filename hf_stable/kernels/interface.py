"""The kernels as Transformers' attention backend "stable_triton"."""

import contextlib
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_stable.model.functional_stable_gpt import attention_forward

from .attention import AttentionStatistics, flash_attention
from .documents import build_documents, documents_of_lengths, is_documents, merge

# Arguments of other backends that change what attention computes; unknown to these kernels. The
# last two come with the pages of continuous batching. A cache of another kind, under either of its
# names, is no such argument: its keys and values are here already.
_FOREIGN = (
    *("s_aux", "position_bias", "head_mask", "output_attentions"),
    *("write_index", "block_table"),
)


@contextlib.contextmanager
def record_statistics(model: nn.Module) -> Iterator[dict[int, AttentionStatistics]]:
    """Fill the dictionary, at the end, with what each attention layer did last inside, by index.

    The launch that computes attention computes its statistics too. A layer that the eager function
    computed (decoding, a dense mask) has none. Blocks may be compiled.
    """
    # On the layer itself: a dictionary that all write to would make each layer's graph its own.
    layers = [module for module in model.modules() if "layer_idx" in vars(module)]
    before = [vars(layer).get("attention_statistics", _NOT_RECORDED) for layer in layers]
    for layer in layers:
        layer.attention_statistics = None  # pyright: ignore[reportArgumentType]
    statistics: dict[int, AttentionStatistics] = {}
    try:
        yield statistics
    finally:
        for layer, outer in zip(layers, before, strict=True):
            found = vars(layer).pop("attention_statistics")
            if found is not None:
                statistics[vars(layer)["layer_idx"]] = found
            if outer is not _NOT_RECORDED:
                layer.attention_statistics = outer


_NOT_RECORDED = object()


def _refuse(module: nn.Module, dropout: float, is_dense: bool, kwargs: dict[str, Any]) -> None:
    problem = None
    for name in _FOREIGN:
        if kwargs.get(name) is not None and kwargs.get(name) is not False:
            problem = name
    if dropout > 0.0:
        problem = f"attention_dropout={dropout}"
    # A dense mask has these in it.
    if not is_dense and kwargs.get("sliding_window") is not None:
        problem = "sliding_window"
    if not is_dense and (not module.is_causal or kwargs.get("is_causal") is False):
        problem = "attention that is not causal"
    if problem is not None:
        raise ValueError(f'attn_implementation="stable_triton" cannot do {problem}: use "eager".')


def _is_dense(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seq_lens: torch.Tensor | None,
) -> bool:
    """Return True if the eager function must compute it: a cache, or any other dense mask."""
    batch_size, length = query.shape[0], query.shape[2]
    if length == key.shape[2] and (mask is None or is_documents(mask, batch_size, length)):
        return False
    if cu_seq_lens is not None:
        raise ValueError("cu_seq_lens_q is not for a cache or beside a dense mask: leave it out.")
    if mask is not None and not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(f"A dense attention mask is bool or additive, found {mask.dtype}.")
    return True


def _documents(
    query: torch.Tensor, mask: torch.Tensor | None, cu_seq_lens: torch.Tensor | None
) -> torch.Tensor | None:
    """The mask, with the documents of FlashAttention's cumulative lengths where those are given."""
    if cu_seq_lens is None:
        return mask
    if query.shape[0] != 1:
        raise ValueError(f"cu_seq_lens_q needs a batch of 1, found {query.shape[0]} sequences.")
    starts = documents_of_lengths(cu_seq_lens, query.shape[2])
    return build_documents(starts) if mask is None else merge(mask, starts)


def attention_backend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    clip_gamma: float | None = None,
    clip_zeta: float = 1.0,
    clip_alpha: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    *,
    fast_tanh: bool = False,
    unbiased: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of any causal model of Transformers, as `AttentionInterface` calls it.

    Args:
        query: (B, H, Q, D). key, value: (B, G, K, D).
        attention_mask: what `documents.document_mask` made, or a dense (B or 1, 1, Q, K) mask, bool
            or additive, with which the eager function computes in O(Q K) memory, as it does for
            decoding, where Q < K.
        cu_seq_lens_q: (N + 1,) where packed documents begin, as FlashAttention has it.

    Returns:
        (B, Q, H, D), and None for the weights, which are never materialized.

    Raises:
        ValueError: for what the kernels cannot do, naming it.
    """
    is_dense = _is_dense(query, key, attention_mask, cu_seq_lens_q)
    _refuse(module, dropout, is_dense, kwargs)
    scaling = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    score: dict[str, Any] = {
        "scaling": scaling,
        "softcap": softcap,
        "clip_gamma": clip_gamma,
        "clip_zeta": clip_zeta,
        "clip_alpha": clip_alpha,
    }
    if is_dense:
        output, _ = attention_forward(module, query, key, value, attention_mask, **score)
        return output, None
    output, statistics = flash_attention(
        query,
        key,
        value,
        documents=_documents(query, attention_mask, cu_seq_lens_q),
        fast_tanh=fast_tanh,
        unbiased=unbiased,
        # Whether somebody records it; the layers of other families declare no such attribute.
        return_statistics=hasattr(module, "attention_statistics"),
        **score,
    )
    if statistics is not None:
        module.attention_statistics = statistics  # pyright: ignore[reportArgumentType]
    return output, None


fast_tanh_backend = partial(attention_backend, fast_tanh=True)
unbiased_backend = partial(attention_backend, unbiased=True)
