"""Tiny random checkpoints of every family that convert knows."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.tiny import byte_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 256,
}
# Transformers gives every tokenizer of a Qwen 2 an <|endoftext|>.
QWEN2_VOCAB_SIZE = SIZES["vocab_size"] + 1
GROUPED = {"num_key_value_heads": 2}
WINDOW_OFF = {"sliding_window": None}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Every family, and what its fields can say that ours can do.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("nemotron", {}),
    ("nemotron", {**GROUPED, "head_dim": 16, "tie_word_embeddings": True}),
    ("nemotron", {"rope_parameters": {"rope_theta": 321.0, "partial_rotary_factor": 1.0}}),
    ("nemotron", {"attention_bias": True, "mlp_bias": True, "norm_eps": 0.1}),
    ("gpt_neox", {}),
    ("gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True}),
    ("gpt_neox", {"rope_parameters": {"rope_theta": 321.0, "partial_rotary_factor": 0.5}}),
    ("gpt_neox", {"hidden_act": "gelu_fast", "layer_norm_eps": 0.1}),
    ("llama", {}),
    ("llama", {**GROUPED, "head_dim": 16, "tie_word_embeddings": True, "rms_norm_eps": 0.1}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama", {"rope_parameters": YARN}),
    ("mistral", {**GROUPED, **WINDOW_OFF}),
    ("mistral", {**GROUPED, "sliding_window": 128}),
    ("qwen2", {**GROUPED, "tie_word_embeddings": True}),
    ("qwen3", {**GROUPED, "head_dim": 16}),
    ("olmo2", GROUPED),
    ("gemma", {"num_key_value_heads": 1, "head_dim": 16}),
    ("gemma2", {**GROUPED, "head_dim": 16, "sliding_window": 128, "query_pre_attn_scalar": 24}),
    ("gemma2", {**GROUPED, "head_dim": 16, "layer_types": ["full_attention"] * 2}),
]  # fmt: skip


def build(kind: str, **fields: Any) -> PreTrainedModel:
    """A model whose every parameter is drawn at random, gains and biases too, and matters."""
    heads = {} if kind == "gpt_neox" else {"num_key_value_heads": SIZES["num_attention_heads"]}
    vocabulary = {"vocab_size": QWEN2_VOCAB_SIZE} if kind == "qwen2" else {}
    config: Any = CONFIG_MAPPING[kind](**{**SIZES, **heads, **vocabulary, **fields})
    return build_from(config)


def build_from(config: PreTrainedConfig) -> PreTrainedModel:
    """As `build`, from a config."""
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(0.3 * noise)
            else:
                parameter.add_(0.3 * noise)
    return model


def save(folder: Path, kind: str, **fields: Any) -> Path:
    """The model's folder, with a tokenizer."""
    model = build(kind, **fields)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_as_written(folder: Path, config: dict[str, Any]) -> Path:
    """A model's folder whose config.json is this very one."""
    folder.mkdir()
    text = json.dumps(config)
    (folder / "config.json").write_text(text)
    build_from(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    (folder / "config.json").write_text(text)
    byte_tokenizer().save_pretrained(folder)
    return folder
