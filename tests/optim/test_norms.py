"""Laws of what the optimizer's state tells."""

import pytest
import torch

from hf_stable import optim
from hf_stable.optim import shards

from ..techniques import build
from .steps import gradients, optimizer_of, weights


def _norm(after: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> float:
    squares = [(after[key].double() - before[key].double()).square().sum() for key in before]
    return torch.stack(squares).sum().sqrt().item()


@pytest.mark.parametrize("name", ["adamw", "stable_adamw"])
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_update_norm_is_that_of_the_difference_of_the_weights(
    name: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(shards._PIECE, "cpu", 100)  # several pieces, the last one shorter
    model = build(layer_scale=0.1)
    optimizer = optimizer_of(model, name)
    optim.set_learning_rate(optimizer, factor)
    for _ in gradients(model, 4, growth=3.0):
        before = weights(model)
        optimizer.step()
        norm = optim.update_norm(optimizer)
        assert norm.shape == ()
        assert norm.item() == pytest.approx(_norm(weights(model), before), rel=1e-10)


def test_update_norm_of_single_precision() -> None:
    model = build().float()
    optimizer = optimizer_of(model)
    for _ in gradients(model, 3):
        before = weights(model)
        optimizer.step()
    assert optim.update_norm(optimizer).item() == pytest.approx(
        _norm(weights(model), before), rel=1e-5
    )


def test_update_norm_leaves_out_what_did_not_move() -> None:
    model = build()
    optimizer = optimizer_of(model)
    for step in gradients(model, 2):
        if step == 1:
            model.lm_head.weight.grad = None
        before = weights(model)
        optimizer.step()
    norm = optim.update_norm(optimizer).item()
    assert norm == pytest.approx(_norm(weights(model), before), rel=1e-10)


def test_a_matrix_in_another_layout_counts_and_moves() -> None:
    weight = torch.nn.Parameter(torch.arange(6.0, dtype=torch.float64).view(2, 3).T)
    assert not weight.is_contiguous()
    group = {"name": "all", "params": [weight], "lr": 0.1, "weight_decay": 0.0}
    optimizer = optim.stable_adamw([group])
    before = weight.detach().clone()
    weight.grad = torch.ones(3, 2, dtype=torch.float64)
    optimizer.step()
    difference = (weight - before).norm().item()
    assert difference == pytest.approx(0.1 * 6**0.5)
    assert optim.update_norm(optimizer).item() == pytest.approx(difference)


def test_fractions_below_eps_count_elements() -> None:
    model = build()
    optimizer = optimizer_of(model, eps=1e-3)
    assert optim.fractions_below_eps(optimizer) == {}
    for _ in gradients(model, 3):
        for parameter in model.parameters():
            flat = parameter.grad.view(-1)
            flat[:] = 1e-2
            flat[: len(flat) // 4] = 1e-4
        optimizer.step()
    found = optim.fractions_below_eps(optimizer)
    assert {name: value.item() for name, value in found.items()} == {
        "matrices": 0.25,
        "embeddings": pytest.approx(0.25, abs=1e-3),
        "vectors": 0.25,
    }


def test_eps_is_warned_of_when_it_decides_most_of_a_group() -> None:
    assert optim.eps_warning({"matrices": 0.4, "embeddings": 0.9, "vectors": 0.0}, 1e-8) is None
    text = optim.eps_warning({"matrices": 0.7, "embeddings": 0.9, "vectors": 0.6}, 1e-8)
    assert text is not None
    assert "70% of the matrices and 60% of the vectors" in text
    assert "embeddings" not in text
    assert "optimizer.eps 1e-08" in text
