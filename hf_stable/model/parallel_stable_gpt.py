"""Tensor and pipeline parallelism of a StableGPT in Transformers, and its limits.

Invariant: split or whole, the loss, the logits and every gradient are the same.
"""

# Transformers registers instances of styles under a type that says functions.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false

from typing import Any

from torch import nn
from torch.distributed.tensor import Replicate
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, ColwiseParallel

from .configuration_stable_gpt import StableGPTConfig


class StableGPTHeadParallel(ColwiseParallel):
    """A head sharded by the vocabulary: logits are gathered, and for a loss the weight is.

    The loss takes tokens in chunks and needs all logits of each, with their cap and z-loss.
    """

    def __init__(self) -> None:
        super().__init__(input_layouts=Replicate(), output_layouts=Replicate())

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        whole = module.forward
        sharded = super().install_forward(module, mesh).forward

        def forward(hidden_states: Any, shift_labels: Any = None, num_items: Any = None) -> Any:
            if shift_labels is None:
                return sharded(hidden_states)
            return whole(hidden_states, shift_labels, num_items)

        module.forward = forward
        return module


ALL_PARALLEL_STYLES.register("stable_gpt_head", StableGPTHeadParallel())


def check_parallelism(config: StableGPTConfig, distributed_config: Any) -> None:
    """Refuse a split that would compute another function.

    Args:
        config: the model's.
        distributed_config: Transformers' `DistributedConfig`.

    Raises:
        ValueError: naming the field and what to do instead.
    """
    if distributed_config.tp_size > 1 and config.sigma_reparam:
        raise ValueError(
            f"tp_size={distributed_config.tp_size} cannot do sigma_reparam=True, whose spectral "
            "norms would be those of shards: save the model after fold_sigma_reparam() and load "
            "that, or shard with fsdp_size."
        )
    if distributed_config.pp_size > 1 and config.embedding_norm:
        raise ValueError(
            f"pp_size={distributed_config.pp_size} cannot do embedding_norm=True, which every "
            "stage would apply again: use tp_size or fsdp_size."
        )
