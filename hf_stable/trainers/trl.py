"""TRL's trainers with our parameter groups and the model's z-loss (needs TRL).

TRL's trainers score hidden states with a separate head and never ask a model for its loss.
"""

from trl import DPOTrainer, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

from .mixin import StableTrainerMixin

__all__ = ["StableDPOTrainer", "StableSFTTrainer"]


class StableSFTTrainer(StableTrainerMixin, SFTTrainer):
    """`trl.SFTTrainer` with the model's loss: cross entropy plus z-loss."""


class StableDPOTrainer(StableTrainerMixin, DPOTrainer):
    """`trl.DPOTrainer` plus the policy's z-loss, averaged over all tokens of both completions."""
