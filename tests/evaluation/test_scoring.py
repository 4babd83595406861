"""What is scored: every token of every document once, from a stated context; what is counted."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_stable.data.tokenizer import boundary_ids
from hf_stable.evaluation import load_model, perplexity, reporting, windows
from hf_stable.wording import significant
from tests.tiny import TEXTS, VOCAB_SIZE, byte_tokenizer, tiny_llama

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@given(st.integers(0, 200), st.integers(1, 40), st.data())
def test_every_token_is_scored_once_with_all_the_context_that_fits(length, max_length, data):
    stride = data.draw(st.integers(1, max_length))
    scored = []
    for begin, start, end in windows(length, max_length, stride):
        assert 0 <= begin <= start < end <= length - 1
        assert end - begin <= max_length
        for position in range(start, end):
            scored.append(position + 1)
            context = position + 1 - begin
            assert context == position + 1 or context > max_length - stride
    assert scored == list(range(1, length))


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_equals_a_direct_float64_loop_over_tokens(tokenizer, stride):
    model = tiny_llama().double()
    max_length = 16
    expected = 0.0
    for text in TEXTS:
        ids = [256, *tokenizer(text).input_ids]
        for target in range(1, len(ids)):
            # The end of the first window, of the steps M, M + stride, ..., that reaches the target.
            end = max_length
            while end < target:
                end += stride
            end = min(end, len(ids) - 1)
            context = torch.tensor([ids[max(0, end - max_length) : target]])
            with torch.no_grad():
                logits = model(context).logits[0, -1]
            expected -= torch.log_softmax(logits, -1)[ids[target]].item()
    result = perplexity(model, tokenizer, TEXTS, max_length=max_length, stride=stride)
    assert result.nll_nats == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("stride", [1, 7, 20])
def test_counts_tokens_words_and_bytes_of_the_documents(tokenizer, stride):
    model = tiny_llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    result = perplexity(model, tokenizer, TEXTS, max_length=20, stride=stride)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert result.tokens == result.bytes == num_bytes
    assert result.words == sum(len(text.split()) + text.count("\n") for text in TEXTS)
    assert result.documents == len(TEXTS)
    # Uniform over the vocabulary: known exactly, and no document differs from another.
    assert result.nll_nats == pytest.approx(num_bytes * math.log(VOCAB_SIZE), rel=1e-6)
    assert result.per_token.value == pytest.approx(VOCAB_SIZE, rel=1e-6)
    assert result.bits_per_byte.value == pytest.approx(math.log2(VOCAB_SIZE), rel=1e-6)
    assert result.bits_per_byte.low == pytest.approx(result.bits_per_byte.high, rel=1e-6)


def test_windows_do_not_matter_to_a_model_that_sees_one_token(tokenizer):
    model = tiny_llama(num_layers=0)
    found = [
        perplexity(model, tokenizer, TEXTS, max_length=length, stride=stride).nll_nats
        for length, stride in [(1, 1), (8, 1), (8, 3), (8, 8), (64, 64)]
    ]
    assert found == pytest.approx([found[0]] * len(found), rel=1e-6)


def test_stride_matters_to_a_model_that_sees_more(tokenizer, llama):
    full, half = (
        perplexity(llama, tokenizer, TEXTS, max_length=16, stride=stride).nll_nats
        for stride in (16, 8)
    )
    assert full != pytest.approx(half, rel=1e-4)


def test_first_tokens_are_scored_from_the_prefix_or_counted_as_unscored(llama, tokenizer):
    bare = byte_tokenizer(eos=False)
    scored, unscored = (perplexity(llama, each, TEXTS) for each in (tokenizer, bare))
    assert scored.unscored_tokens == 0
    # "x" alone has nothing left to score.
    assert (unscored.empty_documents, unscored.unscored_tokens) == (1, len(TEXTS) - 1)
    assert unscored.tokens == scored.tokens - len(TEXTS)
    assert "not scored" in unscored.table()


def test_prefix_is_the_one_of_training(tokenizer):
    model = tiny_llama(num_layers=0).double()
    with torch.no_grad():
        logits = model(torch.tensor([boundary_ids(tokenizer)[0]])).logits[0, -1]
    expected = -torch.log_softmax(logits, -1)[tokenizer("x").input_ids[0]].item()
    assert perplexity(model, tokenizer, ["x"]).nll_nats == pytest.approx(expected, rel=1e-12)


def test_text_that_spells_a_special_token_is_text(tokenizer, llama):
    assert perplexity(llama, tokenizer, ["a<eos>b"]).tokens == len("a<eos>b")


def test_empty_documents_are_counted_and_change_nothing(tokenizer, llama):
    plain = perplexity(llama, tokenizer, TEXTS)
    mixed = perplexity(llama, tokenizer, iter(["", *TEXTS, "", ""]))
    assert mixed.empty_documents == 3
    assert (mixed.nll_nats, mixed.documents) == (plain.nll_nats, plain.documents)
    assert "3 empty documents" in mixed.table()
    assert "empty" not in plain.table()


def test_values_are_the_stated_ratios(tokenizer, llama):
    result = perplexity(llama, tokenizer, TEXTS)
    nll = result.nll_nats
    assert result.per_token.value == pytest.approx(math.exp(nll / result.tokens))
    assert result.per_word.value == pytest.approx(math.exp(nll / result.words))
    assert result.bits_per_byte.value == pytest.approx(nll / math.log(2) / result.bytes)
    assert result.document_sums.sum(axis=0).tolist() == pytest.approx(
        [nll, result.tokens, result.words, result.bytes]
    )
    values = result.to_dict()
    assert values["tokens"] == result.tokens
    assert values["per_token"] == {
        "value": result.per_token.value,
        "low": result.per_token.low,
        "high": result.per_token.high,
    }


def test_text_without_spaces_or_words_has_an_infinite_word_perplexity(tokenizer, llama):
    result = perplexity(llama, tokenizer, ["x" * 600] * 5)
    assert result.per_word.value == math.inf
    assert math.isfinite(result.bits_per_byte.value)
    blank = perplexity(llama, tokenizer, ["   "] * 5)
    assert (blank.words, blank.per_word.value) == (0, math.inf)
    assert blank.interval_note == "the text has no words"


@pytest.mark.parametrize(("name", "words"), [("validation", 217_646), ("test", 245_569)])
def test_words_of_wikitext_are_those_of_the_benchmark(tokenizer, name, words):
    file = DATA / "wikitext2" / f"{name}.txt"
    if not file.is_file():
        pytest.skip(f"{file} is not here")
    model = tiny_llama(num_layers=0)
    assert perplexity(model, tokenizer, [file.read_text(encoding="utf-8")]).words == words


def test_equals_the_loss_of_a_real_checkpoint():
    folder = DATA / "checkpoints" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    model, tokenizer = load_model(folder)
    text = "Once upon a time there was a little girl named Lily. She liked to play in the park."
    ids = torch.tensor([[1, *tokenizer(text, add_special_tokens=False).input_ids]])
    with torch.no_grad():
        expected = model(ids, labels=ids).loss.item()
    result = perplexity(model, tokenizer, [text] * 5)
    assert math.log(result.per_token.value) == pytest.approx(expected, rel=1e-5)
    assert result.per_token.value < 10  # of 512: it has learned such stories


def test_progress_is_plain_lines_on_stderr(tokenizer, llama, capsys, monkeypatch):
    monkeypatch.setattr(reporting, "_SECONDS_BETWEEN_LINES", 0.0)
    perplexity(llama, tokenizer, TEXTS)
    assert capsys.readouterr() == ("", "")
    result = perplexity(llama, tokenizer, TEXTS, batch_size=1, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    last = err.splitlines()[-1]
    assert f"{result.documents} documents, {result.tokens:,} tokens" in last
    assert f"so far {significant(result.per_token.value)}" in last
