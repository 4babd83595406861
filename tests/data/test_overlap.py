"""Warnings about text in both training and validation, and about text that is listed twice."""

import json
import shutil

import pytest

from hf_stable.corpus import describe_data, prepare_corpus, training_text_line
from hf_stable.data import Source, expand
from hf_stable.data.overlap import shared_text
from tests.data.conftest import make_texts
from tests.data.test_corpus import recipe_of


@pytest.fixture
def paths(tmp_path):
    for name in "ab":
        lines = [json.dumps({"text": name + text}) for text in make_texts(200)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "copy.jsonl")
    return {name: str(tmp_path / f"{name}.jsonl") for name in ("a", "b", "copy")}


def said(capsys, recipe):
    _, corpus = prepare_corpus(recipe, progress=True)
    lines = capsys.readouterr().err.splitlines()
    share = describe_data(recipe, corpus)["validation"].get("share_in_training")
    return [line for line in lines if line.startswith("data:")], share


def test_other_validation_text_is_no_overlap(tmp_path, paths, capsys):
    for validation in ([], [paths["b"]]):
        recipe = recipe_of(tmp_path, [paths["a"]], **{"data.validation": validation})
        assert said(capsys, recipe) == ([], None)


@pytest.mark.parametrize("weight", [None, 2.0])
@pytest.mark.parametrize("name", ["a", "copy", "*"])
def test_validation_on_training_text_is_told_with_its_share(name, weight, tmp_path, paths, capsys):
    train = [{"path": paths["a"]} | ({"weight": weight} if weight else {})]
    place = str(tmp_path / f"{name}.jsonl")
    recipe = recipe_of(tmp_path, train, **{"data.validation": [place]})
    lines, share = said(capsys, recipe)
    whole = sum((tmp_path / f"{each}.jsonl").stat().st_size for each in ("a", "b", "copy"))
    part = 2 * (tmp_path / "a.jsonl").stat().st_size / whole if name == "*" else 1.0
    assert share == pytest.approx(part)
    (line,) = [line for line in lines if "is also training text" in line]
    assert f"{part:.0%} of the validation text" in line
    assert paths["copy" if name == "copy" else "a"] in line
    # The glob's files a and copy are one text.
    assert len(lines) == (2 if name == "*" else 1)


def test_what_is_listed_twice_is_named(tmp_path, paths, capsys):
    lines, share = said(capsys, recipe_of(tmp_path, [paths["a"], paths["a"]]))
    assert lines == [f"data: {paths['a']} is listed 2 times in data.train"]
    assert share is None
    lines, _ = said(capsys, recipe_of(tmp_path, [paths["a"], paths["copy"]]))
    assert lines == [f"data: {paths['a']}, {paths['copy']} in data.train are the same text"]


@pytest.mark.parametrize(
    ("train", "validation", "share"),
    [
        (("train", 0.2), ("validation", 0.2), 0),
        (("train", 0.2), ("all", 0.0), 0.8),
        (("all", 0.0), ("validation", 0.1), 1),
        (("train", 0.1), ("validation", 0.4), 0.75),
        (("validation", 0.3), ("train", 0.3), 0),
    ],
)
def test_parts_of_one_file_share_what_their_holdouts_say(train, validation, share):
    def identity(part, holdout):
        content = {"format": "json", "detail": "text", "blake2b": "x"}
        content |= {"part": part, "holdout": holdout}
        return {"path": "a", "bytes": 10, "content": content}

    found, paths = shared_text([identity(*train)], [identity(*validation)])
    assert found == pytest.approx(share)
    assert paths == (["a"] if share else [])
    other = identity(*validation)
    other["content"]["detail"] = "title"
    assert shared_text([identity(*train)], [other]) == (0, [])


def test_evaluating_training_text_is_told(tmp_path, paths):
    recipe = recipe_of(tmp_path, [paths["a"]])
    _, corpus = prepare_corpus(recipe, progress=False)
    data = describe_data(recipe, corpus)
    line = training_text_line(expand([Source(paths["copy"]), Source(paths["b"])]), data)
    assert line is not None and paths["copy"] in line and paths["b"] not in line
    assert training_text_line(expand([Source(paths["b"])]), data) is None
    held_out = Source(paths["a"], part="validation", holdout=recipe.data.holdout)
    assert training_text_line([held_out], data) is None
