"""A checkpoint that cannot be used gets one sentence that names the file; none is half loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from hf_stable.errors import CheckpointError, UserError
from hf_stable.evaluation import load_model, model_place, perplexity
from tests.tiny import TEXTS, byte_tokenizer, stable_gpt, tiny_llama


def save(model: PreTrainedModel, folder: Path, **options) -> Path:
    model.save_pretrained(folder, **options)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return save(tiny_llama(), tmp_path_factory.mktemp("good"))


@pytest.fixture
def folder(good, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(good, tmp_path / "model"))


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(path: str | Path) -> str:
    """The message, which is one line for the user and begins with the place."""
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert isinstance(caught.value, UserError)
    return message


@pytest.mark.parametrize("make_model", [tiny_llama, stable_gpt])
def test_a_saved_model_scores_as_before(make_model, tmp_path):
    model = make_model()
    loaded, tokenizer = load_model(save(model, tmp_path))
    assert not loaded.training
    expected = perplexity(model, byte_tokenizer(), TEXTS)
    assert perplexity(loaded.cpu(), tokenizer, TEXTS) == expected


def test_dtype_is_the_checkpoints_or_the_one_asked_for(tmp_path):
    folder = save(tiny_llama().to(torch.bfloat16), tmp_path)
    assert load_model(folder)[0].dtype == torch.bfloat16
    assert load_model(str(folder), dtype="float32")[0].dtype == torch.float32


def test_a_run_stands_for_the_model_in_it_once_it_has_one(tmp_path):
    (tmp_path / "run.json").touch()
    with pytest.raises(CheckpointError, match="has not finished"):
        model_place(str(tmp_path))
    (tmp_path / "model").mkdir()
    assert model_place(str(tmp_path)) == str(tmp_path / "model")
    assert model_place(str(tmp_path / "model")) == str(tmp_path / "model")
    assert model_place("owner/name") == "owner/name"
    (tmp_path / "config.json").touch()  # as Trainer saves it, beside WatchCallback's records
    assert model_place(str(tmp_path)) == str(tmp_path)


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "no weights (model.safetensors" in refused(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_safetensors(folder, kept):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert "model.safetensors: truncated or damaged" in refused(folder)


@pytest.mark.parametrize("kept", [0, 100, -100])
def test_truncated_pytorch_file(folder, kept):
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save(tiny_llama().state_dict(), file)
    load_model(folder)
    file.write_bytes(file.read_bytes()[:kept])
    assert "cannot be loaded as a causal language model" in refused(folder)


def test_shards_missing_truncated_or_not_listed(tmp_path):
    folder = save(tiny_llama(), tmp_path, max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    load_model(folder)
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-1])
    assert f"{shards[1].name}: truncated" in refused(folder)
    shards[1].unlink()
    assert f"{shards[1].name}: missing" in refused(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "not an index of weight files" in refused(folder)


def test_weights_that_lack_parameters_are_not_filled_with_random_numbers(folder):
    edit_config(folder, num_hidden_layers=3)
    message = refused(folder)
    assert "lack 9 parameters of a LlamaForCausalLM, such as model.layers.2" in message


def test_weights_of_other_shapes(folder):
    edit_config(folder, intermediate_size=25)
    assert "cannot be loaded as a causal language model" in refused(folder)


def test_no_folder_no_config_or_broken_config(folder, tmp_path):
    assert "found nothing there" in refused(tmp_path / "absent")
    assert "found a file" in refused(folder / "config.json")
    (folder / "config.json").write_text("{")
    assert "config.json: not readable as JSON" in refused(folder)
    (folder / "config.json").unlink()
    assert "no config.json there" in refused(folder)


def test_a_name_that_is_not_here_and_not_on_the_hub():
    assert "neither a local folder nor an available model" in refused("nobody/no-such-model")


def test_unknown_model_type_names_it_and_both_versions(folder):
    edit_config(folder, model_type="zork", transformers_version="99.1.0")
    message = refused(folder)
    assert "'zork'" in message
    assert "99.1.0" in message and transformers.__version__ in message


def test_fields_of_a_newer_version_are_not_ignored(folder):
    edit_config(folder, transformers_version="99.1.0")
    load_model(folder)  # nothing in it that this version does not know
    edit_config(folder, attention_fold=3)
    message = refused(folder)
    assert "would ignore attention_fold" in message and "99.1.0" in message


def test_unknown_field_of_a_stable_gpt(tmp_path):
    folder = save(stable_gpt(), tmp_path)
    edit_config(folder, qk_norn="head")
    assert "qk_norn" in refused(folder)


def test_wrong_type_of_a_field_names_the_field(folder):
    edit_config(folder, hidden_size="wide")
    assert "hidden_size" in refused(folder)


def test_not_a_causal_language_model(folder):
    (folder / "config.json").unlink()
    transformers.T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2).save_pretrained(folder)
    assert "cannot be loaded as a causal language model" in refused(folder)


def test_missing_or_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    assert "no usable tokenizer" in refused(folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "no usable tokenizer" in refused(folder)
