"""Registration of `stable_gpt` and, with Triton, of its kernels in Transformers, upon import."""

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

# An export's config.json also names these classes.
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
    # `transformers serve` and TRL look up an architecture as an attribute of Transformers. An
    # import statement would not do: Transformers replaces its module while it is imported.
    vars(sys.modules["transformers"])[model.__name__] = model
kernels.register()
