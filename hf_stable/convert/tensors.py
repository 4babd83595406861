"""Mapping of another family's tensors to ours, with no tensor left over on either side."""

from torch import Tensor, cat

from hf_stable.errors import CheckpointError
from hf_stable.model import StableGPTForCausalLM

from .families import Family


def _places(family: Family, name: str) -> tuple[tuple[str, ...], str]:
    """Return the sources of one of our parameters, and the module that defines its reordering."""
    module, _, kind = name.rpartition(".")
    if module in family.outside:
        return (f"{family.outside[module]}.{kind}",), module
    _, _, index, inside = module.split(".", 3)
    found = family.block[inside]
    return tuple(f"{family.blocks}.{index}.{place}.{kind}" for place in found), inside


def map_tensors(
    family: Family, model: StableGPTForCausalLM, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Build our state dict from another family's, which is emptied in the process.

    Args:
        family: Family of the source.
        model: Our model, for its names and number of heads.
        tensors: State dict of the source, with tied weights under both names.

    Raises:
        CheckpointError: If a tensor of the source remains unused.
    """
    found: dict[str, Tensor] = {}
    for name in model.state_dict():
        places, module = _places(family, name)
        parts = [tensors.pop(place) for place in places]
        joined = parts[0] if len(parts) == 1 else cat(parts)
        if module in family.reorder:
            joined = family.reorder[module](joined, model.config.num_attention_heads)
        found[name] = joined
    if tensors:
        raise CheckpointError(
            f"the source has tensors that a StableGPT does not: {', '.join(sorted(tensors))}"
        )
    return found
