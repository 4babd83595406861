"""Sum of log^2 Z over a StableGPT's tokens, without cross entropy and without a (T, V) tensor.

Shape letters: B batch, Q tokens, C width, T = B * Q, V vocabulary.
"""

import contextlib
from collections.abc import Iterator
from functools import wraps
from typing import Any

import torch
from torch import nn

from hf_stable.model import StableGPTForCausalLM
from hf_stable.model.functional_stable_gpt import softcap, statistics_dtype
from hf_stable.model.loss_stable_gpt import linear_cross_entropy


def squared_log_z(
    model: StableGPTForCausalLM, hidden: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Compute the sum of log^2 Z over the labeled tokens.

    Args:
        model: StableGPT whose head is used.
        hidden: (B, Q, C) output of the decoder.
        targets: (B, Q) int64, already shifted; a negative label is no target.

    Returns:
        0-d tensor, differentiable in `hidden` and the head.
    """
    head: Any = model.get_output_embeddings()
    total, _, _ = linear_cross_entropy(
        hidden.flatten(0, 1),
        head.weight,
        targets.to(hidden.device).flatten(),
        num_items=1,
        cap=model.config.final_logit_softcapping,
        z_loss=1.0,
        around=lambda _: squared_log_z_rows,
    )
    return total


def squared_log_z_rows(
    logits: torch.Tensor, labels: torch.Tensor, cap: float | None, z_loss: float, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return zeros instead of the cross entropy of `cross_entropy_rows`, and log^2 Z, (T,) each.

    If `gradient`, `logits` (T, V) are overwritten with the gradient
    2 c log Z softmax (1 - tanh^2) of c log^2 Z.
    """
    wide = logits.to(statistics_dtype(logits))
    capped = wide if cap is None else softcap(wide, cap)
    log_z = capped.logsumexp(-1)
    lse = torch.where(labels >= 0, log_z, 0)
    if gradient:
        grad = (capped - log_z[:, None]).exp() * (2 * z_loss * lse)[:, None]
        logits.copy_(grad if cap is None else grad * (1 - (capped / cap).square()))
    return torch.zeros_like(lse), lse.square()


@contextlib.contextmanager
def squares_of_scored_tokens(
    causal_lm: StableGPTForCausalLM,
) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Collect the sum of log^2 Z and the token count of each pass with gradients in TRL's head.

    TRL replaces `forward` of the instance, and PEFT calls that without hooks. This function
    therefore also replaces it, during one loss.
    """
    squares: list[tuple[torch.Tensor, torch.Tensor]] = []
    model: Any = causal_lm
    scoring = model.forward
    replaced = "forward" in vars(model)

    @wraps(scoring)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not (kwargs.get("fused_lm_head") and torch.is_grad_enabled()):
            return scoring(*args, **kwargs)

        def measure(_: nn.Module, __: Any, output: Any) -> None:
            targets = kwargs.get("shift_labels")
            if targets is None:
                targets = nn.functional.pad(kwargs["labels"], (0, 1), value=-100)[..., 1:]
            squares.append(
                (squared_log_z(causal_lm, output.last_hidden_state, targets), (targets >= 0).sum())
            )

        hook = causal_lm.model.register_forward_hook(measure)
        try:
            return scoring(*args, **kwargs)
        finally:
            hook.remove()

    model.forward = forward
    try:
        yield squares
    finally:
        if replaced:
            model.forward = scoring
        else:
            del model.forward
