"""Importing this module makes Transformers know `stable_gpt` and, with Triton, its kernels."""

import sys

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from . import kernels
from .model import StableGPTConfig, StableGPTForCausalLM, StableGPTModel

AutoConfig.register("stable_gpt", StableGPTConfig, exist_ok=True)
AutoModel.register(StableGPTConfig, StableGPTModel, exist_ok=True)
AutoModelForCausalLM.register(StableGPTConfig, StableGPTForCausalLM, exist_ok=True)
# `transformers serve` and TRL look an architecture up as an attribute of Transformers, not by Auto.
# Not by an import statement: while it is imported, Transformers puts another module in its place.
vars(sys.modules["transformers"])["StableGPTForCausalLM"] = StableGPTForCausalLM
kernels.register()
