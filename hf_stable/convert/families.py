"""Table of families: mappings of config and tensors, and reasons why others cannot be converted.

Our module names are on the left. Several modules on the right are concatenated along their rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .rules import (
    Rule,
    alias,
    biases,
    neutral,
    only,
    query_scale,
    rope,
    rope_alias,
    same,
    to,
    window,
)

Join = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Family:
    """One `model_type` of Transformers.

    Args:
        rules: Rules of the config's fields, beyond those of every config.
        fields: Our fields that are fixed for the family.
        outside: Modules outside the blocks, ours to theirs.
        blocks: Prefix of their blocks.
        block: Modules of a block, ours to theirs.
        reorder: Functions that reorder the rows of our modules; they receive the number of heads.
    """

    rules: Mapping[str, Rule]
    fields: Mapping[str, Any]
    outside: Mapping[str, str]
    blocks: str
    block: Mapping[str, tuple[str, ...]]
    reorder: Mapping[str, Join] = field(default_factory=dict)


_BIAS = "biases of queries, keys, values and Proj, without the MLP's: ours has no such choice"
_DROPOUT = "dropout outside attention, which ours does not have: its training would differ"
_BOTH_WAYS = "ours never attends to later tokens"

_OUTSIDE = {
    "model.embed_tokens": "model.embed_tokens",
    "model.norm": "model.norm",
    "lm_head": "lm_head",
}
_ATTENTION = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
}
_PRE_NORMS = {
    "input_layernorm": ("input_layernorm",),
    "pre_feedforward_layernorm": ("post_attention_layernorm",),
}
_POST_NORMS = {
    "post_attention_layernorm": ("post_attention_layernorm",),
    "post_feedforward_layernorm": ("post_feedforward_layernorm",),
}
_MLP = {"mlp.up_proj": ("mlp.up_proj",), "mlp.down_proj": ("mlp.down_proj",)}
_GATED_MLP = {**_MLP, "mlp.gate_proj": ("mlp.gate_proj",)}
_QK_NORMS = {"self_attn.q_norm": ("self_attn.q_norm",), "self_attn.k_norm": ("self_attn.k_norm",)}

_RMS_GATED = {"norm": "rmsnorm", "mlp_gated": True}
_RMS_RULES: dict[str, Rule] = {
    **same("num_key_value_heads", "head_dim", "hidden_act"),
    "rms_norm_eps": to("norm_eps"),
    "rope_parameters": rope(partial=False),
}
_WINDOW_RULES = {"sliding_window": window, "layer_types": window}
_QWEN_RULES = {
    **_RMS_RULES,
    **_WINDOW_RULES,
    # They define the layers with windows, as layer_types does.
    **neutral("use_sliding_window", "max_window_layers"),
}
_GEMMA_RULES = {
    **_RMS_RULES,
    "attention_bias": only(False, why=_BIAS),
    "use_bidirectional_attention": only(None, False, why=_BOTH_WAYS),
}
_GEMMA_FIELDS = {**_RMS_GATED, "zero_centered_norm": True, "embedding_scale": "sqrt_hidden"}


def _llama_like(
    rules: Mapping[str, Rule],
    fields: Mapping[str, Any] = _RMS_GATED,
    norms: Mapping[str, tuple[str, ...]] = _PRE_NORMS,
    mlp: Mapping[str, tuple[str, ...]] = _GATED_MLP,
) -> Family:
    block = {**_ATTENTION, **norms, **mlp}
    return Family(rules, fields, _OUTSIDE, "model.layers", block)


def _by_kind(rows: Tensor, heads: int) -> Tensor:
    """Reorder rows from query, key and value per head to all queries, all keys, all values."""
    return rows.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


_NEOX = Family(
    rules={
        **same("hidden_act"),
        "layer_norm_eps": to("norm_eps"),
        "rope_parameters": rope(partial=True),
        "use_parallel_residual": to("parallel_residual"),
        "attention_bias": only(True, why="biases of the MLP alone: ours has no such choice"),
        "hidden_dropout": only(0, why=_DROPOUT),
        "rope_theta": rope_alias,
        "partial_rotary_factor": rope_alias,
        # Declared by Transformers' class, but not read by its causal model.
        **neutral("classifier_dropout", "is_decoder"),
    },
    fields={"norm_bias": True, "linear_bias": "all"},
    outside={
        "model.embed_tokens": "gpt_neox.embed_in",
        "model.norm": "gpt_neox.final_layer_norm",
        "lm_head": "lm_head",
    },
    blocks="gpt_neox.layers",
    block={
        **_PRE_NORMS,
        "self_attn.qkv_proj": ("attention.query_key_value",),
        "self_attn.o_proj": ("attention.dense",),
        "mlp.up_proj": ("mlp.dense_h_to_4h",),
        "mlp.down_proj": ("mlp.dense_4h_to_h",),
    },
    reorder={"self_attn.qkv_proj": _by_kind},
)

FAMILIES: dict[str, Family] = {
    "nemotron": _llama_like(
        {
            **same("num_key_value_heads", "head_dim", "hidden_act"),
            "norm_eps": to("norm_eps"),
            "rope_parameters": rope(partial=True),
            "attention_bias": biases,
            "mlp_bias": biases,
            **neutral("kv_channels"),  # another name of head_dim, which Transformers reads
            "layer_norm_eps": alias("norm_eps"),
        },
        {"norm_bias": True, "zero_centered_norm": True},
        mlp=_MLP,
    ),
    "gpt_neox": _NEOX,
    "llama": _llama_like(
        {
            **_RMS_RULES,
            "attention_bias": biases,
            "mlp_bias": biases,
        }
    ),
    "mistral": _llama_like({**_RMS_RULES, **_WINDOW_RULES}),
    "qwen2": _llama_like(_QWEN_RULES, {**_RMS_GATED, "linear_bias": "qkv"}),
    "qwen3": _llama_like(
        {**_QWEN_RULES, "attention_bias": only(False, why=_BIAS)},
        {**_RMS_GATED, "qk_norm": "head"},
        {**_PRE_NORMS, **_QK_NORMS},
    ),
    "olmo2": _llama_like(
        {**_RMS_RULES, "attention_bias": only(False, why=_BIAS)},
        {
            **_RMS_GATED,
            "qk_norm": "full",
            **{"attention_pre_norm": False, "mlp_pre_norm": False},
            **{"attention_post_norm": True, "mlp_post_norm": True},
        },
        {**_POST_NORMS, **_QK_NORMS},
    ),
    "gemma": _llama_like({**_GEMMA_RULES, "hidden_activation": alias("hidden_act")}, _GEMMA_FIELDS),
    "gemma2": _llama_like(
        {
            **_GEMMA_RULES,
            **_WINDOW_RULES,
            **same("final_logit_softcapping", "attn_logit_softcapping"),
            "hidden_activation": to("hidden_act"),
            "hidden_act": alias("hidden_activation"),
            "sliding_window_size": alias("sliding_window"),
            "query_pre_attn_scalar": query_scale,
        },
        {**_GEMMA_FIELDS, "attention_post_norm": True, "mlp_post_norm": True},
        {
            "input_layernorm": ("input_layernorm",),
            "pre_feedforward_layernorm": ("pre_feedforward_layernorm",),
            **_POST_NORMS,
        },
    ),
}

_LEARNED = "it learns its positions, and ours rotates queries and keys (RoPE)"
_EXPERTS = "it has experts, and ours has one MLP a block"
_PAIRS = "it rotates neighbouring channels of a head, and ours halves of it"
_NO_ATTENTION = "it is no Transformer with attention in every block"
# Well-known families whose block a StableGPT cannot express.
WHY_NOT = {
    **dict.fromkeys(("gpt2", "opt", "gpt_neo", "gpt_bigcode"), _LEARNED),
    **dict.fromkeys(("bloom", "mpt"), "its positions are biases of the scores (ALiBi)"),
    **dict.fromkeys(
        ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss"),
        _EXPERTS,
    ),
    **dict.fromkeys(("gptj", "codegen", "cohere", "cohere2", "glm", "glm4"), _PAIRS),
    **dict.fromkeys(("mamba", "mamba2", "rwkv", "recurrent_gemma"), _NO_ATTENTION),
    **dict.fromkeys(
        ("phi", "falcon"), "both branches read one norm in parallel, and ours has a norm for each"
    ),
    "gemma3_text": "layers have different rotary embeddings, and ours one for all",
    "gemma3": "it reads images, and its layers have different rotary embeddings",
    "granite": "it scales residual branches and output logits",
    "olmo": "its norms have no weights, and it clips queries, keys and values",
    "phi3": "it has dropout in the residual stream, and convert has no table of it yet",
    "stablelm": "convert has no table of it yet",
}
