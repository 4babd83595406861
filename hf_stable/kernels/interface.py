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
from .documents import build_documents, documents_of_lengths, merge

# Arguments of other backends that change what attention computes; unknown to these kernels.
_FOREIGN = ("s_aux", "position_bias", "head_mask", "cache", "sliding_window")

_recording = False


@contextlib.contextmanager
def record_statistics(model: nn.Module) -> Iterator[dict[int, AttentionStatistics]]:
    """Fill the dictionary, at the end, with what each attention layer did last inside, by index.

    The launch that computes attention computes its statistics too. A layer that the eager function
    computed (decoding, a dense mask) has none. Blocks may be compiled.
    """
    global _recording  # noqa: PLW0603 (what a compiled block guards on)
    before, _recording = _recording, True
    statistics: dict[int, AttentionStatistics] = {}
    try:
        yield statistics
    finally:
        _recording = before
        for module in model.modules():
            # Left on the layer itself: a dictionary would make each layer's graph its own.
            found = vars(module).pop("attention_statistics", None)
            if found is not None:
                statistics[int(vars(module)["layer_idx"])] = found


def _refuse(module: nn.Module, dropout: float, is_dense: bool, kwargs: dict[str, Any]) -> None:
    problems = {
        f"attention_dropout={dropout}": dropout > 0.0,
        "attention that is not causal": not is_dense
        and (not module.is_causal or kwargs.get("is_causal") is False),
    }
    for name in _FOREIGN:
        # A dense mask has the window in it.
        has_effect = kwargs.get(name) is not None and not (is_dense and name == "sliding_window")
        problems[name] = has_effect
    for problem, found in problems.items():
        if found:
            raise ValueError(
                f'attn_implementation="stable_triton" cannot do {problem}: use "eager".'
            )


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
        (B, Q, H, D), and None in the place of the weights, which nobody holds.

    Raises:
        ValueError: for what the kernels cannot do, naming it.
    """
    is_dense = attention_mask is not None and attention_mask.dtype != torch.int32
    _refuse(module, dropout, is_dense, kwargs)
    scaling = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    score: dict[str, Any] = {
        "scaling": scaling,
        "softcap": softcap,
        "clip_gamma": clip_gamma,
        "clip_zeta": clip_zeta,
        "clip_alpha": clip_alpha,
    }
    if is_dense or query.shape[2] != key.shape[2]:
        output, _ = attention_forward(module, query, key, value, attention_mask, **score)
        return output, None
    output, statistics = flash_attention(
        query,
        key,
        value,
        documents=_documents(query, attention_mask, cu_seq_lens_q),
        fast_tanh=fast_tanh,
        return_statistics=_recording,
        **score,
    )
    if statistics is not None:
        module.attention_statistics = statistics  # pyright: ignore[reportArgumentType]
    return output, None


fast_tanh_backend = partial(attention_backend, fast_tanh=True)
