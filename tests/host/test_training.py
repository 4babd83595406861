"""Training by others' loops: it learns, and recomputation, frozen parts and Trainer do as told.

That checkpointing changes no bit, that accumulation is exact and how half precision trains:
tests/model/test_modeling.py.
"""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from .models import PRESETS, make, prompt


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_batch_is_learned_by_heart_and_generated(preset: str, checkpointing: bool) -> None:
    model = make(preset, initializer_range=0.02).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
        assert model.is_gradient_checkpointing
    pattern = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = model(pattern, labels=pattern).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    model.eval()
    generated = model.generate(pattern[:, :3], max_new_tokens=9, do_sample=False)
    assert torch.equal(generated, pattern)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_parameter_has_a_gradient(preset: str) -> None:
    model = make(preset).train()
    model(prompt(), labels=prompt()).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and (parameter.grad != 0).any(), name


def test_checkpointing_is_switched_on_and_off() -> None:
    model = make("baseline").train()
    for on in (True, False):
        model.gradient_checkpointing_enable() if on else model.gradient_checkpointing_disable()
        assert all(layer.gradient_checkpointing == on for layer in model.model.layers)


def test_checkpointing_reaches_adapters_behind_frozen_embeddings() -> None:
    """What PEFT asks for: the input of the first block must require gradients."""
    model = make("qk_norm_cap").train()
    model.requires_grad_(False)
    weight = model.model.layers[0].mlp.up_proj.weight.requires_grad_()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    model(prompt(), labels=prompt()).loss.backward()
    assert (weight.grad != 0).any()
    assert model.get_input_embeddings().weight.grad is None


def test_trainer_decays_gains_by_name_as_documented(tmp_path) -> None:
    """Why hf_stable.optim makes groups of its own: Trainer goes by names, and by "norm" alone."""
    arguments = TrainingArguments(output_dir=tmp_path, report_to=[], use_cpu=True)
    fields = {"layer_scale": 0.1, "sigma_reparam": True, "norm_bias": True, "embedding_norm": True}
    trainer = Trainer(model=make("qk_fc_norm", **fields), args=arguments)
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    everything = {name for name, _ in trainer.model.named_parameters()}
    spared = {name for name in everything if "norm" in name}
    assert decayed == everything - spared
    ours = {"attention_scale.weight", "mlp_scale.weight", "mlp.up_proj.gain"}
    assert all(any(name.endswith(each) for name in decayed) for each in ours)
