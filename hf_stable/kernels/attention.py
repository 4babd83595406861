"""Flash attention with a tanh cap and clipped softmax, as operators that `torch.compile` knows.

What is kept for the backward: q, k, v, one fp32 number a row, and one tensor of the output's shape
(the output itself, or w of `attention_forward` under a clip or where `unbiased`).
"""

import math
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import triton

from . import MAX_HEAD_DIM
from .attention_backward import key_value_kernel, query_kernel
from .attention_forward import forward_kernel
from .blocks import choose_blocks
from .documents import is_documents
from .tiles import INTERPRETED, LOG2_E, needs_fp32, tanh_terms

# exp(64) times 2^17 keys times values of 10^5 still fits fp32, and bf16, which has its exponents.
_LARGEST_STATIC_CAP = 64.0
_DTYPES = {torch.float32, torch.float16, torch.bfloat16}


@dataclass(frozen=True)
class AttentionStatistics:
    """Statistics of one attention launch, in fp32 and without gradients.

    Args:
        rows_max_logit: (B, H, S) largest visible logit of each row, scaled, before the cap.
        rows_entropy: (B, H, S) entropy of each row's softmax in nats, before a clip.
        rows_clipped: (B, H, S) bool, rows whose every probability is clipped to zero.
        rows_visible: (B, H, S) bool, rows that see a key at all; the others count nowhere.
    """

    rows_max_logit: torch.Tensor
    rows_entropy: torch.Tensor
    rows_clipped: torch.Tensor
    rows_visible: torch.Tensor

    @property
    def max_logit(self) -> torch.Tensor:
        """(H,) largest logit of each head before the cap."""
        return self.rows_max_logit.masked_fill(~self.rows_visible, -math.inf).amax((0, 2))

    @property
    def entropy(self) -> torch.Tensor:
        """(H,) mean entropy of the rows of each head in nats."""
        return self._mean(self.rows_entropy)

    @property
    def clipped_rows(self) -> torch.Tensor:
        """(H,) fraction of the rows of each head that attend to nothing."""
        return self._mean(self.rows_clipped.float())

    def _mean(self, rows: torch.Tensor) -> torch.Tensor:
        counted = torch.where(self.rows_visible, rows, 0.0).sum((0, 2))
        return counted / self.rows_visible.sum((0, 2))


def _scales(scaling: float, cap: float | None) -> tuple[float, float]:
    """Return the factor of q.k before tanh (unused without a cap), and that of base-2 scores."""
    if cap is None:
        return 1.0, scaling * LOG2_E
    return scaling / cap, cap * LOG2_E


def _numbers(
    scaling: float,
    cap: float | None,
    gamma: float | None,
    zeta: float,
    alpha: float | None,
    *,
    backward: bool,
) -> list[float | tuple[float, ...] | None]:
    """The kernels' numbers: alpha takes the place of gamma."""
    fixed = 0.0 if alpha is not None else gamma or 0.0
    tanh_scale, score_scale = _scales(scaling, cap)
    terms = None
    if cap is not None:
        # Refused here, in the operator, which a compiler does not look into.
        terms = tanh_terms(tanh_scale, 1.0 if backward else score_scale)
        if terms is None:
            _refuse(f"cannot hold tanh in fp32 for scaling {scaling} and softcap {cap}")
    return [scaling, tanh_scale, terms, score_scale, fixed, zeta, alpha or 0.0]


def _launch(
    kernel: Any, name: str, tensors: list[Any], numbers: list[Any], switches: dict[str, Any]
) -> None:
    query, key = tensors[0], tensors[1]
    batch_size, num_heads, length, width = query.shape
    blocks = choose_blocks(name, width, switches["CLIP"], query.dtype, query.device)
    if name == "key_value":
        programs = triton.cdiv(length, blocks.N) * batch_size * key.shape[1]
    else:
        programs = triton.cdiv(length, blocks.M) * batch_size * num_heads
    # Triton launches on the current device, whatever the tensors' is.
    with torch.cuda.device_of(query):
        kernel[(programs,)](
            *tensors,
            *numbers,
            GROUPS=num_heads // key.shape[1],
            D=width,
            COLS=max(16, 1 << (width - 1).bit_length()),
            **switches,
            **blocks.launch,
        )


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


@torch.library.custom_op("hf_stable::attention", mutates_args=())
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: torch.Tensor | None,
    scaling: float,
    cap: float | None,
    gamma: float | None,
    zeta: float,
    alpha: float | None,
    fast_tanh: bool,
    unbiased: bool,
    statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output (B, S, H, D), w (likewise, or empty), log2 Z (B, H, S), statistics."""
    clip = _clips(gamma, zeta, alpha)
    output, w, lse, rows = _empty_outputs(query, clip, unbiased, statistics)
    static = cap is not None and cap <= _LARGEST_STATIC_CAP and query.dtype != torch.float16
    _launch(
        forward_kernel,
        "forward",
        [query, key, value, documents, output, w if clip or unbiased else None, lse, rows],
        [
            *_strides(query, key, value),
            *query.shape[1:3],
            *_numbers(scaling, cap, gamma, zeta, alpha, backward=False),
        ],
        {
            "CAP": cap is not None,
            "CLIP": clip,
            "DOCUMENTS": documents is not None,
            "STATIC_MAX": static,
            "UNBIASED": unbiased,
            "STATS": statistics,
            "FAST_TANH": fast_tanh,
        },
    )
    return output, w, lse, rows


def _clips(gamma: float | None, zeta: float, alpha: float | None) -> bool:
    return gamma is not None or alpha is not None or zeta != 1.0


@attention.register_fake
def _empty_outputs_like(
    query, key, value, documents, scaling, cap, gamma, zeta, alpha, fast_tanh, unbiased, statistics
):
    return _empty_outputs(query, _clips(gamma, zeta, alpha), unbiased, statistics)


def _empty_outputs(
    query: torch.Tensor, clip: bool, unbiased: bool, statistics: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch_size, num_heads, length, width = query.shape
    output = query.new_empty(batch_size, length, num_heads, width)
    w = query.new_empty(
        output.shape if clip or unbiased else (0,),
        dtype=torch.float32 if unbiased else query.dtype,
    )
    lse = query.new_empty(batch_size, num_heads, length, dtype=torch.float32)
    shape = (3, *lse.shape) if statistics else (0,)
    return output, w, lse, lse.new_empty(shape)


@torch.library.custom_op("hf_stable::attention_backward", mutates_args=())
def attention_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: torch.Tensor | None,
    w: torch.Tensor,
    lse: torch.Tensor,
    scaling: float,
    cap: float | None,
    gamma: float | None,
    zeta: float,
    alpha: float | None,
    fast_tanh: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, in their shapes; heads lie beside each other in memory."""
    grads = _empty_gradients(query, key, value)
    batch, row, head = grad_output.stride()[:3]
    numbers = [
        *_strides(query, key, value),
        *(batch, row, head),
        *query.shape[1:3],
        *_numbers(scaling, cap, gamma, zeta, alpha, backward=True),
    ]
    switches = {
        "CAP": cap is not None,
        "CLIP": _clips(gamma, zeta, alpha),
        "DOCUMENTS": documents is not None,
        "FAST_TANH": fast_tanh,
    }
    delta = torch.empty_like(lse)
    shared = [query, key, value, documents]
    # dQ first: it makes delta, which dK needs.
    tensors = [*shared, w, lse, grad_output, delta, grads[0]]
    _launch(query_kernel, "query", tensors, numbers, switches)
    tensors = [*shared, lse, delta, grad_output, grads[1], grads[2]]
    _launch(key_value_kernel, "key_value", tensors, numbers, switches)
    return grads


@attention_backward.register_fake
def _empty_gradients_like(
    grad_output, query, key, value, documents, w, lse, scaling, cap, gamma, zeta, alpha, fast_tanh
):
    return _empty_gradients(query, key, value)


def _empty_gradients(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As (B, S, H, D) in memory, as projections want them; the tensors are (B, H, S, D)."""
    query, key, value = (
        tensor.new_empty([tensor.shape[axis] for axis in (0, 2, 1, 3)]).transpose(1, 2)
        for tensor in inputs
    )
    return query, key, value


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    query, key, value, documents, *ctx.numbers, ctx.fast_tanh, _, _ = inputs
    result, w, lse, rows = output
    ctx.mark_non_differentiable(w, lse, rows)
    ctx.save_for_backward(query, key, value, documents, w if w.numel() else result, lse)


def _backward(ctx: Any, grad_output: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    query, key, value, documents, w, lse = ctx.saved_tensors
    if grad_output.stride(-1) != 1:
        grad_output = grad_output.contiguous()
    grads = attention_backward(
        grad_output, query, key, value, documents, w, lse, *ctx.numbers, ctx.fast_tanh
    )
    return *grads, *[None] * 9


attention.register_autograd(_backward, setup_context=_setup_context)


def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    clip_gamma: float | None = None,
    clip_zeta: float = 1.0,
    clip_alpha: float | None = None,
    documents: torch.Tensor | None = None,
    fast_tanh: bool = False,
    unbiased: bool = False,
    return_statistics: bool = False,
) -> tuple[torch.Tensor, AttentionStatistics | None]:
    """Causal attention with every technique of the score room, in O(S) memory, differentiable.

    FlashAttention-2 (Dao 2023) with a tanh cap (Gemma 2) and clipped softmax (Bondarenko et al.
    2023, eq. 4); statistics and sums are fp32. Equal to `functional_stable_gpt.attention_forward`.

    Args:
        query: (B, H, S, D) fp32, fp16 or bf16, D at most 256. key, value: (B, G, S, D) with H a
            multiple of G. Any strides. Under autocast they are cast to its dtype.
        scaling: multiplies the scores, > 0.
        softcap: tanh cap of the scaled scores, > 0; None is off.
        clip_gamma, clip_zeta: stretch of the probabilities, gamma <= 0 and zeta >= 1.
        clip_alpha: if given, gamma is -alpha / number of keys that a row sees.
        documents: see `documents.py`; None is plain causal.
        fast_tanh: tanh by the hardware, NVIDIA GPUs only. Its relative error of 2^-11 is one of
            0.024 in a capped score of 50, and 2.5 % of that score's weight.
        unbiased: take the bias out of half precision's rounding, as `attention_forward` has it, for
            four bytes more per element of the output; fp32 has none.
        return_statistics: whether to return what attention did.

    Returns:
        (B, S, H, D) in the (autocast) dtype, zero for a row that sees no key; and the statistics.

    Raises:
        ValueError: for what the kernels cannot do, naming it.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    _check(query, key, value, documents, fast_tanh)
    _check_numbers(scaling, softcap, clip_gamma, clip_zeta, clip_alpha)
    given_dtype = query.dtype
    if needs_fp32(given_dtype):
        query, key, value = query.float(), key.float(), value.float()
    query, key, value = (
        tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value)
    )
    output, _, lse, rows = attention(
        query,
        key,
        value,
        None if documents is None else documents.contiguous(),
        scaling,
        softcap,
        clip_gamma,
        clip_zeta,
        clip_alpha,
        fast_tanh,
        unbiased and query.dtype != torch.float32,
        return_statistics,
    )
    statistics = None
    if return_statistics:
        statistics = AttentionStatistics(rows[0], rows[1], rows[2] <= 0, lse != math.inf)
    return output.to(given_dtype), statistics


def _refuse(problem: str) -> NoReturn:
    raise ValueError(f'attn_implementation="stable_triton" {problem}: use "eager".')


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: torch.Tensor | None,
    fast_tanh: bool,
) -> None:
    """Refuse tensors that the kernels would read wrongly; messages are made in need only."""
    batch_size, num_heads, length, width = query.shape
    dtypes = {query.dtype, key.dtype, value.dtype}
    if not query.is_cuda and not INTERPRETED:
        _refuse(f"needs a CUDA device, found {query.device}")
    if fast_tanh and INTERPRETED:
        _refuse("has no hardware tanh where Triton is interpreted")
    if len(dtypes) > 1 or not dtypes <= _DTYPES:
        found = ", ".join(str(dtype) for dtype in (query.dtype, key.dtype, value.dtype))
        _refuse(f"needs fp32, fp16 or bf16 for query, key and value alike, found {found}")
    if key.shape != value.shape or (key.shape[0], *key.shape[2:]) != (batch_size, length, width):
        shapes = f"{[*query.shape]}, {[*key.shape]} and {[*value.shape]}"
        _refuse(f"needs keys and values of the queries' batch, length and width, found {shapes}")
    if num_heads % key.shape[1]:
        _refuse(f"needs a multiple of {key.shape[1]} query heads, found {num_heads}")
    if width > MAX_HEAD_DIM:
        _refuse(f"takes head_dim up to {MAX_HEAD_DIM}, found {width}")
    if documents is not None and not is_documents(documents, batch_size, length):
        _refuse(f"needs documents of shape {[batch_size, 1, 5, length]}, int32")


def _check_numbers(
    scaling: float, cap: float | None, gamma: float | None, zeta: float, alpha: float | None
) -> None:
    if not scaling > 0:
        _refuse(f"needs a positive scaling, found {scaling}")
    if cap is not None and not cap > 0:
        _refuse(f"needs a positive softcap, found {cap}")
    if not (gamma or 0.0) <= 0 or not zeta >= 1 or not (alpha or 0.0) >= 0:
        found = f"clip_gamma={gamma}, clip_zeta={zeta}, clip_alpha={alpha}"
        _refuse(f"needs clip_gamma <= 0, clip_zeta >= 1 and clip_alpha >= 0, found {found}")
