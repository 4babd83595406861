"""Attention statistics per head, from the kernel if it reports them, else from a reference here.

For a sampled step, a wrapper replaces the model's attention function under the same name. It calls
the function and then computes the statistics. Masks, caches and results are unchanged.

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

# Rows of `watched_rows`, each a sum over the attention rows of each head.
ENTROPY, LONG_ROWS, CLIPPED, ROWS = range(4)
# Names of a model family's eager attention: in Transformers, and in StableGPT.
_EAGER_NAMES = ("eager_attention_forward", "attention_forward")


def row_statistics(
    scores: torch.Tensor,
    visible: torch.Tensor,
    cap: float | None,
    clip: tuple[float | None, float, float | None],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the largest logit, entropy and largest stretched probability of each row, (..., Q).

    The entropy H = log Z - sum_j p_j s_j is that of the softmax after the cap and before a clip, in
    nats. A row is clipped completely if its largest stretched probability is not above 0.

    Args:
        scores: Scaled scores, (..., Q, K); overwritten.
        visible: Visible keys, (..., Q, K) bool, broadcastable.
        cap: Soft cap of the logits, or None.
        clip: Gamma, zeta and alpha of `functional_stable_gpt.clip_probabilities`.
    """
    # Not the smallest number: its difference from a row's largest logit must be finite.
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
    """Add (B, H, Q) statistics to (H,) `largest` and (4, H) `rows`.

    `num_keys` is (B or 1, 1, Q).
    """
    logits, entropy, clipped = statistics
    num_keys = num_keys.expand_as(logits)
    seen, long = num_keys > 0, num_keys > 1
    logits = torch.where(seen, logits, -math.inf).amax((0, 2)).double()
    torch.maximum(largest, logits, out=largest)
    normalised = entropy.double() / num_keys.clamp(min=2).double().log()
    # A row with one key has no entropy and would only dilute the mean.
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
    """Compute the reference statistics, in chunks of queries to bound the memory for scores.

    Args:
        query: Queries, (B, H, Q, D).
        key: Keys, (B, G, K, D).
        mask: See `scores.visible_keys`.
        scaling: Factor on the scores.
        cap: Soft cap of the logits, or None.
        gamma: Lower end of the stretched probabilities, or None.
        zeta: Upper end of the stretched probabilities.
        alpha: Numerator of the lower end -alpha / (visible keys), or None.
        largest: (H,) float64, updated in place: largest scaled logit before the cap.
        rows: (4, H) float64, updated in place with sums over rows: ENTROPY / log(visible keys),
            LONG_ROWS (with two keys or more), CLIPPED, ROWS.
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
    """Add the statistics of a kernel, (B, H, S); see `kernels.attention.AttentionStatistics`."""
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
    """Call the module's attention function, then compute its statistics."""
    function = _function_of(module)
    # Skip layers of another model in the same process, and validation.
    if "watched_rows" not in vars(module) or not module.training:
        return function(module, query, key, value, attention_mask, **kwargs)
    module.attention_statistics = None  # from another microbatch
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
    """Attention function that `watched_attention` replaces under a name.

    Args:
        function: Registered function, or None if the model family defines it.
        own: Previous entry of the registry's local mapping.
        samples: Number of active samples that need the replacement.
    """

    function: Callable[..., Any] | None
    own: Callable[..., Any] | None
    samples: int = 0


_replaced: dict[str, _Replaced] = {}


def _function_of(module: nn.Module) -> Callable[..., Any]:
    """Return the attention function of `module` when it is not watched."""
    function = _replaced[module.config._attn_implementation].function  # pyright: ignore
    if function is not None:
        return function
    # Every family defines its eager function in the file of the module that calls it.
    namespace = vars(sys.modules[type(module).__module__])
    return namespace[next(name for name in _EAGER_NAMES if name in namespace)]


def replace_attention(name: str) -> Callable[[], None]:
    """Replace the backend `name` with `watched_attention`; call the result to undo it."""
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
