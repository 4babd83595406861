"""Differences between the supported versions of Transformers, and what it passes to `forward`.

No other file of the folder asks which Transformers is installed. An export carries these files, so
they must work, or warn that they may not, under versions that did not exist when they were written.
"""

# The mixin's methods are those of the output that it is mixed into.
# pyright: reportAttributeAccessIssue=false

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
import transformers
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging

logger = logging.get_logger(__name__)

# The minor versions between which `scripts/host_matrix.sh` passes.
OLDEST_TESTED, NEWEST_TESTED = "5.17", "5.24"

# Transformers called the cache `past_key_values` up to 5.23 and calls it `cache` since 5.24. A
# model must accept either from a caller, and pass on the name that this version looks for.
CACHE = (
    "cache"
    if "cache" in {each.name for each in fields(BaseModelOutputWithPast)}
    else ("past_key_values")
)

# Keywords of `forward` beyond its signature that Transformers itself passes: name -> the first
# supported version that does.
KEYWORDS = {
    "assistant_tokenizer": "5.17",  # generate: what it needs itself and hands to the model as well
    "tokenizer": "5.17",
    "block_table": "5.17",  # continuous batching
    "logits_indices": "5.17",
    "logits_processor_args": "5.17",
    "max_seqlen_k": "5.17",
    "max_seqlen_q": "5.17",
    "read_index": "5.17",
    "write_index": "5.17",
    "cu_seq_lens_k": "5.17",  # packed documents, as of DataCollatorWithFlattening
    "cu_seq_lens_q": "5.17",
    "max_length_k": "5.17",
    "max_length_q": "5.17",
    "seq_idx": "5.17",
    "is_causal": "5.17",  # encoders, and since 5.23 continuous batching
    "num_items_in_batch": "5.17",  # Trainer
    "output_attentions": "5.17",
    "output_hidden_states": "5.17",
    "ignore_index": "5.17",  # pipeline stages: arguments of the head, given to the decoder
    "skip_logits": "5.17",
    "kwargs": "5.17",  # the rest of them, as a mapping
}

# What the Transformers backends of servers pass to the attention functions that they register.
_SERVER_KEYWORDS = {
    "sglang": {"attention_instances", "forward_batch"},
    "vllm": {"attention_instances"},
}


def one_cache(past_key_values: Any, cache: Any) -> Any:
    """Return the cache that was given by either of its names, or None.

    Raises:
        ValueError: when two different caches are given.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError(
            "Both cache and past_key_values are given. They are two names of one argument: "
            "leave one of them out."
        )
    return past_key_values if cache is None else cache


def check_cache(cache: Any, keywords: Mapping[str, Any]) -> None:
    """Raise TypeError for an object that is neither a `Cache` nor continuous batching's pages."""
    if cache is not None and not isinstance(cache, Cache) and not is_paged(keywords):
        raise TypeError(
            f"{CACHE} is a {type(cache).__name__}, but must be a Cache of Transformers, such as "
            "DynamicCache(config=model.config)."
        )


def is_paged(keywords: Mapping[str, Any]) -> bool:
    """Return whether a call comes from continuous batching, whose cache has pages."""
    return keywords.get("write_index") is not None or keywords.get("block_table") is not None


def update_cache(
    cache: Any,
    key: torch.Tensor,
    value: torch.Tensor,
    layer_idx: int,
    keywords: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a layer's keys and values to the cache and return all of them.

    Args:
        cache: None returns `key` and `value`.
        key: (B, G, K, D), after norms and RoPE.
        value: (B, G, K, D).
        layer_idx: Index of the layer.
        keywords: Keywords of the attention function; a cache of pages changes them in place.
    """
    if cache is None:
        return key, value
    if CACHE == "cache":
        return cache.update(key, value, layer_idx, kwargs=keywords)
    if is_paged(keywords):  # Up to 5.23 the attention function reads and writes the pages.
        keywords["cache"] = cache
        return key, value
    return cache.update(key, value, layer_idx)


def mask_cache(cache: Any, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cache argument of Transformers' mask functions, under the name they know."""
    hidden = CACHE != "cache" and is_paged(keywords)
    return {CACHE: None if hidden else cache}


def check_keywords(model: Any, keywords: Mapping[str, Any]) -> None:
    """Refuse keywords of `forward` that no part of the model reads.

    Attention functions of Transformers accept any keyword and ignore what they do not know. An
    argument that a newer version renames would therefore be lost without an exception.

    Args:
        model: Model whose `forward` was called.
        keywords: Keywords beyond the signature; None asks for nothing and is accepted.

    Raises:
        TypeError: for an unknown keyword, naming it.
        ValueError: for `is_causal=False`.
    """
    allowed = KEYWORDS.keys() | _SERVER_KEYWORDS.get(model.config._attn_implementation, set())
    for name, value in keywords.items():
        if value is not None and name not in allowed:
            raise TypeError(_unexpected(name, type(model)))
    if keywords.get("is_causal") is False and not is_paged(keywords):
        raise ValueError("is_causal=False: StableGPT is a causal decoder. Leave is_causal out.")


def _unexpected(name: str, kind: type) -> str:
    known = [*inspect.signature(kind.forward).parameters, *KEYWORDS]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return (
        f"{kind.__name__}.forward() got an unexpected keyword argument {name!r}, which would have "
        f"no effect{hint} Installed is transformers {transformers.__version__}; this model was "
        f"tested with {OLDEST_TESTED} to {NEWEST_TESTED}."
    )


def warn_if_untested() -> None:
    """Warn, once a process, that this Transformers is newer than the newest tested one."""
    installed = transformers.__version__.split(".")[:2]
    if [int(part) for part in installed] > [int(part) for part in NEWEST_TESTED.split(".")]:
        logger.warning_once(
            f"StableGPT was tested with transformers {OLDEST_TESTED} to {NEWEST_TESTED}; installed "
            f"is {transformers.__version__}. Compare generation with and without use_cache before "
            "you rely on it, or upgrade hf_stable."
        )


class StableGPTCacheNames:
    """Mixin of outputs: the cache can be read as `cache` and as `past_key_values`."""

    if CACHE != "cache":  # Since 5.24 Transformers' own outputs have both names.

        @property
        def cache(self: Any) -> Any:
            return self.past_key_values

        def __getitem__(self: Any, key: Any) -> Any:
            return super().__getitem__("past_key_values" if key == "cache" else key)

        def __contains__(self: Any, key: Any) -> bool:
            return super().__contains__("past_key_values" if key == "cache" else key)

        def get(self: Any, key: Any, default: Any = None) -> Any:
            return super().get("past_key_values" if key == "cache" else key, default)
