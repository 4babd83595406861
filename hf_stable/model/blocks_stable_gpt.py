"""The block of a StableGPT: attention, MLP and the two residual branches around them.

Invariant: no `forward` tests a technique's field. A field fills a slot (a module, or
`nn.Identity`) or is an argument of a pure function of `functional_stable_gpt`.
"""

# Transformers types what a config resolves, and what a forward fills in, as Optional.
# pyright: reportOptionalOperand=false, reportOptionalSubscript=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportTypedDictNotRequiredAccess=false, reportPrivateImportUsage=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import math
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_stable_gpt import StableGPTConfig
from .functional_stable_gpt import attention_forward, mlp_stream, rotate, squared_relu
from .host_stable_gpt import one_cache, update_cache
from .sigma_stable_gpt import StableGPTSigmaLinear
from .slots_stable_gpt import (
    StableGPTHeadNorm,
    StableGPTLayerScale,
    StableGPTLinear,
    StableGPTNorm,
)

# score: q, k, v and what happens before V -----------------------------------------------------


def _score_arguments(config: StableGPTConfig) -> dict[str, float | None]:
    """Return the score group's arguments for a backend, besides the scale; empty when off."""
    arguments: dict[str, float | None] = {}
    if config.attn_logit_softcapping is not None:
        arguments["softcap"] = config.attn_logit_softcapping
    if config.clips_attention:
        arguments["clip_gamma"] = config.attention_clip_gamma
        arguments["clip_zeta"] = config.attention_clip_zeta
        arguments["clip_alpha"] = config.attention_clip_alpha
    return arguments


def _score_norm(config: StableGPTConfig, scope: str | None, num_heads: int) -> nn.Module:
    if scope is None:
        return nn.Identity()
    if scope == "head":
        return StableGPTHeadNorm(config, config.head_dim)
    return StableGPTNorm(config, num_heads * config.head_dim)


class StableGPTAttention(nn.Module):
    """Causal self-attention; `qkv_proj` rows are all query, then all key, then all value heads."""

    def __init__(self, config: StableGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.attention_multiplier / math.sqrt(config.head_dim)
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.score_arguments = _score_arguments(config)
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.widths = [heads * config.head_dim, *[kv_heads * config.head_dim] * 2]
        biased = config.linear_bias is not None
        self.qkv_proj = _linear(config, config.hidden_size, sum(self.widths), bias=biased)
        self.o_proj = _linear(config, self.widths[0], config.hidden_size, closes_branch=True)
        self.q_norm = _score_norm(config, config.qk_norm, heads)
        self.k_norm = _score_norm(config, config.qk_norm, kv_heads)
        self.v_norm = _score_norm(config, config.v_norm, kv_heads)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = self.qkv_proj(hidden_states).split(self.widths, dim=-1)
        query = self._heads(self.q_norm(query))
        key = self._heads(self.k_norm(key))
        value = self._heads(self.v_norm(value))
        query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        cache = one_cache(past_key_values, cache)
        key, value = update_cache(cache, key, value, self.layer_idx, kwargs)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, attention_forward
        )
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **self.score_arguments,
            **kwargs,
        )
        return self.o_proj(output.flatten(-2)), weights

    def _heads(self, projected: torch.Tensor) -> torch.Tensor:
        """(B, Q, H * D) to (B, H, Q, D)."""
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


# the block ------------------------------------------------------------------------------------


def _linear(
    config: StableGPTConfig,
    in_features: int,
    out_features: int,
    closes_branch: bool = False,
    bias: bool | None = None,
) -> StableGPTLinear:
    depth_scaled = closes_branch and config.depth_scaled_init
    init_scale = 1 / math.sqrt(2 * config.num_hidden_layers) if depth_scaled else 1.0
    kind = StableGPTSigmaLinear if config.sigma_reparam else StableGPTLinear
    bias = config.linear_bias == "all" if bias is None else bias
    return kind(in_features, out_features, init_scale, bias)


def norm_slot(config: StableGPTConfig, present: bool, gain: float = 1.0) -> nn.Module:
    return StableGPTNorm(config, config.hidden_size, gain) if present else nn.Identity()


def _layer_scale(config: StableGPTConfig) -> nn.Module:
    return nn.Identity() if config.layer_scale is None else StableGPTLayerScale(config)


class StableGPTMLP(nn.Module):
    """FC2(act(FC1 x)), with squared ReLU unless the config says otherwise."""

    def __init__(self, config: StableGPTConfig) -> None:
        super().__init__()
        self.up_proj = _linear(config, config.hidden_size, config.intermediate_size)
        self.act_fn = squared_relu if config.hidden_act == "relu2" else ACT2FN[config.hidden_act]
        self.down_proj = _linear(
            config, config.intermediate_size, config.hidden_size, closes_branch=True
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class StableGPTGatedMLP(StableGPTMLP):
    """FC2(act(gate x) * FC1 x), a GLU (Shazeer 2020)."""

    def __init__(self, config: StableGPTConfig) -> None:
        super().__init__(config)
        self.gate_proj = _linear(config, config.hidden_size, config.intermediate_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate = self.act_fn(self.gate_proj(hidden_states))
        return self.down_proj(gate * self.up_proj(hidden_states))


def _mlp(config: StableGPTConfig) -> StableGPTMLP:
    return StableGPTGatedMLP(config) if config.mlp_gated else StableGPTMLP(config)


class StableGPTDecoderLayer(GradientCheckpointingLayer):
    """Two branches, each pre-norm, map, post-norm, LayerScale, and the residual add."""

    def __init__(self, config: StableGPTConfig, layer_idx: int) -> None:
        super().__init__()
        gain = config.post_norm_gain
        self.input_layernorm = norm_slot(config, config.attention_pre_norm)
        self.self_attn = StableGPTAttention(config, layer_idx)
        self.post_attention_layernorm = norm_slot(config, config.attention_post_norm, gain)
        self.attention_scale = _layer_scale(config)
        self.pre_feedforward_layernorm = norm_slot(config, config.mlp_pre_norm)
        self.mlp = _mlp(config)
        self.post_feedforward_layernorm = norm_slot(config, config.mlp_post_norm, gain)
        self.mlp_scale = _layer_scale(config)
        self.parallel_residual = config.parallel_residual

    def forward(
        self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        branch, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        branch = self.attention_scale(self.post_attention_layernorm(branch))
        stream = hidden_states + branch
        read = mlp_stream(hidden_states, stream, self.parallel_residual)
        branch = self.mlp(self.pre_feedforward_layernorm(read))
        return stream + self.mlp_scale(self.post_feedforward_layernorm(branch))
