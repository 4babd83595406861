"""Transformers' generic heads on our decoder: sequences, tokens and answers are classified."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from hf_stable import (
    StableGPTForCausalLM,
    StableGPTForQuestionAnswering,
    StableGPTForSequenceClassification,
    StableGPTForTokenClassification,
    StableGPTModel,
)
from hf_stable import model as exported

from ..alignment import place
from .models import PRESETS, make, make_config, prompt

KINDS = {
    AutoModelForSequenceClassification: StableGPTForSequenceClassification,
    AutoModelForTokenClassification: StableGPTForTokenClassification,
    AutoModelForQuestionAnswering: StableGPTForQuestionAnswering,
}
each_kind = pytest.mark.parametrize("auto, kind", KINDS.items(), ids=lambda each: each.__name__)
each_preset = pytest.mark.parametrize("preset", PRESETS)


def _labels(kind: type) -> dict[str, torch.Tensor]:
    return {
        StableGPTForSequenceClassification: {"labels": torch.tensor([0, 2])},
        StableGPTForTokenClassification: {"labels": prompt() % 3},
        StableGPTForQuestionAnswering: {
            "start_positions": torch.tensor([0, 1]),
            "end_positions": torch.tensor([2, 4]),
        },
    }[kind]


def _scores(output) -> torch.Tensor:
    if "start_logits" in output:
        return torch.stack((output.start_logits, output.end_logits), dim=-1)
    return output.logits


@each_kind
@each_preset
def test_a_head_trains_saves_and_loads(preset: str, auto, kind, tmp_path) -> None:
    model = make(preset, kind, num_labels=3)
    shapes = {
        StableGPTForSequenceClassification: (2, 3),
        StableGPTForTokenClassification: (2, 5, 3),
        StableGPTForQuestionAnswering: (2, 5, 2),
    }
    output = model(prompt(), **_labels(kind))
    assert _scores(output).shape == shapes[kind]
    output.loss.backward()
    assert all((each.grad != 0).any() for name, each in model.named_parameters() if each.ndim == 2)
    model.save_pretrained(tmp_path)
    loaded = place(auto.from_pretrained(tmp_path))
    assert type(loaded) is kind and loaded.config.num_labels == 3
    assert torch.equal(_scores(loaded(prompt())), _scores(model(prompt())))


@each_kind
@each_preset
def test_a_head_goes_onto_a_pretrained_decoder(preset: str, auto, kind, tmp_path) -> None:
    language_model = make(preset)
    language_model.save_pretrained(tmp_path)
    model, info = auto.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert {name.split(".")[0] for name in info["missing_keys"]} <= {"score", "qa_outputs"}
    assert set(info["unexpected_keys"]) == {"lm_head.weight"}
    hidden = model.model(prompt()).last_hidden_state
    assert torch.equal(hidden, language_model.model(prompt()).last_hidden_state)
    assert all(each.isfinite().all() for each in model.parameters())


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sequence_is_read_at_its_last_token(side: str) -> None:
    model = make("baseline", StableGPTForSequenceClassification, num_labels=3)
    plain = model(prompt()).logits
    padding = (2, 0) if side == "left" else (0, 2)
    padded = torch.nn.functional.pad(prompt(), padding, value=0)
    mask = (padded != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(logits, plain, atol=1e-5, rtol=1e-5)


def test_a_batch_without_a_padding_id_is_refused() -> None:
    model = make("baseline", StableGPTForSequenceClassification, pad_token_id=None)
    with pytest.raises(ValueError, match="padding token"):
        model(prompt())
    assert model(prompt(1)).logits.shape == (1, 2)


@pytest.mark.parametrize(
    "problem, labels, num_labels",
    [
        ("regression", torch.tensor([0.5, -1.0]), 1),
        ("single_label_classification", torch.tensor([1, 2]), 3),
        ("multi_label_classification", torch.tensor([[1.0, 0, 1], [0, 1, 0]]), 3),
    ],
)
def test_kinds_of_problems(problem: str, labels: torch.Tensor, num_labels: int) -> None:
    model = make(
        "baseline",
        StableGPTForSequenceClassification,
        problem_type=problem,
        num_labels=num_labels,
    )
    output = model(prompt(), labels=labels)
    logits = output.logits
    expected = {
        "regression": lambda: torch.nn.functional.mse_loss(logits.squeeze(), labels),
        "single_label_classification": lambda: torch.nn.functional.cross_entropy(logits, labels),
        "multi_label_classification": lambda: torch.nn.functional.binary_cross_entropy_with_logits(
            logits, labels
        ),
    }[problem]()
    torch.testing.assert_close(output.loss, expected)


def test_dropout_of_the_token_head_is_a_field_that_is_kept(tmp_path) -> None:
    model = make("baseline", StableGPTForTokenClassification, classifier_dropout=0.0)
    assert model.dropout.p == 0.0
    assert torch.equal(model.train()(prompt()).logits, model.eval()(prompt()).logits)
    model.save_pretrained(tmp_path)
    assert StableGPTForTokenClassification.from_pretrained(tmp_path).dropout.p == 0.0
    assert make("baseline", StableGPTForTokenClassification).dropout.p == 0.1


def test_sigma_reparam_folds_and_follows_in_a_head_too() -> None:
    model = make("sigma_reparam", StableGPTForSequenceClassification, num_labels=3)
    before = model(prompt()).logits
    folded = model.fold_sigma_reparam()
    torch.testing.assert_close(folded(prompt()).logits, before, atol=1e-5, rtol=1e-5)
    assert not folded.config.sigma_reparam


def test_auto_classes_know_every_head() -> None:
    config = make_config("baseline")
    for auto, kind in {**KINDS, AutoModel: StableGPTModel}.items():
        assert type(auto.from_config(config)) is kind
    assert not any(kind.can_generate() for kind in KINDS.values())
    assert StableGPTForCausalLM.can_generate()


# Where hf_stable cannot be imported, and the code comes with the weights.
_ELSEWHERE = """
import sys
sys.modules["hf_stable"] = None
import torch, transformers
from safetensors.torch import save_file
for auto in sys.argv[1:]:
    model = getattr(transformers, auto).from_pretrained(auto, trust_remote_code=True)
    output = model(torch.arange(1, 6)[None])
    scores = output.start_logits if "start_logits" in output else output.logits
    save_file({"scores": scores.detach().clone()}, auto + "/scores.safetensors")
"""


def test_heads_load_with_nothing_but_transformers(tmp_path) -> None:
    """The generic heads build their decoder by AutoModel, which knows nothing of remote code."""
    models = {auto.__name__: make("qk_norm_cap", kind) for auto, kind in KINDS.items()}
    for name, model in models.items():
        folder = tmp_path / name
        model.save_pretrained(folder)
        for file in Path(exported.__file__).parent.glob("*_stable_gpt.py"):
            shutil.copyfile(file, folder / file.name)
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] = {
            "AutoConfig": "configuration_stable_gpt.StableGPTConfig",
            name: f"modeling_stable_gpt.{type(model).__name__}",
        }
        (folder / "config.json").write_text(json.dumps(config))
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", _ELSEWHERE, *models]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True)
    for name, model in models.items():
        output = model(torch.arange(1, 6)[None])
        expected = output.start_logits if "start_logits" in output else output.logits
        assert torch.equal(load_file(tmp_path / name / "scores.safetensors")["scores"], expected)
