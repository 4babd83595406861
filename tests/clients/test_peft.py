"""Laws of PEFT with a StableGPT: train, save, reload, merge."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("peft")


def test_the_readme_trains_saves_reloads_and_merges(
    lines: Callable[[str, str], str], folder: Path
) -> None:
    ids = torch.arange(24).reshape(2, 12)

    def train(adapted: Any) -> None:
        optimizer = torch.optim.AdamW(
            [each for each in adapted.parameters() if each.requires_grad], lr=1e-2
        )
        for _ in range(2):
            adapted(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        adapted.eval()

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        before = model.eval()(ids).logits
    scope: dict[str, Any] = {"model": model.train(), "train": train}
    exec(lines("PEFT", "python"), scope)
    with torch.no_grad():
        adapted = scope["adapted"](input_ids=ids).logits
        merged = scope["merged"].eval()(ids).logits
    assert (adapted - before).abs().max() > 1e-3
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    assert not [name for name, _ in scope["merged"].named_parameters() if "lora" in name]
    merged_names = {name for name, _ in scope["merged"].named_parameters()}
    assert merged_names == {
        name for name, _ in AutoModelForCausalLM.from_pretrained(folder).named_parameters()
    }
    adapted_maps = scope["adapted"].peft_config["default"].target_modules
    assert {name.rpartition(".")[2] for name in adapted_maps} == {
        "qkv_proj", "o_proj", "up_proj", "down_proj",
    }  # fmt: skip
