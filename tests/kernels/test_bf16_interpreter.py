"""Laws of the interpreter's bf16: it rounds as PyTorch does and refuses other arithmetic."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from hf_stable.kernels.tiles import INTERPRETED

if not INTERPRETED:
    pytest.skip("the kernels run on a GPU", allow_module_level=True)

from .bf16 import bfloat16, narrow, widen


def _bits(numbers: torch.Tensor) -> np.ndarray:
    return numbers.bfloat16().view(torch.uint16).numpy()


def test_rounding_is_that_of_pytorch() -> None:
    """Every bf16 with every pattern of the bits below it that rounding tells apart."""
    upper = np.arange(2**16, dtype=np.uint32)[:, None] << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    numbers = (upper | lower).view(np.float32)
    expected = _bits(torch.from_numpy(numbers))
    known = ~np.isnan(numbers)
    assert np.array_equal(narrow(numbers)[known], expected[known])
    assert np.isnan(widen(narrow(numbers)[~known])).all()


def test_widening_is_exact() -> None:
    numbers = torch.randn(1000).bfloat16()
    assert np.array_equal(widen(_bits(numbers)), numbers.float().numpy())


@triton.jit
def _cast_kernel(x, y, size: tl.constexpr):
    o = tl.arange(0, size)
    tl.store(y + o, tl.load(x + o).to(tl.float32) * 3.0)


@triton.jit
def _dot_kernel(x, y, z, size: tl.constexpr):
    o = tl.arange(0, size)[:, None] * size + tl.arange(0, size)[None, :]
    tl.store(z + o, tl.dot(tl.load(x + o), tl.trans(tl.load(y + o))))


@triton.jit
def _add_kernel(x, y, size: tl.constexpr):
    o = tl.arange(0, size)
    tl.store(y + o, tl.load(x + o) + tl.load(x + o))


@triton.jit
def _negate_kernel(x, y, size: tl.constexpr):
    o = tl.arange(0, size)
    tl.store(y + o, -tl.load(x + o))


@triton.jit
def _abs_kernel(x, y, size: tl.constexpr):
    o = tl.arange(0, size)
    tl.store(y + o, tl.abs(tl.load(x + o)))


@triton.jit
def _sum_kernel(x, y, size: tl.constexpr):
    tl.store(y, tl.sum(tl.load(x + tl.arange(0, size)), axis=0))


@triton.jit
def _compare_kernel(x, y, size: tl.constexpr):
    o = tl.arange(0, size)
    b_x, b_y = tl.load(x + o), tl.load(y + o)
    tl.store(y + o, tl.where(b_x < b_y, b_x, b_y))


def test_loads_stores_and_casts_round_to_nearest_even() -> None:
    x = torch.randn(64).bfloat16()
    y = torch.empty_like(x)
    with bfloat16():
        _cast_kernel[(1,)](x, y, size=64)
    assert torch.equal(y, (x.float() * 3).bfloat16())


def test_a_dot_is_an_exact_product_summed_in_fp32() -> None:
    x, y = torch.randn(2, 32, 32).bfloat16()
    z = torch.empty(32, 32)
    with bfloat16():
        _dot_kernel[(1,)](x, y, z, size=32)
    exact = x.double() @ y.double().T
    magnitude = x.double().abs() @ y.double().abs().T
    assert ((z - exact).abs() <= 32 * torch.finfo(torch.float32).eps * magnitude).all()


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        (_add_kernel, "fadd"),
        (_negate_kernel, "fsub"),
        (_abs_kernel, "fabs"),
        (_compare_kernel, "fcmpOLT"),
        (_sum_kernel, "_sum_combine"),
    ],
)
def test_arithmetic_on_bf16_is_refused_by_name(kernel, name: str) -> None:
    x = torch.randn(16).bfloat16()
    with bfloat16(), pytest.raises(Exception, match=f"bf16 operand in .*{name}"):
        kernel[(1,)](x, torch.empty_like(x), size=16)


def test_a_dot_of_two_dtypes_is_refused() -> None:
    x, z = torch.randn(16, 16), torch.empty(16, 16)
    with bfloat16(), pytest.raises(Exception, match="same dtype"):
        _dot_kernel[(1,)](x.bfloat16(), x, z, size=16)


def test_afterwards_the_interpreter_is_what_it_was() -> None:
    def members() -> dict[str, object]:
        classes = (interpreter.InterpreterBuilder, interpreter.ReduceScanOpInterface)
        return {f"{owner} {name}": vars(owner)[name] for owner in classes for name in vars(owner)}

    before = members()
    with pytest.raises(ZeroDivisionError), bfloat16():
        assert members() != before
        _ = 1 / 0
    assert members() == before


def test_other_dtypes_compute_as_before() -> None:
    x = torch.randn(16)
    results = []
    for context in (bfloat16(), torch.no_grad()):
        y = torch.empty_like(x)
        with context:
            _add_kernel[(1,)](x, y, size=16)
        results.append(y)
    assert torch.equal(*results)
