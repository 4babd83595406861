"""The mixin: an optimizer of our parameter groups, and z-loss where a trainer would drop it.

Law of this file: the loss that is differentiated has the z-loss of the model's config, once, or the
step is refused.
"""

from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer

from hf_stable.errors import UserError
from hf_stable.model import StableGPTForCausalLM
from hf_stable.optim import parameter_groups

from .log_z import squares_of_scored_tokens

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

# What optimizers that choose their own parameters put beside their options.
_OWN_PARAMETERS = {"params", "model", "optimizer_dict"}


class StableTrainerMixin(_Base):
    """Goes before any Trainer: `class MyTrainer(StableTrainerMixin, SFTTrainer)`.

    The optimizer is that of `args.optim` over `hf_stable.optim.parameter_groups`: no vector is
    decayed (norm gains, LayerScale, sigma-Reparam gains), and matrices have simple muP's rate.

    z-loss is as in the model's own loss: the same tokens, and the same denominator, which is
    `num_items_in_batch` where the trainer has it and else the number of scored tokens. A trainer
    that asks the model for its loss is left alone. One that scores hidden states by itself (TRL)
    gets the term of every pass that is differentiated, for all tokens whose log-probability it
    takes. In evaluation the loss is the trainer's own.

    Raises (in training):
        UserError: the loss was computed outside the model in a way that z-loss cannot follow
            (`label_smoothing_factor`, `compute_loss_func`), or `args.optim` forms its own groups.
    """

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, trained
            )
            # Factories and GaLore-like optimizers choose what they train by themselves.
            plain = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
            if not plain or _OWN_PARAMETERS & options.keys():
                raise UserError(
                    f"optim={self.args.optim!s}: {kind} forms its own parameter groups, so that "
                    'decay and muP rates would not be ours; use "adamw_torch" or another '
                    "optimizer of torch"
                )
            groups = parameter_groups(
                trained,
                learning_rate=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
            )
            self.optimizer = kind(groups, **options)
        return super().create_optimizer(model)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        causal_lm = _stable_gpt_of(self.model)
        if causal_lm is None or not causal_lm.config.z_loss or not torch.is_grad_enabled():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._check_z_loss(causal_lm)
        with squares_of_scored_tokens(causal_lm) as squares:
            result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not squares:
            if causal_lm.loss_watch.unanswered:
                raise _foreign_loss(causal_lm.config.z_loss)
            return result
        sums, counts = zip(*squares, strict=True)
        z_loss = causal_lm.config.z_loss * torch.stack(sums).sum()
        if num_items_in_batch is None:
            z_loss = z_loss / torch.stack(counts).sum().clamp(min=1)
        else:
            z_loss = z_loss / num_items_in_batch * self._processes_averaged_over()
        causal_lm.loss_watch.answer()
        if return_outputs:
            loss, outputs = result
            return loss + z_loss, outputs
        return result + z_loss

    def _check_z_loss(self, causal_lm: StableGPTForCausalLM) -> None:
        """Refuse what can be told before a step; a compiled one is seen by no watch."""
        z_loss = causal_lm.config.z_loss
        if self.label_smoother is not None or self.compute_loss_func is not None:
            raise _foreign_loss(z_loss)
        if self.args.torch_compile and "forward" in vars(causal_lm):
            raise UserError(
                f"z_loss={z_loss} may be lost with torch_compile=True, since this trainer scores "
                "hidden states by itself: leave torch_compile off and compile the blocks "
                "(`layer.compile()`), or load the model with z_loss=0.0"
            )

    def _processes_averaged_over(self) -> int:
        """The factor of Trainer's loss: items are of all ranks, and DDP averages over the ranks."""
        if not self.args.average_tokens_across_devices:
            return 1
        return self.accelerator.num_processes // self.get_tp_size()


def _stable_gpt_of(model: Any) -> StableGPTForCausalLM | None:
    """The StableGPT inside wrappers such as PEFT's; None for another model."""
    # Not by its class: that of a model whose code came from the Hub is another one.
    return next((module for module in model.modules() if "loss_watch" in vars(module)), None)


def _foreign_loss(z_loss: float) -> UserError:
    return UserError(
        f"z_loss={z_loss}: this trainer computes its loss outside the model, where z-loss cannot "
        "follow; drop label_smoothing_factor and compute_loss_func, or load the model with "
        "z_loss=0.0"
    )
