"""Small real and made-up texts for the data tests."""

import json
from pathlib import Path

import pytest

from hf_stable.data import Source, load_tokenizer, train_tokenizer

FILES = ("tokens-00000.bin", "documents.npy", "meta.json")
WORDS = [
    *("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven"),
    *("wizards", "boil", "strange", "old", "soup"),
]


def make_texts(count: int) -> list[str]:
    """Documents of different length and with several alphabets, the same on every machine."""
    texts = []
    for i in range(count):
        words = [WORDS[(i * i + 3 * j + j * j * i) % len(WORDS)] for j in range(5 + i % 40)]
        texts.append(f"Chapter {i}.\n\n" + " ".join(words) + f"\n  naïve {i * 7919} Ωμέγα 日本\n")
    return texts


def write_sources(folder: Path, count: int = 300) -> list[Source]:
    """Two files with documents, bad lines and empty lines in both, and a folder with one more."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = make_texts(count)
    lines = [json.dumps({"text": text}) for text in texts]
    lines[7:7] = ["broken", '{"text": ""}', '{"text": null}']
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "more").mkdir(exist_ok=True)
    (folder / "more" / "b.txt").write_text("\n\n".join(texts[:50]))
    (folder / "more" / "picture.png").write_text("")
    (folder / "c.jsonl").write_text("\n".join([*lines[50:120], "also broken"]))
    return [
        Source(str(folder / "a.jsonl"), part="train", holdout=0.1),
        Source(str(folder / "more"), sample_by="paragraph"),
        Source(str(folder / "c.jsonl")),
    ]


@pytest.fixture
def sources(tmp_path):
    return write_sources(tmp_path / "texts")


@pytest.fixture(scope="session", params=["bpe", "sentencepiece"])
def tokenizer_kind(request):
    return request.param


@pytest.fixture(scope="session")
def tokenizer_folder(tokenizer_kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / tokenizer_kind
    train_tokenizer(make_texts(200), kind=tokenizer_kind, vocab_size=400, folder=folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "only_bpe"
    train_tokenizer(make_texts(200), kind="bpe", vocab_size=400, folder=folder)
    return folder


@pytest.fixture(scope="session")
def bpe(bpe_folder):
    return load_tokenizer(bpe_folder)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real texts beside the repository; without it the test is skipped."""
    folder = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no folder of real texts beside the repository")
    return folder


@pytest.fixture(scope="session")
def trained_bpe_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, int], str]:
    """Vocabulary and merges of a byte-level BPE tokenizer, as GPT-2 stores them."""
    folder = tmp_path_factory.mktemp("bpe")
    train_tokenizer(make_texts(50), kind="bpe", vocab_size=300, folder=folder)
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    return model["vocab"], f"#version: 0.2\n{merges}\n"
