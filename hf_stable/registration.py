"""Importing this module makes Transformers' Auto classes know `stable_gpt`."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .model import StableGPTConfig, StableGPTForCausalLM, StableGPTModel

AutoConfig.register("stable_gpt", StableGPTConfig, exist_ok=True)
AutoModel.register(StableGPTConfig, StableGPTModel, exist_ok=True)
AutoModelForCausalLM.register(StableGPTConfig, StableGPTForCausalLM, exist_ok=True)
