"""Packed documents and padding for the kernels: the keys that a query sees, in O(S) numbers.

A documents tensor is (B, 1, 5, S) int32 (four axes, because Transformers hands on a mask with four
axes as it is). A query sees the keys up to its own place whose KEY_DOCUMENT is its QUERY_DOCUMENT.
FIRST_KEY and END_QUERY bound what a tile of queries or of keys must look at; NUM_KEYS is how many
keys a query sees.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)
from transformers.utils.import_utils import is_tracing

_HIDDEN = -1


def build_documents(starts: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
    """Return a documents tensor.

    Args:
        starts: (B, S) bool, where a document begins; the first token always begins one.
        visible: (B, S) bool, False for keys that nobody may see (padding); None is all.
    """
    batch_size, length = starts.shape
    places = torch.arange(length, device=starts.device).expand(batch_size, length)
    starts = starts | (places == 0)
    visible = torch.ones_like(starts) if visible is None else visible
    document = starts.cumsum(-1) - 1
    first = torch.where(starts, places, 0).cummax(-1).values
    begins = torch.where(starts, places, length)
    later = begins.roll(-1, -1).masked_fill(places == length - 1, length)
    end = later.flip(-1).cummin(-1).values.flip(-1)
    # Keys before the first one that anybody sees: left padding, which whole tiles may skip.
    padding = torch.where(visible, places, length).amin(-1, keepdim=True)
    seen = visible.cumsum(-1)
    num_keys = seen - seen.gather(-1, first) + visible.gather(-1, first).long()
    rows = (
        document.masked_fill(~visible, _HIDDEN),
        document,
        torch.maximum(first, padding),
        end,
        num_keys,
    )
    return torch.stack(rows, dim=1)[:, None].int().contiguous()


def is_documents(mask: torch.Tensor, batch_size: int, length: int) -> bool:
    """Return True if a mask is from `build_documents`, for this batch size and length."""
    return mask.dtype == torch.int32 and mask.shape == (batch_size, 1, 5, length)


def documents_of_lengths(cu_seq_lens: torch.Tensor, length: int) -> torch.Tensor:
    """(1, S) bool, where documents begin, from (N + 1,) cumulative lengths as FlashAttention has.

    Tokens beyond the last length are a document of their own.
    """
    starts = torch.zeros(1, length + 1, dtype=torch.bool, device=cu_seq_lens.device)
    starts[0, cu_seq_lens.long()] = True
    return starts[:, :length]


def merge(documents: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """A documents tensor whose documents also begin at `starts`, (B, S) bool."""
    key, query = documents[:, 0, 0], documents[:, 0, 1]
    begins = query != query.roll(1, -1)
    return build_documents(begins | starts, key != _HIDDEN)


def document_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask of the backend "stable_triton", as `AttentionMaskInterface` calls it.

    Args:
        attention_mask: (B, S) bool, False for padding.
        mask_function: causal, or causal inside packed documents; called for adjacent tokens.

    Returns:
        None for plain causal attention, documents, or for everything else (more keys than queries,
        sliding windows, custom mask functions) a (B or 1, 1, Q, K) bool mask, with which
        the eager function computes.
    """
    is_causal = mask_function is causal_mask_function
    # Transformers conjoins causality with packing, and would disjoin what lets a query look ahead.
    is_packed = mask_function.__qualname__.startswith(and_masks.__qualname__)
    knows = (is_causal and allow_is_causal_skip) or (is_packed and not use_vmap)
    if q_length != kv_length or local_size is not None or not knows:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            use_vmap=use_vmap,
            device=device,
            **{**kwargs, "allow_is_causal_skip": False},
        )
    visible = prepare_padding_mask(attention_mask, kv_length, kv_offset=0)
    if is_causal and (visible is None or (not is_tracing(visible) and bool(visible.all()))):
        return None
    here = torch.arange(kv_length, device=device)
    rows = torch.arange(batch_size, device=device)[:, None]
    before = (here - 1).clamp(min=0)
    linked = torch.as_tensor(mask_function(rows, 0, here[None], before[None]), device=device)
    return build_documents(~linked.expand(batch_size, kv_length), visible)
