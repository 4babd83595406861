"""Importing this module makes Transformers know `stable_gpt` and, with Triton, its kernels."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from . import kernels
from .model import (
    StableGPTConfig,
    StableGPTForCausalLM,
    StableGPTForQuestionAnswering,
    StableGPTForSequenceClassification,
    StableGPTForTokenClassification,
    StableGPTModel,
)

AutoConfig.register("stable_gpt", StableGPTConfig, exist_ok=True)
for auto, model in (
    (AutoModel, StableGPTModel),
    (AutoModelForCausalLM, StableGPTForCausalLM),
    (AutoModelForQuestionAnswering, StableGPTForQuestionAnswering),
    (AutoModelForSequenceClassification, StableGPTForSequenceClassification),
    (AutoModelForTokenClassification, StableGPTForTokenClassification),
):
    auto.register(StableGPTConfig, model, exist_ok=True)
kernels.register()
