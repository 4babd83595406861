"""A run: everything that the training loop needs, and the model that it writes at the end."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from . import durable, optim, parallel
from .checkpoints import CheckpointWriter
from .corpus import Corpus, training_order
from .data import data_loader
from .data.order import Order
from .guard import Decision, Guard
from .model import StableGPTConfig
from .qk_clip import QKClip
from .recipes import Recipe, to_dict
from .reporting import Reporter, Throughput
from .resuming import roll_back
from .telemetry import Watcher, watch


@dataclass(frozen=True)
class Run:
    """Everything that the training loop needs."""

    recipe: Recipe
    folder: Path
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    config: StableGPTConfig
    model: Any
    optimizer: torch.optim.AdamW
    first_step: int
    order: Order
    guard: Guard
    update_norm: float | None
    rollbacks: int
    tracker_run: str
    checkpoints: CheckpointWriter
    flops_per_token: float
    reporter: Reporter

    def loader(self, first_step: int, num_steps: int) -> DataLoader:
        """Return this process's training microbatches, in the order given by the recipe's seed."""
        settings = self.recipe.training
        return data_loader(
            self.corpus.train,
            self.order,
            start_step=first_step,
            num_steps=num_steps,
            global_batch_size=settings.global_batch_size,
            micro_batch_size=settings.micro_batch_size,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            num_workers=self.recipe.data.num_workers,
        )

    def watch(self) -> Watcher:
        """Return the telemetry that observes the model during training."""
        settings = self.recipe.telemetry
        return watch(
            self.model,
            self.optimizer,
            every=settings.every,
            bounds_every=settings.bounds_every,
            first_step=self.first_step,
        )

    def qk_clip(self) -> QKClip | None:
        """Return the QK-Clip that shrinks heads with large logits, if the recipe asks for it."""
        threshold = self.recipe.optimizer.qk_clip
        return None if threshold is None else QKClip(self.model, threshold)

    def max_grad_norm(self, step: int) -> float | None:
        """Return the norm to which the gradients of a step, counted from 0, are clipped."""
        settings = self.recipe.optimizer
        late = settings.late_max_grad_norm, settings.late_clip_step
        return optim.max_grad_norm_at(step, settings.max_grad_norm, *late)

    def scalars(self, step: int, update_norm: float | None) -> dict[str, Any]:
        """Return the values that a checkpoint after `step` steps stores beside its tensors.

        Args:
            step: Number of optimizer steps done.
            update_norm: Norm of the last update, which the guard has not seen yet.
        """
        position = step * self.recipe.training.global_batch_size
        return {
            "tokens": step * self.recipe.tokens_per_step,
            "data": {
                "seed": self.recipe.seed,
                "position": position,
                "absolute": int(self.order.absolute(np.array(position))),
                "skipped": [list(each) for each in self.order.skipped],
            },
            "guard": self.guard.state_dict(),
            "update_norm": update_norm,
            "rollbacks": self.rollbacks,
            "tracker_run": self.tracker_run,
            "recipe": to_dict(self.recipe),
        }

    def rolled_back(self, decision: Decision) -> "Run":
        """Return the run reset to before the trouble found by the guard, with other data ahead."""
        where = roll_back(
            self.folder,
            decision,
            self.order,
            self.recipe.training,
            self.model,
            self.optimizer,
            self.accelerator,
            Guard(self.recipe.guard),
        )
        order = training_order(self.recipe, self.corpus, where.skipped)
        text = f"rolled back to step {where.step} ({decision.reason})"
        about = {"at_step": decision.step, "skipped": [list(each) for each in order.skipped]}
        self.reporter.event("rolled_back", where.step, text, **about)
        return replace(
            self,
            first_step=where.step,
            order=order,
            guard=where.guard,
            update_norm=where.update_norm,
            rollbacks=len(where.skipped),
        )

    def throughput(self) -> Throughput:
        """Return a new meter of the run's tokens per second."""
        return Throughput(self.recipe.tokens_per_step, self.flops_per_token, self.accelerator)

    def learning_rate_factor(self, step: int) -> float:
        """Return the schedule's factor on every peak learning rate."""
        schedule = self.recipe.schedule
        return optim.learning_rate_factor(
            step,
            name=schedule.name,
            total_steps=self.recipe.num_steps,
            warmup=self.recipe.warmup_steps,
            min_ratio=schedule.min_ratio,
            decay_fraction=schedule.decay_fraction,
        )


def save_model(run: Run) -> Path:
    """Write `folder/model`, a Transformers folder with weights and tokenizer; collective."""
    target = run.folder / "model"
    weights = parallel.full_weights(run.model)
    if run.accelerator.is_main_process:
        durable.remove_remains(target)  # nobody else writes here: this process holds the run lock
        inner = parallel.unwrap_model(run.model)
        # A folder of this name counts as the model of a finished run, so it must appear whole.
        with durable.whole_folder(target) as temporary:
            inner.save_pretrained(temporary, state_dict=weights)
            run.tokenizer.save_pretrained(temporary)
    run.accelerator.wait_for_everyone()
    return target
