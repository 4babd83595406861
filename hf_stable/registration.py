"""Importing this module makes Transformers know `stable_gpt` and, with Triton, its kernels."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from . import kernels
from .model import StableGPTConfig, StableGPTForCausalLM, StableGPTModel

AutoConfig.register("stable_gpt", StableGPTConfig, exist_ok=True)
AutoModel.register(StableGPTConfig, StableGPTModel, exist_ok=True)
AutoModelForCausalLM.register(StableGPTConfig, StableGPTForCausalLM, exist_ok=True)
kernels.register()
