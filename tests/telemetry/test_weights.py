"""Laws of what telemetry says of weights, gradients, updates and Adam's moments."""

import math
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from hf_stable.telemetry import watch, weights

from .reference import Adam, Reference
from .steps import assert_numbers, draw, exact_copy, tiny, watched

BATCH = draw(1)[0][0]


def _norm(tensors: Any) -> float:
    return math.sqrt(sum(tensor.square().sum().item() for tensor in tensors))


def test_gradients_are_looked_at_before_clipping_and_as_the_optimizer_got_them() -> None:
    model = tiny()
    optimizer = Adam().build(model)
    with watch(model, optimizer, every=1) as watcher:
        model(**BATCH).loss.backward()
        before = model.lm_head.weight.grad.norm().item()
        everything = [parameter.grad.clone() for parameter in model.parameters()]
        watcher.gradients()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        found = watcher.end_step()
    count = sum(gradient.numel() for gradient in everything)
    assert _norm(everything) > 0.1
    assert found["head/weight_grad_l2"] == pytest.approx(before, rel=1e-12)
    assert found["optimizer/grad_rms"] == pytest.approx(0.01 / math.sqrt(count), rel=1e-4)


def test_without_the_call_gradients_are_those_of_the_optimizer() -> None:
    model = tiny()
    optimizer = Adam().build(model)
    with watch(model, optimizer, every=1) as watcher:
        model(**BATCH).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        clipped = model.lm_head.weight.grad.norm().item()
        optimizer.step()
        optimizer.zero_grad()
        found = watcher.end_step()
    assert found["head/weight_grad_l2"] == pytest.approx(clipped, rel=1e-12)


def test_an_optimizer_without_moments_has_updates_only() -> None:
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, every=1) as watcher:
        model(**BATCH).loss.backward()
        gradients = _norm(parameter.grad for parameter in model.parameters())
        optimizer.step()
        found = watcher.end_step()
    assert found["optimizer/update_l2"] == pytest.approx(0.1 * gradients, rel=1e-9)
    assert not [name for name in found if name.endswith(("adam_ratio", "grad_rms_over_eps"))]


@pytest.mark.parametrize("kind", ["fused", "foreach", "amsgrad", "adam", "accelerated"])
def test_kinds_of_adam_tell_the_same(kind: str) -> None:
    """Two steps, since the first one's ratios are all 1."""
    found = []
    for which in ("plain", kind):
        model = tiny("qk_norm")
        options: dict[str, Any] = {**vars(Adam()), "foreach": False}
        if which == "adam":
            optimizer: Any = torch.optim.Adam(
                model.parameters(), **{**options, "decoupled_weight_decay": True}
            )
        else:
            flags = {"foreach": which == "foreach", "amsgrad": which == "amsgrad"}
            flags |= {"fused": True, "foreach": None} if which == "fused" else {}
            optimizer = torch.optim.AdamW(model.parameters(), **{**options, **flags})
        if which == "accelerated":
            Accelerator(cpu=True)
            optimizer = AcceleratedOptimizer(AcceleratedOptimizer(optimizer))
        with watch(model, optimizer, every=1, bounds_every=0) as watcher:
            for (batch,) in draw(2, 1):
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                numbers = watcher.end_step()
        found.append(numbers)
    # amsgrad divides by another v in its update; in two steps it is another one for some elements.
    assert_numbers(found[1], found[0], 1e-9 if kind != "amsgrad" else 0.2)


def test_pieces_of_a_tensor_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = watched(tiny(), draw(), bounds_every=0)
    monkeypatch.setattr(weights, "_PIECE", 7)
    assert watched(tiny(), draw(), bounds_every=0) == whole


def test_an_element_without_gradients_has_ratio_zero() -> None:
    """Rows of the embedding whose tokens never came, or last only."""
    model = tiny()
    found = watched(model, [[BATCH]], Adam(weight_decay=0.0), bounds_every=0)[0]
    absent = 1 - len(BATCH["input_ids"][:, :-1].unique()) / model.config.vocab_size
    bins = found["embed.optimizer/adam_ratio"]
    assert bins == pytest.approx([absent, 0, 0, 0, 0, 0, 0, 1 - absent], abs=1e-12)
    assert sum(bins) == pytest.approx(1.0)


@pytest.mark.parametrize("is_given", [False, True])
def test_frozen_parameters_have_weights_only(is_given: bool) -> None:
    """Whether or not the optimizer has been given them."""
    model = tiny("qk_norm")
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    parameters = [each for each in model.parameters() if is_given or each.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    with watch(model, optimizer, every=1) as watcher:
        model(**BATCH).loss.backward()
        optimizer.step()
        found = watcher.end_step()
    of_first = {name for name in found if name.startswith("layers.0.")}
    told = ("grad", "update", "ratio")
    # A gradient in X passes only where X or what is before it trains.
    assert not [name for name in of_first | {"embed"} if any(word in name for word in told)]
    assert "layers.0.qkv/weight_l2" in found and "layers.1.qkv/weight_grad_l2" in found
    assert "embed.optimizer/update_l2" not in found
    trained = [each for each in model.parameters() if each.requires_grad]
    rms = _norm(each.grad for each in trained) / math.sqrt(sum(each.numel() for each in trained))
    assert found["optimizer/grad_rms"] == pytest.approx(rms, rel=1e-9)


def test_a_skipped_update_is_no_update() -> None:
    """As a gradient scaler skips it, for gradients that are not finite."""
    model = tiny()
    optimizer = Adam().build(model)
    with watch(model, optimizer, every=1, bounds_every=0) as watcher:
        model(**BATCH).loss.backward()
        watcher.gradients()
        optimizer.zero_grad()
        found = watcher.end_step()
        assert "head/weight_grad_l2" in found and "optimizer/update_l2" not in found
        model(**BATCH).loss.backward()
        optimizer.step()
        assert "optimizer/update_l2" in watcher.end_step()


def test_without_an_optimizer_there_are_weights_and_gradients() -> None:
    """Looked at when the loop says so, else when the step is over."""
    model, reference = tiny(), Reference(tiny(), Adam())
    with watch(model, every=1, bounds_every=0) as watcher:
        for batch in draw(1)[0]:
            model(**batch).loss.backward()
        watcher.gradients()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(parameter.grad)
        model.zero_grad()
        found = watcher.end_step()
    expected = reference.step(draw(1)[0], with_bounds=False)
    missing = {name for name in expected if "optimizer/" in name or "update" in name}
    assert_numbers(found, {key: expected[key] for key in expected.keys() - missing}, 1e-9)


def test_weights_that_are_shared_are_updated_once() -> None:
    model = tiny(tie_word_embeddings=True)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    found = watched(model, [[BATCH]], bounds_every=0)[0]
    changes = [new.detach() - old for new, old in zip(model.parameters(), before, strict=True)]
    assert found["optimizer/update_l2"] == pytest.approx(_norm(changes), rel=1e-9)
    assert found["head/weight_l2"] == found["embed/weight_l2"]
    assert "embed.optimizer/update_l2" in found and "head.optimizer/update_l2" not in found


def test_a_weight_of_zeros_has_no_update_ratio() -> None:
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    found = watched(model, [[BATCH]])[0]
    assert found["layers.1.fc2/weight_l2"] == 0.0
    assert "layers.1.fc2/weight_update_ratio" not in found
    assert found["layers.1.fc2/weight_spectral"] == 0.0
    assert found["layers.1.stream/mlp_bound"] == 1.0


def test_the_gain_of_sigma_reparam_is_the_one_before_the_step() -> None:
    model = tiny("sigma_reparam")
    twin = exact_copy(model)
    found = watched(model, [[BATCH]])[0]
    for index, layer in enumerate(twin.model.layers):
        assert found[f"layers.{index}.fc1/gain"] == layer.mlp.up_proj.gain.item()
        assert found[f"layers.{index}.fc1/gain"] != model.model.layers[index].mlp.up_proj.gain
