"""Stable LLM pre-training on the HuggingFace stack: `import hf_stable` registers `stable_gpt`."""

import sys
from pathlib import Path
from typing import Any

__version__ = "0.1.0"
# The names below come from __getattr__.
# pyright: reportUnsupportedDunderAll=false
__all__ = [
    "StableGPTConfig",
    "StableGPTForCausalLM",
    "StableGPTForQuestionAnswering",
    "StableGPTForSequenceClassification",
    "StableGPTForTokenClassification",
    "StableGPTModel",
    "StableGPTPreTrainedModel",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'hf_stable' has no attribute {name!r}")
    from . import model, registration  # noqa: F401, PLC0415

    return vars(model)[name]


# The command line answers --help without torch (seconds); its subcommands register by themselves.
if Path(sys.argv[0]).stem != "hf-stable" and sys.orig_argv[-len(sys.argv) - 1 :][:2] != [
    "-m",
    "hf_stable",
]:
    from . import registration  # noqa: F401
