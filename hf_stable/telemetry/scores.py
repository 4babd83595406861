"""Reference computation of attention scores from queries and keys, for any backend.

Shape letters: B batch, H query heads, G key heads, Q queries, K keys, D head width.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hf_stable.kernels.documents import build_documents, documents_of_lengths, merge
from hf_stable.model.functional_stable_gpt import statistics_dtype

# Elements of one chunk of scores: about a CPU's caches, and few launches on a GPU.
_CHUNK = {"cpu": 2**20, "cuda": 2**27}
# Additive masks hide a key with -inf, with their dtype's smallest number, -1e9 or -1e4.
_HIDDEN = -9999.0


def visible_keys(mask: torch.Tensor | None, shape: torch.Size, rows: slice) -> torch.Tensor:
    """Return the keys that the queries of `rows` see, (B or 1, 1, rows, K) bool.

    Args:
        mask: None is causal, with the last query seeing all keys. (B, K) is causal with 1 for
            tokens and 0 for padding. Documents are as in `kernels.documents`. (B or 1, 1 or H, Q,
            K) is bool or additive, and only its first head is used.
        shape: (B, H, Q, K).
        rows: Range of queries.
    """
    _, _, num_queries, num_keys = shape
    documents = mask is not None and mask.dtype == torch.int32
    if mask is not None and mask.ndim == 4 and not documents:
        part = mask[:, :1, rows]
        return part if part.dtype == torch.bool else part > _HIDDEN
    device = None if mask is None else mask.device
    places = torch.arange(num_queries, device=device)[rows] + num_keys - num_queries
    causal = (torch.arange(num_keys, device=device) <= places[:, None])[None, None]
    if mask is None:
        return causal
    if documents:
        return causal & (mask[:, :, 0, None] == mask[:, :, 1, rows, None])
    return causal & (mask != 0)[:, None, None]


def score_chunks(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield scaled scores in at least fp32, without gradients, in chunks of queries.

    Args:
        query: Queries, (B, H, Q, D).
        key: Keys, (B, G, K, D).
        mask: See `visible_keys`.
        scaling: Factor on the scores.

    Yields:
        Scores (1, H, rows, k) and a mask of visible keys, (1, 1, rows, k) bool. The k keys include
        every key that these rows see.
    """
    query, key = query.detach(), key.detach()
    wide = statistics_dtype(query)
    batch_size, num_heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    is_causal = mask is None or mask.ndim == 2
    shape = torch.Size((batch_size, num_heads, num_queries, num_keys))
    step = max(1, _CHUNK.get(query.device.type, _CHUNK["cuda"]) // (num_heads * num_keys))
    keys = key.to(wide).transpose(-1, -2)
    with torch.autocast(query.device.type, enabled=False):
        for row in range(batch_size):
            mine = None if mask is None else mask[row : row + 1] if len(mask) > 1 else mask
            for start in range(0, num_queries, step):
                part = slice(start, min(start + step, num_queries))
                end = part.stop + num_keys - num_queries if is_causal else num_keys
                visible = visible_keys(mine, shape, part)[..., :end].to(query.device)
                queries = query[row, :, part].to(wide) * scaling
                grouped = queries.unflatten(0, (key.shape[1], -1)).flatten(1, 2)
                scores = grouped @ keys[row, :, :, :end]
                yield scores.unflatten(1, (-1, queries.shape[1])).flatten(0, 1)[None], visible


def mask_of(module: nn.Module, query: torch.Tensor, mask: Any, kwargs: dict[str, Any]) -> Any:
    """Convert mask functions, lengths and positions of backends to a mask for `visible_keys`."""
    if mask is not None and not isinstance(mask, torch.Tensor):  # FlexAttention's
        sizes = (query.shape[0], 1, query.shape[2], mask.seq_lengths[1])
        rows, heads, queries, keys = (torch.arange(size, device=query.device) for size in sizes)
        visible = mask.mask_mod(rows[:, None, None, None], heads[0], queries[:, None], keys)
        return visible.broadcast_to(sizes)
    lengths, positions = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
    if lengths is not None:
        starts = documents_of_lengths(lengths, query.shape[2])
        return build_documents(starts) if mask is None else merge(mask, starts)
    is_flash = "flash" in module.config._attn_implementation  # pyright: ignore
    # As in Transformers, which detects packed documents from positions only in a single row.
    if is_flash and mask is None and positions is not None and len(query) == 1:
        mask = build_documents(positions == 0)
    window = kwargs.get("sliding_window")
    return _window(query, mask, window) if is_flash and window is not None else mask


def _window(query: torch.Tensor, mask: torch.Tensor | None, window: int) -> torch.Tensor:
    """Restrict a mask to the last `window` keys; other backends pass such a mask already."""
    shape = torch.Size((query.shape[0], 1, query.shape[2], query.shape[2]))
    visible = visible_keys(mask, shape, slice(None)).to(query.device)
    places = torch.arange(shape[-1], device=query.device)
    return visible & (places[:, None] - places < window)
