"""Functions of tiles that kernels share; what is computed element by element is fp32."""

import torch
import triton
import triton.language as tl
from triton import knobs

# Whether kernels run interpreted, on CPU tensors: Triton decides by TRITON_INTERPRET at its import.
INTERPRETED: bool = knobs.runtime.interpret
LOG2_E = 1.4426950408889634
_PTX = tl.constexpr(not INTERPRETED and torch.version.hip is None)


def needs_fp32(dtype: torch.dtype) -> bool:
    """Return whether kernels are given fp32 in the place of `dtype`.

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


@triton.jit
def tanh(x):
    """tanh of an fp32 tile with one reciprocal; relative error below 5e-7.

    x * P(x^2) / Q(x^2), fitted to tanh on [0, 8] for the smallest largest relative error; beyond 8
    tanh is 1 up to 2.3e-7. By exp and a division it would be two special functions a score, of
    which attention can afford one besides its own exp, by arithmetic: it was not timed.
    """
    # A GPU's min and max drop NaN, and a broken query would look like a uniform row.
    x = tl.maximum(x, -8.0, propagate_nan=tl.PropagateNan.ALL)
    x = tl.minimum(x, 8.0, propagate_nan=tl.PropagateNan.ALL)
    y = x * x
    p = 1.5230874339522416e-08 * y + 2.18949826376047e-05
    p = p * y + 0.003571617417037487
    p = p * y + 0.13444514572620392
    p = p * y + 1.0
    q = 8.522630992047198e-07 * y + 0.00034113237052224576
    q = q * y + 0.026164516806602478
    q = q * y + 0.46777841448783875
    q = q * y + 1.0
    return x * p * reciprocal(q)


@triton.jit
def hardware_tanh(x):
    """tanh of an fp32 tile by the special function unit: relative error 2^-11, NVIDIA only."""
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )
