"""Functions of tiles that kernels share; what is computed element by element is fp32."""

from functools import cache

import torch
import triton
import triton.language as tl
from triton import knobs

# Whether kernels run interpreted, on CPU tensors: Triton decides by TRITON_INTERPRET at its import.
INTERPRETED: bool = knobs.runtime.interpret
LOG2_E = 1.4426950408889634
_PTX = tl.constexpr(not INTERPRETED and torch.version.hip is None)


def needs_fp32(dtype: torch.dtype) -> bool:
    """Return True if kernels get fp32 instead of `dtype`.

    The interpreter computes with the bits of bf16 as integers, without an error.
    """
    return INTERPRETED and dtype == torch.bfloat16


@triton.jit
def exp2(x):
    """2^x in fp32, without the three instructions by which Triton keeps denormal results."""
    if _PTX:
        x = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        x = tl.exp2(x)
    return x


@triton.jit
def reciprocal(x):
    """1 / x in fp32 for normal numbers, without the scaling of Triton's division."""
    if _PTX:
        x = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        x = 1.0 / x
    return x


# tanh(x) is x P(x^2) / Q(x^2), fitted on [0, 8.1] for the smallest largest relative error, 1.6e-7;
# beyond, tanh is 1 up to 1.9e-7. By exp and a division it would be two special functions a score,
# of which attention can afford one besides its own exp, by arithmetic: it was not timed.
_TANH_BOUND = 8.1
_TANH_P = (0.9999998382107479, 0.1291684607178553, 0.0029415344891709806, 1.1325412478406e-05)
_TANH_Q = (1.0, 0.4625004965393365, 0.023776784963152615, 0.00023732517129474982)
_TANH_Q += (2.426203406533344e-07,)
# Of a term: the sums P and Q are at most 200 times their largest one.
_TERMS_OF_FP32 = (1e-36, 1e34)


@cache
def tanh_terms(scale: float, factor: float) -> tuple[float, ...] | None:
    """Return what `tanh` needs to be factor * tanh(scale * x): a bound on |x|, and coefficients.

    Those of P (four) and Q (the first two and the last two) hold the two numbers, so that these
    cost nothing. A common divisor makes Q's middle one 1 and the others about as large as small.

    Returns:
        None where the numbers are too large or small for coefficients in fp32.
    """
    divisor = scale**4 * _TANH_Q[2]
    p = [factor * value * scale ** (2 * i + 1) / divisor for i, value in enumerate(_TANH_P)]
    q = [value * scale ** (2 * i) / divisor for i, value in enumerate(_TANH_Q)]
    lowest, highest = _TERMS_OF_FP32
    if min(*p, *q) < lowest or max(*p, *q) > highest:
        return None
    return (_TANH_BOUND / scale, *p, *q[:2], *q[3:])


@triton.jit
def tanh(x, terms):
    """factor * tanh(scale * x) of an fp32 tile, by the `terms` of both numbers.

    One reciprocal. The relative error is below 5e-7 (4.4e-7 in emulated fp32, fused or not); the
    result may exceed the factor by a unit of rounding.
    """
    bound, p0, p1, p2, p3, q0, q1, q3, q4 = terms
    # A GPU's min and max drop NaN, and a broken query would look like a uniform row.
    x = tl.maximum(x, -bound, propagate_nan=tl.PropagateNan.ALL)
    x = tl.minimum(x, bound, propagate_nan=tl.PropagateNan.ALL)
    y = x * x
    p = p3 * y + p2
    p = p * y + p1
    p = p * y + p0
    q = q4 * y + q3
    q = q * y + 1.0
    q = q * y + q1
    q = q * y + q0
    # In this order no intermediate leaves fp32.
    return x * reciprocal(q) * p


@triton.jit
def hardware_tanh(x):
    """tanh of an fp32 tile by the special function unit: relative error 2^-11, NVIDIA only."""
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )
