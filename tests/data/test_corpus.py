"""A recipe's weights decide what is trained on when, and nothing where there are none."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hf_stable.corpus import describe_data, planned_epochs, prepare_corpus, training_order
from hf_stable.data import (
    BlockDataset,
    DataOrder,
    MixtureOrder,
    TokenMixture,
    apportion,
    data_loader,
    mixture,
)
from hf_stable.errors import DataError
from hf_stable.recipes import dump, load_recipe, to_dict
from tests.data.conftest import make_texts

ROOT = Path(__file__).parents[2]
TINY = ROOT / "recipes" / "base" / "tiny.yaml"
PAPER = ROOT / "recipes" / "data" / "paper_languages.yaml"


@pytest.fixture
def paths(tmp_path):
    """Three files: the first letter of each text tells its file."""
    names = []
    for name, count in (("a", 160), ("b", 80), ("c", 60)):
        texts = [name + text for text in make_texts(count)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        names.append(str(path))
    return names


def recipe_of(tmp_path, sources, **changes):
    settings = {"data.train": sources, "data.cache": str(tmp_path / "cache"), **changes}
    return load_recipe(TINY, [f"{key}={json.dumps(value)}" for key, value in settings.items()])


def weighted(paths, weights):
    return [{"path": p, "weight": w} for p, w in zip(paths, weights, strict=True)]


def test_without_weights_sources_are_one_text_in_the_order_of_before(tmp_path, paths):
    recipe = recipe_of(tmp_path, paths, seed=3)
    _, corpus = prepare_corpus(recipe, progress=False)
    assert isinstance(corpus.train, BlockDataset)
    order = training_order(recipe, corpus, [(5, 9)])
    assert isinstance(order, DataOrder)
    expected = DataOrder(3, len(corpus.train), [(5, 9)])
    assert order.blocks(np.arange(500)).tolist() == expected.blocks(np.arange(500)).tolist()
    (use,) = planned_epochs(recipe, corpus)
    assert use.paths == paths
    assert use.epochs == 20 * 8 / len(corpus.train)


def test_weights_survive_writing_and_reading(tmp_path, paths):
    recipe = recipe_of(tmp_path, weighted(paths, [1.0, 2.0, 3.5]))
    (tmp_path / "again.yaml").write_text(dump(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe
    assert recipe.data.weights == [1.0, 2.0, 3.5]


@pytest.fixture
def mixed(tmp_path, paths, monkeypatch):
    monkeypatch.setattr(mixture, "PERIOD", 100)
    mixture._pattern.cache_clear()
    recipe = recipe_of(tmp_path, weighted(paths, [1.0, 2.0, 7.0]), seed=4)
    yield recipe, prepare_corpus(recipe, progress=False)
    mixture._pattern.cache_clear()


def test_blocks_come_from_the_sources_in_proportion(mixed, paths):
    recipe, (tokenizer, corpus) = mixed
    order = training_order(recipe, corpus, [(40, 60)])
    assert isinstance(order, MixtureOrder)
    sizes = {"global_batch_size": 10, "micro_batch_size": 10, "rank": 0, "world_size": 1}
    loader = data_loader(corpus.train, order, start_step=8, num_steps=10, **sizes)
    seen = [row for batch in loader for row in batch["input_ids"]]
    taken, starts = np.zeros(3, dtype=int), np.cumsum([0, *order.num_blocks])
    for row, block in zip(seen, order.blocks(np.arange(80, 180)), strict=True):
        source = int(np.searchsorted(starts, block, side="right")) - 1
        taken[source] += 1
        file = corpus.train_tokens.files[source]
        first = (block - starts[source]) * 32
        assert row.tolist() == file.tokens[first : first + 32].tolist()
    assert taken.tolist() == [10, 20, 70]
    for file, name in zip(corpus.train_tokens.files, "abc", strict=True):
        assert tokenizer.decode(file.tokens[1:9].tolist()).startswith(name)


def test_epochs_and_shares_of_the_plan_are_told(mixed, paths):
    recipe, (_, corpus) = mixed
    uses = planned_epochs(recipe, corpus)
    assert [use.paths for use in uses] == [[path] for path in paths]
    assert [use.share for use in uses] == [0.1, 0.2, 0.7]
    order = training_order(recipe, corpus)
    taken = np.bincount(order.sources(np.arange(20 * 8)), minlength=3)
    assert [use.epochs for use in uses] == (taken / order.num_blocks).tolist()
    long = recipe_of(Path(recipe.data.cache).parent, to_dict(recipe)["data"]["train"], seed=4)
    assert "worth less" not in uses[0].line()
    again = load_recipe(TINY, ["training.steps=4000"])
    object.__setattr__(long, "training", again.training)
    assert "worth less" in planned_epochs(long, corpus)[2].line()


@pytest.mark.parametrize("weights", [None, [1.0, 2.0]])
def test_licences_are_recorded_beside_their_files_and_change_nothing_else(tmp_path, paths, weights):
    """A folder's licence is that of each file in it, also where a cached token file is taken."""
    folder = tmp_path / "many"
    folder.mkdir()
    for path in paths[:2]:
        Path(path).rename(folder / Path(path).name)
    sources = [{"path": str(folder), "license": "CC-BY-4.0 OR MIT"}, {"path": paths[2]}]
    for source, weight in zip(sources, weights or [], strict=False):
        source["weight"] = weight
    plain = [{key: source[key] for key in source if key != "license"} for source in sources]
    unlicensed = recipe_of(tmp_path, plain)
    without = describe_data(unlicensed, prepare_corpus(unlicensed, progress=False)[1])
    recipe = recipe_of(tmp_path, sources)
    _, corpus = prepare_corpus(recipe, progress=False)
    described = describe_data(recipe, corpus)
    for part in ("train", "validation"):
        held = described[part]
        files = [each for piece in held.get("mixture", [held]) for each in piece["sources"]]
        assert [Path(each["path"]).name for each in files] == ["a.jsonl", "b.jsonl", "c.jsonl"]
        stated = [each.get("license") for each in files]
        assert stated == ["CC-BY-4.0 OR MIT", "CC-BY-4.0 OR MIT", None]
        assert held["fingerprint"] == without[part]["fingerprint"]
    assert "license" not in json.dumps(without)


def test_what_is_recorded_and_counted_of_a_mixture_is_all_of_it(mixed):
    _, (_, corpus) = mixed
    tokens = corpus.train_tokens
    assert isinstance(tokens, TokenMixture)
    meta = tokens.meta
    assert meta["tokens"] == sum(file.num_tokens for file in tokens.files)
    assert [part["weight"] for part in meta["mixture"]] == [1.0, 2.0, 7.0]
    other = TokenMixture(tokens.files, [7.0, 2.0, 1.0])
    assert other.fingerprint != tokens.fingerprint
    assert TokenMixture(tokens.files, [2.0, 4.0, 14.0]).fingerprint == tokens.fingerprint
    counted = tokens.sample(100)
    parts = [file.tokens[:n] for file, n in zip(tokens.files, (10, 20, 70), strict=True)]
    assert counted.tolist() == np.concatenate(parts).tolist()


def test_the_first_validation_blocks_are_of_all_sources(mixed):
    _, (_, corpus) = mixed
    held_out = corpus.validation_tokens
    assert len(corpus.validation) == (held_out.num_tokens - 1) // 32
    found = sorted(tuple(block["input_ids"].tolist()) for block in corpus.validation)
    natural = BlockDataset(held_out, 32)
    assert found == sorted(tuple(block["input_ids"].tolist()) for block in natural)
    first = range(len(natural) // 4)
    assert [corpus.validation[i]["input_ids"].tolist() for i in first] != [
        natural[i]["input_ids"].tolist() for i in first
    ]


def test_a_source_too_small_for_a_block_is_named(tmp_path, paths):
    small = tmp_path / "small.jsonl"
    small.write_text('{"text": "a"}')
    recipe = recipe_of(
        tmp_path, weighted([*paths, str(small)], [1.0] * 4), **{"data.validation": paths[:1]}
    )
    with pytest.raises(DataError, match=r"small\.jsonl: .* too few for one block"):
        prepare_corpus(recipe, progress=False)


def test_the_papers_mixture_has_its_languages():
    recipe = load_recipe([TINY, PAPER])
    paths = [Path(source.path) for source in recipe.data.train]
    groups = [path.parent.name for path in paths]
    assert (groups.count("human"), groups.count("code"), len(paths)) == (53, 37, 91)
    assert len(set(paths)) == 91
    shares = np.array(recipe.data.weights) / sum(recipe.data.weights)
    totals = [shares[np.array(groups) == group].sum() for group in ("text", "human", "code")]
    assert totals == pytest.approx([0.70, 0.15, 0.15], abs=1e-3)
    assert min(apportion(recipe.data.weights, mixture.PERIOD)) > 0


def test_the_papers_mixture_of_real_text(real_data, tmp_path, monkeypatch):
    text = tmp_path / "text"
    for name, folder in (("multilingual", "human"), ("code", "code")):
        command = [
            *(sys.executable, ROOT / "scripts" / "split_text.py"),
            *(real_data / name / "train.parquet", "--column", "lang", "--limit-bytes", "15000"),
            *("--output", text / folder),
        ]
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
    (text / "english").mkdir()
    (text / "human" / "en.jsonl").rename(text / "english" / "en.jsonl")
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe([TINY, PAPER], ["data.cache=cache", "data.validation=[text/english]"])
    _, corpus = prepare_corpus(recipe, progress=False)
    uses = planned_epochs(recipe, corpus)
    assert len(uses) == 91
    order = training_order(recipe, corpus)
    taken = np.bincount(order.sources(np.arange(mixture.PERIOD)), minlength=91)
    assert taken.tolist() == apportion(recipe.data.weights, mixture.PERIOD)
    assert order.blocks(np.arange(2000)).max() < len(corpus.train)


def test_a_value_that_is_no_file_name_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "x", "lang": "../../outside"}))
    command = [sys.executable, ROOT / "scripts" / "split_text.py", path, "--column", "lang"]
    command += ["--output", tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "cannot name a file" in done.stderr
    assert not list((tmp_path / "out").iterdir())
