"""A corpus of any number of documents has a training and a validation part."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_stable.corpus import describe_data, prepare_corpus, sources_of
from hf_stable.data import ReadReport, Source, expand, read_documents
from hf_stable.data.sources import part_of_document
from hf_stable.errors import DataError
from tests.data.conftest import make_texts
from tests.data.test_corpus import recipe_of, weighted

TEXT = "".join(make_texts(100))


def write(tmp_path, *texts):
    paths = []
    for number, text in enumerate(texts):
        paths.append(tmp_path / f"{number}.txt")
        paths[-1].write_text(text)
    return [str(path) for path in paths]


def texts_of(sources):
    return [text for source in expand(sources) for text in read_documents(source, ReadReport())]


@given(
    text=st.text(st.sampled_from("ab \n😀"), min_size=1, max_size=300),
    holdout=st.floats(0.001, 0.999),
)
def test_head_and_tail_are_the_text(text, holdout):
    head, tail = (
        part_of_document(Source("a", part=part, holdout=holdout, holdout_by="tail"), text, b"")
        for part in ("train", "validation")
    )
    assert head + tail == text
    assert len(tail) <= len(text) * holdout + 0.5
    assert len(tail) >= len(text) * holdout / 2 - 1.5


@pytest.mark.parametrize("holdout", [0.02, 0.1, 0.5, 0.9])
def test_one_document_is_held_out_by_its_tail(tmp_path, holdout, capsys):
    """Whichever part its hash would choose."""
    recipe = recipe_of(tmp_path, write(tmp_path, TEXT), **{"data.holdout": holdout})
    train, validation = (texts_of(sources) for sources in sources_of(recipe))
    assert [len(train), len(validation)] == [1, 1]
    assert train[0] + validation[0] == TEXT
    assert validation[0].startswith(("Chapter", "\n")) or train[0][-1] in " \n"
    _, corpus = prepare_corpus(recipe, progress=True)
    said = [line for line in capsys.readouterr().err.splitlines() if "too few documents" in line]
    assert len(said) == 1 and f"data.holdout {holdout:g}" in said[0]
    for part in describe_data(recipe, corpus).values():
        assert part["sources"][0]["content"]["holdout_by"] == "tail"
    assert corpus.train_tokens.fingerprint != corpus.validation_tokens.fingerprint
    again = prepare_corpus(recipe, progress=False)[1]
    assert again.train_tokens.fingerprint == corpus.train_tokens.fingerprint


def test_tails_and_documents_have_other_fingerprints(tmp_path):
    """A file that grows from one document to many gets another split, and its own token files."""
    lines = [json.dumps({"text": text}) for text in make_texts(120)]
    path = tmp_path / "a.jsonl"
    kinds = []
    for count in (1, 120):
        path.write_text("\n".join(lines[:count]))
        kinds.append(sources_of(recipe_of(tmp_path, [str(path)]))[1][0].holdout_by)
    assert kinds == ["tail", "document"]


def test_many_documents_are_held_out_whole_and_little_is_read(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in make_texts(2000)))
    read = []

    def counted(*arguments):
        for text in read_documents(*arguments):
            read.append(text)
            yield text

    monkeypatch.setattr("hf_stable.data.holdout.read_documents", counted)
    train, validation = sources_of(recipe_of(tmp_path, [str(path)]))
    assert train[0].holdout_by == validation[0].holdout_by == "document"
    assert len(read) < 200
    assert sorted(texts_of(train) + texts_of(validation)) == sorted(make_texts(2000))


def test_each_weighted_source_has_a_training_part(tmp_path):
    paths = write(tmp_path, *(f"{number} {TEXT}" for number in range(8)))
    recipe = recipe_of(tmp_path, weighted(paths, [1.0] * 8), **{"data.holdout": 0.3})
    _, corpus = prepare_corpus(recipe, progress=False)
    assert [file.num_documents for file in corpus.train_tokens.files] == [1] * 8
    assert corpus.validation_tokens.num_documents == 8
    unweighted = recipe_of(tmp_path, paths, **{"data.holdout": 0.3})
    assert sources_of(unweighted)[0][0].holdout_by == "document"


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_an_empty_part_is_never_blamed_on_the_vocabulary(tmp_path, kind):
    settings = {"tokenizer.kind": kind}
    (path,) = write(tmp_path, TEXT + " " * len(TEXT))
    with pytest.raises(DataError, match=r"validation part is empty: holdout 0\.1 .* raise it"):
        prepare_corpus(recipe_of(tmp_path, [path], **settings), progress=False)
    seen = set()
    for number in range(8):
        (path,) = write(tmp_path, f"{number} {TEXT}")
        both = [{"path": path, "part": part, "holdout": 0.5} for part in ("train", "validation")]
        recipe = recipe_of(tmp_path, both[:1], **settings, **{"data.validation": both[1:]})
        with pytest.raises(DataError, match=r"all 1 are in the other part; give more") as error:
            prepare_corpus(recipe, progress=False)
        seen |= {
            part for part in ("train", "validation") if f": {part} part is" in str(error.value)
        }
    assert seen == {"train", "validation"}


def test_too_little_held_out_text_names_the_holdout(tmp_path):
    recipe = recipe_of(tmp_path, write(tmp_path, TEXT[:2000]), **{"data.holdout": 0.01})
    with pytest.raises(DataError, match=r"validation part of .*too few.*data\.holdout is 0\.01"):
        prepare_corpus(recipe, progress=False)
