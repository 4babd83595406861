"""The optimizer's side of a run: parameter groups, update rules, schedules, clipping and norms."""

from .clipping import ClipBy, clip_gradients
from .groups import parameter_groups
from .norms import eps_warning, fractions_below_eps, update_norm
from .optimizers import OPTIMIZERS, StableAdamW, adamw, stable_adamw
from .schedules import Schedule, learning_rate_factor, max_grad_norm_at, set_learning_rate

__all__ = [
    "OPTIMIZERS",
    "ClipBy",
    "Schedule",
    "StableAdamW",
    "adamw",
    "clip_gradients",
    "eps_warning",
    "fractions_below_eps",
    "learning_rate_factor",
    "max_grad_norm_at",
    "parameter_groups",
    "set_learning_rate",
    "stable_adamw",
    "update_norm",
]
