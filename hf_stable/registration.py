"""Importing this module makes Transformers know `stable_gpt` and, with Triton, its kernels."""

import sys

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

# An export's config.json names them too.
AUTO_CLASSES = {
    AutoModel: StableGPTModel,
    AutoModelForCausalLM: StableGPTForCausalLM,
    AutoModelForQuestionAnswering: StableGPTForQuestionAnswering,
    AutoModelForSequenceClassification: StableGPTForSequenceClassification,
    AutoModelForTokenClassification: StableGPTForTokenClassification,
}

AutoConfig.register("stable_gpt", StableGPTConfig, exist_ok=True)
for auto, model in AUTO_CLASSES.items():
    auto.register(StableGPTConfig, model, exist_ok=True)
    # `transformers serve` and TRL look an architecture up as an attribute of Transformers. Not by
    # an import statement: while it is imported, Transformers puts another module in its place.
    vars(sys.modules["transformers"])[model.__name__] = model
kernels.register()
