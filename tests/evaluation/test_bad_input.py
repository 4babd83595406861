"""Arguments, documents and models that cannot be scored: one clear error each."""

import math

import pytest

from hf_stable.errors import UserError
from hf_stable.evaluation import perplexity
from tests.tiny import TEXTS, tiny_bloom, tiny_gpt2, tiny_llama


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 65}, r"max_length: found 65, .*max_position_embeddings of 64"),
        ({"max_length": 0}, "max_length: found 0"),
        ({"max_length": 8, "stride": 9}, "stride: found 9"),
        ({"stride": 0}, "stride: found 0"),
        ({"batch_size": 0}, "batch_size: found 0"),
        ({"confidence": 95}, "confidence: found 95"),
        ({"bootstrap_samples": 10}, "bootstrap_samples: found 10"),
    ],
)
def test_arguments_out_of_range_are_named(tokenizer, llama, options, message):
    with pytest.raises(UserError, match=message):
        perplexity(llama, tokenizer, TEXTS, **options)


def test_the_longest_window_is_what_the_model_allows(tokenizer, llama):
    assert perplexity(llama, tokenizer, TEXTS).max_length == 64
    assert perplexity(tiny_gpt2(), tokenizer, TEXTS).max_length == 64
    assert perplexity(tiny_bloom(), tokenizer, TEXTS).max_length == 4096
    with pytest.raises(UserError, match="max_length: found 65, beyond the model's n_positions"):
        perplexity(tiny_gpt2(), tokenizer, TEXTS, max_length=65)


@pytest.mark.parametrize("documents", [[], ["", ""]])
def test_nothing_to_score_is_an_error(tokenizer, llama, documents):
    with pytest.raises(UserError, match=f"no tokens to score: {len(documents)} documents"):
        perplexity(llama, tokenizer, documents)


def test_ids_outside_the_vocabulary_are_an_error(tokenizer):
    model = tiny_llama()
    model.resize_token_embeddings(200)
    with pytest.raises(UserError, match=r"document 0: token id 256 .* vocabulary of 200"):
        perplexity(model, tokenizer, TEXTS)


def test_a_document_that_is_not_text_is_an_error(tokenizer, llama):
    with pytest.raises(UserError, match="document 1: found NoneType"):
        perplexity(llama, tokenizer, ["text", None])


def test_a_model_that_gives_nan_is_an_error(tokenizer):
    model = tiny_llama()
    model.lm_head.weight.data[5] = math.nan
    with pytest.raises(UserError, match="not finite for 6 of 6 documents"):
        perplexity(model, tokenizer, TEXTS)
