"""One tokenizer and one model for the tests that only read them."""

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.tiny import byte_tokenizer, tiny_llama


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def llama() -> LlamaForCausalLM:
    return tiny_llama()
