"""A warning when a StableGPT with z-loss is trained by a loss that leaves z-loss out.

Invariant: training the decoder of a causal LM uses the model's loss, or warns.
"""

import warnings
from typing import Any

import torch
from torch import nn


class StableGPTLossWatch:
    """Knows whether the latest training pass of a decoder was followed by the model's own loss.

    Some trainers run the decoder and score its hidden states themselves (TRL), others make a loss
    of their own from logits (label smoothing). Neither asks the model, so `z_loss` has no effect.

    Attributes:
        unanswered: a training pass ran whose loss the model was not asked for.
    """

    def __init__(self, z_loss: float) -> None:
        self.z_loss = z_loss
        self.unanswered = False
        self._told = False

    def before_decoder(self, decoder: nn.Module, _: Any) -> None:
        """Forward pre-hook of the decoder; warns once, at the pass after one without its loss."""
        if torch.compiler.is_compiling() or not (decoder.training and torch.is_grad_enabled()):
            return
        if self.unanswered and not self._told:
            self._told = True
            warnings.warn(
                f"z_loss={self.z_loss} is no part of this training: the loss is computed outside "
                "the model. For TRL use StableSFTTrainer or StableDPOTrainer of "
                "hf_stable.trainers.trl (or its mixin with any other trainer), drop "
                "label_smoothing_factor and compute_loss_func, or load the model with z_loss=0.0.",
                stacklevel=2,
            )
        self.unanswered = True

    def answer(self) -> None:
        """The loss of the latest pass has its z-loss."""
        if not torch.compiler.is_compiling():
            self.unanswered = False
