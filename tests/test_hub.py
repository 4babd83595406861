"""Export: a folder that needs nothing but Transformers, proven in a process of its own."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hf_stable import StableGPTConfig
from hf_stable.card import leaks, problems
from hf_stable.card.rendering import PICTURE
from hf_stable.errors import CheckpointError
from hf_stable.hub import check_export, export
from hf_stable.records import read_metrics
from hf_stable.training import train

from .techniques import GEOMETRY, from_config
from .tiny import byte_tokenizer
from .training import tiny_recipe

ROOT = Path(__file__).parents[1]


def _saved(folder: Path, preset: str) -> Path:
    """A saved model whose every parameter has moved, with a tokenizer of its vocabulary."""
    tokenizer = byte_tokenizer()
    fields = {**GEOMETRY, "vocab_size": len(tokenizer)}
    model = from_config(StableGPTConfig.from_preset(preset, **fields)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.power_iterate(1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("preset", ["qkv_norm", "soft_clip", "sigma_reparam"])
def test_export_is_bit_equal_without_hf_stable(preset: str, tmp_path: Path) -> None:
    folder = export(_saved(tmp_path / "model", preset), tmp_path / "export")
    check_export(folder, new_tokens=3)
    files = {path.name for path in folder.iterdir()}
    assert files == {
        "LICENSE", "README.md", "config.json", "generation_config.json", "model.safetensors",
        "blocks_stable_gpt.py", "configuration_stable_gpt.py", "functional_stable_gpt.py",
        "loss_stable_gpt.py",
        "modeling_stable_gpt.py", "parallel_stable_gpt.py",
        "sigma_stable_gpt.py", "slots_stable_gpt.py", "tokenizer.json", "tokenizer_config.json",
        "watch_stable_gpt.py",
    }  # fmt: skip
    assert set(json.loads((folder / "config.json").read_text())["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
    }


def test_a_run_exports_with_a_card_and_its_records(tmp_path: Path) -> None:
    """Equal to the run's own but for secrets and places, and written a second time alike."""
    result = train(tiny_recipe(tmp_path))
    run = json.loads((result.folder / "run.json").read_text())
    planted = {**run, "device": f"{run['device']} " + "hf_" + "a" * 30}
    (result.folder / "run.json").write_text(json.dumps(planted))
    folder = export(result.folder, tmp_path / "export")
    check_export(folder)  # asks for more tokens than this model has positions
    card = (folder / "README.md").read_text()
    assert f"{result.validation_perplexity:.4f} per token" in card and "step 20" in card
    assert problems(ModelCard(card).data.to_dict()) == []
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert f"]({PICTURE})" in card and (folder / PICTURE).is_file()
    record = (folder / "records" / "run.json").read_text()
    assert leaks(card) == leaks(record) == [] and str(tmp_path) not in card + record
    assert json.loads(record)["recipe"]["optimizer"] == run["recipe"]["optimizer"]
    lines = gzip.decompress((folder / "records" / "metrics.jsonl.gz").read_bytes()).decode()
    assert [json.loads(line) for line in lines.splitlines()] == read_metrics(result.folder)
    again = export(result.folder, tmp_path / "again")
    for name in ("README.md", PICTURE, "records/run.json", "records/metrics.jsonl.gz"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_a_checkpoint_on_the_way_exports_without_claims_of_the_end(tmp_path: Path) -> None:
    result = train(tiny_recipe(tmp_path, training__checkpoint_every=10, output=tmp_path / "run"))
    shutil.rmtree(result.folder / "model")
    folder = export(result.folder, tmp_path / "export", step=10)
    check_export(folder, new_tokens=3)
    assert f"{result.validation_perplexity:.2f}" not in (folder / "README.md").read_text()
    saved = load_file(result.folder / "checkpoints/step-00000010/model/model.safetensors")
    exported = load_file(folder / "model.safetensors")
    assert saved.keys() == exported.keys()
    assert all(torch.equal(saved[name], exported[name]) for name in saved)
    with pytest.raises(CheckpointError, match="no checkpoint of step 11; there are: 10, 20"):
        export(result.folder, tmp_path / "none", step=11)


def test_tampered_code_is_noticed(tmp_path: Path) -> None:
    folder = export(_saved(tmp_path / "model", "baseline"), tmp_path / "export")
    code = folder / "blocks_stable_gpt.py"
    code.write_text(code.read_text().replace("self.scaling = ", "self.scaling = 2 * "))
    with pytest.raises(CheckpointError, match="logits differ from ours"):
        check_export(folder, new_tokens=1)
    code.write_text("raise RuntimeError('broken on purpose')\n")
    with pytest.raises(CheckpointError, match="broken on purpose"):
        check_export(folder, new_tokens=1)


def test_what_is_no_stable_gpt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no model"):
        export(tmp_path, tmp_path / "export")
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer()), hidden_size=16, intermediate_size=16,
        num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    byte_tokenizer().save_pretrained(tmp_path / "llama")
    with pytest.raises(CheckpointError, match="LlamaForCausalLM; only a StableGPT"):
        export(tmp_path / "llama", tmp_path / "export")
