"""Cases of the benchmark of head and loss: ours, and every peer that may be installed.

A peer is one function that imports it, so that an absent one raises when it is asked for, and a row
of `CASES`. `formula` says which truth a case is held against.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from hf_stable.model import loss_stable_gpt as plain

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Hidden states (T, C), head (V, C) and labels (T,) to the mean loss."""

Z_LOSS = 1e-4
CAP = 30.0


def ours(**settings: Any) -> Loss:
    from hf_stable.kernels.linear_cross_entropy import (  # noqa: PLC0415  # needs Triton
        linear_cross_entropy,
    )

    return lambda hidden, head, labels: linear_cross_entropy(hidden, head, labels, **settings)[0]


def eager(**settings: Any) -> Loss:
    """The plain torch formula, in chunks."""
    return lambda hidden, head, labels: plain.linear_cross_entropy(
        hidden, head, labels, **settings
    )[0]


def unchunked(compiled: bool) -> Loss:
    """Logits of all tokens at once in fp32, as a model's own code has it."""

    def loss(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = (hidden @ head.T).float()
        z = logits.logsumexp(-1).square().mean()
        return F.cross_entropy(logits, labels) + Z_LOSS * z

    backend = "inductor" if torch.cuda.is_available() else "eager"
    return torch.compile(loss, fullgraph=True, backend=backend) if compiled else loss


def liger(chunk: int | None = None, sums: torch.dtype | None = None) -> Loss:
    """Liger's fused loss; None is its default.

    Args:
        chunk: multiplies the memory of a chunk.
        sums: dtype of the head's gradient while chunks are added to it, by default the head's.
    """
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction  # noqa: PLC0415

    # bias, class weights, ignored label, z-loss, smoothing, reduction, cap, whether z is returned
    options: list[Any] = [None, None, -100, Z_LOSS, 0.0, "mean", None, False]
    # dtype of sums, token scaling, accuracy, predictions, implementation, mode
    options += [sums, False, False, False, None, None]
    options += [] if chunk is None else [chunk]
    return lambda hidden, head, labels: LigerFusedLinearCrossEntropyFunction.apply(
        hidden, head, labels, *options
    )[0]


def torch_fused() -> Loss:
    """torch's own, which knows no z-loss."""
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, head, labels: F.linear_cross_entropy(
        hidden, head, labels, options=options
    )


def cce() -> Loss:
    """Cut cross entropy, every gradient computed; knows no z-loss."""
    from cut_cross_entropy import linear_cross_entropy  # noqa: PLC0415

    return partial(linear_cross_entropy, filter_eps=None)


def quack() -> Loss:
    """QuACK's chunks; knows no z-loss."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy  # noqa: PLC0415

    return chunked_linear_cross_entropy


def fla() -> Loss:
    """flash-linear-attention's; knows no z-loss."""
    from fla.modules import FusedLinearCrossEntropyLoss  # noqa: PLC0415

    module = FusedLinearCrossEntropyLoss()
    return lambda hidden, head, labels: module(hidden[None], labels[None], head)


CASES: dict[str, Callable[[], Loss]] = {
    "ours": partial(ours, z_loss=Z_LOSS),
    "ours, without z-loss": ours,
    "ours, cap": partial(ours, z_loss=Z_LOSS, cap=CAP),
    "ours, two streams": partial(ours, z_loss=Z_LOSS, two_streams=True),
    "ours, 0.5 GiB": partial(ours, z_loss=Z_LOSS, chunk_bytes=2**29),
    "ours, 1 GiB": partial(ours, z_loss=Z_LOSS, chunk_bytes=2**30),
    "ours, 4 GiB": partial(ours, z_loss=Z_LOSS, chunk_bytes=2**32),
    "ours again": partial(ours, z_loss=Z_LOSS),  # its ratio to "ours" is the noise of all ratios
    "eager": partial(eager, z_loss=Z_LOSS),
    "eager, cap": partial(eager, z_loss=Z_LOSS, cap=CAP),
    "unchunked": partial(unchunked, compiled=False),
    "unchunked, compiled": partial(unchunked, compiled=True),
    "liger": liger,
    **{f"liger, chunk {n}": partial(liger, n) for n in (4, 16, 64)},
    "liger, chunk 16, fp32 sums": partial(liger, 16, torch.float32),
    "torch, without z-loss": torch_fused,
    "cce, without z-loss": cce,
    "quack, without z-loss": quack,
    "fla, without z-loss": fla,
}


def formula(name: str) -> dict[str, Any]:
    """Arguments of the plain formula that a case of this name computes."""
    return {
        "z_loss": 0.0 if "without z-loss" in name else Z_LOSS,
        "cap": CAP if "cap" in name else None,
    }
