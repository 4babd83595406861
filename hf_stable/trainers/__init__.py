"""What a Trainer of Transformers, or one made of it, lacks for a StableGPT.

`StableTrainer` is for `transformers.Trainer`; `hf_stable.trainers.trl` has TRL's.
"""

from transformers import Trainer

from .mixin import StableTrainerMixin

__all__ = ["StableTrainer", "StableTrainerMixin"]


class StableTrainer(StableTrainerMixin, Trainer):
    """`transformers.Trainer` with our parameter groups, which refuses to train without z-loss."""
