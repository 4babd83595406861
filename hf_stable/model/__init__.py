"""The exported folder: everything a checkpoint on the Hub needs besides torch and transformers."""

from .configuration_stable_gpt import StableGPTConfig
from .modeling_stable_gpt import (
    StableGPTForCausalLM,
    StableGPTForQuestionAnswering,
    StableGPTForSequenceClassification,
    StableGPTForTokenClassification,
    StableGPTModel,
    StableGPTPreTrainedModel,
)

__all__ = [
    "StableGPTConfig",
    "StableGPTForCausalLM",
    "StableGPTForQuestionAnswering",
    "StableGPTForSequenceClassification",
    "StableGPTForTokenClassification",
    "StableGPTModel",
    "StableGPTPreTrainedModel",
]
