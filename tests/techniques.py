"""The table of techniques: one row a setting of one field, with what switching it on must change.

`test_every_field_has_a_row` fails when a field of the config has no row here.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from hf_stable import StableGPTConfig, StableGPTForCausalLM

GEOMETRY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Technique:
    """A field switched on.

    Attributes:
        room: one of the five rooms.
        field: the config's field that this row is about.
        on: what to set; fields beyond `field` are what it needs to mean something.
        beside: fields set both with and without the technique.
        changes: "logits" of the same weights, their "gradient", the "loss", or the "init".
    """

    room: Literal["branch", "linear", "score", "head", "init"]
    field: str
    on: dict[str, Any]
    changes: Literal["logits", "gradient", "loss", "init"] = "logits"
    beside: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return ",".join(f"{key}={value}" for key, value in self.on.items())


def _row(room: Any, name: str, value: Any, changes: Any = "logits", **beside: Any) -> Technique:
    return Technique(room, name, {name: value}, changes, beside)


TECHNIQUES = [
    _row("branch", "norm", "rmsnorm"),
    _row("branch", "norm_bias", True, "init"),
    _row("branch", "norm_eps", 0.1),
    _row("branch", "zero_centered_norm", True, "init"),
    _row("branch", "attention_pre_norm", False),
    _row("branch", "mlp_pre_norm", False),
    _row("branch", "attention_post_norm", True),
    _row("branch", "mlp_post_norm", True),
    _row("branch", "post_norm_gain", 0.3, "init", attention_post_norm=True, mlp_post_norm=True),
    _row("branch", "layer_scale", 0.1),
    _row("branch", "embedding_scale", "sqrt_hidden"),
    _row("branch", "embedding_scale", 3.0),
    _row("branch", "embedding_norm", True),
    _row("branch", "embedding_detach", 0.1, "gradient"),
    _row("branch", "parallel_residual", True),
    _row("linear", "mlp_gated", True),
    _row("linear", "linear_bias", "qkv", "init"),
    _row("linear", "linear_bias", "all", "init"),
    _row("linear", "sigma_reparam", True),
    _row("linear", "sigma_gain_init", "spectral", "init", sigma_reparam=True),
    _row("linear", "mup_base_width", 8, "init"),
    _row("score", "qk_norm", "head"),
    _row("score", "qk_norm", "full"),
    _row("score", "v_norm", "head"),
    _row("score", "v_norm", "full"),
    _row("score", "attention_multiplier", 0.5),
    _row("score", "attn_logit_softcapping", 0.5),
    _row("score", "attention_clip_gamma", -0.08),
    _row("score", "attention_clip_zeta", 1.2),
    _row("score", "attention_clip_alpha", 0.9),
    _row("head", "final_logit_softcapping", 0.2),
    _row("head", "z_loss", 0.1, "loss"),
    _row("init", "initializer", "small", "init"),
    _row("init", "initializer", "fan_in", "init"),
    _row("init", "initializer_range", 0.5, "init"),
    _row("init", "embedding_std", 1.0, "init"),
    _row("init", "depth_scaled_init", False, "init"),
]


def build(seed: int = 0, attn: str | None = None, **fields: Any) -> StableGPTForCausalLM:
    """A tiny float64 model in eval mode, with weights large enough for every technique to bite."""
    if "initializer" not in fields:
        fields = {"initializer_range": 0.2, **fields}
    config = StableGPTConfig(**{**GEOMETRY, **fields})
    return from_config(config, seed, attn)


def from_config(
    config: StableGPTConfig, seed: int = 0, attn: str | None = None
) -> StableGPTForCausalLM:
    torch.manual_seed(seed)
    model = StableGPTForCausalLM._from_config(config, attn_implementation=attn)
    return model.double().eval()


def tokens(batch: int = 2, length: int = 13, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, GEOMETRY["vocab_size"], (batch, length), generator=generator)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """L2 norm of the difference over the L2 norm of what is expected."""
    scale = expected.double().norm().clamp(min=1e-300)
    return ((actual.double() - expected.double()).norm() / scale).item()
