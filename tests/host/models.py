"""The presets that Transformers' own model tests are held against here, as tiny fp32 models."""

from typing import Any

import torch
from transformers import PreTrainedModel

from hf_stable import StableGPTConfig, StableGPTForCausalLM

from ..techniques import GEOMETRY

PRESETS = ["baseline", "qk_norm_cap", "qkv_norm", "qk_fc_norm", "sigma_reparam", "soft_clip"]
# What only the eager function computes: no fused kernel of PyTorch's has a cap or a clip.
EAGER_ONLY = {"qk_norm_cap": "attn_logit_softcapping", "soft_clip": "attention_clip_gamma"}


def make_config(preset: str, **fields: Any) -> StableGPTConfig:
    return StableGPTConfig.from_preset(
        preset, **{**GEOMETRY, "pad_token_id": 0, "initializer_range": 0.2, **fields}
    )


def make(
    preset: str,
    kind: type[PreTrainedModel] = StableGPTForCausalLM,
    attn: str | None = None,
    **fields: Any,
) -> Any:
    """A model in eval mode, with weights large enough for its technique to bite."""
    torch.manual_seed(0)
    model = kind._from_config(make_config(preset, **fields), attn_implementation=attn)
    return model.float().eval()


def prompt(batch: int = 2, length: int = 5) -> torch.Tensor:
    """Token ids without the padding's id 0."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, GEOMETRY["vocab_size"], (batch, length), generator=generator)
