"""Resizing, replacing and tying embeddings keeps every technique that lives in them."""

import pytest
import torch

from hf_stable import (
    StableGPTForCausalLM,
    StableGPTForQuestionAnswering,
    StableGPTForSequenceClassification,
    StableGPTForTokenClassification,
    StableGPTModel,
)

from ..alignment import place
from .models import PRESETS, make, prompt

KINDS = [
    StableGPTModel,
    StableGPTForCausalLM,
    StableGPTForSequenceClassification,
    StableGPTForTokenClassification,
    StableGPTForQuestionAnswering,
]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [70, 40])
def test_resizing_keeps_the_logits_of_the_ids_that_stay(preset, tied, size, tmp_path) -> None:
    model = make(preset, tie_word_embeddings=tied)
    ids, kept = prompt() % 40, min(size, 61)
    with torch.no_grad():  # Transformers resizes parameters in place, under a graph that is alive
        before = model(ids).logits[..., :kept]
    model.resize_token_embeddings(size)
    logits = model(ids).logits
    assert logits.shape[-1] == size == model.config.vocab_size
    # A product of another width may round otherwise.
    torch.testing.assert_close(logits[..., :kept], before, atol=1e-5, rtol=1e-5)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    with pytest.raises(ValueError, match=f"ids 0 to {size - 1}"):
        model(torch.tensor([[size]]))
    model.train()(ids, labels=ids).loss.backward()
    assert model.get_input_embeddings().weight.grad.shape == (size, 32)
    model.save_pretrained(tmp_path)
    loaded = place(StableGPTForCausalLM.from_pretrained(tmp_path))
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_padding_the_vocabulary_to_a_multiple() -> None:
    model = make("baseline")
    model.resize_token_embeddings(pad_to_multiple_of=64)
    assert model(prompt()).logits.shape[-1] == model.config.vocab_size == 64


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_another_embedding_keeps_scale_and_detach(kind) -> None:
    model = make("baseline", kind, embedding_scale=3.0, embedding_detach=0.1)
    layer = model.get_input_embeddings()
    plain = torch.nn.Embedding(61, 32, _weight=layer.weight.detach().clone())
    before = layer(prompt())
    model.set_input_embeddings(plain)
    assert torch.equal(model.get_input_embeddings()(prompt()), before)
    assert model.get_input_embeddings().weight is plain.weight
    model.resize_token_embeddings(70)
    assert torch.equal(model.get_input_embeddings()(prompt()), before)
    model.get_input_embeddings()(prompt()).sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    torch.testing.assert_close(gradient.sum(), torch.tensor(0.1 * 3.0 * 32 * 10))


def test_an_output_embedding_with_a_bias_is_refused() -> None:
    with pytest.raises(ValueError, match="lm_head has no bias"):
        make("baseline").set_output_embeddings(torch.nn.Linear(32, 61))
