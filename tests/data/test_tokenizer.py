"""Any text comes back from its ids, training is deterministic, boundaries predict every token."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from hf_stable.background import is_work_left, run_in_background
from hf_stable.data import boundary_ids, load_tokenizer, shortage, train_tokenizer
from hf_stable.errors import DataError
from tests.data.conftest import make_texts

PECULIAR = [
    "",
    " ",
    "  leading",
    "trailing  ",
    "\n",
    "\n\n\n a\t\r\n",
    "\u2581",
    "\u2581the \u2581\u2581 fox",
    "🙂 e\u0301 \u200d\ufeff",
    "\0",
    "<0x41>",
    "a<0x0A><0x0a>",
    "<|endoftext|>",
    "a <|padding|> b<|endoftext|>",
    "<unk><s></s>",
    "\u2585\ue000\U0010ffff",
    "do n't , ok . x ? 's",
    "a" * 3000,
]

any_text = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from([*PECULIAR, "the", " ", "Ω", "<", "0", "x", "|>"])
).map("".join)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=any_text)
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    as_text = tokenizer(text, split_special_tokens=True).input_ids
    assert tokenizer.decode(as_text) == text
    assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(as_text)


@pytest.mark.parametrize("text", PECULIAR)
def test_peculiar_text_round_trips(tokenizer, text):
    for split in (False, True):
        assert tokenizer.decode(tokenizer(text, split_special_tokens=split).input_ids) == text


def test_real_text_of_many_languages_round_trips(tokenizer, real_data):
    path = real_data / "multilingual" / "validation.parquet"
    for text in pq.read_table(path, columns=["text"]).column(0).to_pylist():
        assert tokenizer.decode(tokenizer(text[:2000]).input_ids) == text[:2000]


def test_special_tokens(tokenizer):
    assert len(tokenizer) == 400
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token == "<|padding|>"
    assert tokenizer.unk_token is None
    assert tokenizer("<|endoftext|>").input_ids == [tokenizer.eos_token_id]
    assert tokenizer.model_max_length > 10**9
    assert tokenizer.clean_up_tokenization_spaces is False


def test_training_learns_frequent_words(tokenizer):
    text = " quick brown wizards"
    assert len(tokenizer(text).input_ids) < len(text) / 2


def test_equal_texts_give_equal_files_in_another_process(
    tokenizer_folder, tokenizer_kind, tmp_path
):
    code = (
        "import sys; from pathlib import Path; from hf_stable.data import train_tokenizer\n"
        "from tests.data.conftest import make_texts\n"
        "train_tokenizer(iter(make_texts(200)), kind=sys.argv[1], vocab_size=400,"
        " folder=Path(sys.argv[2]))"
    )
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", code, tokenizer_kind, str(tmp_path / "again")]
    subprocess.run(command, env=environment, check=True, timeout=120)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tokenizer_folder / name).read_bytes()


def test_sentencepiece_ids_stand_for_the_pieces_sentencepiece_itself_finds(tmp_path, monkeypatch):
    made = []

    def remember(**arguments):
        made.append(SentencePieceProcessor(**arguments))
        return made[-1]

    monkeypatch.setattr("hf_stable.data.tokenizer.SentencePieceProcessor", remember)
    texts = make_texts(200)
    ours = train_tokenizer(texts, kind="sentencepiece", vocab_size=400, folder=tmp_path / "sp")
    for text in texts:
        for line in text.split("\n"):
            assert ours(line).input_ids == made[0].encode(line)


def test_training_text_cannot_teach_reserved_pieces(tmp_path):
    reserved = "<0x41>\n<|endoftext|>\n\u2581x \u2585 \0"
    texts = [f"{reserved}\n{text} {reserved}" for text in make_texts(200)]
    for kind in ("bpe", "sentencepiece"):
        folder = tmp_path / kind
        tokenizer = train_tokenizer(texts, kind=kind, vocab_size=400, folder=folder)
        for text in PECULIAR:
            ids = tokenizer(text, split_special_tokens=True).input_ids
            assert tokenizer.decode(ids) == text
            assert tokenizer.eos_token_id not in ids


@pytest.mark.parametrize(
    ("kind", "vocab_size", "texts"),
    [
        ("bpe", 100, ["text"]),
        ("sentencepiece", 100, ["text"]),
        ("sentencepiece", 400, []),
        ("bpe", 400, []),
        ("wordpiece", 400, ["text"]),
    ],
)
def test_impossible_training_is_one_clear_error(kind, vocab_size, texts, tmp_path):
    with pytest.raises(DataError, match=r"vocab_size|no text|kind"):
        train_tokenizer(texts, kind=kind, vocab_size=vocab_size, folder=tmp_path / "t")
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_little_text_gives_a_smaller_vocabulary(kind, tmp_path):
    folder = tmp_path / kind
    tokenizer = train_tokenizer(["too little text"], kind=kind, vocab_size=100_000, folder=folder)
    assert 258 <= len(tokenizer) < 400
    assert max(tokenizer.get_vocab().values()) + 1 == len(tokenizer)
    assert re.search(rf"yields {len(tokenizer)} .* 100,000", str(shortage(tokenizer, 100_000)))
    assert shortage(tokenizer, len(tokenizer)) is None
    for text in PECULIAR:
        ids = tokenizer(text, split_special_tokens=True).input_ids
        assert tokenizer.decode(ids) == text


def long_word(length):
    return "".join(random.Random(length).choices("ACGT", k=length))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("text", [long_word(1_000_000), "x" + " " * 4_000_000 + "y"])
def test_bpe_training_cuts_long_words(text, tmp_path):
    """Whole, the first takes minutes and the second an hour."""
    tokenizer = train_tokenizer([text], kind="bpe", vocab_size=300, folder=tmp_path / "bpe")
    part = text[:5000]
    assert tokenizer.decode(tokenizer(part).input_ids) == part
    assert len(tokenizer(part).input_ids) < len(part) / 1.5


def test_words_up_to_the_limit_are_trained_on_whole(tmp_path):
    texts = [long_word(1000), *make_texts(50)]
    ours = train_tokenizer(texts, kind="bpe", vocab_size=400, folder=tmp_path / "bpe")
    whole = Tokenizer(models.BPE())
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|padding|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    whole.train_from_iterator(texts, trainer)
    assert ours.get_vocab() == whole.get_vocab()
    assert ours.backend_tokenizer.pre_tokenizer.pre_tokenize_str(long_word(3000)) == (
        whole.pre_tokenizer.pre_tokenize_str(long_word(3000))
    )


INTERRUPTED = """
import sys
from hf_stable.cli import main
from hf_stable.data.progress import Progress

Progress.update_time = lambda self, done: print(done, flush=True)
sys.exit(main(["tokenizer", sys.argv[1], "--kind", sys.argv[2], "--output", sys.argv[3],
               "--vocab-size", "2000"]))
"""


def test_an_interrupt_ends_training_at_once(tokenizer_kind, tmp_path):
    """That of BPE takes 10 s here, that of SentencePiece minutes."""
    words = [long_word(4000 + number) for number in range(1000)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": word}) for word in words))
    folder = tmp_path / "t"
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "a.jsonl"), tokenizer_kind, folder]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout is not None and process.stderr is not None
        looks = 0
        for line in process.stdout:
            looks += int(line) == sum(map(len, words))
            if looks == 4:  # native code computes, and does not read any more
                break
        process.send_signal(signal.SIGINT)
        sent = time.monotonic()
        assert process.stderr.readline() == "interrupted\n"
        assert time.monotonic() - sent < 5
        assert process.wait(60) == 130
    assert not folder.exists()


def test_work_in_the_background_is_told_that_nobody_waits():
    def interrupt():
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_in_background(lambda is_left: is_left.wait(60), interrupt)
    assert time.monotonic() - started < 30
    assert not is_work_left()
    assert run_in_background(lambda is_left: 7, lambda: None) == 7
    with pytest.raises(DataError, match="broken"):
        run_in_background(fail_in_thread, lambda: None)


def fail_in_thread(is_left):
    raise DataError("broken")


def test_loading_nothing_or_damage_is_an_error_with_the_path(tmp_path, bpe_folder):
    with pytest.raises(DataError, match=r"nothing.*hf-stable tokenizer"):
        load_tokenizer(tmp_path / "nothing")
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="bare"):
        load_tokenizer(tmp_path / "bare")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in bpe_folder.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    (damaged / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        load_tokenizer(damaged)


def test_a_tokenizer_without_end_token_is_refused(tmp_path, bpe_folder):
    for file in bpe_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="eos_token"):
        load_tokenizer(tmp_path)


def test_boundaries(tmp_path, bpe_folder):
    shared = load_tokenizer(bpe_folder)
    eos, other = shared.eos_token_id, shared.pad_token_id
    assert boundary_ids(shared) == ([eos], [])
    shared.bos_token = shared.pad_token
    assert boundary_ids(shared) == ([other], [eos])
    shared.bos_token = None
    assert boundary_ids(shared) == ([eos], [])
    shared.eos_token = None
    with pytest.raises(DataError, match="eos_token"):
        boundary_ids(shared)


def test_gpt2s_two_files_are_a_tokenizer(tmp_path, trained_bpe_files):
    vocabulary, merges = trained_bpe_files
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == len(vocabulary)
    assert tokenizer.eos_token_id == vocabulary["<|endoftext|>"]
    for text in PECULIAR:
        assert tokenizer.decode(tokenizer(text, split_special_tokens=True).input_ids) == text
    del vocabulary["<|endoftext|>"]  # then nobody says which token ends a text
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    with pytest.raises(DataError, match=r"serialization file.*slow tokenizer"):
        load_tokenizer(tmp_path)
