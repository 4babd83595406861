"""What may not matter to a perplexity: batches, padding, order, mode, and what a loss adds."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from hf_stable.evaluation import perplexity, scoring
from tests.tiny import (
    TEXTS,
    VOCAB_SIZE,
    byte_tokenizer,
    stable_gpt,
    tiny_bloom,
    tiny_gpt2,
    tiny_llama,
)


@pytest.mark.parametrize("make_model", [tiny_llama, stable_gpt, tiny_gpt2, tiny_bloom])
def test_batch_size_does_not_matter(tokenizer, make_model):
    model = make_model()
    found = [
        perplexity(model, tokenizer, TEXTS, max_length=24, stride=10, batch_size=size).nll_nats
        for size in (1, 2, 3, 8, 100)
    ]
    assert found == pytest.approx([found[0]] * len(found), rel=1e-6)


def test_padding_does_not_matter(tokenizer):
    model = tiny_llama()
    before = perplexity(model, tokenizer, TEXTS, batch_size=100)
    left = byte_tokenizer()
    left.padding_side, left.pad_token = "left", "<eos>"
    assert perplexity(model, left, TEXTS, batch_size=100) == before
    with torch.no_grad():
        model.model.embed_tokens.weight[0] += 100
    after = perplexity(model, tokenizer, TEXTS, batch_size=100)
    assert after.nll_nats == pytest.approx(before.nll_nats, rel=1e-6)
    changed = perplexity(model, tokenizer, ["! is id 0"], batch_size=100)
    model.model.embed_tokens.weight.data[0] -= 100
    assert perplexity(model, tokenizer, ["! is id 0"]).nll_nats != changed.nll_nats


def test_order_of_documents_does_not_matter(tokenizer, llama):
    one, other = (
        perplexity(llama, tokenizer, texts, max_length=16, batch_size=2)
        for texts in (TEXTS, TEXTS[::-1])
    )
    assert one.nll_nats == pytest.approx(other.nll_nats, rel=1e-6)
    assert one.document_sums == pytest.approx(other.document_sums[::-1], rel=1e-6)


class AddsToItsLoss(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if output.loss is not None:
            output.loss = output.loss + 100
        return output


def test_what_a_model_adds_to_its_loss_is_not_in_it(tokenizer, llama):
    other = AddsToItsLoss(llama.config)
    other.load_state_dict(llama.state_dict())
    assert perplexity(other, tokenizer, TEXTS) == perplexity(llama, tokenizer, TEXTS)


def test_z_loss_is_not_in_it(tokenizer):
    plain, with_z = stable_gpt(), stable_gpt(z_loss=1.0)
    with_z.load_state_dict(plain.state_dict())
    ids = torch.tensor([tokenizer(TEXTS[0]).input_ids[:64]])
    with torch.no_grad():
        assert with_z(ids, labels=ids).loss > plain(ids, labels=ids).loss + 0.1
    assert perplexity(with_z, tokenizer, TEXTS) == perplexity(plain, tokenizer, TEXTS)


def test_train_mode_does_not_matter_and_is_restored(tokenizer):
    model = tiny_llama(attention_dropout=0.5)
    model.eval()
    expected = perplexity(model, tokenizer, TEXTS)
    assert not model.training
    model.train()
    assert perplexity(model, tokenizer, TEXTS) == expected
    assert model.training


def test_half_precision_logits_are_summed_in_fp32(tokenizer):
    model = tiny_llama().to(torch.bfloat16)
    text = TEXTS[0][:60]
    ids = torch.tensor([[256, *tokenizer(text).input_ids]])
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits[0].double()
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    assert perplexity(model, tokenizer, [text]).nll_nats == pytest.approx(expected, rel=1e-6)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor made, of any dtype and of fp32."""

    def __init__(self):
        super().__init__()
        self.any = self.fp32 = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.any = max(self.any, out.numel())
            if out.dtype == torch.float32:
                self.fp32 = max(self.fp32, out.numel())
        return out


def test_only_one_batch_of_logits_is_held_and_only_a_chunk_of_it_in_fp32(tokenizer, monkeypatch):
    monkeypatch.setattr(scoring, "_CHUNK_ELEMENTS", 30 * VOCAB_SIZE)
    model = tiny_llama().to(torch.bfloat16)
    with LargestTensor() as largest:
        perplexity(model, tokenizer, TEXTS * 20, max_length=32, stride=16, batch_size=3)
    assert largest.any <= 3 * 32 * VOCAB_SIZE
    assert largest.fp32 <= 30 * VOCAB_SIZE
