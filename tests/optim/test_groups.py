"""Parameter groups."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_stable import optim

from ..techniques import build

EVERYTHING = {
    "layer_scale": 0.1,
    "qk_norm": "head",
    "sigma_reparam": True,
    "norm_bias": True,
    "attention_post_norm": True,
}


def _groups(model, **options) -> dict[str, dict]:
    settings = {"learning_rate": 0.01, "weight_decay": 0.1, **options}
    return {group["name"]: group for group in optim.parameter_groups(model, **settings)}


def test_every_parameter_is_in_exactly_one_group() -> None:
    model = build(**EVERYTHING)
    members = [p for group in _groups(model).values() for p in group["params"]]
    assert len({id(p) for p in members}) == len(members) == len(list(model.parameters()))


def test_vectors_are_not_decayed_unless_asked() -> None:
    model = build(**EVERYTHING)
    for name, parameter in model.named_parameters():
        vector = any(part in name for part in ("norm", "scale", "gain"))
        group = next(
            group
            for group in _groups(model).values()
            if any(p is parameter for p in group["params"])
        )
        assert (group["weight_decay"] == 0) == vector, name
    assert _groups(model, decay_vectors=True)["vectors"]["weight_decay"] == 0.1
    assert _groups(model, decay_embeddings=False)["embeddings"]["weight_decay"] == 0


def test_a_tied_head_belongs_to_the_embedding() -> None:
    model = build(tie_word_embeddings=True)
    (weight,) = _groups(model)["embeddings"]["params"]
    assert weight is model.lm_head.weight


def test_frozen_parameters_are_left_out() -> None:
    model = build()
    model.model.embed_tokens.weight.requires_grad_(False)
    assert "embeddings" not in _groups(model)


@pytest.mark.parametrize("rate", [1e-3, 1e-1])
def test_independent_decay_does_not_depend_on_the_learning_rate(rate: float) -> None:
    """Without a gradient, one step takes off weight_decay of the weight, whatever the peak is."""
    model = build(mup_base_width=8)
    groups = optim.parameter_groups(
        model, learning_rate=rate, weight_decay=1e-4, weight_decay_mode="independent"
    )
    optimizer = optim.adamw(groups)
    before = {id(p): p.detach().clone() for p in model.parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optim.set_learning_rate(optimizer, 0.5)
    optimizer.step()
    for group in groups:
        kept = 1 - 0.5 * (0.0 if group["name"] == "vectors" else 1e-4)
        for parameter in group["params"]:
            torch.testing.assert_close(parameter.detach(), kept * before[id(parameter)])


def test_mup_scales_the_rate_of_matrices_only() -> None:
    groups = _groups(build(mup_base_width=8))
    assert groups["matrices"]["lr"] == pytest.approx(0.01 * 8 / 32)
    assert groups["embeddings"]["lr"] == groups["vectors"]["lr"] == 0.01


def test_any_transformers_model_has_groups() -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    groups = _groups(LlamaForCausalLM(config))
    assert [len(groups[name]["params"]) for name in ("matrices", "embeddings", "vectors")] == [
        8,
        1,
        3,
    ]


def test_fused_adamw_is_adamw() -> None:
    models = [build(), build()]
    optimizers = [
        optim.adamw(optim.parameter_groups(models[0], learning_rate=0.01, weight_decay=0.1)),
        torch.optim.AdamW(models[1].parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1),
    ]
    for group in optimizers[0].param_groups:
        group["weight_decay"] = 0.1
    assert optimizers[0].defaults["fused"]
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            model.zero_grad()
            for index, parameter in enumerate(model.parameters()):
                parameter.grad = torch.full_like(parameter, math.sin(index + 1))
            optimizer.step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
