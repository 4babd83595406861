"""Trainers for a StableGPT, based on those of Transformers and other libraries.

`StableTrainer` extends `transformers.Trainer`; `hf_stable.trainers.trl` extends TRL's.
"""

from transformers import Trainer

from .mixin import StableTrainerMixin

__all__ = ["StableTrainer", "StableTrainerMixin"]


class StableTrainer(StableTrainerMixin, Trainer):
    """`transformers.Trainer` with our parameter groups, which refuses to train without z-loss."""
