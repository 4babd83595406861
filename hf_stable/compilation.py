"""Blocks compiled one by one: the graph of one serves all, so that depth costs no compile time.

Embedding, power iterations, head and loss stay outside. See "regional compilation" in PyTorch's
documentation of torch.compile.
"""

import torch

from .errors import RecipeError
from .model import StableGPTForCausalLM


def check_compiler(device: torch.device) -> None:
    """Compile a line, so that a machine without a compiler says so before a run begins.

    Raises:
        RecipeError: when torch.compile does not work on `device`.
    """
    tool = "a C++ compiler such as g++" if device.type == "cpu" else "Triton and a C compiler"
    try:
        torch.compile(lambda tensor: tensor.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever it is, this line cannot be at fault
        reason = str(error).strip().partition("\n")[0]
        raise RecipeError(
            f"training.compile is true, but torch.compile does not work here: {reason} "
            f"Install {tool}, or set training.compile to false."
        ) from error


def compile_blocks(model: StableGPTForCausalLM) -> None:
    """Compile every block in place; modules and parameters keep their names.

    Shapes are static: training has one and validation two, since its last batch may be smaller.
    Were sizes symbols, a run's graphs would depend on the order in which it met them.
    """
    # Dynamo keeps eight graphs of a function and refuses a ninth; an earlier run's would count, and
    # batches with and without documents, of two sizes and in two modes, are eight already.
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    # Meant for a model compiled as a whole: it would cut each block where DDP's buckets end.
    torch._dynamo.config.optimize_ddp = False
    for layer in model.model.layers:
        layer.compile(fullgraph=True, dynamic=False)
