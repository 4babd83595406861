"""Generation that ends where the positions end, on every device and before it begins.

Invariant: a request for more tokens than there are positions returns the tokens that fit,
with a warning. Drafts never go beyond the last position.
"""

# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false

import warnings
from typing import Any

import torch
from transformers.generation import GenerationMixin


class StableGPTDrafts:
    """The candidate tokens of another generator, cut off where positions end.

    Args:
        drafts: a `CandidateGenerator` of Transformers.
        positions: of the model that judges the candidates.
        draft_positions: of the model that drafts, if one does; a longer text gets no candidates.
    """

    def __init__(self, drafts: Any, positions: int, draft_positions: int | None) -> None:
        self._drafts, self._positions = drafts, positions
        self._draft_positions = draft_positions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._drafts, name)

    def get_candidates(
        self, input_ids: torch.Tensor, **arguments: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Ids (B, Q + candidates) and, of some generators, logits (B, candidates, V)."""
        length = input_ids.shape[1]
        if self._draft_positions is not None and length >= self._draft_positions:
            return input_ids, None
        ids, logits = self._drafts.get_candidates(input_ids, **arguments)
        end = max(self._positions, length)
        if ids.shape[1] <= end:
            return ids, logits
        kept = None if logits is None or end == length else logits[:, : end - length]
        return ids[:, :end], kept


class StableGPTGenerationMixin(GenerationMixin):
    """`generate` of a model with `max_position_embeddings` and plain RoPE."""

    @property
    def _positions(self: Any) -> int | None:
        """Positions that there are; None where scaled RoPE goes on beyond them."""
        config = self.config
        is_plain = config.rope_parameters["rope_type"] == "default"
        return config.max_position_embeddings if is_plain else None

    def _prepare_model_inputs(self, *arguments: Any, **named: Any) -> Any:
        inputs, name, model_kwargs = super()._prepare_model_inputs(*arguments, **named)
        mask = model_kwargs.get("attention_mask")
        # Left padding takes no positions.
        self._padding = 0
        if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.numel():
            self._padding = int((mask.cumsum(-1) == 0).sum(-1).min())
        return inputs, name, model_kwargs

    def _prepare_generated_length(self, **arguments: Any) -> Any:
        generation_config = super()._prepare_generated_length(**arguments)
        if self._positions is None:
            return generation_config
        limit = f"max_position_embeddings={self._positions}"
        # The last token is not read again. With embeddings, only tokens that have ids are counted.
        width, counted = arguments["inputs_tensor"].shape[1], arguments["input_ids_length"]
        prompt = width - self._padding
        longest = self._positions + 1 + counted - prompt
        if longest <= counted:
            raise ValueError(f"The prompt has {prompt} tokens, but {limit}: shorten it.")
        surplus = generation_config.max_length - longest
        if surplus > 0:
            warnings.warn(f"Generation ends {surplus} tokens early, by {limit}.", stacklevel=4)
            generation_config.max_length = longest
        return generation_config

    def _get_candidate_generator(self, *arguments: Any, **named: Any) -> Any:
        drafts = super()._get_candidate_generator(*arguments, **named)
        if self._positions is None:
            return drafts
        draft = getattr(named.get("assistant_model"), "config", None)
        draft_positions = getattr(draft, "max_position_embeddings", None)
        return StableGPTDrafts(drafts, self._positions, draft_positions)
