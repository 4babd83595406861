"""What attention does, per head: from the kernel where that tells, else by the reference here.

The model's attention function is replaced, under its own name and for the sampled step only, by one
that calls it and then looks; masks, caches and results stay what they were.

Shape letters: B batch, H query heads, G key heads, Q queries, K keys, D head width.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_stable.model.functional_stable_gpt import softcap as cap_logits

from .observe import observe_heads
from .scores import mask_of, score_chunks

# Rows of `watched_rows`: sums over rows of each head.
ENTROPY, LONG_ROWS, CLIPPED, ROWS = range(4)
# Names of a family's own eager attention: Transformers', and StableGPT's.
_EAGER_NAMES = ("eager_attention_forward", "attention_forward")


def row_statistics(
    scores: torch.Tensor,
    visible: torch.Tensor,
    cap: float | None,
    clip: tuple[float | None, float, float | None],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Largest logit, entropy and largest stretched probability of each row, (..., Q) each.

    Entropy H = log Z - sum_j p_j s_j is of the softmax after the cap, in nats, before a clip. A row
    is clipped to nothing when its largest stretched probability is not above 0.

    Args:
        scores: (..., Q, K) scaled, overwritten.
        visible: (..., Q, K) bool, broadcasting.
        clip: gamma, zeta and alpha of `functional_stable_gpt.clip_probabilities`.
    """
    # Not the smallest number: its distance from a row's largest logit must be finite.
    hidden = torch.finfo(scores.dtype).min / 4
    largest = top = scores.masked_fill_(~visible, hidden).amax(-1)
    if cap is not None:
        scores = cap_logits(scores, cap).masked_fill_(~visible, hidden)
        top = scores.amax(-1)
    distance = scores.sub_(top[..., None])
    weights = distance.exp()
    total = weights.sum(-1)
    entropy = total.log() - torch.linalg.vecdot(weights, distance) / total
    gamma, zeta, alpha = clip
    lower = torch.full_like(total, gamma or 0.0)
    if alpha is not None:
        lower = -alpha / visible.sum(-1).clamp(min=1).to(total.dtype).expand_as(total)
    return largest, entropy, lower + (zeta - lower) / total


def _count(
    statistics: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    num_keys: torch.Tensor,
    largest: torch.Tensor,
    rows: torch.Tensor,
) -> None:
    """Add (B, H, Q) statistics to (H,) `largest` and (4, H) `rows`; (B or 1, 1, Q) `num_keys`."""
    logits, entropy, clipped = statistics
    num_keys = num_keys.expand_as(logits)
    seen, long = num_keys > 0, num_keys > 1
    logits = torch.where(seen, logits, -math.inf).amax((0, 2)).double()
    torch.maximum(largest, logits, out=largest)
    normalised = entropy.double() / num_keys.clamp(min=2).double().log()
    # A row of one key has no entropy to speak of: it would only dilute the mean.
    rows[ENTROPY] += torch.where(long, normalised, 0.0).sum((0, 2))
    rows[LONG_ROWS] += long.sum((0, 2))
    rows[CLIPPED] += (clipped & seen).sum((0, 2))
    rows[ROWS] += seen.sum((0, 2))


@torch.library.custom_op("hf_stable::observe_attention", mutates_args={"largest", "rows"})
def observe_attention(  # noqa: PLR0913, PLR0917 (an operator takes tensors and numbers)
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    cap: float | None,
    gamma: float | None,
    zeta: float,
    alpha: float | None,
    largest: torch.Tensor,
    rows: torch.Tensor,
) -> None:
    """The reference, in chunks of queries: memory is that of a chunk of scores.

    Args:
        query: (B, H, Q, D). key: (B, G, K, D). mask: see `scores.visible_keys`.
        largest: (H,) float64, becomes the largest logit, scaled, before the cap.
        rows: (4, H) float64, sums: ENTROPY / log(visible keys), LONG_ROWS (of two keys or more),
            CLIPPED, ROWS.
    """
    clips = gamma is not None or alpha is not None or zeta != 1.0
    for scores, visible in score_chunks(query, key, mask, scaling):
        found = row_statistics(scores, visible, cap, (gamma, zeta, alpha))
        dead = found[2] <= 0 if clips else torch.zeros_like(found[2], dtype=torch.bool)
        _count((found[0], found[1], dead), visible.sum(-1), largest, rows)


@torch.library.custom_op("hf_stable::observe_kernel", mutates_args={"largest", "rows"})
def observe_kernel(
    logits: torch.Tensor,
    entropy: torch.Tensor,
    clipped: torch.Tensor,
    visible: torch.Tensor,
    documents: torch.Tensor | None,
    largest: torch.Tensor,
    rows: torch.Tensor,
) -> None:
    """The same from a kernel's (B, H, S) rows, see `kernels.attention.AttentionStatistics`."""
    num_keys = torch.arange(1, logits.shape[2] + 1, device=logits.device)[None, None]
    if documents is not None:
        num_keys = documents[:, :, 4]
    num_keys = torch.where(visible, num_keys, 0)
    _count((logits, entropy, clipped), num_keys, largest, rows)


for _operator in (observe_attention, observe_kernel):
    _operator.register_fake(lambda *_: None)


def watched_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> Any:
    """The module's attention function, and then a look at what it did."""
    function = _function_of(module)
    # Not a layer of another model in the same process, and no validation.
    if "watched_rows" not in vars(module) or not module.training:
        return function(module, query, key, value, attention_mask, **kwargs)
    module.attention_statistics = None  # those of another microbatch
    result = function(module, query, key, value, attention_mask, **kwargs)
    observe_heads(query, module.watched_queries)
    observe_heads(key, module.watched_keys)
    _look(module, query, key, mask_of(module, query, attention_mask, kwargs), kwargs)
    return result


def _look(
    module: Any, query: torch.Tensor, key: torch.Tensor, mask: Any, kwargs: dict[str, Any]
) -> None:
    statistics = module.attention_statistics
    if statistics is not None:
        observe_kernel(
            statistics.rows_max_logit,
            statistics.rows_entropy,
            statistics.rows_clipped,
            statistics.rows_visible,
            mask,
            module.watched_largest,
            module.watched_rows,
        )
        return
    scaling = kwargs.get("scaling")
    observe_attention(
        query,
        key,
        mask,
        1 / math.sqrt(query.shape[-1]) if scaling is None else scaling,
        kwargs.get("softcap"),
        kwargs.get("clip_gamma"),
        kwargs.get("clip_zeta", 1.0),
        kwargs.get("clip_alpha"),
        module.watched_largest,
        module.watched_rows,
    )


@dataclass
class _Replaced:
    """What `watched_attention` stands in for under a name, and for how many samples.

    Args:
        function: None where the module's own family knows it.
        own: what the registry's local mapping held.
    """

    function: Callable[..., Any] | None
    own: Callable[..., Any] | None
    samples: int = 0


_replaced: dict[str, _Replaced] = {}


def _function_of(module: nn.Module) -> Callable[..., Any]:
    """What computes the attention of `module` when nobody watches."""
    function = _replaced[module.config._attn_implementation].function  # pyright: ignore
    if function is not None:
        return function
    # Every family keeps its eager function beside the module that calls it.
    namespace = vars(sys.modules[type(module).__module__])
    return namespace[next(name for name in _EAGER_NAMES if name in namespace)]


def replace_attention(name: str) -> Callable[[], None]:
    """Put `watched_attention` in the place of the backend `name`; call the result to undo it."""
    functions = ALL_ATTENTION_FUNCTIONS
    if name not in _replaced:
        _replaced[name] = _Replaced(functions.get(name), functions._local_mapping.get(name))
        functions[name] = watched_attention
    replaced = _replaced[name]
    replaced.samples += 1

    def restore() -> None:
        replaced.samples -= 1
        if replaced.samples > 0:
            return
        del _replaced[name], functions[name]
        if replaced.own is not None:
            functions[name] = replaced.own

    return restore
