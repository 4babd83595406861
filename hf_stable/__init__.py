"""Stable LLM pre-training on the HuggingFace stack: `import hf_stable` registers `stable_gpt`."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .model import (
    StableGPTConfig,
    StableGPTForCausalLM,
    StableGPTModel,
    StableGPTPreTrainedModel,
)

__version__ = "0.1.0"
__all__ = [
    "StableGPTConfig",
    "StableGPTForCausalLM",
    "StableGPTModel",
    "StableGPTPreTrainedModel",
]

AutoConfig.register("stable_gpt", StableGPTConfig, exist_ok=True)
AutoModel.register(StableGPTConfig, StableGPTModel, exist_ok=True)
AutoModelForCausalLM.register(StableGPTConfig, StableGPTForCausalLM, exist_ok=True)
