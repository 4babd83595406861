"""A tokenizer and models so small that a law about them is checked in milliseconds."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_stable import StableGPTConfig, StableGPTForCausalLM

VOCAB_SIZE = 257
# No "!", which is id 0 and pads a batch.
TEXTS = [
    "The quick brown fox jumps over the lazy dog.\nAnd again, because one line is not enough.\n",
    "x",
    "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer",
    "\u00e9\u4e2d\U0001f600 not all text is ASCII\n\n",
    "short",
    "a document whose length is no multiple of anything, and longer than every window used here.",
]


def byte_tokenizer(eos: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte (ids 0 to 255), then <eos> = 256: lengths are known without it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    special = {"eos_token": "<eos>"} if eos else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def tiny_llama(num_layers: int = 2, seed: int = 0, **fields) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,  # large, so that the context really matters
        **fields,
    )
    return LlamaForCausalLM(config)


def tiny_gpt2() -> GPT2LMHeadModel:
    """Learned positions, and another name for how many."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB_SIZE, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.3))


def tiny_bloom() -> BloomForCausalLM:
    """No limit on positions, which it makes from the attention mask."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "n_layer": 2, "n_head": 2}
    return BloomForCausalLM(BloomConfig(**sizes, initializer_range=0.3))


def stable_gpt(**fields) -> StableGPTForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "num_hidden_layers": 2}
    return StableGPTForCausalLM(
        StableGPTConfig(
            **sizes,
            num_attention_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,
            **fields,
        )
    )
