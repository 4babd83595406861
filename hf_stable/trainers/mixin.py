"""Trainer mixin with our parameter groups, and with z-loss where a trainer would drop it.

Invariant of this file: the differentiated loss contains the z-loss of the model's config exactly
once, or the step is refused.
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

# Options of optimizers that choose their own parameters.
_OWN_PARAMETERS = {"params", "model", "optimizer_dict"}


class StableTrainerMixin(_Base):
    """Mixin to put before any Trainer: `class MyTrainer(StableTrainerMixin, SFTTrainer)`.

    The optimizer is that of `args.optim` over `hf_stable.optim.parameter_groups`. No vector is
    decayed (norm gains, LayerScale, sigma-Reparam gains), and matrices have simple muP's rate.

    z-loss is the same as in the model's own loss: over the same tokens, divided by
    `num_items_in_batch` if the trainer has it, else by the number of scored tokens. A trainer that
    asks the model for its loss is left unchanged. For one that scores hidden states itself (TRL),
    the term is added for every pass with gradients, over all tokens whose log-probability it uses.
    In evaluation the loss is the trainer's.

    Raises:
        UserError: In training, if the loss is computed outside the model in a way that z-loss
            cannot follow (`label_smoothing_factor`, `compute_loss_func`), or if `args.optim` forms
            other parameter groups.
    """

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, trained
            )
            # Factories and GaLore-like optimizers choose their parameters themselves.
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
        """Refuse settings before a step if possible; a compiled step cannot be watched."""
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
        """Return Trainer's factor on its loss: items of all ranks, averaged over ranks by DDP."""
        if not self.args.average_tokens_across_devices:
            return 1
        return self.accelerator.num_processes // self.get_tp_size()


def _stable_gpt_of(model: Any) -> StableGPTForCausalLM | None:
    """Return the StableGPT inside wrappers such as PEFT's; None for another model."""
    # The class would not identify it: code from the Hub has another class.
    return next((module for module in model.modules() if "loss_watch" in vars(module)), None)


def _foreign_loss(z_loss: float) -> UserError:
    return UserError(
        f"z_loss={z_loss}: this trainer computes its loss outside the model, where z-loss cannot "
        "follow; drop label_smoothing_factor and compute_loss_func, or load the model with "
        "z_loss=0.0"
    )
