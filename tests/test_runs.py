"""What a run leaves in its folder, and what a second start of it does."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers.utils import logging

from hf_stable import StableGPTForCausalLM
from hf_stable.runs import save_model

from .checkpoints.faults import calls_of, die_at
from .tiny import byte_tokenizer, stable_gpt


def run_of(folder: Path, model: StableGPTForCausalLM) -> Any:
    """As much of a run as writing its model needs."""
    return SimpleNamespace(
        folder=folder, model=model, tokenizer=byte_tokenizer(), accelerator=Accelerator(cpu=True)
    )


def test_a_killed_write_of_the_final_model_leaves_a_whole_one(tmp_path: Path, monkeypatch) -> None:
    """At every call: the model of before or the new one, never half of one and never none."""
    monkeypatch.setattr(logging, "_tqdm_active", False)  # its locks would be held in a fork
    before, after = stable_gpt(), stable_gpt()
    with torch.no_grad():
        after.lm_head.weight.add_(1.0)
    total = len(calls_of(partial(save_model, run_of(tmp_path / "whole", after))))
    assert total > 20
    seen = []
    for number in range(1, total + 1):
        folder = tmp_path / str(number)
        save_model(run_of(folder, before))
        assert die_at(partial(save_model, run_of(folder, after)), number)
        if not (folder / "model").exists():
            (folder / ".old-model").rename(folder / "model")  # as the next start does
        found = load_file(folder / "model" / "model.safetensors")["lm_head.weight"]
        seen.append(torch.equal(found, after.lm_head.weight))
        assert seen[-1] or torch.equal(found, before.lm_head.weight)
        assert {"config.json", "tokenizer.json"} < {
            path.name for path in (folder / "model").iterdir()
        }
        save_model(run_of(folder, after))
        assert [path.name for path in folder.iterdir()] == ["model"]
    assert seen == sorted(seen)
    assert set(seen) == {False, True}
