"""Laws of gradient clipping."""

import pytest
import torch

from hf_stable import optim

from ..techniques import build
from .steps import gradients, optimizer_of


def _norms(optimizer: torch.optim.Optimizer) -> list[float]:
    return [
        torch.cat([parameter.grad.flatten() for parameter in group["params"]]).norm().item()
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("by", ["global", "group"])
def test_the_norm_of_all_gradients_is_returned(by: optim.ClipBy) -> None:
    model = build()
    optimizer = optimizer_of(model)
    for _ in gradients(model, 1):
        expected = torch.tensor(_norms(optimizer)).norm().item()
        for max_norm in (None, 1e9, 1.0):
            norm = optim.clip_gradients(model, optimizer, max_norm, by)
            assert norm.shape == ()
            assert norm.item() == pytest.approx(expected)


def test_groups_are_clipped_each_by_itself() -> None:
    """The vectors are below the bound and stay as they are; globally all would be scaled."""
    model = build()
    optimizer = optimizer_of(model)
    for _ in gradients(model, 1):
        before = _norms(optimizer)
        kept = [parameter.grad.clone() for parameter in optimizer.param_groups[2]["params"]]
        bound = (before[1] + before[2]) / 2
        assert before[0] > before[1] > bound > before[2]
        optim.clip_gradients(model, optimizer, bound, "group")
    after = _norms(optimizer)
    assert after[:2] == pytest.approx([bound, bound], rel=1e-6)
    now = [parameter.grad for parameter in optimizer.param_groups[2]["params"]]
    assert all(one.equal(other) for one, other in zip(now, kept, strict=True))


def test_global_clipping_keeps_the_direction() -> None:
    model = build()
    optimizer = optimizer_of(model)
    for _ in gradients(model, 1):
        before = _norms(optimizer)
        optim.clip_gradients(model, optimizer, 1.0)
    after = _norms(optimizer)
    assert torch.tensor(after).norm().item() == pytest.approx(1.0, rel=1e-5)
    ratios = [one / other for one, other in zip(after, before, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * 3)


@pytest.mark.parametrize("by", ["global", "group"])
def test_a_gradient_that_is_not_finite_shows_in_the_norm(by: optim.ClipBy) -> None:
    model = build()
    optimizer = optimizer_of(model)
    for _ in gradients(model, 1):
        model.lm_head.weight.grad[0, 0] = torch.nan
    assert optim.clip_gradients(model, optimizer, 1.0, by).isnan()


def test_a_late_norm_begins_at_its_step() -> None:
    norms = [optim.max_grad_norm_at(step, 1.0, 0.3, 2) for step in range(4)]
    assert norms == [1.0, 1.0, 0.3, 0.3]
    assert optim.max_grad_norm_at(9, 1.0, None, None) == 1.0
    assert [optim.max_grad_norm_at(step, None, 0.3, 1) for step in range(2)] == [None, 0.3]
