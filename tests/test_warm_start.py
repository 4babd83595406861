"""Laws of a warm start: the trained weights, a cost that is told, a run that goes on exactly."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_stable import StableGPTForCausalLM, records
from hf_stable.card import render_card
from hf_stable.check import check
from hf_stable.checkpoints import list_checkpoints
from hf_stable.cli import main
from hf_stable.convert import convert
from hf_stable.errors import CheckpointError, RecipeError
from hf_stable.recipes import load_recipe
from hf_stable.training import train

from .convert.sources import save
from .launching import ROOT, torchrun
from .tiny import byte_tokenizer, tiny_llama
from .training import RECIPES, tiny_recipe, unfinish


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text and a finished run of the baseline in `trained`."""
    folder = tmp_path_factory.mktemp("home")
    train(tiny_recipe(folder, output=folder / "trained", training__steps=40))
    return folder


def warm(home: Path, output: Path, **overrides: Any) -> Any:
    settings = {"training__initial_model": home / "trained", "telemetry__every": 0}
    return tiny_recipe(home, **{"output": output, **settings, **overrides})


def started(home: Path, output: Path, **overrides: Any) -> dict[str, Any]:
    """run.json's word on the switch, after one step."""
    train(warm(home, output, training__steps=1, **overrides))
    return records.read_run(output)["initial_model"]


@pytest.mark.parametrize(
    ("fields", "added"),
    [
        ({}, set()),
        ({"model__z_loss": 0.1}, set()),
        ({"model__attn_logit_softcapping": 1e4}, set()),
        ({"model__layer_scale": 1.0}, {"attention_scale.weight", "mlp_scale.weight"}),
        ({"model__linear_bias": "qkv"}, {"qkv_proj.bias"}),
        (
            {"model__sigma_reparam": True, "model__sigma_gain_init": "spectral"},
            {
                f"{linear}.{kind}"
                for linear in ("qkv_proj", "o_proj", "up_proj", "down_proj")
                for kind in ("gain", "u", "v")
            },
        ),
    ],
)
def test_what_has_a_neutral_value_costs_nothing(
    fields: dict[str, Any], added: set[str], home: Path, tmp_path: Path
) -> None:
    record = started(home, tmp_path / "run", **fields)
    assert record["perplexity_ratio"] == pytest.approx(1, abs=1e-5)
    assert {".".join(name.split(".")[-2:]) for name in record["added"]} == added
    names = {name.removeprefix("model__") for name in fields} - {"sigma_gain_init"}
    assert set(record["switched"]) == names


@pytest.mark.parametrize(
    "fields", [{"model__qk_norm": "head"}, {"model__attn_logit_softcapping": 0.05}]
)
def test_what_has_none_has_a_price_that_is_told(
    fields: dict[str, Any], home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = started(home, tmp_path / "run", **fields)
    before, after = (record[f"perplexity_{when}"]["per_token"] for when in ("before", "after"))
    assert record["perplexity_ratio"] == after["value"] / before["value"]
    # So early, a norm may even help; a change it is.
    assert abs(record["perplexity_ratio"] - 1) > 1e-4
    assert before["low"] < before["value"] < before["high"]
    line = next(line for line in capsys.readouterr().err.splitlines() if "the switch" in line)
    assert f"{before['value']:.6g}" in line and f"{after['value']:.6g}" in line
    assert next(iter(fields)).removeprefix("model__") in line
    card = str(render_card(tmp_path / "run")).replace("\\", "")
    assert record["sha256"] in card and f"{record['perplexity_ratio']:.4f} times" in card


def test_the_perplexity_before_is_the_trained_model_s(home: Path, tmp_path: Path) -> None:
    """As `hf-stable evaluate` finds it on the same held-out documents, all of them."""
    many = {"training__evaluate_blocks": 100_000}
    record = started(home, tmp_path / "run", **many)
    output = tmp_path / "evaluation.json"
    assert main(["evaluate", str(home / "trained"), "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert record["perplexity_before"]["documents"] == found["documents"]
    value = record["perplexity_before"]["per_token"]["value"]
    assert value == pytest.approx(found["per_token"]["value"], rel=1e-5)


def test_training_begins_with_the_trained_weights(home: Path, tmp_path: Path) -> None:
    """Nothing is left of what was drawn: a rate of nearly nothing leaves the trained weights."""
    started(home, tmp_path / "run", optimizer__learning_rate=1e-30, model__qk_norm="head")
    before, after = (
        load_file(folder / "model" / "model.safetensors")
        for folder in (home / "trained", tmp_path / "run")
    )
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(after[name].eq(1).all() for name in after.keys() - before.keys())


def test_sigma_reparam_is_taken_out_by_folding(home: Path, tmp_path: Path) -> None:
    sigma = {"model__sigma_reparam": True, "model__sigma_gain_init": "spectral"}
    started(home, tmp_path / "sigma", **sigma)
    record = started(home, tmp_path / "plain", training__initial_model=tmp_path / "sigma")
    assert record["perplexity_ratio"] == pytest.approx(1, abs=1e-5)
    assert record["switched"] == {"sigma_reparam": [True, False]}
    # And goes on with its own vectors where it stays.
    record = started(home, tmp_path / "again", training__initial_model=tmp_path / "sigma", **sigma)
    assert record["perplexity_ratio"] == 1 and record["added"] == []


def test_a_converted_checkpoint_trains_on(home: Path, tmp_path: Path) -> None:
    """The record of a conversion has the recipe's model section, but for the vocabulary."""
    ids = {"bos_token_id": 7, "eos_token_id": [256, 5], "pad_token_id": 3}
    convert(save(tmp_path / "llama", "llama", num_key_value_heads=2, **ids), tmp_path / "ours")
    fields = json.loads((tmp_path / "ours" / records.CONVERSION).read_text())["fields"]
    del fields["vocab_size"]
    record = started(
        home,
        tmp_path / "run",
        training__initial_model=tmp_path / "ours",
        tokenizer__path=tmp_path / "ours",
        tokenizer__vocab_size=257,
        model=json.dumps({**fields, "attn_logit_softcapping": 1e4}),
    )
    assert record["switched"] == {"attn_logit_softcapping": [None, 1e4]}
    assert record["perplexity_ratio"] == pytest.approx(1, abs=1e-4)
    # What the recipe says of ids counts, and not the tokenizer's one end of text.
    config = StableGPTForCausalLM.from_pretrained(tmp_path / "run" / "model").config
    assert {name: getattr(config, name) for name in ids} == ids


def test_a_warm_run_resumes_exactly(home: Path, tmp_path: Path) -> None:
    recipe = warm(home, tmp_path / "run", model__qk_norm="head", training__checkpoint_every=10)
    train(recipe)
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    record = records.read_run(tmp_path / "run")["initial_model"]
    for kept in (10, 0):  # from a checkpoint in the middle, and from none at all
        shutil.rmtree(tmp_path / "run" / "model")
        for folder in list_checkpoints(tmp_path / "run"):
            if int(folder.name.split("-")[-1]) > kept:
                shutil.rmtree(folder)
        if not kept:
            (tmp_path / "run" / "metrics.jsonl").unlink()  # which says that there were some
        train(recipe)
        again = load_file(tmp_path / "run" / "model" / "model.safetensors")
        assert all(torch.equal(again[name], weights[name]) for name in weights)
        assert records.read_run(tmp_path / "run")["initial_model"] == record


def test_the_initial_weights_are_the_run_s_identity(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(home / "trained" / "model", tmp_path / "model")
    saved = {"training__checkpoint_every": 10}
    recipe = warm(home, tmp_path / "run", training__initial_model=tmp_path / "model", **saved)
    train(recipe)
    record = records.read_run(tmp_path / "run")["initial_model"]
    shutil.copytree(tmp_path / "model", tmp_path / "moved")
    moved = {"training__initial_model": tmp_path / "moved", **saved}
    train(warm(home, tmp_path / "run", **moved))  # the same
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    none = tiny_recipe(home, output=tmp_path / "run", telemetry__every=0, **saved)
    for other in (recipe, none):
        unfinish(tmp_path / "run")
        with pytest.raises(CheckpointError, match=r"SHA-256 of training\.initial_model"):
            train(other)
        # The weights are the checkpoint's, and so is where they came from.
        train(other, resume="changed")
        assert records.read_run(tmp_path / "run")["initial_model"] == record
    shutil.rmtree(tmp_path / "model")
    unfinish(tmp_path / "run")
    capsys.readouterr()
    train(recipe)
    assert f"began with these weights (SHA-256 {record['sha256']}" in capsys.readouterr().err
    assert records.read_run(tmp_path / "run")["initial_model"] == record


def test_another_initial_model_counts_where_a_run_begins_anew(home: Path, tmp_path: Path) -> None:
    """Without a checkpoint there is nothing but the initial model to begin with."""
    other = {"seed": 5, "output": tmp_path / "other", "training__steps": 1, "telemetry__every": 0}
    train(tiny_recipe(home, **other))
    first = started(home, tmp_path / "run", training__checkpoint_every=0)
    for folder in list_checkpoints(tmp_path / "run"):
        shutil.rmtree(folder)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    recipe = warm(
        home,
        tmp_path / "run",
        training__steps=1,
        training__checkpoint_every=0,
        training__initial_model=tmp_path / "other",
    )
    train(recipe, resume="changed")
    second = records.read_run(tmp_path / "run")["initial_model"]
    assert second["folder"] == str(tmp_path / "other") and second["sha256"] != first["sha256"]
    shutil.rmtree(tmp_path / "other")
    for folder in list_checkpoints(tmp_path / "run"):
        shutil.rmtree(folder)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(CheckpointError, match=str(tmp_path / "other")):
        train(recipe)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"layer_scale": 1e-5}, ["model.layer_scale 1e-05 would undo", "set it to 1.0"]),
        ({"sigma_reparam": True}, ["model.sigma_gain_init 'one'", "set it to 'spectral'"]),
        ({"hidden_act": "gelu"}, ["hidden_act='relu2'", "model.hidden_act 'gelu'"]),
        ({"zero_centered_norm": True}, ["zero_centered_norm=False"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings=False"]),
        ({"num_attention_heads": 4}, ["num_attention_heads=2"]),
        ({"initializer": "small"}, ["model.initializer 'small' would be ignored"]),
        ({"preset": "embed_norm"}, ["model.initializer 'small' would be ignored"]),
        ({"intermediate_size": 100}, ["mlp.up_proj.weight is (256, 64), not (100, 64)"]),
        ({"mlp_gated": True}, ["mlp.gate_proj.weight (256, 64) would be random"]),
        ({"num_hidden_layers": 1}, ["model.layers.1.mlp.up_proj.weight has no place"]),
        ({"attention_pre_norm": False}, ["input_layernorm.weight has no place"]),
    ],
)
def test_what_does_not_fit_is_refused(
    fields: dict[str, Any], words: list[str], home: Path, tmp_path: Path
) -> None:
    recipe = warm(home, tmp_path / "run", **{f"model__{key}": each for key, each in fields.items()})
    with pytest.raises(RecipeError) as caught:
        train(recipe)
    message = str(caught.value)
    assert message.startswith(f"training.initial_model {home / 'trained'}: ")
    assert all(word in message for word in words), message
    assert not (tmp_path / "run" / "run.json").exists()


def test_first_values_of_vectors_that_are_trained_must_be_as_there(
    home: Path, tmp_path: Path
) -> None:
    """They would be ignored, and told as a switch all the same."""
    there: dict[str, Any] = {
        **{"model__attention_post_norm": True, "model__post_norm_gain": 0.5},
        **{"model__layer_scale": 0.5, "model__sigma_reparam": True},
    }
    plain = {"telemetry__every": 0, "training__steps": 1, "output": tmp_path / "trained"}
    train(tiny_recipe(home, **plain, **there))
    there["training__initial_model"] = tmp_path / "trained"
    for name, value in (
        ("layer_scale", 1.0),
        ("post_norm_gain", 1.0),
        ("sigma_gain_init", "spectral"),
    ):
        words = rf"model\.{name} '?{value}'? would be ignored: set it to "
        with pytest.raises(RecipeError, match=words):
            train(warm(home, tmp_path / "run", **{**there, f"model__{name}": value}))
    record = started(home, tmp_path / "run", **there)
    assert record["switched"] == {} and record["perplexity_ratio"] == 1
    # A post norm that is new begins as the recipe says.
    both = {"model__mlp_post_norm": True, "model__post_norm_gain": 1.0}
    record = started(home, tmp_path / "both", **{**there, **both})
    assert record["switched"].keys() == {"mlp_post_norm", "post_norm_gain"}


def test_other_models_and_tokenizers_are_refused(home: Path, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "llama")
    byte_tokenizer().save_pretrained(tmp_path / "llama")
    with pytest.raises(RecipeError, match=r"LlamaForCausalLM; `hf-stable convert`"):
        train(warm(home, tmp_path / "run", training__initial_model=tmp_path / "llama"))
    shutil.copytree(home / "trained" / "model", tmp_path / "model")
    other, config = byte_tokenizer(), tmp_path / "model" / "config.json"
    other.save_pretrained(tmp_path / "model")
    ends = {"bos_token_id": other.bos_token_id, "eos_token_id": other.eos_token_id}
    config.write_text(json.dumps({**json.loads(config.read_text()), **ends}))
    with pytest.raises(RecipeError, match=r"another tokenizer than the run: set tokenizer\.path"):
        train(warm(home, tmp_path / "run", training__initial_model=tmp_path / "model"))
    with pytest.raises(CheckpointError, match="nothing"):
        train(warm(home, tmp_path / "run", training__initial_model=tmp_path / "absent"))


@pytest.mark.parametrize(
    "path", sorted(RECIPES.glob("warm_start/*.yaml")), ids=lambda path: path.stem
)
def test_every_warm_start_switches_something_on_in_a_run_that_its_text_says(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == f"warm_{path.stem}"
    assert recipe.training.initial_model is not None
    lines = [line[1:].split() for line in path.read_text().splitlines() if "hf-stable" in line]
    make, go = (line[2:] for line in lines)
    assert go == [f"warm_start/{path.stem}"]
    trained = load_recipe(make[0], make[2:])
    assert trained.output == recipe.training.initial_model
    there, here = trained.model_config(), recipe.model_config()
    switched = {name for name, value in here.to_dict().items() if there.to_dict()[name] != value}
    fields = {"soft_cap": "attn_logit_softcapping"}
    assert switched == {fields.get(path.stem, path.stem)}
    assert (trained.data, trained.tokenizer) == (recipe.data, recipe.tokenizer)
    assert check(recipe).steps == 100


def test_recomputed_blocks_begin_with_the_trained_weights_too(home: Path, tmp_path: Path) -> None:
    record = started(home, tmp_path / "run", training__gradient_checkpointing=True)
    assert record["perplexity_ratio"] == 1
    model = StableGPTForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.num_parameters() == records.read_run(tmp_path / "run")["parameters"]


def test_two_processes_that_share_the_model_begin_alike(home: Path, tmp_path: Path) -> None:
    """One measures and all load: the run is that of one process."""
    settings = {
        "training__initial_model": str(home / "trained"),
        "model__layer_scale": 1.0,
        "training__sharding": "fsdp2",
        "training__log_every": 1,
        "training__steps": 5,
        "telemetry__every": 0,
        "output": str(tmp_path / "two"),
    }
    (tmp_path / "settings.json").write_text(json.dumps([settings]))
    worker = Path(__file__).parent / "distributed_worker.py"
    command = [*torchrun(), str(worker), str(home), str(tmp_path / "settings.json")]
    variables = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env={**os.environ, **variables}, check=True, capture_output=True)
    train(tiny_recipe(home, **{**settings, "output": tmp_path / "one"}))
    runs = [records.read_run(tmp_path / name) for name in ("one", "two")]
    assert [run["processes"] for run in runs] == [1, 2]
    assert runs[0]["initial_model"] == runs[1]["initial_model"]
    losses = [
        [row["loss"] for row in records.read_metrics(tmp_path / name, "train")]
        for name in ("one", "two")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=2e-5) and len(losses[0]) == 5
