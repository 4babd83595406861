"""Laws of TRL with a StableGPT: its z-loss is in the loss, or its absence is told."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from tests.tiny import TEXTS

trl = pytest.importorskip("trl")

from hf_stable.trainers.trl import StableDPOTrainer, StableSFTTrainer  # noqa: E402

PAIRS = {
    "prompt": ["To be, or not", "The quick"],
    "chosen": [" to be", " brown fox"],
    "rejected": [" too", " lazy dog jumps"],
}


def config(kind: Any, **fields: Any) -> Any:
    shared = {
        "max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True,
        "bf16": False, "save_strategy": "no", "logging_steps": 1, "max_length": 32,
    }  # fmt: skip
    return kind("out", **{**shared, **fields})


def sft(kind: Any, model: Any, **fields: Any) -> Any:
    data = Dataset.from_dict({"text": TEXTS})
    return kind(model, args=config(trl.SFTConfig, **fields), train_dataset=data)


def test_the_guide_trains_two_steps_each_from_a_path(
    lines: Callable[[str, str], str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    for kind in (StableSFTTrainer, StableDPOTrainer):
        original = kind.train

        def train(self: Any, original: Any = original) -> Any:
            result = original(self)
            trained.append((type(self).__name__, result.global_step, result.training_loss))
            return result

        monkeypatch.setattr(kind, "train", train)
    scope = {
        "sft_config": config(trl.SFTConfig),
        "texts": Dataset.from_dict({"text": TEXTS}),
        "dpo_config": config(trl.DPOConfig),
        "pairs": Dataset.from_dict(PAIRS),
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="z_loss")
        exec(lines("TRL", "python"), scope)
    assert [each[:2] for each in trained] == [("StableSFTTrainer", 2), ("StableDPOTrainer", 2)]
    assert all(torch.tensor(each[2]).isfinite() for each in trained)


@pytest.mark.parametrize("items", [None, 50])
@pytest.mark.parametrize("lora", [False, True])
def test_the_sft_loss_and_its_gradient_are_the_models_own(
    items: int | None, lora: bool, folder: Path
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    if lora:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    trainer = sft(StableSFTTrainer, model)
    batch = next(iter(trainer.get_train_dataloader()))
    count = None if items is None else torch.tensor(items)

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))

    model.train()
    ours = trainer.compute_loss(model, dict(batch), num_items_in_batch=count)
    own = model(**batch, num_items_in_batch=count)
    torch.testing.assert_close(ours, own.loss, rtol=1e-5, atol=1e-5)
    assert own.z_loss > 0.1 * own.ce_loss  # and is no rounding error
    for mine, theirs in zip(gradients(ours), gradients(own.loss), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_step_of_accumulated_batches_has_the_loss_of_all_its_tokens(folder: Path) -> None:
    fields = {"gradient_accumulation_steps": 3, "max_steps": 1, "learning_rate": 0.0}
    trainer = sft(StableSFTTrainer, str(folder), **fields)
    trainer.train()
    batches = list(trainer.get_train_dataloader())
    assert len(batches) == 3
    total = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    model: Any = AutoModelForCausalLM.from_pretrained(folder).train()
    own = sum(model(**batch, num_items_in_batch=total).loss.item() for batch in batches)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(own, rel=1e-5)


def test_dpo_gets_the_z_loss_of_the_tokens_that_it_scores(folder: Path) -> None:
    data = Dataset.from_dict(PAIRS)
    losses = {}
    for kind in (trl.DPOTrainer, StableDPOTrainer):
        trainer = kind(str(folder), args=config(trl.DPOConfig), train_dataset=data)
        batch = next(iter(trainer.get_train_dataloader()))
        losses[kind] = trainer.compute_loss(trainer.model.train(), dict(batch)).item()
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    model: Any = AutoModelForCausalLM.from_pretrained(folder).train()
    own = model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels)
    assert own.z_loss > 0.1
    added = losses[StableDPOTrainer] - losses[trl.DPOTrainer]
    assert added == pytest.approx(own.z_loss.item(), rel=1e-4)


def test_evaluation_is_trls_own_cross_entropy(folder: Path) -> None:
    trainer = sft(StableSFTTrainer, str(folder))
    data = Dataset.from_dict({"text": TEXTS[:2]})
    found = trainer.evaluate(data)["eval_loss"]
    batch = next(iter(trainer.get_eval_dataloader(trainer._prepare_dataset(
        data, trainer.processing_class, trainer.args, False, None, "eval"
    ))))  # fmt: skip
    with torch.no_grad():
        own: Any = trainer.model.eval()(**batch)
    assert found == pytest.approx(own.ce_loss.item(), rel=1e-4)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_trls_own_trainer_warns_when_z_loss_is_lost(z_loss: float, folder: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, z_loss=z_loss)
    trainer = sft(trl.SFTTrainer, model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    told = [each for each in caught if "StableSFTTrainer" in str(each.message)]
    assert len(told) == (1 if z_loss else 0)


def test_a_loss_that_z_loss_cannot_follow_is_refused(folder: Path) -> None:
    trainer = sft(StableSFTTrainer, str(folder), label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"z_loss=0\.1.*label_smoothing_factor"):
        trainer.train()


def test_compiled_scoring_is_refused_for_it_may_leave_z_loss_out(folder: Path) -> None:
    """A graph of an earlier training, with another z-loss, may be taken again."""
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    trainer = sft(StableSFTTrainer, str(folder), **compiled)
    with pytest.raises(ValueError, match=r"z_loss=0\.1.*torch_compile"):
        trainer.train()
