"""The mathematics: each function against a direct float64 computation, and its memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_stable.model import functional_stable_gpt as F

from ..techniques import relative_error


def _scores(*shape: int, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def _causal(length: int) -> torch.Tensor:
    return torch.ones(1, 1, length, length, dtype=torch.bool).tril()


@given(cap=st.floats(0.1, 100.0), scale=st.floats(0.01, 1e4))
@settings(max_examples=50, deadline=None)
def test_softcap_bounds_and_keeps_order(cap: float, scale: float) -> None:
    logits = torch.linspace(-scale, scale, 101, dtype=torch.float64)
    capped = F.softcap(logits, cap)
    assert (capped.abs() <= cap).all()
    assert (capped.diff() >= 0).all()


def test_softcap_is_the_identity_for_small_logits() -> None:
    logits = torch.linspace(-0.01, 0.01, 11, dtype=torch.float64)
    assert relative_error(F.softcap(logits, 50.0), logits) < 1e-7


def test_capped_scores_still_hide_the_future() -> None:
    probs, _ = F.attention_probabilities(_scores(2, 3, 7, 7, scale=100.0), _causal(7), softcap=5.0)
    assert (probs.triu(1) == 0).all()
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 3, 7, dtype=torch.float64))


def test_clip_reaches_exact_zero_and_one() -> None:
    probs, _ = F.attention_probabilities(
        _scores(1, 2, 32, 32, scale=8.0), _causal(32), clip_gamma=-0.03, clip_zeta=1.03
    )
    visible = probs[_causal(32).expand_as(probs)]
    assert (visible == 0).any() and (visible == 1).any() and (visible >= 0).all()
    assert (visible <= 1).all()


def test_clipped_entries_have_no_gradient() -> None:
    probs = torch.tensor([[[[0.01, 0.5, 0.99]]]], dtype=torch.float64, requires_grad=True)
    count = torch.tensor([[[[3]]]])
    F.clip_probabilities(probs, count, -0.03, 1.03, None).sum().backward()
    assert probs.grad.flatten().tolist() == [0.0, pytest.approx(1.06), 0.0]


def test_alpha_is_gamma_for_each_row() -> None:
    scores = _scores(1, 1, 9, 9)
    by_alpha, _ = F.attention_probabilities(scores.clone(), _causal(9), clip_alpha=0.4)
    for row in range(9):
        gamma = -0.4 / (row + 1)
        by_gamma, _ = F.attention_probabilities(scores.clone(), _causal(9), clip_gamma=gamma)
        torch.testing.assert_close(by_alpha[..., row, :], by_gamma[..., row, :])


def test_rows_without_a_visible_key_are_zero() -> None:
    mask = _causal(5).clone()
    mask[..., 2, :] = False
    query, key, value = (_scores(2, 3, 5, 4, seed=seed) for seed in range(3))
    module = nn.Module()
    whole, _ = F.attention_forward(module, query, key, value, _causal(5), 0.5)
    for given_mask in (mask, torch.zeros(1, 1, 5, 5).masked_fill(~mask, torch.finfo().min)):
        output, _ = F.attention_forward(module, query, key, value, given_mask, 0.5)
        assert (output[:, 2] == 0).all()
        torch.testing.assert_close(output[:, [0, 1, 3, 4]], whole[:, [0, 1, 3, 4]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_probabilities_are_at_least_fp32(dtype: torch.dtype) -> None:
    scores = _scores(1, 1, 3, 3)
    assert F.attention_probabilities(scores.to(dtype), _causal(3))[0].dtype == torch.float32
    assert F.attention_probabilities(scores, _causal(3))[0].dtype == torch.float64


def test_squared_relu_equals_its_formula_and_saves_one_tensor() -> None:
    hidden = _scores(4, 9).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        output = F.squared_relu(hidden)
    output.square().sum().backward()
    expected = hidden.detach().clone().requires_grad_()
    torch.relu(expected).pow(2).square().sum().backward()
    torch.testing.assert_close(output, torch.relu(hidden).pow(2))
    torch.testing.assert_close(hidden.grad, expected.grad)
    assert [tensor.data_ptr() for tensor in saved] == [output.data_ptr()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_squared_relu_errs_no_more_than_twice_the_plain_formula(dtype: torch.dtype) -> None:
    exact = _scores(256, 64, scale=1.0)
    exact = exact.to(dtype).double().requires_grad_()
    cotangent = _scores(256, 64, scale=1.0, seed=1).to(dtype)
    torch.relu(exact).pow(2).backward(cotangent.double())
    errors = []
    for function in (F.squared_relu, lambda x: torch.relu(x).pow(2)):
        hidden = exact.detach().to(dtype).requires_grad_()
        function(hidden).backward(cotangent)
        errors.append((hidden.grad.double() - exact.grad).norm() / exact.grad.norm())
    ulp = torch.finfo(dtype).eps
    assert errors[0] <= 2 * max(errors[1].item(), ulp / 2)


def test_scale_gradient_scales_only_the_gradient() -> None:
    tensor = _scores(5, 5).requires_grad_()
    output = F.scale_gradient(tensor, 0.1)
    assert torch.equal(output, tensor)
    output.sum().backward()
    torch.testing.assert_close(tensor.grad, torch.full_like(tensor, 0.1))


def test_rotation_keeps_norms_and_makes_scores_relative() -> None:
    query, key = _scores(1, 2, 1, 8), _scores(1, 2, 1, 8, seed=1)
    rates = 100.0 ** (-torch.arange(4, dtype=torch.float64) / 4)

    def at(tensor: torch.Tensor, position: float) -> torch.Tensor:
        angles = torch.cat([rates * position] * 2)[None, None, None]
        return F.rotate(tensor, angles.cos(), angles.sin())

    torch.testing.assert_close(at(query, 7).norm(dim=-1), query.norm(dim=-1))
    near = (at(query, 3) * at(key, 1)).sum(-1)
    torch.testing.assert_close(near, (at(query, 12) * at(key, 10)).sum(-1))
    assert not torch.allclose(near, (at(query, 3) * at(key, 0)).sum(-1))


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_power_iteration_finds_the_largest_singular_value(shape: tuple[int, int]) -> None:
    weight = _scores(*shape)
    exact = torch.linalg.svdvals(weight)[0]
    u, v = F.top_singular_vectors(weight)
    assert relative_error(F.spectral_norm(weight, u, v), exact) < 1e-12
    u, v = F.power_iteration(
        weight, torch.ones(shape[0]).double(), torch.ones(shape[1]).double(), 200
    )
    assert relative_error(F.spectral_norm(weight, u, v), exact) < 1e-6


def _with_spectrum(rows: int, columns: int, spectrum: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    bases = [
        torch.linalg.qr(torch.randn(size, len(spectrum), generator=generator).double()).Q
        for size in (rows, columns)
    ]
    return bases[0] * spectrum @ bases[1].T


SPECTRA = {
    "random": torch.randn(150, generator=torch.Generator().manual_seed(0)).abs().double(),
    "low rank": torch.tensor([3.0, 2.0, 1.0]).double(),
    "rank one": torch.tensor([2.0]).double(),
    "clustered at the top": torch.linspace(1 - 1e-5, 1.0, 150).double(),
    "several times the largest": torch.tensor([5.0] * 4 + [1.0] * 100).double(),
    "dense": torch.linspace(0.0, 1.0, 150).double(),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(150, 260), (260, 150), (150, 150)])
def test_top_singular_vectors_are_within_tolerance(spectrum: str, shape: tuple[int, int]) -> None:
    weight = _with_spectrum(*shape, SPECTRA[spectrum])
    exact = torch.linalg.svdvals(weight)[0]
    for dtype, bound in ((torch.float64, 1e-6), (torch.float32, 2e-6)):
        u, v = F.top_singular_vectors(weight.to(dtype))
        assert (u.dtype, u.shape, v.shape) == (dtype, shape[:1], shape[1:])
        assert relative_error(F.spectral_norm(weight.to(dtype), u, v).double(), exact) < bound
        for one, other in ((weight @ v.double(), u), (weight.T @ u.double(), v)):
            assert (one - exact * other.double()).norm() < 3 * bound * exact


def test_top_singular_vectors_draw_no_number_of_the_callers() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    found = [F.top_singular_vectors(_scores(40, 30)) for _ in range(2)]
    assert torch.rand(4).equal(expected)
    assert all(one.equal(other) for one, other in zip(*found, strict=True))


def test_gradient_of_sigma_is_u_v() -> None:
    weight = _scores(4, 6).requires_grad_()
    u, v = F.top_singular_vectors(weight.detach())
    F.spectral_norm(weight, u, v).backward()
    torch.testing.assert_close(weight.grad, torch.outer(u, v))
