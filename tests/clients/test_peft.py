"""Laws of PEFT with a StableGPT: train, save, reload, merge."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_stable import StableGPTConfig

pytest.importorskip("peft")
from peft import LoraConfig, get_peft_model


def test_the_guide_trains_saves_reloads_and_merges(
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


SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 101,
    "max_position_embeddings": 64,
}
WRAPPERS: list[dict[str, Any]] = [
    {"trainable_token_indices": [3, 4]},
    {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    {"target_modules": ["lm_head"]},
    {"modules_to_save": ["lm_head"]},
    {"target_modules": ["embed_tokens", "qkv_proj"]},
]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("more", WRAPPERS, ids="-".join)
def test_what_wraps_the_head_trains_the_model_s_own_loss(more: dict[str, Any], tied: bool) -> None:
    """Fresh, an adapter changes nothing; trained and merged, it is the model that was trained."""
    if not tied and "ensure_weight_tying" in more:
        pytest.skip("nothing is tied")
    fields = {"final_logit_softcapping": 2.0, "z_loss": 0.01, "tie_word_embeddings": tied}
    config = StableGPTConfig(**SIZE, **fields)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for each in model.parameters():
            each.mul_(10)
    ids = torch.randint(2, 101, (2, 9))
    ids[0, :3] = 3
    count = torch.tensor(7)
    expected = [model(ids, labels=ids, num_items_in_batch=n) for n in (None, count)]
    lora = LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": "all-linear", **more})
    adapted: Any = get_peft_model(model, lora)
    for n, each in zip((None, count), expected, strict=True):
        found = adapted(input_ids=ids, labels=ids, num_items_in_batch=n)
        torch.testing.assert_close(found.loss, each.loss)
        torch.testing.assert_close(found.ce_loss, each.ce_loss)
        torch.testing.assert_close(found.z_loss, each.z_loss)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval()
    trained = adapted(input_ids=ids, labels=ids)
    assert trained.loss < expected[0].loss - 1e-4
    assert trained.logits.abs().max() <= 2.0
    if tied and "target_modules" in more:
        return  # a tied weight takes the adapter of one of its two uses, which PEFT warns of
    merged = adapted.merge_and_unload()(ids, labels=ids)
    torch.testing.assert_close(merged.logits, trained.logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(merged.loss, trained.loss, rtol=1e-4, atol=1e-4)
