"""bf16 in Triton's interpreter as a GPU has it.

The interpreter computes with the bits of bf16 as integers, and cuts fp32 off instead of rounding
it. Inside `bfloat16`, casts round to nearest even, and products of matrices are exact products
that are summed in fp32 (tensor cores drop some low bits of a sum, which is not imitated). Any other
arithmetic on bf16 is refused: kernels compute element by element in fp32.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NoReturn
from unittest import mock

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface, TensorHandle

from hf_stable.kernels import attention, linear_cross_entropy

# What moves bits without reading them as numbers; casts and products have functions below.
_COPIES = (
    *("load", "store", "masked_load", "masked_store", "tensor_pointer_load"),
    *("tensor_pointer_store", "descriptor_load", "descriptor_store", "descriptor_gather"),
    *("descriptor_scatter", "bitcast", "reshape", "trans", "expand_dims", "broadcast", "cat"),
    *("join", "split", "splat", "unsplat", "gather", "select"),
)
_CASTS = ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc", "fp_to_fp")
_ALLOWED = {f"create_{name}" for name in (*_COPIES, *_CASTS, "dot")}


def widen(bits: np.ndarray) -> np.ndarray:
    """Return the fp32 numbers that bf16 bits stand for."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(numbers: np.ndarray) -> np.ndarray:
    """Return the bits of the nearest bf16 of fp32 numbers, the even one of two."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # A carry out of a NaN's mantissa would make it infinite or negative.
    return np.where(np.isnan(numbers), 0x7FC0, rounded).astype(np.uint16)


def _is_bf16(value: Any) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


def _refuse(operation: str) -> NoReturn:
    raise TypeError(
        f"bf16 operand in {operation}: kernels compute element by element in fp32, "
        "cast it with .to(tl.float32)."
    )


def _refusing(name: str) -> Callable[..., Any]:
    operation = getattr(InterpreterBuilder, name)

    @functools.wraps(operation)
    def checked(self: Any, *arguments: Any, **options: Any) -> Any:
        if any(map(_is_bf16, (*arguments, *options.values()))):
            _refuse(name.removeprefix("create_"))
        return operation(self, *arguments, **options)

    return checked


def _cast_impl(self: Any, source: TensorHandle, target: Any) -> TensorHandle:
    if _is_bf16(source):
        source = TensorHandle(widen(source.data), tl.float32)
    if target.scalar != tl.bfloat16:
        return _plain_cast(self, source, target)
    numbers = source.data.astype(np.float32)
    if not np.array_equal(numbers, source.data, equal_nan=True):
        raise TypeError(f"a cast of {source.dtype} to bf16 would round twice: cast to fp32 first.")
    return TensorHandle(narrow(numbers), tl.bfloat16)


def _create_fp_to_fp(self: Any, source: TensorHandle, target: Any, rounding: Any) -> TensorHandle:
    if not _is_bf16(source) and target.scalar != tl.bfloat16:
        return _plain_fp_to_fp(self, source, target, rounding)
    if rounding not in (None, ir.ROUNDING_MODE.RTNE):
        raise TypeError(f"a cast to bf16 rounds to nearest even here, not by {rounding}.")
    return _cast_impl(self, source, target)


def _create_dot(self: Any, a: TensorHandle, b: TensorHandle, *others: Any) -> TensorHandle:
    # Triton itself refuses operands of two dtypes, and sums of bf16 that are not fp32.
    a, b = (
        TensorHandle(widen(operand.data), tl.float32) if _is_bf16(operand) else operand
        for operand in (a, b)
    )
    return _plain_dot(self, a, b, *others)


def _reduce(self: Any, operands: Any) -> Any:
    for operand in operands if isinstance(operands, tuple) else (operands,):
        if _is_bf16(operand.handle):
            _refuse(f"reduction by {self.combine_fn.fn.__name__}")
    return _plain_reduce(self, operands)


_plain_cast = InterpreterBuilder.cast_impl
_plain_fp_to_fp = InterpreterBuilder.create_fp_to_fp
_plain_dot = InterpreterBuilder.create_dot
_plain_reduce = ReduceScanOpInterface.apply


@contextlib.contextmanager
def bfloat16() -> Iterator[None]:
    """Interpret bf16 as described above, and let the kernels have it instead of fp32."""
    names = [name for name in dir(InterpreterBuilder) if name.startswith("create_")]
    unknown = _ALLOWED.difference(names)
    assert not unknown, f"this version of Triton's interpreter has no {sorted(unknown)}"
    replaced: dict[str, Any] = {name: _refusing(name) for name in names if name not in _ALLOWED}
    replaced |= {
        "cast_impl": _cast_impl,
        "create_fp_to_fp": _create_fp_to_fp,
        "create_dot": _create_dot,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(InterpreterBuilder, **replaced))
        stack.enter_context(mock.patch.object(ReduceScanOpInterface, "apply", _reduce))
        for module in (attention, linear_cross_entropy):
            stack.enter_context(mock.patch.object(module, "needs_fp32", lambda _: False))
        yield
