"""From another family's tensors to ours, without a tensor left over on either side."""

from torch import Tensor, cat

from hf_stable.errors import CheckpointError
from hf_stable.model import StableGPTForCausalLM

from .families import Family


def _places(family: Family, name: str) -> tuple[tuple[str, ...], str]:
    """Where a parameter of ours comes from, and the module that says how it is reordered."""
    module, _, kind = name.rpartition(".")
    if module in family.outside:
        return (f"{family.outside[module]}.{kind}",), module
    _, _, index, inside = module.split(".", 3)
    found = family.block[inside]
    return tuple(f"{family.blocks}.{index}.{place}.{kind}" for place in found), inside


def map_tensors(
    family: Family, model: StableGPTForCausalLM, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Our state dict of another family's, which is emptied on the way.

    Args:
        model: ours, for its names and number of heads.
        tensors: the source's state dict, tied weights under both names.

    Raises:
        CheckpointError: when a tensor of the source is used by nothing.
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
            f"the source has tensors that ours has no place for: {', '.join(sorted(tensors))}"
        )
    return found
