"""The models whose training steps are timed, and one step of them."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import Device
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM

import hf_stable  # noqa: F401  # registers the attention backends
from hf_stable.kernels.backends import default_attention
from hf_stable.model import StableGPTConfig, StableGPTForCausalLM
from hf_stable.model.configuration_stable_gpt import PRESETS
from hf_stable.optim import adamw, parameter_groups

# The model of recipes/base/830m.yaml; a test holds the two together.
MODEL: dict[str, Any] = {
    "vocab_size": 256_000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "hidden_act": "relu2",
    "norm": "layernorm",
    "norm_bias": True,
    "norm_eps": 1e-6,
}
DRY_MODEL = {
    **MODEL,
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}

E1 = {**PRESETS["qk_norm_cap"], **PRESETS["z_loss"]}
# Everything that a run would combine. A clip takes the place of the softmax and has rows of its
# own; an embedding's scale would be undone by its norm; muP changes numbers only;
# a gated MLP is another architecture.
ALL = {
    **E1,
    **PRESETS["qk_fc_norm"],
    **PRESETS["soft_temp"],
    **PRESETS["layer_scale"],
    **PRESETS["sigma_reparam"],
    **PRESETS["embed_norm"],
    **PRESETS["embed_detach"],
    "v_norm": "head",
}
CLIP_ALPHA = {"attention_clip_alpha": 1.0}
"""Of near uniform rows, as at initialization, half the keys stay active: no tile is skipped."""


@dataclass(frozen=True)
class Shape:
    batch: int
    length: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length


MICRO_BATCH = Shape(8, 4096)
DRY_SHAPE = Shape(2, 16)


def stable_gpt(
    geometry: dict[str, Any], techniques: dict[str, Any], device: Device, attention: str | None
) -> StableGPTForCausalLM:
    """A StableGPT on the device; None is the backend that training would take."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # rows that a clip kills are meant here
        config = StableGPTConfig(**{**geometry, **techniques})
    name = attention or default_attention(config, device.torch, packed=False)
    config._attn_implementation = name
    with device.torch:
        return StableGPTForCausalLM(config).train()


def gemma2(geometry: dict[str, Any], device: Device) -> Gemma2ForCausalLM:
    """Transformers' Gemma 2 with our width, depth and heads.

    A gated MLP has three matrices, so it is 8/3 wide where ours is 4 wide. All layers attend to the
    whole sequence, and the output logits are not capped, like ours.
    """
    width, heads = geometry["hidden_size"], geometry["num_attention_heads"]
    config = Gemma2Config(
        vocab_size=geometry["vocab_size"],
        hidden_size=width,
        intermediate_size=8 * width // 3 // 8 * 8,
        num_hidden_layers=geometry["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        query_pre_attn_scalar=width // heads,
        max_position_embeddings=geometry["max_position_embeddings"],
        layer_types=["full_attention"] * geometry["num_hidden_layers"],
        attn_logit_softcapping=50.0,
        final_logit_softcapping=None,
        tie_word_embeddings=False,
    )
    config._attn_implementation = "eager"
    with device.torch:
        return Gemma2ForCausalLM(config).train()


def flops_per_token(model: Any, length: int) -> float:
    """FLOPs of a training token: 6 a weight of a product, and attention to half the sequence."""
    config = model.config
    matrices = sum(
        module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear)
    )
    width = config.num_attention_heads * config.head_dim
    return 6.0 * matrices + 6.0 * config.num_hidden_layers * length * width


class Training:
    """A model with its optimizer, and steps of it on random tokens.

    Args:
        compiled: whether each block is compiled; on a CPU it is traced only, to save time.
    """

    def __init__(self, model: Any, shape: Shape, device: Device, compiled: bool) -> None:
        self.model, self.shape, self._device = model, shape, device
        groups = parameter_groups(model, learning_rate=3e-4, weight_decay=0.1)
        self._optimizer = adamw(groups)
        size = (3, shape.batch, shape.length)
        self._ids = torch.randint(0, model.config.vocab_size, size, device=device.torch)
        if compiled:
            backend = "inductor" if device.cuda else "eager"
            for layer in model.model.layers:
                layer.compile(fullgraph=True, dynamic=False, backend=backend)

    def __call__(self, number: int) -> None:
        ids = self._ids[number % 3]
        kind = self._device.torch.type
        with torch.autocast(kind, torch.bfloat16, enabled=self._device.cuda):
            loss = self.model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        parameters = list(self.model.parameters())
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        if norm.isfinite().item():  # as in training, where the host decides about the step here
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def fitting(build: Callable[[Shape], Training], shape: Shape, device: Device) -> Training:
    """A training at the largest micro-batch that fits, found by halving."""
    batch = shape.batch
    while batch >= 1:
        try:
            training = build(Shape(batch, shape.length))
            training(0)
            return training
        except torch.OutOfMemoryError:
            training = None
        device.free()
        batch //= 2
    raise torch.OutOfMemoryError("not even one sequence fits")
