"""Laws of the kernels in bf16, with the tiles that a GPU runs: interpreted where there is none."""

import contextlib
import itertools
import math
from typing import Any

import pytest
import torch

from hf_stable.kernels import linear_cross_entropy as head
from hf_stable.kernels.attention import flash_attention
from hf_stable.kernels.documents import build_documents
from hf_stable.kernels.tiles import INTERPRETED

from .bf16 import bfloat16
from .reference import DEVICE, Inputs, assert_as_good_as_plain, dense, draw

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cap": {"softcap": 50.0},
    "small cap": {"softcap": 5.0},
    "large cap": {"softcap": 100.0},
    "clip": {"clip_gamma": -0.03, "clip_zeta": 1.03},
    "cap, clip": {"softcap": 50.0, "clip_alpha": 4.0, "clip_zeta": 1.03},
    "cap, documents": {"softcap": 50.0},
}
# Together they take every branch of the kernels.
QUICK = {("plain", False, 64), ("cap, documents", False, 64), ("cap, clip", True, 64)}
CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in itertools.product(FORMS, (False, True), (32, 64, 80, 128, 256))
]
# More than one tile of every kernel, and of the forward one that nothing masks.
LENGTH = 200


def in_bf16() -> contextlib.AbstractContextManager[None]:
    """Return what lets kernels compute in bf16 here."""
    return bfloat16() if INTERPRETED else contextlib.nullcontext()


def _documents() -> torch.Tensor:
    starts = torch.zeros(1, LENGTH, dtype=torch.bool, device=DEVICE)
    starts[0, [5, 100, 101]] = True
    return build_documents(starts)


@pytest.mark.parametrize(("form", "unbiased", "width"), CASES)
def test_errors_are_at_most_those_of_the_eager_formula(
    form: str, unbiased: bool, width: int
) -> None:
    """With statistics too where there are documents; of weights about equal and of one-hot ones."""
    documents = _documents() if "documents" in form else None
    mask = None if documents is None else dense(documents)
    score = {"scaling": 1 / math.sqrt(width), **FORMS[form]}
    for spread in (1.0, 3.0):
        inputs = draw((1, 2, 1, LENGTH, width), torch.bfloat16, spread=spread)
        with in_bf16():
            output, _ = flash_attention(
                *inputs.tensors,
                documents=documents,
                unbiased=unbiased,
                return_statistics=documents is not None,
                **score,
            )
            found = inputs.gradients(output)
        assert_as_good_as_plain(found, inputs, mask, times=1.0, **score)


@pytest.mark.parametrize("unbiased", [False, True])
def test_equal_values_come_out_as_they_are(unbiased: bool) -> None:
    """Rounded weights of a static maximum, over a sum of unrounded ones, would scale the output.

    The mantissa of the value is the largest, so that half of a weight's rounding error shows.
    """
    inputs = draw((1, 2, 1, LENGTH, 32), torch.bfloat16)
    query, key, value = inputs.tensors
    value = torch.full_like(value, 2 - 2**-7)
    with in_bf16():
        output, _ = flash_attention(
            query, key, value, scaling=32**-0.5, softcap=50.0, unbiased=unbiased
        )
    assert (output == 2 - 2**-7).all()


def _two_keys_share_the_weight() -> Inputs:
    """Scores of two keys within 1e-3 of each other, far above the rest, and values below -1.

    Key 3 is one in all keys, so that element 3 of a query's gradient is the sum of a row of dS.
    """
    generator = torch.Generator().manual_seed(0)
    query, key = torch.zeros(2, 1, 2, 256, 16).unbind()
    query[..., 0], query[..., 3] = 10.0, 3.3 + 2 * torch.rand(1, 2, 256, generator=generator)
    query[..., 1] = 1e-3 * torch.randn(1, 2, 256, generator=generator)
    query[..., 2] = 0.7 * torch.randn(1, 2, 256, generator=generator)
    key[:, :, :2, 0], key[..., 3] = 1.0, 1.0
    key[:, :, 0, 1], key[:, :, 1, 1] = 0.5, -0.5
    key[:, :, 2:, 2] = torch.randn(1, 2, 254, generator=generator)
    value = -1 - torch.randn(1, 2, 256, 16, generator=generator).abs()
    grad = 1 + torch.randn(1, 256, 2, 16, generator=generator)
    tensors = tuple(tensor.to(DEVICE) for tensor in (query, key, value))
    return Inputs(tensors, grad.to(DEVICE)).to(torch.bfloat16)


def _row_sums(unbiased: bool) -> torch.Tensor:
    """Sums of the rows of dS, which are zero without rounding, relative to the size of D."""
    inputs = _two_keys_share_the_weight()
    with in_bf16():
        output, _ = flash_attention(*inputs.tensors, scaling=1.0, unbiased=unbiased)
        grad_query = inputs.gradients(output)[1]
    size = (inputs.grad.double() * output.detach().double()).sum(-1).abs().mean()
    return grad_query[:, :, 2:, 3].double() / size


def test_scores_near_the_maximum_bias_gradients_unless_unbiased() -> None:
    """Qiu and Yao 2025, section 3: such errors do not average out, and training diverges."""
    usual, cured = _row_sums(unbiased=False), _row_sums(unbiased=True)
    assert usual.mean() > 10 * usual.std() / math.sqrt(usual.numel())
    assert cured.mean().abs() < usual.mean() / 50
    assert cured.std() < usual.std() / 5


@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("vocab", [5000, 5001])
def test_the_gradient_of_logits_is_rounded_once(cap: float | None, vocab: int) -> None:
    """Each element is at most half a unit of bf16 from the float64 gradient of these logits."""
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(3, vocab, generator=generator)).to(DEVICE, torch.bfloat16)
    labels = torch.tensor([7, vocab - 1, -100], device=DEVICE)
    exact = logits.double().requires_grad_()
    capped = exact if cap is None else cap * torch.tanh(exact / cap)
    entropy = torch.nn.functional.cross_entropy(capped, labels, reduction="none")
    log_z = capped.logsumexp(-1).square() * (labels >= 0)
    (entropy + 0.1 * log_z).sum().backward()
    with in_bf16():
        found, squares = head.cross_entropy_rows(logits, labels, cap, 0.1, True)
    torch.testing.assert_close(found.double(), entropy.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(squares.double(), log_z.detach(), rtol=1e-5, atol=1e-5)
    half = torch.finfo(torch.bfloat16).eps / 2
    assert ((logits.double() - exact.grad).abs() <= 1.01 * half * exact.grad.abs() + 1e-12).all()
