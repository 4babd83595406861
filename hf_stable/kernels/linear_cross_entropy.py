"""Head, final cap, cross entropy and z-loss on a GPU: cuBLAS GEMMs around one row kernel.

For a row of logits x, with y = cap tanh(x / cap), L = log sum exp(y) and label l:

    cross entropy = L - y_l        z-loss = c L^2
    d/dx = ((1 + 2 c L) exp(y - L) - onehot(l)) (1 - tanh^2(x / cap))

z-loss: Chowdhery et al. 2022 (PaLM), section 5. The chunks of tokens, the three GEMMs and the fp32
sums over chunks are those of `hf_stable.model.loss_stable_gpt`; this file replaces what that
one does to a chunk of logits in plain torch, about ten passes over fp32, by two reads and one write
in the GEMM's dtype. The gradient takes the place of the logits, so nothing is recomputed later.

Names: i index, o offsets, m mask, p pointer, b block in registers. T tokens, V vocabulary.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from hf_stable.kernels.tiles import exp2, needs_fp32, reciprocal
from hf_stable.model import loss_stable_gpt as plain

# Whole tiles of the GEMMs.
ROW_MULTIPLE = 128
# A program loops over its row in blocks of DEPTH x LANES logits, of BLOCK_BYTES together. A lane
# keeps its own maximum and sum, so that the warps meet once a row, and rescales its sum once in
# DEPTH logits: the special function units have no time for two exponentials a logit beside the
# memory. One program fills a multiprocessor, so that few rows must stay in the L2 until they are
# read again, and BLOCK_BYTES are in flight, about twice what the memory's latency asks for. All of
# this is arithmetic from the hardware's rates; nothing was timed on a GPU.
BLOCK_BYTES = 2**16
LAUNCH: dict[str, Any] = {"LANES": 8192, "num_warps": 32}
# Below any logit, and finite: -inf - -inf is NaN.
_LOWEST = tl.constexpr(-1e30)
_LN_2 = tl.constexpr(math.log(2))


@triton.jit
def _tanh_and_slope(x, PRECISE: tl.constexpr):
    """tanh(x) and 1 - tanh^2(x) of an fp32 tile, by e = exp(-2 |x|).

    The slope is 4 e / (1 + e)^2, since 1 - tanh^2 would be noise on the cap. tanh is right to 1e-7
    absolutely; PRECISE to 2e-7 relatively too, by its series below 0.3, which logits in half
    precision do not show.
    """
    size = tl.abs(x)
    e = exp2(size * (-2.0 / _LN_2))
    inverse = reciprocal(1.0 + e)
    value = (1.0 - e) * inverse
    if PRECISE:
        y = x * x
        series = y * (y * (y * (y * (62 / 2835) - 17 / 315) + 2 / 15) - 1 / 3) + 1.0
        value = tl.where(size < 0.3, size * series, value)
    return tl.where(x < 0, -value, value), 4.0 * e * inverse * inverse


@triton.jit
def _load(p_row, o_v, V, inverse_cap, CAPPED: tl.constexpr, LAST: tl.constexpr):
    """x of columns `o_v`, or tanh(x / cap), and the cap's slope, in fp32.

    Beyond the vocabulary x is -inf, or anything where it is read for the LAST time.
    """
    m_v = o_v < V
    if LAST:
        # What is not read again must not drive out of the L2 what will be.
        b_x = tl.load(p_row + o_v, mask=m_v, other=0.0, eviction_policy="evict_first")
    else:
        b_x = tl.load(p_row + o_v, mask=m_v, other=float("-inf"))
    precise: tl.constexpr = p_row.dtype.element_ty == tl.float32
    b_x = b_x.to(tl.float32)
    b_slope = b_x
    if CAPPED:
        b_x, b_slope = _tanh_and_slope(  # pyright: ignore[reportGeneralTypeIssues]
            b_x * inverse_cap, precise
        )
        if not LAST:
            b_x = tl.where(m_v, b_x, float("-inf"))
    return b_x, b_slope


@triton.jit
def _maximum_and_sum(
    p_row, V, scale, inverse_cap, CAPPED: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr
):
    """max(x) and sum 2^(scale (x - max)) of a row in one read, by running maxima of the lanes."""
    o_block = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    b_max = tl.full([LANES], _LOWEST, tl.float32)
    b_sum = tl.zeros([LANES], tl.float32)
    for start in range(0, V, DEPTH * LANES):
        b_x, _ = _load(p_row, start + o_block, V, inverse_cap, CAPPED, LAST=False)
        b_new = tl.maximum(b_max, tl.max(b_x, axis=0))
        b_part = tl.sum(exp2((b_x - b_new[None, :]) * scale), axis=0)
        b_sum = b_sum * exp2((b_max - b_new) * scale) + b_part
        b_max = b_new
    top = tl.max(b_max, axis=0)
    return top, tl.sum(b_sum * exp2((b_max - top) * scale), axis=0)


@triton.jit
def _write_gradient(
    p_row, V, label, top, factor, scale, inverse_cap,
    CAPPED: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """factor 2^(scale (x - top)) - onehot(label), times the slope of the cap, over the logits."""
    o_block = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    blocks = tl.cdiv(V, DEPTH * LANES)
    for i_block in range(0, blocks):
        # Backwards: the end of the row was read last and is the likeliest to be in the L2 still.
        o_v = (blocks - 1 - i_block) * (DEPTH * LANES) + o_block
        b_x, b_slope = _load(p_row, o_v, V, inverse_cap, CAPPED, LAST=True)
        b_grad = exp2((b_x - top) * scale) * factor - tl.where(o_v == label, 1.0, 0.0)
        if CAPPED:
            b_grad *= b_slope
        b_grad = b_grad.to(p_row.dtype.element_ty)
        tl.store(p_row + o_v, b_grad, mask=o_v < V, eviction_policy="evict_first")


@triton.jit
def _zero_row(p_row, V, DEPTH: tl.constexpr, LANES: tl.constexpr):
    o_block = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    b_zero = tl.zeros([DEPTH, LANES], p_row.dtype.element_ty)
    for start in range(0, V, DEPTH * LANES):
        tl.store(p_row + start + o_block, b_zero, mask=start + o_block < V)


@triton.jit
def cross_entropy_rows_kernel(
    p_logits, p_labels, p_cross_entropy, p_squared_log_z, stride, V, cap, inverse_cap, z_loss,
    CAPPED: tl.constexpr, GRADIENT: tl.constexpr,
    GROUP: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program a row: its cross entropy, its log^2 Z and, over its logits, the gradient.

    `V` and `stride` count groups of GROUP logits: so the compiler sees what divides them. A cap of
    1.0 stands for none where the cap is but a factor.
    """
    i_t = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_t * (stride * GROUP)
    V = V * GROUP
    label = tl.load(p_labels + i_t)
    if label < 0:
        tl.store(p_cross_entropy + i_t, 0.0)
        tl.store(p_squared_log_z + i_t, 0.0)
        if GRADIENT:
            _zero_row(p_row, V, DEPTH, LANES)
    else:
        # Read before any warp writes a gradient: the sums of the row lie between. A label beyond
        # the vocabulary must be heard of, and NaN asks no host.
        label_x = tl.load(p_row + label, mask=label < V, other=float("nan")).to(tl.float32)
        if CAPPED:
            label_x, _ = _tanh_and_slope(  # pyright: ignore[reportGeneralTypeIssues]
                label_x * inverse_cap, p_logits.dtype.element_ty == tl.float32
            )
        scale = cap / _LN_2
        top, total = _maximum_and_sum(  # pyright: ignore[reportGeneralTypeIssues]
            p_row, V, scale, inverse_cap, CAPPED, DEPTH, LANES
        )
        log_total = tl.log2(total) * _LN_2
        log_z = cap * top + log_total
        # Not log_z - cap * label_x: large logits would round their difference away.
        tl.store(p_cross_entropy + i_t, cap * (top - label_x) + log_total)
        tl.store(p_squared_log_z + i_t, log_z * log_z)
        if GRADIENT:
            factor = (1.0 + 2.0 * z_loss * log_z) / total
            factor = tl.where(label < V, factor, float("nan"))
            # Slopes beside the logits of a whole block would not fit the registers.
            depth: tl.constexpr = (DEPTH + 1) // 2 if CAPPED else DEPTH
            _write_gradient(
                p_row, V, label.to(tl.int32), top, factor, scale, inverse_cap, CAPPED, depth, LANES
            )


def block_shape(vocab: int, stride: int, item_bytes: int) -> dict[str, Any]:
    """Return launch parameters of the kernel for rows of `vocab` logits, `stride` apart."""
    # Rows that begin anywhere are read one by one, and their addresses take registers.
    group = 8 if vocab % 8 == 0 and stride % 8 == 0 else 1
    depth = BLOCK_BYTES // (LAUNCH["LANES"] * item_bytes) // (1 if group == 8 else 2)
    return {"GROUP": group, "DEPTH": depth, **LAUNCH}


def _launch(
    logits: torch.Tensor,
    labels: torch.Tensor,
    cross_entropy: torch.Tensor,
    squared_log_z: torch.Tensor,
    cap: float | None,
    z_loss: float,
    gradient: bool,
) -> None:
    rows, vocab = logits.shape
    stride = logits.stride(0)
    bound = 1.0 if cap is None else cap
    shape = block_shape(vocab, stride, logits.element_size())
    forms: dict[str, Any] = {"CAPPED": cap is not None, "GRADIENT": gradient}
    units = stride // shape["GROUP"], vocab // shape["GROUP"]
    cross_entropy_rows_kernel[(rows,)](
        logits, labels, cross_entropy, squared_log_z, *units,
        bound, 1.0 / bound, z_loss, **forms, **shape,
    )  # fmt: skip


@torch.library.custom_op("hf_stable::cross_entropy_rows", mutates_args={"logits"})
def cross_entropy_rows(
    logits: torch.Tensor, labels: torch.Tensor, cap: float | None, z_loss: float, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy and log^2 Z of each row; `logits` become the gradient of CE + z-loss.

    Args:
        logits: (T, V) bf16, fp16 or fp32, uncapped, rows dense; with `gradient` overwritten by
            d(CE + z-loss)/d(logits) of each row, not averaged.
        labels: (T,) int64, dense; a row whose label is negative is zero everywhere, one whose label
            is not in the vocabulary is NaN.
        cap: tanh cap; None is off.
        z_loss: coefficient of log^2 Z in the gradient.

    Returns:
        (T,) fp32 each.
    """
    cross_entropy = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    squared_log_z = torch.empty_like(cross_entropy)
    widened = needs_fp32(logits.dtype)
    values = logits.float() if widened else logits
    # Triton launches on the current device.
    with torch.cuda.device_of(logits):
        _launch(values, labels, cross_entropy, squared_log_z, cap, z_loss, gradient)
    if widened:
        logits.copy_(values)
    return cross_entropy, squared_log_z


@cross_entropy_rows.register_fake
def _(
    logits: torch.Tensor, labels: torch.Tensor, cap: float | None, z_loss: float, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    per_row = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return per_row, torch.empty_like(per_row)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of row kernels, whose programs start before those of a GEMM that waits too."""
    return torch.cuda.Stream(device, priority=-1)


def chunk_on_two_streams(
    tokens: torch.Tensor,
    head: torch.Tensor,
    labels: torch.Tensor,
    logits: torch.Tensor,
    grad_tokens: torch.Tensor | None,
    take_rows: Callable[[torch.Tensor, torch.Tensor], None],
) -> None:
    """`chunk_in_order` by halves: one is in the row kernel while the other is in a GEMM.

        GEMMs:           logits 1 | logits 2     | tokens 1     | tokens 2
        second stream:            | row kernel 1 | row kernel 2 |

    The second stream begins each half after its logits and does all that has to do with sums of the
    losses; the first one waits for a half before it reads its gradients, so that at the end nothing
    is left on the second. Buffers are the first stream's, and are not given away before the second
    is done with them even where an error ends this early.
    """
    main, side = torch.cuda.current_stream(logits.device), _side_stream(logits.device)
    middle = len(tokens) // 2 // ROW_MULTIPLE * ROW_MULTIPLE
    halves = [slice(0, middle), slice(middle, len(tokens))] if middle else [slice(0, len(tokens))]
    logits.record_stream(side)
    labels.record_stream(side)
    finished = []
    for half in halves:
        torch.mm(tokens[half], head.T, out=logits[half])
        side.wait_stream(main)
        with torch.cuda.stream(side):
            take_rows(logits[half], labels[half])
        finished.append(side.record_event())
    for half, event in zip(halves, finished, strict=True):
        main.wait_event(event)
        if grad_tokens is not None:
            grad_tokens[half] = logits[half] @ head


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_items: torch.Tensor | int | None = None,
    cap: float | None = None,
    z_loss: float = 0.0,
    chunk_bytes: int | None = None,
    around: Callable[[plain.RowFunction], plain.RowFunction] | None = None,
    two_streams: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`loss_stable_gpt.linear_cross_entropy` with the row kernel: same laws, less memory.

    Args:
        hidden: (T, C). weight: (V, C).
        labels: (T,) int64; a negative label, such as -100, is no target, and one that is not in the
            vocabulary makes the loss NaN.
        num_items: denominator; None is the number of targets.
        cap: tanh cap of the logits; None is off.
        z_loss: coefficient; 0.0 is off.
        chunk_bytes: bytes of one chunk of logits, in the dtype of the GEMMs; None is
            `CHUNK_BYTES` of CUDA: at vocabulary 256,000 that is 4096 rows of bf16, whose GEMMs, not
            the fp32 weight gradient that every chunk reads and writes, take the time.
        around: what may look at each chunk: it is given the row function and returns another.
        two_streams: whether row kernels run beside GEMMs, see `chunk_on_two_streams`. Off until it
            was measured: it never ran on a GPU. Without effect on a CPU, in compiled code and with
            `around`, whose tensors belong to the caller's stream.

    Returns:
        loss (differentiable), its cross entropy and its z-loss (both not), 0-d fp32.
        float64 hidden states go the way of plain torch, and stay float64.
    """
    if hidden.dtype == torch.float64:
        return plain.linear_cross_entropy(
            hidden, weight, labels,
            num_items=num_items, cap=cap, z_loss=z_loss, chunk_bytes=chunk_bytes, around=around,
        )  # fmt: skip
    budget = chunk_bytes or plain.CHUNK_BYTES["cuda"]
    rows = budget // (plain.gemm_dtype(hidden).itemsize * weight.shape[0])
    if rows > ROW_MULTIPLE:
        rows -= rows % ROW_MULTIPLE
    beside = two_streams and hidden.is_cuda and around is None
    if torch.compiler.is_compiling():
        beside = False
    return plain.chunked_linear_cross_entropy(
        hidden, weight, labels.contiguous(),
        num_items=num_items, cap=cap, z_loss=z_loss, rows=max(rows, 1),
        row_function=cross_entropy_rows if around is None else around(cross_entropy_rows),
        chunk_function=chunk_on_two_streams if beside else plain.chunk_in_order,
    )  # fmt: skip
