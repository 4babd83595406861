"""Laws of transformers.Trainer with a StableGPT: our groups, and no loss without its z-loss."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_stable.errors import UserError
from hf_stable.trainers import StableTrainer
from tests.tiny import VOCAB_SIZE, stable_gpt, tiny_llama


def arguments(folder: Path, **fields: Any) -> TrainingArguments:
    shared: dict[str, Any] = {
        "max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True,
        "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-3, "weight_decay": 0.1,
    }  # fmt: skip
    return TrainingArguments(str(folder), **{**shared, **fields})


@pytest.fixture
def dataset() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(VOCAB_SIZE, (8, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.fixture
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="z_loss")
        yield


def test_the_guide_trains(
    lines: Callable[[str, str], str], tmp_path: Path, dataset: list, no_warning: None
) -> None:
    model = stable_gpt(z_loss=0.1, layer_scale=0.1, sigma_reparam=True)
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    scope = {"model": model, "arguments": arguments(tmp_path), "dataset": dataset}
    exec(lines("transformers.Trainer", "python"), scope)
    assert not torch.equal(before, model.model.layers[0].mlp.up_proj.weight)


def test_no_vector_is_decayed_and_mup_rates_are_read(tmp_path: Path, dataset: list) -> None:
    model = stable_gpt(layer_scale=0.1, sigma_reparam=True, mup_base_width=4)
    trainer = StableTrainer(model=model, args=arguments(tmp_path), train_dataset=dataset)
    groups = {group["name"]: group for group in trainer.create_optimizer().param_groups}
    decay = {
        name: groups[kind]["weight_decay"]
        for kind in groups
        for name, parameter in model.named_parameters()
        if any(parameter is each for each in groups[kind]["params"])
    }
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert decay[name] == (0.1 if parameter.ndim > 1 else 0.0), name
    assert groups["matrices"]["lr"] == pytest.approx(1e-3 * 4 / 16)
    assert groups["vectors"]["lr"] == 1e-3
    assert groups["vectors"]["betas"] == (0.9, 0.999)  # of TrainingArguments


def test_an_optimizer_with_groups_of_its_own_is_refused(tmp_path: Path, dataset: list) -> None:
    model = stable_gpt()
    data: Any = dataset
    own = {"params": list(model.parameters())}
    for choice in ((torch.optim.AdamW, own), (lambda: None, {})):
        trainer = StableTrainer(
            model=model,
            args=arguments(tmp_path),
            train_dataset=data,
            optimizer_cls_and_kwargs=choice,  # pyright: ignore[reportArgumentType]
        )
        with pytest.raises(UserError, match=r"own parameter groups.*adamw_torch"):
            trainer.create_optimizer()


def test_label_smoothing_is_refused_of_a_compiled_model_too(tmp_path: Path, dataset: list) -> None:
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    settings = arguments(tmp_path, label_smoothing_factor=0.1, **compiled)
    data: Any = dataset
    trainer = StableTrainer(model=stable_gpt(z_loss=0.1), args=settings, train_dataset=data)
    with pytest.raises(UserError, match=r"z_loss=0\.1.*label_smoothing_factor"):
        trainer.train()


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_label_smoothing_is_refused_or_warned_of_where_z_loss_would_be_lost(
    z_loss: float, tmp_path: Path, dataset: list
) -> None:
    smoothing = arguments(tmp_path, label_smoothing_factor=0.1)
    data: Any = dataset
    ours = StableTrainer(model=stable_gpt(z_loss=z_loss), args=smoothing, train_dataset=data)
    theirs = Trainer(model=stable_gpt(z_loss=z_loss), args=smoothing, train_dataset=data)
    if z_loss:
        with pytest.raises(UserError, match=r"z_loss=0\.1.*label_smoothing_factor"):
            ours.train()
        with pytest.warns(UserWarning, match=r"z_loss=0\.1 is no part of this training"):
            theirs.train()
    else:
        assert ours.train().global_step == theirs.train().global_step == 2


def test_the_loss_is_plain_trainers_where_that_asks_the_model(
    tmp_path: Path, dataset: list, no_warning: None
) -> None:
    found = []
    for kind in (Trainer, StableTrainer):
        data: Any = dataset
        settings = arguments(tmp_path, gradient_accumulation_steps=2, max_steps=1)
        trainer = kind(model=stable_gpt(z_loss=0.1), args=settings, train_dataset=data)
        trainer.train()
        found.append(trainer.state.log_history[0]["loss"])
    assert found[0] == found[1]


def test_another_familys_model_trains_too(tmp_path: Path, dataset: list) -> None:
    data: Any = dataset
    trainer = StableTrainer(model=tiny_llama(), args=arguments(tmp_path), train_dataset=data)
    assert trainer.train().global_step == 2


@pytest.mark.parametrize("through", ["decoder", "logits", "loss"])
def test_a_loss_outside_the_model_is_warned_of_once(through: str) -> None:
    model = stable_gpt(z_loss=0.1)
    ids = torch.arange(12)[None]

    def step() -> None:
        if through == "decoder":
            model.model(ids).last_hidden_state.sum().backward()
        elif through == "logits":
            model(ids).logits.sum().backward()
        else:
            model(ids, labels=ids).loss.backward()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            step()
        with torch.no_grad():
            model(ids)
        model.eval()(ids)
        model.eval()(ids)
    told = [each for each in caught if "z_loss=0.1 is no part" in str(each.message)]
    assert len(told) == (0 if through == "loss" else 1)
