"""Compilation of blocks one by one: all share one graph, so depth costs no compile time.

Embedding, power iterations, head and loss are not compiled. See "regional compilation" in PyTorch's
documentation of torch.compile.
"""

import torch

from .errors import RecipeError
from .model import StableGPTForCausalLM


def check_compiler(device: torch.device) -> None:
    """Compile one line, so that a machine without a compiler is reported before a run begins.

    Args:
        device: Device to compile for.

    Raises:
        RecipeError: If torch.compile does not work on `device`.
    """
    tool = "a C++ compiler such as g++" if device.type == "cpu" else "Triton and a C compiler"
    try:
        torch.compile(lambda tensor: tensor.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # any error is the machine's: the compiled line is correct
        reason = str(error).strip().partition("\n")[0]
        raise RecipeError(
            f"training.compile is true, but torch.compile does not work here: {reason} "
            f"Install {tool}, or set training.compile to false."
        ) from error


def compile_blocks(model: StableGPTForCausalLM) -> None:
    """Compile every block in place; modules and parameters keep their names.

    Shapes are static: training has one, and validation two, since its last batch may be smaller.
    With symbolic sizes, a run's graphs would depend on the order in which the sizes occur.
    """
    # Dynamo keeps eight graphs per function and refuses a ninth. Graphs of an earlier run would
    # count, and batches with and without documents, of two sizes and in two modes, need eight.
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    # Made for a model compiled as a whole: it would split each block where a DDP bucket ends.
    torch._dynamo.config.optimize_ddp = False
    for layer in model.model.layers:
        layer.compile(fullgraph=True, dynamic=False)
