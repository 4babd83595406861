"""Modules that fill the slots of a StableGPT, for four groups of techniques, and initial weights.

Invariant: a module reads its fields at construction only.
"""

# Transformers types what a config resolves, and what a forward fills in, as Optional.
# pyright: reportOptionalOperand=false, reportOptionalSubscript=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportTypedDictNotRequiredAccess=false, reportPrivateImportUsage=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from .configuration_stable_gpt import StableGPTConfig
from .functional_stable_gpt import scale_gradient, softcap, statistics_dtype, summed, whole
from .loss_stable_gpt import LINEAR_CROSS_ENTROPY_FUNCTIONS, linear_cross_entropy

# Standard deviation of a standard normal truncated at two sigma.
_TRUNCATED_STD = 0.87962566103423978


# branch: how the stream enters, leaves and is scaled ------------------------------------------


class StableGPTEmbedding(nn.Embedding):
    """Embedding whose output is scaled (Scaled Embed) and whose gradient is (Embed Detach)."""

    def __init__(self, config: StableGPTConfig) -> None:
        # No padding index: a tokenizer that pads with its end of text would never train that row.
        super().__init__(config.vocab_size, config.hidden_size)
        self.multiplier = config.embedding_multiplier
        self.gradient_factor = config.embedding_detach

    @property
    def embed_scale(self) -> torch.Tensor:
        """The multiplier, 0-d, under the name that PEFT scales an adapter of this layer by.

        On a CPU, for vLLM reads its value while the weight is on the meta device.
        """
        return torch.tensor(self.multiplier)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        embedded = scale_gradient(summed(super().forward(input_ids)), self.gradient_factor)
        return embedded if self.multiplier == 1.0 else embedded * self.multiplier


class StableGPTNorm(nn.Module):
    """LayerNorm or RMSNorm over the last axis, with statistics in at least fp32.

    Its name must not contain "LayerNorm" or "RMSNorm": Transformers sets the gain of such classes
    to 1, which is a gain of 2 where gains are stored as their distance from 1.
    """

    def __init__(self, config: StableGPTConfig, width: int, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if config.norm_bias else None
        self.shape = (width,)
        self.eps = config.norm_eps
        self.is_rms = config.norm == "rmsnorm"
        self.origin = 1.0 if config.zero_centered_norm else 0.0
        self.initial_gain = gain

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = statistics_dtype(hidden_states)
        gain = self.weight.to(wide) + self.origin
        bias = None if self.bias is None else self.bias.to(wide)
        if self.is_rms:
            normed = nn.functional.rms_norm(hidden_states.to(wide), self.shape, gain, self.eps)
            normed = normed if bias is None else normed + bias
        else:
            normed = nn.functional.layer_norm(
                hidden_states.to(wide), self.shape, gain, bias, self.eps
            )
        return normed.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{self.shape[0]}, eps={self.eps}, {'rms' if self.is_rms else 'layer'}norm"


class StableGPTLayerScale(nn.Module):
    """Per-channel gain of a branch (Touvron et al. 2021, CaiT, section 2)."""

    def __init__(self, config: StableGPTConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self.initial_gain = config.layer_scale

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.weight.to(hidden_states.dtype)


# linear: how a map is parametrised ------------------------------------------------------------


class StableGPTLinear(nn.Linear):
    """Linear map, without bias unless asked, that knows how small its weight begins."""

    def __init__(
        self, in_features: int, out_features: int, init_scale: float = 1.0, bias: bool = False
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.init_scale = init_scale


# score: q, k, v before their product ----------------------------------------------------------


class StableGPTHeadNorm(StableGPTNorm):
    """Norm of each head by itself, one gain shared by all heads; takes and gives (..., H * D)."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        heads = hidden_states.unflatten(-1, (-1, self.shape[0]))
        return super().forward(heads).flatten(-2)


class StableGPTRotaryEmbedding(nn.Module):
    """cos and sin of the rotary position embedding, in the forms that Transformers knows."""

    def __init__(self, config: StableGPTConfig) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        compute: Callable[..., Any] = self.compute_default_rope_parameters
        if self.rope_type != "default":
            compute = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = compute(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(
        config: StableGPTConfig,
        device: Any = None,
        dtype: torch.dtype = torch.float32,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, float]:
        """Inverse frequencies theta^(-2i / R), with R the rotated share of `head_dim`."""
        share = config.rope_parameters.get("partial_rotary_factor", 1.0)
        width = int(config.head_dim * share)
        exponents = torch.arange(0, width, 2, dtype=dtype, device=device) / width
        return config.rope_parameters["rope_theta"] ** -exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(
        self, hidden_states: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B or 1, 1, Q, R) each, in the dtype of `hidden_states`, computed in at least fp32."""
        wide = statistics_dtype(hidden_states)
        with torch.autocast(hidden_states.device.type, enabled=False):
            angles = position_ids[..., None].to(wide) * self._rates(hidden_states.device, wide)
            angles = torch.cat((angles, angles), dim=-1)[:, None]
            cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)

    def _rates(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """Return inverse frequencies, recomputed if possible: `model.to(bf16)` rounds buffers."""
        if self.rope_type != "default":
            return self.inv_freq.to(device, dtype)
        return self.compute_default_rope_parameters(self.config, device, dtype)[0]


# head: logits and loss ------------------------------------------------------------------------


class StableGPTHead(StableGPTLinear):
    """Logits before their cap, as of any linear layer, or the loss.

    The head computes the loss, so sharded training gathers its weight in its forward, and training
    never holds logits of all tokens.
    """

    def __init__(self, config: StableGPTConfig) -> None:
        super().__init__(config.hidden_size, config.vocab_size)
        self.cap = config.final_logit_softcapping
        self.z_loss = config.z_loss

    def forward(
        self,
        hidden_states: torch.Tensor,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Logits (..., V) without `shift_labels`; with them (loss, cross entropy, z-loss), 0-d."""
        if shift_labels is not None:
            device = hidden_states.device.type
            loss_function = LINEAR_CROSS_ENTROPY_FUNCTIONS.get(device, linear_cross_entropy)
            return loss_function(
                hidden_states.flatten(0, -2),
                whole(self.weight),
                shift_labels.to(hidden_states.device).flatten(),
                num_items=num_items_in_batch,
                cap=self.cap,
                z_loss=self.z_loss,
            )
        return super().forward(hidden_states)


def cap_logits(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Logits of the vocabulary with their tanh cap; None is off."""
    # The cap in fp32, as in the loss: bf16 would round a capped logit of 30 to eighths.
    return logits if cap is None else softcap(logits.to(statistics_dtype(logits)), cap)


# init: how weights begin ----------------------------------------------------------------------


def embedding_std(config: StableGPTConfig) -> float:
    """`embedding_std`, or the initializer's (small: Takase et al.; fan_in: Wortsman et al.)."""
    if config.embedding_std is not None:
        return config.embedding_std
    stds = {
        "normal": config.initializer_range,
        "small": math.sqrt(2 / (5 * config.hidden_size)),
        "fan_in": 1 / math.sqrt(config.hidden_size),
    }
    return stds[config.initializer]


def init_matrix(config: StableGPTConfig, linear: StableGPTLinear) -> None:
    if linear.bias is not None:
        init.zeros_(linear.bias)
    if config.initializer == "fan_in":
        std = linear.init_scale / math.sqrt(linear.in_features) / _TRUNCATED_STD
        init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
        return
    std = math.sqrt(2 / (5 * config.hidden_size))
    if config.initializer == "normal":
        # muP wants variances of 1 / fan_in; the other initializers have them at any width.
        std = config.initializer_range * math.sqrt(config.learning_rate_multiplier)
    init.normal_(linear.weight, std=std * linear.init_scale)
