"""Laws of the loss of the head: exact, in chunks, in memory that tokens do not decide."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_stable.model import loss_stable_gpt as F

from ..techniques import relative_error


def _head(tokens: int, width: int = 8, vocab: int = 37) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[::5] = -100
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def _direct_loss(hidden, weight, labels, cap, z_loss, items):
    logits = hidden @ weight.T
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    log_z = logits.logsumexp(-1)
    kept = labels >= 0
    ce = (log_z - logits.gather(-1, labels.clamp(min=0)[:, None])[:, 0])[kept].sum() / items
    return ce, z_loss * log_z[kept].square().sum() / items


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("items", [None, 11])
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_linear_cross_entropy_equals_the_direct_formula(cap, z_loss, items, rows) -> None:
    hidden, weight, labels = _head(23)
    count = items or int((labels >= 0).sum())
    ce, z = _direct_loss(hidden, weight, labels, cap, z_loss, count)
    expected = torch.autograd.grad(2.5 * (ce + z), (hidden, weight))
    loss, got_ce, got_z = F.linear_cross_entropy(
        hidden, weight, labels, num_items=items, cap=cap, z_loss=z_loss, chunk_bytes=4 * 37 * rows
    )
    actual = torch.autograd.grad(2.5 * loss, (hidden, weight))
    for got, want in zip((loss, got_ce, got_z, *actual), (ce + z, ce, z, *expected), strict=True):
        assert relative_error(got, want) < 1e-12 or (got == 0 and want == 0)
    assert not got_ce.requires_grad and not got_z.requires_grad


def test_linear_cross_entropy_without_targets_is_nan_with_zero_gradients() -> None:
    hidden, weight, labels = _head(6)
    loss, *_ = F.linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    assert math.isnan(loss.item())
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert all((gradient == 0).all() for gradient in gradients)


def _mean_log_z_after(z_loss: float, steps: int) -> float:
    hidden, weight, labels = _head(40)
    hidden, labels = hidden.detach(), labels.clamp(min=0)
    optimizer = torch.optim.Adam([weight], lr=0.05)
    for _ in range(steps):
        loss, *_ = F.linear_cross_entropy(hidden, weight, labels, z_loss=z_loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (hidden @ weight.T).logsumexp(-1).abs().mean().item()


def test_z_loss_pulls_log_z_to_zero() -> None:
    pulled = _mean_log_z_after(z_loss=10.0, steps=300)
    assert pulled < 0.5 * _mean_log_z_after(z_loss=10.0, steps=0)
    assert pulled < 0.5 * _mean_log_z_after(z_loss=0.0, steps=300)


class _LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_memory_is_flat_in_the_number_of_tokens(dtype: torch.dtype) -> None:
    vocab, width, rows = 1000, 4, 16
    largest = []
    for tokens in (64, 256, 512):
        hidden, weight, labels = (x.detach() for x in _head(tokens, width, vocab))
        hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        with _LargestTensor() as mode:
            loss, *_ = F.linear_cross_entropy(
                hidden, weight, labels, cap=30.0, z_loss=1e-4, chunk_bytes=4 * vocab * rows
            )
            loss.backward()
        largest.append(mode.elements)
    assert largest == [vocab * rows] * 3


def test_linear_cross_entropy_follows_autocast() -> None:
    hidden, weight, labels = (x.detach() for x in _head(20))
    hidden, weight = hidden.float().requires_grad_(), weight.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, *_ = F.linear_cross_entropy(hidden, weight, labels, z_loss=1e-4)
    plain, *_ = F.linear_cross_entropy(hidden, weight, labels, z_loss=1e-4)
    assert loss.dtype == torch.float32 and 0 < abs(loss.item() - plain.item()) < 0.05
    assert nn.functional.cross_entropy(hidden @ weight.T, labels).item() != loss.item()
