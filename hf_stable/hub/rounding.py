"""Effect of a change of the weights on the outputs, measured on text that every export has."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

_LONGEST = 512
# Positions compared at once: float64 logits over a vocabulary of 256,000 need 2 MB each.
_ROWS = 64


@dataclass(frozen=True)
class Rounding:
    """Distance between two models' outputs on the same tokens.

    Args:
        tokens: Number of tokens.
        largest: Largest difference of two logits.
        root_mean_square: Root mean square of all differences.
        divergence: KL(before || after) of the next token, mean over positions, in nats.
    """

    tokens: int
    largest: float
    root_mean_square: float
    divergence: float

    def sentence(self) -> str:
        """Describe the distance in a sentence for the card."""
        return (
            f"On the first {self.tokens:,} tokens of LICENSE its logits differ from those of the "
            f"trained weights by at most {self.largest:.3g} (root mean square "
            f"{self.root_mean_square:.3g}; KL divergence {self.divergence:.3g} nats per token)."
        )


def measuring_tokens(tokenizer: PreTrainedTokenizerBase, text: str, longest: int) -> torch.Tensor:
    """Return the text's first tokens, at most 512 and `longest`, as (1, T) int64."""
    ids: Any = tokenizer(text, add_special_tokens=False).input_ids
    return torch.tensor([ids[: min(longest, _LONGEST)]])


@torch.no_grad()
def measure(before: torch.Tensor, after: torch.Tensor) -> Rounding:
    """Compare logits, each (T, V) of any dtype, in float64."""
    largest, squares, divergence = 0.0, 0.0, 0.0
    for start in range(0, len(before), _ROWS):
        p, q = (each[start : start + _ROWS].double() for each in (before, after))
        largest = max(largest, float((p - q).abs().max()))
        squares += float((p - q).square().sum())
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        divergence += float((log_p.exp() * (log_p - log_q)).sum())
    return Rounding(
        tokens=len(before),
        largest=largest,
        root_mean_square=(squares / before.numel()) ** 0.5,
        divergence=max(0.0, divergence / len(before)),
    )
