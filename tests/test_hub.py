"""Export: a folder that needs nothing but Transformers, proven in a process of its own."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_stable import StableGPTConfig
from hf_stable.errors import CheckpointError
from hf_stable.hub import check_export, export
from hf_stable.training import train

from .techniques import GEOMETRY, from_config
from .tiny import byte_tokenizer
from .training import tiny_recipe


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
        "README.md", "config.json", "generation_config.json", "model.safetensors",
        "blocks_stable_gpt.py", "configuration_stable_gpt.py", "functional_stable_gpt.py",
        "loss_stable_gpt.py",
        "modeling_stable_gpt.py",
        "sigma_stable_gpt.py", "slots_stable_gpt.py", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert set(json.loads((folder / "config.json").read_text())["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
    }


def test_a_run_exports_with_a_card_from_its_records(tmp_path: Path) -> None:
    result = train(tiny_recipe(tmp_path))
    folder = export(result.folder, tmp_path / "export")
    check_export(folder)  # asks for more tokens than this model has positions
    card = (folder / "README.md").read_text()
    assert f"{result.validation_perplexity:.2f} per token after 20 steps" in card
    assert "recipe: tiny" in card and card.startswith("---\nlibrary_name: transformers")


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
