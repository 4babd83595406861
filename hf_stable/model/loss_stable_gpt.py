"""Head and loss in chunks of tokens: cross entropy and z-loss, never holding (T, V).

Invariant: one loop of chunks for everybody; what happens to a chunk of logits is a function,
plain torch here, which a device's kernel may replace through `LinearCrossEntropyInterface`.

Shape letters: T tokens, C width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from transformers.utils.generic import GeneralInterface

from .functional_stable_gpt import statistics_dtype

# Bytes of one chunk of fp32 logits. A CPU wants them near its caches, a GPU few, large GEMMs.
CHUNK_BYTES = {"cpu": 2**23, "cuda": 2**31}
# Fewer rows would read and write the whole weight gradient too often.
CHUNK_ROWS = 128


def cross_entropy_rows(
    logits: torch.Tensor, labels: torch.Tensor, cap: float | None, z_loss: float, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy and log^2 Z of each row; `logits` become the gradient of CE + z-loss.

    That is ((1 + 2 c log Z) softmax - onehot) (1 - tanh^2) for each row, not averaged.

    Args:
        logits: (T, V), uncapped; overwritten, by the gradient if `gradient`.
        labels: (T,); a row whose label is negative is zero everywhere.
        cap: tanh cap; None is off.
        z_loss: coefficient c of log^2 Z.

    Returns:
        (T,) each, in at least fp32.
    """
    capped = logits.to(statistics_dtype(logits))
    slope = None
    if cap is not None:
        capped = capped.div_(cap).tanh_()
        slope = 1 - capped.square() if gradient else None
        capped = capped.mul_(cap)
    lse = capped.logsumexp(-1)
    labelled = labels >= 0
    targets = labels.clamp(min=0)
    picked = capped.gather(-1, targets[:, None])[:, 0]
    cross_entropy = torch.where(labelled, lse - picked, 0)
    squared_log_z = torch.where(labelled, lse.square(), 0)
    if gradient:
        weight = labelled.to(lse.dtype)
        grad = capped.sub_(lse[:, None]).exp_().mul_((weight * (1 + 2 * z_loss * lse))[:, None])
        grad[torch.arange(len(labels), device=labels.device), targets] -= weight
        grad = grad if slope is None else grad.mul_(slope)
        if grad.dtype != logits.dtype:
            logits.copy_(grad)
    return cross_entropy, squared_log_z


def _accumulate(total: torch.Tensor, grad: torch.Tensor, tokens: torch.Tensor, first: bool) -> None:
    """total = grad.T @ tokens if `first`, else total += grad.T @ tokens.

    The sums of GEMMs in half precision are fp32: bf16 sums over chunks lose the rare tokens of a
    large vocabulary. CUDA writes them from inside the GEMM.

    Args:
        total: (V, C), in at least fp32. grad: (T, V). tokens: (T, C).
    """
    if total.dtype == tokens.dtype:
        torch.addmm(total, grad.T, tokens, beta=0 if first else 1, out=total)
    elif not total.is_cuda or total.dtype != torch.float32:
        product = grad.T @ tokens
        total.copy_(product) if first else total.add_(product)
    elif first:
        torch.mm(grad.T, tokens, out_dtype=torch.float32, out=total)
    elif torch.compiler.is_compiling():
        # torch 2.11 cannot trace the next branch (pytorch issue 163880).
        total.add_(torch.mm(grad.T, tokens, out_dtype=torch.float32))
    else:
        torch.addmm(total, grad.T, tokens, out_dtype=torch.float32, out=total)


# What makes losses and, in place, gradients of a chunk: `cross_entropy_rows` or a kernel like it.
RowFunction = Callable[
    [torch.Tensor, torch.Tensor, float | None, float, bool], tuple[torch.Tensor, torch.Tensor]
]


# What makes logits of a chunk's tokens, gives them to a function that replaces them by gradients,
# and makes the gradient of the tokens: `chunk_in_order` or what orders the three otherwise.
ChunkFunction = Callable[
    [
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        torch.Tensor | None,
        Callable[[torch.Tensor, torch.Tensor], None],
    ],
    None,
]


def chunk_in_order(
    tokens: torch.Tensor,
    head: torch.Tensor,
    labels: torch.Tensor,
    logits: torch.Tensor,
    grad_tokens: torch.Tensor | None,
    take_rows: Callable[[torch.Tensor, torch.Tensor], None],
) -> None:
    """Logits of a chunk, losses and gradients of its rows, gradient of its tokens.

    Args:
        tokens: (T, C). head: (V, C). labels: (T,).
        logits: (T, V), uninitialized; afterwards what `take_rows` makes of them.
        grad_tokens: (T, C), written; None where nobody needs it.
        take_rows: is given logits and labels of some rows, of each row once.
    """
    torch.mm(tokens, head.T, out=logits)
    take_rows(logits, labels)
    if grad_tokens is not None:
        grad_tokens.copy_(logits @ head)


class _Options(NamedTuple):
    row_function: RowFunction
    chunk_function: ChunkFunction
    rows: int
    dtype: torch.dtype
    cap: float | None
    z_loss: float
    hidden_gradient: bool
    weight_gradient: bool


class _LinearCrossEntropy(torch.autograd.Function):
    """Head, cap, cross entropy and z-loss in chunks of tokens; gradients are made on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        denominator: torch.Tensor,
        options: _Options,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        row_function, chunk_function, rows, dtype, cap, z_loss, *gradients = options
        hidden_gradient, weight_gradient = gradients
        wide = statistics_dtype(hidden)
        head = weight.to(dtype)
        buffer = head.new_empty(min(rows, len(hidden)), len(head))
        ce = torch.zeros((), dtype=wide, device=hidden.device)
        squared_log_z = torch.zeros_like(ce)
        grad_hidden = torch.empty_like(hidden) if hidden_gradient else None
        grad_weight = torch.empty_like(weight, dtype=wide) if weight_gradient else None

        def take_rows(logits: torch.Tensor, labels: torch.Tensor) -> None:
            gradient = hidden_gradient or weight_gradient
            chunk_ce, chunk_square = row_function(logits, labels, cap, z_loss, gradient)
            ce.add_(chunk_ce.sum())
            squared_log_z.add_(chunk_square.sum())

        # No token is one empty chunk, which still writes the weight gradient.
        for start in range(0, max(len(hidden), 1), rows):
            part = slice(start, start + rows)
            tokens = hidden[part].to(dtype)
            logits = buffer[: len(tokens)]
            grad_tokens = None if grad_hidden is None else grad_hidden[part]
            chunk_function(tokens, head, labels[part], logits, grad_tokens, take_rows)
            if grad_weight is not None:
                _accumulate(grad_weight, logits, tokens, first=start == 0)
        ctx.save_for_backward(grad_hidden, grad_weight, denominator)
        ctx.weight_dtype = weight.dtype
        ce, z = ce / denominator, z_loss * squared_log_z / denominator
        ctx.mark_non_differentiable(ce, z)
        return ce + z, ce, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        grad_hidden, grad_weight, denominator = ctx.saved_tensors
        # Averaging and the scale of a GradScaler meet here, in fp32: 1 / tokens before the GEMMs
        # would make the gradients of rare ids vanish in fp16, and a scale of 65536 is inf in it.
        factor = torch.where(denominator > 0, grad_loss / denominator, 0)
        if grad_hidden is not None:
            grad_hidden = (grad_hidden.to(factor.dtype) * factor).to(grad_hidden.dtype)
        if grad_weight is not None:
            # One read and one write, not an fp32 product of a gigabyte before the cast.
            narrow = torch.empty_like(grad_weight, dtype=ctx.weight_dtype)
            grad_weight = torch.mul(grad_weight, factor, out=narrow)
        return grad_hidden, grad_weight, None, None, None


def gemm_dtype(hidden: torch.Tensor) -> torch.dtype:
    """The dtype in which a linear map of `hidden` computes: its own, or autocast's."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def chunked_linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_items: torch.Tensor | int | None,
    cap: float | None,
    z_loss: float,
    rows: int,
    row_function: RowFunction,
    chunk_function: ChunkFunction = chunk_in_order,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`linear_cross_entropy` in chunks of `rows` tokens, whose logits `row_function` works on."""
    count = (labels >= 0).sum() if num_items is None else num_items
    # Multiplied, not copied: a number that is moved to a GPU makes the host wait for it.
    denominator = torch.ones((), dtype=statistics_dtype(hidden), device=hidden.device) * count
    differentiable = torch.is_grad_enabled()
    options = _Options(
        row_function,
        chunk_function,
        rows,
        gemm_dtype(hidden),
        cap,
        z_loss,
        differentiable and hidden.requires_grad,
        differentiable and weight.requires_grad,
    )
    with torch.autocast(hidden.device.type, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, labels, denominator, options)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_items: torch.Tensor | int | None = None,
    cap: float | None = None,
    z_loss: float = 0.0,
    chunk_bytes: int | None = None,
    around: Callable[[RowFunction], RowFunction] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross entropy of `softcap(hidden @ weight.T)` plus `z_loss * log^2 Z`, never holding (T, V).

    z-loss: PaLM (Chowdhery et al. 2022, section 5); Wortsman et al. 2023, section 3.1.2. It has the
    positions and the denominator of the cross entropy. The three GEMMs run in `hidden`'s dtype, or
    autocast's; everything else (cap, log Z, sums over chunks) is in at least fp32.

    Args:
        hidden: (T, C). weight: (V, C).
        labels: (T,) int64; a negative label, such as -100, is no target.
        num_items: denominator; None is the number of targets.
        cap: tanh cap of the logits; None is off.
        z_loss: coefficient; 0.0 is off.
        chunk_bytes: bytes of one chunk of fp32 logits; None is `CHUNK_BYTES` of the device, and at
            least `CHUNK_ROWS` tokens.
        around: what may look at each chunk: it is given the row function and returns another.

    Returns:
        loss (differentiable), its cross entropy and its z-loss (both not), 0-d, loss = CE + z-loss.
        NaN when there is no target, as in `torch.nn.functional.cross_entropy`, with zero gradients.
    """
    budget = chunk_bytes or CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"])
    rows = max(1 if chunk_bytes else CHUNK_ROWS, budget // (4 * weight.shape[0]))
    return chunked_linear_cross_entropy(
        hidden,
        weight,
        labels,
        num_items=num_items,
        cap=cap,
        z_loss=z_loss,
        rows=rows,
        row_function=cross_entropy_rows if around is None else around(cross_entropy_rows),
    )


def logits_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_items: torch.Tensor | int | None = None,
    z_loss: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`linear_cross_entropy` of logits that are there, (T, V), after their cap."""
    logits = logits.to(statistics_dtype(logits))
    labelled = labels >= 0
    lse = logits.logsumexp(-1)
    picked = logits.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    count = labelled.sum() if num_items is None else num_items
    ce = torch.where(labelled, lse - picked, 0).sum() / count
    z = z_loss * torch.where(labelled, lse.square(), 0).sum() / count
    return ce + z, ce.detach(), z.detach()


class LinearCrossEntropyInterface(GeneralInterface):
    """Registry of functions for the loss of the head, by the device type of its hidden states.

    Each has the arguments, values and laws of `linear_cross_entropy`, which is used where none is
    registered.
    """

    _global_mapping: dict[str, Callable[..., Any]] = {}


LINEAR_CROSS_ENTROPY_FUNCTIONS = LinearCrossEntropyInterface()
