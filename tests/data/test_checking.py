"""All files that cannot be used are named at once, before any of them is tokenized."""

import json

import pytest

from hf_stable.corpus import prepare_corpus, sources_of
from hf_stable.data import (
    Source,
    build_token_file,
    building,
    checking,
    expand,
    refuse_unusable,
)
from hf_stable.errors import DataError, RecipeError
from hf_stable.recipes import deciding_data, from_dict, to_dict
from tests.data.conftest import make_texts
from tests.data.test_corpus import recipe_of

BAD = {
    "b.txt": "caf\xe9".encode("latin-1"),
    "d.txt": b"\x7fELF\0",
    "e.jsonl": b'{"text": "one"}\n' + b"broken\n" * 2,
    "f.txt.gz": b"not packed",
    "g.parquet": b"PAR1",
}


@pytest.fixture
def folder(tmp_path):
    """Good files, an empty one and all of BAD."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, data in BAD.items():
        (folder / name).write_bytes(data)
    (folder / "a.txt").write_text("\n".join(make_texts(60)))
    (folder / "c.txt").write_text("")
    return folder


def names_all(error):
    lines = str(error).splitlines()
    assert lines[0] == f"{len(BAD)} files cannot be used:"
    return all(name in line for name, line in zip(BAD, lines[1:], strict=True))


def test_all_unusable_files_are_named_before_tokenizing(folder, bpe, tmp_path, monkeypatch):
    monkeypatch.setattr(building._Writer, "write", None)
    with pytest.raises(DataError) as caught:
        build_token_file([Source(str(folder))], bpe, tmp_path / "cache", progress=False)
    assert names_all(caught.value)
    monkeypatch.setattr("hf_stable.corpus.train_tokenizer", None)
    recipe = recipe_of(tmp_path, [str(folder)], **{"data.validation": [str(folder / "a.txt")]})
    with pytest.raises(DataError) as caught:
        prepare_corpus(recipe, progress=False)
    assert names_all(caught.value)


def test_what_remains_is_built_and_the_empty_file_is_counted(folder, bpe, tmp_path):
    for name in BAD:
        (folder / name).unlink()
    file = build_token_file([Source(str(folder))], bpe, tmp_path / "cache", progress=False)
    assert file.num_documents == 1
    assert file.meta["report"]["empty_counts"] == {str(folder / "c.txt"): 1}


def test_a_large_file_is_checked_at_its_beginning(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "0123456789"}\n' * 10 + "broken\n" * 30)
    monkeypatch.setattr(checking, "_CHECKED_BYTES", 100)
    refuse_unusable(expand([Source(str(path))]))
    monkeypatch.setattr(checking, "_CHECKED_BYTES", 101)
    path.touch()
    with pytest.raises(DataError, match="30 of 40"):
        refuse_unusable(expand([Source(str(path))]))


def test_a_finished_token_file_is_no_consent_to_bad_documents(bpe, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' + "broken\n" * 9)
    kind = Source(str(path), max_bad_share=1.0)
    first = build_token_file([kind], bpe, tmp_path / "cache", progress=False)
    assert build_token_file([kind], bpe, tmp_path / "cache", progress=False).folder == first.folder
    with pytest.raises(DataError, match="9 of 10"):
        build_token_file([Source(str(path))], bpe, tmp_path / "cache", progress=False)


def test_an_array_is_other_text_than_its_lines(bpe, tmp_path):
    """Earlier versions read the lines of an array; their token files are not used for it."""
    path = tmp_path / "a.json"
    path.write_text('[\n{"text": "one"},\n{"text": "two"}]')
    file = build_token_file([Source(str(path))], bpe, tmp_path / "cache", progress=False)
    assert file.num_documents == 2
    assert file.meta["sources"][0]["content"]["array"] is True


def test_contents_of_earlier_formats_are_named_as_before(bpe, tmp_path):
    """The order of the keys too: it is part of every fingerprint."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n')
    file = build_token_file([Source(str(path))], bpe, tmp_path / "cache", progress=False)
    (source,) = file.meta["sources"]
    assert json.dumps({**source["content"], "blake2b": ""}) == json.dumps(
        {
            **{"format": "json", "detail": "text", "blake2b": ""},
            **{"part": "all", "holdout": 0.0, "gzip": False},
        }
    )


def test_a_pipe_is_not_trained_on(bpe, tmp_path):
    with pytest.raises(DataError, match="pipe, which can be read only once"):
        build_token_file([Source("/dev/null")], bpe, tmp_path / "cache", progress=False)


def test_only_empty_files_are_refused_with_their_names(bpe, tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"only empty documents in .*a\.txt, .*b\.txt"):
        refuse_unusable(expand([Source(str(tmp_path))]))
    (tmp_path / "c.txt").write_text("text")
    refuse_unusable(expand([Source(str(tmp_path))]))


def test_split_train_of_older_runs_is_no_stated_option(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    recipe = recipe_of(tmp_path, [str(tmp_path / "a.txt")])
    content = to_dict(recipe)
    content["data"]["train"][0]["split"] = "train"
    assert from_dict(content).data.train[0].split == "train"
    del content["data"]["train"][0]["max_bad_share"]
    assert from_dict(content) == recipe
    assert sources_of(from_dict(content))[0][0].split is None
    assert deciding_data(content["data"]) == deciding_data(to_dict(recipe)["data"])
    content["data"]["train"][0] |= {"max_bad_share": 0.9, "license": "MIT"}
    assert deciding_data(content["data"]) == deciding_data(to_dict(recipe)["data"])
    content["data"]["train"][0]["split"] = "test"
    assert deciding_data(content["data"]) != deciding_data(to_dict(recipe)["data"])


def test_parts_that_the_recipe_would_override_are_refused(tmp_path):
    source = {"path": "a.txt", "part": "train", "holdout": 0.3}
    with pytest.raises(RecipeError, match=r"no effect while validation is empty"):
        recipe_of(tmp_path, [source])
    recipe_of(tmp_path, [source], **{"data.validation": [{**source, "part": "validation"}]})
