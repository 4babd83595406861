"""StableGPT once more, from the papers' formulas and a state dict, without modules or slots.

It shares no code with `hf_stable.model`: the formulas are written out where they are used.
"""

import math
from typing import Any

import torch
from torch import Tensor


def _norm(x: Tensor, weights: dict[str, Tensor], name: str, config: Any) -> Tensor:
    gain = weights[f"{name}.weight"] + (1.0 if config.zero_centered_norm else 0.0)
    if config.norm == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * gain
    return x + weights[f"{name}.bias"] if config.norm_bias else x


def _linear(x: Tensor, weights: dict[str, Tensor], name: str, config: Any) -> Tensor:
    weight = weights[f"{name}.weight"]
    if config.sigma_reparam:
        sigma = weights[f"{name}.u"] @ weight @ weights[f"{name}.v"]
        weight = weights[f"{name}.gain"] / sigma * weight
    y = x @ weight.T
    biased = config.linear_bias == "all" or (config.linear_bias == "qkv" and "qkv" in name)
    return y + weights[f"{name}.bias"] if biased else y


def _rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Each pair (i, i + D/2) is a complex number, turned by position * theta^(-2i/D)."""
    half = x.shape[-1] // 2
    rates = theta ** (-torch.arange(half, dtype=x.dtype) * 2 / x.shape[-1])
    angle = positions[:, None, :, None].to(x.dtype) * rates
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(
        torch.ones_like(angle), angle
    )
    return torch.cat((turned.real, turned.imag), dim=-1)


def _heads(
    x: Tensor, name: str, scope: str | None, weights: dict[str, Tensor], config: Any
) -> Tensor:
    if scope == "full":
        x = _norm(x, weights, name, config)
    x = x.view(*x.shape[:2], -1, config.head_dim).transpose(1, 2)
    return _norm(x, weights, name, config) if scope == "head" else x


def attention(x: Tensor, positions: Tensor, visible: Tensor, weights: Any, name: str, config: Any):
    """`visible`: (B, Q, K) boolean."""
    query_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    q, k, v = _linear(x, weights, f"{name}.qkv_proj", config).split(
        (query_width, kv_width, kv_width), -1
    )
    theta = config.rope_parameters["rope_theta"]
    q = _rope(_heads(q, f"{name}.q_norm", config.qk_norm, weights, config), positions, theta)
    k = _rope(_heads(k, f"{name}.k_norm", config.qk_norm, weights, config), positions, theta)
    v = _heads(v, f"{name}.v_norm", config.v_norm, weights, config)
    outputs = []
    for head in range(config.num_attention_heads):
        group = head // (config.num_attention_heads // config.num_key_value_heads)
        logits = q[:, head] @ k[:, group].transpose(-1, -2) / math.sqrt(config.head_dim)
        logits = config.attention_multiplier * logits
        cap = config.attn_logit_softcapping
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        logits = torch.where(visible, logits, -math.inf)
        probs = torch.exp(logits - logits.amax(-1, keepdim=True))
        probs = probs / probs.sum(-1, keepdim=True)
        gamma, zeta = config.attention_clip_gamma or 0.0, config.attention_clip_zeta
        if config.attention_clip_alpha is not None:
            gamma = -config.attention_clip_alpha / visible.sum(-1, keepdim=True).double()
        probs = torch.clip((zeta - gamma) * probs + gamma, 0.0, 1.0)
        outputs.append(probs @ v[:, group])
    return _linear(torch.cat(outputs, -1), weights, f"{name}.o_proj", config)


def hidden_states(
    weights: dict[str, Tensor], config: Any, ids: Tensor, positions=None, visible=None
):
    """Final hidden states (B, Q, C)."""
    batch, length = ids.shape
    if positions is None:
        positions = torch.arange(length).expand(batch, length)
    if visible is None:
        visible = torch.ones(length, length, dtype=torch.bool).tril().expand(batch, length, length)
    scale = config.embedding_scale
    x = weights["model.embed_tokens.weight"][ids]
    x = x * (math.sqrt(config.hidden_size) if scale == "sqrt_hidden" else scale)
    if config.embedding_norm:
        x = _norm(x, weights, "model.embed_norm", config)
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        y = x
        if config.attention_pre_norm:
            y = _norm(y, weights, f"{name}.input_layernorm", config)
        y = attention(y, positions, visible, weights, f"{name}.self_attn", config)
        if config.attention_post_norm:
            y = _norm(y, weights, f"{name}.post_attention_layernorm", config)
        if config.layer_scale is not None:
            y = y * weights[f"{name}.attention_scale.weight"]
        stream = x + y
        y = x if config.parallel_residual else stream
        if config.mlp_pre_norm:
            y = _norm(y, weights, f"{name}.pre_feedforward_layernorm", config)
        hidden = _linear(y, weights, f"{name}.mlp.up_proj", config)
        if config.mlp_gated:
            gate = torch.relu(_linear(y, weights, f"{name}.mlp.gate_proj", config)) ** 2
            y = gate * hidden
        else:
            y = torch.relu(hidden) ** 2
        y = _linear(y, weights, f"{name}.mlp.down_proj", config)
        if config.mlp_post_norm:
            y = _norm(y, weights, f"{name}.post_feedforward_layernorm", config)
        if config.layer_scale is not None:
            y = y * weights[f"{name}.mlp_scale.weight"]
        x = stream + y
    return _norm(x, weights, "model.norm", config)


def logits(
    weights: dict[str, Tensor], config: Any, ids: Tensor, positions=None, visible=None
) -> Tensor:
    """(B, Q, V)."""
    head = weights["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    out = hidden_states(weights, config, ids, positions, visible) @ head.T
    cap = config.final_logit_softcapping
    return out if cap is None else cap * torch.tanh(out / cap)


def loss(weights: dict[str, Tensor], config: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross entropy of the next token and the z-loss term."""
    out = logits(weights, config, ids)[:, :-1]
    log_z = torch.log(torch.exp(out).sum(-1))
    picked = torch.gather(out, -1, ids[:, 1:, None])[..., 0]
    return (log_z - picked).mean(), config.z_loss * log_z.square().mean()
